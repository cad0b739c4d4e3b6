"""What is seen while a model trains: a bar with loss, speed, memory and time left; without a terminal, lines."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankshift.run import Run
from rankshift.train.costs import in_words
from rankshift.train.evaluation import Measure, show

_LINES = 10  # lines of a run whose output is not a terminal


class Bar(TrainerCallback):
    """Shows a training, and keeps what the report needs: (step, loss) of training and of validation."""

    def __init__(self, console: Console, measure: Measure, unit: str):
        self.console, self.measure, self.unit = console, measure, unit
        self.losses: list[tuple[int, float]] = []
        self.checks: list[tuple[int, dict[str, float]]] = []
        self.told: dict[str, float | str] = {}  # what the method said of itself last, among what is logged
        self._watched: dict[str, float | str] = {}
        self.done = 0  # tokens or examples seen
        self.seconds = 0.0
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._since = 0.0
        self._first = 0
        self._next = 0
        self._checked = ""

    def count(self, batch: dict[str, Any]) -> None:
        """Told of every training batch."""
        self.done += batch["input_ids"].numel() if self.unit == "tok" else len(batch["labels"])

    def watch(self, run: Run) -> None:
        """Told of the run, and of every phase that begins."""
        self._watched = outcome(run)

    @property
    def speed(self) -> float:
        """Tokens (or examples) a second, over the training so far."""
        return self.done / max(1e-9, self.elapsed)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._since, self.seconds, self._first, self.done = time.perf_counter(), 0.0, state.global_step, 0
        if not state.is_world_process_zero:
            return
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(compact=True),
                console=self.console,
                refresh_per_second=5,
                expand=True,
            )
            self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, status="starting")
            self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=state.global_step, status=self._status())
        elif not self.console.is_terminal:
            taken = state.global_step - self._first
            whole = state.max_steps - self._first
            if taken * _LINES // max(whole, 1) > self._next or state.global_step == state.max_steps:
                self._next = taken * _LINES // max(whole, 1)
                left = self.elapsed / max(taken, 1) * (whole - taken)
                text = f"{state.global_step}/{state.max_steps}  {self._status()}  {left:.0f} s left"
                self.console.print(text, soft_wrap=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.losses.append((state.global_step, float(logs["loss"])))
            seen = {key: float(value) for key, value in logs.items() if key in self._watched}
            self.told = {key: v if isinstance(v := self._watched[key], str) else seen[key] for key in seen}

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        found = named(metrics or {}, self.measure)
        self.checks.append((state.global_step, found))
        name = self.measure.headline
        self._checked = f"val {'' if name == 'loss' else f'{name} '}{found.get(name, float('nan')):.3f}"
        if self._since and state.is_world_process_zero:
            where = f"step {state.global_step}".ljust(10)
            told = f" · {said(self.told, short=True)}" if self.told else ""
            text = f"  {where} validation {show(found, self.measure.shown)}{told}"
            self.console.print(text, highlight=False, soft_wrap=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds = self.elapsed
        self.close()

    @property
    def elapsed(self) -> float:
        """Seconds of training so far."""
        return self.seconds or (time.perf_counter() - self._since if self._since else 0.0)

    def _status(self) -> str:
        loss = f"loss {self.losses[-1][1]:.3f}" if self.losses else "loss …"
        parts = [loss, said(self.told, short=True), self._checked, f"{_short(self.speed)} {self.unit}/s", memory()]
        return " · ".join(part for part in parts if part)


def named(metrics: dict[str, float], measure: Measure) -> dict[str, float]:
    """A Trainer's metrics without its prefix; its own mean over batches gives way to the measure's loss."""
    found = {key.removeprefix("eval_"): float(value) for key, value in metrics.items() if key.startswith("eval_m_")}
    found = {key.removeprefix("m_"): value for key, value in found.items()}
    if "loss" not in found and "eval_loss" in metrics:
        found["loss"] = float(metrics["eval_loss"])
    return found


def outcome(run: Run) -> dict[str, float | str]:
    """What the method says of itself, in words where it has them."""
    return in_words(run.phases[-1].method, run.metrics())


def said(told: Mapping[str, float | str], short: bool = False) -> str:
    """What a method says of itself (``run.metrics()``): "lambda 0.5", "12 of 280 gates open", short "gates 12/280"; of
    subspaces, short, only rank and energy."""
    left, parts = dict(told), []
    if short:
        left = {key: value for key, value in left.items() if key not in ("subspace_renewals", "subspace_saturated")}
        left = {key.removeprefix("subspace_"): value for key, value in left.items()}
    if {"open_gates", "gates"} <= left.keys():
        count, whole = left.pop("open_gates"), left.pop("gates")
        parts.append(f"gates {count:.0f}/{whole:.0f}" if short else f"{count:.0f} of {whole:.0f} gates open")
    left = {key: value if isinstance(value, str) else f"{value:.3g}" for key, value in left.items()}
    return ", ".join([*parts, *(f"{key.replace('_', ' ')} {value}" for key, value in left.items())])


def memory(before: float = 0) -> str:
    """Peak memory of the accelerator, or of this process. ``before``: bytes, that of phases that have ended."""
    if torch.cuda.is_available():
        return f"GPU {max(before, torch.cuda.max_memory_allocated()) / 2**30:.1f} GiB"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"RAM {peak / 2**30:.2f} GiB"


def _short(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"
