"""RMSNorm with the residual sum before it, either way: op.py runs, reference.py says what it means."""

from rankshift.ops.rms_norm.op import add, add_back, norm, norm_back, pick

__all__ = ["add", "add_back", "norm", "norm_back", "pick"]
