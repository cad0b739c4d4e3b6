"""Directories written by two processes under FSDP2 are those that one process writes."""

from __future__ import annotations

import errno
import json

import io_models as models
import pytest
import torch
from safetensors.torch import load_file

import rankshift as rs
from laws.pool import Pool
from rankshift.io import checkpoint

METHODS = {
    "lora": rs.LoRA(rank=4, init="pissa", bias="all", targets=("q_proj", "down_proj"), modules_to_save=("lm_head",)),
    "full": rs.Full(),
}


@pytest.fixture(name="two", scope="module")
def two_fixture():
    pool = Pool(2)
    yield pool
    pool.stop()


def build(method):
    model = models.llama()
    run = rs.attach(model, method)
    models.stir(run.trainable())
    return model, run


def write(method, folder):
    """Every directory of a run; on more than one rank the model is sharded first."""
    model, run = build(method)
    if torch.distributed.is_initialized():
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    run.save(folder / "native")
    if isinstance(method, rs.LoRA):
        run.export(folder / "peft")
    run.export(folder / "merged", format="merged")


def fail_on_first(method, folder):
    _, run = build(method)
    first = torch.distributed.get_rank() == 0
    real = checkpoint.save_file

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if first:
        checkpoint.save_file = full
    try:
        run.save(folder)
    except rs.errors.NotWritable as error:
        return str(error)
    finally:
        checkpoint.save_file = real
    return ""


@pytest.mark.parametrize("name", METHODS)
def test_sharded_writes_what_one_process_writes(two, name, tmp_path):
    write(METHODS[name], tmp_path / "one")
    two.run(write, METHODS[name], tmp_path / "two")
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "two") for p in (tmp_path / "two").rglob("*") if p.is_file())
    for file in files:
        one, other = tmp_path / "one" / file, tmp_path / "two" / file
        if file.suffix == ".safetensors":
            ours, theirs = load_file(one), load_file(other)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[k], theirs[k]) for k in ours), file
    prints = [json.loads((tmp_path / w / "native" / "rankshift.json").read_text())["base"] for w in ("one", "two")]
    assert prints[0]["prints"] == prints[1]["prints"]
    model, _ = build(METHODS[name])
    again = models.llama()
    rs.load(again, tmp_path / "two" / "native")
    assert torch.equal(models.logits(again), models.logits(model))


def test_a_failure_of_the_writer_is_raised_on_every_rank(two, tmp_path):
    first, second = two.run(fail_on_first, METHODS["full"], tmp_path / "out")
    assert "disk is full" in first
    assert "first process" in second
    assert not list(tmp_path.iterdir())
