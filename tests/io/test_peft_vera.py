"""PEFT's VeRA directories, both ways: the same logits, the same pair. PEFT is the oracle."""

from __future__ import annotations

import json
import warnings

import io_models as models
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import rankshift as rs
from rankshift.methods.vera import Numbers, VeRALayer, digest

warnings.filterwarnings("ignore", module="peft")
VERA, WEIGHTS, CONFIG = rs.VeRA, "adapter_model.safetensors", "adapter_config.json"
Q, K, MLP = "q_proj", "k_proj", "down_proj"
NEAR = 2e-6  # fp32, logits of about 3: PEFT multiplies by b after B and by d after A


def pair_of(model):
    """The (A, B) that the layers of a run read."""
    return next((m.projection.A, m.projection.B) for m in model.modules() if isinstance(m, VeRALayer))


def stir(named):
    """b as large as if trained, so that d matters too."""
    models.stir(named, scale=0.3)


# ---- PEFT's, read here

READ = {
    "no projection": (models.llama, {"r": 24, "target_modules": [Q, MLP], "save_projection": False}),
    "projection": (models.llama, {"r": 24, "target_modules": [Q, MLP], "save_projection": True}),
    "all-linear": (models.llama, {"r": 8, "target_modules": "all-linear", "save_projection": False}),
    "key": (models.llama, {"r": 8, "target_modules": [Q, K], "projection_prng_key": 77, "save_projection": False}),
    "regex": (models.llama, {"r": 8, "target_modules": r".*layers\.1\..*(q|v)_proj", "save_projection": False}),
    "layers": (
        models.llama,
        {"r": 8, "target_modules": [Q, MLP], "layers_to_transform": [1], "save_projection": False},
    ),
    "conv1d": (models.gpt2, {"r": 8, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "conv1d drawn": (
        models.gpt2,
        {"r": 8, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "save_projection": False},
    ),
    "classifier": (
        models.bert,
        {"r": 8, "target_modules": ["q_lin", "lin1"], "task_type": "SEQ_CLS", "save_projection": False},
    ),
    "modules_to_save": (models.llama, {"r": 8, "target_modules": [Q], "modules_to_save": ["lm_head", "norm"]}),
    "bias all": (models.llama, {"r": 8, "target_modules": [Q], "bias": "all"}),
    "bias vera_only": (models.llama, {"r": 8, "target_modules": [Q, MLP], "bias": "vera_only"}),
}


def write(folder, make, **config):
    """A trained-looking PEFT directory; its logits, and its pair, as PEFT has them when it loads it again."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = peft.get_peft_model(make(), peft.VeraConfig(**config))
    stir([(n, p) for n, p in model.named_parameters() if p.requires_grad and "original_module" not in n])
    model.save_pretrained(folder)
    again = peft.PeftModel.from_pretrained(make(), folder).eval()
    tuner = again.base_model
    return models.logits(again), (tuner.vera_A["default"], tuner.vera_B["default"])


@pytest.mark.parametrize("case", READ)
def test_what_peft_wrote_is_the_same_function_here(case, tmp_path):
    make, config = READ[case]
    wanted, pair = write(tmp_path / "theirs", make, **config)
    model = make()
    assert (wanted - models.logits(model)).abs().max() > 1e-2
    torch.manual_seed(123)  # nothing depends on it
    run = rs.load(model, tmp_path / "theirs")
    assert (models.logits(model) - wanted).abs().max() < NEAR
    for ours, theirs in zip(pair_of(model), pair, strict=True):
        assert torch.equal(ours, theirs)
    method = run.method
    assert (method.rank, method.projection_seed) == (config["r"], config.get("projection_prng_key", 0))
    assert method.save_projection == config.get("save_projection", True)
    # and back: the same tensors, bit for bit, under the same names
    run.export(tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / which / WEIGHTS) for which in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    assert torch.equal(models.logits(again), wanted)
    # natively as well
    run.save(tmp_path / "native")
    last = make()
    rs.load(last, tmp_path / "native")
    assert torch.equal(models.logits(last), models.logits(model))


def test_the_command_says_what_it_is(directory, tmp_path):
    from rankshift.cli.inspect import rows

    for name, content in directory.items():
        (tmp_path / name).write_bytes(content)
    said = dict(rows(tmp_path))
    assert (said["method"], said["layers"]) == ("vera, rank 8", "2, rank 8")


def test_training_goes_on_from_a_directory_of_peft(tmp_path):
    write(tmp_path, models.llama, **READ["projection"][1])
    model = models.llama()
    run = rs.load(model.train(), tmp_path)
    optimizer = run.optimizer(lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(models.loss(model, 3))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("save_projection", [False, True])
def test_two_directories_of_other_targets_keep_their_pairs(save_projection, tmp_path):
    """The order that PEFT gets silently wrong (its second adapter reads the first one's pair), and the reverse."""
    wide, _ = write(tmp_path / "wide", models.llama, r=8, target_modules="all-linear", save_projection=save_projection)
    slim, _ = write(tmp_path / "slim", models.llama, r=8, target_modules=[Q, "v_proj"], save_projection=save_projection)
    if not save_projection:  # the bug is there: if this fails, PEFT has mended it
        theirs = peft.PeftModel.from_pretrained(models.llama(), tmp_path / "wide")
        theirs.load_adapter(tmp_path / "slim", "slim")
        theirs.set_adapter("slim")
        assert (models.logits(theirs.eval()) - slim).abs().max() > 1e-3
    states = {name: rs.load(models.llama(), tmp_path / name).state_dict() for name in ("wide", "slim")}
    for first, second in (("wide", "slim"), ("slim", "wide")):
        both = states[first] | {
            "adapters": {
                "default": states[first]["adapters"]["default"],
                "other": states[second]["adapters"]["default"],
            },
            "tensors": states[first]["tensors"]
            | {f"other/{name.partition('/')[2]}": t for name, t in states[second]["tensors"].items()},
        }
        model = models.llama()
        run = rs.restore(model, both)
        wanted = {"wide": wide, "slim": slim}
        assert (models.logits(model) - wanted[first]).abs().max() < NEAR
        run.use("other")
        assert (models.logits(model) - wanted[second]).abs().max() < NEAR


# ---- ours, read by PEFT

WRITTEN = {
    "all-linear": (models.llama, VERA(rank=24)),
    "narrow": (models.llama, VERA(rank=6, targets=(Q, "v_proj"), d_initial=1e-3, projection_seed=5)),
    "projection": (models.llama, VERA(rank=6, targets=(Q, MLP), save_projection=True)),
    "one layer": (models.llama, VERA(rank=6, targets="model.layers.1.self_attn.q_proj")),
    "conv1d": (models.gpt2, VERA(rank=6, targets=("c_attn", "c_fc"))),
    "classifier": (models.bert, VERA(rank=6, targets=("q_lin", "lin2"), modules_to_save=("classifier",))),
    "bias all": (models.llama, VERA(rank=6, targets=Q, bias="all")),
    "bias vera_only": (models.llama, VERA(rank=6, targets=(Q, MLP), bias="vera_only", dropout=0.25)),
}
AS_LORA = {
    "convolution": (models.mixed, VERA(rank=3, targets=("one", "head"))),
    "experts": (models.moe, VERA(rank=3, targets=(Q, "experts.gate_up_proj", "experts.down_proj"))),
}


def trained(make, method):
    model = make()
    run = rs.attach(model, method)
    stir(run.trainable())
    return model, run


@pytest.mark.parametrize("case", WRITTEN)
def test_peft_gives_the_same_logits(case, tmp_path):
    make, method = WRITTEN[case]
    model, run = trained(make, method)
    wanted = models.logits(model)
    assert (wanted - models.logits(make())).abs().max() > 1e-2
    run.export(tmp_path)
    assert torch.equal(models.logits(model), wanted)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["peft_type"], config["d_initial"]) == ("VERA", method.d_initial)
    assert (config["projection_prng_key"], config["vera_dropout"]) == (method.projection_seed, method.dropout)
    assert config["save_projection"] is method.save_projection
    assert ("base_model.vera_A" in load_file(tmp_path / WEIGHTS)) is method.save_projection
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    assert not [str(w.message) for w in caught if "missing" in str(w.message) or "unexpected" in str(w.message)]
    assert (models.logits(theirs) - wanted).abs().max() < NEAR
    for ours, drawn in zip(pair_of(model), (theirs.base_model.vera_A, theirs.base_model.vera_B), strict=True):
        assert torch.equal(ours, drawn["default"])
    again = make()
    loaded = rs.load(again, tmp_path)
    assert torch.equal(models.logits(again), wanted)
    assert loaded.describe()["adapters"]["default"].get("shared") == run.describe()["adapters"]["default"]["shared"]
    # the keys are those that PEFT itself writes
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_file(tmp_path / WEIGHTS).keys() == load_file(tmp_path / "theirs" / WEIGHTS).keys()


@pytest.mark.parametrize("case", [*AS_LORA, "all-linear", "projection", "conv1d"])
def test_a_plain_lora_where_peft_has_no_vera_or_none_is_wanted(case, tmp_path):
    make, method = (WRITTEN | AS_LORA)[case]
    model, run = trained(make, method)
    run.export(tmp_path, profile="exact" if case in AS_LORA else "portable")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", method.rank)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    assert (models.logits(theirs) - models.logits(model)).abs().max() < NEAR


def test_biases_of_a_plain_lora_have_its_name(tmp_path):
    model, run = trained(models.mixed, VERA(rank=3, targets=("one", "head"), bias="vera_only"))
    run.export(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["bias"] == "lora_only"
    theirs = peft.PeftModel.from_pretrained(models.mixed(), tmp_path).eval()
    assert (models.logits(theirs) - models.logits(model)).abs().max() < NEAR


def test_a_pair_wider_than_peft_would_draw_travels_along(tmp_path):
    """An adapter whose file holds a pair made for more layers: exported, the pair is cut to what PEFT expects."""
    wanted, (A, B) = write(tmp_path / "theirs", models.llama, r=8, target_modules=[Q], save_projection=True)
    found = load_file(tmp_path / "theirs" / WEIGHTS)
    found["base_model.vera_A"] = torch.nn.functional.pad(A, (0, 5), value=3.0)
    found["base_model.vera_B"] = torch.nn.functional.pad(B, (0, 0, 0, 7), value=3.0)
    save_file(found, tmp_path / "theirs" / WEIGHTS, metadata={"format": "pt"})
    model = models.llama()
    run = rs.load(model, tmp_path / "theirs")
    assert [t.shape for t in pair_of(model)] == [(8, 37), (39, 8)]
    assert (models.logits(model) - wanted).abs().max() < NEAR
    run.export(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(models.llama(), tmp_path / "ours").eval()
    assert (models.logits(theirs) - wanted).abs().max() < NEAR


def test_a_drawn_pair_wider_than_peft_would_draw_travels_along(tmp_path):
    """The same where the pair follows from saved numbers: PEFT would draw another one, so it is written."""
    _, run = trained(models.llama, VERA(rank=8, targets=Q))
    state = run.state_dict()
    wider = Numbers(rank=8, in_max=37, out_max=40, seed=0)
    state["adapters"]["default"]["shared"] |= {"in_max": 37, "out_max": 40, "digest": digest(*wider.draw())}
    model = models.llama()
    run = rs.restore(model, state)
    run.export(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["save_projection"] is True
    theirs = peft.PeftModel.from_pretrained(models.llama(), tmp_path).eval()
    assert (models.logits(theirs) - models.logits(model)).abs().max() < NEAR


# ---- refused


def spoil(folder, config=None, drop=(), change=None):
    """Change a directory: fields of the config, tensors left out, tensors replaced."""
    values = json.loads((folder / CONFIG).read_text()) | (config or {})
    (folder / CONFIG).write_text(json.dumps(values))
    found = {name: t for name, t in load_file(folder / WEIGHTS).items() if not name.endswith(drop or ("\0",))}
    save_file(found | (change or {}), folder / WEIGHTS, metadata={"format": "pt"})


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
SPOILT = {
    "no pair": ({"drop": ("vera_A",)}, rs.errors.CorruptFile, "lacks vera_A or vera_B"),
    "a lone b": ({"drop": ("0.self_attn.q_proj.vera_lambda_d",)}, rs.errors.CorruptFile, "no tensor vera_lambda_d"),
    "no layer": (
        {"drop": ("0.self_attn.q_proj.vera_lambda_d", "0.self_attn.q_proj.vera_lambda_b")},
        rs.errors.CorruptFile,
        r"adapts model\.layers\.0\.self_attn\.q_proj by its adapter_config\.json, but holds no tensors",
    ),
    "nothing": ({"drop": ("lambda_d", "lambda_b")}, rs.errors.CorruptFile, "holds no VeRA tensors"),
    "another r": ({"config": {"r": 9}}, rs.errors.CorruptFile, r"vera_lambda_d .* is \(8,\); the r of its"),
    "another b": (
        {"change": {f"{LAYER}.vera_lambda_b": torch.zeros(31)}},
        rs.errors.WrongBase,
        r"vera_lambda_b .* is \(31,\); the layer's wants \(32,\)",
    ),
    "another pair": (
        {"change": {"base_model.vera_A": torch.zeros(7, 32)}},
        rs.errors.CorruptFile,
        r"vera_A is \(7, 32\)",
    ),
    "a narrow pair": (
        {"change": {"base_model.vera_A": torch.zeros(8, 31)}},
        rs.errors.WrongBase,
        r"too small for this model's layers of up to 32 × 32",
    ),
    "a pair against the seed": (
        {"config": {"save_projection": False, "projection_prng_key": 1}},
        rs.errors.CorruptFile,
        r"not those of its seed",
    ),
    "a name of no layer": (
        {"change": {"base_model.model.model.layers.0.self_attn.z_proj.vera_lambda_b": torch.zeros(32)}},
        rs.errors.WrongBase,
        r"z_proj, which this LlamaForCausalLM does not have",
    ),
    "an embedding": (
        {"change": {"base_model.model.model.embed_tokens.vera_lambda_b": torch.zeros(32)}},
        rs.errors.ConfigError,
        r"kind Embedding, for which PEFT defines no VeRA",
    ),
    "an unknown option": ({"config": {"vera_rows": 3}}, rs.errors.ConfigError, "sets vera_rows = 3"),
    "another kind": ({"config": {"peft_type": "OFT"}}, rs.errors.ConfigError, "Only LORA and VERA"),
    "no expression": ({"config": {"target_modules": "("}}, rs.errors.CorruptFile, "no regular expression"),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vera")
    write(folder, models.llama, r=8, target_modules=[Q])
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_directories_are_refused_by_name(case, directory, tmp_path):
    for name, content in directory.items():
        (tmp_path / name).write_bytes(content)
    how, error, says = SPOILT[case]
    spoil(tmp_path, **how)
    model = models.llama()
    before = models.logits(model)
    with pytest.raises(error, match=says):
        rs.load(model, tmp_path)
    assert torch.equal(models.logits(model), before)
    assert not any(isinstance(module, VeRALayer) for module in model.modules())


def test_another_model_is_refused(directory, tmp_path):
    for name, content in directory.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(rs.errors.WrongBase, match="does not have"):
        rs.load(models.bert(), tmp_path)
