"""Rotary positions with the low-rank terms of q, k and v, either way: op.py runs, reference.py says what it means."""

from rankshift.ops.rotary.op import rotate_, rotate_back

__all__ = ["rotate_", "rotate_back"]
