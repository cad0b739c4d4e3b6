"""ReLoRA: the function stays, the rank grows, Adam forgets as a whole, the rate warms up; and what a fake would do."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import rankshift as rs
from rankshift.core.base import Dense
from rankshift.core.errors import AttachError, ConfigError, ExportError, RankTooLarge, UnsupportedLayer
from rankshift.core.event import Tick
from rankshift.core.random import Key
from rankshift.core.schedule import jagged_cosine
from rankshift.methods.relora import ReLoRALayer, forget_, merge_, renew_

D = torch.float64


def mlp(dtype: torch.dtype = D) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 14), nn.Tanh(), nn.Linear(14, 7, bias=False)).to(dtype)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


class Loop:
    """A plain loop with the method's schedule: a batch of its own for every update."""

    def __init__(self, method: rs.ReLoRA, total: int = 12, warmup: int = 2, lr: float = 1e-2, model: Any = None):
        self.model = mlp() if model is None else model
        self.run = rs.attach(self.model, method, total_steps=total)
        self.begin(lr, warmup)

    def begin(self, lr: float = 1e-2, warmup: int = 2) -> None:
        self.optimizer = self.run.optimizer(lr=lr)
        self.schedule = self.run.scheduler(self.optimizer, warmup)

    def backward(self, scale: float = 1.0) -> None:
        u = self.run.step
        dtype = self.model[0].weight.dtype
        loss = (self.model(noise(8, 9, seed=u).to(dtype)) - noise(8, 7, seed=100 + u).to(dtype)).square().mean()
        (loss * scale).backward()

    def step(self, scale: float = 1.0) -> None:
        self.backward(scale)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def steps(self, n: int) -> Loop:
        for _ in range(n):
            self.step()
        return self

    @property
    def rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def layers(self) -> dict[str, Any]:
        return self.run.adapter()

    def weights(self) -> dict[str, Tensor]:
        return {name: site.base.rows() for name, site in self.run.sites.items()}


METHOD = rs.ReLoRA(rank=2, alpha=7, every=4, rewarm=2)  # s = 3.5
REGARDED = pytest.mark.parametrize("reset", ["all", "magnitude", "random"])


# ---- the restart


def test_a_restart_preserves_the_function_and_merges_with_s():
    """Update 4 is taken at rate 0, so the function before it is the one after it; the oracle is W + s·B A."""
    loop = Loop(METHOD).steps(4)
    assert loop.rate == 0
    before = {name: (a.A.detach().clone(), a.B.detach().clone()) for name, a in loop.layers().items()}
    W, y = loop.weights(), loop.model(noise(5, 9)).detach()
    loop.step()
    assert (loop.model(noise(5, 9)) - y).abs().max() <= 1e-12
    for name, (A, B) in before.items():
        layer = loop.layers()[name]
        change = loop.weights()[name] - W[name]
        assert change.abs().max() > 1e-3
        torch.testing.assert_close(change, 3.5 * B @ A, rtol=0, atol=1e-14)
        assert not layer.B.any()
        assert (layer.A != A).all()
        assert layer.A.abs().max() <= 1 / math.sqrt(layer.in_features)
        assert loop.run.sites[name].base.changed
        for parameter in (layer.A, layer.B):
            assert not any(tensor.any() for tensor in loop.optimizer.state[parameter].values())


def test_every_layer_and_every_restart_draws_its_own():
    """Layers of one shape too; and what A forgets at random is not what B does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 7)).to(D)
    method = rs.ReLoRA(rank=3, every=3, rewarm=0, reset="random", ratio=0.5, targets=("0", "2", "3"))
    loop, drawn, masks = Loop(method, model=model), [], []
    for updates in (4, 3):
        loop.steps(updates)
        drawn += [layer.A.detach().clone() for layer in loop.layers().values()]
        for leaf in "AB":
            masks += [(state["exp_avg"] == 0).flatten() for state in moments(loop, leaf)]
    assert {0.2 < mask.double().mean().item() < 0.8 for mask in masks} == {True}
    for found in (drawn, masks):
        pairs = [(i, j) for i in range(len(found)) for j in range(i)]
        assert not any(torch.equal(found[i], found[j]) for i, j in pairs)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_merge_rounds_once_whatever_the_loop_computes_in(autocast: bool):
    """fp32 weights are those of W + s·B A in float64, to the bit, also where the step is taken under autocast."""
    loop = Loop(METHOD, model=mlp(torch.float32))
    loop.steps(4)
    before = {name: (a.A.detach().double(), a.B.detach().double()) for name, a in loop.layers().items()}
    W = {name: rows.double() for name, rows in loop.weights().items()}
    loop.backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loop.optimizer.step()
    for name, (A, B) in before.items():
        assert loop.weights()[name].dtype == torch.float32
        assert torch.equal(loop.weights()[name], (W[name] + 3.5 * (B @ A)).float())


def test_a_is_drawn_uniform_and_anew_at_every_restart_and_layer():
    """Standard deviation 1/√(3·in), over 64,000 numbers: ± 0.5 % is more than three of its own deviations."""
    model = nn.ModuleDict({"a": nn.Linear(500, 128), "b": nn.Linear(500, 128)})
    run = rs.attach(model, rs.ReLoRA())
    layers = run.adapter()
    first = layers["a"].A.detach().clone()
    renew_(layers["a"], Key(3) / "a" / 1000)
    for A in (first, layers["a"].A.detach()):
        assert A.std().item() == pytest.approx(1 / math.sqrt(3 * 500), rel=0.005)
        assert A.abs().max() <= 1 / math.sqrt(500)
    assert not torch.equal(layers["a"].A, layers["b"].A)
    loop = Loop(METHOD, total=20)
    seen = []
    for u in range(14):
        loop.step()
        if u in (0, 4, 8, 12):
            seen += [layer.A.detach().clone()[0, :5] for layer in loop.layers().values()]
    distances = torch.cdist(torch.stack(seen), torch.stack(seen)) + torch.eye(len(seen))
    assert (distances > 1e-3).all(), "two draws are the same"


def test_restarts_come_after_updates_k_2k_and_no_other():
    """⌊(T − 1)/K⌋ of them, each on the update whose rate is 0."""
    for total, every in ((12, 4), (13, 4), (9, 3), (6, 1), (5, 7)):
        loop = Loop(rs.ReLoRA(rank=1, every=every, rewarm=0 if every < 2 else 1), total=total, warmup=0)
        found = []
        for u in range(total):
            before, rate = loop.weights()["0"], loop.rate
            loop.step()
            if not torch.equal(before, loop.weights()["0"]):
                found.append(u)
                assert rate == 0 or every == 1
        assert found == list(range(every, total, every))
        assert len(found) == (total - 1) // every
        assert loop.run.metrics() == {"restarts": len(found)}


def test_every_cycle_learns_from_its_first_step():
    """∂B is not 0 with the first batch of a cycle, the first one too, and B not 0 after its first step with a rate."""
    loop = Loop(METHOD, total=12, warmup=0)
    for u in range(12):
        loop.backward()
        for layer in loop.layers().values():
            assert layer.B.grad.any(), u
        rate = loop.rate
        loop.optimizer.step()
        loop.schedule.step()
        loop.optimizer.zero_grad()
        restarted = u in (4, 8)
        assert (rate == 0) == restarted
        for layer in loop.layers().values():
            assert layer.B.any() != restarted


def test_a_skipped_update_is_no_restart_and_moves_no_schedule():
    clean, loop = Loop(METHOD).steps(8), Loop(METHOD)
    while loop.run.step < 8:
        if loop.run.step in (3, 4):  # before the restart, and in its place
            rate, W = loop.rate, loop.weights()["0"]
            loop.step(float("nan"))
            assert loop.rate == rate
            assert torch.equal(loop.weights()["0"], W)
        loop.step()
    assert loop.run.skipped == 2
    assert loop.run.metrics() == {"restarts": 1}
    for name, W in clean.weights().items():
        assert torch.equal(loop.weights()[name], W)
        assert torch.equal(loop.layers()[name].B, clean.layers()[name].B)
    assert loop.rate == clean.rate


def test_accumulation_counts_updates():
    loop = Loop(METHOD)
    for _ in range(5):
        loop.backward(0.5)
        loop.backward(0.5)
        loop.optimizer.step()
        loop.schedule.step()
        loop.optimizer.zero_grad()
    once = Loop(METHOD).steps(5)
    for name, W in once.weights().items():
        torch.testing.assert_close(loop.weights()[name], W, rtol=0, atol=1e-12)


def test_a_later_phase_counts_from_its_own_beginning():
    """The first phase trains all weights; cycles, restarts and schedule of the second begin at update 5."""
    model = mlp()
    run = rs.attach(model, rs.Full(), total_steps=17)
    loop = Loop.__new__(Loop)
    loop.model, loop.run = model, run
    loop.begin()
    loop.steps(5)
    y = model(noise(5, 9)).detach()
    loop.run = loop.run.shift(METHOD)
    assert (model(noise(5, 9)) - y).abs().max() <= 1e-12
    loop.begin(warmup=2)
    rates, found = [], []
    for u in range(12):
        before = loop.weights()["0"]
        rates.append(loop.rate)
        loop.step()
        if not torch.equal(before, loop.weights()["0"]):
            found.append(u)
    assert found == [4, 8]
    assert rates == pytest.approx([1e-2 * jagged_cosine(u, 12, 2, 4, 2, 0.1) for u in range(12)])


# ---- what Adam forgets


def moments(loop: Loop, leaf: str = "A") -> list[dict[str, Tensor]]:
    return [loop.optimizer.state[layer.get_parameter(leaf)] for layer in loop.layers().values()]


@pytest.mark.parametrize(
    ("reset", "ratio"), [("magnitude", 0.9), ("magnitude", 0.37), ("random", 0.999), ("random", 0.3)]
)
def test_one_mask_takes_the_share_of_both_moments(reset: str, ratio: float):
    """The share of zeros is the ratio, in m and in v, at the same elements; what is kept is kept as it was."""
    m, v = noise(160, 250, seed=3), noise(160, 250, seed=4).square()
    state = {"step": torch.tensor(30.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    kept = dict(state)
    forget_(state, reset, ratio, Key(0) / "mask")
    assert all(state[name] is kept[name] for name in kept), "in place"
    dropped = state["exp_avg"] == 0
    share = dropped.double().mean().item()
    # the expectation is exact by magnitude; at random it has a deviation of √(p (1 − p)/40,000), and p a grain of 2⁻¹⁷
    assert abs(share - ratio) <= (1e-9 if reset == "magnitude" else 4 * math.sqrt(ratio * (1 - ratio) / 40_000))
    assert torch.equal(dropped, state["exp_avg_sq"] == 0)
    assert torch.equal(state["exp_avg"][~dropped], m[~dropped])
    assert torch.equal(state["exp_avg_sq"][~dropped], v[~dropped])
    assert state["step"] == 30
    if reset == "magnitude":
        assert m[dropped].abs().max() < m[~dropped].abs().min()
    else:
        again = {"step": torch.tensor(30.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
        forget_(again, reset, ratio, Key(0) / "other")
        assert not torch.equal(again["exp_avg"], state["exp_avg"])


def test_the_threshold_is_not_by_quantile(monkeypatch: pytest.MonkeyPatch):
    """Which refuses more than 16 million elements."""
    for owner in (torch, Tensor):
        for name in ("quantile", "nanquantile"):
            monkeypatch.setattr(owner, name, None)
    m = torch.arange(-5.0, 6.0)
    forget_({"exp_avg": m}, "magnitude", 9 / 11, Key(0))
    assert m.nonzero().flatten().tolist() == [0, 10]


@REGARDED
def test_the_state_of_what_is_no_factor_stays(reset: str):
    """Of a bias, a norm or a head, bit for bit as in an update without a restart."""
    model = nn.Sequential(nn.Linear(9, 14), nn.LayerNorm(14), nn.Linear(14, 7)).to(D)
    loop = Loop(rs.ReLoRA(rank=2, every=4, rewarm=2, reset=reset, targets="0"), model=model).steps(4)
    other = copy.deepcopy(loop.optimizer.state_dict()["state"])
    factors = {id(p) for layer in loop.layers().values() for p in layer.parameters()}
    loop.backward()
    gradients = [p.grad.clone() for group in loop.optimizer.param_groups for p in group["params"]]
    loop.optimizer.step()
    parameters = [p for group in loop.optimizer.param_groups for p in group["params"]]
    assert len(parameters) == 7
    seen = 0
    for index, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
        if id(p) in factors:
            continue
        seen += 1
        m, v, now = other[index]["exp_avg"], other[index]["exp_avg_sq"], loop.optimizer.state[p]
        assert torch.equal(now["exp_avg"], torch.lerp(m, g, 1 - 0.9)), "β1 m + (1 − β1) g"
        assert torch.equal(now["exp_avg_sq"], (v * 0.999).addcmul(g, g, value=1 - 0.999))
        assert now["step"] == 5
    assert seen == 5


@REGARDED
def test_the_first_steps_of_a_cycle_are_of_the_size_that_is_said(reset: str):
    """|Δ| ≤ 1.1·lr·f where Adam forgot all; 7.3·lr·f, Adam's own bound, where by one mask. By two it is hundreds."""
    loop = Loop(rs.ReLoRA(rank=2, alpha=7, every=30, rewarm=10, reset=reset, ratio=0.9), total=90, lr=1e-3).steps(31)
    limit = 1.1 if reset == "all" else (1 - 0.9) / math.sqrt((1 - 0.999) * (1 - 0.9**2 / 0.999))
    largest = 0.0
    for u in range(31, 40):
        before = {p: p.detach().clone() for layer in loop.layers().values() for p in layer.parameters()}
        f = loop.rate / 1e-3
        loop.step()
        for p, old in before.items():
            largest = max(largest, (p.detach() - old).abs().max().item() / (1e-3 * f)) if f else largest
            if u == 31:
                assert (p.detach() - old).abs().max() <= limit * 1e-3 * f
        assert f == pytest.approx(jagged_cosine(u, 90, 2, 30, 10, 0.1))
    assert largest <= 1.5 * limit


def test_a_state_that_is_not_there_yet_is_nothing_to_forget():
    for reset in ("all", "magnitude", "random"):
        forget_({}, reset, 0.9, Key(0))


# ---- what the paper promises


def residual(method: rs.ReLoRA, steps: int, lr: float, warmup: int = 25) -> tuple[Tensor, Tensor]:
    """A layer of 32 × 32 learns a matrix of full rank, without noise: (W, target)."""
    target = noise(32, 32, seed=7).float() / 6
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    nn.init.zeros_(model[0].weight)
    run = rs.attach(model, method, total_steps=steps)
    optimizer = run.optimizer(lr=lr)
    schedule = run.scheduler(optimizer, warmup)
    eye = torch.eye(32)
    for _ in range(steps):
        (0.5 * (model(eye) - target.t()).square().sum()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return run.merge()[0].weight.detach(), target


def left(W: Tensor, target: Tensor) -> float:
    """‖W − target‖² / ‖target‖²."""
    return ((W - target).square().sum() / target.square().sum()).item()


def test_lora_stays_at_the_bound_of_its_rank_and_relora_passes_it():
    """Eckart–Young: no matrix of rank 4 is nearer than what the other singular values are. With 19 restarts it is."""
    W, target = residual(rs.ReLoRA(rank=4, alpha=4, every=None, rest="freeze", targets="0"), 400, 3e-2)
    S = torch.linalg.svdvals(target)
    bound = (S[4:].square().sum() / S.square().sum()).item()
    assert 0.6 < bound < 0.7
    assert bound - 1e-6 <= left(W, target) < bound + 1e-3
    W, target = residual(rs.ReLoRA(rank=4, alpha=4, every=50, rest="freeze", targets="0"), 1000, 2e-2)
    assert left(W, target) <= 1e-5
    assert torch.linalg.matrix_rank(W, rtol=1e-3) == 32


def test_the_rank_grows_by_one_of_a_cycle_with_each_restart():
    for total, cycles in ((5, 1), (11, 2), (16, 3), (21, 4)):
        loop = Loop(rs.ReLoRA(rank=1, every=5, rewarm=1, rest="freeze", targets="0"), total=total, lr=0.1)
        W = loop.weights()["0"]
        loop.steps(total)
        moved = loop.run.merge()[0].weight.detach() - W
        assert torch.linalg.matrix_rank(moved, rtol=1e-9) == cycles


def losses(rewarm: int, steps: int = 450, every: int = 150) -> Tensor:
    """Of a regression with noise, at a large constant learning rate."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(16, 16, generator=generator) / 4
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    method = rs.ReLoRA(rank=4, alpha=16, every=every, rewarm=rewarm, floor=1.0, rest="freeze")
    run = rs.attach(model, method, total_steps=steps)
    optimizer = run.optimizer(lr=5e-2)
    schedule = run.scheduler(optimizer, warmup=20)
    seen = []
    for _ in range(steps):
        x = torch.randn(64, 16, generator=generator)
        loss = (model(x) - x @ target.t() - 0.1 * torch.randn(64, 16, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return torch.tensor(seen)


def test_without_the_warm_up_the_loss_jumps_at_a_restart():
    """The largest of 50 losses after it, in deviations of the 50 before: below 3 with the warm-up, above it without."""
    for rewarm in (50, 0):
        seen = losses(rewarm)
        for restart in (150, 300):
            before, after = seen[restart - 50 : restart], seen[restart : restart + 50]
            spike = ((after.max() - before.mean()) / before.std()).item()
            assert spike < 2.5 if rewarm else spike > (3.5 if restart == 150 else 10), (rewarm, restart, spike)


# ---- the schedule and resuming


def test_the_schedule_is_the_jagged_cosine_of_the_run():
    loop = Loop(rs.ReLoRA(rank=1, every=10, rewarm=3, floor=0.2), total=34, warmup=4)
    rates = []
    for _ in range(34):
        rates.append(loop.rate)
        loop.step()
    assert rates == pytest.approx([1e-2 * jagged_cosine(u, 34, 4, 10, 3, 0.2) for u in range(34)])
    assert [u for u, rate in enumerate(rates) if rate == 0] == [0, 10, 20, 30]


def test_the_control_has_the_schedule_and_no_restart():
    loop = Loop(rs.ReLoRA(rank=1, every=None, cycle=4, rewarm=2, floor=0.3), total=12)
    W, rates = loop.weights(), []
    for _ in range(12):
        rates.append(loop.rate)
        loop.step()
    assert rates == pytest.approx([1e-2 * jagged_cosine(u, 12, 2, 4, 2, 0.3) for u in range(12)])
    assert all(torch.equal(W[name], now) for name, now in loop.weights().items())
    plain = Loop(rs.ReLoRA(rank=1, every=None), total=12)
    assert [plain.run.method.period, plain.run.method.warming] == [None, 0]


def test_short_cycles_have_short_warm_ups():
    assert rs.ReLoRA().warming == rs.ReLoRA(every=200).warming == 100
    assert [rs.ReLoRA(every=k).warming for k in (1, 2, 3, 50)] == [0, 1, 1, 25]
    assert rs.ReLoRA(every=500, cycle=20).warming == 10
    assert rs.ReLoRA(every=500, rewarm=0).warming == 0


@pytest.mark.parametrize("k", [3, 4, 5, 9])
@REGARDED
def test_resuming_in_a_cycle_and_around_a_restart_is_exact(k: int, reset: str):
    """With the schedule's state or without: it goes by the run."""
    method = rs.ReLoRA(rank=2, alpha=7, every=4, rewarm=2, reset=reset, ratio=0.5)
    whole = Loop(method).steps(12)
    loop = Loop(method).steps(k)
    state = copy.deepcopy((loop.run.state_dict(), loop.optimizer.state_dict(), loop.schedule.state_dict()))
    for keep in (True, False):
        torch.manual_seed(99)
        again = Loop.__new__(Loop)
        again.model = mlp()
        again.run = rs.restore(again.model, state[0])
        again.begin()
        again.optimizer.load_state_dict(state[1])
        if keep:
            again.schedule.load_state_dict(state[2])
        again.steps(12 - k)
        for name, tensor in whole.run.state_dict()["tensors"].items():
            assert torch.equal(again.run.state_dict()["tensors"][name], tensor), name
        assert again.rate == whole.rate


def test_a_schedule_follows_a_state_that_is_loaded_after_it():
    """Another length, and another place in it."""
    other = Loop(METHOD, total=40).steps(9)
    loop = Loop(METHOD, total=12)
    loop.run.load_state_dict(copy.deepcopy(other.run.state_dict()))
    loop.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))
    assert loop.rate == other.rate
    assert loop.steps(3).rate == other.steps(3).rate == pytest.approx(1e-2 * jagged_cosine(12, 40, 2, 4, 2, 0.1))


def test_a_saved_run_goes_on_with_other_cycles(caplog: pytest.LogCaptureFixture):
    """The tensors are the same; restarts and rates are those of the new fields, from the beginning of the phase."""
    other = Loop(METHOD).steps(7)
    loop = Loop(rs.ReLoRA(rank=2, alpha=7, every=5, rewarm=1, floor=0.4))
    with caplog.at_level(logging.WARNING):
        loop.run.load_state_dict(copy.deepcopy(other.run.state_dict()))
    assert "every=4" in caplog.text
    loop.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))
    loop.steps(4)
    W, rates = loop.weights()["0"], [1e-2 * jagged_cosine(u, 12, 2, 5, 1, 0.4) for u in (10, 11)]
    assert rates[0] == 0
    assert loop.rate == rates[1]
    assert not loop.layers()["0"].B.any(), "restarted in update 10"
    assert torch.equal(loop.step() or loop.weights()["0"], W)
    with pytest.raises(rs.errors.WrongBase, match="rank"):
        Loop(rs.ReLoRA(rank=1, alpha=7, every=4, rewarm=2)).run.load_state_dict(other.run.state_dict())


def test_other_methods_have_a_cosine():
    model = mlp()
    run = rs.attach(model, rs.LoRA(rank=2), total_steps=10)
    optimizer = run.optimizer(lr=1.0)
    schedule = run.scheduler(optimizer, warmup=2)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        model(noise(4, 9)).square().mean().backward()
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0, 0.5] + [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)])
    assert optimizer.param_groups[0]["lr"] == 0


# ---- other optimizers, other layers


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_adam_of_torch_can_carry_it(kind: type[torch.optim.Optimizer]):
    model = mlp()
    run = rs.attach(model, METHOD, total_steps=12)
    optimizer = kind([p for _, p in run.trainable()], lr=1e-2, amsgrad=True)
    run.carry(optimizer)
    schedule = run.scheduler(optimizer)
    for u in range(5):
        model(noise(8, 9, seed=u)).square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for layer in run.adapter().values():
        assert not layer.B.any()
        for parameter in (layer.A, layer.B):
            state = optimizer.state[parameter]
            assert {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"} == state.keys()
            assert not any(tensor.any() for tensor in state.values())


def test_what_adam_it_does_not_know_is_refused_before_the_first_step():
    run = rs.attach(mlp(), METHOD)
    tensors = [p for _, p in run.trainable()]
    for optimizer in (torch.optim.SGD(tensors, lr=0.1), torch.optim.Adafactor(tensors)):
        with pytest.raises(ConfigError, match=rf"resets Adam's moments.*{type(optimizer).__name__}.*run\.optimizer"):
            run.carry(optimizer)
    free = rs.attach(mlp(), rs.ReLoRA(rank=2, every=None))
    free.carry(torch.optim.SGD([p for _, p in free.trainable()], lr=0.1))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "transposed", "embedding"])
def test_every_kind_of_layer_is_merged_as_it_is_stored(kind: str):
    torch.manual_seed(0)
    layer, x = {
        "linear": (nn.Linear(12, 8), noise(3, 12)),
        "conv1d": (nn.Conv1d(4, 8, 3), noise(2, 4, 8)),
        "conv2d": (nn.Conv2d(2, 8, (2, 3)), noise(2, 2, 6, 7)),
        "transposed": (Conv1D(8, 12), noise(3, 12)),
        "embedding": (nn.Embedding(12, 8), torch.tensor([[1, 4, 4, 10]])),
    }[kind]
    model = nn.Sequential(layer).to(D)
    before = layer.weight.detach().clone()
    run = rs.attach(model, rs.ReLoRA(rank=2, alpha=6, every=2, rewarm=1, rest="freeze", targets="0"), total_steps=8)
    optimizer = run.optimizer(lr=0.05)
    schedule = run.scheduler(optimizer)
    for u in range(7):
        y = model(x).detach()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if u in (2, 4, 6):
            assert (model(x) - y).abs().max() <= 1e-12
    assert not torch.equal(layer.weight.detach(), before)
    assert run.changed == {"0.weight"}


# ---- refusals and words


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_cannot_take_a_merge_are_refused_unless_asked_for(dtype: torch.dtype):
    model = mlp(dtype)
    layer = model[0]
    with pytest.raises(ConfigError, match=r"The weight of 0 is in .*float16.*Load the model in fp32.*lossy=True"):
        rs.attach(model, METHOD)
    assert model[0] is layer
    run = rs.attach(model, rs.ReLoRA(rank=2, every=4, lossy=True))
    optimizer = run.optimizer()
    layers = run.adapter()
    assert {layers["0"].A.dtype, layers["2"].B.dtype} == {torch.float32}
    model(noise(4, 9).to(dtype)).square().mean().backward()
    optimizer.step()
    bias = optimizer.state[run.sites["0"].base.bias]
    assert bias["exp_avg"].dtype == torch.float32, "what trains in 16 bits has wide moments"


class Coarse(Dense):
    """A storage that rounds anew."""

    exact = False


def test_a_storage_that_rounds_anew_is_refused_unless_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rankshift.core.site.Dense", Coarse)
    model = mlp()
    layer = model[0]
    with pytest.raises(UnsupportedLayer, match=r"0 is held in a storage that rounds anew.*lossy=True"):
        rs.attach(model, METHOD)
    assert model[0] is layer
    rs.attach(model, rs.ReLoRA(rank=2, lossy=True))


@pytest.mark.parametrize(("size", "share"), [(0.005, 0.9), (0.3, 0.5)])
def test_what_rounding_takes_of_a_merge_is_measured(size: float, share: float):
    """Against the weight before and after it. A small change does not survive four bits, a large one does in part."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128))
    run = rs.attach(model, rs.ReLoRA(rank=2, lossy=True, targets="0"), base="nf4", total_steps=2000)
    (adapter,), (site,) = run.adapter().values(), run.sites.values()
    assert isinstance(adapter, ReLoRALayer)
    before = site.base.rows()
    nn.init.normal_(adapter.B)
    with torch.no_grad():
        adapter.B.mul_(size * before.norm() / adapter.delta().norm())
    change = adapter.delta().detach()
    assert adapter.lost is None
    merge_(adapter)
    want = float((site.base.rows() - before - change).norm() / change.norm())
    assert adapter.lost == pytest.approx(want, rel=1e-4)
    assert adapter.lost > share if size < 0.1 else adapter.lost < share


@pytest.mark.parametrize("base", ["int8", None])
def test_what_rounding_takes_of_a_merge_is_said(base: Any, caplog: pytest.LogCaptureFixture):
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    run = rs.attach(model, rs.ReLoRA(rank=2, every=2, lossy=base is not None, rewarm=0), base=base, total_steps=8)
    optimizer = run.optimizer(lr=3e-3)
    with caplog.at_level("WARNING", "rankshift"):
        for step in range(3):
            model(torch.ones(2, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert ("merge_loss" in run.metrics()) == ("rounding took" in caplog.text) == (step == 2 and bool(base))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rank": 0}, "rank = 0 is below 1"),
        ({"alpha": 0.0}, "not a positive number"),
        ({"every": 0}, "every = 0: a number of updates, at least 1, or None"),
        ({"cycle": 0}, "cycle = 0"),
        ({"rewarm": -1}, "rewarm = -1"),
        ({"every": 50, "rewarm": 60}, "rewarm = 60 is longer than a cycle of 50"),
        ({"cycle": 50, "rewarm": 60}, "rewarm = 60 is longer than a cycle of 50"),
        ({"ratio": 0.0}, r"ratio = 0.0 is not in \(0, 1\]"),
        ({"ratio": 1.1}, "ratio"),
        ({"floor": -0.1}, "floor"),
        ({"dropout": 1.0}, "dropout"),
        ({"modules_to_save": ("head",)}, "leave modules_to_save out"),
        ({"reset": "zero"}, "reset"),
    ],
)
def test_values_that_mean_nothing_are_refused(values: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        rs.ReLoRA(**values)


def test_what_no_schedule_can_be_made_of_is_refused():
    run = rs.attach(mlp(), METHOD)
    optimizer = run.optimizer()
    with pytest.raises(ConfigError, match=r"ReLoRA needs the number of updates.*total_steps="):
        run.scheduler(optimizer)
    run.total_steps = 12
    for warmup in (-1, 12, 13):
        with pytest.raises(ConfigError, match=f"warmup = {warmup}.* the 12 that there are"):
            run.scheduler(optimizer, warmup)
    with pytest.raises(ConfigError, match="warm-up of 5 updates does not end before the first cycle of 4 does"):
        run.scheduler(optimizer, 5)
    run.scheduler(optimizer, 4)
    run.total_steps = 3  # one cycle, which is cut
    run.scheduler(optimizer, 2)
    late = rs.attach(mlp(), rs.Full(), total_steps=1)
    loop = Loop.__new__(Loop)
    loop.model, loop.run = late.model, late
    loop.begin(warmup=0)
    loop.step()
    with pytest.raises(ConfigError, match="began at update 1, and the run was to end at 1"):
        (shifted := late.shift(METHOD)).scheduler(shifted.optimizer())


def test_nothing_stands_beside_it_and_nothing_leaves_it():
    model = mlp()
    run = rs.attach(model, rs.ReLoRA(rank=2, every=1, rest="freeze"), total_steps=4)
    with pytest.raises(AttachError, match="merges into the base, which all adapters would share"):
        run.add("second", rs.LoRA(rank=2))
    for verb in (lambda: run.disabled().__enter__(), run.detach):
        with pytest.raises(AttachError, match="trains the base itself"):
            verb()
    with pytest.raises(RankTooLarge, match="rank 8 at 2 exceeds"):
        rs.attach(mlp(), rs.ReLoRA(rank=8))
    lora = rs.attach(mlp(), rs.LoRA(rank=2))
    with pytest.raises(AttachError, match="merges into the base"):
        lora.add("second", rs.ReLoRA(rank=2, rest="freeze"))


def test_an_adapter_is_not_exported_once_the_base_has_moved(tmp_path: Any):
    model = nn.ModuleDict({"layer": nn.Linear(9, 9)})
    model.forward = lambda x: model["layer"](x)
    run = rs.attach(model, rs.ReLoRA(rank=2, every=1, rest="freeze"), total_steps=4)
    optimizer = run.optimizer()
    run.export(tmp_path / "first")
    for _ in range(2):
        model(noise(4, 9).float()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(ExportError, match='format="merged"'):
        run.export(tmp_path / "second")


def test_a_rate_that_does_not_warm_up_is_told_of_once(caplog: pytest.LogCaptureFixture):
    def told(method: rs.ReLoRA, schedule: bool, steps: int = 10) -> list[str]:
        caplog.clear()
        loop = Loop(method, total=steps)
        for _ in range(steps):
            loop.backward()
            loop.optimizer.step()
            if schedule:
                loop.schedule.step()
            else:
                loop.optimizer.param_groups[0]["lr"] = 1e-2
        return [record.getMessage() for record in caplog.records if record.getMessage().startswith("ReLoRA")]

    with caplog.at_level(logging.WARNING):
        assert told(METHOD, True) == []
        (text,) = told(METHOD, False)
        assert "restarts at update 4" in text
        assert "run.scheduler(optimizer)" in text
        assert told(rs.ReLoRA(rank=2, every=4, rewarm=0), False) == []
        (text,) = told(rs.ReLoRA(rank=2, every=10), True)
        assert text.startswith("ReLoRA(every=10) has 10 updates in this phase at most, so it never restarts")


def test_that_it_never_restarts_is_told_once_and_beforehand(caplog: pytest.LogCaptureFixture):
    """Of a phase that another is to follow too; and what is due is asked more than once an update."""
    with caplog.at_level(logging.WARNING, "rankshift"):
        for every, count in ((5, 1), (4, 0)):
            caplog.clear()
            then = [rs.Then(rs.ReLoRA(rank=2, every=every), steps=3), rs.Then(rs.Full(), steps=5)]
            rs.attach(mlp(), rs.Full(), total_steps=20, then=then).optimizer()
            assert caplog.text.count(f"ReLoRA(every={every}) has 5 updates in this phase at most") == count
        caplog.clear()
        event, first = rs.ReLoRA(rank=2, every=9).events()[0], Tick(0, 9, 0, torch.optim.AdamW([torch.ones(1)]))
        assert not event.due(first)
        assert not event.due(first)
        assert not caplog.text


def test_what_was_frozen_and_trains_now_is_told(caplog):
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6)).requires_grad_(False)
    with caplog.at_level("WARNING"):
        rs.attach(model, rs.ReLoRA(rank=2, every=2, targets="*"), total_steps=8)
    assert "trains what was frozen before attach()" in caplog.text
    assert "1.weight" in caplog.text
    caplog.clear()
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6)).requires_grad_(False)
    rs.attach(model, rs.ReLoRA(rank=2, every=2, targets="*", rest="freeze"), total_steps=8)
    assert not caplog.text
