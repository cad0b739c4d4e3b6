"""A linear layer with a block-diagonal low-rank branch: op.py runs, reference.py says what it means."""

from rankshift.ops.block_lora_linear.op import block_lora_linear
from rankshift.ops.block_lora_linear.reference import block_diagonal

__all__ = ["block_diagonal", "block_lora_linear"]
