"""PreLoRA: full training until it has partly converged, then low-rank. Krishuthapa et al. 2025, arXiv 2509.21619.

    full    every weight trains; at the end of every window of m updates, of each target: N = ‖W‖_F; L: mean loss
            converged, if over the last k windows  |ΔL| / L ≤ ζ  and in every family of layers  mean |ΔN| / N < τ
    joint   y = W x + s·B(A x): adapters come beside the weights, of ranks by how much each layer still moves
                v = (δ − min δ) / (max δ − min δ) within its family, δ its last |ΔN| / N
                r = r_min·2^(⌈v·Λ⌉ − 1), r_min where v = 0;  Λ = log₂(r_max / r_min) + 1
            and all train, for so many updates
    frozen  the adapted layers stand still; adapters, and everything that has none, train to the end

The function is that of before at both changes, and so are the moments of all that goes on training. Only the frozen
part is cheaper: the joint one needs more memory than full training, and is the peak of the run.

The paper's text was not to be had; this is its released code's algorithm, but for what is broken there. There
- gradients' norms, not weights', choose the ranks, and none arrives, since DDP's names match no layer: here all do;
- alpha is set to the rank where it should be twice that: here s is that of the adapters' config, at every rank;
- layers of one block whose names end alike overwrite each other's norm: here a family is a name without its numbers;
- the first window is one batch at update 0: here the first ends after m updates;
- norms are averaged over shards: here their squares are summed;
- all moments are dropped at both changes, at the second with a new warm-up: here they and the schedule go on.
Unverified: the paper's m, k and ranks. A weight that turns at constant norm counts as converged, here too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rankshift.core import shard
from rankshift.core.adapter import Adapter
from rankshift.core.base import Base
from rankshift.core.errors import ConfigError, RankTooLarge, UnsupportedLayer
from rankshift.core.event import Event
from rankshift.core.method import Estate, Method, Shared
from rankshift.core.random import Key
from rankshift.core.site import Spec, check_tied, perhaps_tied, select, spec_of
from rankshift.core.watch import Wish, by_family, changes, converged
from rankshift.methods.lora import LoRA

STAGES = ("full", "joint", "frozen")
_SECOND = ("lora", "paca", "vera")


@dataclass(frozen=True, kw_only=True)
class PreLoRA(Method):
    """Full training that goes on with low-rank adapters once it has slowed down."""

    name: ClassVar[str] = "prelora"
    paper: ClassVar[str] = "Krishuthapa et al. 2025, arXiv 2509.21619"
    summary: ClassVar[str] = "full training, and low-rank adapters with frozen weights once it has partly converged"
    formula: ClassVar[str] = "out·in"
    reversible: ClassVar[bool] = False
    trains_base: ClassVar[bool] = True
    default_lr: ClassVar[float] = 1e-3

    then: Method = field(default_factory=lambda: LoRA(rank=8, alpha=16))
    """What the layers in ``targets`` go on with: LoRA, PaCA or VeRA. Its rank is replaced by the ladder's, its scale s
    stays; of VeRA, which has one rank for all layers, the rank counts."""
    weight_change: float = 1.0
    """τ, percent: converged layers change their norm by less from window to window, on average in every family. The
    runs that are known have 1, 0.5 and 0.25; the code's default is 5."""
    loss_change: float = 5.0
    """ζ, percent: and the loss by at most this. The runs that are known have 5, 2.5 and 1; the code's default is 10."""
    window: int = 1000
    """m, updates of a window. The code's default; a window should hold an epoch or more."""
    windows: int = 3
    """k, windows that are compared, one after the other."""
    minimum: int = 0
    """Updates of full training at least: a warm-up of the learning rate, or a plateau, can pass for convergence."""
    joint: int = 1000
    """w, updates in which weights and adapters train together; 0: the weights freeze at once. The paper: 5 to 15
    epochs."""
    min_rank: int = 4
    """r_min, of the layer of each family that moves least. The code's default."""
    max_rank: int = 32
    """r_max, r_min times a power of two, of the one that moves most. The code's default; 10 % of ViT-L/16 takes 64."""
    quantise: Literal["nf4", "fp4", "int8", "fp8"] | None = None
    """Storage of the adapted layers from the freeze on: 4 or 8 bits a weight instead of 32. That rounds them, once, and
    the log says by how much; none leaves them as they are. Not in the paper."""
    stage: str = "full"
    """Where the run is: "full", "joint" or "frozen". Set by the run; begin with "full"."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """The rank of each layer. Set by the run."""

    def check(self) -> None:
        second = self.then
        if second.name not in _SECOND:
            raise ConfigError(f"PreLoRA(then={type(second).__name__}(…)): it goes on with LoRA, PaCA or VeRA.")
        odd = [f.name for f in fields(second) if f.name in _OURS and getattr(second, f.name) != f.default]
        if odd or second.modules_to_save or getattr(second, "bias", "none") != "none" or second.needs_data:
            what = odd[0] if odd else "data" if second.needs_data else "bias or modules_to_save"
            raise ConfigError(
                f"PreLoRA(then={type(second).__name__}(…)) with {what}: targets are PreLoRA's own, everything else "
                "that is not adapted trains anyway, and there is no look at data in mid-run. Leave it out there."
            )
        if self.joint and second.name == "paca":
            raise ConfigError(
                f"PreLoRA(then=PaCA(…), joint={self.joint}): PaCA trains columns of the weight itself, so beside the "
                "whole weight it is nothing. Set joint=0."
            )
        if self.modules_to_save:
            raise ConfigError("PreLoRA.modules_to_save: every weight that is not adapted trains anyway. Leave it out.")
        for name in ("weight_change", "loss_change"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"PreLoRA.{name} = {getattr(self, name)}: percent, at least 0.")
        if self.window < 1 or self.windows < 2 or self.minimum < 0 or self.joint < 0:
            raise ConfigError(
                f"PreLoRA(window={self.window}, windows={self.windows}, minimum={self.minimum}, joint={self.joint}): a "
                "window has at least 1 update, two windows are compared, minimum and joint are counts of updates."
            )
        if not 1 <= self.min_rank <= self.max_rank:
            raise ConfigError(
                f"PreLoRA(min_rank={self.min_rank}, max_rank={self.max_rank}): 1 ≤ min_rank ≤ max_rank is needed."
            )
        if not math.log2(self.max_rank / self.min_rank).is_integer():
            raise ConfigError(
                f"PreLoRA(min_rank={self.min_rank}, max_rank={self.max_rank}): ranks double from one to the next, so "
                "max_rank must be min_rank times 1, 2, 4, 8 or so."
            )
        if self.stage not in STAGES:
            raise ConfigError(f"PreLoRA.stage = {self.stage!r} is none of {', '.join(STAGES)}.")

    @property
    def second(self) -> Method:
        """``then``, with these targets and with the rank of each layer."""
        method = replace(self.then, targets=self.targets, exclude=self.exclude, tied=self.tied)
        if not self.ranks or not _ladder(self.then):
            return method
        alpha, rank = self.then.alpha, self.then.rank  # type: ignore[attr-defined]
        same = getattr(self.then, "scaling", "standard") != "standard"  # √rank there scales by itself
        # the last match counts, and "up" matches "block.up" too: so the longest name comes last
        ranks = dict(sorted(self.ranks.items(), key=lambda item: len(item[0])))
        alphas = {} if same else {name: alpha * r / rank for name, r in ranks.items()}
        return replace(method, rank_pattern=ranks, alpha_pattern=alphas)  # type: ignore[call-arg]

    # ---- sites

    def sites(self, model: nn.Module) -> list[str]:
        specs = self._layers(model)
        for spec in specs:  # before weeks of training, not after
            self.fit(spec)
        if self.tied == "refuse":
            for spec in perhaps_tied(model, specs):
                check_tied(model, spec)
        return [] if self.stage == "full" else [spec.name for spec in specs]

    def _layers(self, model: nn.Module) -> list[Spec]:
        return [spec_of(model, name) for name in select(model, self.targets, self.exclude)]

    def fit(self, spec: Spec) -> None:
        if torch.finfo(spec.dtype).bits < 32:
            kind = str(spec.dtype).removeprefix("torch.")
            raise UnsupportedLayer(
                f"{spec.name} is in {kind}, where small steps are lost, and PreLoRA trains every weight and measures "
                "how little it moves. Load the model in fp32 and train under autocast."
            )
        if _ladder(self.then) and self.max_rank > spec.max_rank:
            raise RankTooLarge(
                f"max_rank {self.max_rank} at {spec.name} exceeds min(out, in) = {spec.max_rank}. Lower max_rank, or "
                f'exclude "{spec.name.rpartition(".")[2]}" in targets.'
            )
        self.second.fit(spec)

    def rank_at(self, name: str, found: Any = None) -> int:
        return self.second.rank_at(name, found)

    def share(
        self, specs: Sequence[Spec], ranks: Mapping[str, int], saved: Mapping[str, Any] | None = None
    ) -> Shared | None:
        return self.second.share(specs, ranks, saved)

    def adapt(self, base: Base, spec: Spec, rank: int, shared: Any = None) -> Adapter | None:
        return self.second.adapt(base, spec, rank, shared)

    def start(self, adapter: Adapter, key: Key, found: Any = None) -> None:
        self.second.start(adapter, key, found)

    # ---- the model

    def in_place(self, name: str, adapted: bool) -> bool:
        return not (adapted and self.stage == "frozen")

    def must_learn(self, name: str) -> bool:
        return False  # models own parameters that a task never reaches, such as BERT's pooler

    def learning_rate(self, name: str, leaf: str) -> float:
        return self.second.learning_rate(name, leaf) if leaf else 1.0

    def decays(self, name: str, tensor: Tensor, leaf: str) -> bool:
        return self.second.decays(name, tensor, leaf)

    def events(self) -> tuple[Event, ...]:
        return () if self.stage == "full" else self.second.events()

    # ---- phases

    @property
    def holds(self) -> str | None:
        return self.quantise if self.stage == "frozen" else None

    @property
    def solitary(self) -> str:
        return "goes through phases, and a phase is of the whole run"

    def watches(self, model: nn.Module) -> Wish | None:
        if self.stage != "full":
            return None
        return Wish(self.window, tuple(spec.weight for spec in self._layers(model)), self.windows)

    def check_span(self, start: int, end: int, total: int | None) -> str:
        """Refuses a phase that is too short for its windows, and warns of one that ends before it freezes."""
        soonest = start
        if self.stage == "full":
            soonest += max(self.windows * self.window, self.minimum)
            if soonest >= end:
                raise ConfigError(
                    f"PreLoRA(window={self.window}, windows={self.windows}, minimum={self.minimum}) can go on to "
                    f"adapters after update {soonest} at the earliest, and ends at {end}. Take shorter windows, or "
                    "Full."
                )
        if self.stage == "frozen" or soonest + self.joint < end:
            return ""
        return (
            f"PreLoRA(window={self.window}, windows={self.windows}, minimum={self.minimum}, joint={self.joint}) "
            f"freezes after update {soonest + self.joint} at the earliest, and ends at {end}: it never comes to the "
            "stage that is cheaper. Shorten joint or the windows."
        )

    @property
    def final(self) -> PreLoRA:
        return replace(self, stage="frozen")

    @property
    def own_bias(self) -> bool:
        return self.second.own_bias

    def next(self, run: Any) -> Method | None:
        taken = run.step - run.phases[-1].start
        if self.stage == "full":
            seen = run.watch.snapshots
            if taken < self.minimum or not converged(seen, self.windows, self.loss_change, self.weight_change):
                return None
            ranks = ladder(changes(seen[-2], seen[-1]), self.min_rank, self.max_rank) if _ladder(self.then) else {}
            weights = {spec.weight: spec.name for spec in self._layers(run.model)}
            ranks = {weights[name]: rank for name, rank in ranks.items()}
            return replace(self, stage="joint" if self.joint else "frozen", ranks=ranks)
        if self.stage == "joint" and taken >= self.joint:
            return replace(self, stage="frozen")
        return None

    def inherit(self, before: Method, adapters: Mapping[str, Adapter]) -> Mapping[str, Estate] | None:
        """From the joint part to the frozen one: the adapters as they are."""
        if not isinstance(before, PreLoRA) or (before.stage, self.stage) != ("joint", "frozen"):
            return None
        if replace(before, stage="frozen") != self:
            return None
        return {
            site: Estate(
                adapter.rank,
                {
                    leaf: shard.whole(tensor)
                    for leaf, tensor in adapter.state_dict(keep_vars=True).items()
                    if leaf not in adapter.derived
                },
            )
            for site, adapter in adapters.items()
        }

    def metrics(self, adapters: Mapping[str, Adapter]) -> dict[str, float]:
        return {"stage": float(STAGES.index(self.stage))}


_OURS = ("targets", "exclude", "tied")


def _ladder(second: Method) -> bool:
    """Whether layers may have ranks of their own."""
    return any(f.name == "rank_pattern" for f in fields(second))


def ladder(moved: Mapping[str, float], least: int, most: int) -> dict[str, int]:
    """The rank of each layer, least·2^i up to ``most``, by how much it moved against the others of its family.

    Args:
        moved: percent, by the name of the weight.
    """
    rungs = int(math.log2(most / least)) + 1
    ranks: dict[str, int] = {}
    for family in by_family(moved).values():
        low, high = min(family.values()), max(family.values())
        for name, value in family.items():
            v = (value - low) / (high - low) if high > low and math.isfinite(high) else 0.0
            ranks[name] = least * 2 ** max(0, math.ceil(v * rungs) - 1)
    return {name: ranks[name] for name in moved}
