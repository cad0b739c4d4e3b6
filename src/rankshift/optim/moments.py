"""How an average over gradients is held between steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rankshift.core import shard


class Store(Protocol):
    """Where a tensor of a state is kept, under one name or several."""

    def init(self, name: str, shape: tuple[int, ...], like: Tensor, split: bool) -> dict[str, Tensor]:
        """Zeros of this (whole) shape. ``split``: along axis 0 over ranks, as the parameter ``like`` is."""
        ...

    def read(self, state: dict[str, Tensor], name: str) -> Tensor:
        """The part held on this rank, in fp32 or wider; may be changed before it is written."""
        ...

    def write(self, state: dict[str, Tensor], name: str, value: Tensor) -> None:
        """Keep ``value``, of the shape that was read."""
        ...


@dataclass(frozen=True)
class Wide:
    """As it is: fp32, or float64 for a float64 parameter."""

    def init(self, name: str, shape: tuple[int, ...], like: Tensor, split: bool) -> dict[str, Tensor]:
        dtype = torch.promote_types(like.dtype, torch.float32)
        return {name: shard.zeros(shape, like, dtype, split)}

    def read(self, state: dict[str, Tensor], name: str) -> Tensor:
        return shard.held(state[name])

    def write(self, state: dict[str, Tensor], name: str, value: Tensor) -> None:
        here = shard.held(state[name])
        if here is not value and here.data_ptr() != value.data_ptr():
            here.copy_(value)
