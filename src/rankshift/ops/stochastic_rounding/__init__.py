"""fp32 numbers rounded at random into tensors of 16 bits: op.py runs, reference.py says what it means."""

from rankshift.ops.stochastic_rounding.op import fits, round_

__all__ = ["fits", "round_"]
