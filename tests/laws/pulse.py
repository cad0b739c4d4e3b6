"""Pulse: LoRA with one event at each moment. No paper: it carries every kind of load before the methods move in.

WINDOW    λ ← 1 + amplitude · (step mod 3): the branch's scale, a function of the step alone
GRADS     half of the rank slots, keyed by site and step, get no gradient
UPDATED   every ``every`` steps W ← W + λ s B A, A drawn anew, B and the moments of both zeroed
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankshift.core import shard
from rankshift.core.adapter import Adapter
from rankshift.core.base import Base
from rankshift.core.event import Event, Moment, Tick
from rankshift.core.method import _REGISTRY, Method
from rankshift.core.random import Key, permutation
from rankshift.core.site import Spec
from rankshift.methods import lora_init
from rankshift.methods.lora import LoRA, LoRALayer


class PulseLayer(LoRALayer):
    """y = W x + λ s·B(A x)."""

    lam: Tensor  # (), what WINDOW sets: not saved, the step determines it
    folds: Tensor  # (), int64, how often this site was folded: saved, nothing else determines it

    def __init__(self, base: Base, spec: Spec, rank: int, scale: float, config: LoRA):
        super().__init__(base, spec, rank, scale, config)
        self.register_buffer("lam", torch.ones((), dtype=spec.master, device=spec.device), persistent=False)
        self.register_buffer("folds", torch.zeros((), dtype=torch.int64, device=spec.device))

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        return A, self.lam * B


@dataclass(frozen=True)
class Swell:
    """λ ← 1 + amplitude · (step mod 3)."""

    amplitude: float
    moment: ClassVar[Moment] = Moment.WINDOW

    def due(self, tick: Tick) -> bool:
        return self.amplitude != 0

    def apply(self, adapter: Adapter, tick: Tick) -> None:
        assert isinstance(adapter, PulseLayer)
        adapter.lam.fill_(1 + self.amplitude * (tick.step % 3))


@dataclass(frozen=True)
class Mask:
    """A keyed part of the rank slots gets no gradient."""

    share: float
    moment: ClassVar[Moment] = Moment.GRADS

    def due(self, tick: Tick) -> bool:
        return self.share > 0

    def apply(self, adapter: Adapter, tick: Tick) -> None:
        assert isinstance(adapter, PulseLayer)
        r = adapter.rank
        shut = permutation(tick.key(adapter.site, "mask"), r)[: int(r * self.share)]
        keep = torch.ones(r, dtype=adapter.A.dtype, device=adapter.A.device).index_fill_(
            0, shut.to(adapter.A.device), 0
        )
        assert adapter.A.grad is not None
        assert adapter.B.grad is not None
        part, held = shard.local(adapter.A.grad)  # slots are the rows of A: this rank may hold some of them only
        part.mul_(keep[held, None])
        shard.local(adapter.B.grad)[0].mul_(keep)


@dataclass(frozen=True)
class Fold:
    """W ← W + λ s B A; A drawn anew; B and the moments zero."""

    every: float
    moment: ClassVar[Moment] = Moment.UPDATED

    def due(self, tick: Tick) -> bool:
        return math.isfinite(self.every) and (tick.step + 1) % self.every == 0

    def apply(self, adapter: Adapter, tick: Tick) -> None:
        assert isinstance(adapter, PulseLayer)
        change = adapter.whole_delta()
        adapter.base.add_(lambda rows: change[..., rows, :])
        A, B = lora_init.kaiming(tick.key(adapter.site), adapter.out_features, adapter.in_features, adapter.rank)
        shard.assign_(adapter.A, A.to(adapter.A))
        shard.assign_(adapter.B, B.to(adapter.B))
        for factor in (adapter.A, adapter.B):
            for moment in tick.state(factor).values():
                shard.local(moment)[0].zero_()
        adapter.folds += 1


@dataclass(frozen=True, kw_only=True)
class Pulse(LoRA):
    """See the file's head."""

    name: ClassVar[str] = "pulse"
    reversible: ClassVar[bool] = False  # it rewrites the base

    amplitude: float = 0.25
    portion: float = 0.5
    every: float = 2.0

    def adapt(self, base: Base, spec: Spec, rank: int, shared: Any = None) -> Adapter:
        return PulseLayer(base, spec, rank, self.scale_at(spec.name, rank), self)

    def start(self, adapter: Adapter, key: Key, found: Any = None) -> None:
        super().start(adapter, key, found)
        assert isinstance(adapter, PulseLayer)
        adapter.lam.fill_(1)
        adapter.folds.zero_()

    def events(self) -> tuple[Event, ...]:
        return (Swell(self.amplitude), Mask(self.portion), Fold(self.every))


_REGISTRY.pop(Pulse.name)  # defining it registered it; it is no method of the library's


@contextmanager
def registered(*methods: Method) -> Iterator[None]:
    """These methods' classes in the registry for a while, so that their runs can be saved and restored."""
    before = dict(_REGISTRY)
    _REGISTRY.update({type(m).name: type(m) for m in methods})
    try:
        yield
    finally:
        _REGISTRY.clear()
        _REGISTRY.update(before)
