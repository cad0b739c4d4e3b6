"""An update that is launched before anybody knows whether its gradients are finite: on a GPU nobody waits for that."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import rankshift as rs
from laws.pulse import Pulse, registered
from laws.world import batch, loss_of, tiny
from rankshift.core import event
from rankshift.core.errors import NonFinite
from rankshift.core.event import Driver

METHODS = [
    rs.Full(),
    rs.LoRA(rank=2, modules_to_save=("head",)),
    rs.GaLore(rank=3, every=5, stagger=False, gradient="projected"),
    rs.GaLore(rank=3, every=15, gradient="projected", rounding="stochastic", transport="reset", begin=2),
    rs.GaLore(rank=3, every=0, gradient="projected", rest="freeze"),
    rs.VeRA(rank=4),
    rs.SwitchLoRA(rank=4, interval=6.0, freeze=2),
]
names = [f"{m.name}-{i}" for i, m in enumerate(METHODS)]


def trained(
    method: rs.Method, spoilt: tuple[int, ...] = (), steps: int = 6, dtype: torch.dtype = torch.float64, wd: float = 0.1
) -> tuple[rs.Run, Any, list[dict[str, Any]]]:
    """A run whose gradients are spoilt in some updates; and its whole state after each."""
    model = tiny(dtype)
    run = rs.attach(model, method, seed=3, total_steps=steps)
    optimizer = run.optimizer(lr=1e-2, weight_decay=wd)
    seen = []
    for step in range(steps):
        loss_of(model, batch(0)).backward()
        if step in spoilt:
            last = [p for _, p in run.trainable() if p.grad is not None][-1]
            last.grad.view(-1)[0] = float("nan")  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        parts = {"model": model, "run": run, "optimizer": optimizer}
        seen.append(copy.deepcopy({name: part.state_dict() for name, part in parts.items()}))
    return run, optimizer, seen


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """As on a GPU; whether each judged update was launched before its verdict."""
    asked: list[bool] = []
    may = Driver._may_go_ahead

    def noted(self: Driver, *args: Any) -> bool:
        asked.append(may(self, *args))
        return asked[-1]

    monkeypatch.setattr(event, "_on_one_gpu", lambda gradients: True)
    monkeypatch.setattr(Driver, "_may_go_ahead", noted)
    return asked


def flat(state: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flat(value, f"{prefix}{key}/").items()}
    if isinstance(state, (list, tuple)):
        return flat(dict(enumerate(state)), prefix)
    return {prefix: state}


def difference(a: Any, b: Any) -> tuple[float, list[str]]:
    """The largest between tensors, and what else is not equal."""
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    tensors = [key for key, value in a.items() if isinstance(value, torch.Tensor)]
    gap = max(float((a[key].double() - b[key].double()).abs().max()) for key in tensors if a[key].numel())
    return gap, [key for key in a if key not in tensors and a[key] != b[key]]


@pytest.mark.parametrize("method", METHODS, ids=names)
def test_it_is_the_update_that_waits(method: rs.Method, ahead: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    *_, launched = trained(method)
    assert ahead.count(True) >= 3, ahead
    assert not ahead[0], "the first update is checked before it is taken"
    monkeypatch.setattr(event, "_on_one_gpu", lambda gradients: False)
    *_, waited = trained(method)
    gap, other = difference(launched[-1], waited[-1])
    assert gap < 1e-8  # another kernel's rounding
    assert not other


@pytest.mark.parametrize("method", METHODS, ids=names)
def test_a_void_update_changes_nothing_but_the_count(method: rs.Method, ahead: list[bool]) -> None:
    spoilt = 4  # nothing is renewed there: a period of 15 has its moments at 0, 3, 6, …
    run, optimizer, states = trained(method, (spoilt,))
    assert ahead[spoilt], "else this shows nothing"
    before, after = states[spoilt - 1], states[spoilt]
    gap, other = difference(before, after)
    assert gap == 0
    assert {key.rstrip("/").rpartition("/")[2] for key in other} == {"skipped"}
    assert run.skipped == 1
    assert run.step == 5
    assert optimizer.void is None


def test_what_was_void_is_taken_again(ahead: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    method = METHODS[2]
    *_, spoilt = trained(method, (2, 4), steps=8)
    assert ahead[2] or ahead[4]
    *_, whole = trained(method, steps=6)
    gap, other = difference(spoilt[-1], whole[-1])
    assert gap < 1e-8  # another kernel's rounding
    assert {key.rstrip("/").rpartition("/")[2] for key in other} <= {"skipped", "total_steps"}


def test_twenty_void_updates_end_the_run(ahead: list[bool]) -> None:
    with pytest.raises(rs.errors.NonFinite, match="20 updates in a row"):
        trained(METHODS[0], tuple(range(1, 40)), steps=40)
    assert all(ahead[1:])


def test_events_see_no_void_update(ahead: list[bool]) -> None:
    with registered(Pulse()):
        run, *_ = trained(Pulse(rank=2, every=1), (3,))
    assert not any(ahead), "its event at GRADS must see finite gradients"
    assert run.skipped == 1
    sora = rs.SoRA(rank=3, sparsity=3.0)
    run, _, states = trained(sora, (3,))
    assert ahead[3 + 6]
    assert difference(states[2]["run"]["tensors"], states[3]["run"]["tensors"])[0] == 0, "no gate was moved"


@pytest.mark.parametrize(
    "method",
    [rs.AdaRankGrad(rank=3), rs.GaLore(rank=3), rs.GaLore(rank=3, gradient="projected", transport="square")],
    ids=["adarankgrad", "galore", "galore-square"],
)
def test_who_decides_on_the_host_waits(method: rs.Method, ahead: list[bool]) -> None:
    trained(method, steps=3)
    assert not any(ahead)


def test_a_step_that_an_error_ended_leaves_no_verdict_behind(
    ahead: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(torch.float64)
    run = rs.attach(model, rs.Full())
    optimizer = run.optimizer(lr=1e-2)

    def update(spoil: bool = False) -> None:
        loss_of(model, batch(0)).backward()
        if spoil:
            next(p for _, p in run.trainable()).grad.fill_(float("nan"))  # type: ignore[union-attr]
        optimizer.step()

    update()
    optimizer.zero_grad()
    with monkeypatch.context() as broken:
        broken.setattr(type(optimizer), "_advance", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            update(spoil=True)
    assert ahead[-1]
    optimizer.zero_grad()
    monkeypatch.setattr(event, "_on_one_gpu", lambda gradients: False)
    before = {name: p.detach().clone() for name, p in run.trainable()}
    update()
    assert all(not torch.equal(p, before[name]) for name, p in run.trainable() if p.grad is not None)


def test_a_void_update_without_a_gradient_inside_is_skipped_like_any_other(ahead: list[bool]) -> None:
    run, optimizer, _ = trained(METHODS[4].__class__(rank=3, every=0, gradient="projected"), steps=3)
    for name, p in run.trainable():
        p.grad = None if name.endswith(".subspace") else torch.full_like(p, float("nan"))
    run._driver._witness.forward = True
    optimizer.step()
    assert ahead[-1]
    assert (run.skipped, run.step) == (1, 3)
    assert all(p.grad is None for _, p in run.trainable())


@pytest.mark.parametrize("method", [rs.LoRA(rank=2), rs.VeRA(rank=4), rs.PaCA(rank=2)], ids=lambda m: m.name)
@pytest.mark.parametrize("spoilt", [(), (2,), (2, 3), (5,)])
def test_nobody_waits_at_the_end_of_an_update_where_nothing_has_to_know(
    method: rs.Method, spoilt: tuple[int, ...], ahead: list[bool]
) -> None:
    def trained(look: bool) -> dict[str, Any]:
        model = tiny(torch.float64)
        run = rs.attach(model, method, seed=3, total_steps=6)
        optimizer = run.optimizer(lr=1e-2)
        for step in range(6):
            loss_of(model, batch(step)).backward()
            if step in spoilt:
                next(p for _, p in run.trainable()).grad.view(-1)[0] = float("nan")  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
            if look:
                assert run.step + run.skipped == step + 1
            else:
                assert (run._driver._owed is not None) == (step > 0)  # of the first update much is asked
        assert run.skipped == len(spoilt)
        return {"run": run.state_dict(), "optimizer": optimizer.state_dict(), "model": model.state_dict()}

    waiting = trained(look=True)
    assert False not in ahead[1:]
    assert len(ahead) > 1
    assert difference(waiting, trained(look=False)) == (0.0, [])


def test_too_many_in_a_row_are_told_by_the_next_update(ahead: list[bool]) -> None:
    model = tiny(torch.float64)
    run = rs.attach(model, rs.LoRA(rank=2), total_steps=50)
    optimizer = run.optimizer(lr=1e-2)

    def train() -> None:
        for step in range(50):
            loss_of(model, batch(step)).backward()
            if step:
                next(p for _, p in run.trainable()).grad.view(-1)[0] = float("nan")  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()

    with pytest.raises(NonFinite, match="in a row"):
        train()


def test_a_copied_optimizer_owes_nothing(ahead: list[bool]) -> None:
    model = tiny(torch.float64)
    run = rs.attach(model, rs.LoRA(rank=2), total_steps=9)
    optimizer = run.optimizer(lr=1e-2)
    for step in range(3):
        loss_of(model, batch(step)).backward()
        if step == 2:
            next(p for _, p in run.trainable()).grad.view(-1)[0] = float("nan")  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    copied = copy.deepcopy(optimizer)
    assert {float(state["step"]) for state in copied.state.values()} == {2.0}
    assert (copied.param_groups[0]["updates"], copied.param_groups[0]["skipped"]) == (2, 1)


def test_state_that_was_cleared_is_not_counted_back(ahead: list[bool]) -> None:
    model = tiny(torch.float64)
    run = rs.attach(model, rs.LoRA(rank=2), total_steps=9)
    optimizer = run.optimizer(lr=1e-2)
    for step in range(4):
        loss_of(model, batch(step)).backward()
        if step == 1:
            next(p for _, p in run.trainable()).grad.view(-1)[0] = float("nan")  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            optimizer.state.clear()
    assert (run.step, run.skipped) == (3, 1)
