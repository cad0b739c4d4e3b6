"""What rewrites the graph around a layer must not change its gradients: checkpointing, compiling, in-place sums."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rankshift as rs
from laws.cases import Case, rows
from laws.faults import Do
from laws.pulse import Pulse, registered
from laws.world import TOTAL, VOCAB, Tiny, batch, gap, loss_of, objective, scramble, tiny
from rankshift.core.adapter import Adapter
from rankshift.core.base import Base
from rankshift.core.event import Event, Moment, Tick
from rankshift.core.method import Method
from rankshift.core.site import Spec
from rankshift.methods.lora import LoRA, LoRALayer

PULSE = Case("pulse", Pulse(rank=3))
EVERY = [*rows(), PULSE]


def cases(wanted: list[Case]) -> Any:
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.label) for case in wanted])


class Small(nn.Module):
    """Little to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, 6), nn.Linear(6, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.up(self.embed(ids)).tanh())


def small() -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small().double().train()


def gradients(model: nn.Module, run: rs.Run, call: nn.Module | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    scramble()  # dropout draws the same numbers on every call
    objective(run, model if call is None else call, batch(3)).backward()
    return {name: p.grad.clone() for name, p in run.trainable() if p.grad is not None}


def train(run: rs.Run, call: nn.Module, steps: int) -> list[float]:
    """Updates from wherever the run stands; the losses."""
    optimizer, losses = run.optimizer(lr=1e-2), []
    for _ in range(steps):
        loss = objective(run, call, batch(run.step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def started(method: Method, model: nn.Module) -> rs.Run:
    """Two updates, so that no factor is zero."""
    run = rs.attach(model, method, total_steps=TOTAL)
    train(run, model, 2)
    return run


class Checkpointed(Tiny):
    """The model with every block recomputed in backward."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(self.norm(x))


@pytest.mark.capability("checkpointing")
@cases(EVERY)
def test_checkpointing_gives_the_same_gradients(case: Case) -> None:
    checkpointing(case.method)


def checkpointing(method: Method) -> None:
    """Gradients where every block is recomputed in backward are those of a plain backward, bit for bit."""
    with registered(method):
        model = tiny(torch.float64).train()
        run = started(method, model)
        plain = gradients(model, run)
        model.__class__ = Checkpointed
        again = gradients(model, run)
        assert plain.keys() == again.keys() == dict(run.trainable()).keys()
        for name in plain:
            assert torch.equal(plain[name], again[name]), f"{name} has another gradient"


@pytest.mark.capability("compile")
@cases([case for case in EVERY if not case.alone])  # compiling takes seconds
def test_compiling_gives_one_graph_for_all_steps_and_the_same_training(case: Case) -> None:
    compiling(case.method, case.graphs)


def compiling(method: Method, graphs: int = 1) -> None:
    """Updates of a compiled model are those of a plain one, to rounding; nothing breaks its graph or makes another,
    but for the ``graphs`` that the case admits."""
    ends = []
    with registered(method), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")  # of torch's own compiler
        for compile_it in (False, True):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            scramble()
            model = tiny(torch.float64).train()
            run = rs.attach(model, method, total_steps=TOTAL)
            call = torch.compile(model, backend="aot_eager", fullgraph=True) if compile_it else model
            losses = train(run, call, TOTAL)
            made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            assert made == (graphs if compile_it else 0), f"{made} graphs were made, not {graphs}"
            assert run.step == TOTAL
            ends.append((losses, run.state_dict()["tensors"]))
    (losses, plain), (compiled_losses, compiled) = ends
    assert max(abs(a - b) for a, b in zip(losses, compiled_losses, strict=True)) < 1e-9, "losses differ"
    for name in plain:
        # AdamW divides by √v: where a gradient is nearly zero its rounding, 1e-17, is what moves the weight
        assert gap(plain[name], compiled[name]) < 1e-9, f"{name} differs by {gap(plain[name], compiled[name]):.3g}"


class Broken(LoRALayer):
    """Its forward branches on a value, which a graph cannot hold."""

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        return A, B if A.any() else -B


class Counted(LoRALayer):
    """Its forward depends on a Python number that is another in every step."""

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        return A, B * self.__dict__.get("gain", 1.0)


def _count(adapter: Adapter, tick: Tick) -> None:
    adapter.__dict__["gain"] = 1.0 + 0.1 * tick.step


class Misread(LoRALayer):
    """Another function under the compiler."""

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        return A, B * (1.5 if torch.compiler.is_compiling() else 1.0)


class Forgetful(LoRALayer):
    """Its forward is another each time it runs, so what backward recomputes is not what ran."""

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        self.__dict__["calls"] = self.__dict__.get("calls", 0) + 1
        return A, B * (1 + 0.01 * (self.__dict__["calls"] % 7))


@dataclass(frozen=True, kw_only=True)
class Fragile(LoRA):
    """LoRA with a layer that compiling or checkpointing finds fault with."""

    layer: str = "Broken"

    def adapt(self, base: Base, spec: Spec, rank: int, shared: Any = None) -> Adapter:
        kind = {k.__name__: k for k in (Broken, Counted, Misread, Forgetful)}[self.layer]
        return kind(base, spec, rank, self.scale_at(spec.name, rank), self)

    def events(self) -> tuple[Event, ...]:
        return (Do(_count, Moment.WINDOW),) if self.layer == "Counted" else ()


@pytest.mark.parametrize(
    ("layer", "error", "says"),
    [
        ("Broken", torch._dynamo.exc.Unsupported, "[Dd]ata-dependent"),
        ("Counted", AssertionError, "graphs were made, not 1"),
        ("Misread", AssertionError, "differ"),
    ],
)
def test_a_layer_that_does_not_compile_is_found(layer: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        compiling(Fragile(rank=3, layer=layer))


def test_a_layer_that_is_recomputed_wrongly_is_found() -> None:
    with pytest.raises(AssertionError, match="another gradient"):
        checkpointing(Fragile(rank=3, layer="Forgetful"))


def test_a_compiled_model_trains_as_a_plain_one() -> None:
    """The clock, the witness of the forward and the events work from inside a compiled model."""
    torch._dynamo.reset()
    method = Pulse(rank=3, every=2)
    ends = []
    with registered(method):
        for compile_it in (False, True):
            scramble()
            model = small()
            run = rs.attach(model, method)
            call = torch.compile(model, backend="aot_eager") if compile_it else model
            optimizer = run.optimizer(lr=1e-2)
            for step in range(5):
                loss_of(call, batch(step)).backward()
                optimizer.step()
                optimizer.zero_grad()
            assert run.step == 5
            ends.append(run.state_dict()["tensors"])
    for name in ends[0]:
        assert gap(ends[0][name], ends[1][name]) < 1e-10, name


def test_the_output_of_a_layer_can_be_changed_in_place() -> None:
    """Models write ``x = self.proj(x); x += residual``."""
    model = nn.Sequential(nn.Linear(4, 5)).double()
    run = rs.attach(model, rs.LoRA(rank=2, init="orthogonal", targets=("0",)))
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(2, 3, 5)
    grads = []
    for in_place in (False, True):
        model.zero_grad()
        y = model(x)
        if in_place:
            y += 1
            y *= weight
        else:
            y = (y + 1) * weight
        y.sum().backward()
        grads.append([p.grad for _, p in run.trainable()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
