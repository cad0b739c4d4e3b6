"""Events: what changes between steps; and the driver that makes the optimizer step their clock.

    WINDOW   before the first forward of an update
    GRADS    gradients reduced and clipped, update not taken
    UPDATED  parameters hold their new values

An event owns no state, draws no global randomness and calls no clock: what it needs is in the tick, what it changes are
tensors of the adapter or of the optimizer.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rankshift.core.adapter import Adapter
from rankshift.core.errors import AttachError, NoGradient, NonFinite, StepWithoutForward
from rankshift.core.random import Key

_PATIENCE = 20  # skipped updates in a row before a run is stopped


class Moment(enum.Enum):
    """When in a step an event is applied."""

    WINDOW = "window"
    GRADS = "grads"
    UPDATED = "updated"


@dataclass(frozen=True)
class Tick:
    """What an event may know about now."""

    step: int  # updates taken before this one; at UPDATED this one is still not counted
    total: int | None  # updates of the whole run, if the caller said
    seed: int
    optimizer: torch.optim.Optimizer | None

    def key(self, *path: str | int) -> Key:
        """The random key of this step under a path of names, e.g. ``tick.key(adapter.site, "A")``."""
        key = Key(self.seed)
        for part in (*path, self.step):
            key = key / part
        return key

    def state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The optimizer's state of one parameter; empty before its first update."""
        return {} if self.optimizer is None else self.optimizer.state.get(parameter, {})


class Event(Protocol):
    """One change, at one moment, on one adapter at a time."""

    @property
    def moment(self) -> Moment: ...

    def due(self, tick: Tick) -> bool:
        """Whether this event applies at this tick; the same answer on every rank."""
        ...

    def apply(self, adapter: Adapter, tick: Tick) -> None:
        """Change the adapter's tensors, its base through ``add_``, or the optimizer's state, in place."""
        ...


Audience = Callable[[], Iterable[tuple[Event, Sequence[Adapter]]]]


@dataclass(eq=False)
class Driver:
    """Counts updates and applies events, from the step hooks of the optimizer it is bound to.

    The count lives in the optimizer's first parameter group (``updates``), so whatever saves the optimizer saves it.
    """

    audience: Audience
    seed: int
    total: int | None = None
    trainable: Callable[[], Iterable[tuple[str, Tensor, bool]]] = tuple  # (name, tensor, must have a gradient)
    start: int = 0
    check_gradients: bool = True
    on_step: list[Callable[[int], None]] = field(default_factory=list)

    _optimizer: torch.optim.Optimizer | None = None
    _hooks: list[Any] = field(default_factory=list)
    _forwarded: bool = False
    _rehearsal: bool = False
    _skip: bool = False
    _streak: int = 0
    _checked: bool = False

    # ---- the count

    @property
    def step(self) -> int:
        """Updates taken so far."""
        return self._group()["updates"] if self._optimizer is not None else self.start

    @step.setter
    def step(self, value: int) -> None:
        self.start = value
        if self._optimizer is not None:
            self._group()["updates"] = value

    @property
    def skipped(self) -> int:
        """Updates skipped because a gradient was not finite."""
        return self._group()["skipped"] if self._optimizer is not None else 0

    def _group(self) -> dict[str, Any]:
        assert self._optimizer is not None
        return self._optimizer.param_groups[0]

    # ---- binding

    def bind(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Ride this optimizer's steps; see forwards of this model."""
        self.release()
        for key, value in (("updates", self.start), ("skipped", 0)):
            optimizer.param_groups[0].setdefault(key, value)
        self._optimizer = optimizer
        self._checked = False
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_load_state_dict_post_hook(lambda _: self.open_window()),
            model.register_forward_pre_hook(self._saw_forward),
        ]
        self.open_window()

    def release(self) -> None:
        """Stop riding; the count stays."""
        if self._optimizer is not None:
            self.start = self.step
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._optimizer = [], None

    def close(self) -> None:
        """End of the phase: the optimizer that was ridden must not be stepped again."""
        optimizer = self._optimizer
        self.release()
        if optimizer is not None:
            optimizer.register_step_pre_hook(_refuse)

    def open_window(self) -> None:
        """Apply the WINDOW events of the coming update. Safe to repeat: they are functions of the step alone."""
        self._apply(Moment.WINDOW)

    def _saw_forward(self, model: nn.Module, args: object) -> None:
        if model.training and torch.is_grad_enabled():
            self._forwarded = True

    # ---- the step

    def _before(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._rehearsal = self._skip = False
        if not self._forwarded:
            # torch.distributed.checkpoint builds optimizer state by a step on zero gradients: not an update
            if any(bool(g.count_nonzero()) for g in gradients):
                raise StepWithoutForward(
                    "The optimizer was stepped on gradients, but the model was not called in training mode since the "
                    "last update. Call the model that you attached to (not a part of it), after model.train()."
                )
            self._rehearsal = True
            return
        if gradients and not _finite(gradients):
            self._skip = True
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = None  # torch optimizers leave a parameter without gradient, and its state, alone
            return
        if self.check_gradients and not self._checked:
            self._check()
        self._apply(Moment.GRADS)

    def _after(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        if self._rehearsal:
            return
        self._forwarded = False
        group = self._group()
        if self._skip:
            group["skipped"] += 1
            self._streak += 1
            if self._streak >= _PATIENCE:
                raise NonFinite(
                    f"Gradients were NaN or Inf in {self._streak} updates in a row (step {self.step}). No update was "
                    "taken since; the weights are those of the last good step. Lower lr, clip gradients, or train in "
                    "bf16 or fp32 instead of fp16."
                )
            return
        self._streak = 0
        self._apply(Moment.UPDATED)
        group["updates"] += 1
        for call in self.on_step:
            call(group["updates"])
        self.open_window()

    def _apply(self, moment: Moment) -> None:
        tick = Tick(self.step, self.total, self.seed, self._optimizer)
        for event, adapters in self.audience():
            if event.moment is moment and event.due(tick):
                with torch.no_grad():
                    for adapter in adapters:
                        event.apply(adapter, tick)

    def _check(self) -> None:
        self._checked = True
        for name, tensor, must in self.trainable():
            if not must:
                continue
            if tensor.grad is None:
                raise NoGradient(
                    f"{name} received no gradient in the first update. Its layer is not used in forward, or its input "
                    "was cut from the graph (reentrant gradient checkpointing does that: use use_reentrant=False). "
                    "Exclude the layer in targets, or pass check_gradients=False to run.optimizer() if this is meant."
                )
            if not bool(tensor.grad.count_nonzero()):
                raise NoGradient(
                    f"The gradient of {name} is exactly zero in the first update: nothing reaches it. Exclude its "
                    "layer in targets, or pass check_gradients=False to run.optimizer() if this is meant."
                )


def _refuse(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    raise AttachError(
        "This optimizer belongs to a phase that has ended. Make a new one: run.optimizer() of the run that shift() "
        "returned."
    )


def _finite(gradients: list[Tensor]) -> bool:
    norm = torch.nn.utils.get_total_norm(gradients)
    full = getattr(norm, "full_tensor", None)
    return bool(torch.isfinite(full() if full is not None else norm))
