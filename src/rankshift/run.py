"""Run: a model with a method attached. What a user holds: train, switch, save, merge, shift."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankshift import handover, holding
from rankshift import lower as lowering
from rankshift.core import shard
from rankshift.core.adapter import Adapter
from rankshift.core.base import storage_of
from rankshift.core.errors import AttachError, ConfigError, ExportError, TrainingError, WrongBase
from rankshift.core.event import Driver
from rankshift.core.lesson import Ear, Lesson
from rankshift.core.method import Method, compare
from rankshift.core.phase import Phase, Then, listed
from rankshift.core.schedule import check_warmup, cosine
from rankshift.core.site import Replica, Site, Stack, base_parameters, embeddings_untied, form_of, known_as, separate
from rankshift.core.watch import Watch, Wish
from rankshift.holding import Onto
from rankshift.methods import from_dict, to_dict  # with all methods: what a saved state names must be known
from rankshift.optim import Adam, Optimizer, Transform
from rankshift.optim.backward import Backward, FusedOptimizer, check_flag, refuse_apart, refuse_method, refuse_settings
from rankshift.parity import Parity, parity
from rankshift.placement import (
    DEFAULT,
    Placement,
    check_dtypes,
    check_foldable,
    fold,
    weight_names,
)
from rankshift.storage import Kind
from rankshift.summary import Compression, Projections, Summary, compression, projections, summarise

_log = logging.getLogger(__name__)

_ATTACHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_WINDOW = "watch/window"
_HALF_MERGED = (
    "run.merge() was interrupted: some layers have what was trained in their weights, others beside them. Call "
    "run.merge() again, or go on from a checkpoint with a fresh model."
)


def attach(
    model: nn.Module,
    method: Method,
    base: Kind | None = None,
    seed: int = 0,
    total_steps: int | None = None,
    *,
    data: Iterable[Any] | None = None,
    then: Sequence[Then] = (),
) -> Run:
    """Attach a method to a model, in place.

    Args:
        model: any ``nn.Module``. Its weights are frozen; what the method trains is added or unfrozen.
        method: what to train, e.g. ``rs.LoRA(rank=16)``.
        base: storage of the frozen weights, in fewer bits; None leaves them as they are.
        seed: of everything the method draws. Global random state is neither read nor changed.
        total_steps: updates of the whole run, for methods whose schedule needs it.
        data: batches (keyword dictionaries or tensors) for methods that look at data before they start.
        then: methods to go on with, and when. :meth:`Run.due` says when it is time.

    Raises:
        AttachError: the model has a run already.
        TargetError: the method does not fit the model; nothing was changed.
    """
    if not isinstance(method, Method):
        raise ConfigError(f"attach needs a method such as rs.LoRA(rank=16); got {type(method).__name__}.")
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise AttachError(
            f"This is a {type(model).__name__}, which never learns of tensors that are added to it. Attach to the "
            "model inside, model.module, then wrap it anew."
        )
    if model in _ATTACHED or any(isinstance(module, (Site, Replica, Stack)) for module in model.modules()):
        raise AttachError(
            f"This {type(model).__name__} has a method attached. Use run.add(name, method) for a second adapter, "
            "run.shift(method) to go on with another method, or run.merge() to end the run."
        )
    if method.final.holds is not None:
        holding.check_kind(model, method.final.holds)
    run = Run(model, seed=seed, total_steps=total_steps)
    run.coming = then  # type: ignore[assignment]
    handover.foresee(run, method)
    if base is not None:
        holding.check(run._on, method, base, run.coming)
        run._held = base
    run._begin(method, data)
    return run


class Run:
    """A model with a method attached; made by :func:`attach`, :func:`load` and :meth:`shift`."""

    def __init__(self, model: nn.Module, *, seed: int = 0, total_steps: int | None = None, start: int = 0):
        self.model = model
        self.seed = seed
        self.phases: list[Phase] = []
        self._coming: tuple[Then, ...] = ()
        self.watch: Watch | None = None  # over loss and norms, where something depends on them
        self._listed = start  # updates taken when what is before the first of them began
        self._seconds, self._since = 0.0, time.monotonic()  # of training since then; and up to when
        # of tensors that went on training from the last phase; None: this run did not see it end
        self._moments: dict[str, Mapping[str, Tensor]] | None = None
        self._parted: Mapping[str, str] = {}  # why those of others that were there did not, by name
        self._on = Placement(model)
        self._held: str | None = None  # the storage that this run has put the frozen layers into, or is to
        self._changed: set[str] = set()
        self._ranks: dict[str, int] = {}  # of the subspaces of projected gradients, where no optimizer knows them
        self._frozen = {name: p.requires_grad for name, p, _ in base_parameters(model)}
        self._closed = self._suspended = ""
        self._warned: set[str] = set()  # of what will not be reached
        self._told: list[str] = []  # how the method differs from that of the state that was loaded
        self._ear = Ear()
        self._driver = Driver(self._on.audience, seed, _count(total_steps), self._on.required, start)
        self._driver.objection = self._objection
        self._driver.counted = self._counted
        self._driver.passed = self._passed
        self._driver.patient = lambda: self.watch is None and not self._coming
        self._post: Any = None

    # ---- building

    def _begin(
        self,
        method: Method,
        data: Iterable[Any] | None = None,
        name: str = DEFAULT,
        ranks: Mapping[str, int] | None = None,
        saved: Mapping[str, Any] | None = None,
        lr: float | None = None,
    ) -> None:
        """The first adapter; with ``ranks`` its values are not filled, because they will be loaded."""
        known = {name for name, _, _ in base_parameters(self.model)}
        rounded = self._rounded()
        self._on.undo = []
        try:
            self._on.build(name, method, self.seed, data, ranks, saved)
            if (kind := self._held or method.holds) is not None and ranks is None:
                self._hold(method, kind, fresh=True)
            if self.phases:  # what was one tensor with something that may have been trained
                self._changed |= {name for name, _, _ in base_parameters(self.model)} - known
            self._changed |= self._on.train_in_place(method)
            self._on.use(name)
            if not any(True for _ in self.trainable()):
                raise ConfigError(f"{type(method).__name__} has nothing to train on this model.")
            if method.events() and not self._on.sites and not self._on.projected:
                raise ConfigError(f"{type(method).__name__} has events but no layer for them to apply to.")
            self.phases.append(Phase(to_dict(method), self.step, lr=lr, trainable=self._count_trainable()))
            self._driver.began = self.step
            self._look_out()
            self._listen()
            self._driver.open_window()
            if self._moments:
                self._keep_moments(self._moments)
            self._on.settle()
            _ATTACHED.add(self.model)
        except BaseException as error:  # out of memory, Ctrl-C: the model goes back as it came
            self._take_off("an error")
            self._on.revert()
            if ranks is None and self._rounded() != rounded:
                error.add_note(
                    f"Some of its weights are in {self._held or method.holds} now, and rounded: load the model again."
                )
            raise

    def _rounded(self) -> int:
        """How many layers are not dense, those that came so included."""
        return sum(storage_of(module) is not None for module in self.model.modules())

    def _hold(self, method: Method, kind: str, fresh: bool, kept: Mapping[str, Sequence[int]] | None = None) -> None:
        """Put the frozen layers into a storage; see :func:`rankshift.holding.hold`."""
        holding.check_values(self._on, method, kind)
        self._on.settle()  # who can undo what was built keeps every weight
        for site in self._on.sites.values():
            site.base.changed |= site.spec.weight in self._changed  # and so will all be that holds it
        off = holding.hold(self._on, method, kind, fresh, kept)
        if self._held is None and method.holds == kind and self.step:
            _log.warning(
                "Step %d: weights are held in %s from here on, off by %.2g %% of their size.",
                self.step,
                kind,
                100 * off,
            )
        self._held = kind

    def _count_trainable(self) -> int:
        return sum(p.numel() for _, p in self.trainable())

    # ---- what is here

    @property
    def method(self) -> Method:
        """The method of the current phase."""
        return self._on.method

    @property
    def step(self) -> int:
        """Updates taken so far, over all phases."""
        return self._driver.step

    @property
    def total_steps(self) -> int | None:
        """Updates of the whole run, if the caller said; schedules of methods need it."""
        return self._driver.total

    @total_steps.setter
    def total_steps(self, value: int | None) -> None:
        self._driver.total = _count(value)

    @property
    def coming(self) -> tuple[Then, ...]:
        """What follows the method of now. Set it to change that in mid-run: ``run.coming = ()`` goes on as it is."""
        return self._coming

    @coming.setter
    def coming(self, then: Sequence[Then]) -> None:
        then = listed(then)
        if self.phases:
            handover.check_lengths(self, self.method, then, self.phases[-1].start, self._listed)
        self._coming = then
        if self.phases:
            self._look_out()

    @property
    def skipped(self) -> int:
        """Updates skipped because a gradient was NaN or Inf."""
        return self._driver.skipped

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters, in the order they were added."""
        return tuple(self._on.members)

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the adapters that act; their changes add up."""
        return self._on.active

    @property
    def sites(self) -> dict[str, Site]:
        """The sites by the name of the layer they stand at."""
        return dict(self._on.sites)

    @property
    def changed(self) -> set[str]:
        """Parameters of the base that no longer are what they came as: trained in place, or rewritten by an event."""
        rewritten = (weight_names(name, site) for name, site in self._on.sites.items() if site.base.changed)
        return self._changed.union(*rewritten)

    def adapter(self, name: str = DEFAULT) -> dict[str, Adapter]:
        """The adapter's part at each of its sites."""
        return self._on.adapter(name)

    @property
    def subspaces(self) -> dict[str, int]:
        """The rank that each projected gradient's subspace has now, by the name of its weight."""
        seen = self._on.subspaces(self._driver.states())
        inside = {name: s.rank for name, s in seen.items() if name not in self._on.projected and s.bytes}
        return self._ranks | self._driver.ranks() | inside

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, tensor) of everything that trains, in a fixed order: sites, whole copies, base parameters in place."""
        return ((name, parameter) for name, parameter, *_ in self._on.trainable())

    def summary(self) -> Summary:
        """Matched layers, trainable and total parameters, bytes; prints as a table."""
        shard.settle(self.model)
        return summarise(self, self._on)

    def subspace_table(self) -> Projections:
        """Rank, captured energy and renewals of every projected weight; prints as a table.

        :meth:`metrics` has the means. Without projected weights it is empty. One transfer to the host.
        """
        ranks = self.subspaces
        found = self._on.subspaces(self._driver.states())
        return projections(self.step, {n: replace(s, rank=ranks.get(n, s.rank)) for n, s in found.items()})

    def compression(self) -> Compression:
        """Parameters and multiply-adds before and after :meth:`compress`, known from the start; prints as a table.

        Raises:
            ExportError: the method leaves no thin layers behind.
        """
        shard.settle(self.model)
        found = compression(self)
        if found is None:
            raise ExportError(
                f"{type(self.method).__name__} leaves every layer the size it was. PC-LoRA makes layers thin."
            )
        return found

    def metrics(self) -> dict[str, float]:
        """What the active methods have to say of the training so far, such as how many of SoRA's gates are open.

        Under FSDP2 every rank must call this.
        """
        shard.settle(self.model)
        found: dict[str, float] = {}
        for name in self._on.active:
            prefix = "" if name == DEFAULT else f"{name}_"
            values = self._on.members[name].method.metrics(self._on.adapter(name))
            found |= {prefix + key: value for key, value in values.items()}
        return found | self.subspace_table().means()

    # ---- training

    def optimizer(
        self,
        lr: float | None = None,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        decay: Callable[[str, Tensor], bool] | None = None,
        check_gradients: bool = True,
        fused_backward: bool = False,
        clip_each: float | None = None,
    ) -> Optimizer:
        """AdamW over what trains, as the method transforms it; a ``torch.optim.Optimizer`` that carries the events.

        Make it after the model is on its device, wrapped and sharded. Making another one releases the first.

        Args:
            lr: peak learning rate; by default the one that the phase was given, else the one that the method's paper
                recommends, ``run.method.default_lr``.
            decay: which tensors weight decay applies to, by name; by default all that the method lets decay.
            check_gradients: stop if a tensor that must learn has no gradient in the first update.
            fused_backward: update each tensor inside the backward pass as soon as its gradient is complete, and free
                that: of all gradients the largest is in memory at a time. ``step()`` then only ends the update. The
                numbers are the same. No accumulation, GradScaler, clipping by the global norm, closure or DDP: each is
                refused where it can be seen, but ``clip_grad_norm_`` finds nothing to clip. A gradient that is NaN or
                Inf leaves its own tensor alone, the others are updated.
            clip_each: with ``fused_backward``, scale each tensor's gradient down to this norm by itself. That is not
                clipping by the global norm: the direction changes.

        Raises:
            ConfigError: the method cannot train with ``fused_backward``.
        """
        self._open()
        self._check_total()
        check_flag(fused_backward)
        if fused_backward:
            self._check_fused(clip_each)
        elif clip_each is not None:
            raise ConfigError("clip_each= belongs to fused_backward=True. Here call torch.nn.utils.clip_grad_norm_.")
        if lr is None:
            lr = self.phases[-1].lr or self.method.default_lr
        for name, tensor, _ in base_parameters(self.model):
            if name in self._on.projected and not tensor.requires_grad:
                raise ConfigError(
                    f"{name} was frozen after attach(), and {type(self.method).__name__} was told to train it. Undo "
                    'requires_grad_(False), or attach with other targets and rest="freeze".'
                )
        owned = list(self._on.trainable())
        check_dtypes(self._on.sites)
        groups = self.grouped(lr, weight_decay, decay)
        self._ranks.update(self.subspaces)  # a new optimizer begins in the ranks of now, not in those of a loaded run
        optimizer = (FusedOptimizer if fused_backward else Optimizer)(
            groups.values(), [key[0] for key in groups], lr, betas, eps, weight_decay, self.seed, self._ranks
        )
        optimizer.told = self._told  # no copy, as of the ranks
        if self._moments is not None and self.step == self.phases[-1].start:
            optimizer.take_over(self._moments, self._parted)
            self._moments = {name: optimizer.state[p] for name, p, *_ in owned if optimizer.state.get(p)}
        self._driver.check_gradients = check_gradients
        hooks = Backward(optimizer, self._driver, clip_each).hooks(self.model) if fused_backward else None
        self._since = time.monotonic()
        self._driver.bind(optimizer, self.model, optimizer.initial, hooks)
        self._driver.refusal = ""
        return optimizer

    def grouped(
        self, lr: float, weight_decay: float = 0.0, decay: Callable[[str, Tensor], bool] | None = None
    ) -> dict[tuple[Any, ...], dict[str, Any]]:
        """Parameter groups for an optimizer, with named tensors, learning rates and decay as the method has them, by
        (transform, factor of the rate, whether it decays)."""
        groups: dict[tuple[Any, ...], dict[str, Any]] = {}
        for name, tensor, method, leaf in self._on.trainable():
            transform: Transform = method.transform(name, tensor, self._on.projected.get(name), leaf) or Adam()
            decays = method.decays(name, tensor, leaf) and (decay is None or decay(name, tensor))
            factor = method.learning_rate(name, leaf)
            group = groups.setdefault(
                (transform, factor, decays),
                {"params": [], "lr": lr * factor, "weight_decay": weight_decay if decays else 0.0},
            )
            group["params"].append((name, tensor))
        return groups

    def optimizer_cls_and_kwargs(
        self,
        args: Any,
        *,
        check_gradients: bool = True,
        fused_backward: bool = False,
        clip_each: float | None = None,
    ) -> tuple[type[Optimizer], dict[str, Any]]:
        """What an unmodified ``transformers.Trainer`` makes its optimizer of; TRL's trainers too.

        >>> run = rs.attach(model, rs.GaLore(rank=128))
        >>> trainer = Trainer(model, args, optimizer_cls_and_kwargs=run.optimizer_cls_and_kwargs(args), ...)

        It is :meth:`optimizer` with ``args``'s learning rate, betas and ε, and weight decay on those tensors on which
        the Trainer wants it, where the method lets them decay. Clipping is the Trainer's own. The Trainer's
        ``optimizer.pt`` holds the clock and the subspaces, so ``resume_from_checkpoint`` goes on to the same bits.

        Args:
            args: the ``TrainingArguments`` of that Trainer.
            check_gradients, fused_backward, clip_each: as in :meth:`optimizer`.

        Raises:
            ConfigError: arguments that cannot work with this optimizer.
        """
        self._open()
        self._check_total()
        if self.coming or self.method.final != self.method:
            raise ConfigError(
                f"{type(self.method).__name__} is to go on as another phase, and a Trainer that is not rankshift's "
                "cannot change phases: it would fail where this one ends. Use rs.Trainer(run=run, args=args, …), or "
                "attach a method that has one phase."
            )
        optim = getattr(args.optim, "value", args.optim)
        if optim not in ("adamw_torch", "adamw_torch_fused"):
            raise ConfigError(
                f"optim={optim!r} would be ignored: the optimizer is the run's, AdamW as its method transforms it. "
                "Leave optim= and optim_target_modules= out of TrainingArguments."
            )
        if args.deepspeed or args.fsdp:
            raise ConfigError(
                f"An unmodified Trainer under {'DeepSpeed' if args.deepspeed else 'FSDP'} does not save and load this "
                "optimizer's state. Use DDP here, or rs.Trainer under FSDP2."
            )
        check_flag(fused_backward)
        if fused_backward:
            refuse_settings(args)
            refuse_apart(tensor for _, tensor in self.trainable())
            self._check_fused(clip_each)

        run = self

        class OfTrainer(Optimizer):
            """Called with a Trainer's parameter groups, the run's optimizer."""

            def __new__(cls, groups: Iterable[Mapping[str, Any]], **numbers: Any) -> Optimizer:  # type: ignore[misc]
                return run._regrouped(groups, **numbers)

        return OfTrainer, {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            "weight_decay": args.weight_decay,
            "check_gradients": check_gradients,
            "fused_backward": fused_backward,
            "clip_each": clip_each,
        }

    def _regrouped(self, groups: Iterable[Mapping[str, Any]], **numbers: Any) -> Optimizer:
        """:meth:`optimizer` over what trains; from a Trainer's groups comes what decays."""
        decay = {id(p): group["weight_decay"] > 0 for group in groups for p in group["params"]}
        missing = next((name for name, p in self.trainable() if id(p) not in decay), None)
        if missing is not None or len(decay) > len(list(self.trainable())):
            raise ConfigError(
                "The Trainer's parameters are not those of the run: "
                + (f"{missing} is not among them" if missing is not None else "some do not belong to the method")
                + ". Give it the model that was attached to, and leave requires_grad as the method set it."
            )
        return self.optimizer(decay=lambda _, tensor: decay[id(tensor)], **numbers)

    def _check_fused(self, clip: float | None) -> None:
        if clip is not None and not clip > 0:
            raise ConfigError(f"clip_each = {clip}: a norm, above 0; or None.")
        for name in self._on.active:
            refuse_method(self._on.members[name].method)

    def _check_total(self) -> None:
        active = [self._on.members[name].method for name in self._on.active]
        handover.need_total(self, [*active, *(then.method for then in self.coming)])
        for method in active:
            coming = self.coming if method is self.method else ()
            handover.check_lengths(self, method, coming, self.phases[-1].start, self._listed)

    def carry(self, optimizer: torch.optim.Optimizer) -> None:
        """Let any other torch optimizer over ``run.trainable()`` carry the events.

        Raises:
            ConfigError: the method's events know nothing of its state.
        """
        self._open()
        self._check_total()
        for method in (self._on.members[name].method for name in self._on.active):
            if why := method.cannot_ride(optimizer):
                raise ConfigError(f"{type(method).__name__} {why}")
        self._driver.bind(optimizer, self.model)
        self._compare()

    def scheduler(self, optimizer: torch.optim.Optimizer, warmup: int = 0) -> torch.optim.lr_scheduler.LambdaLR:
        """The learning rate: over this phase as the method's paper has it, if it says (ReLoRA's warms up after every
        restart, SoRA's falls to 0 in every stage), else down to 0 along one cosine over the whole run.

        Call its ``step()`` after each ``optimizer.step()``. It goes by the updates that were taken: one that is skipped
        does not move it, and in a resumed run it is where the run is.

        Args:
            warmup: updates over which the rate rises first.

        Raises:
            ConfigError: the number of updates is not known, or the warm-up does not fit into it.
        """
        self._check_open()
        factors: dict[tuple[int, int], Callable[[int], float]] = {}  # one, but where a state is loaded later

        def now(_: int) -> float:
            start, length = self._span()
            if (start, length) not in factors:
                factors[start, length] = self._factor(length, warmup)
            return factors[start, length](self.step - start)

        return torch.optim.lr_scheduler.LambdaLR(optimizer, now)

    def _span(self) -> tuple[int, int]:
        """The first update of a schedule, and how many it has."""
        start, length = self.phases[-1].start, self._length()
        if self.method.lr_schedule(1, 0) is not None or self.phase_end is not None:
            return start, length
        assert self.total_steps is not None
        return 0, self.total_steps

    @property
    def phase_end(self) -> int | None:
        """The update at which the learning rate of this phase ends, if it has a schedule of its own and that is known
        to be over before the run is."""
        end = self.method.phase_end(self.phases[-1].start, self.total_steps)
        if end is None and self.method.lr_schedule(1, 0) is not None and self.coming and self.coming[0].steps:
            return self._listed + self.coming[0].steps
        return end

    def _length(self) -> int:
        """Updates of this phase."""
        kind, start, total = type(self.method).__name__, self.phases[-1].start, self.total_steps
        if total is None:
            raise ConfigError(
                f"A schedule of the learning rate for {kind} needs the number of updates, which is not known. Pass "
                "total_steps= to attach(), or set run.total_steps: the number of optimizer steps."
            )
        end = self.phase_end
        length = (total if end is None else end) - start
        if length < 1 and end is not None:
            raise ConfigError(
                f"This phase of {kind} began at update {start}, and what is to follow was due at update {end} already. "
                "run.due() names it: run = run.shift(method); or take it off with run.coming = ()."
            )
        if length < 1:
            raise ConfigError(
                f"This phase of {kind} began at update {start}, and the run was to end at {total}. Set run.total_steps "
                "to the number of updates of the whole run."
            )
        return length

    def _factor(self, length: int, warmup: int) -> Callable[[int], float]:
        """Of the peak learning rate, in every update of a phase."""
        check_warmup(warmup, length)
        own = self.method.lr_schedule(length, warmup)
        return partial(cosine, total=length, warmup=warmup) if own is None else own

    def loss(self, task: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The loss to train on: that of the task, with what the method adds to it.

        >>> loss = run.loss(model(**batch).loss, **batch)

        Most methods add nothing, and then this is ``task``. PC-LoRA compares what layers put out with the original,
        which runs here on the same batch, in eval mode and without a gradient. What ends a phase by its loss hears it
        here. In evaluation (``model.eval()`` or no gradients) it is ``task`` and nothing else.

        Where gradients accumulate over n micro-batches, give the loss of each as it is and divide what comes back:
        ``run.loss(loss, **batch) / n``. One that is divided before is heard as a lower one, and what a method adds is
        not divided with it.

        Args:
            task: of the forward that was just made, a scalar with its graph.
            args: what the model was called with, positional.
            kwargs: what it was called with by name.

        Raises:
            TrainingError: there was no such forward, or it was on another batch.
        """
        self._check_open()
        if not torch.is_grad_enabled() or not self.model.training:
            return task
        if self.watch is not None:
            self.watch.hear(task, self._accumulates)
        lesson = self._lesson(args, kwargs) if self._ear.listening else None
        for name in self._on.active:
            task = self._on.members[name].method.objective(task, lesson)
        return task

    def _lesson(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lesson:
        """What the model made of the batch, and what the original makes of it."""
        if not self._ear.waiting:
            raise TrainingError(
                "run.loss goes with a forward of the model in training mode that it has not been asked about yet: call "
                "the model that you attached to, then run.loss(loss, *batch, **batch) once."
            )
        if not args and not kwargs:
            raise TrainingError(
                "run.loss needs the batch that the model was just called with: run.loss(loss, **batch)."
            )
        student = self._ear.take()
        with self._on.original(), torch.no_grad():
            teacher = self._ear.overhear(lambda: self.model(*args, **kwargs))
        return Lesson(student, teacher)

    def _listen(self) -> None:
        """Hear what the active methods compare."""
        modules: dict[str, nn.Module] | None = None
        for name in self._on.active:
            names = self._on.members[name].method.hears(self.model, list(self._on.adapter(name)))
            if names is not None:
                modules = {**(modules or {}), **{layer: self.model.get_submodule(layer) for layer in names}}
        self._ear.attend(self.model, modules)
        driver = self._driver
        driver.sentry.watch(tensor for _, tensor in itertools.islice(self.trainable(), 4))
        events = [event for name in self._on.active for event in self._on.members[name].method.events()]
        if self._post is None and any(getattr(event, "essential", True) for event in events):
            self._post = self.model.register_forward_pre_hook(driver.sentry)

    def _deafen(self) -> None:
        """Hear nothing any more."""
        self._ear.attend(self.model, None)
        if self._post is not None:
            self._post.remove()
            self._post = None

    def _objection(self) -> str:
        """Why the update that is due now must not be taken; "" if it may be."""
        return self._unheard() or self._overdue()

    def _overdue(self) -> str:
        """Why, where the phase has ended and its next has not begun."""
        due = self.due()
        if due is None:
            return ""
        if self.step == self.phases[-1].start:
            return (
                f"{type(due).__name__} was due already when this phase of {type(self.method).__name__} began, at "
                f"update {self.step}: a shift by hand leaves the list of phases as it is. Go on with "
                "run.shift(run.due()), or take it off the list with run.coming = ()."
            )
        return (
            f"This phase of {type(self.method).__name__} ended at update {self.step}, and the next has not begun. "
            "After each update ask run.due(); where it names a method: run = run.shift(method), and a new optimizer "
            "and schedule. rs.Trainer does it by itself; other trainers cannot: there use one phase."
        )

    def _unheard(self) -> str:
        """Why an update whose losses lack what the method adds to them, or are not known where they must be, cannot be
        taken; "" if none does."""
        if self.watch is not None and not self.watch.heard:
            return (
                f"When {type(self.method).__name__} goes on depends on the loss, and the batches of this update were "
                "trained without it being known: loss = run.loss(model(**batch).loss, **batch), then loss.backward(). "
                "rs.Trainer does it by itself."
            )
        if not self._ear.unanswered():
            return ""
        return (
            f"{type(self.method).__name__} adds to the loss of every batch, and a batch of this update was trained "
            "without: loss = run.loss(model(**batch).loss, **batch), then loss.backward(). rs.Trainer does it by "
            "itself. To train on the task alone, set features=False."
        )

    # ---- when a phase ends

    def _look_out(self) -> None:
        """Watch what the end of this phase depends on."""
        trained = {name for name, p, _ in base_parameters(self.model) if p.requires_grad}
        wish = self._wish(self.method, self.coming[0] if self.coming else None, trained)
        self.watch = None if wish is None else Watch(wish)

    def _wish(self, method: Method, then: Then | None, trained: Set[str]) -> Wish | None:
        """What to watch in a phase that ``then`` follows, where these parameters train in place."""
        own = method.watches(self.model)
        if own is not None and own.weights:
            names = known_as(self.model, own.weights)
            looked = tuple(name for name in own.weights if names[name] in trained)
            if not looked:
                raise ConfigError(
                    f"{type(method).__name__} looks at the weights of the layers in targets, and none of them trains: "
                    "they were frozen (requires_grad=False). Unfreeze one before attach(), or choose other targets."
                )
            own = replace(own, weights=looked)
        if then is None or not then.looks:
            return own
        if own is not None:
            raise ConfigError(
                f"{type(method).__name__} watches the loss for phases of its own. Let what follows it begin by steps "
                "or minutes."
            )
        # of the model as it came: what sites stand at is in the base and does not train in place
        matrices = {f"{name}.weight" for name, module in self.model.named_modules() if form_of(module) is not None}
        return then.wish([name for name, _, _ in base_parameters(self.model) if name in matrices & trained])

    def _counted(self) -> None:
        """An update was taken."""
        if self.watch is not None:
            self.watch.look(self.step - self.phases[-1].start, self._looked_at)
        if self.coming and self.coming[0].minutes is not None:
            now = time.monotonic()
            self._seconds, self._since = shard.from_first(self._seconds + now - self._since), now

    def _looked_at(self) -> dict[str, nn.Parameter]:
        """The weights that the watch looks at, by name."""
        assert self.watch is not None
        weights = {name: p for name, p, _ in base_parameters(self.model)}
        return {name: weights[at] for name, at in known_as(self.model, self.watch.wish.weights).items()}

    def _passed(self) -> None:
        """An update was skipped."""
        if self.watch is not None:
            self.watch.skip()

    def _accumulates(self) -> bool:
        """Whether there are gradients of what trains; taken for granted of sharded tensors, which may have theirs
        elsewhere until they are reduced."""
        return any(p.grad is not None or shard.is_sharded(p) for _, p in self.trainable())

    def due(self) -> Method | None:
        """The next phase's method, when the current one, or :attr:`coming`, says that it is time; the same on every
        rank. Ask after every update."""
        method = self.method.next(self)
        if method is not None or not self.coming:
            return method
        snapshots = () if self.watch is None else self.watch.snapshots
        reached = self.coming[0].reached(self.step - self._listed, self._seconds / 60, snapshots)
        return self.coming[0].method if reached else None

    # ---- adapters

    def add(self, name: str, method: Method, *, data: Iterable[Any] | None = None) -> None:
        """Add a second adapter, not active until :meth:`use`. The base is not touched."""
        self._open()
        self._on.free(name)
        for other in (method, *(member.method for member in self._on.members.values())):
            projected = other.projects(self.model)
            if any(n in projected or other.in_place(n, adapted) for n, _, adapted in base_parameters(self.model)):
                without = 'bias="none", or ' if any(field.name == "bias" for field in fields(other)) else ""
                raise AttachError(
                    f"{type(other).__name__} as configured trains base weights in place, which all adapters would "
                    f"share: it stands alone. Use {without}run.shift(method) to go on with another method."
                )
            if other.solitary:
                raise AttachError(
                    f"{type(other).__name__} {other.solitary}: it stands alone. Use run.shift(method) to go on with "
                    "another method."
                )
        self._on.build(name, method, self.seed, data)
        self._on.use(*self._on.active)

    def use(self, *names: str) -> None:
        """Make these adapters act; the changes of several add up. Only they train; none of them: the base."""
        self._open()
        self._on.use(*names)
        self._listen()
        self._compare()
        self._driver.open_window()  # while it did not act, an adapter's windows passed it by

    def _compare(self) -> None:
        """An optimizer that does not hold what trains now must not be stepped."""
        missing = self._driver.holds(self.trainable())
        self._driver.refusal = (
            ""
            if missing is None
            else (
                f"{missing} trains now, but this optimizer does not hold it: it was made for other adapters. "
                "Make a new one with run.optimizer()."
            )
        )

    def delete(self, name: str) -> None:
        """Remove an adapter. The base is not touched."""
        self._open()
        self._on.known(name)
        if len(self._on.members) == 1:
            raise AttachError(f"adapter {name!r} is the only one. End the run with run.merge(), or add another first.")
        left = tuple(other for other in self._on.active if other != name)
        self._on.drop(name)
        self.use(*left)

    def combine(self, names: Sequence[str], name: str, weights: Sequence[float] | None = None) -> None:
        """A new LoRA adapter equal to the weighted sum of others: exact, by concatenation, of rank Σ r.

        Raises:
            ExportError: one of them has no low-rank form.
        """
        from rankshift.io.combine import concatenate

        self._open()
        for other in names:
            self._on.known(other)
        self._on.free(name)
        weights = [1.0] * len(names) if weights is None else list(weights)
        if any(other in replica.copies for other in names for replica in self._on.replicas().values()):
            raise ExportError(
                f"One of {', '.join(names)} holds modules trained whole (modules_to_save), which have no low-rank sum."
            )
        method, ranks, tensors = concatenate([self.adapter(other) for other in names], weights)
        self._on.build(name, method, self.seed, ranks=ranks)
        added = self._on.added()
        for leaf, tensor in tensors.items():
            shard.assign_(added[f"{name}/{leaf}"], tensor)
        self._on.use(*self._on.active)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The base, bit for bit, for the length of a ``with`` block."""
        self._open("disabled()")
        if not self.method.reversible:
            raise AttachError(f"{type(self.method).__name__} trains the base itself: there is none to go back to.")
        if self._suspended == "disabled()":  # nested: it is the base already
            yield
            return
        trained = {name: shard.local(tensor)[0].clone() for name, tensor in self._on.movable()}
        with self._suspend("disabled()"):
            try:
                for name, tensor in self._on.movable():
                    shard.assign_(tensor, self._on.originals[name])
                self._on.link(())
                yield
            finally:
                shard.settle(self.model)
                for name, tensor in self._on.movable():
                    shard.local(tensor)[0].copy_(trained[name])

    @contextlib.contextmanager
    def merged(self, onto: Onto = "dequantised", original: Any = None) -> Iterator[nn.Module]:
        """The active adapters folded into the base for a ``with`` block; after it the base's own bits again.

        Args: see :meth:`merge`.
        """
        self._open()
        check_foldable(self.sites.values())
        target, _ = holding.targets(self._on, onto, original)
        holding.refuse_sharded(self._on, onto)
        undo: list[Callable[[], None]] = []
        with self._suspend("merged()"):
            try:
                undo.extend(fold(site, target(site)) for site in self._on.sites.values() if site.active)
                yield self.model
            finally:
                shard.settle(self.model)
                for put_back in undo:
                    put_back()

    def parity(self, inputs: Tensor | Mapping[str, Any], onto: Onto = "dequantised", original: Any = None) -> Parity:
        """The model as it acts beside the merged one, on sample inputs: logits, KL, and what is left of the change of
        each layer; prints as a table. In eval mode, without gradients; the run goes on unchanged.

        Under FSDP2 every rank must call this, and compares on its own inputs; a base in fewer bits is compared there
        with onto="requantised" alone.

        Args:
            inputs: what the model is called with, a tensor or a mapping of names; padded ones (``attention_mask``) do
                not count.
            onto, original: as in :meth:`merge`.
        """
        self._open()
        return parity(self, inputs, onto, original)

    @contextlib.contextmanager
    def _suspend(self, how: str) -> Iterator[None]:
        """Refuse verbs and updates for the length of a ``with`` block, then let the active adapters act again."""
        before, self._suspended = self._driver.refusal, how
        self._driver.refusal = f"An update inside run.{how} would train what is not acting. Step after the with block."
        try:
            yield
        finally:
            self._driver.refusal, self._suspended = before, ""
            self._on.link(self._on.active)

    # ---- speed

    def lower(self, graphs: bool = False, memory_budget: str | None = None) -> lowering.Lowered:
        """Let the blocks of the model run in fused forms where these are known, with the parameters that they have;
        see :func:`rankshift.lower.lower`. Names, states and checkpoints stay what they are. Returns a report, which
        prints.

        It stays through shift(); merge(), compress(), detach() and :meth:`raise_` put the model's own blocks back.

        Args:
            graphs: replay blocks as CUDA graphs once batches of one shape come.
            memory_budget: what a step may take, "40GiB" or "auto": blocks keep less for their backward, and compute it
                again, where it would not fit.
        """
        self._open()
        return lowering.lower(self.model, graphs, memory_budget)

    def raise_(self) -> None:
        """Put the model's own blocks back in the places of fused ones."""
        self._open()
        lowering.undo(self.model)

    # ---- ends

    def merge(self, onto: Onto = "dequantised", original: Any = None) -> nn.Module:
        """Fold the active adapters into the weights and end the run: plain modules, no trace of rankshift.

        The sum is taken in fp32 (float64 on a float64 base) and rounded once.

        Args:
            onto: where the base is held in fewer bits. "dequantised": the base that the adapter was trained on, in the
                layers' dtype, in every layer. "original": the weights before they were rounded; the rounding that the
                adapter has learned with is then gone, and is often more than the adapter. "requantised": back into the
                storage, which rounds most of a small change away: compare both with :meth:`parity` first.
            original: with that, a model, a mapping of tensors or a directory of safetensors.
        """
        self._open("merge()")
        check_foldable(self.sites.values())
        target, originals = holding.targets(self._on, onto, original)
        holding.refuse_sharded(self._on, onto)
        if idle := [name for name in self._on.members if name not in self._on.active]:
            warnings.warn(f"Not active, so not merged and gone now: {', '.join(idle)}.", stacklevel=2)
        self._suspended = "merge()"  # who interrupts this can only call it again
        self._driver.refusal = _HALF_MERGED
        for site in self.sites.values():
            if site.active:
                fold(site, target(site))  # once, whatever interrupts the rest
        lowering.undo(self.model)
        self._on.strip()
        holding.release(self.model, onto != "requantised", originals)
        if embeddings_untied(self.model):  # an embedding was trained as a copy: loading must not tie the two again
            self.model.config.tie_word_embeddings = False  # type: ignore[union-attr]
        self._suspended = ""
        self._close("merge()")
        self.model.zero_grad()
        return self.model

    def compress(self) -> nn.Module:
        """End the run with two thin layers where each adapted one stood, plain modules, no trace of rankshift. Their
        weights of the base are gone from memory once nobody else holds them.

        Raises:
            ExportError: an adapter still needs its base; nothing was changed.
        """
        from rankshift.io import compressed

        self._open()
        if any(shard.is_sharded(p) for p in self.model.parameters()):
            raise AttachError(
                f"compress() puts in new layers, and this {type(self.model).__name__} is sharded. Write them instead: "
                'run.export(directory, format="compressed"); rs.load_compressed reads that.'
            )
        found = compressed.factors(self)
        if idle := [name for name in self._on.members if name not in self._on.active]:
            warnings.warn(f"Not active, so not in the model and gone now: {', '.join(idle)}.", stacklevel=2)
        lowering.undo(self.model)
        self._on.strip()
        compressed.replace(self.model, found)
        self._on.sites.clear()  # else this run would keep the weights
        if embeddings_untied(self.model):
            self.model.config.tie_word_embeddings = False  # type: ignore[union-attr]
        self._close("compress()")
        self.model.zero_grad()
        return self.model

    def detach(self) -> nn.Module:
        """Take the adapters off without merging and end the run: the base as it came."""
        self._open()
        if not self.method.reversible:
            raise AttachError(f"{type(self.method).__name__} trains the base itself: nothing can be taken off it.")
        for name, tensor in self._on.movable():
            shard.assign_(tensor, self._on.originals[name])
        lowering.undo(self.model)
        self._take_off("detach()")
        self.model.zero_grad()
        return self.model

    def shift(self, method: Method, *, data: Iterable[Any] | None = None) -> Run:
        """End this phase and begin the next with another method, in mid-run. The function stays.

        What was trained is folded into the base, unless the next method goes on with its tensors (see
        :meth:`Method.inherit`). Adam's moments of a tensor that goes on training as itself go along, all others begin
        anew; the new optimizer says which.

        Make a new optimizer from the run that is returned; this one and its optimizer are closed. Where something
        fails after the method was found to fit (out of memory, Ctrl-C), what is left is the plain model with all that
        was trained in its weights.
        """
        return handover.shift(self, method, data)

    def _keep_moments(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Of what goes on training; the memory of all others is free once the last optimizer is."""
        train = {name for name, _ in self.trainable()}
        self._moments = {name: state for name, state in states.items() if name in train}

    def _take_off(self, how: str) -> None:
        """End the run without merging."""
        self._on.link(())
        self._on.strip()
        holding.release(self.model, dense=False)
        self._close(how)

    def _close(self, how: str) -> None:
        for name, parameter, _ in base_parameters(self.model):
            if parameter.is_floating_point():  # not the codes of a quantised weight
                parameter.requires_grad_(self._frozen.get(name, True))
        self._driver.close()
        self._deafen()
        self._closed = how
        _ATTACHED.discard(self.model)

    def _open(self, within: str = "") -> None:
        self._check_open(within)
        self._driver.sentry.watch(self._driver.sentry.tensors)  # a verb may change what trains
        shard.settle(self.model)

    def _check_open(self, within: str = "") -> None:
        if self._suspended == "merge()" != within:
            raise AttachError(_HALF_MERGED)
        if self._suspended and self._suspended != within:
            raise AttachError(f"This cannot be done inside run.{self._suspended}. Leave the with block first.")
        if self._closed:
            raise AttachError(
                f"This run ended with {self._closed}. Attach again, or use the run that shift() returned."
            )

    # ---- as data

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values. With the model's and the optimizer's state: an exact resume.

        Under FSDP2, and wherever the run watches the loss (PreLoRA, ``Then(loss=…)`` and the like), every rank must
        call this; tensors are whole.
        """
        return {**self.describe(), "tensors": dict(self.tensors())}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of everything the base as it came does not tell, one gathered at a time.

        ``adapter/…`` for each adapter by its name; ``buffer/…``, running statistics, which move without being trained;
        ``watch/…``, the window that is not over; ``original/…``, what :meth:`disabled` puts back; last ``base/…``,
        weights that are not what they came as.
        """
        self._open()
        changed = self.changed
        for name, tensor in self._on.added().items():
            yield name, shard.whole(tensor)
        if self.watch is not None:
            yield _WINDOW, self.watch.open()
        kept = self._on.kept()
        lent = {
            n for name, site in self._on.sites.items() if site.base.tenant is not None for n in weight_names(name, site)
        }
        with self._on.returned():
            for name in sorted(kept, key=lambda name: name.startswith("base/")):
                kind, _, base_name = name.partition("/")
                if kind != "base" or base_name in changed:
                    value = shard.whole(kept[name])
                    # columns come back to the weight itself as soon as this ends, and must not to what was yielded
                    yield name, value.clone() if kind == "base" and base_name in lent else value

    def describe(self) -> dict[str, Any]:
        """The plain values of :meth:`state_dict`, as JSON knows them."""
        return {
            "format": 1,
            "adapters": {
                name: {"method": to_dict(m.method), "ranks": dict(m.ranks)}
                | ({} if m.shared is None else {"shared": m.shared.describe()})
                for name, m in self._on.members.items()
            },
            "active": list(self._on.active),
            "seed": self.seed,
            "total_steps": self.total_steps,
            "step": self.step,
            "skipped": self.skipped,
            "phases": [phase.to_mapping() for phase in self.phases],
            "changed": sorted(self.changed),
            "subspaces": self.subspaces,
            "storage": self._storage(),
            "frozen": sorted(self._on.frozen) if self.method.trains_base else [],
            "coming": [then.to_mapping() for then in self.coming],
            "listed": [self._listed, self._seconds],
            "snapshots": [] if self.watch is None else [s.to_mapping() for s in self.watch.snapshots],
        }

    def _storage(self) -> dict[str, Any] | None:
        """What the base is held in, where this run has put it there."""
        return None if self._held is None else {"kind": self._held, "kept": holding.kept(self._on)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of another run of the same method on the same base.

        Where a method allows it (``Method.adjustable``: most fields of GaLore and AdaRankGrad), this run's may differ;
        it goes on as it is, and the log says in what.

        Raises:
            WrongBase: another method, or a tensor is missing, unknown or of another shape; nothing was changed.
        """
        theirs, mine = state.get("storage"), self._storage()
        if theirs != mine:
            raise WrongBase(
                f"The saved run holds its base as {_said(theirs)}, and this one as {_said(mine)}: attach with the same "
                "base= and seed, or load it onto a fresh model with rs.load() or rs.restore()."
            )
        self._load(state)

    def _load(self, state: Mapping[str, Any]) -> None:
        """See :meth:`load_state_dict`; a base that is to be held in another storage is put there on the way."""
        self._open()
        wanted = {name: from_dict(entry["method"]) for name, entry in state["adapters"].items()}
        other = [
            compare(wanted[name], member.method, "The run" if name == DEFAULT else f"Adapter {name!r}")
            for name, member in self._on.members.items()
            if name in wanted
        ]
        if self.method.trains_base and (apart := self._on.frozen ^ set(state.get("frozen", ()))):
            here = min(apart) in self._on.frozen
            raise WrongBase(
                f"{min(apart)} {'trained' if here else 'was frozen'} in the saved run, and here it "
                f"{'is frozen' if here else 'trains'}. Before attach() set requires_grad as it was."
            )
        mine = {name: dict(m.ranks) for name, m in self._on.members.items()}
        for name, entry in state["adapters"].items():
            if name in mine and mine[name] != entry["ranks"]:
                odd = sorted(set(mine[name].items()) ^ set(entry["ranks"].items()))[0]
                raise WrongBase(f"adapter {name!r} has other layers or ranks than the one attached, e.g. {odd}.")
            shared = self._on.members[name].shared if name in mine else None
            if shared is not None and shared.describe() != entry.get("shared"):
                raise WrongBase(
                    f"adapter {name!r} was trained with {entry.get('shared')}, but {shared.describe()} is attached. "
                    "Load it onto a fresh base with rs.load() or rs.restore()."
                )
        if stray := self.changed - set(state["changed"]):
            raise WrongBase(f"{min(stray)} was changed since that state. Load the base anew, and the state onto it.")
        coming = tuple(Then.from_mapping(then) for then in state.get("coming", ()))
        if self.coming not in ((), coming):
            raise WrongBase(
                "The saved run has other phases to come than this one, which was given "
                f"{len(self.coming)} (then=, phases:). Give them as they were, or none: the saved ones count."
            )
        new = [name for name in wanted if name not in self._on.members]
        try:
            for name in new:
                entry = state["adapters"][name]
                self._on.build(name, wanted[name], self.seed, ranks=entry["ranks"], saved=entry.get("shared"))
            with self._on.returned():
                self._take(state["tensors"], wanted, state.get("storage"))
        except BaseException:
            for name in new:
                if name in self._on.members:
                    self._on.drop(name)
            raise
        for name in [name for name in self._on.members if name not in wanted]:
            self._on.drop(name)
        self.seed = self._driver.seed = int(state["seed"])
        self.total_steps = state["total_steps"]
        self.phases = [Phase.from_mapping(phase) for phase in state["phases"]]
        if any(other):
            self.phases[-1] = replace(self.phases[-1], method=to_dict(self.method))
        self._driver.began = self.phases[-1].start
        self._coming = coming
        self._listed, self._seconds = state.get("listed", (0, 0.0))
        self._since = time.monotonic()
        self._look_out()
        if self.watch is not None and _WINDOW in state["tensors"]:
            self.watch.load(state["snapshots"], state["tensors"][_WINDOW])
        self._changed = set(state["changed"])
        self._ranks.clear()  # the optimizer reads it too
        self._ranks.update(state.get("subspaces", {}))
        self.use(*state["active"])
        self._driver.step, self._driver.skipped = int(state["step"]), int(state.get("skipped", 0))
        self._driver.open_window()
        self._told[:] = filter(None, other)
        for change in self._told:
            _log.warning("%s.", change)

    def _take(
        self, tensors: Mapping[str, Tensor], wanted: Iterable[str], storage: Mapping[str, Any] | None = None
    ) -> None:
        """Copy saved tensors to their places; every refusal comes before the first, but for those of a base that is to
        be held as ``storage`` says."""
        places = self._on.added()
        tensors = {name: tensor for name, tensor in tensors.items() if name != _WINDOW}
        missing = [name for name in places if name not in tensors and name.partition("/")[0] in wanted]
        if missing:
            raise WrongBase(f"the saved run lacks {missing[0]}. It belongs to another base or method.")
        hold = storage["kind"] if storage is not None and self._held is None else None
        places |= {name: t for name, t in self._on.kept().items() if hold is None or not name.startswith("base/")}
        theirs = {name: tensor for name, tensor in tensors.items() if hold is None or not name.startswith("base/")}
        _copy(theirs, places)
        if hold is not None:
            assert storage is not None
            self._hold(self.method, hold, fresh=False, kept=storage["kept"])
            if self._storage() != storage:
                raise WrongBase(
                    f"The saved run holds its base as {_said(storage)}; here it comes to {_said(self._storage())}."
                )
            _copy({name: tensor for name, tensor in tensors.items() if name not in theirs}, self._on.kept())

    def save(self, directory: str | Path) -> Path:
        """Write the run as a native directory, atomically; :func:`load` reads it. Every rank must call this; one
        writes."""
        from rankshift.io.checkpoint import save

        self._open()
        with self._on.returned():
            return save(self, directory)

    def export(
        self,
        directory: str | Path,
        format: Literal["peft", "merged", "compressed"] = "peft",
        profile: Literal["exact", "portable"] = "exact",
        adapter: str | None = None,
        onto: Onto = "dequantised",
        original: Any = None,
    ) -> Path:
        """Write what other programs load.

        "peft": an adapter directory in PEFT's format; with profile="portable" one plain LoRA of uniform rank, as
        servers accept it. "merged": a plain model directory. "compressed": the small model that PC-LoRA leaves, which
        :func:`rankshift.load_compressed` reads without the base. The run goes on unchanged.

        Args:
            adapter: which one; by default those that are active (for "peft" there must be exactly one).
            onto, original: of a plain model whose base is held in fewer bits, as in :meth:`merge`. "requantised" is
                written as bitsandbytes' layers, which transformers loads.

        Raises:
            ExportError: the format cannot hold this method exactly.
            NotWritable: nothing was written, and what was there before is untouched.
        """
        from rankshift.io.export import export

        self._open()
        if adapter is not None:
            self._on.known(adapter)
        _, originals = holding.targets(self._on, onto, original)
        if format != "merged" and onto != "dequantised":
            raise ConfigError(f'onto="{onto}" is for a plain model, format="merged", not for {format!r}.')
        if format == "peft" and (beside := holding.kept(self._on)):
            _log.warning(
                "%d layers, e.g. %s, have columns in 16 bits beside the codes, which were made without them. PEFT "
                "loads the adapter onto a base that is in %s as a whole, and there the model computes something else. "
                'Export with format="merged", or train on a model that came quantised (BitsAndBytesConfig), without '
                "base=.",
                len(beside), next(iter(beside)), self._held,
            )  # fmt: skip
        read, packed = None if originals is None else originals.__getitem__, onto == "requantised"
        self._on.link(self._on.active if adapter is None else (adapter,))
        try:
            with self.merged(onto) if packed else self._on.returned():
                return export(
                    self, directory, format=format, profile=profile, adapter=adapter, packed=packed, original=read
                )
        finally:
            self._on.link(self._on.active)


def _said(storage: Mapping[str, Any] | None) -> str:
    """What :meth:`Run._storage` found, in words: layers have too many columns to name them."""
    if storage is None:
        return "it came"
    kept = storage["kept"].values()
    beside = f" with {sum(map(len, kept))} columns of {len(kept)} layers beside" if kept else ""
    return f"{storage['kind']}{beside}"


def _count(total: int | None) -> int | None:
    if total is not None and (not isinstance(total, int) or isinstance(total, bool) or total < 1):
        raise ConfigError(
            f"total_steps = {total!r} is no number of updates. Pass a whole number of at least 1, or None."
        )
    return total


def _copy(tensors: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> None:
    """Copy saved tensors to their places; every refusal comes before the first."""
    for name, tensor in tensors.items():
        if name not in places:
            raise WrongBase(f"the saved run has {name}, which this model does not. It belongs to another base.")
        if places[name].shape != tensor.shape:
            raise WrongBase(f"{name} is {tuple(tensor.shape)} in the saved run and {tuple(places[name].shape)} here.")
    for name, tensor in tensors.items():
        shard.assign_(places[name], tensor.to(places[name].device))


def load(
    model: nn.Module,
    directory: str | Path,
    seed: int = 0,
    *,
    check_base: bool = True,
    tied: Literal["refuse", "untie"] = "refuse",
) -> Run:
    """Attach what a directory holds: a native one of :meth:`Run.save`, or else a PEFT LoRA or VeRA adapter.

    Args:
        model: the base that it was trained on.
        directory: where it is.
        seed: for a PEFT directory, which names none.
        check_base: refuse a base whose values are not those it was trained on (native directories know).
        tied: for a PEFT directory, what to do where it adapts a layer whose weight is shared; as in the methods.

    Raises:
        MissingFile, CorruptFile: the directory is not complete.
        WrongBase: it was trained on another base.
        ConfigError: a PEFT adapter with an option that has no equal here; named.
    """
    from rankshift.io.checkpoint import read

    _fresh(model, "load")
    return restore(model, read(model, directory, seed, check_base, tied))


def restore(model: nn.Module, state: Mapping[str, Any]) -> Run:
    """Attach to a fresh base the run whose :meth:`Run.state_dict` this is, with whatever adapters it had."""
    _fresh(model, "restore")
    separate(model, [name.removeprefix("base/") for name in state["tensors"] if name.startswith("base/")])
    run = Run(model, seed=int(state["seed"]), total_steps=state["total_steps"])
    first, entry = next(iter(state["adapters"].items()))
    method = from_dict(entry["method"])
    if method.trains_base:
        run._on.frozen = frozenset(state.get("frozen", ()))  # as it was there, whatever this base came as
    run._begin(method, name=first, ranks=entry["ranks"], saved=entry.get("shared"))
    try:
        run._load(state)
        if prints := state.get("prints"):
            from rankshift.io import fingerprint

            with run._on.returned():
                fingerprint.compare(model, prints, "The run")
    except BaseException:  # the model goes back as it came
        run._take_off("an error")
        raise
    if method.trains_base:
        run._frozen |= dict.fromkeys(run._on.frozen, False)
    return run


def _fresh(model: nn.Module, verb: str) -> None:
    if model in _ATTACHED or any(isinstance(module, (Site, Replica, Stack)) for module in model.modules()):
        raise AttachError(
            f"This {type(model).__name__} has a method attached, and {verb} needs a fresh base. End that run with "
            "run.detach() or run.merge(), or load the model again."
        )
