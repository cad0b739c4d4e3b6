"""Numbers in 8 bits as floating point, e4m3, and their products: op.py runs, reference.py says what it means."""

from rankshift.ops.fp8.op import E4M3, check, product, rounded_rows, rounded_whole

__all__ = ["E4M3", "check", "product", "rounded_rows", "rounded_whole"]
