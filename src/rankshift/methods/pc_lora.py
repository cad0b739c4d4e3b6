"""PC-LoRA: F = λ(n)·(W x + b) + B(A x) + C, λ from 1 to exactly 0. Hwang et al. 2024, arXiv 2406.09117.

A is (r, in), B (out, r), C (out,); B and C start at zero, so at n = 0 the function is that of the base. While λ fades
the frozen layer away, the loss keeps what layers put out near what they put out in the original:

    L = α·task + (1 − α)·mean over layers of MSE(student, teacher)

The teacher is the same storage, its adapters unlinked, in eval mode: a second forward and no second copy. At λ = 0 the
layer is two thin ones, Linear(in → r) and Linear(r → out, bias C); ``run.compress()`` leaves those and nothing else.

There is no official code; where unofficial ones differ from this:
- distillation has a gradient, the base path stays in the graph (∂x gets λWᵀg), and the teacher has no dropout;
- the teacher's features come from the teacher's own forward, not from W on the student's x;
- C absorbs the fading b; λ follows optimizer steps, is exactly 0 from the end of the decay on, and is restored by a
  resume, which knows it from the step.
"sine" and "cosine" are the formulas that re-implementations use; which name the paper gives them could not be checked.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rankshift.core import shard
from rankshift.core.adapter import Adapter
from rankshift.core.base import Base
from rankshift.core.errors import ConfigError, RankTooLarge, TrainingError, UnmatchedTarget, UnsupportedLayer, nearest
from rankshift.core.event import Event, Moment, Tick
from rankshift.core.form import EmbeddingForm
from rankshift.core.lesson import Heard, Lesson
from rankshift.core.method import Method
from rankshift.core.random import Key
from rankshift.core.site import Spec, by_pattern, matches, walk
from rankshift.methods import lora_init


def fading(decay: str, u: float) -> float:
    """λ at u = n/q: from 1 at u = 0 to exactly 0 at u ≥ 1."""
    if u >= 1:
        return 0.0
    if decay == "sine":  # fast first
        return 1 - math.sin(math.pi * u / 2)
    return math.cos(math.pi * u / 2) if decay == "cosine" else 1 - u  # slow first; even


@dataclass(eq=False)
class Beginning:
    """When the layers of one adapter began to fade: 0, or later for one that a shift or a second adapter brought."""

    step: int | None = None  # updates of the run before that; None until it acts for the first time

    def describe(self) -> dict[str, Any]:
        """As it is saved with the run."""
        return {"began": self.step}


class PCLoRALayer(Adapter):
    """F = λ(W x + b) + B(A x) + C; two thin layers at λ = 0, where the base is not called.

    Ordinary operations compose it. Autograd keeps x by reference and A x, so in + r values a token; λ scales what came
    out of the base in fp32, and both parts are added there and rounded once.
    """

    slots: ClassVar[dict[str, int]] = {"A": 0, "B": 1}
    leaves: ClassVar[bool] = True
    silent = frozenset("A")

    lam: Tensor  # (), λ in fp32 whatever the base: bf16 has 8 bits. Not saved, the step determines it
    faded: bool  # λ is 0: a flag beside the tensor, so that compiled code without the base is another code

    def __init__(self, base: Base, spec: Spec, rank: int, bias: bool, config: PCLoRA, beginning: Beginning):
        super().__init__(base)
        self.config, self.beginning, self.faded = config, beginning, False

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=spec.master, device=spec.device))

        self.A, self.B = new(rank, spec.into), new(spec.out, rank)
        self.C = new(spec.out) if bias else None
        self.register_buffer("lam", torch.ones((), dtype=spec.master, device=spec.device), persistent=False)

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def fade(self, lam: float) -> None:
        """Set λ."""
        self.lam.fill_(lam)
        self.faded = lam == 0

    def forward(self, x: Tensor) -> Tensor:
        if self.faded:
            dtype = self.base.dtype
            z = self.form.apply(x, self.A.to(dtype))
            return self.form.expand(z, self.B.to(dtype), None if self.C is None else self.C.to(dtype))
        y = self.base.linear(x)
        total = self._faded(y) + self._branch(x, y.dtype)
        return (total if self.C is None else self.form.shift(total, self.C)).to(y.dtype)

    def product(self, x: Tensor) -> Tensor:
        if self.faded:
            return self._branch(x, self.base.dtype)
        y = self.base.product(x)
        return (self._faded(y) + self._branch(x, y.dtype)).to(y.dtype)

    def _faded(self, y: Tensor) -> Tensor:
        return self.lam * y.to(torch.promote_types(y.dtype, torch.float32))

    def _branch(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self.form.expand(self.form.apply(x, self.A.to(dtype)), self.B.to(dtype))

    def delta(self, rows: slice = slice(None)) -> Tensor:
        """(λ − 1) W + B A."""
        return (self.lam - 1) * self.base.rows(rows).to(self.B.dtype) + self.B[rows] @ self.A

    def delta_bias(self) -> Tensor | None:
        """(λ − 1) b + C."""
        b = self.base.total_bias
        gone = None if b is None else (float(self.lam) - 1) * b.to(self.B.dtype)
        return gone if self.C is None else self.C if gone is None else gone + self.C

    def alone(self) -> tuple[Tensor, Tensor, Tensor | None] | str:
        if not self.faded:
            return f"λ is still {float(self.lam):.3g}; it reaches 0 at decay_end = {self.config.decay_end} of the run"
        A, B = shard.whole(self.A), shard.whole(self.B)
        return A, B, None if self.C is None else shard.whole(self.C)


@dataclass(frozen=True)
class Fade:
    """λ ← λ(n), a function of the step alone; n counts from when the adapter first acts."""

    method: PCLoRA
    moment: ClassVar[Moment] = Moment.WINDOW

    def due(self, tick: Tick) -> bool:
        return True

    def apply(self, adapter: Adapter, tick: Tick) -> None:
        assert isinstance(adapter, PCLoRALayer)
        beginning = adapter.beginning
        if beginning.step is None:
            beginning.step = tick.step
        left = None if tick.total is None else tick.total - beginning.step
        adapter.fade(self.method.lam_at(tick.step - beginning.step, left))


@dataclass(frozen=True, kw_only=True)
class PCLoRA(Method):
    """A low-rank branch takes over from a frozen layer that fades away."""

    name: ClassVar[str] = "pc-lora"
    paper: ClassVar[str] = "Hwang et al. 2024, arXiv 2406.09117"
    summary: ClassVar[str] = "the frozen layers fade away; two thin ones each remain, a smaller model"
    formula: ClassVar[str] = "r·(out + in) + out"

    rank: int = 32
    """r, the width between the two thin layers that remain. 32 gives the paper's ratios: ViT-B and BERT-base keep 6 %
    of the parameters of their linear layers."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Ranks for layers matched by name, e.g. {"fc2": 64}; the last match counts."""
    decay: Literal["linear", "sine", "cosine"] = "linear"
    """λ over u = n/q: 1 − u; 1 − sin(πu/2), fast first; cos(πu/2), slow first. In small trials they differ little."""
    decay_end: float = 0.8
    """q as a fraction of total_steps (of what is left of them where a shift brings the method in): λ is 0 from there
    on, and the thin layers train alone. 0.8 in unofficial code."""
    hold: int = 1
    """Updates for which λ stays before it moves again."""
    task_weight: float = 0.2
    """α: L = α·task + (1 − α)·distillation. 0.1 and 0.2 in unofficial code."""
    features: bool = True
    """Distil what adapted layers put out: the mean over layers of the mean squared difference, in fp32."""
    also: tuple[str, ...] = ()
    """Further modules whose outputs count as features, by name as in targets. The paper adds the last layer; name it
    here where the original has a trained one, such as a final norm."""
    logits: bool = False
    """Distil the model's output too: KL(teacher ‖ student)·T², added to the features' term. Not in the paper; needs an
    original whose head is trained."""
    temperature: float = 2.0
    """T of the logits term. Hinton et al. 2015 use 1 to 20."""
    bias: Literal["always", "match"] = "always"
    """C at every layer, as in the paper: it makes up for the mean of what rank r cannot say. Or only where the layer
    has a bias, so that run.merge() finds a place for it."""

    def check(self) -> None:
        for where, rank in (("rank", self.rank), *self.rank_pattern.items()):
            if rank < 1:
                raise ConfigError(f"PCLoRA rank {rank} at {where!r} is below 1.")
        if not 0 < self.decay_end <= 1:
            raise ConfigError(
                f"PCLoRA.decay_end = {self.decay_end} is not in (0, 1]: λ falls from 1 to 0 within the run, and is 0 "
                "from that fraction of total_steps on."
            )
        if not 0 <= self.task_weight <= 1:
            raise ConfigError(f"PCLoRA.task_weight = {self.task_weight} is not in [0, 1].")
        if self.hold < 1:
            raise ConfigError(f"PCLoRA.hold = {self.hold} is below 1 update.")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"PCLoRA.temperature = {self.temperature} is not a positive number.")
        if self.also and not self.features:
            raise ConfigError("PCLoRA.also names features to distil, and features=False. Drop one of the two.")
        if self.task_weight == 0 and not self.features and not self.logits:
            raise ConfigError("PCLoRA(task_weight=0, features=False, logits=False) leaves no loss to train on.")

    # ---- one site

    def sites(self, model: nn.Module) -> list[str]:
        self._others(model)
        return super().sites(model)

    def rank_at(self, name: str, found: Any = None) -> int:
        return by_pattern(self.rank_pattern, name, self.rank)

    def fit(self, spec: Spec) -> None:
        if spec.form.stacked or isinstance(spec.form, EmbeddingForm):
            kind = "a stack of expert weights" if spec.form.stacked else "an Embedding"
            raise UnsupportedLayer(
                f"{spec.name} is {kind}: PC-LoRA replaces linear layers and convolutions. Exclude it in targets."
            )
        rank = self.rank_at(spec.name)
        if rank > spec.max_rank:
            raise RankTooLarge(
                f"rank {rank} at {spec.name} exceeds min(out, in) = {spec.max_rank}. "
                f'Lower rank, set rank_pattern for it, or exclude "{spec.name.rpartition(".")[2]}".'
            )

    def survey(self, model: nn.Module, specs: Sequence[Spec], data: Iterable[Any] | None, seed: int) -> dict[str, Any]:
        larger = [s for s in specs if self.rank_at(s.name) * (s.out + s.into) >= s.out * s.into]
        if larger:
            first = larger[0]
            bound = first.out * first.into / (first.out + first.into)
            warnings.warn(
                f"rank {self.rank_at(first.name)} makes {len(larger)} layer{'s' * (len(larger) > 1)} no smaller: two "
                f"thin layers are smaller below rank {bound:.4g} = out·in / (out + in) at {first.name}. Lower rank, or "
                "set rank_pattern.",
                stacklevel=2,
            )
        return {}

    def share(
        self, specs: Sequence[Spec], ranks: Mapping[str, int], saved: Mapping[str, Any] | None = None
    ) -> Beginning:
        return Beginning(None if saved is None else saved["began"])

    def adapt(self, base: Base, spec: Spec, rank: int, shared: Any = None) -> Adapter:
        return PCLoRALayer(base, spec, rank, self.bias == "always" or base.bias is not None, self, shared)

    @torch.no_grad()
    def start(self, adapter: Adapter, key: Key, found: Any = None) -> None:
        assert isinstance(adapter, PCLoRALayer)
        A, B = lora_init.kaiming(key, adapter.out_features, adapter.in_features, adapter.rank)
        adapter.A.copy_(A)
        adapter.B.copy_(B)
        if adapter.C is not None:
            adapter.C.zero_()

    def decays(self, name: str, tensor: Tensor, leaf: str) -> bool:
        return leaf != "C"  # it stands in for a bias

    # ---- the schedule

    @property
    def needs_total(self) -> bool:
        return True

    @property
    def own_bias(self) -> bool:
        return self.bias == "always"

    @property
    def solitary(self) -> str:
        return "takes the place of the layers by the clock of the whole run, whether it acts or not"

    def lam_at(self, step: int, total: int | None) -> float:
        """λ(step); 1 while ``total`` is not known. q is rounded up to whole updates, so λ ends at 0."""
        if total is None:
            return 1.0
        q = max(1, math.ceil(self.decay_end * total - 1e-9))  # 0.55·100 is 55.00000000000001
        return fading(self.decay, (step if step >= q else step - step % self.hold) / q)

    def events(self) -> tuple[Event, ...]:
        return (Fade(self),)

    def metrics(self, adapters: Mapping[str, Adapter]) -> dict[str, float]:
        return {"lambda": float(next(a.lam for a in adapters.values() if isinstance(a, PCLoRALayer)))}

    # ---- distillation

    def _others(self, model: nn.Module) -> list[str]:
        names = [name for name, _, parameter in walk(model) if parameter is None]
        for pattern in self.also:
            if not any(matches(name, pattern) for name in names):
                raise UnmatchedTarget(f"also {pattern!r} matches no module. {nearest(pattern, names)}")
        return [name for name in names if any(matches(name, pattern) for pattern in self.also)]

    def hears(self, model: nn.Module, sites: Sequence[str]) -> tuple[str, ...] | None:
        if self.task_weight == 1 or not (self.features or self.logits):
            return None
        return tuple(dict.fromkeys([*sites, *self._others(model)])) if self.features else ()

    def objective(self, task: Tensor, lesson: Lesson | None) -> Tensor:
        if lesson is None:
            return task
        terms = []
        if self.features:
            terms.append(feature_loss(lesson.student, lesson.teacher))
        if self.logits:
            student, teacher = _logits(lesson.student.output), _logits(lesson.teacher.output)
            terms.append(logit_loss(student, teacher, self.temperature))
        # α·task stays in the sum at α = 0: FSDP2 gathers weights for backward where the model's output asks it to
        return self.task_weight * task + (1 - self.task_weight) * torch.stack(terms).sum()


def feature_loss(student: Heard, teacher: Heard) -> Tensor:
    """Mean over layers (and their calls) of the mean squared difference, in fp32 or wider.

    Raises:
        TrainingError: the two did not see the same batch.
    """
    terms = []
    for name, outputs in student.features.items():
        others = teacher.features.get(name, [])
        for mine, its in zip(outputs, others, strict=False):
            if mine.shape != its.shape or len(outputs) != len(others):
                break
            terms.append(_MeanSquare.apply(mine, its))  # type: ignore[no-untyped-call]
        else:
            if len(outputs) == len(others):
                continue
        raise TrainingError(
            f"{name} put out {[tuple(t.shape) for t in outputs]} in training, but the original "
            f"{[tuple(t.shape) for t in others]}: run.loss was given another batch than the model was called with."
        )
    if not terms:
        raise TrainingError("The forward used none of the adapted layers, so there are no features to distil.")
    return torch.stack(terms).mean()


class _MeanSquare(torch.autograd.Function):
    """mean (a − b)² in fp32 or wider, a scalar; keeps a and b as they are, where autograd would keep wide copies."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(a, b)
        return _difference(a, b).square_().mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        a, b = ctx.saved_tensors
        return (_difference(a, b).mul_(2 * g / max(1, a.numel()))).to(a.dtype), None


def _difference(a: Tensor, b: Tensor) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide, copy=True).sub_(b)


def logit_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·KL(teacher ‖ student) of the softened distributions over the last axis, mean over all others."""
    if student.shape != teacher.shape:
        raise TrainingError(
            f"The model put out logits of shape {tuple(student.shape)} in training, but the original "
            f"{tuple(teacher.shape)}: run.loss was given another batch than the model was called with."
        )
    wide = torch.promote_types(student.dtype, torch.float32)
    p, q = ((t.to(wide) / temperature).log_softmax(-1).flatten(0, -2) for t in (student, teacher))
    return temperature**2 * F.kl_div(p, q, reduction="batchmean", log_target=True)


def _logits(output: Any) -> Tensor:
    if isinstance(output, Mapping):
        output = output.get("logits")
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise ConfigError(
            f"PCLoRA(logits=True) needs a model that returns its logits, as a tensor or by that name; it returned "
            f"{type(output).__name__}. Set logits=False."
        )
    return found
