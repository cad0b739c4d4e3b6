"""PreLoRA in rs.Trainer: it switches by itself, the schedule goes on, every stage's cost is logged, resume."""

import logging

import pytest
from test_trainer import STEPS, losses, same, tensors, trainer
from test_trainer_distributed import ENGINES, OnCPU, on_two
from transformers import TrainerCallback

import rankshift as rs
from rankshift.core.errors import ConfigError
from rankshift.train import costs

# 8 updates: 3 of full training, the last in the middle of a window; 2 of both; 3 frozen
METHOD = rs.PreLoRA(
    then=rs.LoRA(rank=2, alpha=4, dropout=0.1), window=1, windows=2, minimum=3, joint=2, min_rank=1, max_rank=4,
    weight_change=1e9, loss_change=1e9,
)  # fmt: skip
WIDE = rs.PreLoRA(then=rs.VeRA(rank=4), window=2, windows=2, joint=1, weight_change=1e9, loss_change=1e9)


class Rates(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, optimizer=None, **_):
        self.seen.append(optimizer.param_groups[0]["lr"])


def test_it_goes_through_its_stages_under_one_schedule(tmp_path, caplog):
    rates = Rates()
    t = trainer(tmp_path, METHOD, [rates], save_strategy="no", warmup_steps=2)
    with caplog.at_level(logging.WARNING, "rankshift"):
        t.train()
    assert [(p.method["stage"], p.start, p.stop) for p in t.run.phases] == [
        ("full", 0, 3), ("joint", 3, 5), ("frozen", 5, None),
    ]  # fmt: skip
    assert t.run.step == STEPS
    assert rates.seen == pytest.approx([1e-2 * rate for rate in (0, 1 / 2, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)])
    said = [r.getMessage() for r in caplog.records]
    steps = [text for text in said if text.startswith("Step ")]
    assert "Step 3: PreLoRA full ends, PreLoRA joint begins; the schedule goes on. Of PreLoRA full" in steps[0]
    assert "Step 5: PreLoRA joint ends, PreLoRA frozen begins; the schedule goes on. Of PreLoRA joint" in steps[1]
    assert steps[0].endswith("parameters train, with adapters of ranks 1 to 4 on 14 layers.")
    assert len(steps) == 2
    logged = [(e["stage"], e["step"]) for e in t.state.log_history if "stage" in e]
    assert logged == [(0, 1), (0, 2), (1, 3), (1, 4), (2, 5), (2, 6), (2, 7), (2, 8)], "of what comes next"


def test_what_every_stage_trains_and_costs_is_logged(tmp_path):
    t = trainer(tmp_path, METHOD, save_strategy="no")
    whole = sum(p.numel() for p in t.model.parameters())
    t.train()
    ends = [e for e in t.state.log_history if "phase_trainable_parameters" in e]
    assert [e["phase_updates"] for e in ends] == [3, 2, 3]
    factors = sum(a.A.numel() + a.B.numel() for a in t.run.adapter().values())
    adapted = sum(site.base.weight.numel() for site in t.run.sites.values())
    counts = [e["phase_trainable_parameters"] for e in ends]
    assert counts == [whole, whole + factors, whole + factors - adapted]
    assert all(e["phase_update_seconds"] > 0 for e in ends)
    full, joint, frozen = (e["phase_estimated_memory"] for e in ends)  # weights, gradients, moments, in fp32
    assert joint > full > frozen
    assert joint - frozen == pytest.approx(12 * adapted, rel=0.02)
    rows = costs.table(t.run.phases, t.state.log_history, t.run.step, 1e-2)
    assert [(row["label"], row["told"], row["lr"]) for row in rows] == [
        (f"PreLoRA {name}", {"stage": name}, 1e-2) for name in ("full", "joint", "frozen")
    ]


@pytest.mark.parametrize("method", [METHOD, WIDE], ids=["lora", "vera"])
def test_resumed_at_every_checkpoint_is_bit_equal(tmp_path, method):
    whole = trainer(tmp_path, method)
    whole.train()
    expected, optimizer = losses(whole), whole.optimizer.state_dict()
    assert [p.method["stage"] for p in whole.run.phases] == ["full", "joint", "frozen"]
    for step in range(1, STEPS):
        resumed = trainer(tmp_path, method, save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert losses(resumed) == expected, step
        assert same(tensors(resumed.run), tensors(whole.run)), step
        mine = resumed.optimizer.state_dict()
        assert mine["param_groups"] == optimizer["param_groups"], step
        assert all(same(mine["state"][index], state) for index, state in optimizer["state"].items()), step
        theirs = [p.to_mapping() for p in whole.run.phases]
        assert [p.to_mapping() for p in resumed.run.phases] == theirs, step


def test_a_training_too_short_for_its_windows_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="after update 9 at the earliest"):
        trainer(tmp_path, rs.PreLoRA(window=3, windows=3, max_rank=4), save_strategy="no").train()


def staged(out, engine):
    t = trainer(out, METHOD, cls=OnCPU, per_device_train_batch_size=1, save_strategy="no", **ENGINES[engine])
    try:
        t.train()
    except ConfigError as error:
        return {"text": str(error)}
    phases = [(p.method["stage"], p.start, p.method["ranks"]) for p in t.run.phases]
    return {"losses": losses(t), "tensors": tensors(t.run), "phases": phases}


def test_two_ranks_under_ddp_go_on_together(tmp_path):
    one, two = on_two(tmp_path, staged, tmp_path / "out", "ddp")
    assert one["losses"] == two["losses"]
    assert one["phases"] == two["phases"]
    assert [phase[:2] for phase in one["phases"]] == [("full", 0), ("joint", 3), ("frozen", 5)]
    assert same(one["tensors"], two["tensors"])


def test_under_fsdp2_it_is_refused_before_training(tmp_path):
    for answer in on_two(tmp_path, staged, tmp_path / "out", "fsdp2"):
        text = answer["text"]
        assert "prelora goes through phases" in text
        assert "A phase cannot end inside a Trainer under FSDP2" in text
