"""PreLoRA: when it goes on, with which ranks, what moves in which stage, and what is left of the one before."""

from __future__ import annotations

import gc
import json
import math
import re
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

import rankshift as rs
from laws.world import Session, begin, evaluate, same, tiny
from rankshift.core.errors import ConfigError, RankTooLarge, TargetError, TiedWeights, TrainingError, UnsupportedLayer
from rankshift.core.random import Key, normal
from rankshift.core.site import Site
from rankshift.methods.prelora import ladder

D = torch.float64
NEVER = 10**9


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class Net(nn.Module):
    """Four blocks of two families, "blocks.up" and "blocks.down", and what no adapter stands at."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 5)
        self.blocks = nn.Sequential(*(Block() for _ in range(blocks)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(ids)))


IDS = torch.arange(33).reshape(3, 11) % 11
SITES = [f"blocks.{i}.{leaf}" for i in range(4) for leaf in ("up", "down")]
TARGETS = ("up", "down")


def net(dtype: torch.dtype = D) -> Net:
    model = Net().to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(normal(Key(0) / name, tuple(p.shape), 0.4, dtype=D))
    return model.train()


def of(**more: Any) -> rs.PreLoRA:
    """Converged at the first look, after 2 windows of 2; 3 updates of both; ranks 1 to 8."""
    return rs.PreLoRA(**{
        "then": rs.LoRA(rank=4, alpha=6), "targets": TARGETS, "window": 2, "windows": 2, "joint": 3, "min_rank": 1,
        "max_rank": 8, "weight_change": NEVER, "loss_change": NEVER, **more,
    })  # fmt: skip


def out(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).clone()


@dataclass
class Loop:
    """A plain loop: ask, shift, step."""

    run: rs.Run
    lr: float = 1e-2
    shifts: list[int] = field(default_factory=list)  # the updates after which a phase ended

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.optimizer = self.run.optimizer(lr=self.lr, weight_decay=0.1)

    def loss(self, step: int) -> Tensor:
        wanted = normal(Key(7) / step, (3, 11, 5), 1.0, dtype=D)
        return self.run.loss((self.run.model(IDS).to(D) - wanted).square().mean())

    def step(self) -> None:
        self.loss(self.run.step).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def turn(self) -> bool:
        """Go on to the next phase, if it is time."""
        method = self.run.due()
        if method is not None:
            self.run = self.run.shift(method)
            self.shifts.append(self.run.step)
            self.begin()
        return method is not None

    def until(self, stage: str) -> Loop:
        """To the beginning of a stage."""
        for _ in range(30):
            if self.run.method.stage == stage:
                return self
            self.turn() or self.step()
        raise AssertionError(f"{stage} was not reached")

    def steps(self, n: int) -> Loop:
        for _ in range(n):
            self.turn()
            self.step()
        return self


def begun(method: rs.PreLoRA | None = None, **more: Any) -> Loop:
    return Loop(rs.attach(net(), method or of(), seed=1), **more)


def base(run: rs.Run, leaf: str = "weight") -> dict[str, Tensor]:
    """A copy of what the adapted layers hold."""
    found = {site: getattr(run.model.get_submodule(site), leaf) for site in SITES}
    return {site: t.detach().clone() for site, t in found.items() if t is not None}


# ---- optimizers


def test_updates_inside_the_backward_pass_give_the_same_bits():
    def through(fused: bool) -> Loop:
        loop = begun()
        loop.begin = lambda: setattr(loop, "optimizer", loop.run.optimizer(lr=1e-2, fused_backward=fused))
        loop.begin()
        return loop.steps(9)

    one, other = through(False), through(True)
    assert one.shifts == other.shifts == [4, 7]
    assert all(torch.equal(p, dict(other.run.trainable())[n]) for n, p in one.run.trainable())
    assert torch.equal(out(one.run.model), out(other.run.model))


def test_another_optimizer_may_carry_it():
    loop = begun()

    def begin() -> None:
        loop.optimizer = torch.optim.SGD([p for _, p in loop.run.trainable()], lr=1e-2)
        loop.run.carry(loop.optimizer)

    loop.begin = begin
    loop.begin()
    loop.steps(9)
    assert loop.shifts == [4, 7]


# ---- ranks


def test_the_ladder_by_hand():
    """v = 0, .25, .26, .5, .51, .75, .76, 1 of four rungs."""
    v = (0, 0.25, 0.26, 0.5, 0.51, 0.75, 0.76, 1)
    moved = {f"layers.{i}.q.weight": 3 + 2 * x for i, x in enumerate(v)}
    assert list(ladder(moved, 4, 32).values()) == [4, 4, 8, 8, 16, 16, 32, 32]
    assert list(ladder(moved, 4, 32)) == list(moved)
    assert set(ladder(dict.fromkeys(moved, 0.3), 4, 32).values()) == {4}, "0/0"
    assert set(ladder(moved, 8, 8).values()) == {8}
    assert list(ladder(moved, 5, 10).values()) == [5, 5, 5, 5, 10, 10, 10, 10]
    assert ladder({"a.0.q.weight": 0.0, "a.1.q.weight": math.inf}, 4, 32) == {"a.0.q.weight": 4, "a.1.q.weight": 4}


def test_ranks_are_of_the_last_change():
    """The layer that moved most before that stands still by now."""
    loop = begun(of(window=1, windows=3), lr=0.0)
    for moved in (0, 1, None):
        loop.step()
        if moved is not None:
            with torch.no_grad():
                loop.run.model.blocks[moved].down.weight.mul_(3 - moved)
    assert loop.run.due().ranks == {**dict.fromkeys(SITES, 1), "blocks.1.down": 8}


def test_a_frozen_stage_with_other_adapters_takes_nothing_over():
    """Its adapters begin anew, and what those before had learned is in the weights."""
    loop = begun().until("joint").steps(2)
    before, A = out(loop.run.model), {s: a.A.detach().clone() for s, a in loop.run.adapter().items()}
    other = replace(loop.run.method, stage="frozen", then=rs.LoRA(rank=2, alpha=50), ranks=loop.run.method.ranks)
    run = loop.run.shift(other)
    assert (out(run.model) - before).abs().max() <= 1e-12
    assert not any(a.B.any() for a in run.adapter().values())
    assert not any(torch.equal(a.A, A[s]) for s, a in run.adapter().items())
    assert {a.scale for a in run.adapter().values()} == {25.0}


def test_each_family_has_a_ladder_of_its_own():
    """One whose layers move a hundred times as much gives none of them a rank from the other."""
    moved = {"0.q.weight": 1.0, "1.q.weight": 2.0, "0.k.weight": 100.0, "1.k.weight": 300.0, "0.only.weight": 50.0}
    assert ladder(moved, 4, 16) == {
        "0.q.weight": 4, "1.q.weight": 16, "0.k.weight": 4, "1.k.weight": 16, "0.only.weight": 4,
    }  # fmt: skip


@pytest.mark.parametrize("alpha", [6.0, 0.5])
def test_the_modules_that_are_built_have_those_ranks_and_this_scale(alpha: float):
    """Norms are taken here, after every update; the last two windows' ends say which layer moved how much."""
    loop = begun(of(then=rs.LoRA(rank=4, alpha=alpha)))
    norms = []
    for _ in range(4):
        loop.step()
        norms.append({s: w.square().sum().sqrt().item() for s, w in base(loop.run).items()})
    delta = {s: 100 * abs(norms[3][s] - norms[1][s]) / norms[1][s] for s in SITES}
    wanted = {}
    for leaf in TARGETS:
        family = {s: d for s, d in delta.items() if s.endswith(leaf)}
        for s, d in family.items():
            v = (d - min(family.values())) / (max(family.values()) - min(family.values()))
            wanted[s] = 1 if v == 0 else 2 ** (math.ceil(v * 4) - 1)
    assert loop.turn()
    built = loop.run.adapter()
    assert {s: a.A.shape[0] for s, a in built.items()} == {s: a.B.shape[1] for s, a in built.items()} == wanted
    assert set(wanted.values()) >= {1, 8}
    assert len(set(wanted.values())) > 2
    assert {a.scale for a in built.values()} == {alpha / 4}
    loop.until("frozen")
    assert {s: a.rank for s, a in loop.run.adapter().items()} == wanted
    eye = torch.eye(8, dtype=D)
    for site, a in loop.run.adapter().items():
        if site.endswith("up"):  # what the layer does, not what it says of itself
            layer = loop.run.model.get_submodule(site)
            with torch.no_grad():
                W = (layer(eye) - layer.base.bias).T
                torch.testing.assert_close(W, layer.base.weight + alpha / 4 * a.B @ a.A, rtol=0, atol=1e-12)


def test_a_layer_whose_name_ends_as_anothers_has_its_own_rank():
    """ "up" is the end of "blocks.0.up"; patterns of ranks match ends of names."""

    class Both(Net):
        def __init__(self) -> None:
            super().__init__(blocks=2)
            self.up = nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.up(self.blocks(self.embed(ids))))

    ranks = {"blocks.0.up": 2, "blocks.1.up": 4, "up": 8}
    run = rs.attach(Both(), of(stage="joint", ranks=ranks, targets="up"))
    assert {s: a.A.shape[0] for s, a in run.adapter().items()} == ranks
    assert {a.scale for a in run.adapter().values()} == {1.5}


def test_rslora_keeps_its_alpha():
    method = of(then=rs.LoRA(rank=4, alpha=6, scaling="rslora"))
    loop = begun(method).until("joint")
    assert {(a.rank, a.scale) for a in loop.run.adapter().values()} >= {(1, 6.0), (8, 6 / 8**0.5)}


# ---- when


@pytest.mark.parametrize(("m", "k"), [(1, 2), (3, 2), (2, 4)])
def test_what_stands_still_goes_on_after_exactly_k_windows(m: int, k: int):
    """A schedule that is fixed, not tested, would not follow. Equality passes for the loss: 0 ≤ 0."""
    loop = begun(of(window=m, windows=k, weight_change=1e-9, loss_change=0.0), lr=0.0)
    loop.loss = lambda step: Loop.loss(loop, 0)
    for step in range(k * m):
        assert loop.run.due() is None, step
        loop.step()
    assert loop.run.due().stage == "joint"
    assert loop.run.due().ranks == dict.fromkeys(SITES, 1), "all the same: r_min"


def test_one_family_that_moves_holds_all_back():
    loop = begun(of(window=1, weight_change=1.0), lr=0.0)
    for step in range(12):
        loop.step()
        with torch.no_grad():
            for i in range(4):
                loop.run.model.blocks[i].down.weight.mul_(1.03)
        assert loop.run.due() is None, step
    loop.step()  # the last growth is in the window before this one's end, and then there is none
    loop.step()
    assert loop.run.due().stage == "joint"


def test_one_layer_that_moves_may_be_outweighed_by_its_family():
    """The mean over four layers counts: one by 3 % is 0.75 % of the family, below 1; by 6 % it is 1.5 %."""
    for growth, on in ((1.03, True), (1.06, False)):
        loop = begun(of(window=1, weight_change=1.0), lr=0.0)
        loop.step()
        with torch.no_grad():
            loop.run.model.blocks[2].down.weight.mul_(growth)
        loop.step()
        method = loop.run.due()
        assert (method is not None) is on
        if on:
            assert method.ranks == {**dict.fromkeys(SITES, 1), "blocks.2.down": 8}


def test_a_change_of_exactly_tau_is_too_much():
    """One of four layers doubles its norm: 25 % on average, to the bit."""
    for tau, on in ((25.0, False), (math.nextafter(25, 26), True)):
        loop = begun(of(window=1, weight_change=tau), lr=0.0)
        loop.step()
        with torch.no_grad():
            loop.run.model.blocks[2].down.weight.mul_(2)
        loop.step()
        assert (loop.run.due() is not None) is on


def test_the_mean_loss_of_a_window_counts():
    """Batches of 1, 3, 2, 2: windows' means are equal, whatever is between."""
    loop = begun(of(loss_change=0.0), lr=0.0)
    values = iter([1.0, 3.0, 2.0, 2.0, 2.1, 2.1])
    loop.loss = lambda step: loop.run.loss(0 * loop.run.model(IDS).sum() + next(values))
    for _ in range(4):
        assert loop.run.due() is None
        loop.step()
    assert loop.run.due() is not None
    assert [s.loss for s in loop.run.watch.snapshots] == [2.0, 2.0]
    loop = begun(of(loss_change=4.9), lr=0.0)
    values = iter([2.0, 2.0, 2.1, 2.1])
    loop.loss = lambda step: loop.run.loss(0 * loop.run.model(IDS).sum() + next(values))
    for _ in range(4):
        loop.step()
    assert loop.run.due() is None, "it rose by 5 %"


def test_accumulated_batches_are_all_heard_and_updates_are_counted():
    loop = begun(of(), lr=0.0)
    for _ in range(4):
        for part in range(3):
            loop.loss(part).backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
    seen = loop.run.watch.snapshots
    assert [s.step for s in seen] == [2, 4]
    mean = sum(Loop.loss(loop, part).item() for part in range(3)) / 3
    assert [s.loss for s in seen] == pytest.approx([mean, mean], rel=1e-6)


def test_a_batch_whose_update_was_skipped_is_not_looked_at():
    loop, straight = begun(), begun().steps(4)
    for step in range(4):
        loop.run.loss(math.nan * loop.run.model(IDS).sum()).backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        loop.step()
        assert (loop.run.step, loop.run.skipped) == (step + 1, step + 1)
    assert loop.run.watch.snapshots == straight.run.watch.snapshots
    assert loop.run.due() == straight.run.due() is not None


def test_a_window_with_a_loss_that_is_no_number_has_not_converged():
    """Of an update that was taken, because its gradients are numbers."""
    loop = begun(lr=0.0)
    loop.step()
    loop.run.loss(loop.run.model(IDS).square().mean() + math.nan).backward()
    loop.optimizer.step()
    loop.optimizer.zero_grad()
    assert (loop.run.step, loop.run.skipped) == (2, 0)
    json.dumps(loop.run.describe(), allow_nan=False)
    again = rs.restore(net(), loop.run.state_dict())
    assert math.isnan(again.watch.snapshots[0].loss)
    for _ in range(3):
        loop.step()
        assert loop.run.due() is None
    loop.step()
    assert loop.run.due() is not None, "two whole windows later"


def test_a_minimum_of_full_training():
    loop = begun(of(minimum=7))
    loop.until("joint")
    assert loop.shifts == [7]


def test_a_phase_that_is_over_takes_no_update():
    loop = begun().steps(4)
    with pytest.raises(TrainingError, match=r"run\.due\(\)"):
        loop.step()
    loop.steps(3)
    with pytest.raises(TrainingError, match=r"run\.due\(\)"):
        loop.step()
    loop.steps(5)
    assert loop.shifts == [4, 7]
    assert [(p.method["stage"], p.start, p.stop) for p in loop.run.phases] == [
        ("full", 0, 4), ("joint", 4, 7), ("frozen", 7, None),
    ]  # fmt: skip
    assert loop.run.metrics() == {"stage": 2.0}


# ---- the function at the changes


@pytest.mark.parametrize(
    "second",
    [
        rs.LoRA(rank=4, alpha=6),
        rs.LoRA(rank=4, dora=True),
        rs.LoRA(rank=4, init="pissa"),
        rs.LoRA(rank=4, train="B"),
        rs.VeRA(rank=6),
    ],
    ids=["lora", "dora", "pissa", "lora-fa", "vera"],
)
def test_the_function_stays_at_both_changes_and_training_goes_on(second: rs.core.method.Method):
    loop = begun(of(then=second))
    for stage, least in (("joint", 1e-6), ("frozen", 1e-6)):
        while loop.run.due() is None:
            loop.step()
        before = out(loop.run.model)
        loop.turn()
        assert loop.run.method.stage == stage
        assert (out(loop.run.model) - before).abs().max() <= 1e-12
        loop.steps(2)
        assert (out(loop.run.model) - before).abs().max() > least
    before = out(loop.run.model)
    model = loop.run.merge()
    assert not [m for m in model.modules() if isinstance(m, Site)]
    assert (out(model) - before).abs().max() <= 1e-12


def test_on_with_paca():
    """No part in which both train: columns of the weight are the weight's own."""
    loop = begun(of(then=rs.PaCA(rank=2), joint=0, window=2))
    while loop.run.due() is None:
        loop.step()
    before, held = out(loop.run.model), base(loop.run)
    loop.turn()
    assert loop.shifts == [4]
    assert loop.run.method.stage == "frozen"
    assert (out(loop.run.model) - before).abs().max() <= 1e-12
    loop.steps(4)
    for site, adapter in loop.run.adapter().items():
        W = loop.run.model.get_submodule(site).base.weight
        moved = (held[site] != W).any(0)
        assert adapter.rank in (1, 2, 4, 8)
        assert moved.sum() == adapter.rank
    assert len({a.rank for a in loop.run.adapter().values()}) > 1


def test_vera_has_one_rank():
    loop = begun(of(then=rs.VeRA(rank=6))).until("frozen")
    assert loop.run.method.ranks == {}
    assert {a.rank for a in loop.run.adapter().values()} == {6}


# ---- what trains


def test_in_the_joint_part_weights_and_adapters_train_together():
    """First gradients: ∂/∂B = s·G xᵀ Aᵀ of W's own G xᵀ, ∂/∂A = 0; and then both move."""
    loop = begun().until("joint")
    run = loop.run
    old = base(run)
    loop.loss(run.step).backward()
    for site, a in run.adapter().items():
        W = run.model.get_submodule(site).base.weight
        assert a.A.grad.abs().max() == 0
        assert a.B.grad.abs().max() > 0
        torch.testing.assert_close(a.B.grad, a.scale * W.grad @ a.A.T, rtol=0, atol=1e-12)
        assert site + ".A" in dict(run.trainable())
    loop.optimizer.step()
    loop.optimizer.zero_grad()
    start = {site: (a.A.detach().clone(), a.B.detach().clone()) for site, a in run.adapter().items()}
    loop.steps(1)
    for site, a in run.adapter().items():
        assert not torch.equal(run.model.get_submodule(site).base.weight, old[site])
        assert not torch.equal(a.A, start[site][0])
        assert not torch.equal(a.B, start[site][1])


def test_gradients_of_the_joint_part_are_those_of_the_equation():
    """y = W x + s·B(A x) + b, written out."""
    loop = begun().until("joint").steps(2)
    run = loop.run
    loop.loss(0).backward()
    plain = net()
    for name, p in plain.named_parameters():
        site, _, leaf = name.rpartition(".")
        p.data.copy_(getattr(run.model.get_submodule(site), leaf))
    factors = {}
    for site, a in run.adapter().items():
        layer = plain.get_submodule(site)
        A, B = factors[site] = [t.detach().clone().requires_grad_() for t in (a.A, a.B)]
        layer.forward = lambda x, of=layer, A=A, B=B: F.linear(x, of.weight, of.bias) + 1.5 * (x @ A.T) @ B.T
    (plain(IDS) - normal(Key(7) / 0, (3, 11, 5), 1.0, dtype=D)).square().mean().backward()
    for site, a in run.adapter().items():
        own, here = run.model.get_submodule(site).base, plain.get_submodule(site)
        pairs = [(a.A, factors[site][0]), (a.B, factors[site][1]), (own.weight, here.weight)]
        for mine, wanted in pairs:
            assert wanted.grad.abs().max() > 0
            torch.testing.assert_close(mine.grad, wanted.grad, rtol=0, atol=1e-13)


def test_in_the_frozen_part_adapted_layers_stand_still_and_all_else_trains():
    loop = begun().until("frozen")
    run, model = loop.run, loop.run.model
    weights, biases = base(run), base(run, "bias")
    rest = {n: p.detach().clone() for n, p in model.named_parameters() if ".adapters." not in n and ".base." not in n}
    assert {"embed.weight", "head.weight", "head.bias", "blocks.0.norm.weight"} <= rest.keys()
    loop.steps(5)
    assert all(torch.equal(t, weights[s]) for s, t in base(run).items())
    assert all(torch.equal(t, biases[s]) for s, t in base(run, "bias").items())
    assert len(biases) == 4
    now = dict(model.named_parameters())
    assert [n for n in rest if torch.equal(rest[n], now[n])] == []
    held = {id(p) for g in loop.optimizer.param_groups for p in g["params"]}
    adapted = [p for n, p in now.items() if ".base." in n]
    assert len(adapted) == 12
    assert not held & {id(p) for p in adapted}
    assert all(p.grad is None for p in adapted)
    counted = sum(p.numel() for g in loop.optimizer.param_groups for p in g["params"])
    assert counted == run.summary().trainable
    assert counted == sum(t.numel() for t in rest.values()) + sum(
        a.rank * (a.in_features + a.out_features) for a in run.adapter().values()
    )


def test_after_the_freeze_a_layer_has_changed_by_no_more_than_its_rank():
    loop = begun(lr=5e-2).until("frozen")
    frozen = {}

    def effective(site: str) -> Tensor:
        layer = loop.run.model.get_submodule(site)
        with torch.no_grad():
            return layer(torch.eye(layer.in_features, dtype=D)).T - (0 if layer.bias is None else layer.bias[:, None])

    for site in SITES:
        frozen[site] = loop.run.model.get_submodule(site).base.weight.detach().clone()
    loop.steps(6)
    for site, a in loop.run.adapter().items():
        values = torch.linalg.svdvals(effective(site) - frozen[site])
        assert values[0] > 1e-3
        assert int((values > 1e-10 * values[0]).sum()) == a.rank


def test_moments_go_along_at_both_changes():
    """Bit for bit those of the last optimizer; those of factors begin at nothing, those of what is frozen are gone."""
    loop = begun()
    while loop.run.due() is None:
        loop.step()
    before = {n: {k: v.clone() for k, v in loop.optimizer.state[p].items()} for n, p in loop.run.trainable()}
    loop.turn()
    after = {n: loop.optimizer.state.get(p, {}) for n, p in loop.run.trainable()}
    assert before.keys() <= after.keys()
    for name, state in before.items():
        assert same_state(after[name], state), name
        assert int(state["step"]) == 4
    assert all(not state for name, state in after.items() if name not in before)
    assert len(after) == len(before) + 16
    while loop.run.due() is None:
        loop.step()
    before = {n: {k: v.clone() for k, v in loop.optimizer.state[p].items()} for n, p in loop.run.trainable()}
    loop.turn()
    after = {n: loop.optimizer.state[p] for n, p in loop.run.trainable()}
    gone = {f"{site}.weight" for site in SITES} | {f"{site}.bias" for site in SITES if site.endswith("up")}
    assert before.keys() - after.keys() == gone
    for name, state in after.items():
        assert same_state(state, before[name]), name
        assert int(state["step"]) == (3 if name.endswith((".A", ".B")) else 7)


def same_state(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_what_the_frozen_part_does_not_need_is_not_in_memory():
    loop = begun()
    while loop.run.method.stage != "joint" or loop.run.due() is None:
        loop.turn() or loop.step()
    loop.loss(0).backward()  # also a gradient that nobody has cleared
    adapted = [p for n, p in loop.run.trainable() if n.startswith(tuple(f"{s}.weight" for s in SITES))]
    assert len(adapted) == 8
    dead = [weakref.ref(t) for p in adapted for k, t in loop.optimizer.state[p].items() if k != "step"]
    dead += [weakref.ref(p.grad) for p in adapted]
    dead.append(weakref.ref(loop.optimizer))
    assert len(dead) == 25
    del adapted
    ended = loop.run  # somebody may keep it
    assert loop.turn()
    gc.collect()
    assert [ref() is None for ref in dead] == [True] * 25
    assert ended.step == 7
    loop.steps(1)
    assert all(p.grad is None for n, p in loop.run.model.named_parameters() if ".base." in n)


def test_a_schedule_over_the_whole_run_goes_on():
    run = rs.attach(net(), of(), total_steps=10)
    loop, rates = Loop(run), []
    schedule = run.scheduler(loop.optimizer)
    for _ in range(10):
        if loop.turn():
            schedule = loop.run.scheduler(loop.optimizer)
        rates.append(loop.optimizer.param_groups[0]["lr"])
        loop.step()
        schedule.step()
    assert loop.shifts == [4, 7]
    assert rates == pytest.approx([1e-2 * (0.5 + 0.5 * math.cos(math.pi * k / 10)) for k in range(10)])


# ---- resume


class Staged(Session):
    """A session that goes on to the next phase where it is due."""

    def until(self, n: int) -> Staged:
        session = self
        while session.run.step < n:
            method = session.run.due()
            if method is not None:
                losses = session.losses
                session = Staged(self.engine, session.run.shift(method), accumulate=self.accumulate)
                session.losses = losses
            session.step()
        return session


WINDOWS = replace(of(), targets="all-linear", joint=2, exclude=("head",))  # 4 updates, 2 and to the end


def staged(method: rs.PreLoRA, engine: Any = "one", **more: Any) -> Staged:
    session = begin(engine, method, blocks=2, total=None, **more)
    return Staged(engine, session.run, accumulate=session.accumulate)


@pytest.mark.parametrize(
    ("second", "joint"),
    [(rs.LoRA(rank=4, alpha=6), 2), (rs.VeRA(rank=4), 2), (rs.PaCA(rank=2), 0), (rs.LoRA(rank=4, init="pissa"), 2)],
    ids=["lora", "vera", "paca", "pissa"],
)
def test_resumed_at_every_update_is_bit_equal(second: rs.core.method.Method, joint: int):
    """Also in the middle of a window, where a phase is over, and where the next has begun but not trained."""
    method = replace(WINDOWS, then=second, joint=joint, max_rank=4)
    whole = staged(method).until(8)
    assert [p.start for p in whole.run.phases] == ([0, 4, 6] if joint else [0, 4])
    for k in range(9):
        session = staged(method).until(k)
        saved = [session.save()]
        if (due := session.run.due()) is not None:
            saved.append(Staged("one", session.run.shift(due)).save())
            assert k in (4, 6)
        for state in saved:
            again = Staged.load(state, "one", tiny(blocks=2)).until(8)
            same(again.state(), whole.state(), what=f"resumed at {k}")
            assert again.run.describe() == whole.run.describe(), k


def test_the_window_that_is_open_is_saved_with_what_was_heard_of_it():
    """The test fires in the resumed run as in the other, by losses that were heard before the save and after."""
    method = replace(WINDOWS, window=4, windows=2, loss_change=0.1)
    whole = staged(method)
    fired = next(k for k in range(1, 200) if whole.until(k).run.due() is not None)
    assert fired > 8, "not at the first look"
    for k in (fired - 3, fired - 1, fired):
        again = Staged.load(staged(method).until(k).save(), "one", tiny(blocks=2)).until(fired)
        assert again.run.due() == whole.run.due(), k
        assert again.run.watch.snapshots[-1] == whole.run.watch.snapshots[-1]


def test_saved_and_loaded_as_a_directory_in_every_stage(tmp_path):
    for k in (3, 5, 7):
        session = staged(WINDOWS).until(k)
        session.run.save(tmp_path / str(k))
        again = rs.load(tiny(blocks=2), tmp_path / str(k))
        assert again.method == session.run.method
        assert torch.equal(evaluate(again.model), evaluate(session.model))
        assert again.method.stage == {3: "full", 5: "joint", 7: "frozen"}[k]


# ---- models


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = tf.ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        num_labels=3,
    )  # fmt: skip
    pixels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return tf.ViTForImageClassification(config), {"pixel_values": pixels, "labels": torch.tensor([0, 1, 2, 1])}


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    ids = torch.randint(30, (3, 9), generator=torch.Generator().manual_seed(1))
    return tf.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("make", [vit, llama])
def test_models_of_transformers_go_through_all_stages(make: Any):
    model, batch = make()
    run = rs.attach(model.train(), of(targets="all-linear", window=1, joint=2))
    optimizer, losses = run.optimizer(lr=5e-3), []
    for _ in range(24):
        if (method := run.due()) is not None:
            run = run.shift(method)
            optimizer = run.optimizer(lr=5e-3)
        loss = run.loss(model(**batch).loss)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [p.start for p in run.phases] == [0, 2, 4]
    assert losses[-1] < min(losses[:5])
    assert len(run.sites) == (12 if make is vit else 14)
    assert len(set(run.method.ranks.values())) > 1
    trained = {name for name, _ in run.trainable()}
    whole = {"vit.embeddings.cls_token", "classifier.weight"} if make is vit else {"model.embed_tokens.weight"}
    assert whole <= trained
    was = model.eval()(**batch).logits
    assert (run.merge()(**batch).logits - was).abs().max() < 1e-5


def test_of_vit_large_less_than_a_tenth_is_left():
    """28.3 M of 304 M at r = 64 on all six linears of a layer; with what is not adapted it is still below 10 %."""
    with torch.device("meta"):
        config = tf.ViTConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
        model = tf.ViTForImageClassification(config)
    total = sum(p.numel() for p in model.parameters())
    run = rs.attach(model, of(targets="all-linear", stage="frozen", then=rs.LoRA(rank=64), max_rank=64))
    factors = sum(a.A.numel() + a.B.numel() for a in run.adapter().values())
    assert len(run.sites) == 6 * 24
    assert factors == 24 * 64 * (4 * 2048 + 2 * 5120) == 28_311_552
    trains = sum(p.numel() for _, p in run.trainable())
    assert trains == run.summary().trainable
    assert trains / (total + factors) < 0.1


def test_under_autocast_weights_and_moments_stay_wide():
    model, batch = vit()
    run = rs.attach(model.train(), of(targets="all-linear", window=1, joint=1))
    optimizer = run.optimizer(lr=1e-3)
    for _ in range(5):
        if (method := run.due()) is not None:
            run = run.shift(method)
            optimizer = run.optimizer(lr=1e-3)
        with torch.autocast("cpu", torch.bfloat16):
            loss = run.loss(model(**batch).loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert run.method.stage == "frozen"
    assert {p.dtype for _, p in run.trainable()} == {torch.float32}
    assert {s["exp_avg"].dtype for s in optimizer.state.values()} == {torch.float32}


# ---- shared and frozen weights


def test_a_layer_that_is_shared_is_refused_before_the_first_update():
    """At the switch it would be weeks later."""
    model, _ = llama()
    with pytest.raises(TiedWeights, match="lm_head"):
        rs.attach(model, of(targets=("q_proj", "lm_head")))
    model = net()
    model.blocks[2].up = model.blocks[1].up
    with pytest.raises(TiedWeights, match=r"blocks\.1\.up"):
        rs.attach(model, of())
    rs.attach(net(), of()).merge()


@pytest.mark.parametrize("joint", [0, 2])
def test_a_shared_weight_may_get_one_of_its_own_at_the_switch(joint: int):
    method = of(targets=("q_proj", "lm_head"), tied="untie", window=1, joint=joint)
    model, batch = llama()
    run = rs.attach(model.train(), method)
    optimizer = run.optimizer(lr=1e-2)

    def step() -> None:
        run.loss(model(**batch).loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(), step()
    assert model.lm_head.weight is model.model.embed_tokens.weight, "one, as long as both train"
    before = model(**batch).logits
    while run.method.stage != "frozen":
        if (due := run.due()) is not None:
            run = run.shift(due)
            optimizer = run.optimizer(lr=1e-2)
            if len(run.phases) == 2:
                assert (model(**batch).logits - before).abs().max() < 1e-5
        if run.method.stage != "frozen":
            step()
    step()
    assert model.lm_head.base.weight is not model.model.embed_tokens.weight
    assert run.adapter()["lm_head"].rank == 1, "the only one of its family"
    again = rs.restore(llama()[0], run.state_dict())
    assert torch.equal(again.model.eval()(**batch).logits, model.eval()(**batch).logits)


class Shared(nn.Module):
    """A head that is tied to the embedding, registered before or after it; and layers that share one weight."""

    def __init__(self, first: str) -> None:
        super().__init__()
        parts = {"embed": nn.Embedding(11, 8), "head": nn.Linear(8, 11)}
        for name in (first, *(parts.keys() - {first})):
            setattr(self, name, parts[name])
        self.up = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head.weight, self.up[2].weight = self.embed.weight, self.up[0].weight
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(normal(Key(0) / name.replace("head.weight", "embed.weight"), tuple(p.shape), 0.4, dtype=D))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for up in self.up:
            x = x + up(x).tanh()
        return self.head(x)[..., :5]


def test_shared_weights_are_looked_at_whichever_was_registered_first():
    seen = []
    for first in ("embed", "head"):
        method = of(targets=("head", "up.*"), tied="untie", then=rs.LoRA(rank=8, alpha=6), min_rank=1, max_rank=2)
        loop = Loop(rs.attach(Shared(first).double().train(), method, seed=1))
        assert set(loop.run.watch.wish.weights) == {"head.weight", "up.0.weight", "up.1.weight", "up.2.weight"}
        loop.steps(4)
        tables = [snapshot.norms for snapshot in loop.run.watch.snapshots]
        assert all(norms["up.0.weight"] == norms["up.2.weight"] for norms in tables)
        assert tables[-1]["head.weight"] == pytest.approx(loop.run.model.embed.weight.norm().item(), rel=1e-12)
        before = out(loop.run.model)
        loop.turn()
        assert (out(loop.run.model) - before).abs().max() <= 1e-12
        ranks = {site: adapter.rank for site, adapter in loop.run.adapter().items()}
        assert ranks == loop.run.method.ranks
        assert ranks["head"] == 1, "of a family of one"
        assert {ranks["up.0"], ranks["up.1"]} == {1, 2}
        assert ranks["up.2"] == ranks["up.0"], "they are one weight"
        seen.append((ranks, tables))
    assert seen[0][0] == seen[1][0]
    for one, other in zip(seen[0][1], seen[1][1], strict=True):
        assert one == pytest.approx(other, rel=1e-9)


def test_a_shared_weight_that_moves_holds_back():
    """Also where there is no other: a test of nothing would pass at once."""
    for tau, on in ((1e-9, False), (NEVER, True)):
        loop = Loop(rs.attach(Shared("embed").double(), of(targets="head", tied="untie", weight_change=tau)))
        for _ in range(4):
            loop.step()
        assert (loop.run.due() is not None) is on


def test_where_no_weight_can_be_looked_at_it_is_refused():
    method = of(targets="all-linear", exclude=("head",))

    def frozen() -> Net:
        model = net()
        for block in model.blocks:
            block.up.requires_grad_(False), block.down.requires_grad_(False)
        return model

    for first, then, text in (
        (method, [], "PreLoRA looks at the weights of the layers in targets, and none of them trains"),
        (rs.LoRA(rank=1), [rs.Then(method, steps=2)], "none of them trains"),
        (rs.Full(), [rs.Then(method, steps=2), rs.Then(rs.Full(), steps=9)], "none of them trains"),
    ):
        model = frozen()
        before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
        with pytest.raises(ConfigError, match=text):
            rs.attach(model, first, then=then)
        now = dict(model.named_parameters())
        assert all(now[n].requires_grad is r and torch.equal(now[n], t) for n, (r, t) in before.items())
    run = rs.attach(frozen(), rs.LoRA(rank=1))
    with pytest.raises(ConfigError, match="none of them trains"):
        run.shift(method)
    assert run.method == rs.LoRA(rank=1), "its phase goes on"
    run = rs.attach(net(), rs.LoRA(rank=1)).shift(method)  # frozen by the run, not by the user
    assert len(run.watch.wish.weights) == 8


def test_weights_that_were_frozen_before_stay_so_and_are_not_looked_at():
    model = net()
    model.blocks[0].requires_grad_(False)
    model.embed.requires_grad_(False)
    old = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    loop = Loop(rs.attach(model, of(targets="all-linear", exclude=("head",))))
    loop.steps(9)
    assert loop.shifts == [4, 7]
    assert set(loop.run.adapter()) == set(SITES[2:])
    assert set(loop.run.method.ranks) == set(SITES[2:])
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], t) for n, t in old.items())
    assert not any(now[n].requires_grad for n in old)
    again = rs.restore(net(), loop.run.state_dict())
    assert again.describe() == loop.run.describe()
    model = net()
    model.embed.requires_grad_(False)
    loop = Loop(rs.attach(model, of()))  # named layers, and the embedding is none of them
    loop.steps(9)
    assert not model.embed.weight.requires_grad
    model = net()
    model.blocks[1].up.requires_grad_(False)
    with pytest.raises(TargetError, match=r"blocks\.1\.up\.bias is frozen"):
        rs.attach(model, of())


# ---- what is written of it


def test_the_example_of_the_documentation(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "prelora.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    for long, short in (
        ("weight_change=1, loss_change=5", "weight_change=1e9, loss_change=1e9, joint=3, max_rank=8"),
        ("100_000", "12"), ("window=1000", "window=2"), ("warmup=1000", "warmup=2"),
        ('"model/"', repr(str(tmp_path / "model"))),
    ):  # fmt: skip
        assert long in code
        code = code.replace(long, short)
    model, batch = llama()
    names = {"model": model.train(), "batches": [batch] * 12}
    exec(code, names)
    assert [p.start for p in names["run"].phases] == [0, 6, 9]
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert (again(**batch).logits - model.eval()(**batch).logits).abs().max() < 1e-5


# ---- bad input


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"min_rank": 16, "max_rank": 8}, "1 ≤ min_rank ≤ max_rank"),
        ({"min_rank": 0}, "1 ≤ min_rank"),
        ({"min_rank": 4, "max_rank": 24}, "times 1, 2, 4, 8"),
        ({"window": 0}, "at least 1 update"),
        ({"windows": 1}, "two windows are compared"),
        ({"joint": -1}, "counts of updates"),
        ({"minimum": -1}, "counts of updates"),
        ({"weight_change": -1.0}, "weight_change = -1.0"),
        ({"loss_change": math.inf}, "loss_change = inf"),
        ({"stage": "later"}, "none of full, joint, frozen"),
        ({"then": rs.Full()}, "LoRA, PaCA or VeRA"),
        ({"then": rs.PaCA(rank=2)}, "Set joint=0"),
        ({"then": rs.LoRA(rank=2, targets="up")}, "with targets"),
        ({"then": rs.LoRA(rank=2, modules_to_save=("head",))}, "modules_to_save"),
        ({"then": rs.LoRA(rank=2, bias="all")}, "bias"),
        ({"then": rs.LoRA(rank=2, init="eva")}, "data"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(more: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        of(**more)


def refused(model: nn.Module, error: type[Exception], said: str, method: rs.PreLoRA) -> None:
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    with pytest.raises(error, match=said):
        rs.attach(model, method)
    now = dict(model.named_parameters())
    assert all(now[n].requires_grad is r and torch.equal(now[n], t) for n, (r, t) in before.items())
    assert before.keys() == now.keys()


def test_what_does_not_fit_the_model_is_refused_before_the_first_update():
    refused(net(torch.bfloat16), UnsupportedLayer, "fp32", of())
    refused(net(), RankTooLarge, r"max_rank 16 at blocks\.0\.up exceeds min\(out, in\) = 8", of(max_rank=16))
    refused(net(), RankTooLarge, "16", of(then=rs.PaCA(rank=2), joint=0, max_rank=16))


def test_a_run_too_short_for_its_windows_is_refused_before_the_first_update():
    for total in (4, 3):
        with pytest.raises(ConfigError, match=f"after update 4 at the earliest, and ends at {total}"):
            rs.attach(net(), of(), total_steps=total)
    with pytest.raises(ConfigError, match="after update 9 at the earliest"):
        rs.attach(net(), of(minimum=9), total_steps=9)
    rs.attach(net(), of(), total_steps=5).optimizer()
    run = rs.attach(net(), of())  # it may be said later
    run.total_steps = 4
    with pytest.raises(ConfigError, match="after update 4 at the earliest"):
        run.optimizer()


@pytest.mark.parametrize(("total", "end"), [(20, 7), (7, None)])
def test_a_run_that_cannot_freeze_is_warned_of_once(total: int, end: int | None, caplog: pytest.LogCaptureFixture):
    then = [] if end is None else [rs.Then(rs.Full(), steps=end)]
    with caplog.at_level("WARNING", "rankshift"):
        run = rs.attach(net(), of(), total_steps=total, then=then)
        text = (
            r"PreLoRA\(window=2, windows=2, minimum=0, joint=3\) freezes after update 7 at the earliest, and ends at 7"
        )
        assert len(re.findall(text, caplog.text)) == 1
        run.optimizer()
        run.optimizer()
        assert len(re.findall(text, caplog.text)) == 1
        caplog.clear()
        rs.attach(net(), of(joint=2), total_steps=7)
    assert "freezes" not in caplog.text


def test_without_its_loss_a_run_cannot_know_when():
    loop = begun()
    loop.run.model(IDS).square().mean().backward()
    with pytest.raises(TrainingError, match=r"run\.loss"):
        loop.optimizer.step()
    loop.steps(4)
    loop.turn()
    loop.run.model(IDS).square().mean().backward()
    loop.optimizer.step()  # later stages go by updates


def test_it_stands_alone():
    loop = begun()
    with pytest.raises(rs.errors.AttachError, match="stands alone"):
        loop.run.add("second", rs.LoRA(rank=1, targets="head"))
    for verb in (loop.run.detach, lambda: loop.run.disabled().__enter__()):
        with pytest.raises(rs.errors.AttachError, match="trains the base itself"):
            verb()
    with pytest.raises(rs.errors.AttachError, match="stands alone"):
        rs.attach(net(), rs.LoRA(rank=1, targets="head")).add("second", of())
