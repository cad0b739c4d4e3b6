"""The kernels of rms_norm under Triton's interpreter. test_rms_norm.py runs this in a process of its own.

In fp16: the interpreter does not know products in bf16.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankshift.ops import arrivals
from rankshift.ops.rms_norm import add, add_back, norm, norm_back, op, pick, reference, triton

FP16 = torch.float16
SHAPES = [(1, 7, 1), (37, 70, 5), (33, 600, 16), (40, 1024, 64), (3, 130, 128)]  # T, K, r


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_kernel", lambda tensor: True)


def drawn(*shape: int, seed: int, pad: int = 0) -> Tensor:
    """Numbers in fp16, with that many columns more in memory: NaN, which nobody may read."""
    wide = torch.full((shape[0], shape[-1] + pad), torch.nan, dtype=FP16)
    wide[:, : shape[-1]] = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(FP16)
    return wide[:, : shape[-1]]


def near(got: Tensor, want: Tensor) -> None:
    """Equal but for one rounding to fp16, and for fp32 before it."""
    assert got.dtype == FP16
    far = (got.double() - want).abs() - 2.0**-11 * want.abs()
    assert far.max() < 1e-4 * want.abs().mean(), far.max()


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.double() for t in tensors)


@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_norm(shape: tuple[int, int, int], pad: int) -> None:
    T, K, r = shape
    x, y, Z, B = (drawn(*s, seed=i, pad=pad) for i, s in enumerate([(T, K), (T, K), (T, r), (K, r)]))
    weight = drawn(1, K, seed=9)[0]
    for low in ((Z, B), None):
        x2, n, rstd = norm(x, weight, 1e-5, 0.5, y, low)
        near(x2, reference.add(*wide(x, y), low and wide(*low)))
        _, want, scale = reference.norm(*wide(x2, weight), 1e-5, 0.5, None, None)
        near(n, want)
        torch.testing.assert_close(rstd.double(), scale, rtol=1e-6, atol=0)
        near(add(x, y, low), reference.add(*wide(x, y), low and wide(*low)))
    x2, n, rstd = norm(x, weight, 1e-5)
    assert x2 is x
    near(n, reference.norm(*wide(x, weight), 1e-5, 0.0, None, None)[1])


@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("shape", [*SHAPES, (5, 96, 384)], ids=str)
def test_its_gradient(shape: tuple[int, int, int], pad: int) -> None:
    T, K, r = shape
    dn, x2, S, A, residual = (
        drawn(*s, seed=i, pad=pad) for i, s in enumerate([(T, K), (T, K), (T, r), (r, K), (T, K)])
    )
    weight = drawn(1, K, seed=9)[0]
    _, n, rstd = reference.norm(*wide(x2, weight), 1e-5, 0.5, None, None)
    z = (n @ A.double().t()).to(FP16)
    for low, past in (((S, A), residual), ((S, A), None), (None, residual), (None, None)):
        want = reference.norm_back(
            *wide(dn, x2, rstd, weight), 0.5, low and wide(*low), None if past is None else past.double(), ()
        )
        near(norm_back(dn, x2, rstd.float(), weight, 0.5, low, past), want)
        known = norm_back(dn, x2, rstd.float(), weight, 0.5, low, past, z=z if low else None)
        assert (known.double() - want).abs().max() < 2.0**-9 * want.abs().max()  # z itself is rounded
    for more in ((S @ A,), (residual, dn.flip(0))):
        total = sum(more, dn.double())
        want = reference.norm_back(*wide(total, x2, rstd, weight), 0.5, wide(S, A), None, ())
        near(norm_back(dn, x2, rstd.float(), weight, 0.5, (S, A), more=more), want)


def test_a_weight_of_another_dtype() -> None:
    x, weight = drawn(5, 70, seed=0), drawn(1, 70, seed=1)[0].float() / 3
    near(norm(x, weight, 1e-5)[1], reference.norm(*wide(x, weight), 1e-5, 0.0, None, None)[1])


@pytest.mark.parametrize("programs", [1, 9, 396])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_gain(shape: tuple[int, int, int], biased: bool, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_PROGRAMS", programs)
    T, K, r = shape
    x, y, Z, B = (drawn(*s, seed=i, pad=3) for i, s in enumerate([(T, K), (T, K), (T, r), (K, r)]))
    weight = drawn(1, K, seed=9)[0]
    gain = torch.randn(2 + biased, K + 5, generator=torch.Generator().manual_seed(8))[:, :K]
    for low in ((Z, B), None):
        exact = low and wide(*low)
        near(add(x, y, low, gain), reference.add(*wide(x, y), exact, gain.double()))
        x2, n, _ = norm(x, weight, 1e-5, 0.5, y, low, gain)
        near(x2, reference.add(*wide(x, y), exact, gain.double()))
        near(n, reference.norm(*wide(x2, weight), 1e-5, 0.5, None, None)[1])
        dy, sums = add_back(x, y, low, gain)
        want = reference.add_back(*wide(x, y), exact, gain.double())
        near(dy, want[0])
        assert sums.dtype == torch.float32
        torch.testing.assert_close(sums.double(), want[1], rtol=1e-4, atol=1e-4)
        assert torch.equal(sums, add_back(x, y, low, gain)[1])
    assert not any(counts.any() for counts in arrivals._kept.values())


def test_every_tile_is_used() -> None:
    for table, most in ((triton._NORM, 128), (triton._BACK, 384), (triton._ADD, 128), (triton._ADD_BACK, 128)):
        assert list(table) == sorted(table)
        assert max(table) == most


@pytest.mark.parametrize("ranks", [(1,), (5,), (64,), (65,), (64, 64, 64), (3, 16, 66)], ids=str)
@pytest.mark.parametrize("rows", [1, 32, 37])
def test_picked(rows: int, ranks: tuple[int, ...]) -> None:
    x, weight = drawn(rows, 70, seed=1, pad=3), drawn(1, 70, seed=2)[0]
    rstd = torch.rand(rows, generator=torch.Generator().manual_seed(3)) + 0.5
    channels = [torch.randperm(70, generator=torch.Generator().manual_seed(4 + k))[:k] for k in ranks]
    every = torch.cat(channels)
    got = pick(x, channels, rstd, weight, 0.5, 0.3)
    near(got, reference.pick(*wide(x)[:1], every, *wide(rstd, weight), 0.5, 0.3))
    assert torch.equal(pick(x, channels), x[:, every])
    if len(ranks) == 1:
        assert torch.equal(pick(x, every), x[:, every])
