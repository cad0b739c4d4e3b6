"""What a phase looks like while it trains, window by window: its mean loss, and the norms of weights.

From it follows when a phase has done its part: once, over several windows, neither the loss nor any family of weights
has moved much (the partial-convergence test of PreLoRA, Krishuthapa et al. 2025, arXiv 2509.21619, as its code has it).
"""

from __future__ import annotations

import itertools
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
        """Plain values."""
        return {"step": self.step, "loss": self.loss, "norms": dict(self.norms)}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Snapshot:
        """The inverse of :meth:`to_mapping`."""
        return cls(int(values["step"]), float(values["loss"]), {k: float(v) for k, v in values["norms"].items()})


@dataclass(eq=False)
class Watch:
    """Hears the loss of every batch and takes a snapshot at the end of every window."""

    wish: Wish
    snapshots: list[Snapshot] = field(default_factory=list)  # the last ones, oldest first
    heard: bool = False  # a loss since the last update
    _sum: Tensor | float = 0.0  # in float64
    _count: int = 0

    def hear(self, loss: Tensor) -> None:
        """One batch's loss, a scalar. Waits for no device."""
        value = loss.detach().float().double()  # sums of these are exact, so it matters not who adds what
        self._sum = value.clone() if isinstance(self._sum, float) and self._sum == 0 else self._sum + value
        self._count += 1
        self.heard = True

    def look(self, step: int, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        """An update was taken, ``step`` of the phase; at the end of a window every rank must be here.

        Args:
            weights: gives what :attr:`Wish.weights` names; asked at the end of a window.
        """
        self.heard = False
        if step % self.wish.window:
            return
        loss, count = self.open().tolist()
        self._sum, self._count = 0.0, 0
        self.snapshots.append(Snapshot(step, loss / max(count, 1), norms(weights())))
        del self.snapshots[: -self.wish.keep]

    def open(self) -> Tensor:
        """(2,), sum and count of the window that is not over, of all ranks; every rank must call this."""
        return shard.total(torch.tensor([float(self._sum), float(self._count)], dtype=torch.float64))

    def load(self, snapshots: Sequence[Mapping[str, Any]], window: Tensor) -> None:
        """Go on from what was saved. The first rank goes on with the sum of all."""
        self.snapshots = [Snapshot.from_mapping(values) for values in snapshots]
        self._sum, self._count = (float(window[0]), int(window[1])) if shard.rank() == 0 else (0.0, 0)
        self.heard = False


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
