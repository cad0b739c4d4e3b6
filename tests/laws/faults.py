"""Methods that are wrong on purpose, one fault each. Every law must raise on the one made for it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from laws.pulse import Fold, Pulse, PulseLayer
from rankshift.core import shard
from rankshift.core.adapter import Adapter
from rankshift.core.base import Base
from rankshift.core.event import Event, Moment, Tick
from rankshift.core.form import Form
from rankshift.core.method import _REGISTRY
from rankshift.core.random import Key
from rankshift.core.site import Spec
from rankshift.methods.galore import GaLore
from rankshift.methods.lora import LoRA, LoRALayer
from rankshift.optim import Adam, Hyper
from rankshift.optim.project import Clock, Project


@dataclass(frozen=True)
class Do:
    """An event that calls a function of this file on every adapter, every step."""

    what: Callable[[Adapter, Tick], None]
    moment: Moment = Moment.UPDATED

    def due(self, tick: Tick) -> bool:
        return True

    def apply(self, adapter: Adapter, tick: Tick) -> None:
        self.what(adapter, tick)


@dataclass(frozen=True, kw_only=True)
class Faulty(LoRA):
    """LoRA with the fault that ``fault`` names."""

    name: ClassVar[str] = "faulty"
    rank: int = 4
    alpha: float = 8.0
    fault: str = ""

    def events(self) -> tuple[Event, ...]:
        what = _EVENTS.get(self.fault)
        return (Do(*what) if isinstance(what, tuple) else Do(what),) if what else ()

    def adapt(self, base: Base, spec: Spec, rank: int, shared: Any = None) -> Adapter:
        kind = _LAYERS.get(self.fault, LoRALayer)
        return kind(base, spec, rank, self.scale_at(spec.name, rank), self)

    def rank_at(self, name: str, found: Any = None) -> Any:
        rank = super().rank_at(name, found)
        return np.int64(rank) if self.fault == "rank that JSON does not know" else rank

    @torch.no_grad()
    def start(self, adapter: Adapter, key: Key, found: Any = None) -> None:
        super().start(adapter, key, found)
        assert isinstance(adapter, LoRALayer)
        if self.fault == "starts from the global generator":
            adapter.A.normal_()
        if self.fault == "starts elsewhere":
            adapter.B.fill_(1e-6)
        if isinstance(adapter, Sized):
            adapter.extra.zero_()
        if isinstance(adapter, Unsaved):
            adapter.factor.fill_(1.5)

    def transform(self, name: str, tensor: Tensor, spec: Spec | None, leaf: str) -> Any:
        return LateKey() if self.fault == "transform invents a key" else None


_REGISTRY.pop(Faulty.name)


# ---- events


def _remembers(adapter: Adapter, tick: Tick) -> None:
    """Counts in a plain attribute, which nothing saves."""
    count = adapter.__dict__["count"] = adapter.__dict__.get("count", 0) + 1
    shard.local(adapter.B)[0].mul_(1 + 0.01 * count)  # type: ignore[arg-type]


def _draws(adapter: Adapter, tick: Tick) -> None:
    part, _ = shard.local(adapter.B)  # type: ignore[arg-type]
    part.add_(torch.randn_like(part), alpha=1e-3)


def _numpy(adapter: Adapter, tick: Tick) -> None:
    np.random.rand()


def _python(adapter: Adapter, tick: Tick) -> None:
    random.random()


def _thinks_its_part_is_all(adapter: Adapter, tick: Tick) -> None:
    """Shrinks the first rows of what is held here, as if that were the whole."""
    shard.local(adapter.B)[0][:2].mul_(0.5)  # type: ignore[arg-type]


def _behind_the_back(adapter: Adapter, tick: Tick) -> None:
    """Writes into the base without add_."""
    shard.local(adapter.weight)[0].add_(1e-3)


def _flips(adapter: Adapter, tick: Tick) -> None:
    adapter.A.requires_grad_(tick.step % 2 == 0)  # type: ignore[union-attr]


def _new_parameter(adapter: Adapter, tick: Tick) -> None:
    adapter.b = nn.Parameter(torch.zeros(adapter.out_features))


def _new_key(adapter: Adapter, tick: Tick) -> None:
    if tick.step:
        tick.state(adapter.B)["age"] = torch.zeros(())  # type: ignore[arg-type]


def _new_tensor(adapter: Adapter, tick: Tick) -> None:
    state = tick.state(adapter.B)  # type: ignore[arg-type]
    state["exp_avg"] = state["exp_avg"] * 0.5


def _swaps_data(adapter: Adapter, tick: Tick) -> None:
    adapter.B.data = adapter.B.data.clone()  # type: ignore[union-attr]


def _into_the_codes(adapter: Adapter, tick: Tick) -> None:
    adapter.base.codes.bitwise_xor_(1)


_EVENTS: dict[str, Any] = {
    "remembers in an attribute": _remembers,
    "event draws from torch": _draws,
    "event draws from numpy": _numpy,
    "event draws from Python": _python,
    "thinks its part is all": _thinks_its_part_is_all,
    "writes behind the back": _behind_the_back,
    "writes into the codes": _into_the_codes,
    "flips what trains": (_flips, Moment.WINDOW),
    "adds a parameter": _new_parameter,
    "adds a key": _new_key,
    "replaces a moment": _new_tensor,
    "replaces data": _swaps_data,
}


# ---- adapters


class WrongDelta(LoRALayer):
    def delta(self, rows: slice = slice(None)) -> Tensor:
        return 1.001 * super().delta(rows)


class WrongRows(LoRALayer):
    """delta(rows) is right only for all rows."""

    def delta(self, rows: slice = slice(None)) -> Tensor:
        part = super().delta(rows)
        return part if rows == slice(None) else part.flip(-2)


class WrongFactors(LoRALayer):
    def low_rank(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        return A.detach(), B.detach()


class Louder(LoRALayer):
    """Its forward is more than its factors say."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.base.linear(x)
        return y + 1.1 * (super().forward(x) - y)


class Hoards(LoRALayer):
    """Keeps another copy of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 1.0 + (x.sin() if x.is_floating_point() else 0) * 0.0)


class Deaf(LoRALayer):
    """A trains and is not in the graph."""

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A.detach(), self.B


class Sized(LoRALayer):
    """A tensor whose size is not the rank's but that of how many were made before."""

    made: ClassVar[list[int]] = []

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.made.append(1)
        self.extra = nn.Parameter(torch.empty(len(self.made)), requires_grad=False)


class Unsaved(LoRALayer):
    """A factor of the equation in a buffer that is not saved and that no step determines."""

    factor: Tensor

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.register_buffer("factor", torch.ones(()), persistent=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        return A, self.factor.to(B.dtype) * B


class WrongStack(LoRALayer):
    """delta is right only where there is one matrix."""

    def delta(self, rows: slice = slice(None)) -> Tensor:
        return (1.001 if self.form.stacked else 1) * super().delta(rows)


class Stays(LoRALayer):
    """Puts something into the base when it enters, and leaves it there."""

    def enter(self) -> None:
        if not self.base.storage:
            return
        shard.local(self.weight)[0].add_(1e-6)


_LAYERS: dict[str, type[LoRALayer]] = {
    "delta of a stack": WrongStack,
    "stays in the base": Stays,
    "delta is not forward": WrongDelta,
    "rows of delta": WrongRows,
    "low_rank is not delta": WrongFactors,
    "louder than its factors": Louder,
    "keeps more": Hoards,
    "deaf": Deaf,
    "shape from elsewhere": Sized,
    "unsaved buffer": Unsaved,
}


# ---- a transform


@dataclass(frozen=True)
class LateKey(Adam):
    """Adam that makes a state tensor in its step."""

    def step(self, parameters: Any, gradients: Any, states: Any, hyper: Hyper) -> None:
        super().step(parameters, gradients, states, hyper)
        for state in states:
            state.setdefault("late", torch.zeros(()))


@dataclass(frozen=True)
class Wandering(Project):
    """A projection that renews its basis in every update, with the fault that ``fault`` names."""

    fault: str = ""

    def _move(self, p: Any, state: Any, old: Any, new: Any, rank: int, hyper: Hyper) -> None:
        before = state["exp_avg"]
        super()._move(p, state, old, new, rank, hyper)
        if self.fault == "moves at every renewal":
            state["exp_avg"] = state["exp_avg"].clone()
        if self.fault == "keeps what it freed" and state["exp_avg"].numel() < before.numel():
            state["exp_avg"] = before.view(-1)[: state["exp_avg"].numel()].view_as(state["exp_avg"])
        if self.fault == "another shape":
            state["energy"] = state["energy"].reshape(1)


@dataclass(frozen=True, kw_only=True)
class Unsettled(GaLore):
    """GaLore, or AdaRankGrad where ``energy`` says so, with a state that does not stay where it is."""

    name: ClassVar[str] = "unsettled"
    fault: str = ""
    energy: float | None = None

    def project(self, form: Form) -> Project:
        return Wandering(
            rank=self.rank,
            energy=self.energy,
            clock=Clock(1, stagger=False),
            transport="square",
            form=form,
            fault=self.fault,
        )


_REGISTRY.pop(Unsettled.name)


# ---- the pulse with a fault


@dataclass(frozen=True)
class FoldAndKeep(Fold):
    """Folds and forgets to zero B: the change counts twice."""

    def apply(self, adapter: Adapter, tick: Tick) -> None:
        assert isinstance(adapter, PulseLayer)
        change = adapter.whole_delta()
        adapter.base.add_(lambda rows: change[..., rows, :])


@dataclass(frozen=True, kw_only=True)
class FaultyPulse(Pulse):
    """Pulse that folds wrongly, or whose dose of zero is not zero."""

    name: ClassVar[str] = "faulty-pulse"
    rank: int = 4
    alpha: float = 8.0
    every: float = 2.0
    forget: bool = field(default=False)
    residue: float = 0.0

    def events(self) -> tuple[Event, ...]:
        fold = FoldAndKeep(self.every) if self.forget else Fold(self.every)
        return (Do(_residue, Moment.WINDOW), fold) if self.residue else (fold,)


def _residue(adapter: Adapter, tick: Tick) -> None:
    assert isinstance(adapter, PulseLayer)
    adapter.lam.fill_(1 + 1e-6)


_REGISTRY.pop(FaultyPulse.name)
