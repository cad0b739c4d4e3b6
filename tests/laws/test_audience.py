"""Events reach the adapters that act now: after others were added, used, deleted and loaded, and in the next phase."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import rankshift as rs
from laws.pulse import Pulse, PulseLayer, registered
from laws.world import batch, loss_of, tiny
from rankshift.methods import GaLore

METHOD = Pulse(rank=2, every=1)  # an event at each moment of every update; the last of them counts


@pytest.fixture(autouse=True)
def _known() -> Iterator[None]:
    with registered(METHOD):
        yield


def heard(run: rs.Run, updates: int = 1) -> dict[str, int]:
    """How many of their sites' events each adapter saw in some updates, as a sum over its sites."""

    def folds() -> dict[str, int]:
        found: dict[str, int] = {}
        for name in run._on.members:
            layers = run.adapter(name).values()
            assert all(isinstance(layer, PulseLayer) for layer in layers)
            found[name] = sum(int(layer.folds) for layer in layers)  # type: ignore[arg-type]
        return found

    before, optimizer = folds(), run.optimizer(lr=1e-2)
    for _ in range(updates):
        loss_of(run.model, batch(run.step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: count - before.get(name, 0) for name, count in folds().items()}


def test_events_follow_adding_using_and_deleting() -> None:
    run = rs.attach(tiny(), METHOD)
    n = len(run.sites)
    assert heard(run, 2) == {"default": 2 * n}
    run.add("second", METHOD)
    assert heard(run) == {"default": n, "second": 0}
    run.use("second")
    assert heard(run) == {"default": 0, "second": n}
    run.use("default", "second")
    assert heard(run) == {"default": n, "second": n}
    run.use("second")
    run.delete("default")
    assert heard(run) == {"second": n}
    run.add("default", METHOD)  # under a name that was there before
    run.use("default")
    assert heard(run) == {"second": 0, "default": n}


def test_an_adapter_deleted_and_added_again_is_another() -> None:
    """Twenty times, for what tells two objects apart may come again."""
    run = rs.attach(tiny(), METHOD)
    n = len(run.sites)
    for _ in range(20):
        run.add("second", METHOD)
        run.use("second")
        assert heard(run) == {"default": 0, "second": n}
        run.delete("second")
        run.use("default")


def test_events_follow_what_is_loaded() -> None:
    two = rs.attach(tiny(), METHOD)
    two.add("second", METHOD)
    two.use("second")
    heard(two)
    run = rs.attach(tiny(), METHOD)
    n = len(run.sites)
    assert heard(run) == {"default": n}
    run.load_state_dict(two.state_dict())
    assert run.active == ("second",)
    assert heard(run) == {"default": 0, "second": n}


@pytest.mark.parametrize("first", [METHOD, GaLore(rank=3, every=1, gradient="projected")], ids=lambda m: m.name)
def test_events_of_the_next_phase_reach_its_layers(first: rs.Method) -> None:
    """What a projected gradient is renewed by, and folded into the weight by, are events."""
    run = rs.attach(tiny(), first)
    optimizer = run.optimizer(lr=1e-2)
    loss_of(run.model, batch(0)).backward()
    optimizer.step()
    run = run.shift(GaLore(rank=2, every=1, stagger=False, gradient="projected"))
    optimizer = run.optimizer(lr=1e-2)
    names = [f"{site}.weight" for site in run.sites]
    before = {name: site.base.weight.detach().clone() for name, site in run.sites.items()}
    for i in range(3):
        loss_of(run.model, batch(1 + i)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {row.name: row.renewals for row in run.subspace_table().rows} == dict.fromkeys(names, 3)
    assert not [name for name, site in run.sites.items() if torch.equal(site.base.weight, before[name])]
