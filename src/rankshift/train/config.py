"""TrainConfig: what `rankshift train` does, as YAML says it. Typed and strict; all problems are told at once.

    model: path-or-hub-id
    data: train.jsonl            # or a mapping: data: {train: …, validation: …}
    method: lora                 # or a mapping: method: {method: lora, rank: 32}
    train: {lr: 2e-4, epochs: 3}

Several methods, one after the other, stand in ``phases`` instead of ``method``:

    phases:
      - {method: full, until: {steps: 1000}}
      - {method: lora, rank: 32, lr: 1e-3}

On the command line the same keys are written with dots: ``method.rank=32 data.validation=dev.jsonl phases.1.rank=8``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from rankshift.core.config import check_keys, conform, field_docs, hints, plain
from rankshift.core.errors import ConfigError, MissingFile, TargetError, beside, nearest
from rankshift.core.method import spelled, to_dict
from rankshift.core.phase import WHEN, Then, check_phases
from rankshift.core.schedule import check_warmup
from rankshift.holding import check_method
from rankshift.methods import LoRA, Method, methods
from rankshift.storage import Kind
from rankshift.train import bundled
from rankshift.train.optimizers import check as check_optimizer

Task = Literal["causal-lm", "masked-lm", "sequence-classification", "regression", "image-classification"]
ROLES = ("text", "text2", "label", "prompt", "completion", "messages", "image")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the examples are and how they become tokens."""

    train: str | tuple[str, ...]
    """Files (JSONL, JSON, CSV, TSV, Parquet, text; also .gz and .xz), a glob, a directory, a list of these, the id of
    a data set on the Hugging Face hub, or "tinyshakespeare", the bundled text."""
    validation: float | str | tuple[str, ...] = 0.05
    """Files as in train, or the share of train that is held out: rows drawn by seed; of fewer than 20 texts the end of
    each. 0 trains without validation."""
    subset: str | None = None
    """Configuration of a hub data set, e.g. "mrpc" of "nyu-mll/glue"."""
    split: str = "train"
    """Split of a hub data set to train on."""
    validation_split: str | None = None
    """Split of a hub data set to validate on, instead of a share of train."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Role → column, e.g. {text: body, label: stars}, or a template of columns, e.g. {prompt: "Q: {question}\\nA:"}.
    Roles: text, text2, label, prompt, completion, messages, image. What is not said is inferred and printed."""
    max_length: int | None = None
    """Tokens of an example or a packed block. None: what the model can take, at most 1024 (classification: 512)."""
    packing: bool | None = None
    """Language models: fill fixed-length blocks with several texts. None: only plain text."""
    loss: Literal["completion", "all"] = "completion"
    """What is learned of prompts and chats: completions (in chats what the assistant says), or all tokens."""
    chat: bool = False
    """Put prompt and completion into the tokenizer's chat template, as one user turn and one reply."""
    labels: int | tuple[str, ...] | None = None
    """Classes, by number or by name, if the data does not show them all or the model's head is to be replaced."""
    mask_probability: float = 0.15
    """Masked LM: share of tokens to predict. BERT uses 0.15."""

    def problems(self) -> Iterable[str]:
        """What no data could satisfy."""
        for role in self.columns:
            if role not in ROLES:
                yield f"data.columns has no role {role!r}. {nearest(role, ROLES)}"
        if isinstance(self.validation, float) and not 0 <= self.validation < 1:
            yield f"data.validation = {self.validation:g} is not a share in [0, 1). Give 0.05, say, or files."
        if self.max_length is not None and self.max_length < 2:
            yield f"data.max_length = {self.max_length} leaves nothing to predict. Set at least 2."
        if self.labels is not None and (self.labels if isinstance(self.labels, int) else len(set(self.labels))) < 2:
            yield f"data.labels = {self.labels}: a classifier needs 2 classes or more. For numbers set task=regression."
        if not 0 < self.mask_probability < 1:
            yield f"data.mask_probability = {self.mask_probability:g} is not in (0, 1). BERT uses 0.15."
        if not self.train:
            yield "data.train is empty. Name at least one file."


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long and how fast."""

    epochs: float = 3.0
    """Passes over the training data, if steps is not given."""
    steps: int | None = None
    """Updates; counts instead of epochs."""
    batch: int = 8
    """Examples (or packed blocks) of one forward, on each device."""
    accumulate: int = 1
    """Forwards of one update."""
    lr: float | None = None
    """Peak learning rate. None: what the method's paper recommends (rankshift methods NAME), 2e-4 for LoRA."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up: down to 0 along a cosine or a line, or constant."""
    warmup: float = 0.05
    """Share of the updates over which the rate rises from 0."""
    weight_decay: float = 0.0
    """Decoupled decay per update, times the learning rate."""
    clip: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    optim: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw"
    """The method's own AdamW, or bitsandbytes': state in 8 bits, or in memory that the GPU pages out to the host."""
    fused_backward: bool = False
    """Update each tensor inside the backward pass and free its gradient at once: of all gradients the largest is in
    memory at a time. Needs accumulate=1 and clip=0, and one process."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Dtype of the base and of activations. auto: bf16 on a GPU that has it, else fp32. What trains stays fp32,
    unless the method has a rounding for bf16 weights."""
    eval_every: int | None = None
    """Updates between evaluations. None: ten per run."""
    save_every: int | None = None
    """Updates between checkpoints to resume from. None: at each evaluation. Ctrl-C saves one too."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lower: bool = False
    """Run Llama-shaped blocks as fused kernels that hold the same parameters: faster, less memory, the same results to
    rounding. Refused where the model has no such block."""
    memory_budget: str | None = None
    """With lower: what a step may take, as 40GiB or auto. Blocks keep less for backward where more would not fit."""
    calibration: int = 32
    """Batches that methods look at before they start, where they do; taken evenly from the training data."""

    def problems(self) -> Iterable[str]:
        """What no training could satisfy."""
        for name in ("steps", "batch", "accumulate", "eval_every", "save_every", "calibration"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"train.{name} = {value} is below 1. Set at least 1."
        for name in ("epochs", "lr"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                yield f"train.{name} = {value:g} is no positive number. Set a finite value above 0."
        if not 0 <= self.warmup < 1:
            yield f"train.warmup = {self.warmup:g} is not a share in [0, 1). Set for example 0.05."
        if self.weight_decay < 0 or self.clip < 0:
            yield "train.weight_decay and train.clip must not be negative. Set 0 to switch one off."
        if self.memory_budget is not None and not self.lower:
            yield "train.memory_budget is for fused blocks. Set train.lower=true, or leave it out."
        if self.fused_backward and self.optim != "adamw":
            yield "train.fused_backward is for the method's own optimizer. Leave it out, or train.optim."
        if self.fused_backward and (self.accumulate != 1 or self.clip):
            yield (
                "train.fused_backward uses each gradient as soon as it is there: none is left to accumulate or clip. "
                "Set train.accumulate=1 and train.clip=0."
            )


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One of several methods that follow each other; in YAML the method's own fields stand beside the other two."""

    method: Method
    """The method."""
    until: Mapping[str, Any] = field(default_factory=dict)
    """When the next phase begins, as in rs.Then: steps, minutes, loss, loss_change, weight_change; window, windows."""
    lr: float | None = None
    """Peak learning rate of the phase. None: as before; without train.lr, what the method's paper recommends."""

    def to_mapping(self) -> dict[str, Any]:
        """As it stands in YAML."""
        until = {"until": dict(self.until)} if self.until else {}
        return {**to_dict(self.method), **until, **({} if self.lr is None else {"lr": self.lr})}


_UNTIL = {name: hint for name, hint in hints(Then).items() if name not in ("method", "lr")}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    _sections: ClassVar[dict[str, str]] = {"data": "train", "method": "method"}  # what a bare value of a section means

    model: str
    """A transformers model directory, a hub id, or "babyllama", the bundled model."""
    data: DataConfig
    """Examples; a bare value is data.train."""
    task: Task | None = None
    """None: inferred from the columns of the data and the architecture of the model, and printed."""
    method: Method = field(default_factory=LoRA)
    """The method and its fields; a bare value is its name. Of several phases the first."""
    phases: tuple[PhaseConfig, ...] = ()
    """Instead of method: several, one after the other, each with its fields, until (when the next one begins, all but
    the last) and lr, e.g. [{method: full, until: {steps: 1000}}, {method: lora, rank: 8, lr: 1e-3}]."""
    base: Kind | None = None
    """Storage of the frozen weights, in fewer bits: nf4 or fp4 (4 bits; nf4 under lora is QLoRA), int8, or fp8, which
    multiplies in 8 bits too. None: as the model comes. (What the base is, says model.)"""
    train: LoopConfig = field(default_factory=LoopConfig)
    """Length and speed."""
    prompt: str | None = None
    """Causal LM: the text that is continued before and after training. None: the first words of the validation data."""
    output: str = "runs"
    """Directory under which the run's own directory is made."""
    name: str | None = None
    """Name of the run's directory. None: model, method and the next free number."""
    seed: int = 0
    """Of everything that is drawn: adapters, order of data, held-out rows, masks, samples."""

    @property
    def methods(self) -> tuple[Method, ...]:
        """One after the other."""
        return tuple(phase.method for phase in self.phases) or (self.method,)

    @property
    def then(self) -> tuple[Then, ...]:
        """What follows the first phase, and when."""
        return tuple(Then(b.method, lr=b.lr, **a.until) for a, b in itertools.pairwise(self.phases))

    def problems(self) -> Iterable[str]:
        """What does not fit together."""
        for method in self.methods if self.train.fused_backward else ():
            if method.waits:
                yield f"train.fused_backward: {type(method).__name__} as configured {method.waits}. Leave it out."
        for method in self.methods if self.train.optim != "adamw" else ():
            try:
                check_optimizer(self.train.optim, method)
            except ConfigError as error:
                yield f"train.{error}"
        if self.base is not None:
            try:
                check_method(self.methods[0], self.base, self.then)
            except (ConfigError, TargetError) as error:
                yield f"base: {error}"
        yield from self.too_short(self.train.steps)
        if not self.model:
            yield "model is empty. Write model=PATH_OR_HUB_ID."
        if self.name is not None and not re.fullmatch(r"[\w][\w.+-]*", self.name):
            yield f"name = {self.name!r} is no plain directory name. Put the place into output= and keep name simple."
        if not 0 <= self.seed < 2**32:
            yield f"seed = {self.seed} is not in 0 … {2**32 - 1}. Set a seed in that range."

    def too_short(self, updates: int | None) -> Iterable[str]:
        """What has no place in so many updates; None: their number is not known yet."""
        then, start = self.then, 0
        try:
            check_phases(self.methods[0], then, 0, 0, updates)
            for method, after in itertools.zip_longest(self.methods, then):  # where one has a schedule of its own
                end = method.phase_end(start, updates)
                if end is None:
                    end = updates if after is None or after.steps is None else start + after.steps
                if end is not None and method.lr_schedule(end - start, 0) is not None:
                    warmup = math.ceil((end - start) * self.train.warmup)
                    check_warmup(warmup, end - start)
                    method.lr_schedule(end - start, warmup)
                start += 0 if after is None else after.least()
        except ConfigError as error:
            yield f"{'phases' if self.phases else 'method'}: {error}"


def parse(values: Mapping[str, Any], where: str = "config") -> TrainConfig:
    """A config from a plain mapping.

    Raises:
        ConfigError: with all problems, one a line.
    """
    problems: list[str] = []
    config = _build(TrainConfig, _spelled_out(values, problems), "", problems)
    return _sound(config, problems, where)


def read(file: str | Path | None, overrides: Iterable[str] = ()) -> TrainConfig:
    """A config from a YAML file and ``key=value`` overrides.

    Without a file and without a model or data in the overrides it is the bundled recipe that the overrides change.

    Raises:
        MissingFile: there is no such file.
        ConfigError: with all problems of file and overrides.
    """
    problems: list[str] = []
    pairs = [pair for pair in (_pair(text, problems) for text in overrides) if pair is not None]
    own = any(key in ("model", "data", "data.train") for key, _ in pairs)
    values: dict[str, Any] = {}
    if file is not None or not own:
        values = _yaml(Path(file) if file is not None else bundled.RECIPE)
    values = _spelled_out(values, problems)
    keys = {key for key, _ in pairs}
    for key, other in (("method", "phases"), ("phases", "method")):  # a whole new one replaces the file's
        if key in keys and other not in keys and values.pop(other, None) is not None:
            _drop_rate(values)
    for key, value in sorted(pairs, key=_before):
        _set(values, key, value, problems)
    values = _spelled_out(values, problems)
    if file is None and not own and isinstance(values.get("train"), dict):
        phases = values.get("phases")
        for phase in phases if isinstance(phases, list) and "lr" not in values["train"] else ():
            if isinstance(phase, dict):
                phase.setdefault("lr", bundled.RATES.get(spelled(str(phase.get("method"))), 6e-3))
        name = values["method"].get("method") if isinstance(values.get("method"), Mapping) else None
        values["train"].setdefault("lr", bundled.RATES.get(spelled(str(name)), 6e-3))
    config = _build(TrainConfig, values, "", problems)
    return _sound(config, problems, str(file) if file is not None else "these settings")


def write(config: TrainConfig) -> str:
    """The config as YAML that :func:`read` takes; nothing is left to defaults."""
    values = plain(config)
    del values["method" if config.phases else "phases"]  # they exclude each other
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def describe(kind: type = TrainConfig) -> dict[str, str]:
    """Field → meaning, dotted: what the help of the command line prints."""
    docs = {name: " ".join(text.split()) for name, text in field_docs(kind).items() if name in hints(kind)}
    for name, section in (("data", DataConfig), ("train", LoopConfig)):
        if kind is TrainConfig:
            docs.update({f"{name}.{key}": text for key, text in describe(section).items()})
    return docs


# ---- reading ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: 2e-4 is one, as in every other language."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$|^[-+]?\.inf$|^\.nan$"),
    list("-+0123456789."),
)


def scalar(text: str) -> Any:
    """One value as YAML reads it: ``32``, ``2e-4``, ``true``, ``[q_proj, v_proj]``, ``text``."""
    return yaml.load(text, _Loader)


def _yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise MissingFile(f"{file} is not there. {beside(file) or 'Name a YAML file that is.'}")
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not YAML: {' '.join(str(error).split())}. Correct the file.") from None
    if not isinstance(values or {}, dict):
        raise ConfigError(f"{file} holds {type(values).__name__}, not settings. Write key: value lines.")
    return values or {}


def _pair(text: str, problems: list[str]) -> tuple[str, Any] | None:
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        problems.append(f"{text!r} is no setting. Write key=value, such as method.rank=32.")
        return None
    try:
        return key.strip(), scalar(value)
    except yaml.YAMLError as error:
        problems.append(f"the value in {text!r} is not YAML: {' '.join(str(error).split())}. Put it in quotes.")
        return None


def _drop_rate(values: dict[str, Any]) -> None:
    """It was found for a method that is no longer there."""
    if isinstance(values.get("train"), dict):
        values["train"].pop("lr", None)


def _before(pair: tuple[str, Any]) -> int:
    """Where a setting stands among others: what a new list or a new method drops goes first."""
    key = pair[0]
    return 0 if key == "phases" else 1 if key.rpartition(".")[2] == "method" else 2


def _set(values: dict[str, Any], key: str, value: Any, problems: list[str]) -> None:
    """Write a dotted key into nested mappings and the list of phases, counted from 0; a bare value of a section
    changes its main key only."""
    *path, leaf = key.split(".")
    here = values
    for at, part in enumerate(path):
        below = here.setdefault(part, {})
        if part == "phases" and isinstance(below, list) and at == 0:
            number = (path[1:] or [leaf])[0]
            if not (number.isdecimal() and int(number) < len(below) and path[1:]):
                said = f"phases.0 to phases.{len(below) - 1}" if below else "none"
                problems.append(f"{key}: there is no such phase; there are {said}. Write phases.0.KEY=VALUE.")
                return
            below = {str(i): phase for i, phase in enumerate(below)}  # the mappings themselves, seen by number
        if not isinstance(below, dict):
            problems.append(f"{key}: {part} is the value {below!r}, which has nothing inside. Drop one of the two.")
            return
        here = below
    if len(path) == 2 and path[0] == "phases" and leaf == "method":
        if spelled(here.get("method")) != spelled(value):
            kept = {"until": here["until"]} if "until" in here else {}
            here.clear()
            here.update(kept)
        here["method"] = value
    elif not path and leaf in TrainConfig._sections and not isinstance(value, dict):
        section = here.setdefault(leaf, {})
        if leaf == "method" and spelled(section.get("method", "lora")) != spelled(value):
            section.clear()  # the fields of another method mean nothing to this one, nor does its learning rate
            _drop_rate(here)
        section[TrainConfig._sections[leaf]] = value
    else:
        here[leaf] = value


def _spelled_out(values: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The mapping with bare values of sections written out, and copied as deep as it is nested."""
    whole: dict[str, Any] = {}
    for key, value in values.items():
        if key in TrainConfig._sections and value is not None and not isinstance(value, (Mapping, Method, DataConfig)):
            value = {TrainConfig._sections[key]: value}
        whole[key] = dict(value) if isinstance(value, Mapping) else value
        if key == "phases" and isinstance(value, (list, tuple)):
            bare = [{"method": phase} if isinstance(phase, str) else phase for phase in value]
            whole[key] = [dict(phase) if isinstance(phase, Mapping) else phase for phase in bare]
    return whole


def _build(kind: type, values: Mapping[str, Any], where: str, problems: list[str]) -> Any:
    """An instance of a config class, or None with what is wrong added to ``problems``."""
    known, count = hints(kind), len(problems)
    dotted = f"{where}." if where else ""
    fields: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            problems.append(f"{where or 'the config'} has no field {key!r}. {nearest(str(key), known)}")
        elif key == "method":
            fields[key] = _method(value, problems)
        elif key == "phases":
            fields[key] = phases = _phases(value, problems)
            if phases and "method" not in values:
                fields["method"] = phases[0].method
            elif values.get("method") is not None:
                problems.append(
                    "method and phases are both given. Leave method out, or phases; fields of a phase are "
                    "phases.0.KEY=VALUE."
                )
        elif key in ("data", "train") and isinstance(value, Mapping) and kind is TrainConfig:
            fields[key] = _build(DataConfig if key == "data" else LoopConfig, value, dotted + key, problems)
        else:
            with _noting(problems, "rankshift train --keys"):
                fields[key] = conform(value, known[key], dotted + key)
    for spec in dataclasses.fields(kind):
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if required and spec.name not in values:
            problems.append(f"{dotted}{spec.name} is not given. {_HOW.get(dotted + spec.name, '')}".rstrip())
    if len(problems) > count:
        return None
    config = kind(**fields)
    problems.extend(config.problems())
    return config


_HOW = {
    "model": "Write model=PATH_OR_HUB_ID.",
    "data": "Write data=FILE, such as data=train.jsonl.",
    "data.train": "Write data=FILE, such as data=train.jsonl.",
}


def _phases(value: Any, problems: list[str]) -> tuple[PhaseConfig, ...]:
    """The list of phases; empty if one of them is not to be made out."""
    if not isinstance(value, (list, tuple)) or (not value and not isinstance(value, tuple)):
        problems.append(
            f"phases = {value!r} is no list of methods. Write phases: [{{method: full, until: {{steps: 1000}}}}, "
            "{method: lora}], or method."
        )
        return ()
    found = [_phase(phase, f"phases.{i}", i == len(value) - 1, problems) for i, phase in enumerate(value)]
    return tuple(phase for phase in found if phase is not None) if None not in found else ()


def _phase(value: Any, where: str, last: bool, problems: list[str]) -> PhaseConfig | None:
    if isinstance(value, PhaseConfig):
        return value
    if not isinstance(value, Mapping) or "method" not in value:
        problems.append(f"{where} = {value!r} names no method. Write {{method: lora, until: {{steps: 1000}}}}.")
        return None
    count = len(problems)
    fields = {key: v for key, v in value.items() if key not in ("until", "lr")}
    method = _method(fields, problems, where, ("until", "lr"))
    lr = value.get("lr")
    with _noting(problems, "rankshift train --keys"):
        lr = conform(lr, float | None, f"{where}.lr")
        if lr is not None and not 0 < lr < math.inf:
            problems.append(f"{where}.lr = {lr:g} is no positive number. Set a finite value above 0.")
    until = _until(value.get("until"), f"{where}.until", last, problems)
    if len(problems) > count:
        return None
    assert method is not None
    return PhaseConfig(method=method, until=until, lr=lr)


def _until(value: Any, where: str, last: bool, problems: list[str]) -> dict[str, Any]:
    """When the next phase begins."""
    if last:
        if value:
            problems.append(f"{where}: the last phase goes on to the end of the run. Leave it out, or add a phase.")
        return {}
    if not isinstance(value, Mapping) or not any(value.get(key) is not None for key in WHEN if key in value):
        unknown = [key for key in value if key not in _UNTIL] if isinstance(value, Mapping) else []
        problems.extend(f"{where} has no field {key!r}. {nearest(str(key), _UNTIL)}" for key in unknown)
        if not unknown:
            problems.append(f"{where} does not say when the next phase begins: give one or more of {', '.join(WHEN)}.")
        return {}
    count, found = len(problems), {}
    for key, v in value.items():
        if key not in _UNTIL:
            problems.append(f"{where} has no field {key!r}. {nearest(str(key), _UNTIL)}")
            continue
        with _noting(problems, "rankshift train --keys"):
            found[key] = conform(v, _UNTIL[key], f"{where}.{key}")
    if len(problems) == count:
        found = {key: v for key, v in found.items() if v is not None}
        if found.keys() & {"loss", "loss_change", "weight_change"}:
            found = {"window": Then.window, "windows": Then.windows, **found}
        try:
            Then(LoRA(), **found)
        except ConfigError as error:
            problems.append(re.sub(r"^Then\(\w+, (.*?)\): ", rf"{where}: \1: ", str(error)))
    return found


def _method(value: Any, problems: list[str], where: str = "method", beside: tuple[str, ...] = ()) -> Method | None:
    """A method from its fields; which one it is defaults to LoRA. ``beside``: other keys that stand there."""
    if isinstance(value, Method):
        return value
    if not isinstance(value, Mapping):
        problems.append(f"{where} = {value!r} is not a method. Write method: lora, or a mapping of its fields.")
        return None
    name, known = spelled(value.get("method", "lora")), methods()
    if name not in known:
        problems.append(f"There is no method {name!r}. {nearest(str(name), known)}")
        return None
    kind: Any = known[name]
    count = len(problems)
    fields = {key: v for key, v in value.items() if key != "method"}
    for key, v in fields.items():
        with _noting(problems, f"rankshift methods {name}"):
            if beside and key not in hints(kind):
                known_here = [*hints(kind), *beside]
                raise ConfigError(f"{where} ({name}) has no field {key!r}. {nearest(str(key), known_here)}")
            check_keys(kind, {key: None}, f"method {name}")
            conform(v, hints(kind)[key], f"{where}.{key}")
    if len(problems) > count:
        return None
    with _noting(problems, f"rankshift methods {name}"):
        return kind(**fields)  # type: ignore[no-any-return]
    return None


@contextlib.contextmanager
def _noting(problems: list[str], see: str) -> Iterator[None]:
    """Note a ConfigError and go on, so that all problems are told at once. ``see``: the command that lists what there
    is to set, for a text that says what is wrong and not what to do."""
    try:
        yield
    except ConfigError as error:
        problems.append(advised(str(error), f"See {see}."))


def advised(text: str, advice: str) -> str:
    """An error's text; with ``advice`` after it if it is a single sentence."""
    return text if "\n" in text or re.search(r"[.!?]\s+(?=[A-Z])", text) else f"{text.rstrip('.')}. {advice}"


def _sound(config: TrainConfig | None, problems: list[str], where: str) -> TrainConfig:
    """The config, if there is nothing wrong with it."""
    distinct = list(dict.fromkeys(problems))
    if len(distinct) > 1:
        raise ConfigError(f"{len(distinct)} problems in {where}:\n" + "\n".join(f"- {p}" for p in distinct))
    if distinct:
        raise ConfigError(distinct[0])
    assert config is not None
    return config
