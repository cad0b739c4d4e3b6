"""Each law is seen to fail on a fault planted for it. A law that cannot fail proves nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import rankshift as rs
from laws import laws
from laws.cases import Case
from laws.faults import Faulty, FaultyPulse, Unsettled
from laws.pool import Pool
from laws.pulse import registered
from laws.world import Engine
from rankshift import holding
from rankshift.core.base import Dense
from rankshift.core.method import Method
from rankshift.methods import LoRA
from rankshift.storage.four_bit import FourBit
from rankshift.storage.quantised import Held


def verdict(law: Callable[..., None], method: Method, engine: Engine, off: Method | None = None) -> str:
    """What a law says of a method; "" if it finds nothing. Caught on the rank, so that the pool lives on."""
    with registered(method):
        try:
            law(Case("fault", method, off=off), engine)
        except (AssertionError, rs.RankshiftError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


ONE: list[tuple[Callable[..., None], str, str]] = [
    (laws.resume, "remembers in an attribute", "resumed at"),
    (laws.resume, "writes behind the back", "resumed at"),
    (laws.resume, "event draws from torch", "resumed at"),
    (laws.resume, "unsaved buffer", "resumed at"),
    (laws.preserve, "delta is not forward", "merged"),
    (laws.quiet, "event draws from torch", "an update drew from torch"),
    (laws.quiet, "event draws from numpy", "an update drew from numpy"),
    (laws.quiet, "event draws from Python", "an update drew from Python"),
    (laws.quiet, "starts from the global generator", "attach drew from torch"),
    (laws.quiet, "writes behind the back", "run.changed does not say so"),
    (laws.quiet, "flips what trains", "set of parameters"),
    (laws.quiet, "adds a parameter", "set of parameters"),
    (laws.in_place, "adds a key", "not what init made"),
    (laws.in_place, "replaces a moment", "moved in memory"),
    (laws.in_place, "replaces data", "moved in memory"),
    (laws.in_place, "transform invents a key", "not what init made"),
    (laws.shapes, "shape from elsewhere", "WrongBase"),
    (laws.shapes, "rank that JSON does not know", "int64"),
    (laws.shapes, "unsaved buffer", "another function"),
    (laws.roundtrip, "unsaved buffer", "another function"),
    (laws.exported, "louder than its factors", "another function"),
    (laws.identity, "starts elsewhere", "attaching changes"),
    (laws.delta, "delta is not forward", "forward is not W"),
    (laws.delta, "rows of delta", "rows of ΔW"),
    (laws.delta, "low_rank is not delta", "low_rank"),
    (laws.delta, "delta of a stack", "experts: forward is not W"),
    (laws.portable, "louder than its factors", "the plain LoRA is another function"),
    (laws.several, "stays in the base", "changes the"),
    (laws.several, "delta is not forward", "both are not W"),
    (laws.several, "unsaved buffer", "two adapters restored"),
    (laws.memory, "keeps more", "bytes kept"),
    (laws.gradients, "deaf", "NoGradient"),
]


@pytest.mark.parametrize(("law", "fault", "says"), [pytest.param(*c, id=f"{c[0].__name__}: {c[1]}") for c in ONE])
def test_a_law_bites(law: Callable[..., None], fault: str, says: str) -> None:
    try:
        text = verdict(law, Faulty(fault=fault), "one")
    except TypeError as error:  # json.dumps of what is no JSON
        text = str(error)
    assert says in text


def test_the_laws_hold_for_the_same_method_without_a_fault() -> None:
    for law in (laws.resume, laws.preserve, laws.quiet, laws.in_place, laws.shapes, laws.delta, laws.memory):
        assert verdict(law, Faulty(), "one") == "", law.__name__


def test_an_event_that_folds_and_forgets_is_found() -> None:
    assert "changes W + ΔW" in verdict(laws.preserve, FaultyPulse(forget=True), "one")
    assert verdict(laws.preserve, FaultyPulse(), "one") == ""


@pytest.mark.parametrize(
    ("fault", "fixed", "adaptive"),
    [
        ("", "", ""),
        ("moves at every renewal", "moved in memory", "moved in memory"),
        ("another shape", "not what init made", "not what init made"),
        ("keeps what it freed", "", "more memory than it fills"),
    ],
)
def test_a_subspace_that_is_not_where_it_was_is_found(fault: str, fixed: str, adaptive: str) -> None:
    for energy, says in ((None, fixed), (0.9, adaptive)):
        text = verdict(laws.in_place, Unsettled(rank=6, fault=fault, energy=energy), "one")
        assert says in text
        assert bool(says) == bool(text), text


def test_a_dose_that_is_not_zero_is_found() -> None:
    parent = LoRA(rank=4, alpha=8)
    silent: dict[str, Any] = {"amplitude": 0.0, "portion": 0.0, "every": float("inf")}
    assert verdict(laws.off, FaultyPulse(**silent), "one", parent) == ""
    assert "differ" in verdict(laws.off, FaultyPulse(**silent, residue=1.0), "one", parent)


def test_changes_that_are_no_sum_are_found() -> None:
    assert "both are not W" in verdict(laws.several, LoRA(rank=4, dora=True), "one")


def test_a_quantised_base_that_is_another_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    method = LoRA(rank=4)
    with monkeypatch.context() as broken:
        whole = FourBit.quantised.__func__  # type: ignore[attr-defined]
        broken.setattr(FourBit, "quantised", classmethod(lambda cls, w, kind, **o: whole(cls, 1.1 * w, kind, **o)))
        assert "not what bitsandbytes makes of it" in verdict(laws.quantised, method, "one")
    with monkeypatch.context() as broken:
        broken.setattr(Held, "plainly", lambda base: Dense(base.dequantised(1.1 * base.dense()), base.form))
        assert "merged onto what it was trained on" in verdict(laws.quantised, method, "one")
    with monkeypatch.context() as broken:
        broken.setattr(holding, "release", lambda *_: None)
        assert "is left in the merged model" in verdict(laws.quantised, LoRA(rank=4, targets="up"), "one")
    with monkeypatch.context() as broken:
        broken.setattr(holding, "hold", lambda *_: 0.0)
        assert "nothing is held" in verdict(laws.quantised, method, "one")


def test_codes_that_are_written_behind_the_back_are_found() -> None:
    assert "base.codes differs in its bits" in verdict(laws.quantised, Faulty(fault="writes into the codes"), "one")


PARALLEL: list[tuple[Callable[..., None], Method, str, tuple[Engine, ...]]] = [
    (laws.ranks, Faulty(fault="event draws from torch"), "ranks", ("ddp", "fsdp2")),
    (laws.ranks, Faulty(fault="starts from the global generator"), "ranks", ("ddp", "fsdp2")),
    (laws.ranks, Faulty(fault="thinks its part is all"), "ranks", ("fsdp2",)),
    (laws.resume, Faulty(fault="remembers in an attribute"), "resumed at", ("ddp", "fsdp2")),
    (laws.quiet, Faulty(fault="writes behind the back"), "run.changed", ("fsdp2",)),
    (laws.in_place, Faulty(fault="replaces a moment"), "moved in memory", ("fsdp2",)),
    (laws.preserve, FaultyPulse(forget=True), "changes W + ΔW", ("fsdp2",)),
]


@pytest.mark.parametrize(
    ("law", "method", "says", "engine"),
    [
        pytest.param(law, method, says, engine, id=f"{engine} {law.__name__}: {getattr(method, 'fault', 'forgets')}")
        for law, method, says, engines in PARALLEL
        for engine in engines
    ],
)
def test_a_law_bites_on_two_ranks(
    law: Callable[..., None], method: Method, says: str, engine: Engine, pool: Pool
) -> None:
    texts = pool.run(verdict, law, method, engine)
    assert any(says in text for text in texts), texts
