"""AdaRankGrad: ranks that follow the gradient of a run, GaLore's code where they do not, moments that go along."""

from __future__ import annotations

import copy
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


FALLS = rs.AdaRankGrad(rank=10, energy=0.999, every=4, earliest=4, stagger=False)


def follow(run: rs.Run, optimizer: Optimizer, first: int, last: int) -> None:
    """Updates on gradients of rank 3, 7, 2 and 5, four of each."""
    for step in range(first, last):
        run.model(of_rank((3, 7, 2, 5)[step // 4], step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def told(run: rs.Run, optimizer: Optimizer) -> tuple[dict[str, int], dict[str, int], tuple[int, ...]]:
    """The ranks that a run says and saves, and the shape of the basis that its optimizer begins with."""
    basis = optimizer.initial(run.model.layer.weight)["basis"]  # type: ignore[union-attr, arg-type]
    return run.subspaces, run.state_dict()["subspaces"], tuple(basis.shape)


def test_ranks_that_came_with_a_run_are_those_of_its_next_optimizer_and_of_no_later_one():
    """A run that was resumed says and begins what one does that went straight on, whatever rank it was loaded in."""
    straight = rs.attach(Given(), FALLS)
    optimizer = straight.optimizer(lr=1e-2)
    follow(straight, optimizer, 0, 4)
    saved = copy.deepcopy((straight.state_dict(), optimizer.state_dict()))
    follow(straight, optimizer, 4, 8)
    resumed = rs.restore(Given(), saved[0])
    again = resumed.optimizer(lr=1e-2)
    assert resumed.subspaces == {"layer.weight": 3}
    again.load_state_dict(saved[1])
    follow(resumed, again, 4, 8)
    assert resumed.subspaces == {"layer.weight": 7}
    later, late = straight.optimizer(lr=1e-2), resumed.optimizer(lr=1e-2)
    assert told(resumed, late) == told(straight, later)
    assert resumed.subspaces != {"layer.weight": 3}
    follow(straight, later, 8, 12)
    follow(resumed, late, 8, 12)
    assert resumed.subspaces == straight.subspaces == {"layer.weight": 2}
    assert torch.equal(straight.model.layer.weight, resumed.model.layer.weight)  # type: ignore[union-attr, arg-type]


def test_a_run_that_is_loaded_again_keeps_no_rank_of_the_first_load():
    run = rs.attach(Given(), FALLS)
    untrained = copy.deepcopy(run.state_dict())
    optimizer = run.optimizer(lr=1e-2)
    follow(run, optimizer, 0, 4)
    other = rs.restore(Given(), run.state_dict())
    early = other.optimizer(lr=1e-2)
    assert told(other, early) == ({"layer.weight": 3}, {"layer.weight": 3}, (12, 3))
    other.load_state_dict({**untrained, "changed": run.state_dict()["changed"]})
    wanted = {}, {}, (12, 10)
    assert told(other, early) == wanted  # made before, and it has no state yet
    assert told(other, other.optimizer(lr=1e-2)) == wanted


def test_a_new_optimizer_takes_over_the_state_of_the_last_one_by_its_shapes():
    """As FSDP2 loads: tensor into tensor."""
    run = rs.attach(Given(), FALLS)
    optimizer = run.optimizer(lr=1e-2)
    follow(run, optimizer, 0, 6)
    weight = run.model.layer.weight
    old = {key: value.shape for key, value in optimizer.state[weight].items()}
    assert {key: value.shape for key, value in run.optimizer().initial(weight).items()} == old


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
