"""What rewrites the graph around a layer must not change its gradients: checkpointing, compiling, in-place sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rankshift as rs
from laws.cases import CASES, Case, rows
from laws.pulse import Pulse, registered
from laws.world import VOCAB, Tiny, batch, gap, loss_of, scramble, tiny
from rankshift.core.method import Method

PULSE = Case("pulse", Pulse(rank=3))
SEVERAL = [case for case in rows() if not case.noisy] + [PULSE]
FIRST = [row[0] for row in CASES.values()] + [PULSE]  # compiling takes seconds: one case a method


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
    loss_of(model if call is None else call, batch(3)).backward()
    return {name: p.grad.clone() for name, p in run.trainable() if p.grad is not None}


def started(method: Method, model: nn.Module) -> rs.Run:
    """Two updates, so that no factor is zero."""
    run = rs.attach(model, method)
    optimizer = run.optimizer(lr=1e-2)
    for step in range(2):
        loss_of(model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return run


class Checkpointed(nn.Module):
    """The model with every block recomputed in backward."""

    def __init__(self, model: Tiny):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        x = self.model.embed(ids)
        for block in self.model.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.model.head(self.model.norm(x))


@cases(SEVERAL)
def test_checkpointing_gives_the_same_gradients(case: Case) -> None:
    with registered(case.method):
        model = tiny(torch.float64).train()
        run = started(case.method, model)
        plain = gradients(model, run)
        again = gradients(model, run, Checkpointed(model))
        assert plain.keys() == again.keys() == dict(run.trainable()).keys()
        for name in plain:
            assert torch.equal(plain[name], again[name]), name


@cases(FIRST)
def test_compiling_gives_the_same_gradients_in_one_graph(case: Case) -> None:
    torch._dynamo.reset()
    with registered(case.method):
        model = small()
        run = started(case.method, model)
        plain = gradients(model, run)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        again = gradients(model, run, compiled)
        assert plain.keys() == again.keys()
        for name in plain:
            assert gap(plain[name], again[name]) < 1e-12, name


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
