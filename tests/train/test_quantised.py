"""A base in fewer bits under rs.Trainer and in recipes: the same run, resumed to the bit; refused before it begins."""

import io
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_trainer import arguments, base, data, losses, same, tensors, trainer
from test_trainer_distributed import ENGINES, OnCPU, on_two
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import rankshift as rs
from rankshift.core.errors import ConfigError, UnsupportedLayer
from rankshift.train import config, recipe


def train(out, kind="nf4", method=None, resume=None, **more):
    t = trainer(out, method, rest={"base": kind}, **more)
    t.train(resume_from_checkpoint=resume)
    return t


def kinds(run):
    return {site.base.kind for site in run.sites.values()}


@pytest.mark.parametrize(
    ("kind", "method"), [("nf4", rs.LoRA(rank=2, dropout=0.1)), ("nf4", rs.PaCA(rank=2)), ("int8", rs.VeRA(rank=4))]
)
def test_three_updates_and_three_are_six(tmp_path, kind, method):
    whole = train(tmp_path, kind, method, max_steps=6, save_steps=3)
    assert kinds(whole.run) == {kind}
    again = train(tmp_path, kind, method, str(tmp_path / "checkpoint-3"), max_steps=6, save_strategy="no")
    assert again.run.step == 6
    assert losses(again) == losses(whole)
    assert same(tensors(again.run), tensors(whole.run))
    held = [{n: t.clone() for n, t in site.base.stored.items()} for site in again.run.sites.values()]
    assert all(same(a, dict(s.base.stored)) for a, s in zip(held, whole.run.sites.values(), strict=True))


def test_it_is_the_run_that_attach_makes(tmp_path):
    run = rs.attach(base(), rs.LoRA(rank=2, dropout=0.1), base="nf4", seed=3, total_steps=8)
    given = rs.Trainer(run=run, args=arguments(tmp_path / "a", save_strategy="no"), train_dataset=data())
    given.train()
    assert losses(given) == losses(train(tmp_path / "b", save_strategy="no"))
    assert losses(given) != losses(train(tmp_path / "c", None, save_strategy="no"))


def test_a_checkpoint_in_one_storage_is_not_resumed_in_another(tmp_path):
    train(tmp_path, "nf4", max_steps=2)
    for other in ("fp4", None):
        with pytest.raises(rs.errors.WrongBase, match="holds its base as"):
            train(tmp_path, other, resume=True, max_steps=4)


def test_stages_of_a_method_keep_the_storage(tmp_path):
    method = rs.SoRA(rank=4, sparsity=(10, 20), gate_init="normal", targets=("q_proj", "down_proj"))
    whole = train(tmp_path, "nf4", method, max_steps=6, save_steps=4, warmup_steps=0)
    assert len(whole.run.phases) > 1
    assert kinds(whole.run) == {"nf4"}
    resumed = {"resume": str(tmp_path / "checkpoint-4"), "save_strategy": "no"}
    again = train(tmp_path, "nf4", method, max_steps=6, warmup_steps=0, **resumed)
    assert kinds(again.run) == {"nf4"}
    assert losses(again) == losses(whole)
    assert same(tensors(again.run), tensors(whole.run))


def test_a_model_that_transformers_quantised(tmp_path):
    base().save_pretrained(tmp_path / "base")
    options = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=options, dtype=torch.float32)
    t = trainer(tmp_path / "a", model=model, save_strategy="no")
    t.train()
    assert model.is_quantized
    assert losses(t) == losses(train(tmp_path / "b", save_strategy="no"))


@pytest.mark.parametrize(
    ("method", "more", "error", "text"),
    [
        (rs.GaLore(rank=2), {}, ConfigError, "trains the weights of the model"),
        (rs.ReLoRA(rank=2, every=4), {}, UnsupportedLayer, "lossy=True"),
        (rs.LoRA(rank=2), {"then": [rs.Then(rs.VeRA(rank=2), steps=3)]}, ConfigError, "would round most of that away"),
        (rs.LoRA(rank=2), {"base": "nf5"}, ConfigError, "none of nf4"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_happens(tmp_path, method, more, error, text):
    model = base()
    before = [id(module) for module in model.modules()]
    with pytest.raises(error, match=text):
        rs.Trainer(model, arguments(tmp_path / "out"), method=method, train_dataset=data(), **{"base": "nf4", **more})
    assert [id(module) for module in model.modules()] == before
    assert not (tmp_path / "out").exists()


def test_a_run_that_exists_has_its_own(tmp_path):
    run = rs.attach(base(), rs.LoRA(rank=2))
    with pytest.raises(ConfigError, match=r"base= goes with method="):
        rs.Trainer(run=run, base="nf4", args=arguments(tmp_path), train_dataset=data())


# ---- recipes ---------------------------------------------------------------------------------------------------------


def read(*pairs):
    return config.read(None, [*pairs, "data=nothing.txt", "model=nowhere"])


@pytest.mark.parametrize(
    ("pairs", "text"),
    [
        (["base=nf5"], r"base = 'nf5' is not one of .* Did you mean 'nf4'"),
        (["base=meta-llama/Llama-3.2-1B"], r"is not one of 'nf4', 'fp4', 'int8', 'fp8' or none"),
        (["bases=nf4"], "Did you mean 'base'"),
        (["base=nf4", "method=galore"], "base: GaLore trains the weights"),
        (["base=int8", "method=relora"], "lossy=True"),
        (["base=nf4", "phases=[{method: lora, until: {steps: 9}}, {method: vera}]"], "base: LoRA is to go on as VeRA"),
    ],
)
def test_settings_are_refused_before_data_is_read(pairs, text):
    with pytest.raises(ConfigError, match=text):
        read(*pairs)


def test_odd_sizes_are_not_taken_for_the_storage():
    assert read("base=nf4", "method=melora", "method.blocks=3").base == "nf4"
    assert read("base=nf4", "method=relora", "method.lossy=true").base == "nf4"
    assert read().base is None
    assert "base: fp8" in config.write(read("base=fp8"))


def job(tmp_path, model, *pairs):
    (tmp_path / "a.txt").write_text("hello how are you ? fine thanks . " * 50)
    out = io.StringIO()
    wanted = [f"model={model}", f"data={tmp_path / 'a.txt'}", "data.max_length=16", "train.steps=6", "train.lr=1e-2"]
    result = recipe.train(config.read(None, [*wanted, f"output={tmp_path / 'runs'}", *pairs]), Console(file=out))
    return result.directory, json.loads((result.directory / "metrics.json").read_text()), out.getvalue()


def test_a_recipe_with_a_base_in_4_bits(tmp_path, tiny_llama):
    directory, metrics, told = job(tmp_path, tiny_llama, "base=nf4")
    assert "14 layers in nf4 (" in told
    assert metrics["base"]["loss"] > metrics["final"]["loss"]
    assert json.loads((directory / "adapter" / "rankshift.json").read_text())["run"]["storage"]["kind"] == "nf4"
    _, plain, told = job(tmp_path, tiny_llama)
    assert " layers in " not in told
    assert plain["base"]["loss"] != metrics["base"]["loss"]
    again = recipe.train(config.read(directory / "config.yaml"), Console(file=io.StringIO()))
    assert json.loads((again.directory / "metrics.json").read_text())["train_loss"] == metrics["train_loss"]


def test_a_recipe_on_a_model_that_is_quantised_already(tmp_path, tiny_llama):
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    few = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=options, dtype=torch.float32)
    few.save_pretrained(tmp_path / "few")
    for file in Path(tiny_llama).glob("token*"):
        (tmp_path / "few" / file.name).write_bytes(file.read_bytes())
    directory, metrics, told = job(tmp_path, tmp_path / "few")
    assert "14 layers in nf4 (4.5 bits a weight)" in told
    assert metrics["base"]["loss"] > metrics["final"]["loss"]
    assert (directory / "peft" / "adapter_config.json").is_file()
    with pytest.raises(rs.errors.UnsupportedLayer, match="held in nf4 already"):
        job(tmp_path, tmp_path / "few", "base=int8")


def test_the_python_of_the_page(capsys):
    page = (Path(__file__).parents[2] / "docs" / "qlora.md").read_text(encoding="utf-8")
    first, second = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    batch = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}
    names = {"rs": rs, "model": base(), "batches": [batch]}
    exec(first.replace("rank=64", "rank=4"), names)
    assert "14 layers in nf4 (" in capsys.readouterr().out
    names["model"](**batch).loss.backward()
    names["optimizer"].step()
    exec(second, names)
    assert "same most likely class" in capsys.readouterr().out
    assert not any(isinstance(module, rs.core.site.Site) for module in names["model"].modules())


def train_in_two(out, kind, engine):
    alike = {"model": base(dropout=0.0), "save_strategy": "no", "rest": {"base": kind}}
    t = trainer(out, rs.LoRA(rank=2), cls=OnCPU, per_device_train_batch_size=1, **alike, **ENGINES[engine])
    t.train()
    codes = [site.base.codes for site in t.run.sites.values()]
    here = sum(getattr(w, "to_local", lambda w=w: w)().numel() for w in codes)
    return {"losses": losses(t), "tensors": tensors(t.run), "held": here / sum(w.numel() for w in codes)}


@pytest.mark.parametrize(("kind", "engine", "share"), [("nf4", "ddp", 1.0), ("nf4", "fsdp2", 0.5)])
def test_two_processes_are_one(tmp_path, kind, engine, share):
    one, two = on_two(tmp_path, train_in_two, tmp_path / "out", kind, engine)
    assert one["losses"] == two["losses"]
    assert same(one["tensors"], two["tensors"])
    assert one["held"] == pytest.approx(share)
    alone = train(tmp_path / "alone", kind, rs.LoRA(rank=2), model=base(dropout=0.0), save_strategy="no")
    assert one["losses"] == pytest.approx(losses(alone), abs=1e-3)
