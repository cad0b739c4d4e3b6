"""`rankshift methods`: the catalogue. Names and fields come from the registry, what each can do from asking it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import rankshift
from rankshift import capability
from rankshift.capability import Capability
from rankshift.cli.inspect import method_words
from rankshift.core.config import describe, field_docs, hints
from rankshift.core.errors import ConfigError, nearest
from rankshift.core.method import Method, spelled, to_dict
from rankshift.core.phase import check_phases
from rankshift.methods import methods
from rankshift.train import config

_NO_PAGE = ("full",)  # in docs/


def show_all() -> None:
    """One row a method."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("method", "what trains", "parameters", "not at", "LoRA", "needs"):
        table.add_column(title, no_wrap=title in ("method", "LoRA"), min_width=22 if title == "what trains" else None)
    for name, kind in methods().items():
        can = capability.probe(kind())
        refused = [layer for layer, why in can.layers.items() if why]
        needs = [what for what, needed in (("total steps", can.total), ("data", can.data)) if needed]
        cells = (name, kind.summary, kind.formula, ", ".join(refused), "no" if can.lora else "yes", ", ".join(needs))
        table.add_row(*map(escape, cells))
    console = Console()
    console.print(table, highlight=False)
    kinds = ", ".join("transformers' Conv1D" if kind == "Conv1D" else kind for kind in capability.LAYERS)
    console.print(
        f"\nparameters: trained in one (out, in) layer. not at: which layers it refuses, of {kinds}. LoRA: whether it "
        "exports exactly as one plain LoRA.\n"
        "Settings, and why it does not do what it does not: rankshift methods NAME. More: docs/methods.md",
        highlight=False,
    )


def show_one(name: str) -> None:
    """The settings of a method: type, default, meaning; how it is written; what it can do and why not."""
    known = methods()
    name = spelled(name)
    if name not in known:
        raise ConfigError(f"There is no method {name!r}. {nearest(name, known)}")
    kind: Any = known[name]
    console = Console()

    def say(text: str = "") -> None:
        console.print(text, highlight=False)

    say(f"[bold]{name}[/bold]  {escape(kind.summary)}")
    say(escape(f"{kind.paper}. Trains {kind.formula} parameters of an (out, in) layer."))
    say()
    docs, types = field_docs(kind), hints(kind)
    table = _table("field", "default", "meaning")
    for field in _fields(kind):
        meaning = f"{escape(_line(docs.get(field.name, '')))} [dim]({escape(describe(types[field.name]))})[/dim]"
        table.add_row(field.name, escape(_plain(_default(field))), meaning)
    console.print(table, highlight=False)
    say()
    table = _table("written", "")
    for where, line in examples(kind).items():
        table.add_row(where, escape(line))
    console.print(table, highlight=False)
    say()
    table = _table("does it", "", "")
    for what, answer, why in _answers(kind):
        table.add_row(what, answer, escape(why))
    console.print(table, highlight=False)
    page = f"docs/{name}.md" if kind.__module__.startswith("rankshift.") and name not in _NO_PAGE else "docs/methods.md"
    say(f"\nMore: {page}; all methods, as the tests found them: docs/capabilities.md")


def examples(kind: type[Method]) -> dict[str, str]:
    """How a method is written, with the settings that matter most: those that it declares first."""
    own = [f for f in _fields(kind) if f.name not in _common() and type(_default(f)) in (int, float)][:2]
    values = {f.name: _default(f) for f in own}
    arguments = ", ".join(f"{name}={_plain(value)}" for name, value in values.items())
    pairs = ", ".join([f"method: {kind.name}", *(f"{name}: {_plain(value)}" for name, value in values.items())])
    settings = " ".join(f"method.{name}={_plain(value)}" for name, value in values.items())
    total = ", total_steps=1000" if kind().needs_total else ""
    return {
        "Python": f"run = rs.attach(model, {_class(kind)}({arguments}){total})",
        "YAML": f"method: {{{pairs}}}",
        "command": f"rankshift train method={kind.name} {settings}".rstrip() + _steps(kind()),
    }


def _steps(method: Method) -> str:
    """ " train.steps=10000" for a method that by default needs more updates than the bundled recipe has."""
    usual = config.read(None).train.steps

    def fits(updates: int | None) -> bool:
        try:
            return not check_phases(method, (), 0, 0, updates)
        except ConfigError:
            return False

    return "" if fits(usual) else next((f" train.steps={n}" for n in (1000, 10_000, 100_000) if fits(n)), "")


def _class(kind: type[Method]) -> str:
    """The class as a user names it."""
    public = getattr(rankshift, kind.__name__, None) is kind if kind.__name__ in rankshift.__all__ else False
    return f"rs.{kind.__name__}" if public else f"{kind.__module__}.{kind.__name__}"


def _answers(kind: type[Method]) -> Iterator[tuple[str, str, str]]:
    """(what, yes or no, why not) with default settings, then what single settings change."""
    can = capability.probe(kind())
    changes = {setting: capability.probe(method) for setting, method in capability.variants(kind)}
    for layer, why in can.layers.items():
        yield f"{'project' if can.projects else 'adapt'} {layer}", *_answer(why)
    for what, why in _verbs(can).items():
        yield what, *_answer(why)
    for setting, other in changes.items():
        for layer, why in other.layers.items():
            if bool(can.layers[layer]) != bool(why):
                yield f"{'project' if other.projects else 'adapt'} {layer}, {setting}", *_answer(why)
        for what, why in _verbs(other).items():
            if bool(_verbs(can)[what]) != bool(why):
                yield f"{what}, {setting}", *_answer(why)
    total = [s for s, other in changes.items() if other.total != can.total]
    data = [s for s, other in changes.items() if other.data != can.data]
    yield "need total_steps", *_needs(can.total, total)
    yield "need data", *_needs(can.data, data)
    if can.shared is not None:
        yield "share", "yes", "all layers: " + ", ".join(f"{k} {v}" for k, v in can.shared.items())
    for event in can.events:
        yield "change between steps", "yes", event


def _verbs(can: Capability) -> dict[str, str]:
    return {
        "export as a plain LoRA": can.lora,
        "merge": can.merge,
        "go back to the base": can.disable,
        "stand on a base in 4 bits": can.quantised,
        "stand beside another": can.second,
    }


def _answer(why: str) -> tuple[str, str]:
    return ("no", why) if why else ("yes", "")


def _needs(needed: bool, other: list[str]) -> tuple[str, str]:
    others = " or ".join(other)
    return "yes" if needed else "no", (f"not with {others}" if needed else f"with {others}") if others else ""


def _table(*titles: str) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for i, title in enumerate(titles):
        table.add_column(title, no_wrap=i == 0, overflow="fold")
    return table


def _common() -> set[str]:
    return {f.name for f in dataclasses.fields(Method)}


def _fields(kind: type[Method]) -> list[Any]:
    """The method's own fields, then those that all have."""
    return sorted(dataclasses.fields(kind), key=lambda field: field.name in _common())


def _default(field: Any) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _line(text: str) -> str:
    return " ".join(text.split())


def _plain(value: object) -> str:
    """A default as YAML would have it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, dict)) and not value:
        return "none"
    if isinstance(value, Method):
        return method_words(to_dict(value))
    return f"{value:g}" if isinstance(value, float) else str(value)
