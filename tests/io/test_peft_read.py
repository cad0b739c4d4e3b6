"""Directories that PEFT wrote, loaded here: the same logits, and refusals by name. PEFT is the oracle."""

from __future__ import annotations

import json
import warnings

import io_models as models
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rankshift as rs

warnings.filterwarnings("ignore", module="peft")
Q, K, MLP = "q_proj", "k_proj", "down_proj"


def write(folder, make, seed=0, **config):
    """A trained-looking PEFT directory, and the logits that PEFT computes with it when it loads it again."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = peft.get_peft_model(make(seed=seed), peft.LoraConfig(**config))
    own = [(n, p) for n, p in model.named_parameters() if p.requires_grad and "original_module" not in n]
    models.stir(own)
    model.save_pretrained(folder)
    again = peft.PeftModel.from_pretrained(make(seed=seed), folder).eval()
    return models.logits(again)


CASES = {
    "plain": (models.llama, {"r": 4, "lora_alpha": 16, "target_modules": [Q, MLP]}),
    "rslora": (models.llama, {"r": 9, "lora_alpha": 16, "use_rslora": True, "target_modules": [Q]}),
    "dora": (models.llama, {"r": 4, "use_dora": True, "target_modules": [Q, "gate_proj"]}),
    "patterns": (
        models.llama,
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": [Q, K, MLP],
            "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2, "down_proj": 6},
            "alpha_pattern": {"layers.1.mlp.down_proj": 3, r".*self_attn\.k_proj": 5},
        },
    ),
    "rslora patterns": (
        models.llama,
        {"r": 4, "use_rslora": True, "target_modules": [Q, K], "rank_pattern": {Q: 9}, "alpha_pattern": {K: 5}},
    ),
    "conv1d": (models.gpt2, {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv1d dora": (models.gpt2, {"r": 4, "target_modules": ["c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "conv1d pissa": (
        models.gpt2,
        {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": "pissa"},
    ),
    "convolutions": (models.mixed, {"r": 3, "target_modules": ["one", "two", "three"]}),
    "convolutions dora": (models.mixed, {"r": 3, "target_modules": ["one", "two", "three"], "use_dora": True}),
    "embedding": (models.mixed, {"r": 3, "target_modules": ["embed", "head"]}),
    "embedding of a model": (models.llama, {"r": 3, "target_modules": ["embed_tokens", Q]}),
    "modules_to_save": (models.llama, {"r": 4, "target_modules": [Q], "modules_to_save": ["lm_head", "norm"]}),
    "classifier": (models.bert, {"r": 4, "target_modules": ["q_lin"], "task_type": "SEQ_CLS"}),
    "bias all": (models.llama, {"r": 4, "target_modules": [Q], "bias": "all"}),
    "bias all and whole modules": (
        models.bert,
        {"r": 4, "target_modules": ["q_lin"], "bias": "all", "modules_to_save": ["classifier"]},
    ),
    "bias lora_only": (models.llama, {"r": 4, "target_modules": [Q, MLP], "bias": "lora_only"}),
    "lora_bias": (models.llama, {"r": 4, "target_modules": [Q, MLP], "lora_bias": True}),
    "regex": (models.llama, {"r": 4, "target_modules": r".*layers\.1\..*(q|v)_proj"}),
    "all-linear": (models.llama, {"r": 4, "target_modules": "all-linear"}),
    "exclude": (models.llama, {"r": 4, "target_modules": [Q, K], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "layers": (models.llama, {"r": 4, "target_modules": [Q, K], "layers_to_transform": [1]}),
    "layers pattern": (
        models.llama,
        {"r": 4, "target_modules": [Q], "layers_to_transform": 0, "layers_pattern": "layers"},
    ),
    "pissa": (models.llama, {"r": 4, "lora_alpha": 12, "target_modules": [Q, MLP], "init_lora_weights": "pissa"}),
    "pissa rslora dora": (
        models.llama,
        {"r": 4, "target_modules": [Q], "init_lora_weights": "pissa", "use_rslora": True, "use_dora": True},
    ),
    "olora": (models.llama, {"r": 4, "lora_alpha": 12, "target_modules": [Q, MLP], "init_lora_weights": "olora"}),
    "gaussian": (models.llama, {"r": 4, "target_modules": [Q], "init_lora_weights": "gaussian"}),
    "orthogonal": (models.llama, {"r": 4, "target_modules": [Q], "init_lora_weights": "orthogonal"}),
    "no init": (models.llama, {"r": 4, "target_modules": [Q], "init_lora_weights": False}),
    "wide": (models.bert, {"r": 64, "target_modules": ["q_lin", "out_lin"]}),
    "experts": (
        models.moe,
        {"r": 3, "target_modules": [Q], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "one stack of experts": (
        models.moe,
        {"r": 3, "target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
    ),
    "transposed experts": (
        models.gpt_oss,
        {
            "r": 3,
            "target_modules": [],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 5},
        },
    ),
    "parameter of a linear layer": (
        models.llama,
        {"r": 3, "target_modules": [], "target_parameters": ["q_proj.weight"]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_same_logits(case, tmp_path):
    make, config = CASES[case]
    wanted = write(tmp_path, make, **config)
    model = make()
    before = models.logits(model)
    assert (wanted - before).abs().max() > 1e-4  # the adapter does something
    run = rs.load(model, tmp_path)
    got = models.logits(model)
    assert (got - wanted).abs().max() <= 1e-6
    if config.get("bias", "none") == "none":
        with run.disabled():
            assert torch.equal(models.logits(model), before)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.fixture(name="folder")
def folder_fixture(tmp_path):
    write(tmp_path, models.llama, r=4, target_modules=[Q, K])
    return tmp_path


def edit(folder, change):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, path)


A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "mica"),
        ("trainable_token_indices", [1, 2]),
        ("megatron_config", {"a": 1}),
        ("alora_invocation_tokens", [3]),
        ("layer_replication", [[0, 2]]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 1}),
        ("monteclora_config", {"num_samples": 2}),
        ("velora_config", {"scale": 1.0}),
        ("arrow_config", {"top_k": 3}),
        ("ensure_weight_tying", True),
        ("a_field_of_the_future", 3),
        ("peft_type", "IA3"),
    ],
)
def test_option_without_an_equal_is_named(folder, field, value):
    edit(folder, lambda config: config.update({field: value}))
    model = models.llama()
    with pytest.raises(rs.errors.ConfigError, match=field) as raised:
        rs.load(model, folder)
    assert len(str(raised.value).splitlines()) == 2
    assert [type(m).__name__ for m in model.modules()] == [type(m).__name__ for m in models.llama().modules()]


def test_field_of_the_future_at_rest_is_no_obstacle(folder):
    edit(folder, lambda config: config.update({"future": None, "future_list": [], "future_flag": False}))
    rs.load(models.llama(), folder)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (lambda t: t.pop(A0), rs.errors.CorruptFile, "layers.0.self_attn.q_proj has no tensor A"),
        (
            lambda t: [t.pop(A0), t.pop(A0.replace("_A", "_B"))],
            rs.errors.CorruptFile,
            "adapts model.layers.0.self_attn.q_proj .* holds no tensors",
        ),
        (
            lambda t: t.update({A0.replace("layers.0", "layers.7"): t[A0]}),
            rs.errors.WrongBase,
            "layers.7.self_attn.q_proj",
        ),
        (lambda t: t.update({"base_model.model.more": t[A0]}), rs.errors.WrongBase, "more"),
        (lambda t: t.update({"more": t[A0]}), rs.errors.CorruptFile, "'more'"),
        (
            lambda t: t.update({A0.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)}),
            rs.errors.CorruptFile,
            "use_dora",
        ),
        (
            lambda t: t.update({A0.replace("lora_A.weight", "base_layer.bias"): torch.ones(32)}),
            rs.errors.CorruptFile,
            "base_layer.bias",
        ),
        (lambda t: t.update({A0: t[A0][:, :-1].contiguous()}), rs.errors.WrongBase, "q_proj"),
        (
            lambda t: t.update({A0: t[A0][:2].contiguous(), A0.replace("_A", "_B"): torch.zeros(32, 2)}),
            rs.errors.CorruptFile,
            "rank 2",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, error, named):
    edit_tensors(folder, change)
    model = models.llama()
    with pytest.raises(error, match=named):
        rs.load(model, folder)
    rs.attach(model, rs.LoRA(rank=2))  # the model is as it came


def test_another_base_is_named(folder):
    with pytest.raises(rs.errors.WrongBase, match=r"q_proj.*\n"):
        rs.load(models.llama(hidden_size=16), folder)


def test_missing_and_broken_files(folder):
    config = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(rs.errors.CorruptFile, match=r"adapter_config\.json"):
        rs.load(models.llama(), folder)
    (folder / "adapter_config.json").write_text(config)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(rs.errors.CorruptFile, match=r"adapter_model\.safetensors"):
        rs.load(models.llama(), folder)
    file.unlink()
    with pytest.raises(rs.errors.MissingFile, match=r"adapter_model\.safetensors"):
        rs.load(models.llama(), folder)


@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"]
)
def test_an_expression_that_is_none(folder, field):
    edit(folder, lambda config: config.update({field: {"(": 4} if "_pattern" in field and field[0] in "ra" else "("}))
    with pytest.raises(rs.errors.CorruptFile, match="no regular expression"):
        rs.load(models.llama(), folder)


def test_a_tied_layer_is_refused_or_untied(tmp_path):
    make = lambda seed=0: models.llama(tie=True, seed=seed)  # noqa: E731
    wanted = write(tmp_path, make, r=4, target_modules=[Q, "lm_head"])
    with pytest.raises(rs.errors.TiedWeights, match="untie"):
        rs.load(make(), tmp_path)
    model = make()
    rs.load(model, tmp_path, tied="untie")
    assert (models.logits(model) - wanted).abs().max() <= 1e-6


def test_bin_file_and_nothing_but_tensors_in_it(folder, tmp_path):
    wanted = models.llama()
    rs.load(wanted, folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    model = models.llama()
    rs.load(model, folder)
    assert torch.equal(models.logits(model), models.logits(wanted))
    torch.save({"a": edit}, folder / "adapter_model.bin")
    with pytest.raises(rs.errors.CorruptFile, match=r"adapter_model\.bin"):
        rs.load(models.llama(), folder)


def test_olora_on_conv1d_is_refused(tmp_path):
    write(tmp_path, models.llama, r=4, target_modules=[Q], init_lora_weights="olora")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.transformer.h.0.attn.c_proj"
    parts = {f"{name}.lora_{x}.weight": tensors[A0.replace("_A", f"_{x}")] for x in "AB"}
    save_file(parts, tmp_path / "adapter_model.safetensors")
    edit(tmp_path, lambda config: config.update({"target_modules": ["transformer.h.0.attn.c_proj"]}))
    with pytest.raises(rs.errors.ConfigError, match=r"olora.*Conv1D"):
        rs.load(models.gpt2(), tmp_path)


def test_embedding_saved_beside_the_adapter_is_loaded(tmp_path):
    wanted = models.llama()
    lora = peft.get_peft_model(wanted, peft.LoraConfig(r=4, target_modules=[Q]))
    models.stir([("e", lora.get_input_embeddings().weight), ("h", lora.get_output_embeddings().weight)])
    lora.save_pretrained(tmp_path, save_embedding_layers=True)
    model = models.llama()
    run = rs.load(model, tmp_path)
    assert torch.equal(models.logits(model), models.logits(lora))
    assert run.changed == {"model.embed_tokens.weight", "lm_head.weight"}


def test_loaded_adapter_trains_on(tmp_path):
    write(tmp_path, models.llama, r=4, target_modules=[Q], init_lora_weights="pissa", use_dora=True, bias="lora_only")
    model = models.llama()
    run = rs.load(model, tmp_path, seed=5)
    assert run.seed == 5
    assert {n.rpartition(".")[2] for n, _ in run.trainable()} == {"A", "B", "magnitude", "bias"}
    model.train()
    optimizer = run.optimizer(lr=1e-2)
    ids = torch.arange(12)[None]
    first = model(input_ids=ids, labels=ids).loss
    first.backward()
    optimizer.step()
    assert model(input_ids=ids, labels=ids).loss < first


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"padding": 1, "padding_mode": "reflect"}, "padding_mode='reflect'"), ({"dilation": 2}, r"dilation=\(2,\)")],
)
def test_convolutions_that_peft_computes_otherwise(options, reason, tmp_path):
    """PEFT trains them with a branch of plain padding and no dilation, for which there is no equal here."""
    model = nn.Sequential(nn.Conv1d(3, 4, 3, **options))
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    fresh = nn.Sequential(nn.Conv1d(3, 4, 3, **options))
    with pytest.raises(rs.errors.ConfigError, match=f"adapts 0, a convolution with {reason}"):
        rs.load(fresh, tmp_path)
    assert type(fresh[0]) is nn.Conv1d
