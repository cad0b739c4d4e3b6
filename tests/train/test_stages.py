"""Phases with a schedule of their own that go on with the tensors of the one before: SoRA's stages in rs.Trainer."""

import logging
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers
from test_recipe import jsonl, train
from test_trainer import STEPS, arguments, base, data, losses, same, tensors, trainer
from test_trainer_distributed import ENGINES, OnCPU, on_two
from transformers import TrainerCallback

import rankshift as rs
from rankshift.core import method as registry
from rankshift.core.errors import ConfigError, TrainingError

# 8 updates: 2, 3 and 3. At lr 1e-2 ξ is 0.1 to 0.6, so gates of N(0, 1) close in every stage
METHOD = rs.SoRA(rank=4, alpha=4, sparsity=(10, 30, 60), gate_init="normal", targets=("q_proj", "v_proj", "down_proj"))


class Look(TrainerCallback):
    """Remembers the learning rate of every update, whether B moved in it, and the ranks."""

    def __init__(self):
        self.rates, self.moved, self.ranks, self.stages = [], [], [], []
        self.trainer = None

    def factors(self):
        return torch.cat([a.B.detach().flatten() for a in self.trainer.run.adapter().values()])

    def on_step_begin(self, args, state, control, optimizer=None, **_):
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.before = self.factors()
        self.stages.append(self.trainer.run.method.stage)
        self.ranks.append(sum(a.rank for a in self.trainer.run.adapter().values()))

    def on_optimizer_step(self, args, state, control, **_):
        self.moved.append(not torch.equal(self.before, self.factors()))


def looked_at(out, method=METHOD, **more):
    look = Look()
    t = look.trainer = trainer(out, method, [look], **{"warmup_steps": 0, **more})
    return t, look


def test_every_stage_trains_from_the_top_of_a_schedule_of_its_own(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "rankshift"):
        t, look = looked_at(tmp_path, save_strategy="no")
        t.train()
    assert look.stages == [0] * 2 + [1] * 3 + [2] * 3
    one = [1 - k / 2 for k in range(2)]
    other = [1 - k / 3 for k in range(3)]
    assert look.rates == pytest.approx([1e-2 * rate for rate in one + other + other])
    assert all(look.moved), "also in the later stages"
    ranks = [look.ranks[0], look.ranks[2], look.ranks[5]]
    assert 6 * 4 == ranks[0] > ranks[1] > ranks[2] > 0, "each stage begins with fewer ranks"
    assert [(p.method["stage"], p.start, p.stop) for p in t.run.phases] == [(0, 0, 2), (1, 2, 5), (2, 5, None)]
    assert t.run.step == t.state.global_step == STEPS
    told = [r.getMessage() for r in caplog.records if "moments" in r.getMessage()]
    assert told[0].startswith("Adam's moments go on for 18 of 18 tensors from the phase before: ")
    assert len(told) == 2
    assert any(
        "Step 2: SoRA stage 0 ends, SoRA stage 1 begins; the schedule does too." in r.getMessage()
        for r in caplog.records
    )
    assert all(int(s["step"]) == STEPS for s in t.optimizer.state.values())
    seen = [(e["step"], e["open_gates"], e["gates"]) for e in t.state.log_history if "open_gates" in e]
    assert [step for step, *_ in seen] == list(range(1, STEPS + 1))
    assert all(opened <= gates for _, opened, gates in seen)
    assert seen[-1][1] == t.run.metrics()["open_gates"] < seen[0][1]
    counts = [e["trainable_parameters"] for e in t.state.log_history if "trainable_parameters" in e]
    assert len(counts) == 3
    assert counts == sorted(counts, reverse=True)


def test_warm_up_is_part_of_every_schedule(tmp_path):
    t, look = looked_at(tmp_path, save_strategy="no", warmup_steps=1)
    t.train()
    assert look.rates == pytest.approx([0, 1e-2, 0, 1e-2, 0.5e-2, 0, 1e-2, 0.5e-2])


def test_resumed_in_every_stage_is_bit_equal(tmp_path):
    whole = trainer(tmp_path, METHOD, warmup_steps=0)
    whole.train()
    expected, optimizer, scheduler = losses(whole), whole.optimizer.state_dict(), whole.lr_scheduler.state_dict()
    for step in (1, 2, 4, 5, 7):  # inside each stage, and where the second and the third begin
        resumed = trainer(tmp_path, METHOD, warmup_steps=0, save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert losses(resumed) == expected, step
        assert same(tensors(resumed.run), tensors(whole.run)), step
        mine = resumed.optimizer.state_dict()
        assert mine["param_groups"] == optimizer["param_groups"]
        for index, state in optimizer["state"].items():
            assert same(mine["state"][index], state), step
        assert resumed.lr_scheduler.state_dict()["last_epoch"] == scheduler["last_epoch"]
        assert resumed.run.describe() == whole.run.describe()


def test_the_best_checkpoint_may_be_of_an_earlier_stage(tmp_path):
    t = trainer(
        tmp_path, METHOD, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, save_steps=1,
        metric_for_best_model="eval_loss", greater_is_better=True, warmup_steps=0,
    )  # fmt: skip
    t.train()
    best = int(t.state.best_model_checkpoint.rpartition("-")[2])
    assert t.run.step == best
    assert t.run.method.stage == (0 if best < 2 else 1 if best < 5 else 2)


def test_one_stage_follows_the_schedule_of_the_run(tmp_path):
    t, look = looked_at(tmp_path, rs.SoRA(rank=4, sparsity=10, targets="q_proj"), save_strategy="no")
    t.train()
    assert look.rates == pytest.approx([1e-2 * (1 - k / STEPS) for k in range(STEPS)])
    assert len(t.run.phases) == 1


def test_what_no_stage_can_follow_is_refused_before_training(tmp_path):
    run = rs.attach(base(), METHOD, total_steps=STEPS)
    optimizer = torch.optim.SGD([p for _, p in run.trainable()], lr=0.1)
    t = rs.Trainer(run=run, args=arguments(tmp_path), train_dataset=data(), optimizers=(optimizer, None))
    with pytest.raises(ConfigError, match=r"sora goes through phases, the next from step 2, which needs a new opt"):
        t.train()
    assert t.run.step == 0
    t = trainer(tmp_path, METHOD, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps")
    with pytest.raises(ConfigError, match="follows what it measured"):
        t.train()
    assert t.run.step == 0
    with pytest.raises(ConfigError, match="3 of 3 stages to go and 2 updates"):
        trainer(tmp_path, METHOD, max_steps=2, warmup_steps=0).train()


def test_a_training_whose_last_gate_closes_stops_with_a_checkpoint_behind_it(tmp_path):
    t = trainer(tmp_path, rs.SoRA(rank=2, sparsity=(100, 200), targets="q_proj"), warmup_steps=0)
    with pytest.raises(TrainingError, match="Every gate of every layer is closed"):
        t.train()
    assert (tmp_path / "checkpoint-3").is_dir()


def test_a_phase_that_cannot_begin_leaves_a_checkpoint_of_the_one_before(tmp_path):
    method = rs.SoRA(rank=2, sparsity=(100, 200), targets="q_proj")
    t = trainer(tmp_path, method, warmup_steps=0, save_strategy="no")
    with pytest.raises(TrainingError):
        t.train()
    (saved,) = tmp_path.glob("checkpoint-*")
    assert int(saved.name.split("-")[1]) == t.run.step > 0
    assert same(tensors(rs.load(base(), saved)), tensors(t.run))


@pytest.fixture
def relay():
    """Two phases with schedules of their own, until steps 2 and 5, then one that follows the run's."""

    @dataclass(frozen=True, kw_only=True)
    class Own(rs.LoRA):
        name: ClassVar[str] = "test_own"
        rank: int = 2
        until: int = 2

        def phase_end(self, start, total):
            return self.until

        def next(self, run):
            return None if run.step < self.until else rs.LoRA(rank=1) if self.until == 5 else Own(until=5)

    yield Own
    registry._REGISTRY.pop("test_own")


def test_after_a_schedule_of_a_phase_the_runs_goes_on_where_the_run_is(tmp_path, relay):
    rates = []

    class Rates(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **_):
            rates.append(optimizer.param_groups[0]["lr"])

    t = trainer(tmp_path, relay(), [Rates()], save_strategy="no", warmup_steps=0)
    t.train()
    whole = [1 - k / 8 for k in range(8)]
    assert rates == pytest.approx([1e-2 * rate for rate in [1, 1 / 2, 1, 2 / 3, 1 / 3, *whole[5:]]])


def test_a_recipe_goes_through_stages_and_its_warm_up_is_a_share_of_each(tmp_path, tiny_llama, monkeypatch):
    schedules = []

    class Listen(rs.Trainer):
        def create_scheduler(self, *args, **more):
            schedules.append(super().create_scheduler(*args, **more))
            return schedules[-1]

    monkeypatch.setattr("rankshift.train.trainer.Trainer", Listen)
    rows = [{"text": "hello how are you ? fine thanks ."}] * 40
    method = {"method": "sora", "rank": 2, "sparsity": [0, 10], "gate_init": "normal", "targets": ["q_proj", "up_proj"]}
    result, *_ = train(
        tmp_path, model=str(tiny_llama), data=str(jsonl(tmp_path / "text.jsonl", rows)), method=method,
        train={"steps": 8, "warmup": 0.5, "schedule": "linear"},
    )  # fmt: skip
    # 4 updates each, 2 of them warm-up
    assert [[schedule.lr_lambdas[0](k) for k in range(4)] for schedule in schedules] == [[0, 0.5, 1, 0.5]] * 2
    run = rs.load(base_of(tiny_llama), result.directory / "adapter")
    assert [(p.start, p.method["stage"]) for p in run.phases] == [(0, 0), (4, 1)]


def base_of(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory)


def staged(out, engine, **more):
    t = trainer(out, METHOD, cls=OnCPU, per_device_train_batch_size=1, warmup_steps=0, save_strategy="no",
                **ENGINES[engine], **more)  # fmt: skip
    try:
        t.train()
    except ConfigError as error:
        return str(error)
    return {"losses": losses(t), "tensors": tensors(t.run), "ranks": t.run.describe()["adapters"]["default"]["ranks"]}


def test_stages_under_ddp(tmp_path):
    one, two = on_two(tmp_path, staged, tmp_path / "out", "ddp")
    assert one["losses"] == two["losses"]
    assert one["ranks"] == two["ranks"]
    assert len(set(one["ranks"].values())) > 1
    assert same(one["tensors"], two["tensors"])


def gated(out):
    t = trainer(out, rs.SoRA(rank=3, alpha=4, sparsity=30, gate_init="normal", targets=("q_proj", "v_proj")), cls=OnCPU,
                per_device_train_batch_size=1, save_strategy="no", **ENGINES["fsdp2"])  # fmt: skip
    t.train()
    assert any(hasattr(p, "to_local") for p in t.model.parameters())
    return {"open": [e["open_gates"] for e in t.state.log_history if "open_gates" in e], "tensors": tensors(t.run)}


def test_one_stage_under_fsdp2_counts_the_gates_of_all_ranks(tmp_path):
    one, two = on_two(tmp_path, gated, tmp_path / "out")
    assert one["open"] == two["open"]
    assert (
        one["open"][0]
        > one["open"][-1]
        == sum(int(t.count_nonzero()) for name, t in one["tensors"].items() if name.endswith(".g"))
    )


def fsdp_refused(out):
    text = staged(out, "fsdp2")
    assert "sora goes through phases, the next from step 2. A phase cannot end inside a Trainer under FSDP2" in text
    return {"text": text}


def test_stages_under_fsdp2_are_refused_before_training(tmp_path):
    assert len(on_two(tmp_path, fsdp_refused, tmp_path / "out")) == 2
