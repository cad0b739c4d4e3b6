"""AdaRankGrad: ranks that follow the gradient of a run, GaLore's code where they do not, moments that go along."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import rankshift as rs
from rankshift.core.errors import ConfigError
from rankshift.core.form import Form
from rankshift.core.site import Spec
from rankshift.optim import Optimizer, subspace
from rankshift.optim.project import Clock, Project

D = torch.float64
SPEC = Spec("layer", 20, 12, Form(), torch.float32, torch.device("cpu"))


class Given(nn.Module):
    """A model whose weight has whatever gradient is put in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 20, bias=False, dtype=D)
        nn.init.zeros_(self.layer.weight)

    def forward(self, G: Tensor) -> Tensor:
        return (self.layer.weight * G).sum() + 0 * self.layer(G[:1, :12].new_zeros(1, 12)).sum()


def of_rank(rank: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(20, rank, generator=g, dtype=D)).Q
    V = torch.linalg.qr(torch.randn(12, rank, generator=g, dtype=D)).Q
    return U @ V.mT


def test_ranks_jump_with_the_gradient_and_the_run_knows_them():
    model = Given()
    method = rs.AdaRankGrad(rank=10, energy=0.999, every=4, earliest=4, stagger=False)
    run = rs.attach(model, method)
    optimizer = run.optimizer(lr=1e-2)
    found = []
    for step in range(12):
        model(of_rank((3, 7, 2)[step // 4], step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(run.subspaces["layer.weight"])
        state = optimizer.state[model.layer.weight]
        memory = sum(t.untyped_storage().nbytes() for t in state.values() if t.dim())
        assert memory == 8 * (found[-1] * (12 + 2 * 20 + 1) + 2)  # and two numbers of the test of convergence
    assert found == [3] * 4 + [7] * 4 + [2] * 4
    assert run.state_dict()["subspaces"] == {"layer.weight": 2}


def test_with_a_fixed_rank_and_clock_and_no_transport_it_is_galore():
    ada = rs.AdaRankGrad(rank=6, every=7, earliest=7, scale=0.5).project(SPEC.form)
    same = replace(ada, energy=None, transport="none", clock=replace(ada.clock, earliest=None))
    galore = rs.GaLore(rank=6, every=7, scale=0.5).project(SPEC.form)
    assert same == galore


def test_fields_reach_the_transform():
    method = rs.AdaRankGrad(
        rank=9, min_rank=2, energy=0.7, multiple=4, every=80, earliest=30, kappa=0.4, transport="centred",
        finder="eigh", scale=0.5, residual="fira", side="in", stagger=False,
    )  # fmt: skip
    assert method.project(SPEC.form) == Project(
        rank=9, energy=0.7, min_rank=2, multiple=4, clock=Clock(80, 30, 0.4, stagger=False), finder="eigh",
        transport="centred", residual=True, side="in", scale=0.5,
    )  # fmt: skip


def test_all_energy_at_full_rank_found_once_is_adamw_in_rotated_coordinates():
    model = Given()
    method = rs.AdaRankGrad(rank=12, energy=1.0, every=0, finder="svd", scale=1.0)
    optimizer = rs.attach(model, method).optimizer(lr=1e-2, weight_decay=0.1)
    with torch.no_grad():
        model.layer.weight.add_(torch.randn(20, 12, generator=torch.Generator().manual_seed(0), dtype=D))
    start = model.layer.weight.detach().clone()
    stream = [torch.randn(20, 12, generator=torch.Generator().manual_seed(n), dtype=D) for n in range(30)]
    for G in stream:
        model(G).backward()
        optimizer.step()
        optimizer.zero_grad()
    V = torch.linalg.svd(stream[0])[2].mT
    turned = nn.Parameter(start @ V)
    adamw = torch.optim.AdamW([turned], lr=1e-2, weight_decay=0.1)
    for G in stream:
        turned.grad = G @ V
        adamw.step()
    torch.testing.assert_close(model.layer.weight.detach(), turned.detach() @ V.mT, rtol=1e-8, atol=1e-9)


# ---- the card's toy


def toy(transport: str, every: int, seed: int, monkeypatch, steps: int = 240) -> float:
    """Teacher–student, 32 → 64 → 16, with random signs at each renewal: the mean loss of the last 40 updates."""
    g, signs = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 50)
    teacher, student = (
        nn.Sequential(nn.Linear(32, 64, bias=False), nn.Tanh(), nn.Linear(64, 16, bias=False)) for _ in range(2)
    )
    with torch.no_grad():
        for p in (*teacher.parameters(), *student.parameters()):
            p.copy_(torch.randn(p.shape, generator=g) / p.shape[1] ** 0.5)
    find = subspace.find

    def flipped(*args, **settings):
        basis = find(*args, **settings)
        flips = torch.randint(0, 2, basis.vectors.shape[-1:], generator=signs) * 2 - 1
        return replace(basis, vectors=basis.vectors * flips)

    rule = Project(4, clock=Clock(every, stagger=False), transport=transport)
    optimizer = Optimizer([{"params": list(student.parameters())}], [rule], lr=6e-3)
    losses = []
    with monkeypatch.context() as patch:
        patch.setattr(subspace, "find", flipped)
        for _ in range(steps):
            x = torch.randn(64, 32, generator=g)
            with torch.no_grad():
                y = 3 * teacher(x)
            loss = (student(x) - y).square().mean()
            student.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return sum(losses[-40:]) / 40


def test_moments_that_go_along_pay_where_renewals_are_frequent(monkeypatch):
    often = {how: toy(how, 10, 0, monkeypatch) for how in ("none", "square", "centred")}
    assert often["square"] < 0.9 * often["none"]
    assert often["centred"] < 0.9 * often["none"]
    assert toy("none", 50, 0, monkeypatch) < 0.9 * often["none"]


def test_a_linear_map_of_the_second_moment_is_fatal(monkeypatch):
    """R V has negative entries, whose roots are NaN: the control for the test above."""

    def linear(moments, R, how, seen):
        mass = (R.square() @ moments.mass[..., None])[..., 0]
        return subspace.Moments(moments.first @ R.mT, moments.second @ R.mT, mass)

    monkeypatch.setattr(subspace, "transport", linear)
    # the NaN reaches a renewal, or the loss
    with pytest.raises((AssertionError, RuntimeError)):
        assert toy("square", 10, 0, monkeypatch, steps=40) < 1e3


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"energy": 0.0}, "energy"),
        ({"energy": 1.5}, "energy"),
        ({"min_rank": 0}, "min_rank"),
        ({"min_rank": 9, "rank": 8}, "min_rank"),
        ({"transport": "none"}, "no place in a subspace of another rank"),
        ({"earliest": 0}, "earliest"),
        ({"earliest": 10, "every": 5}, "earliest"),
        ({"kappa": 1.0}, "kappa"),
        ({"multiple": 0}, "multiple"),
    ],
)
def test_wrong_fields(fields, text):
    with pytest.raises(ConfigError, match=text):
        rs.AdaRankGrad(**fields)
