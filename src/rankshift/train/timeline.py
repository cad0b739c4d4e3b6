"""What happened in a training under its loss: phases as a band, rare events, and how far it was from convergence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rankshift.core.errors import DataError
from rankshift.core.event import Tick
from rankshift.core.phase import Phase, labels
from rankshift.io.atomic import explain
from rankshift.methods import from_dict
from rankshift.run import Run
from rankshift.train.report import INK, MUTED, SURFACE, read_history, smooth

History = str | Path | Iterable[Mapping[str, Any] | tuple[int, float]]
"""A ``trainer_state.json``, or a directory with one (a checkpoint), the ``log_history`` of a Trainer, or pairs of
(update, loss) that a loop collected."""

# Okabe and Ito's colours, told apart by everyone; the blue and the orange of loss.png are of them
_LOSS, _CHECK = "#0072B2", "#D55E00"
_BANDS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#999999")
_CHANGES = {  # of what is logged: its name, what a phase's end says of it, colour, marker
    "loss_change": ("loss", "at most", _LOSS, "o"),
    "weight_change": ("weights that move most", "below", _BANDS[2], "s"),
}
_LEAST = 1e-4  # percent; what is less is drawn there
_LINES = 12  # phases that are told one by one
_MARKS = 200  # of an event, at most


@dataclass(frozen=True)
class Band:
    """One phase, after update ``start`` and up to update ``stop``."""

    number: int  # from 1
    name: str
    start: int
    stop: int
    trainable: int | None

    def __str__(self) -> str:
        trains = "" if self.trainable is None else f", {self.trainable:,} parameters train"
        return f"{self.number}  {self.name}, updates {self.start + 1} to {self.stop}{trains}"


def bands(phases: Sequence[Phase], step: int) -> list[Band]:
    """The phases of a run that has taken ``step`` updates; those in which none was are left out."""
    found = []
    for number, (phase, name) in enumerate(zip(phases, labels(phases), strict=True), 1):
        stop = step if phase.stop is None else phase.stop
        if stop > phase.start:
            found.append(Band(number, name, phase.start, stop, phase.trainable))
    return found


def landmarks(run: Run) -> dict[str, list[int]]:
    """The updates in which events happened that say what they are (``landmark``), by that name.

    Nothing of it is stored: when an event is due follows from the update.
    """
    found: dict[str, list[int]] = {}
    for phase in run.phases:
        stop = run.step if phase.stop is None else phase.stop
        for event in from_dict(phase.method).events():
            name = getattr(event, "landmark", "")
            for step in range(phase.start, stop) if name else ():
                if event.due(Tick(step, run.total_steps, run.seed, None, phase.start)):
                    found.setdefault(name, []).append(step + 1)
    return found


def worth_seeing(run: Run, history: Iterable[Mapping[str, Any]]) -> bool:
    """Whether there is more than one phase, an event that is a landmark, or a watch."""
    watched = any("window_loss_change" in entry or "window_weight_change" in entry for entry in history)
    return len(run.phases) > 1 or watched or bool(landmarks(run))


def timeline(file: str | Path, run: Run, history: History, title: str = "") -> Path:
    """Write a PNG: the loss, below it the phases of the run and what happened in them.

    >>> timeline("timeline.png", trainer.run, trainer.state.log_history)
    >>> timeline("timeline.png", run, [(step, loss), …])            # what a loop collected

    Args:
        run: as it is now, or was loaded: its phases tell where each began.

    Raises:
        DataError: no update was taken.
        MissingFile: there is no such file of a Trainer.
    """
    figure = draw(run, history, title)
    try:
        figure.savefig(file)
    except OSError as error:
        raise explain(error, Path(file)) from error
    return Path(file)


def draw(run: Run, history: History, title: str = "") -> Any:
    """The figure of :func:`timeline`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    entries = [
        entry if isinstance(entry, Mapping) else {"step": entry[0], "loss": entry[1]}
        for entry in (read_history(Path(history)) if isinstance(history, (str, Path)) else history)
    ]
    spans = bands(run.phases, run.step)
    if not spans:
        raise DataError("No update was taken: there is nothing to draw yet.")
    windows = list({e["window_end"]: {**e, "step": e["window_end"]} for e in entries if "window_end" in e}.values())
    changes = {key: _points(windows, f"window_{key}") for key in _CHANGES}
    limits = {key: _limits(_points(windows, f"window_{key}_limit"), spans) for key in _CHANGES}
    watched = any(changes.values())
    told = [str(band) for band in spans[:_LINES]]
    if len(spans) > _LINES:
        told.append(f"and {len(spans) - _LINES} more")
    rows = [4.0, *([1.6] if watched else []), 0.5]
    figure = Figure(figsize=(8, sum(rows) + 0.9 + 0.2 * len(told)), dpi=150, facecolor=SURFACE, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(rows) + 1, 1, height_ratios=[*rows, 0.2 * len(told) + 0.1])
    panels = [figure.add_subplot(grid[0])]
    panels += [figure.add_subplot(grid[i], sharex=panels[0]) for i in range(1, len(rows))]
    for axes in panels:
        axes.set_facecolor(SURFACE)
        axes.tick_params(colors=MUTED, length=0)
        for side in axes.spines.values():
            side.set_visible(False)
    _losses(panels[0], entries)
    if watched:
        _changes(panels[1], changes, limits)
    _phases(panels[-1], spans)
    for axes in panels[:-1]:
        axes.tick_params(labelbottom=False)
        for band in spans[1:]:
            axes.axvline(band.start, color=MUTED, lw=0.8, ls=(0, (2, 2)), zorder=0)
    _events(panels[0], landmarks(run))
    panels[0].set_title(title, loc="left", color=INK, fontsize=11)
    panels[0].set_xlim(0, max(run.step, max((int(e.get("step", 0)) for e in entries), default=0)))
    panels[-1].set_xlabel("update", color=MUTED)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    words = figure.add_subplot(grid[len(rows)])
    words.axis("off")
    for i, line in enumerate(told):
        words.text(0, 1 - (i + 0.5) / len(told), line, color=INK, fontsize=8, va="center", transform=words.transAxes)
    return figure


def _points(entries: Iterable[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    found = [(int(e.get("step", 0)), float(e[key])) for e in entries if e.get(key) is not None]
    return [(step, value) for step, value in found if math.isfinite(value)]


def _losses(axes: Any, entries: Iterable[Mapping[str, Any]]) -> None:
    train, checks = _points(entries, "loss"), _points(entries, "eval_loss")
    if train:
        steps, values = (np.array(part, float) for part in zip(*train, strict=True))
        axes.plot(steps, values, color=_LOSS, lw=1, alpha=0.3)
        axes.plot(steps, smooth(values), color=_LOSS, lw=2, label="training")
    if checks:
        steps, values = (np.array(part, float) for part in zip(*checks, strict=True))
        axes.plot(steps, values, color=_CHECK, lw=2, marker="o", ms=4, label="validation")
    axes.set_ylabel("loss", color=MUTED)
    axes.grid(axis="y", color="#e6e5e0", lw=0.8)
    axes.set_axisbelow(True)


def _limits(points: Sequence[tuple[int, float]], spans: Sequence[Band]) -> list[tuple[int, int, float]]:
    """(start, stop, limit) of each phase that ends by one; ``points`` are (end of a window, limit)."""
    found = ((band, [v for step, v in points if band.start < step <= band.stop]) for band in spans)
    return [(band.start, band.stop, values[-1]) for band, values in found if values]


def _changes(
    axes: Any,
    changes: Mapping[str, Sequence[tuple[int, float]]],
    limits: Mapping[str, Sequence[tuple[int, int, float]]],
) -> None:
    """From window to window, in percent; dashed, what all must come down to for the phase to end."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """0.1 and 20, not 1e-01 and 2 × 10¹; at the ticks that have a label."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:,.10g}" if super().__call__(x, pos) else ""

    for key, points in changes.items():
        name, words, colour, marker = _CHANGES[key]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, np.maximum(values, _LEAST), color=colour, marker=marker, ms=4, lw=1.5, label=name)
        for start, stop, limit in limits[key]:
            axes.plot(
                [start, stop], [max(limit, _LEAST)] * 2, color=colour, lw=1.2, ls=(0, (5, 3)),
                label=f"goal: {words} {limit:g} %",
            )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(Plain())
    axes.yaxis.set_minor_formatter(Plain())
    axes.tick_params(which="both", colors=MUTED, length=0)
    axes.set_ylabel("change, %", color=MUTED)
    axes.grid(axis="y", color="#e6e5e0", lw=0.8)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # of the same limit one
    axes.legend(handles.values(), handles, frameon=False, labelcolor=INK, fontsize=7, loc="upper right", ncols=2)


def _phases(axes: Any, spans: Sequence[Band]) -> None:
    """A band with a segment for each, numbered; the name stands in it where there is room."""
    colours = {name: _BANDS[i % len(_BANDS)] for i, name in enumerate(dict.fromkeys(band.name for band in spans))}
    whole = spans[-1].stop
    for band in spans:
        width = band.stop - band.start
        axes.barh(0, width, left=band.start, height=1, color=colours[band.name], edgecolor=SURFACE, lw=1.5)
        text = f"{band.number}  {band.name}" if width / whole > 0.014 * (len(band.name) + 4) else str(band.number)
        axes.text(band.start + width / 2, 0, text, ha="center", va="center", color="#000000", fontsize=8, clip_on=True)
    axes.set_yticks([])
    axes.set_ylim(-0.5, 0.5)


def _events(axes: Any, found: Mapping[str, Sequence[int]]) -> None:
    """Short marks at the foot of the loss, a line each would hide it."""
    for i, (name, steps) in enumerate(found.items()):
        shown = steps[:: math.ceil(len(steps) / _MARKS)]
        style = {"marker": "^v|"[i % 3], "color": INK, "ls": "none", "ms": 5}
        axes.plot(
            shown, [0.02 + 0.04 * i] * len(shown), transform=axes.get_xaxis_transform(), label=f"{name} ({len(steps)})",
            clip_on=False, **style,
        )  # fmt: skip
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=INK, fontsize=8, loc="upper right")
