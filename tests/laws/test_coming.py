"""Phases to come: when they are due, what they need to know, what is saved of them, and which moments go along."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import rankshift as rs
from laws import laws
from laws.pool import Pool
from laws.world import Engine, Session, batch, evaluate, gap, loss_of, same, tiny
from rankshift.core import event, shard
from rankshift.core.errors import ConfigError, RankTooLarge, TrainingError, WrongBase
from rankshift.core.method import Method
from rankshift.methods import Full, GaLore, LoRA

FULL, LORA = Full(), LoRA(rank=2, alpha=4, init="orthogonal")


def begin(engine: Engine, then: list[rs.Then], method: Method = FULL, **options: Any) -> Session:
    return Session(engine, rs.attach(tiny(), method, total_steps=20, then=then), **options)


def go(session: Session, steps: int) -> Session:
    """So many updates, going on with what is due before each."""
    for _ in range(steps):
        method = session.run.due()
        if method is not None:
            session = Session(session.engine, session.run.shift(method), losses=session.losses)
        session.step()
    return session


def route(run: rs.Run) -> list[tuple[str, int, int | None]]:
    return [(p.method["method"], p.start, p.stop) for p in run.phases]


def test_by_steps_each_counted_from_the_phase_before() -> None:
    session = begin("one", [rs.Then(LORA, steps=3, lr=0.25), rs.Then(FULL, steps=2)])
    for step in range(3):
        assert session.run.step == step
        assert session.run.due() is None
        session.step()
    assert session.run.due() == session.run.due() == LORA
    before = evaluate(session.model)
    run = session.run.shift(LORA)
    assert gap(evaluate(run.model), before) <= laws.MERGED[torch.float32]
    assert [then.method for then in run.coming] == [FULL]
    assert run.due() is None
    session = Session("one", run).steps(1)
    assert session.run.due() is None
    session.step()
    assert session.run.due() == FULL
    session = Session("one", session.run.shift(FULL)).steps(3)
    assert session.run.due() is None
    assert route(session.run) == [("full", 0, 3), ("lora", 3, 5), ("full", 5, None)]
    assert [p.lr for p in session.run.phases] == [None, 0.25, 0.25]  # none said: as before
    weights = sum(p.numel() for p in tiny().parameters())
    assert [p.trainable for p in session.run.phases][::2] == [weights, weights]


def test_the_rate_of_a_phase_is_that_of_its_optimizer() -> None:
    session = go(begin("one", [rs.Then(LORA, steps=1, lr=0.25)]), 1)
    assert session.run.optimizer().param_groups[0]["lr"] == FULL.default_lr
    run = session.run.shift(LORA)
    assert run.optimizer().param_groups[0]["lr"] == 0.25
    assert run.optimizer(lr=0.5).param_groups[0]["lr"] == 0.5


def test_a_shift_of_ones_own_leaves_the_list_as_it_is() -> None:
    session = begin("one", [rs.Then(LORA, steps=4)]).steps(2)
    run = session.run.shift(LoRA(rank=3))
    assert len(run.coming) == 1
    session = Session("one", run).steps(1)
    assert session.run.due() is None
    session.step()
    assert session.run.due() == LORA, "counted from where the list stands, not from the last shift"
    assert session.run.shift(LORA).coming == ()
    late = begin("one", [rs.Then(LORA, steps=4)]).steps(4).run.shift(LoRA(rank=3))
    assert late.due() == LORA
    windows = begin("one", [rs.Then(LORA, loss=99.0, window=3)]).steps(2)
    session = Session("one", windows.run.shift(FULL)).steps(2)
    assert session.run.due() is None, "a window is of one phase"
    assert session.steps(1).run.due() == LORA


def test_a_phase_by_hand_that_begins_when_the_list_is_due_says_so() -> None:
    session = begin("one", [rs.Then(LORA, steps=4)]).steps(4)
    late = session.run.shift(rs.ReLoRA(rank=2, every=3))
    optimizer = late.optimizer(lr=1e-2)
    with pytest.raises(ConfigError, match=r"began at update 4, and what is to follow was due at update 4 already"):
        late.scheduler(optimizer)
    loss_of(late.model.train(), batch(0)).backward()
    with pytest.raises(TrainingError, match=r"LoRA was due already when this phase of ReLoRA began, at update 4"):
        optimizer.step()
    late.coming = ()  # as it says
    late.scheduler(optimizer)
    optimizer.step()
    assert late.step == 5


def test_an_update_after_the_end_of_a_phase_is_refused() -> None:
    session = begin("one", [rs.Then(LORA, steps=2)]).steps(2)
    before = session.state()
    with pytest.raises(TrainingError, match="This phase of Full ended at update 2, and the next has not begun"):
        session.step()
    same(before, session.state(), what="a refused update")
    go(session, 1)


def test_losses_must_be_known_where_a_phase_ends_by_them() -> None:
    session = begin("one", [rs.Then(LORA, loss=0.1, window=2)])
    loss_of(session.model, batch(0)).backward()
    with pytest.raises(TrainingError, match=r"depends on the loss.*run\.loss"):
        session.optimizer.step()
    assert session.run.step == 0
    session.optimizer.zero_grad()
    session.steps(1)
    by_steps = begin("one", [rs.Then(LORA, steps=2)])
    loss_of(by_steps.model, batch(0)).backward()
    by_steps.optimizer.step()  # nobody asks


def test_an_evaluation_is_not_heard() -> None:
    session = begin("one", [rs.Then(LORA, loss=0.1, window=9)])
    session.model.eval()
    session.run.loss(loss_of(session.model, batch(0)))
    session.model.train()
    with torch.no_grad():
        session.run.loss(loss_of(session.model, batch(0)))
    assert session.run.watch is not None
    assert session.run.watch.open().tolist() == [0, 0]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_window_has_the_mean_of_its_micro_batches(accumulate: int) -> None:
    session = begin("one", [rs.Then(LORA, loss_change=1e-6, windows=2, window=2)], accumulate=accumulate).steps(6)
    losses = torch.tensor(session.losses, dtype=torch.float64)  # Session has the mean over micro-batches of an update
    assert session.run.watch is not None
    seen = [(s.step, s.loss) for s in session.run.watch.snapshots]
    assert [step for step, _ in seen] == [4, 6]
    assert [loss for _, loss in seen] == pytest.approx(losses.reshape(3, 2).mean(1)[1:].tolist(), rel=1e-6)
    assert session.run.watch.snapshots[0].norms == {}


def spoil(session: Session, ways: str) -> None:
    """A batch of huge or no loss whose update is not taken; of two micro-batches where they accumulate."""
    model, run = session.wrapped.train(), session.run
    for way in ways:
        run.loss(loss_of(model, batch(99)) * 1e6).backward()
        run.loss(loss_of(model, batch(98)) * (math.nan if way == "s" else 1e5)).backward()
        if way == "s":  # skipped: gradients are not finite
            before = run.skipped
            session.optimizer.step()
            assert run.skipped == before + 1
            assert run.watch is not None
            assert not run.watch.heard
        model.zero_grad()  # else the loop left the step out
        if way == "n":  # and there not even a backward pass is made
            run.loss(loss_of(model, batch(97)) * 1e7)


def heard_of(ahead: bool, ways: str, engine: Engine = "one", on: int | None = None) -> list[tuple[int, float]]:
    """Snapshots of 6 updates, with batches between them that made no step."""
    with pytest.MonkeyPatch.context() as patch:
        if ahead:
            patch.setattr(event, "_on_one_gpu", lambda gradients: True)
        session = begin(engine, [rs.Then(LORA, loss=0.0, loss_change=1e-6, windows=3, window=2)], accumulate=2)
        for _ in range(6):
            if ways and (on is None or on == session.run.step):
                spoil(session, ways)
            session.step()
        assert session.run.watch is not None
        return [(s.step, s.loss) for s in session.run.watch.snapshots]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("ways", ["s", "l", "n", "sln"])
def test_losses_of_updates_that_were_not_taken_do_not_count(ways: str, ahead: bool) -> None:
    """Ahead: as on a GPU, where the update is launched before anybody knows."""
    assert heard_of(ahead, ways) == heard_of(ahead, "")
    assert len(heard_of(ahead, "")) == 3


def spoilt_on_ranks(engine: Engine, ways: str) -> list[Any]:
    return [heard_of(False, some, engine, 3) for some in ("", ways)]


@pytest.mark.parametrize(("engine", "ways"), [("ddp", "sln"), ("fsdp2", "s")])
def test_nor_on_two_ranks_which_have_the_same(engine: Engine, ways: str, pool: Pool) -> None:
    (one, spoilt), (two, too) = pool.run(spoilt_on_ranks, engine, ways)
    assert one == two == spoilt == too


def test_a_step_that_a_loss_scaler_leaves_out_does_not_count() -> None:
    seen = []
    for scale in (1.0, 2.0**127):  # which overflows and is halved, again and again
        run = rs.attach(tiny(), FULL, total_steps=20, then=[rs.Then(LORA, loss=0.0, window=2)])
        optimizer = torch.optim.SGD([p for _, p in run.trainable()], lr=0.01)
        run.carry(optimizer)
        scaler, calls = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=99), 0
        while run.step < 2:
            scaler.scale(run.loss(loss_of(run.model.train(), batch(run.step)) * 100)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            calls += 1
        assert run.skipped == 0, "the run was not asked"
        assert run.watch is not None
        seen.append((calls, [s.loss for s in run.watch.snapshots]))
    assert seen[0][0] == 2 < seen[1][0]
    assert seen[1][1] == pytest.approx(seen[0][1], rel=1e-6)


def test_it_is_due_once_the_mean_of_a_window_is_low_enough() -> None:
    probe = begin("one", [rs.Then(LORA, loss=0.0, window=2)]).steps(4)
    means = [sum(probe.losses[k : k + 2]) / 2 for k in (0, 2)]
    assert means[1] < means[0]
    session = begin("one", [rs.Then(LORA, loss=(means[0] + means[1]) / 2, window=2)])
    for _ in range(3):
        session.step()
        assert session.run.due() is None
    session.step()
    assert session.run.due() == LORA


def over_ranks() -> dict[str, Any]:
    session = begin("ddp", [rs.Then(LORA, loss_change=1e-6, windows=2, window=2)]).steps(4)
    assert session.run.watch is not None
    return {"mine": session.losses, "seen": [s.loss for s in session.run.watch.snapshots]}


def test_under_ddp_it_is_the_mean_over_ranks(pool: Pool) -> None:
    one, two = pool.run(over_ranks)
    assert one["mine"] != two["mine"]
    assert one["seen"] == two["seen"], "decisions are the same everywhere"
    both = torch.tensor([one["mine"], two["mine"]], dtype=torch.float64).mean(0)
    assert one["seen"] == pytest.approx(both.reshape(2, 2).mean(1).tolist(), rel=1e-6)


THEN = [rs.Then(LORA, loss=100.0, window=3, lr=1e-2), rs.Then(GaLore(rank=2), loss_change=1000.0, windows=2, window=2)]


def known(session: Session, steps: int) -> tuple[Session, list[Any]]:
    """So many updates, and what the run knew after each: the windows too."""
    seen = []
    for _ in range(steps):
        session = go(session, 1)
        seen.append(session.run.describe())
    return session, seen


def resume(engine: Engine, at: int) -> list[Any]:
    """Steps 0 … 9 with changes after 3 and 7, straight through and by a file after ``at``."""
    whole, seen = known(begin(engine, THEN), 9)
    first = go(begin(engine, THEN), at)
    saved, losses = first.save(), list(first.losses)
    again, seen_again = known(Session.load(saved, engine, tiny(), losses=losses), 9 - at)
    same(whole.state(), again.state(), what=f"resumed after {at}")
    assert whole.losses == again.losses
    assert route(whole.run) == route(again.run) == [("full", 0, 3), ("lora", 3, 7), ("galore", 7, None)]
    assert seen_again == seen[at:]
    assert [len(now["snapshots"]) for now in seen] == [0, 0, 1, 0, 1, 1, 2, 0, 0]
    return seen


@pytest.mark.parametrize("at", range(1, 9))
def test_resume_at_every_update(at: int) -> None:
    resume("one", at)


@pytest.mark.parametrize("at", [2, 3, 5, 7])
def test_resume_under_ddp_in_the_middle_of_a_window(at: int, pool: Pool) -> None:
    one, two = pool.run(resume, "ddp", at)
    assert one == two


def test_minutes_are_of_training_and_go_on_when_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("rankshift.run.time.monotonic", lambda: clock[0])
    session = begin("one", [rs.Then(LORA, minutes=1.0)])
    clock[0] += 500  # before the optimizer is there, nothing trains
    session = Session("one", session.run)
    for wait in (20.0, 20.0):
        clock[0] += wait
        session.step()
        assert session.run.due() is None
    saved = session.save()
    clock[0] += 5000  # the process was away
    again = Session.load(saved, "one", tiny())
    clock[0] += 19.0
    again.step()
    assert again.run.due() is None  # 59 seconds
    clock[0] += 1.0
    again.step()
    assert again.run.due() == LORA
    run = again.run.shift(LORA)
    assert run.due() is None


def test_minutes_of_each_phase_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("rankshift.run.time.monotonic", lambda: clock[0])
    run = rs.attach(tiny(), FULL, then=[rs.Then(LORA, minutes=1.0), rs.Then(FULL, minutes=1.0)])
    for _ in range(2):
        session = Session("one", run)
        for _ in range(3):
            assert session.run.due() is None
            clock[0] += 25.0
            session.step()
        due = session.run.due()
        assert due is not None
        run = session.run.shift(due)
    assert route(run) == [("full", 0, 3), ("lora", 3, 6), ("full", 6, None)]


def over_clocks() -> list[Any]:
    """Two processes, whose clocks go at different rates."""
    clock = [1000.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rankshift.run.time.monotonic", lambda: clock[0])
        session, due = begin("ddp", [rs.Then(LORA, minutes=1.0)]), []
        for _ in range(4):
            clock[0] += 25.0 if shard.rank() == 0 else 1000.0
            session.step()
            due.append(session.run.due() is not None)
            if due[-1]:
                break
    return due


def test_minutes_are_those_of_the_first_process(pool: Pool) -> None:
    assert pool.run(over_clocks) == [[False, False, True]] * 2


def test_the_schedule_of_a_phase_ends_where_the_next_is_listed() -> None:
    session = go(begin("one", [rs.Then(rs.ReLoRA(rank=2, every=9), steps=3), rs.Then(LORA, steps=5)]), 4)
    assert session.run.phase_end == 8
    rates = []
    optimizer = session.run.optimizer(lr=1.0)
    schedule = session.run.scheduler(optimizer)
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        session.run.loss(loss_of(session.model, batch(0))).backward()
        optimizer.step()
        schedule.step()
    assert session.run.due() == LORA
    assert rates == sorted(rates, reverse=True)
    assert 0.1 < rates[-1] < 0.3 < rates[0] < 1, "from 1 to a tenth over 5 updates"


def unmoved(run: rs.Run, steps: int, inflate: str = "") -> list[int]:
    """Updates at rate 0 on one batch; after which of them it was due. ``inflate``: a weight to scale in each."""
    model = run.model.train()
    optimizer, due = run.optimizer(lr=0.0), []
    for step in range(1, steps + 1):
        run.loss(loss_of(model, batch(0))).backward()
        if inflate:
            with torch.no_grad():
                model.get_parameter(inflate).mul_(1.02)
        optimizer.step()
        optimizer.zero_grad()
        if run.due() is not None:
            due.append(step)
            break
    return due


def test_what_stands_still_has_converged_after_exactly_so_many_windows() -> None:
    then = rs.Then(LORA, loss_change=1.0, weight_change=1.0, window=3, windows=3)
    assert unmoved(rs.attach(tiny(), FULL, then=[then]), 12) == [9]
    then = rs.Then(LORA, weight_change=1.0, window=2, windows=2)
    assert unmoved(rs.attach(tiny(), FULL, then=[then]), 12) == [4]


def test_one_weight_that_moves_keeps_a_phase_going() -> None:
    then = rs.Then(LORA, weight_change=1.0, window=2, windows=2)
    assert unmoved(rs.attach(tiny(), FULL, then=[then]), 8, "blocks.0.q.weight") == []
    # norms are watched of linear layers: what a LayerNorm does is no matter
    assert unmoved(rs.attach(tiny(), FULL, then=[then]), 8, "blocks.0.norm1.weight") == [4]


def norms_of_two() -> dict[str, float]:
    session = begin("fsdp2", [rs.Then(LORA, weight_change=1.0, window=2, windows=2)]).steps(2)
    assert session.run.watch is not None
    seen = dict(session.run.watch.snapshots[-1].norms)
    whole = session.state(whole=True)
    for name, norm in seen.items():
        assert norm == pytest.approx(whole[name].double().norm().item(), rel=1e-9), name
    return seen


def test_under_fsdp2_norms_are_of_whole_weights(pool: Pool) -> None:
    one, two = pool.run(norms_of_two)
    assert one == two
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in one} >= {"q", "up", "down", "head"}
    assert not any("norm" in name for name in one)


def test_what_cannot_be_is_refused_when_it_is_attached() -> None:
    model = tiny()
    before = {name: p.clone() for name, p in model.named_parameters()}
    for then, error, text in (
        ([rs.Then(LORA, steps=9), rs.Then(FULL, steps=9)], ConfigError, "at update 18 at the earliest"),
        ([rs.Then(LoRA(rank=99), steps=2)], RankTooLarge, "rank 99"),
        ([rs.Then(LoRA(targets="none"), steps=2)], rs.errors.UnmatchedTarget, "none"),
        ([LORA], ConfigError, r"list of rs\.Then"),
    ):
        with pytest.raises(error, match=text):
            rs.attach(model, FULL, total_steps=18, then=then)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the phase before trains none of them"):
        rs.attach(model, LORA, then=[rs.Then(FULL, weight_change=1.0)])
    run = rs.attach(model, FULL)  # nothing is attached
    assert {name for name, _ in run.trainable()} == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    run.coming = (rs.Then(LORA, steps=18),)
    run.total_steps = 18
    with pytest.raises(ConfigError, match="at update 18 at the earliest"):
        run.optimizer()
    with pytest.raises(ConfigError, match="at update 19 at the earliest"):
        run.coming = (rs.Then(LORA, steps=19),)


PRE = rs.PreLoRA(window=3, windows=3, joint=1, max_rank=8)  # goes on after 9 updates of it at the earliest
SWITCH = rs.SwitchLoRA(rank=2)
STAGES = rs.SoRA(rank=2, sparsity=(1, 2))


@pytest.mark.parametrize(
    ("first", "then", "total", "text"),
    [
        (FULL, [rs.Then(PRE, steps=4)], 13, "after update 13 at the earliest, and ends at 13"),
        (FULL, [rs.Then(PRE, loss=1.0, window=4)], 13, "after update 13 at the earliest, and ends at 13"),
        (FULL, [rs.Then(PRE, minutes=1)], 9, "after update 9 at the earliest, and ends at 9"),
        (FULL, [rs.Then(PRE, steps=4), rs.Then(LORA, steps=9)], 40, "after update 13 .*and ends at 13"),
        (FULL, [rs.Then(PRE, steps=4), rs.Then(LORA, steps=9)], None, "after update 13 .*and ends at 13"),
        (PRE, [rs.Then(LORA, steps=3)], None, "after update 9 .*and ends at 3"),
        (PRE, [], 9, "after update 9 .*and ends at 9"),
        (FULL, [rs.Then(SWITCH, steps=3)], None, r"SwitchLoRA as configured .*total_steps= to attach"),
        (FULL, [rs.Then(LORA, minutes=1, loss=1.0, window=100)], 10, r"loss=1.0, window=100\) is looked at after 100"),
        (FULL, [rs.Then(LORA, steps=4), rs.Then(FULL, loss=1.0, minutes=1, window=6)], 10, "ends 6 after the phase"),
        (STAGES, [rs.Then(LORA, steps=5)], 10, "SoRA's 2 stages .*begin at update 5, and this phase ends at 5"),
        (FULL, [rs.Then(STAGES, steps=9)], 10, "SoRA has 2 of 2 stages to go and 1 updates"),
    ],
)
def test_a_phase_that_is_too_short_is_refused_when_it_is_attached(
    first: Method, then: list[rs.Then], total: int | None, text: str
) -> None:
    model = tiny()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match=text):
        rs.attach(model, first, total_steps=total, then=then)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    rs.attach(model, FULL)  # nothing is attached


def test_one_update_more_is_enough() -> None:
    begin("one", [rs.Then(PRE, steps=10)])
    rs.attach(tiny(), FULL, total_steps=14, then=[rs.Then(PRE, steps=4)])
    rs.attach(tiny(), FULL, total_steps=14, then=[rs.Then(PRE, loss=1.0, window=4)])
    rs.attach(tiny(), FULL, then=[rs.Then(PRE, steps=4), rs.Then(LORA, steps=10)])
    rs.attach(tiny(), PRE, then=[rs.Then(LORA, steps=10)])
    rs.attach(tiny(), STAGES, total_steps=10, then=[rs.Then(LORA, steps=6)])


def test_a_phase_that_came_too_late_leaves_the_run_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knew when it would begin."""
    clock = [1000.0]
    monkeypatch.setattr("rankshift.run.time.monotonic", lambda: clock[0])
    session = begin("one", [rs.Then(PRE, minutes=1.0)]).steps(10)
    clock[0] += 100.0
    session.step()
    assert session.run.due() == PRE
    before = session.state()
    with pytest.raises(ConfigError, match="after update 20 at the earliest, and ends at 20") as caught:
        session.run.shift(PRE)
    assert "has changed nothing" in caught.value.__notes__[0]
    same(before, session.state(), what="a refused shift")
    again = Session.load(session.save(), "one", tiny())
    for one in (session, again):
        one.run.coming = ()
        one.steps(3)
    same(session.state(), again.state())
    session.run.shift(LORA)


def test_what_a_shift_by_hand_lacks_is_said_before_anything_changes() -> None:
    session = Session("one", rs.attach(tiny(), FULL)).steps(2)
    before = session.state()
    with pytest.raises(ConfigError, match="SwitchLoRA as configured follows a schedule"):
        session.run.shift(SWITCH)
    session.run.coming = [rs.Then(FULL, weight_change=1.0, window=2)]
    with pytest.raises(ConfigError, match="the phase before trains none of them"):
        session.run.shift(LORA)
    same(before, session.state())
    session.run.coming = ()
    session.steps(1)
    session.run.shift(LORA)


def test_what_cannot_be_seen_in_a_later_phase_is_refused_when_it_is_attached() -> None:
    norms, loss = rs.Then(FULL, weight_change=1.0, window=2), rs.Then(FULL, loss=1.0, window=2)
    with pytest.raises(ConfigError, match="the phase before trains none of them"):
        begin("one", [rs.Then(LORA, steps=1), norms])
    own = rs.PreLoRA(window=2, windows=2, max_rank=4)
    with pytest.raises(ConfigError, match="PreLoRA watches the loss for phases of its own"):
        begin("one", [rs.Then(own, steps=1), loss])
    with pytest.raises(ConfigError, match="PreLoRA watches the loss for phases of its own"):
        begin("one", [loss], own)
    for method in (LORA, GaLore(rank=2, targets="q"), rs.ReLoRA(rank=2)):
        begin("one", [rs.Then(method, steps=1), loss if method is LORA else norms])


def test_other_phases_in_a_saved_state_are_refused() -> None:
    state = go(begin("one", [rs.Then(LORA, steps=3)]), 1).run.state_dict()
    for other in ([rs.Then(LORA, steps=4)], [rs.Then(FULL, steps=3)], [rs.Then(LORA, steps=3)] * 2):
        run = rs.attach(tiny(), FULL, total_steps=20, then=other)
        with pytest.raises(WrongBase, match="other phases to come"):
            run.load_state_dict(state)
        assert run.step == 0
    for mine in ((), [rs.Then(LORA, steps=3)]):
        run = rs.attach(tiny(), FULL, total_steps=20, then=mine)
        run.load_state_dict(state)
        assert (run.step, run.coming) == (1, (rs.Then(LORA, steps=3),))


def test_another_trainer_is_refused_a_run_that_changes_phases() -> None:
    staged = [
        rs.attach(tiny(), FULL, total_steps=20, then=[rs.Then(LORA, steps=3)]),
        rs.attach(tiny(), rs.PreLoRA(max_rank=8)),
        rs.attach(tiny(), rs.PreLoRA(max_rank=8, stage="joint")),
        rs.attach(tiny(), STAGES, total_steps=20),
    ]
    arguments = SimpleNamespace(
        optim="adamw_torch", deepspeed=None, fsdp=None, learning_rate=1e-3, adam_beta1=0.9, adam_beta2=0.99,
        adam_epsilon=1e-8, weight_decay=0.0,
    )  # fmt: skip
    for run in staged:
        with pytest.raises(ConfigError, match=r"is to go on as another phase.*Use rs\.Trainer\(run=run"):
            run.optimizer_cls_and_kwargs(arguments)
    staged[0].coming = ()
    for run in (
        staged[0],
        rs.attach(tiny(), rs.PreLoRA(max_rank=8, stage="frozen")),
        rs.attach(tiny(), rs.SoRA(rank=2)),
    ):
        assert run.optimizer_cls_and_kwargs(arguments)[1]["lr"] == 1e-3


# ---- moments


def changed(method: Method, to: Method, **options: Any) -> tuple[dict[str, dict[str, Tensor]], Session]:
    """The states of all tensors after three updates of a method, by name, and the next method's session."""
    session = Session("one", rs.attach(tiny(), method, total_steps=20), **options).steps(3)
    states = {n: {k: t.clone() for k, t in session.optimizer.state[p].items()} for n, p in session.run.trainable()}
    return states, Session("one", session.run.shift(to))


def gone_along(states: dict[str, dict[str, Tensor]], after: Session) -> set[str]:
    found = set()
    for name, p in after.run.trainable():
        state = after.optimizer.state.get(p, {})
        assert not state or name in states, f"{name} has a state from nowhere"
        if state:
            assert state.keys() == states[name].keys()
            assert all(torch.equal(state[k], states[name][k]) for k in state), name
            assert int(state["step"]) == 3
            found.add(name)
    return found


def test_moments_of_what_goes_on_training_go_along(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "rankshift"):
        states, after = changed(FULL, Full(targets=("q", "norm1")))
    assert gone_along(states, after) == {
        f"blocks.0.{leaf}" for leaf in ("q.weight", "q.bias", "norm1.weight", "norm1.bias")
    }
    names = r"blocks\.0\.norm1\.weight, blocks\.0\.norm1\.bias, blocks\.0\.q\.weight and 1 more"
    assert re.search(rf"Adam's moments go on for 4 of 4 tensors from the phase before: {names}\.", caplog.text)
    # from there on it is the training that never stopped, of those four
    alone = Session("one", rs.attach(tiny(), Full(targets=("q", "norm1")), total_steps=20)).steps(3)
    direct = Session("one", alone.run.shift(Full(targets=("q", "norm1"))))
    straight = Session("one", rs.attach(tiny(), Full(targets=("q", "norm1")), total_steps=20)).steps(3)
    straight.scheduler = torch.optim.lr_scheduler.LambdaLR(straight.optimizer, lambda n: 1 / (1 + 0.3 * n))
    direct.steps(3)
    straight.steps(3)
    same(direct.state(), straight.state(), what="a phase that is the one before again")


FACTORS = r"\(blocks\.0\.q\.A, blocks\.0\.q\.B, blocks\.0\.k\.A and 11 more\)"


@pytest.mark.parametrize(
    ("method", "to", "why"),
    [
        (LORA, LoRA(rank=2), rf"anew for 14 {FACTORS}, which are others than those of that name before"),
        (FULL, LORA, rf"anew for 14 {FACTORS}, which are new\."),
        (LORA, FULL, r"anew for 19 \(embed\.weight, .* and 16 more\), which were frozen before\."),
    ],
    ids=["lora-lora", "full-lora", "lora-full"],
)
def test_moments_of_what_is_another_tensor_begin_anew(
    method: Method, to: Method, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "rankshift"):
        states, after = changed(method, to)
    assert gone_along(states, after) == set()
    assert f"Adam's moments go on for 0 of {len(list(after.run.trainable()))} tensors" in caplog.text
    assert re.search(why, caplog.text)
    after.steps(1)


def test_the_log_says_of_which_and_why_of_others_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "rankshift"):
        changed(GaLore(rank=2, targets="q"), rs.ReLoRA(rank=2, targets="down"))
    said = re.search(r"go on for (\d+) of (\d+) tensors from the phase before: (.*)", caplog.text)
    assert said is not None
    assert said[1] == "17"  # all but q, which was projected, down, and its new factors
    assert said[2] == "20"
    assert said[3].startswith("embed.weight, ")
    assert "begin anew for 2 (blocks.0.down.A, blocks.0.down.B), which are new" in said[3]
    assert (
        "begin anew for 1 (blocks.0.q.weight), whose state is of no use here: it is that of a projected gradient, and "
        "here this tensor takes plain AdamW." in said[3]
    )
    session = Session("one", rs.attach(tiny(), FULL))  # without an update
    caplog.clear()
    with caplog.at_level(logging.WARNING, "rankshift"):
        Session("one", session.run.shift(Full(targets="q")))
    assert "begin anew for 2 (blocks.0.q.weight, blocks.0.q.bias), which had none yet." in caplog.text


def test_the_log_says_what_an_adapter_takes_over(caplog: pytest.LogCaptureFixture) -> None:
    stages = rs.SoRA(rank=4, alpha=8, sparsity=(12, 20), gate_init="normal")
    with caplog.at_level(logging.WARNING, "rankshift"):
        changed(stages, replace(stages, stage=1))
    assert "go on for 21 of 21 tensors from the phase before: blocks.0.q.A, blocks.0.q.B, " in caplog.text
    assert "anew" not in caplog.text


def test_biases_in_place_and_whole_modules_go_along() -> None:
    method = LoRA(rank=2, bias="lora_only", modules_to_save=("head",), targets=("q", "up"))
    states, after = changed(method, FULL)
    assert gone_along(states, after) == {"blocks.0.q.bias", "blocks.0.up.bias", "head.weight"}


def test_other_optimizers_states_stay_behind(caplog: pytest.LogCaptureFixture) -> None:
    run = rs.attach(tiny(), FULL, total_steps=20)
    optimizer = torch.optim.SGD([p for _, p in run.trainable()], lr=0.1, momentum=0.9)
    run.carry(optimizer)
    run.model.train()
    for step in range(2):
        loss_of(run.model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = Session("one", run.shift(Full(targets="q")))
    assert not after.optimizer.state
    assert (
        "begin anew for 2 (blocks.0.q.weight, blocks.0.q.bias), whose moments SGD kept in its own way." in caplog.text
    )
    after.steps(2)


@pytest.mark.parametrize("named", [True, False])
def test_adams_states_of_another_optimizer_stay_behind_whether_it_knows_names(
    named: bool, caplog: pytest.LogCaptureFixture
) -> None:
    run = rs.attach(tiny(), FULL, total_steps=20)
    trainable = list(run.trainable())
    optimizer = torch.optim.AdamW(trainable if named else [p for _, p in trainable], lr=0.1)
    run.carry(optimizer)
    loss_of(run.model.train(), batch(0)).backward()
    optimizer.step()
    after = Session("one", run.shift(Full(targets="q")))
    assert not after.optimizer.state
    assert "(blocks.0.q.weight, blocks.0.q.bias), whose moments AdamW kept in its own way." in caplog.text


SPARSER = rs.SoRA(rank=4, alpha=8, sparsity=(0.01, 0.02, 0.03))  # no gate closes


@pytest.mark.parametrize(
    ("method", "between", "to", "more"),
    [
        (FULL, [rs.ReLoRA(rank=2, targets="down")], FULL, {"blocks.0.down.weight"}),
        (FULL, [Full(), rs.SwitchLoRA(rank=2, targets="down")], Full(), {"blocks.0.down.weight"}),
        (SPARSER, [replace(SPARSER, stage=1)], replace(SPARSER, stage=2), set()),
    ],
    ids=["folded", "folded twice", "taken over"],
)
def test_moments_go_through_a_phase_without_an_update(
    method: Method, between: list[Method], to: Method, more: set[str]
) -> None:
    """Whether that had an optimizer or not; what it froze, or folded, begins anew."""
    for optimizer in (False, True):
        session = Session("one", rs.attach(tiny(), method, total_steps=20)).steps(3)
        states = {n: {k: t.clone() for k, t in session.optimizer.state[p].items()} for n, p in session.run.trainable()}
        run = session.run
        for middle in between:
            run = run.shift(middle)
            if optimizer:
                run.optimizer(lr=1e-3)
        after = Session("one", run.shift(to))
        assert gone_along(states, after) == {name for name, _ in after.run.trainable()} - more
        late = Session("one", after.steps(1).run.shift(FULL)).run
        assert late.step == 4, "and only what an update was taken from counts then"


def test_moments_of_long_ago_are_not_those_of_now() -> None:
    """A phase whose updates another optimizer took."""
    _, after = changed(FULL, FULL)
    run = after.run
    optimizer = torch.optim.SGD([p for _, p in run.trainable()], lr=0.1)
    run.carry(optimizer)
    loss_of(run.model.train(), batch(0)).backward()
    optimizer.step()
    assert not Session("one", run.shift(FULL)).optimizer.state


def test_a_shift_without_an_optimizer() -> None:
    run = rs.attach(tiny(), FULL, total_steps=20).shift(LORA).shift(FULL)
    assert route(run) == [("full", 0, 0), ("lora", 0, 0), ("full", 0, None)]
    Session("one", run).steps(1)


def test_a_second_optimizer_of_a_phase_begins_with_the_same_moments() -> None:
    states, after = changed(FULL, Full(targets="q"))
    again = Session("one", after.run)
    assert gone_along(states, again) == {"blocks.0.q.weight", "blocks.0.q.bias"}
    again.steps(1)
    later = Session("one", again.run)
    assert not later.optimizer.state, "in mid-phase a new optimizer is new"


def test_a_resumed_phase_does_not_tell_of_moments_that_it_loads(caplog: pytest.LogCaptureFixture) -> None:
    _, after = changed(FULL, Full(targets="q"))
    saved = after.save()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "rankshift"):
        again = Session.load(saved, "one", tiny())
    assert "moments" not in caplog.text
    same(after.steps(2).state(), again.steps(2).state())
