"""What is logged of a run while it trains, beside the loss; and a callback that has an unmodified Trainer log it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from rankshift.core.errors import ConfigError
from rankshift.core.watch import by_family, change, changes
from rankshift.run import Run
from rankshift.train.heat_map import heat_map as draw
from rankshift.train.timeline import timeline as draw_timeline


class RunCallback(TrainerCallback):
    """Logs of a run, from an unmodified transformers Trainer or one of TRL's, what ``rs.Trainer`` logs by itself.

    >>> trainer = Trainer(run.model, args, optimizer_cls_and_kwargs=run.optimizer_cls_and_kwargs(args), ...)
    >>> trainer.add_callback(RunCallback(run, trainer, heat_map="out/subspaces.png"))

    With each loss: skipped updates and what the method has to say (``run.metrics()``); of each subspace that was
    renewed ``subspace_rank/WEIGHT`` and so on. It goes to ``log_history`` and to whatever ``report_to`` names, in
    entries of its own; consoles are not shown single layers.

    Args:
        run: the run whose model this trainer trains.
        trainer: which is to log it.
        heat_map: a PNG of rank and captured energy over layers and updates, written when training ends.
        timeline: a PNG of the loss, with phases and events under it, likewise.

    Raises:
        ConfigError: ``rs.Trainer`` does this by itself; or there is no subspace to draw.
    """

    def __init__(
        self,
        run: Run,
        trainer: transformers.Trainer,
        heat_map: str | Path | None = None,
        timeline: str | Path | None = None,
    ):
        if isinstance(getattr(trainer, "run", None), Run):
            raise ConfigError("rs.Trainer logs its run by itself. RunCallback is for other trainers.")
        if heat_map is not None and not run.subspace_table().rows:
            raise ConfigError(
                f"heat_map={str(heat_map)!r}: {type(run.method).__name__} has no subspaces to draw. Leave it out."
            )
        self.run, self.trainer, self.heat_map, self.timeline = run, trainer, heat_map, timeline
        self.news = News()

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        # the Trainer's own log, not that of its class: TRL's add what they have collected since the last
        if found := self.news.of_all(self.run):
            transformers.Trainer.log(self.trainer, found)
        if found := self.news.of_each(self.run):
            with without_screens(self.trainer.callback_handler):
                transformers.Trainer.log(self.trainer, found)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.heat_map is not None and state.is_world_process_zero:
            draw(self.heat_map, state.log_history)
        if self.timeline is not None and state.is_world_process_zero:
            draw_timeline(self.timeline, self.run, state.log_history)


class News:
    """What is worth logging of a run; what does not change is said once."""

    def __init__(self) -> None:
        self._counted = False
        self._renewals: dict[str, int] = {}  # of each projected weight's subspace, when it was last asked for
        self._window = 0  # the last window that was told, by the update at its end

    def state(self) -> dict[str, Any]:
        """What was told, for :meth:`load`: plain values."""
        return {"counted": self._counted, "renewals": dict(self._renewals), "window": self._window}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from where a training was stopped."""
        self._counted, self._window = bool(state["counted"]), int(state["window"])
        self._renewals = {name: int(count) for name, count in state["renewals"].items()}

    def of_all(self, run: Run) -> dict[str, float]:
        """Skipped updates, what the method says, and the first time how much trains. Under FSDP2 for every rank."""
        found: dict[str, float] = {"skipped": run.skipped} if run.skipped else {}
        found |= run.metrics() | self.of_window(run)
        if not self._counted:
            found["trainable_parameters"] = sum(p.numel() for _, p in run.trainable())
            self._counted = True
        return found

    def of_window(self, run: Run) -> dict[str, float]:
        """Of the last window of what a phase's end depends on, once: its loss, and what changed since the one before,
        in percent, with the limit at which the phase ends; of weights, in the family that moved most."""
        seen = [] if run.watch is None else run.watch.snapshots
        if not seen or seen[-1].step == self._window:
            return {}
        self._window = seen[-1].step
        found = {"window_end": float(run.phases[-1].start + seen[-1].step), "window_loss": seen[-1].loss}
        if len(seen) > 1:
            found["window_loss_change"] = change(seen[-2].loss, seen[-1].loss)
            moved = by_family(changes(seen[-2], seen[-1])).values()
            if moved:
                found["window_weight_change"] = max(sum(family.values()) / len(family) for family in moved)
            goal = run.method if run.method.watches(run.model) is not None else next(iter(run.coming), None)
            for name in ("loss_change", "weight_change"):
                if (limit := getattr(goal, name, None)) is not None:
                    found[f"window_{name}_limit"] = float(limit)
        return found

    def of_each(self, run: Run) -> dict[str, float]:
        """Of each subspace that was renewed since the last time: ``subspace_rank/WEIGHT`` and so on. To be logged
        apart, and only what is new, or a log of a few hundred layers would be mostly this."""
        rows = [row for row in run.subspace_table().rows if row.renewals != self._renewals.get(row.name, 0)]
        self._renewals |= {row.name: row.renewals for row in rows}
        return {key: value for row in rows for key, value in row.logged().items()}


@contextlib.contextmanager
def without_screens(handler: CallbackHandler) -> Iterator[None]:
    """Without the callbacks that print every log as it is."""
    every = handler.callbacks
    handler.callbacks = [one for one in every if not isinstance(one, (PrinterCallback, ProgressCallback))]
    try:
        yield
    finally:
        handler.callbacks = every
