"""The frozen linear layer written out. Tests hold the fast form to this."""

from __future__ import annotations

from torch import Tensor


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + bias.  x (…, in), weight (out, in) → (…, out); its gradient is dy W."""
    y = x @ weight.t()
    return y if bias is None else y + bias
