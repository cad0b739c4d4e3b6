"""The base that a finished run, a native directory or a PEFT adapter stands on, loaded again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankshift.core.errors import ConfigError, MissingFile, beside
from rankshift.io import checkpoint
from rankshift.io.checkpoint import MANIFEST
from rankshift.train import bundled, models, recipe
from rankshift.train.config import Task, TrainConfig
from rankshift.train.labels import Classes

_PEFT = "adapter_config.json"
_TASKS: dict[str, Task] = {"CAUSAL_LM": "causal-lm", "SEQ_CLS": "sequence-classification"}


@dataclass(frozen=True)
class Base:
    """A base model, the directory whose adapter belongs on it, and its tokenizer or image processor, if it has one."""

    model: nn.Module
    adapter: Path
    reader: Any | None
    config: TrainConfig | None = None  # of the run of which the adapter is
    classes: Classes | None = None


def load(directory: Path, model: str | None = None) -> Base:
    """The base of a directory, from where it was when it was trained on, or from ``model``.

    Raises:
        MissingFile: the directory or the base is not there.
        ConfigError: the directory does not say which base it stands on.
    """
    if not directory.is_dir():
        hint = beside(directory, directories=True) or "Name a directory that is there."
        raise MissingFile(f"There is no directory {directory}. {hint}")
    for run in (directory, directory.parent):
        if (run / recipe.CONFIG).is_file() and (run / recipe.ADAPTER).is_dir():
            inner = directory if run is not directory else run / recipe.ADAPTER
            return _of_run(run, inner, model)
    if (directory / recipe.CONFIG).is_file():
        raise MissingFile(f"{directory} has no {recipe.ADAPTER}/: the run is not finished. Go on with it: "
                          f"rankshift train --resume {directory}")  # fmt: skip
    if (directory / MANIFEST).is_file():
        base = checkpoint.inspect(directory)["base"]
        return _by_class(directory, model or base.get("name"), base["class"])
    if (directory / _PEFT).is_file():
        return _of_peft(directory, model)
    raise MissingFile(f"{directory} holds no {MANIFEST}, {_PEFT} or {recipe.CONFIG}. Name a run or an adapter.")


def _of_run(run: Path, adapter: Path, model: str | None) -> Base:
    """With the task and the classes of the run, and its new head, which the seed draws again."""
    config = recipe.load_config(run)
    name = model or config.model
    found = models.settings(name)
    if config.task is None:
        raise ConfigError(f"{run / recipe.CONFIG} does not say task. Add the line task: causal-lm, or what it was.")
    labels = config.data.labels
    classes = None
    if labels is not None:
        classes = Classes(labels, True) if isinstance(labels, tuple) else Classes(tuple(map(str, range(labels))), False)
    reader = _reader(name)
    pad = getattr(reader, "pad_token_id", None)
    loaded = models.load(name, found, config.task, classes, recipe.precision(config)[0], config.seed, pad)
    return Base(loaded.model, adapter, reader, config, classes)


def _by_class(directory: Path, name: str | None, kind: str) -> Base:
    import transformers

    if not name:
        raise ConfigError(f"{directory} does not say where its base is. Give it: --model PATH_OR_HUB_ID")
    models.settings(name)
    factory = getattr(transformers, kind, None)
    if factory is None:
        raise ConfigError(
            f"{directory} stands on {kind}, which is no class of transformers. Merge it in Python: rs.load."
        )
    with models.quiet():
        return Base(factory.from_pretrained(bundled.model_path(name)), directory, _reader(name))


def _of_peft(directory: Path, model: str | None) -> Base:
    config = json.loads((directory / _PEFT).read_text(encoding="utf-8"))
    name = model or config.get("base_model_name_or_path")
    if not name:
        raise ConfigError(f"{directory} does not say where its base is. Give it: --model PATH_OR_HUB_ID")
    found = models.settings(name)
    task = _TASKS.get(str(config.get("task_type"))) or models.suited(found)
    if task is None:
        raise ConfigError(f"{directory} does not say its task_type. Write it into {_PEFT}, such as CAUSAL_LM.")
    return Base(models.load(name, found, task, None, torch.float32).model, directory, _reader(name))


def _reader(name: str) -> Any | None:
    """What reads the model's inputs, to be put beside a merged model; None if it has none."""
    for find in (models.tokenizer, models.processor):
        try:
            return find(name)
        except (MissingFile, ConfigError):
            continue
    return None
