"""A linear layer whose weight gradient is projected as it is formed: op.py runs, reference.py says what it means."""

from rankshift.ops.projected_linear.op import Listener, projected_linear

__all__ = ["Listener", "projected_linear"]
