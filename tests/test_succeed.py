"""A shift whose method goes on with the tensors of the one before: what is taken over, what goes, what stays."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import rankshift as rs
from laws.pulse import registered
from rankshift.core.adapter import Adapter
from rankshift.core.event import Event, Moment, Tick
from rankshift.core.method import _REGISTRY, Estate, Method
from rankshift.core.site import Site
from rankshift.methods.lora import LoRALayer
from test_run import IDS, bits, net, out, stir


@dataclass(frozen=True)
class Note:
    """Writes the rank of the adapter that it met into the list of the class."""

    moment: ClassVar[Moment] = Moment.WINDOW
    met: ClassVar[list[tuple[int, str, int]]] = []

    def due(self, tick: Tick) -> bool:
        return True

    def apply(self, adapter: Adapter, tick: Tick) -> None:
        self.met.append((tick.step, adapter.site, adapter.rank))


@dataclass(frozen=True)
class Told:
    """What sites share: here what the method was told of them."""

    ranks: dict[str, int]

    def describe(self) -> dict[str, Any]:
        return {"ranks": self.ranks}


@dataclass(frozen=True, kw_only=True)
class Heir(rs.LoRA):
    """LoRA that goes on with the first ranks of a LoRA, and leaves the sites in ``drop`` alone."""

    name: ClassVar[str] = "test_heir"
    keep: int = 2
    drop: tuple[str, ...] = ()
    forbidden: str = ""

    def fit(self, spec: Any) -> None:
        super().fit(spec)
        if spec.name == self.forbidden:
            raise rs.errors.UnsupportedLayer(f"{spec.name} is forbidden")

    def share(self, specs: Any, ranks: Mapping[str, int], saved: Any = None) -> Told:
        assert {spec.name for spec in specs} == ranks.keys()
        return Told(dict(ranks))

    def adapt(self, base: Any, spec: Any, rank: int, shared: Any = None) -> Adapter:
        assert shared.ranks[spec.name] == rank
        return LoRALayer(base, spec, rank, self.alpha / self.rank, self)

    def events(self) -> tuple[Event, ...]:
        return (Note(),)

    def inherit(self, before: Method, adapters: Mapping[str, Adapter]) -> Mapping[str, Estate] | None:
        if not isinstance(before, rs.LoRA):
            return None
        k = self.keep
        return {
            site: Estate(k, {"A": a.A[:k].detach(), "B": a.B[:, :k].detach()})  # type: ignore[index]
            for site, a in adapters.items()
            if site not in self.drop
        }


_REGISTRY.pop(Heir.name)  # defining it registered it


@pytest.fixture(autouse=True)
def known() -> Any:
    Note.met.clear()
    with registered(Heir()):
        yield


HEIR = Heir(rank=4, keep=2, drop=("second",), targets=("first", "second", "head"))
LORA = rs.LoRA(rank=4, targets=("first", "second", "head"))


def begun(method: rs.LoRA = LORA, steps: int = 2) -> tuple[Any, rs.Run, Any]:
    model = net().train()
    run = rs.attach(model, method, seed=1, total_steps=9)
    optimizer = run.optimizer(lr=1e-2)
    stir(run)
    for _ in range(steps):
        model(IDS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, run, optimizer


def test_tensors_are_taken_over_and_the_base_is_not_touched():
    model, run, _ = begun()
    old = {site: (a.A.detach().clone(), a.B.detach().clone()) for site, a in run.adapter().items()}
    before, parameters = bits(model), {n: id(p) for n, p in model.named_parameters() if "adapters" not in n}
    after = run.shift(HEIR)
    assert list(after.adapter()) == ["first", "head"]
    for site, adapter in after.adapter().items():
        assert torch.equal(adapter.A, old[site][0][:2])
        assert torch.equal(adapter.B, old[site][1][:, :2])
        assert adapter.site == site
        assert adapter.base is model.get_submodule(site).base
        assert adapter.training
    assert bits(model) == before
    assert after.changed == set()
    now = {n: id(p) for n, p in model.named_parameters() if "adapters" not in n}
    # the layer that has no site now stands there itself, with the same parameter
    assert now == {n.replace("second.base.", "second."): i for n, i in parameters.items()}
    assert type(model.second) is torch.nn.Linear
    assert isinstance(model.first, Site)


def test_the_function_is_that_of_what_was_taken_over():
    model, run, _ = begun()
    old = {site: (a.A.detach().clone(), a.B.detach().clone()) for site, a in run.adapter().items()}
    run.shift(HEIR)
    plain = net()
    with torch.no_grad():
        for site in ("first", "head"):
            A, B = old[site]
            getattr(plain, site).weight += 32 / 4 * B[:, :2] @ A[:2]
    assert (out(model) - out(plain)).abs().max() < 1e-12


def test_the_run_goes_on_and_the_old_one_is_closed():
    model, run, optimizer = begun()
    after = run.shift(HEIR)
    assert (after.step, after.seed, after.total_steps, after.active) == (2, 1, 9, ("default",))
    assert [(p.method["method"], p.start, p.stop) for p in after.phases] == [("lora", 0, 2), ("test_heir", 2, None)]
    assert Note.met == [(2, "first", 2), (2, "head", 2)], "its window was opened, on the new adapters"
    with pytest.raises(rs.errors.AttachError, match="ended with shift"):
        run.merge()
    model(IDS).square().mean().backward()
    with pytest.raises(rs.errors.AttachError, match="no longer drives a run"):
        optimizer.step()
    fresh = after.optimizer(lr=1e-2)
    assert not fresh.state
    model(IDS).square().mean().backward()
    fresh.step()
    assert after.step == 3
    assert all(int(state["step"]) == 1 for state in fresh.state.values())
    assert {n.rpartition(".")[0] for n, _ in after.trainable()} == {"first", "head"}


def test_events_know_when_the_phase_began():
    began: list[tuple[int, int]] = []

    class Since(Note):
        def due(self, tick: Tick) -> bool:
            began.append((tick.step, tick.began))
            return False

    class Later(Heir):
        name: ClassVar[str] = ""

        def events(self) -> tuple[Event, ...]:
            return (Since(),)

    _, run, _ = begun(steps=3)
    run.shift(Later(rank=4, keep=2))
    assert set(began) == {(3, 3)}


@pytest.mark.parametrize("factor", [1, 2])
def test_moments_go_along_with_values_and_not_with_others(factor: int, caplog: pytest.LogCaptureFixture):
    class Other(Heir):
        name: ClassVar[str] = ""

        def inherit(self, before: Method, adapters: Mapping[str, Adapter]) -> Mapping[str, Estate] | None:
            return {s: Estate(4, {"A": factor * a.A.detach(), "B": a.B.detach()}) for s, a in adapters.items()}

    _, run, _ = begun()
    after = run.shift(Other(rank=4, keep=4))
    optimizer = after.optimizer(lr=1e-2)
    kept = {name.rpartition(".")[2] for name, p in after.trainable() if optimizer.state.get(p)}
    assert kept == ({"A", "B"} if factor == 1 else {"B"})
    assert ("(first.A, second.A, head.A), which begin with other values" in caplog.text) is (factor == 2)


def test_gradients_of_the_phase_before_are_gone():
    model, run, _ = begun(rs.LoRA(rank=4, targets=("first", "second"), modules_to_save=("head",)))
    model(IDS).square().mean().backward()
    after = run.shift(Heir(rank=4, targets=("first", "second"), modules_to_save=("head",)))
    assert [n for n, p in model.named_parameters() if p.grad is not None] == []
    assert list(after.adapter()) == ["first", "second"]


def test_whole_copies_stay_as_they_are():
    model, run, _ = begun(rs.LoRA(rank=4, targets=("first", "second"), modules_to_save=("head",)))
    copied = {name: (id(p), p.detach().clone()) for name, p in run.trainable() if name.startswith("head")}
    after = run.shift(Heir(rank=4, targets=("first", "second"), modules_to_save=("head",)))
    still = {name: p for name, p in after.trainable() if name.startswith("head")}
    assert still.keys() == copied.keys() == {"head.weight", "head.bias"}
    assert all(id(p) == copied[name][0] and torch.equal(p, copied[name][1]) for name, p in still.items())
    assert torch.equal(model.head.base.weight, net().head.weight)


def test_saved_and_restored_in_the_second_phase():
    model, run, _ = begun()
    after = run.shift(HEIR)
    wanted = out(model)
    state = after.state_dict()
    assert state["adapters"]["default"]["ranks"] == {"first": 2, "head": 2}
    assert state["adapters"]["default"]["shared"] == {"ranks": {"first": 2, "head": 2}}
    assert not any(name.startswith("base/") for name in state["tensors"])
    again = rs.restore(net(), state)
    assert torch.equal(out(again.model), wanted)
    with after.disabled():
        assert torch.equal(out(model), out(net()))
    after.detach()
    assert bits(model) == bits(net())


def test_a_layer_that_cannot_be_stood_at_ends_nothing():
    model, run, optimizer = begun()
    before = out(model)
    with pytest.raises(rs.errors.UnsupportedLayer, match="head is forbidden"):
        run.shift(Heir(rank=4, forbidden="head"))
    assert torch.equal(out(model), before)
    assert run.method == LORA
    model(IDS).square().mean().backward()
    optimizer.step()
    assert run.step == 3


@pytest.mark.parametrize("why", ["a second adapter", "other copies", "biases in place"])
def test_folded_where_taking_over_would_leave_something_behind(why: str):
    method = {"biases in place": rs.LoRA(rank=4, bias="lora_only", targets=("first", "head"))}.get(why, LORA)
    model, run, _ = begun(method)
    if why == "a second adapter":
        run.add("second", rs.LoRA(rank=1))
        run.delete("second")  # one adapter again: taken over
        run.add("third", rs.LoRA(rank=1))
    before = out(model)
    other = Heir(rank=4, targets=("first", "second"), modules_to_save=("head",) if why == "other copies" else ())
    with pytest.warns(UserWarning, match="third") if why == "a second adapter" else contextlib.nullcontext():
        after = run.shift(other)
    assert "first.weight" in after.changed
    assert all(adapter.rank == 4 for adapter in after.adapter().values())
    assert (out(model) - before).abs().max() < 1e-12


def test_what_a_site_knew_of_its_base_is_known_when_it_is_gone():
    model, run, _ = begun()
    site = run.sites["second"]
    site.base.add_(lambda rows: torch.ones(rows.stop - rows.start, 14, dtype=torch.float64))
    assert run.changed == {"second.weight"}
    after = run.shift(HEIR)
    assert "second" not in after.sites
    assert after.changed == {"second.weight"}
    assert "base/second.weight" in after.state_dict()["tensors"]
    assert torch.equal(model.second.weight, net().second.weight + 1)


def test_metrics_are_those_of_the_active_adapters():
    class Counting(Heir):
        name: ClassVar[str] = ""

        def metrics(self, adapters: Mapping[str, Adapter]) -> dict[str, float]:
            return {"sites": len(adapters)}

    run = rs.attach(net(), LORA)
    assert run.metrics() == {}
    run.add("second", Counting(rank=1, targets=("first", "head")))
    assert run.metrics() == {}
    run.use("default", "second")
    assert run.metrics() == {"second_sites": 2}
