"""LoRA linear layers that read one input: op.py runs, reference.py says what it means."""

from rankshift.ops.sibling_lora.op import down, up

__all__ = ["down", "up"]
