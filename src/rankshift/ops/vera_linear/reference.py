"""The VeRA linear layer as the paper writes it, and its gradients by hand. Tests hold the fast form to this."""

from __future__ import annotations

from torch import Tensor


def vera_linear(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y = x Wᵀ + b ⊙ ((d ⊙ (x Aᵀ)) Bᵀ) + bias.  x (…, in), weight (out, in), A (r, in), B (out, r) → (…, out)."""
    y = x @ weight.t() + b * ((d * (x @ A.t())) @ B.t())
    return y if bias is None else y + bias


def gradients(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dd, db), token by token: db = Σ dy ⊙ v and dd = Σ u ⊙ (Bᵀ (b ⊙ dy)) with u = A x, v = B (d ⊙ u)."""
    u = x.flatten(0, -2) @ A.t()
    dy = dy.flatten(0, -2)
    below = (b * dy) @ B  # (tokens, r)
    dx = dy @ weight + (d * below) @ A
    return dx.view(x.shape), (u * below).sum(0), (dy * ((d * u) @ B.t())).sum(0)
