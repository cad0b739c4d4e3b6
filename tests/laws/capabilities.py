"""The capability table: what the laws have shown of each method, as a page.

    pytest tests/laws --capabilities docs/capabilities.md

A test says by ``@pytest.mark.capability("merge")`` which columns it shows, and by its parameters which method, in which
configuration and under which engine. One that passes because the method refuses hands the refusal over with
``record_property("refused", {column: text})``; it becomes a footnote. Nothing is written unless every test has passed
and every cell is known. :func:`read` is the inverse of :func:`render`, for the test that compares the page with the
library.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from laws.cases import CASES, Case
from rankshift.core.method import Method, methods

COLUMNS = {
    "resume": "n updates are k updates, save, load and n − k updates, bit for bit, for every k",
    "merge": "`run.merge()` gives plain layers and the same function, in float64, fp32 and bf16",
    "exact LoRA export": '`run.export(profile="portable")` writes one plain LoRA that is the same function',
    "quantised base": 'a base in 4 or 8 bits, `attach(base="nf4")`',
    "multi-adapter": "a second adapter of the same method: added, switched, summed, deleted; each keeps its bits",
    "compile": "`torch.compile(fullgraph=True)`: one graph for all steps, the same training",
    "fused blocks": "a Llama's blocks after `run.lower()`: the same training to rounding; raised, or saved and loaded, "
    "the same state",
    "DDP": "two ranks are one process with all the data; exact resume; all laws that engines touch",
    "FSDP2": "the same under `fully_shard`",
    "accumulation": "exact resume where several backward passes make an update",
    "checkpointing": "gradients under non-reentrant activation checkpointing, bit for bit",
    "Linear": "forward is W + ΔW at `nn.Linear`",
    "Conv1D": "the same at transformers' `Conv1D`",
    "Conv": "at `nn.Conv1d` and `nn.Conv2d`",
    "Embedding": "at `nn.Embedding`",
    "experts": "at a stack of experts",
}
ENGINES = {"ddp": "DDP", "fsdp2": "FSDP2"}
SIZES = ("rank", "alpha", "targets", "modules_to_save", "exclude")  # settings that are the test's, not a configuration
YES, NO = "✓", "–"


@dataclass
class Found:
    """What tests have shown of one (method, column)."""

    shown: set[bool] = field(default_factory=set)  # by the first configuration but for sizes, by another
    refused: dict[str, set[str]] = field(default_factory=dict)  # why → settings that it is about; "" for the first


@dataclass
class Record:
    """What a session has shown."""

    cells: dict[tuple[str, str], Found] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def add(self, method: str, settings: Mapping[str, str], columns: Iterable[str], refused: Mapping[str, str]) -> None:
        """``settings``: how the configuration differs from the method's first, as it is written."""
        for column in columns:
            found = self.cells.setdefault((method, column), Found())
            if column in refused:
                why = " ".join(refused[column].split())
                found.refused.setdefault(why, set()).add(_about(settings, why))
            else:
                found.shown.add(not settings.keys() - set(SIZES))

    def missing(self, names: Iterable[str]) -> list[str]:
        """Cells that no test has filled."""
        return [f"{name} × {column}" for name in names for column in COLUMNS if (name, column) not in self.cells]


def settings(method: Method) -> dict[str, str]:
    """Field → ``field=value`` where a configuration is not the default."""
    default = type(method)()
    names = [f.name for f in dataclasses.fields(method) if getattr(method, f.name) != getattr(default, f.name)]
    return {name: f"{name}={written(getattr(method, name))}" for name in names}


def written(value: Any) -> str:
    if isinstance(value, Method):
        return f"{type(value).__name__}({', '.join(settings(value).values())})"
    return repr(value).replace("'", '"')


def _about(settings: Mapping[str, str], why: str) -> str:
    """Those of the settings that a refusal speaks of, by name or by value; all but sizes if it speaks of none."""

    def words(text: str) -> set[str]:  # norm2 is one of the norms; low-rank is no rank
        found = (word.rstrip("s0123456789") for word in re.findall(r"[^\W\d][\w-]*", text.lower()))
        return set(found) - {"true", "false", "none"}

    named = [text for text in settings.values() if words(text) & words(why)]
    return ", ".join(named or [text for name, text in settings.items() if name not in SIZES])


# ---- the page --------------------------------------------------------------------------------------------------------


def render(record: Record, kinds: Mapping[str, type[Method]], docs: Path | None = None) -> str:
    """The page. ``docs``: where pages of methods are, to be linked."""
    notes: dict[str, int] = {}  # text → number
    table = ["| method | " + " | ".join(COLUMNS) + " |", "|---|" + ":-:|" * len(COLUMNS)]
    for name in kinds:
        cells = [_cell(record.cells[name, column], notes) for column in COLUMNS]
        linked = docs is not None and (docs / f"{name}.md").is_file()
        table.append(f"| {f'[{name}]({name}.md)' if linked else name} | " + " | ".join(cells) + " |")
    return "\n".join(
        [
            "# What each method can do",
            "",
            "<!-- generated by `make capabilities` from the outcomes of tests/laws; not written by hand -->",
            "",
            "Generated by `make capabilities` from the outcomes of `tests/laws`. "
            f"{YES}: shown by tests that pass. {NO}: refused; the footnote is what the library says. A footnote at a "
            "tick names settings or layers that are refused.",
            "",
            *table,
            "",
            *(f"{number}. {text}" for text, number in notes.items()),
            "",
            "## What is shown",
            "",
            *(f"- **{column}**: {meaning}." for column, meaning in COLUMNS.items()),
            "",
        ]
    )


def _cell(found: Found, notes: dict[str, int]) -> str:
    """A tick if the first configuration can, else a dash; and the numbers of its footnotes."""
    first = any("" in about for about in found.refused.values())  # it is refused
    default = True in found.shown or (bool(found.shown) and not first)
    numbers = set()
    for why, about in found.refused.items():
        if not found.shown and first and "" not in about:
            continue  # of another configuration, that is refused for another reason
        odd = "" if "" in about or not found.shown else " or ".join(f"`{text}`" for text in sorted(about))
        text = re.sub(r"([*_<])", r"\\\1", why)  # no markup in a refusal
        numbers.add(notes.setdefault(f"With {odd}: {text}" if odd else text, len(notes) + 1))
    return (YES if default else NO) + (f"<sup>{','.join(map(str, sorted(numbers)))}</sup>" if numbers else "")


def read(page: str) -> dict[str, dict[str, bool]]:
    """method → column → whether it can, of a page; {} if it has no table."""
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in page.splitlines() if line[:2] == "| "]
    if not lines:
        return {}
    (_, *columns), *rows = lines
    names = (re.sub(r"\[(.*?)\].*", r"\1", row[0]) for row in rows)
    return {
        name: {column: cell.startswith(YES) for column, cell in zip(columns, row[1:], strict=True)}
        for name, row in zip(names, rows, strict=True)
    }


# ---- the plug-in -----------------------------------------------------------------------------------------------------


class Recorder:
    """Watches a session and writes the page at its end."""

    def __init__(self, page: Path):
        self.page, self.record, self.said = page, Record(), ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.record.failed.append(report.nodeid)
        shows = dict(report.user_properties).get("shows")
        if report.when != "call" or not report.passed or shows is None:
            return
        method, odd, columns = shows
        refused = {k: v for key, texts in report.user_properties if key == "refused" for k, v in texts.items()}
        self.record.add(method, odd, columns, refused)

    def pytest_sessionfinish(self, session: Any, exitstatus: int) -> None:
        kinds = methods()
        if self.record.failed or exitstatus:
            first = self.record.failed[0] if self.record.failed else f"exit status {exitstatus}"
            self.said = f"not written: {len(self.record.failed)} failed, {first}"
        elif missing := self.record.missing(kinds):
            self.said = f"not written: {len(missing)} cells are unknown, {missing[0]}; run the whole of tests/laws"
        else:
            self.page.write_text(render(self.record, kinds, self.page.parent), encoding="utf-8")
            self.said = f"{self.page} written"
        if not self.said.endswith("written") and not exitstatus:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(f"capabilities: {self.said}")


def stamp(items: Iterable[pytest.Item]) -> None:
    """Write on every test what it shows, so that its report carries it wherever it runs."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        case = parameters.get("case")
        columns = [name for mark in item.iter_markers("capability") for name in mark.args]
        unknown = set(columns) - set(COLUMNS)
        assert not unknown, f"{item.nodeid} shows {unknown}, which the table has no column for"
        if isinstance(case, Case) and case.method.name in methods():
            engine = ENGINES.get(parameters.get("engine", ""))
            shown = columns if engine is None else [engine]
            odd = {} if case is CASES[case.method.name][0] else settings(case.method)
            if shown:
                item.user_properties.append(("shows", (case.method.name, odd, shown)))
