"""Phases: what trained when, and what comes next. A change of the set of trainable tensors begins a new one, never
happens inside one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from rankshift.core import config
from rankshift.core.errors import ConfigError
from rankshift.core.method import Method, from_dict, to_dict
from rankshift.core.watch import Snapshot, Wish, converged


@dataclass(frozen=True)
class Phase:
    """One method from one update to another."""

    method: dict[str, Any]  # as to_dict gives it
    start: int  # updates taken before its first
    stop: int | None = None  # updates taken when it ended; None while it runs
    lr: float | None = None  # peak learning rate that the phase was begun with, where one was said
    trainable: int | None = None  # parameters that it began to train; None in files of before

    def ended(self, step: int) -> Phase:
        """This phase, closed after ``step`` updates."""
        return replace(self, stop=step)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, for a manifest."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str = "phase") -> Phase:
        """The inverse of :meth:`to_mapping`."""
        try:
            method, start, stop = dict(values["method"]), int(values["start"]), values["stop"]
            return cls(method, start, stop, values.get("lr"), values.get("trainable"))
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{where} is not a phase: {values!r}.") from error


@dataclass(frozen=True)
class Then:
    """A method to go on with, and when: at the first of ``steps``, ``minutes``, ``loss``, and convergence, which is
    ``loss_change`` and ``weight_change`` together. All count from the beginning of the phase before it in the list; a
    shift by hand comes in between and changes nothing of that, but windows begin anew with every phase."""

    method: Method
    steps: int | None = None
    """After so many updates."""
    minutes: float | None = None
    """After so much time of training."""
    loss: float | None = None
    """Once the mean training loss of a window is at most this."""
    loss_change: float | None = None
    """Once the mean loss changes by at most so many percent from window to window."""
    weight_change: float | None = None
    """Once the norms of the weights that train change by less than so many percent, on average in every family of
    layers: PreLoRA's test, see core/watch.py."""
    window: int = 100
    """Updates of a window."""
    windows: int = 3
    """Windows over which changes must be small."""
    lr: float | None = None
    """Peak learning rate of the phase; None: as it was."""

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise ConfigError(f"Then needs a method such as rs.LoRA(rank=16); got {type(self.method).__name__}.")
        config.conform_fields(self)
        said = [name for name in WHEN if getattr(self, name) is not None]
        if not said:
            raise ConfigError(
                f"When is {self._kind} to begin? Say one or more of {', '.join(WHEN)}, e.g. Then(method, steps=1000)."
            )
        for name in (*said, "window"):
            if name != "loss" and not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"Then({self._kind}, {name}={getattr(self, name)}): it must be above 0.")
        if self.loss is not None and not math.isfinite(self.loss):
            raise ConfigError(f"Then({self._kind}, loss={self.loss}): a number is needed.")
        if self.windows < 2:
            raise ConfigError(f"Then({self._kind}, windows={self.windows}): a change is between two windows at least.")
        if self.steps is not None:
            self.check_sight(self.steps, f"after steps={self.steps} it begins anyway")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ConfigError(f"Then({self._kind}, lr={self.lr}): a learning rate, above 0.")

    @property
    def _kind(self) -> str:
        return type(self.method).__name__

    @property
    def looks(self) -> bool:
        """Whether the loss must be known."""
        return any(value is not None for value in (self.loss, self.loss_change, self.weight_change))

    def wish(self, weights: Sequence[str]) -> Wish | None:
        """What to watch, of these weights that train."""
        if not self.looks:
            return None
        if self.weight_change is not None and not weights:
            raise ConfigError(
                f"Then({self._kind}, weight_change={self.weight_change}) looks at the weights of linear layers, and "
                "the phase before trains none of them. Use loss_change, loss, steps or minutes."
            )
        return Wish(self.window, tuple(weights) if self.weight_change is not None else (), self.windows)

    def reached(self, steps: int, minutes: float, snapshots: Sequence[Snapshot]) -> bool:
        """Whether it is time, after so many updates and minutes of the phase before."""
        if self.steps is not None and steps >= self.steps:
            return True
        if self.minutes is not None and minutes >= self.minutes:
            return True
        if self.loss is not None and snapshots and snapshots[-1].loss <= self.loss:
            return True
        if self.loss_change is None and self.weight_change is None:
            return False
        return converged(snapshots, self.windows, self.loss_change, self.weight_change)

    def least(self) -> int:
        """Updates that pass before it can be time."""
        times = (self.steps, None if self.minutes is None else 0, *self._sights().values())
        return min(time for time in times if time is not None)

    def _sights(self) -> dict[str, int]:
        """Updates after which each condition on losses and weights is looked at for the first time."""
        seen = {"loss": self.window, "loss_change": self.windows * self.window}
        seen["weight_change"] = seen["loss_change"]
        return {name: updates for name, updates in seen.items() if getattr(self, name) is not None}

    def check_sight(self, updates: int, why: str) -> None:
        """Raise ConfigError for a condition whose windows are longer than the phase before, which has so many updates
        at most, so that it could never come true."""
        for name, seen in self._sights().items():
            if seen > updates:
                windows = "" if name == "loss" else f", windows={self.windows}"
                raise ConfigError(
                    f"Then({self._kind}, {name}={getattr(self, name)}, window={self.window}{windows}) is looked at "
                    f"after {seen} updates for the first time, and {why}: it can never come true. Shorten the window, "
                    f"or leave {name} out."
                )

    def to_mapping(self) -> dict[str, Any]:
        """Plain values."""
        said = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "method"}
        return {"method": to_dict(self.method), **said}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Then:
        """The inverse of :meth:`to_mapping`."""
        return cls(from_dict(values["method"]), **{key: value for key, value in values.items() if key != "method"})


WHEN = ("steps", "minutes", "loss", "loss_change", "weight_change")
"""Fields of Then that say a time."""


def listed(then: Sequence[Then]) -> tuple[Then, ...]:
    """Phases to come, as a tuple. Raises ConfigError for what is none."""
    if isinstance(then, Then) or not all(isinstance(one, Then) for one in then):
        raise ConfigError(
            f"then= is a list of rs.Then, e.g. then=[rs.Then(rs.LoRA(rank=16), steps=1000)]; got {then!r}."
        )
    return tuple(then)


def labels(phases: Sequence[Phase]) -> list[str]:
    """What to call each: its method, and what is otherwise in it than in others of that method, as in "PreLoRA joint"
    or "LoRA rank 4"."""
    found = []
    for phase in phases:
        alike = [other.method for other in phases if other.method["method"] == phase.method["method"]]
        plain = {k: v for k, v in phase.method.items() if isinstance(v, (str, int, float))}
        apart = [(k, v) for k, v in plain.items() if any(other.get(k) != v for other in alike)]
        own = [v if isinstance(v, str) else f"{k} {v}" for k, v in apart]
        found.append(" ".join([type(from_dict(phase.method)).__name__, *own]))
    return found


def check_phases(method: Method, coming: Sequence[Then], began: int, listed: int, total: int | None) -> list[str]:
    """Look whether every phase can begin within the run, and is long enough for what its method does in it. Where it is
    not known when one begins, it is taken to begin as early as it can.

    Args:
        method: of the phase of now.
        coming: what follows it.
        began: the update at which the phase of now began.
        listed: that from which the first of ``coming`` counts; another where a shift by hand came between.
        total: updates of the whole run, if known.

    Returns:
        What will not be reached, as sentences to warn with.

    Raises:
        ConfigError: a phase cannot begin, or is too short for its method; or a condition can never come true.
    """
    told: list[str] = []
    for then in (*coming, None):
        end, soonest = total, listed if then is None else listed + then.least()
        if then is not None and total is not None:
            if soonest >= total:
                raise ConfigError(
                    f"{type(then.method).__name__} would begin at update {soonest} at the earliest, and the run ends "
                    f"at {total}. Shorten the phases before it (steps, window), or train longer (total_steps)."
                )
            then.check_sight(total - 1 - began, f"the run ends {total - began} after the phase before begins")
        if then is not None and then.steps is not None:
            end = listed + then.steps if total is None else min(listed + then.steps, total)
        method.phase_end(began, total)  # a schedule that does not fit is refused there
        if end is not None:
            told += filter(None, [method.check_span(began, end, total)])
        if then is not None:
            method, began, listed = then.method, max(began, soonest), soonest
    return told
