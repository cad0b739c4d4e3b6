"""How a weight of 16 bits takes a step that is smaller than the distance to the next number it can be.

"nearest"     computed in fp32 and rounded once: what is below half that distance is lost
"stochastic"  up or down at random, with the exact value as expectation
"master"      rounded from a copy in fp32 that the optimizer keeps: 4 bytes a number
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import EllipsisType
from typing import Literal

import torch
from torch import Tensor

from rankshift.core import shard
from rankshift.core.random import Key, dither, stochastic
from rankshift.ops.stochastic_rounding import fits, round_

Rounding = Literal["nearest", "stochastic", "master"]

Rows = slice | EllipsisType  # of what is held here: some of axis 0, or all

ROUNDINGS: tuple[str, ...] = ("nearest", "stochastic", "master")


_TOGETHER = 1 << 24  # numbers that are rounded at once


def pieces(tensor: Tensor, size: int) -> list[Rows]:
    """What this rank holds of a tensor in pieces of about ``size`` numbers, or less; 256 rows and multiples of that."""
    here = shard.held(tensor)
    if here.numel() <= size:
        return [...]
    rows = max(256, size // math.prod(here.shape[1:]) // 256 * 256)
    return [slice(start, min(start + rows, here.shape[0])) for start in range(0, here.shape[0], rows)]


def offset(rows: Rows) -> int:
    """The first of them."""
    return 0 if rows is ... else rows.start


def narrow(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype are rounded in a step: bf16 and fp16."""
    return dtype.is_floating_point and torch.finfo(dtype).bits < 32


def init(p: Tensor, how: Rounding) -> dict[str, Tensor]:
    """What a state needs for it, beside "key" and "step": the master, split over ranks as the weight is."""
    return {"master": p.detach().to(torch.float32)} if how == "master" and narrow(p.dtype) else {}


def opened(p: Tensor, state: dict[str, Tensor], rows: Rows = ...) -> Tensor:
    """The part of a weight held here in fp32 or wider, to be changed in place and given to :func:`close`."""
    here = shard.held(p)[rows]
    if not narrow(here.dtype):
        return here
    if "master" not in state:
        return here.to(torch.float32)
    master = shard.held(state["master"])[rows]
    moved = master.to(here.dtype) != here  # by others since the last step: a weight that was loaded is not taken back
    return master.copy_(torch.where(moved, here, master))


def opened_together(ps: Sequence[Tensor], states: Sequence[dict[str, Tensor]], pieces: Sequence[Rows]) -> list[Tensor]:
    """:func:`opened` of several, with one launch for those that are copied."""
    found: list[Tensor] = []
    narrowed: list[Tensor] = []
    copies: list[Tensor] = []
    for p, state, rows in zip(ps, states, pieces, strict=True):
        here = shard.held(p)[rows]
        if narrow(here.dtype) and "master" not in state:
            narrowed.append(here)
            copies.append(torch.empty_like(here, dtype=torch.float32))
            found.append(copies[-1])
        else:
            found.append(opened(p, state, rows))
    if copies:
        torch._foreach_copy_(copies, narrowed)
    return found


def close_together(
    ps: Sequence[Tensor],
    values: Sequence[Tensor],
    states: Sequence[dict[str, Tensor]],
    how: Rounding,
    pieces: Sequence[Rows],
) -> None:
    """:func:`close` of several, with one launch where they are rounded to the nearest."""
    if how == "stochastic":
        for p, value, state, rows in zip(ps, values, states, pieces, strict=True):
            close(p, value, state, how, rows)
        return
    pairs = [(shard.held(p)[rows], value) for p, value, rows in zip(ps, values, pieces, strict=True)]
    copied = [(here, value) for here, value in pairs if here.data_ptr() != value.data_ptr()]
    if copied:
        torch._foreach_copy_([here for here, _ in copied], [value for _, value in copied])


def word(state: dict[str, Tensor]) -> int:
    """Of the noise by which a weight is rounded at random in the step that ``state`` has just counted."""
    return (Key(int(state["key"])) / "weight" / int(state["step"])).word


def close(p: Tensor, value: Tensor, state: dict[str, Tensor], how: Rounding, rows: Rows = ...) -> None:
    """Put what :func:`opened` gave, and was changed, back into the weight."""
    here, held = shard.local(p)
    here = here[rows]
    if here.data_ptr() == value.data_ptr():
        return
    if how != "stochastic":
        here.copy_(value)
        return
    noisy = word(state)
    if fits(here, value):
        round_(here, value, noisy, (held.start + offset(rows)) * math.prod(here.shape[1:]))
        return
    for piece in pieces(here, _TOGETHER):
        part = here[piece]
        first = (held.start + offset(rows) + offset(piece)) * math.prod(here.shape[1:])
        noise = dither(noisy, part.numel(), first, part.device).reshape(part.shape)
        part.copy_(stochastic(value[piece], part.dtype, noise))
