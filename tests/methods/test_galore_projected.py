"""GaLore with a gradient that is projected as it is formed: the training of the ordinary way, without the gradient."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rankshift as rs
from rankshift.methods import AdaRankGrad, GaLore
from rankshift.methods.galore_projected import ProjectedLayer
from rankshift.optim import subspace

F64 = torch.float64
LR, DECAY, EPS = 1e-2, 0.1, 1e-6


class Net(nn.Module):
    """Layers that grow, shrink and keep the width, one of each other kind, and what is not projected."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.grow, self.same, self.shrink = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 5, bias=False)
        self.transposed, self.conv = Conv1D(7, 5), nn.Conv1d(7, 6, 3, padding=1)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.shrink(torch.tanh(self.same(torch.tanh(self.grow(x))))))
        h = self.conv(torch.tanh(self.transposed(h)).transpose(1, 2).contiguous()).transpose(1, 2).contiguous()
        return self.head(self.norm(h))


LAYERS = ("grow", "same", "shrink", "transposed", "conv")


def net(dtype: torch.dtype = F64) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Net().to(dtype).train()


def batch(step: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 5, 6, generator=generator, dtype=F64)
    return x.to(dtype), torch.randn(4, 5, 3, generator=generator, dtype=F64).to(dtype)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


def attached(method: GaLore, dtype: torch.dtype = F64) -> tuple[Net, rs.Run, torch.optim.Optimizer]:
    model = net(dtype)
    run = rs.attach(model, method, seed=5)
    return model, run, run.optimizer(lr=LR, weight_decay=DECAY, eps=EPS)


def train(
    method: GaLore,
    steps: int,
    parts: int = 1,
    between: Callable[[rs.Run, int], None] = lambda run, step: None,
) -> tuple[Net, rs.Run, torch.optim.Optimizer]:
    """Some updates, with ``between`` backward and step; the model merged."""
    model, run, optimizer = attached(method)
    for step in range(steps):
        for x, y in zip(*(t.chunk(parts) for t in batch(step)), strict=True):
            (loss_of(model, x, y) / parts).backward()
        between(run, step)
        optimizer.step()
        optimizer.zero_grad()
    return model, run, optimizer


def weights(model: nn.Module) -> dict[str, Tensor]:
    """By the names that the model came with."""
    return {name.replace(".base.", "."): p.detach() for name, p in model.named_parameters() if ".adapters." not in name}


def assert_same(mine: nn.Module, theirs: nn.Module, tolerance: float = 1e-11) -> None:
    # AdamW divides by √v + 1e-6: rounding of 1e-17 in a gradient that is nearly zero meets lr as 1e-13
    a, b, start = weights(mine), weights(theirs), weights(net())
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() < tolerance, f"{name} by {(a[name] - b[name]).abs().max():.2g}"
        assert (a[name] - start[name]).abs().max() > 1e-4, f"{name} did not move"


# ---- the training is that of the whole gradient ----------------------------------------------------------------------

SETTINGS = [
    *(GaLore(rank=3, every=3, side=side) for side in ("smaller", "larger", "in")),  # type: ignore[arg-type]
    *(GaLore(rank=3, every=2, transport=how) for how in ("reset", "square", "centred")),  # type: ignore[arg-type]
    *(GaLore(rank=2, every=4, finder=how, stagger=False) for how in ("eigh", "svd", "warm")),  # type: ignore[arg-type]
    GaLore(rank=100, every=0, scale=1.0),
    AdaRankGrad(rank=5, every=3, earliest=1, energy=0.97),
    AdaRankGrad(rank=5, every=0, earliest=2, kappa=0.99, energy=0.97, transport="centred", side="in"),
    AdaRankGrad(rank=5, every=2, earliest=1, energy=0.96, transport="reset", multiple=2, finder="eigh"),
]


def placed(method: GaLore) -> GaLore:
    """Renewals are spread over what one transform steps, which is all linear layers here and those of a kind there."""
    return replace(method, targets=LAYERS[:3] if method.stagger else LAYERS)


def length(method: GaLore) -> int:
    """Updates: convergence is looked for every tenth."""
    return 10 if method.every or not isinstance(method, AdaRankGrad) else 13


def _label(method: GaLore) -> str:
    return f"{method.name}-{method.side}-{method.finder}-{method.transport}-{method.every}"


@pytest.mark.parametrize("method", SETTINGS, ids=_label)
@pytest.mark.parametrize("parts", [1, 2])
def test_training_is_that_of_the_whole_gradient(method: GaLore, parts: int) -> None:
    method = placed(method)
    full, run, optimizer = train(method, length(method), parts)
    mine, projected, inside = train(replace(method, gradient="projected"), length(method), parts)
    assert_same(mine, full)
    assert projected.subspaces == run.subspaces
    wanted = {n: s for n, s in zip(*_states(optimizer), strict=True) if "basis" in s}
    found = {n.replace(".subspace", ".weight"): s for n, s in zip(*_states(inside), strict=True)}
    for name, state in wanted.items():
        for key in ("step", "renewals", "renewed", "next"):
            assert int(state[key]) == int(found[name][key]), f"{key} of {name}"


def _states(optimizer: torch.optim.Optimizer) -> tuple[list[str], list[dict[str, Tensor]]]:
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    return names, [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]


def test_the_settings_renew_and_change_ranks() -> None:
    """Else the test above compares little."""
    for method in map(placed, SETTINGS):
        ranks: list[dict[str, int]] = []
        mine = replace(method, gradient="projected")
        _, _, optimizer = train(mine, length(method), between=lambda run, step, to=ranks: to.append(run.subspaces))
        renewals = [int(state["renewals"]) for state in optimizer.state.values() if "renewals" in state]
        assert len(renewals) == len(method.targets)
        if method.every:
            assert min(renewals) >= 3, renewals
        if isinstance(method, AdaRankGrad):
            assert max(renewals) > 1
            assert any(a != b for a, b in pairwise(ranks[1:])), ranks


@pytest.mark.parametrize("finder", ["range", "warm"])
def test_random_directions_are_drawn_alike(finder: str) -> None:
    """Where they decide: sides wider than rank and oversampling together. "warm" goes on from the last basis too."""
    ends = []
    for gradient in ("full", "projected"):
        method = GaLore(rank=2, every=2, finder=finder, gradient=gradient, stagger=False)  # type: ignore[arg-type]
        model, run, optimizer = deep(method, 2)
        for step in range(5):
            x = torch.randn(30, 24, dtype=F64, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(run.merge()[0].weight.detach())  # type: ignore[index]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


def by_hand(W: Tensor, batches: list[tuple[Tensor, Tensor]], rank: int, every: int, scale: float) -> Tensor:
    """GaLore's algorithm 2 with AdamW's decay, for y = W x under a squared loss, W (out, in) with in < out."""
    W, beta1, beta2 = W.clone(), 0.9, 0.999
    m = v = torch.zeros(W.shape[0], rank, dtype=W.dtype)
    for t, (x, y) in enumerate(batches):
        G = 2 / y.numel() * (x @ W.t() - y).t() @ x
        if t % every == 0:
            Q = torch.linalg.svd(G).Vh[:rank].t()
            Q = Q * Q.gather(0, Q.abs().argmax(0, keepdim=True)).sign()
        R = G @ Q
        m, v = beta1 * m + (1 - beta1) * R, beta2 * v + (1 - beta2) * R * R
        N = m / (1 - beta1 ** (t + 1)) / ((v / (1 - beta2 ** (t + 1))).sqrt() + EPS)
        W = (1 - LR * DECAY) * W - LR * scale * N @ Q.t()
    return W


def test_the_paper_written_out() -> None:
    g = torch.Generator().manual_seed(0)
    layer = nn.Linear(5, 8, bias=False, dtype=F64)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(8, 5, generator=g, dtype=F64) / 2)
    data = [(batch(i)[0].reshape(-1, 6)[:, :5], torch.randn(20, 8, generator=g, dtype=F64)) for i in range(7)]
    want = by_hand(layer.weight.detach(), data, 2, 3, 0.25)
    model = nn.Sequential(layer)
    method = GaLore(rank=2, every=3, finder="svd", stagger=False, gradient="projected", targets=("0",))
    optimizer = rs.attach(model, method).optimizer(lr=LR, weight_decay=DECAY, eps=EPS)
    for x, y in data:
        loss_of(model, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(layer.weight.detach(), want, rtol=0, atol=1e-13)


# ---- what is done to gradients between backward and step -------------------------------------------------------------


def test_a_factor_on_the_gradients_reaches_a_new_basis_too() -> None:
    """Another in every update, as clipping has. Both ways are given the same, for each clips by a norm of its own."""

    def scale(run: rs.Run, step: int) -> None:
        for _, p in run.trainable():
            assert p.grad is not None
            p.grad *= 0.1 + 0.2 * (step * 7 % 5)

    method = GaLore(rank=3, every=2, targets=LAYERS, stagger=False)
    full, _, _ = train(method, 8, between=scale)
    mine, _, _ = train(replace(method, gradient="projected"), 8, between=scale)
    assert_same(mine, full)
    other, _, _ = train(replace(method, gradient="projected"), 8)
    assert (weights(other)["grow.weight"] - weights(full)["grow.weight"]).abs().max() > 1e-4


def test_clipping_goes_by_the_projected_norm() -> None:
    def check(run: rs.Run, step: int) -> None:
        gradients = [p.grad for _, p in run.trainable() if p.grad is not None]
        assert (9, 9) not in {tuple(g.shape) for g in gradients}
        wanted = torch.stack([g.norm() for g in gradients]).norm()
        assert torch.equal(torch.nn.utils.clip_grad_norm_([p for _, p in run.trainable()], 1e-3), wanted)

    train(GaLore(rank=3, every=2, targets=LAYERS, gradient="projected"), 4, between=check)


def scaled(method: GaLore, overflow: int | None) -> Net:
    """Under a GradScaler, with an overflow in one update, which is tried again on the next batch."""
    model, run, optimizer = attached(method)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    step, tried = 0, False
    while step < 6:
        loss = scaler.scale(loss_of(model, *batch(step)))
        loss.backward()
        if step == overflow and not tried:
            for _, p in run.trainable():
                assert p.grad is not None
                p.grad += float("inf")
            for site in run.adapter().values():
                assert isinstance(site, ProjectedLayer)
                if site.listener.gradient is not None:
                    site.listener.gradient += float("inf")
            tried = True
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        step = run.step
    return model


def test_loss_scaling() -> None:
    method = GaLore(rank=3, every=2, targets=LAYERS, stagger=False)
    plain, _, _ = train(method, 6)
    assert_same(scaled(replace(method, gradient="projected"), None), plain, 1e-9)


def test_what_an_update_heard_that_was_skipped_is_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    """A scaler skips without a word; the renewal waits for a window that is whole."""
    model, run, optimizer = attached(GaLore(rank=3, every=1, targets=("grow",), gradient="projected"))
    layer = run.adapter()["grow"]
    assert isinstance(layer, ProjectedLayer)
    for step in range(3):
        loss_of(model, *batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = layer.basis.clone()
    (2 * loss_of(model, *batch(90))).backward()
    optimizer.zero_grad()  # as after an overflow: no step, and half the scale
    loss_of(model, *batch(3)).backward()
    with caplog.at_level(logging.WARNING):
        optimizer.step()
    assert "cannot be renewed" in caplog.text
    assert torch.equal(layer.basis, before)
    optimizer.zero_grad()
    loss_of(model, *batch(4)).backward()
    optimizer.step()
    assert not torch.equal(layer.basis, before)


def test_an_overflow_in_the_first_update(caplog: pytest.LogCaptureFixture) -> None:
    """There is no basis yet: the layers wait, and train from the next update on."""
    with caplog.at_level(logging.WARNING):
        model = scaled(GaLore(rank=3, every=2, targets=LAYERS, gradient="projected"), 0)
    assert "cannot be renewed" in caplog.text
    assert all(torch.isfinite(w).all() for w in weights(model).values())
    for name, w in weights(net()).items():
        assert not torch.equal(w, weights(model)[name]), f"{name} did not move"


def test_clipping_by_value_stops_the_run() -> None:
    def clip(run: rs.Run, step: int) -> None:
        for _, p in run.trainable():
            assert p.grad is not None
            p.grad.sign_()

    with pytest.raises(rs.errors.TrainingError, match=r'Clip by norm, .*gradient="full"'):
        train(GaLore(rank=3, every=2, targets=("grow",), gradient="projected"), 25, between=clip)


def test_renewals_put_off_now_and_then_do_not_stop_the_run() -> None:
    """Twenty in a row do; of these 22 every tenth is followed by one that can be renewed."""

    def clip(run: rs.Run, step: int) -> None:
        for _, p in run.trainable():
            assert p.grad is not None
            if step % 10 != 9:
                p.grad.sign_()

    _, run, _ = train(GaLore(rank=3, every=1, targets=("grow",), gradient="projected"), 25, between=clip)
    assert [row.renewals for row in run.subspace_table().rows] == [2]


def test_gradients_of_zeros_put_nothing_off(caplog: pytest.LogCaptureFixture) -> None:
    """However many: a reward that is always the same teaches nothing, and is no fault."""

    model, run, optimizer = attached(GaLore(rank=3, every=1, targets=LAYERS[:2], gradient="projected"))
    with caplog.at_level(logging.WARNING, "rankshift"):
        for step in range(26):
            (loss_of(model, *batch(step)) * float(step in (0, 25))).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not caplog.records
    assert run.step == 26


# ---- memory and launches ---------------------------------------------------------------------------------------------


_NO_LAUNCH = ("aten::detach", "aten::alias", "aten::t", "aten::_local_scalar_dense")


class Made(TorchDispatchMode):
    """New memory by shape, and how many operations ran."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        held = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for t in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in held:
                self.shapes.append(tuple(t.shape))
        self.count += func.name().split(".")[0] not in _NO_LAUNCH
        return out


def deep(method: GaLore, layers: int) -> tuple[nn.Module, rs.Run, torch.optim.Optimizer]:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = nn.Sequential(*(nn.Linear(24, 24, bias=False, dtype=F64) for _ in range(layers))).train()
    run = rs.attach(model, replace(method, targets="all-linear"))
    return model, run, run.optimizer(lr=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_between_renewals_nothing_of_the_weights_size_is_formed(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 31)).to(dtype)
    run = rs.attach(
        model, GaLore(rank=3, every=0, gradient="projected", rounding="nearest", side="in", targets=("0", "1"))
    )
    optimizer = run.optimizer()
    x = torch.randn(16, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    formed = []
    for _ in range(3):
        with Made() as made:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        formed.append({(20, 30), (30, 20), (31, 20), (20, 31)} & set(made.shapes))
    assert formed[0], "the first update forms the whole gradient"
    assert formed[1] == formed[2] == set()
    assert model[0].base.weight.grad is None
    assert not model[0].base.weight.requires_grad
    assert model[0].base.bias.requires_grad


@pytest.mark.parametrize(
    ("method", "most"),
    [
        (GaLore(rank=4, every=0, gradient="projected"), 3),
        (AdaRankGrad(rank=4, every=0, earliest=50, gradient="projected"), 8),
    ],
)
def test_a_step_is_a_few_launches_a_layer(method: GaLore, most: int) -> None:
    """v over its mass, the product into W, X to zero; with a rule of convergence, its running means. By difference of
    two depths: what all layers share is not counted."""
    counts = []
    for layers in (10, 20):
        model, _, optimizer = deep(method, layers)
        for step in range(8):
            x = torch.randn(8, 24, generator=torch.Generator().manual_seed(step), dtype=F64)
            model(x).square().mean().backward()
            with Made() as made:
                optimizer.step()
            optimizer.zero_grad()
        counts.append(made.count)
    assert counts[1] - counts[0] <= 10 * most


def test_a_renewal_is_a_few_launches_for_layers_of_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Cholesky's factorisation, as on a GPU. What comes with each layer: its draw, its clock, its basis."""
    monkeypatch.setattr(subspace, "orthonormal", subspace.cholesky_qr)
    counts = {}
    for every in (0, 1):
        for layers in (6, 12):
            method = GaLore(rank=64, every=every, stagger=False, side="in", gradient="projected")
            with torch.random.fork_rng():
                model = nn.Sequential(*[nn.Linear(80, 80, bias=False) for _ in range(layers)])
            optimizer = rs.attach(model, method).optimizer(lr=1e-3)
            for step in range(2):
                x = torch.randn(8, 80, generator=torch.Generator().manual_seed(step))
                model(x).square().mean().backward()
                with Made() as made:
                    optimizer.step()
                optimizer.zero_grad()
            counts[every, layers] = made.count
    six, twelve = (counts[1, layers] - counts[0, layers] for layers in (6, 12))
    assert six <= 210
    assert twelve - six <= 6 * 9


def test_memory_stays_that_of_the_largest_rank_and_columns_beyond_are_zero() -> None:
    method = AdaRankGrad(rank=5, every=2, earliest=1, energy=0.6, gradient="projected", targets=LAYERS[:4])
    model, run, optimizer = attached(method)
    held = {}
    for step in range(8):
        loss_of(model, *batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, layer in run.adapter().items():
            assert isinstance(layer, ProjectedLayer)
            state, rank = optimizer.state[layer.subspace], run.subspaces[f"{name}.weight"]
            assert rank == int(state["rank"])
            assert not layer.subspace.any()
            kept = {"basis": layer.basis, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            for key, tensor in kept.items():
                assert tensor.shape[1] == 5
                assert not tensor[:, rank:].any(), f"{key} of {name} beyond its rank"
                assert held.setdefault((name, key), tensor.data_ptr()) == tensor.data_ptr()
            torch.testing.assert_close(layer.basis[:, :rank].t() @ layer.basis[:, :rank], torch.eye(rank, dtype=F64))
    assert min(run.subspaces.values()) < 5


# ---- weights in bf16 -------------------------------------------------------------------------------------------------


def test_moments_in_8_bits() -> None:
    ends = []
    for moments in ("float32", "8bit"):
        with torch.random.fork_rng():
            torch.manual_seed(4)
            layer = nn.Linear(80, 80, bias=False)
        start = layer.weight.detach().clone()
        run = rs.attach(
            nn.Sequential(layer),
            GaLore(rank=64, every=4, gradient="projected", moments=moments, targets=("0",)),  # type: ignore[arg-type]
        )
        optimizer = run.optimizer(lr=1e-3)
        for step in range(10):
            x = torch.randn(64, 80, generator=torch.Generator().manual_seed(step))
            (run.model(x) - x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        (state,) = optimizer.state.values()
        assert state["exp_avg"].dtype == (torch.uint8 if moments == "8bit" else torch.float32)
        ends.append(layer.weight.detach() - start)
    assert 0 < (ends[1] - ends[0]).norm() < 0.1 * ends[0].norm()


def test_a_bf16_weight_needs_a_word_on_rounding() -> None:
    model = net(torch.bfloat16)
    with pytest.raises(rs.errors.ConfigError, match=r"grow.weight is in bfloat16.*rounding="):
        rs.attach(model, GaLore(rank=3, gradient="projected", targets=LAYERS))
    assert isinstance(model.grow, nn.Linear)


def fold(how: str, step: float, times: int) -> Tensor:
    """A bf16 weight of ones after so many steps of the same size; each in the mean over 4096 entries."""
    layer = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(layer.weight)
    model = nn.Sequential(layer)
    method = GaLore(rank=1, every=0, gradient="projected", rounding=how, targets=("0",))  # type: ignore[arg-type]
    run = rs.attach(model, method)
    adapter = run.adapter()["0"]
    assert isinstance(adapter, ProjectedLayer)
    adapter.basis.data.fill_(1.0)
    state = {"key": torch.tensor(7), "step": torch.tensor(0)}
    for _ in range(times):
        state["step"] += 1
        part = torch.full_like(adapter.subspace, step, dtype=torch.bfloat16 if how == "nearest" else torch.float32)
        adapter.fold(state, 1.0, how, part.detach())  # type: ignore[arg-type]
    return layer.weight.detach()


def test_small_steps_of_a_bf16_weight() -> None:
    tiny = 2.0**-11  # an eighth of the distance to the next number above 1
    assert torch.equal(fold("nearest", tiny, 16), torch.ones(64, 64, dtype=torch.bfloat16))
    grown = fold("stochastic", tiny, 16).double()
    assert abs(grown.mean() - (1 + 16 * tiny)) < 5 * 2.0**-7 * (16 * 0.125 / 4096) ** 0.5
    assert torch.equal(fold("nearest", 2.0**-7, 3), torch.full((64, 64), 1 + 3 * 2.0**-7, dtype=torch.bfloat16))


def test_training_in_bf16_follows_that_in_fp32() -> None:
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8)).to(dtype)
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) / 4)
        method = GaLore(rank=4, every=5, gradient="projected", rounding="stochastic", targets=("0", "2"), scale=1.0)
        optimizer = rs.attach(model, method).optimizer(lr=2e-2)
        for step in range(80):
            x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
            loss = F.mse_loss(model(x.to(dtype)).float(), x[:, :8])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(loss.item())
    assert ends[0] < 0.5
    assert abs(ends[0] - ends[1]) < 0.1 * ends[0]


@pytest.mark.parametrize("side", ["in", "larger"])
def test_many_small_passes_in_bf16_add_up(side: str) -> None:
    """Each adds less to the gradient than half its last bit in bf16, all together half its size: the basis has them."""
    layer = nn.Linear(16, 24, bias=False, dtype=torch.bfloat16)
    into, out = torch.ones(16).bfloat16(), torch.ones(24).bfloat16()
    into[::2] = -1
    other_into, other_out = into.clone(), out.clone()
    other_into[:8] *= -1
    other_out[:12] *= -1
    model = nn.Sequential(layer)
    method = GaLore(
        rank=2,
        every=1,
        finder="eigh",
        gradient="projected",
        rounding="nearest",
        side=side,
        targets=("0",),
        stagger=False,
    )
    run = rs.attach(model, method)
    optimizer = run.optimizer()
    for _ in range(2):  # in the first update directions are not yet known, in the second they are renewed
        for size, x, y in [(1.0, into, out), *[(2.0**-9, other_into, other_out)] * 256]:
            (model(x[None]) * (size * y)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        Q = run.adapter()["0"].basis.detach().float()  # type: ignore[union-attr]
        second = (other_into if side == "in" else other_out).float()
        assert (Q.t() @ (second / second.norm())).norm() > 0.999
        assert run.subspace_table().rows[0].energy > 0.999


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_the_forward_is_the_plain_layers_bit_for_bit() -> None:
    model, plain = net(torch.float32), net(torch.float32)
    rs.attach(model, GaLore(rank=3, gradient="projected", targets=LAYERS))
    x = batch(0, torch.float32)[0]
    assert torch.equal(model(x), plain(x))


def test_what_is_named_where() -> None:
    _, run, _ = attached(GaLore(rank=3, gradient="projected", targets=LAYERS))
    assert set(run.sites) == set(LAYERS[:4])  # a convolution goes the ordinary way
    assert run._on.projected.keys() == {"conv.weight"}
    names = dict(run.trainable())
    assert {"grow.subspace", "grow.bias", "conv.weight", "conv.bias", "norm.weight", "head.weight"} <= names.keys()
    assert not {"grow.weight", "grow.basis"} & names.keys()
    frozen = rs.attach(net(), GaLore(rank=3, gradient="projected", targets=LAYERS, rest="freeze"))
    assert set(dict(frozen.trainable())) == {f"{name}.subspace" for name in LAYERS[:4]} | {"conv.weight"}


def test_a_model_without_linear_layers_goes_the_ordinary_way() -> None:
    ends = []
    for gradient in ("full", "projected"):
        model = nn.Sequential(nn.Conv1d(3, 4, 2, dtype=F64))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel(), dtype=F64).reshape(p.shape))
        run = rs.attach(model, GaLore(rank=2, gradient=gradient, targets=("0",)))  # type: ignore[arg-type]
        optimizer = run.optimizer()
        model(torch.linspace(0, 1, 15, dtype=F64).reshape(1, 3, 5)).square().sum().backward()
        optimizer.step()
        ends.append(model[0].weight.detach())
    assert torch.equal(*ends)


def test_merge_and_shift() -> None:
    model, run, _ = train(GaLore(rank=3, every=2, gradient="projected", targets=LAYERS), 3)
    x = batch(9)[0]
    y = model(x).detach()
    run = run.shift(rs.LoRA(rank=2, targets=("grow",)))
    torch.testing.assert_close(model(x).detach(), y, rtol=0, atol=1e-12)
    assert {"grow.weight", "transposed.weight", "norm.weight"} <= run.changed
    run = run.shift(GaLore(rank=2, gradient="projected", targets=LAYERS))
    assert torch.equal(run.merge()(x), y)
    assert not any("rankshift" in type(module).__module__ for module in model.modules())


def test_saved_and_loaded_as_the_plain_weights(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, run, _ = train(GaLore(rank=3, every=2, gradient="projected", targets=LAYERS), 3)
    run.save(tmp_path / "run")
    other = net()
    again = rs.load(other, tmp_path / "run")
    assert torch.equal(other(batch(9)[0]), model(batch(9)[0]))
    assert not any(".subspace" in name for name in again.state_dict()["tensors"])
    for name, layer in again.adapter().items():
        assert torch.equal(layer.basis, run.adapter()[name].basis)  # type: ignore[arg-type]


def test_a_copied_model_trains_by_itself() -> None:
    method = GaLore(rank=3, every=1, gradient="projected", targets=LAYERS)
    model, _, optimizer = attached(method)
    other = copy.deepcopy(model)
    loss_of(other, *batch(50)).backward()
    loss_of(model, *batch(0)).backward()
    optimizer.step()
    optimizer.zero_grad()
    alone, _, _ = train(method, 1)
    assert_same(model, alone, 1e-15)


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"residual": "fira"}, "never formed"), ({"rounding": "master"}, "no tensors of the optimizer")],
)
def test_what_needs_the_whole_gradient_or_the_weight_is_refused(fields: dict[str, str], says: str) -> None:
    with pytest.raises(rs.errors.ConfigError, match=says):
        GaLore(gradient="projected", **fields)  # type: ignore[arg-type]


def test_another_optimizer_is_refused() -> None:
    run = rs.attach(net(), GaLore(rank=3, gradient="projected", targets=LAYERS))
    with pytest.raises(rs.errors.ConfigError, match=r"run\.optimizer\(\)"):
        run.carry(torch.optim.AdamW([p for _, p in run.trainable()]))


def test_fused_backward_and_a_second_adapter_are_refused() -> None:
    run = rs.attach(net(), GaLore(rank=3, gradient="projected", targets=LAYERS, rest="freeze"))
    with pytest.raises(rs.errors.ConfigError, match="fused_backward"):
        run.optimizer(fused_backward=True)
    with pytest.raises(rs.errors.AttachError, match="stands alone"):
        run.add("second", rs.LoRA(rank=2, targets=("grow",)))


# ---- layers that begin one after the other ---------------------------------------------------------------------------


def test_layers_begin_one_after_the_other() -> None:
    """Never more than their share of whole gradients; who waits stands still; then it trains as from a first update."""
    model, run, optimizer = attached(GaLore(rank=3, every=0, begin=3, gradient="projected", targets=LAYERS[:4]))
    start, moved = weights(net()), []
    for step in range(6):
        loss_of(model, *batch(step)).backward()
        layers = run.adapter().values()
        assert sum(layer.listener.gradient is not None for layer in layers) <= 2  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad()
        moved.append({n for n in LAYERS[:4] if not torch.equal(weights(model)[f"{n}.weight"], start[f"{n}.weight"])})
    assert moved[0] == {"grow", "same"}
    assert moved[1] == {"grow", "same", "shrink"}
    assert moved[2] == set(LAYERS[:4])
    states = {name: optimizer.state[layer.subspace] for name, layer in run.adapter().items()}  # type: ignore[index]
    assert {name: int(state["step"]) for name, state in states.items()} == {
        "grow": 6, "same": 6, "shrink": 5, "transposed": 4
    }  # fmt: skip


def test_begin_belongs_to_projected() -> None:
    with pytest.raises(rs.errors.ConfigError, match='set gradient="projected"'):
        GaLore(begin=4)


def test_a_skipped_update_leaves_nothing_to_say(caplog: pytest.LogCaptureFixture) -> None:
    """Layers that were due had heard NaN; the next update renews them as if that had not been."""
    results = []
    for bad in (False, True):
        model, run, optimizer = attached(GaLore(rank=3, every=2, stagger=False, gradient="projected", targets=LAYERS))
        for step in range(5):
            if bad and step in (0, 2):
                (loss_of(model, *batch(step)) * float("nan")).backward()
                optimizer.step()
                optimizer.zero_grad()
            loss_of(model, *batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert run.skipped == 2 * bad
        results.append(weights(model))
    assert not [r for r in caplog.records if "put off" in r.message]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_layer_without_a_gradient_keeps_no_turn_from_others() -> None:
    """One that is never used, and one behind zeros, are first in line; the rest begins all the same."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.inner, self.outer, self.last = (nn.Linear(8, 8, bias=False) for _ in range(4))
            nn.init.zeros_(self.outer.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x + self.outer(torch.tanh(self.inner(x))))

    model = Late().to(F64)
    run = rs.attach(model, GaLore(rank=2, begin=4, rest="freeze", gradient="projected"))
    optimizer = run.optimizer(lr=1e-2, check_gradients=False)
    for step in range(8):
        x = torch.randn(6, 8, dtype=F64, generator=torch.Generator().manual_seed(step))
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    begun = {row.name: row.renewals for row in run.subspace_table().rows}
    assert begun == {"unused.weight": 0, "inner.weight": 1, "outer.weight": 1, "last.weight": 1}


def test_the_narrow_basis_is_that_of_the_last_renewal() -> None:
    """A bf16 weight moves inside the subspace of now, in every update."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16, bias=False, dtype=torch.bfloat16))
    method = GaLore(rank=2, every=2, side="in", stagger=False, gradient="projected", rounding="nearest", targets=("0",))
    run = rs.attach(model, method)
    optimizer = run.optimizer(lr=1.0)
    layer = run.adapter()["0"]
    assert isinstance(layer, ProjectedLayer)
    for step in range(6):
        before = model[0].weight.detach().double()
        x = torch.randn(40, 24, generator=torch.Generator().manual_seed(step)).bfloat16()
        (model(x).float() - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved, Q = model[0].weight.detach().double() - before, layer.basis.detach().double()
        outside = moved - moved @ Q @ Q.t()
        assert outside.norm() < 0.1 * moved.norm(), f"update {step}"
