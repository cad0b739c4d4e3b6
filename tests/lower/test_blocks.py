"""Lowered models compute what they computed, for every method; what is fused, what is not and why; what stays."""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import nullcontext

import lower_models as models
import peft
import pytest
import torch
import transformers
from lower_models import close, gemma, ids, llama, mistral, outcome, qwen2, qwen3, stir
from safetensors.torch import load_file
from torch import Tensor, nn

import rankshift as rs
from laws.cases import CASES, Case, rows
from laws.world import begin
from rankshift import lower as lowering
from rankshift.core.adapter import Adapter, Columns
from rankshift.core.form import Form
from rankshift.core.method import methods
from rankshift.core.site import Site
from rankshift.lower.llama import block_of
from rankshift.lower.stand_in import stands_in
from rankshift.methods.lora import LoRALayer

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NORMS, MORE, HOOKED = "norms train", "more than a low-rank term", "hooked"

METHODS: dict[str, tuple[rs.Method, str]] = {  # and why blocks run as they are; "": they run fused
    "lora": (rs.LoRA(rank=4, alpha=8), ""),
    "lora-patterns": (
        rs.LoRA(
            rank=2,
            rank_pattern={"k_proj": 5, "up_proj": 3},
            alpha_pattern={"v_proj": 3.0},
            scaling="rslora",
            targets=("k_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
        ),
        "",
    ),
    "lora-fa": (rs.LoRA(rank=4, train="B"), ""),
    "lora-a": (rs.LoRA(rank=4, train="A", init="orthogonal"), ""),
    "lora-pissa": (rs.LoRA(rank=3, init="pissa"), ""),
    "lora-head": (rs.LoRA(rank=3, modules_to_save=("lm_head",)), ""),
    "lora-dropout": (rs.LoRA(rank=4, dropout=0.2), MORE),
    "lora-bias": (rs.LoRA(rank=2, lora_bias=True), MORE),
    "lora-norm": (rs.LoRA(rank=2, modules_to_save=("input_layernorm",)), NORMS),
    "dora": (rs.LoRA(rank=4, dora=True), ""),
    "dora-patterns": (
        rs.LoRA(rank=2, dora=True, rank_pattern={"k_proj": 5}, targets=("k_proj", "v_proj", "up_proj", "down_proj")),
        "",
    ),
    "dora-fa": (rs.LoRA(rank=4, dora=True, train="B"), ""),
    "dora-pissa": (rs.LoRA(rank=3, dora=True, init="pissa"), ""),
    "dora-head": (rs.LoRA(rank=3, dora=True, targets=("q_proj", "lm_head")), ""),
    "dora-dropout": (rs.LoRA(rank=4, dora=True, dropout=0.2), MORE),
    "vera": (rs.VeRA(rank=8), ""),
    "paca": (rs.PaCA(rank=3), ""),
    "relora": (rs.ReLoRA(rank=4, every=2, rest="freeze"), ""),
    "relora-all": (rs.ReLoRA(rank=4, every=2), NORMS),
    "sora": (rs.SoRA(rank=4, gate_init="normal"), ""),
    "switchlora": (rs.SwitchLoRA(rank=4, interval=2, freeze=1, ratio=5, rest="freeze"), ""),
    "melora": (rs.MELoRA(rank=2, blocks=2), MORE),
    "flat-lora": (rs.FlatLoRA(rank=4, sigma=0.3), MORE),
    "pc-lora": (rs.PCLoRA(rank=3, decay_end=0.5), HOOKED),
    "full": (rs.Full(), NORMS),
    "full-part": (rs.Full(targets=("layers.0.mlp.up_proj", "layers.1.mlp.up_proj")), "base train in place"),
    "galore": (rs.GaLore(rank=3, every=2), NORMS),
    "galore-projected": (rs.GaLore(rank=3, every=2, gradient="projected", rest="freeze"), MORE),
    "adarankgrad": (rs.AdaRankGrad(rank=4), NORMS),
    "prelora": (rs.PreLoRA(stage="frozen", then=rs.LoRA(rank=4), max_rank=8), NORMS),
    "prelora-joint": (rs.PreLoRA(stage="joint", then=rs.LoRA(rank=4), max_rank=8), NORMS),
}


def begun(method=None, make=llama, **more):
    model = make(**more)
    run = rs.attach(model, method or rs.LoRA(rank=4, alpha=8), total_steps=8)
    stir(run)
    return model, run


def fused(report) -> bool:
    return len(report.blocks) == 2 and not report.refused and not report.aside


def check(model, run, tolerance=2e-5, **batch):
    """Lowered equals not lowered. The report."""
    torch.manual_seed(3)
    plain = outcome(model, run, **batch)
    report = run.lower()
    torch.manual_seed(3)
    close(outcome(model, run, **batch), plain, tolerance)
    return report


# ---- what adapters say of themselves --------------------------------------------------------------------------------


def term_is_forward(adapter: Adapter) -> None:
    """Raise AssertionError unless the term that an adapter gives is what its forward does: its value and gradients."""
    term = adapter.term()
    if term is None or type(adapter.form) is not Form:
        return
    x = torch.randn(5, adapter.in_features, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = [p for p in adapter.parameters() if p.requires_grad]
    y = adapter.forward(x)
    if isinstance(term, Columns):
        extra = term.scale * (term.D - term.D.detach())  # its value stands in the base
        z = adapter.base.linear(x) + x[:, term.channels] @ extra.t()
    else:
        z = adapter.base.linear(x) + term.scale * (x @ term.A.t().to(x)) @ term.B.t().to(x)
        if term.magnitude is not None:
            W, bias = adapter.base.dense(), adapter.base.total_bias
            norm = (W + term.scale * term.B @ term.A).detach().square().sum(1).sqrt()
            shift = torch.zeros_like(norm) if bias is None else bias
            z = term.magnitude / norm * (z - shift) + shift
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)
    by_forward, by_term = (torch.autograd.grad(t, leaves, dy, allow_unused=True) for t in (y, z))
    for a, b in zip(by_forward, by_term, strict=True):
        assert (a is None) == (b is None)
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_table_has_every_method():
    assert {method.name for method, _ in METHODS.values()} == set(methods()) == set(CASES)


@pytest.mark.parametrize("case", rows(), ids=lambda case: case.label)
@pytest.mark.parametrize("train", [True, False])
def test_a_term_is_what_the_adapter_does(case: Case, train):
    run = begin("one", case.method, torch.float64, check=False).steps(1).run
    stir(run)
    for adapter in run.adapter().values():
        term_is_forward(adapter.train(train))


def test_that_law_catches_an_adapter_that_forgets_its_term(monkeypatch):
    run = begin("one", rs.LoRA(rank=3), torch.float64).run
    stir(run)
    adapter = next(iter(run.adapter().values()))
    term_is_forward(adapter)
    own = {name: getattr(LoRALayer, name) for name in ("add_branch", "forward", "factors")}
    changes = {
        "add_branch": lambda self, x, bias=True: 1.01 * own["add_branch"](self, x, bias),
        "forward": lambda self, x: own["forward"](self, x).detach() + 0 * self.A.sum(),
    }
    for name, change in changes.items():
        adapter.__class__ = type("Forgetful", (LoRALayer,), {name: change})
        with pytest.raises(AssertionError):
            term_is_forward(adapter)
    adapter.__class__ = type("Heedful", (LoRALayer,), {"factors": lambda self: (self.A, 2 * self.B)})
    term_is_forward(adapter)


# ---- every method, every family -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method(name):
    method, why = METHODS[name]
    report = check(*begun(method))
    assert report.blocks == ["model.layers.0", "model.layers.1"]
    assert fused(report) == (not why)
    for said in report.aside.values():
        assert why in said
        assert said in str(report)
    assert f"{0 if why else 2} of 2 blocks run fused" in str(report)


def test_dropout_is_fused_in_evaluation():
    model, run = begun(METHODS["lora-dropout"][0])
    report = check(model.eval(), run)
    assert fused(report)


BATCHES = {
    "masked": {"attention_mask": torch.tensor([[0] * 3 + [1] * 6, [1] * 5 + [0] * 4, [1] * 9])},
    "packed": {
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), "input_ids": ids(size=1), "labels": ids(size=1),
    },
    "positions": {"position_ids": torch.arange(9)[None] + torch.tensor([[0], [3], [5]])},
}  # fmt: skip


@pytest.mark.parametrize("make", [llama, mistral, gemma, qwen2, qwen3])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_families_and_batches(make, attn):
    for method in (rs.LoRA(rank=3), rs.LoRA(rank=3, dora=True), rs.PaCA(rank=2)):
        aside = make is qwen3 and getattr(method, "dora", False)
        for batch in ({}, *BATCHES.values()):
            report = check(*begun(method, make, attn=attn), **batch)
            assert fused(report) != aside
            assert not aside or "its heads are normed, and DoRA" in str(report)


def test_norms_of_heads():
    """No gradient can be had of a head whose norm's weight is zero from what is left of it."""
    model, run = begun(make=qwen3)
    plain = outcome(model, run)
    report = run.lower()
    norms = model.model.layers[1].self_attn
    before = norms.k_norm.weight.detach().clone()
    with torch.no_grad():
        norms.k_norm.weight[3] = 1e-4  # as a state that is loaded does
    outcome(model, run)
    assert report.aside == {"model.layers.1": "weights of the norms of its heads are next to zero"}
    with torch.no_grad():
        norms.k_norm.weight.copy_(before)
    close(outcome(model, run), plain)
    assert fused(report)
    norms.k_norm.variance_epsilon = 0.1
    run.raise_()
    report = check(model, run)
    assert "differ in epsilon" in report.aside["model.layers.1"]
    norms.q_norm.variance_epsilon = 0.1
    run.raise_()
    report = check(model, run)
    assert fused(report)
    norms.q_norm = nn.Identity()
    outcome(model, run)
    assert "its norms are Identity and" in report.aside["model.layers.1"]
    hook = model.model.layers[0].self_attn.q_norm.register_forward_hook(lambda *_: None)
    outcome(model, run)
    assert "hooked" in report.aside["model.layers.0"]
    hook.remove()
    model.model.layers[0].self_attn.q_norm.weight.requires_grad_()
    outcome(model, run)
    assert "its norms train" in report.aside["model.layers.0"]


@pytest.mark.parametrize(
    "more",
    [
        {"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"head_dim": 12}, {"attention_dropout": 0.3},
        {"attention_bias": True, "mlp_bias": True}, {"hidden_act": "gelu_pytorch_tanh"}, {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ],
    ids=lambda more: next(iter(more)),
)  # fmt: skip
def test_shapes_of_llama(more):
    assert fused(check(*begun(**more)))


def test_a_sequence_classifier_and_a_bare_model():
    config = llama().config
    for kind in (transformers.LlamaForSequenceClassification, transformers.LlamaModel):
        model = kind(config)
        run = rs.attach(model, rs.LoRA(rank=3, targets=LAYERS))
        stir(run)
        with torch.no_grad():
            before = model(ids())[0]
            report = run.lower()
            close({"out": model(ids())[0]}, {"out": before})
        assert fused(report)


def test_float64_is_not_rounded_on_the_way():
    """transformers rounds its norms to fp32; between lowered and not there is that, and no more."""
    model, run = begun(dtype=torch.float64)
    assert fused(check(model, run, 1e-6))
    model = llama(dtype=torch.float64)
    run = rs.attach(model, rs.LoRA(rank=4), base="nf4", total_steps=8)
    stir(run)
    assert fused(check(model, run, 1e-6))


def test_bfloat16_is_as_near_the_truth_as_the_model_itself():
    for method in (rs.LoRA(rank=4), rs.PaCA(rank=3)):
        nearer(lambda dtype, method=method: begun(method, dtype=dtype))


def nearer(make):
    """Lowered is off by no more than the model itself, where both are held to fp32."""
    wide, narrow = make(torch.float32), make(torch.bfloat16)
    with torch.no_grad():
        for p, q in zip(wide[0].parameters(), narrow[0].parameters(), strict=True):
            if p.is_floating_point() and q.is_floating_point():
                p.copy_(q)
    stir(wide[1])
    true, plain = outcome(*wide), outcome(*narrow)
    report = narrow[1].lower()
    lowered = outcome(*narrow)
    assert fused(report)
    off = [
        torch.stack([(found[n].double() - true[n].double()).norm() / true[n].double().norm() for n in true]).mean()
        for found in (lowered, plain)
    ]
    assert off[0] <= 1.1 * off[1], off


# ---- what makes a block run as it is --------------------------------------------------------------------------------


def test_outputs_of_the_inside():
    for attn in ("sdpa", "eager"):
        model, run = begun(attn=attn)
        wanted = model(ids(), output_hidden_states=True, output_attentions=attn == "eager")
        model, run = begun(attn=attn)
        report = run.lower()
        found = model(ids(), output_hidden_states=True)
        assert fused(report)  # though transformers put its recorders there
        close(dict(enumerate(found.hidden_states)), dict(enumerate(wanted.hidden_states)))
        if attn == "eager":
            found = model(ids(), output_attentions=True)
            close(dict(enumerate(found.attentions)), dict(enumerate(wanted.attentions)))
            assert set(report.aside.values()) == {"attention weights are asked for"}
            model(ids())
            assert fused(report)
            model.config.output_attentions = True
            assert len(model(ids()).attentions) == 2


def test_hooks():
    model, run = begun()
    report = run.lower()
    layer = model.model.layers[0]
    seen: list[str] = []
    inner = [layer.self_attn, layer.self_attn.q_proj, layer.mlp, layer.mlp.act_fn, layer.input_layernorm]
    inner.append(layer.mlp.up_proj.adapters["default"])
    for module in inner:
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *_: seen.append("heard"))
            outcome(model, run)
            assert seen == ["heard"]
            assert report.aside == {"model.layers.0": "a module inside it is hooked"}
            handle.remove()
            seen.clear()
            outcome(model, run)
            assert fused(report)
    layer = model.model.layers[1]
    handle = layer.mlp.register_full_backward_hook(lambda *_: seen.append("backward"))
    outcome(model, run)
    assert seen == ["backward"]
    assert report.aside == {"model.layers.1": "a module inside it is hooked"}
    handle.remove()
    layer.register_forward_hook(lambda *_: seen.append("block"))
    layer.register_full_backward_hook(lambda *_: seen.append("block, backward"))
    outcome(model, run)
    assert seen == ["backward", "block", "block, backward"]
    assert fused(report)


def test_a_forward_that_was_replaced():
    model, run = begun()
    report = run.lower()
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: 2 * type(mlp).forward(mlp, x)
    lowered = outcome(model, run)
    assert report.aside == {"model.layers.0": "a module inside it is hooked"}
    run.raise_()
    close(lowered, outcome(model, run))
    model.model.layers[1].forward = model.model.layers[1].forward
    assert list(run.lower().refused) == ["model.layers.1"]


def test_parts_that_are_others():
    class Doubled(transformers.models.llama.modeling_llama.LlamaMLP):
        def forward(self, x):
            return 2 * super().forward(x)

    model = llama()
    model.model.layers[0].mlp.__class__ = Doubled
    model.model.layers[1].input_layernorm = nn.LayerNorm(32)
    run = rs.attach(model, rs.LoRA(rank=3))
    stir(run)
    report = check(model, run)
    assert report.refused == {"model.layers.0": "mlp is a Doubled, which transformers does not have there"}
    assert report.aside == {"model.layers.1": "its norms are LayerNorm and LlamaRMSNorm"}
    assert "0 of 2" in str(report)


def test_layers_that_others_quantised_are_refused(monkeypatch):
    class Tagged(torch.Tensor):
        """As torchao's."""

    monkeypatch.setattr(Tagged, "__module__", "torchao.dtypes.affine")
    model = llama().requires_grad_(False)
    layer = model.model.layers[0].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Tagged), requires_grad=False)
    torch.nn.utils.parametrizations.orthogonal(model.model.layers[1].self_attn.o_proj)
    report = lowering.lower(model)
    assert report.refused == {
        "model.layers.0": "mlp.down_proj is a Linear",
        "model.layers.1": "self_attn.o_proj is a ParametrizedLinear",
    }


def test_adapters_of_several_kinds():
    for columns, why in ((("down_proj", "k_proj"), "its layers have adapters of several kinds"), (("down_proj",), "")):
        model, run = begun(rs.LoRA(rank=3, targets=("q_proj", "o_proj", "gate_proj")))
        run.add("columns", rs.PaCA(rank=2, targets=columns))
        run.use("default", "columns")
        stir(run)
        report = check(model, run)
        assert set(report.aside.values()) == ({why} if why else set())
        assert fused(report) == (not why)


def test_another_activation_is_refused():
    assert set(check(*begun(hidden_act="relu")).refused.values()) == {"its activation is relu"}


def test_other_models_are_left_alone():
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=61))
    block = model.transformer.h[0]
    report = rs.attach(model, rs.LoRA(rank=2)).lower()
    assert not report.blocks
    assert not report.refused
    assert model.transformer.h[0] is block
    assert "0 of 0" in str(report)


def test_a_block_that_is_all_of_the_model_is_refused():
    block = llama().model.layers[0]
    assert lowering.lower(block).refused == {"": "it is all of the model"}
    assert "" not in block._modules


def test_autocast():
    model, run = begun()
    with torch.autocast("cpu", torch.bfloat16):
        report = check(model, run, 0.03)  # the loss is taken in chunks, from logits in bf16
    assert set(report.aside.values()) == {"it computes in another dtype than its weights' float32"}
    model, run = begun(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(check(model, run, 0.05))


def test_meta():
    with torch.device("meta"):
        model = llama()
    model.requires_grad_(False)
    report = lowering.lower(model)
    assert model(ids().to("meta")).logits.shape == (3, 9, models.VOCAB)
    assert fused(report)


@pytest.mark.parametrize("whole", [True, False])
def test_torch_compile_takes_the_blocks_own_forward(whole):
    torch._dynamo.reset()
    model, run = begun(num_hidden_layers=1)
    plain = outcome(model, run)
    report = run.lower()
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    if whole:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
    else:
        compiled = model
        model.model.layers[0].compile(backend=backend, fullgraph=True)
    close(outcome(compiled, run), plain)
    assert len(seen) == 1
    assert set(report.aside.values()) == {"torch.compile makes kernels of its own"}
    if not whole:
        run.raise_()
        close(outcome(compiled, run), plain)
        assert list(run.lower().refused) == ["model.layers.0"]


# ---- what stays -----------------------------------------------------------------------------------------------------


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {k: t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for k, t in tensors.items()}


def owns(model) -> bool:
    """Whether every weight has memory of its own, and no module is a stand-in."""
    kept = all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    return kept and not any(stands_in(m) or "lowered" in vars(m) for m in model.modules())


@pytest.mark.parametrize("method", [rs.LoRA(rank=3), rs.PaCA(rank=3), rs.VeRA(rank=4)], ids=lambda m: m.name)
def test_names_identities_and_bits(method):
    model, run = begun(method)
    parameters, state = dict(model.named_parameters()), bits(model.state_dict())
    modules = [name for name, _ in model.named_modules()]
    classes = [type(m).__name__ for m in model.modules()]
    layer = model.model.layers[0]
    for _ in range(2):
        report = run.lower()
        assert fused(report)
        after = dict(model.named_parameters())
        assert list(after) == list(parameters)
        assert all(after[name] is p for name, p in parameters.items())
        assert list(model.state_dict()) == list(state)
        assert bits(model.state_dict()) == state
        assert [name for name, _ in model.named_modules()] == modules
        assert [type(m).__name__ for m in model.modules()] == classes
        assert isinstance(model.model.layers[0], type(layer))
        lowered = model.model.layers[0]
        assert fused(run.lower())
        assert model.model.layers[0] is lowered  # twice is once
        run.raise_()
        assert owns(model)
        assert type(model.model.layers[0]) is type(layer)
        assert bits(model.state_dict()) == state
        assert not report.aside  # nobody to ask, and no error


def test_a_state_is_loaded_into_a_lowered_model():
    other, run = begun()
    for p in other.parameters():
        p.data.mul_(1.1)
    model, mine = begun()
    assert fused(mine.lower())
    model.load_state_dict(other.state_dict())
    close(outcome(model, mine), outcome(other, run))
    weights = [model.model.layers[0].mlp.gate_proj.weight, model.model.layers[0].mlp.up_proj.weight]
    assert len({w.untyped_storage().data_ptr() for w in weights}) == 1  # written where they are


def test_weights_that_were_moved_or_cast_are_multiplied_as_they_lie():
    model, run = begun()
    report = run.lower()
    model.double()
    lowered = outcome(model, run)
    assert fused(report)
    run.raise_()
    close(lowered, outcome(model, run), 1e-6)


def test_lowered_before_attach():
    model, run = begun()
    plain = outcome(model, run)
    model = llama()
    report = lowering.lower(model)
    run = rs.attach(model, rs.LoRA(rank=4, alpha=8), total_steps=8)
    stir(run)
    close(outcome(model, run), plain)
    assert fused(report)
    run.raise_()
    close(outcome(model, run), plain)


def test_weights_lie_as_suits_what_stands_on_them_now():
    """rs.Trainer lowers before it attaches, and again; so does whoever shifts to another rank."""
    model = llama()
    lowering.lower(model)

    def rows_below() -> list[int]:
        first, second = (block_of(layer).slots for layer in model.model.layers)
        assert first == second
        return list(first)

    assert rows_below() == [0] * 4
    run = rs.attach(model, rs.LoRA(rank=16), total_steps=8)
    stir(run)
    before = outcome(model, run)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    for _ in range(2):
        report = run.lower()
        assert fused(report)
        assert rows_below() == [48, 16, 32, 16]
        places = {name: p.data_ptr() for name, p in model.named_parameters()}
        close(outcome(model, run), before)
        assert bits(dict(model.named_parameters())) == bits(weights)
    run.lower()
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places  # nothing was moved again
    run = run.shift(rs.LoRA(rank=8))
    report = run.lower()
    assert rows_below() == [0, 0, 16, 0]  # only with gate and up are rows a multiple of 16
    run = run.shift(rs.PaCA(rank=4))
    stir(run)
    run.raise_()
    plain = outcome(model, run)
    report = run.lower()
    close(outcome(model, run), plain)
    assert fused(report)


def test_lowered_before_the_base_is_rounded():
    model = llama()
    report = lowering.lower(model)
    run = rs.attach(model, rs.LoRA(rank=3, targets=("q_proj",)), base="int8")
    stir(run)
    lowered = outcome(model, run)
    assert fused(report)
    run.raise_()
    close(lowered, outcome(model, run))


@pytest.mark.parametrize("method", [rs.LoRA(rank=4, alpha=8), rs.PaCA(rank=3), rs.Full()], ids=lambda m: m.name)
def test_save_load_and_export(tmp_path, method):
    model, run = begun(method)
    plain = outcome(model, run)
    run.save(tmp_path / "plain")
    run.export(tmp_path / "plain-merged", format="merged")
    run.lower()
    run.save(tmp_path / "lowered")
    run.export(tmp_path / "lowered-merged", format="merged")
    for one, other in (("plain", "lowered"), ("plain-merged", "lowered-merged")):
        files = sorted(p.relative_to(tmp_path / one) for p in (tmp_path / one).rglob("*") if p.is_file())
        assert files
        for file in files:
            assert (tmp_path / one / file).read_bytes() == (tmp_path / other / file).read_bytes(), file
    model = llama()
    lowering.lower(model)
    close(outcome(model, rs.load(model, tmp_path / "lowered")), plain)


@pytest.mark.parametrize("largest", ["1GB", "20KB"])
def test_save_pretrained_writes_every_weight_once(tmp_path, largest):
    model = llama()
    state = bits(model.state_dict())
    lowering.lower(model)
    model.save_pretrained(tmp_path, max_shard_size=largest)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (largest == "20KB")
    found = [item for file in files for item in bits(load_file(file)).items()]
    assert dict(found) == state
    assert len(found) == len(state)
    assert sum(file.stat().st_size for file in files) < sum(map(len, state.values())) + 4000 * len(files)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert bits(again.state_dict()) == state
    assert owns(again)


def test_copies():
    model, run = begun()
    plain = outcome(model, run)["logits"]
    run.lower()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for other in copies:
        layer = other.model.layers[0]
        assert stands_in(layer)
        with torch.no_grad():
            close({"logits": other(ids()).logits}, {"logits": plain})
            assert layer.lowered.aside is None
            layer.self_attn.k_proj.base.weight.add_(1)
        mine = model.model.layers[0]
        assert layer is not mine
        assert layer.lowered is not mine.lowered
    with torch.no_grad():
        close({"logits": model(ids()).logits}, {"logits": plain})


def test_disabled_and_several_adapters():
    base = llama()
    with torch.no_grad():
        plain = base(ids()).logits
    for method in (rs.LoRA(rank=4), rs.PaCA(rank=3)):
        model, run = begun(method)
        report = run.lower()
        with run.disabled(), torch.no_grad():
            close({"logits": model(ids()).logits}, {"logits": plain})
        assert fused(report)
        run.add("other", rs.LoRA(rank=2))
        for names in (("default",), ("other",), ("default", "other")):
            run.use(*names)
            stir(run)
            lowered = outcome(model, run)
            assert fused(report) == (len(names) == 1)
            run.raise_()
            close(lowered, outcome(model, run))
            report = run.lower()


@pytest.mark.parametrize("method", [rs.LoRA(rank=3), rs.PaCA(rank=3)], ids=lambda m: m.name)
def test_merge_and_detach_leave_a_plain_model(method):
    for end in ("merge", "detach"):
        plain, run = begun(method)
        getattr(run, end)()
        model, run = begun(method)
        run.lower()
        outcome(model, run)
        assert getattr(run, end)() is model
        assert bits(model.state_dict()) == bits(plain.state_dict())
        assert owns(model)
        assert [type(m) for m in model.modules()] == [type(m) for m in llama().modules()]
        if end == "detach":
            assert bits(model.state_dict()) == bits(llama().state_dict())


def test_compress_leaves_a_plain_model():
    model, run = begun(rs.PCLoRA(rank=3, decay_end=0.5))
    run.lower()
    optimizer = run.optimizer(lr=1e-3)
    for _ in range(5):
        out = model(input_ids=ids(), labels=ids())
        run.loss(out.loss, input_ids=ids(), labels=ids()).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        before = model(ids()).logits
        run.compress()
        close({"logits": model(ids()).logits}, {"logits": before})
    assert owns(model)


def test_shift_keeps_fused_blocks():
    """Also where the next method stands at other layers than the last one."""
    model, run = begun(rs.LoRA(rank=3))
    report = run.lower(memory_budget="1GiB")
    before = outcome(model, run)["logits"]
    for method in (rs.PaCA(rank=2, targets=("q_proj", "down_proj")), rs.LoRA(rank=2), rs.VeRA(rank=4)):
        run = run.shift(method)
        assert all(map(stands_in, model.model.layers))
        assert stands_in(model.lm_head)
        assert lowering.how(model) == {"graphs": False, "memory_budget": "1GiB"}
        with torch.no_grad():
            close({"logits": model(ids()).logits}, {"logits": before}, 1e-4)
        stir(run)
        lowered = outcome(model, run)
        assert fused(run.lower(memory_budget="1GiB"))
        run.raise_()
        close(lowered, outcome(model, run))
        assert str(report) == "the model's own blocks stand there again"
        run.lower(memory_budget="1GiB")
        before = outcome(model, run)["logits"]
    run = run.shift(rs.Full())
    report = run.lower()
    assert set(report.aside.values()) == {"its norms train"}
    assert str(report).startswith(f"0 of {len(model.model.layers)} blocks run fused")
    check(model, run)


def test_dora_over_a_row_of_zeros_is_not_fused():
    """Its magnitude is zero too, and what it will learn is in no product."""
    for name, count in (("self_attn.k_proj", 1), ("lm_head", 2)):
        model = llama()
        with torch.no_grad():
            dict(model.named_modules())[name if count == 2 else f"model.layers.1.{name}"].weight[3] = 0
        run = rs.attach(model, rs.LoRA(rank=2, dora=True))
        stir(run)
        report = check(model, run)
        assert str(report).startswith(f"{count} of 2 blocks run fused")
        again = llama()
        with torch.no_grad():
            dict(again.named_modules())[name if count == 2 else f"model.layers.1.{name}"].weight[3] = 0
        assert str(rs.restore(again, run.state_dict()).lower()).startswith(f"{count} of 2 blocks run fused")


def test_dora_beside_large_biases_is_not_fused():
    """In 16 bits the gradients of magnitudes are of q, k and v less their biases."""
    for dtype, wanted in ((torch.bfloat16, 1), (torch.float32, 2)):
        model = qwen2(dtype=dtype)
        run = rs.attach(model, rs.LoRA(rank=2, dora=True))
        report = run.lower()
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.base.bias[1] = 50
        outcome(model, run)
        assert str(report).startswith(f"{wanted} of 2 blocks run fused")


def test_a_lowered_dora_is_pefts():
    """Gradients of A, B and magnitudes, and the input's, in float32."""
    config = peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=list(LAYERS))
    theirs = peft.get_peft_model(llama(), config)
    model = llama()
    run = rs.attach(model, rs.LoRA(rank=3, alpha=5, dora=True, targets=LAYERS))
    stir(run)
    assert fused(run.lower())
    pairs = {}
    for name, adapter in run.adapter().items():
        other = theirs.get_submodule(f"base_model.model.{name}")
        magnitude = other.lora_magnitude_vector["default"]
        pairs |= {
            f"{name}.A": (adapter.A, other.lora_A["default"].weight),
            f"{name}.B": (adapter.B, other.lora_B["default"].weight),
            f"{name}.magnitude": (adapter.magnitude, magnitude.weight),
        }
    with torch.no_grad():
        for mine, other in pairs.values():
            other.copy_(mine)
    grads = []
    for which in (model, theirs):
        words = model.model.embed_tokens(ids()).detach().requires_grad_()
        which(inputs_embeds=words, labels=ids()).loss.backward()
        grads.append(words.grad)
    found = {name: mine.grad for name, (mine, _) in pairs.items()} | {"x": grads[0]}
    close(found, {name: other.grad for name, (_, other) in pairs.items()} | {"x": grads[1]}, 1e-4)


def test_the_report_says_before_any_forward_what_hinders():
    for method, why in (
        (rs.LoRA(rank=2, lora_bias=True), "LoRALayer"),
        (rs.LoRA(rank=2, dropout=0.1), "LoRALayer"),
        (rs.Full(), "train"),
    ):
        model, run = begun(method)
        model.train()
        report = run.lower()
        assert str(report).startswith(f"0 of {len(model.model.layers)} blocks run fused")
        assert all(why in reason for reason in report.aside.values())
        assert len(report.aside) == len(report.blocks)


def test_gradient_checkpointing():
    model, run = begun()
    plain = outcome(model, run)
    report = run.lower()
    model.enable_input_require_grads()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        calls = []
        handle = model.model.embed_tokens.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        close(outcome(model, run, use_cache=False), plain)
        handle.remove()
        assert fused(report)
    model, run = begun(METHODS["lora-bias"][0])
    plain = outcome(model, run)
    report = run.lower()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    close(outcome(model, run, use_cache=False), plain)
    assert MORE in str(report)


@pytest.mark.parametrize("make", [llama, mistral, gemma, qwen2, qwen3])
def test_generate_and_caches(make):
    model, run = begun(make=make)
    plain = outcome(model, run, use_cache=True)
    prompt = {"input_ids": ids(1, 2, 5), "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1] * 5])}
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    model.eval()
    words = model.generate(**prompt, **how)
    report = run.lower()
    assert torch.equal(model.generate(**prompt, **how), words)
    assert torch.equal(model.generate(**prompt, **how, use_cache=False), words)
    if make is llama:
        assert torch.equal(model.generate(**prompt, **how, cache_implementation="static"), words)
    assert fused(report)
    close(outcome(model.train(), run, use_cache=True), plain)


def test_modes():
    model, run = begun()
    model.eval()
    with torch.no_grad():
        plain = model(ids()).logits
    report = run.lower()
    for mode in (torch.no_grad, torch.inference_mode, nullcontext):
        with mode():
            out = model(ids()).logits
        close({"logits": out}, {"logits": plain})
        assert out.requires_grad == (mode is nullcontext)
        assert fused(report)
    model.train()
    assert fused(check(model, run))


def test_a_graph_may_be_gone_through_twice():
    for method in (rs.LoRA(rank=3), rs.PaCA(rank=3)):
        model, run = begun(method)
        run.lower()
        loss = model(ids(), labels=ids()).loss
        leaves = [p for _, p in run.trainable()]
        once, twice = torch.autograd.grad(loss, leaves, retain_graph=True), torch.autograd.grad(loss, leaves)
        assert all(map(torch.equal, once, twice))


def test_what_is_kept_may_go_elsewhere():
    model, run = begun()
    plain = outcome(model, run)
    run.lower()
    with torch.autograd.graph.save_on_cpu():
        close(outcome(model, run), plain)


def test_the_gradient_of_the_models_input():
    model, run = begun()
    x = model.model.embed_tokens(ids()).detach().requires_grad_()
    plain = torch.autograd.grad(model(inputs_embeds=x, labels=ids()).loss, x)
    run.lower()
    close(dict(enumerate(torch.autograd.grad(model(inputs_embeds=x, labels=ids()).loss, x))), dict(enumerate(plain)))


def test_a_weight_that_was_changed_between_forward_and_backward_is_an_error():
    model, run = begun()
    run.lower()
    loss = model(ids(), labels=ids()).loss
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- bases in fewer bits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [rs.LoRA(rank=4), rs.LoRA(rank=4, dora=True), rs.PaCA(rank=3)], ids=["lora", "dora", "paca"]
)
@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_bases_in_fewer_bits(kind, method):
    def make(dtype):
        model = llama(dtype=dtype, hidden_size=64, intermediate_size=128)
        run = rs.attach(model, method, base=kind)
        stir(run)
        return model, run

    assert fused(check(*make(torch.float32)))
    model, run = make(torch.bfloat16)
    state = bits({k: t for k, t in model.state_dict().items() if t.is_floating_point() or t.dtype == torch.uint8})
    plain = outcome(model, run)
    report = run.lower()
    lowered = outcome(model, run)
    assert fused(report)
    close(
        {"loss": lowered["loss"], "logits": lowered["logits"]}, {"loss": plain["loss"], "logits": plain["logits"]}, 0.06
    )
    after = model.state_dict()
    assert bits({k: after[k] for k in state}) == state


def library(kind, dtype=torch.float32):
    """A model whose layers came in a library's storage; the library's layers stay where no adapter is put."""
    model, run = begun(rs.LoRA(rank=2), hidden_size=64, intermediate_size=128, dtype=dtype)
    run.detach()
    run = rs.attach(model, rs.LoRA(rank=2), base=kind)
    run.merge(onto="requantised")
    run = rs.attach(model, rs.LoRA(rank=4, targets=("q_proj", "gate_proj", "down_proj")))
    stir(run)
    return model, run


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_layers_of_a_library_stay_its_own(kind):
    model, run = library(kind)
    layers = [layer for block in model.model.layers for layer in (block.self_attn.v_proj, block.mlp.up_proj)]
    assert not any(isinstance(layer, Site) for layer in layers)
    weights = [p for layer in layers for p in layer.parameters()]
    places = [p.data_ptr() for p in weights]
    report = check(model, run, 0.05 if kind == "int8" else 2e-5)  # bitsandbytes rounds activations to 8 bits too
    assert fused(report)
    assert [p.data_ptr() for p in weights] == places
    if kind != "int8":  # where a first forward has made copies
        for p in weights:  # as .to() does
            p.data = p.data.clone().zero_()
        lowered = outcome(model, run)
        assert fused(report)
        run.raise_()
        close(lowered, outcome(model, run))


@pytest.mark.parametrize("onto", ["dequantised", "requantised"])
@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_merge_of_a_rounded_base(kind, onto):
    states = []
    for lower in (False, True):
        model = llama(dtype=torch.bfloat16, hidden_size=64, intermediate_size=128)
        run = rs.attach(model, rs.LoRA(rank=4), base=kind)
        stir(run)
        if lower:
            run.lower()
            outcome(model, run)
        run.merge(onto=onto)
        assert owns(model)
        states.append(bits({k: t for k, t in model.state_dict().items() if torch.is_tensor(t)}))
    assert states[0] == states[1]
