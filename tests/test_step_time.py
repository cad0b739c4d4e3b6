"""The table of benchmarks/step_time.py: ratios between runs that share no arm but the reference."""

import importlib.util
import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def step_time():
    path = Path(__file__).parents[1] / "benchmarks" / "step_time.py"
    if not path.exists():
        pytest.skip("benchmarks are not in an installed package")
    spec = importlib.util.spec_from_file_location("step_time", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(ms, x_reference, owner, arithmetic="bf16", **more):
    return {
        "ms": ms, "p10": ms - 1, "p90": ms + 1, "host_ms": 5.0, "x_reference": x_reference, "owner": owner,
        "arithmetic": arithmetic, **more,
    }  # fmt: skip


def result(arms, **more):
    return {
        "shape": "1.1B", "sequences": 8, "tokens": 8192, "gpu": "a GPU", "date": "2026-01-01",
        "versions": {"torch": "2"}, "arms": arms, "left_out": {}, "failed": {}, "batches": [], **more,
    }  # fmt: skip


def test_the_best_floor_of_any_file_is_what_all_rows_are_divided_by(step_time, tmp_path):
    first = result({
        "frozen, blocks compiled": row(80.0, 1.0, "floor", gib=11.0),
        "LoRA r16, lowered": row(90.0, 1.125, "ours", gib=9.0, kernel_ms=81.2, kernels_a_block=37),
        "QLoRA r16, lowered": row(96.0, 1.2, "ours", "nf4"),
    }, left_out={"frozen, Liger": "not here"})  # fmt: skip
    second = result({  # a slower machine: its milliseconds say nothing about the first one's
        "frozen, blocks compiled": row(100.0, 1.0, "floor", gib=11.0),
        "frozen, Liger": row(90.0, 0.9, "floor", gib=8.6),
    })  # fmt: skip
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, content in zip(files, (first, second), strict=True):
        file.write_text(json.dumps(content))
    shapes = step_time.merged(files)
    arms = shapes["1.1B"]["arms"]
    assert shapes["1.1B"]["best"] == "frozen, Liger"
    assert arms["LoRA r16, lowered"]["x_floor"] == pytest.approx(1.125 / 0.9)
    assert arms["frozen, Liger"]["x_floor"] == 1
    text = step_time.table(files)
    assert "| **frozen, Liger** | 90.0 | 89.0–91.0 | 1.000 | 8.60 | 5.0 | – | – |" in text
    assert "| LoRA r16, lowered | 90.0 | 89.0–91.0 | 1.250 | 9.00 | 5.0 | 81.2 | 37 |" in text
    assert "Left out" not in text  # the second file has it
    assert text.index("base in fewer bits") < text.index("QLoRA r16, lowered")
    step_time.plot(files, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_without_the_reference_there_are_times_and_no_ratios(step_time, tmp_path):
    file = tmp_path / "a.json"
    arms = {"frozen, eager": row(80.0, None, "floor"), "LoRA r16, eager": row(90.0, None, "ours")}
    file.write_text(json.dumps(result(arms, failed={"frozen, blocks compiled": "RuntimeError: no compiler"})))
    text = step_time.table([file])
    assert "| LoRA r16, eager | 90.0 | 89.0–91.0 | – | – | 5.0 | – | – |" in text
    assert "Failed: frozen, blocks compiled (RuntimeError: no compiler)" in text
    other = tmp_path / "b.json"
    other.write_text(json.dumps(result({"frozen, blocks compiled": row(80.0, 1.0, "floor")})))
    assert "| LoRA r16, eager | 90.0 | 89.0–91.0 | – | – | 5.0 | – | – |" in step_time.table([file, other])


def test_a_smoothed_curve_is_the_mean_of_what_came_last(step_time):
    assert step_time.smooth([4.0, 2.0, 3.0, 7.0], over=2) == [4.0, 3.0, 2.5, 5.0]
