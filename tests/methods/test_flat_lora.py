"""Flat-LoRA: the noise that the paper promises, where and when, by dense weights written down here."""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import rankshift as rs
from rankshift.methods.flat_lora import Noisy
from rankshift.ops.noise import reference

D = torch.float64


def layer(out: int = 6, into: int = 10, dtype: torch.dtype = D, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(into, out, bias, dtype=dtype)).train()


def mlp(dtype: torch.dtype = D) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 12, dtype=dtype), nn.Tanh(), nn.Linear(12, 6, dtype=dtype)).train()


def inputs(*shape: int, dtype: torch.dtype = D, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def stir(run: rs.Run, name: str = "default", size: float = 0.3) -> None:
    """Give every trained tensor values of its own, as training would, and open the window again."""
    gen = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for adapter in run.adapter(name).values():
            for leaf, parameter in adapter.named_parameters():
                if leaf in adapter.trains:
                    parameter += size * torch.randn(parameter.shape, generator=gen, dtype=D).to(parameter.dtype)
    run._driver.open_window()


def flat(model: nn.Module, sigma: float = 0.4, total: int | None = None, seed: int = 0, **fields: object) -> rs.Run:
    fields = {
        "rank": 2,
        "schedule": "constant",
        "targets": tuple(n for n, m in model.named_children() if len([*m.parameters()])),
    } | fields
    return rs.attach(model, rs.FlatLoRA(sigma=sigma, **fields), seed=seed, total_steps=total)  # type: ignore[arg-type]


def weight(run: rs.Run, site: str = "0") -> Tensor:
    """W + ΔW, dense."""
    return (run.sites[site].base.rows() + run.adapter()[site].delta()).detach()


def applied(model: nn.Module, site: str = "0") -> Tensor:
    """ε, (out, in), seen from outside: what training adds to a linear layer's output, input by input."""
    module = model.get_submodule(site)
    x = torch.eye(module.in_features, dtype=module.weight.dtype)
    with torch.no_grad():
        noisy = module.train()(x)
        clean = module.eval()(x)
    module.train()
    return (noisy - clean).t()


def step(model: nn.Module, opt: torch.optim.Optimizer, x: Tensor) -> float:
    loss = model(x).float().square().mean()
    loss.backward()
    opt.step(), opt.zero_grad()
    return loss.item()


# ---- the card's list of how a fake would cheat


def test_1_statistics_of_the_noise():
    """Row i has variance σ²‖W'_i‖²/in, W' with a large B: over 40 updates, within five standard errors."""
    model = layer(5, 300)
    run, sigma = flat(model, 0.2), 0.2
    with torch.no_grad():
        model[0].base.weight *= torch.tensor([0.1, 1, 2, 5, 0])[:, None]
    stir(run, size=1.0)
    norm = weight(run).norm(dim=1)
    assert (norm > 1.3 * model[0].base.weight.norm(dim=1)).all()  # W' is far from W
    draws = []
    for update in range(40):
        run._driver.step = update
        run._driver.open_window()
        draws.append(applied(model))
    z = torch.stack(draws) / (sigma * norm[:, None] / math.sqrt(300))
    count = 40 * 300
    assert ((z.square().mean((0, 2)) - 1).abs() < 5 * math.sqrt(2 / count)).all()
    assert (z.mean((0, 2)).abs() < 5 / math.sqrt(count)).all()
    assert (z.mean((0, 1)).std() * math.sqrt(40 * 5)).item() == pytest.approx(1, abs=0.2)  # no column stands out


@pytest.mark.parametrize("into", [64, 128, 256])
def test_1_the_outputs_variance_does_not_depend_on_the_width(into: int):
    """Var y grows by 1 + σ², whatever in is: ‖ε‖ ≈ σ‖W'‖."""
    model = layer(40, into, bias=False)
    flat(model, 0.3)
    epsilon, W = applied(model), model[0].base.weight
    assert (epsilon.norm() / W.norm()).item() == pytest.approx(0.3, rel=0.06)
    x = inputs(2000, into)
    with torch.no_grad():
        ratio = model(x).var() / (x @ W.t()).var()
    assert ratio.item() == pytest.approx(1 + 0.3**2, abs=0.03)


FIELDS = [
    {}, {"dora": True}, {"init": "pissa"}, {"init": "orthogonal"}, {"dora": True, "init": "olora"},
    {"scaling": "rslora"}, {"train": "B", "precondition": True}, {"lora_bias": True}, {"dropout": 0.4},
    {"forward_order": "f2", "backward_order": "b4"},
]  # fmt: skip


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_1_rows_have_the_norms_of_the_merged_weight(fields: dict):
    """To the bit of float64, for every variant of LoRA: v = σ/√in·‖W + ΔW‖ with ΔW dense."""
    model = layer()
    run = flat(model, 0.4, alpha=5, **fields)
    stir(run)
    adapter = run.adapter()["0"]
    want = 0.4 / math.sqrt(10) * weight(run).norm(dim=1)
    torch.testing.assert_close(adapter.v, want, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(want, 0.4 / math.sqrt(10) * model[0].base.weight.norm(dim=1), rtol=1e-2)
    epsilon = reference.noise(adapter.v, 10, adapter.word)
    if not fields.get("dropout"):
        torch.testing.assert_close(applied(model), epsilon, rtol=1e-10, atol=1e-12)


def test_2_without_sigma_it_is_lora():
    """Same bits over a training run, and no operation more."""
    ends = []
    for method in (rs.FlatLoRA(rank=2, sigma=0, targets=("0", "2")), rs.LoRA(rank=2, targets=("0", "2"))):
        model = mlp(torch.float32)
        run = rs.attach(model, method)
        opt = run.optimizer(lr=1e-2)  # asks for no total_steps
        losses = [step(model, opt, inputs(8, 10, dtype=torch.float32, seed=i)) for i in range(5)]
        ends.append((losses, {n: p.detach() for n, p in run.trainable()}))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(ends[0][1][n], p) for n, p in ends[1][1].items())


def test_3_the_schedule():
    """0 at the first update, σ/2 half way, σ at the end, never less than before; σ throughout if constant."""
    model = layer()
    run = flat(model, 0.4, total=8, schedule="cosine")
    x, norm = inputs(5, 10), model[0].base.weight.norm(dim=1)
    with torch.no_grad():
        assert torch.equal(model(x), model.eval()(x))  # the first update is plain LoRA
    model.train()
    sizes = []
    for update in range(12):
        run._driver.step = update
        run._driver.open_window()
        sizes.append((run.adapter()["0"].v * math.sqrt(10) / norm).mean().item())
        assert applied(model).any() == (update > 0)
    assert sizes[0] == 0
    assert sizes[4] == pytest.approx(0.2, rel=1e-12)
    assert sizes[8:] == [pytest.approx(0.4, rel=1e-12)] * 4  # past the end it stays
    assert all(a < b for a, b in itertools.pairwise(sizes[:9]))
    assert sizes[2] == pytest.approx(0.4 * 0.5 * (1 - math.cos(math.pi / 4)), rel=1e-12)


def test_3_a_schedule_needs_the_length_of_the_run():
    model = layer()
    run = flat(model, schedule="cosine")
    assert not applied(model).any()  # not known, not guessed
    with pytest.raises(rs.errors.ConfigError, match=r"FlatLoRA as configured follows a schedule over the whole run"):
        run.optimizer()
    run.total_steps = 10
    opt = run.optimizer()
    step(model, opt, inputs(4, 10))
    assert applied(model).any()


def digest(model: nn.Module) -> list[str]:
    """Hashes of the base's weights."""
    tensors = [p.detach() for n, p in model.named_parameters() if n.endswith(("base.weight", "base.bias"))]
    return [hashlib.sha256(t.view(torch.uint8).numpy().tobytes()).hexdigest() for t in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_4_the_base_does_not_drift_by_a_bit(dtype: torch.dtype):
    model = mlp(dtype)
    run = flat(model, 0.5)
    opt, before = run.optimizer(lr=1e-2), digest(model)
    assert len(before) == 4
    for update in range(6):
        loss = model(inputs(8, 10, dtype=dtype, seed=update)).float().square().mean()
        assert digest(model) == before  # also between forward and backward
        loss.backward()
        assert digest(model) == before
        opt.step(), opt.zero_grad()
        assert digest(model) == before
    assert applied(model).any()
    assert applied(model).dtype == dtype


def test_5_another_draw_for_every_update_layer_and_seed():
    """Uncorrelated, and again the same in another run of the same seed."""
    found: dict[tuple[int, int, str], Tensor] = {}
    for seed in (0, 0, 1):
        torch.manual_seed(seed + 17)  # no matter
        model = nn.Sequential(nn.Linear(40, 40, dtype=D), nn.Linear(40, 40, dtype=D)).train()
        run = flat(model, seed=seed)
        for update in range(3):
            run._driver.step = update
            run._driver.open_window()
            for site, adapter in run.adapter().items():
                z = reference.noise(torch.ones(40, dtype=D), 40, adapter.word)
                assert torch.equal(found.setdefault((seed, update, site), z), z)
    assert len(found) == 2 * 3 * 2
    for one, other in itertools.combinations(found.values(), 2):
        assert abs((one * other).mean().item()) < 5 / 40


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_6_gradients_are_those_of_a_constant_epsilon(fields: dict):
    """Two layers, so that the second's noise is in the gradient of the first; input gradient too."""
    model, x = mlp(), inputs(7, 10).requires_grad_()
    run = flat(model, 0.5, alpha=3, **fields)
    stir(run)
    adapters = run.adapter()
    bases = [copy.deepcopy(model[i].base.restore()) for i in (0, 2)]

    def dense(site: str, base: nn.Module, x: Tensor) -> Tensor:
        adapter = adapters[site]
        assert isinstance(adapter, Noisy)
        epsilon = reference.noise(adapter.v, x.shape[-1], adapter.word)
        shift = adapter.delta_bias()
        bias = base.bias if shift is None else base.bias + shift
        if fields.get("dropout"):  # the same mask, on the branch alone
            return F.linear(x, base.weight + epsilon, bias) + F.linear(F.dropout(x, 0.4), adapter.delta())
        return F.linear(x, base.weight + adapter.delta() + epsilon, bias)

    torch.manual_seed(5)
    torch.sin(model(x)).sum().backward()
    leaves = dict(run.trainable()) | {"x": x}
    got = {n: p.grad.clone() for n, p in leaves.items()}
    torch.manual_seed(5)
    y = dense("2", bases[1], torch.tanh(dense("0", bases[0], x)))
    want = dict(zip(leaves, torch.autograd.grad(torch.sin(y).sum(), list(leaves.values())), strict=True))
    for name in leaves:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-10, msg=lambda t, n=name: f"{n}: {t}")
    model.eval()
    clean = torch.autograd.grad(torch.sin(model(x)).sum(), list(leaves.values()))
    assert all((g - want[n]).norm() > 1e-2 * g.norm() for n, g in zip(leaves, clean, strict=True))


def test_6_one_draw_for_all_of_an_update():
    """Micro-batches, recomputation and a model that is called twice meet one ε; the next update another."""
    model, x = mlp(), inputs(8, 10)
    run = flat(model, 0.5)
    stir(run)
    opt = run.optimizer(lr=1e-3)

    def gradients(forward: Callable[[Tensor], Tensor], parts: int) -> list[Tensor]:
        for part in x.chunk(parts):
            forward(part).square().sum().backward()
        found = [p.grad.clone() for _, p in run.trainable()]
        opt.zero_grad()
        return found

    def again(x: Tensor) -> Tensor:
        torch.manual_seed(int(x.sum() * 1000) % 100)  # global state of its own
        return checkpoint(model, x, use_reentrant=False)

    want = gradients(model, 1)
    for found in (gradients(model, 4), gradients(again, 1), gradients(again, 2), gradients(model, 1)):
        for a, b in zip(want, found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    first = applied(model)
    step(model, opt, x)
    assert not torch.allclose(applied(model), first, rtol=0.1)


def test_7_the_step_holds_no_noise():
    """Kept for backward: what LoRA keeps, and the norms. Scratch is checked with the op."""
    kept: list[dict[int, int]] = []
    for method in (rs.LoRA, rs.FlatLoRA):
        model = layer(60, 80, torch.float32)
        fields = {} if method is rs.LoRA else {"schedule": "constant"}
        rs.attach(model, method(rank=2, targets="0", **fields))
        found: dict[int, int] = {}
        parameters = {p.data_ptr() for p in model.parameters()}

        def keep(t: Tensor, found: dict[int, int] = found, parameters: set[int] = parameters) -> Tensor:
            if t.data_ptr() not in parameters:
                found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        x = inputs(9, 80, dtype=torch.float32).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = model(x)  # noqa: F841
        kept.append(found)
    assert sum(kept[1].values()) - sum(kept[0].values()) == 60 * 4 + 8  # v and the key


def test_8_only_training_sees_it(tmp_path):
    model, x = mlp(torch.float32), inputs(5, 10, dtype=torch.float32)
    base = copy.deepcopy(model)
    run = flat(model, 0.5)
    stir(run)
    noisy = model(x)
    assert torch.equal(model(x), noisy)  # within an update nothing is drawn anew
    with torch.no_grad():  # the first pass of a reentrant checkpoint; LoRA may multiply in another order there
        torch.testing.assert_close(model(x), noisy, rtol=1e-5, atol=1e-5)
    clean = model.eval()(x)
    with torch.no_grad():
        twin = copy.deepcopy(base)
        for i in (0, 2):
            twin[i].weight += run.adapter()[str(i)].delta()
    torch.testing.assert_close(clean, twin(x), rtol=1e-5, atol=1e-6)
    assert (noisy - clean).abs().max() > 1e-2
    run.save(tmp_path / "run")
    run.export(tmp_path / "peft")
    assert torch.equal(rs.load(copy.deepcopy(base), tmp_path / "run").model.eval()(x), clean)
    model.train()
    with run.disabled():
        assert torch.equal(model(x), base(x))
    with run.merged() as merged:
        torch.testing.assert_close(merged(x), clean, rtol=1e-5, atol=1e-6)
    assert torch.equal(model(x), noisy)
    names = [name for name in run.state_dict()["tensors"] if not name.endswith((".A", ".B"))]
    assert not names  # a plain LoRA's state
    torch.testing.assert_close(run.merge().train()(x), clean, rtol=1e-5, atol=1e-6)


def test_8_an_exception_in_mid_update_leaves_nothing_behind():
    model, x = mlp(), inputs(5, 10)
    run = flat(model, 0.5)
    stir(run)
    opt, before = run.optimizer(lr=1e-2), digest(model)
    noisy, clean = model(x).detach(), model.eval()(x).detach()
    model.train()

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model[2].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()
    loss = model(x).square().sum()  # an epoch's leftover micro-batch: no step follows
    loss.backward()
    assert digest(model) == before
    assert torch.equal(model.eval()(x), clean)
    assert torch.equal(model.train()(x), noisy)  # the update goes on with the noise it had
    opt.step()
    assert digest(model) == before


def test_9_a_resumed_run_goes_on_with_the_noise_it_had():
    """Also into a model of another global state, and with the adapter as it is in mid-run."""
    model = mlp()
    run = flat(model, 0.5, total=6, schedule="cosine")
    opt = run.optimizer(lr=1e-2)
    for i in range(3):
        step(model, opt, inputs(8, 10, seed=i))
    state = copy.deepcopy(run.state_dict())
    torch.manual_seed(123)
    again = rs.restore(mlp(), state)
    for site, adapter in run.adapter().items():
        other = again.adapter()[site]
        assert torch.equal(adapter.v, other.v)
        assert torch.equal(adapter.word, other.word)
        assert adapter.v.all()
    assert torch.equal(model(inputs(4, 10)), again.model.train()(inputs(4, 10)))


def test_10_dropout_has_the_masks_it_would_have():
    """What is left after taking off x εᵀ is LoRA's output with the same masks, and the same global state after it."""
    x, left, states = inputs(6, 10), [], []
    for method in (
        rs.FlatLoRA(rank=2, dropout=0.5, schedule="constant", targets="0"),
        rs.LoRA(rank=2, dropout=0.5, targets="0"),
    ):
        model = layer()
        run = rs.attach(model, method)
        stir(run)
        torch.manual_seed(8)
        y = model(x).detach()
        states.append(torch.get_rng_state())
        adapter = run.adapter()["0"]
        noise = x @ reference.noise(adapter.v, 10, adapter.word).t() if isinstance(adapter, Noisy) else 0 * y
        left.append(y - noise)
    torch.testing.assert_close(left[0], left[1], rtol=1e-12, atol=1e-12)
    assert torch.equal(*states)


def test_11_the_minimum_is_flatter(shared):
    """Digits turned by 90°: under fresh row-scaled noise the loss rises less than after LoRA, summed over two seeds."""
    import numpy as np

    data = np.load(shared("data/images/digits8x8.npz"))
    x = torch.tensor(data["x"], dtype=torch.float32).reshape(-1, 8, 8) / 16
    y = torch.tensor(data["y"], dtype=torch.long)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    adam, gen = torch.optim.Adam(base.parameters(), 2e-3), torch.Generator().manual_seed(0)
    for _ in range(300):
        at = torch.randint(len(y), (64,), generator=gen)
        F.cross_entropy(base(x[at].flatten(1)), y[at]).backward()
        adam.step(), adam.zero_grad()
    turned, y = x.rot90(1, (1, 2)).flatten(1)[:1200], y[:1200]

    def rise(model: nn.Module, size: float = 0.2, draws: int = 20) -> float:
        gen, total = torch.Generator().manual_seed(9), 0.0
        clean = F.cross_entropy(model(turned), y).item()
        for _ in range(draws):
            other = copy.deepcopy(model)
            for m in other[::2]:
                epsilon = torch.randn(m.weight.shape, generator=gen)
                m.weight.data += size / math.sqrt(m.in_features) * m.weight.norm(dim=1, keepdim=True) * epsilon
            total += F.cross_entropy(other(turned), y).item() - clean
        return total / draws

    rises = {"lora": 0.0, "flat-lora": 0.0}
    options = {"rank": 8, "alpha": 16, "targets": ("0", "2", "4")}
    for seed, method in itertools.product((0, 1), (rs.LoRA(**options), rs.FlatLoRA(sigma=0.3, **options))):
        model = copy.deepcopy(base)
        run = rs.attach(model, method, seed=seed, total_steps=300)
        opt, gen = run.optimizer(lr=2e-3), torch.Generator().manual_seed(seed)
        for _ in range(300):
            at = torch.randint(len(y), (32,), generator=gen)
            F.cross_entropy(model(turned[at]), y[at]).backward()
            opt.step(), opt.zero_grad()
        with torch.no_grad():
            rises[method.name] += rise(run.merge().eval())
    assert rises["flat-lora"] < 0.85 * rises["lora"], rises


# ---- layer kinds, several adapters, refusals


def kinds() -> list[tuple[str, nn.Module, Tensor]]:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    made: list[tuple[str, nn.Module, Tensor]] = [
        ("linear", nn.Linear(4, 5), inputs(2, 3, 4)),
        ("gpt2 conv1d", Conv1D(5, 4), inputs(2, 3, 4)),
        ("conv1d", nn.Conv1d(3, 5, 3, padding=1, stride=2), inputs(2, 3, 8)),
        ("conv2d", nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), inputs(2, 3, 6, 5)),
        ("conv3d", nn.Conv3d(2, 5, 2, dilation=2), inputs(2, 2, 4, 5, 4)),
    ]
    made[1][1].weight.data.normal_(std=0.5)
    return [(name, module.double(), x) for name, module, x in made]


KINDS = kinds()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("name", "plain", "x"), KINDS, ids=[k[0] for k in KINDS])
def test_every_layer_kind(name: str, plain: nn.Module, x: Tensor, dora: bool):
    """Value and gradients of the layer that holds W' + ε."""
    model, free = nn.Sequential(copy.deepcopy(plain)).train(), copy.deepcopy(plain)
    run = flat(model, 0.5, dora=dora)
    stir(run)
    adapter, form = run.adapter()["0"], run.sites["0"].spec.form
    W = weight(run)
    torch.testing.assert_close(adapter.v, 0.5 / math.sqrt(W.shape[1]) * W.norm(dim=1), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        free.weight.copy_(form.stored(W + reference.noise(adapter.v, W.shape[1], adapter.word)))
    mine, twin = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, want = model(mine), free(twin)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    torch.sin(y).sum().backward(), torch.sin(want).sum().backward()
    torch.testing.assert_close(mine.grad, twin.grad, rtol=1e-10, atol=1e-10)
    if not dora:
        G = form.matrix(free.weight.grad)
        torch.testing.assert_close(adapter.B.grad, adapter.scale * G @ adapter.A.t(), rtol=1e-10, atol=1e-10)


def test_two_of_them_draw_once():
    """The innermost that acts draws, on the weight with its own change; the other, alone, draws as if it were alone."""
    model = layer()
    run = flat(model, 0.5)
    run.add("second", rs.FlatLoRA(rank=3, sigma=0.2, schedule="constant", targets="0"))
    stir(run), stir(run, "second")
    W, first, second = model[0].base.weight.detach(), *(run.adapter(n)["0"].delta().detach() for n in run.adapters)

    def size(sigma: float, W: Tensor) -> None:
        word = run.adapter(run.active[0])["0"].word
        epsilon = reference.noise(sigma / math.sqrt(10) * W.norm(dim=1), 10, word)
        torch.testing.assert_close(applied(model), epsilon, rtol=1e-10, atol=1e-12)

    run.use("default")
    size(0.5, W + first)
    run.use("default", "second")
    size(0.5, W + first)
    run.use("second", "default")
    size(0.2, W + second)
    run.use("second")
    size(0.2, W + second)


def test_beside_other_methods():
    """A LoRA below belongs to the weight; one above is not the adapter's to know. σ = 0 below draws nothing."""
    model = layer()
    run = flat(model, 0.5)
    run.add("plain", rs.LoRA(rank=3, targets="0"))
    run.add("zero", rs.FlatLoRA(rank=1, sigma=0, targets="0"))
    stir(run), stir(run, "plain"), stir(run, "zero")
    W = model[0].base.weight.detach()
    change = {n: run.adapter(n)["0"].delta().detach() for n in run.adapters}
    for names, merged in {
        ("default", "plain"): W + change["default"],
        ("plain", "default"): W + change["plain"] + change["default"],
        ("zero", "default"): W + change["zero"] + change["default"],
    }.items():
        run.use(*names)
        adapter = run.adapter()["0"]
        torch.testing.assert_close(adapter.v, 0.5 / math.sqrt(10) * merged.norm(dim=1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(applied(model), reference.noise(adapter.v, 10, adapter.word), rtol=1e-10, atol=1e-12)
    run.use("plain")
    assert not applied(model).any()


def test_an_adapter_that_did_not_act_is_not_behind():
    """Switched to in mid-run it draws for the update that comes, not for its last one."""
    model = layer()
    run = flat(model, 0.5)
    run.add("second", rs.FlatLoRA(rank=3, sigma=0.2, schedule="constant", targets="0"))
    opt = run.optimizer(lr=1e-2)
    for i in range(3):
        step(model, opt, inputs(8, 10, seed=i))
    word = run.adapter()["0"].word.clone()
    run.use("second")
    assert torch.equal(run.adapter("second")["0"].word, word)  # key of seed, layer and step
    assert run.adapter("second")["0"].v.all()


def test_what_it_refuses():
    with pytest.raises(rs.errors.UnsupportedLayer, match=r"0 is an Embedding: it looks up columns and sums over none"):
        rs.attach(nn.Sequential(nn.Embedding(9, 5)), rs.FlatLoRA(rank=2, targets="0"))

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 8, 12))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.up.mT)

    with pytest.raises(
        rs.errors.UnsupportedLayer, match=r"0.up is a stack of expert weights.* noise that is drawn again"
    ):
        rs.attach(nn.Sequential(Experts()), rs.FlatLoRA(rank=2, targets="0.up"))
    for sigma in (-0.1, math.nan, math.inf):
        with pytest.raises(rs.errors.ConfigError, match=r"FlatLoRA.sigma = .* is no size of noise"):
            rs.FlatLoRA(sigma=sigma)
    with pytest.raises(rs.errors.ConfigError, match=r"schedule = 'cosin' is not one of 'cosine', 'constant'. Did you"):
        rs.FlatLoRA(schedule="cosin")  # type: ignore[arg-type]
    with pytest.raises(rs.errors.ConfigError, match=r"LoRA rank 0"):
        rs.FlatLoRA(rank=0)


def test_narrow_layers_and_autocast():
    """Noise in the dtype of the layer's product, ε as it is in float64."""
    epsilons = []
    for dtype in (D, torch.bfloat16, torch.float32):
        model = layer(6, 40, dtype)
        model[0].weight.data.copy_(inputs(6, 40).bfloat16())
        run = flat(model, 0.5)
        assert run.adapter()["0"].v.dtype == torch.promote_types(dtype, torch.float32)
        adapter = run.adapter()["0"]
        epsilons.append(reference.noise(adapter.v, 40, adapter.word).double())
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
            y = model(inputs(3, 40, dtype=dtype))
        assert y.dtype == (dtype if dtype is D else torch.bfloat16)
        W = model[0].base.weight.double() + epsilons[-1]
        want = inputs(3, 40, dtype=dtype).double() @ W.t() + model[0].base.bias.double()
        assert ((y.double() - want).norm() / want.norm()) < (1e-12 if dtype is D else 2**-6)
    for epsilon in epsilons[1:]:
        assert (epsilon - epsilons[0]).norm() < 1e-5 * epsilons[0].norm()
