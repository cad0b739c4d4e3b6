"""`rankshift methods`: everything in it is true of the registry, and it fits a terminal."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import rankshift as rs
from rankshift import capability
from rankshift.cli.methods import examples, show_all, show_one
from rankshift.core.config import describe, field_docs, hints
from rankshift.core.method import methods
from rankshift.train import config

KINDS = pytest.mark.parametrize("kind", methods().values(), ids=lambda kind: kind.name)


@pytest.fixture
def shown(monkeypatch, capsys):
    """What is printed in a terminal of some width."""

    def show(width: int, name: str | None = None) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        show_all() if name is None else show_one(name)
        return capsys.readouterr().out

    return show


def words(text: str) -> str:
    """Text without the places where lines were folded."""
    return " ".join(text.split())


@pytest.mark.parametrize("width", [100, 80])
def test_the_list_fits(shown, width):
    lines = shown(width).splitlines()
    assert max(map(len, lines)) <= width
    assert re.split(r"  +", lines[0].strip()) == [
        "method", "what trains", "parameters", "not at", "LoRA", "needs",
    ]  # fmt: skip
    starts = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    assert starts[1 : len(methods()) + 1] == list(methods()), "one row a method, its name in one piece"
    assert len(lines) < 8 * (len(methods()) + 2), "rows of a few lines"


def test_the_list_says_what_each_can_do(shown):
    rows = {line.split()[0]: line for line in shown(300).splitlines() if line}
    for name, kind in methods().items():
        can, row = capability.probe(kind()), re.split(r"  +", rows[name].strip())
        refused = [layer for layer, why in can.layers.items() if why]
        needs = [what for what, needed in (("total steps", can.total), ("data", can.data)) if needed]
        cells = [name, kind.summary, kind.formula, ", ".join(refused), "no" if can.lora else "yes", ", ".join(needs)]
        assert row == [cell for cell in cells if cell]


@KINDS
@pytest.mark.parametrize("width", [100, 80])
def test_one_method_fits_and_is_complete(shown, kind: Any, width: int):
    text = shown(width, kind.name)
    assert max(map(len, text.splitlines())) <= width
    assert kind.paper.split(",")[0] in words(text)
    wide = words(shown(4000, kind.name))
    for field in dataclasses.fields(kind):
        assert re.search(rf"^{field.name} ", text, re.M), field.name
        assert words(field_docs(kind)[field.name]) in wide, field.name
        assert f"({describe(hints(kind)[field.name])})" in wide, field.name
    assert kind.formula in wide
    for why in capability.layers(kind()).values():
        assert words(why) in wide


@KINDS
def test_the_examples_work_as_written(kind: Any):
    lines = examples(kind)
    model = nn.Sequential(nn.Linear(160, 160))
    names = {"rs": rs, "model": model}
    exec(lines["Python"], names)
    run = names["run"]
    assert run.method == kind()
    run.optimizer()
    run.model(torch.zeros(1, 160))
    assert rs.from_dict(yaml.safe_load(lines["YAML"])["method"]) == kind()
    command, verb, *settings = lines["command"].split()
    assert (command, verb) == ("rankshift", "train")
    assert config.read(None, settings).method == kind()


def test_a_method_that_another_package_brings_is_named_by_its_module(monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class LoRA(rs.LoRA):
        """Of the same name."""

    LoRA.__module__ = "elsewhere"
    assert "elsewhere.LoRA(" in examples(LoRA)["Python"]
    assert "rs.LoRA(" in examples(rs.LoRA)["Python"]


def test_what_a_setting_changes_is_told_with_the_reason(shown):
    text = words(shown(4000, "lora"))
    assert 'need data no with init="eva"' in text
    assert "export as a plain LoRA, dora=True no A portable LoRA cannot hold" in text
    assert "adapt Embedding, dora=True no DoRA at embed_tokens" in text
    assert "go back to the base no Full trains the base itself" in words(shown(4000, "full"))


def test_an_unknown_name():
    with pytest.raises(rs.errors.ConfigError, match="Did you mean 'lora'"):
        show_one("lroa")


def test_projecting_methods_say_what_they_project(shown):
    text = words(shown(4000, "galore"))
    assert "project Linear yes" in text
    assert "project experts yes" in text
    assert "project Embedding no embed_tokens is an Embedding" in text
    assert "what is not projected trains by AdamW" in text
    assert "adapt Linear" not in text
    assert 'stand beside another, rest="freeze"' not in text, "it trains the base either way"
    assert "project" not in words(shown(4000, "lora")).split("does it")[1]


def test_a_method_as_a_default_is_a_few_words(shown):
    text = words(shown(4000, "prelora"))
    assert "then lora, rank 8, alpha 16 What the layers" in text
    assert "targets=" not in text
    assert "{" not in text.split("written")[0]
    assert "method.loss_change=5 train.steps=10000" in text, "the bundled recipe is too short for it"


@pytest.mark.parametrize("name", sorted(methods()))
def test_the_page_that_is_named_is_there(shown, name):
    page = re.search(r"More: (docs/[\w-]+\.md)", words(shown(4000, name)))[1]
    assert (Path(__file__).parents[2] / page).exists()
    assert page == ("docs/methods.md" if name == "full" else f"docs/{name}.md")
