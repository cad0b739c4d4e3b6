"""The examples run, learn something, and leave what they say."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import rankshift as rs
from rankshift.train.bundled import model_path

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(tmp_path, monkeypatch, capsys):
    def run(name, steps):
        monkeypatch.setenv("STEPS", str(steps))
        monkeypatch.setenv("OUT", str(tmp_path))
        names = runpy.run_path(str(EXAMPLES / f"{name}.py"))
        return names, capsys.readouterr().out

    return run


def base():
    return AutoModelForCausalLM.from_pretrained(model_path("babyllama"))


def test_loop(example, tmp_path):
    names, out = example("loop", 12)
    before, after, untouched = (
        float(re.search(rf"{what}:? ([\d.]+)", out)[1]) for what in ("loss before", "loss after", "the base, untouched")
    )
    assert after < before - 0.3
    assert untouched == before
    assert "q_proj" in out
    run = rs.load(base(), tmp_path)
    assert run.step == 12
    trained = dict(names["run"].trainable())
    assert all(torch.equal(p, trained[name]) for name, p in run.trainable())


def test_galore(example, tmp_path):
    names, out = example("galore", 12)
    before, after = (float(re.search(rf"held-out loss {when} ([\d.]+)", out)[1]) for when in ("before", "after"))
    assert after < before - 0.3
    assert "below AdamW's" in out
    assert [step for step, _ in names["tables"]] == [1, 6, 11]
    assert "model.layers.0.self_attn.q_proj.weight" in out
    assert (tmp_path / "subspaces.png").stat().st_size > 10_000
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(p, trained[name]) for name, p in names["run"].trainable())


@pytest.mark.filterwarnings("ignore")
def test_hf_trainer_and_going_on(example, tmp_path, monkeypatch):
    from peft import PeftModel

    names, out = example("hf_trainer", 12)
    before, after = map(float, re.search(r"held-out loss ([\d.]+) → ([\d.]+)", out).groups())
    assert after < before - 0.3
    x = torch.arange(5, 25)[None]
    with torch.no_grad():
        ours = names["model"].eval()(x).logits
        theirs = PeftModel.from_pretrained(base(), tmp_path / "peft").eval()(x).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # fp32, another order of products
    restore, resumed = rs.Trainer._restore, []
    monkeypatch.setattr(rs.Trainer, "_restore", lambda t, path: (resumed.append(path.name), restore(t, path)))
    names, _ = example("hf_trainer", 14)
    assert resumed == ["checkpoint-12"]
    assert names["trainer"].run.step == 14


@pytest.mark.filterwarnings("ignore")
def test_trl_sft(example, tmp_path):
    pytest.importorskip("trl")
    _, out = example("trl_sft", 12)
    before, after = map(float, re.search(r"held-out loss ([\d.]+) → ([\d.]+)", out).groups())
    assert after < before - 0.3
    assert rs.load(base(), tmp_path / "run").step == 12
