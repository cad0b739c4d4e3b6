"""The timeline: phases, rare events and convergence under the loss; the same after a resume."""

from dataclasses import dataclass
from typing import ClassVar

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from test_callback import plain
from test_then import going
from test_trainer import base, trainer

import rankshift as rs
from rankshift.core import method as registry
from rankshift.core.errors import DataError, MissingFile, NotWritable
from rankshift.core.event import Moment
from rankshift.core.phase import Phase
from rankshift.train import timeline as t
from rankshift.train.timeline import bands, draw, landmarks, timeline

RELORA = rs.ReLoRA(rank=2, every=2)
CONVERGES = {"loss_change": 1e-9, "weight_change": 1e-9, "window": 1, "windows": 2}  # it never has
THEN = [rs.Then(RELORA, steps=3, **CONVERGES), rs.Then(rs.Full(), steps=3)]
BANDS = [(1, "Full", 0, 3), (2, "ReLoRA", 3, 6), (3, "Full", 6, 8)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Full for 3 updates, ReLoRA for 3, Full for 2, of 8; a checkpoint after each."""
    out = tmp_path_factory.mktemp("trained")
    trainer = going(out, THEN)
    trainer.train()
    return trainer, out


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def panels(figure):
    """What each panel of a figure shows, for comparing figures."""
    return [
        (
            [(line.get_label(), np.asarray(line.get_xydata()).tolist()) for line in axes.lines],
            [patch.get_bbox().bounds for patch in axes.patches],
            axes.get_xlim(),
        )
        for axes in figure.axes
    ]


def test_phases_with_what_trains(trained):
    trainer, _ = trained
    found = bands(trainer.run.phases, trainer.run.step)
    assert [(b.number, b.name, b.start, b.stop) for b in found] == BANDS
    weights = sum(p.numel() for p in base().parameters())
    assert [b.trainable for b in found][::2] == [weights, weights]
    assert str(found[0]) == "1  Full, updates 1 to 3, 5,456 parameters train"
    figure = draw(trainer.run, trainer.state.log_history, "a title")
    assert "1  Full, updates 1 to 3, 5,456 parameters train" in texts(figure)
    assert [text for text in texts(figure) if "updates" not in text] == ["1  Full", "2  ReLoRA", "3  Full"]
    band = next(axes for axes in figure.axes if axes.patches)
    assert [(p.get_x(), p.get_width()) for p in band.patches] == [(0, 3), (3, 3), (6, 2)]
    colours = [matplotlib.colors.to_hex(p.get_facecolor()) for p in band.patches]
    assert colours[0] == colours[2] != colours[1]


def test_a_phase_without_an_update_is_no_band():
    phases = [Phase(rs.to_dict(rs.Full()), *span) for span in ((0, 0), (0, 4), (4, None))]
    assert [(b.number, b.start, b.stop) for b in bands(phases, 4)] == [(2, 0, 4)]
    assert str(bands(phases, 4)[0]) == "2  Full, updates 1 to 4"


def test_restarts_are_marked_where_the_method_made_them(trained):
    trainer, _ = trained
    assert landmarks(trainer.run) == {"restart": [6]}  # after 2 updates of the second phase, in the third of them
    figure = draw(trainer.run, trainer.state.log_history)
    marks = next(line for line in figure.axes[0].lines if line.get_label() == "restart (1)")
    assert marks.get_xdata().tolist() == [6]


def test_events_are_found_by_what_they_say_of_themselves():
    @dataclass(frozen=True)
    class Rare:
        moment: ClassVar[Moment] = Moment.WINDOW
        landmark: ClassVar[str] = "rare"

        def due(self, tick):
            return tick.total == 9 and tick.seed == 5 and tick.step in (1, 4, 30)

        def apply(self, adapter, tick):
            pass

    @dataclass(frozen=True, kw_only=True)
    class Own(rs.LoRA):
        name: ClassVar[str] = "test_rare"

        def events(self):
            return (Rare(),)

    try:
        run = rs.attach(base(), Own(rank=2), seed=5, total_steps=9)
        run._driver.step = 4
        assert landmarks(run) == {"rare": [2]}
        run._driver.step = 5
        assert landmarks(run) == {"rare": [2, 5]}
        assert t.worth_seeing(run, [])
        run = rs.attach(base(), rs.LoRA(rank=2))
        assert landmarks(run) == {}
        assert not t.worth_seeing(run, [{"loss": 1.0, "step": 1}])
        assert t.worth_seeing(run, [{"window_loss_change": 1.0}])
    finally:
        registry._REGISTRY.pop("test_rare")


def test_how_far_it_was_from_convergence(trained):
    trainer, _ = trained
    figure = draw(trainer.run, trainer.state.log_history)
    lines = {line.get_label(): line.get_xydata() for line in figure.axes[1].lines}
    steps, values = np.asarray(lines["loss"]).T
    assert steps.tolist() == [2, 3], "windows of one update, of the first phase; the last is the one that ended it"
    losses = {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e}
    wanted = [100 * abs(losses[k] - losses[k - 1]) / losses[k - 1] for k in (2, 3)]
    assert values == pytest.approx(wanted, rel=1e-2)  # the log rounds
    assert np.asarray(lines["weights that move most"])[:, 0].tolist() == [2, 3]


def test_what_the_changes_must_come_down_to_is_drawn(trained):
    """Two phases that end by their convergence, with limits of their own."""
    run = rs.attach(base(), rs.Full(), total_steps=90)
    run.phases = [
        Phase(rs.to_dict(rs.Full()), 0, 40),
        Phase(rs.to_dict(rs.Full()), 40, 60),
        Phase(run.phases[0].method, 60),
    ]
    run._driver.step = 90
    limits = {"window_loss_change_limit": 5.0, "window_weight_change_limit": 0.25}
    windows = [
        {"step": k, "window_end": k, "window_loss_change": 100 / k, "window_weight_change": 1 / k, **limits}
        for k in (10, 20, 30, 40)
    ]
    windows += [
        {"step": k, "window_end": k, "window_loss_change": 1.0, "window_loss_change_limit": 2.0} for k in (50, 60)
    ]
    figure = draw(run, [*windows, {"step": 90, "loss": 1.0}])
    axes = figure.axes[1]
    found = [(line.get_label(), np.asarray(line.get_xydata()).tolist(), line.get_color()) for line in axes.lines]
    dashed = [one for one in found if one[0].startswith("goal")]
    assert [one[:2] for one in dashed] == [
        ("goal: at most 5 %", [[0, 5], [40, 5]]), ("goal: at most 2 %", [[40, 2], [60, 2]]),
        ("goal: below 0.25 %", [[0, 0.25], [40, 0.25]]),
    ]  # fmt: skip
    colours = {label: colour for label, _, colour in found}
    assert dashed[0][2] == colours["loss"] != dashed[2][2] == colours["weights that move most"]
    low, high = axes.get_ylim()
    assert low < 0.1
    assert high > 10
    figure.canvas.draw()
    labels = [text.get_text() for text in axes.get_yticklabels(which="both") if text.get_text()]
    assert {"0.1", "1", "10"} <= set(labels)
    assert all(float(text.replace(",", "")) > 0 and "e" not in text for text in labels)
    # and what a Trainer logs has them
    trainer, _ = trained
    dashed = [line for line in draw(trainer.run, trainer.state.log_history).axes[1].lines if "goal" in line.get_label()]
    assert [line.get_label() for line in dashed] == ["goal: at most 1e-09 %", "goal: below 1e-09 %"]
    assert all(line.get_xdata().tolist() == [0, 3] for line in dashed)


def test_prelora_says_its_limits_itself(tmp_path):
    method = rs.PreLoRA(window=2, windows=2, joint=2, max_rank=4, weight_change=90, loss_change=99)
    trained = trainer(tmp_path, method, save_strategy="no")
    trained.train()
    windows = [e for e in trained.state.log_history if "window_loss_change" in e]
    assert [(e["window_loss_change_limit"], e["window_weight_change_limit"]) for e in windows] == [(99, 90)]


def test_a_trainer_draws_it_at_its_end(trained, tmp_path, monkeypatch, caplog):
    assert (trained[1] / "timeline.png").stat().st_size > 10_000
    plain = trainer(tmp_path, rs.LoRA(rank=2), max_steps=1)
    plain.train()
    assert not (tmp_path / "timeline.png").exists(), "there is nothing to see"
    restarts = {"method": RELORA, "max_steps": 4}
    trainer(tmp_path, **restarts, save_strategy="no").train()
    assert not (tmp_path / "timeline.png").exists(), "nothing was to be saved"
    other = trainer(tmp_path, **restarts)
    monkeypatch.setattr(other, "is_world_process_zero", lambda: False)
    other.train()
    assert not (tmp_path / "timeline.png").exists(), "another rank draws it"
    with monkeypatch.context() as patch:
        patch.setattr(t, "draw", lambda *_: 1 / 0)
        trainer(tmp_path, **restarts).train()
    assert "timeline.png could not be drawn: division by zero" in caplog.text
    trainer(tmp_path, **restarts).train()
    assert (tmp_path / "timeline.png").stat().st_size > 10_000


@pytest.mark.parametrize("step", [2, 3, 7])
def test_a_resumed_training_has_the_same(tmp_path, trained, step):
    trainer, out = trained
    again = going(tmp_path, THEN, save_strategy="no")
    again.train(resume_from_checkpoint=str(out / f"checkpoint-{step}"))
    assert panels(draw(again.run, again.state.log_history)) == panels(draw(trainer.run, trainer.state.log_history))
    assert texts(draw(again.run, again.state.log_history)) == texts(draw(trainer.run, trainer.state.log_history))


def test_it_is_drawn_of_a_checkpoint_or_of_a_loop(tmp_path, trained):
    trainer, out = trained
    run = rs.load(base(), out / "checkpoint-5")
    file = timeline(tmp_path / "a.png", run, out / "checkpoint-5", "after five")
    assert [(b.name, b.stop) for b in bands(run.phases, run.step)] == [("Full", 3), ("ReLoRA", 5)]
    picture = np.round(matplotlib.image.imread(file)[..., :3] * 255).astype(int)
    for ink in (t._LOSS, *t._BANDS[:2]):
        assert (picture == [int(ink[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).sum() > 100, ink
    timeline(tmp_path / "b.png", trainer.run, [(1, 3.0), (2, float("nan")), (8, 2.0)])
    assert (tmp_path / "b.png").stat().st_size > 10_000
    with pytest.raises(DataError, match="No update was taken"):
        timeline(tmp_path / "c.png", rs.attach(base(), rs.Full()), [])
    with pytest.raises(MissingFile):
        timeline(tmp_path / "c.png", trainer.run, tmp_path / "nowhere")
    with pytest.raises(NotWritable):
        timeline(tmp_path / "no" / "c.png", trainer.run, [])


def test_many_phases_and_many_marks_stay_readable():
    run = rs.attach(base(), rs.Full(), total_steps=900)
    phase = run.phases[0]
    run.phases = [type(phase)(phase.method, 10 * k, 10 * k + 10, None, 1) for k in range(30)]
    run.phases[-1] = type(phase)(rs.to_dict(rs.ReLoRA(rank=2, every=1)), 290, None, None, 1)
    run._driver.step = 900
    figure = draw(run, [(k, 1.0) for k in range(1, 900)])
    told = [text for text in texts(figure) if "updates" in text or "more" in text]
    assert len(told) == 13
    assert told[-1] == "and 18 more"
    marks = next(line for line in figure.axes[0].lines if line.get_label() == "restart (609)")
    assert len(marks.get_xdata()) <= 200
    assert [text for text in texts(figure) if text not in told][:2] == ["1", "2"], "no room for names"


def test_the_colours_of_phases_are_told_apart_without_red_and_green():
    """Machado, Oliveira & Fernandes 2009, full deuteranopia and protanopia: distances in linear RGB stay large."""
    deutan = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    protan = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    colours = np.array([matplotlib.colors.to_rgb(c) for c in t._BANDS[:4]]) ** 2.2
    for seen in (np.eye(3), np.array(deutan), np.array(protan)):
        found = colours @ seen.T
        gaps = [np.linalg.norm(a - b) for i, a in enumerate(found) for b in found[:i]]
        assert min(gaps) > 0.15, gaps


def test_an_unmodified_trainer_draws_it_too(tmp_path):
    run, trainer = plain(tmp_path, rs.ReLoRA(rank=2, every=2), save_strategy="no", timeline=tmp_path / "line.png")
    trainer.train()
    assert landmarks(run) == {"restart": [3, 5]}
    assert (tmp_path / "line.png").stat().st_size > 10_000
