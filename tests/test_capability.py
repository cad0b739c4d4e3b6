"""What a method says it can do, against what happens when it is asked to; and methods made to answer otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import rankshift as rs
from laws.laws import Experts
from rankshift import capability
from rankshift.core.adapter import Adapter
from rankshift.core.base import Base
from rankshift.core.errors import ConfigError, UnsupportedLayer
from rankshift.core.event import Event, Moment, Tick
from rankshift.core.form import EmbeddingForm
from rankshift.core.method import _REGISTRY, Method, methods
from rankshift.core.site import Spec
from rankshift.methods import LoRA

REAL: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(160, 160),
    "Conv1D": lambda: Conv1D(160, 160),
    "Conv": lambda: nn.Conv2d(40, 160, 2),
    "Embedding": lambda: nn.Embedding(160, 160),
    "experts": lambda: Experts(3, 160, 160),
}


def disagreements(method: Method) -> list[str]:
    """Kinds of layers where attaching to a real one does other than the method says."""
    wrong = []
    for kind, why in capability.layers(method).items():
        name = "layer.weight" if kind == "experts" else "layer"
        values: dict[str, Any] = {**rs.to_dict(method), "targets": (name,)}
        try:
            total = 4 if method.needs_total else None
            run = rs.attach(nn.ModuleDict({"layer": REAL[kind]()}), rs.from_dict(values), total_steps=total)
            refused = False
            assert run.adapter() or any(p.requires_grad for p in run.model.parameters())
        except UnsupportedLayer:
            refused = True
        if refused != bool(why):
            wrong.append(kind)
    return wrong


@pytest.mark.parametrize("kind", methods().values(), ids=lambda kind: kind.name)
def test_what_is_said_of_layers_is_so(kind: type[Method]) -> None:
    assert disagreements(kind()) == []
    assert capability.layers(kind())["Linear"] == ""


@pytest.mark.parametrize("kind", methods().values(), ids=lambda kind: kind.name)
def test_what_is_said_of_a_base_in_4_bits_is_so(kind: type[Method]) -> None:
    said = capability.probe(kind()).quantised
    try:
        rs.attach(nn.ModuleDict({"layer": nn.Linear(160, 160)}), kind(), base="nf4", total_steps=10_000)
        found = ""
    except (ConfigError, UnsupportedLayer) as error:
        found = str(error)
    assert bool(said) == bool(found)
    assert said.replace("A linear layer", "layer") == found


@pytest.mark.parametrize("kind", methods().values(), ids=lambda kind: kind.name)
def test_what_is_said_of_the_rest_is_so(kind: type[Method], tmp_path: Any) -> None:
    before = torch.random.get_rng_state()
    can = capability.probe(kind())
    assert torch.equal(torch.random.get_rng_state(), before), "asking draws from the global generator"
    assert bool(can.disable) == (not kind.reversible)
    assert can.total == kind().needs_total
    assert len(can.events) == len(kind().events())
    assert all(text.partition(": ")[2] for text in can.events), "an event without a docstring"
    if can.total:
        with pytest.raises(rs.errors.ConfigError, match="total_steps"):
            rs.attach(nn.Sequential(nn.Linear(160, 160)), kind()).optimizer()
    if not can.data:
        rs.attach(nn.Sequential(nn.Linear(160, 160)), kind())


def test_what_stages_ask_for_is_found() -> None:
    staged = dict(capability.variants(methods()["sora"]))["sparsity=(0.1, 0.2)"]
    alone = capability.probe(rs.SoRA())
    assert not alone.total
    assert not alone.second
    assert capability.probe(staged).total
    assert "goes through phases" in capability.probe(staged).second


class Looked(Exception):
    """Data was asked for."""


class Watched:
    """Data that says when it is looked at."""

    def __iter__(self):
        raise Looked


@pytest.mark.parametrize("name", sorted(methods()))
def test_a_method_that_looks_at_data_says_so(name: str) -> None:
    kind = methods()[name]
    for setting, method in [("", kind()), *capability.variants(kind)]:
        model = nn.Sequential(nn.Linear(160, 160))
        looked = False
        try:
            rs.attach(model, method, total_steps=8 if method.needs_total else None, data=Watched())
        except Looked:
            looked = True
        except rs.errors.RankshiftError:
            continue
        assert looked == method.needs_data, setting
        if looked:
            weight = model[0].weight.detach().clone()
            run = rs.attach(model, rs.LoRA(rank=2))
            with pytest.raises(rs.errors.ConfigError, match="looks at data before it starts"):
                run.add("second", method)
            with pytest.raises(rs.errors.ConfigError, match="looks at data before it starts"):
                run.shift(method)
            assert run.adapters == ("default",), "a shift that cannot begin ends nothing"
            run.detach()
            assert torch.equal(model[0].weight, weight)


def test_what_is_known_of_lora() -> None:
    can = capability.probe(LoRA())
    assert not any([*can.layers.values(), can.lora, can.merge, can.disable, can.second, can.total, can.data])
    assert can.shared is None
    assert can.events == ()
    variants = dict(capability.variants(LoRA))
    assert {name for name, method in variants.items() if method.needs_data} == {'init="eva"'}
    assert variants["dora=True"] == LoRA(dora=True)
    assert variants['forward_order="f2"'] == LoRA(forward_order="f2")
    assert 'train="A"' not in variants, "freezes B at zero, so it is refused"
    assert "dora=False" not in variants
    assert "no plain LoRA" in capability.probe(LoRA(dora=True)).lora
    assert "embed_tokens" in capability.layers(LoRA(dora=True))["Embedding"]
    assert capability.probe(rs.Full()).disable


# ---- a method that answers otherwise ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nothing:
    """θ ← θ, by the clock.

    More than is shown.
    """

    moment: Moment = Moment.GRADS

    def due(self, tick: Tick) -> bool:
        return True

    def apply(self, adapter: Adapter, tick: Tick) -> None:
        pass


@dataclass(frozen=True)
class Pair:
    """What all sites share."""

    def describe(self) -> dict[str, Any]:
        return {"generator": "planted"}


@dataclass(frozen=True, kw_only=True)
class Odd(LoRA):
    """Refuses, needs and shares what LoRA does not."""

    name: ClassVar[str] = "odd"
    honest: bool = True

    def fit(self, spec: Spec) -> None:
        if self.honest and isinstance(spec.form, EmbeddingForm):
            raise UnsupportedLayer(f"planted at {spec.name}")

    def adapt(self, base: Base, spec: Spec, rank: int, shared: Any = None) -> Adapter:
        if isinstance(spec.form, EmbeddingForm):
            raise UnsupportedLayer("too late")
        return super().adapt(base, spec, rank)

    @property
    def needs_data(self) -> bool:
        return True

    def survey(self, model: nn.Module, specs: Any, data: Any, seed: int) -> dict[str, Any]:
        list(data)
        return {}

    def share(self, specs: Any, ranks: Any, saved: Any = None) -> Pair:
        return Pair()

    def events(self) -> tuple[Event, ...]:
        return (Nothing(),)

    @property
    def needs_total(self) -> bool:
        return True


_REGISTRY.pop(Odd.name)


@pytest.fixture
def odd() -> Iterator[None]:
    _REGISTRY["odd"] = Odd
    yield
    _REGISTRY.pop("odd")


@pytest.mark.usefixtures("odd")
def test_a_method_is_asked_and_not_assumed() -> None:
    can = capability.probe(Odd())
    assert can.layers == {**dict.fromkeys(capability.LAYERS, ""), "Embedding": "planted at embed_tokens"}
    assert can.total
    assert can.data
    assert can.shared == {"generator": "planted"}
    assert can.events == ("on the gradients: θ ← θ, by the clock.",)


@pytest.mark.usefixtures("odd")
def test_a_method_that_says_one_thing_and_does_another_is_found() -> None:
    class Method(Odd):  # no batches are at hand where real layers are tried
        needs_data = False

        def survey(self, model: nn.Module, specs: Any, data: Any, seed: int) -> dict[str, Any]:
            return {}

    _REGISTRY["odd"] = Method
    assert disagreements(Method()) == []
    assert disagreements(Method(honest=False)) == ["Embedding"]


def test_large_ranks_get_a_large_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert capability.probe(LoRA(rank=300)).lora == ""
    monkeypatch.setattr(capability, "_SIDE", 256)
    with pytest.raises(rs.errors.RankTooLarge):
        capability.probe(LoRA(rank=300))


def test_batches_fit_the_layer() -> None:
    run = capability._attached(LoRA(rank=300))
    (batch,) = capability._Batches(run.model)
    out = run.model(**batch)
    assert out.logits.shape == (64, 1024)
    assert out.loss > 0
