"""Killed at any point, a run goes on from its last checkpoint bit for bit; an error in attach or shift leaves nothing
half-done."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import hashlib
import inspect
import io
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankshift as rs
from laws.cases import CASES, Case, rows
from laws.world import Session, begin, evaluate, gap, same, scramble, tiny
from rankshift.core import shard
from rankshift.core.base import Dense
from rankshift.core.event import Event, Tick
from rankshift.core.site import Replica, Site, Stack
from rankshift.io import atomic, checkpoint
from rankshift.methods import LoRA, SoRA
from rankshift.placement import Placement, fold

TOTAL, SAVED, SHIFT = 8, 2, 4  # updates that a run says it will take; when it is saved, and goes on with another method
NEXT = LoRA(rank=2, alpha=4)
FIRST = [cases[0] for cases in CASES.values()]


class Killed(BaseException):
    """Like a signal, no error that anybody handles."""


# ---- where a process may die


@dataclass(frozen=True)
class Torn:
    """An event that dies half way through its layers."""

    event: Event

    @property
    def moment(self) -> Any:
        return self.event.moment

    @property
    def steps(self) -> bool:
        return getattr(self.event, "steps", False)

    def due(self, tick: Tick) -> bool:
        return self.event.due(tick)

    def apply_all(self, adapters: Any, tick: Tick) -> None:
        half = adapters[: (len(adapters) + 1) // 2]
        if hasattr(self.event, "apply_all"):
            self.event.apply_all(half, tick)
        else:
            for adapter in half:
                self.event.apply(adapter, tick)
        raise Killed


Doom = Callable[[Session, pytest.MonkeyPatch], None]


def die(*args: object, **kwargs: object) -> None:
    raise Killed


def before_forward(session: Session, patch: pytest.MonkeyPatch) -> None:
    session.model.register_forward_pre_hook(die)


def after_backward(session: Session, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("torch.nn.utils.clip_grad_norm_", die)


def in_event(index: int) -> Doom:
    def doom(session: Session, patch: pytest.MonkeyPatch) -> None:
        driver, real = session.run._driver, session.run._driver.audience
        patch.setattr(
            driver, "audience", lambda: [(Torn(e) if i == index else e, a) for i, (e, a) in enumerate(real())]
        )

    return doom


def in_weight(session: Session, patch: pytest.MonkeyPatch) -> None:
    real = Dense._add

    def torn(self: Dense, delta: Any) -> None:
        part, _ = shard.local(self.weight)
        half, before = len(part) // 2, part.clone()
        real(self, delta)
        part[half:] = before[half:]
        raise Killed

    patch.setattr(Dense, "_add", torn)


def before_update(session: Session, patch: pytest.MonkeyPatch) -> None:
    session.optimizer.register_step_pre_hook(die)


def in_update(session: Session, patch: pytest.MonkeyPatch) -> None:
    optimizer, real = session.optimizer, session.optimizer._advance
    left = sum(len(group["params"]) for group in optimizer.param_groups) // 2

    def torn(parameters: Any, group: Any, transform: Any) -> None:
        nonlocal left
        real(parameters[:left], group, transform)
        left -= len(parameters)
        if left <= 0:
            raise Killed

    patch.setattr(optimizer, "_advance", torn)


def in_file(session: Session, patch: pytest.MonkeyPatch) -> None:
    real = checkpoint.save_file

    def torn(tensors: Any, path: Path) -> None:
        real(tensors, path)
        path.write_bytes(path.read_bytes()[:100])
        uncleared(patch)

    patch.setattr(checkpoint, "save_file", torn)


def at_exchange(session: Session, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(atomic, "_exchange", lambda *names: uncleared(patch))


def uncleared(patch: pytest.MonkeyPatch) -> None:
    """Die, and clear nothing away."""
    patch.setattr(atomic, "_discard", lambda folder: None)
    raise Killed


def half_folded(session: Session, patch: pytest.MonkeyPatch) -> None:
    left = len(session.run.sites) // 2

    def torn(site: Site, onto: Any = None) -> Callable[[], None]:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return fold(site, onto)

    patch.setattr("rankshift.run.fold", torn)


def folded(session: Session, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Placement, "build", die)


def begun(session: Session, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rs.Run, "_look_out", die)


EVERYWHERE = {
    f.__name__: f
    for f in (
        before_forward, after_backward, before_update, in_update, in_file, at_exchange, half_folded, folded, begun,
    )
}  # fmt: skip
WRITES = ("relora", "relora-magnitude", "relora-random", "paca-redraw")  # through Base.add_


def points(case: Case) -> dict[str, Doom]:
    """Where this one may die: everywhere, or in what it has beside the first of its method."""
    found = dict(EVERYWHERE) if case in FIRST else {}
    if not case.method.sites(tiny()):  # nothing to fold
        found.pop("half_folded", None)
    found |= {f"event {i}": in_event(i) for i in range(len(case.method.events()))}
    return found | ({"in_weight": in_weight} if case.label in WRITES else {})


# ---- what is on disk, and who goes on from it


def write(session: Session, folder: Path) -> None:
    session.run.save(folder / "run")
    state = {"optimizer": session.optimizer.state_dict(), "scheduler": session.scheduler.state_dict()}
    torch.save(state, folder / "optimizer.pt")


def go_on(folder: Path, case: Case) -> Session:
    """A new process."""
    scramble()
    run = rs.load(tiny(), folder / "run")
    session = Session("one", run, noisy=case.noisy)
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    session.optimizer.load_state_dict(state["optimizer"])
    session.scheduler.load_state_dict(state["scheduler"])
    return session


def finish(session: Session, case: Case, folder: Path | None = None) -> Session:
    """To the end: updates, a checkpoint where one is asked for, the next method, an update."""
    session.steps(SHIFT - session.run.step)
    if folder is not None:
        write(session, folder)
    return Session("one", session.run.shift(NEXT)).steps(1)


def digest(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file() and ".rankshift-partial" not in str(file)]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@functools.cache
def straight(label: str) -> tuple[Path, Case, dict[str, Tensor]]:
    """A checkpoint, and where the uninterrupted run that wrote it ended."""
    (case,) = [case for case in rows() if case.label == label]
    folder = Path(tempfile.mkdtemp(prefix="rankshift-killed-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    session = begin("one", case.method, total=TOTAL, noisy=case.noisy).steps(SAVED)
    write(session, folder)
    return folder, case, finish(session, case).state()


VICTIMS = [case for case in rows() if case in FIRST or not case.alone]


@pytest.mark.parametrize(
    ("label", "point"), [pytest.param(case.label, p, id=f"{case.label}-{p}") for case in VICTIMS for p in points(case)]
)
def test_killed_at_any_point_it_goes_on_bit_for_bit(label: str, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(*straight(label), point, monkeypatch)


def killed(folder: Path, case: Case, end: dict[str, Tensor], point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The law."""
    before = digest(folder)
    with monkeypatch.context() as patch:
        doomed = go_on(folder, case)
        points(case)[point](doomed, patch)
        with pytest.raises(Killed):
            finish(doomed, case, folder if point in ("in_file", "at_exchange") else None)
    assert digest(folder) == before, "the checkpoint was touched"
    same(end, finish(go_on(folder, case), case).state(), what=f"killed {point}")
    assert digest(folder) == before, "the checkpoint was touched by who goes on from it"


@pytest.mark.parametrize("case", [pytest.param(case, id=case.label) for case in FIRST])
def test_a_state_that_was_loaded_can_be_loaded_again(case: Case) -> None:
    loaded_again(case)


def loaded_again(case: Case) -> None:
    """What is restored shares no memory with what it was restored from."""
    session = begin("one", case.method, total=TOTAL, noisy=case.noisy).steps(SAVED)
    state = torch.load(io.BytesIO(session.save()), weights_only=True)
    ends = []
    for _ in range(2):
        again = Session("one", rs.restore(tiny(), state["run"]), noisy=case.noisy)
        again.optimizer.load_state_dict(state["optimizer"])
        ends.append(again.steps(2).state())
    same(ends[0], ends[1], what="loaded again")


# ---- errors, after which somebody goes on


def calls(what: Callable[[], Any], fail_at: int = -1) -> int:
    """How many functions of the library ``what()`` calls; the one of this number raises as it is called."""
    count = 0

    def trace(frame: Any, event: str, arg: object) -> None:
        nonlocal count
        code = frame.f_code
        if "/rankshift/" in code.co_filename and not code.co_flags & inspect.CO_GENERATOR:  # which may be being closed
            count += 1
            if count == fail_at:
                raise MemoryError  # which ends the trace: what clears up is not disturbed

    before = sys.gettrace()
    gc.disable()  # what it calls cannot raise
    sys.settrace(trace)
    try:
        what()
    finally:
        sys.settrace(before)
        gc.enable()
    return count


def spread(number: int, count: int) -> Iterator[int]:
    """So many numbers up to a number, the last ones among them."""
    yield from sorted({number - 1, number, *(1 + number * i // count for i in range(count))})


def looked_at(model: nn.Module) -> dict[str, Any]:
    """All that attaching could leave behind."""
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)],
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)],
        "bits": [p.detach().clone().numpy().tobytes() for p in model.parameters()],
        "gradients": [None if p.grad is None else id(p.grad) for p in model.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "training": [m.training for m in model.modules()],
    }


@pytest.mark.parametrize("case", [pytest.param(case, id=case.label) for case in rows() if not case.alone])
def test_an_attach_that_fails_anywhere_leaves_the_model_as_it_was(case: Case) -> None:
    undone(case)


def undone(case: Case) -> None:
    """The law."""
    model = tiny()
    for one in (warm := tiny(), counted := tiny(), model):
        one.head.weight.requires_grad_(False)
    rs.attach(warm, case.method, total_steps=TOTAL)  # from now on caches are warm
    number = calls(lambda: rs.attach(counted, case.method, total_steps=TOTAL))
    model(torch.zeros(1, 2, dtype=torch.int64)).sum().backward()
    before = looked_at(model)
    for at in spread(number, 6):
        with pytest.raises(MemoryError):
            calls(lambda: rs.attach(model, case.method, total_steps=TOTAL), at)
        after = looked_at(model)
        for key, value in before.items():
            assert after[key] == value, f"{key} after an error in call {at} of {number}"
    model.head.weight.requires_grad_(True)
    model.zero_grad()
    run = rs.attach(model, case.method, total_steps=TOTAL)
    fresh = rs.attach(tiny(), case.method, total_steps=TOTAL)
    a, b = (Session("one", r, noisy=case.noisy).steps(1).state() for r in (run, fresh))
    same(a, b, what="attached after errors")


def plain(model: nn.Module) -> bool:
    return not any(isinstance(module, (Site, Replica, Stack)) for module in model.modules())


ONWARD = [
    *((case, after) for case, after in zip(FIRST, [*FIRST[5:], *FIRST[:5]], strict=True)),
    (CASES["lora"][2], FIRST[0]),
    (CASES["paca"][1], CASES["switchlora"][0]),
    (CASES["switchlora"][0], CASES["paca"][0]),
    *(
        (case, replace(case, method=replace(case.method, stage=1)))
        for case in [
            Case("sora", SoRA(rank=4, alpha=8, sparsity=(12, 20), gate_init="normal")),
        ]
    ),
    (CASES["prelora"][1], CASES["prelora"][2]),
]


@pytest.mark.parametrize(("before", "after"), [pytest.param(a, b, id=f"{a.label}-{b.label}") for a, b in ONWARD])
def test_a_shift_that_fails_anywhere_leaves_the_run_or_a_plain_merged_model(before: Case, after: Case) -> None:
    """The old run, as if nobody had asked, or a plain model with the function of before; and an error that says so."""
    options: dict[str, Any] = {"total": TOTAL, "noisy": before.noisy}
    saved = begin("one", before.method, **options).steps(SAVED).save()

    def again() -> Session:
        return Session.load(saved, "one", tiny(), noisy=before.noisy)

    again().run.shift(after.method)  # from now on caches are warm
    counted = again()
    number = calls(lambda: counted.run.shift(after.method))
    end, seen = None, set()
    for at in spread(number, 5):
        session = again()
        run, model, trained = session.run, session.model, evaluate(session.model)
        with pytest.raises(MemoryError) as error:
            calls(lambda: run.shift(after.method), at)  # noqa: B023
        where = f"after an error in call {at} of {number}"
        seen.add(run._closed)
        if not run._closed:
            assert torch.equal(evaluate(model), trained), where
            end = end or again().steps(1).state()
            same(end, session.steps(1).state(), what=where)
            continue
        assert "merged into its weights" in "".join(error.value.__notes__)
        assert plain(model), where
        assert gap(evaluate(model), trained) <= 2e-5, where
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules()), where
        for verb in (run.merge, run.state_dict, run.optimizer, lambda: run.shift(NEXT)):  # noqa: B023
            with pytest.raises(rs.errors.AttachError, match=r"shift\(\), which failed half way"):
                verb()
        with pytest.raises(rs.errors.AttachError, match="no longer drives"):
            session.optimizer.step()
        Session("one", rs.attach(model, NEXT)).steps(1)
    assert seen == {"", "shift(), which failed half way"}, seen


def test_a_merge_that_was_interrupted_can_only_be_called_again(monkeypatch: pytest.MonkeyPatch) -> None:
    session = begin("one", CASES["pc-lora"][0].method, total=TOTAL).steps(2)
    run, trained = session.run, evaluate(session.model)
    with monkeypatch.context() as patch:
        half_folded(session, patch)
        with pytest.raises(Killed):
            run.merge()
    assert gap(evaluate(run.model), trained) <= 2e-5
    for verb in (run.state_dict, run.optimizer, run.detach, lambda: run.shift(NEXT)):
        with pytest.raises(rs.errors.AttachError, match=r"merge\(\) was interrupted"):
            verb()
    with pytest.raises(rs.errors.AttachError, match=r"merge\(\) was interrupted"):
        session.step()
    assert gap(evaluate(run.merge()), trained) <= 2e-5
    assert plain(run.model)


def test_weights_that_were_one_are_one_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    model.head.weight = model.embed.weight
    before = looked_at(model)
    monkeypatch.setattr(rs.Run, "_listen", die)
    with pytest.raises(Killed):
        rs.attach(model, LoRA(rank=2, targets=("embed", "q"), tied="untie"))
    assert looked_at(model) == before
    assert model.head.weight is model.embed.weight


def test_switchlora_gives_back_what_it_took_from_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model, real, seen = tiny(), Dense._add, []
    before = looked_at(model)

    def torn(self: Dense, delta: Any) -> None:
        real(self, delta)
        seen.append(self.weight)
        if len(seen) == 4:
            raise MemoryError

    monkeypatch.setattr(Dense, "_add", torn)
    with pytest.raises(MemoryError):
        rs.attach(model, CASES["switchlora"][0].method, total_steps=TOTAL)
    assert looked_at(model) == before
    assert len({id(weight) for weight in seen}) == 4


# ---- the laws bite


@contextlib.contextmanager
def in_place(directory: Path, kind: object) -> Iterator[Path]:
    yield directory


def aliased(tensor: Tensor, value: Tensor) -> None:
    tensor.data = value


def test_a_checkpoint_that_is_written_where_the_last_one_is_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, case, end = straight("lora")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(checkpoint, "replacing", in_place)
    with pytest.raises(AssertionError, match="the checkpoint was touched"):
        killed(tmp_path, case, end, "in_file", monkeypatch)


def test_a_checkpoint_that_lacks_a_moment_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, case, end = straight("relora")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    state = torch.load(tmp_path / "optimizer.pt")
    state["optimizer"]["state"][0]["exp_avg"] *= 0
    torch.save(state, tmp_path / "optimizer.pt")
    with pytest.raises(AssertionError, match="killed before_update"):
        killed(tmp_path, case, end, "before_update", monkeypatch)


def test_a_run_that_shares_memory_with_its_checkpoint_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "assign_", aliased)
    with pytest.raises(AssertionError, match="loaded again"):
        loaded_again(CASES["lora"][0])


@pytest.mark.parametrize(
    ("owner", "name", "what", "label"),
    [
        (Placement, "revert", "bits", "switchlora"),
        (rs.Run, "_close", "parameters", "lora"),
        (Placement, "strip", "modules", "galore-projected"),
    ],
)
def test_an_attach_that_leaves_something_behind_is_found(
    owner: type, name: str, what: str, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, lambda self, *rest: None)
    (case,) = [case for case in rows() if case.label == label]
    with pytest.raises((AssertionError, rs.errors.AttachError), match=f"{what}|has a method attached"):
        undone(case)
