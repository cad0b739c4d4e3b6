"""What a run hands to its next phase, what it leaves behind on the model, and which state it refuses to take over."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rankshift as rs
from rankshift.core.lesson import Ear


class Net(nn.Module):
    """Two layers, the second of which may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.whole = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        return self.norm(self.second(x) if self.whole else x)


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().double().train()


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
BODY = ("first", "second")
SORA = rs.SoRA(rank=3, targets=BODY)
PC = rs.PCLoRA(rank=2, targets=BODY)


def update(run: rs.Run, optimizer: torch.optim.Optimizer, factor: float = 1.0) -> None:
    task = run.model(X).square().mean()
    (run.loss(task, X) * factor).backward()
    optimizer.step()
    optimizer.zero_grad()


# ---- into the next phase


def test_the_first_gradients_of_a_later_stage_are_checked_too() -> None:
    run = rs.attach(net(), SORA)
    update(run, run.optimizer(lr=1e-2))
    run = run.shift(SORA)
    assert not run.changed, "a stage, not a fold"
    optimizer = run.optimizer(lr=1e-2)
    run.model.whole = False  # a head was changed between the stages, say: one layer is not used any more
    with pytest.raises(rs.errors.NoGradient, match=r"second\.[ABg] received no gradient"):
        update(run, optimizer)


@pytest.mark.parametrize("to", [SORA, rs.LoRA(rank=2, targets=BODY)], ids=["stage", "fold"])
def test_skipped_updates_are_counted_over_all_phases(to: rs.Method) -> None:
    run = rs.attach(net(), SORA)
    optimizer = run.optimizer(lr=1e-2)
    update(run, optimizer)
    update(run, optimizer, float("nan"))
    assert (run.step, run.skipped) == (1, 1)
    run = run.shift(to)
    assert (run.step, run.skipped) == (1, 1)
    optimizer = run.optimizer(lr=1e-2)
    assert run.skipped == 1
    update(run, optimizer, float("nan"))
    assert (run.step, run.skipped) == (1, 2)
    assert run.state_dict()["skipped"] == 2


@pytest.mark.parametrize("end", [rs.Run.merge, rs.Run.detach], ids=["merge", "detach"])
def test_after_a_later_stage_the_model_trains_what_it_trained_before(end: Callable[[rs.Run], nn.Module]) -> None:
    model = net()
    model.norm.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    assert set(before.values()) == {True, False}
    run = rs.attach(model, SORA)
    end(run.shift(SORA).shift(SORA))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


IN_MID_RUN = [
    (rs.Full(), rs.SwitchLoRA(rank=2, interval=9, freeze=2, targets=BODY)),
    (rs.ReLoRA(rank=2, targets=BODY), rs.Full()),
    (rs.LoRA(rank=2, targets=BODY, bias="all"), rs.Full()),
    (rs.SwitchLoRA(rank=2, interval=9, freeze=2, targets=BODY), rs.Full()),
    (SORA, SORA),
    (rs.GaLore(rank=2, targets=BODY, rest="train"), rs.Full()),
]


@pytest.mark.parametrize(("first", "then"), IN_MID_RUN, ids=[f"{a.name}-{b.name}" for a, b in IN_MID_RUN])
def test_what_is_frozen_in_mid_run_stays_so(first: rs.Method, then: rs.Method) -> None:
    run = rs.attach(net(), first, total_steps=30)
    update(run, run.optimizer(lr=1e-2))
    trained = run.model.norm.bias.requires_grad
    run.model.norm.bias.requires_grad_(False)
    held = run.model.norm.bias.detach().clone()
    run = run.shift(then)
    update(run, run.optimizer(lr=1e-2))
    assert torch.equal(run.model.norm.bias, held)
    assert run.model.norm.weight.requires_grad is then.trains_base
    if then.name == "full":
        again = rs.restore(net(), run.state_dict())
        assert not again.model.norm.bias.requires_grad
        run.model.norm.bias.requires_grad_(True)
        run = run.shift(rs.Full())
        assert run.model.norm.bias.requires_grad
    if trained:
        assert run.merge().norm.bias.requires_grad, "as it came"


def test_a_target_that_was_frozen_in_mid_run_ends_nothing() -> None:
    run = rs.attach(net(), rs.Full(), total_steps=30)
    optimizer = run.optimizer(lr=1e-2)
    update(run, optimizer)
    run.model.first.weight.requires_grad_(False)
    with pytest.raises(rs.errors.TargetError, match=r"first\.weight is frozen"):
        run.shift(rs.SwitchLoRA(rank=2, interval=9, freeze=2, targets=BODY))
    assert run.method == rs.Full()
    update(run, optimizer)
    assert run.step == 2


# ---- left behind


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def faded() -> rs.Run:
    """PC-LoRA at the end of its decay, its optimizer still there."""
    run = rs.attach(net(), PC, total_steps=1)
    update(run, run.optimizer(lr=1e-2))
    return run


@pytest.mark.parametrize("how", ["merge", "detach", "compress", "shift"])
def test_an_ended_run_leaves_no_hook(how: str) -> None:
    run = faded()
    model = run.model
    assert hooks(model) > 0
    ends = {"merge": run.merge, "detach": run.detach, "compress": run.compress}
    if how == "shift":
        run.shift(rs.LoRA(rank=1, targets=BODY))
    else:
        ends[how]()
    assert hooks(model) == 0


def test_a_stage_leaves_no_hook_of_the_one_before() -> None:
    run = rs.attach(net(), SORA)
    before = hooks(run.model)
    update(run, run.optimizer(lr=1e-2))
    assert hooks(run.shift(SORA).model) == before


def test_an_ended_run_keeps_no_activation() -> None:
    """Of a forward whose loss nobody asked for."""
    run = rs.attach(net(), PC, total_steps=4)
    seen: list[weakref.ref[Tensor]] = []
    hook = run.model.norm.register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output)))
    y = run.model(X)
    hook.remove()
    del y
    gc.collect()
    assert seen[0]() is not None, "it waits for run.loss"
    run.detach()
    gc.collect()
    assert seen[0]() is None


def test_who_attends_anew_has_missed_nothing() -> None:
    model, ear = net(), Ear()
    ear.attend(model, {"first": model.first})
    model(X), model(X)
    assert ear.waiting
    assert ear.missed
    ear.attend(model, {"second": model.second})
    assert not ear.waiting
    assert not ear.unanswered()
    model(X)
    heard = ear.take()
    assert list(heard.features) == ["second"]


def test_evaluation_does_not_wait_for_a_loss() -> None:
    """Neither in eval mode nor without gradients; nor where a training forward before it came to no end."""
    model, ear = net(), Ear()
    ear.attend(model, {"first": model.first})
    for broken in (False, True):
        if broken:
            hook = model.second.register_forward_pre_hook(lambda module, args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(X)
            hook.remove()
        model.eval()
        model(X)
        assert not ear.waiting
        model.train()
        with torch.no_grad():
            model(X)
        assert not ear.waiting
        assert not ear.unanswered()
    model(X)
    assert ear.waiting
    model.eval()(X)
    with torch.no_grad():
        model.train()(X)
    assert not ear.missed
    assert len(ear.take().features["first"]) == 1, "what waits is what the training forward put out"
    with torch.no_grad():
        model(X)
    assert not ear.take().features, "kept for nobody"


# ---- the state of another


def test_the_state_of_another_pair_is_refused() -> None:
    """VeRA's vectors mean nothing without the random pair that they were trained with, which the widest layer sizes."""
    small, wide = (nn.Sequential(nn.Linear(6, 6), nn.Linear(6, out)).double() for out in (6, 9))
    method = rs.VeRA(rank=4, targets="0")
    state = rs.attach(small, method).state_dict()
    wide_state = rs.attach(wide, rs.VeRA(rank=4, targets=("0", "1"))).state_dict()
    run = rs.attach(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 9)).double(), method)
    run.load_state_dict(state)
    before = {name: p.detach().clone() for name, p in run.trainable()}
    state["adapters"]["default"]["shared"] = wide_state["adapters"]["default"]["shared"]
    state["tensors"] = {name: tensor + 1 for name, tensor in state["tensors"].items()}
    with pytest.raises(rs.errors.WrongBase, match=r"was trained with .*, but .* is attached"):
        run.load_state_dict(state)
    assert all(torch.equal(p, before[name]) for name, p in run.trainable())


def test_the_state_of_one_that_began_to_fade_later_is_refused() -> None:
    later = rs.attach(net(), rs.LoRA(rank=1, targets=BODY), total_steps=9)
    optimizer = later.optimizer(lr=1e-2)
    update(later, optimizer), update(later, optimizer)
    state = later.shift(PC).state_dict()
    assert state["adapters"]["default"]["shared"] == {"began": 2}
    run = rs.attach(net(), PC, total_steps=9)
    with pytest.raises(rs.errors.WrongBase, match=r"'began': 2.*'began': 0"):
        run.load_state_dict(state)
    assert run.step == 0
    assert rs.restore(net(), state).step == 2
