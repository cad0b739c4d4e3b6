"""GaLore: Adam in the leading subspace of each weight's gradient. Zhao et al. 2024, arXiv 2403.03507.

    G = ∂L/∂W (m, n);  m > n: X = G Q, Q the n × r leading right singular vectors;  m < n: X = Pᵀ G, P those of the left
    every T updates   Q ← of the gradient of now; Adam's moments stay where they stand
    W ← (1 − lr·wd) W − lr·α·N Qᵀ,   N = Adam(X)

Every weight trains, in place, as in full fine-tuning; what is small is Adam's state. What has no (out, in) matrix to
project (embeddings, norms, biases, a head that ``targets`` does not name) takes ordinary AdamW at lr, without α.

Beyond the paper: cheaper finders of the subspace, moments that go along (``transport``), Fira's residual, and renewals
spread over the updates. Where the paper's algorithm writes bias-corrected moments back into the state, which would
destroy the averages, they are temporaries here, as in the authors' code.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rankshift.core.adapter import Adapter
from rankshift.core.base import Base
from rankshift.core.errors import ConfigError, UnsupportedLayer
from rankshift.core.event import Event
from rankshift.core.form import EmbeddingForm, Form
from rankshift.core.method import Method, Subspace
from rankshift.core.random import Key
from rankshift.core.site import Spec, select, spec_of
from rankshift.methods import galore_projected
from rankshift.optim.adam import Adam
from rankshift.optim.inside import Inside
from rankshift.optim.moments import Blocks, Store, Wide
from rankshift.optim.project import Clock, Project
from rankshift.optim.rounding import narrow
from rankshift.optim.subspace import Finder, Transport
from rankshift.optim.transform import Optimizer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GaLore(Method):
    """Full-parameter training with Adam's moments in an r-dimensional subspace of each layer's gradient."""

    name: ClassVar[str] = "galore"
    paper: ClassVar[str] = "Zhao et al. 2024, arXiv 2403.03507"
    summary: ClassVar[str] = "every weight; Adam's moments in the leading subspace of each gradient"
    formula: ClassVar[str] = "out·in"
    reversible: ClassVar[bool] = False
    trains_base: ClassVar[bool] = True
    default_lr: ClassVar[float] = 1e-2

    rank: int = 128
    """Dimensions of the subspace; where a side of a layer is smaller, that. The paper has a quarter of the model's
    width, and 4 or 8 to fine-tune."""
    scale: float = 0.25
    """α, a factor on the step of projected weights. The paper: 0.25 to pre-train, 4 and 2 at ranks 4 and 8."""
    every: int = 200
    """T: updates between two renewals of a subspace; 0: it is found once."""
    stagger: bool = True
    """Renew a few layers at a time, at up to five moments in T updates, instead of all in one, as the paper does."""
    finder: Finder = "range"
    """How a subspace is found: "svd" as in the paper, "eigh" of the Gram matrix (the same subspace, faster), "range"
    (randomised: nearly all of the energy where some directions stand out, four fifths where none does, at a fraction of
    the time), "warm" (one iteration from the last one)."""
    transport: Transport = "none"
    """What happens to Adam's moments at a renewal: "none" as in the paper, "reset", "square" or "centred"."""
    residual: Literal["none", "fira"] = "none"
    """"fira": what lies outside the subspace goes along, scaled row by row as Adam scaled what lies inside (Chen et
    al. 2024, arXiv 2410.01623)."""
    side: Literal["smaller", "larger", "in"] = "smaller"
    """Which side of a layer is projected. "smaller" as in the paper; "larger" keeps less state; "in" is cheapest where
    rows are sharded."""
    rest: Literal["train", "freeze"] = "train"
    """What is not projected: trained by AdamW, as in the paper, or left as it is."""
    moments: Literal["float32", "8bit"] = "float32"
    """How Adam's moments are held, of all that trains: in fp32, or in 8 bits, block by block (4096 numbers of a weight
    are too few to gain from that, and vectors stay in fp32)."""
    rounding: Literal["nearest", "stochastic", "master"] | None = None
    """How a weight in bf16 or fp16 takes its step, which must be said for a model that has such weights: "nearest"
    loses steps below half a bit of the weight; "stochastic" keeps them on average; "master" keeps them exactly, in an
    fp32 copy, 4 bytes a weight. Weights in fp32 need none of them."""

    gradient: Literal["full", "projected"] = "full"
    """"projected": linear layers form their weight's gradient inside the subspace only, (r·longer side) instead of
    out·in numbers, and keep r numbers a token for backward where their input side is projected. The same training, but
    gradients are clipped by the norm of the projected ones, and the memory of moments stays that of the largest rank.
    Other layers, such as convolutions, go as in "full"."""
    begin: int = 1
    """With "projected": updates over which layers begin to train, one after the other. Each needs its whole gradient in
    its first update, in fp32; 1 has all of them in the first one, 16 a sixteenth of them at a time."""

    def check(self) -> None:
        kind = type(self).__name__
        if self.begin < 1 or (self.begin > 1 and self.gradient == "full"):
            raise ConfigError(
                f'{kind}(begin={self.begin}, gradient="{self.gradient}"): updates over which layers of '
                'gradient="projected" begin, at least 1. Leave it out, or set gradient="projected".'
            )
        if self.gradient == "projected":
            if self.residual == "fira":
                raise ConfigError(
                    f'{kind}(gradient="projected", residual="fira"): the residual is what lies outside the subspace, '
                    'and that is never formed. Use gradient="full", or leave residual out.'
                )
            if self.rounding == "master":
                raise ConfigError(
                    f'{kind}(gradient="projected", rounding="master"): the weights are no tensors of the optimizer, '
                    'which would keep their copies. Use rounding="stochastic", or load the model in fp32 and train '
                    "under autocast."
                )
        if self.rank < 1:
            raise ConfigError(f"{kind}(rank={self.rank}): it must be at least 1.")
        if self.every < 0:
            raise ConfigError(f"{kind}(every={self.every}): updates between two renewals, or 0 for never.")
        if not 0 < self.scale < math.inf:
            raise ConfigError(f"{kind}(scale={self.scale}): a factor on the step, above 0.")
        if self.modules_to_save:
            raise ConfigError(f"{kind} trains modules where they are, without copies: leave modules_to_save out.")

    def sites(self, model: nn.Module) -> list[str]:
        return [spec.name for spec in self._projected(model) if self.gradient == "projected" and spec.form.pointwise]

    def fit(self, spec: Spec) -> None:
        if isinstance(spec.form, EmbeddingForm):
            raise UnsupportedLayer(
                f"{spec.name} is an Embedding: each update changes the few rows that its batch asks for, and no "
                "subspace keeps those. Leave it out of targets: what is not projected trains by AdamW."
            )
        if not spec.dtype.is_floating_point:
            kind = str(spec.dtype).removeprefix("torch.")
            raise UnsupportedLayer(f"{spec.name} has weights in {kind}: only real ones train. Exclude it in targets.")
        if self.gradient == "projected" and spec.form.pointwise:
            self._check_rounding(f"{spec.name}.weight", spec.dtype)

    def projects(self, model: nn.Module) -> dict[str, Spec]:
        specs = [s for s in self._projected(model) if self.gradient == "full" or not s.form.pointwise]
        return {spec.weight: spec for spec in specs}

    def _projected(self, model: nn.Module) -> list[Spec]:
        """The layers whose gradients are projected, wherever that is done."""
        specs = [spec_of(model, name) for name in select(model, self.targets, self.exclude)]
        for spec in specs:
            self.fit(spec)
        return specs

    def survey(self, model: nn.Module, specs: Sequence[Spec], data: Iterable[Any] | None, seed: int) -> dict[str, Any]:
        layers = self._projected(model)
        if short := [spec for spec in layers if spec.max_rank < self.rank]:
            widest = max(short, key=lambda spec: spec.max_rank)
            _log.warning(
                "%s(rank=%d): %d of %d layers have a smaller side; there the rank is that side, at most %d at %s.",
                type(self).__name__, self.rank, len(short), len(layers), widest.max_rank, widest.name,
            )  # fmt: skip
        return {}

    def rank_at(self, name: str, found: Any = None) -> int:
        return self.rank

    def adapt(self, base: Base, spec: Spec, rank: int, shared: Any = None) -> Adapter:
        on_input = galore_projected.on_input(self.project(spec.form), spec)
        return galore_projected.ProjectedLayer(base, spec, min(rank, spec.max_rank), on_input)

    def start(self, adapter: Adapter, key: Key, found: Any = None) -> None:
        galore_projected.start(adapter, key)

    def events(self) -> tuple[Event, ...]:
        if self.gradient == "full":
            return ()
        return galore_projected.events(self.project(Form()), self.rounding or "nearest", self.begin)

    def in_place(self, name: str, adapted: bool) -> bool:
        return self.rest == "train" and not (adapted and name.rpartition(".")[2] == "weight")

    def must_learn(self, name: str) -> bool:
        return False

    def cannot_ride(self, optimizer: torch.optim.Optimizer) -> str:
        if isinstance(optimizer, Optimizer):
            return ""
        return (
            f"projects gradients inside its own optimizer, and {type(optimizer).__name__} would step with whole ones. "
            "Use run.optimizer()."
        )

    def transform(self, name: str, tensor: Tensor, spec: Spec | None, leaf: str) -> Any:
        if leaf == galore_projected.LEAF:
            return Inside.of(self.project(Form()))
        self._check_rounding(name, tensor.dtype)
        if spec is not None:
            return self.project(spec.form)
        if self.moments == "float32" and not narrow(tensor.dtype):
            return None
        return Adam(self.store, self.rounding or "nearest")

    def _check_rounding(self, name: str, dtype_of: torch.dtype) -> None:
        """Raise ConfigError where a weight of 16 bits would train and nothing is said of how it is rounded."""
        if self.rounding is None and narrow(dtype_of):
            kind, dtype = type(self).__name__, str(dtype_of).removeprefix("torch.")
            raise ConfigError(
                f"{name} is in {dtype}, where small steps are lost, and {kind} trains it in place: choose "
                f'{kind}(rounding="stochastic"), which keeps them on average; rounding="master", an fp32 copy of each '
                'weight in the optimizer; or rounding="nearest", without either. Or load the model in fp32.'
            )

    @property
    def adjustable(self) -> frozenset[str]:
        """All but what decides which tensors there are and of what shape: where a gradient is projected as it is
        formed, X and its basis have the largest rank."""
        firm = {"targets", "exclude", "tied", "modules_to_save", "rest", "side", "gradient"}
        if self.gradient == "projected":
            firm.add("rank")
        return frozenset(f.name for f in fields(self)) - firm

    @property
    def trains_narrow(self) -> bool:
        return self.rounding is not None

    @property
    def store(self) -> Store:
        """Of Adam's moments."""
        return Blocks() if self.moments == "8bit" else Wide()

    def project(self, form: Form) -> Project:
        """The transform of the weights of layers of this form."""
        return Project(
            rank=self.rank,
            clock=Clock(self.every, stagger=self.stagger),
            finder=self.finder,
            transport=self.transport,
            residual=self.residual == "fira",
            side=self.side,
            scale=self.scale,
            form=form,
            store=self.store,
            rounding=self.rounding or "nearest",
        )

    def subspaces(
        self,
        specs: Mapping[str, Spec],
        states: Mapping[str, Mapping[str, Tensor]],
        adapters: Mapping[str, Adapter],
    ) -> dict[str, Subspace]:
        found = {name: self.seen(spec, states.get(name, {})) for name, spec in specs.items()}
        return found | galore_projected.subspaces(adapters, states, self.project(Form()).energy)

    def seen(self, spec: Spec, state: Mapping[str, Tensor]) -> Subspace:
        """What one layer's state says of its subspace."""
        most = min(self.rank, spec.max_rank)
        renewals, renewed = (int(state[key]) if state else 0 for key in ("renewals", "renewed"))
        rank = state["basis"].shape[-1] if state else most
        size = sum(t.numel() * t.element_size() for t in state.values() if t.dim())
        wish = self.project(spec.form).energy
        return Subspace(spec.shape, rank, most, wish, state.get("energy"), renewals, renewed, size)
