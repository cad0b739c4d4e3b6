"""Native directories: bit for bit in a fresh process, and every way in which files can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import io_models as models
import pytest
import torch
from safetensors.torch import load_file

import rankshift as rs
from rankshift.io import checkpoint

LORA = rs.LoRA


def trained(make, method, seed=0, steps=2):
    """A run after a few real updates and some noise."""
    model = make()
    run = rs.attach(model, method, seed=seed)
    train(model, run, steps)
    models.stir(run.trainable(), scale=0.02)
    return model, run


def train(model, run, steps):
    optimizer = run.optimizer(lr=1e-2)
    model.train()
    for step in range(steps):
        models.loss(model, seed=step).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


CASES = {
    "plain": ("llama", LORA(rank=4, targets=("q_proj", "down_proj"))),
    "dora": ("llama", LORA(rank=4, dora=True, targets="q_proj")),
    "pissa": ("llama", LORA(rank=4, init="pissa", targets="q_proj")),
    "olora dora": ("llama", LORA(rank=4, init="olora", dora=True, scaling="rslora", targets="q_proj")),
    "orthogonal": ("llama", LORA(rank=4, init="orthogonal", train="A", targets="q_proj")),
    "only B": ("llama", LORA(rank=4, train="B", precondition=True, targets="q_proj")),
    "bias all": ("llama", LORA(rank=4, bias="all", targets="q_proj")),
    "bias lora_only": ("llama", LORA(rank=4, bias="lora_only", targets="q_proj")),
    "lora_bias": ("llama", LORA(rank=4, lora_bias=True, targets="q_proj")),
    "whole modules": ("llama", LORA(rank=4, targets="q_proj", modules_to_save=("lm_head", "model.norm"))),
    "patterns": ("llama", LORA(rank=4, rank_pattern={"k_proj": 2}, alpha_pattern={"layers.0.*": 7})),
    "conv1d": ("gpt2", LORA(rank=4, targets=("c_attn", "c_fc"))),
    "experts": ("moe", LORA(rank=3, targets=("experts.gate_up_proj", "experts.down_proj", "q_proj"))),
    "convolutions, embedding, batch norm": ("mixed", LORA(rank=3, targets=("one", "two", "three", "embed"))),
    "full": ("llama", rs.Full()),
    "full in part": ("llama", rs.Full(targets=("layers.1",))),
    "full with batch norm": ("mixed", rs.Full()),
}


def elsewhere(make, folder, out):
    """The logits of a fresh process that loads the folder."""
    code = f"""
        import sys, torch
        sys.path[:0] = [{str(Path(__file__).parent)!r}]
        import io_models as models, rankshift as rs
        torch.set_num_threads(1)
        model = models.{make}()
        run = rs.load(model, {str(folder)!r})
        with run.disabled() if run.method.reversible else torch.no_grad():
            base = models.logits(model)
        torch.save([models.logits(model.eval()), base, run.describe()], {str(out)!r})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
    return torch.load(out)


def here(make, folder):
    model = getattr(models, make)()
    run = rs.load(model, folder)
    return model, run


@pytest.mark.parametrize("case", CASES)
def test_same_bits_after_save_and_load(case, tmp_path):
    make, method = CASES[case]
    model, run = trained(getattr(models, make), method)
    wanted, described = models.logits(model), run.describe()
    run.save(tmp_path / "out")
    assert torch.equal(models.logits(model), wanted)
    again, loaded = here(make, tmp_path / "out")
    assert torch.equal(models.logits(again.eval()), wanted)
    assert loaded.describe() == described
    if method.reversible:
        with run.disabled(), loaded.disabled():
            assert torch.equal(models.logits(again), models.logits(model))
    bases = sorted(f.name for f in (tmp_path / "out").glob("base-*"))
    assert bool(bases) == bool(run.changed)  # the base is written only if it changed


def test_same_bits_in_a_fresh_process(tmp_path):
    """The hardest at once: three phases, a changed base, two adapters, biases with an original to go back to."""
    model, run = trained(models.llama, rs.Full(targets=("layers.1",)))
    run = run.shift(LORA(rank=4, init="pissa", targets=("q_proj", "down_proj"), modules_to_save=("lm_head",)))
    train(model, run, 1)
    run = run.shift(LORA(rank=2, bias="all", dora=True, targets=("q_proj", "v_proj")))
    train(model, run, 2)
    run.save(tmp_path / "one")
    logits, base, described = elsewhere("llama", tmp_path / "one", tmp_path / "one.pt")
    assert torch.equal(logits, models.logits(model))
    with run.disabled():
        assert torch.equal(base, models.logits(model))
    assert described == run.describe()
    assert [phase["start"] for phase in described["phases"]] == [0, 2, 3]
    assert described["step"] == 5

    run = run.shift(LORA(rank=2, init="olora", targets="k_proj"))
    run.add("second", LORA(rank=4, lora_bias=True, modules_to_save=("model.norm",), targets=("q_proj", "k_proj")))
    run.use("default", "second")
    models.stir(run.trainable())
    run.save(tmp_path / "two")
    logits, base, described = elsewhere("llama", tmp_path / "two", tmp_path / "two.pt")
    assert torch.equal(logits, models.logits(model))
    with run.disabled():
        assert torch.equal(base, models.logits(model))
    assert described["active"] == ["default", "second"]


def test_training_goes_on_bit_for_bit(tmp_path):
    method = LORA(rank=4, init="pissa", bias="all", targets=("q_proj", "down_proj"))
    model, run = trained(models.llama, method, steps=3)
    run.save(tmp_path / "out")
    again, loaded = here("llama", tmp_path / "out")
    assert loaded.step == run.step == 3
    train(model, run, 2)  # both begin with new moments
    train(again, loaded, 2)
    assert torch.equal(models.logits(model), models.logits(again))


def test_big_bases_are_sharded(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD", 20_000)
    model, run = trained(models.llama, rs.Full())
    run.save(tmp_path / "out")
    bases = sorted((tmp_path / "out").glob("base-*"))
    assert len(bases) > 3
    sizes = [sum(t.numel() * t.element_size() for t in load_file(f).values()) for f in bases]
    assert max(sizes) <= 20_000
    assert sum(sizes) == sum(p.numel() * 4 for p in model.parameters())
    again, _ = here("llama", tmp_path / "out")
    assert torch.equal(models.logits(again.eval()), models.logits(model))


def test_low_precision_base_keeps_its_masters(tmp_path):
    model = models.llama().to(torch.bfloat16)
    run = rs.attach(model, LORA(rank=4, targets="q_proj"))
    models.stir(run.trainable())
    run.save(tmp_path / "out")
    assert {t.dtype for t in load_file(tmp_path / "out" / "adapter.safetensors").values()} == {torch.float32}
    again = models.llama().to(torch.bfloat16)
    rs.load(again, tmp_path / "out")
    assert torch.equal(models.logits(again), models.logits(model))


@pytest.mark.parametrize(
    "method",
    [
        LORA(rank=2, targets=("q_proj", "lm_head"), tied="untie"),
        LORA(rank=2, targets="q_proj", modules_to_save=("lm_head",)),
        LORA(rank=2, targets="q_proj", modules_to_save=("embed_tokens",)),
        LORA(rank=2, targets="q_proj"),
        rs.Full(),
    ],
)
def test_tied_embeddings_come_back_as_they_were(tmp_path, method):
    model, run = trained(lambda: models.llama(tie=True), method)
    for name in ("now", "after the next phase"):
        run.save(tmp_path / name)
        again = models.llama(tie=True)
        loaded = rs.load(again, tmp_path / name)
        assert torch.equal(models.logits(again.eval()), models.logits(model))
        assert again.config.tie_word_embeddings == model.config.tie_word_embeddings
        assert loaded.describe() == run.describe()
        if name == "now":
            run = run.shift(LORA(rank=2, targets="v_proj"))
            models.stir(run.trainable())


# ---- what can be wrong -----------------------------------------------------------------------------------------------


@pytest.fixture(name="folder")
def folder_fixture(tmp_path):
    _, run = trained(models.llama, rs.Full(targets=("layers.1",)))
    return run.shift(LORA(rank=2, targets="q_proj")).save(tmp_path / "out")


def two_lines(error):
    assert len(str(error.value).splitlines()) == 2, str(error.value)
    return str(error.value)


def plain(model):
    """The classes of a model's modules: nothing of ours is left in it."""
    return [type(module) for module in model.modules()] == [type(module) for module in models.llama().modules()]


@pytest.mark.parametrize("name", ["adapter.safetensors", "base-00001.safetensors"])
def test_damage_is_found_and_named(folder, name):
    file = folder / name
    good = file.read_bytes()
    for bad, what in ((good[:-1], "bytes"), (good[:-1] + bytes([good[-1] ^ 1]), "SHA-256")):
        file.write_bytes(bad)
        model = models.llama()
        with pytest.raises(rs.errors.CorruptFile, match=what) as error:
            rs.load(model, folder)
        assert name in two_lines(error)
        assert plain(model)
    file.unlink()
    with pytest.raises(rs.errors.MissingFile, match=name) as error:
        rs.load(models.llama(), folder)
    two_lines(error)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": 1, "files": {"a": 3}}', '{"format": "x", "files": {}}']
)
def test_a_manifest_that_is_none(folder, text):
    (folder / "rankshift.json").write_text(text)
    with pytest.raises(rs.errors.CorruptFile, match=r"rankshift\.json") as error:
        rs.load(models.llama(), folder)
    two_lines(error)


def test_a_manifest_cannot_name_files_elsewhere(folder):
    manifest = json.loads((folder / "rankshift.json").read_text())
    manifest["files"]["../other"] = {"size": 0, "sha256": ""}
    (folder / "rankshift.json").write_text(json.dumps(manifest))
    (folder.parent / "other").write_text("")
    with pytest.raises(rs.errors.MissingFile, match="other"):
        rs.load(models.llama(), folder)


def test_a_newer_format_is_told(folder):
    manifest = json.loads((folder / "rankshift.json").read_text())
    (folder / "rankshift.json").write_text(json.dumps(manifest | {"format": 9}))
    with pytest.raises(rs.errors.CheckpointError, match="format 9") as error:
        rs.load(models.llama(), folder)
    assert "pip install -U" in two_lines(error)


def test_no_directory_and_an_empty_one(tmp_path):
    with pytest.raises(rs.errors.MissingFile, match="nowhere") as error:
        rs.load(models.llama(), tmp_path / "nowhere")
    two_lines(error)
    with pytest.raises(rs.errors.MissingFile, match=r"rankshift\.json") as error:
        rs.load(models.llama(), tmp_path)
    two_lines(error)


def test_another_base_by_shape_by_name_and_by_value(folder):
    model = models.llama(hidden_size=16)
    with pytest.raises(
        rs.errors.WrongBase, match=r"embed_tokens\.weight is \(61, 32\); here it is \(61, 16\)"
    ) as error:
        rs.load(model, folder)
    two_lines(error)
    with pytest.raises(rs.errors.WrongBase, match=r"embed_tokens\.weight; this GPT2LMHeadModel") as error:
        rs.load(models.gpt2(), folder)
    two_lines(error)
    for seed, change, first in (
        (1, lambda model: None, "model.embed_tokens.weight"),
        (0, lambda model: model.model.layers[0].mlp.up_proj.weight.mul_(1.02), "model.layers.0.mlp.up_proj.weight"),
        (0, lambda model: model.lm_head.weight.zero_(), "lm_head.weight"),
    ):
        model = models.llama(seed=seed)
        with torch.no_grad():
            change(model)
        with pytest.raises(rs.errors.WrongBase, match="check_base=False") as error:
            rs.load(model, folder)
        assert f"in {first} (" in two_lines(error)
        assert plain(model)
        rs.load(model, folder, check_base=False)


def test_weights_that_the_directory_holds_are_not_asked_of_the_base(folder):
    model, _ = here("llama", folder)
    other = models.llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.zero_()  # trained in the first phase, so it comes with the directory
    rs.load(other, folder)
    assert torch.equal(models.logits(other), models.logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_in_another_precision_is_the_same_base(tmp_path, dtype):
    _, run = trained(models.llama, LORA(rank=2, targets="q_proj"))
    run.save(tmp_path / "out")
    rs.load(models.llama().to(dtype), tmp_path / "out")
    run = rs.attach(models.llama().to(dtype), LORA(rank=2, targets="q_proj"))
    run.save(tmp_path / "other")
    rs.load(models.llama(), tmp_path / "other")


def test_the_fingerprint_is_small_and_of_every_weight(tmp_path):
    _, run = trained(models.llama, LORA(rank=2, targets="q_proj", modules_to_save=("lm_head",)))
    run.save(tmp_path / "out")
    prints = json.loads((tmp_path / "out" / "rankshift.json").read_text())["base"]["prints"]
    assert set(prints) == {n for n, _ in models.llama().named_parameters()} - {"lm_head.weight"}
    assert max(len(entry["values"]) for entry in prints.values()) <= 64


def test_loading_needs_a_fresh_base(folder):
    model, _ = here("llama", folder)
    with pytest.raises(rs.errors.AttachError, match="fresh base"):
        rs.load(model, folder)


def test_a_running_run_can_read_its_own_directory(folder):
    """As a resume does: the model is attached already."""
    _, run = here("llama", folder)
    model, other = here("llama", folder)
    models.stir(other.trainable())
    other.load_state_dict(checkpoint.read(model, folder))
    assert torch.equal(models.logits(model), models.logits(run.model))
    wrong, attached = here("llama", folder)
    with torch.no_grad():
        wrong.model.layers[0].self_attn.v_proj.weight.mul_(2)
    with pytest.raises(rs.errors.WrongBase, match=r"layers\.0\.self_attn\.v_proj"):
        checkpoint.read(attached.model, folder)


def test_a_state_that_does_not_fit_leaves_the_model_plain():
    _, run = trained(models.llama, LORA(rank=2, targets="q_proj"))
    state = run.state_dict()
    del state["tensors"]["default/model.layers.1.self_attn.q_proj.B"]
    model = models.llama()
    with pytest.raises(rs.errors.WrongBase, match=r"layers\.1\.self_attn\.q_proj\.B"):
        rs.restore(model, state)
    assert plain(model)
    rs.restore(model, run.state_dict())
