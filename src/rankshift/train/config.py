"""TrainConfig: what `rankshift train` does, as YAML says it. Typed and strict; all problems are told at once.

    model: path-or-hub-id
    data: train.jsonl            # or a mapping: data: {train: …, validation: …}
    method: lora                 # or a mapping: method: {method: lora, rank: 32}
    train: {lr: 2e-4, epochs: 3}

On the command line the same keys are written with dots: ``method.rank=32 data.validation=dev.jsonl``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from rankshift.core.config import check_keys, conform, field_docs, hints, plain
from rankshift.core.errors import ConfigError, MissingFile, beside, nearest
from rankshift.core.method import spelled
from rankshift.methods import LoRA, Method, methods
from rankshift.train import bundled

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
        if self.fused_backward and (self.accumulate != 1 or self.clip):
            yield (
                "train.fused_backward uses each gradient as soon as it is there: none is left to accumulate or clip. "
                "Set train.accumulate=1 and train.clip=0."
            )


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
    """The method and its fields; a bare value is its name."""
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

    def problems(self) -> Iterable[str]:
        """What does not fit together."""
        if self.train.fused_backward and self.method.waits:
            yield f"train.fused_backward: {type(self.method).__name__} as configured {self.method.waits}. Leave it out."
        if not self.model:
            yield "model is empty. Write model=PATH_OR_HUB_ID."
        if self.name is not None and not re.fullmatch(r"[\w][\w.+-]*", self.name):
            yield f"name = {self.name!r} is no plain directory name. Put the place into output= and keep name simple."
        if not 0 <= self.seed < 2**32:
            yield f"seed = {self.seed} is not in 0 … {2**32 - 1}. Set a seed in that range."


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
    for key, value in sorted(pairs, key=lambda pair: pair[0] != "method"):  # what a new method drops goes first
        _set(values, key, value, problems)
    values = _spelled_out(values, problems)
    if file is None and not own and isinstance(values.get("train"), dict):
        name = values["method"].get("method") if isinstance(values.get("method"), Mapping) else None
        values["train"].setdefault("lr", bundled.RATES.get(spelled(str(name)), 6e-3))
    config = _build(TrainConfig, values, "", problems)
    return _sound(config, problems, str(file) if file is not None else "these settings")


def write(config: TrainConfig) -> str:
    """The config as YAML that :func:`read` takes; nothing is left to defaults."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True, width=120)


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


def _set(values: dict[str, Any], key: str, value: Any, problems: list[str]) -> None:
    """Write a dotted key into nested mappings; a bare value of a section changes its main key only."""
    *path, leaf = key.split(".")
    here = values
    for part in path:
        below = here.setdefault(part, {})
        if not isinstance(below, dict):
            problems.append(f"{key}: {part} is the value {below!r}, which has nothing inside. Drop one of the two.")
            return
        here = below
    if not path and leaf in TrainConfig._sections and not isinstance(value, dict):
        section = here.setdefault(leaf, {})
        if leaf == "method" and spelled(section.get("method", "lora")) != spelled(value):
            section.clear()  # the fields of another method mean nothing to this one, nor does its learning rate
            if isinstance(here.get("train"), dict):
                here["train"].pop("lr", None)
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


def _method(value: Any, problems: list[str]) -> Method | None:
    """A method from its fields; which one it is defaults to LoRA."""
    if isinstance(value, Method):
        return value
    if not isinstance(value, Mapping):
        problems.append(f"method = {value!r} is not a method. Write method: lora, or a mapping of its fields.")
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
            check_keys(kind, {key: None}, f"method {name}")
            conform(v, hints(kind)[key], f"method.{key}")
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
