"""ReLoRA: LoRA that is merged into W and begun anew every K updates. Lialin et al. 2023, ICLR 2024, arXiv 2307.05695.

    y = W x + s·B(A x),   s = alpha/r
    restart:  W ← W + s·B A,   A ← U(±1/√in),   B ← 0,   the optimizer forgets its moments of A and B

so that W moves by a matrix of rank r in every cycle, and by one of rank (restarts + 1)·r in all. The function stays
what it was: B is zero. What is not adapted (embeddings, norms, biases, the head) trains where it is. The learning rate
is a cosine that warms up anew after every restart (:func:`rankshift.core.schedule.jagged_cosine`): update k·K of a
phase, counted from 0, is taken at a rate of 0, the restart comes right after it, and the first step of the new factors
is 1/rewarm of the way up.

The paper begins with ordinary training of all weights, and by its own ablation that is what matters most; here it is a
phase before this one (``run.shift``).

What differs from the released code, which
- since September 2023 begins with A = 0 and B = 0, so that nothing learns before the first restart: here A is drawn;
- prunes m and v of Adam by two independent masks, so that an element that keeps m and loses v takes a step of hundreds
  of learning rates: here m, v and the step count are zeroed together, or m and v pruned by one mask;
- finds the quantile of a magnitude by a function that fails above 16 million elements;
- merges in the dtype of the weights, bf16: here in float64, rounded once, and 16-bit weights have to be asked for;
- draws A from the generator of each rank, which agree while those do: here from a key of the layer and the update.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rankshift.core import shard
from rankshift.core.adapter import Adapter
from rankshift.core.base import Base
from rankshift.core.errors import ConfigError, RankTooLarge, UnsupportedLayer
from rankshift.core.event import Event, Moment, Tick
from rankshift.core.form import EmbeddingForm
from rankshift.core.method import Method
from rankshift.core.random import Key, dither, swift_uniform
from rankshift.core.schedule import cosine, jagged_cosine
from rankshift.core.site import Spec
from rankshift.methods import lora_init
from rankshift.methods.lora import LoRA, LoRALayer
from rankshift.optim import Adam, Optimizer
from rankshift.optim.moments import Wide
from rankshift.optim.rounding import narrow

_log = logging.getLogger(__name__)


class ReLoRALayer(LoRALayer):
    """One cycle's layer, and how many there were before it."""

    restarts: Tensor  # (), int64
    lost: float | None = None
    """Of the change that was merged last, the share that rounding took: ‖(W' − W) − ΔW‖ / ‖ΔW‖; None if none to speak
    of."""

    def __init__(self, base: Base, spec: Spec, rank: int, scale: float, config: LoRA):
        super().__init__(base, spec, rank, scale, config)
        self.register_buffer("restarts", torch.zeros((), dtype=torch.int64, device=spec.device))


def merge_(adapter: ReLoRALayer) -> None:
    """W ← W + s·B A, rounded once to W's dtype. Under sharding every rank must call this; each forms the rows of W that
    it holds."""
    A, B = adapter.whole_factors()
    if A.device.type != "mps":  # which has none
        A, B = A.double(), B.double()  # float64: neither autocast nor TF32 touches the product
    base = adapter.base
    before = base.rows() if narrow(base.dtype) or not base.exact else None
    base.add_(lambda rows: adapter.scale * (B[..., rows, :] @ A))
    if before is not None:
        change = adapter.scale * (B @ A)
        came = base.rows().to(change.dtype) - before.to(change.dtype)
        adapter.lost = float((came - change).norm() / change.norm().clamp_min(torch.finfo(change.dtype).tiny))


def renew_(adapter: LoRALayer, key: Key) -> None:
    """A ~ U(±1/√in) and B = 0, in place; of an embedding A = 0 and B ~ N(0, 1). Each rank draws what it holds."""
    A, held = shard.local(adapter.A)
    if isinstance(adapter.form, EmbeddingForm):
        A.zero_()
        B = lora_init.embedding(key, adapter.out_features, adapter.in_features, adapter.rank)[1]
        shard.assign_(adapter.B, B.to(adapter.B))
        return
    bound = 1 / math.sqrt(adapter.in_features)
    first = held.start * math.prod(A.shape[1:])
    uniform = swift_uniform(key / "A", A.numel(), first, A.device)
    A.copy_(uniform.mul_(2 * bound).sub_(bound).view(A.shape))
    shard.local(adapter.B)[0].zero_()


def forget_(state: dict[str, Tensor], how: str, ratio: float, key: Key) -> None:
    """Reset Adam's state of one parameter, in place: all of it, or ``ratio`` of its moments, the same in each.

    "magnitude" goes by |m|: of the elements that are smaller than what is kept none is. The step count stays, because
    it is that of the elements that are kept; so in its first updates an element that was not takes steps of 3 to 7
    learning rates (at β = 0.9, 0.999), which the warm-up has to absorb.
    """
    if how == "all":
        for tensor in state.values():
            shard.local(tensor)[0].zero_()
        return
    if not state:
        return
    part, held = shard.local(state["exp_avg"])
    if how == "magnitude":
        sizes = shard.whole(state["exp_avg"]).abs().flatten()  # of all ranks, so that they find one threshold
        count = round(ratio * len(sizes))
        drop = part.abs() <= sizes.kthvalue(count).values if count else torch.zeros_like(part, dtype=torch.bool)
    else:
        first = held.start * math.prod(part.shape[1:])
        drop = dither(key.word, part.numel(), first, part.device).reshape(part.shape) < round(ratio * (1 << 16))
    for tensor in state.values():
        if tensor.dim():
            shard.local(tensor)[0].masked_fill_(drop, 0)


@dataclass(frozen=True)
class Restart:
    """Merge, draw A anew, B = 0, and let the optimizer forget both; after updates K, 2K, … of the phase."""

    every: int
    reset: str
    ratio: float
    rewarm: int  # what the method's schedule would do after it
    moment: ClassVar[Moment] = Moment.UPDATED
    landmark: ClassVar[str] = "restart"

    def due(self, tick: Tick) -> bool:
        taken = tick.step - tick.began
        return taken > 0 and taken % self.every == 0

    def apply(self, adapter: Adapter, tick: Tick) -> None:
        assert isinstance(adapter, ReLoRALayer)
        merge_(adapter)
        adapter.restarts += 1
        key = tick.key(adapter.site)
        renew_(adapter, key)
        for leaf in "AB":
            forget_(tick.state(adapter.get_parameter(leaf)), self.reset, self.ratio, key / leaf / "reset")

    def apply_all(self, adapters: Sequence[Adapter], tick: Tick) -> None:
        """Every layer; at the first restart whoever trains at a rate that does not warm up is told."""
        for adapter in adapters:
            self.apply(adapter, tick)
        if lost := {a.site: a.lost for a in adapters if isinstance(a, ReLoRALayer) and a.lost is not None}:
            worst = max(lost, key=lambda site: lost[site])
            _log.warning(
                "ReLoRA restarts at update %d: rounding took %.0f %% of the change that was merged (median of %d "
                "layers; %.0f %% at %s).",
                tick.step, 100 * statistics.median(lost.values()), len(lost), 100 * lost[worst], worst,
            )  # fmt: skip
        group = tick.group(adapters[0].get_parameter("B"))
        lr = float(group.get("lr", 0.0))
        if self.rewarm and tick.step - tick.began == self.every and lr > 0.1 * float(group.get("initial_lr", lr)):
            _log.warning(
                "ReLoRA restarts at update %d with the learning rate at %g, and nothing warms it up again: the loss "
                "may rise after every restart. Use the scheduler that run.scheduler(optimizer) gives; rewarm=0 says "
                "that this is meant.",
                tick.step, lr,
            )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ReLoRA(Method):
    """LoRA that merges and begins anew, so that updates of low rank add up to one of high rank."""

    name: ClassVar[str] = "relora"
    paper: ClassVar[str] = "Lialin et al. 2023, arXiv 2307.05695"
    summary: ClassVar[str] = "LoRA that is merged into the weight and begun anew, again and again"
    formula: ClassVar[str] = "r·(out + in)"
    reversible: ClassVar[bool] = False
    default_lr: ClassVar[float] = 1e-3

    rank: int = 128
    """r, of each cycle. 128 in the paper, for models 512 to 2048 wide."""
    alpha: float = 32.0
    """Numerator of the scale s = alpha / rank. 32 in the released code."""
    every: int | None = 1000
    """K: updates between two restarts. The paper has 5,000 of 20,000, and 1,000 at 1B. None: never, which is LoRA with
    the same schedule (set cycle), the control that ReLoRA has to beat."""
    reset: Literal["all", "magnitude", "random"] = "all"
    """What the optimizer forgets of A and B at a restart: Adam's moments and step count, all of them; or a share of the
    moments, the smallest or any, by one mask for both, as in the paper (the released code has a mask for each)."""
    ratio: float = 0.9
    """Share of the moments that "magnitude" and "random" zero. The paper: 0.9 to 0.99 by magnitude; the released
    default is 0.999 at random."""
    cycle: int | None = None
    """Updates between two warm-ups of the learning rate. None: as every."""
    rewarm: int | None = None
    """Updates of the warm-up after a restart. None: 100, as in the paper, and half a cycle at most. 0: none."""
    floor: float = 0.1
    """Where the cosine of the learning rate ends, as a share of lr. 0.1 in the released code."""
    dropout: float = 0.0
    """Probability of dropping an input of the branch while training; 0.1 in the released code. No fused op then."""
    rest: Literal["train", "freeze"] = "train"
    """What is not adapted (embeddings, norms, biases, the head): trained where it is, as in the paper, or left as it
    is."""
    lossy: bool = False
    """Train although a merge rounds more than it should: at weights in bf16 or fp16, where at every restart what is
    below half a bit of a weight is lost (2⁻⁹ of it in bf16), or at a storage that rounds anew."""

    def check(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"ReLoRA.rank = {self.rank} is below 1.")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"ReLoRA.alpha = {self.alpha} is not a positive number.")
        for name, least in (("every", 1), ("cycle", 1), ("rewarm", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"ReLoRA.{name} = {value}: a number of updates, at least {least}, or None.")
        if self.rewarm and self.period is not None and self.rewarm > self.period:
            raise ConfigError(
                f"ReLoRA.rewarm = {self.rewarm} is longer than a cycle of {self.period} updates: the learning rate "
                "would never be up again. Lower rewarm, or leave it out."
            )
        if not 0 < self.ratio <= 1:
            raise ConfigError(
                f"ReLoRA.ratio = {self.ratio} is not in (0, 1]. To zero nothing is not ReLoRA: every=None."
            )
        if not 0 <= self.floor <= 1:
            raise ConfigError(f"ReLoRA.floor = {self.floor} is not in [0, 1].")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"ReLoRA.dropout = {self.dropout} is not in [0, 1).")
        if self.modules_to_save and self.rest == "train":
            raise ConfigError(
                'ReLoRA(rest="train") trains what is not adapted where it is, without copies: leave modules_to_save '
                'out, or set rest="freeze".'
            )

    @property
    def period(self) -> int | None:
        """Updates between two warm-ups; None: there is one."""
        return self.every if self.cycle is None else self.cycle

    @property
    def warming(self) -> int:
        """Updates of each warm-up but the first."""
        if self.rewarm is not None or self.period is None:
            return self.rewarm or 0
        return min(100, self.period // 2)

    # ---- one site

    def fit(self, spec: Spec) -> None:
        if self.rank > spec.max_rank:
            raise RankTooLarge(
                f"rank {self.rank} at {spec.name} exceeds min(out, in) = {spec.max_rank}. "
                f'Lower rank, or exclude "{spec.name.rpartition(".")[2]}" in targets.'
            )
        if spec.form.stacked and self.dropout:
            raise UnsupportedLayer(
                f"{spec.name} is a stack of expert weights, reached only as W + ΔW: dropout needs the layer's input. "
                "Exclude it, or set dropout=0."
            )
        self._refuse_rounding(spec, spec.storage == "dense")
        if narrow(spec.dtype) and not self.lossy:
            kind = str(spec.dtype).removeprefix("torch.")
            raise ConfigError(
                f"The weight of {spec.name} is in {kind}, and ReLoRA merges into it at every restart: what is below "
                "half a bit of the weight would be lost each time. Load the model in fp32 and train under autocast; or "
                "say with ReLoRA(lossy=True) that this is meant."
            )

    def _refuse_rounding(self, spec: Spec, exact: bool) -> None:
        if not exact and not self.lossy:
            raise UnsupportedLayer(
                f"{spec.name} is held in a storage that rounds anew in every merge, so each restart would change the "
                "function. Attach with base=None, or say with ReLoRA(lossy=True) that this is meant."
            )

    def rank_at(self, name: str, found: Any = None) -> int:
        return self.rank

    def adapt(self, base: Base, spec: Spec, rank: int, shared: Any = None) -> Adapter:
        base.check_open(spec.name)
        self._refuse_rounding(spec, base.exact)
        return ReLoRALayer(base, spec, rank, self.alpha / self.rank, self.lora)

    def start(self, adapter: Adapter, key: Key, found: Any = None) -> None:
        self.lora.start(adapter, key)

    @property
    def lora(self) -> LoRA:
        """One cycle."""
        return LoRA(rank=self.rank, alpha=self.alpha, dropout=self.dropout)

    # ---- the model

    def in_place(self, name: str, adapted: bool) -> bool:
        return self.rest == "train" and (not adapted or name.rpartition(".")[2] == "bias")

    def must_learn(self, name: str) -> bool:
        return False  # models own parameters that a task never reaches, such as BERT's pooler

    def transform(self, name: str, tensor: Tensor, spec: Spec | None, leaf: str) -> Any:
        return Adam(Wide(), "stochastic") if narrow(tensor.dtype) else None

    def events(self) -> tuple[Event, ...]:
        return () if self.every is None else (Restart(self.every, self.reset, self.ratio, self.warming),)

    def metrics(self, adapters: Mapping[str, Adapter]) -> dict[str, float]:
        """Restarts since this phase began; and what rounding took at the last one, where the weight is not exact."""
        layers = [a for a in adapters.values() if isinstance(a, ReLoRALayer)]
        lost = [layer.lost for layer in layers if layer.lost is not None]
        found = {"restarts": float(layers[0].restarts)}
        return found | ({"merge_loss": statistics.median(lost)} if lost else {})

    def cannot_ride(self, optimizer: torch.optim.Optimizer) -> str:
        if self.every is None or isinstance(optimizer, (Optimizer, torch.optim.Adam, torch.optim.AdamW)):
            return ""
        return (
            f"resets Adam's moments of its factors at every restart, and {type(optimizer).__name__} is no Adam that it "
            "knows. Use run.optimizer() or torch.optim.AdamW."
        )

    def lr_schedule(self, total: int, warmup: int) -> Callable[[int], float]:
        cycle = self.period
        if cycle is None or cycle >= total:
            return partial(cosine, total=total, warmup=warmup, floor=self.floor)
        if warmup > cycle:
            raise ConfigError(
                f"A warm-up of {warmup} updates does not end before the first cycle of {cycle} does. Lower the "
                "warm-up, or set every, or cycle, higher."
            )
        return partial(jagged_cosine, total=total, warmup=warmup, cycle=cycle, rewarm=self.warming, floor=self.floor)

    def check_span(self, start: int, end: int, total: int | None) -> str:
        if self.every is None or self.every < end - start:
            return ""
        return (
            f"ReLoRA(every={self.every}) has {end - start} updates in this phase at most, so it never restarts and is "
            "LoRA. Set every below that."
        )

    @property
    def adjustable(self) -> frozenset[str]:
        return frozenset({"every", "reset", "ratio", "cycle", "rewarm", "floor"})

    @property
    def solitary(self) -> str:
        return "merges into the base, which all adapters would share"
