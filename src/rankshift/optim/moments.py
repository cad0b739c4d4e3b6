"""How an average over gradients is held between steps: as it is, or in 8 bits.

8 bits as in bitsandbytes (Dettmers et al. 2022, arXiv 2110.02861): one code and, for each block, the largest magnitude
(absmax) in fp32; a code stands for a number of the dynamic map times absmax. What differs: a number between two of
the map's becomes the one or the other at random, so that its expectation is the number itself. Rounded to the nearest,
β2 v (0.1 % below v) is v again wherever two codes lie further apart than that, which is nearly everywhere: a second
moment could rise and hardly fall. And a positive second moment is never rounded to 0, which would divide by ε.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rankshift.core import shard
from rankshift.core.errors import ConfigError
from rankshift.core.random import Key, dither
from rankshift.optim.rounding import Rows, offset

_CALLED = {  # what only some rules keep; there is nothing to say of the rest
    "pace": "what convergence is measured against",
    "limit": "the norm that bounds the residual's growth",
    "master": "the fp32 copy of the weight",
}


class Store(Protocol):
    """Where a tensor of a state is kept, under one name or several."""

    def init(self, name: str, shape: tuple[int, ...], like: Tensor, split: bool) -> dict[str, Tensor]:
        """Zeros of this (whole) shape. ``split``: along axis 0 over ranks, as the parameter ``like`` is."""
        ...

    def read(self, state: dict[str, Tensor], name: str, rows: Rows = ...) -> Tensor:
        """The part held on this rank, or of that some rows, from a multiple of 256 on; in fp32 or wider. It may be
        changed before it is written."""
        ...

    def check(self, shape: tuple[int, ...], like: Tensor) -> None:
        """Raise ConfigError if this shape cannot be split along axis 0 as ``like`` is."""
        ...

    def write(self, state: dict[str, Tensor], name: str, value: Tensor, rows: Rows = ...) -> None:
        """Keep ``value``, of the shape that was read. What is random follows from the state's "key" and "step"."""
        ...


@dataclass(frozen=True)
class Wide:
    """As it is: fp32, or float64 for a float64 parameter."""

    def init(self, name: str, shape: tuple[int, ...], like: Tensor, split: bool) -> dict[str, Tensor]:
        dtype = torch.promote_types(like.dtype, torch.float32)
        if shape == like.shape and not shard.is_sharded(like):  # in its order in memory, which fused kernels go by
            return {name: torch.zeros_like(like, dtype=dtype, memory_format=torch.preserve_format)}
        return {name: shard.zeros(shape, like, dtype, split)}

    def check(self, shape: tuple[int, ...], like: Tensor) -> None:
        pass

    def read(self, state: dict[str, Tensor], name: str, rows: Rows = ...) -> Tensor:
        return shard.held(state[name])[rows]

    def write(self, state: dict[str, Tensor], name: str, value: Tensor, rows: Rows = ...) -> None:
        here = shard.held(state[name])[rows]
        if here is not value and here.data_ptr() != value.data_ptr():
            here.copy_(value)


@dataclass(frozen=True)
class Blocks:
    """8 bits in blocks. Averages of squares, whose names end in "_sq", have the map without signs.

    A block never crosses axis 0 without need, so that rows can be sharded. With w numbers in an entry of axis 0: for
    w ≥ 256 each entry has ⌈w/256⌉ blocks, the last one shorter; for w < 256 a block is as many entries as a power of
    two lets fit. Bytes of a moment of n numbers: n + 4·blocks, which is n (1 + 4/256) where w is a power of two or a
    multiple of 256, and for other w at most n (1 + 4/128) + 4.

    What would not gain from it is as in :class:`Wide`: parameters of fewer than ``least`` numbers, as in bitsandbytes,
    and vectors. That goes by the parameter, so it stays when the rank changes.
    """

    size: int = 256
    least: int = 4096

    def init(self, name: str, shape: tuple[int, ...], like: Tensor, split: bool) -> dict[str, Tensor]:
        if not self._holds(like):
            return Wide().init(name, shape, like, split)
        width = math.prod(shape[1:])
        dtype = torch.promote_types(like.dtype, torch.float32)
        if width >= self.size:
            blocks: tuple[int, ...] = (shape[0], -(-width // self.size))
        else:
            blocks = (-(-shape[0] // self._rows(width)),)
        if split:
            self.check(shape, like)
        state = {name: shard.zeros(shape, like, torch.uint8, split)}
        state[f"{name}_absmax"] = shard.zeros(blocks, like, dtype, split)
        return state

    def check(self, shape: tuple[int, ...], like: Tensor) -> None:
        width, here = math.prod(shape[1:]), shard.share(like)
        if not self._holds(like) or width >= self.size or here == like.shape[0] or here % self._rows(width) == 0:
            return
        raise ConfigError(
            f"8-bit moments of shape {tuple(shape)} are kept in blocks of {self._rows(width)} rows, and a rank holds "
            f"{here} of the {shape[0]} rows. Use a larger rank (for ranks that adapt, a larger min_rank or multiple: "
            f'from {self.size // (here & -here)} on it fits), another number of ranks, or moments="float32".'
        )

    def read(self, state: dict[str, Tensor], name: str, rows: Rows = ...) -> Tensor:
        if f"{name}_absmax" not in state:
            return Wide().read(state, name, rows)
        codes, absmax = shard.held(state[name])[rows], self._absmax(state, name, rows)
        blocks = self._blocks(decode(codes, name.endswith("_sq"), absmax.dtype))
        blocks = blocks * absmax.reshape(blocks.shape[:2])[..., None]
        return _joined(blocks, codes.shape)

    def write(self, state: dict[str, Tensor], name: str, value: Tensor, rows: Rows = ...) -> None:
        if f"{name}_absmax" not in state:
            Wide().write(state, name, value, rows)
            return
        codes, held = shard.local(state[name])
        codes, absmax, unsigned = codes[rows], self._absmax(state, name, rows), name.endswith("_sq")
        blocks = self._blocks(value)
        most = blocks.abs().amax(-1)
        absmax.copy_(most.reshape(absmax.shape))
        scaled = blocks / most.clamp(min=torch.finfo(most.dtype).tiny)[..., None]
        word = (Key(int(state["key"])) / name / int(state["step"])).word
        first = (held.start + offset(rows)) * math.prod(codes.shape[1:])
        noise = dither(word, codes.numel(), first, codes.device).reshape(codes.shape)
        codes.copy_(encode(_joined(scaled, codes.shape), unsigned, noise))

    def _absmax(self, state: dict[str, Tensor], name: str, rows: Rows) -> Tensor:
        """Those of some rows."""
        absmax, width = shard.held(state[f"{name}_absmax"]), math.prod(state[name].shape[1:])
        if rows is ...:
            return absmax
        each = 1 if width >= self.size else self._rows(width)
        return absmax[rows.start // each : -(-rows.stop // each)]

    def _holds(self, like: Tensor) -> bool:
        """Whether moments of such a parameter are kept in 8 bits."""
        return like.dim() > 1 and like.numel() >= self.least

    def _rows(self, width: int) -> int:
        """Entries of axis 0 in a block, for width < size: a power of two."""
        return 1 << ((self.size // max(1, width)).bit_length() - 1)

    def _blocks(self, values: Tensor) -> Tensor:
        """(lines, blocks, size) of a tensor, each line padded with zeros at its end; a view where none are needed."""
        n, width = values.shape[0], math.prod(values.shape[1:])
        size = self.size if width >= self.size else self._rows(width) * width
        lines = values.reshape((n, width) if width >= self.size else (1, n * width))
        blocks = -(-lines.shape[1] // size)
        return F.pad(lines, (0, blocks * size - lines.shape[1])).reshape(lines.shape[0], blocks, size)


def adopt(
    store: Store,
    saved: dict[str, Tensor],
    fresh: dict[str, Tensor],
    shape: tuple[int, ...],
    like: Tensor,
    split: bool,
) -> list[str]:
    """Fill a new state, whose moments have this shape and are in ``store``, from one whose moments may be in another.

    Returns:
        What else is in only one of the two, in words.

    Raises:
        ConfigError: a shape does not fit; nothing was filled.
    """
    held: dict[str, Store] = {}
    for name in ("exp_avg", "exp_avg_sq"):
        for other in (store, Wide(), Blocks()):
            promised = other.init(name, shape, like, split)
            beside = (f"{name}_absmax" in saved) == (f"{name}_absmax" in promised)
            if beside and all(k in saved and _alike(saved[k], value) for k, value in promised.items()):
                held[name] = other
                break
        else:
            found = tuple(saved[name].shape) if name in saved else "missing"
            raise ConfigError(f"its {name} is {found} and would be {shape}.")
    rest = [name for name in fresh if not name.startswith("exp_avg")]
    for name in rest:
        if name in saved and saved[name].shape != fresh[name].shape:
            raise ConfigError(f"its {name} is {tuple(saved[name].shape)} and would be {tuple(fresh[name].shape)}.")
    for name in rest:
        if name in saved:
            fresh[name].copy_(saved[name])
    for name, other in held.items():
        if other is store:
            for key in store.init(name, shape, like, split):  # as it is, to the bit
                fresh[key].copy_(saved[key])
        else:
            store.write(fresh, name, other.read(saved, name).to(shard.held(fresh[name]).device))
    left = [name for name in saved if name not in fresh and not name.startswith("exp_avg")]
    new = [name for name in rest if name not in saved]
    return [f"{_CALLED[name]} begins anew" for name in new if name in _CALLED] + [
        f"{_CALLED[name]} is left behind" for name in left if name in _CALLED
    ]


def _alike(saved: Tensor, promised: Tensor) -> bool:
    return saved.shape == promised.shape and saved.is_floating_point() == promised.is_floating_point()


def encode(values: Tensor, unsigned: bool, noise: Tensor) -> Tensor:
    """Codes (uint8) of numbers in [−1, 1], or [0, 1] without signs.

    Args:
        noise: int32 of the shape of ``values``, uniform in 0 … 2¹⁶ − 1: which of the two neighbouring codes is taken.
            Half of 2¹⁶ everywhere takes the nearest.
    """
    known = _map(unsigned, values.dtype, values.device)
    below = torch.bucketize(values.contiguous(), known, out_int32=True, right=True).sub_(1).clamp_(0, len(known) - 2)
    share = (values - known[below]).mul_((2.0**16 / known.diff())[below])
    codes = below.add_(share.sub_(0.5) > noise)
    return (codes.clamp_(min=(values > 0).int()) if unsigned else codes).to(torch.uint8)


def decode(codes: Tensor, unsigned: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that codes stand for, in units of absmax."""
    return _map(unsigned, dtype, codes.device)[codes.int()]


@functools.cache
def _map(unsigned: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The 256 numbers of bitsandbytes' dynamic map, ascending: 0, 1, and the middles of the equal parts into which each
    decade from 10⁻⁶ to 1 is cut, twice as many as the one below. With signs the lowest is −1, where bitsandbytes has
    −0.993: the largest magnitude of a block is kept exactly, whatever its sign."""
    found = [0.0, 1.0]
    for i in range(7):
        parts = 2 ** (i + 1) if unsigned else 2**i
        edges = torch.linspace(0.1, 1, parts + 1, dtype=torch.float64, device="cpu")
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)).tolist()
        found += middles if unsigned else [*middles, *(-x for x in middles)]
    found.sort()
    if not unsigned:
        found[0] = -1.0
    return torch.tensor(found, dtype=dtype, device=device)


def _joined(blocks: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of cutting a tensor of this shape into blocks."""
    lines = blocks.flatten(1)
    return lines[:, : shape.numel() // max(1, lines.shape[0])].reshape(shape)
