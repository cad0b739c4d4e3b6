"""RunCallback: an unmodified Trainer, or one of TRL's, logs of a run what rs.Trainer does."""

import numpy as np
import pytest
import transformers
from test_subspaces import Heard, Screen
from test_trainer import arguments, base, data

import rankshift as rs
from rankshift.core.errors import ConfigError
from rankshift.train.callback import RunCallback
from rankshift.train.heat_map import course

METHOD = rs.AdaRankGrad(rank=8, energy=0.8, every=3, earliest=1)


def plain(out, method=METHOD, callbacks=(), heat_map=None, timeline=None, **more):
    run, args = rs.attach(base(), method, seed=3), arguments(out, max_steps=6, **more)
    trainer = transformers.Trainer(
        run.model, args, train_dataset=data(), callbacks=list(callbacks),
        optimizer_cls_and_kwargs=run.optimizer_cls_and_kwargs(args),
    )  # fmt: skip
    trainer.add_callback(RunCallback(run, trainer, heat_map, timeline))
    return run, trainer


def test_it_logs_what_our_trainer_does_and_draws_it(tmp_path):
    reporter, screen = Heard(), Screen()
    _, trainer = plain(tmp_path / "a", callbacks=(reporter, screen), heat_map=tmp_path / "map.png")
    trainer.train()
    ours = rs.Trainer(
        model=base(), method=METHOD, args=arguments(tmp_path / "b", max_steps=6), train_dataset=data()
    )  # fmt: skip
    ours.train()
    mine, theirs = trainer.state.log_history, ours.state.log_history
    for what in ("rank", "energy"):
        found, wanted = course(mine, what), course(theirs, what)
        assert (found.steps, found.layers) == (wanted.steps, wanted.layers)
        np.testing.assert_array_equal(found.values, wanted.values)
    for key in ("subspace_rank", "subspace_energy", "subspace_saturated", "subspace_renewals", "trainable_parameters"):
        values = [(entry["step"], entry[key]) for entry in mine if key in entry]
        assert values == [(entry["step"], entry[key]) for entry in theirs if key in entry], key
        assert values == [(step, logs[key]) for step, logs in reporter.logs if key in logs], "what reports is told"
    layers = [key for _, logs in reporter.logs for key in logs if "/" in key]
    assert sorted(layers) == sorted(key for entry in mine for key in entry if "/" in key)
    assert layers
    assert any("subspace_rank" in logs for logs in screen.logs)
    assert not any("/" in key for logs in screen.logs for key in logs)
    assert [e["loss"] for e in mine if "loss" in e] == [e["loss"] for e in theirs if "loss" in e]
    assert (tmp_path / "map.png").stat().st_size > 10_000


def test_a_resumed_training_draws_the_whole_course(tmp_path):
    plain(tmp_path, save_steps=3)[1].train()
    _, again = plain(tmp_path / "again", heat_map=tmp_path / "map.png", save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert course(again.state.log_history).steps == (1, 2, 3, 4, 5, 6)
    assert (tmp_path / "map.png").exists()


def test_other_methods_have_their_metrics_and_no_map(tmp_path):
    run, trainer = plain(tmp_path, rs.SoRA(rank=2), save_strategy="no")
    trainer.train()
    named = set(run.metrics())
    assert named
    assert sum(named <= entry.keys() for entry in trainer.state.log_history) == 6
    with pytest.raises(ConfigError, match="SoRA has no subspaces to draw"):
        RunCallback(run, trainer, tmp_path / "map.png")


def test_our_trainer_does_it_by_itself(tmp_path):
    ours = rs.Trainer(model=base(), method=METHOD, args=arguments(tmp_path), train_dataset=data())
    with pytest.raises(ConfigError, match="logs its run by itself"):
        RunCallback(ours.run, ours)
