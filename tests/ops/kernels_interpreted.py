"""Kernels under Triton's interpreter, on the CPU: projected_fold and stochastic_rounding.

test_kernels.py runs this in a process of its own, because the interpreter is chosen when Triton is imported:

    TRITON_INTERPRET=1 pytest tests/ops/kernels_interpreted.py
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import rankshift as rs
from rankshift.core.random import dither
from rankshift.methods.galore_projected import ProjectedLayer
from rankshift.ops import stochastic_rounding
from rankshift.ops.projected_fold import Fold, fold_, op, reference, triton
from rankshift.ops.stochastic_rounding.reference import rounded
from rankshift.optim import rounding

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [(16, 8, 3), (33, 36, 136), (1, 4, 1), (40, 68, 17)]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_TILE", (32, 32, 64))


def few_bits(*shape: int, seed: int) -> Tensor:
    """Multiples of 2⁻⁶: sums of their products are exact."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)) * 2.0**-6


def weights(n: int, m: int, dtype: torch.dtype, count: int = 3) -> list[Tensor]:
    found = torch.randn(count, n, m, generator=torch.Generator().manual_seed(n)) * 2.0**-4
    return list(found.to(dtype).clone())


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_reference_to_the_bit(shape: tuple[int, int, int], dtype: torch.dtype, stochastic: bool) -> None:
    n, m, r = shape
    folds, want = [], []
    for index, (W, word) in enumerate(zip(weights(n, m, dtype), [0, 77, (1 << 64) - 12345], strict=True)):
        left, right, keep = few_bits(n, r, seed=index), few_bits(m, r, seed=9 + index), (1.0, 0.5, 0.5)[index]
        want.append(reference.fold(W, left, right, keep, word if stochastic else None))
        folds.append(Fold(W, left, right, keep, word))
    fold_(folds, stochastic)
    for fold, expected in zip(folds, want, strict=True):
        assert torch.equal(fold.weight, expected)


def at_random(exact: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Written out in float64: so many units of the last place, and noise / 2¹⁶ more before they are cut off."""
    fraction, least = (7, -126) if dtype == BF16 else (10, -14)
    exponent = torch.frexp(exact.abs())[1].double() - 1
    unit = torch.exp2(exponent.clamp(min=least) - fraction)
    if dtype == BF16:
        return exact.sign() * ((exact.abs() / unit + noise * 2.0**-16).floor() * unit)
    coarse = exact.sign() * ((exact.abs() / unit + (noise >> 3) * 2.0**-13).floor() * unit)
    return torch.where(exponent < least, (exact / unit + noise * 2.0**-16).floor() * unit, coarse)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_rounding_written_out(dtype: torch.dtype) -> None:
    """In float64, of which all numbers here are sums and products without rounding."""
    n, m, r = 20, 40, 5
    (W,) = weights(n, m, dtype, 1)
    left, right = few_bits(n, r, seed=1) * 2.0**-9, few_bits(m, r, seed=2)
    W[0], left[0] = 0, left[0] * 2.0**-6  # where fp16 is an even grid
    exact = W.double() + left.double() @ right.double().t()
    assert torch.equal(exact, exact.float().double())
    both = W.clone(), W.clone()
    fold_([Fold(both[0], left, right, 1.0, 5)], False)
    fold_([Fold(both[1], left, right, 1.0, 5)], True)
    noise = dither(5, n * m, 0, W.device).view(n, m).long()
    assert torch.equal(both[0], exact.to(dtype))
    assert torch.equal(both[1].double(), at_random(exact, dtype, noise))
    assert (both[0] != both[1]).any()


def test_ties_go_to_even_and_what_is_no_number_stays_none() -> None:
    half = 2.0**-8  # of the distance between neighbours above 1
    W = torch.tensor([[1.0, 1 + 2 * half, float("inf"), float("nan")]], dtype=BF16)
    fold_([Fold(W, torch.ones(1, 1), torch.full((4, 1), half), 1.0)], False)
    assert W[0, :3].tolist() == [1.0, 1 + 4 * half, float("inf")]
    bits = torch.tensor([[0x7FFFFFFF, -1, 0x7F800001, 0x7F800000]], dtype=torch.int32).view(FP32)
    for dtype, stochastic in itertools.product((BF16, FP16), (False, True)):
        W = torch.zeros(1, 4, dtype=dtype)
        for word in range(10):
            fold_([Fold(W.zero_(), torch.ones(1, 1), bits.t().contiguous(), 1.0, word)], stochastic)
            assert W[0, :3].isnan().all()
            assert W[0, 3] == float("inf")


def test_weights_of_all_kinds_at_once() -> None:
    """Of several shapes, ranks, dtypes and decays: as one after another, and nothing else is written."""
    kinds = [(16, 8, 3, BF16, 1.0), (16, 8, 3, BF16, 0.5), (8, 16, 3, BF16, 1.0), (16, 8, 4, BF16, 1.0),
             (16, 8, 3, FP16, 1.0), (16, 8, 3, BF16, 1.0)]  # fmt: skip
    folds, room = [], []
    for index, (n, m, r, dtype, keep) in enumerate(kinds):
        room.append(torch.full((n * m + 32,), 3.0, dtype=dtype))
        W = room[-1][16:-16].view(n, m)
        W.copy_(weights(n, m, dtype, 1)[0])
        folds.append(Fold(W, few_bits(n, r, seed=index), few_bits(m, r, seed=50 + index), keep, index))
    want = [reference.fold(*fold) for fold in folds]
    versions = [fold.weight._version for fold in folds]
    fold_(folds, True)
    for fold, expected, version, around in zip(folds, want, versions, room, strict=True):
        assert torch.equal(fold.weight, expected)
        assert fold.weight._version > version
        assert (torch.cat([around[:16], around[-16:]]) == 3).all()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_a_void_step_changes_nothing(dtype: torch.dtype) -> None:
    """Even where it is no number."""
    left, right = few_bits(16, 3, seed=1), few_bits(8, 3, seed=2)
    W, valid, _ = weights(16, 8, dtype)
    before, want = W.clone(), reference.fold(valid, left, right, 0.5, 3)
    fold_([Fold(W, torch.full((16, 3), float("nan")), right, 0.5, 3)], True, torch.ones(()))
    assert torch.equal(W, before)
    fold_([Fold(valid, left, right, 0.5, 3)], True, torch.zeros(()))
    assert torch.equal(valid, want)


def test_a_tensor_that_moved_is_found_again() -> None:
    left, right = few_bits(16, 3, seed=1), few_bits(8, 3, seed=2)
    for W in weights(16, 8, BF16):
        want = reference.fold(W, left, right, 1.0, None)
        fold_([Fold(W, left, right, 1.0)], False)
        assert torch.equal(W, want)


# ---- rounding by itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(("shape", "first"), [((1,), 0), ((33, 5), 3), ((2, 1500), (1 << 33) + 2)], ids=str)
def test_rounding_is_the_reference_to_the_bit(shape: tuple[int, ...], first: int, dtype: torch.dtype) -> None:
    size = torch.Size(shape).numel()
    value = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    value *= torch.exp2(torch.arange(size).view(shape) % 40 - 30.0)
    value.view(-1)[-1] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(FP32)
    room = torch.full((size + 16,), 3.0, dtype=dtype)
    target = room[8:-8].view(shape)
    for word in (0, 1, (1 << 64) - 12345):
        version = target._version
        stochastic_rounding.round_(target, value, word, first)
        want = rounded(value, dtype, word, first).view(-1)
        assert torch.equal(target.view(-1)[:-1], want[:-1])
        assert target.view(-1)[-1].isnan()
        assert target._version > version
    assert (torch.cat([room[:8], room[-8:]]) == 3).all()
    stochastic_rounding.round_(torch.empty(0, dtype=dtype), torch.empty(0), 1, 0)


def test_a_weight_is_closed_as_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole and by rows."""
    value = torch.randn(600, 3, generator=torch.Generator().manual_seed(1))
    state = {"key": torch.tensor(-5), "step": torch.tensor(4)}
    results = []
    for runs in (False, True):
        monkeypatch.setattr(stochastic_rounding.op, "runs_on", lambda device, runs=runs: runs)
        for rows in ([...], [slice(0, 256), slice(256, 600)]):
            p = torch.zeros(600, 3, dtype=BF16)
            for some in rows:
                rounding.close(p, value[some], state, "stochastic", some)
            results.append(p)
    assert all(torch.equal(results[0], other) for other in results[1:])


# ---- in training -----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers that grow and shrink, stored either way, and one that the kernel does not take."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.grow, self.shrink = nn.Linear(8, 20), nn.Linear(20, 12, bias=False)
        self.wide, self.narrow, self.odd = Conv1D(24, 12), Conv1D(16, 24), nn.Linear(16, 7)
        self.last = nn.Linear(7, 16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.grow, self.shrink, self.wide, self.narrow, self.odd):
            x = torch.tanh(layer(x))
        return self.last(x)


LAYERS = ("grow", "shrink", "wide", "narrow", "odd", "last")


def updated(method: rs.GaLore, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights after one update: later ones would magnify what is rounded apart in the first."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape) / 4)
    run = rs.attach(model, replace(method, targets=LAYERS), seed=3)
    optimizer = run.optimizer(lr=3e-2, weight_decay=0.1)
    (model(torch.randn(32, 8).to(dtype)).float() - 1).square().mean().backward()
    optimizer.step()
    for adapter in run.adapter().values():
        assert isinstance(adapter, ProjectedLayer)
        assert not adapter.subspace.any()
        assert adapter.base.changed
    return {name: p.detach() for name, p in model.named_parameters() if "adapters" not in name}


@pytest.mark.parametrize("side", ["in", "smaller", "larger"])
@pytest.mark.parametrize(("dtype", "rounding"), [(FP32, "nearest"), (BF16, "nearest"), (BF16, "stochastic")], ids=str)
def test_an_update_is_that_without_the_kernel(
    side: str, dtype: torch.dtype, rounding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = rs.GaLore(rank=3, gradient="projected", side=side, rounding=rounding, scale=1.0)  # type: ignore[arg-type]
    apart = updated(method, dtype)
    taken: list[int] = []
    launch = triton.launch
    monkeypatch.setattr(triton, "launch", lambda table, *rest: (taken.append(len(table)), launch(table, *rest)))
    monkeypatch.setattr(op, "runs_on", lambda device: True)
    together = updated(method, dtype)
    assert sum(taken) == 5  # all but one, whose rows are no multiple of four
    for name, p in apart.items():
        far = (p.double() - together[name].double()).abs() / p.double().abs().clamp(min=2.0**-4)
        assert far.max() < (1e-6 if dtype == FP32 else 2.0**-7), name  # one unit of the last place
        if rounding == "stochastic":  # the same noise: few are rounded apart
            assert (p == together[name]).double().mean() > 0.97, name
