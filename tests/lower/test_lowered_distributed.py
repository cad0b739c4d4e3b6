"""Lowered blocks under DDP and FSDP2: two gloo processes against one with all the data."""

from __future__ import annotations

import warnings

import lower_models as models
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import rankshift as rs
from laws.pool import Pool
from rankshift.core import shard
from rankshift.lower.stand_in import stands_in

METHODS = {
    "lora": rs.LoRA(rank=4),
    "lora-some": rs.LoRA(rank=3, targets=("q_proj", "v_proj", "down_proj")),
    "paca": rs.PaCA(rank=2),
    "vera": rs.VeRA(rank=8),
    "dora": rs.LoRA(rank=3, dora=True),
    "lora-bias": rs.LoRA(rank=3, lora_bias=True),  # runs unfused
}


@pytest.fixture(name="two", scope="module")
def two_fixture():
    pool = Pool(2)
    yield pool
    pool.stop()


def begin(engine, name, lower=True, dtype=torch.float64, policy=None):
    model = models.llama(dtype=dtype)
    run = rs.attach(model, METHODS[name], total_steps=4)
    models.stir(run)
    report = run.lower() if lower else None
    if engine == "ddp":
        return model, DistributedDataParallel(model), run, report
    if engine == "fsdp2":
        options = {"mp_policy": policy} if policy else {}
        for layer in model.model.layers:
            fully_shard(layer, **options)
        fully_shard(model, **options)
    return model, model, run, report


def part(step, engine):
    batch = models.ids(step, 4)
    return batch if engine == "one" else batch.chunk(2)[dist.get_rank()]


def whole(tensors):
    return {name: shard.whole(t).detach().clone() for name, t in tensors}


def train(engine, name, updates=3, accumulate=1, checkpoint=False, **how):
    """Gradients of each update, and every parameter after the last; whether blocks ran as they should."""
    model, wrapped, run, report = begin(engine, name, **how)
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = run.optimizer(lr=5e-3, eps=1e-4)
    found = {}
    for step in range(updates):
        parts = part(step, engine).chunk(accumulate)
        for i, batch in enumerate(parts):
            if isinstance(wrapped, FSDPModule):
                wrapped.set_requires_gradient_sync(i == len(parts) - 1)
            (wrapped(input_ids=batch, labels=batch).loss / accumulate).backward()
        found |= {f"{step} {n}": g for n, g in whole((n, p.grad) for n, p in run.trainable()).items()}
        optimizer.step()
        optimizer.zero_grad()
    assert report is None or bool(report.aside) == (name == "lora-bias")
    return found | whole(model.named_parameters())


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_are_one(two, engine, name):
    alone = train("one", name)
    models.close(train("one", name, lower=False), alone, 1e-4)
    for ranks in two.run(train, engine, name):
        models.close(ranks, alone, 1e-9)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_accumulation_and_checkpointing(two, engine):
    alone = train("one", "lora", accumulate=2)
    for how in ({"accumulate": 2}, {"accumulate": 2, "checkpoint": True}):
        for ranks in two.run(train, engine, "lora", **how):
            models.close(ranks, alone, 1e-9)


def warned():
    _, wrapped, _, report = begin("fsdp2", "lora")
    batch = part(0, "fsdp2")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        wrapped(input_ids=batch, labels=batch).loss.backward()
    assert not report.aside
    return [str(warning.message) for warning in said]


def test_no_warnings(two):
    """FSDP2 warns of modules that return views."""
    assert two.run(warned) == [[], []]


def mixed(lower):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return train("fsdp2", "lora", updates=1, lower=lower, dtype=torch.float32, policy=policy)


def test_mixed_precision_of_fsdp2(two):
    """Parameters are gathered in bf16, and the blocks run fused in it."""
    plain, lowered = two.run(mixed, False)[0], two.run(mixed, True)[0]
    models.close(
        {n: lowered[n] for n in lowered if n.startswith("0 ")}, {n: plain[n] for n in plain if n[0] == "0"}, 0.1
    )


def end(engine, name, how):
    """What is left of a model that trained lowered, and how it was put back."""
    model, wrapped, run, _ = begin(engine, name)
    batch = part(0, engine)
    wrapped(input_ids=batch, labels=batch).loss.backward()
    layer = model.model.layers[0]
    getattr(run, how)()
    plain = model.model.layers[0]
    assert not any(map(stands_in, model.modules()))
    assert isinstance(plain, FSDPModule) == isinstance(layer, FSDPModule)
    loss = wrapped(input_ids=batch, labels=batch).loss.detach()
    if engine != "one":
        dist.all_reduce(loss)
        loss /= 2
    return {"loss": loss} | whole(model.state_dict().items())


@pytest.mark.parametrize("how", ["merge", "detach", "raise_"])
@pytest.mark.parametrize("name", ["lora", "paca"])
def test_put_back(two, name, how):
    alone = end("one", name, how)
    for engine in ("ddp", "fsdp2"):
        models.close(two.run(end, engine, name, how)[0], alone, 1e-6)  # transformers takes losses in fp32


def late():
    model, _, run, _ = begin("fsdp2", "lora", lower=False)
    before = whole(model.named_parameters())
    report = run.lower()
    models.close(whole(model.named_parameters()), before, 0)
    return report.refused, not any(map(stands_in, model.model.layers))


def test_a_model_that_is_sharded_already_is_refused(two):
    for refused, plain in two.run(late):
        assert set(refused.values()) == {"it is sharded already: lower before fully_shard()"}
        assert len(refused) == 2
        assert plain
