"""Directories that PEFT wrote, loaded here: the same logits, and refusals by name. PEFT is the oracle."""

from __future__ import annotations

import json
import warnings

import io_models as models
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

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
    "one stack of experts": (models.moe, {"r": 3, "target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}),
    "transposed experts": (
        models.gpt_oss,
        {
            "r": 3,
            "target_modules": [],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 5},
        },
    ),
    "parameter of a linear layer": (models.llama, {"r": 3, "target_modules": [], "target_parameters": ["q_proj.weight"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_same_logits(case, tmp_path):
    make, config = CASES[case]
    wanted = write(tmp_path, make, **config)
    model = make()
    before = models.logits(model)
    assert (wanted - before).abs().max() > 1e-3  # the adapter does something
    run = rs.load(model, tmp_path)
    got = models.logits(model)
    assert (got - wanted).abs().max() <= 1e-6
    if config.get("bias", "none") == "none":
        with run.disabled():
            assert torch.equal(models.logits(model), before)
