"""`rankshift methods`: the catalogue, from the registry."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rankshift.core.config import describe, field_docs, hints
from rankshift.core.errors import ConfigError, nearest
from rankshift.methods import methods


def show_all() -> None:
    """One row a method."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("method", "what trains", "parameters a layer", "paper"):
        table.add_column(title, no_wrap=title == "method")
    for name, kind in methods().items():
        table.add_row(name, kind.summary, kind.formula, kind.paper)
    console = Console()
    console.print(table, highlight=False)
    console.print("\nSettings of one: rankshift methods NAME", highlight=False)


def show_one(name: str) -> None:
    """The settings of a method: type, default, meaning."""
    known = methods()
    if name not in known:
        raise ConfigError(f"There is no method {name!r}. {nearest(name, known)}")
    kind: Any = known[name]
    console = Console()
    console.print(f"[bold]{name}[/bold]  {escape(kind.summary)}", highlight=False)
    console.print(escape(f"{kind.paper}; {kind.formula} parameters a layer"), highlight=False)
    console.print()
    docs, types = field_docs(kind), hints(kind)
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("field", "default", "meaning"):
        table.add_column(title, no_wrap=title == "field", overflow="fold")
    for field in dataclasses.fields(kind):
        made = field.default_factory
        default = made() if made is not dataclasses.MISSING else field.default
        meaning = (
            f"{escape(' '.join(docs.get(field.name, '').split()))} [dim]({escape(describe(types[field.name]))})[/dim]"
        )
        table.add_row(field.name, escape(_plain(default)), meaning)
    console.print(table, highlight=False)
    console.print(f"\nUse: rankshift train method={name}, and fields as method.FIELD=VALUE", highlight=False)


def _plain(value: object) -> str:
    """A default as YAML would have it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, dict)) and not value:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
