"""Flat-LoRA: LoRA trained under noise on the merged weight. Li et al. 2025, ICML, arXiv 2409.14396.

    min over A, B of  E_ε L(W' + ε),   W' = W + s·BA,   ε_ij = (σ_t/√in)·‖W'_i‖·z_ij,   z standard normal

    σ_t = σ·½(1 − cos(π t/T))  at update t of T

The function that is flat is that of the weight which is used in the end, not of (A, B). One draw of ε per optimizer
step: the same in forward and backward of all its micro-batches and in what checkpointing recomputes; none in eval(),
and none in anything that is saved, exported or merged. What comes out is an ordinary LoRA adapter.

W is never written: y = x W'ᵀ + x εᵀ, with ε drawn from a key in forward and again in backward (ops/noise). What is held
is a key, a function of (seed, layer, step), and the noise of each row, (out,), which a WINDOW event sets: all ranks
draw the same ε, and a resumed run draws the ε of the run that it resumes. Only the gradients that reach below the layer
meet ε; those of A and B are LoRA's own of the loss under noise.

All of LoRA's options combine. Under DoRA the rows of W' have the norms |μ|. With several adapters at a layer noise is
drawn once, by the innermost of this method that acts, on the weight up to and with its own change.

Where this differs from the published code: that adds noise to W in place and subtracts it again, which in bf16 moves
the base by as much as an update; it seeds the global generator from the clock, other on every rank; it counts
micro-batches, so that leftovers of an epoch put noise into steps and evaluations, and measures its schedule in them.
Noise on norms and biases, which the paper tries, is left out; convolutions, which it does not, have noise as linear
layers have, a row being an output filter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rankshift.core import shard
from rankshift.core.adapter import Adapter
from rankshift.core.base import Base
from rankshift.core.errors import ConfigError, UnsupportedLayer
from rankshift.core.event import Event, Moment, Tick
from rankshift.core.form import EmbeddingForm
from rankshift.core.site import Spec
from rankshift.methods.lora import DoRALayer, LoRA, LoRALayer, row_norm
from rankshift.ops.noise import noise_product


class Noisy(LoRALayer):
    """A layer that carries the noise of one update: how much in each row, and the key of its draw."""

    v: Tensor  # (out,), σ_t/√in · ‖W'_i‖
    quiet: bool  # whether an adapter below draws the noise of this layer, or none is wanted

    def __init__(self, base: Base, spec: Spec, rank: int, scale: float, config: FlatLoRA):
        self.sigma = config.sigma
        super().__init__(base, spec, rank, scale, config)
        # not saved: the event that sets it is a function of the step and of what is saved
        self.register_buffer("v", torch.zeros(spec.out, dtype=spec.master, device=spec.device), persistent=False)
        # no buffer: a key that moved to the device would have to be waited for
        self.word = torch.zeros((), dtype=torch.int64, device="cpu")

    def stand_on(self, base: Base) -> None:
        super().stand_on(base)
        self.quiet = self.sigma == 0
        while isinstance(base, Adapter):
            self.quiet = self.quiet or (isinstance(base, Noisy) and base.sigma > 0)
            base = base.base

    def term(self) -> None:
        return None

    def open(self, sigma: float, word: int) -> None:
        """Begin an update: its noise has size ``sigma`` and the key ``word``. Under sharding every rank must call."""
        self.word.fill_(word - (1 << 64) if word >> 63 else word)
        if sigma == 0 or self.quiet:
            self.v.zero_()
        else:
            self.v.copy_(self.merged_norm().mul_(sigma / math.sqrt(self.in_features)))

    def merged_norm(self) -> Tensor:
        """‖W'‖ of each row, whole, a new tensor."""
        A, B = self.whole_factors()
        base = self.base
        W = base.format.dense(*map(shard.whole, base.packed)) if base.storage else base.rows()
        return row_norm(W, self.scale * A, B)

    def perturb(self, y: Tensor, x: Tensor) -> Tensor:
        """y + x εᵀ while training."""
        if self.quiet or not self.training:
            return y
        return y + noise_product(x, self.v, self.word, self.form)


class FlatLoRALayer(Noisy):
    """y = (W + ε) x + s·B(A x)."""

    def add_branch(self, x: Tensor, bias: bool = True) -> Tensor:
        return self.perturb(super().add_branch(x, bias), x)


class FlatDoRALayer(Noisy, DoRALayer):
    """y = μ ⊙ (W x + s·B(A x)) / ‖W + s·BA‖_row + ε x + bias."""

    def merged_norm(self) -> Tensor:
        return shard.whole(self.magnitude).abs()

    def product(self, x: Tensor) -> Tensor:
        return self.perturb(super().product(x), x)


@dataclass(frozen=True)
class Draw:
    """The noise of the coming update: another key, and its size at each row of the merged weight."""

    sigma: float
    schedule: str
    moment: ClassVar[Moment] = Moment.WINDOW

    def due(self, tick: Tick) -> bool:
        return True

    def apply(self, adapter: Adapter, tick: Tick) -> None:
        assert isinstance(adapter, Noisy)
        size = self.sigma * strength(self.schedule, tick.step, tick.total)
        adapter.open(size, tick.key(adapter.site, "noise").word)


def strength(schedule: str, step: int, total: int | None) -> float:
    """σ_t / σ at an update, in [0, 1]: from 0 at the first to 1 at the end along half a cosine, or 1 throughout.

    0 while the length of the run is not known; 1 past its end.
    """
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 - math.cos(math.pi * min(step / total, 1.0))) if total else 0.0


@dataclass(frozen=True, kw_only=True)
class FlatLoRA(LoRA):
    """LoRA whose training sees the merged weight under noise, for a minimum that is flat where it will be used."""

    name: ClassVar[str] = "flat-lora"
    paper: ClassVar[str] = "Li et al. 2025, arXiv 2409.14396"
    summary: ClassVar[str] = "LoRA under noise on the merged weight, for flat minima"
    formula: ClassVar[str] = "r·(out + in)"
    default_lr: ClassVar[float] = 5e-4

    sigma: float = 0.05
    """σ, size of the noise as a share of the norm of each row of W + s·BA. The paper: 0.05 for T5 and Llama, 0.15 for
    CLIP, 0.1 for SDXL. 0 is LoRA."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """σ_t: from 0 up to σ along half a cosine over the whole run (the paper; needs total_steps), or σ throughout."""

    def check(self) -> None:
        super().check()
        if not 0 <= self.sigma < math.inf:
            raise ConfigError(f"FlatLoRA.sigma = {self.sigma} is no size of noise. Set for example 0.05; 0 is LoRA.")

    def fit(self, spec: Spec) -> None:
        super().fit(spec)
        if spec.form.stacked:
            raise UnsupportedLayer(
                f"{spec.name} is a stack of expert weights, reached only as W + ΔW: noise that is drawn again in "
                "backward would have to be held there for the whole stack. Exclude it, or use LoRA."
            )
        if isinstance(spec.form, EmbeddingForm):
            raise UnsupportedLayer(
                f"{spec.name} is an Embedding: it looks up columns and sums over none, so noise by the norm of whole "
                "rows means nothing there, and all of it would be drawn for a few columns. Exclude it, or use LoRA."
            )

    def adapt(self, base: Base, spec: Spec, rank: int, shared: Any = None) -> Adapter:
        base.check_open(spec.name)  # the noise is as large as the rows of W
        layer = FlatDoRALayer if self.dora else FlatLoRALayer
        return layer(base, spec, rank, self.scale_at(spec.name, rank), self)

    def events(self) -> tuple[Event, ...]:
        return (*super().events(), *((Draw(self.sigma, self.schedule),) if self.sigma else ()))

    @property
    def needs_total(self) -> bool:
        return self.schedule == "cosine" and self.sigma > 0
