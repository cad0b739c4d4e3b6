"""A frozen linear layer whose weight is held in some format. See op.py."""

from rankshift.ops.frozen_linear.op import frozen_linear

__all__ = ["frozen_linear"]
