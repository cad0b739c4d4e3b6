"""Several updates of a lowered model are those of the model as it was."""

from __future__ import annotations

import lower_models as models
import pytest
import torch
from lower_models import close, ids, stir

import rankshift as rs

METHODS: dict[str, rs.Method] = {
    "lora": rs.LoRA(rank=4, alpha=8),
    "lora-plus": rs.LoRA(rank=3, lr_ratio=4.0),
    "lora-fa": rs.LoRA(rank=4, train="B", precondition=True),
    "pissa": rs.LoRA(rank=3, init="pissa"),
    "paca": rs.PaCA(rank=3),
    "paca-redraw": rs.PaCA(rank=2, redraw_every=2),
    "vera": rs.VeRA(rank=8),
    "sora": rs.SoRA(rank=4, alpha=8, sparsity=12, gate_init="normal"),
    "relora": rs.ReLoRA(rank=4, alpha=8, every=2, rest="freeze"),
    "relora-all": rs.ReLoRA(rank=4, alpha=8, every=2),
    "switchlora": rs.SwitchLoRA(rank=4, interval=2, freeze=1, ratio=5, rest="freeze"),
    "dora": rs.LoRA(rank=3, dora=True),
    "flat-lora": rs.FlatLoRA(rank=4, sigma=0.3),
    "full": rs.Full(),
}
TOTAL = 5


def train(method, lower, accumulate=1, fused_backward=False, before=False, **more):
    """Losses and everything that is left after some updates, as one flat dictionary; and the report."""
    model = models.llama(**more)
    run = rs.attach(model, method, total_steps=TOTAL)
    report = run.lower() if lower and before else None
    stir(run)
    optimizer = run.optimizer(lr=5e-3, weight_decay=0.1, eps=1e-5, fused_backward=fused_backward)
    report = run.lower() if lower and not before else report
    found = {}
    for step in range(TOTAL):
        torch.manual_seed(step)
        parts = ids(step, 4).chunk(accumulate)
        total = torch.zeros(())
        for part in parts:
            batch = {"input_ids": part, "labels": part}
            loss = run.loss(model(**batch).loss, **batch) / accumulate
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        found[f"loss {step}"] = total
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        if tensor.is_floating_point():
            found[name] = tensor.detach().clone()
    for name, p in run.trainable():
        found |= {f"{name}/{k}": v.detach().clone() for k, v in optimizer.state.get(p, {}).items() if v.numel()}
    return found, report


@pytest.mark.parametrize("name", METHODS)
def test_updates(name):
    plain, _ = train(METHODS[name], False)
    for before in (True, False):
        lowered, report = train(METHODS[name], True, before=before)
        assert bool(report.aside) == (name in ("relora-all", "flat-lora", "full"))
        close(lowered, plain, 5e-4)
    assert plain["loss 4"] != plain["loss 0"]


@pytest.mark.parametrize("name", ["lora", "paca", "relora"])
def test_accumulation(name):
    plain, _ = train(METHODS[name], False, accumulate=2)
    close(train(METHODS[name], True, accumulate=2)[0], plain, 5e-4)


def test_the_update_in_the_backward():
    plain, _ = train(METHODS["lora"], False, fused_backward=True)
    close(train(METHODS["lora"], True, fused_backward=True)[0], plain, 5e-4)


@pytest.mark.parametrize("name", ["lora", "paca"])
def test_raised_in_the_middle(name):
    model = models.llama()
    run = rs.attach(model, METHODS[name], total_steps=TOTAL)
    stir(run)
    optimizer = run.optimizer(lr=5e-3, weight_decay=0.1, eps=1e-5)
    found = {}
    for step in range(TOTAL):
        report = run.lower() if step % 2 else None
        found[f"loss {step}"] = loss = model(input_ids=ids(step, 4), labels=ids(step, 4)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if report is not None:
            assert not report.aside
            run.raise_()
    plain, _ = train(METHODS[name], False)
    close(found, {name: plain[name] for name in found}, 2e-5)


def test_resumed_from_a_model_that_was_not_lowered():
    """A run's state and its optimizer's say nothing of it."""
    states = {}
    for lower in (False, True):
        model = models.llama()
        run = rs.attach(model, rs.LoRA(rank=3), total_steps=TOTAL)
        stir(run)
        optimizer = run.optimizer(lr=5e-3)
        if lower:
            run.lower()
            run.load_state_dict(states["run"])
            optimizer.load_state_dict(states["optimizer"])
        model(input_ids=ids(), labels=ids()).loss.backward()
        if lower:
            close({n: p.grad for n, p in run.trainable()}, states["gradients"])
            break
        optimizer.step()
        optimizer.zero_grad()
        states = {"run": run.state_dict(), "optimizer": optimizer.state_dict()}
        model(input_ids=ids(), labels=ids()).loss.backward()
        states["gradients"] = {n: p.grad.clone() for n, p in run.trainable()}
