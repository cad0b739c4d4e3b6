"""SwitchLoRA: against plain loops written from the paper's algorithm, and what it promises one by one."""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankshift as rs
from rankshift.core.errors import AttachError, ConfigError, RankTooLarge, TrainingError, UnsupportedLayer
from rankshift.core.event import Tick
from rankshift.methods import switchlora_pool
from rankshift.methods.switchlora import SwitchLayer
from rankshift.optim import Optimizer
from rankshift.optim.vectors import Vectors

F64 = torch.float64


class Chain(nn.Module):
    """Linear layers without anything between them."""

    def __init__(self, *widths: int, bias: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pairs = itertools.pairwise(widths)
            self.layers = nn.ModuleList(nn.Linear(n, m, bias=bias) for n, m in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def chain(*widths: int, dtype: torch.dtype = F64, bias: bool = False) -> Chain:
    return Chain(*widths, bias=bias).to(dtype)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layers_of(run: rs.Run) -> dict[str, SwitchLayer]:
    found = run.adapter()
    assert all(isinstance(layer, SwitchLayer) for layer in found.values())
    return found  # type: ignore[return-value]


def update(run: rs.Run, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor) -> None:
    (run.model(x) - target).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def method(**fields: Any) -> rs.SwitchLoRA:
    return rs.SwitchLoRA(**{"rank": 4, "interval": 4, "freeze": 2, "ratio": 2, "targets": ("layers.*",), **fields})


# ---- plain loops, from the algorithm ---------------------------------------------------------------------------------


@dataclass
class Plain:
    """One layer, with every list that the algorithm names; moments and step counts for each vector."""

    name: str
    W: Tensor
    A: Tensor
    B: Tensor
    pool_a: Tensor  # (c, n)
    pool_b: Tensor  # (c, m)
    config: rs.SwitchLoRA
    state: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        r, c = len(self.A), len(self.pool_a)
        self.slot_A, self.slot_B = list(range(c - r, c)), [0] * r
        for j in range(r):
            self.slot_B[(r // 2 + j) % r] = c - r + j
        self.p_A, self.p_B = 0, r // 2
        self.frozen_A, self.frozen_B = [0] * r, [0] * r
        self.switched = 0
        for leaf, like in (("A", self.A), ("B", self.B)):
            self.state[f"m{leaf}"], self.state[f"v{leaf}"] = torch.zeros_like(like), torch.zeros_like(like)
            self.state[f"t{leaf}"] = torch.zeros(r, dtype=torch.int64)

    @property
    def scale(self) -> float:
        return self.config.alpha / len(self.A)

    def step(self, G: Tensor, t: int, total: int, lr: float, seed: int) -> None:
        """One update from G = ∂L/∂(W + s·BA)."""
        A, B, r, c, N, s = self.A, self.B, len(self.A), len(self.pool_a), self.config.freeze, self.scale
        grad_A, grad_B = s * B.T @ G, s * G @ A.T
        q = r / self.config.interval * self.config.rho ** ((t + 1) / (self.config.ratio * total))
        text = "\x1f".join((str(seed), "switch", str(t), "default", self.name))
        word = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        k = int(q) + (word / 2**64 < q - int(q))
        behind_A, behind_B = sum(n > 0 for n in self.frozen_B), sum(n > 0 for n in self.frozen_A)
        k = min(k, (self.p_A - behind_A - self.p_B) % r, (self.p_B - behind_B - self.p_A) % r)
        fresh: list[tuple[str, int]] = []
        for _ in range(k):
            i = self.p_A
            slot = (self.slot_A[i - 1] + 1) % c
            new = self.pool_a[slot].clone()
            self.W += s * torch.outer(B[:, i], A[i] - new)
            self.pool_a[self.slot_A[i]] = A[i]
            self.slot_A[i], A[i] = slot, new
            self.frozen_B[i] = N
            fresh.append(("B", i))
            self.p_A = (i + 1) % r
        for _ in range(k):
            i = self.p_B
            slot = (self.slot_B[i - 1] + 1) % c
            new = self.pool_b[slot].clone()
            self.W += s * torch.outer(B[:, i] - new, A[i])
            self.pool_b[self.slot_B[i]] = B[:, i]
            self.slot_B[i], B[:, i] = slot, new
            self.frozen_A[i] = N
            fresh.append(("A", i))
            self.p_B = (i + 1) % r
        self.switched += k
        for leaf, i in fresh:
            for moment in "mv":
                (self.state[f"{moment}A"][i] if leaf == "A" else self.state[f"{moment}B"][:, i]).zero_()
            self.state[f"t{leaf}"][i] = 0
        for i in range(r):
            if self.frozen_A[i] > 0:
                grad_A[i] = 0
                self.frozen_A[i] -= 1
            if self.frozen_B[i] > 0:
                grad_B[:, i] = 0
                self.frozen_B[i] -= 1
        self.adam(A, grad_A, "A", lr)
        self.adam(B.T, grad_B.T, "B", lr)

    def adam(self, p: Tensor, g: Tensor, leaf: str, lr: float) -> None:
        """Vector by vector; ``p`` (r, length) shares memory with the factor."""
        m, v, t = (self.state[f"{name}{leaf}"] for name in "mvt")
        m, v = (m, v) if leaf == "A" else (m.T, v.T)
        for i in range(len(p)):
            t[i] += 1
            m[i] = 0.9 * m[i] + 0.1 * g[i]
            v[i] = 0.999 * v[i] + 0.001 * g[i] ** 2
            p[i] -= lr * (m[i] / (1 - 0.9 ** int(t[i]))) / ((v[i] / (1 - 0.999 ** int(t[i]))).sqrt() + 1e-8)


@pytest.mark.parametrize(
    ("fields", "widths"),
    [
        ({}, (9, 12, 7)),
        ({"rank": 5, "interval": 2, "freeze": 1, "rho": 1.0}, (9, 12, 7)),  # exchanges run into each other
        ({"rank": 6, "interval": 6, "freeze": 3, "alpha": 2.0, "ratio": 0.3}, (8, 8, 8)),  # two layers of one shape
        ({"rank": 6, "freeze": 1, "rho": 1.0}, (9, 9, 9)),  # of which one exchanges one vector and the other two
        ({"interval": math.inf}, (9, 12, 7)),
    ],
)
def test_an_update_is_that_of_plain_loops(fields: dict[str, Any], widths: tuple[int, ...]) -> None:
    total, lr, seed = 200, 3e-3, 7
    model = chain(*widths)
    run = rs.attach(model, method(**fields), seed=seed, total_steps=total)
    optimizer = run.optimizer(lr=lr)
    mine = layers_of(run)
    plain = [
        Plain(
            name,
            *(t.detach().clone() for t in (layer.base.weight, layer.A, layer.B, layer.pool_A, layer.pool_B)),
            run.method,  # type: ignore[arg-type]
        )
        for name, layer in mine.items()
    ]
    x, target = noise(16, widths[0], seed=1), noise(16, widths[-1], seed=2)
    for t in range(total):
        update(run, optimizer, x, target)
        first, second = (p.W + p.scale * p.B @ p.A for p in plain)
        h = x @ first.T
        dy = 2 * (h @ second.T - target) / target.numel()
        gradients = (dy @ second).T @ x, dy.T @ h
        for p, G in zip(plain, gradients, strict=True):
            p.step(G, t, total, lr, seed)
    assert all(p.switched > 30 for p in plain) is (run.method.interval < math.inf)  # type: ignore[attr-defined]
    for p, layer in zip(plain, mine.values(), strict=True):
        assert int(layer.clock[0]) == p.switched
        assert (int(layer.clock[0]) % layer.rank, (layer.rank // 2 + int(layer.clock[0])) % layer.rank) == (
            p.p_A,
            p.p_B,
        )
        for leaf, axis in (("A", 1), ("B", 0)):
            state = optimizer.state[layer.get_parameter(leaf)]
            torch.testing.assert_close(state["exp_avg"], p.state[f"m{leaf}"], rtol=0, atol=1e-12)
            torch.testing.assert_close(state["exp_avg_sq"], p.state[f"v{leaf}"], rtol=0, atol=1e-12)
            assert torch.equal(state["step"].squeeze(axis).long(), p.state[f"t{leaf}"])
        held = (layer.base.weight, layer.A, layer.B, layer.pool_A, layer.pool_B)
        for got, want in zip(held, (p.W, p.A, p.B, p.pool_a, p.pool_b), strict=True):
            torch.testing.assert_close(got.detach(), want, rtol=0, atol=1e-11)


# ---- the start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "r"), [(640, 480, 160), (480, 640, 120), (512, 512, 128)])
def test_the_start_is_that_of_torchs_linear_and_the_function_stays(m: int, n: int, r: int) -> None:
    model = chain(n, m, dtype=torch.float32)
    before = model.layers[0].weight.detach().clone()
    run = rs.attach(model, rs.SwitchLoRA(rank=r, targets=("layers.0",)), total_steps=10)
    (layer,) = layers_of(run).values()
    BA = layer.B @ layer.A / r
    assert BA.std().item() == pytest.approx((3 * n) ** -0.5, rel=0.03)
    g = 3**-0.5
    for pool, factor, std in (
        (layer.pool_A, layer.A, (r * m**0.5 / n**1.5) ** 0.25 * g**0.5),
        (layer.pool_B, layer.B, (r / (m * n) ** 0.5) ** 0.25 * g**0.5),
    ):
        assert pool.shape == (min(m, n), max(factor.shape))
        assert pool.std().item() == pytest.approx(std, rel=0.01)
        bound = 3**0.5 * std
        assert 0.999 * bound < pool.abs().max().item() <= bound * (1 + 1e-6)
        assert pool.mean().abs().item() < 0.01 * std
    torch.testing.assert_close(layer.base.weight + BA, before, rtol=0, atol=3e-7)


def test_the_last_candidates_are_out() -> None:
    run = rs.attach(chain(9, 12), method(rank=5), total_steps=10)
    (layer,) = layers_of(run).values()
    assert torch.equal(layer.A, layer.pool_A[-5:])
    for j in range(5):
        assert torch.equal(layer.B[:, (2 + j) % 5], layer.pool_B[4 + j])


def test_draws_are_of_the_seed_and_the_layer_alone() -> None:
    def pools(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(torch.seed() % 1000)
        run = rs.attach(chain(8, 8, 8), method(), seed=seed, total_steps=10)
        return {f"{n}.{leaf}": t for n, layer in layers_of(run).items() for leaf, t in layer.aside().items()}

    one, again, other = pools(3), pools(3), pools(4)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["layers.0.pool_A"], other["layers.0.pool_A"])
    assert not torch.equal(one["layers.0.pool_A"], one["layers.1.pool_A"])
    assert not torch.equal(one["layers.0.pool_A"], one["layers.0.pool_B"])


# ---- exchanges -------------------------------------------------------------------------------------------------------


def standing(run: rs.Run, updates: int) -> None:
    """Updates at a learning rate of zero: exchanges are all that happens."""
    optimizer = run.optimizer(lr=0.0)
    into = run.model.layers[0].in_features  # type: ignore[union-attr]
    out = run.model.layers[-1].out_features  # type: ignore[union-attr]
    dtype = next(run.model.parameters()).dtype
    for _ in range(updates):
        update(run, optimizer, noise(3, into, dtype=dtype), noise(3, out, seed=1, dtype=dtype))


def test_the_function_stays_through_hundreds_of_exchanges() -> None:
    model = chain(10, 14, 10)
    x = noise(6, 10, seed=3)
    before = model(x).detach()
    run = rs.attach(model, method(rho=1.0), total_steps=303)
    start = {name: layer.base.weight.detach().clone() for name, layer in layers_of(run).items()}
    A = layers_of(run)["layers.0"].A.detach().clone()
    standing(run, 303)
    assert run.metrics()["exchanged"] > 1000, "every pool was gone through many times"
    assert (model(x) - before).abs().max() < 1e-12
    for name, layer in layers_of(run).items():
        assert (layer.base.weight - start[name]).abs().max() > 0.1, "W was rewritten"
    assert (layers_of(run)["layers.0"].A - A).abs().max() > 0.1


def test_in_fp32_the_weight_drifts_by_rounding_only() -> None:
    model = chain(48, 40, dtype=torch.float32)
    before = model.layers[0].weight.detach().clone()
    run = rs.attach(model, method(rank=12, rho=1.0), total_steps=200)
    standing(run, 200)
    (layer,) = layers_of(run).values()
    now = layer.base.weight + layer.delta()
    assert run.metrics()["exchanged"] > 800
    assert ((now - before).norm() / before.norm()).item() < 4e-6


def test_autocast_and_tf32_round_no_correction() -> None:
    """An update inside an autocast region, in a process that allows TF32 (10 bits, on GPUs)."""
    seen = []

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        seen.append((torch.backends.cuda.matmul.fp32_precision, torch.is_autocast_enabled("cpu")))
        return bmm(*args, **kwargs)

    bmm, precision = torch.bmm, torch.get_float32_matmul_precision()
    run = rs.attach(chain(48, 40, dtype=torch.float32), method(rank=12, rho=1.0), total_steps=200)
    before = (lambda layer: (layer.base.weight + layer.delta()).detach())(layers_of(run)["layers.0"])
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(torch, "bmm", watched)
        try:
            torch.set_float32_matmul_precision("high")
            standing(run, 20)
            assert torch.get_float32_matmul_precision() == "high"
        finally:
            torch.set_float32_matmul_precision(precision)
    assert set(seen) == {("ieee", False)}
    (layer,) = layers_of(run).values()
    assert ((layer.base.weight + layer.delta() - before).norm() / before.norm()).item() < 2e-6


def test_every_candidate_comes_before_one_comes_again() -> None:
    run = rs.attach(chain(9, 11), method(rank=4, rho=1.0), total_steps=100)
    (layer,) = layers_of(run).values()
    fresh = layer.pool_A.clone(), layer.pool_B.clone()
    optimizer = run.optimizer(lr=0.0)
    came: tuple[list[int], list[int]] = ([], [])
    for _ in range(40):
        A, B = layer.A.detach().clone(), layer.B.detach().clone()
        count = int(layer.clock[0])
        update(run, optimizer, noise(3, 9), noise(3, 11, seed=1))
        moved = [(i + count) % 4 for i in range(int(layer.clock[0]) - count)]
        for found, pool, vectors, old, rows in (
            (came[0], fresh[0], layer.A.detach(), A, moved),
            (came[1], fresh[1], layer.B.detach().T, B.T, [(i + 2) % 4 for i in moved]),
        ):
            assert sorted((vectors != old).any(1).nonzero().flatten().tolist()) == sorted(rows)
            found += [int((pool == vectors[i]).all(1).nonzero()) for i in rows]
    for found in came:
        assert len(found) > 27
        assert found == [i % 9 for i in range(len(found))], "in order, round after round"


def test_a_trained_vector_goes_back_to_its_place_and_comes_again() -> None:
    run = rs.attach(chain(9, 11), method(rank=4, rho=1.0), total_steps=100)
    (layer,) = layers_of(run).values()
    mark_A, mark_B = noise(9, seed=5), noise(11, seed=6)
    with torch.no_grad():
        layer.A[0], layer.B[:, 2] = mark_A, mark_B  # the next to go, trained to something else
    optimizer = run.optimizer(lr=0.0)
    seen = []
    while int(layer.clock[0]) < 20:
        update(run, optimizer, noise(3, 9), noise(3, 11, seed=1))
        there = (layer.A - mark_A == 0).all(1).any() and (layer.B.T - mark_B == 0).all(1).any()
        back = (layer.pool_A[5] == mark_A).all() and (layer.pool_B[5] == mark_B).all()
        seen.append((int(layer.clock[0]), bool(there), bool(back)))
    assert not seen[0][1] or seen[0][0] == 0
    for count, there, back in seen:
        assert back is (count > 0)
        out = (
            6 <= count <= 9 or 15 <= count <= 18
        )  # it is candidate 5, taken by exchange 5 and given back by exchange 9
        assert there is (out or count == 0)


@dataclass
class Snapshot:
    """A layer and its optimizer state at one moment, vectors of A and B as rows."""

    vectors: dict[str, Tensor]
    state: dict[str, dict[str, Tensor]]

    @classmethod
    def of(cls, layer: SwitchLayer, optimizer: torch.optim.Optimizer) -> Snapshot:
        factors = {"A": layer.A, "B": layer.B}
        turn = {"A": lambda t: t.detach().clone(), "B": lambda t: t.detach().clone().T}
        state = {f: {k: turn[f](v) for k, v in optimizer.state.get(p, {}).items()} for f, p in factors.items()}
        return cls({f: turn[f](p) for f, p in factors.items()}, state)


def test_the_counterpart_forgets_and_stands_still_for_n_updates() -> None:
    run = rs.attach(chain(10, 12), method(rank=6, interval=8, freeze=3, rho=1.0), total_steps=200)
    optimizer = run.optimizer(lr=1e-2)
    (layer,) = layers_of(run).values()
    seen: list[Snapshot] = []
    # registered after the run's own: between the events and the update
    optimizer.register_step_pre_hook(lambda *args: seen.append(Snapshot.of(layer, optimizer)))
    x, target = noise(16, 10, seed=1), noise(16, 12, seed=2)
    until = {"A": [0] * 6, "B": [0] * 6}  # the update from which on each vector moves again
    for step in range(40):
        count, before = int(layer.clock[0]), Snapshot.of(layer, optimizer)
        update(run, optimizer, x, target)
        between, after = seen[-1], Snapshot.of(layer, optimizer)
        rows = [i % 6 for i in range(count, int(layer.clock[0]))]
        columns = [(i + 3) % 6 for i in rows]
        for leaf, out, reset in (("A", rows, columns), ("B", columns, rows)):
            for i in range(6):
                if i in reset:
                    until[leaf][i] = step + 3
                exchanged = not torch.equal(between.vectors[leaf][i], before.vectors[leaf][i])
                assert exchanged is (i in out)
                for key, had in before.state[leaf].items():
                    got = between.state[leaf][key][i]
                    assert not got.any() if i in reset else torch.equal(got, had[i]), f"{key} of {leaf} {i}"
                moved = not torch.equal(after.vectors[leaf][i], between.vectors[leaf][i])
                assert moved is (step >= until[leaf][i]), f"{leaf} {i} in update {step}"
    assert int(layer.clock[0]) > 15


def test_a_thawed_vector_starts_softly() -> None:
    """Constant gradients: the step count runs on through the freeze, so first steps are shorter than lr, not longer."""
    p = nn.Parameter(torch.zeros(2, 3, dtype=F64))
    optimizer = Optimizer([{"params": [p]}], [Vectors(0)], lr=1.0, eps=1e-12)
    lengths = []
    for t in range(10):
        p.grad = torch.ones_like(p)
        p.grad[0] *= t >= 5
        before = p.detach().clone()
        optimizer.step()
        lengths.append((before - p.detach())[:, 0].tolist())
    assert [a for a, _ in lengths[:5]] == [0.0] * 5
    assert [a for a, _ in lengths[5:]] == pytest.approx([0.52, 0.68, 0.78, 0.84, 0.89], abs=6e-3)
    assert [b for _, b in lengths] == pytest.approx([1.0] * 10)


def test_as_many_exchanges_as_the_rate_says_and_none_in_the_end() -> None:
    """Σ q(t) = (r/interval)·ratio·T/ln(1/ρ), each update's number within one of q."""
    T, r, interval, ratio, rho = 2000, 24, 48.0, 0.08, 0.3
    run = rs.attach(chain(26, 28), method(rank=r, interval=interval, ratio=ratio, rho=rho, freeze=4), total_steps=T)
    (layer,) = layers_of(run).values()
    (event,) = run.method.events()
    counts, q = [], []
    for t in range(T):
        moves = event.moves([layer], Tick(t, T, 5, None))  # type: ignore[attr-defined]
        counts.append(sum(moves.count.tolist()))
        for clock in torch.from_numpy(moves.clock):
            layer.clock.copy_(clock)
        q.append(r / interval * rho ** ((t + 1) / (ratio * T)))
    assert sum(q) == pytest.approx(r / interval * ratio * T / math.log(1 / rho), rel=0.01)
    deviation = math.sqrt(sum((x % 1) * (1 - x % 1) for x in q))
    assert abs(sum(counts) - sum(q)) < 4 * deviation
    assert all(c in (math.floor(x), math.floor(x) + 1) for c, x in zip(counts, q, strict=True))
    assert not any(counts[T // 2 :]), "rate below 1e-3 of the first"
    late, early = Tick(1060, 2000, 5, None, began=1000), Tick(60, 1000, 5, None)
    assert event.rate(late) == event.rate(early) > 0, "in a later phase time and length are those of the phase"  # type: ignore[attr-defined]


def test_pointers_never_meet() -> None:
    """At the largest rate that is let through: what is frozen lies between the pointers, never on what is exchanged."""
    run = rs.attach(chain(20, 20), method(rank=7, interval=2, freeze=1, rho=1.0), total_steps=100)
    tight = rs.attach(chain(8, 8), method(rank=7, interval=2, freeze=1, rho=1.0), total_steps=100)  # one in the pool
    longer = rs.attach(chain(20, 20), method(rank=5, interval=4, freeze=2, rho=1.0), total_steps=100)
    for each in (run, tight, longer):
        (layer,) = layers_of(each).values()
        x, target = noise(4, layer.in_features), noise(4, layer.out_features, seed=1)
        optimizer, history = each.optimizer(lr=0.0), []
        before = (layer.base.weight + layer.delta()).detach()
        for _ in range(100):
            count = int(layer.clock[0])
            update(each, optimizer, x, target)
            history.append(int(layer.clock[0]) - count)
        N, r = each.method.freeze, layer.rank  # type: ignore[attr-defined]
        windows = [sum(history[max(0, t - N + 1) : t + 1]) for t in range(100)]
        assert max(windows) <= r // 2, "half of the ring, rounded down"
        assert max(history) <= len(layer.pool_A) - r
        assert sum(history) >= 90
        torch.testing.assert_close((layer.base.weight + layer.delta()).detach(), before, rtol=0, atol=1e-12)


# ---- what it learns --------------------------------------------------------------------------------------------------


def residual(method: rs.SwitchLoRA, steps: int = 600, lr: float = 0.1) -> tuple[float, int]:
    """A linear teacher whose change from the start has full rank: the share of it that is left, and the rank of the
    change that was learned."""
    d = 64
    model = chain(d, d)
    start = model.layers[0].weight.detach().clone()
    change = noise(d, d, seed=1) / d**0.5
    run = rs.attach(model, method, total_steps=steps)
    optimizer = run.optimizer(lr=lr)
    generator = torch.Generator().manual_seed(2)
    for t in range(steps):
        x = torch.randn(d, d, generator=generator, dtype=F64)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - t / steps)
        update(run, optimizer, x, x @ (start + change).T)
    learned = run.merge().layers[0].weight.detach() - start  # type: ignore[union-attr, operator]
    return float((learned - change).square().sum() / change.square().sum()), int(torch.linalg.matrix_rank(learned))


def test_exchanges_reach_what_the_rank_alone_cannot() -> None:
    """Eckart and Young: a change of rank 2r = 8 leaves at least 62 % of a teacher of full rank."""
    left, rank = residual(method(ratio=1.0))
    assert left < 0.05
    assert rank == 64
    left, rank = residual(method(interval=math.inf), steps=300)
    assert left > 0.62
    assert rank <= 8, "A and B both start at something, so the change has rank 2r"


def test_without_the_correction_of_w_nothing_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankshift.methods.switchlora.add_products_", lambda *args: None)
    left, _ = residual(method(ratio=1.0), steps=300)
    assert left > 0.8


# ---- state -----------------------------------------------------------------------------------------------------------


def test_w_has_no_gradient_and_no_state_and_the_rest_trains_at_its_own_rate() -> None:
    run = rs.attach(chain(9, 12, 7, bias=True), method(rest_lr_ratio=0.1), total_steps=10)
    optimizer = run.optimizer(lr=1e-2)
    update(run, optimizer, noise(4, 9), noise(4, 7))
    for layer in layers_of(run).values():
        assert not layer.base.weight.requires_grad
        assert layer.base.weight.grad is None
        assert layer.base.weight not in optimizer.state
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    assert rates == {
        **{f"layers.{i}.{leaf}": 1e-2 for i in (0, 1) for leaf in "AB"},
        **{f"layers.{i}.bias": pytest.approx(1e-3) for i in (0, 1)},
    }
    frozen = rs.attach(chain(9, 12, 7, bias=True), method(rest="freeze"), total_steps=10)
    assert {name.rpartition(".")[2] for name, _ in frozen.trainable()} == {"A", "B"}


@pytest.mark.parametrize(
    ("d", "h", "layers", "r", "share"), [(768, 2048, 12, 192, 0.618), (1024, 2736, 24, 128, 0.341)]
)
def test_what_ranks_send_and_what_the_cpu_holds(d: int, h: int, layers: int, r: int, share: float) -> None:
    """Of LLaMA with 130M and 350M parameters and a vocabulary of 32,100: the numbers are the card's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32100, hidden_size=d, intermediate_size=h, num_hidden_layers=layers, num_attention_heads=d // 64
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    summary = rs.attach(model, rs.SwitchLoRA(rank=r), total_steps=100).summary()
    P, L = layers * (4 * d * d + 3 * d * h), layers * r * (4 * 2 * d + 3 * (d + h))
    E = 2 * 32100 * d + (2 * layers + 1) * d
    assert summary.reduced(8) == (2 * 7 * 4 * (L + E) // 8, 2 * 7 * 4 * (P + E) // 8)
    assert summary.reduced(1) == (0, 0)
    assert abs((L + E) / (P + E) - share) < 1e-3
    assert summary.bytes_aside == layers * (4 * 4 * 2 * d * d + 3 * 4 * d * (d + h) + 7 * 5 * 8)
    text = str(summary)
    assert f"2(N−1)/N · {4 * (L + E) / 2**20:.1f} MiB" in text
    assert f"{100 * (1 - (L + E) / (P + E)):.1f} % below full training" in text
    assert "on the CPU of each rank" in text
    assert summary.bytes_optimizer == 2 * 4 * (L + E) + layers * 7 * 2 * 4 * r, "a step count for each vector"


def test_what_was_frozen_before_stays_frozen() -> None:
    model = chain(9, 12, 7, bias=True)
    model.layers[0].bias.requires_grad_(False)
    run = rs.attach(model, method(), total_steps=10)
    assert [name for name, _ in run.trainable() if name.endswith("bias")] == ["layers.1.bias"]


def test_candidates_stay_on_the_cpu_and_are_nobodys_parameters() -> None:
    run = rs.attach(chain(9, 12), method(), total_steps=10)
    (layer,) = layers_of(run).values()
    names = [name for name, _ in run.model.named_parameters()] + list(run.model.state_dict())
    assert not any("pool" in name or "clock" in name for name in names)
    assert {n.rpartition(".")[2] for n in run.state_dict()["tensors"]} >= {"pool_A", "pool_B", "clock"}
    other = copy.deepcopy(run.model)
    pool = other.layers[0].adapters["default"].pool_A  # type: ignore[index, union-attr]
    assert torch.equal(pool, layer.pool_A)
    assert pool.data_ptr() != layer.pool_A.data_ptr(), "a copy of a model trains by itself"
    run.model.to("meta")
    assert {t.device.type for t in layer.aside().values()} == {"cpu"}
    assert layer.A.device.type == "meta"


def test_resumed_in_the_middle_of_a_round_it_goes_on_bit_for_bit() -> None:
    x, target = noise(8, 9, dtype=torch.float32), noise(8, 11, seed=1, dtype=torch.float32)

    def fresh() -> Chain:
        return chain(9, 10, 11, dtype=torch.float32)

    def state(run: rs.Run) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in run.state_dict()["tensors"].items()}

    straight = rs.attach(fresh(), method(rho=1.0), total_steps=24)
    optimizer = straight.optimizer(lr=1e-2)
    saved = []
    for _ in range(24):
        saved.append((copy.deepcopy(straight.state_dict()), copy.deepcopy(optimizer.state_dict())))
        update(straight, optimizer, x, target)
    for k in (1, 2, 7, 23):
        run = rs.restore(fresh(), saved[k][0])
        again = run.optimizer(lr=1e-2)
        again.load_state_dict(saved[k][1])
        for _ in range(24 - k):
            update(run, again, x, target)
        for name, tensor in state(straight).items():
            assert torch.equal(tensor, state(run)[name]), f"{name}, resumed at {k}"


def test_another_rate_is_taken_over_and_another_freeze_is_not() -> None:
    run = rs.attach(chain(9, 12), method(), total_steps=10)
    saved = copy.deepcopy(run.state_dict())
    other = rs.attach(chain(9, 12), method(interval=8, rho=0.5), total_steps=10)
    other.load_state_dict(saved)
    with pytest.raises(rs.errors.WrongBase, match="freeze cannot change"):
        rs.attach(chain(9, 12), method(freeze=1), total_steps=10).load_state_dict(saved)


def test_merged_it_is_a_plain_model() -> None:
    model = chain(9, 12, 7)
    run = rs.attach(model, method(), total_steps=10)
    optimizer = run.optimizer(lr=1e-2)
    for _ in range(5):
        update(run, optimizer, noise(4, 9), noise(4, 7))
    want = model(noise(4, 9)).detach()
    plain = run.merge()
    assert all(type(layer) is nn.Linear for layer in plain.layers)  # type: ignore[union-attr]
    torch.testing.assert_close(plain(noise(4, 9)), want, rtol=0, atol=1e-13)


def test_a_skipped_update_exchanges_nothing() -> None:
    run = rs.attach(chain(9, 12), method(rho=1.0), total_steps=50)
    optimizer = run.optimizer(lr=1e-2)
    for _ in range(3):
        update(run, optimizer, noise(4, 9), noise(4, 12))

    def state() -> dict[str, Tensor]:
        found = {name: tensor.clone() for name, tensor in run.state_dict()["tensors"].items()}
        for i, values in enumerate(optimizer.state.values()):
            found |= {f"{i}.{key}": value.clone() for key, value in values.items()}
        return found

    before = state()
    update(run, optimizer, noise(4, 9) * math.nan, noise(4, 12))
    after = state()
    assert run.skipped == 1
    assert all(torch.equal(before[name], after[name]) for name in before)
    update(run, optimizer, noise(4, 9), noise(4, 12))
    assert not torch.equal(before["default/layers.0.pool_A"], state()["default/layers.0.pool_A"])


def test_a_few_layers_at_a_time_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> dict[str, Tensor]:
        run = rs.attach(chain(8, 8, 8, 8), method(rho=1.0), total_steps=50)
        optimizer = run.optimizer(lr=1e-2)
        for _ in range(12):
            update(run, optimizer, noise(4, 8), noise(4, 8, seed=1))
        return run.state_dict()["tensors"]

    want = trained()
    monkeypatch.setattr("rankshift.methods.switchlora._TOGETHER", 130)
    got = trained()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-12)


def test_what_is_multiplied_together_has_one_shape_and_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a factor that is only expanded costs a launch a tensor: five hundred in an update of a small Llama."""
    run = rs.attach(chain(9, 12, 7, dtype=torch.float32), method(rho=1.0), total_steps=50)
    optimizer = run.optimizer(lr=1e-2)
    for _ in range(3):
        update(run, optimizer, noise(4, 9, dtype=torch.float32), noise(4, 7, dtype=torch.float32))
    seen = []
    multiply = torch._foreach_mul_

    def watched(tensors: list[Tensor], factors: Any) -> None:
        if isinstance(factors, list):
            seen.extend((t.shape, t.stride(), f.shape, f.stride()) for t, f in zip(tensors, factors, strict=True))
        multiply(tensors, factors)

    monkeypatch.setattr(torch, "_foreach_mul_", watched)
    update(run, optimizer, noise(4, 9, dtype=torch.float32), noise(4, 7, dtype=torch.float32))
    assert len(seen) > 8
    assert all((shape, stride) == (other, order) for shape, stride, other, order in seen), seen


def test_a_layer_without_a_gradient_does_not_stop_the_others() -> None:
    """A layer that a batch does not reach has no gradient: its vectors are exchanged all the same."""
    model = chain(8, 8, 8)
    run = rs.attach(model, method(rho=1.0), total_steps=50)
    optimizer = run.optimizer(lr=1e-2, check_gradients=False)
    first, second = layers_of(run).values()
    model.forward = model.layers[0].forward  # type: ignore[method-assign]
    for _ in range(12):
        update(run, optimizer, noise(4, 8), noise(4, 8, seed=1))
    assert int(first.clock[0]) > 3
    assert int(second.clock[0]) > 3
    ages = optimizer.state[first.A]["step"].flatten()
    assert ages.min() < ages.max(), "single vectors began anew"


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"rank": 1}, "at least 2"),
        ({"alpha": 0.0}, "alpha"),
        ({"ratio": 0.0}, "ratio"),
        ({"rest_lr_ratio": -1.0}, "rest_lr_ratio"),
        ({"rho": 0.0}, "rho"),
        ({"rho": 1.5}, "rho"),
        ({"freeze": 0}, "freeze"),
        ({"freeze": -1}, "freeze"),
        ({"freeze": 21}, "at least 42"),
        ({"interval": 9.9}, "at least 10"),
        ({"interval": math.nan}, "interval"),
        ({"modules_to_save": ("head",)}, "modules_to_save"),
        ({"intervall": 5}, "interval"),
    ],
)
def test_settings_that_cannot_be_meant(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        rs.SwitchLoRA(**fields)


def test_the_length_of_the_run_is_not_guessed() -> None:
    run = rs.attach(chain(9, 12), method())
    with pytest.raises(ConfigError, match="total_steps"):
        run.optimizer(lr=1e-2)
    run.total_steps = 10
    run.optimizer(lr=1e-2)
    rs.attach(chain(9, 12), method(interval=math.inf)).optimizer(lr=1e-2)
    late = rs.attach(chain(9, 12), rs.LoRA(rank=2, targets=("layers.*",)), total_steps=1)
    optimizer = late.optimizer(lr=1e-2)
    update(late, optimizer, noise(4, 9), noise(4, 12))
    with pytest.raises(ConfigError, match="begins at update 1 of 1"):
        late.shift(method()).optimizer(lr=1e-2)


@pytest.mark.parametrize(
    ("layer", "error", "match"),
    [
        (nn.Linear(4, 8), RankTooLarge, "below min"),
        (nn.Linear(8, 8).bfloat16(), UnsupportedLayer, "fp32"),
        (nn.Linear(8, 8).half(), UnsupportedLayer, "fp32"),
        (nn.Embedding(8, 8), UnsupportedLayer, "Embedding"),
    ],
)
def test_layers_that_are_refused_stay_as_they_were(layer: nn.Module, error: type[Exception], match: str) -> None:
    model = nn.ModuleDict({"layer": layer})
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(error, match=match):
        rs.attach(model, rs.SwitchLoRA(rank=4, targets=("layer",)), total_steps=5)
    assert model["layer"] is layer
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_model_made_narrow_after_it_was_attached_gets_no_optimizer() -> None:
    run = rs.attach(chain(9, 12), method(), total_steps=5)
    run.model.bfloat16()
    with pytest.raises(ConfigError, match="bfloat16"):
        run.optimizer(lr=1e-2)


def test_candidates_that_do_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = 8 * (9 * 21 + 7 * 19)
    assert switchlora_pool.available() > 1 << 20
    monkeypatch.setattr(switchlora_pool, "available", lambda: wanted)
    rs.attach(chain(9, 12, 7), method(), total_steps=5)
    monkeypatch.setattr(switchlora_pool, "available", lambda: wanted - 1)
    model = chain(9, 12, 7)
    weight = model.layers[0].weight
    with pytest.raises(ConfigError, match="GiB are free"):
        rs.attach(model, method(), total_steps=5)
    assert model.layers[0].weight is weight
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(switchlora_pool, "available", lambda: 2 * wanted - 1)
    with pytest.raises(ConfigError, match="2 processes"):
        rs.attach(model, method(), total_steps=5)


def test_what_it_cannot_stand_beside_or_ride() -> None:
    run = rs.attach(chain(9, 12), method(rest="freeze"), total_steps=5)
    with pytest.raises(AttachError, match="rewrites the base"):
        run.add("second", rs.LoRA(rank=2, targets=("layers.*",)))
    with pytest.raises(AttachError, match="trains the base itself"), run.disabled():
        pass
    with pytest.raises((ConfigError, TrainingError), match=r"run\.optimizer\(\)"):
        run.carry(torch.optim.AdamW([p for _, p in run.trainable()]))
    with pytest.raises(ConfigError, match="fused_backward"):
        run.optimizer(lr=1e-2, fused_backward=True)


def test_a_storage_that_rounds_anew_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankshift.core.base.Dense.exact", False)
    model = chain(9, 12)
    layer = model.layers[0]
    with pytest.raises(UnsupportedLayer, match="drift"):
        rs.attach(model, method(), total_steps=5)
    assert model.layers[0] is layer
