"""From any method to any other in mid-run: the function stays, training goes on, and it resumes bit for bit."""

from __future__ import annotations

import itertools
import logging
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankshift as rs
from laws.cases import CASES, Case
from laws.world import Session, Tiny, begin, evaluate, gap, same, scramble, tiny
from rankshift.core import shard
from rankshift.core.errors import AttachError
from rankshift.core.method import Method
from rankshift.core.site import Site, base_parameters
from rankshift.methods import LoRA, SoRA
from rankshift.methods.sora import SoRALayer
from rankshift.optim.transform import Optimizer

TOTAL, BEFORE, AFTER = 8, 2, 2  # updates that a run says it will take; that are taken on each side of the shift
# W x + B (A x) against (W + B A) x in float64, numbers of order one, one block deep. One number for all: what a shift
# moves is one product and one sum a weight, in PC-LoRA's fold, (λ − 1) W + B A, and SwitchLoRA's start, W − s·BA, too
TOLERANCE = 1e-12
ADAM = {"exp_avg", "exp_avg_sq", "step"}

FIRST = {name: cases[0] for name, cases in CASES.items()}
EXTRAS = Case("extras", LoRA(rank=2, bias="lora_only", modules_to_save=("head", "norm2"), targets=("q", "up")))
STAGED = SoRA(rank=4, alpha=8, sparsity=(12, 20), gate_init="normal")
PAIRS = [
    *itertools.product(FIRST.values(), repeat=2),
    # biases and whole modules that go on, and what a method of stages hands to its next
    *((EXTRAS, FIRST[to]) for to in ("full", "relora", "switchlora", "galore")),
    *((CASES["lora"][-1], FIRST[to]) for to in ("full", "lora", "paca")),  # DoRA
    *((FIRST[of], EXTRAS) for of in ("full", "relora", "switchlora", "galore")),
    (Case("sora-first", STAGED), Case("sora-second", replace(STAGED, stage=1))),
    (CASES["prelora"][0], CASES["prelora"][1]),
    (CASES["prelora"][1], CASES["prelora"][2]),
]


def shift(before: Case, after: Case) -> None:
    """Two updates, a shift, two more."""
    straight = begin("one", before.method, torch.float64, total=TOTAL)
    saved: dict[str, bytes] = {}
    for _ in range(BEFORE - 1):
        straight.step()
    saved["before the last update"] = straight.save()
    straight.step()
    saved["before the shift"] = straight.save()
    was, trained = states(straight), evaluate(straight.model)
    heirs = open_ranks(straight.run)

    straight, told = shifted(straight, after.method)
    moved = gap(evaluate(straight.model), trained)
    assert moved <= TOLERANCE, f"shift() changes the function by {moved:.3g}"
    saved["after the shift"] = straight.save()
    go_along(straight, was, heirs, told)

    values = {name: p.detach().clone() for name, p in straight.run.trainable()}
    take_first(straight)
    saved["after the first update"] = straight.save()
    for _ in range(AFTER - 1):
        straight.step()
    assert all(map(torch.isfinite, map(torch.tensor, straight.losses))), straight.losses
    passing = {f"{site}.{leaf}" for site, a in straight.run.adapter().items() for leaf in a.derived & a.trains}
    still = [n for n, p in straight.run.trainable() if n not in passing and torch.equal(p, values[n])]
    assert not still, f"{still[:3]} did not move"

    for when, state in saved.items():
        scramble()
        again = Session.load(state, "one", tiny(torch.float64))
        if again.run.step < BEFORE:
            again.step()
        if len(again.run.phases) == 1:
            again, _ = shifted(again, after.method)
        again.steps(BEFORE + AFTER - again.run.step)
        same(straight.state(), again.state(), what=f"resumed from {when}")
        assert history(straight.run) == history(again.run), when
        assert straight.losses[-1:] == again.losses[-1:], when


def shifted(session: Session, method: Method) -> tuple[Session, str]:
    """The next phase with an optimizer of its own, and what that said."""
    said: list[str] = []
    ear = logging.Handler()
    ear.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("rankshift.optim.transform")
    log.addHandler(ear)
    try:
        return Session("one", session.run.shift(method)), " ".join(said)
    finally:
        log.removeHandler(ear)


def history(run: rs.Run) -> dict[str, Any]:
    """What a run says of itself, but for the clock on the wall."""
    return {key: value for key, value in run.describe().items() if key != "listed"}


# ---- moments


def states(session: Session) -> dict[str, dict[str, Tensor]]:
    """A copy of the optimizer's state of every tensor that has one, by name."""
    held = {name: session.optimizer.state.get(p, {}) for name, p in session.run.trainable()}
    return {name: {k: t.clone() for k, t in state.items()} for name, state in held.items() if state}


def open_ranks(run: rs.Run) -> dict[str, Tensor]:
    """Of SoRA's layers, which ranks the next stage takes over."""
    return {s: a.g.detach().nonzero().flatten() for s, a in run.adapter().items() if isinstance(a, SoRALayer)}


def go_along(session: Session, was: dict[str, dict[str, Tensor]], ranks: dict[str, Tensor], told: str) -> None:
    """What goes on training as itself has its moments, exactly; what does not begins without; the log counts them."""
    run, found, on = session.run, states(session), 0
    base = {name for name, _, _ in base_parameters(run.model)}
    inherited = _inherits(run)
    optimizer = session.optimizer
    assert isinstance(optimizer, Optimizer)
    for name, p in run.trainable():
        old = was.get(name, {}) if name in base or inherited else {}
        fresh = optimizer.initial(p)
        if old and ADAM == old.keys() == fresh.keys() and old["step"].shape == fresh["step"].shape:
            site, _, leaf = name.rpartition(".")
            if name not in base and site in ranks:  # the ranks that stayed open
                old = {k: _slots(v, leaf, ranks[site]) for k, v in old.items()}
            same(old, found.get(name, {}), what=f"moments of {name}")
        elif "basis" in old and "basis" in found.get(name, {}):
            for key in ("basis", "exp_avg", "exp_avg_sq", "step"):
                assert torch.equal(old[key], found[name][key]), f"{key} of {name}"
        else:
            assert name not in found, f"{name} has a state from nowhere"
        on += name in found
    count, total = map(int, re.findall(r"go on for (\d+) of (\d+) tensors", told)[0])
    assert (count, total) == (on, len(list(run.trainable()))), told


def _inherits(run: rs.Run) -> bool:
    before, now = (rs.from_dict(phase.method) for phase in run.phases[-2:])
    return type(before) is type(now) and now.inherit(before, run.adapter()) is not None


def _slots(t: Tensor, leaf: str, ranks: Tensor) -> Tensor:
    return t if t.dim() == 0 else t.index_select(1 if leaf == "B" else 0, ranks)


def take_first(session: Session) -> None:
    """The first update: moments go on by Adam's equations from those that were carried, all others from zero."""
    was, gradients = states(session), {}

    def look(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        gradients.update({name: p.grad.clone() for name, p in session.run.trainable() if p.grad is not None})

    handle = session.optimizer.register_step_pre_hook(look)
    session.step()
    handle.remove()
    for name, now in states(session).items():
        if now.keys() == ADAM and now["step"].dim() == 0 and name in gradients:
            m, v, step = (was[name][k] if name in was else 0.0 for k in ("exp_avg", "exp_avg_sq", "step"))
            g = shard.whole(gradients[name])
            assert gap(now["exp_avg"], 0.9 * m + 0.1 * g) <= 1e-15, f"m of {name}"
            assert gap(now["exp_avg_sq"], 0.999 * v + 0.001 * g * g) <= 1e-15, f"v of {name}"
            assert int(now["step"]) == int(step) + 1, f"step of {name}"


@pytest.mark.parametrize(("before", "after"), [pytest.param(a, b, id=f"{a.label}-{b.label}") for a, b in PAIRS])
def test_from_any_method_to_any_other(before: Case, after: Case) -> None:
    shift(before, after)


# ---- without biases


def unbiased() -> Tiny:
    """As Llama is: no linear layer has a bias."""
    model = tiny(torch.float64)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.bias = None
    return model


PLAIN = {**FIRST, "pc-lora": replace(FIRST["pc-lora"], method=replace(FIRST["pc-lora"].method, bias="match"))}
WITH_BIAS = {
    "pc-lora": FIRST["pc-lora"].method,
    "lora": LoRA(rank=2, lora_bias=True),
    "prelora": rs.PreLoRA(then=LoRA(rank=4, alpha=8, lora_bias=True), window=1, windows=2, joint=1, max_rank=8),
}


@pytest.mark.parametrize("before", PLAIN)
def test_from_any_method_to_any_other_where_no_layer_has_a_bias(before: str) -> None:
    for after in PLAIN:
        session = Session("one", rs.attach(unbiased(), PLAIN[before].method, total_steps=TOTAL)).steps(1)
        trained = evaluate(session.model)
        session = Session("one", session.run.shift(PLAIN[after].method))
        moved = gap(evaluate(session.model), trained)
        assert moved <= TOLERANCE, f"{before} to {after} changes the function by {moved:.3g}"
        session.step()
        assert all(p.isfinite().all() for _, p in session.run.trainable())


@pytest.mark.parametrize("kind", WITH_BIAS)
def test_a_bias_that_has_no_place_is_refused_before_the_first_update(kind: str) -> None:
    method, text = WITH_BIAS[kind], r"has no bias to merge that of \w+ into, as is done where Full begins.*match"
    then = rs.Then(rs.Full(), steps=4)
    for first, coming in ((method, [then]), (rs.GaLore(rank=2), [rs.Then(method, steps=3), then])):
        model = unbiased()
        with pytest.raises(AttachError, match=text):
            rs.attach(model, first, total_steps=TOTAL, then=coming)
        rs.attach(model, rs.Full())  # nothing is attached
        if kind == "pc-lora":  # it leaves "down" alone, and all others have a bias
            rs.attach(tiny(), first, total_steps=TOTAL, then=coming)
    rs.attach(unbiased(), rs.Full(), total_steps=TOTAL, then=[rs.Then(method, steps=3)])  # the last stays as it is


@pytest.mark.parametrize("kind", ["pc-lora", "lora"])
def test_a_bias_that_has_no_place_leaves_the_phase_as_it_is(kind: str) -> None:
    session = Session("one", rs.attach(unbiased(), WITH_BIAS[kind], total_steps=TOTAL)).steps(2)
    before = session.state()
    with pytest.raises(AttachError, match=r"has no bias to merge the adapter's bias into\. Nothing was merged"):
        session.run.shift(rs.Full())
    same(before, session.state(), what="a refused shift")
    session.steps(1)


@pytest.mark.parametrize("case", [case for cases in CASES.values() for case in cases], ids=lambda case: case.label)
def test_methods_say_whether_they_need_a_bias(case: Case) -> None:
    run = rs.attach(unbiased(), case.method, total_steps=TOTAL)
    has = any(a.delta_bias() is not None for a in run.adapter().values())
    assert has == (case.method.own_bias and bool(run.adapter()))


# ---- the law bites


_change, _take_over = Site.change, Optimizer.take_over


def half(site: Site) -> Any:
    change = _change(site)
    return lambda rows: 0.5 * change(rows)


def everything(self: Optimizer, states: Any, why: Any) -> None:
    named = [pair for g in self.param_groups for pair in zip(g["param_names"], g["params"], strict=True)]
    others = {n: {"exp_avg": p.clone(), "exp_avg_sq": p.square(), "step": torch.tensor(2.0)} for n, p in named}
    _take_over(self, {**others, **states}, why)


def nothing(self: Optimizer, states: Any, why: Any) -> None:
    _take_over(self, {}, why)


def older(self: Optimizer, states: Any, why: Any) -> None:
    _take_over(self, {name: {**state, "step": state["step"] + 1} for name, state in states.items()}, why)


@pytest.mark.parametrize(
    ("owner", "name", "fault", "pair", "says"),
    [
        (Site, "change", half, ("lora", "full"), "changes the function"),
        (Optimizer, "take_over", everything, ("lora", "vera"), "has a state from nowhere"),
        (Optimizer, "take_over", nothing, ("full", "relora"), "moments of .* only in one"),
        (Optimizer, "take_over", older, ("relora", "full"), "moments of .* step differs"),
    ],
)
def test_a_fault_is_found(
    owner: type, name: str, fault: Any, pair: tuple[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, fault)
    with pytest.raises(AssertionError, match=says):
        shift(FIRST[pair[0]], FIRST[pair[1]])
