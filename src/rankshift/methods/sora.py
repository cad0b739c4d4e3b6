"""SoRA: y = W x + s·B(g ⊙ (A x)), W frozen, gates g that become exactly zero. Ding et al. 2023, arXiv 2311.11696.

A is (r, in), B is (out, r), g is (r,), s = alpha/r of the config, also where fewer ranks are left. The task's loss is
all that is differentiated; after each update of the optimizer every gate takes a proximal step of λ‖g‖₁,

    g ← T_ξ(g),   T_ξ(z) = sign(z)·max(|z| − ξ, 0),   ξ = η·λ,   η the learning rate of g in this update

so a gate that the task does not need closes, and opens again only if one step of the optimizer exceeds ξ:
∂g_i = s Σ (A x)_i (Bᵀ∂y)_i lives at g_i = 0, while row i of ∂A and column i of ∂B are then exactly zero. A run may go
through stages of rising λ; between them closed ranks are cut out, which leaves the function as it is.

What differs from the released code, which
- zeroes every |z| < 2ξ (its three masks act one after the other), a jump of ξ: here T_ξ;
- adds λ Σ|g| to the loss as well, the penalty twice: here once, in T_ξ;
- leaves ξ unscaled in the optimizer that its script imports, so that as η decays gates shrink whatever their gradient:
  here ξ = η·λ, as in the paper's proximal gradient;
- keeps one exhausted schedule over all stages, which are then trained with η = 0: here each has a schedule of its own;
- has no pruning and counts 2·hidden per closed gate, wrong where in ≠ out: here ranks are removed and counted as held;
- updates its GradScaler twice a step and finds gates by a substring of their name: neither can happen here;
- starts g at N(0, 1), so that the speed at which a rank learns, and which rank closes first, are chance: here at 1,
  where SoRA begins as LoRA does; gate_init="normal" is the released start.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankshift.core import shard
from rankshift.core.adapter import Adapter
from rankshift.core.base import Base
from rankshift.core.errors import ConfigError, RankTooLarge, TrainingError, UnsupportedLayer
from rankshift.core.event import Event, Moment, Tick
from rankshift.core.form import EmbeddingForm
from rankshift.core.method import Estate, Method
from rankshift.core.random import Key, normal
from rankshift.core.site import Spec
from rankshift.methods import lora_init
from rankshift.methods.lora import LoRA, LoRALayer


class SoRALayer(LoRALayer):
    """y = W x + s·B(g ⊙ (A x)): LoRA with g folded into B, the narrower factor at embeddings and convolutions."""

    slots: ClassVar[dict[str, int]] = {"A": 0, "B": 1, "g": 0}

    def __init__(self, base: Base, spec: Spec, rank: int, scale: float, config: LoRA, train_gates: bool):
        super().__init__(base, spec, rank, scale, config)
        self.g = nn.Parameter(torch.empty(rank, dtype=spec.master, device=spec.device), train_gates)  # (r,)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B * self.g

    def whole_factors(self) -> tuple[Tensor, Tensor]:
        """The same, whole, without the ranks whose gate is closed."""
        A, B, g = (shard.whole(tensor) for tensor in (self.A, self.B, self.g))
        K = g.nonzero().flatten()
        return A[K], B[:, K] * g[K]

    def open_gates(self) -> int:
        """How many ranks act. Under sharding every rank must call this."""
        return int(shard.whole(self.g).count_nonzero())

    @property
    def silent(self) -> frozenset[str]:  # type: ignore[override]
        """At the start one factor is zero, and with it ∂g; behind closed gates so are ∂A and ∂B."""
        return self._silent | {"g"} if self.open_gates() else frozenset("ABg")

    @silent.setter
    def silent(self, value: frozenset[str]) -> None:
        self._silent = value


def soft_threshold_(z: Tensor, xi: float) -> None:
    """z ← T_ξ(z) = sign(z)·max(|z| − ξ, 0), in place."""
    z.copy_(F.softshrink(z, xi))


@dataclass(frozen=True)
class Prox:
    """g ← T_ξ(g) with ξ = η·λ, after every update that was taken."""

    sparsity: float
    moment: ClassVar[Moment] = Moment.UPDATED

    def due(self, tick: Tick) -> bool:
        return self.sparsity > 0

    def apply(self, adapter: Adapter, tick: Tick) -> None:
        assert isinstance(adapter, SoRALayer)
        part, _ = shard.local(adapter.g)
        soft_threshold_(part, tick.lr(adapter.g) * self.sparsity)


@dataclass(frozen=True, kw_only=True)
class SoRA(Method):
    """LoRA that starts at a generous rank and finds by itself which ranks each layer needs."""

    name: ClassVar[str] = "sora"
    paper: ClassVar[str] = "Ding et al. 2023, arXiv 2311.11696"
    summary: ClassVar[str] = "LoRA whose ranks have gates that a proximal step closes: a rank of its own for each layer"
    formula: ClassVar[str] = "r·(out + in + 1)"
    default_lr: ClassVar[float] = 8e-4

    rank: int = 16
    """r_max, the rank before gates close. The paper starts at 8 or 16; ports to larger models at twice the target."""
    alpha: float = 16.0
    """Numerator of the scale s = alpha / rank, which stays when ranks are pruned. 16 in the released code."""
    sparsity: float | tuple[float, ...] = 0.4
    """λ: after each update every gate moves towards 0 by ξ = its learning rate · λ. A gate that nothing holds closes
    once the sum of ξ has reached where it began: at λ = 0.4 and a mean learning rate of 4e-4, from 1 in 6,000 updates.
    Useful between 0.1 and 1 for long runs; short ones need more. 0 closes none. Rising numbers are stages of equal
    length (of what is left of total_steps), each with its own learning-rate schedule, as the paper's Algorithm 1. The
    default is the released script's ξ / lr, 3e-4 / 8e-4, rounded."""
    gate_lr_ratio: float = 1.0
    """The learning rate of the gates is this many times lr (and ξ with it). 1 in the released scripts; 0 freezes the
    gates where they are."""
    gate_init: Literal["ones", "normal"] = "ones"
    """Where gates start: 1, so that every rank learns alike; or N(0, 1) as in the released code."""
    prune: bool = True
    """Cut closed ranks out where a stage begins, and where run.shift() is asked to go on with SoRA: smaller factors
    and moments, the same function. False keeps them, so that their gates may open again."""
    dropout: float = 0.0
    """Probability of dropping an input of the branch while training; the base path is not touched. No fused op then."""
    stage: int = 0
    """Which of the numbers in sparsity counts. Set by the run; begin with 0."""

    def check(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"SoRA.rank = {self.rank} is below 1.")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"SoRA.alpha = {self.alpha} is not a positive number.")
        if not self.stages or not all(0 <= value < math.inf for value in self.stages):
            raise ConfigError(f"SoRA.sparsity = {self.sparsity}: needs a number of at least 0, or several.")
        if any(later <= earlier for earlier, later in zip(self.stages, self.stages[1:], strict=False)):
            raise ConfigError(f"SoRA.sparsity = {self.sparsity}: the numbers of stages must rise.")
        if not 0 <= self.stage < len(self.stages):
            raise ConfigError(f"SoRA.stage = {self.stage}, but sparsity has {len(self.stages)} stages, counted from 0.")
        if not 0 <= self.gate_lr_ratio < math.inf:
            raise ConfigError(f"SoRA.gate_lr_ratio = {self.gate_lr_ratio} is not a number of at least 0.")
        if self.gate_lr_ratio == 0 and self.stages[-1] > 0:
            raise ConfigError(
                f"SoRA(gate_lr_ratio=0, sparsity={self.sparsity}): frozen gates never close. Set sparsity=0, or a "
                "gate_lr_ratio above 0."
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"SoRA.dropout = {self.dropout} is not in [0, 1).")

    @property
    def stages(self) -> tuple[float, ...]:
        """λ of each stage."""
        return self.sparsity if isinstance(self.sparsity, tuple) else (self.sparsity,)

    # ---- one site

    def sites(self, model: nn.Module) -> list[str]:
        if self.stage:
            raise ConfigError(
                f"SoRA(stage={self.stage}) goes on with the ranks of the stage before, and there are none to take over "
                "here: the run must train SoRA of the same rank, alpha and targets. Begin with stage=0; the run counts."
            )
        return super().sites(model)

    def fit(self, spec: Spec) -> None:
        if spec.form.stacked:
            raise UnsupportedLayer(
                f"{spec.name} is a stack of expert weights: every expert would want a rank of its own, and a stack has "
                "one. Exclude it in targets, or use LoRA there."
            )
        if self.rank > spec.max_rank:
            raise RankTooLarge(
                f"rank {self.rank} at {spec.name} exceeds min(out, in) = {spec.max_rank}. "
                f'Lower rank, or exclude "{spec.name.rpartition(".")[2]}" in targets.'
            )

    def rank_at(self, name: str, found: Any = None) -> int:
        return self.rank

    def adapt(self, base: Base, spec: Spec, rank: int, shared: Any = None) -> Adapter:
        config = LoRA(rank=rank, alpha=self.alpha, dropout=self.dropout)
        return SoRALayer(base, spec, rank, self.alpha / self.rank, config, self.gate_lr_ratio > 0)

    @torch.no_grad()
    def start(self, adapter: Adapter, key: Key, found: Any = None) -> None:
        assert isinstance(adapter, SoRALayer)
        begin = lora_init.embedding if isinstance(adapter.form, EmbeddingForm) else lora_init.kaiming
        A, B = begin(key, adapter.out_features, adapter.in_features, adapter.rank)
        adapter.A.copy_(A)
        adapter.B.copy_(B)
        if self.gate_init == "ones":
            adapter.g.fill_(1)
        else:
            adapter.g.copy_(normal(key / "g", (adapter.rank,), dtype=torch.float64))

    # ---- the model

    def learning_rate(self, name: str, leaf: str) -> float:
        return self.gate_lr_ratio if leaf == "g" else 1.0

    def decays(self, name: str, tensor: Tensor, leaf: str) -> bool:
        return leaf != "g"  # T_ξ is what makes gates small

    def events(self) -> tuple[Event, ...]:
        return (Prox(self.stages[self.stage]),)

    def metrics(self, adapters: Mapping[str, Adapter]) -> dict[str, float]:
        layers = [adapter for adapter in adapters.values() if isinstance(adapter, SoRALayer)]
        return {"open_gates": sum(a.open_gates() for a in layers), "gates": sum(a.rank for a in layers)}

    # ---- stages

    @property
    def solitary(self) -> str:
        if len(self.stages) == 1:
            return ""
        return "as configured goes through phases, and a phase is of the whole run"

    @property
    def needs_total(self) -> bool:
        return len(self.stages) > 1

    def phase_end(self, start: int, total: int | None) -> int | None:
        """The stages that are left, this one too, share what is left of the run."""
        left = len(self.stages) - self.stage
        if len(self.stages) == 1 or total is None:
            return None
        if total - start < left:
            raise ConfigError(
                f"SoRA has {left} of {len(self.stages)} stages to go and {max(0, total - start)} updates for them "
                f"(total_steps = {total}). Give fewer numbers in sparsity, or more updates."
            )
        return start + (total - start) // left

    def check_span(self, start: int, end: int, total: int | None) -> str:
        """Refuses a phase that ends before its last stage begins."""
        begins, stage = start, self
        while stage != self.final and (after := stage.phase_end(begins, total)) is not None:
            begins, stage = after, dataclasses.replace(stage, stage=stage.stage + 1)
        if len(self.stages) > 1 and begins >= end:
            raise ConfigError(
                f"SoRA's {len(self.stages)} stages share the whole run, the last would begin at update {begins}, and "
                f"this phase ends at {end}. Give fewer numbers in sparsity, or let what follows begin later."
            )
        return ""

    @property
    def final(self) -> SoRA:
        return dataclasses.replace(self, stage=len(self.stages) - 1)

    def next(self, run: Any) -> Method | None:
        if self.stage + 1 == len(self.stages):
            return None
        end = self.phase_end(run.phases[-1].start, run.total_steps)
        if end is None or run.step < end:
            return None
        return dataclasses.replace(self, stage=self.stage + 1)

    def inherit(self, before: Method, adapters: Mapping[str, Adapter]) -> Mapping[str, Estate] | None:
        """From SoRA of the same layers and scale: the ranks whose gates are open, or with prune=False all of them."""
        if not isinstance(before, SoRA) or any(getattr(self, f) != getattr(before, f) for f in _SAME):
            return None
        estates: dict[str, Estate] = {}
        for site, adapter in adapters.items():
            assert isinstance(adapter, SoRALayer)
            A, B, g = (shard.whole(tensor) for tensor in (adapter.A, adapter.B, adapter.g))
            K = g.nonzero().flatten() if self.prune else torch.arange(len(g), device=g.device)
            if len(K):
                estates[site] = Estate(len(K), {"A": A[K], "B": B[:, K], "g": g[K]}, K)
        if not estates:
            raise TrainingError(
                f"Every gate of every layer is closed (sparsity = {before.stages[before.stage]:g}): nothing is left "
                "that could train. Train with a lower sparsity, or load an earlier checkpoint and shift to one."
            )
        return estates


_SAME = ("rank", "alpha", "targets", "exclude")
