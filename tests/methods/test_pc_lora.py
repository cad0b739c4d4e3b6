"""PC-LoRA against explicit formulas in float64: the fading layer, its schedule, and distillation from the original."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rankshift as rs
from rankshift.core.lesson import Heard
from rankshift.methods.pc_lora import PCLoRALayer, fading, feature_loss

F64 = torch.float64
TASK = rs.PCLoRA(rank=2, features=False)  # the task alone


def seeded(make: Any, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


class Net(nn.Module):
    """Two hidden layers with dropout and a batch norm between them, and a head."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(7, 9), nn.Linear(9, 8), nn.Linear(8, 5)
        self.norm, self.drop = nn.BatchNorm1d(9), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.drop(self.norm(self.first(x)).tanh())).tanh())


BODY = ("first", "second")


def net(dropout: float = 0.0, dtype: torch.dtype = F64) -> Net:
    return seeded(lambda: Net(dropout)).to(dtype)


def batch(step: int = 0, size: int = 6, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(100 + step)
    return torch.randn(size, 7, generator=g, dtype=dtype), torch.randint(5, (size,), generator=g)


def train(run: rs.Run, optimizer: Any, steps: int, parts: int = 1) -> list[float]:
    """Updates as a user writes them; λ that each of them saw."""
    run.model.train()
    seen = []
    for _ in range(steps):
        x, y = batch(run.step, 8)
        for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss = F.cross_entropy(run.model(xs), ys)
            (run.loss(loss, xs) / parts).backward()
            seen.append(float(layer(run).lam))
        optimizer.step()
        optimizer.zero_grad()
    return seen


def layer(run: rs.Run, name: str = "second") -> PCLoRALayer:
    found = run.adapter()[name]
    assert isinstance(found, PCLoRALayer)
    return found


def shaken(run: rs.Run) -> rs.Run:
    """With values in A, B and C that no start would give."""
    g = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for adapter in run.adapter().values():
            for p in adapter.parameters():
                p += 0.3 * torch.randn(p.shape, generator=g, dtype=F64).to(p)
    return run


# ---- λ ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("decay", "half"), [("linear", 0.5), ("sine", 0.2929), ("cosine", 0.7071)])
def test_lambda_has_the_shape_of_its_name(decay: str, half: float) -> None:
    assert fading(decay, 0.0) == 1
    assert fading(decay, 0.5) == pytest.approx(half, abs=5e-5)
    assert fading(decay, 1.0) == 0
    assert fading(decay, 7.0) == 0
    values = [fading(decay, u / 50) for u in range(51)]
    assert all(a > b for a, b in itertools.pairwise(values))
    assert all(0 <= v <= 1 for v in values)


@pytest.mark.parametrize("total", [1, 2, 7, 100, 1000])
@pytest.mark.parametrize("decay", ["linear", "sine", "cosine"])
@pytest.mark.parametrize("end", [0.3, 0.55, 0.8, 1.0])
def test_lambda_is_exactly_zero_from_the_end_of_the_decay_on(total: int, decay: Any, end: float) -> None:
    method = rs.PCLoRA(decay=decay, decay_end=end)
    values = [method.lam_at(n, total) for n in range(total + 1)]
    q = max(1, math.ceil(round(end * total, 6)))
    assert values[0] == 1
    assert all(v > 0 for v in values[:q])
    assert all(v == 0 for v in values[q:])
    assert values[-1] == 0


def test_hold_keeps_lambda_for_some_updates() -> None:
    method = rs.PCLoRA(decay_end=0.5, hold=3)
    assert [method.lam_at(n, 20) for n in range(12)] == [
        1,
        1,
        1,
        0.7,
        0.7,
        0.7,
        0.4,
        0.4,
        0.4,
        pytest.approx(0.1),
        0,
        0,
    ]


@pytest.mark.parametrize("parts", [1, 4])
def test_lambda_follows_updates_and_not_micro_batches(parts: int) -> None:
    run = rs.attach(net(), rs.PCLoRA(rank=2, decay_end=0.5, targets=BODY), total_steps=8)
    seen = train(run, run.optimizer(lr=1e-3), 6, parts)
    assert seen == [value for value in (1.0, 0.75, 0.5, 0.25, 0.0, 0.0) for _ in range(parts)]
    assert run.metrics() == {"lambda": 0.0}


def test_without_a_total_there_is_no_schedule_and_no_optimizer() -> None:
    run = rs.attach(net(), rs.PCLoRA(rank=2))
    assert layer(run).lam == 1
    with pytest.raises(rs.errors.ConfigError, match="total_steps="):
        run.optimizer()
    run.total_steps = 4
    assert train(run, run.optimizer(), 3) == [1.0, 0.75, 0.5]


def test_loading_restores_lambda_without_an_optimizer(tmp_path: Any) -> None:
    run = rs.attach(net(), rs.PCLoRA(rank=2, decay_end=1.0, targets=BODY), total_steps=4)
    train(run, run.optimizer(), 3)
    run.save(tmp_path / "run")
    again = rs.load(net(), tmp_path / "run")
    assert layer(again).lam == 0.25
    assert train(again, again.optimizer(), 1) == [0.25]
    assert layer(again).faded
    restored = rs.restore(net(), again.state_dict())
    assert layer(restored).faded


def test_a_shift_in_mid_run_begins_at_lambda_one() -> None:
    model = net()
    run = rs.attach(model, rs.LoRA(rank=2, targets=BODY), total_steps=8)
    train_lora = run.optimizer()
    for _ in range(2):
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
        train_lora.step()
    before = model.eval()(batch()[0])
    run = run.shift(rs.PCLoRA(rank=2, decay_end=0.5, targets=BODY))
    assert torch.allclose(model(batch()[0]), before, atol=1e-12)
    seen = train(run, run.optimizer(), 5)
    assert seen == pytest.approx([1, 2 / 3, 1 / 3, 0, 0])
    state = run.state_dict()
    assert state["adapters"]["default"]["shared"] == {"began": 2}
    fresh = rs.restore(net(), {**state, "step": 3})
    assert float(layer(fresh).lam) == pytest.approx(2 / 3), "counted from where the phase began"


# ---- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
def test_at_lambda_one_the_function_is_that_of_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    model = net(dtype=dtype).eval()
    x = batch(dtype=dtype)[0]
    plain = model(x)
    rs.attach(model, rs.PCLoRA(rank=2), total_steps=9)
    assert torch.equal(model(x), plain)


def at(run: rs.Run, lam: float) -> rs.Run:
    for adapter in run.adapter().values():
        assert isinstance(adapter, PCLoRALayer)
        adapter.fade(lam)
    return run


def test_the_equation_and_its_gradients() -> None:
    """Against F = λ(W x + b) + B(A x) + C written out; ∂x holds λWᵀg."""
    model = nn.Sequential(seeded(lambda: nn.Linear(7, 5))).to(F64)
    W, b = (p.detach().clone() for p in model.parameters())
    run = at(shaken(rs.attach(model, rs.PCLoRA(rank=2, targets=("0",)), total_steps=9)), 0.6)
    A, B, C = layer(run, "0").A, layer(run, "0").B, layer(run, "0").C
    x = batch()[0].requires_grad_(True)
    g = torch.linspace(-1, 1, 30, dtype=F64).reshape(6, 5)
    model(x).backward(g)
    grads = [t.grad.clone() for t in (x, A, B, C)]
    for t in (x, A, B, C):
        t.grad = None
    y = 0.6 * (x @ W.T + b) + x @ A.T @ B.T + C
    y.backward(g)
    assert torch.allclose(model(x), y, atol=1e-13)
    for mine, theirs in zip(grads, (x.grad, A.grad, B.grad, C.grad), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-13)
    assert torch.allclose(grads[0], g @ (0.6 * W + B @ A), atol=1e-13)
    assert torch.autograd.gradcheck(lambda z: model(z), (x.detach()[:2].requires_grad_(True),))


def test_the_layer_is_affine_in_lambda() -> None:
    model = net().eval()
    run = shaken(rs.attach(model, rs.PCLoRA(rank=2, targets=("first",)), total_steps=9))
    x = batch()[0]
    y = {lam: at(run, lam).model.first(x) for lam in (0.0, 0.5, 1.0)}
    assert torch.allclose(y[0.5], (y[0.0] + y[1.0]) / 2, atol=1e-13)
    assert (y[0.0] - y[1.0]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_at_lambda_zero_two_thin_layers_and_the_base_is_not_called(kind: str, dtype: torch.dtype) -> None:
    """To the bit that of two plain layers, with NaN in W and b; gradients too."""
    make = {"linear": lambda: nn.Linear(7, 5), "conv": lambda: nn.Conv1d(4, 5, 3, stride=2, padding=1)}[kind]
    thin = {
        "linear": lambda: nn.Sequential(nn.Linear(7, 2, bias=False), nn.Linear(2, 5)),
        "conv": lambda: nn.Sequential(nn.Conv1d(4, 2, 3, stride=2, padding=1, bias=False), nn.Conv1d(2, 5, 1)),
    }[kind]().to(dtype)
    model = nn.Sequential(seeded(make)).to(dtype)
    run = at(shaken(rs.attach(model, replace(TASK, targets=("0",)), total_steps=9)), 0.0)
    with torch.no_grad():
        for p in (run.sites["0"].base.weight, run.sites["0"].base.bias):
            p.fill_(float("nan"))
        for p, q in zip(thin.parameters(), layer(run, "0").parameters(), strict=True):
            p.copy_(q.reshape(p.shape))
    x = seeded(lambda: torch.randn(6, 7) if kind == "linear" else torch.randn(2, 4, 9)).to(dtype)
    x, z = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    y, w = model(x), thin(z)
    assert torch.equal(y, w)
    y.float().square().sum().backward()
    w.float().square().sum().backward()
    assert torch.equal(x.grad, z.grad)
    for p, q in zip(thin.parameters(), layer(run, "0").parameters(), strict=True):
        assert torch.equal(p.grad, q.grad.reshape(p.shape).to(p.dtype))


def test_a_bf16_base_is_scaled_by_an_fp32_lambda_and_rounded_once() -> None:
    model = nn.Sequential(seeded(lambda: nn.Linear(64, 48, bias=False))).to(torch.bfloat16)
    run = rs.attach(model, rs.PCLoRA(rank=2, targets=("0",), bias="match"), total_steps=9)
    lam = 0.7013  # in bf16 this would be 0.703125
    at(run, lam)
    assert layer(run, "0").lam.dtype == torch.float32
    x = seeded(lambda: torch.randn(99, 64)).to(torch.bfloat16)
    y = F.linear(x, run.sites["0"].base.weight).float()
    assert torch.equal(model(x), (torch.tensor(lam) * y).to(torch.bfloat16))


def test_merging_is_exact_at_every_lambda() -> None:
    x = batch()[0]
    for lam in (1.0, 0.3, 0.0):
        model = net().eval()
        run = at(shaken(rs.attach(model, rs.PCLoRA(rank=2, targets=BODY), total_steps=9)), lam)
        if lam == 0:
            for adapter in run.adapter().values():
                dense = adapter.base.rows() + adapter.delta()
                assert torch.linalg.matrix_rank(dense.detach(), tol=1e-9) <= 2
        y = model(x)
        with run.merged():
            assert torch.allclose(model(x), y, atol=1e-12)
        assert torch.equal(model(x), y)
        assert torch.allclose(run.merge()(x), y, atol=1e-12)
        assert type(model.first) is nn.Linear


def test_c_needs_a_bias_to_be_merged_into_and_match_leaves_it_out() -> None:
    def bare() -> nn.Module:
        return nn.Sequential(seeded(lambda: nn.Linear(7, 5, bias=False))).to(F64)

    run = rs.attach(bare(), rs.PCLoRA(rank=2, targets=("0",)), total_steps=9)
    assert layer(run, "0").C is not None
    with pytest.raises(rs.errors.AttachError, match=r'bias="match"'):
        run.merge()
    run = at(shaken(rs.attach(bare(), rs.PCLoRA(rank=2, targets=("0",), bias="match"), total_steps=9)), 0.5)
    assert layer(run, "0").C is None
    y = run.model(batch()[0])
    assert torch.allclose(run.merge()(batch()[0]), y, atol=1e-12)


# ---- distillation ----------------------------------------------------------------------------------------------------


def outputs(model: nn.Module, x: Tensor, *names: str) -> list[Tensor]:
    """What these modules put out, by hooks of our own."""
    found: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda m, a, y, name=name: found.__setitem__(name, y))
        for name in names
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return [found[name] for name in names]


def test_distillation_is_what_two_networks_would_give() -> None:
    """α·task + (1 − α)·mean of MSEs, and its gradients, against a second model that nothing was attached to."""
    model, teacher = net(), net().eval()
    method = rs.PCLoRA(rank=2, targets=BODY, task_weight=0.3, also=("head",))
    run = at(shaken(rs.attach(model, method, total_steps=9)), 0.4)
    x, y = batch()
    model.train()
    torch.manual_seed(1)
    total = run.loss(F.cross_entropy(model(x), y), x)
    total.backward()
    mine = {name: p.grad.clone() for name, p in run.trainable()}
    model.zero_grad()
    names = ("first", "second", "head")
    student = outputs(model, x, *names)
    with torch.no_grad():
        wanted = outputs(teacher, x, *names)
    kd = sum(((s - t) ** 2).mean() for s, t in zip(student, wanted, strict=True)) / 3
    oracle = 0.3 * F.cross_entropy(student[2], y) + 0.7 * kd
    oracle.backward()
    assert torch.allclose(total, oracle, atol=1e-13)
    for name, p in run.trainable():
        assert torch.allclose(mine[name], p.grad, atol=1e-13), name


def test_features_differ_in_nothing_at_the_start_and_teach_after_it() -> None:
    model = net()
    model.norm.eval()  # batch statistics would be another function than running ones
    run = rs.attach(model, rs.PCLoRA(rank=2, targets=BODY, task_weight=0.0), total_steps=9)
    optimizer = run.optimizer(lr=1e-2)
    x, y = batch()
    model.train()
    model.norm.eval()
    task = F.cross_entropy(model(x), y)
    assert run.loss(task, x).item() == 0
    assert train(run, optimizer, 1)
    model.norm.eval()
    loss = run.loss(F.cross_entropy(model(x), y), x)
    assert loss.item() > 0
    loss.backward()
    for name, p in run.trainable():
        assert p.grad.count_nonzero() > 0 or name.endswith("A"), name
    train(run, optimizer, 2)
    model.norm.eval()
    run.loss(F.cross_entropy(model(x), y), x).backward()
    assert all(p.grad.count_nonzero() for _, p in run.trainable())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_logits_are_distilled_at_a_temperature() -> None:
    model, teacher = net(), net().eval()
    method = rs.PCLoRA(rank=2, targets=BODY, features=False, logits=True, temperature=3.0, task_weight=0.25)
    run = at(shaken(rs.attach(model, method, total_steps=9)), 0.4)
    x, y = batch()
    model.train()
    logits = model(x)
    task = F.cross_entropy(logits, y)
    p, q = (teacher(x) / 3).softmax(-1), (logits / 3).softmax(-1)
    kl = (p * (p / q).log()).sum(-1).mean() * 9
    assert torch.allclose(run.loss(task, x), 0.25 * task + 0.75 * kl, atol=1e-12)

    class Odd(Net):
        def forward(self, x: Tensor) -> Any:
            return {"scores": super().forward(x)}

    model = seeded(Odd).to(F64).train()
    run = rs.attach(model, method, total_steps=9)
    with pytest.raises(rs.errors.ConfigError, match="returns its logits"):
        run.loss(F.cross_entropy(model(x)["scores"], y), x)


def test_the_teacher_is_the_model_as_it_came_and_leaves_no_trace() -> None:
    """Dropout off, the original's running statistics, no generator touched, no mode changed, no gradient."""
    model = net(dropout=0.5)
    plain = copy.deepcopy(model).eval()
    run = rs.attach(model, rs.PCLoRA(rank=2, targets=BODY, modules_to_save=("head",)), total_steps=6)
    optimizer = run.optimizer(lr=1e-2)
    x = batch()[0]
    heard = []
    original = run._on.original

    def spied() -> Any:
        context = original()

        class Spy:
            def __enter__(self) -> None:
                context.__enter__()
                heard.append(run.model(x).clone())

            def __exit__(self, *error: object) -> None:
                context.__exit__(*error)

        return Spy()

    run._on.original = spied  # type: ignore[method-assign]
    model.drop.eval()  # one module in another mode than the rest
    for step in range(5):
        model.train()
        model.drop.eval()
        modes = {name: m.training for name, m in model.named_modules()}
        loss = F.cross_entropy(model(x), batch(step)[1])
        statistics = model.norm.running_mean.clone()
        state = torch.random.get_rng_state()
        total = run.loss(loss, x)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.equal(model.norm.running_mean, statistics)
        assert {name: m.training for name, m in model.named_modules()} == modes
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model.norm.running_mean, plain.norm.running_mean)
    assert len(heard) == 5
    assert all(torch.equal(y, plain(x)) for y in heard)
    with run.disabled():
        assert torch.equal(model.eval()(x), plain(x))


def test_a_batch_that_was_trained_without_distillation_stops_the_run() -> None:
    run = rs.attach(net(), rs.PCLoRA(rank=2, targets=BODY), total_steps=6)
    optimizer = run.optimizer()
    x, y = batch()
    run.model.train()
    F.cross_entropy(run.model(x), y).backward()
    before = [p.clone() for _, p in run.trainable()]
    with pytest.raises(rs.errors.TrainingError, match=r"run\.loss\(model"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, run.trainable(), strict=True))
    assert run.step == 0
    optimizer.zero_grad()
    F.cross_entropy(run.model(x), y).backward()  # the first of two micro-batches
    run.loss(F.cross_entropy(run.model(x), y), x).backward()
    with pytest.raises(rs.errors.TrainingError, match="trained without"):
        optimizer.step()
    optimizer.zero_grad()
    train(run, optimizer, 2)
    assert run.step == 2
    free = rs.attach(net(), rs.PCLoRA(rank=2, targets=BODY, task_weight=1.0), total_steps=6)
    optimizer = free.optimizer()
    F.cross_entropy(free.model.train()(x), y).backward()
    optimizer.step()
    assert free.step == 1


def test_the_loss_of_another_batch_or_of_none_is_refused() -> None:
    run = rs.attach(net(), rs.PCLoRA(rank=2, targets=BODY), total_steps=6)
    x, y = batch()
    task = torch.zeros((), dtype=F64)
    run.model.train()
    with pytest.raises(rs.errors.TrainingError, match="has not been asked about"):
        run.loss(task, x)
    run.model(x)
    with pytest.raises(rs.errors.TrainingError, match="another batch"):
        run.loss(task, x[:4])
    loss = F.cross_entropy(run.model(x), y)
    run.loss(loss, x)
    with pytest.raises(rs.errors.TrainingError, match="has not been asked about"):
        run.loss(loss, x)
    run.model.eval()
    run.model(x)
    assert run.loss(task, x) is task
    run.model.train()
    with torch.no_grad():
        run.model(x)
        assert run.loss(task, x) is task
    run.detach()
    with pytest.raises(rs.errors.AttachError, match="ended"):
        run.loss(task, x)


def test_what_checkpointing_runs_again_is_not_heard() -> None:
    """Else the features of the recomputation would keep what checkpointing is there to free."""

    class Again(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = checkpoint(lambda z: self.first(z).tanh(), x, use_reentrant=False)
            return self.head(checkpoint(lambda z: self.second(z).tanh(), h, use_reentrant=False))

    class Once(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x).tanh()).tanh())

    grads = []
    for kind in (Again, Once):
        model = seeded(kind).to(F64).train()
        run = at(shaken(rs.attach(model, rs.PCLoRA(rank=2, targets=BODY), total_steps=9)), 0.5)
        x, y = batch()
        loss = run.loss(F.cross_entropy(model(x), y), x)
        assert not run._ear._features
        loss.backward()
        assert not run._ear._features
        assert not run._ear.waiting
        grads.append([p.grad.clone() for _, p in run.trainable()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_one_layer_called_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(7, 7), nn.Linear(7, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(self.layer(x).tanh()))

    model, teacher = (seeded(Twice).to(F64) for _ in range(2))
    run = at(shaken(rs.attach(model, rs.PCLoRA(rank=2, targets=("layer",), task_weight=0), total_steps=9)), 0.5)
    x, _ = batch()
    model.train()
    loss = run.loss(model(x).sum(), x)
    s1 = model.layer(x)
    s2 = model.layer(s1.tanh())
    t1 = teacher.layer(x)
    t2 = teacher.layer(t1.tanh())
    assert torch.allclose(loss, (F.mse_loss(s1, t1) + F.mse_loss(s2, t2)) / 2, atol=1e-13)


def test_features_are_compared_in_fp32() -> None:
    model = net(dtype=torch.bfloat16)
    run = at(shaken(rs.attach(model, rs.PCLoRA(rank=2, targets=BODY), total_steps=9)), 0.5)
    x, y = batch(dtype=torch.bfloat16)
    model.train()
    loss = run.loss(F.cross_entropy(model(x).float(), y), x)
    assert loss.dtype == torch.float32


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"decay_end": 0.0}, r"not in \(0, 1\]"),
        ({"decay_end": 1.5}, r"not in \(0, 1\]"),
        ({"decay_end": -0.1}, r"not in \(0, 1\]"),
        ({"decay_end": float("nan")}, r"not in \(0, 1\]"),
        ({"decay": "quadratic"}, "decay"),
        ({"rank": 0}, "below 1"),
        ({"rank_pattern": {"up": 0}}, "below 1"),
        ({"task_weight": 1.1}, r"not in \[0, 1\]"),
        ({"hold": 0}, "below 1 update"),
        ({"temperature": 0.0}, "positive"),
        ({"features": False, "also": ("head",)}, "also"),
        ({"features": False, "task_weight": 0.0}, "no loss"),
        ({"bias": "none"}, "bias"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(rs.errors.ConfigError, match=says):
        rs.PCLoRA(**fields)


def test_layers_that_cannot_be_replaced_are_refused_before_anything_is_touched() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(9, 7), "layer": nn.Linear(7, 5)})
    with pytest.raises(rs.errors.UnsupportedLayer, match="table is an Embedding"):
        rs.attach(model, rs.PCLoRA(rank=2, targets=("table", "layer")), total_steps=4)
    with pytest.raises(rs.errors.RankTooLarge, match=r"min\(out, in\) = 5"):
        rs.attach(model, rs.PCLoRA(rank=6, targets=("layer",)), total_steps=4)
    with pytest.raises(rs.errors.UnmatchedTarget, match="also 'nrom'"):
        rs.attach(model, rs.PCLoRA(rank=2, targets=("layer",), also=("nrom",)), total_steps=4)
    assert type(model["layer"]) is nn.Linear


def test_a_rank_that_makes_layers_larger_is_carried_out_with_a_warning() -> None:
    """7·5 / (7 + 5) = 2.917."""
    model = nn.Sequential(nn.Linear(7, 5))
    with pytest.warns(UserWarning, match=r"below rank 2\.917"):
        rs.attach(model, rs.PCLoRA(rank=3, targets=("0",)), total_steps=4).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rs.attach(model, rs.PCLoRA(rank=3, rank_pattern={"0": 2}, targets=("0",)), total_steps=4)


def test_a_lora_file_cannot_hold_it(tmp_path: Any) -> None:
    run = rs.attach(net(), rs.PCLoRA(rank=2, targets=BODY), total_steps=4)
    with pytest.raises(rs.errors.ExportError, match='format="compressed"'):
        run.export(tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


# ---- compiled --------------------------------------------------------------------------------------------------------


def test_lambda_is_a_tensor_to_the_compiler_and_the_base_goes_once() -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = net()
    run = rs.attach(model, rs.PCLoRA(rank=2, decay_end=0.5, targets=BODY), total_steps=12)
    optimizer, call = run.optimizer(), torch.compile(model, backend=backend, fullgraph=True)
    model.train()
    for step in range(10):
        x, y = batch(step)
        run.loss(F.cross_entropy(call(x), y), x).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert len(graphs) == (1 if step < 6 else 2)


def test_fading_beats_the_same_branch_without_a_base() -> None:
    """Equal updates, equal loss: the branch alone, from B = C = 0, hardly starts; faded in, it does."""

    def deep() -> nn.Sequential:
        layers = [part for _ in range(5) for part in (nn.Linear(16, 16), nn.Tanh())]
        model = nn.Sequential(*layers, nn.Linear(16, 4))
        with torch.no_grad():
            for p in model.parameters():
                p *= 2
        return model

    teacher, names, steps = seeded(deep), ("0", "2", "4", "6", "8"), 100
    x = seeded(lambda: torch.randn(256, 16), 1)
    with torch.no_grad():
        wanted = teacher(x)
    ends = []
    for fades in (True, False):
        model = seeded(deep)
        run = rs.attach(model, rs.PCLoRA(rank=4, targets=names, decay_end=0.6), total_steps=steps)
        optimizer = run.optimizer(lr=1e-2, check_gradients=False)
        model.train()
        for _ in range(steps):
            if not fades:
                at(run, 0.0)
            run.loss(F.mse_loss(model(x), wanted), x).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            ends.append(F.mse_loss(run.compress()(x), wanted).item())
    assert ends[0] < 0.6 * ends[1]


def test_comparing_features_keeps_no_wide_copies():
    a = torch.randn(40, 8, dtype=torch.bfloat16, requires_grad=True)
    b = torch.randn(40, 8, dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = feature_loss(Heard({"x": [a]}, None), Heard({"x": [b]}, None))
    assert {t.data_ptr() for t in kept if t.numel() > 1} == {a.data_ptr(), b.data_ptr()}
    assert loss.dtype == torch.float32
    (3 * loss).backward()
    wide = a.detach().double().requires_grad_()
    expected = torch.nn.functional.mse_loss(wide, b.double())
    (3 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(a.grad.double(), wide.grad, rtol=1e-2, atol=0)
