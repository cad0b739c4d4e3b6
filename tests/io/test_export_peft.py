"""Exports that PEFT and transformers load: the same logits as the run gives. PEFT is the oracle."""

from __future__ import annotations

import json
import warnings

import io_models as models
import peft
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from torch import nn

import rankshift as rs

warnings.filterwarnings("ignore", module="peft")


def trained(make, method, seed=0):
    """A run in which nothing that trains stands where it started."""
    model = make()
    run = rs.attach(model, method, seed=seed)
    models.stir(run.trainable())
    return model, run


LORA = rs.LoRA
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
CASES = {
    "plain": (models.llama, LORA(rank=4, alpha=12, targets=("q_proj", "down_proj"))),
    "all-linear": (models.llama, LORA(rank=4)),
    "odd scale": (models.llama, LORA(rank=12, alpha=16, targets="q_proj")),
    "rslora": (models.llama, LORA(rank=9, alpha=16, scaling="rslora", targets="q_proj")),
    "dora": (models.llama, LORA(rank=4, dora=True, targets=("q_proj", "gate_proj"))),
    "patterns": (
        models.llama,
        LORA(
            rank=4,
            targets=("q_proj", "k_proj", "down_proj"),
            rank_pattern={"layers.0.self_attn.q_proj": 2, "down_proj": 6},
            alpha_pattern={"layers.1.mlp.down_proj": 3.5, "k_proj": 5},
        ),
    ),
    "rslora patterns": (
        models.llama,
        LORA(rank=4, scaling="rslora", targets=("q_proj", "k_proj"), rank_pattern={"q_proj": 9}),
    ),
    "pissa": (models.llama, LORA(rank=4, init="pissa", targets=("q_proj", "down_proj"))),
    "pissa rslora dora": (models.llama, LORA(rank=4, init="pissa", scaling="rslora", dora=True, targets="q_proj")),
    "olora": (models.llama, LORA(rank=4, init="olora", targets=("q_proj", "down_proj"))),
    "pissa wide": (models.llama, LORA(rank=14, init="pissa", targets="k_proj")),
    "gaussian": (models.llama, LORA(rank=4, init="gaussian", targets="q_proj")),
    "orthogonal": (models.llama, LORA(rank=4, init="orthogonal", targets="q_proj")),
    "only B": (models.llama, LORA(rank=4, train="B", precondition=True, targets="q_proj")),
    "bias all": (models.llama, LORA(rank=4, bias="all", targets="q_proj")),
    "bias lora_only": (models.llama, LORA(rank=4, bias="lora_only", targets=("q_proj", "down_proj"))),
    "lora_bias": (models.llama, LORA(rank=4, lora_bias=True, targets=("q_proj", "down_proj"))),
    "whole modules": (models.llama, LORA(rank=4, targets="q_proj", modules_to_save=("lm_head", "model.norm"))),
    "embedding": (models.llama, LORA(rank=4, targets=("embed_tokens", "q_proj"))),
    "conv1d": (models.gpt2, LORA(rank=4, targets=("c_attn", "c_fc"))),
    "conv1d pissa": (models.gpt2, LORA(rank=4, targets=("c_attn", "c_fc"), init="pissa")),
    "conv1d dora": (models.gpt2, LORA(rank=4, targets=("c_attn", "c_fc"), dora=True)),
    "classifier": (models.bert, LORA(rank=4, targets="q_lin", modules_to_save=("pre_classifier", "classifier"))),
    "head without its neck": (models.bert, LORA(rank=4, targets="q_lin", modules_to_save=("classifier",))),
    "frozen head": (models.bert, LORA(rank=4, targets="q_lin")),
    "bias all with a head": (models.bert, LORA(rank=4, targets="q_lin", bias="all", modules_to_save=("classifier",))),
    "experts": (models.moe, LORA(rank=3, targets=("q_proj", *EXPERTS), rank_pattern={"down_proj": 5})),
    "one stack of experts": (models.moe, LORA(rank=3, targets="experts.down_proj")),
    "some experts": (models.moe, LORA(rank=3, targets=("experts.down_proj", "layers.0.mlp.experts.gate_up_proj"))),
    "transposed experts": (models.gpt_oss, LORA(rank=3, targets=EXPERTS)),
    "one layer": (models.llama, LORA(rank=4, targets="model.layers.1.self_attn.q_proj")),
    "a name that ends in another": (models.mixed, LORA(rank=3, targets=("one", "head"))),
    "convolutions": (models.mixed, LORA(rank=3, targets=("one", "two", "three"))),
    "convolutions dora": (models.mixed, LORA(rank=3, targets=("one", "two", "three"), dora=True)),
    "convolutions pissa": (models.mixed, LORA(rank=3, targets=("one", "two", "three"), init="pissa")),
    "plain module": (models.mixed, LORA(rank=3, targets=("embed", "head"), rank_pattern={"head": 2})),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_gives_the_same_logits(case, tmp_path):
    make, method = CASES[case]
    model, run = trained(make, method)
    wanted, state = models.logits(model), {k: v.clone() for k, v in run.state_dict()["tensors"].items()}
    assert (wanted - models.logits(make())).abs().max() > 1e-4
    run.export(tmp_path / "out")
    assert torch.equal(models.logits(model), wanted)  # the run goes on unchanged
    assert all(torch.equal(v, state[k]) for k, v in run.state_dict()["tensors"].items())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "out").eval()
    assert not [str(w.message) for w in caught if "missing" in str(w.message) or "unexpected" in str(w.message)]
    assert (models.logits(theirs) - wanted).abs().max() <= 1e-6
    again = make()
    rs.load(again, tmp_path / "out")
    assert (models.logits(again) - wanted).abs().max() <= 1e-6


@pytest.mark.parametrize("case", [c for c in CASES if CASES[c][0] is not models.mixed])
def test_transformers_gives_the_same_logits(case, tmp_path):
    make, method = CASES[case]
    if method.modules_to_save and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("older transformers drop the whole modules of PEFT's own files too")
    model, run = trained(make, method)
    run.export(tmp_path)
    theirs = make()
    theirs.load_adapter(str(tmp_path))
    assert (models.logits(theirs) - models.logits(model)).abs().max() <= 1e-6


PORTABLE = {
    k: v for k, v in CASES.items() if k in ("plain", "rslora", "patterns", "pissa", "olora", "conv1d", "one layer")
}
PORTABLE |= {"experts": CASES["experts"], "all-linear": CASES["all-linear"]}


@pytest.mark.parametrize("case", PORTABLE)
def test_portable_is_one_plain_lora(case, tmp_path):
    make, method = PORTABLE[case]
    model, run = trained(make, method)
    run.export(tmp_path, profile="portable")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    assert not any(
        config.get(key) for key in ("rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "modules_to_save")
    )
    assert config["bias"] == "none"
    assert isinstance(config["target_modules"], list)
    for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        experts = 4 if ".experts." in name else 1
        assert tensor.shape[0 if "lora_A" in name else 1] == config["r"] * experts, name
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    assert (models.logits(theirs) - models.logits(model)).abs().max() <= 1e-6


def test_target_modules_are_last_names_where_that_is_exact(tmp_path):
    for targets, written in (
        (("q_proj", "down_proj"), ["down_proj", "q_proj"]),
        (("layers.1.self_attn.q_proj",), ["model.layers.1.self_attn.q_proj"]),
    ):
        _, run = trained(models.llama, LORA(rank=2, targets=targets))
        run.export(tmp_path, profile="portable")
        assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == written


@pytest.mark.parametrize(
    ("make", "method", "reason"),
    [
        (models.llama, LORA(rank=2, dora=True), "DoRA"),
        (models.llama, LORA(rank=2, lora_bias=True), "lora_bias"),
        (models.llama, LORA(rank=2, bias="all"), "biases"),
        (models.llama, LORA(rank=2, modules_to_save=("lm_head",)), "lm_head"),
        (models.mixed, LORA(rank=2, targets="two"), "two is no linear layer"),
        (models.mixed, LORA(rank=2, targets="embed"), "embed is no linear layer"),
    ],
)
def test_portable_refuses_with_the_reason(make, method, reason, tmp_path):
    _, run = trained(make, method)
    with pytest.raises(rs.errors.ExportError, match=reason):
        run.export(tmp_path / "out", profile="portable")
    assert not list(tmp_path.iterdir())


def test_a_changed_base_cannot_travel_in_an_adapter(tmp_path):
    _, run = trained(models.llama, rs.Full())
    with pytest.raises(rs.errors.ExportError, match="merged"):
        run.export(tmp_path)
    _, run = trained(models.llama, LORA(rank=2, targets="q_proj"))
    run = run.shift(LORA(rank=2, targets="k_proj"))
    with pytest.raises(rs.errors.ExportError, match="q_proj"):
        run.export(tmp_path)


def test_which_adapter(tmp_path):
    model, run = trained(models.llama, LORA(rank=2, targets="q_proj"))
    run.add("second", LORA(rank=4, targets="v_proj"))
    run.use("default", "second")
    models.stir(run.trainable(), seed=3)
    with pytest.raises(rs.errors.ExportError, match="default, second"):
        run.export(tmp_path)
    with pytest.raises(rs.errors.AttachError, match="'second'"):
        run.export(tmp_path, adapter="secnd")
    run.export(tmp_path, adapter="second")
    run.use("second")
    theirs = peft.PeftModel.from_pretrained(models.llama(), tmp_path).eval()
    assert (models.logits(theirs) - models.logits(model)).abs().max() <= 1e-6


def test_unknown_format_and_profile(tmp_path):
    _, run = trained(models.llama, LORA(rank=2, targets="q_proj"))
    with pytest.raises(rs.errors.ConfigError, match="'merged'"):
        run.export(tmp_path, format="merge")
    with pytest.raises(rs.errors.ConfigError, match="'portable'"):
        run.export(tmp_path, profile="portabel")


def test_config_tells_base_and_task(tmp_path):
    model, run = trained(models.llama, LORA(rank=2, targets="q_proj"))
    model.config.name_or_path = "some/llama"
    run.export(tmp_path / "lm")
    config = json.loads((tmp_path / "lm" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("some/llama", "CAUSAL_LM")
    for copies, task in (((), None), (("pre_classifier", "classifier"), "SEQ_CLS")):
        _, run = trained(models.bert, LORA(rank=2, targets="q_lin", modules_to_save=copies))
        run.export(tmp_path / "cls")
        assert json.loads((tmp_path / "cls" / "adapter_config.json").read_text())["task_type"] == task


def conv(**options):
    return nn.Sequential(nn.Conv2d(3, 4, **options))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kernel_size": (3, 1), "padding": 1, "padding_mode": "reflect"}, "padding_mode='reflect'"),
        ({"kernel_size": 3, "padding": "same", "padding_mode": "circular"}, "padding_mode='circular'"),
        ({"kernel_size": 3, "dilation": 2, "padding": 2}, r"dilation=\(2, 2\)"),
        ({"kernel_size": (1, 2), "dilation": (1, 3)}, r"dilation=\(1, 3\)"),
        ({"kernel_size": 3, "padding_mode": "reflect"}, None),  # nothing is padded
        ({"kernel_size": (1, 3), "dilation": (2, 1)}, None),  # and nothing is spread
    ],
)
def test_convolutions_that_peft_computes_otherwise(options, reason, dora, tmp_path):
    """PEFT gives lora_A neither dilation nor padding_mode. Where that matters the layer is refused by name."""
    method, x = LORA(rank=2, targets="0", dora=dora), torch.randn(2, 3, 8, 8)
    model, run = trained(lambda: models.seeded(lambda: conv(**options)), method)
    fresh = models.seeded(lambda: conv(**options))
    if reason is None:
        run.export(tmp_path)
        theirs = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
        assert (theirs(x) - model(x)).abs().max() <= 1e-6
        rs.load(again := models.seeded(lambda: conv(**options)), tmp_path)
        assert (again(x) - model(x)).abs().max() <= 1e-6
        return
    with pytest.raises(rs.errors.ExportError, match=rf"0 is a convolution with {reason}.*merged"):
        run.export(tmp_path / "out")
    assert not list(tmp_path.iterdir())
    run.export(tmp_path / "merged", format="merged")
    fresh.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    torch.testing.assert_close(fresh(x), model(x), rtol=1e-5, atol=1e-5)
