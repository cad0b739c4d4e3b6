"""The house has floors: a file imports only from lower ones. Read from the source, by ast."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1] / "src" / "rankshift"

FLOORS = {
    "core": 0,
    "storage": 1,
    "ops": 1,
    "optim": 1,
    "methods": 2,
    "io": 3,
    "plan": 3,
    "lower": 3,
    "placement": 3,
    "summary": 3,
    "holding": 4,
    "handover": 4,
    "parity": 5,
    "run": 6,
    "capability": 7,
    "train": 7,
    "serve": 7,
    "cli": 8,
    "__main__": 9,
}
_KIN = ("adarankgrad", "galore")  # three changes to it
_DOWN = (("optim", "ops"), ("storage", "ops"))  # on one floor, and the first calls the second
HEAVY = {"transformers", "accelerate", "datasets", "peft", "trl", "matplotlib", "yaml", "rich", "typer"}
CORE_MAY = {"torch"}  # and the standard library


@dataclass(frozen=True)
class Import:
    """One imported module, as an absolute dotted name."""

    module: str
    line: int
    typed: bool  # under TYPE_CHECKING: never executed


def imports(tree: ast.AST, package: str) -> Iterator[Import]:
    """Every import in a file, wherever it stands. ``package``: dotted name of the file's package."""
    typed = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, id(node) in typed)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            start = ".".join(parts[: len(parts) - node.level + 1]) + "." if node.level else ""
            module = (start + (node.module or "")).rstrip(".")
            # "from rankshift.core import shard" imports rankshift.core.shard
            yield from (Import(f"{module}.{alias.name}", node.lineno, id(node) in typed) for alias in node.names)


def names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every identifier and attribute, dotted where it is written so, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Name)):
            yield ast.unparse(node), node.lineno


def faults(path: Path, house: Path = HOUSE) -> list[str]:
    """What is wrong with one file, as "file:line: what"."""
    where = path.relative_to(house)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    floor = where.parts[0].removesuffix(".py")
    package = ".".join(["rankshift", *where.parts[:-1]])
    found: list[tuple[int, str]] = []
    for it in imports(tree, package):
        top, *rest = it.module.split(".")
        if top == "rankshift":
            found += [(it.line, what) for what in _between(where, floor, rest, it.typed)]
        else:
            found += [(it.line, what) for what in _outside(where, floor, it.module)]
    found += _words(where, tree)
    return [f"{where}:{line}: {what}" for line, what in sorted(found)]


def _between(where: Path, floor: str, target: list[str], typed: bool) -> Iterator[str]:
    if floor == "__init__" or not target or target[0] not in FLOORS:
        return  # the front door may name everything; version and the like belong to no floor
    there = target[0]
    if floor not in FLOORS:
        yield f"{floor} stands on no floor"
    elif floor != there and FLOORS[there] >= FLOORS[floor] and not typed and (floor, there) not in _DOWN:
        yield f"{floor} (floor {FLOORS[floor]}) imports {there} (floor {FLOORS[there]})"
    if floor == "methods":
        mine, other = where.stem, target[1] if len(target) > 1 else ""
        if there not in ("core", "ops", "optim", "methods"):
            yield f"methods import {there}"
        family = mine == "__init__" or mine.split("_")[0] == other.split("_")[0]
        if there == "methods" and not (family or other == "lora" or other.startswith("lora_") or (mine, other) == _KIN):
            yield f"method {mine} imports method {other}"


def _outside(where: Path, floor: str, module: str) -> Iterator[str]:
    top = module.split(".")[0]
    if top in HEAVY and floor not in ("train", "cli", "serve"):
        yield f"{floor} imports {top}"
    if top == "triton" and not (floor == "ops" and where.name == "triton.py"):
        yield "triton outside ops/*/triton.py"
    if module.startswith("torch.distributed.tensor") and where.as_posix() != "core/shard.py":
        yield "DTensor outside core/shard.py"
    if floor == "core" and top not in CORE_MAY | sys.stdlib_module_names:
        yield f"core imports {top}"


def _words(where: Path, tree: ast.AST) -> list[tuple[int, str]]:
    found = []
    forked = {  # others' code that draws from the global generator runs in a copy of it
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.With) and any("fork_rng" in ast.unparse(item) for item in node.items)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        if where.parts[0] == "train"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            found.append((node.lineno, "a global statement"))
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            if call == "torch.load" and not safe:
                found.append((node.lineno, "torch.load without weights_only=True"))
    for name, line in names(tree):
        own = name.startswith("torch.Generator(")  # a generator made on the spot is nobody else's
        if name.rpartition(".")[2] in ("manual_seed", "manual_seed_all") and line not in forked and not own:
            found.append((line, f"{name}: nothing sets the global generator"))
        if name.rpartition(".")[2] == "DTensor" and where.as_posix() != "core/shard.py":
            found.append((line, "DTensor outside core/shard.py"))
        if name.rpartition(".")[2] == "triton" and where.name != "triton.py":
            found.append((line, "triton outside ops/*/triton.py"))
    return found


FILES = sorted(HOUSE.rglob("*.py"))


def test_every_file_stands_on_its_floor() -> None:
    assert len(FILES) > 30, "the house was not found"
    wrong = [fault for path in FILES for fault in faults(path)]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("core/bad.py", "from rankshift.ops.lora_linear import op", "core (floor 0) imports ops (floor 1)"),
        ("core/bad.py", "def f():\n    import rankshift.run", "core (floor 0) imports run (floor 6)"),
        ("core/bad.py", "import numpy", "core imports numpy"),
        ("core/bad.py", "from ..methods import lora", "core (floor 0) imports methods (floor 2)"),
        ("ops/bad.py", "from rankshift import optim", "ops (floor 1) imports optim (floor 1)"),
        ("methods/vera.py", "from rankshift.methods.galore import GaLore", "method vera imports method galore"),
        ("methods/vera.py", "from rankshift.io import peft", "methods import io"),
        ("methods/vera.py", "import transformers", "methods imports transformers"),
        ("io/bad.py", "from transformers import AutoModel", "io imports transformers"),
        ("io/bad.py", "import rankshift.train.trainer", "io (floor 3) imports train (floor 7)"),
        ("run.py", "from datasets import Dataset", "run imports datasets"),
        ("ops/x/op.py", "import triton", "triton outside"),
        ("ops/x/op.py", "def f(triton):\n    return triton.jit", "triton outside"),
        ("io/bad.py", "from torch.distributed.tensor import DTensor", "DTensor outside"),
        ("io/bad.py", "import torch\ntorch.distributed.tensor.DTensor", "DTensor outside"),
        ("io/bad.py", "import torch\ntorch.load('x')", "torch.load without"),
        ("io/bad.py", "import torch\ntorch.load('x', weights_only=False)", "torch.load without"),
        ("train/bad.py", "import torch\ntorch.manual_seed(0)", "manual_seed"),
        ("run.py", "import torch\nwith torch.random.fork_rng():\n    torch.manual_seed(0)", "manual_seed"),
        ("train/bad.py", "def f():\n    global x\n    x = 1", "a global statement"),
        ("attic/bad.py", "from rankshift.core import base", "attic stands on no floor"),
    ],
)
def test_a_planted_fault_is_found(file: str, text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert any(says in fault for fault in faults(path, tmp_path)), faults(path, tmp_path)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("methods/vera.py", "from rankshift.core import base\nfrom rankshift.methods.lora import LoRA\nimport torch"),
        ("methods/lora.py", "from rankshift.methods import lora_init"),
        ("ops/x/triton.py", "import triton"),
        ("optim/ok.py", "from rankshift.ops.products import into"),
        ("train/trainer.py", "import transformers\nfrom rankshift.run import Run"),
        (
            "io/ok.py",
            "import torch\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rankshift.run import Run",
        ),
        ("train/ok.py", "import torch\nwith torch.random.fork_rng():\n    torch.manual_seed(0)"),
        ("methods/vera.py", "import torch\ngenerator = torch.Generator(device='cpu').manual_seed(0)"),
        ("core/ok.py", "import os\nimport torch\nfrom . import shard"),
        ("io/ok.py", "import torch\ntorch.load('x', weights_only=True)"),
    ],
)
def test_what_is_allowed_is_allowed(file: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert faults(path, tmp_path) == []
