"""`rankshift train` with phases: what it says, writes and goes on with."""

import io
import json
import logging

import pytest
import torch
import yaml
from rich.console import Console
from test_recipe import jsonl, train
from transformers import AutoModelForCausalLM

import rankshift as rs
from rankshift.cli import files, inspect
from rankshift.core.errors import ConfigError, RankTooLarge
from rankshift.run import load
from rankshift.train import bases, config, recipe
from rankshift.train.trainer import Trainer

PHASES = [{"method": "full", "until": {"steps": 4}, "lr": 1e-3}, {"method": "lora", "rank": 2, "lr": 1e-2}]


def settings(tmp_path, tiny_llama, phases=PHASES, **more):
    rows = jsonl(tmp_path / "text.jsonl", [{"text": "hello how are you ? fine thanks ."}] * 40)
    loop = {"steps": 8, "batch": 2, "eval_every": 2, **more.pop("train", {})}
    return {"model": str(tiny_llama), "data": str(rows), "phases": phases, "train": loop, **more}


def weights(directory):
    run = load(bases.load(directory).model, directory / "adapter")
    return run, {name: tensor.clone() for name, tensor in run.state_dict()["tensors"].items()}


def test_full_then_lora(tmp_path, tiny_llama, caplog):
    with caplog.at_level(logging.WARNING, "rankshift"):
        result, screen, metrics = train(tmp_path, **settings(tmp_path, tiny_llama))
    assert "full for 4 updates, then lora" in screen.split("phases")[1].split("\n")[0]
    text = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("Step 4: full ends, lora begins"))
    assert "4 updates" in text
    first, second = metrics["phases"]
    assert [(p["method"], p["start"], p["stop"], p["lr"]) for p in (first, second)] == [
        ("full", 0, 4, 1e-3), ("lora", 4, 8, 1e-2),
    ]  # fmt: skip
    assert metrics["method"] == {"name": "lora"}
    assert metrics["trainable"] == second["trainable"], "at the end"
    whole = first["trainable"]
    assert metrics["total"] == whole + second["trainable"] > whole
    assert first["estimated_memory"] > second["estimated_memory"] > 4 * whole
    assert first["seconds_per_update"] > 0
    end = screen.split("8 updates in")[1]
    assert f"1 Full: 4 updates, {first['trainable']:,} parameters trained" in end
    assert f"2 LoRA: 4 updates, {second['trainable']:,} parameters trained" in end
    assert (result.directory / "timeline.png").stat().st_size > 10_000
    assert (result.directory / "model" / "config.json").is_file(), "an adapter alone would lack the first phase"
    assert not (result.directory / "peft").exists()
    resolved = yaml.safe_load((result.directory / "config.yaml").read_text())
    assert "method" not in resolved
    assert resolved["phases"][1]["targets"] == "all-linear"
    assert resolved["phases"][0]["until"] == {"steps": 4}
    # what is written is one model, however it is read
    run, _ = weights(result.directory)
    ids = torch.tensor([[2, 7, 8, 9]])
    plain = AutoModelForCausalLM.from_pretrained(result.directory / "model").eval()
    base = bases.load(result.directory)
    load(base.model, base.adapter).export(tmp_path / "merged", format="merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        ours = run.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(plain(input_ids=ids).logits, ours, rtol=0, atol=1e-5)  # fp32, merged
        assert torch.equal(merged(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize("step", [1, 3, 4, 6])  # the update during which it stops; the change is after the fourth
def test_stopped_and_resumed_it_is_the_same_run(tmp_path, tiny_llama, monkeypatch, step):
    wanted = settings(tmp_path, tiny_llama, train={"save_every": 1})
    whole, _, expected = train(tmp_path, **wanted)
    real = Trainer.training_step

    def stopped(self, *arguments, **named):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return real(self, *arguments, **named)

    monkeypatch.setattr(Trainer, "training_step", stopped)
    with pytest.raises(recipe.Interrupted) as caught:
        train(tmp_path, **wanted)
    monkeypatch.undo()
    screen = io.StringIO()
    result = recipe.resume(caught.value.directory, Console(file=screen, width=160))
    metrics = json.loads((result.directory / "metrics.json").read_text())
    for key in ("train_loss", "validation", "sample_after", "base"):
        assert metrics[key] == expected[key], key
    known = ("method", "start", "stop", "lr", "trainable", "estimated_memory")
    assert [{k: p[k] for k in known} for p in metrics["phases"]] == [
        {k: p[k] for k in known} for p in expected["phases"]
    ]
    mine, theirs = weights(result.directory)[1], weights(whole.directory)[1]
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert (result.directory / "timeline.png").is_file()


def test_a_new_head_trains_in_every_phase(tmp_path, tiny_bert):
    rows = [{"text": f"a {word} film", "label": k} for k, word in enumerate(("fine", "dull"))] * 20
    phases = [{"method": "lora", "rank": 2, "until": {"steps": 2}}, {"method": "vera", "rank": 4}]
    result, *_ = train(
        tmp_path, model=str(tiny_bert), data=str(jsonl(tmp_path / "rows.jsonl", rows)), phases=phases,
        train={"steps": 4, "batch": 4},
    )  # fmt: skip
    resolved = yaml.safe_load((result.directory / "config.yaml").read_text())
    assert ["classifier" in phase["modules_to_save"] for phase in resolved["phases"]] == [True, True]
    assert [phase["lr"] for phase in resolved["phases"]] == [rs.LoRA.default_lr, rs.VeRA.default_lr]
    assert result.directory.name == "tiny-bert-lora-vera-1"
    assert (result.directory / "model").is_dir(), "LoRA's change is in the base"
    files.export_run(result.directory, tmp_path / "merged", None, "merged", "exact")


def test_a_run_of_one_method_has_no_timeline_and_one_row(tmp_path, tiny_llama):
    wanted = settings(tmp_path, tiny_llama)
    del wanted["phases"]
    result, screen, metrics = train(tmp_path, **{**wanted, "train": {"steps": 2, "batch": 2}})
    assert [p["method"] for p in metrics["phases"]] == ["lora"]
    assert not (result.directory / "timeline.png").exists()
    assert "phases" not in screen


STAGES = {
    "method": "prelora", "window": 1, "windows": 2, "joint": 2, "min_rank": 1, "max_rank": 2, "weight_change": 1e9,
    "loss_change": 1e9, "then": {"method": "lora", "rank": 2},
}  # fmt: skip


def test_stages_are_named_wherever_they_are_told(tmp_path, tiny_llama):
    wanted = settings(tmp_path, tiny_llama, train={"lr": 1e-3})
    del wanted["phases"]
    result, screen, metrics = train(tmp_path, **wanted, method=STAGES)
    assert "8/8  loss" in screen
    assert " · stage joint · " in screen
    assert "PreLoRA: stage frozen" in screen
    assert metrics["method"] == {"name": "prelora", "stage": "frozen"}
    assert [(row["label"], row["lr"]) for row in metrics["phases"]] == [
        ("PreLoRA full", 1e-3), ("PreLoRA joint", 1e-3), ("PreLoRA frozen", 1e-3),
    ]  # fmt: skip
    assert metrics["trainable"] == metrics["phases"][-1]["trainable"] < metrics["phases"][0]["trainable"]
    lines = dict(inspect.rows(result.directory))
    assert lines["phases"] == "PreLoRA full from 0, PreLoRA joint from 2, PreLoRA frozen from 4"
    assert lines["at the end"] == "stage frozen"
    assert "then (lora, rank 2, alpha 32)" in lines["method"]
    assert "stage frozen" in lines["method"]
    assert "ranks of 14 layers" in lines["method"]
    assert "{" not in lines["method"]


@pytest.mark.parametrize(
    ("phases", "match", "later"),
    [
        (
            [{"method": "prelora", "window": 4, "windows": 2}],
            "method: PreLoRA.*after update 8 at the earliest, and ends at 8",
            "after update 8 at the earliest, and ends at 3",
        ),
        (
            [{"method": "full", "until": {"steps": 4}}, {"method": "prelora", "window": 2, "windows": 2}],
            "phases: PreLoRA.*after update 8 at the earliest", "PreLoRA would begin at update 4 at the earliest",
        ),
        (
            [{"method": "sora", "sparsity": list(range(1, 10))}],
            "method: SoRA has 9 of 9 stages to go and 8 updates", "SoRA has 9 of 9 stages to go and 3 updates",
        ),
    ],
)  # fmt: skip
def test_too_few_updates_are_refused_with_the_other_settings(tmp_path, tiny_llama, monkeypatch, phases, match, later):
    wanted = settings(tmp_path, tiny_llama, phases)
    if len(phases) == 1:
        wanted["method"] = wanted.pop("phases")[0]
    with pytest.raises(ConfigError, match=match):
        config.parse(wanted)
    wanted["train"] |= {"steps": None, "epochs": 1}  # then they are known with the data; nothing is loaded before
    monkeypatch.setattr(recipe.models, "load", lambda *_, **__: pytest.fail("loaded first"))
    with pytest.raises(ConfigError, match=later):
        train(tmp_path, **wanted)
    assert not (tmp_path / "runs").exists()


def test_a_warm_up_that_does_not_fit_is_refused_with_the_other_settings(tmp_path, tiny_llama):
    phases = [{"method": "full", "until": {"steps": 4}}, {"method": "relora", "rank": 2, "every": 2}]
    with pytest.raises(ConfigError, match="phases: A warm-up of 3 updates does not end before the first cycle of 2"):
        config.parse(settings(tmp_path, tiny_llama, phases, train={"warmup": 0.75}))
    config.parse(settings(tmp_path, tiny_llama, phases, train={"warmup": 0.5}))


def test_what_is_refused_when_training_begins_leaves_no_directory(tmp_path, tiny_llama, monkeypatch):
    def refused(*_, **__):
        raise ConfigError("no")

    monkeypatch.setattr(Trainer, "create_scheduler", refused)
    with pytest.raises(ConfigError):
        train(tmp_path, **settings(tmp_path, tiny_llama))
    assert not list((tmp_path / "runs").iterdir())


def test_what_cannot_be_reached_or_does_not_fit_leaves_no_directory(tmp_path, tiny_llama):
    late = [{"method": "full", "until": {"steps": 40}}, {"method": "lora", "rank": 2}]
    wanted = settings(tmp_path, tiny_llama, late)
    del wanted["train"]["steps"]  # then the number of updates is known only with the data
    with pytest.raises(ConfigError, match="LoRA would begin at update 40 at the earliest, and the run ends at 3"):
        train(tmp_path, **{**wanted, "train": {**wanted["train"], "epochs": 1}})
    assert not (tmp_path / "runs").exists()
    large = [{"method": "full", "until": {"steps": 4}}, {"method": "lora", "rank": 99}]
    with pytest.raises(RankTooLarge, match="rank 99"):
        train(tmp_path, **settings(tmp_path, tiny_llama, large))
    assert not list((tmp_path / "runs").iterdir())


def test_resuming_takes_no_other_phases(tmp_path, tiny_llama, monkeypatch):
    real = Trainer.training_step

    def stopped(self, *arguments, **named):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return real(self, *arguments, **named)

    monkeypatch.setattr(Trainer, "training_step", stopped)
    with pytest.raises(recipe.Interrupted) as caught:
        train(tmp_path, **settings(tmp_path, tiny_llama))
    with pytest.raises(ConfigError, match="method and phases are both given"):
        recipe.resume(caught.value.directory, Console(file=io.StringIO()), ["method.rank=3"])
