"""Every law, for every case, under every engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from laws import laws
from laws.cases import CASES, Case, rows
from laws.pool import Pool
from laws.pulse import Pulse, registered
from laws.world import Engine
from rankshift.core.method import methods
from rankshift.methods import LoRA

PULSE = (
    Case("pulse", Pulse(rank=4, alpha=8)),
    Case(
        "pulse-off",
        Pulse(rank=4, alpha=8, amplitude=0.0, portion=0.0, every=float("inf")),
        off=LoRA(rank=4, alpha=8),
    ),
)
SWELL = Case("pulse-swell", Pulse(rank=4, alpha=8, every=float("inf")))  # with a scale that the step says
EVERY = [*rows(), PULSE[0]]
FIRST = [row[0] for row in CASES.values()] + [PULSE[0]]


def hold(law: Callable[..., Any], case: Case, engine: Engine, pool: Pool | None = None, **options: Any) -> Any:
    """Check a law here, or on two ranks; what it hands back (here)."""
    if engine == "one":
        return held(law, case, engine, **options)
    assert pool is not None
    return pool.run(held, law, case, engine, **options)


def held(law: Callable[..., Any], case: Case, engine: Engine, **options: Any) -> Any:
    with registered(case.method):
        return law(case, engine, **options)


Refuse = Callable[[str, object], None]  # record_property("refused", {column of the capability table: why})


def cases(*wanted: Case) -> Any:
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.label) for case in wanted])


def everywhere(*wanted: Case, one: bool = True) -> Any:
    """Cases × engines; what a case claims for one process only stays there."""
    pairs = [(case, "one") for case in wanted if one]
    pairs += [(case, engine) for case in wanted if not case.alone for engine in ("ddp", "fsdp2")]
    return pytest.mark.parametrize(
        ("case", "engine"), [pytest.param(case, engine, id=f"{case.label}-{engine}") for case, engine in pairs]
    )


def test_every_registered_method_has_a_row() -> None:
    assert set(methods()) == set(CASES), "give each registered method a row in tests/laws/cases.py"
    for name, row in CASES.items():
        assert row, f"{name} has an empty row"
        assert all(case.method.name == name for case in row)


@pytest.mark.capability("resume")
@cases(*EVERY)
def test_resume_at_every_step(case: Case) -> None:
    hold(laws.resume, case, "one")


@pytest.mark.capability("accumulation")
@cases(*FIRST)
def test_resume_at_every_step_of_accumulated_gradients(case: Case) -> None:
    hold(laws.resume, case, "one", accumulate=2)


@everywhere(*EVERY, one=False)
def test_resume_on_two_ranks(case: Case, engine: Engine, pool: Pool) -> None:
    first = case in FIRST
    hold(laws.resume, case, engine, pool, ks=(0, 2) if first else (2,), accumulate=2 if first else 1)


@everywhere(*EVERY, one=False)
def test_two_ranks_are_one_process(case: Case, engine: Engine, pool: Pool) -> None:
    hold(laws.ranks, case, engine, pool)


@pytest.mark.capability("merge")
@everywhere(*EVERY)
def test_rewriting_the_base_preserves_the_function(case: Case, engine: Engine, pool: Pool) -> None:
    hold(laws.preserve, case, engine, pool)


@pytest.mark.capability("merge")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@cases(*EVERY)
def test_merging_in_lower_precision(case: Case, dtype: torch.dtype) -> None:
    if dtype is torch.bfloat16 and not case.narrow:
        hold(laws.too_narrow, case, "one", dtype=dtype)
        return
    hold(laws.preserve, case, "one", dtype=dtype)


@everywhere(*[case for case in [*EVERY, PULSE[1]] if case.off is not None])
def test_dose_zero_is_the_parent(case: Case, engine: Engine, pool: Pool) -> None:
    hold(laws.off, case, engine, pool)


@everywhere(*EVERY)
def test_quiet(case: Case, engine: Engine, pool: Pool) -> None:
    hold(laws.quiet, case, engine, pool)


@everywhere(*EVERY)
def test_state_stays_in_place(case: Case, engine: Engine, pool: Pool) -> None:
    hold(laws.in_place, case, engine, pool)


@everywhere(*EVERY)
def test_everything_that_trains_learns(case: Case, engine: Engine, pool: Pool) -> None:
    hold(laws.gradients, case, engine, pool)


@cases(*EVERY)
def test_shapes_follow_from_saved_integers(case: Case) -> None:
    hold(laws.shapes, case, "one")


@cases(*[case for case in EVERY if case.identity is not None])
def test_attaching_does_not_change_the_function(case: Case) -> None:
    hold(laws.identity, case, "one")


@pytest.mark.capability("Linear", "Conv1D", "Conv", "Embedding", "experts")
@cases(*EVERY)
def test_forward_is_the_dense_delta(case: Case, record_property: Refuse) -> None:
    record_property("refused", hold(laws.delta, case, "one"))


@cases(*EVERY)
def test_a_saved_directory_is_the_run(case: Case) -> None:
    hold(laws.roundtrip, case, "one")


@cases(*EVERY)
def test_an_exported_directory_is_the_function(case: Case) -> None:
    hold(laws.exported, case, "one")


@pytest.mark.capability("exact LoRA export")
@cases(*EVERY)
def test_an_exported_plain_lora_is_the_function(case: Case, record_property: Refuse) -> None:
    if why := hold(laws.portable, case, "one"):
        record_property("refused", {"exact LoRA export": why})


@pytest.mark.capability("multi-adapter")
@cases(*EVERY, SWELL)
def test_two_adapters(case: Case, record_property: Refuse) -> None:
    if why := hold(laws.several, case, "one"):
        record_property("refused", {"multi-adapter": why})


@cases(*FIRST)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_other_quantised_bases(case: Case, kind: str) -> None:
    hold(laws.quantised, case, "one", kind=kind)


@pytest.mark.capability("quantised base")
@everywhere(*EVERY)
def test_a_quantised_base(case: Case, engine: Engine, pool: Pool, record_property: Refuse) -> None:
    if why := hold(laws.quantised, case, engine, pool):
        record_property("refused", {"quantised base": why})


@cases(*[case for case in EVERY if case.kept is not None])
def test_bytes_kept_for_backward(case: Case) -> None:
    hold(laws.memory, case, "one")
