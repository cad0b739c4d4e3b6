"""Which layers a pattern names, and which are refused: names are those of the model as it came."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from torch import nn

import rankshift as rs
from rankshift.core import site
from rankshift.core.errors import TiedWeights, UnmatchedTarget, UnsupportedLayer
from rankshift.core.site import matches, select

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def llama(**more: object) -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, vocab_size=20, **more))


def bert() -> nn.Module:
    return tf.BertForSequenceClassification(tf.BertConfig(**SMALL, vocab_size=20))


def gpt2() -> nn.Module:
    config = tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, bos_token_id=0, eos_token_id=0)
    return tf.GPT2LMHeadModel(config)


def vit() -> nn.Module:
    return tf.ViTForImageClassification(tf.ViTConfig(**SMALL, image_size=8, patch_size=4))


def mixtral() -> nn.Module:
    return tf.MixtralForCausalLM(tf.MixtralConfig(**SMALL, num_key_value_heads=2, vocab_size=20, num_local_experts=4))


def qwen2_moe() -> nn.Module:
    config = tf.Qwen2MoeConfig(
        **SMALL, num_key_value_heads=2, vocab_size=20, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    )  # fmt: skip
    return tf.Qwen2MoeForCausalLM(config)


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
BERT = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
VIT = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")
SHARED = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj")

ALL_LINEAR = {
    llama: [f"model.layers.{i}.{n}" for i in (0, 1) for n in (*ATTENTION, *MLP)],
    bert: [f"bert.encoder.layer.{i}.{n}" for i in (0, 1) for n in (*BERT, "intermediate.dense", "output.dense")]
    + ["bert.pooler.dense"],
    gpt2: [f"transformer.h.{i}.{n}" for i in (0, 1) for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")],
    vit: [f"vit.layers.{i}.{n}" for i in (0, 1) for n in VIT],
    mixtral: [f"model.layers.{i}.{n}" for i in (0, 1) for n in ATTENTION],
    qwen2_moe: [f"model.layers.{i}.{n}" for i in (0, 1) for n in (*ATTENTION, *SHARED)],
}  # fmt: skip


@pytest.mark.parametrize("build", ALL_LINEAR, ids=lambda b: b.__name__)
def test_all_linear(build):
    """The body's linear layers in model order: no head, no classifier, no router, no expert stack."""
    model = build()
    assert select(model, "all-linear") == ALL_LINEAR[build]
    run = rs.attach(model, rs.LoRA(rank=2))
    assert list(run.sites) == ALL_LINEAR[build]


@pytest.mark.parametrize("build", ALL_LINEAR, ids=lambda b: b.__name__)
def test_names_stay_those_of_the_model(build):
    """A second adapter is placed by the same names, beside the first."""
    model = build()
    run = rs.attach(model, rs.LoRA(rank=2))
    run.add("second", rs.LoRA(rank=2))
    assert list(run.adapter("second")) == ALL_LINEAR[build]
    model = run.merge()
    assert select(model, "all-linear") == ALL_LINEAR[build]


@pytest.mark.parametrize(
    ("name", "pattern", "hit"),
    [
        ("model.layers.0.self_attn.q_proj", "q_proj", True),
        ("model.layers.0.self_attn.q_proj", "self_attn.q_proj", True),
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("model.layers.0.self_attn.q_proj", "proj", False),
        ("model.layers.0.self_attn.q_proj", "_proj", False),
        ("model.layers.0.self_attn.q_proj", "attn.q_proj", False),
        ("model.layers.0.self_attn.q_proj", "*_proj", True),
        ("model.layers.0.self_attn.q_proj", "?_proj", True),
        ("model.layers.0.self_attn.q_proj", "layers.0.*", True),
        ("model.layers.10.self_attn.q_proj", "layers.0.*", False),
        ("model.layers.0.self_attn.q_proj", "q_proj.*", False),
        ("q_proj", "q_proj", True),
    ],
)
def test_patterns(name: str, pattern: str, hit: bool):
    assert matches(name, pattern) is hit


def test_selection():
    model = llama()
    assert select(model, "q_proj") == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert select(model, ("v_proj", "q_proj")) == [
        f"model.layers.{i}.self_attn.{n}" for i in (0, 1) for n in ("q_proj", "v_proj")
    ]
    assert select(model, "layers.1.*_proj") == ALL_LINEAR[llama][7:]
    assert select(model, "all-linear", ("*mlp*", "k_proj")) == [
        f"model.layers.{i}.{n}" for i in (0, 1) for n in ATTENTION if "k_" not in n
    ]
    assert select(model, ("all-linear", "lm_head"))[-1] == "lm_head"


def test_excluding_a_block_excludes_what_is_in_it():
    model = llama()
    assert select(model, "all-linear", ("layers.0",)) == ALL_LINEAR[llama][7:]
    assert select(model, "all-linear", ("self_attn",)) == [n for n in ALL_LINEAR[llama] if "mlp" in n]


def test_unmatched_patterns_name_the_nearest():
    model = llama()
    with pytest.raises(UnmatchedTarget, match=r"'q_porj' matches no layer of LlamaForCausalLM. Did you mean 'q_proj'"):
        select(model, ("v_proj", "q_porj"))
    with pytest.raises(UnmatchedTarget, match=r"exclude 'v_porj' matches no module. Did you mean 'v_proj'"):
        select(model, "all-linear", ("v_porj",))
    with pytest.raises(UnmatchedTarget, match=r"removes every layer"):
        select(model, "q_proj", ("self_attn",))
    with pytest.raises(UnmatchedTarget, match=r"finds no Linear layer in Sequential"):
        select(nn.Sequential(nn.ReLU()), "all-linear")
    with pytest.raises(UnsupportedLayer, match=r"matches model.layers.0.mlp, but LlamaMLP is not a layer"):
        select(model, "mlp")


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "groups=2"),
        (nn.Embedding(5, 4, max_norm=1.0), "max_norm"),
        (nn.Embedding(5, 4, sparse=True), "sparse"),
        (nn.LayerNorm(4), "LayerNorm is not a layer"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "parametrization"),
        (nn.Bilinear(2, 3, 4), "Bilinear is not a layer"),
        (nn.ConvTranspose2d(4, 4, 3), "ConvTranspose2d is not a layer"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_layers_that_are_refused(layer: nn.Module, text: str):
    model = nn.Sequential(layer)
    before = [type(m) for m in model.modules()]
    with pytest.raises(UnsupportedLayer, match=text):
        rs.attach(model, rs.LoRA(rank=1, targets="0"))
    assert [type(m) for m in model.modules()] == before


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.after = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

    def forward(self, x):
        return self.after(self.attn(x, x, x)[0])


def test_multihead_attention_is_refused():
    """Its weights are read, never called: an adapter there would silently do nothing."""
    with pytest.raises(UnsupportedLayer, match=r"out_proj belongs to nn.MultiheadAttention"):
        rs.attach(Attention(), rs.LoRA(rank=2, targets="out_proj"))
    with pytest.raises(UnsupportedLayer, match=r"out_proj belongs to nn.MultiheadAttention"):
        rs.attach(Attention(), rs.LoRA(rank=2))
    model = Attention()
    assert list(rs.attach(model, rs.LoRA(rank=2, exclude=("out_proj",))).sites) == ["after"]


def test_the_encoder_layers_fast_path_is_refused():
    """In eval() without gradients torch runs nn.TransformerEncoderLayer from its weights and calls no layer."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    method = rs.LoRA(rank=2, targets=("linear1", "linear2"))
    with pytest.raises(UnsupportedLayer, match=r"fast path"):
        rs.attach(layer, method)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        run = rs.attach(layer, method)
        nn.init.normal_(run.adapter()["linear2"].B)
        x = torch.randn(2, 3, 8)
        with torch.no_grad():
            with run.disabled():
                off = layer.eval()(x)
            assert not torch.allclose(layer(x), off)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# ---- shared weights


def tied() -> nn.Module:
    return llama(tie_word_embeddings=True).eval()


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_tied_weights_are_refused(target: str):
    model = tied()
    with pytest.raises(TiedWeights, match=f"{target}.weight is also .*untie"):
        rs.attach(model, rs.LoRA(rank=2, targets=("q_proj", target)))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_only_what_stands_twice_is_looked_at(monkeypatch: pytest.MonkeyPatch):
    """A large model has hundreds of targets: each is not compared with every module."""
    looked = []
    monkeypatch.setattr(site, "_shared_with", lambda model, spec: looked.append(spec.name) or [])
    rs.attach(tied(), rs.LoRA(rank=2, targets=("all-linear", "lm_head")))
    assert set(looked) == {"lm_head"}


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_untied_weights(target: str):
    """The function stays, the other holder's bits stay, and a merge changes the target alone."""
    model, ids = tied(), torch.arange(12).reshape(2, 6)
    before, table = model(ids).logits, model.lm_head.weight.detach().clone()
    run = rs.attach(model, rs.LoRA(rank=2, targets=target, tied="untie"))
    assert torch.equal(model(ids).logits, before)
    assert model.config.tie_word_embeddings is False
    adapter = next(iter(run.adapter().values()))
    nn.init.normal_(adapter.A), nn.init.normal_(adapter.B)
    adapted = model(ids).logits
    assert not torch.allclose(adapted, before)
    delta = adapter.delta().detach()
    model = run.merge()
    torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-5, atol=1e-5)
    other = model.model.embed_tokens if target == "lm_head" else model.lm_head
    own = model.lm_head if target == "lm_head" else model.model.embed_tokens
    assert torch.equal(other.weight, table)
    torch.testing.assert_close(own.weight, table + (delta if target == "lm_head" else delta.t()))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a

    def forward(self, x):
        return self.b(self.a(x))


def test_a_layer_under_two_names():
    with pytest.raises(TiedWeights, match=r"a.weight is also b"):
        rs.attach(Twice(), rs.LoRA(rank=1, targets="a"))
    model, x = Twice(), torch.randn(3, 4)
    before = model(x)
    run = rs.attach(model, rs.LoRA(rank=1, targets="a", tied="untie"))
    assert torch.equal(model(x), before)
    nn.init.normal_(run.adapter()["a"].B)
    model = run.merge()
    assert not torch.equal(model.a.weight, model.b.weight)


class SharedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        block = nn.Sequential(nn.Linear(4, 4))
        self.one, self.two = nn.ModuleDict({"block": block}), nn.ModuleDict({"block": block})

    def forward(self, x):
        return self.two["block"](self.one["block"](x))


@pytest.mark.parametrize("targets", ["all-linear", "one.block.0", "two.block.0"])
def test_a_block_under_two_names_is_adapted_once(targets: str):
    """Both uses see the same adapter, before and after merging."""
    model, x = SharedBlock().double(), torch.randn(3, 4, dtype=torch.float64)
    run = rs.attach(model, rs.LoRA(rank=1, targets=targets))
    assert list(run.sites) == ["one.block.0"]
    nn.init.normal_(run.adapter()["one.block.0"].B)
    adapted = model(x)
    torch.testing.assert_close(run.merge()(x), adapted, rtol=1e-12, atol=1e-12)


# ---- what model code asks of a layer besides calling it


def test_layer_attributes_are_those_of_the_layer():
    """Whisper's encoder computes lengths from its convolutions' strides."""
    config = tf.WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=30, num_mel_bins=4, max_source_positions=10,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = tf.WhisperForConditionalGeneration(config).eval()
    x, ids = torch.randn(1, 4, 20), torch.arange(3)[None]
    before = model(input_features=x, decoder_input_ids=ids).logits
    run = rs.attach(model, rs.LoRA(rank=2, targets=("conv1", "conv2", "q_proj")))
    assert torch.equal(model(input_features=x, decoder_input_ids=ids).logits, before)
    site = run.sites["model.encoder.conv2"]
    assert (site.stride, site.kernel_size) == ((2,), (3,))
    with pytest.raises(AttributeError, match=r"strid"):
        site.strid  # noqa: B018


def test_a_model_with_sites_can_be_copied():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    run = rs.attach(model, rs.LoRA(rank=2, targets=("0", "1")))
    nn.init.normal_(run.adapter()["1"].B)
    twin, ids = copy.deepcopy(model), torch.arange(5)
    assert twin[0].embedding_dim == 4
    assert torch.equal(twin(ids), model(ids))
    with torch.no_grad():
        run.adapter()["1"].B.zero_()
    assert not torch.equal(twin(ids), model(ids))
