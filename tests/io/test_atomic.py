"""Either the old directory or the new one, complete, at every instant and after every failure."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import io_models as models
import pytest
import torch

import rankshift as rs
from rankshift.io import atomic, checkpoint, export

LORA = rs.LoRA


@pytest.fixture(name="runs")
def runs_fixture():
    """Two runs of the same shape with other values."""
    found = []
    for seed in (1, 2):
        run = rs.attach(models.llama(), LORA(rank=2, targets="q_proj", modules_to_save=("lm_head",)))
        models.stir(run.trainable(), seed=seed)
        found.append(run)
    return found


def value(folder):
    """Which of the two runs a directory holds."""
    model = models.llama()
    rs.load(model, folder)
    return models.logits(model)


STAGES = {
    "mkdir": (Path, "mkdir"),
    "first file": (checkpoint, "save_file"),
    "manifest": (Path, "write_text"),
    "checksum": (checkpoint, "sha256"),
    "sync": (os, "fsync"),
    "carry": (atomic, "_carry"),
    "swap": (atomic, "_exchange"),
}


@pytest.mark.parametrize(
    ("stage", "old"),  # nothing is carried or swapped where nothing was
    [(stage, old) for stage in STAGES for old in (False, True) if old or stage not in ("carry", "swap")],
)
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "I/O error")])
def test_a_failure_at_any_stage_leaves_the_old(runs, tmp_path, monkeypatch, stage, old, error):
    first, second = runs
    target = tmp_path / "deep" / "out"
    if old:
        first.save(target)

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(*STAGES[stage], fail)
        with pytest.raises(
            rs.errors.NotWritable, match="disk is full" if error.errno == errno.ENOSPC else "I/O"
        ) as raised:
            second.save(target)
    assert str(target) in str(raised.value)
    assert len(str(raised.value).splitlines()) == 2
    if old:
        assert torch.equal(value(target), models.logits(first.model))
        assert [entry.name for entry in target.parent.iterdir()] == ["out"]
    else:
        assert not list(tmp_path.iterdir())
    second.save(target)
    assert torch.equal(value(target), models.logits(second.model))


def test_every_write_of_every_byte_can_fail(runs, tmp_path):
    """A limit on the size of files stands in for a full disk: safetensors itself meets it, at any byte."""
    first, second = runs
    target = tmp_path / "out"
    first.save(target)
    size = (target / "adapter.safetensors").stat().st_size
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (0, 1, size // 2, size - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
            with pytest.raises(rs.errors.NotWritable, match="ulimit"):
                second.save(target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert torch.equal(value(target), models.logits(first.model))
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_killed_writer_leaves_one_of_the_two(runs, tmp_path):
    """Killed at many moments of many writes; a reader never meets anything but a complete directory."""
    code = f"""
        import sys, torch
        sys.path[:0] = [{str(Path(__file__).parent)!r}]
        import io_models as models, rankshift as rs
        torch.set_num_threads(1)
        runs = []
        for seed in (1, 2):
            run = rs.attach(models.llama(), rs.LoRA(rank=2, targets="q_proj", modules_to_save=("lm_head",)))
            models.stir(run.trainable(), seed=seed)
            runs.append(run)
        print("ready", flush=True)
        while True:
            for run in runs:
                run.save({str(tmp_path / "out")!r})
    """
    allowed = [models.logits(run.model) for run in runs]
    for delay in (0.011, 0.037, 0.052):
        writer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        while not (tmp_path / "out").exists():
            time.sleep(0.001)
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        found = value(tmp_path / "out")
        assert any(torch.equal(found, logits) for logits in allowed)
    runs[0].save(tmp_path / "out")  # and what the killed one left is cleared away
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_the_name_is_there_at_every_instant(runs, tmp_path, monkeypatch):
    """Every system call that changes names is watched: the target never is absent or incomplete."""
    target = tmp_path / "out"
    runs[0].save(target)
    seen = []

    def watch(module, name):
        real = getattr(module, name)

        def call(*args, **kwargs):
            seen.append(checkpoint.inspect(target)["files"])
            result = real(*args, **kwargs)
            seen.append(checkpoint.inspect(target)["files"])
            return result

        monkeypatch.setattr(module, name, call)

    watch(atomic, "_exchange")
    watch(os, "rename")
    watch(atomic, "_discard")
    runs[1].save(target)
    assert len({str(files) for files in seen}) == 2  # the old one, then the new one


def test_without_exchange_an_interrupted_swap_is_undone(runs, tmp_path, monkeypatch):
    first, second = runs
    target = tmp_path / "out"
    first.save(target)
    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    second.save(target)
    assert torch.equal(value(target), models.logits(second.model))
    os.rename(target, tmp_path / ".out.rankshift-previous")  # a crash between the two renames
    assert torch.equal(value(target), models.logits(second.model))
    os.rename(target, tmp_path / ".out.rankshift-previous")
    first.save(target)
    assert torch.equal(value(target), models.logits(first.model))
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]

    real = os.rename

    def second_fails(a, b):
        if "partial" in str(a):
            raise OSError(errno.EIO, "I/O error")
        real(a, b)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(rs.errors.NotWritable):
        second.save(target)
    assert (target / "rankshift.json").exists()  # put back at once, not by the next reader
    assert torch.equal(value(target), models.logits(first.model))


def test_everything_is_synced_before_the_rename(runs, tmp_path, monkeypatch):
    order = []
    sync, rename = os.fsync, os.rename

    def fsync(handle):
        order.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        sync(handle)

    def moved(a, b):
        order.append("rename")
        rename(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", moved)
    runs[0].save(tmp_path / "out")
    at = order.index("rename")
    assert {"adapter.safetensors", "rankshift.json", ".out.rankshift-partial"} <= set(order[:at])
    assert tmp_path.name in order[at:]


# ---- whose directory it is -------------------------------------------------------------------------------------------


def test_a_directory_of_the_user_is_left_alone(runs, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for write in (runs[0].save, runs[0].export, lambda d: runs[0].export(d, format="merged")):
        with pytest.raises(rs.errors.NotWritable, match=r"thesis\.tex") as error:
            write(tmp_path)
        assert len(str(error.value).splitlines()) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_a_user_keeps_beside_a_checkpoint_stays(runs, tmp_path):
    target = tmp_path / "out"
    runs[0].save(target)
    (target / "notes.txt").write_text("mine")
    (target / "plots").mkdir()
    (target / "plots" / "loss.png").write_bytes(b"png")
    (target / "link").symlink_to("notes.txt")
    runs[1].save(target)
    assert (target / "notes.txt").read_text() == "mine"
    assert (target / "plots" / "loss.png").read_bytes() == b"png"
    assert os.readlink(target / "link") == "notes.txt"
    assert torch.equal(value(target), models.logits(runs[1].model))


def test_shards_of_the_previous_base_do_not_stay(tmp_path):
    run = rs.attach(models.llama(), rs.Full())
    run.save(tmp_path)
    assert list(tmp_path.glob("base-*"))
    rs.attach(models.llama(), LORA(rank=2)).save(tmp_path)
    assert not list(tmp_path.glob("base-*"))


def test_native_and_peft_share_a_directory_but_peft_and_a_model_do_not(runs, tmp_path):
    run = runs[0]
    run.save(tmp_path / "a")
    run.export(tmp_path / "a")
    run.save(tmp_path / "a")
    assert torch.equal(value(tmp_path / "a"), models.logits(run.model))
    assert (tmp_path / "a" / "adapter_model.safetensors").exists()
    with pytest.raises(rs.errors.NotWritable, match="PEFT adapter"):
        run.export(tmp_path / "a", format="merged")
    run.export(tmp_path / "b", format="merged")
    run.save(tmp_path / "b")
    with pytest.raises(rs.errors.NotWritable, match="plain model"):
        run.export(tmp_path / "b")


def test_a_file_in_the_way(runs, tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "under" / "it"):
        with pytest.raises(rs.errors.NotWritable, match="is a file") as error:
            runs[0].save(target)
        assert len(str(error.value).splitlines()) == 2
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming nobody needs root; as a user the mode alone would do")
def test_no_permission(runs, tmp_path):
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o005 != 0o005:
            folder.chmod(0o755)
    os.seteuid(65534)
    try:
        for write in (runs[0].save, runs[0].export):
            with pytest.raises(rs.errors.NotWritable, match="No permission") as error:
                write(tmp_path / "out")
            assert len(str(error.value).splitlines()) == 2
    finally:
        os.seteuid(0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EIO])
def test_errors_are_told_without_numbers_and_passing_names(code):
    error = OSError(code, os.strerror(code), "/proc/.x.rankshift-partial")
    text = str(atomic.explain(error, Path("/proc/x")))
    assert text.startswith("/proc/x ")
    assert "Errno" not in text
    assert "partial" not in text


def test_asking_before_training(runs, tmp_path):
    atomic.check(tmp_path / "a" / "b", atomic.NATIVE)
    assert not list(tmp_path.iterdir())
    runs[0].save(tmp_path / "out")
    atomic.check(tmp_path / "out", atomic.NATIVE)


def test_a_symbolic_link_is_followed(runs, tmp_path):
    runs[0].save(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    runs[1].save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert torch.equal(value(tmp_path / "real"), models.logits(runs[1].model))


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_exports_fail_as_softly(runs, tmp_path, monkeypatch, format):
    runs[0].export(tmp_path / "out", format=format)
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "save_file", fail)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    with pytest.raises(rs.errors.NotWritable, match="disk is full"):
        runs[1].export(tmp_path / "out", format=format)
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_model_of_the_user_is_not_replaced(runs, tmp_path):
    """Neither the base, nor any other plain model, nor its config alone: only what rankshift wrote."""
    base = tmp_path / "base"
    models.llama().save_pretrained(base)
    runs[0].save(tmp_path / "half")
    (tmp_path / "half" / "config.json").write_text("{}")
    for theirs in (base, tmp_path / "half"):
        before = {f.name: f.read_bytes() for f in theirs.iterdir()}
        with pytest.raises(rs.errors.NotWritable, match="that rankshift did not write") as error:
            runs[0].export(theirs, format="merged")
        assert len(str(error.value).splitlines()) == 2
        assert {f.name: f.read_bytes() for f in theirs.iterdir()} == before
    for run in runs:
        run.export(tmp_path / "ours", format="merged")
    assert torch.equal(models.logits(type(runs[1].model).from_pretrained(tmp_path / "ours").eval()),
                       models.logits(runs[1].merge()))  # fmt: skip


def test_a_merged_model_that_became_a_base_is_not_replaced_by_what_stands_on_it(runs, tmp_path):
    runs[0].export(tmp_path / "base", format="merged")
    run = rs.attach(type(runs[0].model).from_pretrained(tmp_path / "base"), LORA(rank=2, targets="q_proj"))
    (tmp_path / "link").symlink_to("base")
    for name in ("base", "link"):
        with pytest.raises(rs.errors.NotWritable, match="is the base model itself"):
            run.export(tmp_path / name, format="merged")
    run.export(tmp_path / "new", format="merged")


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_others_may_read_what_the_umask_lets_them(runs, tmp_path, mask, mode):
    old = os.umask(mask)
    try:
        runs[0].save(tmp_path / "native")
        runs[0].export(tmp_path / "peft")
        runs[0].export(tmp_path / "merged", format="merged")
    finally:
        os.umask(old)
    written = [file for folder in tmp_path.iterdir() for file in folder.iterdir()]
    assert {file.name for file in written} >= {"adapter.safetensors", "adapter_model.safetensors", "model.safetensors"}
    assert {file.name: file.stat().st_mode & 0o777 for file in written} == {file.name: mode for file in written}
