"""The optimizer step is the clock: when events fire, what counts as an update, and what stops a run."""

import copy
import logging
import pickle
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_state_dict
from torch.utils.checkpoint import checkpoint

import rankshift as rs
from rankshift.core.errors import AttachError, NoGradient, NonFinite, StepWithoutForward
from rankshift.core.event import Moment
from rankshift.methods.lora import LoRA

WINDOW, GRADS, UPDATED = Moment.WINDOW, Moment.GRADS, Moment.UPDATED
DIARY = []  # (moment, step, adapter, gradient of B, B) of every application


@dataclass(frozen=True)
class Note:
    moment: Moment
    every: int = 1

    def due(self, tick):
        return tick.step % self.every == 0

    def apply(self, adapter, tick):
        gradient = None if adapter.B.grad is None else adapter.B.grad.clone()
        DIARY.append((self.moment, tick.step, adapter.site, gradient, adapter.B.detach().clone()))


@dataclass(frozen=True, kw_only=True)
class Noted(LoRA):
    name: ClassVar[str] = ""  # not in the registry
    notes: tuple = field(default=())

    def __post_init__(self):
        pass

    def events(self):
        return tuple(Note(moment) for moment in (UPDATED, GRADS, WINDOW))  # order here must not matter


@pytest.fixture(autouse=True)
def diary():
    DIARY.clear()
    return DIARY


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g) / 3

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def batch(step=0):
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(step))


def learn(model, step=0):
    loss = model(batch(step)).square().mean()
    loss.backward()
    return loss


def attached(method=None, **optimizer):
    model = Net()
    run = rs.attach(model, method or rs.LoRA(rank=2))
    return model, run, run.optimizer(lr=1e-2, **optimizer)


def moments():
    return [(moment, step) for moment, step, site, _, _ in DIARY if site == "first"]


def cycle(steps):
    return [(WINDOW, 0)] + [m for k in range(steps) for m in ((GRADS, k), (UPDATED, k), (WINDOW, k + 1))]


def test_order_under_accumulation_and_clipping():
    model, run, optimizer = attached(Noted(rank=2))
    del DIARY[:-2]  # a window is opened at attach and again at bind: the same one
    for step in range(3):
        for part in range(4):
            learn(model, 4 * step + part)
        torch.nn.utils.clip_grad_norm_([p for _, p in run.trainable()], 1e-3)
        optimizer.step()
        optimizer.zero_grad()
    assert moments() == cycle(3)
    assert run.step == 3
    at = {(m, k, site): (g, B) for m, k, site, g, B in DIARY}
    for step in range(3):
        clipped, before = at[GRADS, step, "first"]
        assert clipped.norm() <= 1e-3  # after clipping
        assert torch.equal(before, at[WINDOW, step, "first"][1])  # the update is not taken
        assert not torch.equal(at[UPDATED, step, "first"][1], before)  # now it is


def test_order_under_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model, run, optimizer = attached(Noted(rank=2))
    del DIARY[:-2]
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    model, optimizer = accelerator.prepare(model, optimizer)
    del DIARY[2:]  # prepare reloads the optimizer's state, which opens the same window once more
    for part in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(model(batch(part)).square().mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
            optimizer.zero_grad()
    assert moments() == cycle(2)
    assert run.step == 2


def test_two_runs_do_not_hear_each_other():
    model, run, optimizer = attached(Noted(rank=2))
    _other, second, idle = attached(Noted(rank=2))
    learn(model)
    optimizer.step()
    assert (run.step, second.step) == (1, 0)
    for _, p in second.trainable():
        p.grad = torch.ones_like(p)
    with pytest.raises(StepWithoutForward):
        idle.step()


def test_step_without_forward_is_refused():
    model, run, optimizer = attached()
    for act in (lambda: model.eval()(batch()).sum(), lambda: model.first(batch()).sum()):
        run.model.train()
        act().backward()
        before = [p.detach().clone() for _, p in run.trainable()]
        with pytest.raises(StepWithoutForward, match=r"not called in training mode"):
            optimizer.step()
        assert all(torch.equal(p, b) for (_, p), b in zip(run.trainable(), before, strict=True))
        optimizer.zero_grad()
    assert run.step == 0


def test_checkpoint_library_steps_are_no_updates():
    model, run, optimizer = attached(Noted(rank=2), weight_decay=0.1)
    DIARY.clear()
    before = [p.detach().clone() for _, p in run.trainable()]
    weights, state = get_state_dict(model, optimizer)
    assert run.step == 0
    assert DIARY == []
    assert all(torch.equal(p, b) for (_, p), b in zip(run.trainable(), before, strict=True))
    assert all(s["step"] == 0 for s in optimizer.state.values())  # Adam's bias correction begins at one as well

    def go_on(model, run, optimizer):
        for step in range(run.step, 6):
            learn(model, step)
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for _, p in run.trainable()]

    for k in (0, 1, 3):
        model, run, optimizer = attached(Noted(rank=2), weight_decay=0.1)
        for step in range(k):
            learn(model, step)
            optimizer.step()
            optimizer.zero_grad()
        weights, state = copy.deepcopy(get_state_dict(model, optimizer))
        whole = go_on(model, run, optimizer)
        model, run, optimizer = attached(Noted(rank=2), weight_decay=0.1)
        DIARY.clear()
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        assert run.step == k
        assert all(moment is WINDOW for moment, _ in moments())
        assert all(torch.equal(p, q) for p, q in zip(whole, go_on(model, run, optimizer), strict=True))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(poison, caplog, recwarn):
    model, run, optimizer = attached(Noted(rank=2), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)
    learn(model)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    before = copy.deepcopy([(p.detach(), optimizer.state[p]) for _, p in run.trainable()])
    DIARY.clear()
    with caplog.at_level(logging.WARNING, "rankshift"):
        for _ in range(2):
            learn(model, 1)
            next(p for _, p in run.trainable()).grad[0, 0] = poison
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    assert (run.step, run.skipped) == (1, 2)
    assert {(moment, step) for moment, step, *_ in DIARY} <= {(Moment.WINDOW, 1)}, (
        "the same update begins anew; nothing else happens"
    )
    assert [r.message for r in caplog.records] == ["Step 1: gradients are NaN or Inf; this update is skipped."]
    for (p, state), (_, q) in zip(before, run.trainable(), strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(state[k], optimizer.state[q][k]) for k in state)
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]
    learn(model, 2)
    optimizer.step()
    assert (run.step, run.skipped) == (2, 2)


def test_huge_finite_gradients_are_taken():
    model, run, optimizer = attached()
    learn(model)
    for _, p in run.trainable():
        p.grad.fill_(1e30)  # a sum of squares would overflow
    optimizer.step()
    assert (run.step, run.skipped) == (1, 0)


def test_twenty_skips_in_a_row_stop_the_run():
    model, run, optimizer = attached()

    def poisoned():
        learn(model)
        next(p for _, p in run.trainable()).grad.fill_(float("nan"))
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(19):
        poisoned()
    learn(model)
    optimizer.step()  # a good one ends the row
    optimizer.zero_grad()
    for _ in range(19):
        poisoned()
    with pytest.raises(NonFinite, match=r"20 updates in a row \(step 1\)"):
        poisoned()
    assert run.skipped == 39


def test_grad_scaler_that_skips_does_not_tick():
    model, run, optimizer = attached(Noted(rank=2))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    DIARY.clear()
    for step in range(3):
        scaler.scale(model(batch(step)).square().mean()).backward()
        if step == 1:
            next(p for _, p in run.trainable()).grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert (run.step, run.skipped) == (2, 0)  # the scaler skipped, not we
    assert [m for m in moments() if m[0] is UPDATED] == [(UPDATED, 0), (UPDATED, 1)]
    assert scaler.get_scale() == 2.0


def test_gradients_of_a_closure_are_judged_after_it():
    model, run, optimizer = attached(Noted(rank=2))
    del DIARY[:-2]

    def closure():
        optimizer.zero_grad()
        return learn(model)

    before = closure().item()
    optimizer.zero_grad()
    for _ in range(3):
        loss = optimizer.step(closure)
    assert run.step == 3
    assert moments() == cycle(3)
    assert loss.item() < before


def test_another_optimizer_can_carry():
    model = Net()
    run = rs.attach(model, Noted(rank=2))
    optimizer = torch.optim.SGD([p for _, p in run.trainable()], lr=0.1, momentum=0.9)
    run.carry(optimizer)
    del DIARY[:-2]
    for step in range(2):
        learn(model, step)
        optimizer.step()
        optimizer.zero_grad()
    assert moments() == cycle(2)
    state = optimizer.state_dict()
    assert state["param_groups"][0]["updates"] == 2
    later = torch.optim.SGD([p for _, p in run.trainable()], lr=0.1, momentum=0.9)
    run.carry(later)
    assert run.step == 2  # the count stays with the run
    del state["param_groups"][0]["updates"]  # written by a program that knows nothing of the count
    later.load_state_dict(state)
    assert run.step == 2


def test_a_rehearsal_of_another_optimizer_leaves_its_count_at_zero():
    """torch.distributed.checkpoint makes state by a step on zero gradients; AdamW counts that."""
    straight, rehearsed = [], []
    for seen in (straight, rehearsed):
        torch.manual_seed(0)
        model = Net()
        run = rs.attach(model, rs.LoRA(rank=2))
        optimizer = torch.optim.AdamW(list(run.trainable()), lr=1e-2)
        run.carry(optimizer)
        if seen is rehearsed:
            get_optimizer_state_dict(model, optimizer)
            assert run.step == 0
            assert {float(state["step"]) for state in optimizer.state.values()} == {0.0}
        for _ in range(2):
            optimizer.zero_grad()
            learn(model)
            optimizer.step()
        assert run.step == 2
        seen += [p.detach().clone() for _, p in run.trainable()]
    assert all(torch.equal(a, b) for a, b in zip(straight, rehearsed, strict=True))


def test_a_new_optimizer_releases_the_first():
    model, run, first = attached(Noted(rank=2))
    learn(model)
    first.step()
    second = run.optimizer(lr=1e-2)
    DIARY.clear()
    learn(model)
    with pytest.raises(AttachError, match="no longer drives a run"):
        first.step()
    assert (run.step, DIARY) == (1, [])
    learn(model)
    second.step()
    assert run.step == 2


def test_the_optimizer_of_an_ended_phase_is_refused():
    model, run, optimizer = attached()
    learn(model)
    optimizer.step()
    later = run.shift(rs.LoRA(rank=3))
    learn(model)
    with pytest.raises(AttachError, match="no longer drives a run"):
        optimizer.step()
    assert later.step == 1


def test_skips_count_over_phases():
    model, run, optimizer = attached()
    learn(model)
    next(p for _, p in run.trainable()).grad.fill_(float("nan"))
    optimizer.step()
    later = run.shift(rs.LoRA(rank=3))
    assert later.skipped == 1
    later.optimizer(lr=1e-2)
    assert later.skipped == 1


def test_a_copied_or_pickled_model_is_none_of_the_drivers_business():
    model, run, optimizer = attached()
    twin, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(batch()), model(batch()))
    learn(model)
    optimizer.step()  # takes the gradients: model was called
    optimizer.zero_grad()
    learn(twin)
    learn(thawed)
    for _, p in run.trainable():
        p.grad = torch.ones_like(p)
    with pytest.raises(StepWithoutForward):
        optimizer.step()
    assert run.step == 1
    assert len(pickle.dumps(twin)) < 3 * sum(p.numel() * 4 for p in model.parameters()) + 20_000  # no optimizer inside


@pytest.mark.parametrize("inplace", [False, True])
def test_forwards_of_a_compiled_model_are_seen(inplace):
    model, run, optimizer = attached()
    if inplace:
        model.compile(backend="eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
    for step in range(2):
        learn(compiled, step)
        optimizer.step()
        optimizer.zero_grad()
    assert run.step == 2
    optimizer = run.optimizer(lr=1e-2)  # the compiled code still holds the hook of the first binding
    learn(compiled)
    optimizer.step()
    assert run.step == 3
    for _, p in run.trainable():
        p.grad = torch.ones_like(p)
    with pytest.raises(StepWithoutForward):
        optimizer.step()
    torch.compiler.reset()


def test_evaluation_between_updates_counts_nothing():
    model, run, optimizer = attached(Noted(rank=2))
    DIARY.clear()
    for step in range(2):
        learn(model, step)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.eval()(batch())
        model.train()
    assert run.step == 2
    assert len(moments()) == 6


# ---- the first gradient


class Partial(Net):
    """``second`` is not used, or gets exactly zero."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        h = torch.tanh(self.first(x))
        if self.how == "reentrant":
            return checkpoint(self.second, x @ torch.ones(6, 8), use_reentrant=True) + h.sum(-1, keepdim=True)
        return h if self.how == "unused" else h[:, :4] + 0.0 * self.second(h)


@pytest.mark.parametrize(
    ("how", "name", "text"),
    [
        ("unused", "second.A", "received no gradient.*not used in forward.*use_reentrant=False"),
        ("zero", "second.B", "exactly zero in the first update"),
        pytest.param("reentrant", "second.A", "received no gradient", marks=pytest.mark.filterwarnings("ignore")),
    ],
)
def test_a_layer_that_learns_nothing_is_named(how, name, text):
    def fresh(check=True):
        model = Partial(how)
        run = rs.attach(model, rs.LoRA(rank=2))
        return model, run, run.optimizer(lr=1e-2, check_gradients=check)

    model, run, optimizer = fresh()
    before = [p.detach().clone() for _, p in run.trainable()]
    learn(model)
    with pytest.raises(NoGradient, match=text) as caught:
        optimizer.step()
    assert name in str(caught.value)
    assert all(torch.equal(p, b) for (_, p), b in zip(run.trainable(), before, strict=True))  # the step was not taken
    model, run, optimizer = fresh(check=False)
    learn(model)
    optimizer.step()
    assert run.step == 1


def test_what_starts_silent_may_be_zero_but_not_missing():
    model, run, optimizer = attached()
    learn(model)
    assert not run.adapter()["first"].A.grad.any()
    run.adapter()["first"].A.grad = None
    with pytest.raises(NoGradient, match=r"first\.A received no gradient"):
        optimizer.step()


def test_an_update_without_any_signal_is_not_judged():
    model, _run, optimizer = attached()
    (model(batch()).sum() * 0).backward()  # a batch without reward
    optimizer.step()
    optimizer.zero_grad()
    (model(batch()).sum() * 0 + model.first(batch()).sum()).backward()
    with pytest.raises(NoGradient, match=r"second\.B is exactly zero"):
        optimizer.step()


def test_whole_copies_must_be_reached():
    model = Partial("unused")
    run = rs.attach(model, rs.LoRA(rank=2, targets="first", modules_to_save=("second",)))
    optimizer = run.optimizer(lr=1e-2)
    learn(model)
    with pytest.raises(NoGradient, match=r"second\.weight received no gradient"):
        optimizer.step()


def test_full_training_lets_unreached_parameters_be():
    model = Partial("unused")
    run = rs.attach(model, rs.Full())
    optimizer = run.optimizer(lr=1e-2)
    learn(model)
    optimizer.step()
    assert run.step == 1
