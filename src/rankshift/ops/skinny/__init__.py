"""Products of a large matrix with narrow ones, and narrow ones copied together: op.py runs, reference.py means."""

from rankshift.ops.skinny.op import down_back, gains, pack, up_gradient, weight_gradient

__all__ = ["down_back", "gains", "pack", "up_gradient", "weight_gradient"]
