"""Project: trajectories against torch.optim.AdamW and formulas; invariances, ranks, bytes, clocks, loading."""

from __future__ import annotations

import copy
import io
import itertools
import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rankshift.core.errors import ConfigError
from rankshift.core.form import ExpertsForm, TransposedForm
from rankshift.optim import Adam, Optimizer, subspace
from rankshift.optim.inside import Inside
from rankshift.optim.moments import Blocks
from rankshift.optim.project import Clock, Project

D = torch.float64
NEVER = Clock(every=0)
EACH = Clock(every=1, stagger=False)
COUNTERS = {"step", "born", "renewed", "renewals", "next", "key", "even"}


def gradient(shape: tuple[int, ...], step: int, seed: int = 0, dtype: torch.dtype = D) -> Tensor:
    g = torch.Generator().manual_seed(1000 * seed + step)
    return torch.randn(shape, generator=g, dtype=D).to(dtype)


def weight(shape: tuple[int, ...] = (9, 6), seed: int = 7, dtype: torch.dtype = D) -> nn.Parameter:
    return nn.Parameter(gradient(shape, 0, seed, dtype))


def optimizer(ps: list[nn.Parameter], project: Project, **numbers: object) -> Optimizer:
    names = [(f"w{i}", p) for i, p in enumerate(ps)]
    return Optimizer([{"params": names}], [project], **{"lr": 1e-2, **numbers})


def train(p: nn.Parameter, project: Project, steps: int, stream=None, seed: int = 0, **numbers: object) -> Optimizer:
    """``stream``: the gradient of a step; normal numbers where none is given."""
    o = optimizer([p], project, **numbers)
    for step in range(steps):
        p.grad = (stream or (lambda n: gradient(tuple(p.shape), n, seed, p.dtype)))(step)
        o.step()
    return o


def adamw(p: nn.Parameter, steps: int, stream=None, **numbers: object) -> None:
    o = torch.optim.AdamW([p], **{"lr": 1e-2, "weight_decay": 0.0, **numbers})
    for step in range(steps):
        p.grad = (stream or (lambda n: gradient(tuple(p.shape), n, dtype=p.dtype)))(step)
        o.step()


def state(o: Optimizer) -> dict[str, Tensor]:
    (only,) = o.state.values()
    return only


def set_basis(o: Optimizer, p: nn.Parameter, Q: Tensor) -> dict[str, Tensor]:
    """Begin with this basis, as if it had just been found."""
    fresh = o.initial(p)
    fresh["basis"].copy_(Q)
    fresh["renewals"] += 1
    fresh["next"].fill_(1 << 40)
    o.state[p].update(fresh)
    return fresh


# ---- Adam's own trajectories


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
def test_the_identity_as_basis_is_torch_adamw(shape, decay):
    mine, theirs = weight(shape), weight(shape)
    o = optimizer([mine], Project(9, clock=NEVER), weight_decay=decay)
    set_basis(o, mine, torch.eye(min(shape), dtype=D))
    for step in range(40):
        mine.grad = gradient(shape, step)
        o.step()
    adamw(theirs, 40, weight_decay=decay)
    torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("energy", [None, 1.0])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
def test_full_rank_found_once_is_adamw_in_rotated_coordinates(shape, energy, decay):
    """…with the basis of numpy's SVD, and is not AdamW in the coordinates of the weight."""
    p = weight(shape)
    start = p.detach().clone()
    transport = "square" if energy else "none"
    train(p, Project(9, energy, clock=NEVER, finder="svd", transport=transport), 30, weight_decay=decay)
    G = gradient(shape, 0)
    on_input = shape[1] <= shape[0]
    _, _, Vh = torch.linalg.svd(G if on_input else G.mT, full_matrices=False)
    V = Vh.mT

    def rotated(x: Tensor) -> Tensor:
        return x @ V if on_input else x.mT @ V

    turned = nn.Parameter(rotated(start))
    adamw(turned, 30, lambda n: rotated(gradient(shape, n)), weight_decay=decay)
    back = turned.detach() @ V.mT
    torch.testing.assert_close(p.detach(), back if on_input else back.mT, rtol=1e-9, atol=1e-10)
    plain = nn.Parameter(start.clone())
    adamw(plain, 30, weight_decay=decay)
    assert (p - plain).abs().max() > 1e-2


def test_low_rank_is_the_papers_algorithm_written_out():
    """T = 4, no transport, α, decay before the step: every line of it in float64, from the SVD of each fourth G."""
    lr, beta1, beta2, eps, decay, alpha, r = 1e-2, 0.8, 0.95, 1e-6, 0.1, 0.25, 3
    p = weight()
    W = p.detach().clone()
    clock = Clock(every=4, stagger=False)
    project = Project(r, clock=clock, finder="svd", scale=alpha)
    train(p, project, 13, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    M = V = torch.zeros(9, r, dtype=D)
    for t in range(13):
        G = gradient((9, 6), t)
        if t % 4 == 0:
            Q = torch.linalg.svd(G)[2][:r].mT
            Q = Q * Q.gather(0, Q.abs().argmax(0, keepdim=True)).sign()  # of the two signs ours
        X = G @ Q
        M, V = beta1 * M + (1 - beta1) * X, beta2 * V + (1 - beta2) * X * X
        N = (M / (1 - beta1 ** (t + 1))) / ((V / (1 - beta2 ** (t + 1))).sqrt() + eps)
        W = (1 - lr * decay) * W - lr * alpha * N @ Q.mT
    torch.testing.assert_close(p.detach(), W, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("side", ["smaller", "larger"])
@pytest.mark.parametrize("finder", ["svd", "eigh", "range", "warm"])
def test_a_transposed_problem_takes_transposed_steps(side, finder):
    tall, wide = weight((8, 5)), nn.Parameter(weight((8, 5)).detach().mT.clone())
    project = Project(3, clock=Clock(every=3, stagger=False), finder=finder, side=side)
    train(tall, project, 8)
    train(wide, project, 8, lambda n: gradient((8, 5), n).mT.clone())
    torch.testing.assert_close(tall.detach(), wide.detach().mT, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("side", "shape", "s"),
    [("smaller", (8, 5), 5), ("smaller", (5, 8), 5), ("larger", (8, 5), 8), ("larger", (5, 8), 8),
     ("in", (8, 5), 5), ("in", (5, 8), 8), ("smaller", (6, 6), 6)],
)  # fmt: skip
def test_the_side_that_is_projected(side, shape, s):
    p = weight(shape)
    o = train(p, Project(2, side=side), 1)
    assert state(o)["basis"].shape == (s, 2)
    assert state(o)["exp_avg"].shape == (40 // s if shape != (6, 6) else 6, 2)
    change = p.detach() - weight(shape).detach()
    assert torch.linalg.matrix_rank(change, rtol=1e-6) == 2


@pytest.mark.parametrize("dtype", [torch.float32, D], ids=str)
def test_the_change_has_the_rank_of_the_subspaces_seen(dtype):
    """r before the second renewal; between r and (k+1)·r after k more."""
    p = weight((20, 16), dtype=dtype)
    start = p.detach().clone()
    o = optimizer([p], Project(2, clock=Clock(every=5, stagger=False)))
    ranks = []
    for step in range(15):
        p.grad = gradient((20, 16), step, dtype=dtype)
        o.step()
        ranks.append(int(torch.linalg.matrix_rank((p.detach() - start), rtol=1e-4)))
    assert ranks[:5] == [2] * 5
    assert ranks[5] > 2
    assert all(rank <= 2 * (1 + step // 5) for step, rank in enumerate(ranks))
    assert ranks[-1] > 4


def test_decay_is_of_the_whole_weight_and_without_the_scale():
    p = weight()
    start = p.detach().clone()
    train(p, Project(2, scale=0.25), 1, lambda n: 0 * gradient((9, 6), n), lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(p.detach(), 0.95 * start, rtol=1e-14, atol=0)


# ---- invariances of transport


@pytest.mark.parametrize("transport", ["square", "centred"])
def test_signed_permutations_of_a_new_basis_change_nothing(transport, monkeypatch):
    """…with moments that go along; where they stay, they change everything."""
    find, calls = subspace.find, []

    def shuffled(*args, **settings):
        basis = find(*args, **settings)
        r = basis.vectors.shape[-1]  # another order every time, within the rank of 3
        calls.append(torch.randperm(3, generator=torch.Generator().manual_seed(len(calls))))
        order = torch.tensor([*calls[-1], *range(3, r)])
        signs = torch.tensor([-1.0, 1, (-1) ** len(calls), *[1] * (r - 3)], dtype=D)
        return replace(basis, vectors=basis.vectors[..., order] * signs)

    def run(how: str, other: bool) -> Tensor:
        monkeypatch.setattr(subspace, "find", shuffled if other else find)
        calls.clear()
        p = weight()
        train(p, Project(3, clock=Clock(2, stagger=False), finder="svd", transport=how), 12)
        return p.detach()

    torch.testing.assert_close(run(transport, False), run(transport, True), rtol=1e-9, atol=1e-11)
    assert (run("none", False) - run("none", True)).abs().max() > 1e-3


def test_signs_of_the_first_basis_do_not_matter_without_transport(monkeypatch):
    find = subspace.find

    def run() -> Tensor:
        p = weight()
        train(p, Project(3, clock=NEVER, finder="svd"), 8)
        return p.detach()

    before = run()

    def turned(*args, **settings):
        basis = find(*args, **settings)
        return replace(basis, vectors=-basis.vectors)

    monkeypatch.setattr(subspace, "find", turned)
    torch.testing.assert_close(before, run(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("transport", ["square", "centred", "reset"])
def test_a_direction_never_seen_is_not_stepped_along_too_far(transport):
    """Constant gradients, after 1000 updates in another direction: |Δ| ≤ 1.1·lr·α in every update that follows."""
    lr, alpha = 1e-2, 0.5
    p = weight((6, 5))
    old, new = torch.zeros(6, 5, dtype=D), torch.zeros(6, 5, dtype=D)
    old[:, 0], new[:, 1] = 1.0, 1.0
    clock = Clock(every=1000, stagger=False)
    o = optimizer([p], Project(1, clock=clock, finder="svd", transport=transport, scale=alpha), lr=lr)
    largest = 0.0
    for step in range(1060):
        p.grad = (old if step < 1000 else new).clone()
        before = p.detach().clone()
        o.step()
        if step >= 1000:
            largest = max(largest, float((p.detach() - before).abs().max()))
    assert state(o)["renewals"] == 2
    assert 0.5 * lr * alpha < largest <= 1.1 * lr * alpha


@pytest.mark.parametrize("transport", ["square", "centred"])
@pytest.mark.parametrize("energy", [None, 0.7])
def test_hundreds_of_renewals_leave_everything_finite(transport, energy):
    p = weight((12, 10), dtype=torch.float32)
    o = optimizer([p], Project(6, energy, clock=EACH, finder="range", transport=transport))
    for step in range(300):
        p.grad = gradient((12, 10), step, dtype=torch.float32) * 10.0 ** (step % 7 - 3)
        o.step()
        assert bool((state(o)["exp_avg_sq"] >= 0).all())
        assert bool((state(o)["mass"] > 0).all())
    assert all(bool(torch.isfinite(value).all()) for value in [p, *state(o).values()])


# ---- ranks


def jump(step: int) -> Tensor:
    """A stream whose true rank is 3, then 7, then 2, with equal singular values."""
    rank = (3, 7, 2)[min(step // 4, 2)]
    g = torch.Generator().manual_seed(step)
    U = torch.linalg.qr(torch.randn(20, rank, generator=g, dtype=D)).Q
    V = torch.linalg.qr(torch.randn(12, rank, generator=g, dtype=D)).Q
    return U @ V.mT


def bytes_of(value: Tensor) -> int:
    return value.untyped_storage().nbytes()


@pytest.mark.parametrize("finder", ["svd", "eigh", "range", "warm"])
def test_ranks_follow_the_gradient_and_memory_follows_the_rank(finder):
    """3, 7, 2 at the renewals, bytes by the card's formula: s·r + 2·l·r + r numbers, in storages of no more."""
    p = weight((20, 12))
    o = optimizer([p], Project(10, 0.999, clock=Clock(4, stagger=False), finder=finder, transport="square"))
    for step in range(12):
        p.grad = jump(step)
        o.step()
        r, now = (3, 7, 2)[step // 4], state(o)
        assert {name: tuple(now[name].shape) for name in ("basis", "exp_avg", "exp_avg_sq", "mass")} == {
            "basis": (12, r), "exp_avg": (20, r), "exp_avg_sq": (20, r), "mass": (r,)
        }  # fmt: skip
        assert sum(bytes_of(now[k]) for k in ("basis", "exp_avg", "exp_avg_sq", "mass")) == 8 * r * (12 + 2 * 20 + 1)
        assert sum(bytes_of(value) for value in now.values()) <= 8 * r * 53 + 8 * (len(COUNTERS) + 1)
        assert now["energy"] >= 0.999


def test_the_rank_is_minimal_at_every_renewal():
    p = weight((20, 12))
    o = optimizer([p], Project(12, 0.8, clock=EACH, finder="eigh", transport="square"))
    seen = set()
    for step in range(12):
        G = p.grad = gradient((20, 12), step) @ torch.diag(torch.arange(1, 13, dtype=D) ** -(step / 6))
        o.step()
        sigma = torch.linalg.svdvals(G).square()
        share = sigma.cumsum(0) / sigma.sum()
        r = state(o)["basis"].shape[-1]
        assert share[r - 1] >= 0.8 - 1e-12
        assert r == 1 or share[r - 2] < 0.8
        torch.testing.assert_close(state(o)["energy"], share[r - 1], rtol=1e-9, atol=0)
        seen.add(r)
    assert len(seen) > 3


def test_a_saturated_rank_is_the_largest_and_keeps_less():
    o = train(weight((20, 12)), Project(3, 0.99, transport="square"), 1)
    assert state(o)["basis"].shape[-1] == 3
    assert state(o)["energy"] < 0.99


@pytest.mark.parametrize(
    ("least", "multiple", "ranks"), [(1, 1, (3, 7, 2)), (5, 1, (5, 7, 5)), (1, 4, (4, 8, 4)), (1, 16, (10, 10, 10)),
                                     (10, 8, (10, 10, 10)), (9, 2, (10, 10, 10))],
)  # fmt: skip
def test_least_ranks_and_multiples_near_the_limit(least, multiple, ranks):
    p = weight((20, 12))
    rule = Project(10, 0.999, least, multiple, clock=Clock(4, stagger=False), transport="square")
    o = optimizer([p], rule)
    found = []
    for step in range(12):
        p.grad = jump(step)
        o.step()
        found.append(state(o)["basis"].shape[-1])
    assert tuple(found[::4]) == ranks


def test_a_change_of_rank_leaves_what_is_inside_both_as_it_was():
    """Down and up: of the first moment, lifted, what the new subspace holds is the old one's; nothing jumps."""
    p = weight((20, 12))
    o = optimizer([p], Project(10, 0.999, clock=Clock(4, stagger=False), transport="square"), lr=1e-3)
    sizes = []
    for step in range(12):
        before = {k: v.clone() for k, v in state(o).items()} if step else {}
        weight_before = p.detach().clone()
        G = p.grad = jump(step)
        o.step()
        now = state(o)
        if step in (4, 8):
            old = before["exp_avg"] @ before["basis"].mT
            seen = 0.9 * old @ now["basis"] + 0.1 * G @ now["basis"]
            torch.testing.assert_close(now["exp_avg"], seen, rtol=1e-9, atol=1e-12)
        sizes.append(float((p.detach() - weight_before).abs().max()))
    assert max(sizes) <= 1e-3 * 20  # a step of Adam, lifted, over at most 7 directions


# ---- what a renewal costs


class Count(TorchDispatchMode):
    """How often operations are called; by fragments of their names."""

    def __init__(self, *names: str):
        super().__init__()
        self.names, self.found = names, dict.fromkeys(names, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for name in self.names:
            if name in str(func):
                self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("finder", "kind"), [("svd", "linalg_svd"), ("eigh", "linalg_eigh"), ("range", "linalg_eigh")])
def test_one_decomposition_at_a_renewal_and_none_between(finder, kind):
    p = weight((12, 8))
    o = optimizer([p], Project(6, 0.9, clock=Clock(4, stagger=False), finder=finder, transport="square"))
    for step in range(12):
        p.grad = gradient((12, 8), step)
        with Count("linalg_svd", "linalg_eigh", "linalg_qr") as count:
            o.step()
        spent = {k: n for k, n in count.found.items() if n and (k == kind or finder != "range" or k != "linalg_qr")}
        assert spent == ({kind: 1} if step % 4 == 0 else {})
        if step % 4:
            assert count.found["linalg_qr"] == 0


@pytest.mark.parametrize("finder", ["svd", "eigh", "range", "warm"])
@pytest.mark.parametrize("energy", [None, 0.9])
def test_directions_stand_by_energy_at_every_renewal(finder, energy):
    """…and are uncorrelated in the gradient of now: QᵀAᵀA Q is diagonal and falls. Moments that stay where they stand
    are then of a direction of the same order, and Adam's coordinates are the gradient's own."""
    p = weight((90, 80))
    transport = "none" if energy is None else "square"
    o = optimizer([p], Project(70, energy, clock=EACH, finder=finder, transport=transport))
    for step in range(3):
        G = p.grad = gradient((90, 80), step)
        o.step()
        Q = state(o)["basis"]
        energies = (G @ Q).square().sum(0)
        torch.testing.assert_close(Q.mT @ G.mT @ G @ Q, torch.diag(energies), rtol=1e-9, atol=1e-9)
        assert bool((energies.diff() <= 0).all())


@pytest.mark.parametrize("finder", ["range", "warm"])
def test_one_that_began_later_is_renewed_as_if_it_were_alone(finder):
    """Bit for bit: the backward pass may hand over tensors one by one."""
    project = Project(3, clock=EACH, finder=finder)
    results = []
    for together in (True, False):
        ps = [weight((12, 8), seed) for seed in range(3)]
        o = optimizer(ps, project)
        for step in range(4):
            for some in [range(3)] if together else [[0], [1], [2]]:
                for i in range(3):
                    ps[i].grad = gradient((12, 8), step, i) if i in some and step >= i else None
                o.step()
        results.append(ps)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_what_has_one_shape_is_decomposed_together_the_first_time():
    ps = [weight((12, 8), seed) for seed in range(5)] + [weight((8, 12), seed) for seed in range(3)]
    o = optimizer(ps, Project(3, clock=Clock(8), finder="eigh"))
    for p in ps:
        p.grad = gradient(tuple(p.shape), 0)
    with Count("linalg_eigh") as count:
        o.step()
    assert count.found["linalg_eigh"] == 1  # both shapes face the same way: 12 rows of 8


@pytest.mark.parametrize(("finder", "energy"), [("eigh", 0.9), ("range", 0.9), ("range", None), ("warm", 0.9)])
def test_at_most_one_transfer_to_the_host_for_all_that_is_renewed_together(finder, energy):
    """Read from what a renewal asks of tensors that are not counters: counters live on the CPU."""

    class Transfers(TorchDispatchMode):
        moved = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "_local_scalar_dense" in str(func) and args[0].dtype != torch.int64:
                self.moved += 1
            return func(*args, **(kwargs or {}))

    lists = 0
    tolist = Tensor.tolist

    def counted(self):
        nonlocal lists
        lists += 1
        return tolist(self)

    ps = [weight((12, 8), seed) for seed in range(4)]
    transport = "none" if energy is None else "square"
    o = optimizer(ps, Project(4, energy, clock=Clock(3, stagger=False), finder=finder, transport=transport))
    for step in range(7):
        for i, p in enumerate(ps):
            p.grad = gradient((12, 8), step, i)
        with pytest.MonkeyPatch.context() as patch, Transfers() as transfers:
            patch.setattr(Tensor, "tolist", counted)
            lists = 0
            o.step()
        assert transfers.moved == 0
        # with a fixed rank only the first asks: whether there is a gradient at all
        assert lists == int(step == 0 if energy is None else step % 3 == 0)


def test_the_basis_stands_bit_for_bit_between_renewals():
    p = weight((12, 8), dtype=torch.float32)
    o = optimizer([p], Project(3, clock=Clock(5, stagger=False)))
    for step in range(11):
        before = state(o)["basis"].clone() if step else None
        p.grad = gradient((12, 8), step, dtype=torch.float32)
        o.step()
        if step:
            assert torch.equal(before, state(o)["basis"]) == (step % 5 != 0)
        Q = state(o)["basis"]
        torch.testing.assert_close(Q.mT @ Q, torch.eye(3), rtol=0, atol=1e-5)


def course_of_energies(rule: Project, steps: int) -> Tensor:
    """What each basis of a constant gradient holds, as a share of the best; its singular values have no gap."""
    p = weight((40, 30))
    o = optimizer([p], rule)
    sigma = torch.linalg.svdvals(gradient((40, 30), 0)).square()
    shares = []
    for _ in range(steps):
        p.grad = gradient((40, 30), 0)
        o.step()
        kept = p.grad @ state(o)["basis"]
        shares.append(kept.square().sum() / sigma[: kept.shape[-1]].sum())
    return torch.stack(shares)


@pytest.mark.parametrize("transport", ["none", "square"])
def test_warm_comes_nearer_to_the_best_with_every_renewal(transport):
    """One iteration at a time, each from where the last one ended; another finder begins anew every time."""
    rule = Project(5, clock=EACH, finder="warm", transport=transport, oversample=0)
    warm = course_of_energies(rule, 60)
    assert bool((warm.diff() > -1e-9).all())
    assert warm[0] < 0.9
    assert warm[-1] > 0.999
    assert course_of_energies(replace(rule, finder="range"), 60).max() < 0.97


def test_warm_goes_on_from_a_basis_narrower_than_the_sketch():
    """A rank of 4, chosen by energy, of 7 directions that are sought: the other three are drawn."""
    rule = Project(7, 0.3, clock=EACH, finder="warm", transport="square", oversample=0)
    warm = course_of_energies(rule, 30)
    assert bool((warm.diff() > -1e-9).all())
    assert warm[0] < 0.96
    assert warm[-1] > 0.9999
    assert course_of_energies(replace(rule, finder="range"), 30).max() < 0.99


# ---- when


def renewed(o: Optimizer) -> list[int]:
    return [int(o.state[p]["renewals"]) for group in o.param_groups for p in group["params"]]


def steps_of_renewals(o: Optimizer, ps: list[nn.Parameter], steps: int, give) -> list[list[int]]:
    """For each update, the tensors that were renewed in it."""
    found, before = [], [0] * len(ps)
    for step in range(steps):
        for i, p in enumerate(ps):
            p.grad = give(step, i)
        o.step()
        now = renewed(o)
        found.append([i for i in range(len(ps)) if now[i] > before[i]])
        before = now
    return found


@pytest.mark.parametrize(("count", "every"), [(5, 10), (10, 4), (7, 7), (3, 50)])
def test_no_update_carries_more_renewals_than_its_share(count, every):
    ps = [weight((4, 3), seed) for seed in range(count)]
    o = optimizer(ps, Project(2, clock=Clock(every)))
    found = steps_of_renewals(o, ps, 3 * every + 1, lambda step, i: gradient((4, 3), step, i))
    assert found[0] == list(range(count))
    assert all(len(now) <= -(-count // min(every, 5)) for now in found[1:])
    for i in range(count):
        at = [step for step, now in enumerate(found) if i in now]
        assert 1 <= at[1] <= every
        assert all(b - a == every for a, b in itertools.pairwise(at[1:]))


def test_renewals_are_spread_over_groups_too():
    """Layers of another kind, or that do not decay, stand in groups of their own: one sequence goes through all."""
    ps = [weight((4, 3), seed) for seed in range(5)]
    rule = Project(2, clock=Clock(5))
    groups = [{"params": [(f"w{i}", p)]} for i, p in enumerate(ps)]
    o = Optimizer(groups, [replace(rule, scale=1.0 + i) for i in range(5)], lr=1e-2)
    found = steps_of_renewals(o, ps, 11, lambda step, i: gradient((4, 3), step, i))
    assert found[0] == list(range(5))
    assert all(len(now) == 1 for now in found[1:])


def test_without_spreading_all_are_renewed_together():
    ps = [weight((4, 3), seed) for seed in range(4)]
    o = optimizer(ps, Project(2, clock=Clock(3, stagger=False)))
    found = steps_of_renewals(o, ps, 7, lambda step, i: gradient((4, 3), step, i))
    assert found == [[0, 1, 2, 3], [], [], [0, 1, 2, 3], [], [], [0, 1, 2, 3]]


@pytest.mark.parametrize("earliest", [None, 5])
def test_every_zero_is_found_once_by_the_clock(earliest):
    p = weight()
    o = train(p, Project(3, clock=Clock(0, earliest)), 60)
    assert state(o)["renewals"] == 1


def fading(scale: float, quiet: int):
    """Gradients inside one subspace that die down after ``quiet`` updates."""
    G = gradient((9, 2), 0) @ gradient((2, 6), 1)
    return lambda step: scale * G * (1.0 if step < quiet else 1e-3)


def convergent(scale: float, quiet: int, every: int = 200, earliest: int = 20, steps: int = 150) -> list[int]:
    p = weight()
    clock = Clock(every, earliest, kappa=0.5, stagger=False)
    o = optimizer([p], Project(3, 0.99, clock=clock, transport="square"))
    stream = fading(scale, quiet)
    found = steps_of_renewals(o, [p], steps, lambda step, i: stream(step))
    return [step for step, now in enumerate(found) if now]


def test_convergence_renews_between_the_earliest_update_and_the_clock():
    assert convergent(1.0, quiet=45)[:2] == [0, 60]  # two looks later: the mean has to fall by itself
    assert convergent(1.0, quiet=6)[1] == 20
    assert convergent(1.0, quiet=6, earliest=40)[1] == 40  # not before the earliest
    assert convergent(1.0, quiet=1000) == [0]  # it never converges, and the clock is far
    assert convergent(1.0, quiet=1000, every=50) == [0, 50, 100]


def test_convergence_without_a_clock():
    assert convergent(1.0, quiet=45, every=0)[:2] == [0, 60]


def test_the_scale_of_the_loss_changes_no_renewal():
    assert convergent(1.0, quiet=45) == convergent(1e3, quiet=45) == convergent(1e-6, quiet=45)


def test_a_look_at_convergence_is_one_transfer_for_all_tensors():
    ps = [weight((9, 6), seed) for seed in range(5)]
    o = optimizer(ps, Project(3, 0.9, clock=Clock(40, earliest=5), transport="square"))
    tolist, lists, alone = Tensor.tolist, [], 0

    def counted(self):
        lists[-1] += 1
        return tolist(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "tolist", counted)
        for step in range(60):
            for i, p in enumerate(ps):
                p.grad = gradient((9, 6), step, i)
            lists.append(0)
            before = renewed(o) if step else [0] * 5
            o.step()
            looked = (step + 1) % 10 == 0 and step >= 5
            assert lists[-1] <= int(before != renewed(o)) + int(looked)
            alone += looked and before == renewed(o) and lists[-1] == 1
    assert alone >= 3, "looked, and nothing was renewed"


# ---- a gradient that is not there yet


def test_a_basis_waits_for_the_first_gradient():
    """Zeros at first, as behind an output layer that starts at zero: the run is the one that begins later."""
    late, prompt = weight(), weight()
    project = Project(3, clock=Clock(4, stagger=False), finder="svd")
    o = train(late, project, 9, lambda n: 0 * gradient((9, 6), 0) if n < 3 else gradient((9, 6), n - 3))
    train(prompt, project, 6)
    assert state(o)["renewals"] == 2
    torch.testing.assert_close(late, prompt, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("energy", [None, 0.9])
def test_a_gradient_of_zeros_at_a_renewal_changes_no_basis(energy):
    p = weight()
    how = "none" if energy is None else "square"
    o = train(p, Project(3, energy, clock=Clock(3, stagger=False), transport=how), 3)
    before = {k: v.clone() for k, v in state(o).items()}
    p.grad = torch.zeros_like(p)
    o.step()
    assert torch.equal(state(o)["basis"], before["basis"])
    torch.testing.assert_close(state(o)["exp_avg"], 0.9 * before["exp_avg"], rtol=1e-12, atol=1e-15)
    assert bool(torch.isfinite(p).all())


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (5, 5)])
@pytest.mark.parametrize("finder", ["svd", "eigh", "range", "warm"])
@pytest.mark.parametrize("rank", [1, 100])
def test_narrow_weights_and_ranks_over_the_side(shape, finder, rank):
    p = weight(shape)
    start = p.detach().clone()
    o = train(p, Project(rank, clock=Clock(2, stagger=False), finder=finder), 5)
    assert state(o)["basis"].shape[-1] == min(rank, *shape)
    assert bool(torch.isfinite(p).all())
    assert (p - start).abs().max() > 1e-3


@pytest.mark.parametrize("finder", ["svd", "eigh", "range", "warm"])
def test_gradients_of_rank_one(finder):
    p = weight()
    start = p.detach().clone()
    o = train(p, Project(4, clock=Clock(2, stagger=False), finder=finder), 6,
              lambda n: gradient((9, 1), n) @ gradient((1, 6), n + 50))  # fmt: skip
    assert bool(torch.isfinite(p).all())
    assert float((p - start).detach().abs().max()) <= 6 * 1e-2 * 2.01  # six steps, over four directions
    Q = state(o)["basis"]
    torch.testing.assert_close(Q.mT @ Q, torch.eye(4, dtype=D), rtol=0, atol=1e-10)


# ---- experts and other forms


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_are_projected_one_by_one(transposed):
    """A stack trains as its matrices alone would, with the same bases: nothing of one is seen in another."""
    project = Project(2, clock=Clock(3, stagger=False), finder="svd")
    stack = weight((3, 8, 5))
    alone = [nn.Parameter(part.detach().clone()) for part in stack]
    train(stack, replace(project, form=ExpertsForm(3, transposed)), 7)
    form = TransposedForm() if transposed else project.form
    for e, p in enumerate(alone):
        train(p, replace(project, form=form), 7, lambda n, e=e: gradient((3, 8, 5), n)[e])
        torch.testing.assert_close(stack[e], p, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("finder", ["svd", "eigh", "range", "warm"])
def test_the_energy_of_a_stack_is_the_mean_over_its_experts(finder):
    """From singular values, at two renewals; the experts' own shares lie far apart."""
    ranks = torch.tensor([2, 4, 6])
    p = weight((3, 12, 8))
    o = optimizer([p], Project(2, clock=EACH, finder=finder, form=ExpertsForm(3)))
    for step in range(2):
        G = p.grad = torch.stack([gradient((12, r), step, r) @ gradient((r, 8), step, r + 9) for r in ranks.tolist()])
        o.step()
        sigma = torch.linalg.svdvals(G).square()
        shares = sigma[:, :2].sum(-1) / sigma.sum(-1)
        assert float(shares.max() - shares.min()) > 0.25
        # sketches of 2 + 8 directions know all eight
        torch.testing.assert_close(state(o)["energy"], shares.mean(), rtol=1e-9, atol=0)


def test_an_expert_without_tokens_keeps_its_basis_and_moments():
    project = Project(2, clock=Clock(2, stagger=False), finder="eigh", transport="square", form=ExpertsForm(3))
    p = weight((3, 8, 5))
    start = p.detach().clone()

    def stream(n: int) -> Tensor:
        G = gradient((3, 8, 5), n)
        G[1] = 0
        return G

    o = train(p, project, 3, stream)
    assert torch.equal(p[1], start[1])
    full = {"exp_avg": state(o)["exp_avg"][1], "exp_avg_sq": state(o)["exp_avg_sq"][1]}
    assert not any(bool(value.any()) for value in full.values())
    Q = state(o)["basis"][1]
    torch.testing.assert_close(Q.mT @ Q, torch.eye(2, dtype=D), rtol=0, atol=1e-10)


def test_an_idle_expert_goes_through_a_change_of_rank():
    """The others' rank falls and rises; the idle one's leading directions and their moments stay."""

    def expert(rank: int, n: int) -> Tensor:
        g = torch.Generator().manual_seed(n)
        return torch.randn(8, rank, generator=g, dtype=D) @ torch.randn(rank, 6, generator=g, dtype=D)

    def stream(n: int) -> Tensor:
        rank = (4, 2, 5)[n]
        return torch.stack([expert(rank, n), expert(4, 99) * (n == 0)])

    p = weight((2, 8, 6))
    rule = Project(6, 0.9999, clock=EACH, finder="svd", transport="square", form=ExpertsForm(2))
    o = optimizer([p], rule)
    kept = []
    for n in range(3):
        p.grad = stream(n)
        o.step()
        now = state(o)
        assert now["basis"].shape[-1] == (4, 2, 5)[n]
        Q = now["basis"][1]
        torch.testing.assert_close(Q.mT @ Q, torch.eye(Q.shape[-1], dtype=D), rtol=0, atol=1e-10)
        kept.append((Q.clone(), (now["exp_avg"][1] @ Q.mT).clone(), now["mass"][1].clone()))
    first, second, third = kept
    torch.testing.assert_close((first[0][:, :2].mT @ second[0]).abs(), torch.eye(2, dtype=D), rtol=0, atol=1e-10)
    torch.testing.assert_close(second[1], 0.9 * first[1] @ second[0] @ second[0].mT, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(third[1], 0.9 * second[1], rtol=1e-9, atol=1e-12)


# ---- Fira


def fira(W: Tensor, G: Tensor, Q: Tensor, memory: dict, lr: float, alpha: float) -> Tensor:
    """One update of Fira written out, with its limiter; ``memory`` holds M, V, t and the last norm."""
    X = G @ Q
    memory["t"] += 1
    memory["M"] = 0.9 * memory["M"] + 0.1 * X
    memory["V"] = 0.999 * memory["V"] + 0.001 * X * X
    N = memory["M"] / (1 - 0.9 ** memory["t"]) / ((memory["V"] / (1 - 0.999 ** memory["t"])).sqrt() + 1e-8)
    outside = torch.zeros_like(G)
    for row in range(len(G)):
        outside[row] = N[row].norm() / X[row].norm() * (G[row] - Q @ (Q.mT @ G[row]))
    size = outside.norm()
    if memory["norm"] is not None and size > 1.01 * memory["norm"]:
        outside = outside * (1.01 * memory["norm"] / size)
        memory["limited"] += 1
    memory["norm"] = outside.norm()
    return W - lr * (alpha * N @ Q.mT + outside)


def test_fira_is_its_formula_with_the_limiter():
    p = weight()
    W = p.detach().clone()
    memory = {"t": 0, "M": torch.zeros(9, 2, dtype=D), "V": torch.zeros(9, 2, dtype=D), "norm": None, "limited": 0}
    o = optimizer([p], Project(2, clock=NEVER, finder="svd", residual=True, scale=0.25))
    for step in range(12):
        G = p.grad = gradient((9, 6), step) * (3.0 if step % 3 == 2 else 1.0)
        o.step()
        W = fira(W, G, state(o)["basis"], memory, 1e-2, 0.25)
        torch.testing.assert_close(p.detach(), W, rtol=1e-9, atol=1e-11)
    assert 2 <= memory["limited"] < 12


def test_at_full_rank_fira_has_nothing_to_add():
    with_it, without = weight(), weight()
    train(with_it, Project(6, clock=Clock(3, stagger=False), residual=True), 8)
    train(without, Project(6, clock=Clock(3, stagger=False)), 8)
    torch.testing.assert_close(with_it, without, rtol=1e-9, atol=1e-11)


# ---- random numbers


@pytest.mark.parametrize("finder", ["range", "warm"])
def test_draws_are_keyed_and_leave_the_global_generator_alone(finder):
    def bases(seed: int, name: str = "w") -> list[Tensor]:
        p = weight((30, 20))
        o = Optimizer([{"params": [(name, p)]}], [Project(2, clock=EACH, finder=finder, power=0)], lr=1e-2, seed=seed)
        found = []
        for step in range(3):
            p.grad = gradient((30, 20), step)
            o.step()
            found.append(state(o)["basis"].clone())
        return found

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = bases(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, bases(0), strict=True))
    assert not torch.equal(first[0], bases(1)[0])
    assert not torch.equal(first[0], bases(0, "other")[0])


# ---- dtypes


def test_sixteen_bit_gradients_have_fp32_state():
    p = weight((40, 24), dtype=torch.bfloat16)
    o = train(p, Project(4, clock=Clock(2, stagger=False), transport="square"), 5)
    wide = [name for name, value in state(o).items() if name not in COUNTERS]
    assert {state(o)[name].dtype for name in wide} == {torch.float32}
    assert p.dtype == torch.bfloat16
    same = weight((40, 24), dtype=torch.bfloat16).float()
    reference = nn.Parameter(same.detach().clone())
    train(reference, Project(4, clock=Clock(2, stagger=False), transport="square"), 1,
          lambda n: gradient((40, 24), n, dtype=torch.bfloat16).float())  # fmt: skip
    one = weight((40, 24), dtype=torch.bfloat16)
    train(one, Project(4, clock=Clock(2, stagger=False), transport="square"), 1)
    torch.testing.assert_close(one.float(), reference.detach(), rtol=2**-8, atol=1e-4)  # rounded once to bf16


def test_weights_of_several_dtypes_in_one_group():
    ps = [weight((8, 5), 1, torch.float32), weight((8, 5), 2, D), weight((8, 5), 3, torch.bfloat16)]
    alone = copy.deepcopy(ps)
    o = optimizer(ps, Project(2, clock=Clock(3, stagger=False), finder="svd"))
    for step in range(4):
        for p in ps:
            p.grad = gradient((8, 5), step, dtype=p.dtype)
        o.step()
    for p, q in zip(ps, alone, strict=True):
        train(q, Project(2, clock=Clock(3, stagger=False), finder="svd"), 4)
        assert torch.equal(p, q)


# ---- saving, and loading under another rule


def saved(o: Optimizer) -> dict:
    file = io.BytesIO()
    torch.save(o.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("finder", ["svd", "range", "warm"])
@pytest.mark.parametrize("energy", [None, 0.6])
def test_resume_is_exact_across_renewals_and_changes_of_rank(finder, energy):
    how = "none" if energy is None else "square"
    rule = Project(5, energy, clock=Clock(3, 2, stagger=False), finder=finder, transport=how, residual=True)

    def run(cut: int | None) -> tuple[Tensor, dict]:
        p = weight((12, 8), dtype=torch.float32)
        o = optimizer([p], rule)
        for step in range(10):
            if step == cut:
                state_dict = saved(o)
                p = nn.Parameter(p.detach().clone())
                o = optimizer([p], rule)
                o.load_state_dict(state_dict)
            p.grad = gradient((12, 8), step, dtype=torch.float32)
            o.step()
        return p.detach(), state(o)

    whole, end = run(None)
    for cut in range(1, 10):
        p, now = run(cut)
        assert torch.equal(p, whole)
        assert now.keys() == end.keys()
        assert all(torch.equal(now[k], end[k]) for k in end)


FIXED = Project(3, clock=Clock(4, stagger=False), finder="svd", transport="square")


def under(rule: Project, before: Project, caplog, shape=(9, 6), steps: int = 3, numbers: dict | None = None):
    """An optimizer by ``rule`` with the state of one by ``before`` after ``steps`` updates, and what the log says."""
    p = weight(shape)
    state_dict = saved(train(p, before, steps))
    o = optimizer([p], rule, **(numbers or {}))
    with caplog.at_level(logging.WARNING, "rankshift"):
        caplog.clear()
        o.load_state_dict(state_dict)
    said = "\n".join(record.getMessage() for record in caplog.records)
    return p, o, said, next(iter(state_dict["state"].values()))


def go_on(p: nn.Parameter, o: Optimizer, steps: int = 8) -> None:
    for step in range(steps):
        p.grad = gradient(tuple(p.shape), 100 + step)
        o.step()
    assert bool(torch.isfinite(p).all())


def test_the_same_rule_loads_without_a_word(caplog):
    _, o, said, before = under(FIXED, FIXED, caplog)
    assert said == ""
    assert all(torch.equal(state(o)[k], before[k]) for k in before)


def test_a_larger_rank_takes_over_at_the_next_renewal(caplog):
    p, o, said, before = under(replace(FIXED, rank=5), FIXED, caplog)
    assert "rank: 3 → 5" in said
    assert '"rank": "5"' in o.param_groups[0]["rule"]  # what is saved next is of this rule
    assert "rank 3 until the next renewal, then 5: w0" in said
    assert torch.equal(state(o)["exp_avg"], before["exp_avg"])
    p.grad = gradient((9, 6), 3)
    o.step()
    assert state(o)["basis"].shape == (6, 3)
    go_on(p, o, 1)
    assert state(o)["basis"].shape == (6, 5)
    go_on(p, o)


def test_another_rank_without_transport_begins_its_moments_anew(caplog):
    p, o, said, _ = under(replace(FIXED, rank=2, transport="none"), replace(FIXED, transport="none"), caplog, steps=4)
    assert "its moments begin anew there" in said
    W, G = p.detach().clone(), gradient((9, 6), 100)
    go_on(p, o, 1)
    # the first step of a new Adam: signs along the new directions
    torch.testing.assert_close((W - p.detach()) @ state(o)["basis"], 1e-2 * (G @ state(o)["basis"]).sign(),
                               rtol=1e-4, atol=0)  # fmt: skip


def test_from_fixed_to_energy_and_back(caplog):
    adaptive = replace(FIXED, rank=6, energy=0.9, clock=Clock(4, 2))
    p, o, said, _ = under(adaptive, FIXED, caplog)
    assert "energy: None → 0.9" in said
    assert "what convergence is measured against begins anew" in said
    go_on(p, o)
    p, o, said, before = under(FIXED, adaptive, caplog)
    assert "energy: 0.9 → None" in said
    assert "what convergence is measured against is left behind" in said
    assert state(o)["basis"].shape == before["basis"].shape
    go_on(p, o)
    assert state(o)["basis"].shape[-1] == 3


def test_what_convergence_is_measured_against_begins_with_the_loaded_state(caplog):
    watched = replace(FIXED, clock=Clock(100, 50, stagger=False))
    p, o, said, _ = under(watched, replace(FIXED, clock=Clock(100, stagger=False)), caplog)
    assert "earliest: None → 50" in said
    sizes = []
    for step in range(7):
        G = p.grad = gradient((9, 6), 50 + step)
        o.step()
        sizes.append(float((G @ state(o)["basis"]).square().sum()))
    torch.testing.assert_close(float(state(o)["pace"][1]), sum(sizes[:5]) / 5, rtol=1e-9, atol=0)


def test_another_transport_and_finder_are_said(caplog):
    p, o, said, _ = under(replace(FIXED, transport="centred", finder="range"), FIXED, caplog)
    assert "transport: square → centred" in said
    assert "finder: svd → range" in said
    go_on(p, o)


def test_a_shorter_clock_holds_at_once_and_a_stopped_one_stops(caplog):
    long = replace(FIXED, clock=Clock(500, stagger=False))
    p, o, said, _ = under(FIXED, long, caplog)
    assert "(every: 500 → 4)" in said
    go_on(p, o, 6)
    assert state(o)["renewals"] == 2
    p, o, said, _ = under(replace(FIXED, clock=NEVER), FIXED, caplog)
    go_on(p, o, 12)
    assert state(o)["renewals"] == 1
    p, o, _, _ = under(FIXED, replace(FIXED, clock=NEVER), caplog)
    go_on(p, o, 6)
    assert state(o)["renewals"] == 2


def test_a_residual_begins_or_stays_behind(caplog):
    p, o, said, _ = under(replace(FIXED, residual=True), FIXED, caplog)
    assert "the norm that bounds the residual's growth begins anew" in said
    go_on(p, o)
    p, o, said, _ = under(FIXED, replace(FIXED, residual=True), caplog)
    assert "the norm that bounds the residual's growth is left behind" in said
    go_on(p, o)


@pytest.mark.parametrize("eight", [True, False])
def test_moments_go_from_fp32_to_8_bits_and_back(eight, caplog):
    wide, narrow = FIXED, replace(FIXED, store=Blocks(least=0))
    rule, before_rule = (narrow, wide) if eight else (wide, narrow)
    p, o, said, before = under(rule, before_rule, caplog, shape=(90, 60))
    assert ("moments: float32 → 8bit" if eight else "moments: 8bit → float32") in said
    for name in ("exp_avg", "exp_avg_sq"):
        new, old = rule.store.read(state(o), name), before_rule.store.read(before, name)
        # 7 bits of a dynamic map; what is read from 8 bits is exact
        torch.testing.assert_close(new, old, rtol=0.2 if eight else 0, atol=0.02 * float(old.abs().max()) * eight)
    assert state(o)["exp_avg"].dtype == (torch.uint8 if eight else D)
    go_on(p, o)


def test_8_bits_load_as_the_same_codes(caplog):
    narrow = replace(FIXED, store=Blocks(least=0))
    _, o, said, before = under(narrow, narrow, caplog, shape=(90, 60))
    assert said == ""
    assert all(torch.equal(state(o)[k], before[k]) and state(o)[k].dtype == before[k].dtype for k in before)


def refused(rule, before, shape=(9, 6), numbers=None) -> str:
    p = weight(shape)
    o = train(p, before, 3)
    state_dict = saved(o)
    fresh = Optimizer([{"params": [("w0", p)]}], [rule], lr=0.5)
    with pytest.raises(ConfigError) as error:
        fresh.load_state_dict(state_dict)
    assert not fresh.state
    assert fresh.param_groups[0]["lr"] == 0.5  # nothing was changed
    return str(error.value)


def test_another_side_is_refused():
    said = refused(replace(FIXED, side="larger"), FIXED)
    assert "w0 (9, 6)" in said
    assert "its basis is (6, 3) and would be (9, 3): another side" in said


def test_plain_adam_and_a_projection_are_refused_both_ways():
    assert "that of plain AdamW" in refused(FIXED, Adam())
    assert "that of a projected gradient" in refused(Adam(), FIXED)


def test_another_shape_is_refused():
    p, q = weight((9, 6)), weight((9, 4))
    state_dict = saved(train(p, FIXED, 2))
    with pytest.raises(ConfigError, match=r"its basis is \(6, 3\) and would be \(4, 3\)"):
        optimizer([q], FIXED).load_state_dict(state_dict)
    tall = weight((11, 6))
    with pytest.raises(ConfigError, match=r"its exp_avg is \(9, 3\) and would be \(11, 3\)"):
        optimizer([tall], FIXED).load_state_dict(state_dict)


def test_other_groups_are_refused():
    p, q = weight(), weight()
    state_dict = saved(train(p, FIXED, 2))
    with pytest.raises(ConfigError, match=r"groups of \[1\] tensors, this one of \[2\]"):
        optimizer([p, q], FIXED).load_state_dict(state_dict)


def test_a_state_of_torch_adamw_loads_into_adam_and_goes_on():
    mine, theirs = weight(), weight()
    reference = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.0)
    for step in range(6):
        theirs.grad = gradient((9, 6), step)
        if step == 3:
            o = Optimizer([{"params": [mine]}], [Adam()], lr=1e-2)
            o.load_state_dict(copy.deepcopy(reference.state_dict()))
            with torch.no_grad():
                mine.copy_(theirs)
        if step >= 3:
            mine.grad = gradient((9, 6), step)
            o.step()
        reference.step()
    assert torch.equal(mine, theirs)


# ---- gradients that cannot be used


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_a_sparse_or_complex_gradient_is_refused_before_anything_moves(kind):
    fine = weight()
    if kind == "sparse":
        odd = nn.Parameter(torch.ones(4, 3, dtype=D))
        odd_grad = torch.eye(4, 3, dtype=D).to_sparse()
    else:
        odd = nn.Parameter(torch.ones(4, 3, dtype=torch.complex128))
        odd_grad = torch.ones(4, 3, dtype=torch.complex128)
    groups = [{"params": [("fine", fine)]}, {"params": [("odd", odd)]}]
    o = Optimizer(groups, [Project(2), Project(2, scale=2.0)], lr=1e-2)
    fine.grad, odd.grad = gradient((9, 6), 0), odd_grad
    before = fine.detach().clone()
    with pytest.raises(ConfigError, match=rf"gradient of odd \(4, 3\) is {kind}"):
        o.step()
    assert torch.equal(fine, before)
    assert not o.state


def test_a_closure_gives_the_same_result():
    mine, other = weight(), weight()
    target = gradient((9, 6), 5)
    a, b = (optimizer([p], Project(3, clock=Clock(3, stagger=False))) for p in (mine, other))

    def loss(p: nn.Parameter) -> Tensor:
        value = (p - target).square().mean()
        value.backward()
        return value

    for _ in range(8):
        a.zero_grad()
        assert a.step(lambda: loss(mine)).requires_grad
        b.zero_grad()
        loss(other)
        b.step()
    assert torch.equal(mine, other)


# ---- convergence, pinned ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "renews"), [(0.6, False), (0.45, True)])
def test_kappa_is_a_share_of_the_norm_and_not_of_its_square(share: float, renews: bool):
    p = weight((9, 6))
    o = optimizer([p], Project(6, 1.0, clock=Clock(0, earliest=5, look=1), transport="square"))
    found = steps_of_renewals(o, [p], 80, lambda step, i: gradient((9, 6), 0) * (1.0 if step < 10 else share))
    assert any(now for now in found[10:]) == renews


def test_what_convergence_is_measured_by_begins_anew_at_a_renewal():
    p = weight((9, 6))
    o = optimizer([p], Project(6, 1.0, clock=Clock(12, earliest=6, look=1), transport="square"))
    steps_of_renewals(o, [p], 16, lambda step, i: gradient((9, 6), 0) * (3.0 if step < 12 else 1.0))
    state = o.state[p]
    assert int(state["renewals"]) == 2
    size = gradient((9, 6), 0).square().sum()  # the subspace is everything
    assert state["pace"][0] == pytest.approx(size.item(), rel=1e-9)
    assert state["pace"][1] == pytest.approx(0.8 * size.item(), rel=1e-9)  # four of five updates since


def test_every_renewal_draws_anew():
    p = weight((40, 30))
    o = optimizer([p], Project(2, clock=Clock(1, stagger=False), finder="range", power=0, oversample=0))
    bases = []
    for _ in range(2):
        p.grad = gradient((40, 30), 0)  # white noise: what is found depends on the sketch
        o.step()
        bases.append(o.state[p]["basis"].clone())
    assert (bases[0].mT @ bases[1]).abs().max() < 0.99


def test_renewals_come_in_at_most_five_groups():
    ps = [weight((4, 3), seed) for seed in range(25)]
    o = optimizer(ps, Project(2, clock=Clock(200)))
    found = steps_of_renewals(o, ps, 201, lambda step, i: gradient((4, 3), step, i))
    groups = [now for now in found[1:] if now]
    assert len(groups) == 5
    assert max(map(len, groups)) == 5


def test_a_gradient_of_zeros_at_a_renewal_leaves_what_is_known():
    p = weight((9, 6))
    o = optimizer([p], Project(3, clock=Clock(3, stagger=False)))
    steps_of_renewals(o, [p], 3, lambda step, i: gradient((9, 6), step))
    basis, energy = (o.state[p][key].clone() for key in ("basis", "energy"))
    steps_of_renewals(o, [p], 1, lambda step, i: torch.zeros(9, 6, dtype=D))
    assert int(o.state[p]["renewals"]) == 2
    assert torch.equal(o.state[p]["basis"], basis)
    assert torch.equal(o.state[p]["energy"], energy)
    assert energy > 0.3


@pytest.mark.parametrize("finder", ["range", "warm"])
def test_a_sketch_is_a_tensors_own_whoever_is_renewed_with_it(finder: str):
    """White noise, of which every sketch finds something else: alone, and together with others of its shape."""
    rule = Project(3, clock=EACH, finder=finder, power=0, oversample=0, transport="square")
    together = [weight((40, 30), seed) for seed in range(3)]
    o = optimizer(together, rule)
    alone = [weight((40, 30), seed) for seed in range(3)]
    each = [Optimizer([{"params": [(f"w{i}", p)]}], [rule], lr=1e-2) for i, p in enumerate(alone)]
    for step in range(3):
        for i, (p, q) in enumerate(zip(together, alone, strict=True)):
            p.grad, q.grad = gradient((40, 30), step, i), gradient((40, 30), step, i)
        for one in (o, *each):
            one.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-11)
    same = weight((40, 30), 0)  # the first one's, under another name: another sketch
    other = Optimizer([{"params": [("another", same)]}], [rule], lr=1e-2)
    for step in range(3):
        same.grad = gradient((40, 30), step, 0)
        other.step()
    assert (same - alone[0]).abs().max() > 1e-3


def test_convergence_is_measured_against_five_updates_however_early_it_is_looked_for():
    """A gradient that grows at first: against a mean of less it would seem to have shrunk."""
    p = weight((9, 6))
    o = optimizer([p], Project(6, 1.0, clock=Clock(0, earliest=1, kappa=0.99, look=1), transport="square"))
    found = steps_of_renewals(o, [p], 6, lambda step, i: gradient((9, 6), 0) * (3.0 if step else 1.0))
    assert [step for step, now in enumerate(found) if now] == [0, 5]


@pytest.mark.parametrize("now", ["none", "reset"])
@pytest.mark.parametrize("before", ["square", "centred"])
@pytest.mark.parametrize("kind", [Project, Inside])
def test_moments_that_directions_have_seen_unequally_are_read_so_under_another_transport(before, now, kind):
    """The second moment is as full as the mass says, not as the tensor is old: else steps are several times too far."""
    p, project = weight((9, 6)), Project(3, clock=Clock(2, stagger=False), transport=before)
    first = train(p, project, 7)
    saved = first.state[p]
    age = int(saved["step"]) - int(saved["born"])
    assert (saved["mass"] < 0.8 * (1 - 0.999**age)).any(), "else this shows nothing"
    later = replace(project, transport=now, clock=Clock(0))
    if kind is Project:
        o = optimizer([p], later)
        o.load_state_dict(first.state_dict())
        target = p
        p.grad = gradient((9, 6), 99)
        X = p.grad @ saved["basis"]
    else:
        target = nn.Parameter(torch.zeros(9, 3, dtype=D))
        o = optimizer([target], Inside.of(later))
        fresh = o.initial(target)
        fresh |= {key: saved[key].clone() for key in fresh if key in saved}
        o.state[target].update(fresh)
        X = target.grad = gradient((9, 3), 99)
    m = 0.9 * saved["exp_avg"] + 0.1 * X
    v = 0.999 * saved["exp_avg_sq"] + 0.001 * X.square()
    c = 0.999 * saved["mass"] + 0.001
    N = m / (1 - 0.9 ** (age + 1)) / ((v / c).sqrt() + 1e-8)
    wanted = target.detach() - 1e-2 * (N @ saved["basis"].mT if kind is Project else N)
    o.step()
    torch.testing.assert_close(target.detach(), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(o.state[target]["mass"], c, rtol=0, atol=1e-15)
