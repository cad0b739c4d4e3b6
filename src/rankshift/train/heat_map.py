"""The subspaces of a training over layers and time: rank, and the share of the gradient that it keeps."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rankshift.core.errors import DataError
from rankshift.io.atomic import explain
from rankshift.summary import Projections
from rankshift.train.report import INK, MUTED, SURFACE, read_history

What = Literal["rank", "energy"]
History = str | Path | Projections | Iterable[Mapping[str, Any] | tuple[int, Projections]]
"""A ``trainer_state.json``, or a directory with one (a checkpoint), the ``log_history`` of a Trainer, or pairs of
(update, ``run.subspace_table()``) that a loop collected; one table alone is its own update."""

_KEY = re.compile(r"subspace_(rank|energy)/(.+)")
_TITLES: dict[What, str] = {"rank": "rank", "energy": "captured share of ‖G‖²"}
_EACH = 40  # layers that are named one by one; of more, groups are
_NAMES = 40  # names of groups on an axis, at most


@dataclass(frozen=True)
class Course:
    """One number of every layer after every update that was logged; layers in the order of their names and numbers,
    because the file of a Trainer knows no other."""

    steps: tuple[int, ...]
    layers: tuple[str, ...]
    values: np.ndarray[Any, Any]  # (layers, steps); NaN before a layer was first seen

    def edges(self) -> list[float]:
        """Where on the axis of updates columns begin and end: one holds from the log before to its own."""
        if len(self.steps) == 1:
            return [self.steps[0] - 1, self.steps[0]]
        first = self.steps[0]
        return [max(0, first - (self.steps[1] - first)), *self.steps]


def course(history: History, what: What = "rank") -> Course:
    """What was logged of subspaces, as a matrix; a layer keeps its number until it is logged again.

    Raises:
        MissingFile, DataError: there is no such file, or it is no Trainer's.
    """
    logs = list(_entries(history))
    steps = sorted({step for step, _ in logs})
    layers = sorted({name for _, found in logs for name in found[what]}, key=_natural)
    row, column = ({one: i for i, one in enumerate(every)} for every in (layers, steps))
    values = np.full((len(layers), len(steps)), np.nan)
    for step, found in logs:
        for name, value in found[what].items():
            values[row[name], column[step]] = value
    for j in range(1, len(steps)):
        values[:, j] = np.where(np.isnan(values[:, j]), values[:, j - 1], values[:, j])
    return Course(tuple(steps), tuple(layers), values)


def _entries(history: History) -> Iterable[tuple[int, dict[What, dict[str, float]]]]:
    """(update, what is said of layers) of each log of a training."""
    for entry in _listed(history):
        found: dict[What, dict[str, float]] = {"rank": {}, "energy": {}}
        if isinstance(entry, Mapping):
            step = int(entry.get("step", 0))
            for key, value in entry.items():
                if match := _KEY.fullmatch(key):
                    found["rank" if match[1] == "rank" else "energy"][match[2]] = float(value)
            if "loss" not in entry and not found["rank"]:
                continue  # an evaluation, or the end
        else:
            step, table = entry
            found["rank"] = {row.name: float(row.rank) for row in table.rows}
            found["energy"] = {row.name: row.energy for row in table.rows if row.renewals}
        yield step, found


def _listed(history: History) -> list[Mapping[str, Any] | tuple[int, Projections]]:
    if isinstance(history, Projections):
        return [(history.step, history)]
    return list(read_history(Path(history)) if isinstance(history, (str, Path)) else history)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A name as something to sort by: 2 before 10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def groups(layers: Iterable[str]) -> list[tuple[str, int, int]]:
    """(name, first, past the last) of layers in a row that share a block: their names up to the first number."""

    def block(name: str) -> str:
        found = re.match(r"(?:.*?\.)??(\w+\.\d+)\.", name)
        return found[1].replace(".", " ") if found else name.removesuffix(".weight").rpartition(".")[2]

    spans, start = [], 0
    for name, members in groupby(layers, block):
        count = len(list(members))
        spans.append((name, start, start + count))
        start += count
    return spans


def heat_map(file: str | Path, history: History, title: str = "") -> Path:
    """Write a PNG of rank and captured energy over layers and updates.

    >>> heat_map("subspaces.png", trainer.state.log_history)
    >>> heat_map("subspaces.png", [(step, table), …])           # tables of run.subspace_table()

    Raises:
        DataError: nothing was logged of subspaces.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    history = _listed(history)
    courses: dict[What, Course] = {what: course(history, what) for what in _TITLES}
    layers = courses["rank"].layers
    if not layers:
        raise DataError("Nothing was logged of subspaces: a heat map needs a method that projects, such as GaLore.")
    height = 2 + min(10.0, max(2.0, 0.2 * min(len(layers), _EACH + len(layers) / 6)))
    figure = Figure(figsize=(12, height), dpi=150, facecolor=SURFACE, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (what, found) in zip(panels, courses.items(), strict=True):
        whole = np.full((len(layers), len(found.steps)), np.nan)
        for i, name in enumerate(found.layers):
            whole[layers.index(name)] = found.values[i]
        top = 1.0 if what == "energy" else max(1.0, float(np.nanmax(whole)))
        axes.set_facecolor("#e6e5e0")  # nothing known
        image = axes.pcolormesh(
            found.edges(), np.arange(len(layers) + 1), np.ma.masked_invalid(whole), vmin=0, vmax=top, cmap="viridis",
            rasterized=True,
        )  # fmt: skip
        bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=40)
        bar.set_label(_TITLES[what], color=MUTED)
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors=MUTED, length=0)
        axes.set_xlabel("update", color=MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.tick_params(colors=MUTED, length=0)
        for side in axes.spines.values():
            side.set_visible(False)
    _name(panels[0], layers)
    for axes in panels[1:]:
        axes.tick_params(labelleft=False)
        if len(layers) > _EACH:
            _rule(axes, layers)
    panels[0].invert_yaxis()  # the first layer on top; the axis is shared
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=11)
    try:
        figure.savefig(file)
    except OSError as error:
        raise explain(error, Path(file)) from error
    return Path(file)


def _name(axes: Any, layers: tuple[str, ...]) -> None:
    """Name the rows: each, or where they are many the groups."""
    axes.set_ylabel("layer", color=MUTED)
    if len(layers) <= _EACH:
        axes.set_yticks(np.arange(len(layers)) + 0.5, [_short(name) for name in layers], fontsize=7)
        return
    spans = groups(layers)
    shown = spans[:: math.ceil(len(spans) / _NAMES)]
    axes.set_yticks([(start + end) / 2 for _, start, end in shown], [name for name, _, _ in shown], fontsize=7)
    _rule(axes, layers)


def _rule(axes: Any, layers: tuple[str, ...]) -> None:
    """A line between groups."""
    for _, _, end in groups(layers)[:-1]:
        axes.axhline(end, color=SURFACE, lw=0.6)


def _short(name: str) -> str:
    """The last three parts of a layer's name, "weight" aside."""
    return ".".join(name.removesuffix(".weight").split(".")[-3:])
