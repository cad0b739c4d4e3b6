"""Small print of single methods: a λ that is nearly zero, what weight decay leaves alone, a D that is swapped for one
call, two adapters that draw anew."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankshift as rs
from rankshift.methods.pc_lora import PCLoRALayer

F64 = torch.float64


def mlp() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(12, 12) for _ in range(3))).to(F64)


# ---- PC-LoRA


@pytest.mark.parametrize("lam", [9e-3, 1e-3, 1e-12])
def test_a_base_that_has_nearly_faded_still_acts(lam: float) -> None:
    """Only at λ = 0 is it left out: with a large weight a small λ is not nothing."""
    model = mlp()[:1]
    with torch.no_grad():
        model[0].weight.mul_(1e6)
        x = torch.ones(2, 12, dtype=F64)
        plain = model(x)
        run = rs.attach(model, rs.PCLoRA(rank=2, targets="0", features=False), total_steps=10)
        layer = run.adapter()["0"]
        assert isinstance(layer, PCLoRALayer)
        layer.B.normal_(generator=torch.Generator().manual_seed(1))
        layer.fade(lam)
        want = lam * plain + x @ layer.A.t() @ layer.B.t()
        torch.testing.assert_close(model(x), want, rtol=1e-12, atol=0)
        torch.testing.assert_close(layer.product(x), want - lam * model[0].bias, rtol=1e-9, atol=0)
        assert isinstance(layer.alone(), str), "no thin layers yet"
        with pytest.raises(rs.errors.ExportError):
            run.compress()
        layer.fade(0.0)
        assert torch.equal(model(x), nn.functional.linear(x @ layer.A.t(), layer.B, layer.C))


def test_weight_decay_leaves_the_bias_of_pc_lora_alone() -> None:
    run = rs.attach(mlp(), rs.PCLoRA(rank=2, features=False, targets=("0", "1")), total_steps=10)
    decay = {n: g["weight_decay"] for g in run.optimizer(weight_decay=0.1).param_groups for n in g["param_names"]}
    assert decay == {f"{site}.{leaf}": 0.0 if leaf == "C" else 0.1 for site in "01" for leaf in "ABC"}


# ---- PaCA


def test_another_d_for_one_call() -> None:
    """functional_call puts another tensor in D's place, whose version may be that of D by chance."""
    model, x = mlp()[:1], torch.randn(4, 12, generator=torch.Generator().manual_seed(1), dtype=F64)
    W = model[0].weight.detach().clone()
    run = rs.attach(model, rs.PaCA(rank=3, alpha=6, targets="0"))
    adapter = run.adapter()["0"]
    plain = model(x).detach()
    name = next(name for name, p in model.named_parameters() if p is adapter.D)
    other = torch.randn(adapter.D.shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    while other._version != adapter.D._version:
        other = other.add_(0) if other._version < adapter.D._version else other.clone()
    with torch.no_grad():
        y = torch.func.functional_call(model, {name: other}, (x,))
        want = W.clone()
        want[:, adapter.channels] += 2 * other
        torch.testing.assert_close(y, nn.functional.linear(x, want, model[0].bias), rtol=0, atol=1e-12)
        assert torch.equal(model(x), plain), "D is back, and so are its columns"


def test_two_adapters_draw_apart() -> None:
    """At the start and whenever they draw anew: were the keys alike, both would train the same channels for ever."""
    method = rs.PaCA(rank=4, redraw_every=1)
    apart = 0
    for seed in range(2):
        run = rs.attach(mlp(), method, seed=seed)
        run.add("second", method)
        run.use("default", "second")
        optimizer = run.optimizer(lr=1e-3)
        for step in range(3):
            if step:
                run.model(torch.ones(2, 12, dtype=F64)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            first, second = run.adapter(), run.adapter("second")
            apart += sum(not torch.equal(first[site].channels, second[site].channels) for site in "012")
    assert apart >= 16, "of 18: two draws of 4 in 12 are alike once in 495"
