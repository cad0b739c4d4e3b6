"""What a phase looks like while it trains, window by window: its mean loss, and the norms of weights.

From it follows when a phase has done its part: once, over several windows, neither the loss nor any family of weights
has moved much (the partial-convergence test of PreLoRA, Krishuthapa et al. 2025, arXiv 2509.21619, as its code has it).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rankshift.core import shard

_NOTHING = 1e-12  # a norm or loss that is zero


@dataclass(frozen=True)
class Wish:
    """What to look at."""

    window: int  # updates
    weights: tuple[str, ...] = ()  # parameters of the model, by name
    keep: int = 2  # snapshots


@dataclass(frozen=True)
class Snapshot:
    """The end of one window."""

    step: int  # updates taken
    loss: float  # mean over the window, of all ranks
    norms: Mapping[str, float]  # ‖W‖_F of each weight, by name

    def to_mapping(self) -> dict[str, Any]:
        """Plain values; a number that is none as a text, because JSON has no word for it."""
        return {"step": self.step, "loss": _plain(self.loss), "norms": {k: _plain(v) for k, v in self.norms.items()}}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Snapshot:
        """The inverse of :meth:`to_mapping`."""
        return cls(int(values["step"]), float(values["loss"]), {k: float(v) for k, v in values["norms"].items()})


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


@dataclass(eq=False)
class _Heard:
    """One batch's loss, until the update that it is for is taken or not."""

    loss: Tensor
    before: list[_Heard]  # those of this update whose backward pass had been made by then
    counts: bool = False  # its backward pass was made, and its gradients were not thrown away


@dataclass(eq=False)
class Watch:
    """Hears the loss of every batch and takes a snapshot at the end of every window. What counts are the losses of
    updates that were taken."""

    wish: Wish
    snapshots: list[Snapshot] = field(default_factory=list)  # the last ones, oldest first
    _heard: list[_Heard] = field(default_factory=list)  # since the last update
    _sum: Tensor | float = 0.0  # in float64, of this window
    _count: int = 0

    @property
    def heard(self) -> bool:
        """Whether there was a loss since the last update."""
        return bool(self._heard)

    def hear(self, loss: Tensor, accumulates: Callable[[], bool] = lambda: True) -> None:
        """One batch's loss, a scalar. Waits for no device.

        Args:
            accumulates: whether gradients of earlier batches are there, as a backward pass begins. If not, their losses
                do not count: an update that a loop, or a loss scaler, leaves out makes no step.
        """
        value = loss.detach().float().double()  # sums of these are exact, so it matters not who adds what
        heard = _Heard(value, [other for other in self._heard if other.counts])
        self._heard.append(heard)
        if loss.requires_grad and not torch.compiler.is_compiling():
            loss.register_hook(functools.partial(_begun, heard, accumulates))  # type: ignore[no-untyped-call]
        else:
            heard.counts = True

    def skip(self) -> None:
        """The update was not taken: what was heard for it is of no use."""
        self._heard.clear()

    def look(self, step: int, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        """An update was taken, ``step`` of the phase; at the end of a window every rank must be here.

        Args:
            weights: gives what :attr:`Wish.weights` names; asked at the end of a window.
        """
        losses = [heard.loss for heard in self._heard if heard.counts] or [heard.loss for heard in self._heard]
        self._heard.clear()
        for loss in losses:
            self._sum = loss if isinstance(self._sum, float) and self._sum == 0 else self._sum + loss
        self._count += len(losses)
        if step % self.wish.window:
            return
        loss, count = self.open().tolist()
        self._sum, self._count = 0.0, 0
        self.snapshots.append(Snapshot(step, loss / max(count, 1), norms(weights())))
        del self.snapshots[: -self.wish.keep]

    def open(self) -> Tensor:
        """(2,), sum and count of the window that is not over, of the updates that were taken and of all ranks; every
        rank must call this."""
        return shard.total(torch.tensor([float(self._sum), float(self._count)], dtype=torch.float64))

    def load(self, snapshots: Sequence[Mapping[str, Any]], window: Tensor) -> None:
        """Go on from what was saved. The first rank goes on with the sum of all."""
        self.snapshots = [Snapshot.from_mapping(values) for values in snapshots]
        self._sum, self._count = (float(window[0]), int(window[1])) if shard.rank() == 0 else (0.0, 0)
        self._heard.clear()


def _begun(heard: _Heard, accumulates: Callable[[], bool], gradient: Tensor) -> None:
    """A backward pass begins at this loss."""
    if heard.before and not accumulates():
        for other in heard.before:
            other.counts = False
    heard.before = []
    heard.counts = True


def norms(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """‖W‖_F of each, over all ranks that hold a part, in float64; one transfer to the host."""
    if not weights:
        return {}
    parts = [(shard.sum_like(shard.held(w).to(torch.float64).square().sum(), w)) for w in weights.values()]
    device = parts[0].device
    return dict(zip(weights, torch.stack([p.to(device) for p in parts]).sqrt().tolist(), strict=True))


def change(before: float, after: float) -> float:
    """|after − before| in percent of |before|; 0 if both are nothing, ∞ if only the first is."""
    if abs(before) < _NOTHING:
        return 0.0 if abs(after) < _NOTHING else float("inf")
    return 100 * abs(after - before) / abs(before)


def changes(before: Snapshot, after: Snapshot) -> dict[str, float]:
    """:func:`change` of every weight's norm."""
    return {name: change(norm, after.norms[name]) for name, norm in before.norms.items()}


def family(name: str) -> str:
    """The weights of one kind in all layers: "encoder.layer.3.attention.output.dense.weight" without its numbers."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def by_family(values: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The same, family by family."""
    found: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        found.setdefault(family(name), {})[name] = value
    return found


def converged(snapshots: Sequence[Snapshot], windows: int, loss: float | None, weight: float | None) -> bool:
    """Whether over the last ``windows`` snapshots each change of the loss is at most ``loss`` percent, and the mean
    change of the norms in every family below ``weight`` percent. None asks nothing. False before there are so many."""
    if len(snapshots) < windows:
        return False
    last = list(snapshots)[-windows:]
    for before, after in itertools.pairwise(last):
        if loss is not None and not change(before.loss, after.loss) <= loss:
            return False
        if weight is not None:
            for values in by_family(changes(before, after)).values():
                if not sum(values.values()) / len(values) < weight:
                    return False
    return True
