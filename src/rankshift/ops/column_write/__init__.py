"""Columns of many weights written at once: op.py runs, reference.py says what it means."""

from rankshift.ops.column_write.op import Layer, fits, write_

__all__ = ["Layer", "fits", "write_"]
