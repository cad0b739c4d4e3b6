"""The LoRA linear layer: op.py runs, reference.py says what it means, order.py chooses the order of multiplication."""

from rankshift.ops.lora_linear.op import lora_linear

__all__ = ["lora_linear"]
