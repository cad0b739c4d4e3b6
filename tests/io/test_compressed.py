"""The compressed model: two thin layers for each dense one, written and read without the base."""

from __future__ import annotations

import gc
import json
import weakref

import io_models as models
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import rankshift as rs

FACTORIES = {"llama": models.llama, "gpt2": models.gpt2, "bert": models.bert, "mixed": models.mixed}


def method(name="llama", **more):
    targets = ("one", "two", "three", "head") if name == "mixed" else "all-linear"
    return rs.PCLoRA(**{"rank": 2, "targets": targets, "decay_end": 1.0, "features": False, **more})


def ended(name="llama", model=None, **more):
    """A run after its last update, with values that no start would give."""
    model = FACTORIES[name]() if model is None else model
    run = rs.attach(model, method(name, **more), total_steps=2)
    optimizer = run.optimizer(lr=1e-2)
    model.train()
    for step in range(2):
        loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    models.stir((n, p) for n, p in run.trainable())
    model.eval()
    return run


def loss(model, seed):
    """Of the outputs alone: these models have heads of several kinds."""
    ids = torch.randint(0, 13, (4, 8), generator=torch.Generator().manual_seed(seed))
    return (model(ids) if isinstance(model, models.Mixed) else model(input_ids=ids).logits).square().mean()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[2, 7, 4, 9]])).logits


def kinds(model):
    return {type(module).__module__.split(".")[0] for module in model.modules()}


# ---- in memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FACTORIES)
def test_compress_leaves_plain_thin_layers_of_the_same_function(name, dtype):
    run = ended(name, FACTORIES[name]().to(dtype))
    model, sites = run.model, run.sites
    wanted = models.logits(model)
    formula = {n: 2 * (s.spec.out + s.spec.into) + s.spec.out for n, s in sites.items()}
    report = run.compression()
    assert run.compress() is model
    assert torch.equal(models.logits(model), wanted)
    assert "rankshift" not in kinds(model)
    for layer, count in formula.items():
        pair = model.get_submodule(layer)
        assert type(pair) is nn.Sequential
        assert sum(p.numel() for p in pair.parameters()) == count
        assert all(p.requires_grad and p.dtype == dtype for p in pair.parameters())
        assert pair[0].bias is None
        assert not any(part.training for part in pair.modules())
    assert sum(p.numel() for p in model.parameters()) == report.total[1]
    with pytest.raises(rs.errors.AttachError, match=r"ended with compress"):
        run.compress()


def test_the_dense_weights_leave_memory():
    run = ended()
    held = [weakref.ref(site.base.weight) for site in run.sites.values()]
    assert all(ref() is not None for ref in held)
    model = run.compress()
    gc.collect()
    assert not any(ref() is not None for ref in held), "somebody still holds a dense weight"
    assert model is run.model


def test_a_compressed_model_trains_on_and_takes_a_method():
    model = ended().compress()
    loss(model.train(), 0).backward()
    assert all(p.grad is not None for p in model.parameters())
    rs.attach(model, rs.LoRA(rank=1))


def test_whole_modules_go_along():
    run = ended("llama", modules_to_save=("lm_head", "norm"))
    wanted = models.logits(run.model)
    head = run.model.lm_head.copies["default"].weight.detach().clone()
    model = run.compress()
    assert torch.equal(models.logits(model), wanted)
    assert torch.equal(model.lm_head.weight, head)


def test_a_layer_that_still_needs_its_base_is_refused(tmp_path):
    model = models.llama()
    run = rs.attach(model, rs.PCLoRA(rank=2, decay_end=0.75, features=False), total_steps=8)
    optimizer = run.optimizer()
    loss(model.train(), 0).backward()
    optimizer.step()
    for verb in (run.compress, lambda: run.export(tmp_path / "out", format="compressed")):
        with pytest.raises(rs.errors.ExportError, match=r"step 1 of 8: λ is still 0\.833.*decay_end = 0\.75"):
            verb()
    assert not (tmp_path / "out").exists()
    assert run.sites
    other = rs.attach(models.llama(), rs.LoRA(rank=2))
    with pytest.raises(rs.errors.ExportError, match="Only PC-LoRA"):
        other.compress()
    with pytest.raises(rs.errors.ExportError, match="size it was"):
        other.compression()


def test_a_switched_off_adapter_is_no_compressed_model():
    run = ended()
    run.use()
    with pytest.raises(rs.errors.ExportError, match="No adapter acts"):
        run.compress()
    run.use("default")
    assert "rankshift" not in kinds(run.compress())


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FACTORIES)
def test_what_is_written_holds_no_dense_weight_and_loads_without_the_base(tmp_path, name):
    run = ended(name)
    wanted, out = models.logits(run.model), tmp_path / "out"
    dense = {n: {tuple(s.base.weight.shape), (s.spec.out, s.spec.into)} for n, s in run.sites.items()}
    assert run.export(out, format="compressed") == out
    assert torch.equal(models.logits(run.model), wanted), "the run goes on"
    saved = load_file(out / "compressed.safetensors")
    for layer, shapes in dense.items():
        inside = [tuple(t.shape) for n, t in saved.items() if n.startswith(f"{layer}.")]
        assert len(inside) == 3
        assert not shapes & set(inside)
    parameters = dict(run.model.named_parameters())
    assert len(saved) >= len([n for n in parameters if ".adapters." not in n])
    if name == "mixed":
        with pytest.raises(rs.errors.ConfigError, match=r"no config\.json"):
            rs.load_compressed(out)
        loaded = rs.load_compressed(out, models.mixed(seed=5))
        with torch.device("meta"):
            bare = models.Mixed()
        bare = rs.load_compressed(out, bare.eval())
        assert torch.equal(models.logits(bare), wanted)
    else:
        loaded = rs.load_compressed(out)
        assert not loaded.training
        assert type(loaded) is type(run.model)
    assert torch.equal(models.logits(loaded), wanted)
    assert "rankshift" not in kinds(loaded)
    assert all(p.requires_grad for p in loaded.parameters())
    here = run.compress()
    assert here.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(here.state_dict().values(), loaded.state_dict().values(), strict=True))


def test_loading_draws_nothing_and_keeps_ties_and_dtype(tmp_path):
    run = ended("llama", models.llama(tie=True).to(torch.bfloat16))
    wanted = models.logits(run.model)
    run.model.generation_config.max_new_tokens = 7
    run.export(tmp_path / "out", format="compressed")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "compressed.safetensors")
    before = torch.random.get_rng_state()
    loaded = rs.load_compressed(tmp_path / "out")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.dtype == torch.bfloat16
    assert loaded.generation_config.max_new_tokens == 7
    assert torch.equal(models.logits(loaded), wanted)
    untied = ended("llama", models.llama(tie=True), modules_to_save=("embed_tokens",), tied="untie")
    wanted = models.logits(untied.model)
    untied.export(tmp_path / "untied", format="compressed")
    loaded = rs.load_compressed(tmp_path / "untied")
    assert torch.equal(models.logits(loaded), wanted)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight


def test_a_model_of_another_class_or_size_is_refused_and_left_alone(tmp_path):
    ended("mixed").export(tmp_path / "out", format="compressed")
    wide = models.mixed()
    wide.head = nn.Linear(5, 9)
    more = models.mixed()
    more.extra = nn.Linear(2, 2)
    longer = models.mixed()
    longer.embed = nn.Embedding(14, 8)
    for model, says in (
        (models.bert(), "has none"),
        (wide, "in two parts"),
        (more, r"extra\.\w+ is only in this Mixed"),
        (longer, r"embed\.weight is \(13, 8\)"),
    ):
        names = {n: (id(p), p.clone()) for n, p in model.named_parameters()}
        with pytest.raises(rs.errors.WrongBase, match=says):
            rs.load_compressed(tmp_path / "out", model)
        after = dict(model.named_parameters())
        assert names.keys() == after.keys()
        assert all(id(after[n]) == i and torch.equal(after[n], p) for n, (i, p) in names.items())


@pytest.mark.parametrize("options", [{"padding": "same", "padding_mode": "circular", "dilation": 2}, {"stride": 2}])
def test_a_convolution_keeps_its_geometry(options):
    model = nn.Sequential(nn.Conv2d(3, 6, 3, **options)).double()
    run = rs.attach(model, rs.PCLoRA(rank=2, targets=("0",), features=False), total_steps=1)
    models.stir(run.trainable(), scale=0.3)
    run.adapter()["0"].fade(0.0)
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x)
        assert torch.equal(run.compress()(x), wanted)
    assert [tuple(part.weight.shape) for part in model[0]] == [(2, 3, 3, 3), (6, 2, 1, 1)]


def test_an_architecture_that_meta_cannot_hold_is_built_for_real(tmp_path, monkeypatch):
    from rankshift.train import compressed

    run = ended()
    out = run.export(tmp_path / "out", format="compressed")
    wanted, state = models.logits(run.model), torch.random.get_rng_state()
    monkeypatch.setattr(compressed, "_plain_tensors", lambda model: True)
    assert torch.equal(models.logits(rs.load_compressed(out)), wanted)
    assert torch.equal(torch.random.get_rng_state(), state)
    manifest = json.loads((out / "rankshift-compressed.json").read_text())
    manifest["class"] = "NoSuchModel"
    (out / "rankshift-compressed.json").write_text(json.dumps(manifest))
    with pytest.raises(rs.errors.ConfigError, match="NoSuchModel is no class of transformers"):
        rs.load_compressed(out)


def test_damage_is_named_and_strangers_are_left_alone(tmp_path):
    run = ended()
    out = run.export(tmp_path / "out", format="compressed")
    weights = out / "compressed.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(rs.errors.CorruptFile, match="SHA-256"):
        rs.load_compressed(out)
    weights.write_bytes(bytes(data[:-9]))
    with pytest.raises(rs.errors.CorruptFile, match="bytes instead of"):
        rs.load_compressed(out)
    weights.unlink()
    with pytest.raises(rs.errors.MissingFile, match="is not there"):
        rs.load_compressed(out)
    (out / "rankshift-compressed.json").write_text("{}")
    with pytest.raises(rs.errors.CorruptFile, match="not a manifest"):
        rs.load_compressed(out)
    with pytest.raises(rs.errors.MissingFile, match="compressed"):
        rs.load_compressed(tmp_path / "nothing")
    run.export(out, format="compressed")  # over its own kind
    rs.load_compressed(out)
    run.export(tmp_path / "merged", format="merged")
    for wrong in (tmp_path / "merged", tmp_path):
        before = sorted(wrong.rglob("*"))
        with pytest.raises(rs.errors.NotWritable):
            run.export(wrong, format="compressed")
        assert sorted(wrong.rglob("*")) == before
    manifest = json.loads((out / "rankshift-compressed.json").read_text())
    manifest["format"] = 99
    (out / "rankshift-compressed.json").write_text(json.dumps(manifest))
    with pytest.raises(rs.errors.CheckpointError, match="Update"):
        rs.load_compressed(out)


def test_the_command_line_writes_it_too(tmp_path, tiny_llama, capsys):
    from rankshift.cli.files import export_run

    run = ended("llama", transformers.LlamaForCausalLM.from_pretrained(tiny_llama), rank=1)
    wanted = logits(run.model)
    run.save(tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out", None, "compressed", "exact")
    assert f"load_compressed('{tmp_path / 'out'}')" in capsys.readouterr().out
    assert torch.equal(logits(rs.load_compressed(tmp_path / "out")), wanted)
    assert (tmp_path / "out" / "tokenizer.json").exists()


# ---- what it saves ---------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """The linear layers of a ViT block as timm has them, with one for q, k and v."""

    def __init__(self, d):
        super().__init__()
        self.qkv, self.proj, self.fc1, self.fc2 = (
            nn.Linear(i, o) for i, o in ((d, 3 * d), (d, d), (d, 4 * d), (4 * d, d))
        )


@pytest.mark.parametrize(("rank", "saved"), [(8, 98.5), (16, 97.1), (32, 94.35), (64, 88.8)])
def test_the_ratios_of_the_paper_for_vit_b(rank, saved):
    with torch.device("meta"):
        model = nn.ModuleList(Block(768) for _ in range(12))
    report = rs.attach(model, rs.PCLoRA(rank=rank)).compression()
    assert report.percent == pytest.approx(saved, abs=0.06)
    if rank == 32:
        assert report.adapted == (85_017_600, 4_801_536)
        assert report.macs_adapted == (84_934_656, 12 * 32 * (4 * 768 + 2 * 768 + 5 * 768 + 5 * 768))
        assert "5.65 %" in str(report)


def test_the_ratio_of_the_paper_for_bert_base():
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig())
    run = rs.attach(model, rs.PCLoRA(rank=32, exclude=("pooler",)))
    report = run.compression()
    assert report.layers == 72
    assert report.adapted == (85_017_600, 5_391_360)
    assert report.percent == pytest.approx(93.66, abs=0.005)
    assert report.total[0] == sum(p.numel() for n, p in model.named_parameters() if ".adapters." not in n)
    # the pooler stays as it is
    assert report.macs_total[1] - report.macs_adapted[1] == 768 * 768 == report.macs_total[0] - report.macs_adapted[0]


def test_a_flop_counter_finds_what_the_report_says():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.head = nn.Linear(24, 40), nn.Linear(40, 24, bias=False), nn.Linear(24, 9)

        def forward(self, x):
            return self.head(self.down(self.up(x).tanh()))

    model = Stack()
    run = rs.attach(model, rs.PCLoRA(rank=3, targets=("up", "down"), features=False), total_steps=1)
    for adapter in run.adapter().values():
        adapter.fade(0.0)
    report, x = run.compression(), torch.randn(7, 24)

    def count():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x)
        return counter.get_total_flops()

    with run.disabled():
        assert count() == 2 * 7 * report.macs_total[0]
    run.compress()
    assert count() == 2 * 7 * report.macs_total[1] == 2 * 7 * (2 * 3 * (24 + 40) + 24 * 9)


def test_a_large_bias_moves_into_c():
    """b = 10 fades away; after training and compressing the mean of what the layer puts out is still there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6))
    with torch.no_grad():
        model[2].bias.fill_(10)
    x = torch.randn(256, 8)
    with torch.no_grad():
        wanted = model(x)
    run = rs.attach(model, rs.PCLoRA(rank=3, targets=("2",), task_weight=0.2, decay_end=0.6), total_steps=300)
    optimizer = run.optimizer(lr=0.1)
    model.train()
    for _ in range(300):
        run.loss((model(x) - wanted).square().mean(), x).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        got = run.compress()(x)
    assert model[2][1].bias.mean().item() == pytest.approx(10, abs=0.5)
    assert torch.allclose(got.mean(0), wanted.mean(0), atol=0.05)
