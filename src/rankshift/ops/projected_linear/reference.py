"""The projected gradient of a linear layer, through the whole gradient. Tests hold the fast form to this."""

from __future__ import annotations

from torch import Tensor


def gradients(x: Tensor, weight: Tensor, Q: Tensor, dy: Tensor, on_input: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dX, G): G = dyᵀ x (out, in); dX = G Q (out, r) with Q (in, r), or Gᵀ Q (in, r) with Q (out, r)."""
    rows = dy.reshape(-1, dy.shape[-1])
    G = rows.t() @ x.reshape(-1, x.shape[-1])
    return dy @ weight, (G if on_input else G.t()) @ Q, G
