"""The equations in plain torch. Tests hold the kernels to this.

Sums are in fp32, or in fp64 if the tensors are; what is returned is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Low = tuple[Tensor, Tensor]


def norm(
    x: Tensor, weight: Tensor, eps: float, offset: float, y: Tensor | None, low: Low | None, gain: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x₂ = x + y + Z Bᵀ; ρ = (mean(x₂²) + ε)^-½; n = x₂ ρ (offset + w). Returns x₂, n, ρ."""
    if y is not None:
        x = add(x, y, low, gain)
    value = _wide(x)
    rstd = torch.rsqrt(value.square().mean(1) + eps)
    return x, (value * rstd[:, None] * (offset + weight.to(value.dtype))).to(x.dtype), rstd


def norm_back(
    dn: Tensor, x2: Tensor, rstd: Tensor, weight: Tensor, offset: float, low: Low | None, residual: Tensor | None,
    more: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """g = (Σ dn + S A)(offset + w); dx = residual + ρ (g − x₂ ρ² mean(g x₂))."""
    g, value, rstd = sum(map(_wide, more), _wide(dn)), _wide(x2), rstd[:, None]
    if low is not None:
        g = g + _wide(low[0]) @ _wide(low[1])
    g = g * (offset + weight.to(g.dtype))
    dx = rstd * (g - value * rstd.square() * (g * value).mean(1, keepdim=True))
    return (dx if residual is None else residual + dx).to(dn.dtype)


def add(x: Tensor, y: Tensor, low: Low | None, gain: Tensor | None = None) -> Tensor:
    """x + y + Z Bᵀ, or x + c (y + Z Bᵀ) + b."""
    return (_wide(x) + gained(whole(y, low), gain)).to(x.dtype)


def add_back(dx: Tensor, y: Tensor, low: Low | None, gain: Tensor) -> tuple[Tensor, Tensor]:
    """c dx, and ρ Σₜ dx (y + Z Bᵀ)."""
    value = _wide(dx)
    return (gain[0] * value).to(dx.dtype), gain[-1] * (value * whole(y, low)).sum(0)


def whole(y: Tensor, low: Low | None) -> Tensor:
    """y + Z Bᵀ, in fp32 or wider."""
    return _wide(y) if low is None else _wide(y) + _wide(low[0]) @ _wide(low[1]).t()


def gained(value: Tensor, gain: Tensor | None) -> Tensor:
    """c · value + b; the value where there is no gain."""
    if gain is None:
        return value
    return gain[0] * value if len(gain) == 2 else gain[0] * value + gain[1]


def pick(
    x: Tensor, channels: Tensor, rstd: Tensor | None, weight: Tensor | None, offset: float, scale: float
) -> Tensor:
    """x[:, channels], with ρ and w as in ``norm``, times scale."""
    value = _wide(x.index_select(1, channels))
    if rstd is not None and weight is not None:
        value = value * rstd[:, None] * (offset + weight[channels].to(value.dtype))
    return (value * scale).to(x.dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
