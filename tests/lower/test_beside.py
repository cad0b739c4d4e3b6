"""Two streams, on a machine that has none: who reads what the other wrote, or writes where it reads, has waited."""

from __future__ import annotations

import contextlib
from typing import Any

import lower_models as models
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rankshift as rs
from rankshift.lower import nodes
from rankshift.lower.beside import Beside

FIRST, SECOND = "first", "second"


class Races(TorchDispatchMode):
    """Every operation in the order in which it is launched, each on the stream that is current.

    A stream knows how far it has seen the other. Of each piece of memory it is known when each stream has touched it
    last; whoever touches what the other has touched must have seen that far. What the second stream reads of the
    first's must be there until the first has seen that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stream = FIRST
        self.time = {FIRST: 0, SECOND: 0}
        self.seen = {FIRST: {FIRST: 0, SECOND: 0}, SECOND: {FIRST: 0, SECOND: 0}}
        self.read: dict[int, dict[str, int]] = {}  # by address: when each stream read there last
        self.wrote: dict[int, tuple[str, int]] = {}  # and who wrote there last, and when
        self.made: dict[int, str] = {}  # and who made it
        self.lent: list[tuple[StorageWeakRef, int]] = []  # what the first made and the second reads, and when
        self.beside = 0  # operations on the second stream
        self.found: list[str] = []

    def sees(self, stream: str, other: str) -> None:
        self.seen[stream][other] = self.time[other]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if all(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            return out  # a view
        here, self.time[self.stream] = self.stream, self.time[self.stream] + 1
        self.beside += here == SECOND
        given = {_place(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        results = {_place(t) for t in tree_leaves(out) if isinstance(t, Tensor)}
        changed = {
            _place(t) for t, a in zip(args, func._schema.arguments, strict=False)
            if isinstance(t, Tensor) and a.alias_info is not None and a.alias_info.is_write
        }  # fmt: skip
        for at in results - given:
            self.made[at], self.read[at] = here, {}
            self.wrote[at] = here, self.time[here]
        if here == SECOND:
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            borrowed = [t.untyped_storage() for t in inputs if self.made.get(_place(t)) != SECOND]
            self.lent += [(StorageWeakRef(storage), self.time[here]) for storage in borrowed]
        elif any(gone.expired() and self.seen[FIRST][SECOND] < when for gone, when in self.lent):
            self.found.append("memory that the second stream reads was let go of")
        for at in given:
            self._after(at, "reads", dict([self.wrote.get(at, (here, 0))]))
            self.read.setdefault(at, {})[here] = self.time[here]
        for at in changed:
            self._after(at, "changes", self._touched(at))
            self.wrote[at] = here, self.time[here]
        return out

    def _touched(self, at: int) -> dict[str, int]:
        who, when = self.wrote.get(at, (FIRST, 0))
        touched = dict(self.read.get(at, {}))
        touched[who] = max(when, touched.get(who, 0))
        return touched

    def _after(self, at: int, what: str, touched: dict[str, int]) -> None:
        here = self.stream
        for other, when in touched.items():
            if other != here and self.seen[here][other] < when:
                self.found.append(f"the {here} stream {what} what the {other} has not done with")


def _place(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch) -> Races:
    races = Races()

    class Raced(Beside):
        def __bool__(self) -> bool:
            return True

        def __enter__(self) -> None:
            races.sees(SECOND, FIRST)
            races.stream = SECOND

        def __exit__(self, *_: object) -> None:
            races.stream = FIRST

        def hold(self, *tensors: Tensor) -> None:
            self._held += tensors

        def wait(self) -> None:
            races.sees(FIRST, SECOND)
            self._held = ()

    monkeypatch.setattr(nodes, "Beside", Raced)
    return races


@pytest.mark.parametrize(
    "method", [rs.LoRA(rank=4), rs.LoRA(rank=40), rs.PaCA(rank=4), rs.VeRA(rank=130), rs.SoRA(rank=4)],
    ids=["lora", "lora of rank 40", "paca", "vera", "sora"],
)  # fmt: skip
@pytest.mark.parametrize("base", [None, "nf4"])
def test_nobody_reads_before_it_is_there(races: Races, method: rs.Method, base: str | None) -> None:
    gradients = []
    for raced in (False, True):
        model = models.llama(dtype=torch.float64, hidden_size=96, intermediate_size=160)
        run = rs.attach(model, method, base=base, total_steps=4)
        models.stir(run)
        run.lower()
        ids = torch.arange(24).view(2, 12) % models.VOCAB
        with pytest.MonkeyPatch.context() as patch, races if raced else contextlib.nullcontext():
            if not raced:
                patch.setattr(nodes, "Beside", Beside)
            model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad for _, p in run.trainable()])
    assert races.beside > 0
    assert races.found == []
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
