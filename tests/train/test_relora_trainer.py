"""ReLoRA in rs.Trainer: its own schedule in the place of the arguments', restarts in it, exact resume, phases."""

import inspect
import logging

import pytest
import torch
import transformers
from test_trainer import STEPS, arguments, base, data, losses, same, tensors, trainer
from test_trainer_distributed import on_two, train_and_resume
from transformers import TrainerCallback

import rankshift as rs
from rankshift.core.errors import ConfigError
from rankshift.core.schedule import jagged_cosine

# of 8 updates two, 3 and 6, are at rate 0 and followed by a restart
METHOD = rs.ReLoRA(rank=2, every=3, rewarm=2, dropout=0.1, targets=("q_proj", "v_proj", "down_proj"))
WEIGHT = "model.layers.0.self_attn.q_proj"


class Look(TrainerCallback):
    """Remembers the learning rate of every update, and which of them rewrote the base."""

    def __init__(self):
        self.rates, self.rewrote = [], []
        self.trainer = None

    def weight(self):
        site = self.trainer.run.sites.get(WEIGHT)
        return None if site is None else site.base.rows()

    def on_step_begin(self, args, state, control, optimizer=None, **_):
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.before = self.weight()

    def on_optimizer_step(self, args, state, control, **_):
        if self.before is not None and not torch.equal(self.before, self.weight()):
            self.rewrote.append(state.global_step)


def looked_at(out, method=METHOD, **more):
    look = Look()
    t = look.trainer = trainer(out, method, [look], **{"save_strategy": "no", **more})
    return t, look


def jagged(length=STEPS, warmup=2, every=3):
    return [1e-2 * jagged_cosine(u, length, warmup, every, 2, 0.1) for u in range(length)]


def test_the_schedule_is_the_methods_own_and_the_log_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "rankshift"):
        t, look = looked_at(tmp_path)
        t.train()
    assert look.rates == pytest.approx(jagged())
    assert look.rates[3] == look.rates[6] == 0
    assert look.rewrote == [3, 6]
    told = [r.getMessage() for r in caplog.records]
    assert told == [
        "lr_scheduler_type='linear' gives way to the schedule that ReLoRA has of its own, over 8 updates, the first 2 "
        "of them rising."
    ]
    assert t.run.step == t.state.global_step == STEPS


def test_resumed_before_in_and_after_a_restart_is_bit_equal(tmp_path):
    whole = trainer(tmp_path, METHOD)
    whole.train()
    expected, optimizer, scheduler = losses(whole), whole.optimizer.state_dict(), whole.lr_scheduler.state_dict()
    for step in (1, 3, 4, 5, 6, 7):
        resumed = trainer(tmp_path, METHOD, save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert losses(resumed) == expected, step
        assert same(tensors(resumed.run), tensors(whole.run)), step
        mine = resumed.optimizer.state_dict()
        assert mine["param_groups"] == optimizer["param_groups"]
        for index, state in optimizer["state"].items():
            assert same(mine["state"][index], state), step
        assert resumed.lr_scheduler.state_dict() == scheduler


def test_a_schedule_that_was_given_stays(tmp_path):
    model = base()
    run = rs.attach(model, METHOD, seed=3, total_steps=STEPS)
    optimizer = run.optimizer(lr=1e-2)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
    look = Look()
    look.trainer = rs.Trainer(
        run=run,
        args=arguments(tmp_path, save_strategy="no"),
        train_dataset=data(),
        callbacks=[look],
        optimizers=(optimizer, constant),
    )
    look.trainer.train()
    assert look.rates == pytest.approx([5e-3] * STEPS)
    assert look.rewrote == [3, 6]


def test_a_warm_up_that_does_not_fit_is_refused_before_training(tmp_path):
    t, look = looked_at(tmp_path, warmup_steps=4)
    with pytest.raises(ConfigError, match="warm-up of 4 updates does not end before the first cycle of 3 does"):
        t.train()
    t, look = looked_at(tmp_path, warmup_steps=STEPS)
    with pytest.raises(ConfigError, match=f"warmup = {STEPS}"):
        t.train()
    assert look.rates == []


def test_after_a_phase_of_all_weights_it_has_a_schedule_from_there(tmp_path, caplog):
    """Full for 3 of 11 updates on the arguments' line, then 8 updates of its own: rates, restarts, checkpoints."""
    phases = {"then": [rs.Then(METHOD, steps=3)]}
    line = [0, 0.5, 1]
    with caplog.at_level(logging.WARNING, "rankshift"):
        t, look = looked_at(tmp_path, rs.Full(), max_steps=11, rest=phases, save_strategy="steps")
        t.train()
    assert look.rates == pytest.approx([1e-2 * f for f in line] + jagged())
    assert look.rewrote == [6, 9]
    told = [r.getMessage() for r in caplog.records if "schedule" in r.getMessage()]
    assert "over 8 updates" in told[0]
    assert "full ends, relora begins; the schedule does too" in told[1]
    for step in (2, 3, 7):
        resumed = trainer(tmp_path, rs.Full(), max_steps=11, rest=phases, save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert same(tensors(resumed.run), tensors(t.run)), step


def test_after_it_the_schedule_of_the_run_is_where_the_run_is(tmp_path):
    """Full for 1 update, ReLoRA for the 5 that its schedule is made for, then LoRA on the arguments' line."""
    phases = {"then": [rs.Then(METHOD, steps=1), rs.Then(rs.LoRA(rank=2), steps=5)]}
    t, look = looked_at(tmp_path, rs.Full(), rest=phases)
    t.train()
    line = [1e-2 * min(u / 2, (STEPS - u) / (STEPS - 2)) for u in range(STEPS)]
    assert look.rates == pytest.approx([line[0], *jagged(length=5), *line[6:]])
    assert look.rewrote == [4]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_agree_and_resume_after_a_restart_to_the_bit(tmp_path, engine):
    if engine == "ddp" and 'type != "cpu"' not in inspect.getsource(transformers.Trainer._load_optimizer_and_scheduler):
        pytest.skip("this transformers cannot load an optimizer on several CPU processes (map_location cpu:0)")
    method = rs.ReLoRA(rank=2, every=3, rewarm=2, targets=("q_proj", "v_proj"))
    (one, resumed), (two, _) = on_two(tmp_path, train_and_resume, tmp_path / "out", method, engine, 4)
    assert f"base/{WEIGHT}.weight" in one["tensors"], "what was merged is saved"
    assert one["losses"] == two["losses"] == resumed["losses"]
    assert same(one["tensors"], two["tensors"])
    assert same(one["tensors"], resumed["tensors"])


def test_a_warm_up_that_does_not_fit_a_later_phase_is_refused_before_training(tmp_path):
    for warmup, words in ((4, "warm-up of 4 updates"), (5, "warmup = 5: .* the 5 that there are")):
        phases = {"then": [rs.Then(rs.LoRA(rank=2), steps=1), rs.Then(METHOD, steps=2)]}
        t, look = looked_at(tmp_path, rs.Full(), warmup_steps=warmup, rest=phases)
        with pytest.raises(ConfigError, match=words):
            t.train()
        assert look.rates == []
