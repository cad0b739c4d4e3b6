"""What a run leaves to read: metrics.json and loss.png."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rankshift.core.errors import DataError, MissingFile
from rankshift.io.atomic import explain

SURFACE, INK, MUTED = "#ffffff", "#1a1a19", "#7a7974"
_TRAIN, _CHECK = "#2a78d6", "#eb6834"


def write_metrics(directory: Path, values: dict[str, Any]) -> None:
    """metrics.json; numbers that are not finite become null, as JSON wants it."""
    _write(directory / "metrics.json", json.dumps(_finite(values), indent=1, ensure_ascii=False) + "\n")


def read_metrics(directory: Path) -> dict[str, Any]:
    """What :func:`write_metrics` wrote; empty if there is nothing to read."""
    try:
        found = json.loads((directory / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_history(file: Path) -> list[Mapping[str, Any]]:
    """``log_history`` of a ``trainer_state.json``, or of the checkpoint that has one.

    Raises:
        MissingFile, DataError: there is no such file, or it is no Trainer's.
    """
    file = file / "trainer_state.json" if file.is_dir() else file
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        history: list[Mapping[str, Any]] = state["log_history"]
    except FileNotFoundError:
        raise MissingFile(f"{file} is not there. Name a checkpoint of a Trainer, or its trainer_state.json.") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{file} is no trainer_state.json of a Trainer: {error!r}. Name another file.") from error
    return history


def write_text(file: Path, text: str) -> None:
    """A small file, replaced as a whole."""
    _write(file, text)


def plot(
    file: Path,
    title: str,
    train: Sequence[tuple[int, float]],
    validation: Sequence[tuple[int, float]],
    base: float | None,
    words: str = "loss",
) -> None:
    """Training loss (faint, and smoothed), validation loss, and the untouched base as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, facecolor=SURFACE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=SURFACE)
    if base is not None:
        axes.axhline(base, color=INK, lw=1.2, ls=(0, (5, 3)))
        axes.annotate(
            f"untouched base, validation: {base:.3f}", (0.995, base), xycoords=("axes fraction", "data"),
            xytext=(0, 4), textcoords="offset points", ha="right", va="bottom", color=INK, fontsize=9,
        )  # fmt: skip
    finite = [(s, v) for s, v in train if math.isfinite(v)]
    if finite:
        steps, losses = (np.array(part, float) for part in zip(*finite, strict=True))
        axes.plot(steps, losses, color=_TRAIN, lw=1, alpha=0.3)
        axes.plot(steps, smooth(losses), color=_TRAIN, lw=2, label="training")
    points = [(s, v) for s, v in validation if math.isfinite(v)]
    if points:
        steps, losses = (np.array(part, float) for part in zip(*points, strict=True))
        axes.plot(steps, losses, color=_CHECK, lw=2, marker="o", ms=5, label="validation", clip_on=False)
        axes.annotate(
            f"{losses[-1]:.3f}", (steps[-1], losses[-1]), xytext=(0, 9), textcoords="offset points",
            ha="right", va="bottom", color=_CHECK, fontsize=9, fontweight="bold",
        )  # fmt: skip
    axes.set_xlabel("update", color=MUTED)
    axes.set_ylabel(words, color=MUTED)
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.set_xlim(left=0)
    axes.margins(y=0.1)
    axes.tick_params(colors=MUTED, length=0)
    axes.grid(axis="y", color="#e6e5e0", lw=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    if finite or points:
        axes.legend(frameon=False, labelcolor=INK, fontsize=9, loc="upper right", bbox_to_anchor=(1, 0.9))
    try:
        figure.savefig(file)
    except OSError as error:
        raise explain(error, file) from error


def smooth(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The mean of each point and those before it, over a tenth of the run; at the start, over what there is."""
    window = max(1, len(values) // 10)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)  # as long at the end as in the middle, or the last points would be noise
    smoothed: np.ndarray[Any, Any] = (sums[end] - sums[start]) / (end - start)
    return smoothed


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(file: Path, text: str) -> None:
    fresh = file.with_name(f".{file.name}.new")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(file)
    except OSError as error:
        raise explain(error, file) from error
