"""The job of `rankshift train` on every task, and what it refuses before it begins."""

import gzip
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import rankshift as rs
from rankshift.cli import files, inspect
from rankshift.core.errors import ConfigError, DataError, MissingFile, NotWritable, RankshiftError, WrongBase
from rankshift.run import load
from rankshift.train import bases, config, recipe


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def glue(shared, path, name, count):
    with gzip.open(shared(f"data/glue/{name}.jsonl.gz"), "rt") as file:
        return jsonl(path, [json.loads(line) for line, _ in zip(file, range(count), strict=False)])


def train(tmp_path, **values):
    """(result, what was printed, metrics.json)."""
    screen = io.StringIO()
    settings = {"output": str(tmp_path / "runs"), **values}
    result = recipe.train(config.parse(settings), Console(file=screen, width=160))
    return result, screen.getvalue(), json.loads((result.directory / "metrics.json").read_text())


def test_classification_trains_the_new_head_whole_and_says_so(tmp_path, tiny_bert, shared):
    data = glue(shared, tmp_path / "sst2.jsonl", "sst2_train", 300)
    result, screen, metrics = train(
        tmp_path, model=str(tiny_bert), data={"train": str(data), "validation": 0.2}, method={"rank": 4},
        train={"steps": 60, "batch": 16, "lr": 1e-2, "eval_every": 20},
    )  # fmt: skip
    assert "sequence-classification (from the columns of the data)" in screen
    assert "classifier" in screen.split("new head")[1].split("\n")[0]
    assert "· val accuracy 0." in screen
    assert "portable" not in screen  # the head is trained whole, which no server takes
    assert set(metrics["final"]) == {"loss", "accuracy", "f1", "matthews"}
    assert metrics["per_second"] * metrics["seconds"] == pytest.approx(60 * 16, rel=0.05)  # examples, not tokens
    assert result.final["loss"] < result.base["loss"]
    resolved = yaml.safe_load((result.directory / "config.yaml").read_text())
    assert resolved["task"] == "sequence-classification"
    assert "classifier" in resolved["method"]["modules_to_save"]
    assert resolved["data"]["columns"] == {"text": "text", "label": "label"}
    assert sorted(p.name for p in result.directory.iterdir()) == [
        "adapter", "config.yaml", "loss.png", "metrics.json", "peft"
    ]  # fmt: skip

    base = bases.load(result.directory)  # the same head is drawn again, and the trained one is put on it
    run = load(base.model, base.adapter)
    again = run.model.eval()
    batch = base.reader(["a fine film", "a dull film"], return_tensors="pt", padding=True)
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(bases.load(result.directory).model, result.directory / "peft").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, theirs(**batch).logits, rtol=0, atol=1e-6)


def test_pairs_and_numbers_are_a_regression(tmp_path, tiny_bert, shared):
    data = glue(shared, tmp_path / "stsb.jsonl", "stsb_train", 120)
    held = glue(shared, tmp_path / "dev.jsonl", "stsb_dev", 40)
    _, screen, metrics = train(
        tmp_path, model=str(tiny_bert), data={"train": str(data), "validation": str(held)}, method="full",
        train={"steps": 6, "lr": 1e-3},
    )  # fmt: skip
    assert "regression (from the columns of the data)" in screen
    assert set(metrics["final"]) == {"loss", "pearson", "spearman", "mse"}
    assert abs(metrics["final"]["loss"] - metrics["final"]["mse"]) < 1e-4 * metrics["final"]["mse"]
    assert metrics["base"]["mse"] > metrics["final"]["mse"]


def test_named_classes_survive_a_merge(tmp_path, tiny_bert):
    rows = [{"text": f"a {word} film", "label": name} for word, name in (("fine", "good"), ("dull", "bad"))] * 20
    data = jsonl(tmp_path / "named.jsonl", rows)
    result, *_ = train(tmp_path, model=str(tiny_bert), data=str(data), method={"rank": 2}, train={"steps": 2})
    from transformers import AutoModelForSequenceClassification

    base = bases.load(result.directory)
    load(base.model, base.adapter).export(tmp_path / "merged", format="merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == {0: "bad", 1: "good"}


def test_masked_lm(tmp_path, tiny_bert, shared):
    with gzip.open(shared("data/glue/sst2_dev.jsonl.gz"), "rt") as file:
        text = [json.loads(line)["text"] for line in file]
    data = jsonl(tmp_path / "text.jsonl", [{"sentence": line} for line in text[:200]])
    _, screen, metrics = train(
        tmp_path, model=str(tiny_bert), data={"train": str(data), "validation": 0.2},
        train={"steps": 30, "batch": 16, "lr": 1e-2, "eval_every": 1},
    )  # fmt: skip
    assert "masked-lm (from the model's architecture)" in screen
    assert "text ← 'sentence'" in screen
    assert metrics["per_second"] * metrics["seconds"] > 30 * 16 * 5  # tokens of all updates, of at least 5 a text
    assert metrics["final"]["loss"] < metrics["base"]["loss"]
    assert metrics["final"]["perplexity"] == pytest.approx(np.exp(metrics["final"]["loss"]))


def test_images(tmp_path, tiny_vit):
    from PIL import Image

    rng = np.random.default_rng(0)
    for name, tone in (("dark", 40), ("light", 200)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(16):
            pixels = (tone + rng.integers(-30, 30, (16, 16, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    result, screen, metrics = train(
        tmp_path, model=str(tiny_vit), data={"train": str(tmp_path / "pictures"), "validation": 0.25},
        method={"rank": 4}, train={"steps": 20, "batch": 8, "lr": 5e-3},
    )  # fmt: skip
    assert "image-classification (from the columns of the data)" in screen
    assert metrics["final"]["accuracy"] == 1.0
    assert yaml.safe_load((result.directory / "config.yaml").read_text())["data"]["labels"] == ["dark", "light"]


def test_images_by_their_paths(tmp_path, tiny_vit, monkeypatch):
    from PIL import Image

    (tmp_path / "data").mkdir()
    (tmp_path / "other").mkdir()
    for name, tone in (("dark", 40), ("light", 200)):
        Image.new("RGBA", (16, 16), (tone, tone, tone, 255)).save(tmp_path / "data" / f"{name}.png")
        Image.new("RGB", (16, 16), (tone,) * 3).save(tmp_path / "other" / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    # from the directory of the data, from here, and whole
    paths = [f(name) for name in ("dark", "light") for f in (
        "{}.png".format, "other/{}.png".format, f"{tmp_path}/other/{{}}.png".format
    )]  # fmt: skip
    rows = [{"image": path, "label": "light" if "light" in path else "dark"} for path in paths] * 8
    data = jsonl(tmp_path / "data" / "rows.jsonl", rows)
    _, screen, metrics = train(
        tmp_path, model=str(tiny_vit), data={"train": str(data), "validation": 0.25}, method={"rank": 4},
        train={"steps": 20, "batch": 8, "lr": 5e-3},
    )  # fmt: skip
    assert "image-classification (from the columns of the data)" in screen
    assert metrics["final"]["accuracy"] == 1.0

    def refused(match, image):
        rows[3] = {"image": image, "label": "dark"}
        refuse(tmp_path / "new", DataError, match, model=str(tiny_vit), data=str(jsonl(data, rows)))

    refused(r"row 4 of data.train has the image 'gone.png', which is no file in .* or .*/data\. Correct", "gone.png")
    refused("row 4 of data.train has the image None", None)
    other = jsonl(tmp_path / "other.jsonl", [{"image": [0, 1], "label": k % 2} for k in range(30)])
    refuse(tmp_path / "new", DataError, "'image' holds neither images nor paths", model=str(tiny_vit), data=str(other))
    (tmp_path / "data" / "text.png").write_text("no image")
    rows[3]["image"] = "text.png"
    with pytest.raises(DataError, match=r"data/text.png cannot be opened as an image"):
        train(tmp_path, model=str(tiny_vit), data={"train": str(jsonl(data, rows)), "validation": 0.25},
              train={"steps": 20})  # fmt: skip


def test_chats_with_a_template(tmp_path, tiny_llama):
    chat = [{"role": "user", "content": "how are you ?"}, {"role": "assistant", "content": "fine thanks ."}]
    data = jsonl(tmp_path / "chat.jsonl", [{"messages": chat}] * 30)
    _, screen, metrics = train(
        tmp_path, model=str(tiny_llama), data=str(data), method="full",
        train={"steps": 30, "lr": 1e-2, "batch": 4, "eval_every": 15},
    )  # fmt: skip
    assert "causal-lm (from the columns of the data)" in screen
    assert metrics["base"]["tokens"] == 2 * 4  # two validation rows of "fine thanks . [SEP]"
    assert metrics["final"]["loss"] < 0.5 * metrics["base"]["loss"]


def test_full_fine_tuning_leaves_a_plain_model(tmp_path, tiny_llama):
    data = jsonl(tmp_path / "qa.jsonl", [{"question": "two and one ?", "answer": "three ."}] * 24)
    result, screen, _ = train(
        tmp_path, model=str(tiny_llama), data=str(data), method="full", train={"steps": 4, "lr": 1e-3, "batch": 4}
    )
    assert "prompt ← 'question', completion ← 'answer'" in screen
    assert "[CLS]" not in screen.split("before")[1]
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(result.directory / "model")
    base = bases.load(result.directory)
    run = load(base.model, base.adapter)
    ids = torch.tensor([[2, 7, 8, 9]])
    with torch.no_grad():
        assert torch.equal(plain.eval()(input_ids=ids).logits, run.model.eval()(input_ids=ids).logits)


def test_no_advice_of_transformers_between_the_lines(tmp_path, tiny_llama, monkeypatch):
    import logging

    (tmp_path / "a.txt").write_text("hello how are you ? " * 50)
    heard = []
    logger = logging.getLogger("transformers.trainer_utils")
    monkeypatch.setattr(logger, "handle", lambda record: heard.append(record.getMessage()))
    logger.warning_once.cache_clear()
    train(
        tmp_path, model=str(tiny_llama), data={"train": str(tmp_path / "a.txt"), "max_length": 16},
        train={"steps": 6, "save_every": 1, "eval_every": 6},
    )  # fmt: skip
    assert heard == []
    logger.warning("and after it")
    assert heard == ["and after it"]


def test_no_validation(tmp_path, tiny_llama):
    (tmp_path / "a.txt").write_text("hello how are you ? " * 50)
    data = {"train": str(tmp_path / "a.txt"), "validation": 0, "max_length": 16}
    _, screen, metrics = train(tmp_path, model=str(tiny_llama), data=data, train={"steps": 3})
    assert metrics["final"] == {}
    assert "no validation" in screen
    assert "nan" not in screen


def test_the_next_free_number_and_a_name(tmp_path, tiny_llama):
    (tmp_path / "a.txt").write_text("hello how are you ? " * 50)
    settings = {"model": str(tiny_llama), "data": {"train": str(tmp_path / "a.txt"), "max_length": 16}}
    settings |= {"train": {"steps": 1}}
    names = [train(tmp_path, **settings)[0].directory.name for _ in range(2)]
    assert names == ["tiny-llama-lora-1", "tiny-llama-lora-2"]
    assert train(tmp_path, **settings, name="mine")[0].directory.name == "mine"
    with pytest.raises(NotWritable, match="mine exists already"):
        train(tmp_path, **settings, name="mine")


def test_a_resolved_config_trains_the_same_again(tmp_path, tiny_llama):
    (tmp_path / "a.txt").write_text("hello how are you ? fine thanks . " * 50)
    settings = {"model": str(tiny_llama), "data": {"train": str(tmp_path / "a.txt"), "max_length": 16}}
    first, _, metrics = train(tmp_path, **settings, train={"steps": 5, "lr": 1e-2})
    again = recipe.train(config.read(first.directory / "config.yaml"), Console(file=io.StringIO()))
    assert json.loads((again.directory / "metrics.json").read_text())["train_loss"] == metrics["train_loss"]


def test_global_randomness_does_not_matter(tmp_path, tiny_bert):
    rows = [{"text": f"a {word} film", "label": k} for k, word in enumerate(("fine", "dull"))] * 20
    data = jsonl(tmp_path / "rows.jsonl", rows)
    settings = {"model": str(tiny_bert), "data": str(data), "train": {"steps": 3}}
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        losses.append(train(tmp_path, **settings)[2]["train_loss"])
    assert losses[0] == losses[1]


RECIPES = sorted(p.stem for p in (Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_run_on_small_models_and_own_data(tmp_path, name, tiny_llama, tiny_bert, shared):
    """As written, with another model, other data and fewer updates."""
    recipe_file = Path(__file__).parents[2] / "recipes" / f"{name}.yaml"
    if name.startswith("llama-chat"):
        turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello you"}]
        model, rows = tiny_llama, jsonl(tmp_path / "d.jsonl", [{"messages": turns}] * 60)
        settings = [f"data={rows}", "data.max_length=48", "data.validation=0.1"]
    elif name.startswith("bert-sst2"):
        rows = glue(shared, tmp_path / "d.jsonl", "sst2_train", 60)
        model = tiny_bert
        settings = [f"data={rows}", "data.subset=null", "data.validation_split=null", "data.validation=0.2"]
        settings += ["data.columns={text: text, label: label}", "data.max_length=32"]
    else:
        (tmp_path / "corpus").mkdir()
        (tmp_path / "corpus" / "a.txt").write_text("a fine film with a good story . " * 200)
        model = tiny_llama if name.startswith("babyllama") else tiny_bert
        settings = [f"data={tmp_path / 'corpus'}", "data.max_length=32"]
    if name.endswith("pc-lora"):
        settings += ["method.rank=4"]  # 32 would make these small layers no smaller
    if name.endswith("switchlora"):
        settings += ["method.rank=4"]  # below the sides of all of them
    if name.endswith("prelora"):  # it goes on after two updates, and freezes after the third
        soon = {"max_rank": 16, "window": 1, "windows": 2, "minimum": 0, "joint": 1}
        settings += [f"method.{k}={v}" for k, v in (soon | {"weight_change": 1e6, "loss_change": 1e6}).items()]
    if "-q" in name:  # on a CPU, and below the sides of these small layers
        settings += ["method.rank=4", "train.optim=adamw"]
    if name.endswith("full-lora"):
        settings += ["phases.0.until.steps=4"]  # 100 are more than the updates here
    wanted = config.read(recipe_file, [f"model={model}", *settings, "train.steps=6", f"output={tmp_path / 'runs'}"])
    names = ("" if wanted.base is None else "q") + "-".join(method.name for method in wanted.methods)
    assert name.endswith(f"-{names}"), "recipes are named for model and methods"
    result = recipe.train(wanted, Console(file=io.StringIO()))
    assert result.final["loss"] > 0
    phases = json.loads((result.directory / "adapter" / "rankshift.json").read_text())["run"]["phases"]
    assert len(phases) == (3 if name.endswith(("sora", "prelora")) else len(wanted.methods))
    assert (result.directory / "timeline.png").is_file() is (len(phases) > 1)
    if name.endswith("pc-lora"):
        small = tmp_path / "small"
        files.export_run(result.directory, small, None, "compressed", "exact")  # as the recipe says
        thin = rs.load_compressed(small)
        assert thin.num_parameters() < AutoModelForSequenceClassification.from_pretrained(model).num_parameters()
    elif wanted.method.reversible:
        assert (result.directory / "peft" / "adapter_config.json").is_file()
    else:
        assert (result.directory / "model" / "config.json").is_file()
        assert (result.directory / "subspaces.png").is_file() is name.endswith(("-galore", "-adarankgrad"))


def test_the_recipe_of_the_bundled_model_is_what_runs_by_default():
    assert config.read(Path(__file__).parents[2] / "recipes" / "babyllama-shakespeare-lora.yaml") == config.read(None)


def test_settings_of_hub_data_are_refused_for_files(tmp_path, tiny_llama):
    (tmp_path / "a.txt").write_text("hello")
    data = {"train": str(tmp_path / "a.txt"), "validation_split": "validation"}
    refuse(tmp_path, ConfigError, "is for data sets of the hub", model=str(tiny_llama), data=data)


def test_bf16_on_request(tmp_path, tiny_bert):
    rows = [{"text": f"a {word} film", "label": k} for k, word in enumerate(("fine", "dull"))] * 20
    data = jsonl(tmp_path / "rows.jsonl", rows)
    result, _, metrics = train(
        tmp_path, model=str(tiny_bert), data=str(data), method={"rank": 4},
        train={"steps": 4, "precision": "bf16", "lr": 1e-3, "checkpointing": True},
    )  # fmt: skip
    from safetensors.torch import load_file

    kept = load_file(result.directory / "adapter" / "adapter.safetensors")
    assert all(tensor.dtype == torch.float32 for name, tensor in kept.items() if name.endswith((".A", ".B")))
    assert all(np.isfinite(loss) for _, loss in metrics["train_loss"])


@pytest.mark.parametrize(("rounding", "kept"), [(None, torch.float32), ("stochastic", torch.bfloat16)])
def test_weights_are_bf16_where_it_is_said_how_they_round(tmp_path, tiny_bert, rounding, kept):
    from safetensors.torch import load_file

    rows = [{"text": f"a {word} film", "label": k} for k, word in enumerate(("fine", "dull"))] * 20
    result, _, metrics = train(
        tmp_path, model=str(tiny_bert), data=str(jsonl(tmp_path / "rows.jsonl", rows)),
        method={"method": "galore", "rank": 4, "rounding": rounding},
        train={"steps": 4, "precision": "bf16", "lr": 1e-3},
    )  # fmt: skip
    weights = load_file(result.directory / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {kept}
    assert all(np.isfinite(loss) for _, loss in metrics["train_loss"])


# ---- refusals --------------------------------------------------------------------------------------------------------


def refuse(tmp_path, kind, match, **values):
    """The error, raised before a run directory appeared."""
    with pytest.raises(kind, match=match) as caught:
        train(tmp_path, **values)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
    return str(caught.value)


def test_all_missing_things_are_told_at_once(tmp_path, tiny_llama):
    (tmp_path / "file").write_text("")
    text = refuse(
        tmp_path, ConfigError, "4 problems",
        model=str(tmp_path / "modle"), data={"train": str(tmp_path / "trian.jsonl"), "validation": "./dev.jsonl"},
        output=str(tmp_path / "file" / "runs"),
    )  # fmt: skip
    for part in ("modle is no directory", "trian.jsonl is not there", "dev.jsonl is not there", "a file is in the way"):
        assert part in text


def test_a_missing_file_names_the_nearest(tmp_path, tiny_llama):
    jsonl(tmp_path / "train.jsonl", [{"text": "a"}])
    refuse(
        tmp_path, DataError, r"Did you mean 'train.jsonl'\?", model=str(tiny_llama), data=str(tmp_path / "trian.jsonl")
    )


# ---- what methods look at and say ------------------------------------------------------------------------------------


LOOKING = [{"method": "paca", "select": "activation"}, {"method": "paca", "select": "gradient"},
           {"method": "lora", "init": "eva"}]  # fmt: skip


@pytest.mark.parametrize("validation", [0.1, 0])
@pytest.mark.parametrize("method", LOOKING, ids=lambda method: method.get("select", "eva"))
def test_methods_look_at_as_many_batches_as_the_setting_says(tmp_path, tiny_llama, monkeypatch, method, validation):
    data = jsonl(tmp_path / "d.jsonl", [{"prompt": "hello", "completion": "you " * (k % 7 + 1)} for k in range(120)])
    counts = []
    looked = recipe._calibration
    monkeypatch.setattr(
        recipe, "_calibration", lambda job: (counts.append(len(b["input_ids"])) or b for b in looked(job))
    )
    _, screen, _ = train(
        tmp_path, model=str(tiny_llama), data={"train": str(data), "validation": validation},
        method={**method, "rank": 2}, train={"steps": 1, "batch": 4, "calibration": 3},
    )  # fmt: skip
    assert counts == [4, 4, 4] if method["method"] == "paca" else 1 <= len(counts) <= 3  # EVA stops when it has settled
    assert "looking   at up to 3 batches of the training data" in screen
    assert screen.index("looking") < screen.index("parameters train")


def test_the_batches_are_spread_over_data_that_may_be_sorted(tmp_path, tiny_llama):
    class Rows(list):
        pass

    settings = {"model": "m", "data": "d", "train": {"batch": 4, "calibration": 2}}
    examples = type("Examples", (), {"train": Rows(range(80)), "collate": staticmethod(list)})()
    job = type("Job", (), {"config": config.parse(settings), "examples": examples})()
    assert list(recipe._calibration(job)) == [[0, 10, 20, 30], [40, 50, 60, 70]]
    examples.train = Rows(range(6))
    assert list(recipe._calibration(job)) == [[0, 1, 2, 3], [4, 5]]


def test_methods_that_look_at_nothing_are_given_nothing(tmp_path, tiny_llama, monkeypatch):
    (tmp_path / "a.txt").write_text("hello how are you ? " * 50)
    monkeypatch.setattr(recipe, "_calibration", lambda job: pytest.fail("asked for batches"))
    data = {"train": str(tmp_path / "a.txt"), "max_length": 16}
    _, screen, metrics = train(tmp_path, model=str(tiny_llama), data=data, train={"steps": 1})
    assert "looking" not in screen
    assert metrics["method"] == {"name": "lora"}
    assert "loss      in training" not in screen
    assert "method    LoRA:" not in screen


@pytest.mark.parametrize(("sparsity", "none"), [(1e-6, False), (1e6, True)])
def test_how_many_gates_are_open_is_told(tmp_path, tiny_llama, sparsity, none):
    (tmp_path / "a.txt").write_text("hello how are you ? " * 50)
    result, screen, metrics = train(
        tmp_path, model=str(tiny_llama), data={"train": str(tmp_path / "a.txt"), "max_length": 16},
        method={"method": "sora", "rank": 4, "sparsity": sparsity}, train={"steps": 4, "lr": 1e-3, "eval_every": 2},
    )  # fmt: skip
    whole = metrics["method"]["gates"]
    assert metrics["method"]["open_gates"] == (0 if none else whole)
    assert whole > 4
    run = load(bases.load(result.directory).model, result.directory / "adapter")
    assert {"name": "sora", **run.metrics()} == metrics["method"]
    assert f"SoRA: {0 if none else whole:.0f} of {whole:.0f} gates open" in screen
    checks = [line for line in screen.splitlines() if line.startswith("  step")]
    assert all(f"gates {0 if none else whole:.0f}/{whole:.0f}" in line for line in checks)
    assert f" · gates {0 if none else whole:.0f}/{whole:.0f} · val" in screen
    assert ("the adapter changes nothing" in screen) == none


@pytest.mark.parametrize("method", [{"method": "galore"}, {"method": "adarankgrad", "earliest": 1, "energy": 0.5}])
def test_subspaces_are_told_and_drawn(tmp_path, tiny_llama, method):
    from rankshift.train.heat_map import course

    (tmp_path / "a.txt").write_text("hello how are you ? fine thanks . " * 50)
    result, screen, metrics = train(
        tmp_path, model=str(tiny_llama), data={"train": str(tmp_path / "a.txt"), "max_length": 16},
        method={"rank": 8, "every": 2, **method}, train={"steps": 6, "lr": 1e-3, "eval_every": 3},
    )  # fmt: skip
    told, energy = metrics["method"], method["method"] == "adarankgrad"
    assert set(told) - {"subspace_saturated"} == {"name", "subspace_rank", "subspace_energy", "subspace_renewals"}
    assert ("subspace_saturated" in told) == energy
    checks = [line for line in screen.splitlines() if line.startswith("  step") or "/6  loss" in line]
    assert len(checks) > 3
    assert all(re.search(r" · rank [\d.]+, energy [\d.]+(e-\d+)?( |$)", line) for line in checks[1:])
    assert not any("subspace" in line or "proj" in line for line in checks), "nothing of single layers"
    begin = re.search(r"(GaLore|AdaRankGrad), rank 8, on (\d+) layers", screen)
    assert re.search(r"state     of the optimizer [\d.]+ KiB, AdamW's [\d.]+ KiB", screen)
    assert f": subspace rank {told['subspace_rank']:.3g}, subspace energy {told['subspace_energy']:.3g}" in screen
    run = load(bases.load(result.directory).model, result.directory / "adapter")
    rank, kept = course(metrics["subspaces"]), course(metrics["subspaces"], "energy")
    assert len(rank.layers) == int(begin[2]) == len(run.subspaces)
    assert {name: int(row[-1]) for name, row in zip(rank.layers, rank.values, strict=True)} == run.subspaces
    assert told["subspace_rank"] == pytest.approx(rank.values[:, -1].mean())
    assert told["subspace_energy"] == pytest.approx(kept.values[:, -1].mean())
    assert (result.directory / "subspaces.png").stat().st_size > 10_000
    assert "subspaces.png" in screen
    assert dict(inspect.rows(result.directory))["projected"].startswith(f"{len(run.subspaces)}, rank ")
    plain = AutoModelForCausalLM.from_pretrained(result.directory / "model")
    ids = torch.tensor([[2, 7, 8, 9]])
    with torch.no_grad():
        assert torch.equal(plain.eval()(input_ids=ids).logits, run.model.eval()(input_ids=ids).logits)


def test_an_interrupted_run_keeps_the_course_of_its_subspaces(tmp_path, tiny_llama, monkeypatch):
    from rankshift.train.heat_map import course
    from rankshift.train.trainer import Trainer

    (tmp_path / "a.txt").write_text("hello how are you ? fine thanks . " * 50)
    settings = {
        "model": str(tiny_llama), "data": {"train": str(tmp_path / "a.txt"), "max_length": 16},
        "method": {"method": "adarankgrad", "rank": 8, "every": 2, "earliest": 1, "energy": 0.5},
        "train": {"steps": 6, "lr": 1e-3, "save_every": 3},
    }  # fmt: skip
    _, _, whole = train(tmp_path, **settings)
    step = Trainer.training_step

    def stopped(self, *arguments, **named):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return step(self, *arguments, **named)

    monkeypatch.setattr(Trainer, "training_step", stopped)
    with pytest.raises(recipe.Interrupted) as caught:
        train(tmp_path, **settings)
    monkeypatch.undo()
    result = recipe.resume(caught.value.directory, Console(file=io.StringIO()))
    metrics = json.loads((result.directory / "metrics.json").read_text())
    for what in ("rank", "energy"):
        np.testing.assert_array_equal(
            course(metrics["subspaces"], what).values, course(whole["subspaces"], what).values
        )


def test_a_run_is_resumed_with_other_settings_of_its_method(tmp_path, tiny_llama, monkeypatch, caplog):
    from rankshift.train.trainer import Trainer

    (tmp_path / "a.txt").write_text("hello how are you ? fine thanks . " * 50)
    settings = {
        "model": str(tiny_llama), "data": {"train": str(tmp_path / "a.txt"), "max_length": 16},
        "method": {"method": "galore", "rank": 4, "every": 2},
        "train": {"steps": 6, "lr": 1e-3, "save_every": 3},
    }  # fmt: skip
    step = Trainer.training_step

    def stopped(self, *arguments, **named):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return step(self, *arguments, **named)

    monkeypatch.setattr(Trainer, "training_step", stopped)
    with pytest.raises(recipe.Interrupted) as caught:
        train(tmp_path, **settings)
    monkeypatch.undo()
    directory = caught.value.directory
    before = (directory / "config.yaml").read_text()
    with pytest.raises(WrongBase, match=r"GaLore\(side=\"larger\"\): side cannot change"):
        recipe.resume(directory, Console(file=io.StringIO()), ["method.side=larger"])
    assert (directory / "config.yaml").read_text() == before
    with caplog.at_level("WARNING", "rankshift"):
        recipe.resume(directory, Console(file=io.StringIO()), ["method.every=3", "method.rank=8"])
    assert "The run was saved as GaLore(rank=4, every=2) and goes on as GaLore(rank=8, every=3)." in caplog.text
    after = config.read(directory / "config.yaml")
    assert (after.method.rank, after.method.every) == (8, 3)
    run = load(bases.load(directory).model, directory / "adapter")
    assert run.method == after.method
    assert set(run.subspaces.values()) == {8}


def test_compression_and_the_mixed_loss_are_told(tmp_path, tiny_llama):
    (tmp_path / "a.txt").write_text("hello how are you ? " * 50)
    settings = {"model": str(tiny_llama), "data": {"train": str(tmp_path / "a.txt"), "max_length": 16}}
    method = {"method": "pc-lora", "rank": 2, "bias": "match", "task_weight": 0.3}
    result, screen, metrics = train(tmp_path, **settings, method=method, train={"steps": 6})
    assert "in training 0.3 · task + 0.7 · distillation; in validation the task's alone" in screen
    assert screen.index("distillation") < screen.index("1/6")
    assert metrics["method"] == {"name": "pc-lora", "lambda": 0}
    assert "PCLoRA: lambda 0" in screen
    whole = AutoModelForCausalLM.from_pretrained(tiny_llama).num_parameters()
    small = rs.load_compressed(result.directory / "compressed").num_parameters()
    assert f"whole model {whole:,} → {small:,}" in screen
    _, screen, _ = train(tmp_path, **settings, method={**method, "features": False}, train={"steps": 6})
    assert "distillation" not in screen


# ---- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "mine"])
def test_a_run_without_a_checkpoint_says_how_to_start_anew(tmp_path, tiny_llama, monkeypatch, name):
    from rankshift.train.trainer import Trainer

    (tmp_path / "a.txt").write_text("hello how are you ? " * 50)
    settings = {"model": str(tiny_llama), "data": {"train": str(tmp_path / "a.txt"), "max_length": 16}, "name": name}

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, **settings, train={"steps": 1})
    (directory,) = (tmp_path / "runs").iterdir()
    assert (directory / "checkpoints").is_dir(), "begun, and nothing saved"
    monkeypatch.setattr(recipe, "prepare", lambda *_, **__: pytest.fail("looked at data first"))
    with pytest.raises(MissingFile) as caught:
        recipe.resume(directory, Console(file=io.StringIO()))
    first, second = str(caught.value).splitlines()
    assert "nothing to resume from: it stopped before its first checkpoint" in first
    monkeypatch.undo()
    file, *overrides = second.partition("rankshift train ")[2].split()
    assert recipe.train(config.read(file, overrides), Console(file=io.StringIO())).directory != directory


# ---- refusals of data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "extra", "match"),
    [
        ("", {}, "is empty"),
        ("\n", {}, "no rows|cannot be read"),
        ('{"txt": "a", "n": 1}\n' * 30, {"columns": {"text": "text"}}, r"no column 'text'.*Did you mean 'txt'"),
        ('{"a": "x", "b": "y"}\n' * 30, {}, "has the columns a, b"),
        ('{"text": 3}\n' * 30, {}, "holds integer, but text must be text"),
        ('{"text": "a"}\n{"text": \n', {}, "cannot be read as json"),
        ('{"text": ""}\n' * 30, {}, "no token to learn from"),
        ('{"prompt": "a", "completion": ""}\n' * 30, {}, "row 1 of data.train has no completion"),
        ('{"prompt": "a", "completion": "b"}\n', {"validation": 0.5}, "leaves none to train on"),
    ],
)
def test_data_that_cannot_be_used(tmp_path, tiny_llama, rows, extra, match):
    (tmp_path / "d.jsonl").write_text(rows)
    data = {"train": str(tmp_path / "d.jsonl"), **extra}
    refuse(tmp_path, DataError, match, model=str(tiny_llama), data=data, task="causal-lm")


@pytest.mark.parametrize(
    ("labels", "extra", "match"),
    [
        ([0, 1, -1], {}, r"row 3 of data.train has the label -1"),
        ([0, 1, 2], {"labels": 2}, "3 classes, but data.labels = 2"),
        ([0, 0, 0], {}, "a single class"),
        (["a", "b", None], {}, "row 3 of data.train has no label"),
        (["a", "b", "c"], {"labels": ["a", "b"]}, "the label 'c', which data.labels has not"),
    ],
)
def test_labels_out_of_range(tmp_path, tiny_bert, labels, extra, match):
    data = jsonl(tmp_path / "d.jsonl", [{"text": "a film", "label": label} for label in labels] * 10)
    settings = {"train": str(data), "validation": 0, **extra}
    refuse(tmp_path, DataError, match, model=str(tiny_bert), data=settings, task="sequence-classification")


def test_a_label_that_only_validation_has(tmp_path, tiny_bert):
    data = jsonl(tmp_path / "d.jsonl", [{"text": "a film", "label": k % 2} for k in range(10)])
    held = jsonl(tmp_path / "v.jsonl", [{"text": "a film", "label": 2}])
    settings = {"train": str(data), "validation": str(held)}
    refuse(
        tmp_path,
        DataError,
        r"row 1 of .* has the label 2, but there are 2 classes",
        model=str(tiny_bert),
        data=settings,
    )


def test_models_that_cannot_be_used(tmp_path, tiny_llama, tiny_bert):
    data = jsonl(tmp_path / "d.jsonl", [{"text": "hello you"}] * 30)
    (tmp_path / "empty").mkdir()
    refuse(tmp_path, MissingFile, "without config.json", model=str(tmp_path / "empty"), data=str(data))
    refuse(tmp_path, MissingFile, "could not be loaded", model="nobody/nothing", data=str(data))
    refuse(tmp_path, ConfigError, "has no llama for it", model=str(tiny_llama), data=str(data), task="masked-lm")
    refuse(
        tmp_path, ConfigError, "exceeds the 64 positions", model=str(tiny_bert),
        data={"train": str(data), "max_length": 100},
    )  # fmt: skip
    text = refuse(tmp_path, DataError, "could not be loaded", model=str(tiny_llama), data="nobody/nothing")
    assert "Hugging Face hub" in text
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_llama.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 500 if file.suffix == ".safetensors" else None])
    refuse(tmp_path, MissingFile, "weights of .* cannot be read", model=str(broken), data=str(data))


def test_an_encoder_is_no_causal_lm(tmp_path, tiny_bert):
    data = jsonl(tmp_path / "d.jsonl", [{"text": "hello you"}] * 30)
    chats = jsonl(tmp_path / "c.jsonl", [{"prompt": "hello", "completion": "you"}] * 30)
    refuse(tmp_path, ConfigError, "an encoder", model=str(tiny_bert), data=str(data), task="causal-lm")
    refuse(tmp_path, ConfigError, "an encoder", model=str(tiny_bert), data=str(chats))
    from transformers import AutoConfig

    from rankshift.train import models

    found = AutoConfig.from_pretrained(tiny_bert)
    found.is_decoder = True
    assert models.architecture(found, "causal-lm").__name__ == "BertLMHeadModel"
    for kind in ("llama", "gpt2", "bart", "mamba", "t5gemma"):
        assert not models._sees_both_ways(AutoConfig.for_model(kind)), kind


def test_images_and_text_are_told_apart(tmp_path, tiny_bert, tiny_vit):
    from PIL import Image

    for name in ("dark", "light"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (16, 16)).save(tmp_path / "pictures" / name / f"{i}.png")
    text = jsonl(tmp_path / "d.jsonl", [{"text": "hello you", "label": k % 2} for k in range(30)])
    plain = jsonl(tmp_path / "p.jsonl", [{"text": "hello you"}] * 30)
    pictures = str(tmp_path / "pictures")
    refuse(tmp_path, ConfigError, "vit is a model of images", model=str(tiny_vit), data=str(text))
    refuse(tmp_path, DataError, "needs a column of images", model=str(tiny_vit), data=str(plain))
    refuse(tmp_path, ConfigError, "bert is a model of text", model=str(tiny_bert), data=pictures)
    for task in ("masked-lm", "sequence-classification"):
        refuse(tmp_path, DataError, "needs a column of text", model=str(tiny_bert), data=pictures, task=task)


def test_a_target_that_matches_nothing(tmp_path, tiny_llama):
    data = jsonl(tmp_path / "d.jsonl", [{"text": "hello you"}] * 30)
    refuse(
        tmp_path, RankshiftError, "'q_porj' matches no layer", model=str(tiny_llama), data=str(data),
        method={"targets": "q_porj"},
    )  # fmt: skip
