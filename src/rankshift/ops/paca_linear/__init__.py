"""A layer some of whose weight's columns train where they stand."""

from rankshift.ops.paca_linear.op import paca_conv, paca_linear

__all__ = ["paca_conv", "paca_linear"]
