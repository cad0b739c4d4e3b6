"""LoRA and its variants: the properties the papers promise, by formulas written down here and by PEFT."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional as F

import rankshift as rs
from rankshift.methods.lora import LoRALayer

peft = pytest.importorskip("peft")
D = torch.float64
KAIMING_LIKE = ("kaiming", "gaussian")
INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora")


def mlp(bias: bool = True, dtype: torch.dtype = D) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 12, bias, dtype=dtype), nn.Tanh(), nn.Linear(12, 6, bias, dtype=dtype))


def inputs(*shape: int, dtype: torch.dtype = D) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def stir(run: rs.Run, name: str = "default") -> None:
    """Give every trained tensor of an adapter values of its own, as training would."""
    gen = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for adapter in run.adapter(name).values():
            for parameter in adapter.parameters():
                if parameter.requires_grad:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=gen, dtype=D).to(parameter.dtype)


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=30
    )
    return tf.LlamaForCausalLM(config)


# ---- the card's list of how a fake would cheat


@pytest.mark.parametrize("dtype", [D, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", KAIMING_LIKE)
@pytest.mark.parametrize("dora", [False, True])
def test_1_it_starts_as_the_base(dtype: torch.dtype, init: str, dora: bool):
    model, x = mlp(dtype=dtype), inputs(3, 4, 10, dtype=dtype)
    before = model(x)
    run = rs.attach(model, rs.LoRA(rank=2, init=init, dora=dora))  # type: ignore[arg-type]
    if dora:  # μ/‖W‖ is 1 up to rounding
        torch.testing.assert_close(model(x), before, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    else:
        assert torch.equal(model(x), before)
    A = {n: a.A.detach().clone() for n, a in run.adapter().items()}
    B = {n: a.B.detach().clone() for n, a in run.adapter().items()}
    sgd = torch.optim.SGD([p for _, p in run.trainable()], lr=0.1)
    model(x).float().square().sum().backward()
    sgd.step()
    for name, adapter in run.adapter().items():
        assert torch.equal(adapter.A, A[name])
        assert not torch.equal(adapter.B, B[name])


@pytest.mark.parametrize("init", ["orthogonal", "pissa", "olora"])
def test_1_other_starts_preserve_the_function(init: str):
    model, x = mlp(), inputs(5, 10)
    before, bits = model(x), [p.detach().clone() for p in model.parameters()]
    run = rs.attach(model, rs.LoRA(rank=2, init=init))  # type: ignore[arg-type]
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    model(x).square().sum().backward()
    for adapter in run.adapter().values():  # and both factors move in the first step
        assert adapter.A.grad.norm() > 0
        assert adapter.B.grad.norm() > 0
    with run.disabled():
        assert torch.equal(model(x), before)
    assert all(torch.equal(p, b) for p, b in zip(run.detach().parameters(), bits, strict=True))


@pytest.mark.parametrize("shape", [(10,), (7, 10), (2, 3, 10), (2, 1, 3, 10), (0, 10), (1, 10)])
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_2_gradients_are_those_of_the_dense_weight(shape: tuple[int, ...], scaling: str):
    """dB = s·G·Aᵀ and dA = s·Bᵀ·G with G of an unfrozen copy that holds W + s·B·A; dx through that weight."""
    free = nn.Linear(10, 6, dtype=D)
    model = nn.Sequential(copy.deepcopy(free))
    run = rs.attach(model, rs.LoRA(rank=3, alpha=5, targets="0", scaling=scaling))  # type: ignore[arg-type]
    stir(run)
    adapter = run.adapter()["0"]
    s = 5 / 3 if scaling == "standard" else 5 / math.sqrt(3)
    with torch.no_grad():
        free.weight += s * adapter.B @ adapter.A
    x, twin = inputs(*shape).requires_grad_(), inputs(*shape).requires_grad_()
    y, want = model(x), free(twin)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    torch.sin(y).sum().backward()
    torch.sin(want).sum().backward()
    G = free.weight.grad
    torch.testing.assert_close(adapter.B.grad, s * G @ adapter.A.t(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(adapter.A.grad, s * adapter.B.t() @ G, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fields", [{}, {"init": "pissa"}, {"dora": True}, {"train": "B"}, {"dropout": 0.2}])
def test_3_the_base_is_not_touched(fields: dict):
    model = mlp(dtype=torch.float32)
    bits = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = rs.attach(model, rs.LoRA(rank=2, **fields))
    opt = run.optimizer(lr=0.1)
    counted = sum(p.numel() for group in opt.param_groups for p in group["params"])
    per_layer = {"A": 2 * 10 + 2 * 12, "B": 2 * 12 + 2 * 6}
    want = per_layer["B"] if fields.get("train") == "B" else sum(per_layer.values())
    assert counted == want + (12 + 6 if "dora" in fields else 0)
    for _ in range(4):
        model(inputs(5, 10, dtype=torch.float32)).square().sum().backward()
        opt.step()
        opt.zero_grad()
    for site in run.sites.values():
        assert site.base.weight.grad is None
        assert site.base.bias.grad is None
    stepped = run.detach()
    assert {n for n, _ in stepped.named_parameters()} == set(bits)
    assert all(torch.equal(p, bits[n]) for n, p in stepped.named_parameters())


VARIANTS = [
    *({"init": init} for init in INITS), {"scaling": "rslora"}, {"dora": True}, {"dora": True, "init": "pissa"},
    {"train": "B"}, {"train": "A", "init": "orthogonal"}, {"lora_bias": True}, {"bias": "lora_only"}, {"bias": "all"},
    {"rank_pattern": {"2": 4}, "alpha_pattern": {"0": 3.0}}, {"dropout": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_4_merging_keeps_the_function(fields: dict):
    model, x = mlp(), inputs(2, 5, 10)
    run = rs.attach(model, rs.LoRA(rank=2, alpha=3, **fields))
    stir(run)
    model.eval()
    adapted = model(x)
    bits = {n: s.base.weight.detach().clone() for n, s in run.sites.items()}
    with run.merged() as merged:
        torch.testing.assert_close(merged(x), adapted, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(s.base.weight, bits[n]) for n, s in run.sites.items())
    assert torch.equal(model(x), adapted)
    plain = run.merge()
    torch.testing.assert_close(plain(x), adapted, rtol=1e-10, atol=1e-10)
    assert [type(m) for m in plain.modules()] == [type(m) for m in mlp().modules()]
    with pytest.raises(rs.errors.AttachError, match=r"ended with merge"):
        run.merge()


def test_5_two_adapters_add():
    model, x = mlp()[:1], inputs(4, 10)
    base = model(x).detach()
    run = rs.attach(model, rs.LoRA(rank=2, targets="0"))
    run.add("second", rs.LoRA(rank=3, alpha=1, targets="0"))
    stir(run), stir(run, "second")
    outputs = {}
    for names in (("default",), ("second",), ("default", "second")):
        run.use(*names)
        outputs[names] = model(x).detach()
    both = outputs["default", "second"] - base
    torch.testing.assert_close(both, (outputs["default",] - base) + (outputs["second",] - base), rtol=1e-12, atol=1e-12)
    with run.disabled():
        assert torch.equal(model(x), base)
    run.use("default")
    frozen = [p.detach().clone() for p in run.adapter("second")["0"].parameters()]
    opt = run.optimizer(lr=0.1)
    model(x).square().sum().backward()
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(run.adapter("second")["0"].parameters(), frozen, strict=True))
    assert torch.equal(model[0].base.weight, mlp()[0].weight)


def test_6_scales():
    """alpha doubled doubles ΔY; rsLoRA is √r times standard."""
    x, base = inputs(4, 10), mlp()[:1]

    def change(**fields: object) -> Tensor:
        model = mlp()[:1]
        run = rs.attach(model, rs.LoRA(rank=4, targets="0", **fields))  # type: ignore[arg-type]
        stir(run)
        return model(x).detach() - base(x).detach()

    one = change(alpha=3)
    torch.testing.assert_close(change(alpha=6), 2 * one, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(change(alpha=3, scaling="rslora"), 2 * one, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(change(alpha=3, alpha_pattern={"0": 1.5}), 0.5 * one, rtol=1e-12, atol=1e-12)


def test_7_dropout_is_on_the_branch_alone():
    model, x = mlp(dtype=torch.float32)[:1], inputs(8, 10, dtype=torch.float32)
    base = model(x).detach()
    run = rs.attach(model, rs.LoRA(rank=2, targets="0", dropout=0.5))
    torch.manual_seed(0)
    assert torch.equal(model(x), base)  # B = 0: the base path is exact whatever is dropped
    stir(run)
    model.eval()
    plain = model(x).detach()
    assert torch.equal(model(x), plain)
    model.train()
    draws = torch.stack([model(x).detach() for _ in range(4000)])
    spread = draws.std(0) / math.sqrt(len(draws))
    assert (spread > 0).all()
    assert ((draws.mean(0) - plain).abs() < 5 * spread + 1e-6).all()
    # what is dropped is an input of the branch, scaled by 1/(1−p): with one input its change is 0 or doubled
    one = torch.zeros(1, 10)
    one[0, 3] = 1
    off = model[0].base(one).detach()
    model.eval()
    full = model(one).detach() - off
    model.train()
    for _ in range(20):
        change = model(one).detach() - off
        assert torch.allclose(change, 2 * full, atol=1e-6) or torch.equal(change, torch.zeros_like(change))


def test_7_dropout_gradients_use_the_same_mask():
    model, x = mlp()[:1], inputs(3, 10)
    run = rs.attach(model, rs.LoRA(rank=2, alpha=2, targets="0", dropout=0.4))
    stir(run)
    adapter = run.adapter()["0"]
    torch.manual_seed(5)
    model(x).sum().backward()
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.4)
    G = torch.ones(3, 12, dtype=D).t() @ dropped
    torch.testing.assert_close(adapter.B.grad, G @ adapter.A.t(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(adapter.A.grad, adapter.B.t() @ G, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("init", INITS)
def test_9_the_rank_of_the_change(init: str):
    run = rs.attach(mlp(), rs.LoRA(rank=2, init=init, targets="0"))  # type: ignore[arg-type]
    stir(run)
    singular = torch.linalg.svdvals(run.adapter()["0"].delta().detach())
    bound = 4 if init in ("pissa", "olora") else 2  # an anchored start is exported as rank 2r
    assert (singular[bound:] < 1e-12 * singular[0]).all()
    assert singular[1] > 1e-3
    low = run.adapter()["0"].low_rank()
    assert low is not None
    assert low[0].shape[0] == bound
    torch.testing.assert_close(low[1] @ low[0], run.adapter()["0"].delta().detach(), rtol=1e-12, atol=1e-12)


def test_9_lora_plus_groups():
    """Under Adam's first step, which moves every entry by lr, B moves lr_ratio times as far as A."""
    model = mlp()
    run = rs.attach(model, rs.LoRA(rank=2, init="orthogonal", lr_ratio=16))
    before = {n: p.detach().clone() for n, p in run.trainable()}
    opt = run.optimizer(lr=1e-4)
    assert sorted(group["lr"] for group in opt.param_groups) == pytest.approx([1e-4, 16e-4])
    model(inputs(6, 10)).square().sum().backward()
    opt.step()
    moved = {n: (p.detach() - before[n]).abs().median().item() for n, p in run.trainable()}
    for name, distance in moved.items():
        assert distance == pytest.approx(16e-4 if name.endswith(".B") else 1e-4, rel=1e-3)


# ---- starting points


def test_starting_points():
    """A and B as the papers define them."""
    W = mlp()[0].weight.detach()

    def start(init: str, rank: int = 4) -> LoRALayer:
        adapter = rs.attach(mlp(), rs.LoRA(rank=rank, alpha=6, targets="0", init=init)).adapter()["0"]  # type: ignore[arg-type]
        assert isinstance(adapter, LoRALayer)
        return adapter

    kaiming, gaussian = start("kaiming"), start("gaussian")
    assert kaiming.A.abs().max() <= 1 / math.sqrt(10)
    assert kaiming.A.abs().max() > 0.9 / math.sqrt(10)
    assert gaussian.A.std().item() == pytest.approx(1 / 4, rel=0.4)
    for adapter in (kaiming, gaussian):
        assert not adapter.B.any()
    orthogonal = start("orthogonal")
    assert (orthogonal.B @ orthogonal.A).abs().max() < 1e-14
    assert torch.linalg.matrix_rank(orthogonal.A) == torch.linalg.matrix_rank(orthogonal.B) == 2

    s = 6 / 4
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    pissa = start("pissa")
    torch.testing.assert_close(s * pissa.B @ pissa.A, U[:, :4] * S[:4] @ Vh[:4], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(pissa.A @ pissa.A.t(), torch.diag(S[:4] / s), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(pissa.B.t() @ pissa.B, torch.diag(S[:4] / s), rtol=1e-10, atol=1e-10)
    olora = start("olora")
    Q, R = torch.linalg.qr(W)
    torch.testing.assert_close(olora.B @ olora.A, Q[:, :4] @ R[:4], rtol=1e-10, atol=1e-10)
    assert olora.B.norm().item() == pytest.approx(math.sqrt(4))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_anchored_starts_train_as_pefts(init: str):
    """PEFT subtracts the start from W; the anchor here does it without. Same function, same gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 12, dtype=torch.float32))
    config = peft.LoraConfig(r=3, lora_alpha=4, target_modules=["0"], init_lora_weights=init)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    run = rs.attach(model, rs.LoRA(rank=3, alpha=4, targets="0", init=init))  # type: ignore[arg-type]
    x = inputs(8, 10, dtype=torch.float32)
    ours = run.adapter()["0"]
    layer = theirs.base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    sgd = [torch.optim.SGD([ours.A, ours.B], 0.05), torch.optim.SGD([A, B], 0.05)]
    for _ in range(5):
        y, want = model(x), theirs(x)
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
        y.square().mean().backward(), want.square().mean().backward()
        torch.testing.assert_close(ours.A.grad.abs(), A.grad.abs(), rtol=1e-3, atol=1e-4)  # signs of an SVD are free
        torch.testing.assert_close(ours.B.grad.abs(), B.grad.abs(), rtol=1e-3, atol=1e-4)
        for opt in sgd:
            opt.step(), opt.zero_grad()


def test_seeds():
    """Same seed, same start; another seed or layer, another. Global random state is left alone."""
    torch.manual_seed(3)
    state = torch.get_rng_state()
    starts = [rs.attach(mlp_like, rs.LoRA(rank=2), seed=seed).adapter() for mlp_like, seed in _three()]
    torch.set_rng_state(state)
    assert torch.equal(starts[0]["0"].A, starts[1]["0"].A)
    assert not torch.equal(starts[0]["0"].A, starts[2]["0"].A)
    assert not torch.equal(starts[0]["0"].A[:, :10], starts[0]["2"].A[:, :10])


def test_layers_and_adapters_of_one_shape_start_apart():
    run = rs.attach(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), rs.LoRA(rank=2, targets=("0", "1")))
    run.add("second", rs.LoRA(rank=2, targets=("0", "1")))
    starts = [adapter.A for name in ("default", "second") for adapter in run.adapter(name).values()]
    assert len(starts) == 4
    for one, other in itertools.combinations(starts, 2):
        assert not torch.equal(one, other)


def test_a_model_in_eval_gets_adapters_in_eval():
    """Dropout stays off until model.train(), as it does in the model's own layers."""
    model, x = mlp().eval(), inputs(4, 10)
    run = rs.attach(model, rs.LoRA(rank=2, dropout=0.5))
    stir(run)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def _three():
    models = [mlp(), mlp(), mlp()]
    before = torch.get_rng_state()
    yield from zip(models, (0, 0, 1), strict=True)
    assert torch.equal(torch.get_rng_state(), before)


# ---- patterns, biases, copies


def test_patterns():
    model = llama()
    method = rs.LoRA(
        rank=4, alpha=8, rank_pattern={"*_proj": 3, "q_proj": 2, "layers.1.mlp.up_proj": 5}, alpha_pattern={"v_proj": 6}
    )
    adapters = rs.attach(model, method).adapter()
    assert adapters["model.layers.0.self_attn.q_proj"].rank == 2
    assert adapters["model.layers.0.self_attn.k_proj"].rank == 3
    assert adapters["model.layers.0.mlp.up_proj"].rank == 3
    assert adapters["model.layers.1.mlp.up_proj"].rank == 5
    scales = {n: a.scale for n, a in adapters.items()}
    assert scales["model.layers.0.self_attn.q_proj"] == 8 / 2
    assert scales["model.layers.0.self_attn.v_proj"] == 6 / 3


def test_rank_too_large():
    model = llama()
    with pytest.raises(
        rs.errors.RankTooLarge, match=r"rank 20 at model.layers.0.self_attn.q_proj exceeds min\(out, in\) = 16"
    ):
        rs.attach(model, rs.LoRA(rank=20))
    rs.attach(model, rs.LoRA(rank=20, rank_pattern={"*": 16}))


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_biases(bias: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    x = torch.randn(5, 10)
    before, bits = model(x).detach(), {n: p.detach().clone() for n, p in model.named_parameters()}
    run = rs.attach(model, rs.LoRA(rank=2, targets="0", bias=bias))  # type: ignore[arg-type]
    trained = {n for n, _ in run.trainable()} - {"0.A", "0.B"}
    assert trained == {"none": set(), "lora_only": {"0.bias"}, "all": {"0.bias", "1.bias", "2.bias"}}[bias]
    opt = run.optimizer(lr=0.1)
    for _ in range(2):
        model(x).square().sum().backward()
        opt.step()
        opt.zero_grad()
    with run.disabled():
        assert torch.equal(model(x), before)
    assert not torch.equal(model(x), before)
    moved = {n for n, p in run.detach().named_parameters() if not torch.equal(p, bits[n])}
    assert moved == set()


def test_biases_that_a_task_never_reaches():
    """With bias="all" they may stay without a gradient; a bias of an adapted layer must have one."""

    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(10, 8), nn.Linear(10, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    def one_step(method: rs.LoRA) -> rs.Run:
        run = rs.attach(model := Partly(), method)
        opt = run.optimizer(lr=0.1)
        model(torch.randn(5, 10)).square().sum().backward()
        opt.step()
        assert opt.param_groups[0]["updates"] == 1
        return run

    run = one_step(rs.LoRA(rank=2, targets="used", bias="all"))
    assert {"used.bias", "unused.bias"} <= dict(run.trainable()).keys()
    assert rs.LoRA(bias="lora_only").must_learn("unused.bias")


def test_bias_gradient():
    free, x = mlp()[0], inputs(4, 10)
    model = nn.Sequential(copy.deepcopy(free))
    run = rs.attach(model, rs.LoRA(rank=2, targets="0", bias="lora_only"))
    torch.sin(model(x)).sum().backward()
    torch.sin(free(x)).sum().backward()
    torch.testing.assert_close(run.sites["0"].base.bias.grad, free.bias.grad, rtol=1e-12, atol=1e-12)


def test_lora_bias():
    """y = W x + s·(B(A x) + b), as PEFT's lora_bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 6))
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], lora_bias=True)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    run = rs.attach(model, rs.LoRA(rank=2, alpha=3, targets="0", lora_bias=True))
    stir(run)
    ours, layer = run.adapter()["0"], theirs.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(ours.A)
        layer.lora_B["default"].weight.copy_(ours.B)
        layer.lora_B["default"].bias.copy_(ours.b)
    x = torch.randn(4, 10)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-6)
    model(x).square().sum().backward(), theirs(x).square().sum().backward()
    torch.testing.assert_close(ours.b.grad, layer.lora_B["default"].bias.grad, rtol=1e-5, atol=1e-5)


def test_lora_bias_without_a_bias_is_not_half_merged():
    model = nn.Sequential(nn.Linear(10, 12, bias=True), nn.Linear(12, 6, bias=False))
    run = rs.attach(model, rs.LoRA(rank=2, targets=("0", "1"), lora_bias=True))
    stir(run)
    bits = [s.base.weight.detach().clone() for s in run.sites.values()]
    with pytest.raises(
        rs.errors.AttachError, match=r"1 has no bias to merge the adapter's bias into. Nothing was merged"
    ):
        run.merge()
    assert all(torch.equal(s.base.weight, b) for s, b in zip(run.sites.values(), bits, strict=True))
    assert model(torch.randn(2, 10)).shape == (2, 6)


def test_modules_to_save():
    """A whole copy trains beside the adapters; the original stays, and merge puts the copy in its place."""
    torch.manual_seed(0)
    config = tf.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=20
    )
    model = tf.BertForSequenceClassification(config).eval()
    ids = torch.arange(12).reshape(2, 6)
    before, head = model(ids).logits, model.classifier.weight.detach().clone()
    run = rs.attach(model, rs.LoRA(rank=2, modules_to_save=("classifier",)))
    assert "classifier.weight" in dict(run.trainable())
    assert torch.equal(model(ids).logits, before)
    opt = run.optimizer(lr=0.1)
    model.train()
    model(ids, labels=torch.tensor([0, 1])).loss.backward()
    opt.step()
    model.eval()
    adapted = model(ids).logits
    with run.disabled():
        assert torch.equal(model(ids).logits, before)
    merged = run.merge()
    assert type(merged.classifier) is nn.Linear
    assert not torch.equal(merged.classifier.weight, head)
    torch.testing.assert_close(merged(ids).logits, adapted, rtol=1e-5, atol=1e-6)
    with pytest.raises(rs.errors.UnmatchedTarget, match=r"modules_to_save 'clasifier' matches no module.*'classifier'"):
        rs.attach(merged, rs.LoRA(rank=2, modules_to_save=("clasifier",)))


def test_a_whole_module_answers_for_itself():
    """Model code asks the embedding that it is given for its sizes."""
    model = llama()
    rs.attach(model, rs.LoRA(rank=2, modules_to_save=("embed_tokens",)))
    table = model.get_input_embeddings()
    assert (table.num_embeddings, table.embedding_dim) == (30, 16)
    with pytest.raises(AttributeError, match=r"no_such_thing"):
        _ = table.no_such_thing
    assert copy.deepcopy(table).num_embeddings == 30


def test_full_says_that_it_takes_names():
    with pytest.raises(rs.errors.ConfigError, match=r'Full\(targets="all-linear"\).*Use "all", or name'):
        rs.Full(targets="all-linear")


# ---- LoRA-FA


def test_lora_fa_trains_b_alone():
    model = mlp()
    run = rs.attach(model, rs.LoRA(rank=2, train="B"))
    assert {n.rpartition(".")[2] for n, _ in run.trainable()} == {"B"}
    A = {n: a.A.detach().clone() for n, a in run.adapter().items()}
    opt = run.optimizer(lr=0.1)
    for _ in range(3):
        model(inputs(5, 10)).square().sum().backward()
        opt.step()
        opt.zero_grad()
    assert all(torch.equal(a.A, A[n]) for n, a in run.adapter().items())
    assert all(a.B.norm() > 0 for a in run.adapter().values())


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_lora_fa_precondition(scaling: str):
    """ĝ = s⁻² g (A Aᵀ)⁻¹: under plain SGD, s·ΔB·A is −lr times G projected on the rows of A."""
    free, x = mlp()[0], inputs(7, 10)
    model = nn.Sequential(copy.deepcopy(free))
    method = rs.LoRA(rank=3, alpha=5, targets="0", train="B", precondition=True, scaling=scaling)  # type: ignore[arg-type]
    run = rs.attach(model, method)
    adapter = run.adapter()["0"]
    sgd = torch.optim.SGD([adapter.B], 0.1)
    run.carry(sgd)
    torch.sin(model(x)).sum().backward()
    torch.sin(free(x)).sum().backward()
    g, A, s = adapter.B.grad.clone(), adapter.A.detach(), adapter.scale
    sgd.step()
    torch.testing.assert_close(adapter.B.grad, g @ torch.linalg.inv(A @ A.t()) / s**2, rtol=1e-6, atol=1e-9)
    projector = A.t() @ torch.linalg.inv(A @ A.t()) @ A
    torch.testing.assert_close(adapter.delta(), -0.1 * free.weight.grad @ projector, rtol=1e-6, atol=1e-9)


def test_lora_fa_precondition_of_sharded_experts(monkeypatch: pytest.MonkeyPatch):
    """A rank that holds experts 1 and 2 of 4 corrects their gradients with their own A Aᵀ."""
    from types import SimpleNamespace

    from rankshift.core import shard
    from rankshift.methods.lora import Precondition

    whole = inputs(4, 6, 2)
    run = rs.attach(mlp(), rs.LoRA(rank=2, alpha=3, targets="0", train="B", precondition=True))
    adapter = run.adapter()["0"]
    A = inputs(4, 2, 10)
    adapter.A, adapter.B = nn.Parameter(A, False), nn.Parameter(torch.zeros_like(whole))
    adapter.B.grad = whole.clone()
    monkeypatch.setattr(shard, "local", lambda tensor: (tensor[1:3], slice(1, 3)))
    Precondition().apply(adapter, SimpleNamespace())  # type: ignore[arg-type]
    want = whole[1:3] @ torch.linalg.inv(A[1:3] @ A[1:3].mT) / 1.5**2
    torch.testing.assert_close(adapter.B.grad[1:3], want, rtol=1e-5, atol=1e-9)
    assert torch.equal(adapter.B.grad[[0, 3]], whole[[0, 3]])


# ---- layer kinds


def kinds() -> list[tuple[str, nn.Module, Tensor]]:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    gen = torch.Generator().manual_seed(3)
    made: list[tuple[str, nn.Module, Tensor]] = [
        ("linear", nn.Linear(6, 5), torch.randn(3, 6, generator=gen)),
        ("gpt2 conv1d", Conv1D(5, 6), torch.randn(2, 3, 6, generator=gen)),
        ("embedding", nn.Embedding(9, 5, padding_idx=2), torch.randint(0, 9, (3, 4), generator=gen)),
    ]
    made[1][1].weight.data.normal_(std=0.5)
    for dims, (stride, padding, dilation, mode) in itertools.product(
        (1, 2, 3), [(1, 0, 1, "zeros"), (2, 1, 1, "zeros"), (1, 1, 2, "circular"), (1, "same", 1, "reflect")]
    ):
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        layer = kind(3, 5, 3, stride=stride, padding=padding, dilation=dilation, padding_mode=mode)
        made.append((f"conv{dims}d {mode} {padding}", layer, torch.randn(2, 3, *(6, 5, 5)[:dims], generator=gen)))
    return [(name, layer.double(), x.double() if x.is_floating_point() else x) for name, layer, x in made]


KINDS = kinds()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("name", "layer", "x"), KINDS, ids=[k[0] for k in KINDS])
def test_every_layer_kind(name: str, layer: nn.Module, x: Tensor, dora: bool):
    """Value, input gradient and factor gradients equal those of an unfrozen layer that holds W + s·B·A (or DoRA's)."""
    if dora and name == "embedding":
        with pytest.raises(rs.errors.UnsupportedLayer, match=r"DoRA at 0"):
            rs.attach(nn.Sequential(copy.deepcopy(layer)), rs.LoRA(rank=2, targets="0", dora=True))
        return
    free = copy.deepcopy(layer).requires_grad_()
    model = nn.Sequential(copy.deepcopy(layer))
    run = rs.attach(model, rs.LoRA(rank=2, alpha=3, targets="0", dora=dora))
    stir(run)
    adapter, form = run.adapter()["0"], run.sites["0"].spec.form
    if name == "embedding":
        adapter.A.data[:, layer.padding_idx] = 0  # where it starts and, without a gradient, stays
    W0, s = form.matrix(layer.weight).detach(), 1.5
    A, B = adapter.A.detach(), adapter.B.detach()
    V = W0 + s * B @ A
    gain = adapter.magnitude.detach() / V.norm(dim=1) if dora else torch.ones(W0.shape[0], dtype=D)
    with torch.no_grad():
        free.weight.copy_(form.stored(gain[:, None] * V))
    x = x.clone().requires_grad_(x.is_floating_point())
    twin = x.detach().clone().requires_grad_(x.is_floating_point())
    y, want = model(x), free(twin)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    torch.sin(y).sum().backward()
    torch.sin(want).sum().backward()
    G = form.matrix(free.weight.grad)
    if x.requires_grad:
        torch.testing.assert_close(x.grad, twin.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(adapter.B.grad, s * (gain[:, None] * G) @ A.t(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(adapter.A.grad, s * B.t() @ (gain[:, None] * G), rtol=1e-10, atol=1e-10)
    if dora:  # the norm is a constant to the gradient
        torch.testing.assert_close(adapter.magnitude.grad, (G * V).sum(1) / V.norm(dim=1), rtol=1e-10, atol=1e-10)
    merged = run.merge()
    torch.testing.assert_close(merged(x), want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(merged[0].weight, free.weight, rtol=1e-10, atol=1e-10)


def test_embedding_options():
    """padding_idx keeps its row, scale_grad_by_freq divides by how often a token came: as in the plain layer."""
    table = nn.Embedding(6, 4, padding_idx=1, scale_grad_by_freq=True, dtype=D)
    model, free = nn.Sequential(copy.deepcopy(table)), copy.deepcopy(table)
    adapter = rs.attach(model, rs.LoRA(rank=2, alpha=2, targets="0")).adapter()["0"]
    assert not adapter.A.any()
    ids = torch.tensor([[0, 0, 0, 1], [1, 2, 2, 5]])
    weights = inputs(2, 4, 4)
    (model(ids) * weights).sum().backward()
    (free(ids) * weights).sum().backward()
    torch.testing.assert_close(adapter.A.grad, adapter.B.detach().t() @ free.weight.grad.t(), rtol=1e-12, atol=1e-12)
    assert not adapter.A.grad[:, 1].any()
    for fields in ({"train": "B"}, {"lora_bias": True}, {"init": "pissa"}, {"init": "eva"}):
        with pytest.raises(rs.errors.UnsupportedLayer):
            rs.attach(nn.Sequential(copy.deepcopy(table)), rs.LoRA(rank=2, targets="0", **fields))


@pytest.mark.parametrize("init", ["kaiming", "orthogonal"])
def test_an_embedding_trains(init: str):
    """Its B has no gradient in the first update, because A starts at zero: that is no error."""
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4))
    run = rs.attach(model, rs.LoRA(rank=2, targets=("0", "1"), init=init))  # type: ignore[arg-type]
    opt = run.optimizer(lr=0.1)
    for _ in range(2):
        model(torch.arange(6)).square().sum().backward()
        opt.step()
        opt.zero_grad()
    assert run.adapter()["0"].A.any()


# ---- DoRA against PEFT


def dora_pair(layer: nn.Module, target: str = "0") -> tuple[nn.Module, LoRALayer, nn.Module, nn.Module]:
    model = nn.Sequential(layer)
    theirs = peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(
            r=2, lora_alpha=3, target_modules=[target], use_dora=True,
            fan_in_fan_out=type(layer).__name__ == "Conv1D",
        ),
    )  # fmt: skip
    run = rs.attach(model, rs.LoRA(rank=2, alpha=3, targets=target, dora=True))
    adapter, wrapped = run.adapter()["0"], theirs.base_model.model[0]
    torch.testing.assert_close(
        adapter.magnitude.detach(), wrapped.lora_magnitude_vector["default"].weight.detach().flatten()
    )
    stir(run)
    with torch.no_grad():
        for name, tensor in (("lora_A", adapter.A), ("lora_B", adapter.B)):
            weight = getattr(wrapped, name)["default"].weight
            weight.copy_(tensor.reshape(weight.shape))
        magnitude = wrapped.lora_magnitude_vector["default"].weight
        magnitude.copy_(adapter.magnitude.reshape(magnitude.shape))
    assert isinstance(adapter, LoRALayer)
    return model, adapter, theirs, wrapped


@pytest.mark.parametrize("name", ["linear", "linear without bias", "gpt2 conv1d", "conv2d"])
def test_dora_is_pefts(name: str):
    """fp32; both round a dozen operations of values near 1, so 1e-5 relative is ten times what is seen."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer, x = {
        "linear": lambda: (nn.Linear(6, 5), torch.randn(3, 4, 6)),
        "linear without bias": lambda: (nn.Linear(6, 5, bias=False), torch.randn(3, 4, 6)),
        "gpt2 conv1d": lambda: (Conv1D(5, 6), torch.randn(3, 4, 6)),
        "conv2d": lambda: (nn.Conv2d(3, 5, 3, stride=2, padding=1), torch.randn(2, 3, 7, 7)),
    }[name]()
    if name == "gpt2 conv1d":
        nn.init.normal_(layer.weight)
    model, adapter, theirs, wrapped = dora_pair(layer)
    x, twin = x.requires_grad_(), x.detach().clone().requires_grad_()
    y, want = model(x), theirs(twin)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    torch.sin(y).sum().backward(), torch.sin(want).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-5, atol=1e-5)
    for mine, other in (
        (adapter.A, wrapped.lora_A["default"].weight),
        (adapter.B, wrapped.lora_B["default"].weight),
        (adapter.magnitude, wrapped.lora_magnitude_vector["default"].weight),
    ):
        torch.testing.assert_close(mine.grad.flatten(), other.grad.flatten(), rtol=1e-4, atol=1e-5)


def test_dora_leaves_a_row_of_zeros_alone():
    """Its norm is 0: the row stays, its gradients are numbers, B's is LoRA's, and once it has a norm μ acts."""
    layer = nn.Linear(6, 5, dtype=D)
    with torch.no_grad():
        layer.weight[2] = 0
    model, x = nn.Sequential(copy.deepcopy(layer)), inputs(4, 6)
    run = rs.attach(model, rs.LoRA(rank=2, alpha=4, targets="0", dora=True))
    adapter = run.adapter()["0"]
    torch.testing.assert_close(model(x), layer(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(adapter.delta(), torch.zeros(5, 6, dtype=D), rtol=0, atol=1e-12)
    model(x).sum().backward()
    assert all(p.grad.isfinite().all() for _, p in run.trainable())
    torch.testing.assert_close(adapter.B.grad[2], 2 * x.sum(0) @ adapter.A.t(), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        adapter.B[2], adapter.magnitude[2] = 1.0, 3.0
    assert (adapter.delta()[2]).norm().item() == pytest.approx(3.0)
    y = model(x).detach()
    torch.testing.assert_close(run.merge()(x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("below", [{"lora_bias": True}, {"dora": True}, {}], ids=str)
@pytest.mark.parametrize("dtype", [D, torch.bfloat16])
def test_dora_on_another_adapter(below: dict, dtype: torch.dtype):
    """Only the weight below is rescaled, not the biases; and none is added first and subtracted after."""
    layer, x = nn.Linear(10, 6, dtype=dtype), inputs(5, 10, dtype=dtype)
    with torch.no_grad():
        layer.bias += 300  # in bf16 its step is 2: what is added to it and taken off again is lost
    model = nn.Sequential(layer)
    run = rs.attach(model, rs.LoRA(rank=2, alpha=3, targets="0", **below))
    run.add("second", rs.LoRA(rank=2, alpha=3, targets="0", dora=True))
    stir(run), stir(run, "second")
    run.use("default", "second")
    one, two = run.adapter()["0"], run.adapter("second")["0"]
    W, x64 = layer.weight.detach().double(), x.double()
    W = W + 1.5 * one.B.double() @ one.A.double()
    if "dora" in below:
        W = (one.magnitude.double() / W.norm(dim=1))[:, None] * W
    V = W + 1.5 * two.B.double() @ two.A.double()
    want = x64 @ ((two.magnitude.double() / V.norm(dim=1))[:, None] * V).t()
    bias = layer.bias.double() + (1.5 * one.b.double() if one.b is not None else 0)
    if dtype is D:
        torch.testing.assert_close(model(x), want + bias, rtol=1e-10, atol=1e-10)
        y = model(x).detach()
        torch.testing.assert_close(run.merge()(x), y, rtol=1e-10, atol=1e-10)
    else:
        product = two.product(x).double()
        assert (product - want).norm() < 0.03 * want.norm()  # a few roundings of 8 bits


def test_dora_row_norm_without_forming_the_product():
    model = mlp()
    run = rs.attach(model, rs.LoRA(rank=3, dora=True, init="pissa"))
    stir(run)
    for adapter in run.adapter().values():
        V = adapter.base.rows() + adapter.scale * (adapter.B @ adapter.A - adapter.B0 @ adapter.A0)
        torch.testing.assert_close(adapter.row_norm(), V.norm(dim=1).detach(), rtol=1e-12, atol=1e-12)


def test_dora_in_bf16_stays_near_its_float64_self():
    torch.manual_seed(0)
    layer = nn.Linear(32, 16, dtype=torch.bfloat16)
    x = torch.randn(8, 32, dtype=torch.bfloat16)
    model = nn.Sequential(layer)
    run = rs.attach(model, rs.LoRA(rank=2, dora=True, targets="0"))
    stir(run)
    a = run.adapter()["0"]
    V = layer.weight.double() + a.scale * a.B.double() @ a.A.double()
    exact = x.double() @ ((a.magnitude.double() / V.norm(dim=1))[:, None] * V).t() + layer.bias.double()
    error = (model(x).double() - exact).norm() / exact.norm()
    assert error < 3 * 2**-8  # three roundings of 8 bits


# ---- against PEFT, whole models, training


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_training_equals_pefts(fields: dict):
    """Same start, same AdamW, ten steps on a small Llama: the losses are those of PEFT to fp32 rounding."""
    model = llama()
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **fields)
    )
    run = rs.attach(
        model,
        rs.LoRA(
            rank=4, alpha=8, dora=fields.get("use_dora", False),
            scaling="rslora" if fields.get("use_rslora") else "standard",
        ),
    )  # fmt: skip
    with torch.no_grad():
        for name, adapter in run.adapter().items():
            adapter.A.copy_(theirs.base_model.model.get_submodule(name).lora_A["default"].weight)
    ids = torch.randint(0, 30, (2, 12), generator=torch.Generator().manual_seed(0))
    mine = run.optimizer(lr=1e-2)
    other = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    first = None
    for _ in range(10):
        losses = []
        for net, opt in ((model, mine), (theirs, other)):
            loss = net(input_ids=ids, labels=ids).loss
            loss.backward()
            opt.step(), opt.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=2e-4)
        first = first or losses[0]
    assert losses[0] < first - 0.05


# ---- counts


@pytest.mark.parametrize(("rank", "count"), [(8, 19_988_480), (64, 159_907_840)])
def test_trainable_count_of_a_7b_llama(rank: int, count: int):
    """LLaMA-7B, all linear layers of every block: the counts everyone quotes. Nothing is allocated."""
    config = tf.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(config)
    run = rs.attach(model, rs.LoRA(rank=rank))
    assert sum(p.numel() for _, p in run.trainable()) == count
    assert len(run.sites) == 7 * 32
    assert run.summary().trainable == count
    assert run.summary().total == 6_738_415_616 + count


@pytest.mark.parametrize("how", ["bf16 base", "autocast"])
@pytest.mark.parametrize("fields", [{}, {"dora": True}, {"dropout": 1e-9}, {"init": "pissa"}], ids=str)
@pytest.mark.parametrize(("name", "layer", "x"), KINDS[:4] + KINDS[7:8], ids=[k[0] for k in KINDS[:4] + KINDS[7:8]])
def test_narrow_compute_with_wide_factors(name: str, layer: nn.Module, x: Tensor, fields: dict, how: str):
    """Factors and their gradients are fp32; value and gradients are those of float64 to a few roundings of bf16."""
    if name == "embedding" and fields.keys() & {"dora", "init"}:
        return

    def pass_through(dtype: torch.dtype, autocast: bool) -> list[Tensor]:
        model = nn.Sequential(copy.deepcopy(layer).to(dtype))
        run = rs.attach(model, rs.LoRA(rank=2, alpha=3, targets="0", **fields))
        gen = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in run.adapter()["0"].parameters():
                if parameter.requires_grad:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=gen, dtype=D).to(parameter.dtype)
        own = x.to(dtype) if x.is_floating_point() else x
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(own)
        (y.double() * torch.randn(y.shape, generator=gen, dtype=D)).sum().backward()
        trained = [p for _, p in run.trainable()]
        assert all(p.dtype == p.grad.dtype == torch.promote_types(dtype, torch.float32) for p in trained)
        return [y, *(p.grad for p in trained)]

    exact = pass_through(D, False)
    narrow = pass_through(torch.float32, True) if how == "autocast" else pass_through(torch.bfloat16, False)
    for got, want in zip(narrow, exact, strict=True):
        assert (got.detach().double() - want.detach()).norm() < 0.03 * want.detach().norm()
