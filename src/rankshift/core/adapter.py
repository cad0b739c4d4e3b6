"""Adapter: what is trained at one site. ``forward`` is the paper's equation, ``delta`` the same as a weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from rankshift.core import shard
from rankshift.core.base import Base


class LowRank(NamedTuple):
    """A change y += scale · B (A x) of a linear layer: what the layer adds to its base's product, and nothing else.

    With a magnitude μ it is y = μ ⊙ (W x + scale · B (A x)) / ‖W + scale · B A‖ + bias: the norm is that of each row, a
    constant to the gradient, and where it is 0 nothing is rescaled.
    """

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    scale: float
    magnitude: Tensor | None = None  # (out,)


class Columns(NamedTuple):
    """Columns of the stored weight that train: W[:, channels] is W₀[:, channels] + scale · D already."""

    channels: Tensor  # (r,)
    D: Tensor  # (out, r)
    scale: float


class Adapter(Base):
    """Stands on a base and is itself one, so adapters stack: the sum of two is one standing on the other.

    Subclasses define ``forward``, ``product`` (the same without biases) and ``delta``; a law ties forward and delta
    together. Parameters that train require a gradient; frozen ones (a shared projection, an anchor) do not. The set of
    both is fixed from the first step to the last.
    """

    storage: ClassVar[bool] = False
    slots: ClassVar[dict[str, int]] = {}
    """Parameter → axis along which it splits into rank slots, for events that exchange or prune single ranks."""
    site: str = ""
    """Dotted name of the layer, set when the adapter is placed."""
    label: str = ""
    """Name of the adapter in its run, set likewise."""
    trains: frozenset[str] = frozenset()
    """Parameters that train while the adapter is active, set when it is placed."""
    silent: frozenset[str] = frozenset()
    """Parameters whose gradient is exactly zero in the first update because another starts at zero."""
    derived: frozenset[str] = frozenset()
    """Tensors that follow from the base and the others: never saved, made anew by :meth:`enter`."""

    @property
    def keeps(self) -> Tensor | None:
        """Columns of the weight, (k,), sorted, that must not be rounded where it is held in fewer bits."""
        return None

    def rebased(self) -> None:
        """The weight below has just been rounded, before anything was trained: what was measured of it is again."""

    leaves: ClassVar[bool] = False
    """True if the base fades away while this trains, so that two thin layers remain: see :meth:`alone`."""

    def __init__(self, base: Base):
        super().__init__()
        self.stand_on(base)

    def stand_on(self, base: Base) -> None:
        """Put this adapter on another base of the same layer."""
        self.__dict__["base"] = base  # a plain reference: the site owns the base and registers it once
        self.form, self.out_features, self.in_features = base.form, base.out_features, base.in_features

    base: Base

    def meet(self, kin: Sequence[Adapter]) -> None:
        """Once all are placed: these adapters, this the first of them, probably read one input (see core/kin.py)."""

    def enter(self) -> None:
        """Begin to act, linked and with values: what must then stand in the base is put there. May be repeated."""

    def leave(self) -> None:
        """Give back to the base what :meth:`enter` took, bit for bit; ``forward`` goes on to hold. May be repeated."""

    def refresh(self) -> None:
        """Bring what stands in the base up to date where another hand than the optimizer's changed what it follows
        from; :meth:`term` does so too."""

    def aside(self) -> dict[str, Tensor]:
        """Tensors that stay on the CPU whatever the device of the model: saved as its other tensors are, by name, but
        no buffers, so that nobody moves, shards or broadcasts them. Every rank has the same."""
        return {}

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return self.base.bias

    @property
    def packed(self) -> tuple[Tensor, ...]:
        return self.base.packed

    @property
    def rank(self) -> int:
        """The one integer that determines every shape of this adapter; 0 if it has no rank."""
        return 0

    def linear(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def product(self, x: Tensor) -> Tensor:
        raise NotImplementedError  # not forward minus its bias: what was added and rounded does not come off again

    @property
    def total_bias(self) -> Tensor | None:
        below, own = self.base.total_bias, self.delta_bias()
        return own if below is None else below if own is None else below + own

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def delta(self, rows: slice = slice(None)) -> Tensor:
        """Rows of the change of the (out, in) weight, in the adapter's dtype; differentiable."""
        raise NotImplementedError

    def delta_bias(self) -> Tensor | None:
        """The change of the bias, (out,), or None if the method has none."""
        return None

    def term(self) -> LowRank | Columns | None:
        """What a linear layer's forward does now besides its base, differentiable, for code that multiplies for
        several layers at once; None if only :meth:`forward` knows."""
        return None

    def branch(self) -> tuple[Tensor, Tensor] | None:
        """(A, B), differentiable, with ``B @ A == delta()``; None if the change has no such form."""
        return None

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """Whole (A, B), detached, with ``B @ A == delta()``; None if the change has no such form."""
        return None

    def alone(self) -> tuple[Tensor, Tensor, Tensor | None] | str:
        """Whole (A, B, C), detached, if the layer is B(A x) + C without its base; else why it is not, as a clause."""
        return "its change adds to the weight below"

    @property
    def changed(self) -> bool:  # type: ignore[override]
        return self.base.changed

    def add_(self, delta: Callable[[slice], Tensor]) -> None:
        """W += delta, in the storage at the bottom."""
        self.base.add_(delta)

    def check_open(self, name: str) -> None:
        self.base.check_open(name)

    def rows(self, rows: slice = slice(None)) -> Tensor:
        with torch.no_grad():
            below = self.base.rows(rows)
            change = self.whole_delta()[..., rows, :]
            return (below.to(torch.promote_types(below.dtype, change.dtype)) + change).to(below.dtype)

    @torch.no_grad()
    def whole_delta(self) -> Tensor:
        """All rows of :meth:`delta`, gathered under sharding (then every rank must call this)."""
        if not any(shard.is_sharded(p) for p in self.parameters()):
            return self.delta()
        factors = {name: shard.whole(p) for name, p in self.named_parameters()}
        delta: Tensor = torch.func.functional_call(_Delta(self), {f"adapter.{k}": v for k, v in factors.items()}, ())
        return delta


class _Delta(torch.nn.Module):
    """``delta`` as a forward, so that functional_call can run it on gathered factors."""

    def __init__(self, adapter: Adapter):
        super().__init__()
        self.adapter = adapter

    def forward(self) -> Tensor:
        return self.adapter.delta()
