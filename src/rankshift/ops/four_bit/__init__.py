"""Weights out of 4 bits: op.py runs, reference.py says what the bits mean."""

from rankshift.ops.four_bit.op import dequantised, levels_on, merged
from rankshift.ops.four_bit.reference import NESTED

__all__ = ["NESTED", "dequantised", "levels_on", "merged"]
