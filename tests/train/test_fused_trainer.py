"""rs.Trainer and recipes with updates inside the backward pass."""

import copy

import pytest
import torch
from test_trainer import arguments, base, ladder, losses, same, tensors, trainer
from test_trainer_distributed import ENGINES, OnCPU, on_two

import rankshift as rs
from rankshift.core.errors import ConfigError
from rankshift.optim.backward import FusedOptimizer
from rankshift.train.config import parse

GALORE = rs.GaLore(rank=4, every=3, transport="square")
ALONE = {"gradient_accumulation_steps": 1, "max_grad_norm": 0}
climbing = ladder  # the fixture, under a name that pytest finds here


def train(out, method, fused, resume=None, **more):
    t = trainer(out, method, rest={"fused_backward": fused}, **{**ALONE, **more})
    t.train(resume_from_checkpoint=resume)
    assert isinstance(t.run._driver._optimizer, FusedOptimizer) == fused
    return t


def test_the_run_of_the_ordinary_way_and_resume(tmp_path):
    plain = train(tmp_path / "plain", GALORE, False, save_strategy="no")
    fused = train(tmp_path / "fused", GALORE, True, save_steps=5)
    again = train(tmp_path / "fused", GALORE, True, str(tmp_path / "fused" / "checkpoint-5"))
    assert losses(fused) == losses(plain) == losses(again)
    assert same(tensors(fused.run), tensors(plain.run))
    assert same(tensors(again.run), tensors(plain.run))


def test_through_phases(tmp_path, climbing):
    plain, fused = (train(tmp_path, climbing(), fused, save_strategy="no") for fused in (False, True))
    assert len(fused.run.phases) == 3
    assert losses(fused) == losses(plain)
    assert same(tensors(fused.run), tensors(plain.run))


@pytest.mark.parametrize("fused", [True, False])
def test_an_interrupt_in_the_middle_of_an_update_saves_nothing(tmp_path, fused):
    t = trainer(tmp_path, GALORE, rest={"fused_backward": fused}, save_strategy="no", **ALONE)

    def stop(gradient):
        if t.run.step == 3:
            raise KeyboardInterrupt

    t.model.model.layers[0].mlp.up_proj.weight.register_hook(stop)
    with pytest.raises(SystemExit):
        t.train()
    assert [f.name for f in tmp_path.iterdir()] == ([] if fused else ["checkpoint-3"])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"gradient_accumulation_steps": 2}, "each backward pass is an update"),
        ({"max_grad_norm": 0.5}, "Set max_grad_norm=0"),
        ({"method": rs.LoRA(rank=2, train="B", precondition=True)}, "LoRA as configured changes gradients"),
        ({"method": rs.GaLore(rank=2, gradient="projected")}, "GaLore as configured changes gradients"),
        ({"optimizer": True}, "passed in optimizers="),
    ],
)
def test_what_it_cannot_go_with_is_refused_before_anything_is_attached(tmp_path, settings, text):
    settings, model = copy.copy(settings), base()
    rest = {"fused_backward": True}
    if settings.pop("optimizer", False):
        rest["optimizers"] = (torch.optim.AdamW(model.parameters()), None)
    with pytest.raises(ConfigError, match=text):
        trainer(tmp_path, settings.pop("method", GALORE), model=model, rest=rest, **{**ALONE, **settings})
    rs.attach(model, rs.Full())  # it is free


def on_ranks(out, engine):
    found = []
    for fused in (False, True):
        t = trainer(
            out, GALORE, cls=OnCPU, rest={"fused_backward": fused}, per_device_train_batch_size=1, save_strategy="no",
            **ALONE, **ENGINES[engine],
        )  # fmt: skip
        t.train()
        found.append({"losses": losses(t), "tensors": tensors(t.run), "left": t.run._driver.taken})
    return found


def refusal(out):
    try:
        trainer(out, GALORE, rest={"fused_backward": True}, ddp_backend="gloo", **ALONE)
    except ConfigError as error:
        return [str(error)]
    return []


def test_under_fsdp2(tmp_path):
    for plain, fused in on_two(tmp_path, on_ranks, tmp_path / "out", "fsdp2"):
        assert fused["left"] == {}
        assert plain["losses"] == fused["losses"]
        assert same(plain["tensors"], fused["tensors"])


def test_ddp_is_refused(tmp_path):
    for said in on_two(tmp_path, refusal, tmp_path / "out"):
        assert "DDP averages gradients after" in said[0]


def test_a_recipe_says_it_with_what_it_needs():
    recipe = {"model": "m", "data": "d", "method": "galore"}
    assert parse({**recipe, "train": {"fused_backward": True, "clip": 0}}).train.fused_backward
    for wrong in ({}, {"clip": 0, "accumulate": 2}):
        with pytest.raises(ConfigError, match=r"Set train\.accumulate=1 and train\.clip=0"):
            parse({**recipe, "train": {"fused_backward": True, **wrong}})
    projected = {"method": "galore", "gradient": "projected"}
    with pytest.raises(ConfigError, match=r"train\.fused_backward: GaLore as configured changes gradients"):
        parse({**recipe, "method": projected, "train": {"fused_backward": True, "clip": 0}})


@pytest.mark.parametrize("word", ["false", "true", 1, None])
def test_what_is_neither_true_nor_false_is_refused(tmp_path, word):
    says = f"fused_backward={word!r} is not True or False"
    run = rs.attach(base(), GALORE)
    for make in (
        lambda: run.optimizer(fused_backward=word),
        lambda: run.optimizer_cls_and_kwargs(arguments(tmp_path), fused_backward=word),
        lambda: trainer(tmp_path, GALORE, rest={"fused_backward": word}),
    ):
        with pytest.raises(ConfigError, match=says):
            make()


def test_refusals_name_the_other_way_to_small_gradients(tmp_path):
    for more in ({"gradient_accumulation_steps": 2, "max_grad_norm": 0}, {**ALONE, "max_grad_norm": 1.0}):
        with pytest.raises(ConfigError, match=r'leave fused_backward out \(of GaLore .*gradient="projected"'):
            trainer(tmp_path, GALORE, rest={"fused_backward": True}, **more)
