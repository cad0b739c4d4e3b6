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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from rankshift.ops.projected_fold import Fold, fits, fold_
from rankshift.ops.projected_linear import Listener, projected_linear
from rankshift.optim import Optimizer, rounding, subspace
from rankshift.optim.inside import Inside
from rankshift.optim.project import TOGETHER, Project
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
        self._along_rows = (type(base.form) is Form) == on_input  # X lies along axis 0 of the stored weight
        self.subspace = nn.Parameter(torch.zeros(length, rank, dtype=spec.master, device=spec.device))
        self.basis = nn.Parameter(torch.zeros(s, rank, dtype=spec.master, device=spec.device), requires_grad=False)
        self.listener = Listener()
        self.put_off = 0  # renewals in a row
        self._narrow: tuple[Tensor, Any, Tensor] | None = None  # Q, its state then, and Q in the weight's dtype

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
    def fold(self, state: dict[str, Tensor], keep: float, how: Rounding, step: Tensor) -> None:
        """W ← keep·W + ΔW, rounded once.

        Args:
            step: this rank's part of X; in the weight's dtype to be rounded to the nearest: a product in 16 bits is
                summed in fp32.
        """
        basis = self._whole_basis(step.dtype)
        if self._along_rows:
            rows, columns = step, basis
        else:
            rows = basis[shard.local(self.basis)[1]] if shard.is_sharded(self.basis) else basis
            columns = shard.whole(self.subspace).to(step.dtype) if shard.is_sharded(self.subspace) else step

        def write(weight: Tensor) -> None:
            if how == "nearest":
                shard.held(weight).addmm_(rows, columns.t(), beta=keep)
                return
            here = rounding.opened(weight, state)
            here.addmm_(rows.to(here.dtype), columns.t().to(here.dtype), beta=keep)
            rounding.close(weight, here, state, how)

        self.base.rewrite_(write)

    def whole_fold(self, state: dict[str, Tensor], keep: float, how: Rounding) -> Fold | None:
        """What :meth:`fold` does with X, for a kernel that takes many layers at once; None where it cannot."""
        left, right = (self.subspace, self.basis) if self._along_rows else (self.basis, self.subspace)
        weight = self.base.weight
        if not fits(weight, left, right):
            return None
        if not self.base.changed:
            self.base.changed = True  # as Base.rewrite_ says it, of a plain weight
        return Fold(weight, left, right, keep, rounding.word(state) if how == "stochastic" else 0)

    def _whole_basis(self, dtype: torch.dtype) -> Tensor:
        """Q in some dtype; where it is held whole, a narrower one is made once a renewal."""
        Q = self.basis
        if shard.is_sharded(Q) or dtype == Q.dtype:
            return shard.whole(Q).to(dtype)
        made_from = Q._version, Q.device, dtype
        if self._narrow is None or self._narrow[0] is not Q or self._narrow[1] != made_from:
            self._narrow = Q, made_from, Q.detach().to(dtype)
        return self._narrow[2]

    @property
    def gradient(self) -> Tensor:
        """∂L/∂X (l, r), which is there."""
        assert self.subspace.grad is not None
        return self.subspace.grad

    @torch.no_grad()
    def heard(self) -> Tensor:
        """A (l, s), the whole gradient of this update, equal on all ranks."""
        G = self.listener.gradient
        if G is None:  # no token came here on this rank
            G = torch.zeros(self.out_features, self.in_features, dtype=self.basis.dtype, device=self.basis.device)
        self.listener.start(False)
        G = shard.over_data(G, self.gradient).to(self.basis.dtype)
        return G if self.on_input else G.t()

    def factor(self, along: float, size: float, scaled: float) -> float | None:
        """c with X.grad = c·A Q; None if they are not along each other.

        Args:
            along: ⟨X.grad, A Q⟩.
            size: ‖A Q‖².
            scaled: ‖X.grad‖².
        """
        if size == scaled == 0:
            return 1.0
        if along**2 > _ALONG * size * scaled:
            self.put_off = 0
            return along / size
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
        if self.put_off == 1:
            _log.warning("%s. It is put off from update to update.", message)
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
        """Whether it is the turn of a layer that has no basis yet. It stays its turn until a gradient comes."""
        if not isinstance(tick.optimizer, Optimizer):  # there is none yet
            return True
        place, count = tick.optimizer.place(X)
        return (place - 1) * self.begin < count * (tick.step - tick.began + 1)


@dataclass(frozen=True)
class Renew:
    """A new basis where one is due."""

    transform: Inside
    moment: ClassVar[Moment] = Moment.GRADS

    def due(self, tick: Tick) -> bool:
        return True

    def apply(self, adapter: Adapter, tick: Tick) -> None:
        self.apply_all([adapter], tick)

    def idle(self, adapters: Sequence[Adapter], tick: Tick) -> bool:
        """Whether no basis is due, and every layer has one."""
        layers = [adapter for adapter in adapters if isinstance(adapter, ProjectedLayer)]
        return not any(layer.listener.open or not _begun(tick.state(layer.subspace)) for layer in layers)

    def apply_all(self, adapters: Sequence[Adapter], tick: Tick) -> None:
        """Bases of layers of one shape are found together, and all are scaled after one transfer to the host."""
        due: dict[int, list[ProjectedLayer]] = {}  # by parameter group
        for adapter in adapters:
            assert isinstance(adapter, ProjectedLayer)
            X = adapter.subspace
            if X.grad is None:
                continue
            assert isinstance(tick.optimizer, Optimizer)
            if not tick.state(X):
                tick.optimizer.state[X].update(tick.optimizer.initial(X))
            if adapter.listener.open:
                due.setdefault(id(tick.group(X)), []).append(adapter)
            elif not _begun(tick.state(X)):
                X.grad = None  # its turn is yet to come
        for layers in due.values():
            self._renew(layers, tick)

    def _renew(self, layers: Sequence[ProjectedLayer], tick: Tick) -> None:
        inside, states = self.transform, [tick.state(layer.subspace) for layer in layers]
        kinds = [
            (layer.subspace.shape, layer.basis.shape, layer.basis.dtype, layer.basis.device, _begun(state))
            for layer, state in zip(layers, states, strict=True)
        ]
        sizes = [layer.in_features * layer.out_features for layer in layers]
        batches = [[layers[i] for i in batch] for batch in subspace.alike(kinds, sizes, TOGETHER)]
        heard = [_Heard.of(batch) for batch in batches]
        sums = torch.cat([h.sums.to(heard[0].sums.device) for h in heard], 1)
        measured = iter(
            shard.sum_like(sums, layers[0].subspace).t().tolist()
        )  # the one transfer, where ranks are fixed
        turns, chosen = [], []
        for batch, h in zip(batches, heard, strict=True):
            factors = [layer.factor(*next(measured)) for layer in batch]
            for layer, factor in zip(batch, factors, strict=True):
                if factor is None and not _begun(tick.state(layer.subspace)):
                    layer.subspace.grad = None  # there is no basis yet to step in
            if some := [i for i, factor in enumerate(factors) if factor is not None]:
                h = h if len(some) == len(batch) else h.some(some)
                turned = [batch[i] for i in some]
                Xs = [layer.subspace for layer in turned]
                keys = [Key(tick.seed) / f"{layer.site}.weight" for layer in turned]
                turns.append(inside.turn(h.gradients, h.bases, Xs, [tick.state(X) for X in Xs], keys))
                chosen.append((turned, h, [factor for factor in factors if factor is not None]))
        news = inside.enter(turns, hyper_of(tick.group(layers[0].subspace)))
        for turn, (turned, h, scales), bases in zip(turns, chosen, news, strict=True):
            new = torch.stack([old if basis is None else basis for old, basis in zip(h.bases, bases, strict=True)])
            formed = h.gradients[:, h.rows] @ new
            begun = [i for i, basis in enumerate(bases) if basis is not None]
            if begun:
                kept, total = formed.square().sum((-2, -1)), turn.found.total
                inside.tell([turn.states[i] for i in begun], kept[begun], total[begun], turn.ps[0])
            gradients = list(formed.unbind())
            torch._foreach_mul_(gradients, scales)
            torch._foreach_copy_(h.parts, gradients)
            for layer, basis in zip(turned, new, strict=True):
                shard.assign_(layer.basis, basis)


@dataclass(frozen=True)
class _Heard:
    """What layers of one shape have heard in an update."""

    gradients: Tensor  # (n, l, s), whole
    bases: Tensor  # (n, s, r), whole
    parts: list[Tensor]  # of the gradients of X, (rows, r) each, what is held here
    rows: slice  # of l, which these are
    sums: Tensor  # (3, n): ⟨X.grad, A Q⟩, ‖A Q‖², ‖X.grad‖² over the rows held here

    @classmethod
    def of(cls, layers: Sequence[ProjectedLayer]) -> _Heard:
        A = torch.stack([layer.heard() for layer in layers])
        Q = torch.stack([shard.whole(layer.basis) for layer in layers])
        parts, rows = zip(*(shard.local(layer.gradient) for layer in layers), strict=True)
        formed, given = (A[:, rows[0]] @ Q).flatten(1), torch.stack(parts).flatten(1)
        pairs = ((given, formed), (formed, formed), (given, given))
        return cls(A, Q, list(parts), rows[0], torch.stack([torch.linalg.vecdot(a, b) for a, b in pairs]))

    def some(self, indices: list[int]) -> _Heard:
        """Of those layers at some places."""
        parts = [self.parts[i] for i in indices]
        return _Heard(self.gradients[indices], self.bases[indices], parts, self.rows, self.sums[:, indices])


@dataclass(frozen=True)
class FoldIn:
    """The step inside the subspace goes into the weight: the update itself, with its decay."""

    how: Rounding
    moment: ClassVar[Moment] = Moment.UPDATED
    steps: ClassVar[bool] = True

    def due(self, tick: Tick) -> bool:
        return True

    def apply(self, adapter: Adapter, tick: Tick) -> None:
        self.apply_all([adapter], tick)

    def apply_all(self, adapters: Sequence[Adapter], tick: Tick) -> None:
        """What the kernel takes together; of the rest, with one launch what all layers share."""
        folds: list[Fold] = []
        layers: list[ProjectedLayer] = []
        keeps, parts = [], []
        for layer in adapters:
            assert isinstance(layer, ProjectedLayer)
            X = layer.subspace
            if X.grad is None:
                continue
            parts.append(shard.held(X) if shard.is_sharded(X) else X)  # detaching each costs more than all launches
            keep = _kept(tick.group(X))
            fold = layer.whole_fold(tick.state(X), keep, self.how)
            if fold is not None:
                folds.append(fold)
            else:
                layers.append(layer)
                keeps.append(keep)
        void = tick.optimizer.void if isinstance(tick.optimizer, Optimizer) else None
        if folds:
            fold_(folds, self.how == "stochastic", void)
        if layers and (void is None or not bool(void)):
            self._apart(layers, keeps, tick)
        if parts:
            torch._foreach_zero_(parts)

    def _apart(self, layers: Sequence[ProjectedLayer], keeps: Sequence[float], tick: Tick) -> None:
        """Layer by layer; the steps come into the weights' dtype together."""
        steps = parts = [shard.held(layer.subspace) for layer in layers]
        if self.how == "nearest":
            steps = [torch.empty_like(s, dtype=a.base.weight.dtype) for a, s in zip(layers, parts, strict=True)]
            torch._foreach_copy_(steps, parts)
        for layer, keep, step in zip(layers, keeps, steps, strict=True):
            layer.fold(tick.state(layer.subspace), keep, self.how, step)


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
