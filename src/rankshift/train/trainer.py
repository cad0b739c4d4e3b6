"""Trainer: transformers' Trainer around a run. What it adds: the method, its phases, and checkpoints without the base.

A checkpoint is transformers' own (optimizer.pt, scheduler.pt, trainer_state.json, random states), but where
model.safetensors would be there is ``rankshift/``, the run's native directory.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import itertools
import json
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from accelerate.utils import save_fsdp_optimizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from rankshift import lower as lowering
from rankshift.core import shard
from rankshift.core.errors import AttachError, ConfigError, MissingFile, OutOfMemory, TrainingError, WrongBase
from rankshift.core.method import Method, compare, from_dict, to_dict
from rankshift.core.phase import Then, listed
from rankshift.core.schedule import check_warmup
from rankshift.core.site import base_parameters
from rankshift.holding import check_method
from rankshift.io.atomic import explain
from rankshift.io.checkpoint import MANIFEST, TRAINER, read
from rankshift.io.export import dense
from rankshift.optim.backward import check_flag, refuse_apart, refuse_method, refuse_settings
from rankshift.run import Run, attach, restore
from rankshift.storage import Kind
from rankshift.train import costs, timeline
from rankshift.train.callback import News, without_screens
from rankshift.train.optimizers import OPTIMIZERS
from rankshift.train.optimizers import build as build_optimizer
from rankshift.train.optimizers import check as check_optimizer

_log = logging.getLogger(__name__)

_STATE = "trainer_state.json"  # transformers writes it last: a checkpoint that has it is complete
_WRITER = ("PytorchStreamWriter", "iostream error", "unexpected pos")  # torch.save, where the disk is full
_LOGGED = "rankshift"  # in trainer_state.json, what was not logged yet
_ADAMW = ("adamw_torch", "adamw_torch_fused")


class Trainer(transformers.Trainer):
    """``transformers.Trainer`` for a model with a method.

    >>> trainer = rs.Trainer(model=model, method=rs.LoRA(rank=16), args=TrainingArguments("out"), train_dataset=data)
    >>> trainer.train()
    >>> trainer.run.export("out/adapter")

    Checkpoints hold what the method trained, never an untouched base, and resume to the same bits. The next phase
    begins where it is due: new optimizer, and the same schedule unless the method has one for each phase. What a phase
    cost is logged at its end: ``phase_trainable_parameters``, ``phase_update_seconds``, ``phase_peak_memory`` (without
    a GPU ``phase_estimated_memory``: weights, gradients and optimizer state).

    Ctrl-C ends training after the update in progress, with what is logged and evaluated then, saves a checkpoint, says
    how to go on and exits with code 130; a second Ctrl-C stops at once. Any other KeyboardInterrupt saves too, unless
    it came in the middle of an update. A resumed training logs what it would have logged without a stop, and trains
    nothing where nothing is left to train.

    Where there is more than one phase, or a rare event, ``timeline.png`` is drawn in ``args.output_dir`` at the end:
    the loss, and these under it. Not with save_strategy="no".

    Args:
        model: the base; or leave it out and give ``run``.
        args: transformers' TrainingArguments. ``args.seed`` is the seed of the method too.
        method: attached to ``model``. Exactly one of ``method`` and ``run`` is given.
        base: storage of the frozen weights, as in ``rs.attach``: "nf4" under LoRA is QLoRA.
        run: a run that exists already.
        lower: let the model's blocks run in fused forms, as :meth:`Run.lower` does; refused where none is known.
        memory_budget: with that, what a step may take, as there.
        then: methods to go on with, and when, after ``method``. A run has its own. A learning rate that one does not
            say is the one before it.
        calibration: batches for methods that look at data before they start, as collated dictionaries.
        check_gradients: stop if a tensor that must learn has no gradient in the first update.
        fused_backward: update each tensor inside the backward pass and free its gradient at once, as in
            :meth:`Run.optimizer`; it needs max_grad_norm=0, no accumulation, and FSDP2 where there are several GPUs.
        clip_each: with ``fused_backward``, clip each tensor's gradient to this norm by itself.
        rest: everything else that transformers' Trainer takes. An optimizer in ``optimizers`` must hold the run's
            trainable tensors and then carries the method's events.

    Raises:
        ConfigError: a setting that cannot work with a method, before anything is attached.
        NotWritable: ``args.output_dir`` cannot be written, likewise.
        OutOfMemory: while training; the text says what to lower.
    """

    run: Run

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        method: Method | None = None,
        base: Kind | None = None,
        run: Run | None = None,
        lower: bool = False,
        memory_budget: str | None = None,
        then: Sequence[Then] = (),
        calibration: Iterable[Any] | None = None,
        check_gradients: bool = True,
        fused_backward: bool = False,
        clip_each: float | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **rest: Any,
    ):
        if (method is None) == (run is None):
            raise ConfigError("Trainer needs a method=, such as rs.LoRA(rank=16), or an existing run=; one of the two.")
        if run is not None:
            if model is not None and model is not run.model:
                raise AttachError("Trainer(model=…, run=…): the run is attached to another model. Leave model out.")
            model = run.model
        if model is None:
            raise ConfigError("Trainer needs a model. model_init is not supported: a method is attached to one model.")
        args = copy.copy(args) if args is not None else TrainingArguments("tmp_trainer")
        first = run.method if run is not None else method
        if not isinstance(first, Method):
            raise ConfigError(f"Trainer needs a method such as rs.LoRA(rank=16); got {type(first).__name__}.")
        if run is not None and (then or base is not None):
            what = "then=" if then else "base="
            raise ConfigError(f"{what} goes with method=. A run that exists has what rs.attach(…, {what}…) gave it.")
        coming = listed(then) if run is None else run.coming
        if base is not None:
            check_method(first, base, coming)
        if memory_budget is not None and not lower:
            raise ConfigError(f"memory_budget={memory_budget!r} is for fused blocks: set lower=True, or leave it out.")
        self._check_optimizers(first, model, coming, rest)
        self._settle(args, model, first, coming)
        check_flag(fused_backward)
        if fused_backward and self._optim is not None:
            raise ConfigError(f"fused_backward=True is for the run's own optimizer, not for optim={self._optim!r}.")
        if fused_backward:
            self._check_fused(args, [first, *(one.method for one in coming)], rest)
        self._calibration = calibration
        if any(one.method.needs_data for one in coming):  # more than one phase may look at it
            self._calibration = self._batches(first, coming)
        with dense(model):  # it takes no quantised model whose adapters it does not know
            super().__init__(model, args, callbacks=[_Watch(self), *(callbacks or ())], **rest)
        self._refuse_engines()
        if fused_backward and not self.is_fsdp_enabled:
            refuse_apart(model.parameters())
        self.check_gradients = check_gradients
        self._fused, self._clip_each = fused_backward, clip_each
        given = self.optimizer
        self._stop = False  # this rank was asked to
        self._agreed = False  # every rank stops after this update
        self._before: Tensor | None = None  # the sum of losses to be logged, before an update that is not over
        self._begun = False  # there is such a sum
        self._settled = True
        self._news, self._meter = News(), costs.Meter(self.args.device)
        planned = self._planned_updates()
        if lower:
            report = lowering.lower(model, memory_budget=memory_budget)
            if not report.blocks:
                why = f": {next(iter(report.refused.values()))}" if report.refused else ""
                raise ConfigError(f"lower=True, but no block of this {type(model).__name__} can be fused{why}.")
        attached = run is None
        if run is None:
            assert method is not None
            run = attach(model, method, base, args.seed, planned, data=self._prepared(), then=coming)
        if lower:  # again: only now it is known what stands there, and that the head is frozen
            report = run.lower(memory_budget=memory_budget)
            if len(aside := report.aside) == len(report.blocks):
                if attached:
                    run._take_off("an error")
                    lowering.undo(model)
                why = next(iter(aside.values()))
                raise ConfigError(f"lower=True, but under {type(first).__name__} no block can be fused: {why}.")
            _log.info("%s", report)
        self.run = run
        self._planned = run.total_steps if planned is None else planned
        run.total_steps = self._planned
        if given is not None:
            self._carry(given)

    # ---- settings

    def _check_optimizers(self, method: Method, model: nn.Module, coming: Sequence[Then], rest: dict[str, Any]) -> None:
        """Refuse an optimizer or a schedule that cannot carry the method, or not all its phases."""
        phases = bool(coming) or method.watches(model) is not None
        if rest.get("optimizer_cls_and_kwargs") is not None:
            other = "Leave it out." if phases else "Pass run= and a ready one in optimizers=."
            raise ConfigError(f"optimizer_cls_and_kwargs= is not supported: the run makes its own. {other}")
        optimizer, scheduler = rest.get("optimizers") or (None, None)
        self._foreign, self._scheduled = optimizer is not None, scheduler is not None
        if coming:
            self._check_given(f"{method.name} is to go on as {coming[0].method.name}")
        elif phases:
            self._check_given(f"{method.name} goes through phases")

    def _check_given(self, what: str) -> None:
        """Raise ConfigError where an optimizer or a schedule was passed, which ends with its phase."""
        if self._foreign:
            raise ConfigError(
                f"{what}, which needs a new optimizer, but one was passed in optimizers=. Leave optimizers out."
            )
        if self._scheduled:
            raise ConfigError(
                f"{what}, which needs a new schedule, but one was passed in optimizers=. Leave it out, and say it "
                "in lr_scheduler_type."
            )

    def _settle(self, args: TrainingArguments, model: nn.Module, method: Method, coming: Sequence[Then]) -> None:
        """Defaults that suit a mostly frozen model; refusals before anything is built."""
        optim = getattr(args.optim, "value", args.optim)
        self._optim = optim if optim in OPTIMIZERS else None
        if self._optim is not None:
            for one in (method, *(then.method for then in coming)):
                check_optimizer(self._optim, one, args.device)
        elif optim not in _ADAMW:
            other = (
                ""
                if coming or method.watches(model) is not None
                else "; or attach first and pass run= and optimizers=(yours, None), yours made over [p for _, p in "
                "run.trainable()]"
            )
            raise ConfigError(
                f"optim={optim!r} would replace the method's own optimizer, AdamW as it transforms it. Use "
                f"{', '.join(map(repr, (*_ADAMW, *OPTIMIZERS)))}{other}."
            )
        if args.ddp_broadcast_buffers is None:
            args.ddp_broadcast_buffers = False
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = _may_be_unused(model, method)
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            if (getattr(args, name, None) or {}).get("use_reentrant"):
                raise ConfigError(
                    f"{name} has use_reentrant=True, which cuts the graph at a layer whose input needs no gradient, as "
                    "behind a frozen embedding: adapters there would learn nothing. Set use_reentrant=False."
                )
        out = Path(args.output_dir or ".")
        try:
            out.mkdir(parents=True, exist_ok=True)
            if not os.access(out, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "Permission denied")
        except OSError as error:
            raise explain(error, out) from error

    def _check_fused(self, args: TrainingArguments, methods: Sequence[Method], rest: dict[str, Any]) -> None:
        """Refuse, before anything is built, what updates inside the backward pass cannot go with."""
        refuse_settings(args)
        for method in methods:
            refuse_method(method)
        if (rest.get("optimizers") or (None,))[0] is not None:
            raise ConfigError(
                "fused_backward=True is for the run's own optimizer, but one was passed in optimizers=. Leave one out."
            )

    def _batches(self, first: Method, coming: Sequence[Then]) -> list[Any]:
        """Those for methods that look at data, to be gone through more than once."""
        if self._calibration is None:
            kind = next(type(one.method).__name__ for one in coming if one.method.needs_data)
            raise ConfigError(
                f"{kind} as configured looks at data before it starts, in a later phase: pass batches, calibration=."
            )
        return list(self._calibration)

    def _prepared(self) -> Iterable[Any] | None:
        """These batches on the device."""
        return None if self._calibration is None else (self._prepare_inputs(batch) for batch in self._calibration)

    def _refuse_engines(self) -> None:
        if self.is_deepspeed_enabled:
            raise ConfigError("DeepSpeed steps its own optimizer, which carries no events. Use DDP or FSDP2.")
        if self.is_fsdp_enabled and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
            raise ConfigError('FSDP1 flattens trained and frozen tensors together. Use fsdp_config={"version": 2}.')
        if self.is_fsdp_enabled and self._optim is not None:
            raise ConfigError(
                f"optim={self._optim!r}: bitsandbytes' optimizers know no sharded tensors. Under FSDP2 leave optim "
                "out: the run's own AdamW keeps its state sharded."
            )
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"{self.args.n_gpu} GPUs in one process would use nn.DataParallel. Launch with torchrun "
                f"--nproc-per-node {self.args.n_gpu}, or show one GPU with CUDA_VISIBLE_DEVICES."
            )

    def _planned_updates(self) -> int | None:
        """Updates of the whole schedule, where the arguments and the data say it."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        if self.train_dataset is None or not has_length(self.train_dataset):
            return None
        return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1])

    # ---- optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The run's AdamW with the rates and decay of the arguments; biases and norms do not decay. With ``args.optim``
        of bitsandbytes, that one."""
        if self.optimizer is None and self._optim is not None:
            args, lr = self.args, self.run.phases[-1].lr or self.args.learning_rate
            betas = (args.adam_beta1, args.adam_beta2)
            self.run._driver.check_gradients = self.check_gradients
            self.optimizer = build_optimizer(
                self.run, self._optim, lr, args.weight_decay, betas, args.adam_epsilon, self._decays()
            )
        if self.optimizer is None:
            args = self.args
            self.optimizer = self.run.optimizer(
                lr=self.run.phases[-1].lr or args.learning_rate,
                weight_decay=args.weight_decay,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                decay=self._decays(),
                check_gradients=self.check_gradients,
                fused_backward=self._fused,
                clip_each=self._clip_each,
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule of this phase where the method has one, or wants one; else transformers' over the training."""
        end, start, method = self.run.phase_end, self.run.phases[-1].start, self.run.method
        length = max(1, (num_training_steps if end is None else end) - start)
        if self.lr_scheduler is not None or method.lr_schedule(length, 0) is None:
            scheduler = super().create_scheduler(num_training_steps if end is None else length, optimizer)
        else:
            optimizer = self.optimizer if optimizer is None else optimizer
            assert optimizer is not None
            warmup = self.args.get_warmup_steps(length)
            scheduler = self.lr_scheduler = self.run.scheduler(optimizer, warmup)
            self._created_lr_scheduler = True
            _log.warning(
                "lr_scheduler_type=%r gives way to the schedule that %s has of its own, over %d updates, the first %d "
                "of them rising.",
                getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type), type(method).__name__,
                length, warmup,
            )  # fmt: skip
        # another phase is to come: what it cannot be begun with is refused now
        if self.run.coming:
            self._check_phases(f"{method.name} is to go on as {self.run.coming[0].method.name}", scheduler)
            self._check_schedules(num_training_steps)
        elif end is not None and end < num_training_steps:
            self._check_phases(f"{method.name} goes through phases, the next from step {end}", scheduler)
        elif method.watches(self.run.model) is not None:
            self._check_phases(f"{method.name} goes through phases", scheduler)
        return scheduler

    def _check_schedules(self, total: int) -> None:
        """Raise ConfigError where the warm-up does not fit into a schedule that a phase to come has of its own."""
        start, coming = self.run.phases[-1].start, self.run.coming
        for then, following in itertools.zip_longest(coming, coming[1:]):
            start += then.least()
            length = total - start if following is None or following.steps is None else following.steps
            if then.method.lr_schedule(length, 0) is not None:
                check_warmup(warmup := self.args.get_warmup_steps(length), length)
                then.method.lr_schedule(length, warmup)

    def _own_schedule(self) -> bool:
        """Whether the schedule of the learning rate is this phase's."""
        return self.run.phase_end is not None or self.run.method.lr_schedule(1, 0) is not None

    def _decays(self) -> Callable[[str, Tensor], bool]:
        """transformers' rule by name for the model's own tensors; of an adapter, matrices decay and vectors do not."""
        model = self.run.model
        names = set(self.get_decay_parameter_names(model))
        decaying = {id(p) for name, p in model.named_parameters() if name in names}
        factors = {id(p) for name in self.run.active for a in self.run.adapter(name).values() for p in a.parameters()}
        return lambda _, tensor: tensor.dim() > 1 if id(tensor) in factors else id(tensor) in decaying

    def _carry(self, optimizer: torch.optim.Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, tensor in self.run.trainable():
            if id(tensor) not in held:
                raise ConfigError(
                    f"The optimizer in optimizers= does not hold {name}. Attach first, make it over "
                    "[p for _, p in run.trainable()], and pass run= instead of method=."
                )
        self.run.carry(optimizer)

    # ---- training

    def train(
        self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any
    ) -> transformers.trainer_utils.TrainOutput:
        """Train; with ``resume_from_checkpoint`` a directory, or True or "last" for the last complete one, go on.

        Raises:
            MissingFile: there is no complete checkpoint to resume from.
            NotWritable: a checkpoint could not be written; the earlier ones are untouched.
            OutOfMemory: the device is full.
            SystemExit: code 130 after Ctrl-C, with a checkpoint saved.
        """
        directory = self._checkpoint(resume_from_checkpoint)
        self._before, self._begun = None, False
        if directory is not None:
            self._restore(directory)
            before, self.run.total_steps = self.run.total_steps, self._planned or self.run.total_steps
            if before != self.run.total_steps and self.run.method.needs_total:  # a resumed run may be planned longer
                _log.warning(
                    "%s follows a schedule over the whole run, which was planned for %s updates and now is for %s: "
                    "from here on it goes by the new number.",
                    type(self.run.method).__name__, before, self.run.total_steps,
                )  # fmt: skip
        try:
            with self._interruptible():
                return super().train(None if directory is None else str(directory), *args, **kwargs)
        except KeyboardInterrupt:
            self._leave()
            raise SystemExit(130) from None
        except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator raises a plain one
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise OutOfMemory(self._what_to_lower(error)) from error
            raise

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward, through the wrapper of the current phase."""
        current = self.model_wrapped
        if current is model or not (
            isinstance(model, DistributedDataParallel) and isinstance(current, DistributedDataParallel)
        ):
            return super().training_step(model, *args, **kwargs)
        # transformers' loop holds the wrapper of the phase in which it began, and tells that one when to synchronise
        with contextlib.nullcontext() if model.require_backward_grad_sync else current.no_sync():
            return super().training_step(current, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """transformers' loss, and in training what the method adds to it (``run.loss``)."""
        loss, outputs = super().compute_loss(model, dict(inputs), True, num_items_in_batch)
        if self.run.model.training and torch.is_grad_enabled():
            # a task's loss that is a sum over the whole update's items already needs no division by its micro-batches;
            # what the method adds is a mean over this micro-batch and does
            parts = self.current_gradient_accumulation_steps if self._is_whole(num_items_in_batch) else 1
            task = loss if parts == 1 else loss * parts
            total = self.run.loss(task, **inputs)
            loss = loss if total is task else total / parts
        return (loss, outputs) if return_outputs else loss

    def _is_whole(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether transformers takes the loss of a micro-batch for its share of the whole update's, as it stands."""
        said = getattr(self, "loss_is_scaled_for_ga", None)
        if said is not None:
            return bool(said)
        return (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func is not None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> transformers.trainer_utils.EvalLoopOutput:
        """As in transformers, and a model evaluated before training is still wrapped when training begins."""
        output = super().evaluation_loop(*args, **kwargs)
        if not self.is_in_train and self.args.world_size > 1:
            # accelerate marks what it prepared, here for evaluation and bare, and would not wrap it in DDP any more
            vars(self.run.model).pop("_is_accelerate_prepared", None)
        return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """transformers' own, which would take one update more where a resumed training has none left."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]
        else:
            self.control.should_training_stop = True

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        last = self.control.should_training_stop  # there is no other update to wait for
        if self._agreed or (last and shard.any_rank(self._stop, self.args.device)):
            self._agreed = True
            raise KeyboardInterrupt

    def _go_on(self) -> None:
        """Log what a checkpoint had not logged yet as if there had been no stop; evaluate what is trained already."""
        self._begun = True
        if told := self._kept.get(_LOGGED):
            self._globalstep_last_logged = int(told["step"])
            self._tr_loss += told["loss"]
            self._total_loss_scalar = -told["loss"]  # it is in the sum of the training before
            self._news.load(told["news"])
        step, args = self.state.global_step, self.args
        if step < self.state.max_steps:
            return
        _log.warning("Nothing is left to train: update %d of %d is taken.", step, self.state.max_steps)
        known = any(e["step"] == step and any(key.startswith("eval_") for key in e) for e in self.state.log_history)
        if args.eval_strategy != "no" and args.eval_delay <= step and not known:
            self.evaluate()

    @property
    def _kept(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the state of the training, by name."""
        assert isinstance(self.state.stateful_callbacks, dict)
        return self.state.stateful_callbacks

    def _logged(self) -> dict[str, Any]:
        """What :meth:`_go_on` needs, in a checkpoint's trainer_state.json. Every rank must call this."""
        loss = self._tr_loss if self._before is None else self._before
        loss = shard.total(loss.detach().double()) / self.args.world_size
        return {"step": self._globalstep_last_logged, "loss": loss.item(), "news": self._news.state()}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs = {**logs, **self._news.of_all(self.run)}
        super().log(logs, *args, **kwargs)
        if "loss" in logs and (renewed := self._news.of_each(self.run)):
            with without_screens(self.callback_handler):
                super().log(renewed)

    def _what_to_lower(self, error: RuntimeError) -> str:
        args, advice = self.args, []
        if args.per_device_train_batch_size > 1:
            advice.append(
                f"per_device_train_batch_size = {args.per_device_train_batch_size} to "
                f"{args.per_device_train_batch_size // 2} with gradient_accumulation_steps = "
                f"{args.gradient_accumulation_steps * 2} (the same update)"
            )
        advice.append("the sequence length")
        if any(a.rank for name in self.run.active for a in self.run.adapter(name).values()):
            advice.append("the rank")
        checkpointing = "activation_checkpointing" if hasattr(args, "activation_checkpointing") else ""
        checkpointing = checkpointing or "gradient_checkpointing"
        more = "" if getattr(args, checkpointing) else f" Or set {checkpointing}=True: less memory, a third more time."
        first = str(error).split("\n")[0].rstrip(".")
        return f"Out of memory at step {self.state.global_step} ({first}). Lower {', or '.join(advice)}.{more}"

    # ---- phases

    def _shift(self, method: Method) -> None:
        """Begin the next phase: new trainable tensors and moments, the schedule where it was."""
        before = self.run.method.name
        self._check_phases(f"{before} goes on as {method.name} at step {self.run.step}", self.lr_scheduler)
        self._account()
        assert isinstance(self.lr_scheduler, torch.optim.lr_scheduler.LambdaLR)
        # a schedule of the phase that ends counts its updates only; that of the run goes on where the run is
        taken = self.state.global_step if self._own_schedule() else self.lr_scheduler.last_epoch
        self.run = self.run.shift(method, data=self._prepared() if method.needs_data else None)
        self.accelerator.free_memory()
        if isinstance(self.model_wrapped, DistributedDataParallel):  # its reducer knows the old tensors
            self.accelerator.ddp_handler.find_unused_parameters = _may_be_unused(self.run.model, method)
            self.model_wrapped = self.accelerator.prepare_model(self.run.model)
        self.optimizer = self.lr_scheduler = None
        self.optimizer = self.accelerator.prepare_optimizer(self.create_optimizer())
        self.create_scheduler(num_training_steps=self.state.max_steps)
        own = self._own_schedule()
        if not own:
            _advance(self.lr_scheduler, taken)
        for name in ("optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self._news = News()
        self._meter.begin()
        ended, trains = costs.table(self.run.phases, self.state.log_history, self.run.step)[-2:]
        old, new = (before, method.name) if before != method.name else (ended["label"], trains["label"])
        _log.warning(
            "Step %d: %s ends, %s begins; the schedule %s. Of %s there were %s; now %s parameters train%s.",
            self.run.step, old, new, "does too" if own else "goes on", old, costs.words(ended),
            f"{trains['trainable']:,}", _adapters(self.run),
        )  # fmt: skip

    def _account(self) -> None:
        """Log what the phase that ends now has cost; once."""
        phase, optimizer = self.run.phases[-1], self.optimizer
        assert optimizer is not None
        if self._meter.updates:
            state = [t for of in optimizer.state.values() for t in of.values() if isinstance(t, Tensor)]
            tensors = [*self.run.model.parameters(), *self.run.model.buffers(), *state]
            spent = self._meter.read(tensors, [p for _, p in self.run.trainable()], self._fused)
            counts = {"phase": len(self.run.phases), "phase_updates": self.run.step - phase.start}
            due = self.control.should_log
            trains = {"phase_trainable_parameters": phase.trainable or 0}
            told = {costs.TOLD + key: value for key, value in self.run.metrics().items()}
            self.log({**counts, **trains, **spent, **told, **self._news.of_window(self.run)})
            self.control.should_log = due  # transformers takes any log for the one of this update
            self._meter.begin()

    def _draw(self) -> None:
        """timeline.png, where there is something to see; on the first rank. No error of it ends a training."""
        if self.args.save_strategy == "no" or not self.is_world_process_zero():
            return
        try:
            if timeline.worth_seeing(self.run, self.state.log_history):
                timeline.timeline(self._out / "timeline.png", self.run, self.state.log_history)
        except Exception as error:
            _log.warning("timeline.png could not be drawn: %s", error)

    def _check_phases(self, what: str, scheduler: object) -> None:
        """Raise ConfigError unless this training can go from one phase to the next."""
        self._check_given(what)
        if self.args.load_best_model_at_end and self.run.coming and from_dict(self.run.phases[0].method).reversible:
            raise ConfigError(
                f"{what}, which folds what was trained into the base: at the end the checkpoint before that could not "
                "be gone back to. Set load_best_model_at_end=False."
            )
        if self.is_fsdp_enabled:
            raise ConfigError(
                f"{what}. A phase cannot end inside a Trainer under FSDP2: shift() before training, or use DDP."
            )
        if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            kind = getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type)
            raise ConfigError(
                f"{what}. lr_scheduler_type={kind!r} follows what it measured, not the step, so the next phase cannot "
                "go on with it. Use a schedule such as linear, cosine or constant."
            )

    # ---- checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the run, as ``rs.load`` reads it, to ``rankshift/`` in this directory; the tokenizer beside it."""
        directory = Path(output_dir) if output_dir else self._out
        self.run.save(directory / TRAINER)
        if self.args.should_save:
            keeper = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if keeper is not None:
                keeper.save_pretrained(directory)
            torch.save(self.args, directory / "training_args.bin")
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        here = self._out / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self._begun:
            self._kept[_LOGGED] = self._logged()
        try:
            super()._save_checkpoint(model, trial)
        except OSError as error:
            raise explain(error, here) from error
        except RuntimeError as error:
            if any(text in str(error) for text in _WRITER):
                raise explain(OSError(str(error).split("\n")[0]), here) from error
            raise

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """transformers' own, but under FSDP without the whole model, which it would write a second time there."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.lr_scheduler is not None
        accelerator = self.accelerator
        save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    @property
    def _out(self) -> Path:
        return Path(self.args.output_dir or ".")

    def _checkpoint(self, wish: str | Path | bool | None) -> Path | None:
        """The directory to resume from."""
        if wish is None or wish is False:
            return None
        if wish is True or wish == "last":
            found = _complete_checkpoints(self._out)
            if not found:
                raise MissingFile(f"There is no complete checkpoint in {self.args.output_dir}. Train without resuming.")
            wish = found[-1]
        directory = Path(wish)
        for needed in (directory, directory / _STATE, directory / TRAINER):
            if not needed.exists():
                raise MissingFile(f"{needed} is not there: {directory} is no complete checkpoint of rs.Trainer.")
        if not any(directory.glob("optimizer*")):
            raise MissingFile(
                f"{directory} has no optimizer state (save_only_model=True), so training cannot resume there. Begin "
                "a new run from it: rs.Trainer(run=rs.load(model, directory), …)."
            )
        return directory

    def _restore(self, directory: Path) -> None:
        """Bring the run to the state of a checkpoint, in whatever phase that is."""
        with contextlib.suppress(OSError, ValueError, LookupError):  # read() says what is wrong with the files
            then = json.loads((directory / TRAINER / MANIFEST).read_text())["run"]["changed"]
            if stray := self.run.changed - set(then):
                raise WrongBase(f"{min(stray)} was changed since {directory.name}. Load the base anew to resume there.")
        state = read(self.run.model, directory / TRAINER)
        if len(state["phases"]) == len(self.run.phases):
            self.run.load_state_dict(state)
            return
        began, here = (from_dict(method) for method in (state["phases"][0]["method"], self.run.phases[0].method))
        if other := compare(began, here, "The first phase"):
            raise WrongBase(f"{other}, but the checkpoint is of a later phase. Give the method as it was.")
        if self._foreign:
            raise ConfigError("The checkpoint is from another phase, whose tensors the given optimizer does not hold.")
        coming, given = tuple(Then.from_mapping(values) for values in state.get("coming", ())), self.run.coming
        gone, later = len(given) - len(coming), iter([phase["method"] for phase in state["phases"][1:]])
        if given and not (coming == given[gone:] and all(to_dict(one.method) in later for one in given[:gone])):
            raise WrongBase(
                f"{directory.name} has other phases to come than this Trainer was given (then=). Give them as they "
                "were, or none: the saved ones count."
            )
        model = self.run.model
        self.run.detach() if self.run.method.reversible else self.run.merge()
        self.run = restore(model, state)
        self.optimizer = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: :meth:`train` restored the run before transformers asks."""

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._restore(Path(self.state.best_model_checkpoint))

    # ---- interrupts

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let the first SIGINT wait for the end of the update; leave a handler that somebody else set alone."""
        before = signal.getsignal(signal.SIGINT)
        here = threading.current_thread() is threading.main_thread() and before is signal.default_int_handler
        self._stop = self._agreed = False

        def wait(number: int, frame: FrameType | None) -> None:
            self._stop = True
            signal.signal(signal.SIGINT, before)
            _log.warning("Stopping after this update, and its evaluation if one is due. Ctrl-C again stops at once.")

        if here:
            signal.signal(signal.SIGINT, wait)
        try:
            yield
        finally:
            if here:
                signal.signal(signal.SIGINT, before)

    def _leave(self) -> None:
        """Save where an interrupt came, if the state there is whole, and say how to go on."""
        step = self.state.global_step
        here = self._out / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        together = self.args.world_size == 1 or self._agreed  # saving is for all ranks or none
        found = _complete_checkpoints(self._out)
        if here not in found and step > 0 and together and self._settled:
            self._save_checkpoint(self.run.model, None)
            found.append(here)
        if not found:
            _log.warning("Interrupted at step %d. There is no checkpoint to go on from.", step)
            return
        _log.warning(
            'Interrupted at step %d. To go on from %s: trainer.train(resume_from_checkpoint="%s").',
            step, found[-1].name, found[-1],
        )  # fmt: skip


class _Watch(TrainerCallback):
    """Tells its trainer where in an update the loop is."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer._meter.begin()
        self.trainer._go_on()
        if state.global_step < state.max_steps:
            self._turn()  # a run, or a checkpoint, may be at the end of its phase

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer._meter.pause()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer._meter.pause()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        trainer = self.trainer
        trainer._settled = not trainer._fused  # there the backward pass is in the middle of an update
        trainer._before = trainer._tr_loss.clone()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.trainer._settled = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        trainer = self.trainer
        trainer._before = None
        trainer._meter.count()
        if control.should_training_stop:
            trainer._account()
        else:
            self._turn()
        trainer._settled = True
        trainer._agreed = shard.any_rank(trainer._stop, args.device)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer._account()  # where something stopped it between two updates
        self.trainer._draw()

    def _turn(self) -> None:
        """Begin the next phase, where it is due."""
        trainer = self.trainer
        method = trainer.run.due()
        if method is not None:
            try:
                trainer._shift(method)
            except TrainingError:  # the phase that ends is whole: what was trained is not lost with the next
                trainer._save_checkpoint(trainer.run.model, None)
                raise


def _may_be_unused(model: nn.Module, method: Method) -> bool:
    """Whether the method trains tensors that a task may not reach, so that DDP has to look for them."""
    return any(method.in_place(name, True) and not method.must_learn(name) for name, _, _ in base_parameters(model))


def _adapters(run: Run) -> str:
    """What of a run stands at layers: ", with adapters of ranks 4 to 32 on 35 layers"."""
    ranks = sorted(adapter.rank for name in run.active for adapter in run.adapter(name).values())
    if not ranks or not ranks[-1]:
        return ""
    said = f"rank {ranks[-1]}" if ranks[0] == ranks[-1] else f"ranks {ranks[0]} to {ranks[-1]}"
    return f", with adapters of {said} on {len(ranks)} layers"


def _advance(scheduler: Any, steps: int) -> None:
    """Take a fresh schedule to where another one was."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")  # on purpose, before updates
        for _ in range(steps):
            scheduler.step()


def _complete_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints whose last file was written, by step."""
    found = []
    for entry in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = entry.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        with contextlib.suppress(OSError, ValueError):
            json.loads((entry / _STATE).read_text())
            if (entry / TRAINER).is_dir():
                found.append((int(number), entry))
    return [entry for _, entry in sorted(found)]
