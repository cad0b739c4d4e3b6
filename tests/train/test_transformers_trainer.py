"""An unmodified transformers Trainer trains an attached model, by ``run.optimizer_cls_and_kwargs(args)``."""

import inspect

import pytest
import torch
import torch.distributed as dist
import transformers
from test_trainer import arguments, base, data, losses
from test_trainer_distributed import on_two
from torch import nn
from transformers import LlamaForCausalLM

import rankshift as rs
from rankshift.core.errors import ConfigError, TrainingError
from rankshift.optim import Project

METHODS = {
    "galore": rs.GaLore(rank=4, every=3, transport="square"),
    "adarankgrad": rs.AdaRankGrad(rank=12, every=2, earliest=1, energy=0.7),
}
FUSED = {"gradient_accumulation_steps": 1, "max_grad_norm": 0}


def trainer(out, method, options=None, **more):
    run = rs.attach(base(), method)
    args = arguments(out, **more)
    made = run.optimizer_cls_and_kwargs(args, **(options or {}))
    return run, transformers.Trainer(run.model, args, train_dataset=data(), optimizer_cls_and_kwargs=made)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_full_training_has_the_bits_of_the_trainers_own_adamw(tmp_path):
    numbers = {
        "weight_decay": 0.3, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-3, "learning_rate": 3e-2,
        "max_grad_norm": 0.1, "lr_scheduler_type": "cosine", "save_strategy": "no",
    }  # fmt: skip
    plain = transformers.Trainer(
        base(), arguments(tmp_path / "plain", optim="adamw_torch", **numbers), train_dataset=data()
    )
    plain.train()
    run, mine = trainer(tmp_path / "mine", rs.Full(), **numbers)
    mine.train()
    same(weights(mine.model), weights(plain.model))
    assert mine.state.log_history[:-1] == plain.state.log_history[:-1]  # losses, norms and rates; not the times
    assert run.step == 8


def test_every_tensor_has_the_numbers_of_the_arguments(tmp_path):
    run, mine = trainer(
        tmp_path, METHODS["galore"], weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-5
    )
    optimizer = mine.create_optimizer()
    decaying = set(mine.get_decay_parameter_names(run.model))
    found = {}
    for group, transform in zip(optimizer.param_groups, optimizer.transforms, strict=True):
        assert (group["lr"], group["betas"], group["eps"]) == (1e-2, (0.8, 0.95), 1e-5)
        found |= {name: (group["weight_decay"], type(transform)) for name in group["param_names"]}
    assert {name: decay for name, (decay, _) in found.items()} == {
        name: 0.3 if name in decaying else 0.0 for name, _ in run.model.named_parameters()
    }
    assert {decay for decay, _ in found.values()} == {0.3, 0.0}
    projected = {name for name, (_, kind) in found.items() if kind is Project}
    assert projected == {name for name, p in run.model.named_parameters() if "layers" in name and p.dim() == 2}


@pytest.mark.parametrize("name", METHODS)
def test_resume_to_the_bit_across_renewals(tmp_path, name):
    run, whole = trainer(tmp_path / "out", METHODS[name])
    whole.train()
    if name == "adarankgrad":
        assert len(set(run.subspaces.values())) > 1  # ranks went their own ways
    for step in (2, 5):
        again, resumed = trainer(tmp_path / "again", METHODS[name], save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        same(weights(again.model), weights(run.model))
        assert (again.step, again.subspaces) == (8, run.subspaces)
        assert losses(resumed) == losses(whole)


def test_what_is_saved_is_a_plain_model(tmp_path):
    run, mine = trainer(tmp_path, METHODS["galore"], save_steps=8)
    mine.train()
    same(weights(LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-8")), weights(run.model))


def test_a_ready_optimizer_gives_the_same_run(tmp_path):
    args = arguments(tmp_path, weight_decay=0, save_strategy="no")
    run = rs.attach(base(), METHODS["galore"])
    ready = transformers.Trainer(run.model, args, train_dataset=data(), optimizers=(run.optimizer(lr=1e-2), None))
    ready.train()
    other, mine = trainer(tmp_path, METHODS["galore"], weight_decay=0, save_strategy="no")
    mine.train()
    same(weights(other.model), weights(run.model))


@pytest.mark.parametrize("name", ["galore", "adarankgrad"])
def test_fused_backward_gives_the_same_run_and_resumes(tmp_path, name):
    run, plain = trainer(tmp_path / "plain", METHODS[name], save_strategy="no", **FUSED)
    plain.train()
    other, fused = trainer(tmp_path / "fused", METHODS[name], {"fused_backward": True}, save_steps=5, **FUSED)
    fused.train()
    same(weights(other.model), weights(run.model))
    assert losses(fused) == losses(plain)
    again, resumed = trainer(tmp_path / "fused", METHODS[name], {"fused_backward": True}, **FUSED)
    resumed.train(resume_from_checkpoint=str(tmp_path / "fused" / "checkpoint-5"))
    same(weights(again.model), weights(run.model))
    assert again.step == 8


def test_a_clip_for_every_tensor(tmp_path):
    options = {"fused_backward": True, "clip_each": 1e-3}
    _, mine = trainer(tmp_path, rs.Full(), options, save_strategy="no", adam_epsilon=1.0, **FUSED)
    before = weights(mine.model)
    mine.train()
    # 8 updates of at most lr = 0.01 times a gradient of norm 1e-3, over ε = 1; decay 0.1 of a weight
    for name, p in mine.model.named_parameters():
        shrunk = before[name].norm() * 8 * 1e-2 * 0.1
        assert (p - before[name]).norm() <= 8 * 1e-2 * 1e-3 + shrunk


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"gradient_accumulation_steps": 2, "max_grad_norm": 0}, "gradient_accumulation_steps=2: each backward"),
        ({"gradient_accumulation_steps": 1, "max_grad_norm": 1.0}, "Set max_grad_norm=0"),
        ({**FUSED, "fp16": True}, "fp16=True: the loss scale"),
    ],
)
def test_what_a_fused_backward_cannot_go_with_is_refused(tmp_path, settings, text):
    run = rs.attach(base(), rs.Full())
    args = arguments(tmp_path, **{k: v for k, v in settings.items() if k != "fp16"})
    args.fp16 = settings.get("fp16", False)  # transformers itself refuses it without a GPU
    with pytest.raises(ConfigError, match=text):
        run.optimizer_cls_and_kwargs(args, fused_backward=True)
    run.optimizer_cls_and_kwargs(args)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("optim", "galore_adamw", "optim='galore_adamw' would be ignored"),
        ("deepspeed", {"zero": 3}, "under DeepSpeed does not save"),
        ("fsdp", True, r"under FSDP does not save.*rs.Trainer"),
    ],
)
def test_arguments_that_cannot_work_are_refused(tmp_path, field, value, text):
    run = rs.attach(base(), METHODS["galore"])
    args = arguments(tmp_path)
    setattr(args, field, value)
    with pytest.raises(ConfigError, match=text):
        run.optimizer_cls_and_kwargs(args)


@pytest.mark.parametrize("inner", [True, False])
def test_a_model_that_is_not_the_runs_is_refused(tmp_path, inner):
    model, args = base(), arguments(tmp_path)
    run = rs.attach(model.model if inner else model, rs.Full())
    made = run.optimizer_cls_and_kwargs(args)
    with pytest.raises(ConfigError, match="some do not belong" if inner else "embed_tokens.weight is not among"):
        transformers.Trainer(model if inner else base(), args, optimizer_cls_and_kwargs=made).create_optimizer()


def test_accumulation_that_no_argument_tells_of_is_refused_before_harm(tmp_path):
    class Twice(transformers.Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            super().training_step(model, inputs, *args, **kwargs)
            self.between = weights(model)
            return super().training_step(model, inputs, *args, **kwargs)

    run = rs.attach(base(), rs.Full())
    args = arguments(tmp_path, **FUSED)
    made = run.optimizer_cls_and_kwargs(args, fused_backward=True)
    mine = Twice(run.model, args, train_dataset=data(), optimizer_cls_and_kwargs=made)
    with pytest.raises(TrainingError, match="cannot be accumulated"):
        mine.train()
    same(weights(run.model), mine.between)


def test_a_model_that_is_not_from_transformers(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, labels=None):
            return {"loss": (self.b(self.a(x).tanh()) - labels).square().mean()}

    rows = [{"x": x, "labels": x.flip(0)} for x in torch.randn(40, 8, generator=torch.Generator().manual_seed(0))]
    run = rs.attach(Net(), rs.GaLore(rank=2, every=3))
    args = arguments(tmp_path, save_strategy="no")
    mine = transformers.Trainer(
        run.model, args, train_dataset=rows, optimizer_cls_and_kwargs=run.optimizer_cls_and_kwargs(args)
    )
    before = weights(run.model)
    mine.train()
    assert run.step == 8
    assert run.subspaces == {"a.weight": 2, "b.weight": 2}
    assert not any(torch.equal(p, before[name]) for name, p in run.model.named_parameters())


def on_ranks(out):
    run, mine = trainer(out, METHODS["adarankgrad"], ddp_backend="gloo", per_device_train_batch_size=1, save_steps=3)
    mine.train()
    dist.barrier()
    again, resumed = trainer(
        out, METHODS["adarankgrad"], ddp_backend="gloo", per_device_train_batch_size=1, save_strategy="no"
    )
    resumed.train(resume_from_checkpoint=str(out / "checkpoint-3"))
    return type(mine.model_wrapped).__name__, run.subspaces, weights(run.model), weights(again.model)


def test_under_ddp_ranks_agree_and_resume_to_the_bit(tmp_path):
    if 'type != "cpu"' not in inspect.getsource(transformers.Trainer._load_optimizer_and_scheduler):
        pytest.skip("this transformers cannot load an optimizer on several CPU processes (map_location cpu:0)")
    (wrapper, ranks, one, again), (_, others, two, _) = on_two(tmp_path, on_ranks, tmp_path / "out")
    assert wrapper == "DistributedDataParallel"
    assert ranks == others
    same(one, two)
    same(one, again)
