"""Adam with a step count for each vector: torch's AdamW while all are equal, and one that began anew by itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankshift.core.errors import ConfigError
from rankshift.optim import Adam, Optimizer
from rankshift.optim import vectors as module
from rankshift.optim.vectors import Vectors

F64 = torch.float64


def noise(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def of(shapes: list[tuple[int, int]], axis: int, dtype: torch.dtype = torch.float32, **numbers: Any) -> Optimizer:
    ps = [nn.Parameter(noise(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(shapes)]
    return Optimizer([{"params": ps}], [Vectors(axis)], **{"lr": 1e-2, "weight_decay": 0.1, **numbers})


def step(optimizer: torch.optim.Optimizer, t: int) -> None:
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        p.grad = noise(*p.shape, seed=100 * t + i, dtype=p.dtype)
    optimizer.step()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("together", [1 << 24, 50])  # all of one shape at once, or one by one
def test_with_equal_counts_it_is_torchs_adamw(axis: int, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments to the bit of the fused kernel."""
    monkeypatch.setattr(module, "_TOGETHER", together)
    mine = of([(5, 7), (3, 4), (5, 7), (5, 7)], axis, F64)
    ps = [p.detach().clone().requires_grad_() for p in mine.param_groups[0]["params"]]
    torchs = torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, fused=True)
    for t in range(20):
        for optimizer in (mine, torchs):
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + t)
            step(optimizer, t)
        for p, q in zip(mine.param_groups[0]["params"], ps, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-14)
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(mine.state[p][key], torchs.state[q][key])
            assert (mine.state[p]["step"] == torchs.state[q]["step"]).all()
            assert mine.state[p]["step"].shape == ((p.shape[0], 1) if axis == 0 else (1, p.shape[1]))


def test_a_vector_that_begins_anew_is_an_adamw_that_does() -> None:
    """Every row against an optimizer of its own, made when its state was zeroed."""
    mine = of([(4, 6)], 0, F64, weight_decay=0.0)
    (p,) = mine.param_groups[0]["params"]
    rows = [p.detach()[i].clone().requires_grad_() for i in range(4)]
    alone = [torch.optim.AdamW([row], lr=1e-2, weight_decay=0.0) for row in rows]
    for t in range(12):
        if t in (3, 4, 9):
            i = t % 4
            for value in mine.state[p].values():
                value[i] = 0
            alone[i] = torch.optim.AdamW([rows[i]], lr=1e-2, weight_decay=0.0)
        step(mine, t)
        for row, optimizer, g in zip(rows, alone, p.grad, strict=True):
            row.grad = g.clone()
            optimizer.step()
        torch.testing.assert_close(p.detach(), torch.stack([r.detach() for r in rows]), rtol=0, atol=1e-15)


def test_saved_and_loaded_it_goes_on_to_the_bit() -> None:
    one, other = of([(4, 6), (4, 6)], 1), of([(4, 6), (4, 6)], 1)
    for t in range(5):
        step(one, t)
        one.state[one.param_groups[0]["params"][0]]["step"][0, t] = 0
    for p, q in zip(one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        q.data.copy_(p)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for t in range(5, 8):
        step(one, t)
        step(other, t)
    for p, q in zip(one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)
        assert torch.equal(one.state[p]["step"], other.state[q]["step"])


def test_the_state_of_an_ordinary_adam_is_taken_over_and_not_the_other_way() -> None:
    ps = [nn.Parameter(noise(4, 6, seed=0))]
    plain = Optimizer([{"params": ps}], [Adam()], lr=1e-2)
    for t in range(3):
        step(plain, t)
    mine = of([(4, 6)], 0, weight_decay=0.0)
    (p,) = mine.param_groups[0]["params"]
    p.data.copy_(ps[0])
    mine.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert (mine.state[p]["step"] == 3).all()
    step(plain, 3)
    step(mine, 3)
    assert torch.equal(p, ps[0])
    with pytest.raises(ConfigError, match=r"step is \(4, 1\)"):
        plain.load_state_dict(mine.state_dict())
    projected = {"basis": torch.zeros(6, 2), "step": torch.zeros(())}
    with pytest.raises(ConfigError, match="projected"):
        Vectors(0).adopt(p, projected, Vectors(0).init(p))
