"""The LoRA linear layer as the paper writes it, and its gradients by hand. Tests hold the fast form to this."""

from __future__ import annotations

from torch import Tensor


def lora_linear(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + s (x Aᵀ) Bᵀ + bias.  x (…, in), weight (out, in), A (r, in), B (out, r) → (…, out)."""
    y = x @ weight.t() + scale * (x @ A.t()) @ B.t()
    return y if bias is None else y + bias


def gradients(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dA, dB) through the dense gradient G = dyᵀ x:  dA = s Bᵀ G,  dB = s G Aᵀ,  dx = dy (W + s B A)."""
    G = dy.flatten(0, -2).t() @ x.flatten(0, -2)  # (out, in)
    return dy @ (weight + scale * B @ A), scale * B.t() @ G, scale * G @ A.t()
