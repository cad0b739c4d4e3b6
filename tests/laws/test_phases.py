"""Phases: Full → LoRA → Full and their like, exact at every step; and what shift() and the next optimizer promise."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import replace

import pytest
import torch

import rankshift as rs
from laws import laws
from laws.cases import Case
from laws.pool import Pool
from laws.pulse import Pulse, registered
from laws.world import Engine, Session, batch, begin, evaluate, gap, loss_of, same, tiny
from rankshift.core.method import Method
from rankshift.core.phase import Phase
from rankshift.methods import AdaRankGrad, Full, GaLore, LoRA, ReLoRA, SoRA

SORA = SoRA(rank=4, alpha=8, sparsity=(20, 30), gate_init="normal")  # 22 of 28 ranks are left for the second stage
ROUTES: dict[str, list[Method]] = {
    "full-lora-full": [Full(), LoRA(rank=4, alpha=8), Full()],
    "lora-pissa-dora": [LoRA(rank=2), LoRA(rank=3, init="pissa"), LoRA(rank=2, dora=True)],
    "pulse-full-pulse": [Pulse(rank=2, every=2), Full(targets=("blocks.0",)), Pulse(rank=3, every=1)],
    "extras-lora": [
        LoRA(rank=2, bias="lora_only", modules_to_save=("head", "norm2"), targets=("q", "up")),
        LoRA(rank=2, lora_bias=True, targets=("q", "up")),
        Full(targets=("head", "up")),
    ],
    "sora-stages-lora": [SORA, replace(SORA, stage=1), LoRA(rank=2)],
    "full-relora-lora": [Full(), ReLoRA(rank=3, every=1, targets=("q", "up")), LoRA(rank=2)],
    "lora-galore-lora": [LoRA(rank=2), GaLore(rank=3, every=1, rounding="stochastic"), LoRA(rank=2)],
    "galore-adarankgrad-galore": [
        GaLore(rank=4, every=2, rest="freeze"),
        AdaRankGrad(rank=6, every=1, earliest=1),
        GaLore(rank=2, every=1, side="in", gradient="projected"),
    ],
}
routes = pytest.mark.parametrize("methods", [pytest.param(m, id=name) for name, m in ROUTES.items()])


@routes
def test_resume_at_every_step_of_three_phases(methods: list[Method]) -> None:
    laws.resume_phases(methods, "one")


def test_resume_across_phases_under_ddp(pool: Pool) -> None:
    pool.run(laws.resume_phases, ROUTES["full-lora-full"], "ddp", each=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # float64: test_shift.py
@pytest.mark.parametrize("to", [Full(), LoRA(rank=2), GaLore(rank=2)], ids=["full", "lora", "galore"])
def test_shift_preserves_the_function(to: Method, dtype: torch.dtype) -> None:
    every = (
        Full(),
        LoRA(rank=4, alpha=8),
        LoRA(rank=4, dora=True),
        ROUTES["extras-lora"][0],
        Pulse(rank=2),
        SORA,
        GaLore(rank=2, rounding="nearest"),
    )
    for method in every:
        laws.preserve_shift(Case("shift", method), to, dtype)


def sharded_route(methods: list[Method], each: int) -> dict[str, torch.Tensor]:
    """A change of phase under FSDP2: whole state on every rank, a fresh model, shift, shard again."""
    with registered(*methods):
        session = begin("fsdp2", methods[0], torch.float64).steps(each)
        for method in methods[1:]:
            before = evaluate(session.model)
            with pytest.raises(rs.errors.AttachError, match="sharded already"):
                session.run.shift(method)
            if session.run.method.reversible:
                with pytest.raises(rs.errors.AttachError, match=r"sharded already|goes through phases"):
                    session.run.add("second", LoRA(rank=2))
            run = rs.restore(tiny(torch.float64), session.run.state_dict()).shift(method)
            session = Session("fsdp2", run)
            assert gap(evaluate(session.model), before) <= laws.MERGED[torch.float64]
            session.steps(each)
        state = session.state(whole=True)
        laws.agree(state)
        return state


@pytest.mark.parametrize(
    "route", ["full-lora-full", "sora-stages-lora", "lora-galore-lora", "galore-adarankgrad-galore"]
)
def test_phases_under_fsdp2_are_those_of_one_process(route: str, pool: Pool) -> None:
    methods = ROUTES[route]
    session = begin("one", methods[0], torch.float64).steps(2)
    for method in methods[1:]:  # by the way of a resume, which takes no moments along
        session = Session("one", rs.restore(tiny(torch.float64), session.run.state_dict()).shift(method)).steps(2)
    sharded = pool.run(sharded_route, methods, 2)
    same(sharded[0], session.state(whole=True), laws.RANKS, "phases under FSDP2")


@pytest.mark.parametrize("order", list(itertools.permutations(("model", "run", "optimizer"))), ids="-".join)
@pytest.mark.parametrize(
    "method",
    [LoRA(rank=3, init="pissa", bias="lora_only"), Full(), Pulse(rank=3), AdaRankGrad(rank=6, every=2, earliest=1)],
    ids=lambda m: m.name,
)
def test_state_may_be_loaded_in_any_order_over_any_weights(method: Method, order: tuple[str, ...]) -> None:
    """model.load_state_dict, run.load_state_dict and optimizer.load_state_dict, on a model with other weights."""
    with registered(method):
        session = begin("one", method).steps(2)
        buffer = io.BytesIO()
        parts = {"model": session.model, "run": session.run, "optimizer": session.optimizer}
        torch.save({name: part.state_dict() for name, part in parts.items()}, buffer)
        saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
        again = begin("one", method, base_seed=5)
        parts = {"model": again.model, "run": again.run, "optimizer": again.optimizer}
        for name in order:
            parts[name].load_state_dict(saved[name])
        again.scheduler.load_state_dict(session.scheduler.state_dict())
        same(session.steps(3).state(), again.steps(3).state(), what=str(order))


def test_a_phase_that_is_none_is_refused() -> None:
    phase = Phase(rs.to_dict(LoRA(rank=2)), 0).ended(3)
    assert Phase.from_mapping(json.loads(json.dumps(phase.to_mapping()))) == phase
    for wrong in ({}, {"method": None, "start": 0, "stop": None}, {"method": {}, "start": None, "stop": None}):
        with pytest.raises(rs.errors.ConfigError, match="not a phase"):
            Phase.from_mapping(wrong)


def test_an_optimizer_of_an_ended_phase_refuses_to_step() -> None:
    session = begin("one", LoRA(rank=2)).steps(1)
    run = session.run.shift(Full())
    with pytest.raises(rs.errors.AttachError, match="no longer drives a run"):
        session.optimizer.step()
    with pytest.raises(rs.errors.AttachError, match="ended with shift"):
        session.run.optimizer()
    assert [(p.method["method"], p.start, p.stop) for p in run.phases] == [("lora", 0, 1), ("full", 1, None)]
    assert run.step == 1


def test_the_clock_goes_on_across_phases_and_a_new_optimizer() -> None:
    session = begin("one", LoRA(rank=2)).steps(2)
    session = Session("one", session.run.shift(Full())).steps(1)
    assert session.run.step == 3
    again = session.run.optimizer()
    loss_of(session.model, batch(3)).backward()
    again.step()
    assert session.run.step == 4
    with pytest.raises(rs.errors.ConfigError, match=r"rs\.LoRA"):
        session.run.shift("lora")  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["one", "ddp", "fsdp2"])
def test_a_fold_is_known_to_the_run_and_saved(engine: Engine, pool: Pool) -> None:
    if engine == "one":
        fold_is_saved(engine)
    else:
        pool.run(fold_is_saved, engine)


def fold_is_saved(engine: Engine) -> None:
    method = Pulse(rank=2, every=2, targets=("q", "embed"))
    with registered(method):
        session = begin(engine, method)
        session.step()
        assert session.run.changed == set()
        assert not any(name.startswith("base/") for name in session.run.state_dict()["tensors"])
        with session.run.merged():
            assert "embed.weight" in session.run.changed
        assert session.run.changed == set(), "merged() leaves no mark"
        session.step()
        folded = {"embed.weight", "blocks.0.q.weight"}
        assert session.run.changed == folded
        state = session.run.state_dict()
        assert {name for name in state["tensors"] if name.startswith("base/")} == {f"base/{name}" for name in folded}
        assert int(state["tensors"]["default/embed.folds"]) == 1
        fresh = rs.restore(tiny(), state)
        assert fresh.changed == folded
        assert gap(evaluate(fresh.model), evaluate(session.model)) < 1e-5
