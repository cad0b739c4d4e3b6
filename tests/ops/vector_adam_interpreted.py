"""The kernels of ops/vector_adam under Triton's interpreter, on the CPU: see kernels_interpreted.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rankshift.ops import vector_adam
from rankshift.ops.vector_adam import op, reference, triton
from rankshift.optim import Optimizer
from rankshift.optim.vectors import Vectors

BETAS, EPS = (0.9, 0.999), 1e-8
SHAPES = [[(1, 4)], [(7, 12), (40, 36), (9, 20)], [(33, 64), (5, 8)]]  # of matrices that go together


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In small tiles."""
    monkeypatch.setattr(op, "runs_on", lambda device: True)
    monkeypatch.setattr(triton, "_SOME", 8)
    monkeypatch.setattr(triton, "_TILE", (8, 16))


def made(shapes: list[tuple[int, int]], axis: int) -> list[list[Tensor]]:
    """Matrices, gradients, moments and counts from 0 on, some vectors of which begin now."""
    draw = torch.Generator().manual_seed(1)
    p, g, m = ([torch.randn(shape, generator=draw) for shape in shapes] for _ in range(3))
    v = [torch.rand(shape, generator=draw) * 1e-2 for shape in shapes]
    t = [torch.randint(0, 50, (n, 1) if axis == 0 else (1, k), generator=draw).float() for n, k in shapes]
    for first, second, count in zip(m, v, t, strict=True):
        first *= count > 0
        second *= count > 0
    return [p, g, m, v, t]


@pytest.mark.parametrize("void", [None, 0.0, 1.0])
@pytest.mark.parametrize("lr", [0.0, 3e-3])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_a_step_is_that_of_the_reference(
    shapes: list[tuple[int, int]], axis: int, lr: float, void: float | None
) -> None:
    tensors, keep = made(shapes, axis), 1 - lr * 0.1
    before = [[t.clone() for t in some] for some in tensors]
    wide = [[t.double() for t in some] for some in tensors]
    versions = [p._version for p in tensors[0]]
    vector_adam.step_(tensors, axis, lr, BETAS, EPS, keep, None if void is None else torch.tensor(void))
    assert all(p._version > version for p, version in zip(tensors[0], versions, strict=True))
    for i in range(len(shapes)):
        p, g, m, v, t = (some[i] for some in tensors)
        old = [some[i] for some in before]
        if void:
            assert all(torch.equal(new, was) for new, was in zip((p, g, m, v, t), old, strict=True))
            continue
        m_, v_, g_ = old[2].double(), old[3].double(), g.double()
        assert torch.equal(m, (0.9 * m_ + (1 - 0.9) * g_).float())
        assert torch.equal(v, (0.999 * v_ + (1 - 0.999) * g_ * g_).float())
        assert torch.equal(t, old[4] + 1)
        assert torch.equal(g, old[1])
        reference.step_(*(some[i] for some in wide), lr, BETAS, EPS, keep)  # type: ignore[arg-type]
        torch.testing.assert_close(p.double(), wide[0][i], rtol=3e-7, atol=3e-8)
        assert lr or torch.equal(p, old[0])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("lr", [0.0, 1e-2])
def test_an_optimizer_steps_as_without_the_kernels(axis: int, lr: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two shapes, one of which it does not take; one step is void, and one vector begins anew."""
    found = []
    launched: list[int] = []
    launch = triton.launch
    monkeypatch.setattr(triton, "launch", lambda table, *rest: (launched.append(table.shape[1]), launch(table, *rest)))
    for kernels in (True, False):
        monkeypatch.setattr(op, "runs_on", lambda device, kernels=kernels: kernels)
        ps = [nn.Parameter(torch.randn(n, m, generator=torch.Generator().manual_seed(n))) for n, m in [(6, 8), (9, 12)]]
        optimizer = Optimizer([{"params": ps}], [Vectors(axis)], lr=lr, weight_decay=0.1)
        for t in range(6):
            for p in ps:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
            optimizer.void = torch.tensor(float(t == 3)) if t > 1 else None
            optimizer.step()
            for value in optimizer.state[ps[0]].values():
                value.select(axis, t % 3)[...] = 0
        found.append([t for p in ps for t in (p.detach(), *optimizer.state[p].values())])
    assert launched == [2] * 6
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
