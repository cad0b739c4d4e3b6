"""A few inputs to compare two models on: of the data that a run was trained on, or a paragraph of text."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rankshift.core.errors import RankshiftError
from rankshift.train import columns as roles
from rankshift.train import data, recipe, sources
from rankshift.train.bases import Base

_ROWS, _LETTERS = 64, 20_000  # of the data, at most
_COUNT = 2  # examples made of them
_TEXT = """\
A lighthouse keeper wrote down the weather every evening for forty years. On calm days he noted the wind in two words
and went to bed; on wild nights he filled a page, because there was nothing else to do until morning. When the tower was
given to the museum, his grandchildren found 14,610 entries and one remark that had nothing to do with the sea: "Bought
a clock. It is slow." What would you ask him, if he were still here? He would have answered in two words, I suppose, and
then, after a while, in a page."""


def samples(base: Base) -> tuple[Mapping[str, Tensor], str] | None:
    """(inputs of the model, what they are); None where the model reads no text and its data is gone."""
    if base.config is not None:
        with contextlib.suppress(RankshiftError, OSError), sources.quiet():  # the data may be elsewhere by now
            return _own(base), f"{_COUNT} of the run's own examples"
    if base.reader is None or not hasattr(base.reader, "pad_token_id"):
        return None
    length = min(256, getattr(base.reader, "model_max_length", 256))
    return dict(base.reader(_TEXT, return_tensors="pt", truncation=True, max_length=length)), "a paragraph of text"


def _own(base: Base) -> dict[str, Any]:
    """The first of them, without labels."""
    config = base.config
    assert config is not None
    task = config.task
    assert task is not None
    rows = sources.load(config.data.train, "data.train", config.data.split, config.data.subset)
    rows = rows.select(range(min(_ROWS, len(rows))))
    if rows.column_names == ["text"]:  # perhaps whole books
        rows = rows.map(lambda row: {"text": row["text"][:_LETTERS]}, keep_in_memory=True)
    columns = roles.infer(rows, config.data.columns, task)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, validation=0.0, validation_split=None))
    parts, length = data.split(rows, config.data, config.seed), config.data.max_length
    examples = recipe.encoded(config, task, parts, columns, base.reader, type(base.model), length, base.classes)
    batch = examples.collate([examples.train[i] for i in range(min(_COUNT, len(examples.train)))])
    return {name: tensor for name, tensor in batch.items() if name != "labels"}
