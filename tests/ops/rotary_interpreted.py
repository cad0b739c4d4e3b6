"""The kernels of rotary under Triton's interpreter. test_rotary.py runs this in a process of its own.

In fp16: the interpreter does not know products in bf16.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankshift.ops import arrivals
from rankshift.ops.rotary import op, reference, rotate_, rotate_back, triton

FP16 = torch.float16
# batch, S, heads of q and of k, D
SHAPES = [(1, 7, 3, 1, 2), (2, 37, 4, 2, 32), (1, 65, 3, 1, 80), (2, 5, 2, 2, 96), (1, 64, 4, 2, 64)]


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
    assert far.max() < 1e-5 * want.abs().mean(), far.max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ranks", [(1, 5, 16), (16, 16, 16), (64, 128, 0), (0, 0, 5), (0, 0, 0)], ids=str)
def test_forward(shape: tuple[int, ...], ranks: tuple[int, int, int]) -> None:
    batch, S, Hq, Hk, D = shape
    T, widths = batch * S, (Hq * D, Hk * D, Hk * D)
    packed = drawn(T, sum(widths) + 3)  # a few columns that belong to nobody
    before = packed.clone()
    low = tuple(
        (drawn(T, r + 1, seed=r)[:, :r], drawn(n, r)) if r else None for n, r in zip(widths, ranks, strict=True)
    )
    for rows in {S, T}:
        cos, sin = tables(rows, D)
        packed.copy_(before)
        q, k, v, rest = packed.split((*widths, 3), 1)
        want = [t.double() for t in (q, k, v)]
        exact = tuple(term and (term[0].double(), term[1].double()) for term in low)
        reference.rotate_(*want, cos.double(), sin.double(), exact, D)  # type: ignore[arg-type]
        rotate_(q, k, v, cos, sin, low, head=D)
        for got, expected in zip((q, k, v), want, strict=True):
            near(got, expected)
        assert torch.equal(rest, before[:, -3:])


@pytest.mark.parametrize("laid", ["bhsd", "bshd", "dshb"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_back(shape: tuple[int, ...], laid: str) -> None:
    batch, S, Hq, Hk, D = shape
    T, widths = batch * S, (Hq * D, Hk * D, Hk * D)
    sizes = dict(zip("bsd", (batch, S, D), strict=True))
    grads = []
    for seed, heads in enumerate((Hq, Hk, Hk)):
        memory = drawn(*((sizes | {"h": heads})[axis] for axis in laid), seed=seed)
        grads.append(memory.permute(*(laid.index(axis) for axis in "bhsd")))
    for rows in {S, T}:
        cos, sin = tables(rows, D)
        packed = torch.full((T, sum(widths) + 3), 7.0, dtype=FP16)
        *out, rest = packed.split((*widths, 3), 1)
        want = tuple(torch.empty(T, n, dtype=torch.float64) for n in widths)
        reference.rotate_back(*(g.double() for g in grads), cos.double(), sin.double(), want)  # type: ignore[arg-type]
        rotate_back(*grads, cos, sin, tuple(out))
        for got, expected in zip(out, want, strict=True):
            near(got, expected)
        assert torch.equal(out[2], grads[2].transpose(1, 2).reshape(T, -1)), "v is only copied"
        assert (rest == 7).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("ranks", "biased", "programs"), [((5, 16, 1), True, 1), ((0, 0, 0), False, 9)], ids=str)
def test_a_gain(
    shape: tuple[int, ...], ranks: tuple[int, int, int], biased: bool, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "_PROGRAMS", programs)
    batch, S, Hq, Hk, D = shape
    T, widths = batch * S, (Hq * D, Hk * D, Hk * D)
    packed, columns = drawn(T, sum(widths) + 3), sum(widths)
    low = tuple((drawn(T, r, seed=r), drawn(n, r)) if r else None for n, r in zip(widths, ranks, strict=True))
    gain = torch.randn(2 + biased, columns + 5, generator=torch.Generator().manual_seed(3))[:, :columns]
    gain[0, 1] = 0
    grads = [drawn(batch, S, h, D, seed=h).transpose(1, 2) for h in (Hq, Hk, Hk)]
    for rows in {S, T}:
        cos, sin = tables(rows, D)
        q, k, v, _ = packed.clone().split((*widths, 3), 1)
        want = [t.double() for t in (q, k, v)]
        exact = tuple(term and (term[0].double(), term[1].double()) for term in low)
        reference.rotate_(*want, cos.double(), sin.double(), exact, D, gain.double())  # type: ignore[arg-type]
        rotate_(q, k, v, cos, sin, low, head=D, gain=gain)  # type: ignore[arg-type]
        for got, expected in zip((q, k, v), want, strict=True):
            near(got, expected)
        *out, rest = torch.full((T, columns + 3), 7.0, dtype=FP16).split((*widths, 3), 1)
        back = tuple(torch.empty(T, n, dtype=torch.float64) for n in widths)
        kept = (q.double(), k.double(), v.double())
        sums = reference.rotate_back(
            *(g.double() for g in grads),
            cos.double(),
            sin.double(),
            back,
            kept,
            gain.double(),  # type: ignore[arg-type]
        )
        found = rotate_back(*grads, cos, sin, tuple(out), (q, k, v), gain)  # type: ignore[arg-type]
        for got, expected in zip(out, back, strict=True):
            near(got, expected)
        assert (rest == 7).all()
        assert found is not None
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), sums, rtol=1e-4, atol=1e-4 * float(sums.abs().max()))
        again = rotate_back(*grads, cos, sin, tuple(out), (q, k, v), gain)  # type: ignore[arg-type]
        assert torch.equal(found, again)
    assert not any(counts.any() for counts in arrivals._kept.values())


def test_tables_of_another_dtype() -> None:
    q, k, v = drawn(5, 12), drawn(5, 4), drawn(5, 4)
    cos, sin = (t.float() / 3 for t in tables(5, 4))
    want = [t.double() for t in (q, k, v)]
    reference.rotate_(*want, cos.double(), sin.double(), (None, None, None), 4)
    rotate_(q, k, v, cos, sin, head=4)
    near(q, want[0])
    near(k, want[1])
