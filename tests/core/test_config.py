"""Methods as data: strict, complete, and the same on the way back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

import rankshift as rs
from rankshift.core.config import check_keys, conform, conform_fields, describe, field_docs
from rankshift.core.errors import ConfigError
from rankshift.core.method import methods

METHODS = methods()


@pytest.mark.parametrize(
    ("value", "hint", "result"),
    [
        (3, int, 3),
        (3, float, 3.0),
        ("a", str, "a"),
        (None, int | None, None),
        ([1, 2], tuple[int, ...], (1, 2)),
        (["q", "k"], str | tuple[str, ...], ("q", "k")),
        ("q", str | tuple[str, ...], "q"),
        ([1, 0.5], tuple[int, float], (1, 0.5)),
        ({"a": 1}, Mapping[str, float], {"a": 1.0}),
        ("x", Literal["x", "y"], "x"),
        ({"any": [1]}, Any, {"any": [1]}),
        (True, bool, True),
    ],
)
def test_conforming_values(value: object, hint: object, result: object):
    got = conform(value, hint, "here")
    assert got == result
    assert type(got) is type(result)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (True, int),
        (True, float),
        (1, bool),
        (1.0, int),
        ("1", int),
        ("1e-4", float),
        (1, str),
        (None, int),
        ("ab", tuple[str, ...]),
        ([1, 2, 3], tuple[int, float]),
        ([1, "b"], tuple[int, ...]),
        ({"a": "b"}, Mapping[str, float]),
        ([("a", 1.0)], Mapping[str, float]),
        ("z", Literal["x", "y"]),
        (1.0, Literal[1, 2]),
        (True, Literal[1, 2]),
        ([], int | None),
    ],
)
def test_other_values_are_refused(value: object, hint: object):
    with pytest.raises(ConfigError, match=r"^here"):
        conform(value, hint, "here")


def test_a_literal_names_the_nearest():
    with pytest.raises(ConfigError, match=r"Did you mean 'rslora'"):
        rs.LoRA(scaling="rslor")  # type: ignore[arg-type]


@dataclass(frozen=True)
class Inner:
    width: int = 1


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        conform_fields(self)


def test_nested():
    assert Outer(inner={"width": 3}, names=["a"]) == Outer(Inner(3), ("a",))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"no field 'widht'. Did you mean 'width'"):
        Outer(inner={"widht": 3})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"Outer\.names\[1\] = 2 is not text"):
        Outer(names=["a", 2])  # type: ignore[list-item]


def test_descriptions():
    assert describe(int | None) == "an integer or none"
    assert describe(tuple[str, ...]) == "a list (text)"
    assert describe(Mapping[str, int]) == "a mapping (text → an integer)"
    assert describe(Literal["a", 1]) == "one of 'a', 1"


def test_unknown_keys():
    with pytest.raises(ConfigError, match=r"LoRA has no field 'rnak'. Did you mean 'rank'"):
        rs.LoRA(rnak=3)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"no field 'xyzzy'\. Known: .*begin.*transport\.$"):  # all of them
        rs.GaLore(xyzzy=1)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"method lora has no field 'alhpa'. Did you mean 'alpha'"):
        rs.from_dict({"method": "lora", "alhpa": 3})
    with pytest.raises(ConfigError, match=r"no method 'lroa'. Did you mean 'lora'"):
        rs.from_dict({"method": "lroa"})
    for bad in ({}, {"rank": 3}, "lora", None):
        with pytest.raises(ConfigError, match=r"A method is written as"):
            rs.from_dict(bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"no field 'nam'"):
        check_keys(Outer, {"nam": ()}, "here")


@pytest.mark.parametrize("name", METHODS)
def test_round_trip(name: str):
    method = rs.from_dict({"method": name})
    assert type(method) is METHODS[name]
    values = rs.to_dict(method)
    assert values["method"] == name
    assert set(values) == {"method", *(f.name for f in dataclasses.fields(method))}
    again = rs.from_dict(json.loads(json.dumps(values)))
    assert again == method
    assert rs.to_dict(again) == values


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_frozen_and_keyword_only(name: str):
    method = rs.from_dict({"method": name})
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.targets = "x"  # type: ignore[misc]
    with pytest.raises((TypeError, ConfigError)):
        METHODS[name]("all-linear")  # type: ignore[call-arg]


@pytest.mark.parametrize("name", METHODS)
def test_every_field_is_documented(name: str):
    docs = field_docs(METHODS[name])
    for field in dataclasses.fields(METHODS[name]):
        assert len(docs.get(field.name, "")) > 15, f"{name}.{field.name} has no string under it"
        assert docs[field.name].endswith("."), f"{name}.{field.name}"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is(name: str):
    kind = METHODS[name]
    assert kind.name == name
    assert kind.summary
    assert kind.formula
    assert "arXiv" in kind.paper
    assert kind.__doc__


def test_every_value_round_trips():
    method = rs.LoRA(
        rank=4, alpha=8, targets=("q_proj", "v_proj"), exclude=("layers.0",), rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 3}, scaling="rslora", init="pissa", dora=True, lr_ratio=16,
        bias="lora_only", modules_to_save=("score",), tied="untie", forward_order="f1", backward_order="b5",
    )  # fmt: skip
    for one in (method, rs.LoRA(dropout=0.1)):
        assert rs.from_dict(json.loads(json.dumps(rs.to_dict(one)))) == one


def test_the_callers_containers_are_not_kept():
    pattern = {"q_proj": 2}
    method = rs.LoRA(rank_pattern=pattern)
    pattern["q_proj"] = 99
    assert method.rank_pattern == {"q_proj": 2}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"rank": 0}, "rank 0 at 'rank' is below 1"),
        ({"rank_pattern": {"q_proj": 0}}, "rank 0 at 'q_proj' is below 1"),
        ({"rank": 2.5}, "LoRA.rank = 2.5 is not an integer"),
        ({"rank": True}, "LoRA.rank = True is not an integer"),
        ({"alpha": 0}, "alpha 0.0 at 'alpha' is not a positive number"),
        ({"alpha": float("nan")}, "is not a positive number"),
        ({"alpha_pattern": {"q": -1}}, "alpha -1.0 at 'q'"),
        ({"dropout": 1}, r"LoRA.dropout = 1.0 is not in \[0, 1\)"),
        ({"dropout": float("nan")}, "LoRA.dropout"),
        ({"lr_ratio": 0}, "lr_ratio"),
        ({"lr_ratio": float("nan")}, "lr_ratio"),
        ({"eva_ratio": 0.5}, "eva_ratio"),
        ({"eva_tau": 1.5}, "eva_tau"),
        ({"train": "A"}, "nothing can learn"),
        ({"precondition": True}, 'needs train="B"'),
        ({"dora": True, "lora_bias": True}, "no bias on B"),
        ({"init": "orthogonal", "rank": 3}, "must be even"),
        ({"train": "B", "backward_order": "b1"}, "keeps the layer's input"),
        ({"dropout": 0.1, "forward_order": "f1"}, "dropout composes the layer"),
        ({"dropout": 0.1, "backward_order": "b1"}, "dropout composes the layer"),
        ({"targets": 3}, "LoRA.targets = 3 is not text or a list"),
        ({"tied": "maybe"}, "is not one of 'refuse', 'untie'"),
    ],
)
def test_lora_refuses(fields: dict[str, Any], text: str):
    with pytest.raises(ConfigError, match=text):
        rs.LoRA(**fields)


@pytest.mark.parametrize("name", ["pc-lora", "pc_lora", "PCLoRA", "PC-LoRA", "pclora"])
def test_a_methods_name_in_any_spelling(name):
    assert rs.from_dict({"method": name, "rank": 4}) == rs.PCLoRA(rank=4)
    with pytest.raises(ConfigError, match=r"There is no method .pc-lore.\. Did you mean"):
        rs.from_dict({"method": "pc-lore"})
