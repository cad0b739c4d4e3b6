"""rs.Trainer: transformers' loop with a method, its phases, and checkpoints that hold no untouched base."""

import errno
import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

import rankshift as rs
from rankshift.core import method as registry
from rankshift.core.errors import (
    AttachError,
    ConfigError,
    MissingFile,
    NoGradient,
    NonFinite,
    NotWritable,
    OutOfMemory,
    UnmatchedTarget,
    WrongBase,
)
from rankshift.core.event import Moment

STEPS = 8


def base(dropout=0.1):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, tie_word_embeddings=False, attention_dropout=dropout,
        )
    )  # fmt: skip


def data(n=40):
    g = torch.Generator().manual_seed(1)
    return [{"input_ids": x, "labels": x} for x in torch.randint(0, 8, (n, 12), generator=g)]


def arguments(out, **more):
    defaults = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": STEPS, "learning_rate": 1e-2,
        "weight_decay": 0.1, "logging_steps": 1, "save_strategy": "steps", "save_steps": 1, "use_cpu": True,
        "report_to": [], "disable_tqdm": True, "seed": 3, "warmup_steps": 2,
    }  # fmt: skip
    return TrainingArguments(str(out), **{**defaults, **more})


def trainer(out, method=None, callbacks=None, model=None, cls=None, rest=None, **more):
    return (cls or rs.Trainer)(
        model=model or base(),
        method=method or rs.LoRA(rank=2, dropout=0.1),
        args=arguments(out, **more),
        train_dataset=data(),
        eval_dataset=data(8),
        callbacks=callbacks,
        **(rest or {}),
    )


class Began(TrainerCallback):
    """Remembers at which step training began."""

    def on_train_begin(self, args, state, control, **_):
        self.step = state.global_step


def losses(trainer):
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def tensors(run):
    return {name: t.clone() for name, t in run.state_dict()["tensors"].items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def ladder():
    """Full until step 3, LoRA until step 6, then Full again; known to the registry while the test runs."""

    @dataclass(frozen=True, kw_only=True)
    class Climb(rs.Full):
        name: ClassVar[str] = "test_climb"
        until: int = 3

        def next(self, run):
            return Rung(until=self.until + 3) if run.step >= self.until else None

    @dataclass(frozen=True, kw_only=True)
    class Rung(rs.LoRA):
        name: ClassVar[str] = "test_rung"
        rank: int = 2
        dropout: float = 0.1
        init: str = "orthogonal"  # A and B learn from the first update
        until: int = 6

        def next(self, run):
            return rs.Full() if run.step >= self.until else None

    yield Climb
    for name in ("test_climb", "test_rung"):
        registry._REGISTRY.pop(name)


# ---- the thin subclass


def test_a_given_or_resumed_run_learns_the_length_of_the_schedule(tmp_path):
    model = base()
    run = rs.attach(model, rs.LoRA(rank=2))
    t = rs.Trainer(run=run, args=arguments(tmp_path, max_steps=2), train_dataset=data())
    assert run.total_steps == 2
    t.train()
    longer = trainer(tmp_path, method=rs.LoRA(rank=2), max_steps=4)
    longer.train(resume_from_checkpoint="last")
    assert (longer.run.step, longer.run.total_steps) == (4, 4)


def test_attaches_knows_the_schedule_and_trains(tmp_path):
    model = base()
    t = trainer(tmp_path, model=model, max_steps=-1, num_train_epochs=2, save_strategy="no")
    assert t.run.model is model
    assert t.run.seed == 3
    assert t.run.total_steps == 2 * 10  # 40 rows, 2 a batch, 2 batches an update
    t.train()
    assert t.run.step == t.state.global_step == 20
    first, *_, last = losses(t).values()
    assert last < first
    entry = [e for e in t.state.log_history if "trainable_parameters" in e]
    assert [e["trainable_parameters"] for e in entry] == [sum(p.numel() for _, p in t.run.trainable())]


def test_takes_an_existing_run(tmp_path):
    run = rs.attach(base(), rs.LoRA(rank=2), seed=7)
    t = rs.Trainer(run=run, args=arguments(tmp_path, max_steps=2), train_dataset=data())
    t.train()
    assert t.run is run
    assert run.step == 2


def test_equals_a_plain_loop_to_the_bit(tmp_path):
    seen = []

    class Listen(rs.Trainer):
        def training_step(self, model, inputs, *rest, **more):
            seen.append({k: v.clone() for k, v in inputs.items()})
            return super().training_step(model, inputs, *rest, **more)

    t = trainer(tmp_path, rs.LoRA(rank=2), model=base(dropout=0.0), cls=Listen, save_strategy="no",
                gradient_accumulation_steps=1, max_grad_norm=0.5)  # fmt: skip
    t.train()
    model = base(dropout=0.0).train()
    run = rs.attach(model, rs.LoRA(rank=2), seed=3)
    optimizer = run.optimizer(lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: k / 2 if k < 2 else (STEPS - k) / (STEPS - 2))
    for inputs in seen:
        model(**inputs, num_items_in_batch=(inputs["labels"][:, 1:] != -100).sum()).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert run.step == t.run.step == STEPS
    assert same(tensors(run), tensors(t.run))


def test_decay_spares_biases_and_norms_and_lora_plus_keeps_its_rates(tmp_path):
    model = base()
    model.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(16))
    method = rs.LoRA(rank=2, lr_ratio=4.0, dora=True, bias="all", modules_to_save=("norm", "lm_head"))
    optimizer = trainer(tmp_path, method, model=model).create_optimizer()
    found = {}
    for group in optimizer.param_groups:
        for name in group["param_names"]:
            found[name] = (group["lr"], group["weight_decay"])
    site = "model.layers.0.self_attn.q_proj"
    assert found[f"{site}.A"] == (1e-2, 0.1)
    assert found[f"{site}.B"] == (4e-2, 0.1)
    assert found[f"{site}.magnitude"][1] == 0
    assert found[f"{site}.bias"] == (1e-2, 0)
    assert found["model.norm.weight"] == (1e-2, 0)
    assert found["lm_head.weight"] == (1e-2, 0.1)
    assert optimizer.defaults["betas"] == (0.9, 0.999)


def test_full_decays_what_transformers_decays(tmp_path):
    import transformers

    mine = trainer(tmp_path, rs.Full()).create_optimizer()
    theirs = transformers.Trainer(base(), arguments(tmp_path), train_dataset=data()).create_optimizer()
    sizes = [{g["weight_decay"]: sorted(p.shape for p in g["params"]) for g in o.param_groups} for o in (mine, theirs)]
    assert sizes[0] == sizes[1]


def test_full_training_equals_transformers_own_to_the_bit(tmp_path):
    import transformers

    mine = trainer(tmp_path / "a", rs.Full(), save_strategy="no")
    mine.train()
    args = arguments(tmp_path / "b", save_strategy="no", optim="adamw_torch")
    theirs = transformers.Trainer(base(), args, train_dataset=data())
    theirs.train()
    assert losses(mine) == losses(theirs)
    assert same(dict(mine.model.state_dict()), dict(theirs.model.state_dict()))


def test_optimizer_of_the_user_is_carried(tmp_path):
    run = rs.attach(base(), rs.LoRA(rank=2))
    optimizer = torch.optim.SGD([p for _, p in run.trainable()], lr=0.1)
    t = rs.Trainer(run=run, args=arguments(tmp_path, max_steps=3), train_dataset=data(), optimizers=(optimizer, None))
    t.train()
    assert run.step == 3
    assert t.optimizer.optimizer is optimizer


def test_events_fire_once_per_update_and_in_order(tmp_path):
    diary = []

    @dataclass(frozen=True)
    class Note:
        moment: Moment

        def due(self, tick):
            return True

        def apply(self, adapter, tick):
            clipped = None if adapter.B.grad is None else float(adapter.B.grad.norm()) <= 1e-3 + 1e-6
            diary.append((self.moment, tick.step, tick.total, clipped if self.moment is Moment.GRADS else None))

    @dataclass(frozen=True, kw_only=True)
    class Noted(rs.LoRA):
        name: ClassVar[str] = ""  # not in the registry
        targets: str = "layers.0.self_attn.q_proj"
        rank: int = 2

        def events(self):
            return Note(Moment.UPDATED), Note(Moment.GRADS), Note(Moment.WINDOW)

    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            diary.clear()  # the first window was opened, several times over, while the optimizer was prepared

    more = {"save_strategy": "no", "max_grad_norm": 1e-3, "max_steps": 3}
    trainer(tmp_path, Noted(), [Begin()], **more).train()
    assert diary == [
        entry
        for k in range(3)
        for entry in (
            (Moment.GRADS, k, 3, True), (Moment.UPDATED, k, 3, None), (Moment.WINDOW, k + 1, 3, None),
        )
    ]  # fmt: skip


def test_calibration_data_reach_the_method(tmp_path):
    rows = data(8)
    batches = [{key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels")}]
    with_data = trainer(tmp_path, rs.LoRA(rank=2, init="eva"), rest={"calibration": batches}).run
    site = with_data.adapter()["model.layers.0.self_attn.q_proj"]
    model, seen = base().eval(), []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(**batches[0])
    top = torch.linalg.svd(seen[0].double(), full_matrices=False).Vh[: site.rank]
    overlap = torch.linalg.svdvals(top @ torch.linalg.qr(site.A.detach().double().T).Q)
    torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=0, atol=1e-3)  # the same subspace, in fp32


def test_default_settings_suit_a_frozen_base(tmp_path):
    args = arguments(tmp_path)
    t = rs.Trainer(base(), args, method=rs.LoRA(rank=2))
    assert (t.args.ddp_broadcast_buffers, t.args.ddp_find_unused_parameters) == (False, False)
    assert (args.ddp_broadcast_buffers, args.ddp_find_unused_parameters) == (None, None)  # the caller's stay
    assert rs.Trainer(base(), args, method=rs.Full()).args.ddp_find_unused_parameters is True


def test_gradient_checkpointing_and_mixed_precision(tmp_path):
    plain = trainer(tmp_path / "a", save_strategy="no", method=rs.LoRA(rank=2))
    plain.train()
    name = "activation_checkpointing" if hasattr(plain.args, "activation_checkpointing") else "gradient_checkpointing"
    again = trainer(tmp_path / "b", save_strategy="no", method=rs.LoRA(rank=2), **{name: True})
    again.train()
    assert losses(plain) == losses(again)
    half = trainer(tmp_path / "c", save_strategy="no", method=rs.LoRA(rank=2), bf16=True)
    half.train()
    assert all(p.dtype == torch.float32 for _, p in half.run.trainable())
    assert losses(half) != losses(plain)
    assert losses(half)[STEPS] == pytest.approx(losses(plain)[STEPS], rel=0.02)  # bf16 products: 3 digits


# ---- refusals


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"optim": "adafactor"}, ConfigError, "optim='adafactor'.*'adamw_torch', 'adamw_torch_fused'.*run.trainable"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, ConfigError, "use_reentrant=False"),
        ({"method": rs.LoRA(targets="nothing")}, UnmatchedTarget, "nothing"),
        ({"method": "lora"}, ConfigError, "such as rs.LoRA"),
        ({"rest": {"run": "both"}}, ConfigError, "one of the two"),
        ({"rest": {"optimizer_cls_and_kwargs": (torch.optim.SGD, {})}}, ConfigError, "optimizers="),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_refused_before_training(tmp_path, change, error, text):
    with pytest.raises(error, match=text):
        trainer(tmp_path, **change)


def test_refused_combinations_of_model_run_and_optimizer(tmp_path):
    run = rs.attach(base(), rs.LoRA(rank=2))
    with pytest.raises(AttachError, match="another model"):
        rs.Trainer(base(), arguments(tmp_path), run=run)
    with pytest.raises(ConfigError, match="one of the two"):
        rs.Trainer(base(), arguments(tmp_path))
    with pytest.raises(ConfigError, match="needs a model"):
        rs.Trainer(None, arguments(tmp_path), method=rs.LoRA(rank=2))
    model = base()
    stale = torch.optim.AdamW(model.parameters())
    with pytest.raises(ConfigError, match=r"does not hold .*q_proj\.A"):
        rs.Trainer(model, arguments(tmp_path), method=rs.LoRA(rank=2), optimizers=(stale, None))
    with pytest.raises(AttachError, match="has a method attached"):
        rs.Trainer(run.model, arguments(tmp_path), method=rs.LoRA(rank=2))


# ---- checkpoints


def test_a_checkpoint_is_small_and_loads_without_pickle(tmp_path):
    t = trainer(tmp_path, save_steps=4, save_total_limit=1)
    before = {name: p.clone() for name, p in t.model.state_dict().items() if "base" in name}
    t.train()
    assert same(before, {name: p for name, p in t.model.state_dict().items() if "base" in name})
    (kept,) = tmp_path.glob("checkpoint-*")
    assert kept.name == f"checkpoint-{STEPS}"
    names = {p.name for p in kept.iterdir()}
    assert {"rankshift", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"} <= names
    assert not any("model" in name for name in names)
    frozen = sum(p.numel() * 4 for p in t.model.parameters() if not p.requires_grad)
    assert sum(f.stat().st_size for f in (kept / "rankshift").iterdir()) < frozen
    state = torch.load(kept / "optimizer.pt", weights_only=True)
    assert state["param_groups"][0]["updates"] == STEPS
    model = base()
    run = rs.load(model, kept)
    assert same(tensors(run), tensors(t.run))


class Die(TrainerCallback):
    """Kills the process, as a power cut would, at one of the places where a loop may be."""

    def __init__(self, step, place):
        self.step, self.place = step, place

    def at(self, place, state):
        if place == self.place and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_begin(self, args, state, control, **_):
        self.at("begin", state)

    def on_substep_end(self, args, state, control, **_):
        self.at("substep", state)

    def on_optimizer_step(self, args, state, control, **_):
        self.at("update", state)

    def on_step_end(self, args, state, control, **_):
        self.at("end", state)

    def on_save(self, args, state, control, **_):
        self.at("saved", state)


class DiesWhileSaving(rs.Trainer):
    doom = -1

    def _save_rng_state(self, output_dir):
        if self.state.global_step == self.doom:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_rng_state(output_dir)


def die(out, method, step, place):
    cls = DiesWhileSaving if place == "saving" else rs.Trainer
    t = trainer(out, method, [Die(step, place)], cls=cls)
    t.doom = step
    t.train()


@pytest.mark.parametrize("kind", ["lora", "full", "phases"])
def test_killed_and_resumed_is_bit_equal(tmp_path, kind, ladder):
    method = {"lora": rs.LoRA(rank=2, dropout=0.1), "full": rs.Full(), "phases": ladder()}[kind]
    whole = trainer(tmp_path / "whole", method, save_strategy="no")
    whole.train()
    draw = random.Random(kind)
    places = ["begin", "substep", "update", "end", "saved", "saving"]
    for k in range(3):
        step, place = draw.randrange(2, STEPS), draw.choice(places)
        out = tmp_path / f"{k}"
        child = multiprocessing.get_context("fork").Process(target=die, args=(out, method, step, place))
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL, (step, place)
        began = Began()
        resumed = trainer(out, method, [began])
        resumed.train(resume_from_checkpoint=True)
        assert began.step in (step - 1, step)
        assert losses(resumed) == losses(whole), (step, place)
        assert same(tensors(resumed.run), tensors(whole.run))
        assert same(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))


@pytest.mark.parametrize("kind", ["lora", "phases", "adarankgrad"])
def test_resumed_at_every_step_is_bit_equal(tmp_path, kind, ladder):
    method = {
        "lora": rs.LoRA(rank=2, init="pissa", train="AB"),
        "phases": ladder(),
        "adarankgrad": rs.AdaRankGrad(rank=6, every=3, earliest=1, residual="fira"),
    }[kind]
    whole = trainer(tmp_path, method, save_total_limit=None)
    whole.train()
    expected, optimizer = losses(whole), whole.optimizer.state_dict()
    for step in range(1, STEPS):
        resumed = trainer(tmp_path, method, save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert losses(resumed) == expected, step
        assert same(tensors(resumed.run), tensors(whole.run))
        mine = resumed.optimizer.state_dict()
        assert mine["param_groups"] == optimizer["param_groups"]
        assert all(same(mine["state"][k], optimizer["state"][k]) for k in optimizer["state"])
    saved = [json.loads((tmp_path / f"checkpoint-{k}/rankshift/rankshift.json").read_text()) for k in (1, STEPS)]
    assert (saved[0]["run"]["subspaces"] != saved[1]["run"]["subspaces"]) == (kind == "adarankgrad")


def test_last_means_the_last_complete_checkpoint(tmp_path):
    t = trainer(tmp_path, max_steps=3)
    t.train()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text('{"global_st')  # cut off by a crash
    (tmp_path / "checkpoint-9").mkdir()
    began = Began()
    again = trainer(tmp_path, callbacks=[began], max_steps=3)
    again.train(resume_from_checkpoint="last")
    assert began.step == 2
    assert losses(again) == losses(t)


def test_resume_refusals(tmp_path):
    t = trainer(tmp_path / "a", max_steps=1)
    with pytest.raises(MissingFile, match="no complete checkpoint"):
        t.train(resume_from_checkpoint=True)
    with pytest.raises(MissingFile, match="is not there"):
        t.train(resume_from_checkpoint=str(tmp_path / "none"))
    t.train()
    only = trainer(tmp_path / "only", max_steps=1, save_only_model=True)
    only.train()
    with pytest.raises(MissingFile, match="save_only_model"):
        only.train(resume_from_checkpoint=True)
    with pytest.raises(WrongBase, match="rank"):
        trainer(tmp_path / "a", rs.LoRA(rank=3)).train(resume_from_checkpoint=True)
    other = base()
    other.lm_head.weight.data += 1
    other.model.layers[0].self_attn.q_proj.weight.data += 1
    with pytest.raises(WrongBase):
        trainer(tmp_path / "a", model=other).train(resume_from_checkpoint=True)


def test_resuming_into_a_base_that_was_changed_since_is_refused(tmp_path, ladder):
    @dataclass(frozen=True, kw_only=True)
    class Start(rs.LoRA):
        name: ClassVar[str] = "test_start"

        def next(self, run):
            return rs.Full() if run.step >= 2 else None

    try:
        t = trainer(tmp_path, Start(rank=2), max_steps=3)
        t.train()
        with pytest.raises(WrongBase, match="Load the base anew"):
            t.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    finally:
        registry._REGISTRY.pop("test_start")


def test_best_model_is_loaded_at_the_end(tmp_path):
    class Worse(rs.Trainer):
        def evaluate(self, *args, **kwargs):
            metrics = {"eval_loss": abs(self.state.global_step - 4.0)}
            self.log(metrics)
            return metrics

    t = trainer(
        tmp_path, cls=Worse, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, save_total_limit=2,
        metric_for_best_model="eval_loss", greater_is_better=False,
    )  # fmt: skip
    t.train()
    assert t.state.best_model_checkpoint.endswith("checkpoint-4")
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", f"checkpoint-{STEPS}"}
    best = rs.load(base(), tmp_path / "checkpoint-4" / "rankshift")
    assert same(tensors(best), tensors(t.run))
    assert best.step == t.run.step == 4


def test_save_model_writes_the_run_and_the_tokenizer(tmp_path):
    t = trainer(tmp_path, max_steps=1, save_strategy="no")
    t.train()
    t.save_model(str(tmp_path / "final"))
    assert same(tensors(rs.load(base(), tmp_path / "final" / "rankshift")), tensors(t.run))


# ---- phases


def test_phases_follow_each_other(tmp_path, ladder, caplog):
    rates = {}

    class Rates(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **_):
            rates[state.global_step] = optimizer.param_groups[0]["lr"]

    with caplog.at_level(logging.WARNING, "rankshift"):
        t = trainer(tmp_path, ladder(), [Rates()], save_strategy="no")
        t.train()
    assert [(p.method["method"], p.start, p.stop) for p in t.run.phases] == [
        ("test_climb", 0, 3), ("test_rung", 3, 6), ("full", 6, None),
    ]  # fmt: skip
    assert t.run.step == STEPS
    plain = [1e-2 * (k / 2 if k < 2 else (STEPS - k) / (STEPS - 2)) for k in range(STEPS)]
    assert list(rates.values()) == pytest.approx(plain)  # one schedule over all phases
    told = [r.getMessage() for r in caplog.records]
    assert any(text.startswith("Step 3: test_climb ends, test_rung begins; the schedule goes on.") for text in told)
    assert sum("Adam's moments go on for 0 of" in text for text in told) == 2
    counts = [e["trainable_parameters"] for e in t.state.log_history if "trainable_parameters" in e]
    assert len(counts) == 3
    assert counts[0] == counts[2] > counts[1]
    assert all(s["step"] == 2 for s in t.optimizer.state.values())  # moments began anew at step 6


def test_a_phase_preserves_the_function(tmp_path, ladder):
    x = data(4)[0]["input_ids"][None]
    outputs = []

    class Look(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **_):
            outputs.append(look(model))

        def on_step_end(self, args, state, control, model=None, **_):
            outputs.append(look(model))

    def look(model):
        model.eval()
        with torch.no_grad():
            logits = model(x).logits
        model.train()
        return logits

    trainer(tmp_path, ladder(), [Look()], save_strategy="no").train()
    for before, after in zip(outputs[::2], outputs[1::2], strict=True):
        torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)  # fp32, merged once


def test_a_phase_needs_an_optimizer_of_its_own(tmp_path, ladder):
    run = rs.attach(base(), ladder())
    optimizer = torch.optim.SGD([p for _, p in run.trainable()], lr=0.1)
    t = rs.Trainer(run=run, args=arguments(tmp_path), train_dataset=data(), optimizers=(optimizer, None))
    with pytest.raises(ConfigError, match="Leave optimizers out"):
        t.train()


def test_a_schedule_that_follows_measurements_cannot_cross_phases(tmp_path, ladder):
    t = trainer(tmp_path, ladder(), lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", save_strategy="no")
    with pytest.raises(ConfigError, match=r"reduce_lr_on_plateau.*follows what it measured"):
        t.train()


# ---- what goes wrong while training


class Poison(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if state.global_step in self.steps:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("nan"))


def test_skipped_updates_are_logged(tmp_path):
    t = trainer(tmp_path, callbacks=[Poison({1, 4})], save_strategy="no")
    t.train()
    assert (t.run.step, t.run.skipped, t.state.global_step) == (STEPS - 2, 2, STEPS)
    logged = {e["step"]: e.get("skipped") for e in t.state.log_history if "loss" in e}
    assert logged == {1: None, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2, 7: 2, 8: 2}


def test_gradients_that_stay_nan_stop_training(tmp_path):
    t = trainer(tmp_path, callbacks=[Poison(range(100))], save_strategy="no", max_steps=30)
    with pytest.raises(NonFinite, match="20 updates in a row"):
        t.train()


def test_a_layer_that_learns_nothing_stops_training(tmp_path):
    class Cut(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x, labels=None):
            return {"loss": self.used(x).square().mean()}

    rows = [{"x": torch.ones(4), "labels": torch.zeros(1)}] * 8
    for check in (True, False):
        t = rs.Trainer(Cut(), arguments(tmp_path, save_strategy="no"), method=rs.LoRA(rank=2), train_dataset=rows,
                       check_gradients=check)  # fmt: skip
        if check:
            with pytest.raises(NoGradient, match=r"unused\.A"):
                t.train()
        else:
            t.train()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_out_of_memory_says_what_to_lower(tmp_path, error):
    class Full(TrainerCallback):
        def on_substep_end(self, args, state, control, **_):
            if state.global_step == 2:
                raise error

    with pytest.raises(OutOfMemory) as caught:
        trainer(tmp_path, callbacks=[Full()], save_strategy="no").train()
    text = str(caught.value)
    assert "at step 2" in text
    assert "per_device_train_batch_size = 2 to 1 with gradient_accumulation_steps = 4" in text
    assert "sequence length" in text
    assert "rank" in text
    assert "checkpointing=True" in text
    with pytest.raises(OutOfMemory) as caught:
        trainer(tmp_path, rs.Full(), [Full()], save_strategy="no", per_device_train_batch_size=1).train()
    assert "per_device" not in str(caught.value)
    assert "rank" not in str(caught.value)


def test_other_errors_pass_unchanged(tmp_path):
    class Wrong(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        trainer(tmp_path, callbacks=[Wrong()]).train()


def test_an_output_directory_that_cannot_be_made_is_refused_before_training(tmp_path):
    (tmp_path / "file").touch()
    model = base()
    with pytest.raises(NotWritable, match="file"):
        trainer(tmp_path / "file" / "out", model=model)
    rs.attach(model, rs.LoRA(rank=2))  # it was not attached


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "space"),
        (RuntimeError("[enforce fail at inline_container.cc:603] . PytorchStreamWriter failed writing file"), "failed"),
    ],
)
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, error, text):
    save, writes = torch.save, []

    def full(value, path, *rest, **more):
        writes.append(path)
        if "checkpoint-2" in str(path):
            raise error
        return save(value, path, *rest, **more)

    monkeypatch.setattr(torch, "save", full)
    whole = trainer(tmp_path)
    with pytest.raises(NotWritable, match=text) as caught:
        whole.train()
    assert "checkpoint-2" in str(caught.value)
    monkeypatch.undo()
    began = Began()
    trainer(tmp_path, callbacks=[began], max_steps=3).train(resume_from_checkpoint=True)
    assert began.step == 1


# ---- Ctrl-C


class Interrupt(TrainerCallback):
    def __init__(self, moment, how):
        setattr(self, moment, self.act)
        self.how = how

    def act(self, args, state, control, **_):
        if state.global_step == 3:
            self.how()


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def raise_it():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("moment", "how"),
    [("on_step_end", raise_it), ("on_substep_end", ctrl_c), ("on_pre_optimizer_step", ctrl_c), ("on_step_end", ctrl_c)],
)
def test_an_interrupt_saves_and_resumes_bit_equal(tmp_path, moment, how, caplog):
    whole = trainer(tmp_path / "whole", save_strategy="no")
    whole.train()
    stopped = trainer(tmp_path / "cut", callbacks=[Interrupt(moment, how)], save_strategy="no")
    with caplog.at_level(logging.WARNING, "rankshift"), pytest.raises(SystemExit) as left:
        stopped.train()
    assert left.value.code == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    (saved,) = (tmp_path / "cut").glob("checkpoint-*")
    assert f'trainer.train(resume_from_checkpoint="{saved}")' in caplog.text
    resumed = trainer(tmp_path / "cut", save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    if how is ctrl_c:
        assert losses(resumed) == losses(whole)
    else:  # before its update was logged: its loss is in the next
        assert losses(resumed)[4] == pytest.approx((losses(whole)[3] + losses(whole)[4]) / 2)
    assert losses(resumed)[STEPS] == losses(whole)[STEPS]
    assert same(tensors(resumed.run), tensors(whole.run))


def test_an_interrupt_inside_an_update_saves_nothing(tmp_path, caplog):
    stopped = trainer(tmp_path, callbacks=[Interrupt("on_optimizer_step", raise_it)], save_steps=2)
    with caplog.at_level(logging.WARNING, "rankshift"), pytest.raises(SystemExit):
        stopped.train()
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-2"}
    assert "checkpoint-2" in caplog.text


def test_a_handler_that_somebody_else_set_is_left_alone(tmp_path):
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    try:
        trainer(tmp_path, callbacks=[Interrupt("on_step_end", ctrl_c)], save_strategy="no").train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [1]


def test_ctrl_c_in_a_script_ends_it_without_a_traceback(tmp_path):
    script = textwrap.dedent("""
        import os, signal, sys
        sys.path.insert(0, sys.argv[2])
        from test_trainer import Interrupt, ctrl_c, trainer
        trainer(sys.argv[1], callbacks=[Interrupt("on_step_end", ctrl_c)], save_strategy="no").train()
        print("not reached")
    """)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)], capture_output=True, text=True
    )
    assert done.returncode == 130
    assert "not reached" not in done.stdout
    assert "Traceback" not in done.stderr
    assert "To go on from checkpoint-4" in done.stderr or "To go on from checkpoint-3" in done.stderr


def test_state_of_the_checkpoint_is_json(tmp_path):
    trainer(tmp_path, max_steps=1).train()
    assert json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())["global_step"] == 1
