"""The public names, exactly; what each is documented as; and the signatures that others build on."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import rankshift as rs
from rankshift.core.config import field_docs
from rankshift.methods import methods

NAMES = {
    "AdaRankGrad",
    "FlatLoRA",
    "Full",
    "GaLore",
    "LoRA",
    "MELoRA",
    "Method",
    "PCLoRA",
    "PaCA",
    "PreLoRA",
    "RankshiftError",
    "ReLoRA",
    "Run",
    "SoRA",
    "SwitchLoRA",
    "Then",
    "Trainer",
    "VeRA",
    "__version__",
    "attach",
    "errors",
    "from_dict",
    "load",
    "load_compressed",
    "restore",
    "to_dict",
}


def test_the_names_are_these() -> None:
    assert set(rs.__all__) == NAMES
    assert len(rs.__all__) == len(set(rs.__all__)) <= 30
    assert sorted(rs.__all__) == list(rs.__all__)
    assert set(dir(rs)) == set(rs.__all__)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(rs.__file__).read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    typed = {alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed | {"__version__"} == NAMES


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'attatch'"):
        rs.attatch  # noqa: B018


def undocumented(value: Any, name: str) -> list[str]:
    """Public callables in ``value`` without a docstring (a method may have that of the verb it overrides)."""
    missing = [] if inspect.getdoc(value) else [name]
    if inspect.isclass(value) and value.__module__.startswith("rankshift"):
        for leaf, member in vars(value).items():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if leaf.startswith("_") or not inspect.isfunction(function):
                continue
            if not inspect.getdoc(getattr(value, leaf)):
                missing.append(f"{name}.{leaf}")
    return missing


def test_every_public_callable_has_a_docstring() -> None:
    missing: list[str] = []
    for name in sorted(NAMES - {"__version__"}):
        value = getattr(rs, name)
        if isinstance(value, ModuleType):
            for leaf, member in vars(value).items():
                if inspect.isclass(member) and member.__module__ == value.__name__:
                    missing += undocumented(member, f"{name}.{leaf}")
        else:
            missing += undocumented(value, name)
    assert not missing, missing


def test_a_callable_without_one_is_found() -> None:
    class Bare:
        """Documented, unlike its method."""

        def verb(self) -> None:
            pass

    Bare.__module__ = "rankshift.planted"
    assert undocumented(Bare, "Bare") == ["Bare.verb"]


@pytest.mark.parametrize("kind", sorted(methods().values(), key=lambda m: m.name), ids=lambda m: m.name)
def test_every_field_of_a_method_says_what_it_is(kind: type[rs.Method]) -> None:
    docs = field_docs(kind)
    missing = [f.name for f in dataclasses.fields(kind) if not docs.get(f.name)]
    assert not missing, f"put a string under {missing}"
    assert kind.paper
    assert kind.summary
    assert kind.formula
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert rs.from_dict(rs.to_dict(kind())) == kind(), "working defaults, and there and back"


def test_the_signatures_are_those_of_the_design() -> None:
    def parameters(function: Any) -> list[str]:
        return [name for name in inspect.signature(function).parameters if name != "self"]

    assert parameters(rs.attach)[:5] == ["model", "method", "base", "seed", "total_steps"]
    assert parameters(rs.load)[:2] == ["model", "directory"]
    assert parameters(rs.Run.optimizer)[:2] == ["lr", "weight_decay"]
    assert parameters(rs.Run.export)[:3] == ["directory", "format", "profile"]
    assert parameters(rs.Run.shift)[0] == "method"
    for verb in (
        "summary",
        "disabled",
        "merged",
        "merge",
        "detach",
        "state_dict",
        "load_state_dict",
        "save",
        "describe",
    ):
        assert callable(getattr(rs.Run, verb))


def test_a_typo_names_the_nearest_field() -> None:
    with pytest.raises(rs.RankshiftError, match="rank"):
        rs.LoRA(rnak=8)  # type: ignore[call-arg]
