"""The equations in plain torch. Tests hold the kernels to this. In fp32, or in fp64 if the tensors are."""

from __future__ import annotations

import torch
from torch import Tensor

Low = tuple[Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]


def rotate_(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, low: tuple[Low | None, Low | None, Low | None], head: int
) -> None:
    """Each tensor plus its Z Bᵀ; then every head (a, b) of q and k ← (a cos − b sin, b cos + a sin)."""
    for tensor, term, turns in zip((q, k, v), low, (True, True, False), strict=True):
        value = _wide(tensor)
        if term is not None:
            value = value + _wide(term[0]) @ _wide(term[1]).t()
        if turns:
            value = _turned(value.view(len(tensor), -1, head), cos, sin).flatten(1)
        tensor.copy_(value)


def rotate_back(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, out: Three) -> None:
    """Every head turned the other way, and put where its token's row is."""
    for tensor, to, turns in zip((dq, dk, dv), out, (True, True, False), strict=True):
        value = _wide(tensor).transpose(1, 2).flatten(0, 1)  # (T, H, D)
        to.copy_((_turned(value, cos, -sin) if turns else value).flatten(1))


def _turned(value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(T, H, D); row t by row t % T' of the first halves of cos and sin."""
    half = value.shape[2] // 2
    times = len(value) // len(cos)
    c, s = (_wide(table[:, :half]).repeat(times, 1)[:, None] for table in (cos, sin))
    a, b = value[..., :half], value[..., half:]
    return torch.cat((a * c - b * s, b * c + a * s), 2)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
