"""Plain model directories: what transformers and torch load is the merged model, and the run does not notice."""

from __future__ import annotations

import json

import io_models as models
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import rankshift as rs

LORA = rs.LoRA


def trained(make, method):
    model = make()
    run = rs.attach(model, method)
    models.stir(run.trainable())
    return model, run


def bits(run):
    """Everything that a run and its model hold, copied; and which modules there are."""
    tensors = {k: v.clone() for k, v in run.model.state_dict().items()}
    return tensors, [(n, id(m)) for n, m in run.model.named_modules()], run.describe()


CASES = {
    "plain": (models.llama, LORA(rank=4, targets=("q_proj", "down_proj"))),
    "dora pissa": (models.llama, LORA(rank=4, dora=True, init="pissa", targets="q_proj")),
    "whole modules": (models.llama, LORA(rank=4, targets="q_proj", modules_to_save=("lm_head", "model.norm"))),
    "biases": (models.llama, LORA(rank=4, targets="q_proj", bias="all")),
    "lora_bias": (models.llama, LORA(rank=4, targets="q_proj", lora_bias=True)),
    "embedding": (models.llama, LORA(rank=4, targets=("embed_tokens", "q_proj"))),
    "conv1d": (models.gpt2, LORA(rank=4, targets=("c_attn", "c_fc"))),
    "experts": (models.moe, LORA(rank=3, targets=("experts.gate_up_proj", "experts.down_proj"))),
    "transposed experts": (models.gpt_oss, LORA(rank=3, targets=("experts.gate_up_proj", "experts.down_proj"))),
    "classifier": (models.bert, LORA(rank=4, targets="q_lin", modules_to_save=("classifier",))),
    "full": (models.llama, rs.Full()),
}


@pytest.mark.parametrize("case", CASES)
def test_from_pretrained_gives_the_merged_model(case, tmp_path):
    make, method = CASES[case]
    model, run = trained(make, method)
    wanted, before = models.logits(model), bits(run)
    run.export(tmp_path, format="merged")
    tensors, modules, described = bits(run)
    assert modules == before[1]
    assert described == before[2]
    assert all(torch.equal(tensors[k], v) for k, v in before[0].items())
    assert torch.equal(models.logits(model), wanted)
    plain = type(make()).from_pretrained(tmp_path).eval()
    assert [type(m) for m in plain.modules()] == [type(m) for m in make().modules()]
    assert (models.logits(plain) - wanted).abs().max() <= 2e-6  # one fp32 rounding of W + ΔW
    merged = run.merge()
    assert torch.equal(models.logits(plain), models.logits(merged))  # the same bits as merge()
    assert all(torch.equal(v, merged.state_dict()[k]) for k, v in plain.state_dict().items())


def test_auto_class_and_bf16(tmp_path):
    model = models.llama().to(torch.bfloat16)
    run = rs.attach(model, LORA(rank=4, targets="q_proj"))
    models.stir(run.trainable())
    run.export(tmp_path, format="merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.dtype == torch.bfloat16
    merged = run.merge()
    assert all(torch.equal(v, merged.state_dict()[k]) for k, v in plain.state_dict().items())


def test_a_tied_model_stays_tied_and_an_untied_one_says_so(tmp_path):
    model, run = trained(lambda: models.llama(tie=True), LORA(rank=4, targets="q_proj"))
    run.export(tmp_path / "tied", format="merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tied").eval()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert json.loads((tmp_path / "tied" / "config.json").read_text())["tie_word_embeddings"] is True
    assert (models.logits(plain) - models.logits(model)).abs().max() <= 2e-6
    for number, method in enumerate(
        (
            LORA(rank=4, targets="q_proj", modules_to_save=("lm_head",)),
            LORA(rank=4, targets="q_proj", modules_to_save=("embed_tokens", "lm_head")),
            LORA(rank=4, targets=("q_proj", "lm_head"), tied="untie"),
        )
    ):
        model, run = trained(lambda: models.llama(tie=True), method)
        before = model.config.tie_word_embeddings
        run.export(tmp_path / str(number), format="merged")
        assert model.config.tie_word_embeddings == before
        assert json.loads((tmp_path / str(number) / "config.json").read_text())["tie_word_embeddings"] is False
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(number)).eval()
        assert (models.logits(plain) - models.logits(model)).abs().max() <= 2e-6
        merged = run.merge()
        assert merged.config.tie_word_embeddings is False
        merged.save_pretrained(tmp_path / f"{number} merged")
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{number} merged").eval()
        assert (models.logits(plain) - models.logits(model)).abs().max() <= 2e-6


def test_any_module(tmp_path):
    model, run = trained(models.mixed, LORA(rank=3, targets=("one", "two", "three", "embed", "head")))
    wanted = models.logits(model)
    run.export(tmp_path, format="merged")
    assert torch.equal(models.logits(model), wanted)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.safetensors", "rankshift-merged.json"]
    plain = models.mixed(seed=5)
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert (models.logits(plain) - wanted).abs().max() <= 2e-6


def test_a_model_that_saves_itself_is_plain_while_it_does(tmp_path):
    class Own(models.Mixed):
        def save_pretrained(self, folder, state_dict):
            assert set(state_dict) == set(self.state_dict())
            assert [type(m) for m in self.modules()][1:] == [type(m) for m in models.Mixed().modules()][1:]
            torch.save(state_dict, folder / "pytorch_model.bin")

    model, run = trained(lambda: models.seeded(Own), LORA(rank=2, targets=("one", "head"), modules_to_save=("norm",)))
    wanted = models.logits(model)
    run.export(tmp_path, format="merged")
    assert torch.equal(models.logits(model), wanted)
    plain = models.mixed(seed=3)
    plain.load_state_dict(torch.load(tmp_path / "pytorch_model.bin"))
    assert (models.logits(plain) - wanted).abs().max() <= 2e-6


def test_a_module_with_shared_weights(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.c = nn.Linear(4, 4)
            self.b.weight = self.a.weight

    run = rs.attach(Tied(), LORA(rank=2, targets="c"))
    run.export(tmp_path, format="merged")
    Tied().load_state_dict(load_file(tmp_path / "model.safetensors"))


def test_several_adapters_are_summed_or_one_is_chosen(tmp_path):
    model, run = trained(models.llama, LORA(rank=2, targets="q_proj"))
    run.add("second", LORA(rank=4, targets=("q_proj", "v_proj")))
    run.use("default", "second")
    models.stir(run.trainable(), seed=3)
    run.export(tmp_path / "both", format="merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "both").eval()
    assert (models.logits(plain) - models.logits(model)).abs().max() <= 2e-6
    run.export(tmp_path / "one", format="merged", adapter="second")
    assert run.active == ("default", "second")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one").eval()
    run.use("second")
    assert (models.logits(plain) - models.logits(model)).abs().max() <= 2e-6
    run.use()
    run.export(tmp_path / "none", format="merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "none").eval()
    assert torch.equal(models.logits(plain), models.logits(models.llama()))


def test_a_bias_that_has_no_place(tmp_path):
    make = lambda: models.llama(attention_bias=False)  # noqa: E731
    _, run = trained(make, LORA(rank=4, targets="q_proj", lora_bias=True))
    with pytest.raises(rs.errors.ExportError, match="q_proj has no bias"):
        run.export(tmp_path / "out", format="merged")
    assert not list(tmp_path.iterdir())
