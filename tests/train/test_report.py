"""The files that a run leaves to read."""

import json
import math

import numpy as np
import pytest

from rankshift.core.errors import NotWritable
from rankshift.train import report


def test_the_plot_shows_all_three_losses(tmp_path):
    import matplotlib.image

    train = [(step, 3 - step / 50) for step in range(1, 101)]
    report.plot(tmp_path / "all.png", "title", train, [(0, 3.2), (50, 2.2), (100, 1.2)], 3.2)
    picture = matplotlib.image.imread(tmp_path / "all.png")
    assert picture.shape[0] >= 600
    pixels = np.round(picture[..., :3] * 255).astype(int)
    for ink in (report._TRAIN, report._CHECK, report.INK):
        colour = [int(ink[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == colour).all(-1).sum() > 100


@pytest.mark.parametrize(("train", "checks", "base"), [([], [], None), ([(1, math.nan), (2, 1.0)], [], 2.0)])
def test_a_plot_of_little(tmp_path, train, checks, base):
    report.plot(tmp_path / "few.png", "title", train, checks, base)
    assert (tmp_path / "few.png").stat().st_size > 1000


def test_smoothing_is_as_long_at_the_end_as_in_the_middle():
    values = np.random.default_rng(0).standard_normal(100)
    smooth = report.smooth(values)
    for i in range(100):
        assert smooth[i] == pytest.approx(values[max(0, i - 9) : i + 1].mean())
    assert report.smooth(np.array([2.0])).tolist() == [2.0]


def test_metrics_are_strict_json(tmp_path):
    report.write_metrics(tmp_path, {"a": math.nan, "b": [1.0, math.inf], "c": {"d": "é"}})
    text = (tmp_path / "metrics.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [1.0, None], "c": {"d": "é"}}
    assert report.read_metrics(tmp_path)["c"] == {"d": "é"}
    assert report.read_metrics(tmp_path / "nothing") == {}


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotWritable):
        report.write_metrics(tmp_path / "file", {})
    with pytest.raises(NotWritable):
        report.plot(tmp_path / "file" / "loss.png", "title", [(1, 1.0)], [], None)
