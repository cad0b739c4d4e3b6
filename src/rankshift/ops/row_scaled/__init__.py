"""A weight out of codes in 8 bits with a scale for each row: op.py runs, reference.py says what it means."""

from rankshift.ops.row_scaled.op import row_scaled

__all__ = ["row_scaled"]
