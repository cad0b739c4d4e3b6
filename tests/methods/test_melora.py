"""MELoRA: the properties the paper promises and the ways to fake them, by formulas written down here and by PEFT."""

from __future__ import annotations

import copy
import itertools
import json
import math

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import rankshift as rs

peft = pytest.importorskip("peft")
D = torch.float64


def layer(out: int = 8, into: int = 12, dtype: torch.dtype = D) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(into, out, dtype=dtype))


def inputs(*shape: int, dtype: torch.dtype = D, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def stir(run: rs.Run, name: str = "default") -> None:
    """Give every trained tensor values of its own, as training would."""
    gen = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for adapter in run.adapter(name).values():
            for parameter in adapter.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=gen, dtype=D).to(parameter.dtype)


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=30,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config)


# ---- the card's list of how a fake would cheat


@pytest.mark.parametrize("fields", [{}, {"scaling": "rslora"}, {"dropout": 0.3}], ids=str)
def test_1_one_block_is_lora(fields: dict):
    """The whole training, first draw to last step: same bits."""
    runs = []
    for method in (rs.MELoRA(rank=3, blocks=1, alpha=5, **fields), rs.LoRA(rank=3, alpha=5, **fields)):
        model = llama()
        run = rs.attach(model, method, seed=7)
        opt, losses = run.optimizer(lr=1e-2, weight_decay=0.1), []
        for step in range(4):
            ids = torch.randint(30, (2, 6), generator=torch.Generator().manual_seed(step))
            torch.manual_seed(step)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for _, p in run.trainable()], 1.0)
            opt.step(), opt.zero_grad()
            losses.append(loss.item())
        runs.append((dict(run.trainable()), losses))
    (ours, losses), (theirs, want) = runs
    assert losses == want
    assert losses[3] != losses[0]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_2_parameters_do_not_grow_with_blocks(blocks: int):
    run = rs.attach(layer(), rs.MELoRA(rank=2, blocks=blocks, targets="0"))
    assert sum(p.numel() for _, p in run.trainable()) == 2 * (8 + 12)
    assert run.adapter()["0"].rank == 2


def test_2_the_papers_counts():
    """On the meta device: RoBERTa-base n=8 r=1 is an eighth of LoRA r=8; Llama-2-7B r=1."""
    with torch.device("meta"):
        roberta = tf.RobertaModel(tf.RobertaConfig(vocab_size=50265))
        llama7b = tf.LlamaForCausalLM(tf.LlamaConfig())
    for model, targets, count in ((roberta, ("query", "value"), 36_864), (llama7b, ("q_proj", "v_proj"), 524_288)):
        run = rs.attach(model, rs.MELoRA(rank=1, blocks=8, targets=targets))
        assert run.summary().trainable == count
        if model is roberta:
            run.detach()
            assert rs.attach(model, rs.LoRA(rank=8, targets=targets)).summary().trainable == 8 * count


@pytest.mark.parametrize(("blocks", "rank"), [(2, 8), (8, 1), (16, 2), (3, 4)])
def test_3_4_rank_adds_up_and_the_rest_is_zero(blocks: int, rank: int):
    run = rs.attach(layer(96, 48), rs.MELoRA(rank=rank, blocks=blocks, targets="0"))
    stir(run)
    change = run.adapter()["0"].delta().detach()
    assert torch.linalg.matrix_rank(change) == blocks * min(rank, 48 // blocks)
    inside = torch.block_diag(*[torch.ones(96 // blocks, 48 // blocks)] * blocks).bool()
    assert (change[inside] != 0).all()
    assert (change[~inside] == 0).all()
    assert inside.double().mean().item() == pytest.approx(1 / blocks)
    before = run.sites["0"].base.weight.detach().clone()
    merged = run.merge()[0].weight.detach()
    assert torch.equal(merged[~inside], before[~inside])  # bits outside the blocks are not touched
    assert not torch.equal(merged, before)


def test_5_blocks_do_not_see_each_other():
    model, n = layer(), 4
    base = copy.deepcopy(model)
    run = rs.attach(model, rs.MELoRA(rank=2, blocks=n, targets="0"))
    stir(run)
    x = inputs(12)
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x) - base(x), x)  # (8, 12)
    for i, j in itertools.product(range(n), range(n)):
        block = jacobian[2 * i : 2 * i + 2, 3 * j : 3 * j + 3]
        assert (block.abs().max() > 1e-3) == (i == j)
        assert (block.abs().max() < 1e-15) == (i != j)


@pytest.mark.parametrize("shape", [(12,), (7, 12), (2, 5, 12), (2, 1, 3, 12), (0, 12)])
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_6_it_is_the_dense_layer(shape: tuple[int, ...], scaling: str):
    """Value, input gradient and factor gradients of an unfrozen W + s·diag(BᵢAᵢ); s has the mini rank below it."""
    model, free = layer(), layer()[0]
    run = rs.attach(model, rs.MELoRA(rank=3, blocks=2, alpha=5, targets="0", scaling=scaling))  # type: ignore[arg-type]
    stir(run)
    A, B, s = run.adapter()["0"].A, run.adapter()["0"].B, 5 / (3 if scaling == "standard" else math.sqrt(3))
    with torch.no_grad():
        free.weight[:4, :6] += s * B[:4] @ A[:3]
        free.weight[4:, 6:] += s * B[4:] @ A[3:]
    x, twin = inputs(*shape).requires_grad_(), inputs(*shape).requires_grad_()
    y, want = model(x), free(twin)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    torch.sin(y).sum().backward(), torch.sin(want).sum().backward()
    G = free.weight.grad
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(A.grad[3:], s * B[4:].t() @ G[4:, 6:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(B.grad[:4], s * G[:4, :6] @ A[:3].t(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("portable", [False, True])
def test_7_peft_loads_it_as_a_lora_of_rank_nr(tmp_path, portable: bool):
    model, ids = llama().eval(), torch.arange(12).reshape(2, 6)
    base = copy.deepcopy(model)
    run = rs.attach(model, rs.MELoRA(rank=2, blocks=4, alpha=5, targets=("q_proj", "k_proj", "down_proj")))
    stir(run)
    want = model(ids).logits
    run.export(tmp_path / "peft", profile="portable" if portable else "exact")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == ((8, 8) if portable else (8, 4 * 5))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    torch.testing.assert_close(theirs(ids).logits, want, rtol=1e-5, atol=1e-5)
    name = "base_model.model.model.layers.1.self_attn.k_proj"
    A, B = (theirs.get_submodule(f"{name}.lora_{f}.default").weight for f in "AB")
    ours = run.adapter()["model.layers.1.self_attn.k_proj"]
    if not portable:  # the blocks themselves, to the bit
        assert torch.equal(A, torch.block_diag(*ours.A.chunk(4)))
        assert torch.equal(B, torch.block_diag(*ours.B.chunk(4)))
    with run.merged() as merged:
        torch.testing.assert_close(merged(ids).logits, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(ids).logits, want)
    torch.testing.assert_close(theirs.merge_and_unload()(ids).logits, want, rtol=1e-5, atol=1e-5)


def test_8_sides_that_blocks_do_not_divide():
    model = llama()
    with pytest.raises(
        rs.errors.UnsupportedLayer,
        match=r"blocks = 3 does not divide both sides of model.layers.0.self_attn.q_proj, out = 16 and in = 16. "
        r"Set blocks=2, which does, or exclude \"q_proj\"",
    ):
        rs.attach(model, rs.MELoRA(rank=1, blocks=3))
    with pytest.raises(rs.errors.UnsupportedLayer, match=r"k_proj, out = 8 and in = 16. Set blocks=8, which does"):
        rs.attach(model, rs.MELoRA(rank=1, blocks=16))  # grouped queries: keys are narrower
    with pytest.raises(rs.errors.UnsupportedLayer, match=r"of 0, out = 7 and in = 12. No number but 1 does. Exclude"):
        rs.attach(layer(7, 12), rs.MELoRA(rank=1, blocks=2, targets="0"))
    assert not any(type(m).__module__.startswith("rankshift") for m in model.modules())
    with pytest.raises(
        rs.errors.RankTooLarge,
        match=r"mini rank 5 at model.layers.0.self_attn.q_proj exceeds min\(out, in\) / blocks = 16 / 4 = 4",
    ):
        rs.attach(model, rs.MELoRA(rank=5, blocks=4, exclude=("k_proj",)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank": 0}, r"MELoRA.rank = 0 is below 1"),
        ({"blocks": 0}, r"MELoRA.blocks = 0 is below 1"),
        ({"blocks": 2.5}, r"MELoRA.blocks = 2.5 is not an integer"),
        ({"alpha": 0.0}, r"MELoRA.alpha = 0.0 is not a positive number"),
        ({"alpha": math.inf}, r"MELoRA.alpha = inf is not a positive number"),
        ({"dropout": 1.0}, r"MELoRA.dropout = 1.0 is not in \[0, 1\)"),
        ({"block": 2}, r"MELoRA has no field 'block'. Did you mean 'blocks'"),
    ],
)
def test_8_values_that_no_model_could_satisfy(fields: dict, said: str):
    with pytest.raises(rs.errors.ConfigError, match=said):
        rs.MELoRA(**fields)


def test_8_layers_that_it_refuses():
    table = nn.Sequential(nn.Embedding(12, 8))
    with pytest.raises(rs.errors.UnsupportedLayer, match=r"0 is an Embedding: in blocks, each part of the vocabulary"):
        rs.attach(table, rs.MELoRA(rank=1, blocks=2, targets="0"))

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 8, 12))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.up.mT)

    with pytest.raises(rs.errors.UnsupportedLayer, match=r"0.up is a stack of expert weights"):
        rs.attach(nn.Sequential(Experts()), rs.MELoRA(rank=1, blocks=2, targets="0.up"))


def test_9_every_block_has_a_dropout_mask_of_its_own():
    """With equal blocks and equal slices of the input, blocks can differ by their masks alone."""
    model = layer(8, 12, torch.float32)
    run = rs.attach(model, rs.MELoRA(rank=2, blocks=4, dropout=0.5, targets="0"))
    torch.manual_seed(0)
    x = inputs(50, 3, dtype=torch.float32).repeat(1, 4)
    base = nn.functional.linear(x, model[0].base.weight, model[0].base.bias)
    assert torch.equal(model(x), base)  # B = 0
    stir(run)
    adapter = run.adapter()["0"]
    with torch.no_grad():
        adapter.A.copy_(adapter.A[:2].repeat(4, 1)), adapter.B.copy_(adapter.B[:2].repeat(4, 1))
    parts = (model(x) - base).unflatten(-1, (4, 2)).detach()
    for i, j in itertools.combinations(range(4), 2):
        assert (parts[:, i] - parts[:, j]).abs().max() > 1e-2
    model.eval()
    parts = (model(x) - base).unflatten(-1, (4, 2)).detach()
    torch.testing.assert_close(parts, parts[:, :1].expand_as(parts), rtol=1e-4, atol=1e-5)


def test_10_saved_and_loaded_beside_a_lora(tmp_path):
    """Both kinds in one run: each comes back as itself, and their sum is that of their weights."""
    model, ids = llama().eval(), torch.arange(12).reshape(2, 6)
    base = copy.deepcopy(model)
    run = rs.attach(model, rs.MELoRA(rank=2, blocks=4))
    run.add("plain", rs.LoRA(rank=3, targets=("q_proj", "v_proj")))
    stir(run), stir(run, "plain")
    run.save(tmp_path / "run")
    again = rs.load(copy.deepcopy(base), tmp_path / "run")
    weights = dict(base.named_parameters())
    for names in (("default",), ("plain",), ("plain", "default")):  # also one standing on the other
        run.use(*names), again.use(*names)
        want = model(ids).logits
        assert torch.equal(again.model.eval()(ids).logits, want)
        twin = copy.deepcopy(base)
        with torch.no_grad():
            for name in names:
                for site, adapter in run.adapter(name).items():
                    twin.get_submodule(site).weight += adapter.delta()
        torch.testing.assert_close(twin(ids).logits, want, rtol=1e-4, atol=1e-5)
    assert weights.keys() == dict(base.named_parameters()).keys()
    run.combine(["default", "plain"], "both")
    run.use("both")
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)
    assert run.adapter("both")["model.layers.0.self_attn.q_proj"].rank == 2 * 4 + 3


@pytest.mark.parametrize("blocks", [1, 4, 16])
def test_11_the_start(blocks: int):
    """A uniform in ±1/√(in/n), so √n times as wide as LoRA's; B = 0, so the function is the base's; blocks differ."""
    model, x = layer(64, 64), inputs(3, 64)
    before = model(x)
    adapter = rs.attach(model, rs.MELoRA(rank=4, blocks=blocks, targets="0")).adapter()["0"]
    assert torch.equal(model(x), before)
    assert not adapter.B.any()
    bound = math.sqrt(blocks / 64)
    assert 0.97 * bound < adapter.A.abs().max() <= bound
    assert adapter.A.std().item() == pytest.approx(math.sqrt(blocks) / math.sqrt(3 * 64), rel=0.12)
    chunks = adapter.A.chunk(blocks)
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(chunks, 2))
    model(x).square().sum().backward()
    assert not adapter.A.grad.any()  # one factor stands still in the first step
    assert adapter.B.grad.all()


# ---- layer kinds


def kinds() -> list[tuple[str, nn.Module, Tensor]]:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    made: list[tuple[str, nn.Module, Tensor]] = [("gpt2 conv1d", Conv1D(6, 4), inputs(2, 3, 4))]
    made[0][1].weight.data.normal_(std=0.5)
    for dims, (stride, padding, dilation, mode) in itertools.product(
        (1, 2, 3), [(1, 0, 1, "zeros"), (2, 1, 1, "zeros"), (1, 1, 2, "circular"), (1, "same", 1, "reflect")]
    ):
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        conv = kind(4, 6, 3, stride=stride, padding=padding, dilation=dilation, padding_mode=mode)
        made.append((f"conv{dims}d {mode} {padding}", conv, inputs(2, 4, *(6, 5, 5)[:dims])))
    return [(name, layer.double(), x) for name, layer, x in made]


KINDS = kinds()


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(("name", "plain", "x"), KINDS, ids=[k[0] for k in KINDS])
def test_every_layer_kind(name: str, plain: nn.Module, x: Tensor, p: float):
    """Value, input gradient and factor gradients equal those of an unfrozen layer with the blocks in its weight."""
    free, model = copy.deepcopy(plain).requires_grad_(), nn.Sequential(copy.deepcopy(plain))
    run = rs.attach(model, rs.MELoRA(rank=2, blocks=2, alpha=3, targets="0", dropout=p))
    stir(run)
    A, B, s = run.adapter()["0"].A, run.adapter()["0"].B, 1.5
    form = run.sites["0"].spec.form
    W = form.matrix(plain.weight).detach().clone()
    i = W.shape[1] // 2
    W[:3, :i] += s * (B[:3] @ A[:2]).detach()
    W[3:, i:] += s * (B[3:] @ A[2:]).detach()
    with torch.no_grad():
        free.weight.copy_(form.stored(W))
    if p:  # composed of ordinary operations then; with nothing dropped it is the same layer
        model.eval()
    mine, twin = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, want = model(mine), free(twin)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    torch.sin(y).sum().backward(), torch.sin(want).sum().backward()
    torch.testing.assert_close(mine.grad, twin.grad, rtol=1e-10, atol=1e-10)
    G = form.matrix(free.weight.grad)
    torch.testing.assert_close(A.grad[2:], s * B[3:].t() @ G[3:, i:], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(B.grad[:3], s * G[:3, :i] @ A[:2].t(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(run.merge()(x), want.detach(), rtol=1e-10, atol=1e-10)


def test_dropout_gradients_use_the_same_mask():
    model, x = layer(), inputs(3, 12)
    run = rs.attach(model, rs.MELoRA(rank=2, blocks=2, alpha=2, targets="0", dropout=0.4))
    stir(run)
    adapter = run.adapter()["0"]
    torch.manual_seed(5)
    model(x).sum().backward()
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, 0.4)
    G = torch.ones(3, 8, dtype=D).t() @ dropped
    torch.testing.assert_close(adapter.A.grad[:2], adapter.B[:4].t() @ G[:4, :6], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(adapter.B.grad[4:], G[4:, 6:] @ adapter.A[2:].t(), rtol=1e-12, atol=1e-12)


def test_channels_of_a_convolution_are_what_blocks_divide():
    """3 channels × kernel 2 is an even number of columns, and still no two blocks of channels."""
    with pytest.raises(rs.errors.UnsupportedLayer, match=r"out = 6 and in = 3 channels. Set blocks=3, which does"):
        rs.attach(nn.Sequential(nn.Conv1d(3, 6, 2)), rs.MELoRA(rank=1, blocks=2, targets="0"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns(dtype: torch.dtype):
    """A block-diagonal change of W is learned to a hundredth; factors are fp32 whatever the base."""
    model, x = layer(8, 12, dtype), inputs(64, 12, dtype=dtype)
    target = copy.deepcopy(model)
    with torch.no_grad():
        part = torch.outer(torch.ones(4), inputs(6, dtype=torch.float32))
        target[0].weight += torch.block_diag(part, part).to(dtype)
        goal = target(x)
    run = rs.attach(model, rs.MELoRA(rank=2, blocks=2, targets="0"))
    assert {p.dtype for _, p in run.trainable()} == {torch.float32}
    opt = run.optimizer(lr=2e-2)
    losses = []
    for _ in range(200):
        loss = (model(x) - goal).float().square().mean()
        loss.backward()
        opt.step(), opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]
