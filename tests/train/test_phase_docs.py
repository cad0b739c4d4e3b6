"""Every block of docs/phases.md runs, one after the other, and does what the page says."""

import re
from pathlib import Path

import torch
from test_recipe import train
from test_trainer import arguments, base, data

import rankshift as rs
from rankshift.train import config

PAGE = (Path(__file__).parents[2] / "docs" / "phases.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_python_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = data(48)
    names = {
        "batches": [{k: torch.stack([r[k] for r in rows[i : i + 2]]) for k in rows[0]} for i in range(0, 48, 2)],
        "args": arguments(tmp_path / "trainer", max_steps=24, gradient_accumulation_steps=1, save_steps=12),
        "data": rows,
        "fresh_model": base(),
    }  # fmt: skip
    routes = {}
    for block in [text for kind, text in BLOCKS if kind == "python"]:
        if "rs.attach(" in block or "rs.Trainer(" in block:
            names["model"] = base().train()
        exec(block, names)
        if "run.shift" in block:
            routes["loop"] = names["run"].phases
            assert names["run"].step == 24
        if "trainer.train()" in block:
            routes["trainer"] = names["trainer"].run.phases
    for where, found in routes.items():
        spans = [(p.method["method"], p.start, p.stop) for p in found]
        assert spans[0] == ("full", 0, 6), where
        assert spans[1][:2] == ("relora", 6), where
        assert spans[2:] == [] or spans[2] == ("lora", spans[1][2], None), where
        assert [p.lr for p in found[:2]] == [None, 1e-3]
    assert routes.keys() == {"loop", "trainer"}
    said = capsys.readouterr().out
    assert "full 0 6 None 5456" in said
    assert "full 6 updates, 5,456 parameters trained" in said
    assert (tmp_path / "timeline.png").stat().st_size > 10_000
    assert (tmp_path / "loop.png").stat().st_size > 10_000


def test_the_yaml_of_the_page(tmp_path, tiny_llama):
    (tmp_path / "a.txt").write_text("hello how are you ? fine thanks . two and one is three . " * 80)
    (values,) = [config.scalar(text) for kind, text in BLOCKS if kind == "yaml"]
    assert values["model"] == "babyllama"
    values |= {"model": str(tiny_llama), "data": {"train": str(tmp_path / "a.txt"), "max_length": 32}}
    result, _, metrics = train(tmp_path, **values)
    assert [p["method"] for p in metrics["phases"]] == ["full", "relora", "lora"]
    assert metrics["phases"][0]["stop"] == 6
    assert {"model", "timeline.png", "adapter", "loss.png"} <= {p.name for p in result.directory.iterdir()}


def test_every_block_is_one_that_is_run_here():
    assert {kind for kind, _ in BLOCKS} == {"python", "yaml"}
    assert len(BLOCKS) >= 8


def test_the_table_has_every_time_that_there_is():
    fields = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert set(fields) == set(rs.core.phase.WHEN)
