"""LoRA linear layers of one input as the paper writes them. Tests hold the fast form to this."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rankshift.ops.lora_linear.reference import lora_linear


def sibling_lora(x: Tensor, layers: Sequence[tuple[Tensor, Tensor, Tensor, float, Tensor | None]]) -> list[Tensor]:
    """y_i = x W_iᵀ + s_i (x A_iᵀ) B_iᵀ + bias_i of layers given as (W, A, B, s, bias).  x (…, in) → (…, out_i)."""
    return [lora_linear(x, *layer) for layer in layers]
