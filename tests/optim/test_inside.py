"""Adam inside a subspace, on gradients that come projected: a step against the formulas, and what its state knows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rankshift.optim.inside import Inside
from rankshift.optim.moments import Blocks
from rankshift.optim.project import Clock
from rankshift.optim.transform import Hyper

F64 = torch.float64
HYPER = Hyper(lr=1e-2, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
METHOD = Inside(rank=3, scale=0.25, clock=Clock(every=0), side="in")


def seeded(*shape: int, seed: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def written_out(gradients: list[Tensor]) -> Tensor:
    """The last step of Adam on these, times −lr·α."""
    (beta1, beta2), m, v = HYPER.betas, torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0])
    for g in gradients:
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    t = len(gradients)
    return -HYPER.lr * 0.25 * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + HYPER.eps)


@pytest.mark.parametrize("transport", ["none", "reset", "square", "centred"])
def test_a_step_written_out(transport: str) -> None:
    """Tensors that began at different times, and of two dtypes, are stepped together. Weight decay is not for X."""
    method = replace(METHOD, transport=transport)  # type: ignore[arg-type]
    shapes, dtypes, began = [(5, 3), (3, 3), (4, 2), (6, 3)], [F64, torch.float32, F64, F64], [0, 0, 2, 2]
    Xs = [torch.zeros(*shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    states = [method.init(X) for X in Xs]
    seen: list[list[Tensor]] = [[] for _ in Xs]
    for step in range(6):
        here = [i for i, first in enumerate(began) if first <= step]
        gs = [seeded(*shapes[i], seed=10 * step + i, dtype=dtypes[i]) for i in here]
        for i, g in zip(here, gs, strict=True):
            seen[i].append(g.double())
        method.step([Xs[i] for i in here], gs, [states[i] for i in here], HYPER)
        for i in here:
            tolerance = 1e-15 if dtypes[i] == F64 else 1e-8
            assert (Xs[i].double() - written_out(seen[i])).abs().max() < tolerance, (step, i)
            Xs[i].zero_()
    for state, gs in zip(states, seen, strict=True):
        assert int(state["step"]) == len(gs)
        filled = torch.full_like(state["mass"], 1 - HYPER.betas[1] ** len(gs))
        torch.testing.assert_close(state["mass"], filled, rtol=1e-6, atol=0)


def test_moments_that_began_anew_are_corrected_by_their_own_age() -> None:
    X, state = torch.zeros(4, 3, dtype=F64), METHOD.init(torch.zeros(4, 3, dtype=F64))
    state["step"].fill_(7), state["born"].fill_(7)
    gs = [seeded(4, 3, seed=i) for i in range(3)]
    for g in gs:
        METHOD.step([X.zero_()], [g], [state], HYPER)
    torch.testing.assert_close(X, written_out(gs), rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", [METHOD, replace(METHOD, store=Blocks(least=1))], ids=["wide", "blocks"])
def test_columns_without_gradients_stay_zero_and_no_tensors_are_no_step(method: Inside) -> None:
    method.step([], [], [], HYPER)
    X, g = torch.zeros(8, 3), seeded(8, 3, seed=1, dtype=torch.float32)
    g[:, 2] = 0
    state = method.init(X)
    for _ in range(3):
        method.step([X.zero_()], [g], [state], HYPER)
        assert X[:, :2].all()
        assert not X[:, 2].any()


def test_convergence_is_looked_for_in_the_gradients() -> None:
    method = replace(METHOD, clock=Clock(every=0, earliest=5, kappa=0.5, look=1))
    X, state = torch.zeros(4, 3, dtype=F64), method.init(torch.zeros(4, 3, dtype=F64))
    state["next"].fill_(1 << 40)
    for size in [1.0] * 5 + [0.01] * 40:
        method.step([X.zero_()], [size * seeded(4, 3, seed=1)], [state], HYPER)
        if int(state["next"]) == int(state["step"]):
            return
    raise AssertionError("the gradient fell to a hundredth and nothing was renewed")
