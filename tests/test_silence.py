"""What would go wrong without a word is refused: lost hooks, optimizers without events, phases that are passed by."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rankshift as rs
from rankshift.core.errors import AttachError, ConfigError, TrainingError, UnsupportedLayer
from rankshift.methods import methods


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def batch(step=0):
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(step))


SMALL = {
    "adarankgrad": rs.AdaRankGrad(rank=2, gradient="projected"),
    "flat-lora": rs.FlatLoRA(rank=2),
    "galore": rs.GaLore(rank=2, gradient="projected"),
    "lora": rs.LoRA(rank=2),
    "melora": rs.MELoRA(rank=2, blocks=2),
    "paca": rs.PaCA(rank=2),
    "pc-lora": rs.PCLoRA(rank=2, features=False),
    "prelora": rs.PreLoRA(stage="joint", then=rs.LoRA(rank=2), max_rank=4),
    "relora": rs.ReLoRA(rank=2, every=2),
    "sora": rs.SoRA(rank=2),
    "switchlora": rs.SwitchLoRA(rank=2, interval=4, freeze=2),
    "vera": rs.VeRA(rank=8),
}


def test_every_method_with_sites_is_here():
    assert set(SMALL) == set(methods()) - {"full"}


# ---- hooks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_hooks_of_a_layer_still_fire(name):
    model, seen = net(), []
    model[0].register_forward_pre_hook(lambda m, args: seen.append("pre"))
    handle = model[0].register_forward_hook(lambda m, args, y: y + 1)
    model[0].register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    before = model(batch())
    seen.clear()
    run = rs.attach(model, SMALL[name], total_steps=4)
    if run.method.reversible:
        with run.disabled():
            assert torch.equal(model(batch()), before)
    else:
        model(batch())
    assert seen == ["pre"]
    torch.testing.assert_close(model.eval()(batch()), before, rtol=0, atol=1e-6)
    model.train()(batch().requires_grad_()).sum().backward()
    assert "backward" in seen
    handle.remove()
    plain = net()
    torch.testing.assert_close(model.eval()(batch()), plain(batch()), rtol=0, atol=1e-6)
    seen.clear()
    copy.deepcopy(run.detach() if run.method.reversible else run.merge())(batch())
    assert seen == ["pre"], "once, after the run too"


def test_a_layer_whose_forward_was_replaced_is_refused():
    model = net()
    model[0].forward = lambda x: x @ model[0].weight.t()
    with pytest.raises(UnsupportedLayer, match="its forward was replaced on the instance"):
        rs.attach(model, rs.LoRA(rank=2, targets=("0",)))


# ---- an optimizer that carries no events -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flat-lora", "sora", "pc-lora"])
def test_an_optimizer_without_events_is_noticed(name):
    model = net()
    run = rs.attach(model, SMALL[name], total_steps=9)
    optimizer = torch.optim.SGD([p for _, p in run.trainable()], lr=0.1)
    for _ in range(2):  # looking twice is no update
        model(batch()).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        model(batch())
    with pytest.raises(TrainingError, match=r"carries no events.*run\.optimizer\(\)"):
        model(batch())


def test_an_optimizer_that_carries_the_events_is_not():
    model = net()
    run = rs.attach(model, rs.SoRA(rank=2))
    mine = torch.optim.SGD([p for _, p in run.trainable()], lr=0.1)
    run.carry(mine)
    for optimizer in (lambda: mine, run.optimizer):
        taken = optimizer()
        for _ in range(3):
            model(batch()).square().mean().backward()
            taken.step()
    state = run.state_dict()
    other = net()
    again = rs.attach(other, rs.SoRA(rank=2))
    other(batch())
    again.load_state_dict(state)
    other(batch())  # a verb changed what trains, no optimizer


def test_a_method_without_events_takes_any_optimizer():
    model = net()
    run = rs.attach(model, rs.LoRA(rank=2))
    optimizer = torch.optim.SGD([p for _, p in run.trainable()], lr=0.1)
    for _ in range(3):
        model(batch()).square().mean().backward()
        optimizer.step()


WATCHED = {name: SMALL[name] for name in ("relora", "switchlora", "sora", "flat-lora")}
FOREIGN = pytest.raises(TrainingError, match="carries no events")


def learn(model, optimizer, step=0):
    """One update by an optimizer; that there was another before it is seen in the forward."""
    model(batch(step)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("taken", [0, 2])
@pytest.mark.parametrize("name", WATCHED)
def test_the_runs_optimizer_is_there_and_another_is_stepped(name, taken):
    model = net()
    run = rs.attach(model, WATCHED[name], total_steps=9)
    optimizer, other = run.optimizer(lr=1e-2), torch.optim.AdamW(trainable(model), lr=1e-2)
    for step in range(taken):
        learn(model, optimizer, step)
    learn(model, other)
    with FOREIGN:
        learn(model, other)
    assert run.step == taken
    optimizer = run.optimizer(lr=1e-2)
    learn(model, optimizer), learn(model, optimizer)
    model(batch()).square().mean().backward()
    optimizer.step(), other.step()  # what the run's has done is done twice
    with FOREIGN:
        model(batch())


@pytest.mark.parametrize("how", ["before", "after", "in training", "saved"])
@pytest.mark.parametrize("name", WATCHED)
def test_a_copy_has_no_run_to_train_it(name, how, tmp_path):
    model = net()
    run = rs.attach(model, WATCHED[name], total_steps=9)
    if how != "before":
        optimizer = run.optimizer(lr=1e-2)
    if how in ("in training", "saved"):
        learn(model, optimizer)
    if how == "saved":
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        other = copy.deepcopy(model)
    theirs = torch.optim.LBFGS(trainable(other), lr=1e-3, max_iter=1) if name == "sora" else None
    theirs = theirs or torch.optim.SGD(trainable(other), lr=1e-3)

    def closure():
        theirs.zero_grad()
        loss = other(batch()).square().mean()
        loss.backward()
        return loss

    other(batch())  # without it, one step later
    theirs.step(closure)
    with FOREIGN:
        theirs.step(closure)
    if how != "before":
        learn(model, optimizer), learn(model, optimizer)  # the model itself is none of it


class Wrapper(torch.optim.Optimizer):
    """An optimizer that steps another, as those do that perturb or average weights."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        self.inner.step(closure)


@pytest.mark.parametrize("outer", [True, False])
def test_an_optimizer_around_another_is_one_with_it(outer):
    model = net()
    run = rs.attach(model, SMALL["sora"], total_steps=9)
    inner = torch.optim.AdamW(trainable(model), lr=1e-2)
    around = Wrapper(inner)
    run.carry(around if outer else inner)
    for step in range(3):
        learn(model, around, step)
    assert run.step == 3


@pytest.mark.parametrize("name", WATCHED)
def test_values_may_change_where_an_optimizer_is_ridden(name):
    """Averages that are swapped in and out, states that are loaded, in the middle of an accumulated update too."""
    model = net()
    run = rs.attach(model, WATCHED[name], total_steps=30)
    optimizer = run.optimizer(lr=1e-2)
    average = torch.optim.swa_utils.AveragedModel(model)
    teacher = copy.deepcopy(model)
    elsewhere = net()
    others = torch.optim.AdamW([*elsewhere.parameters(), *trainable(model)], lr=1e-2)  # ours have no gradient there
    saved = {k: v.clone() for k, v in model.state_dict().items()}

    def disturb():
        with torch.no_grad():
            kept = [p.detach().clone() for p in trainable(model)]
            for p, q in zip(trainable(model), trainable(average.module), strict=True):
                p.copy_(q)
            model.eval()(batch()), model.train()
            for p, value in zip(trainable(model), kept, strict=True):
                p.copy_(value)
        model.load_state_dict(saved)
        run.metrics(), run.state_dict()

    for step in range(4):
        (model(batch(step)).square().mean() / 2).backward()
        disturb()
        (model(batch(step)).square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        disturb()
        with torch.no_grad():
            for p, q in zip(trainable(teacher), trainable(model), strict=True):
                p.lerp_(q, 0.1)
        teacher(batch(step)).sum()  # in training mode, with gradients
        elsewhere(batch(step)).sum().backward()
        others.step()
        others.zero_grad()
    model(batch()).square().mean().backward()
    optimizer.zero_grad()  # a step that a loss scaler leaves out
    disturb()
    model(batch())
    assert run.step == 4


def test_an_ended_run_watches_nothing():
    model = net()
    rs.attach(model, rs.SoRA(rank=2)).detach()
    assert not model._forward_pre_hooks


# ---- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [0, -1, 1.5, "10", True])
def test_a_length_that_is_none(total):
    with pytest.raises(ConfigError, match=r"total_steps = .* is no number of updates"):
        rs.attach(net(), rs.FlatLoRA(rank=2), total_steps=total)
    run = rs.attach(net(), rs.FlatLoRA(rank=2))
    with pytest.raises(ConfigError, match=r"total_steps = .* is no number of updates"):
        run.total_steps = total


def test_a_phase_is_not_passed_by():
    model = net()
    run = rs.attach(model, rs.SoRA(rank=2, sparsity=(0.1, 0.2)), total_steps=4)
    optimizer = run.optimizer(lr=1e-2)
    for _ in range(2):
        model(batch()).square().mean().backward()
        optimizer.step()
    weights = [p.detach().clone() for _, p in run.trainable()]
    model(batch()).square().mean().backward()
    with pytest.raises(TrainingError, match=r"ended at update 2, and the next has not begun.*run\.due\(\)"):
        optimizer.step()
    assert all(torch.equal(p, w) for (_, p), w in zip(run.trainable(), weights, strict=True))
    run = run.shift(run.due())
    optimizer = run.optimizer(lr=1e-2)
    for _ in range(3):  # the last phase may go on
        model(batch()).square().mean().backward()
        optimizer.step()


def test_what_fades_by_the_clock_stands_alone():
    for first, second in ((rs.PCLoRA(rank=2), rs.LoRA(rank=2)), (rs.LoRA(rank=2), rs.PCLoRA(rank=2))):
        run = rs.attach(net(), first, total_steps=9)
        with pytest.raises(AttachError, match="PCLoRA takes the place of the layers by the clock of the whole run"):
            run.add("second", second)


def test_a_loss_without_its_batch():
    model = net()
    run = rs.attach(model, rs.PCLoRA(rank=2), total_steps=9)
    with pytest.raises(TrainingError, match=r"run\.loss needs the batch"):
        run.loss(model(batch()).sum())
