"""The VeRA linear layer: op.py runs, reference.py says what it means."""

from rankshift.ops.vera_linear.op import vera_linear

__all__ = ["vera_linear"]
