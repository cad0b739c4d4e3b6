"""GaLore's gradient in the subspace from the start: between two renewals that of a weight is never formed.

    forward    y = W x + bias, the plain layer
    backward   ∂L/∂X = A Q, formed as dyᵀ (x Q), or xᵀ (dy Q) for the output side: (l, r)
    step       X ← −lr·α·N,  W ← (1 − lr·wd) W + X Qᵀ (or Q Xᵀ),  X ← 0

A (l, s) is G = ∂L/∂W (out, in), or Gᵀ for the output side. X is a parameter, zero whenever a forward runs: DDP, FSDP2,
accumulation, loss scaling and clipping see its gradient as any other. ``clip_grad_norm_`` then goes by the norm of the
projected gradients, which is below that of the whole ones (in the very first update, taken in random directions, far
below). Input sides keep x Q for backward, r numbers a token; output sides keep x.

In an update that renews a layer's basis, its backward passes sum up G as well; it is averaged over ranks as X's
gradient was, and scaled as that was since (unscaled, clipped): by c with X.grad = c·A Q_old. From there the arithmetic
is Project's: the training is that of ``gradient="full"`` up to rounding, but for what clipping by another norm changes.
The first update renews all layers, with as much memory as there, unless they begin one after the other over some
updates (``begin``); a layer stands still until its turn.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankshift.core import shard
from rankshift.core.adapter import Adapter
from rankshift.core.base import Base
from rankshift.core.errors import ConfigError, TrainingError
from rankshift.core.event import Event, Moment, Tick
from rankshift.core.form import Form
from rankshift.core.method import Subspace
from rankshift.core.random import Key, normal
from rankshift.core.site import Spec
from rankshift.ops.projected_linear import Listener, projected_linear
from rankshift.optim import Optimizer, rounding
from rankshift.optim.inside import Inside
from rankshift.optim.project import Project
from rankshift.optim.rounding import Rounding
from rankshift.optim.transform import hyper_of

_log = logging.getLogger(__name__)

LEAF = "subspace"  # name of X in its layer
_ALONG = 0.98  # cosine² of X.grad and A Q below which more than a factor lies between them; rounding leaves 0.999
_PATIENCE = 20  # renewals of one layer put off in a row before the run is stopped


class ProjectedLayer(Adapter):
    """y = W x + bias, with a gradient in a subspace. X is ``subspace``, Q is ``basis``."""

    derived = frozenset({LEAF})
    silent = frozenset({LEAF})

    def __init__(self, base: Base, spec: Spec, rank: int, on_input: bool):
        super().__init__(base)
        length, s = (spec.out, spec.into) if on_input else (spec.into, spec.out)
        self.on_input = on_input
        self.subspace = nn.Parameter(torch.zeros(length, rank, dtype=spec.master, device=spec.device))
        self.basis = nn.Parameter(torch.zeros(s, rank, dtype=spec.master, device=spec.device), requires_grad=False)
        self.listener = Listener()
        self.put_off = 0  # renewals in a row
        self._narrow: tuple[Any, Tensor] | None = None  # Q in the weight's dtype, and what it was made from

    @property
    def rank(self) -> int:
        return self.basis.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, self.base.bias)

    def product(self, x: Tensor) -> Tensor:
        return self._run(x, None)

    def _run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.form.matrix(self.base.weight)
        return projected_linear(x, weight, bias, self.subspace, self.basis, self.on_input, self.listener)

    def delta(self, rows: slice = slice(None)) -> Tensor:
        left, right = (self.subspace, self.basis) if self.on_input else (self.basis, self.subspace)
        return left[rows] @ right.t()

    @torch.no_grad()
    def fold(self, state: dict[str, Tensor], keep: float, how: Rounding) -> None:
        """W ← keep·W + ΔW, rounded once; X ← 0."""
        by_out = type(self.form) is Form  # axis 0 of the stored weight, along which it may be sharded
        first, other = (self.subspace, self.basis) if by_out == self.on_input else (self.basis, self.subspace)
        rows, columns = shard.held(first), shard.whole(other)

        def write(weight: Tensor) -> None:
            # a product in bf16 is summed in fp32 and rounded once
            here = shard.held(weight) if how == "nearest" else rounding.opened(weight, state)
            here.addmm_(rows.to(here.dtype), columns.t().to(here.dtype), beta=keep)
            rounding.close(weight, here, state, how)

        self.base.rewrite_(write)
        shard.held(self.subspace).zero_()

    @torch.no_grad()
    def fold_narrow(self, step: Tensor, keep: float) -> None:
        """W ← keep·W + ΔW, summed in fp32 and rounded once, from this rank's part of X in the weight's dtype."""
        basis = self._narrow_basis(step.dtype)
        by_out = type(self.form) is Form
        if by_out == self.on_input:
            rows, columns = step, basis
        else:
            rows = basis[shard.local(self.basis)[1]]
            columns = shard.whole(self.subspace).to(step.dtype) if shard.is_sharded(self.subspace) else step

        def write(weight: Tensor) -> None:
            shard.held(weight).addmm_(rows, columns.t(), beta=keep)

        self.base.rewrite_(write)

    def _narrow_basis(self, dtype: torch.dtype) -> Tensor:
        """The whole basis in the weight's dtype; where it is held whole, made once a renewal."""
        if shard.is_sharded(self.basis):
            return shard.whole(self.basis).to(dtype)
        made_from = self.basis._version, self.basis.device, dtype
        if self._narrow is None or self._narrow[0] != made_from:
            self._narrow = made_from, self.basis.detach().to(dtype)
        return self._narrow[1]

    @torch.no_grad()
    def renew(self, transform: Inside, state: dict[str, Tensor], tick: Tick) -> None:
        """A new basis from the gradient that was heard, and X's gradient in it."""
        g = self.subspace.grad
        assert g is not None
        G = self.listener.gradient
        if G is None:  # no token came here on this rank
            G = torch.zeros(self.out_features, self.in_features, dtype=self.basis.dtype, device=self.basis.device)
        self.listener.start(False)
        G = shard.over_data(G, g).to(self.basis.dtype)
        A, Q, (part, rows) = G if self.on_input else G.t(), shard.whole(self.basis), shard.local(g)
        factor = self._factor(part, A[rows] @ Q, g)
        if factor is None:
            if int(state["renewals"]) == 0:
                self.subspace.grad = None  # there is no basis yet to step in
            return
        A.mul_(factor)
        key = Key(tick.seed) / f"{self.site}.weight"
        Q = transform.turn(A, Q, rows, state, key, hyper_of(tick.group(self.subspace)))
        shard.assign_(self.basis, Q)
        part.copy_(A[rows] @ Q)

    def _factor(self, part: Tensor, formed: Tensor, g: Tensor) -> float | None:
        """c with X.grad = c·A Q; None if they are not along each other."""
        sums = torch.stack([(part * formed).sum(), formed.square().sum(), part.square().sum()])
        along, size, scaled = shard.sum_like(sums, g).tolist()
        if size == scaled == 0:
            return 1.0
        if along**2 > _ALONG * size * scaled:
            self.put_off = 0
            return float(along / size)
        self.put_off += 1
        message = (
            f"{self.site}: its gradient was changed by more than a factor between the backward pass and the step "
            "(clipped by value, or left over from a backward pass without a step), so its subspace cannot be renewed"
        )
        if self.put_off >= _PATIENCE:
            raise TrainingError(
                f"{message}, {_PATIENCE} times in a row. Clip by norm, zero all gradients after each step, or use "
                'gradient="full".'
            )
        _log.warning("%s. It is in the next update.", message)
        return None


def _begun(state: Mapping[str, Tensor]) -> bool:
    """Whether there is a basis that comes from a gradient."""
    return bool(state) and int(state["renewals"]) > 0


@dataclass(frozen=True)
class Listen:
    """Layers whose basis will be renewed in the coming update sum up their whole gradient."""

    begin: int  # updates over which the first renewals are spread
    moment: ClassVar[Moment] = Moment.WINDOW

    def due(self, tick: Tick) -> bool:
        if tick.optimizer is not None and not isinstance(tick.optimizer, Optimizer):
            raise ConfigError(
                f'gradient="projected" takes its steps inside subspaces, which a {type(tick.optimizer).__name__} does '
                'not know. Use the optimizer of run.optimizer(), or gradient="full".'
            )
        return True

    def apply(self, adapter: Adapter, tick: Tick) -> None:
        assert isinstance(adapter, ProjectedLayer)
        state = tick.state(adapter.subspace)
        due = int(state["next"]) <= int(state["step"]) if _begun(state) else self._first(adapter.subspace, tick)
        adapter.listener.start(due)

    def _first(self, X: Tensor, tick: Tick) -> bool:
        """Whether it is the turn of a layer that has no basis yet: those before it come first."""
        group = tick.group(X).get("params", [])
        waiting = takewhile(lambda p: p is not X, (p for p in group if not _begun(tick.state(p))))
        return sum(1 for _ in waiting) < max(1, math.ceil(len(group) / self.begin))


@dataclass(frozen=True)
class Renew:
    """A new basis where one is due."""

    transform: Inside
    moment: ClassVar[Moment] = Moment.GRADS

    def due(self, tick: Tick) -> bool:
        return True

    def apply(self, adapter: Adapter, tick: Tick) -> None:
        assert isinstance(adapter, ProjectedLayer)
        X = adapter.subspace
        if X.grad is None:
            return
        assert isinstance(tick.optimizer, Optimizer)
        if not tick.state(X):
            tick.optimizer.state[X].update(tick.optimizer.initial(X))
        state = tick.state(X)
        if adapter.listener.open:
            adapter.renew(self.transform, state, tick)
        elif not _begun(state):
            X.grad = None  # its turn is yet to come


@dataclass(frozen=True)
class FoldIn:
    """The step inside the subspace goes into the weight: the update itself, with its decay."""

    how: Rounding
    moment: ClassVar[Moment] = Moment.UPDATED
    steps: ClassVar[bool] = True

    def due(self, tick: Tick) -> bool:
        return True

    def apply(self, adapter: Adapter, tick: Tick) -> None:
        assert isinstance(adapter, ProjectedLayer)
        X = adapter.subspace
        if X.grad is not None:
            adapter.fold(tick.state(X), _kept(tick.group(X)), self.how)

    def apply_all(self, adapters: Sequence[Adapter], tick: Tick) -> None:
        """With one launch for what all layers share: the steps in the weights' dtype, and the zeros after."""
        chosen = [a for a in adapters if isinstance(a, ProjectedLayer) and a.subspace.grad is not None]
        steps = [shard.held(a.subspace) for a in chosen]
        wide = [
            s for a, s in zip(chosen, steps, strict=True) if self.how != "nearest" or s.dtype == a.base.weight.dtype
        ]
        if wide or not steps:
            for adapter in chosen:
                self.apply(adapter, tick)
            return
        narrow = [torch.empty_like(s, dtype=a.base.weight.dtype) for a, s in zip(chosen, steps, strict=True)]
        torch._foreach_copy_(narrow, steps)
        for adapter, step in zip(chosen, narrow, strict=True):
            adapter.fold_narrow(step, _kept(tick.group(adapter.subspace)))
        torch._foreach_zero_(steps)


def _kept(group: Mapping[str, Any]) -> float:
    """What weight decay leaves of a weight."""
    return float(1 - group["lr"] * group["weight_decay"])


# ---- what the methods ask --------------------------------------------------------------------------------------------


def on_input(project: Project, spec: Spec) -> bool:
    """Which side of a layer is projected."""
    return project.face(spec.form.stored(torch.empty(spec.out, spec.into, device="meta")))[1]


def start(adapter: Adapter, key: Key) -> None:
    """Random directions, until the first gradient says better: they tell by what it was scaled."""
    assert isinstance(adapter, ProjectedLayer)
    s, rank = adapter.basis.shape
    adapter.basis.copy_(normal(key / "basis", (s, rank), s**-0.5, dtype=adapter.basis.dtype))


def events(project: Project, how: Rounding, begin: int) -> tuple[Event, ...]:
    """What happens between steps."""
    return Listen(begin), Renew(Inside.of(project)), FoldIn(how)


def subspaces(
    adapters: Mapping[str, Adapter], states: Mapping[str, Mapping[str, Tensor]], wish: float | None
) -> dict[str, Subspace]:
    """What the state of each layer says of its subspace, by the name of the weight."""
    found = {}
    for site, adapter in adapters.items():
        assert isinstance(adapter, ProjectedLayer)
        state = states.get(f"{site}.{LEAF}", {})
        rank, renewals, renewed = (int(state[key]) if state else 0 for key in ("rank", "renewals", "renewed"))
        tensors = [adapter.basis, *(t for t in state.values() if t.dim())] if state else []
        found[f"{site}.weight"] = Subspace(
            shape=(adapter.out_features, adapter.in_features),
            rank=rank or adapter.rank,
            limit=adapter.rank,
            wish=wish,
            energy=state.get("energy"),
            renewals=renewals,
            renewed=renewed,
            bytes=sum(t.numel() * t.element_size() for t in tensors),
        )
    return found
