"""SoRA: exact zeros by T_ξ with ξ = η·λ, ranks that go and leave the function as it is, and what a fake would do."""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import rankshift as rs
from rankshift.core.errors import AttachError, ConfigError, ExportError, RankTooLarge, TrainingError, UnsupportedLayer
from rankshift.core.site import Site
from rankshift.methods.sora import SoRALayer, soft_threshold_

D = torch.float64


def mlp(dtype: torch.dtype = D) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 14), nn.Tanh(), nn.Linear(14, 7, bias=False)).to(dtype)


def inputs(n: int = 24, dtype: torch.dtype = D, seed: int = 1) -> Tensor:
    return torch.randn(n, 9, generator=torch.Generator().manual_seed(seed), dtype=D).to(dtype)


def task(n: int = 24, seed: int = 2) -> Tensor:
    """What the model should answer: another linear map of rank 2, so that few ranks are needed."""
    g = torch.Generator().manual_seed(seed)
    U, V = torch.randn(7, 2, generator=g, dtype=D), torch.randn(2, 9, generator=g, dtype=D)
    return inputs(n) @ (U @ V).t()


def stir(run: rs.Run, closed: dict[str, tuple[int, ...]] | None = None, seed: int = 3) -> None:
    """Nothing stands where it started; gates lie in ±[0.5, 1.5], those named are closed."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, adapter in run.adapter().items():
            for leaf, p in adapter.named_parameters():
                draw = torch.rand(p.shape, generator=g, dtype=D)
                p.copy_((0.5 + draw) * torch.where(draw > 0.5, 1, -1) if leaf == "g" else draw - 0.5)
            adapter.g[list((closed or {}).get(name, ()))] = 0


def trained(method: rs.SoRA, steps: int = 60, lr: float = 0.02, seed: int = 0) -> tuple[nn.Module, rs.Run]:
    model = mlp()
    run = rs.attach(model, method, seed=seed, total_steps=steps)
    optimizer = run.optimizer(lr=lr)
    for _ in range(steps):
        (model(inputs()) - task()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, run


def gates(run: rs.Run) -> Tensor:
    return torch.cat([a.g.detach() for a in run.adapter().values()])


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config).eval()


# ---- T_ξ


def test_t_is_soft_thresholding_everywhere():
    """sign·max(|z| − ξ, 0), also between ξ and 2ξ, where three masks in a row give 0, and at ±ξ."""
    xi = 0.25
    z = torch.cat([torch.linspace(-1, 1, 401, dtype=D), torch.tensor([xi, -xi, 2 * xi, -2 * xi, 0.0, 1e-300], dtype=D)])
    t = z.clone()
    soft_threshold_(t, xi)
    torch.testing.assert_close(t, z.sign() * (z.abs() - xi).clamp(min=0), rtol=0, atol=0)
    between = (z.abs() > xi) & (z.abs() < 2 * xi)
    assert between.sum() > 50
    assert bool((t[between] != 0).all())
    assert bool((t[z.abs() == xi] == 0).all())
    assert bool(((t - z).abs() <= xi).all())
    odd = -z
    soft_threshold_(odd, xi)
    assert torch.equal(odd, -t)
    assert bool(((t[1:] - t[:-1]).abs() <= (z[1:] - z[:-1]).abs() + 1e-15).all())  # never further apart than before
    same = z.clone()
    soft_threshold_(same, 0.0)
    assert torch.equal(same, z)


@pytest.mark.parametrize("lam", [0.3, 0.9])
def test_plain_proximal_gradient_solves_the_lasso(lam: float):
    """½(g − a)² + λ|g| has its minimum at T_λ(a). With SGD that is what the steps converge to."""
    a = torch.tensor([2.0, 0.5, -0.7, -3.0, 0.31], dtype=D)
    model = nn.Sequential(nn.Linear(5, 5, bias=False)).to(D)
    nn.init.zeros_(model[0].weight)
    run = rs.attach(model, rs.SoRA(rank=5, alpha=5, sparsity=lam, targets="0"))
    layer = run.adapter()["0"]
    with torch.no_grad():
        layer.A.copy_(torch.eye(5)), layer.B.copy_(torch.eye(5))
    sgd = torch.optim.SGD([{"params": [layer.g], "lr": 0.2}, {"params": [layer.A, layer.B], "lr": 0.0}])
    run.carry(sgd)
    for _ in range(120):
        (0.5 * (model(torch.eye(5, dtype=D)).diagonal() - a).square().sum()).backward()
        sgd.step()
        sgd.zero_grad()
    wanted = a.sign() * (a.abs() - lam).clamp(min=0)
    torch.testing.assert_close(layer.g.detach(), wanted, rtol=0, atol=1e-10)
    assert torch.equal(layer.g.detach() == 0, wanted == 0)


# ---- one update


def test_training_is_adamw_and_then_the_threshold():
    """Every update against the equation, torch.optim.AdamW and T_ξ by hand: order, ξ = η_t·λ, no second penalty."""
    lam, ratio, decay, rates = 3.0, 2.0, 0.1, [1e-2, 2e-2, 1.5e-2, 1e-2, 5e-3, 0.0]
    model = mlp()
    run = rs.attach(model, rs.SoRA(rank=5, alpha=8, sparsity=lam, gate_lr_ratio=ratio, gate_init="normal"))
    W = [layer.weight.detach().clone() for layer in mlp() if isinstance(layer, nn.Linear)]
    bias = mlp()[0].bias.detach()
    p = {f"{n}.{leaf}": t.detach().clone().requires_grad_() for n, a in run.adapter().items()
         for leaf, t in a.named_parameters()}  # fmt: skip
    factors = [t for name, t in p.items() if not name.endswith("g")]
    plain_gates = [t for name, t in p.items() if name.endswith("g")]
    adam = torch.optim.AdamW([{"params": factors, "weight_decay": decay}, {"params": plain_gates, "weight_decay": 0.0}])
    mine = run.optimizer(lr=1e-2, weight_decay=decay)
    assert {n[-1]: g["lr"] for g in mine.param_groups for n in g["param_names"]} == {"A": 1e-2, "B": 1e-2, "g": 2e-2}
    closed = []
    for rate in rates:
        for group in mine.param_groups:
            group["lr"] = rate * (
                ratio if any(q is a.g for a in run.adapter().values() for q in group["params"]) else 1
            )
        adam.param_groups[0]["lr"], adam.param_groups[1]["lr"] = rate, rate * ratio
        (model(inputs()) - task()).square().mean().backward()
        h = inputs()
        for i, name in enumerate(("0", "2")):
            A, B, g = (p[f"{name}.{leaf}"] for leaf in "ABg")
            low = h @ W[i].t() + (8 / 5) * (g * (h @ A.t())) @ B.t()
            h = (low + bias).tanh() if i == 0 else low
        (h - task()).square().mean().backward()
        for name, adapter in run.adapter().items():
            for leaf, t in adapter.named_parameters():
                torch.testing.assert_close(t.grad, p[f"{name}.{leaf}"].grad, rtol=1e-10, atol=1e-14)
        mine.step(), mine.zero_grad(), adam.step(), adam.zero_grad()
        with torch.no_grad():
            for g in plain_gates:
                g.copy_(g.sign() * (g.abs() - rate * ratio * lam).clamp(min=0))
        for name, adapter in run.adapter().items():
            for leaf, t in adapter.named_parameters():
                torch.testing.assert_close(t.detach(), p[f"{name}.{leaf}"].detach(), rtol=1e-9, atol=1e-12)
        closed.append(int((gates(run) == 0).sum()))
    assert closed[0] < closed[-2] < 10, "the test closed some gates"
    assert closed[-1] == closed[-2], "at η = 0 nothing shrinks"


def test_without_a_gradient_a_gate_shrinks_by_exactly_xi():
    model = mlp(torch.float32)
    run = rs.attach(model, rs.SoRA(rank=4, sparsity=0.5))
    optimizer = run.optimizer(lr=0.1, weight_decay=0.3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / 4)
    wanted = torch.ones(4)
    for n in range(4):
        (model(inputs(dtype=torch.float32)) * 0).sum().backward()
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        wanted = wanted - torch.tensor(0.1 * (1 - n / 4) * 0.5)
        for adapter in run.adapter().values():
            assert torch.equal(adapter.g.detach(), wanted), "by ξ, and by no weight decay"


def test_once_an_update_not_once_a_forward_and_never_for_a_skipped_one():
    model = mlp()
    run = rs.attach(model, rs.SoRA(rank=4, sparsity=1.0))
    optimizer = run.optimizer(lr=0.1)
    for _ in range(3):  # accumulated
        (model(inputs()) * 0).sum().backward()
    optimizer.step(), optimizer.zero_grad()
    assert bool((gates(run) == 1 - 0.1).all())
    before = gates(run).clone()
    (model(inputs()) * float("nan")).sum().backward()
    optimizer.step(), optimizer.zero_grad()
    assert run.skipped == 1
    assert torch.equal(gates(run), before)
    model.eval()
    with torch.no_grad():
        model(inputs())
    assert torch.equal(gates(run), before)


def test_behind_a_closed_gate_only_the_gate_has_a_gradient():
    model = mlp()
    run = rs.attach(model, rs.SoRA(rank=4, alpha=6))
    stir(run, {"0": (1, 3), "2": (0,)})
    (model(inputs()) - task()).square().sum().backward()
    for name, shut in (("0", [1, 3]), ("2", [0])):
        layer = run.adapter()[name]
        assert not layer.A.grad[shut].any()
        assert not layer.B.grad[:, shut].any()
        assert bool((layer.g.grad[shut].abs() > 1e-3).all())
        assert bool(layer.A.grad.any(1).sum() == 4 - len(shut))
    layer = run.adapter()["2"]  # ∂g_i = s Σ (A x)_i (Bᵀ∂y)_i
    x = model[1](model[0](inputs()))
    dy = 2 * (model(inputs()) - task())
    wanted = (6 / 4) * ((x @ layer.A.t()) * (dy @ layer.B)).sum(0)
    torch.testing.assert_close(layer.g.grad, wanted.detach())


def test_a_closed_gate_opens_when_one_step_exceeds_xi():
    for lam, opens in ((0.5, True), (1.5, False)):  # Adam's first step has the size of lr
        model = mlp()
        run = rs.attach(model, rs.SoRA(rank=3, sparsity=lam, targets="2"))
        stir(run, {"2": (1,)})
        optimizer = run.optimizer(lr=0.01, eps=1e-12)
        (model(inputs()) - task()).square().sum().backward()
        optimizer.step()
        assert bool(run.adapter()["2"].g[1] != 0) is opens


def test_gates_train_in_fp32_on_a_bf16_base():
    """Near 1, bf16 has steps of 2⁻⁸: a ξ of 3e-4 would be rounded away."""
    model = mlp(torch.bfloat16)
    run = rs.attach(model, rs.SoRA(rank=4, sparsity=0.375))
    optimizer = run.optimizer(lr=8e-4)
    for _ in range(3):
        (model(inputs(dtype=torch.bfloat16)) * 0).sum().backward()
        optimizer.step(), optimizer.zero_grad()
    assert gates(run).dtype == torch.float32
    torch.testing.assert_close(gates(run), torch.full((8,), 1 - 3 * 3e-4))


# ---- sparsity


def test_exact_zeros_and_none_without_a_penalty():
    _, run = trained(rs.SoRA(rank=6, sparsity=2.0, gate_init="normal"))
    assert 0 < int((gates(run) == 0).sum()) < 12
    assert run.metrics() == {"open_gates": int((gates(run) != 0).sum()), "gates": 12}
    _, run = trained(rs.SoRA(rank=6, sparsity=0, gate_init="normal"))
    assert int((gates(run) == 0).sum()) == 0
    assert run.metrics() == {"open_gates": 12, "gates": 12}


@pytest.mark.parametrize("init", ["ones", "normal"])
def test_a_larger_lambda_leaves_fewer_gates(init: str):
    counts = []
    for lam in (0.0, 0.5, 1.0, 2.0):
        runs = [trained(rs.SoRA(rank=6, sparsity=lam, gate_init=init), seed=seed)[1] for seed in range(3)]
        counts.append(sum(run.metrics()["open_gates"] for run in runs))
    assert counts[0] == 36
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < 0.7 * counts[0]


def test_where_gates_start():
    ones, normal = (rs.attach(mlp(), rs.SoRA(rank=7, gate_init=init), seed=5) for init in ("ones", "normal"))
    assert bool((gates(ones) == 1).all())
    drawn = gates(normal)
    assert drawn.unique().numel() == 14
    assert 0.5 < drawn.std() < 1.6
    assert torch.equal(drawn, gates(rs.attach(mlp(), rs.SoRA(rank=7, gate_init="normal"), seed=5)))
    assert not torch.equal(drawn, gates(rs.attach(mlp(), rs.SoRA(rank=7, gate_init="normal"), seed=6)))


# ---- ranks that go


def test_pruning_leaves_the_function():
    """Pruned, merged before pruning, merged after it: the same model, and s stays alpha / r_max."""
    for dtype, bound in ((D, 1e-14), (torch.float32, 1e-6)):
        model = mlp(dtype)
        run = rs.attach(model, rs.SoRA(rank=7, alpha=5))
        stir(run, {"0": (0, 3, 4), "2": (6,)})
        x = inputs(dtype=dtype)
        before = model(x).detach()
        unpruned = rs.restore(mlp(dtype), run.state_dict()).merge()
        run = run.shift(run.method)
        assert {name: a.rank for name, a in run.adapter().items()} == {"0": 4, "2": 6}
        assert all(a.A.shape[0] == a.B.shape[1] == len(a.g) == a.rank for a in run.adapter().values())
        assert {a.scale for a in run.adapter().values()} == {5 / 7}
        assert sum(p.numel() for _, p in run.trainable()) == 4 * (9 + 14 + 1) + 6 * (14 + 7 + 1)
        assert (model(x) - before).abs().max() <= bound
        assert run.changed == set()
        again = rs.restore(mlp(dtype), run.state_dict())
        assert torch.equal(again.model(x), model(x))
        model = run.merge()
        assert (model(x) - before).abs().max() <= bound
        assert (unpruned(x) - before).abs().max() <= bound


def test_the_order_of_ranks_and_their_values_stay():
    run = rs.attach(mlp(), rs.SoRA(rank=5))
    stir(run, {"0": (1,), "2": (0, 4)})
    old = {name: [p.detach().clone() for p in (a.A, a.B, a.g)] for name, a in run.adapter().items()}
    run = run.shift(replace(run.method, sparsity=0.1))
    for name, kept in (("0", [0, 2, 3, 4]), ("2", [1, 2, 3])):
        A, B, g = old[name]
        layer = run.adapter()[name]
        assert torch.equal(layer.A, A[kept])
        assert torch.equal(layer.B, B[:, kept])
        assert torch.equal(layer.g, g[kept])
        assert layer.g.requires_grad
    assert run.method.sparsity == 0.1


def test_not_pruned_where_that_is_not_wanted():
    run = rs.attach(mlp(), rs.SoRA(rank=5, prune=False))
    stir(run, {"0": (1,), "2": (0, 1, 2, 3, 4)})
    run = run.shift(run.method)
    assert {name: a.rank for name, a in run.adapter().items()} == {"0": 5, "2": 5}
    assert run.metrics() == {"open_gates": 4, "gates": 10}
    optimizer = run.optimizer(
        lr=0.01
    )  # all gates of one layer closed: no factor of it has a gradient, and that is fine
    (run.model(inputs()) - task()).square().sum().backward()
    optimizer.step()
    assert run.metrics()["open_gates"] > 4


def test_a_layer_without_an_open_gate_is_the_base_again():
    model = mlp()
    run = rs.attach(model, rs.SoRA(rank=3, targets=("0", "2")))
    stir(run, {"0": (0, 1, 2)})
    before = model(inputs()).detach()
    first = model[0]
    assert isinstance(first, Site)
    assert torch.equal(first(inputs()), mlp()[0](inputs()))
    run = run.shift(run.method)
    assert list(run.adapter()) == ["2"] == list(run.sites)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0](inputs()), mlp()[0](inputs()))
    torch.testing.assert_close(model(inputs()), before, rtol=0, atol=1e-14)
    optimizer = run.optimizer(lr=0.01)
    (model(inputs()) - task()).square().sum().backward()
    optimizer.step()
    again = rs.restore(mlp(), run.state_dict())
    assert torch.equal(again.model(inputs()), model(inputs()))
    with run.disabled():
        assert torch.equal(model(inputs()), mlp()(inputs()))


def test_when_every_gate_is_closed_nothing_is_lost_and_it_is_said():
    model = mlp()
    run = rs.attach(model, rs.SoRA(rank=3, sparsity=0.7))
    stir(run, {"0": (0, 1, 2), "2": (0, 1, 2)})
    with pytest.raises(TrainingError, match=r"Every gate of every layer is closed \(sparsity = 0\.7\)"):
        run.shift(run.method)
    assert run.metrics() == {"open_gates": 0, "gates": 6}
    assert list(run.adapter()) == ["0", "2"]  # the run goes on
    optimizer = run.optimizer(lr=0.1)
    (model(inputs()) - task()).square().sum().backward()
    optimizer.step()
    assert run.metrics()["open_gates"] > 0


def test_a_run_whose_gates_closed_resumes():
    """The check of the first gradients knows that a closed layer has none."""
    _, run = trained(rs.SoRA(rank=2, sparsity=8.0), steps=1)
    stir(run, {"2": (0, 1)})
    again = rs.restore(mlp(), run.state_dict())
    optimizer = again.optimizer(lr=0.01)
    (again.model(inputs()) - task()).square().sum().backward()
    optimizer.step()
    assert again.step == 2


def test_another_rank_or_other_layers_start_anew():
    for other in (rs.SoRA(rank=3), rs.SoRA(rank=4, alpha=3), rs.SoRA(rank=4, targets="2"), rs.LoRA(rank=2)):
        model = mlp()
        run = rs.attach(model, rs.SoRA(rank=4))
        stir(run, {"0": (1,)})
        before = model(inputs()).detach()
        run = run.shift(other)
        assert "0.weight" in run.changed, "what was trained is in the base"
        assert (model(inputs()) - before).abs().max() < 1e-13
        assert all(a.rank == other.rank for a in run.adapter().values())


def test_gates_may_be_frozen_for_the_end():
    run = rs.attach(mlp(), rs.SoRA(rank=4, sparsity=1.0))
    stir(run, {"0": (1,)})
    run = run.shift(replace(run.method, sparsity=0, gate_lr_ratio=0))
    before = gates(run).clone()
    assert sorted({name[-1] for name, _ in run.trainable()}) == ["A", "B"]
    optimizer = run.optimizer(lr=0.1)
    for _ in range(2):
        (run.model(inputs()) - task()).square().sum().backward()
        optimizer.step(), optimizer.zero_grad()
    assert torch.equal(gates(run), before)


def test_dropout_falls_on_the_input_of_the_branch_in_training_alone():
    """Of an input with one value the branch is nothing or 1 / (1 - p) times itself; the base path never drops."""
    model, plain = nn.Sequential(mlp()[0]), nn.Sequential(mlp()[0])
    run = rs.attach(model, rs.SoRA(rank=3, dropout=0.25, targets="0"))
    stir(run)
    x = torch.zeros(400, 9, dtype=D)
    x[:, 2] = 1
    branch = model.eval()(x) - plain(x)
    assert torch.equal(model(x), model(x))
    assert (branch[0] - run.adapter()["0"].delta()[:, 2]).abs().max() < 1e-13
    with torch.random.fork_rng():
        torch.manual_seed(0)
        seen = (model.train()(x) - plain(x)) / branch
    dropped = seen.abs().amax(1) < 1e-9
    assert 60 < int(dropped.sum()) < 140, "of 400 at p = 0.25"
    torch.testing.assert_close(seen[~dropped], torch.full_like(seen[~dropped], 4 / 3), rtol=0, atol=1e-9)


# ---- stages


def test_stages_share_the_updates_and_take_over():
    model = mlp()
    run = rs.attach(model, rs.SoRA(rank=6, sparsity=(0.5, 1.0, 2.0), gate_init="normal"), total_steps=100)
    assert run.method.phase_end(0, 100) == 33
    optimizer, seen = run.optimizer(lr=0.02), []
    for _ in range(100):
        before = {name: (a.B.detach().clone(), a.g != 0) for name, a in run.adapter().items()}
        (model(inputs()) - task()).square().mean().backward()
        optimizer.step(), optimizer.zero_grad()
        seen.append(run.method.stage)
        assert any(not torch.equal(a.B, before[name][0]) for name, a in run.adapter().items())
        if (method := run.due()) is not None:
            y = model(inputs()).detach()
            counted = run.metrics()["open_gates"]
            moments = {}
            for name, adapter in run.adapter().items():
                K = adapter.g.nonzero().flatten()
                m = {leaf: optimizer.state[getattr(adapter, leaf)]["exp_avg"] for leaf in "ABg"}
                moments[name] = {"A": m["A"][K], "B": m["B"][:, K], "g": m["g"][K]}
            run = run.shift(method)
            assert run.metrics() == {"open_gates": counted, "gates": counted}
            assert (model(inputs()) - y).abs().max() < 1e-13
            optimizer = run.optimizer(lr=0.02)
            for name, adapter in run.adapter().items():
                for leaf, m in moments[name].items():
                    state = optimizer.state[getattr(adapter, leaf)]
                    assert torch.equal(state["exp_avg"], m), "the moments of the ranks that are left"
                    assert int(state["step"]) == run.step
    assert seen == [0] * 33 + [1] * 33 + [2] * 34
    assert [(p.start, p.stop, p.method["stage"]) for p in run.phases] == [(0, 33, 0), (33, 66, 1), (66, None, 2)]
    assert run.due() is None
    assert run.changed == set()
    assert run.metrics()["gates"] < 12


def test_stages_after_another_method_share_what_is_left():
    run = rs.attach(mlp(), rs.LoRA(rank=2), total_steps=50)
    run._driver.step = 20
    run = run.shift(rs.SoRA(rank=4, sparsity=(0.1, 0.2)))
    assert run.method.phase_end(run.phases[-1].start, run.total_steps) == 35


def test_stages_need_to_know_how_long_the_run_is():
    method = rs.SoRA(rank=4, sparsity=(0.1, 0.2, 0.3))
    run = rs.attach(mlp(), method)
    assert run.due() is None
    with pytest.raises(ConfigError, match="total_steps"):
        run.optimizer()
    run.total_steps = 2
    with pytest.raises(ConfigError, match=r"3 of 3 stages to go and 2 updates"):
        run.optimizer()
    run.total_steps = 3
    run.optimizer()
    assert rs.attach(mlp(), rs.SoRA(rank=4)).optimizer()  # one stage needs nothing


def test_a_later_stage_cannot_be_the_first():
    model = mlp()
    with pytest.raises(ConfigError, match="stage=0; the run counts"):
        rs.attach(model, rs.SoRA(rank=2, sparsity=(0.1, 0.2), stage=1))
    assert type(model[0]) is nn.Linear
    run = rs.attach(model, rs.LoRA(rank=2))
    with pytest.raises(ConfigError, match="the same rank, alpha and targets"):
        run.shift(rs.SoRA(rank=2, sparsity=(0.1, 0.2), stage=1))
    assert torch.equal(run.adapter()["0"].base.rows(), mlp()[0].weight)
    run.optimizer()


def test_stages_are_of_a_run_with_one_adapter():
    """A phase would end for the others too."""
    staged = rs.SoRA(rank=2, sparsity=(0.1, 0.2))
    run = rs.attach(mlp(), staged, total_steps=4)
    with pytest.raises(AttachError, match="SoRA as configured goes through phases"):
        run.add("second", rs.LoRA(rank=2))
    run = rs.attach(mlp(), rs.LoRA(rank=2), total_steps=4)
    with pytest.raises(AttachError, match="SoRA as configured goes through phases"):
        run.add("second", staged)
    assert run.adapters == ("default",)
    run.add("second", rs.SoRA(rank=2))


def test_the_loops_of_the_page_run(tmp_path, monkeypatch):
    """The code of docs/sora.md, with fewer updates."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs/sora.md").read_text(encoding="utf-8")
    first, second = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    batch = {"input_ids": IDS, "labels": IDS}
    names = {"model": llama().train(), "batches": [batch] * 2}
    exec(first, names)
    assert (tmp_path / "peft/adapter_config.json").is_file()
    names |= {"model": llama().train(), "batches": [batch] * 12, "torch": torch}
    exec(second.replace("total_steps=3000", "total_steps=12"), names)
    run, optimizer = names["run"], names["optimizer"]
    assert [(p["start"], p["method"]["stage"]) for p in run.describe()["phases"]] == [(0, 0), (4, 1), (8, 2)]
    assert run.step == 12
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    assert optimizer.param_groups[0]["initial_lr"] == 8e-4
    assert {path.name for path in tmp_path.glob("stage-*")} == {"stage-0", "stage-1"}


# ---- files


def closed_llama(closed: dict[str, tuple[int, ...]], method: rs.SoRA) -> tuple[nn.Module, rs.Run]:
    model = llama()
    run = rs.attach(model, method)
    stir(run)
    with torch.no_grad():
        for name, layer in run.adapter().items():
            for pattern, at in closed.items():
                if name.endswith(pattern):
                    layer.g[list(at)] = 0
    return model, run


IDS = torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(0))
METHOD = rs.SoRA(rank=8, alpha=16, targets=("q_proj", "v_proj", "down_proj"))
SHUT = {"0.self_attn.q_proj": (0, 4, 5), "v_proj": (1,), "1.mlp.down_proj": tuple(range(8))}


@pytest.mark.parametrize("pruned", [False, True])
def test_peft_loads_an_export_with_ranks_by_layer(tmp_path, pruned: bool):
    """alpha_l / r_l = alpha / r_max at every layer: 8 → 5 kept with alpha left alone would be 1.6 times the change."""
    model, run = closed_llama(SHUT, METHOD)
    wanted = model(IDS).logits.detach()
    assert (wanted - llama()(IDS).logits).abs().max() > 0.1
    if pruned:
        run = run.shift(run.method)
    run.export(tmp_path / "exact")
    assert torch.equal(model(IDS).logits, wanted) or pruned
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "exact").eval()
    assert (theirs(IDS).logits - wanted).abs().max() <= 1e-5
    config = json.loads((tmp_path / "exact/adapter_config.json").read_text())
    found = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    ranks = {name: m.r["default"] for name, m in found.items()}
    layers = "model.layers.{}."
    assert ranks == {
        layers.format(0) + "self_attn.q_proj": 5, layers.format(0) + "self_attn.v_proj": 7,
        layers.format(0) + "mlp.down_proj": 8, layers.format(1) + "self_attn.q_proj": 8,
        layers.format(1) + "self_attn.v_proj": 7,
    }  # fmt: skip
    assert {m.scaling["default"] for m in found.values()} == {2.0}
    assert config["rank_pattern"]
    assert config["alpha_pattern"]
    run.export(tmp_path / "portable", profile="portable")
    config = json.loads((tmp_path / "portable/adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (8, {}, {})
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "portable").eval()
    assert (theirs(IDS).logits - wanted).abs().max() <= 1e-5
    run.export(tmp_path / "merged", format="merged")
    assert (tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits - wanted).abs().max() <= 1e-5
    again = rs.load(llama(), tmp_path / "exact")
    assert (again.model.eval()(IDS).logits - wanted).abs().max() <= 1e-5


def test_an_export_of_nothing_is_refused(tmp_path):
    model, run = closed_llama({"proj": tuple(range(8))}, METHOD)
    for profile in ("exact", "portable"):
        with pytest.raises(ExportError, match="no rank left at any layer"):
            run.export(tmp_path / "out", profile=profile)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ExportError, match="None of the adapters has a rank left"):
        run.combine(["default"], "other")
    run.export(tmp_path / "merged", format="merged")  # that is the base
    model = run.merge()
    assert torch.equal(model(IDS).logits, llama()(IDS).logits)


def test_a_sum_with_closed_ranks(tmp_path):
    model, run = closed_llama(SHUT, METHOD)
    wanted = model(IDS).logits.detach()
    run.combine(["default"], "plain")
    run.use("plain")
    assert (model(IDS).logits - wanted).abs().max() <= 1e-5
    assert "model.layers.1.mlp.down_proj" not in run.adapter("plain")
    run.export(tmp_path / "out", adapter="plain")


def test_a_native_directory_keeps_every_rank_until_pruned(tmp_path):
    model, run = closed_llama(SHUT, METHOD)
    wanted = model(IDS).logits.detach()
    run.save(tmp_path / "full")
    pruned = run.shift(run.method)
    pruned.save(tmp_path / "pruned")
    assert [a.rank for a in rs.load(llama(), tmp_path / "full").adapter().values()] == [8] * 6
    again = rs.load(llama(), tmp_path / "pruned")
    assert [a.rank for a in again.adapter().values()] == [5, 7, 8, 8, 7]
    assert (again.model.eval()(IDS).logits - wanted).abs().max() <= 1e-6
    sizes = [(tmp_path / n / "adapter.safetensors").stat().st_size for n in ("full", "pruned")]
    kept = sum(r * (16 + (24 if "down" in n else 16) + 1) for n, r in
               ((n, a.rank) for n, a in again.adapter().items()))  # fmt: skip
    assert sizes[1] < sizes[0]
    assert sum(p.numel() for _, p in again.trainable()) == kept


# ---- layers and settings


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda: nn.Linear(9, 7), inputs(6).reshape(2, 3, 9)),
        (lambda: Conv1D(7, 9), inputs(6)),
        (lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1), inputs(24).reshape(2, 3, 6, 6)),
        (lambda: nn.Embedding(11, 7), torch.tensor([[1, 4, 4, 10]])),
    ],
    ids=["linear", "Conv1D", "conv", "embedding"],
)
@pytest.mark.parametrize("dropout", [0.0, 1e-9], ids=["", "dropout"])
def test_every_layer_kind_trains_and_is_pruned(layer, x: Tensor, dropout: float):
    def fresh() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(layer()).to(D)

    model = fresh()
    run = rs.attach(model, rs.SoRA(rank=4, sparsity=0.5, dropout=dropout, targets="0"))
    assert torch.equal(model(x), fresh()(x))
    optimizer = run.optimizer(lr=0.05)
    target = model(x).detach() + torch.randn(model(x).shape, generator=torch.Generator().manual_seed(1), dtype=D)
    start = None
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        start = start or loss.item()
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
    assert loss.item() < 0.9 * start
    with torch.no_grad():
        run.adapter()["0"].g[[0, 2]] = 0
    model.eval()
    before = model(x).detach()
    run = run.shift(run.method)
    assert run.adapter()["0"].rank == 2
    assert (model(x) - before).abs().max() < 1e-13
    assert (run.merge()(x) - before).abs().max() < 1e-12


def test_stacks_of_experts_and_ranks_too_large_are_refused():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 8, 6))

        def forward(self, x):
            return torch.einsum("ni,eoi->neo", x, self.up)

    with pytest.raises(UnsupportedLayer, match=r"0\.up is a stack of expert weights"):
        rs.attach(nn.Sequential(Experts()), rs.SoRA(rank=2, targets="up"))
    with pytest.raises(RankTooLarge, match=r'rank 8 at 2 exceeds min\(out, in\) = 7\. Lower rank, or exclude "2"'):
        rs.attach(mlp(), rs.SoRA(rank=8))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"rank": 0}, "rank = 0"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": math.inf}, "alpha"),
        ({"sparsity": -0.1}, "at least 0"),
        ({"sparsity": ()}, "at least 0"),
        ({"sparsity": (0.1, math.nan)}, "at least 0"),
        ({"sparsity": (0.2, 0.2)}, "must rise"),
        ({"sparsity": (0.2, 0.1)}, "must rise"),
        ({"sparsity": 0.1, "stage": 1}, "1 stages, counted from 0"),
        ({"stage": -1}, "counted from 0"),
        ({"gate_lr_ratio": -1}, "gate_lr_ratio"),
        ({"gate_lr_ratio": 0}, "never close"),
        ({"gate_init": "zeros"}, "gate_init"),
        ({"dropout": 1.0}, "dropout"),
        ({"sparcity": 1.0}, "Did you mean 'sparsity'"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(fields: dict, text: str):
    with pytest.raises(ConfigError, match=text):
        rs.SoRA(**fields)


def test_a_config_survives_json():
    for method in (rs.SoRA(), rs.SoRA(sparsity=(0, 0.5, 1), stage=2, prune=False)):
        again = rs.from_dict(json.loads(json.dumps(rs.to_dict(method))))
        assert again == method
        assert again.stages == method.stages


def test_trainable_count_of_a_7b_llama():
    """Σ r (in + out + 1) over the 7·32 linear layers; nothing is allocated."""
    config = tf.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(config)
    run = rs.attach(model, rs.SoRA(rank=8))
    assert sum(p.numel() for _, p in run.trainable()) == 19_988_480 + 8 * 7 * 32 == run.summary().trainable


def test_two_adapters_each_with_gates_of_its_own():
    model = mlp()
    run = rs.attach(model, rs.SoRA(rank=3))
    run.add("second", rs.SoRA(rank=2, alpha=4))
    run.use("default", "second")
    for name, seed in (("default", 1), ("second", 2)):
        with torch.no_grad():
            for adapter in run.adapter(name).values():
                assert isinstance(adapter, SoRALayer)
                g = torch.Generator().manual_seed(seed)
                for p in adapter.parameters():
                    p.copy_(torch.randn(p.shape, generator=g, dtype=D))
                adapter.g[0] = 0
    assert run.metrics() == {"open_gates": 4, "gates": 6, "second_open_gates": 2, "second_gates": 4}
    y = model(inputs()).detach()
    h = inputs()
    plain = copy.deepcopy(mlp())
    with torch.no_grad():
        for name, layer in (("0", plain[0]), ("2", plain[2])):
            for adapter, s in ((run.adapter("default")[name], 16 / 3), (run.adapter("second")[name], 4 / 2)):
                layer.weight += s * adapter.B @ torch.diag(adapter.g) @ adapter.A
    assert (plain(h) - y).abs().max() < 1e-12
