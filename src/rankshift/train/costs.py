"""What each phase of a training costs: parameters that train, memory at the peak, time of an update."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankshift.core import shard
from rankshift.core.phase import Phase, labels
from rankshift.summary import size

MEASURED, ESTIMATED = "phase_peak_memory", "phase_estimated_memory"
TOLD = "phase_told_"  # and a name: what the method had to say at the end of its phase


@dataclass
class Meter:
    """Time and memory of a phase while it trains, on this rank; of a resumed one since it was resumed."""

    device: torch.device
    updates: int = 0
    seconds: float = 0.0  # without evaluations and checkpoints
    _since: float = 0.0

    def begin(self) -> None:
        """A phase begins, or training goes on in it. Resets CUDA's own record of the peak."""
        self.updates, self.seconds = 0, 0.0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.pause()

    def pause(self) -> None:
        """What took place since the last update is none of its time."""
        self._since = time.perf_counter()

    def count(self) -> None:
        """An update was taken."""
        now = time.perf_counter()
        self.seconds, self._since, self.updates = self.seconds + now - self._since, now, self.updates + 1

    def read(self, tensors: Iterable[Tensor], gradients: Sequence[Tensor], fused: bool) -> dict[str, float]:
        """Mean seconds of an update, and bytes: the peak that CUDA saw, elsewhere an estimate, without activations.

        Args:
            tensors: the model's, and the optimizer's state.
            gradients: what trains.
            fused: of all gradients one is there at a time.
        """
        found = {"phase_update_seconds": self.seconds / self.updates} if self.updates else {}
        if self.device.type == "cuda":
            return {**found, MEASURED: torch.cuda.max_memory_allocated(self.device)}
        sizes = [_bytes(g) for g in gradients]
        both = sum(_bytes(t) for t in tensors) + (max(sizes, default=0) if fused else sum(sizes))
        return {**found, ESTIMATED: both}


def _bytes(tensor: Tensor) -> int:
    part = shard.held(tensor)
    return part.numel() * part.element_size()


def table(
    phases: Sequence[Phase], history: Iterable[Mapping[str, Any]], step: int, lr: float | None = None
) -> list[dict[str, Any]]:
    """One row a phase, of what a Trainer logged of it; with null for what it did not.

    Args:
        phases: of a run.
        history: ``log_history`` of its Trainer.
        step: updates taken, where the last phase ends.
        lr: peak learning rate of phases that were begun without one of their own.
    """
    logged = {int(entry["phase"]): entry for entry in history if "phase" in entry}  # the last of each
    rows = []
    for number, (phase, label) in enumerate(zip(phases, labels(phases), strict=True), 1):
        entry = logged.get(number, {})
        rows.append(
            {
                "method": phase.method["method"],
                "label": label,
                "start": phase.start,
                "stop": step if phase.stop is None else phase.stop,
                "lr": lr if phase.lr is None else phase.lr,
                "trainable": phase.trainable,
                "seconds_per_update": entry.get("phase_update_seconds"),
                "peak_memory": entry.get(MEASURED),
                "estimated_memory": entry.get(ESTIMATED),  # weights, gradients and optimizer state
                "told": in_words(
                    phase.method,
                    {key.removeprefix(TOLD): value for key, value in entry.items() if key.startswith(TOLD)},
                ),
            }
        )
    return rows


def in_words(method: Mapping[str, Any], told: Mapping[str, float]) -> dict[str, float | str]:
    """What a method (as ``to_dict`` gives it) said of itself, with a stage by its name rather than its number."""
    return {key: word if isinstance(word := method.get(key), str) else value for key, value in told.items()}


def words(row: Mapping[str, Any]) -> str:
    """A row of :func:`table` in plain words."""
    parts = [f"{row['stop'] - row['start']} updates"]
    if row["trainable"] is not None:
        parts.append(f"{row['trainable']:,} parameters trained")
    if row["seconds_per_update"] is not None:
        parts.append(f"{row['seconds_per_update']:.3g} s an update")
    if row["peak_memory"] is not None:
        parts.append(f"{size(row['peak_memory'])} of GPU memory at the peak")
    if row["estimated_memory"] is not None:
        parts.append(f"about {size(row['estimated_memory'])} of weights, gradients and optimizer state")
    return ", ".join(parts)
