"""Heads of q and k normed before they are rotated, either way: op.py runs, reference.py says what it means."""

from rankshift.ops.head_norm.op import norm_rotate_, norm_rotate_back

__all__ = ["norm_rotate_", "norm_rotate_back"]
