"""Labels of a classification: which classes there are, and the labels of every row as class numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rankshift.core.errors import DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Classes:
    """The classes of a task, in the order of their numbers."""

    names: tuple[str, ...]
    given: bool  # the data names its classes, rather than numbering them

    def __len__(self) -> int:
        return len(self.names)


def classes_of(rows: Dataset, wish: int | tuple[str, ...] | None, head: tuple[str, ...] | None) -> Classes:
    """The classes that the training rows show.

    Args:
        wish: the classes, or their number, if the user said it.
        head: class names of the model's trained head, if it has one; it is kept where it fits and ``wish`` is None.

    Raises:
        DataError: a label is missing, negative or beyond the classes there are.
    """
    for i, value in enumerate(rows["label"]):
        if value is None:
            raise DataError(f"row {i + 1} of data.train has no label. Fill it or remove the row.")
    shown = _shown(rows)
    if isinstance(wish, tuple):
        if (not shown.given and len(shown) > len(wish)) or (shown.given and not set(shown.names) <= set(wish)):
            odd = next((n for n in shown.names if n not in wish), shown.names[-1])
            raise DataError(f"data.train has the label {odd!r}, which data.labels has not. {nearest(odd, wish)}")
        return Classes(wish, True)
    if wish is not None:
        if len(shown) > wish:
            raise DataError(f"data.train has {len(shown)} classes, but data.labels = {wish}. Set it to {len(shown)}.")
        return Classes((*shown.names, *(str(k) for k in range(len(shown), wish))), shown.given)
    if head is not None:
        if shown.given and set(shown.names) <= set(head):
            return Classes(head, True)
        if len(shown) > len(head) or (shown.given and len(shown) != len(head)):
            raise DataError(
                f"data.train has {len(shown)} classes, but the head of the model has {len(head)}. "
                f"Set data.labels={max(2, len(shown))} to train a new head."
            )
        return shown if shown.given else Classes(head, head != tuple(str(k) for k in range(len(head))))
    if len(shown) < 2:
        raise DataError("data.train shows a single class, so there is nothing to tell apart. Give rows of each class.")
    return shown


def _shown(rows: Dataset) -> Classes:
    """The classes in the rows themselves."""
    from datasets import ClassLabel

    feature, values = rows.features["label"], rows["label"]
    if isinstance(feature, ClassLabel):
        return Classes(tuple(feature.names), True)
    if isinstance(values[0], str):
        return Classes(tuple(sorted(set(values))), True)
    numbers = [_number(value, i, "data.train") for i, value in enumerate(values)]
    return Classes(tuple(str(k) for k in range(max(numbers) + 1)), False)


def numbered(rows: Dataset, classes: Classes, where: str) -> list[int]:
    """The class number of each row.

    Raises:
        DataError: a label that is none of the classes, with its row.
    """
    values = rows["label"]
    table = {name: k for k, name in enumerate(classes.names)}
    numbers = []
    for i, value in enumerate(values):
        if isinstance(value, str):
            if value not in table:
                hint = nearest(value, table)
                raise DataError(f"row {i + 1} of {where} has the label {value!r}, which data.train has not. {hint}")
            numbers.append(table[value])
            continue
        number = _number(value, i, where)
        if number >= len(classes):
            raise DataError(
                f"row {i + 1} of {where} has the label {number}, but there are {len(classes)} classes (0 to "
                f"{len(classes) - 1}). Correct it, or set data.labels={number + 1}."
            )
        numbers.append(number)
    return numbers


def _number(value: Any, row: int, where: str) -> int:
    if value is None or isinstance(value, (list, dict)) or value != int(value) or value < 0:
        raise DataError(
            f"row {row + 1} of {where} has the label {value!r}. Classes are names or numbers from 0; leave out rows "
            "without a label, and for measurements set task=regression."
        )
    return int(value)
