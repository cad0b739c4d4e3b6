"""Stacks of expert weights: transformers' own mixture-of-experts models, every way they multiply their experts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

import rankshift as rs
from rankshift.core import lowrank
from rankshift.core.lowrank import LowRankSum

SMALL = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32,
    "head_dim": 8,
}  # fmt: skip
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def mixtral() -> nn.Module:
    config = tf.MixtralConfig(**SMALL, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2)
    return tf.MixtralForCausalLM(config)


def qwen3() -> nn.Module:
    config = tf.Qwen3MoeConfig(
        **SMALL, intermediate_size=32, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return tf.Qwen3MoeForCausalLM(config)


def gpt_oss() -> nn.Module:
    """Stores its experts as (experts, in, out)."""
    config = tf.GptOssConfig(
        **SMALL, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0, eos_token_id=0
    )
    return tf.GptOssForCausalLM(config)


MODELS = (mixtral, qwen3, gpt_oss)
WAYS = ("eager", "batched_mm", "grouped_mm")
# torch's grouped_mm has no float64; in fp32 sums of a few dozen products of ones agree to 1e-4
PRECISION = {
    "eager": (torch.float64, {"rtol": 1e-9, "atol": 1e-9}),
    "batched_mm": (torch.float64, {"rtol": 1e-9, "atol": 1e-9}),
    "grouped_mm": (torch.float32, {"rtol": 1e-4, "atol": 1e-4}),
}


def build(maker, way: str = "eager", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = maker()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.set_experts_implementation(way)
    return model.to(dtype).eval()


def ids() -> Tensor:
    return torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(1))


def stir(run: rs.Run, name: str = "default", size: float = 0.3) -> None:
    gen = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for adapter in run.adapter(name).values():
            for p in (adapter.A, adapter.B):
                p += size * torch.randn(p.shape, generator=gen, dtype=torch.float64).to(p.dtype)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("maker", MODELS, ids=lambda m: m.__name__)
def test_experts_against_the_dense_model(maker, way: str):
    """Logits and factor gradients are those of the plain model whose unfrozen stacks hold W + s·B·A, one by one."""
    dtype, near = PRECISION[way]
    free, model = build(maker, way, dtype), build(maker, way, dtype)
    x = ids()
    run = rs.attach(model, rs.LoRA(rank=3, alpha=6, targets=EXPERTS))
    assert torch.equal(model(x).logits, free(x).logits)  # B = 0
    stir(run)
    assert len(run.adapter()) == 2
    for name, adapter in run.adapter().items():
        stack = free.get_parameter(name)
        delta = torch.stack([2.0 * B @ A for A, B in zip(adapter.A, adapter.B, strict=True)])
        with torch.no_grad():
            stack += delta.mT if maker is gpt_oss else delta
    y, want = model(x).logits, free(x).logits
    torch.testing.assert_close(y, want, **near)
    torch.sin(y).sum().backward()
    torch.sin(want).sum().backward()
    for name, adapter in run.adapter().items():
        G = free.get_parameter(name).grad
        G = G.mT if maker is gpt_oss else G
        torch.testing.assert_close(adapter.B.grad, 2.0 * G @ adapter.A.mT, **near)
        torch.testing.assert_close(adapter.A.grad, 2.0 * adapter.B.mT @ G, **near)
    with run.disabled():
        assert torch.equal(model(x).logits, build(maker, way, dtype)(x).logits)
    merged = run.merge()
    torch.testing.assert_close(merged(x).logits, want, **near)
    assert [type(m) for m in merged.modules()] == [type(m) for m in free.modules()]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("maker", MODELS, ids=lambda m: m.__name__)
def test_no_second_stack_is_formed(maker, way: str, monkeypatch: pytest.MonkeyPatch):
    """Every call these models make on their stacks is known: none falls back to the sum W + B A."""
    run = rs.attach(model := build(maker, way, PRECISION[way][0]), rs.LoRA(rank=3, targets=EXPERTS))
    stir(run)
    formed = []
    monkeypatch.setattr(lowrank, "_sum", lambda t: formed.append(1) or t.W + t.B @ t.A)
    model(ids()).logits.sum().backward()
    assert not formed


@pytest.mark.parametrize("way", WAYS)
def test_bf16_experts_keep_a_small_update(way: str):
    """A change of 7e-4 of the weight, which W + ΔW rounded to bf16 mostly loses. W = [V, −V], x = [t, t]: Wx = 0."""
    gen = torch.Generator().manual_seed(0)
    V, t = torch.randn(4, 32, 32, generator=gen), torch.randn(64, 32, generator=gen)
    W, x = torch.cat([V, -V], -1).bfloat16(), torch.cat([t, t], 1).bfloat16()
    A, B = torch.randn(4, 4, 64, generator=gen), torch.randn(4, 32, 4, generator=gen)
    B *= 7e-4 * W.float().norm() / (B @ A).norm()
    both = LowRankSum(W, A, B)

    def outputs(weight: Tensor, x: Tensor) -> Tensor:
        if way == "eager":
            return torch.cat([F.linear(part, weight[e]) for e, part in enumerate(x.split(16))])
        if way == "batched_mm":
            return torch.bmm(weight[torch.arange(4).repeat_interleave(16)], x.unsqueeze(-1)).squeeze(-1)
        return F.grouped_mm(x, weight.transpose(-2, -1), offs=torch.tensor([16, 32, 48, 64], dtype=torch.int32))

    exact = torch.cat([part.double() @ (B[e].double() @ A[e].double()).t() for e, part in enumerate(x.split(16))])
    assert (outputs(both, x).double() - exact).norm() / exact.norm() < 0.02
    assert (outputs(W + (B @ A).bfloat16(), x).double() - exact).norm() / exact.norm() > 0.3


def test_bf16_model_trains():
    run = rs.attach(
        model := build(mixtral, "grouped_mm", torch.bfloat16), rs.LoRA(rank=4, targets=(*EXPERTS, "q_proj"))
    )
    opt = run.optimizer(lr=1e-2)
    model.train()
    losses = []
    for _ in range(8):
        loss = model(ids(), labels=ids()).loss
        loss.backward()
        opt.step(), opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(p.dtype == torch.float32 for _, p in run.trainable())


@pytest.mark.parametrize("maker", [mixtral, gpt_oss], ids=lambda m: m.__name__)
def test_two_adapters_on_experts_add(maker):
    model, x = build(maker), ids()
    run = rs.attach(model, rs.LoRA(rank=2, targets=EXPERTS))
    run.add("second", rs.LoRA(rank=3, targets=EXPERTS[0]))
    stir(run), stir(run, "second")
    run.use("default", "second")
    both = model(x).logits
    assert not torch.allclose(both, build(maker)(x).logits)
    torch.testing.assert_close(run.merge()(x).logits, both, rtol=1e-9, atol=1e-9)


def test_anchored_starts_on_experts():
    model, x = build(mixtral), ids()
    for init in ("pissa", "olora"):
        run = rs.attach(model, rs.LoRA(rank=2, targets=EXPERTS, init=init))
        torch.testing.assert_close(model(x).logits, build(mixtral)(x).logits, rtol=1e-9, atol=1e-9)
        for adapter in run.adapter().values():
            S = torch.linalg.svdvals(adapter.base.rows())
            norm = torch.linalg.matrix_norm(adapter.scale * adapter.B @ adapter.A)
            if init == "pissa":
                torch.testing.assert_close(norm.detach(), S[:, :2].square().sum(1).sqrt(), rtol=1e-9, atol=1e-9)
        run.detach()


@pytest.mark.parametrize("fields", [{"dora": True}, {"dropout": 0.1}, {"lora_bias": True}, {"init": "eva"}])
def test_what_a_stack_cannot_do_is_refused(fields: dict):
    with pytest.raises(rs.errors.UnsupportedLayer):
        rs.attach(build(mixtral), rs.LoRA(rank=2, targets=EXPERTS, **fields), data=[{"input_ids": ids()}])


@pytest.mark.parametrize("way", ["batched_mm", "grouped_mm"])
def test_compiles(way: str):
    """The graph breaks where a part of a stack is taken, and the numbers are the same."""
    torch._dynamo.reset()
    run = rs.attach(model := build(mixtral, way, torch.float32), rs.LoRA(rank=2, targets=EXPERTS))
    stir(run)
    want = model(ids()).logits
    torch.testing.assert_close(torch.compile(model, backend="eager")(ids()).logits, want, rtol=1e-5, atol=1e-5)


# ---- the two-part weight itself


def parts(*lead: int) -> tuple[LowRankSum, Tensor]:
    gen = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(*lead, *s, generator=gen, dtype=torch.float64) for s in ((4, 6), (2, 6), (4, 2)))
    return LowRankSum(W, A, B), W + B @ A


def test_calls_on_the_parts_are_calls_on_the_sum():
    both, dense = parts(3)
    one, plain = parts()
    x, rows = torch.randn(5, 6, dtype=torch.float64), torch.randn(3, 5, 6, dtype=torch.float64)
    index = torch.tensor([2, 0, 0])
    kept = {
        "index": (both[1], dense[1]),
        "tensor index": (both[torch.tensor(2)], dense[2]),
        "gather": (both[index], dense[index]),
        "transpose": (both.transpose(-2, -1), dense.mT),
        "transpose by number": (both.transpose(1, 2), dense.mT),
        "mT": (one.mT, plain.mT),
        "mT of one": (both.mT[0], dense[0].t()),
    }
    for name, (got, want) in kept.items():
        assert isinstance(got, LowRankSum), name
        torch.testing.assert_close(got + 0, want, msg=name)
    for got, want in (
        (F.linear(x, one), x @ plain.t()),
        (F.linear(x, one, torch.ones(4, dtype=torch.float64)), x @ plain.t() + 1),
        (x @ one.mT, x @ plain.t()),
        (torch.bmm(rows, both.mT), rows @ dense.mT),
        (torch.bmm(both, rows.mT), dense @ rows.mT),
        (one @ x.t(), plain @ x.t()),
        # calls that are not known get the sum
        (both.sum(), dense.sum()),
        (both[:, 1], dense[:, 1]),
        (both.transpose(0, 1), dense.transpose(0, 1)),
        (torch.einsum("eoi,ebi->ebo", both, rows), torch.einsum("eoi,ebi->ebo", dense, rows)),
        (torch.stack([one, one]), torch.stack([plain, plain])),
        (one @ one.mT, plain @ plain.t()),
    ):
        torch.testing.assert_close(got, want)
        assert type(got) is Tensor
    assert (both.shape, both.dtype, both.dim(), both.size(1), len(both)) == (dense.shape, dense.dtype, 3, 4, 3)
