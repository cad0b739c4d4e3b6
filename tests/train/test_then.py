"""Phases to come in rs.Trainer: their rates, what is resumed to the bit, what is refused before training, and costs."""

import logging

import pytest
import torch
from test_trainer import STEPS, Interrupt, arguments, base, ctrl_c, data, losses, same, tensors, trainer
from test_trainer_distributed import OnCPU, on_two
from transformers import TrainerCallback

import rankshift as rs
from rankshift.core.errors import ConfigError, RankTooLarge, WrongBase
from rankshift.train import costs

LORA = rs.LoRA(rank=2, init="orthogonal", dropout=0.1)
PHASES = [rs.Then(LORA, steps=3, lr=2e-2), rs.Then(rs.Full(), steps=2)]  # of 8 updates: 3, 2 and 3


class Rates(TrainerCallback):
    """The learning rate of every update."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, optimizer=None, **_):
        self.seen.append(optimizer.param_groups[0]["lr"])


class Stop(TrainerCallback):
    """Ends training with the update after so many."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **_):
        control.should_training_stop |= state.global_step + 1 == self.step


def going(out, then=PHASES, method=None, callbacks=None, rest=None, **more):
    rest = {"then": then, **(rest or {})}
    return trainer(out, method or rs.Full(), callbacks, rest=rest, **{"logging_steps": 1, **more})


def route(run):
    return [(p.method["method"], p.start, p.stop) for p in run.phases]


ROUTE = [("full", 0, 3), ("lora", 3, 5), ("full", 5, None)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training of three phases with a checkpoint after every update."""
    out = tmp_path_factory.mktemp("whole")
    rates = Rates()
    t = going(out, callbacks=[rates])
    t.train()
    return t, out, rates


def test_each_phase_has_its_rate_under_one_schedule(whole):
    t, _, rates = whole
    assert route(t.run) == ROUTE
    plain = [k / 2 if k < 2 else (STEPS - k) / (STEPS - 2) for k in range(STEPS)]
    peaks = [1e-2] * 3 + [2e-2] * 5  # the third phase says none: as before
    assert rates.seen == pytest.approx([rate * peak for rate, peak in zip(plain, peaks, strict=True)])


def test_what_each_phase_costs_is_logged_once_at_its_end(whole):
    t, *_ = whole
    logged = [entry for entry in t.state.log_history if "phase" in entry]
    assert [(e["phase"], e["step"], e["phase_updates"]) for e in logged] == [(1, 3, 3), (2, 5, 2), (3, 8, 3)]
    rows = costs.table(t.run.phases, t.state.log_history, t.run.step)
    assert [(r["method"], r["start"], r["stop"], r["lr"]) for r in rows] == [
        ("full", 0, 3, None), ("lora", 3, 5, 2e-2), ("full", 5, 8, 2e-2),
    ]  # fmt: skip
    model = base()
    weights = sum(p.numel() for p in model.parameters())
    lora = sum(2 * sum(m.weight.shape) for n, m in model.named_modules() if "_proj" in n)
    assert [r["trainable"] for r in rows] == [weights, lora, weights]
    # fp32: weights, a gradient and two moments of what trains; beside them counters and buffers
    wanted = [4 * (weights + 3 * weights), 4 * (weights + lora + 3 * lora), 4 * (weights + 3 * weights)]
    assert all(0 <= r["estimated_memory"] - w < 1000 for r, w in zip(rows, wanted, strict=True)), rows
    assert all(r["peak_memory"] is None for r in rows)
    assert all(r["seconds_per_update"] > 0 for r in rows)
    assert "2 updates" in costs.words(rows[1])
    assert f"{lora:,} parameters trained" in costs.words(rows[1])


def test_on_a_gpu_the_peak_is_measured_of_each_phase(monkeypatch):
    peaks, reset = {"cuda:1": 700}, []
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: reset.append(str(device)))
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: peaks[str(device)])
    meter = costs.Meter(torch.device("cuda:1"))
    meter.begin()
    assert reset == ["cuda:1"]
    assert meter.read([torch.zeros(9)], [], fused=False) == {"phase_peak_memory": 700}
    history = [{"phase": 1, "phase_peak_memory": 700, "phase_update_seconds": 0.5}]
    phase = rs.core.phase.Phase(rs.to_dict(LORA), 0, None, None, 12)
    (row,) = costs.table([phase], history, 4)
    assert (row["peak_memory"], row["estimated_memory"]) == (700, None)
    assert costs.words(row) == "4 updates, 12 parameters trained, 0.5 s an update, 700 B of GPU memory at the peak"


def test_evaluations_and_checkpoints_are_no_time_of_updates(monkeypatch):
    clock = [5.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    meter = costs.Meter(torch.device("cpu"))
    meter.begin()
    for update, evaluation in ((1.0, 0.0), (3.0, 70.0), (2.0, 0.0)):
        clock[0] += update
        meter.count()
        if evaluation:
            clock[0] += evaluation
            meter.pause()
    x = torch.zeros(3, 5)
    assert meter.read([x, x], [x, torch.zeros(2)], fused=False) == {
        "phase_update_seconds": 2.0, "phase_estimated_memory": 60 + 60 + 60 + 8,
    }  # fmt: skip
    assert meter.read([x], [x, torch.zeros(2)], fused=True)["phase_estimated_memory"] == 60 + 60
    meter.begin()
    assert "phase_update_seconds" not in meter.read([], [], fused=False)


@pytest.mark.parametrize("step", [2, 3, 4, 5, 7])  # 3 and 5: right after a change
def test_resumed_in_every_phase_is_bit_equal(tmp_path, whole, step):
    t, out, _ = whole
    resumed = going(tmp_path, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(out / f"checkpoint-{step}"))
    assert losses(resumed) == losses(t)
    assert same(tensors(resumed.run), tensors(t.run))
    assert resumed.run.describe() == t.run.describe()
    mine, theirs = resumed.optimizer.state_dict()["state"], t.optimizer.state_dict()["state"]
    assert mine.keys() == theirs.keys()
    assert all(same(mine[key], theirs[key]) for key in theirs)
    assert [e["phase"] for e in resumed.state.log_history if "phase" in e] == [1, 2, 3]


def test_killed_right_before_a_change_is_bit_equal(tmp_path):
    """The checkpoint is of the ended phase, whose next has not begun."""
    constant = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    t = going(tmp_path / "whole", save_strategy="no", **constant)
    t.train()
    stopped = going(tmp_path / "a", callbacks=[Stop(3)], **constant)
    stopped.train()
    assert route(stopped.run) == [("full", 0, None)]
    assert stopped.run.due() == LORA
    resumed = going(tmp_path / "b", save_strategy="no", **constant)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert route(resumed.run) == ROUTE
    assert losses(resumed) == losses(t)
    assert same(tensors(resumed.run), tensors(t.run))


def test_ctrl_c_in_the_update_of_a_change_saves_the_next_phase(tmp_path, whole):
    t, *_ = whole
    first = going(tmp_path, callbacks=[AtChange()], save_strategy="no")
    with pytest.raises(SystemExit) as left:
        first.train()
    assert left.value.code == 130
    assert route(first.run) == [("full", 0, 3), ("lora", 3, None)]
    resumed = going(tmp_path, save_strategy="no")
    resumed.train(resume_from_checkpoint="last")
    assert losses(resumed) == losses(t)
    assert same(tensors(resumed.run), tensors(t.run))


class AtChange(Interrupt):
    """Ctrl-C in the third update, which ends the first phase."""

    def __init__(self):
        super().__init__("on_pre_optimizer_step", ctrl_c)

    def act(self, args, state, control, **_):
        if state.global_step == 2:
            self.how()


def test_a_phase_that_ends_by_its_loss_resumes_in_the_middle_of_a_window(tmp_path, caplog):
    then = [rs.Then(LORA, loss=100.0, window=3)]  # at the end of the first window
    t = going(tmp_path, then)
    with caplog.at_level(logging.WARNING, "rankshift"):
        t.train()
    assert route(t.run) == [("full", 0, 3), ("lora", 3, None)]
    text = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("Step 3: full ends, lora begins"))
    assert "3 updates, 5,456 parameters trained" in text
    again = going(tmp_path / "again", then, save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again) == losses(t)
    assert same(tensors(again.run), tensors(t.run))


def test_the_window_has_the_mean_of_what_is_logged(tmp_path):
    """Accumulation: every update is the mean of two micro-batches, as the loss in the log is."""
    t = going(tmp_path, [rs.Then(LORA, loss_change=1e-9, windows=2, window=3)], max_steps=7, save_strategy="no")
    t.train()
    logged = losses(t)
    seen = [s.loss for s in t.run.watch.snapshots]
    wanted = [sum(logged[k] for k in steps) / 3 for steps in ((1, 2, 3), (4, 5, 6))]
    assert seen == pytest.approx(wanted, abs=1e-4)  # the log rounds
    assert len(t.run.phases) == 1


def windowed(out):
    then = [rs.Then(LORA, loss_change=1e-9, windows=2, window=3)]
    t = going(out, then, max_steps=7, save_strategy="no", cls=OnCPU, per_device_train_batch_size=1, ddp_backend="gloo")
    t.train()
    return {"logged": losses(t), "seen": [s.loss for s in t.run.watch.snapshots]}


def test_on_two_processes_too(tmp_path):
    one, two = on_two(tmp_path, windowed, tmp_path / "out")
    assert one == two
    wanted = [sum(one["logged"][k] for k in steps) / 3 for steps in ((1, 2, 3), (4, 5, 6))]
    assert one["seen"] == pytest.approx(wanted, abs=1e-4)


def test_other_phases_than_the_saved_ones_are_refused_and_none_are_those(tmp_path, whole):
    t, out, _ = whole
    other = [rs.Then(LORA, steps=3, lr=2e-2), rs.Then(rs.Full(), steps=3)]
    for step in (2, 4):
        with pytest.raises(WrongBase, match="other phases to come"):
            going(tmp_path, other).train(resume_from_checkpoint=str(out / f"checkpoint-{step}"))
    with pytest.raises(WrongBase, match="other phases to come"):  # all of them have begun
        going(tmp_path, [rs.Then(rs.LoRA(rank=3), steps=3)]).train(resume_from_checkpoint=str(out / "checkpoint-7"))
    resumed = going(tmp_path, (), save_strategy="no")
    resumed.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    assert route(resumed.run) == ROUTE
    assert losses(resumed) == losses(t)


def test_what_cannot_be_is_refused_before_training(tmp_path):
    run = rs.attach(base(), rs.Full(), total_steps=STEPS, then=PHASES)
    optimizer = torch.optim.SGD([p for _, p in run.trainable()], lr=0.1)
    with pytest.raises(ConfigError, match="full is to go on as lora, which needs a new optimizer"):
        rs.Trainer(run=run, args=arguments(tmp_path), train_dataset=data(), optimizers=(optimizer, None))
    t = going(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps")
    with pytest.raises(ConfigError, match=r"full is to go on as lora.*follows what it measured"):
        t.train()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    with pytest.raises(ConfigError, match="needs a new schedule, but one was passed"):
        going(tmp_path, rest={"optimizers": (None, schedule)})
    t = going(tmp_path, method=LORA, then=[rs.Then(rs.Full(), steps=3)], load_best_model_at_end=True, save_steps=1,
              eval_strategy="steps", eval_steps=1)  # fmt: skip
    with pytest.raises(ConfigError, match="Set load_best_model_at_end=False"):
        t.train()
    assert t.run.step == 0
    t = going(tmp_path)
    t.create_optimizer()
    t.is_fsdp_enabled = True
    with pytest.raises(ConfigError, match=r"go on as lora\. A phase cannot end inside a Trainer under FSDP2"):
        t.create_scheduler(STEPS)
    with pytest.raises(ConfigError, match="then= goes with method="):
        rs.Trainer(run=rs.attach(base(), rs.Full()), then=PHASES, args=arguments(tmp_path), train_dataset=data())
    for wrong in (PHASES[0], [rs.Full()]):
        with pytest.raises(ConfigError, match=r"then= is a list of rs\.Then"):
            going(tmp_path, wrong)
    with pytest.raises(ConfigError, match="would begin at update 9 at the earliest, and the run ends at 8"):
        going(tmp_path, [rs.Then(LORA, steps=3), rs.Then(rs.Full(), steps=6)])
    waits = rs.LoRA(rank=2, train="B", precondition=True)
    with pytest.raises(ConfigError, match="changes gradients"):
        going(tmp_path, [rs.Then(waits, steps=3)], rest={"fused_backward": True}, gradient_accumulation_steps=1,
              max_grad_norm=0)  # fmt: skip
    with pytest.raises(RankTooLarge, match="rank 99"):
        going(tmp_path, [rs.Then(rs.LoRA(rank=99), steps=3)])
    with pytest.raises(ConfigError, match="in a later phase: pass batches, calibration="):
        going(tmp_path, [rs.Then(rs.LoRA(rank=2, init="eva"), steps=3)])


@pytest.mark.parametrize("method", [rs.Full(), rs.PreLoRA(window=2, windows=2, max_rank=4)], ids=["then", "stages"])
def test_an_optimizer_of_ones_own_is_refused_once_and_for_all(tmp_path, method):
    """One text, which sends nobody to what is refused next."""
    then = PHASES if method == rs.Full() else ()
    model = base()
    given = {"optimizers": (torch.optim.SGD(model.parameters(), lr=0.1), None)}
    with pytest.raises(ConfigError, match=r"needs a new optimizer.*Leave optimizers out\.$"):
        trainer(tmp_path, method, model=model, rest={**given, "then": then})
    with pytest.raises(ConfigError) as caught:
        trainer(tmp_path, method, optim="sgd", rest={"then": then})
    assert "optimizers=" not in str(caught.value)
    kind = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}
    with pytest.raises(ConfigError, match="is not supported") as caught:
        trainer(tmp_path, method, rest={**kind, "then": then})
    assert "optimizers=" not in str(caught.value)


def test_a_later_phase_looks_at_data(tmp_path):
    batches = ({"input_ids": d["input_ids"][None]} for d in data(3))  # gone through once only
    then = [rs.Then(rs.LoRA(rank=2, init="eva"), steps=2), rs.Then(rs.LoRA(rank=3, init="eva"), steps=2)]
    t = going(tmp_path, then, rest={"calibration": batches}, max_steps=5, save_strategy="no")
    t.train()
    assert route(t.run) == [("full", 0, 2), ("lora", 2, 4), ("lora", 4, None)]
    sites = t.run.adapter().values()
    assert sum(site.rank for site in sites) == 3 * len(sites)  # of which each has what its data say
    assert len({site.rank for site in sites}) > 1
