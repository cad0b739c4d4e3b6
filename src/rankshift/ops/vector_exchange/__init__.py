"""Vectors of two factors exchanged for candidates, and their counterparts held, in many layers at once: op.py runs,
reference.py says what it means."""

from rankshift.ops.vector_exchange.lend import lend, take_back
from rankshift.ops.vector_exchange.op import described, fits, hold_, plain, sent, swap_

__all__ = ["described", "fits", "hold_", "lend", "plain", "sent", "swap_", "take_back"]
