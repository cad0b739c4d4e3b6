"""Events: what changes between steps; and the driver that makes the optimizer step their clock.

    WINDOW   before the first forward of an update
    GRADS    gradients reduced and clipped, update not taken
    UPDATED  parameters hold their new values

An event owns no state, draws no global randomness and calls no clock: what it needs is in the tick, what it changes are
tensors of the adapter or of the optimizer.
"""

from __future__ import annotations

import enum
import functools
import logging
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from rankshift.core import shard
from rankshift.core.adapter import Adapter
from rankshift.core.errors import AttachError, NoGradient, NonFinite, StepWithoutForward, TrainingError
from rankshift.core.random import Key

_log = logging.getLogger(__name__)

_PATIENCE = 20  # skipped updates in a row before a run is stopped
_UNSEEN = (
    "The optimizer was stepped on gradients, but the model was not called in training mode since the last update. Call "
    "the model that you attached to (not a part of it), after model.train()."
)


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
    began: int = 0  # updates taken when this phase began

    def key(self, *path: str | int) -> Key:
        """The random key of this step under a path of names, e.g. ``tick.key(adapter.site, "A")``."""
        key = Key(self.seed)
        for part in (*path, self.step):
            key = key / part
        return key

    def state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The optimizer's state of one parameter; empty before its first update."""
        return {} if self.optimizer is None else self.optimizer.state.get(parameter, {})

    def lr(self, parameter: Tensor) -> float:
        """The learning rate of one parameter in this update; 0 if no optimizer holds it."""
        return float(self.group(parameter).get("lr", 0.0))

    def group(self, parameter: Tensor) -> dict[str, Any]:
        """The optimizer's group of one parameter; empty if no optimizer holds it."""
        return self._groups.get(id(parameter), {})

    @functools.cached_property
    def _groups(self) -> dict[int, dict[str, Any]]:
        """Groups by the id of a parameter: events ask for that of every site."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return {id(p): group for group in groups for p in group["params"]}


class Event(Protocol):
    """One change, at one moment, on one adapter at a time.

    One that may be missed, because ``forward`` catches up by itself, says ``essential = False``. One that is the update
    itself, where the optimizer steps beside the weight, says ``steps = True``: it alone may change the function. One
    that takes all adapters faster together has ``apply_all(adapters, tick)`` too, with the result of one after another.
    One that is rare and worth a mark under the loss says what it is, ``landmark = "restart"``.
    One at GRADS that often finds nothing to do has ``idle(adapters, tick)``: then nobody waits for the gradients. Nor
    for one with ``launch(adapters, tick, void)``: on the device it changes nothing where ``void``, (), is 1; what it
    returns is called once the update is known to be taken, and does what is left for the host.
    """

    @property
    def moment(self) -> Moment: ...

    def due(self, tick: Tick) -> bool:
        """Whether this event applies at this tick; the same answer on every rank."""
        ...

    def apply(self, adapter: Adapter, tick: Tick) -> None:
        """Change the adapter's tensors, its base through ``add_``, or the optimizer's state, in place."""
        ...


Audience = Callable[[], Iterable[tuple[Event, Sequence[Adapter]]]]


class Needs(enum.Enum):
    """What the first gradient of a tensor that trains must be."""

    NOTHING = "nothing"  # the task may never reach it
    GRADIENT = "gradient"  # it must be there; zero will do, because another tensor starts at zero
    NONZERO = "nonzero"


@dataclass
class Witness:
    """Saw a training forward since it was last asked. A copied model has its own, which nobody asks."""

    forward: bool = False

    def __call__(self, model: nn.Module, args: object) -> None:
        if model.training and torch.is_grad_enabled():
            self.forward = True


_SENTRIES: weakref.WeakSet[Sentry] = weakref.WeakSet()  # of models that were called in training mode


@functools.cache
def _post() -> None:
    """Let them know of the steps of all optimizers from now on."""
    register_optimizer_step_pre_hook(functools.partial(_report, False))
    register_optimizer_step_post_hook(functools.partial(_report, True))


def _report(over: bool, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    if not torch.compiler.is_compiling():
        for sentry in list(_SENTRIES):
            sentry.sees(optimizer, over)


@dataclass(eq=False)
class Sentry:
    """Sees in a training forward that what trains was updated by an optimizer that no driver rides: events that a
    method needs would not happen, without a word. It knows tensors and no run, so that a copied model has its own.

    Where an optimizer is ridden, and in a copied model, it goes by steps of others alone: that values changed says
    nothing, as weights are averaged, swapped and loaded. Compiled code and sharded tensors are not watched.
    """

    tensors: list[Tensor] = field(default_factory=list)
    _armed: bool = True  # whether values that changed say something: before there is an optimizer
    _rider: int | None = None  # id of the optimizer that is ridden
    _others: set[int] = field(default_factory=set)  # ids of others that are in a step
    _stray: bool = False  # another has stepped since the one that is ridden did
    _seen: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: nothing is ridden there, and whether it is trained or follows this model is not known."""
        return {
            "tensors": self.tensors,
            "_armed": False,
            "_rider": None,
            "_others": set(),
            "_stray": False,
            "_seen": None,
        }

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Watch these from now on; a few of what trains are enough."""
        self.tensors = [t for t in tensors if not shard.is_sharded(t)]
        self.forgive()

    def follow(self, optimizer: torch.optim.Optimizer | None) -> None:
        """This optimizer is ridden from now on; None: none is."""
        self._rider, self._armed = None if optimizer is None else id(optimizer), optimizer is None
        self.forgive()

    def forgive(self) -> None:
        """The optimizer that is ridden has stepped, or a verb changed what trains."""
        self._stray, self._seen = False, None
        self._others.clear()

    def sees(self, optimizer: torch.optim.Optimizer, over: bool) -> None:
        """An optimizer begins a step, or ends one. In between the one that is ridden may step: then they are one."""
        if not over and id(optimizer) != self._rider:
            self._others.add(id(optimizer))
        elif over and id(optimizer) in self._others:
            self._others.discard(id(optimizer))
            mine = {id(t) for t in self.tensors if t.grad is not None}
            if mine and any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
                self._stray = True

    def __call__(self, model: nn.Module, args: object) -> None:
        if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
            return
        _post()
        _SENTRIES.add(self)
        now = sum(t._version for t in self.tensors)
        if self._stray or (self._armed and self._seen not in (None, now)):
            raise TrainingError(
                "What trains was updated by an optimizer that carries no events, which this method needs. Step the one "
                "that run.optimizer() made, or hand yours to run.carry(optimizer). A copy of the model has no run and "
                "cannot be trained: merge() first."
            )
        self._seen = now


class _Verdict:
    """A number on its way from the device to the host, past whatever the device is asked to do after."""

    def __init__(self, value: Tensor):
        self._value, self._arrived = value, None
        if value.is_cuda:
            self._value = torch.empty_like(value, device="cpu", pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._arrived = torch.cuda.current_stream(value.device).record_event()

    def known(self) -> bool:
        """Whether it is not 0; waits until it is there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._value)


@dataclass(eq=False)
class Driver:
    """Counts updates and applies events, from the step hooks of the optimizer it is bound to.

    The counts live in the optimizer's first parameter group (``updates`` and ``skipped``), so whatever saves the
    optimizer saves them.
    """

    audience: Audience
    seed: int
    total: int | None = None
    trainable: Callable[[], Iterable[tuple[str, Tensor, Needs]]] = tuple
    start: int = 0  # updates taken, while no optimizer counts
    began: int = 0  # updates taken when the phase began
    skips: int = 0  # updates skipped, likewise
    check_gradients: bool = True
    refusal: str = ""  # why no update can be taken now
    objection: Callable[[], str] = str  # likewise, asked when gradients are there
    counted: Callable[[], None] = lambda: None  # called when an update was taken
    passed: Callable[[], None] = lambda: None  # called when one was skipped
    patient: Callable[[], bool] = lambda: False  # whether both may be called later, at the next update
    sentry: Sentry = field(default_factory=Sentry)  # sees optimizers that are not ridden
    taken: dict[int, float] | None = None
    """Where the backward pass itself updates: the largest magnitude in each gradient that it has used since the last
    step, by the id of its tensor; not finite where that tensor was left alone. None: everything waits for the step."""

    _optimizer: torch.optim.Optimizer | None = None
    _units: list[Any] = field(default_factory=list)  # that FSDP2 gathers
    _initial: Callable[[Tensor], dict[str, Tensor]] | None = None
    _hooks: list[Any] = field(default_factory=list)
    _witness: Witness = field(default_factory=Witness)  # one for life: compiled code keeps the hook it was traced with
    _fresh: list[Tensor] | None = None  # in a rehearsal: tensors whose state it makes
    _bad: bool = False  # a gradient is not finite
    _verdict: _Verdict | None = None  # where the update was launched before that is known
    _late: list[Callable[[], None]] = field(default_factory=list)  # then: what events do once it is taken
    _owed: tuple[_Verdict, list[Tensor]] | None = None  # of an update not counted yet: its verdict, what it stepped
    _skip: bool = False  # so no tensor is updated
    _streak: int = 0
    _checked: bool = False

    # ---- the count

    @property
    def step(self) -> int:
        """Updates taken so far."""
        self.settle()
        return self.start if self._optimizer is None else self._optimizer.param_groups[0]["updates"]

    @step.setter
    def step(self, value: int) -> None:
        self.start = value
        if self._optimizer is not None:
            self._optimizer.param_groups[0]["updates"] = value

    @property
    def skipped(self) -> int:
        """Updates skipped because a gradient was not finite."""
        self.settle()
        return self.skips if self._optimizer is None else self._optimizer.param_groups[0]["skipped"]

    @skipped.setter
    def skipped(self, value: int) -> None:
        self.skips = value
        if self._optimizer is not None:
            self._optimizer.param_groups[0]["skipped"] = value

    @property
    def ridden(self) -> torch.optim.Optimizer | None:
        """The optimizer whose steps are counted."""
        return self._optimizer

    def holds(self, tensors: Iterable[tuple[str, Tensor]]) -> str | None:
        """The name of the first of these that the optimizer does not hold; None if it holds all, or there is none."""
        if self._optimizer is None:
            return None
        held = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        return next((name for name, tensor in tensors if id(tensor) not in held), None)

    def states(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's state of every tensor that has one, by name."""
        self.settle()
        optimizer = self._optimizer
        groups = [] if optimizer is None else optimizer.param_groups
        named = [pair for group in groups for pair in zip(group.get("param_names", ()), group["params"], strict=False)]
        return {name: optimizer.state[p] for name, p in named if optimizer is not None and optimizer.state.get(p)}

    def ranks(self) -> dict[str, int]:
        """Ranks of the subspaces that the optimizer's state is in, by the name of a tensor."""
        return {name: state["basis"].shape[-1] for name, state in self.states().items() if "basis" in state}

    # ---- binding

    def bind(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        initial: Callable[[Tensor], dict[str, Tensor]] | None = None,
        hooks: Sequence[Any] | None = None,
    ) -> None:
        """Ride this optimizer's steps; see forwards of this model.

        Args:
            initial: a parameter's state before any step.
            hooks: those by which the backward pass itself updates; None if it does not.
        """
        if optimizer is not self._optimizer:
            self.close()
        self.release()
        self._initial, self._units = initial, shard.units(model)
        self._optimizer = optimizer
        if hasattr(optimizer, "settle"):
            optimizer.settle = self.settle
        self.sentry.follow(optimizer)
        self._checked, self.taken = False, None if hooks is None else {}
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_state_dict_pre_hook(lambda _: self.settle()),
            optimizer.register_load_state_dict_post_hook(self._loaded),
            model.register_forward_pre_hook(self._witness),
            *(hooks or ()),
        ]
        self._loaded(optimizer)

    def release(self) -> None:
        """Stop riding; the counts stay."""
        self.start, self.skips = self.step, self.skipped
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._optimizer, self._initial = [], None, None
        self.sentry.follow(None)

    def close(self) -> None:
        """Part with the optimizer that was ridden: it must not be stepped again."""
        optimizer = self._optimizer
        self.release()
        if optimizer is not None:
            optimizer.register_step_pre_hook(_refuse)

    def open_window(self) -> None:
        """Apply the WINDOW events of the coming update. Safe to repeat: they are functions of the step alone."""
        self._apply(Moment.WINDOW)

    def _loaded(self, optimizer: torch.optim.Optimizer) -> None:
        self._owed = None  # it was of what has been replaced
        for key, value in (("updates", self.start), ("skipped", self.skips)):
            optimizer.param_groups[0].setdefault(key, value)
        self.open_window()

    # ---- the step

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._judge(optimizer)
            return None

        def judged() -> Any:
            loss = closure()
            self._judge(optimizer)  # only now are the gradients there
            return loss

        return args[:1], {**kwargs, "closure": judged}

    def _judge(self, optimizer: torch.optim.Optimizer) -> None:
        """The gradients are complete: a rehearsal, an update to skip, or one to take."""
        self.settle()
        tensors = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in tensors if p.grad is not None]
        self._fresh, self._skip, self._bad = None, False, False
        self._verdict, self._late = None, []
        if getattr(optimizer, "void", None) is not None:
            optimizer.void = None  # type: ignore[attr-defined]  # of a step that an error ended
        if not self._witness.forward and not self.taken:
            # torch.distributed.checkpoint builds optimizer state by a step on zero gradients: not an update
            if any(shard.any_part(shard.held(g).count_nonzero() > 0, g) for g in gradients):
                raise StepWithoutForward(_UNSEEN)
            self._fresh = [p for p in tensors if p.grad is not None and not optimizer.state.get(p)]
            if self._initial is not None:  # which makes state by itself: nothing needs to be decomposed and reduced
                for p in tensors:
                    p.grad = None
            return
        if self.taken is not None and gradients:
            raise TrainingError(
                f"{len(gradients)} of {len(tensors)} gradients are there at optimizer.step(), but fused_backward=True "
                "takes them as soon as a backward pass has made them. Let loss.backward() make all gradients; after "
                "wrapping or sharding the model make a new optimizer."
            )
        if self.taken:  # the backward pass began this update, and asked by itself
            self._bad = not all(map(math.isfinite, self.taken.values()))
            self._skip = not any(map(math.isfinite, self.taken.values()))
        else:
            self.permit()
            if self._may_go_ahead(optimizer, gradients):
                void = 1 - _all_finite(gradients).float()
                optimizer.void = void  # type: ignore[attr-defined]
                self._verdict = _Verdict(void)
                self._launch(void)
                return
            self._bad = self._skip = not _finite(gradients)
        if self._skip:
            for p in tensors:
                p.grad = None  # torch optimizers leave a parameter without gradient, and its state, alone
            return
        if self.check_gradients and not self._checked:
            self._check()
        self._apply(Moment.GRADS)

    def _may_go_ahead(self, optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor]) -> bool:
        """Whether the update may be launched before it is known whether its gradients are finite: a GPU that is asked
        for an answer at this point stands still until the host has launched the update and the next forward."""
        if not getattr(optimizer, "defers", False) or (self.check_gradients and not self._checked) or not gradients:
            return False
        stepped = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not _on_one_gpu(gradients) or not all(optimizer.state.get(p) for p in stepped):
            return False
        tick = self._tick()
        waiting = [(e, adapters) for e, adapters in self.audience() if e.moment is Moment.GRADS and e.due(tick)]
        return all(
            hasattr(event, "launch") or (hasattr(event, "idle") and event.idle(adapters, tick))
            for event, adapters in waiting
        )

    def _launch(self, void: Tensor) -> None:
        """Events at GRADS, as far as they can act before it is known whether the update is taken."""
        tick = self._tick()
        with torch.no_grad():
            self._late = [
                event.launch(adapters, tick, void)
                for event, adapters in self.audience()
                if event.moment is Moment.GRADS and event.due(tick) and hasattr(event, "launch")
            ]

    def _tick(self) -> Tick:
        return Tick(self.step, self.total, self.seed, self._optimizer, self.began)

    def permit(self) -> None:
        """Raise unless an update may be taken now."""
        if not self._witness.forward:
            raise StepWithoutForward(_UNSEEN)
        if self.refusal:
            raise AttachError(self.refusal)
        if objection := self.objection():
            raise TrainingError(objection)

    def called(self) -> bool:
        """Whether the model was called in training mode since this was last asked."""
        seen, self._witness.forward = self._witness.forward, False
        return seen

    def _after(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        self.sentry.forgive()
        if self._fresh is not None:
            self._rehearsed(optimizer, self._fresh)
            return
        self._witness.forward = False
        if self.taken:
            self.taken.clear()
        if self._verdict is not None:
            self._apply(Moment.UPDATED, steps=True)  # of the update itself: before anybody waits
            if self._may_owe():
                stepped = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
                self._owed = self._verdict, stepped
                optimizer.void = None  # type: ignore[attr-defined]
                return
            self._bad = self._skip = self._verdict.known()
            if self._bad:
                optimizer.retract()  # type: ignore[attr-defined]
                for p in (p for group in optimizer.param_groups for p in group["params"]):
                    p.grad = None  # as where the update waits
            else:
                for keep in self._late:
                    keep()
            self._late, optimizer.void = [], None  # type: ignore[attr-defined]
        self._count(optimizer)

    def _may_owe(self) -> bool:
        """Whether nothing has to know before the next update whether this one was taken. A GPU that is asked at the end
        of every step stands still while the host prepares the next."""
        after = [event for event, _ in self.audience() if event.moment is not Moment.GRADS]
        return not self._late and all(getattr(event, "steps", False) for event in after) and self.patient()

    def settle(self) -> None:
        """Count an update that was launched before it was known whether it would be taken. Whoever asks for a count or
        a state does this, and so does the next update."""
        if self._owed is None or self._optimizer is None:
            return
        (verdict, stepped), self._owed = self._owed, None
        self._bad = self._skip = verdict.known()
        if self._bad:
            self._optimizer.retract(stepped)  # type: ignore[attr-defined]
        self._count(self._optimizer)

    def _count(self, optimizer: torch.optim.Optimizer) -> None:
        """What the verdict on an update leads to."""
        group = optimizer.param_groups[0]
        if self._skip:
            self.passed()
        if self._bad:
            group["skipped"] += 1
            self._streak += 1
            if self._streak >= _PATIENCE:
                since = (
                    "No update was taken since; the weights are those of the last good step."
                    if self._skip
                    else "Their tensors were not updated, others were."
                )
                raise NonFinite(
                    f"Gradients were NaN or Inf in {self._streak} updates in a row (step {self.step}). {since} Lower "
                    "lr, clip gradients, or train in bf16 or fp32 instead of fp16."
                )
            if self._streak == 1:
                _log.warning(
                    "Step %d: gradients are NaN or Inf; %s.",
                    self.step, "this update is skipped" if self._skip else "their tensors are not updated",
                )  # fmt: skip
        else:
            self._streak = 0
        if self._skip:
            self.open_window()  # the same update again: what was heard for it is of no use
            return
        self._apply(Moment.UPDATED, steps=None if self._verdict is None else False)
        group["updates"] += 1
        self.open_window()
        self.counted()

    def _rehearsed(self, optimizer: torch.optim.Optimizer, fresh: Iterable[Tensor]) -> None:
        """The state that a rehearsal is for, as it is before the first update."""
        for parameter in fresh:
            if self._initial is not None:
                optimizer.state[parameter].update(self._initial(parameter))
            elif "step" in (state := optimizer.state.get(parameter, {})):  # another's: its count would stand at one
                state["step"] *= 0

    def _apply(self, moment: Moment, steps: bool | None = None) -> None:
        """Apply the events of a moment; ``steps``: only those that are the update itself, or only the others."""
        tick = self._tick()
        due = [(event, adapters) for event, adapters in self.audience() if event.moment is moment and event.due(tick)]
        if steps is not None:
            due = [(event, adapters) for event, adapters in due if getattr(event, "steps", False) is steps]
        for unit in self._units if due else ():  # as shard.settle, without a walk over the model in every step
            unit.reshard()
        with torch.no_grad():
            for event, adapters in due:
                together = getattr(event, "apply_all", None)
                if together is not None:
                    together(adapters, tick)
                    continue
                for adapter in adapters:
                    event.apply(adapter, tick)

    def _check(self) -> None:
        found: dict[str, tuple[Tensor, Needs]] = {}
        for name, tensor, needs in self.trainable():
            if tensor.grad is not None or (self.taken and id(tensor) in self.taken):
                found[name] = tensor, needs
            elif needs is not Needs.NOTHING:
                raise NoGradient(
                    f"{name} received no gradient in the first update. Its layer is not used in forward, or its input "
                    "was cut from the graph (reentrant gradient checkpointing does that: use use_reentrant=False). "
                    "Exclude the layer in targets, or pass check_gradients=False to run.optimizer() if this is meant."
                )
        zero = {name: self._is_zero(tensor) for name, (tensor, _) in found.items()}
        if all(zero.values()):
            return  # a batch that teaches nothing, such as one without reward, says nothing about the layers: ask again
        self._checked = True
        apart = shard.first_apart([tensor.grad for tensor, _ in found.values() if tensor.grad is not None])
        if apart is not None:
            raise TrainingError(
                f"The gradient of {list(found)[apart]} differs between ranks: nothing averages it. Wrap the model (DDP "
                "or fully_shard) after attach, add and shift, not before, and call the wrapped model; or pass "
                "check_gradients=False to run.optimizer() if ranks are meant to train apart."
            )
        for name, (_, needs) in found.items():
            if needs is Needs.NONZERO and zero[name]:
                raise NoGradient(
                    f"The gradient of {name} is exactly zero in the first update: nothing reaches it. Exclude its "
                    "layer in targets, or pass check_gradients=False to run.optimizer() if this is meant."
                )

    def _is_zero(self, tensor: Tensor) -> bool:
        """Whether the gradient of a tensor is zero everywhere, on every rank."""
        if self.taken:
            return self.taken[id(tensor)] == 0
        assert tensor.grad is not None
        return not shard.any_part(shard.held(tensor.grad).count_nonzero() > 0, tensor.grad)


def _refuse(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    raise AttachError(
        "This optimizer no longer drives a run: a newer one was made, or its phase has ended. Step the newest one, "
        "made by run.optimizer() of the run that is open (after shift(), of the run that it returned)."
    )


def _on_one_gpu(gradients: Sequence[Tensor]) -> bool:
    return len({g.device for g in gradients}) == 1 and all(g.is_cuda and not shard.is_sharded(g) for g in gradients)


def _all_finite(parts: Sequence[Tensor]) -> Tensor:
    """Whether every entry is: by the largest magnitude, which cannot overflow as a sum of squares can."""
    return torch.isfinite(torch.nn.utils.get_total_norm([p for p in parts if p.numel()], float("inf")))


def _finite(gradients: list[Tensor]) -> bool:
    """Whether every entry on every rank is."""
    parts = [part for part in map(shard.held, gradients) if part.numel()]
    here = not parts or bool(_all_finite(parts))
    sharded = next((g for g in gradients if shard.is_sharded(g)), None)
    return here if sharded is None else not shard.any_rank(not here, sharded.device)
