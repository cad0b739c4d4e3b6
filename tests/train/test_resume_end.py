"""A training that was stopped logs, once resumed, what it would have logged; with nothing left it only finishes."""

import io
import json
import multiprocessing
import os
import signal

import pytest
from rich.console import Console
from test_prelora_trainer import METHOD
from test_recipe import train
from test_recipe_phases import settings, weights
from test_then import going, route
from test_timeline import panels
from test_trainer import STEPS, Interrupt, base, ctrl_c, losses, raise_it, same, tensors, trainer
from test_trainer_distributed import OnCPU, on_two
from transformers import TrainerCallback

import rankshift as rs
from rankshift.train import recipe
from rankshift.train.timeline import draw
from rankshift.train.trainer import Trainer

EVALUATES = {"eval_strategy": "steps", "eval_steps": 2}


class At(Interrupt):
    """Ctrl-C in an update; ``step`` are taken before it."""

    def __init__(self, step, moment="on_pre_optimizer_step", how=ctrl_c):
        super().__init__(moment, how)
        self.step = step

    def act(self, args, state, control, **_):
        if state.global_step == self.step:
            self.how()


def history(t):
    """What was logged, without how long it took."""
    slow = ("time", "per_second", "seconds")
    kept = [{k: v for k, v in e.items() if not k.endswith(slow)} for e in t.state.log_history]
    return [e for e in kept if "train_loss" not in e]  # of one call of train()


def stopped(out, callback, **more):
    t = trainer(out, callbacks=[callback], **more)
    with pytest.raises(SystemExit) as left:
        t.train()
    assert left.value.code == 130
    return t


SUBSPACES = rs.AdaRankGrad(rank=8, energy=0.8, every=3, earliest=1)
ENDS = rs.PreLoRA(
    then=rs.LoRA(rank=2),
    window=1,
    windows=2,
    minimum=3,
    joint=STEPS - 3,
    max_rank=4,
    weight_change=1e9,
    loss_change=1e9,
)  # its last stage would begin after the last update


@pytest.mark.parametrize(
    ("method", "logging_steps", "step"),  # in the middle of what is logged, evaluated, the last
    [(rs.LoRA(rank=2, dropout=0.1), 1, 7), (METHOD, 3, 3), (SUBSPACES, 3, 4)],
    ids=["last", "stages", "subspaces"],
)
def test_ctrl_c_leaves_no_gap_in_what_is_logged(tmp_path, method, logging_steps, step):
    more = {"logging_steps": logging_steps, "save_strategy": "no", **EVALUATES}
    whole = trainer(tmp_path / "whole", method, **more)
    whole.train()
    cut = stopped(tmp_path / "cut", At(step), method=method, **more)
    assert cut.state.global_step == step + 1
    assert [e["step"] for e in history(cut) if "eval_loss" in e] == list(range(2, step + 2, 2))
    resumed = trainer(tmp_path / "cut", method, **more)
    resumed.train(resume_from_checkpoint="last")
    assert history(resumed) == history(whole)
    assert same(tensors(resumed.run), tensors(whole.run))
    assert resumed.run.describe() == whole.run.describe()
    assert panels(draw(resumed.run, resumed.state.log_history)) == panels(draw(whole.run, whole.state.log_history))


def test_what_was_heard_of_an_update_that_was_broken_off_does_not_count(tmp_path):
    """Between two micro-batches: the first will be trained again."""
    more = {"method": rs.LoRA(rank=2), "save_strategy": "no"}
    whole = trainer(tmp_path / "whole", model=base(dropout=0), **more, logging_steps=1)
    whole.train()
    stopped(tmp_path / "cut", At(4, "on_substep_end", raise_it), model=base(dropout=0), **more, logging_steps=3)
    resumed = trainer(tmp_path / "cut", model=base(dropout=0), **more, logging_steps=3)
    result = resumed.train(resume_from_checkpoint="last")
    each = losses(whole)
    assert losses(resumed) == pytest.approx(
        {3: sum(each[k] for k in (1, 2, 3)) / 3, 6: sum(each[k] for k in (4, 5, 6)) / 3}
    )
    assert result.training_loss == pytest.approx(sum(each[k] for k in (5, 6, 7, 8)) / 4), "of this call"


@pytest.mark.parametrize(
    ("method", "more"),
    [
        (rs.LoRA(rank=2, dropout=0.1), {}),
        (rs.LoRA(rank=2), EVALUATES),
        (rs.LoRA(rank=2), {"eval_strategy": "epoch"}),  # which evaluates after the last checkpoint
        (ENDS, {}),
        (rs.LoRA(rank=2), {"max_steps": -1, "num_train_epochs": 1, "eval_strategy": "epoch"}),
    ],
    ids=["", "evaluates", "at the end", "next stage", "epoch"],
)
def test_with_nothing_left_nothing_is_trained(tmp_path, method, more):
    whole = trainer(tmp_path, method, **more)
    whole.train()
    last = whole.state.global_step
    before = [e for e in history(whole) if "eval_loss" in e]
    resumed = trainer(tmp_path, method, **more)
    resumed.training_step = lambda *_, **__: pytest.fail("trained")
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{last}"))
    assert resumed.state.global_step == resumed.run.step == last
    assert [e for e in history(resumed) if "eval_loss" in e] == before
    assert history(resumed) == history(whole)
    assert resumed.run.describe() == whole.run.describe()
    assert same(tensors(resumed.run), tensors(whole.run))
    assert resumed.state.epoch == whole.state.epoch


def test_a_training_that_is_over_may_be_made_longer(tmp_path):
    whole = going(tmp_path, lr_scheduler_type="constant", warmup_steps=0)
    whole.train()
    again = going(tmp_path, (), lr_scheduler_type="constant", warmup_steps=0, max_steps=STEPS + 2)
    again.train(resume_from_checkpoint=True)
    assert again.run.step == STEPS + 2
    assert route(again.run) == route(whole.run)
    assert not same(tensors(again.run), tensors(whole.run))


class Late(TrainerCallback):
    """Ctrl-C when the last update is already over."""

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs and state.global_step == STEPS:
            ctrl_c()


@pytest.mark.parametrize("callback", [At(STEPS - 1), Late()], ids=["in it", "after it"])
def test_ctrl_c_in_the_last_update(tmp_path, callback):
    whole = trainer(tmp_path / "whole", save_strategy="no")
    whole.train()
    assert stopped(tmp_path, callback, save_strategy="no").state.global_step == STEPS
    resumed = trainer(tmp_path, save_strategy="no")
    resumed.train(resume_from_checkpoint="last")
    assert history(resumed) == history(whole)
    assert same(tensors(resumed.run), tensors(whole.run))


def two(out):
    more = {"cls": OnCPU, "per_device_train_batch_size": 1, "logging_steps": 3, "save_steps": 2, "ddp_backend": "gloo"}
    whole = trainer(out, **more)
    whole.train()
    resumed = trainer(out, **more)
    resumed.train(resume_from_checkpoint=str(out / "checkpoint-4"))
    ended = trainer(out, **more)
    ended.train(resume_from_checkpoint=str(out / f"checkpoint-{STEPS}"))
    return [losses(t) for t in (whole, resumed, ended)], ended.run.step


def test_on_two_processes(tmp_path):
    for (whole, resumed, ended), step in on_two(tmp_path, two, tmp_path / "out"):
        assert step == STEPS
        assert whole == ended
        assert whole == pytest.approx(resumed, rel=1e-6)  # the sum so far is that of all ranks


# ---- rankshift train


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def between_the_files(job, run, directory):
    run.save(directory / recipe.ADAPTER)
    kill()


def doomed(tmp_path, wanted):
    recipe._write = between_the_files
    train(tmp_path, **wanted)


def unlike_in_time(metrics):
    """Metrics without how long it took."""
    rest = {k: v for k, v in metrics.items() if k not in ("seconds", "per_second", "memory", "phases")}
    return rest, [{k: v for k, v in row.items() if k != "seconds_per_update"} for row in metrics["phases"]]


def test_killed_when_all_is_trained(tmp_path, tiny_llama):
    wanted = settings(tmp_path, tiny_llama, train={"save_every": 1, "schedule": "constant"})
    whole, _, expected = train(tmp_path, **wanted, name="whole")
    child = multiprocessing.get_context("fork").Process(target=doomed, args=(tmp_path, {**wanted, "name": "cut"}))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    finishes_alike(tmp_path / "runs" / "cut", whole, expected)


def finishes_alike(directory, whole, expected):
    result = recipe.resume(directory, Console(file=(screen := io.StringIO()), width=160))
    metrics = json.loads((result.directory / "metrics.json").read_text())
    assert metrics["steps"] == 8
    assert unlike_in_time(metrics) == unlike_in_time(expected)
    mine, theirs = weights(result.directory)[1], weights(whole.directory)[1]
    assert same(mine, theirs)
    files = [sorted(p.name for p in one.directory.iterdir()) for one in (result, whole)]
    assert files[0] == files[1]
    assert "/s, " not in screen.getvalue().split("8 updates in")[1].split("\n")[0], "there was nothing to measure"
    return metrics


def test_ctrl_c_in_the_last_update_of_a_run(tmp_path, tiny_llama, monkeypatch):
    wanted = settings(tmp_path, tiny_llama, train={"schedule": "constant"})
    whole, _, expected = train(tmp_path, **wanted, name="whole")
    real = Trainer.training_step

    def pressed(self, *arguments, **named):
        if self.state.global_step == 7:
            ctrl_c()
        return real(self, *arguments, **named)

    monkeypatch.setattr(Trainer, "training_step", pressed)
    with pytest.raises(recipe.Interrupted):
        train(tmp_path, **wanted, name="cut")
    monkeypatch.undo()
    stopped = json.loads((tmp_path / "runs" / "cut" / "metrics.json").read_text())
    assert stopped["seconds"] > 0
    metrics = finishes_alike(tmp_path / "runs" / "cut", whole, expected)
    assert metrics["seconds"] >= stopped["seconds"], "the time before counts"
    assert metrics["per_second"] == stopped["per_second"]
