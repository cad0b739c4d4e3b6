"""Which column plays which role, and rows reduced to their roles.

Roles are text, text2, label, prompt, completion, messages and image. A role is a column, or a template of columns such
as "Question: {question}\\nAnswer:".
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rankshift.core.errors import DataError, nearest
from rankshift.train.config import Task

if TYPE_CHECKING:
    from datasets import Dataset

_ALIASES = {
    "text": ("text", "sentence", "sentence1", "premise", "content", "document", "body"),
    "text2": ("text2", "sentence2", "hypothesis"),
    "label": ("label", "labels", "class", "target", "score"),
    "prompt": ("prompt", "instruction", "question"),
    "completion": ("completion", "response", "output", "answer"),
    "messages": ("messages", "conversation", "conversations"),
    "image": ("image", "img"),
}
_NEEDED = {
    "causal-lm": (("messages",), ("prompt", "completion"), ("text",)),
    "masked-lm": (("text",),),
    "sequence-classification": (("text", "label"),),
    "regression": (("text", "label"),),
    "image-classification": (("image", "label"),),
}
_OPTIONAL = {"sequence-classification": ("text2",), "regression": ("text2",)}


@dataclass(frozen=True)
class Columns:
    """The column, or the template, of each role that is used."""

    of: Mapping[str, str]

    def __contains__(self, role: str) -> bool:
        return role in self.of

    def __str__(self) -> str:
        return ", ".join(role if role == column else f"{role} ← {column!r}" for role, column in self.of.items())


def infer(rows: Dataset, given: Mapping[str, str], task: str | None, where: str = "data.train") -> Columns:
    """The roles that ``task`` needs, as given and otherwise by the usual names of columns.

    Raises:
        DataError: a given column is not there (the nearest is named), or a needed role has no column.
    """
    for role, column in given.items():
        for part in _fields(column):
            if part not in rows.column_names:
                hint = nearest(part, rows.column_names)
                raise DataError(f"{where} has no column {part!r} for data.columns.{role}. {hint}")
    found = dict(given)
    for role, aliases in _ALIASES.items():
        hits = [name for name in aliases if name in rows.column_names and name not in found.values()]
        if role not in found and hits:
            found[role] = hits[0]
    if "instruction" in found.values() and "input" in rows.column_names and "prompt" not in given:
        found["prompt"] = "{instruction}\n{input}"  # Alpaca's layout
    words = [name for name in rows.column_names if _kind(rows, name) == "text"]
    if "text" not in found and not {"prompt", "messages", "image"} & found.keys() and len(words) == 1:
        found["text"] = words[0]
    tasks = [task] if task else list(_NEEDED)
    for name in tasks:
        for roles in _NEEDED[name]:
            if all(role in found for role in roles):
                used = (*roles, *_OPTIONAL.get(name, ())) if task else tuple(_ALIASES)
                return Columns({role: found[role] for role in used if role in found})
    wanted = " or ".join(" + ".join(roles) for name in tasks for roles in _NEEDED[name])
    missing = [role for role in _NEEDED[tasks[0]][-1] if role not in found]
    kinds = {"image": ("image",), "label": ("text", "integer", "float"), "messages": ("list",)}
    able = [name for name in rows.column_names if _kind(rows, name) in kinds.get(missing[0], ("text",))]
    if able:
        hint = f"Say which column it is, such as data.columns.{missing[0]}={able[0]}."
    elif missing[0] == "image":
        hint = "An image model needs a column of images, or a directory of them. For text choose another model=."
    elif any(_kind(rows, name) == "image" for name in rows.column_names):
        hint = "A text model needs a column of text. For images choose another model=."
    else:
        hint = "Give data that has such a column."
    raise DataError(
        f"{where} has the columns {', '.join(rows.column_names)}, none of which is {' or '.join(missing)} (needed: "
        f"{wanted}). {hint}"
    )


def suits(columns: Columns, rows: Dataset) -> Task | None:
    """The task that only these columns can mean; None for plain text."""
    if "image" in columns and "label" in columns:
        return "image-classification"
    if "messages" in columns or ("prompt" in columns and "completion" in columns):
        return "causal-lm"
    if "label" in columns and "text" in columns:
        return "regression" if is_number(rows, columns.of["label"]) else "sequence-classification"
    return None


def is_number(rows: Dataset, column: str) -> bool:
    """Whether a label column holds measurements: floats that are not all whole."""
    if _kind(rows, column) != "float":
        return False
    return any(value is not None and value != int(value) for value in rows[column])


def select(rows: Dataset, columns: Columns, where: str) -> Dataset:
    """Rows with one column a role.

    Raises:
        DataError: a column is missing here or holds something else than its role can be.
    """
    for role, column in columns.of.items():
        for part in _fields(column):
            if part not in rows.column_names:
                raise DataError(f"{where} has no column {part!r} ({role}). {nearest(part, rows.column_names)}")
        if role in ("text", "text2", "prompt", "completion") and column in rows.column_names:
            kind = _kind(rows, column)
            if kind != "text":
                raise DataError(
                    f"{where}: column {column!r} holds {kind}, but {role} must be text. Name another column."
                )
    plain = {role: column for role, column in columns.of.items() if column in rows.column_names}
    templates = {role: column for role, column in columns.of.items() if role not in plain}

    def fill(batch: dict[str, list[Any]]) -> dict[str, list[str]]:
        count = len(next(iter(batch.values())))
        lines = ({name: batch[name][i] for name in batch} for i in range(count))
        filled = [{role: column.format_map(line) for role, column in templates.items()} for line in lines]
        return {f"role {role}": [row[role] for row in filled] for role in templates}

    if templates:
        rows = rows.map(fill, batched=True, keep_in_memory=True, new_fingerprint=rows._fingerprint + "t")
    source = {**plain, **{role: f"role {role}" for role in templates}}
    rows = rows.select_columns(list(dict.fromkeys(source.values())))
    return rows.rename_columns({column: role for role, column in source.items() if column != role})


def no_gaps(rows: Dataset, roles: Iterable[str], where: str) -> None:
    """Raise DataError at the first row where one of these roles is empty."""
    for role in roles:
        if role in rows.column_names:
            for i, value in enumerate(rows[role]):
                if value is None or value == "":
                    raise DataError(f"row {i + 1} of {where} has no {role}. Fill it or remove the row.")


def _fields(column: str) -> list[str]:
    """Columns that a role is made of."""
    parts = [name for _, name, _, _ in string.Formatter().parse(column) if name is not None] if "{" in column else []
    return parts or [column]


def _kind(rows: Dataset, column: str) -> str:
    """ "text", "float", "integer", "image", "list", … of a column."""
    from datasets import ClassLabel, Image, Value

    feature = rows.features[column]
    if isinstance(feature, Value):
        name = feature.dtype
        for prefix, kind in (("large_string", "text"), ("string", "text"), ("float", "float"), ("double", "float")):
            if name.startswith(prefix):
                return kind
        return "integer" if name.startswith(("int", "uint", "bool")) else str(name)
    if isinstance(feature, ClassLabel):
        return "integer"
    return "image" if isinstance(feature, Image) else "list"
