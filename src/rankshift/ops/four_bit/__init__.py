"""Weights out of 4 bits: op.py runs, reference.py says what the bits mean."""

from rankshift.ops.four_bit.op import dequantised

__all__ = ["dequantised"]
