"""The job of `rankshift train`: check everything, prepare data and base, train, and write a run directory.

runs/<name>/config.yaml    every setting as it was resolved
            metrics.json   before and after, and every evaluation in between
            loss.png
            timeline.png   where there are phases or events to see: these under the loss
            subspaces.png  where gradients are projected: rank and captured energy over layers and updates
            adapter/       the run, as rs.load reads it
            peft/          the same for PEFT and servers; or model/, where the method trains the base itself
            checkpoints/   while it trains or after an interrupt: what --resume goes on from
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from rankshift.core.errors import (
    ConfigError,
    ExportError,
    MissingFile,
    NotWritable,
    RankshiftError,
    beside,
)
from rankshift.core.form import ConvForm, EmbeddingForm
from rankshift.core.method import compare
from rankshift.io.atomic import explain
from rankshift.methods import Method, PCLoRA
from rankshift.run import Run
from rankshift.summary import size
from rankshift.train import bundled, costs, data, models, report, sources
from rankshift.train import columns as roles
from rankshift.train import config as settings
from rankshift.train.config import Task, TrainConfig
from rankshift.train.data import Examples
from rankshift.train.evaluation import Measure, measure, show
from rankshift.train.heat_map import heat_map
from rankshift.train.labels import Classes, classes_of
from rankshift.train.optimizers import check as check_optimizer
from rankshift.train.timeline import timeline, worth_seeing

CONFIG, CHECKPOINTS = "config.yaml", "checkpoints"
ADAPTER, PEFT, MODEL, COMPRESSED = "adapter", "peft", "model", "compressed"


@dataclass(frozen=True)
class Job:
    """A run that has passed all checks and has its data and base in memory."""

    config: TrainConfig  # resolved: nothing is left to be inferred
    task: Task
    model: nn.Module
    reader: Any  # tokenizer or image processor
    examples: Examples
    classes: Classes | None
    fresh: tuple[str, ...]  # modules of the model that came without weights
    autocast: bool

    @property
    def measure(self) -> Measure:
        """How this task is evaluated."""
        return measure(self.task, len(self.classes or ()), self.examples.bytes_per_token)


@dataclass(frozen=True)
class Result:
    """A finished run."""

    directory: Path
    base: dict[str, float]
    final: dict[str, float]
    seconds: float


class Interrupted(Exception):
    """Ctrl-C: the state is saved in the run's directory."""

    def __init__(self, directory: Path, step: int):
        super().__init__(str(directory))
        self.directory, self.step = directory, step


# ---- before ----------------------------------------------------------------------------------------------------------


def preflight(config: TrainConfig, resume: bool = False) -> Any:
    """The model's config, after looking for everything that could fail before data or weights are read.

    Raises:
        RankshiftError: with all problems at once.
    """
    problems: list[RankshiftError] = []
    found = None
    with _collect(problems):
        found = models.settings(config.model)
        if config.task is not None:
            models.architecture(found, config.task)
    with _collect(problems):
        _check_source(config)
    if config.train.optim != "adamw":
        with _collect(problems):
            check_optimizer(config.train.optim, config.method, torch.device(_device()))
    if not isinstance(config.data.validation, float):
        with _collect(problems):
            sources.find(config.data.validation, "data.validation")
    if not resume:
        with _collect(problems):
            _check_output(config)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        lines = [f"- {' '.join(str(problem).split())}" for problem in problems]
        raise ConfigError(f"{len(problems)} problems:\n" + "\n".join(lines))
    return found


def prepare(config: TrainConfig, console: Console, resume: bool = False) -> Job:
    """Read data and base, and settle what the config leaves open. Every error of a user's making comes from here."""
    found = preflight(config, resume)
    with sources.quiet():
        return _prepare(config, console, found)


def _prepare(config: TrainConfig, console: Console, found: Any) -> Job:
    rows = sources.load(config.data.train, "data.train", config.data.split, config.data.subset)
    suited = models.suited(found)
    columns = roles.infer(rows, config.data.columns, config.task)
    meant = roles.suits(columns, rows)
    task: Task | None = config.task or meant or suited
    if task is None:
        raise ConfigError(
            f"what to train {config.model} ({found.model_type}) for cannot be told from its config. "
            "Write task=causal-lm, masked-lm, sequence-classification, regression or image-classification."
        )
    architecture = models.architecture(found, task)
    columns = roles.infer(rows, config.data.columns, task)
    parts = data.split(rows, config.data, config.seed)
    dtype, autocast = precision(config)
    _head(console, config, found, task, meant, columns)
    reader: Any
    classes = length = None
    if task == "image-classification":
        reader = models.processor(config.model)
    else:
        reader = models.tokenizer(config.model)
        length = models.max_length(found, reader, task, config.data.max_length)
    if task in ("sequence-classification", "image-classification"):
        labelled = roles.select(rows, roles.Columns({"label": columns.of["label"]}), "data.train")
        classes = classes_of(labelled, config.data.labels, models.head_of(found, task))
    pad = getattr(reader, "pad_token_id", None)
    examples = encoded(config, task, parts, columns, reader, architecture, length, classes)
    held = (
        "no validation" if examples.validation is None else f"{len(examples.validation):,} to validate ({parts.split})"
    )
    _line(console, "data", f"{len(examples.train):,} {examples.unit} to train, {held}")
    for note in examples.notes:
        _line(console, "", note)
    updates = config.train.steps or math.ceil(
        config.train.epochs * len(examples.train) / (config.train.batch * config.train.accumulate * _world())
    )
    if problems := list(config.too_short(updates)):
        raise ConfigError(problems[0])
    loaded = models.load(config.model, found, task, classes, dtype, config.seed, pad)
    method = models.train_whole(config.method, loaded.fresh)
    phases = tuple(
        dataclasses.replace(
            phase,
            method=models.train_whole(phase.method, loaded.fresh),
            lr=phase.method.default_lr if phase.lr is None and config.train.lr is None else phase.lr,
        )
        for phase in config.phases
    )
    if loaded.fresh:
        how = "trained whole and saved with the adapter" if method is not config.method else "trained with the rest"
        _line(console, "new head", f"{', '.join(loaded.fresh)} of the model had no trained weights: {how}")
    every = config.train.eval_every or max(1, updates // 10)
    resolved = dataclasses.replace(
        config,
        task=task,
        method=method,
        phases=phases,
        data=dataclasses.replace(
            config.data,
            columns=dict(columns.of),
            max_length=length,
            labels=None if classes is None else classes.names if classes.given else len(classes),
        ),
        train=dataclasses.replace(
            config.train, steps=updates, eval_every=every, save_every=config.train.save_every or every
        ),
    )
    return Job(resolved, task, loaded.model, reader, examples, classes, loaded.fresh, autocast)


def encoded(
    config: TrainConfig,
    task: Task,
    rows: data.Rows,
    columns: roles.Columns,
    reader: Any,
    architecture: type,
    length: int | None,
    classes: Classes | None,
) -> Examples:
    """Rows as the model takes them."""
    if task == "image-classification":
        assert classes is not None
        return data.images(rows, columns, config.data, reader, classes)
    assert length is not None
    if task == "causal-lm":
        return data.language(rows, columns, config.data, reader, architecture, length)
    if task == "masked-lm":
        return data.masked(rows, columns, config.data, reader, length, config.seed)
    return data.sequences(rows, columns, reader, length, classes)


def _check_source(config: TrainConfig) -> None:
    """Refuse missing files, and settings that only data sets of the hub have."""
    local = sources.find(config.data.train, "data.train") is not None or config.data.train in bundled.TEXTS
    for name in ("subset", "validation_split"):
        if local and getattr(config.data, name) is not None:
            raise ConfigError(
                f"data.{name} is for data sets of the hub, but data.train is a file. Set it to null"
                + (", and name the rows to validate on in data.validation." if name != "subset" else ".")
            )


def _check_output(config: TrainConfig) -> None:
    """Refuse an output directory that cannot be written, by writing to it."""
    root = Path(config.output).expanduser()
    if config.name is not None and (root / config.name).exists():
        raise NotWritable(
            f"{root / config.name} exists already. Choose another name=, or go on with it: "
            f"rankshift train --resume {root / config.name}"
        )
    there = root
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise explain(error, root) from error


def _claim(config: TrainConfig) -> Path:
    """Make the run's directory: the given name, or the next free number."""
    root = Path(config.output).expanduser()
    stem = config.name or "-".join([Path(config.model).name, *(method.name for method in config.methods)])
    try:
        root.mkdir(parents=True, exist_ok=True)
        taken = [re.fullmatch(re.escape(stem) + r"-(\d+)", p.name) for p in root.iterdir()]
        number = max((int(m.group(1)) for m in taken if m), default=0)
        while True:
            number += 1
            directory = root / (config.name or f"{stem}-{number}")
            try:
                directory.mkdir()
            except FileExistsError:
                if config.name is None:
                    continue
                raise
            return directory
    except OSError as error:
        raise explain(error, root) from error


def precision(config: TrainConfig) -> tuple[torch.dtype, bool]:
    """(dtype the base is loaded in, whether forward runs under bf16 autocast)."""
    wish = config.train.precision
    if wish == "auto":
        wish = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
    if wish == "fp32":
        return torch.float32, False
    # weights that train themselves stay fp32, unless the method was told how bf16 takes a small step
    narrow = all(method.reversible or method.trains_narrow for method in config.methods)
    # and a phase that ends folds what it trained into the weights: in bf16 most of it would be lost
    return (torch.bfloat16 if narrow and len(config.methods) == 1 else torch.float32), True


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def _collect(problems: list[RankshiftError]) -> Iterator[None]:
    try:
        yield
    except RankshiftError as error:
        problems.append(error)


# ---- the run ---------------------------------------------------------------------------------------------------------


def train(config: TrainConfig, console: Console) -> Result:
    """Train from the start.

    Raises:
        RankshiftError: before training where possible; after it began, the last checkpoint stays.
        Interrupted: Ctrl-C, with the state saved.
    """
    job = prepare(config, console)
    directory = _claim(job.config) if _first() else Path(job.config.output)
    directory = _agreed(directory)
    return _run(job, directory, console, resume=False)


def resume(directory: Path, console: Console, overrides: Iterable[str] = ()) -> Result:
    """Go on with an interrupted run; ``overrides`` of fields of its method, as ``method.every=50``.

    Raises:
        MissingFile: that is no run, or there is no checkpoint in it.
        WrongBase: the saved state cannot go on under these.
    """
    config, before = load_config(directory, overrides), load_config(directory)
    compare(before.method, config.method, "The run")  # before the file in the directory is written
    if not resumable(directory):
        state = report.read_metrics(directory).get("status")
        why = "it is finished" if state == "finished" else "it stopped before its first checkpoint"
        raise MissingFile(f"{directory} has nothing to resume from: {why}.\n{anew(directory)}")
    return _run(prepare(config, console, resume=True), directory, console, resume=True)


def anew(directory: Path) -> str:
    """How to train the same again."""
    name = load_config(directory).name
    other = "" if name is None else f" name={name}-again"  # the directory of that name is there already
    return f"Start anew with the same settings: rankshift train {directory / CONFIG}{other}"


def resumable(directory: Path) -> bool:
    """Whether a run directory has a complete checkpoint; the file is the last that transformers writes of one."""
    return any((directory / CHECKPOINTS).glob("checkpoint-*/trainer_state.json"))


def load_config(directory: Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """The resolved config of a run directory, with ``key=value`` overrides."""
    if not directory.is_dir():
        hint = beside(directory, directories=True) or "Name a directory that is there."
        raise MissingFile(f"There is no directory {directory}. {hint}")
    if not (directory / CONFIG).is_file():
        raise MissingFile(
            f"{directory} has no {CONFIG}, so it is no run of rankshift train. Name a directory in runs/."
        )
    return settings.read(directory / CONFIG, overrides)


def _run(job: Job, directory: Path, console: Console, resume: bool) -> Result:
    from rankshift.train.progress import Bar, memory, named, outcome, said

    config, task = job.config, job.task
    bar = Bar(console, job.measure, "tok" if task.endswith("lm") else "examples")
    looks = [type(method).__name__ for method in config.methods if method.needs_data]
    if looks:
        count = math.ceil(len(_looked_at(job)) / config.train.batch)
        _line(console, "looking", f"at up to {count} batches of the training data, for {looks[0]} …")
    try:
        trainer = _trainer(job, directory, bar)
    except BaseException:  # such as a method that does not fit: nothing has begun, so nothing stays behind
        if not resume and _first():
            shutil.rmtree(directory, ignore_errors=True)
        raise
    run = trainer.run
    if _first():
        report.write_text(directory / CONFIG, _HEADER + settings.write(config))
    summary = run.summary()
    _line(console, "method", _describe(config, run) + f" · {summary.trainable:,} of {summary.total:,} parameters train")
    if summary.stored:
        _line(console, "base", f"{size(summary.bytes_base)}{summary.stored}")
    if summary.bytes_optimizer < summary.bytes_adamw:
        _line(
            console, "state", f"of the optimizer {size(summary.bytes_optimizer)}, AdamW's {size(summary.bytes_adamw)}"
        )
    if config.phases:
        _line(console, "phases", _course(config))
    mixed = _mixed(run)
    if mixed:
        _line(console, "loss", f"in training {mixed}; in validation the task's alone")
    _line(console, "run", f"{directory}   (Ctrl-C stops and saves)")
    bar.watch(run)
    console.print()
    earlier = report.read_metrics(directory) if resume else {}
    base: dict[str, float] = earlier.get("base") or {}
    before: str | None = earlier.get("sample_before")
    prompt = _prompt(job)
    spent = float(earlier.get("seconds") or 0)
    record: dict[str, Any] = {"status": "running", "task": task, **({"seconds": spent} if resume else {})}
    if not resume:
        with run.disabled() if config.method.reversible else contextlib.nullcontext():
            if job.examples.validation is not None:
                base = named(trainer.evaluate(), job.measure)
            before = _sample(job, prompt)
        record |= {"base": base, "sample_before": before}
        if _first():
            report.write_metrics(directory, record)
    else:
        record |= {"base": base, "sample_before": before}
    if base:
        console.print(f"  {'base'.ljust(10)} validation {show(base, job.measure.shown)}", highlight=False)
    try:
        with no_cache(run.model), _no_advice():
            trainer.train(resume_from_checkpoint=True if resume else None)
    except SystemExit as stop:
        if stop.code != 130:
            raise
        if _first():
            step, seconds = trainer.state.global_step, spent + bar.elapsed
            stopped = {"status": "interrupted", "step": step, "seconds": seconds, **_speed(bar, earlier)}
            report.write_metrics(directory, {**record, **stopped})
        raise Interrupted(directory, trainer.state.global_step) from None
    except ConfigError:  # what cannot be trained: nothing has begun here either
        if not resume and _first() and not trainer.state.global_step:
            shutil.rmtree(directory, ignore_errors=True)
        raise
    finally:
        bar.close()
    run = trainer.run
    history = trainer.state.log_history
    losses = [(int(e["step"]), float(e["loss"])) for e in history if "loss" in e]
    checks = [(int(e["step"]), named(e, job.measure)) for e in history if "eval_loss" in e]
    checks = [(0, base), *[c for c in checks if c[0] > 0]] if base else checks
    final = checks[-1][1] if checks else {}
    if job.examples.validation is not None and (not checks or checks[-1][0] != trainer.state.global_step):
        final = named(trainer.evaluate(), job.measure)
        checks.append((trainer.state.global_step, final))
    run.model.eval()
    after = _sample(job, prompt)
    seconds, told, summary = spent + bar.seconds, outcome(run), run.summary()
    rows = costs.table(run.phases, history, trainer.state.global_step, trainer.args.learning_rate)
    used = memory(max((row["peak_memory"] or 0 for row in rows), default=0))
    console.print()
    made = _write(job, run, directory)
    renewals = [entry for entry in history if any(key.startswith("subspace_rank/") for key in entry)]
    if _first():
        record |= {
            "status": "finished", "final": final, "sample_after": after, "prompt": prompt,
            "steps": trainer.state.global_step, "skipped": run.skipped, "seconds": seconds,
            **_speed(bar, earlier), "memory": used, "phases": rows,
            "trainable": summary.trainable, "total": summary.total, "method": {"name": run.method.name, **told},
            "train_loss": losses, "validation": [{"step": step, **values} for step, values in checks],
            **({"subspaces": renewals} if renewals else {}),
        }  # fmt: skip
        report.write_metrics(directory, record)
        names = " → ".join(type(method).__name__ for method in config.methods)
        title = f"{Path(config.model).name} · {names} · {sources.describe(config.data.train)}"
        points = [(step, values["loss"]) for step, values in checks if "loss" in values]
        words = "loss (nats per token)" if task.endswith("lm") else "loss"
        words += f"; training: {mixed}" if mixed else ""
        report.plot(directory / "loss.png", title, losses, points, base.get("loss"), words)
        made["loss.png"] = "training and validation loss"
        if worth_seeing(run, history):
            timeline(directory / "timeline.png", run, history, title)
            made["timeline.png"] = "phases and events under the loss"
        if renewals:
            heat_map(directory / "subspaces.png", history, title)
            made["subspaces.png"] = "rank and captured energy over layers and updates"
        shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
    lines, commands = _outcome(run, told, said(told)), _next(run, directory)
    if len(rows) > 1:
        lines += [("" if k else "phases", f"{k + 1} {r['label']}: {costs.words(r)}") for k, r in enumerate(rows)]
    _finish(console, job, directory, base, final, bar, seconds, used, before, after, prompt, made, commands, lines)
    return Result(directory, base, final, seconds)


def _speed(bar: Any, earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens or examples a second, of the last part of the training in which there were any."""
    return {"per_second": bar.speed if bar.done else earlier.get("per_second"), "unit": bar.unit}


def _trainer(job: Job, directory: Path, bar: Any) -> Any:
    """The Trainer with the settings of the config."""
    from transformers import PrinterCallback, TrainingArguments

    from rankshift.train.trainer import Trainer

    config, loop = job.config, job.config.train
    assert loop.steps is not None
    assert loop.eval_every is not None
    assert loop.save_every is not None
    validates = job.examples.validation is not None
    more: dict[str, Any] = {} if loop.optim == "adamw" else {"optim": loop.optim}
    args = TrainingArguments(
        output_dir=str(directory / CHECKPOINTS),
        max_steps=loop.steps,
        per_device_train_batch_size=loop.batch,
        per_device_eval_batch_size=loop.batch * 2,
        gradient_accumulation_steps=loop.accumulate,
        learning_rate=(config.phases[0].lr if config.phases else None) or loop.lr or config.method.default_lr,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(loop.schedule, loop.schedule),
        warmup_steps=loop.warmup,  # a share: also of each phase that has a schedule of its own
        weight_decay=loop.weight_decay,
        max_grad_norm=loop.clip,
        bf16=job.autocast,
        ddp_backend=None if torch.cuda.is_available() or _world() == 1 else "gloo",
        # transformers refuses bf16 on a CPU, and several processes on one, without a word for it
        use_cpu=(job.autocast or _world() > 1) and not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        eval_strategy="steps" if validates else "no",
        eval_steps=loop.eval_every if validates else None,
        save_strategy="steps",
        save_steps=loop.save_every,
        save_total_limit=1,
        logging_steps=max(1, loop.steps // 200),
        logging_nan_inf_filter=False,
        seed=config.seed,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        **more,
        **_recompute(loop.checkpointing),
    )
    measured = job.measure

    class Counting(Trainer):
        def training_step(self, model: nn.Module, *arguments: Any, **named: Any) -> torch.Tensor:
            bar.count(arguments[0])
            return super().training_step(model, *arguments, **named)

        def _shift(self, method: Method) -> None:
            super()._shift(method)
            bar.watch(self.run)

        def _draw(self) -> None:
            """Drawn with a title, in the run's directory, at the end."""

    trainer = Counting(
        model=job.model,
        method=config.method,
        base=config.base,
        then=config.then,
        args=args,
        train_dataset=job.examples.train,
        eval_dataset=job.examples.validation,
        data_collator=job.examples.collate,
        processing_class=job.reader,
        calibration=_calibration(job) if any(method.needs_data for method in config.methods) else None,
        fused_backward=loop.fused_backward,
        lower=loop.lower,
        memory_budget=loop.memory_budget,
        compute_metrics=lambda p: {f"m_{k}": v for k, v in measured.compute(p).items()},
        preprocess_logits_for_metrics=measured.keep,
        callbacks=[bar],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _recompute(wanted: bool) -> dict[str, Any]:
    """Arguments for recomputing activations, under the name that this transformers has for them."""
    from transformers import TrainingArguments

    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if wanted else {}


def _looked_at(job: Job) -> list[int]:
    """Rows for methods that look at data before they start: as many batches as the config says, spread evenly over
    the training data, which may be sorted."""
    rows = len(job.examples.train)
    count = min(rows, job.config.train.calibration * job.config.train.batch)
    return [k * rows // count for k in range(count)]


def _calibration(job: Job) -> Iterator[Any]:
    """Batches of these rows."""
    rows, size = _looked_at(job), job.config.train.batch
    for start in range(0, len(rows), size):
        yield job.examples.collate([job.examples.train[i] for i in rows[start : start + size]])


@contextlib.contextmanager
def no_cache(model: nn.Module) -> Iterator[None]:
    """No key-value cache while training: it costs memory, and with one transformers does not see packed texts."""
    config: Any = model.config
    before = getattr(config, "use_cache", None)
    if before is not None:
        config.use_cache = False
    try:
        yield
    finally:
        if before is not None:
            config.use_cache = before


@contextlib.contextmanager
def _no_advice() -> Iterator[None]:
    """Without what transformers warns of while it trains, such as checkpoints written within one second."""
    logger = logging.getLogger("transformers.trainer_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# ---- after -----------------------------------------------------------------------------------------------------------


def _write(job: Job, run: Run, directory: Path) -> dict[str, str]:
    """Write the run and what other programs load. Returns name → what it is."""
    run.save(directory / ADAPTER)
    made = {ADAPTER: "this run, for rs.load and the commands below"}
    where, format, words = (PEFT, "peft", "the same for PEFT, transformers and servers")
    if not run.method.reversible or (job.config.phases and run.changed):
        where, format, words = (MODEL, "merged", "the trained model, for transformers")
    elif _shrinks(run):
        where, format, words = (COMPRESSED, "compressed", "the small model that remains, for rs.load_compressed")
    try:
        run.export(directory / where, format=format)  # type: ignore[arg-type]
        made[where] = words if where != PEFT or _told(directory)["peft_type"] == "LORA" else "the same for PEFT"
        if _first():
            job.reader.save_pretrained(directory / where)
    except ExportError as error:
        made[where] = f"not written: {str(error).splitlines()[0]}"
    return made


def _shrinks(run: Run) -> bool:
    """Whether the method leaves a smaller model behind rather than an adapter."""
    return any(adapter.leaves for name in run.active for adapter in run.adapter(name).values())


def _mixed(run: Run) -> str:
    """The loss in training, where the method makes it of more than the task's; else ""."""
    method = run.method
    if not isinstance(method, PCLoRA) or method.hears(run.model, list(run.sites)) is None:
        return ""
    return f"{method.task_weight:g} · task + {1 - method.task_weight:g} · distillation"


def _outcome(run: Run, told: Mapping[str, float | str], words: str) -> list[tuple[str, str]]:
    """(name, text) lines on what the method says of itself at the end."""
    lines = [("method", f"{type(run.method).__name__}: {words}")] if told else []
    if told.get("open_gates") == 0:
        lines.append(
            ("", "every gate is closed: the adapter changes nothing, and this is the base. Lower method.sparsity.")
        )
    if _shrinks(run):
        saved = run.compression()
        (before, after), (whole, left) = saved.adapted, saved.total
        lines.append(
            (
                "smaller",
                f"{saved.layers} layers {before:,} → {after:,} parameters ({saved.percent:.1f} % saved), whole model "
                f"{whole:,} → {left:,}",
            )
        )
    return lines


def _next(run: Run, directory: Path) -> list[tuple[str, str]]:
    """(command, what it gives) lines to go on from here."""
    commands = [(f"rankshift inspect {directory}", "what is in it")]
    if not _shrinks(run):
        commands.append((f"rankshift merge {directory} merged", "a plain transformers model in merged/"))
    elif (directory / COMPRESSED).is_dir():
        commands.append((f'rs.load_compressed("{directory / COMPRESSED}")', "the small model, in Python"))
    if _portable(run, directory):
        commands.append((f"rankshift export {directory} served --profile portable", "a LoRA that servers take"))
    return [*commands, ("rankshift train model=PATH_OR_HUB_ID data=FILE.jsonl", "your model, your data")]


def _told(directory: Path) -> dict[str, Any]:
    """What the PEFT directory says of itself."""
    config: dict[str, Any] = json.loads((directory / PEFT / "adapter_config.json").read_text(encoding="utf-8"))
    return config


def _portable(run: Run, directory: Path) -> bool:
    """Whether what was written for PEFT is factors of linear layers and nothing else, as servers take it."""
    try:
        told = _told(directory)
    except OSError:
        return False
    if any(told.get(name) for name in ("modules_to_save", "use_dora", "lora_bias")) or told["bias"] != "none":
        return False
    return not any(site.active and isinstance(site.spec.form, (ConvForm, EmbeddingForm)) for site in run.sites.values())


def _prompt(job: Job) -> str | None:
    """What a causal model is asked to go on from."""
    if job.task != "causal-lm":
        return None
    if job.config.prompt is not None:
        return job.config.prompt
    rows = job.examples.validation if job.examples.validation is not None else job.examples.train
    ids, labels = rows[0]["input_ids"], rows[0]["labels"]
    start = next(i for i, label in enumerate(labels) if label != -100)
    cut = start if start > 1 else min(len(ids) // 2, 16)
    return str(job.reader.decode(ids[:cut], skip_special_tokens=start <= 1))


def _sample(job: Job, prompt: str | None) -> str | None:
    """About 300 bytes of text that the model writes after the prompt, drawn by the seed."""
    if prompt is None:
        return None
    model: Any = job.model
    special = job.config.data.columns.keys() & {"prompt", "messages"} and job.config.prompt is None
    ids = job.reader(prompt, return_tensors="pt", add_special_tokens=not special, verbose=False).input_ids
    length = job.config.data.max_length or 256
    ids = ids[:, : max(1, length - 16)].to(next(model.parameters()).device)
    wanted = min(300 if (job.examples.bytes_per_token or 4) < 2 else 80, length - ids.shape[1])
    with models.quiet(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(job.config.seed)
        was = model.training
        model.eval()
        whole = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=wanted, do_sample=True,
            temperature=0.8, top_k=40, use_cache=True, pad_token_id=job.reader.pad_token_id,
        )  # fmt: skip
        model.train(was)
    return str(job.reader.decode(whole[0, ids.shape[1] :], skip_special_tokens=True))


_HEADER = "# Every setting of this run as it was resolved. Train the same again: rankshift train THIS_FILE\n"


def _head(
    console: Console, config: TrainConfig, found: Any, task: str, meant: str | None, columns: roles.Columns
) -> None:
    kind = (found.architectures or [found.model_type])[0]
    _line(console, "model", f"{config.model} ({kind}) on {_device()}")
    why = ""
    if config.task is None:
        why = " (from the columns of the data)" if meant else " (from the model's architecture)"
    _line(console, "task", f"{task}{why}")
    if str(columns) != "text":
        _line(console, "columns", str(columns))


def _describe(config: TrainConfig, run: Run) -> str:
    """ "LoRA, rank 16, on 35 layers"."""
    projected = run.subspace_table().rows
    ranks = [a.rank for name in run.active for a in run.adapter(name).values()]
    ranks = sorted({*ranks, *(row.rank for row in projected)} - {0})
    parts = [type(config.method).__name__]
    if ranks:
        parts.append(f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}")
    count = len(projected) or sum(site.active != () for site in run.sites.values())
    return ", ".join(parts) + (f", on {count} layers" if count else "")


def _course(config: TrainConfig) -> str:
    """ "full for 1000 updates, then lora"."""
    units = {"steps": "for {} updates", "minutes": "for {} minutes", "loss": "until the loss is {}"}
    units |= {
        "loss_change": "until the loss changes by {} % at most",
        "weight_change": "until weights change by < {} %",
    }
    parts = []
    for phase in config.phases:
        said = [units[key].format(value) for key, value in phase.until.items() if key in units and value is not None]
        parts.append(f"{phase.method.name} {' or '.join(said)}".strip())
    return ", then ".join(parts)


def _line(console: Console, name: str, text: str) -> None:
    console.print(f"[bold]{name.ljust(9)}[/bold]", end=" ", highlight=False)
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _finish(
    console: Console,
    job: Job,
    directory: Path,
    base: dict[str, float],
    final: dict[str, float],
    bar: Any,
    seconds: float,
    used: str,
    before: str | None,
    after: str | None,
    prompt: str | None,
    made: dict[str, str],
    commands: list[tuple[str, str]],
    outcome: list[tuple[str, str]],
) -> None:
    """The last screen: before and after, what was written, what to type next."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    if final:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("validation")
        table.add_column("untouched base", justify="right")
        table.add_column("after training", justify="right", style="bold")
        for name in job.measure.shown:
            if name in final:
                old, new = (f"{values[name]:.4f}" if name in values else "–" for values in (base, final))
                table.add_row(name.replace("_", " "), old, new)
        console.print(table)
        console.print()
    if prompt is not None and before is not None and after is not None:
        prompt = prompt.removeprefix(job.reader.bos_token or "")
        for title, text in (("before", before), ("after", after)):
            body = Text(prompt, style="dim").append(text, style="default")
            console.print(Panel(body, title=title, title_align="left", border_style="dim"))
    speed = f"{bar.speed:,.0f} {bar.unit}/s, " if bar.done else ""
    console.print(f"{job.config.train.steps} updates in {_clock(seconds)}, {speed}{used}", highlight=False)
    for name, text in outcome:
        _line(console, name, text)
    console.print()
    made = {**made, CONFIG: "every setting", "metrics.json": "every number"}
    for name, words in made.items():
        console.print(f"  {directory / name!s:<38} {words}", highlight=False, markup=False, soft_wrap=True)
    console.print()
    _line(console, "Next", "")
    for command, words in commands:
        console.print(f"  {command:<68} {words}", highlight=False, markup=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


# ---- several processes -----------------------------------------------------------------------------------------------


def _first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _agreed(directory: Path) -> Path:
    """The first process's directory, on every process."""
    if _world() == 1:
        return directory
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=not torch.cuda.is_available())
    return Path(broadcast_object_list([str(directory)])[0])
