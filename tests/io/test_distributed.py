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
    "vera": rs.VeRA(rank=4, targets=("q_proj", "down_proj"), modules_to_save=("lm_head",), save_projection=True),
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
    if not isinstance(method, rs.Full):
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


def compress(folder):
    """A sharded run exports; compress() is refused and names that way."""
    from torch.distributed.fsdp import fully_shard

    run = rs.restore(models.llama(), torch.load(folder / "run.pt", weights_only=True))
    for layer in run.model.model.layers:
        fully_shard(layer)
    fully_shard(run.model)
    with pytest.raises(rs.errors.AttachError, match="load_compressed"):
        run.compress()
    run.export(folder / "two", format="compressed")


def test_a_compressed_model_of_a_sharded_run(tmp_path, two):
    run = rs.attach(models.llama(), rs.PCLoRA(rank=2, features=False, decay_end=1.0), total_steps=1)
    models.stir(run.trainable())
    state = {**run.state_dict(), "step": 1}
    torch.save(state, tmp_path / "run.pt")
    two.run(compress, tmp_path)
    rs.restore(models.llama(), state).export(tmp_path / "one", format="compressed")
    one, many = (load_file(tmp_path / at / "compressed.safetensors") for at in ("one", "two"))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
