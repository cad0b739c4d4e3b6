"""What a phase's end is seen by, and PreLoRA's three stages, on two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rankshift as rs
from laws.pool import Pool
from laws.world import Session, begin, same, tiny
from rankshift.core import shard
from rankshift.methods import LoRA, PreLoRA

D = torch.float64
METHOD = PreLoRA(
    then=LoRA(rank=4, alpha=6), exclude=("head",), window=2, windows=2, joint=2, min_rank=1, max_rank=8,
    weight_change=10**9, loss_change=10**9,
)  # fmt: skip


def through(engine: Any, updates: int, way: str) -> tuple[Session, list[Any]]:
    """A session after so many updates, and the snapshots by which stages ended."""
    session, seen = begin(engine, METHOD, D, blocks=2, total=None), []
    for _ in range(updates):
        due = session.run.due()
        if due is not None:
            seen += [] if session.run.watch is None else [s.to_mapping() for s in session.run.watch.snapshots]
            if engine == "fsdp2":
                with pytest.raises(rs.errors.AttachError, match="sharded already"):
                    session.run.shift(due)
            run = session.run if way == "shift" else rs.restore(tiny(D, blocks=2), session.run.state_dict())
            session = Session(engine, run.shift(due))
        session.step()
    return session, seen


def ended(engine: Any, way: str) -> dict[str, Any]:
    session, seen = through(engine, 9, way)
    sharded = {shard.is_sharded(p) for p in session.model.parameters()}
    assert sharded == {engine == "fsdp2"}
    return {"state": session.state(whole=True), "seen": seen, "phases": [p.to_mapping() for p in session.run.phases]}


@pytest.mark.parametrize(("engine", "way"), [("ddp", "shift"), ("fsdp2", "resume")])
def test_all_stages_on_two_ranks_are_those_of_one_process(engine: str, way: str, pool: Pool) -> None:
    """Under DDP the wrapper is made anew after each change; FSDP2 cannot be taken off, so a resume begins a stage,
    without moments. Weights are seen whole: norms of halves are smaller."""
    first, second = pool.run(ended, engine, way)
    one = ended("one", way)
    assert first["phases"] == second["phases"]
    assert [(p["start"], p["method"]["stage"]) for p in first["phases"]] == [(0, "full"), (4, "joint"), (6, "frozen")]
    ranks = one["phases"][2]["method"]["ranks"]
    assert first["phases"][2]["method"]["ranks"] == ranks
    assert len(set(ranks.values())) > 1
    assert first["seen"] == second["seen"]
    for mine, wanted in zip(first["seen"], one["seen"], strict=True):
        assert mine["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        assert mine["norms"] == pytest.approx(wanted["norms"], rel=1e-12)
    same(first["state"], one["state"], 1e-9, what=f"{engine} and one process")
    if engine == "ddp":
        same(first["state"], second["state"], what="two ranks")


def resumed() -> tuple[list[Any], list[Any]]:
    """Snapshots of a run, and of one that was saved in the middle of the second window and loaded on both ranks."""
    found = []
    for stop in (4, 3):
        session, _ = through("ddp", stop, "shift")
        if stop == 3:
            session = Session.load(session.save(), "ddp", tiny(D, blocks=2)).steps(1)
        assert session.run.watch is not None
        found.append([s.to_mapping() for s in session.run.watch.snapshots])
    return found[0], found[1]


def test_what_was_heard_of_a_window_counts_once_for_all_ranks(pool: Pool) -> None:
    for whole, again in pool.run(resumed):
        assert [s["step"] for s in whole] == [2, 4]
        assert whole == again


def unwrapped() -> str:
    """A wrapper of the phase before knows nothing of the factors."""
    session, _ = through("ddp", 4, "shift")
    wrapped, run = session.wrapped, session.run.shift(session.run.due())
    session = Session("one", run)
    session.engine, session.wrapped = "ddp", wrapped
    with pytest.raises(rs.errors.RankshiftError) as error:
        session.step()
    return str(error.value)


def test_a_wrapper_of_the_stage_before_is_found_out(pool: Pool) -> None:
    for text in pool.run(unwrapped):
        assert "differs between ranks: nothing averages it" in text
