"""The PaCA layer as the paper writes it, and its gradients by hand. Tests hold the fast form to this."""

from __future__ import annotations

from torch import Tensor


def paca_linear(
    x: Tensor, weight: Tensor, D: Tensor, columns: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """y = x W'ᵀ + bias, W' = W but for W'[:, I] = W[:, I] + s D.  x (…, in), weight (out, in), D (out, r), I (r,)."""
    y = x @ weight.index_add(1, columns, scale * D).t()
    return y if bias is None else y + bias


def gradients(
    x: Tensor, weight: Tensor, D: Tensor, columns: Tensor, scale: float, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dD, dbias) through the dense gradient G = dyᵀ x:  dx = dy W',  dD = s G[:, I]."""
    rows = dy.reshape(-1, dy.shape[-1])
    G = rows.t() @ x.reshape(-1, x.shape[-1])  # (out, in)
    return dy @ weight.index_add(1, columns, scale * D), scale * G[:, columns], rows.sum(0)
