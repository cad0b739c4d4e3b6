"""Methods as data: frozen dataclasses to plain dictionaries and back, strictly."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from rankshift.core.errors import ConfigError, nearest


def conform(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the annotated type ``hint``: lists become tuples, ints become floats, anything else must fit.

    Raises:
        ConfigError: naming ``where``, what is there and what is wanted.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        errors = []
        for option in args:
            try:
                return conform(value, option, where)
            except ConfigError as error:
                errors.append(str(error))
        choices = [str(a) for option in args if get_origin(option) is Literal for a in get_args(option)]
        close = nearest(value, choices) if choices and isinstance(value, str) else ""
        raise ConfigError(f"{where} = {value!r} is not {describe(hint)}.{f' {close}' if 'mean' in close else ''}")
    if hint is None or hint is type(None):
        ok = value is None
    elif origin is Literal:
        if any(type(value) is type(option) and value == option for option in args):  # True is not 1
            return value
        hint_text = f" {nearest(value, [str(a) for a in args])}" if isinstance(value, str) else ""
        raise ConfigError(f"{where} = {value!r} is not one of {', '.join(map(repr, args))}.{hint_text}")
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            if len(args) == 2 and args[1] is Ellipsis:
                return tuple(conform(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
            if len(value) == len(args):
                return tuple(conform(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True)))
        ok = False
    elif isinstance(origin, type) and issubclass(origin, Sequence):
        if isinstance(value, (list, tuple)):
            return tuple(conform(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
        ok = False
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        if isinstance(value, Mapping):
            return {conform(k, args[0], where): conform(v, args[1], f"{where}[{k!r}]") for k, v in value.items()}
        ok = False
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        ok = False
    elif hint is int:
        ok = isinstance(value, int) and not isinstance(value, bool)
    elif isinstance(hint, type):
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            return build(hint, value, where)
        ok = isinstance(value, hint)
    else:
        raise TypeError(f"config fields cannot be annotated {hint!r}")
    if not ok:
        raise ConfigError(f"{where} = {value!r} is not {describe(hint)}.")
    return value


def build(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """An instance of a config dataclass from a mapping; a class may say how by a classmethod ``from_mapping``."""
    special = getattr(kind, "from_mapping", None)
    if special is not None:
        return special(values, where)
    check_keys(kind, values, where)
    return kind(**values)


def check_keys(kind: type, values: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for a key that is no field of ``kind``, naming the nearest."""
    known = [f.name for f in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{where} has no field {key!r}. {nearest(str(key), known, len(known))}")


@functools.cache
def hints(kind: type) -> dict[str, Any]:
    """Resolved annotations of the fields of a config class."""
    everything = typing.get_type_hints(kind)
    return {f.name: everything[f.name] for f in dataclasses.fields(kind)}


def conform_fields(config: Any) -> None:
    """Check every field of a frozen dataclass against its annotation, in place (for ``__post_init__``)."""
    kind: type = type(config)
    for name, hint in hints(kind).items():
        where = f"{type(config).__name__}.{name}"
        object.__setattr__(config, name, conform(getattr(config, name), hint, where))


def describe(hint: Any) -> str:
    """An annotation in plain words: "an integer", "one of 'a', 'b'", "a list of text"."""
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "none", None: "none"}
    if hint in names:
        return names[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin is tuple or (isinstance(origin, type) and issubclass(origin, Sequence)):
        return f"a list ({describe(args[0])})"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a mapping ({describe(args[0])} → {describe(args[1])})"
    return f"a {getattr(hint, '__name__', hint)}"


def plain(value: Any) -> Any:
    """A config value as JSON knows it: tuples become lists, nested configs dictionaries."""
    special = getattr(value, "to_mapping", None)
    if special is not None:
        return special()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


@functools.cache
def field_docs(kind: type) -> dict[str, str]:
    """The string under each field of a config class: its meaning, unit and the source of its default."""
    docs: dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(parent):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                docs[statement.target.id] = inspect.cleandoc(below.value.value)
    return docs
