"""A process that is killed while it writes a checkpoint, or while it changes phase, and the one that goes on."""

import multiprocessing
import os
import signal

import pytest
from test_trainer import Began, losses, same, tensors, trainer

import rankshift as rs
from rankshift.io import atomic, checkpoint
from rankshift.placement import Placement

THEN = [rs.Then(rs.SwitchLoRA(rank=4, interval=2, freeze=1, rest="freeze"), steps=3)]


def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_file(step):
    """When half of the adapter's file of this checkpoint is there."""
    real = checkpoint.save_file

    def torn(tensors, path):
        real(tensors, path)
        if f"checkpoint-{step}" in str(path):
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size // 2)
            kill()

    checkpoint.save_file = torn


def before_the_rename(step):
    real = atomic._swap

    def torn(fresh, target):
        if f"checkpoint-{step}" in str(target):
            kill()
        real(fresh, target)

    atomic._swap = torn


def half_way_into_the_next_phase(step):
    """The old adapters are folded, the first weight has given its part to the new one."""
    real = rs.SwitchLoRA.start

    def torn(self, adapter, key, found=None):
        real(self, adapter, key, found)
        kill()

    rs.SwitchLoRA.start = torn


def between_the_phases(step):
    Placement.build, real = (
        lambda self, name, method, *rest, **more: (
            kill() if isinstance(method, rs.SwitchLoRA) else real(self, name, method, *rest, **more)
        ),
        Placement.build,
    )


def doomed(out, doom, step):
    doom(step)
    trainer(out, rs.PaCA(rank=2), rest={"then": THEN}).train()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    t = trainer(tmp_path_factory.mktemp("whole"), rs.PaCA(rank=2), rest={"then": THEN}, save_strategy="no")
    t.train()
    return t


@pytest.mark.parametrize(
    ("doom", "step"),
    [(in_a_file, 2), (before_the_rename, 5), (between_the_phases, 3), (half_way_into_the_next_phase, 3)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_killed_while_saving_or_shifting(tmp_path, whole, doom, step):
    child = multiprocessing.get_context("fork").Process(target=doomed, args=(tmp_path, doom, step))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    began = Began()
    resumed = trainer(tmp_path, rs.PaCA(rank=2), [began], rest={"then": THEN})
    resumed.train(resume_from_checkpoint=True)
    assert began.step == step - 1  # the last that is complete
    assert [p.method["method"] for p in resumed.run.phases] == ["paca", "switchlora"]
    assert losses(resumed) == losses(whole)
    assert same(tensors(resumed.run), tensors(whole.run))
    assert same(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))
