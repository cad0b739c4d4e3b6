"""The kernels of head_norm under Triton's interpreter. test_head_norm.py runs this in a process of its own.

In fp16: the interpreter does not know products in bf16.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankshift.ops.head_norm import norm_rotate_, norm_rotate_back, op, reference

FP16, EPS = torch.float16, 1e-3
# batch, S, heads of q and of k, D
SHAPES = [(1, 7, 3, 1, 2), (2, 37, 4, 2, 32), (1, 65, 3, 1, 80), (1, 64, 4, 2, 64)]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_kernel", lambda tensor: True)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(FP16)


def tables(rows: int, head: int) -> tuple[Tensor, Tensor]:
    """Their second halves are NaN: nobody may read them."""
    angle = torch.rand(rows, head // 2, generator=torch.Generator().manual_seed(1)) * 6
    nothing = torch.full_like(angle, torch.nan)
    return torch.cat((angle.cos(), nothing), 1).to(FP16), torch.cat((angle.sin(), nothing), 1).to(FP16)


def near(got: Tensor, want: Tensor) -> None:
    """Equal but for one rounding to fp16, and for fp32 before it."""
    far = (got.double() - want).abs() - 2.0**-11 * want.abs()
    assert far.max() < 1e-5 * want.abs().mean() + 1e-6, far.max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ranks", [(1, 5, 16), (64, 128, 0), (0, 0, 5), (0, 0, 0)], ids=str)
def test_both_ways(shape: tuple[int, ...], ranks: tuple[int, int, int]) -> None:
    batch, S, Hq, Hk, D = shape
    T, widths = batch * S, (Hq * D, Hk * D, Hk * D)
    before = drawn(T, sum(widths) + 3)  # a few columns that belong to nobody
    low = tuple(
        (drawn(T, r + 1, seed=r)[:, :r], drawn(n, r)) if r else None for n, r in zip(widths, ranks, strict=True)
    )
    weights = tuple(1 + drawn(D, seed=seed) / 4 for seed in (5, 6))
    wide = tuple(w.double() for w in weights)
    exact = tuple(term and (term[0].double(), term[1].double()) for term in low)
    grads = [drawn(batch, S, h, D, seed=h).transpose(1, 2) for h in (Hq, Hk, Hk)]
    for rows in {S, T}:
        cos, sin = tables(rows, D)
        q, k, v, rest = before.clone().split((*widths, 3), 1)
        want = [t.double() for t in (q, k, v)]
        rho = reference.norm_rotate_(*want, cos.double(), sin.double(), wide, EPS, exact)  # type: ignore[arg-type]
        found = norm_rotate_(q, k, v, cos, sin, weights, EPS, low)  # type: ignore[arg-type]
        for got, expected in zip((q, k, v), want, strict=True):
            near(got, expected)
        torch.testing.assert_close(found.double(), rho, rtol=1e-5, atol=0)
        assert torch.equal(rest, before[:, -3:])
        *out, rest = torch.full((T, sum(widths) + 3), 7.0, dtype=FP16).split((*widths, 3), 1)
        back = tuple(torch.empty(T, n, dtype=torch.float64) for n in widths)
        kept, doubled = (q.double(), k.double()), [g.double() for g in grads]
        reference.norm_rotate_back(*doubled, kept, found.double(), cos.double(), sin.double(), wide, back)  # type: ignore[arg-type]
        norm_rotate_back(*grads, (q, k), found, cos, sin, weights, tuple(out))  # type: ignore[arg-type]
        for got, expected in zip(out, back, strict=True):
            near(got, expected)
        assert torch.equal(out[2], grads[2].transpose(1, 2).reshape(T, -1)), "v is only copied"
        assert (rest == 7).all()
