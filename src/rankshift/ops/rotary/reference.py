"""The equations in plain torch. Tests hold the kernels to this. In fp32, or in fp64 if the tensors are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankshift.ops.rms_norm.reference import gained, whole

Low = tuple[Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]


def rotate_(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, low: tuple[Low | None, Low | None, Low | None],
    head: int, gain: Tensor | None = None,
) -> None:  # fmt: skip
    """Each tensor plus its Z Bᵀ, with its gain; then every head (a, b) of q and k ← (a cos − b sin, b cos + a sin)."""
    gains = _apart(gain, (q, k, v))
    for tensor, term, one, turns in zip((q, k, v), low, gains, (True, True, False), strict=True):
        value = gained(whole(tensor, term), one)
        if turns:
            value = turned(value.view(len(tensor), -1, head), cos, sin).flatten(1)
        tensor.copy_(value)


def rotate_back(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, out: Three, of: Three | None = None,
    gain: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Every head turned the other way, times c, and put where its token's row is; ρ/c Σₜ dy (y − b)."""
    sums = []
    whose: Sequence[Tensor | None] = (None,) * 3 if of is None else of
    for tensor, to, y, one, turns in zip(
        (dq, dk, dv), out, whose, _apart(gain, out), (True, True, False), strict=True
    ):  # fmt: skip
        value = wide(tensor).transpose(1, 2).flatten(0, 1)  # (T, H, D)
        d = (turned(value, cos, -sin) if turns else value).flatten(1)
        if y is not None and one is not None:
            before = (unturned(wide(y).view_as(value), cos, sin) if turns else wide(y).view_as(value)).flatten(1)
            c, rho = one[0], one[-1]
            sums.append((d * (before if len(one) == 2 else before - one[1])).sum(0) * torch.where(c == 0, 0, rho / c))
            d = d * c
        to.copy_(d)
    return torch.cat(sums) if sums else None


def _apart(gain: Tensor | None, of: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The gain of each."""
    return (None,) * len(of) if gain is None else gain.split_with_sizes([x.shape[1] for x in of], 1)


def turned(value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(T, H, D); row t by row t % T' of the first halves of cos and sin."""
    half = value.shape[2] // 2
    times = len(value) // len(cos)
    c, s = (wide(table[:, :half]).repeat(times, 1)[:, None] for table in (cos, sin))
    a, b = value[..., :half], value[..., half:]
    return torch.cat((a * c - b * s, b * c + a * s), 2)


def unturned(value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What ``turned`` made this of: cos and sin are rounded, and what they turn they stretch."""
    half = value.shape[2] // 2
    stretch = (wide(cos[:, :half]).square() + wide(sin[:, :half]).square()).repeat(len(value) // len(cos), 2)
    return turned(value, cos, -sin) / stretch[:, None]


def wide(tensor: Tensor) -> Tensor:
    """In fp32, or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
