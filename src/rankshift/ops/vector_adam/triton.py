"""The kernels. Programs find their matrix in a table (fields, matrices) of int64: addresses, then numbers."""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SOME = 128  # vectors, for each program of _factors
_TILE = (8, 256)  # of a matrix, for each program of _step
EXACT = {"enable_fp_fusion": False}  # a product and a sum are rounded each, as in plain torch


def launch(
    table: Tensor,
    factors: Tensor,
    axis: int,
    vectors: int,
    rows: int,
    columns: int,
    betas: tuple[float, float],
    keep: float,
    moves: bool,
    void: Tensor | None = None,
) -> None:
    """Count, then step.

    Args:
        table: addresses of p, g, m, v and t; rows, columns/4; where the factors of a matrix begin; bits of lr and ε.
        factors: room for two of each vector: lr·d = m / (a √v + b).
        vectors: the largest number of them; rows, columns: likewise.
        moves: lr is not 0.
    """
    count, nothing = table.shape[1], table if void is None else void
    kinds = {"BETA1": betas[0], "BETA2": betas[1], "VOID": void is not None}
    N, M = _TILE
    with torch.cuda.device_of(table):
        _factors[(triton.cdiv(vectors, _SOME), count)](
            table, factors, nothing, count, AXIS=axis, SOME=_SOME, **kinds, num_warps=4,
        )  # fmt: skip
        _step[(triton.cdiv(rows, N) * triton.cdiv(columns, M), count)](
            table, factors, nothing, count, keep, AXIS=axis, MOVES=moves, N=N, M=M, **kinds, num_warps=8, **EXACT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def _factors(
    table, factors, void, count,
    AXIS: tl.constexpr, SOME: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, VOID: tl.constexpr,
):  # fmt: skip
    here = table + tl.program_id(1)
    vectors = tl.load(here + 5 * count).to(tl.int32) if AXIS == 0 else 4 * tl.load(here + 6 * count).to(tl.int32)
    if VOID:
        vectors = tl.where(tl.load(void) == 0, vectors, 0)
    at = tl.program_id(0) * SOME + tl.arange(0, SOME)
    steps = _pointer(here, 4, count) + at
    t = tl.load(steps, mask=at < vectors, other=0.0) + 1
    tl.store(steps, t, mask=at < vectors)
    lr = tl.load(here + 8 * count).to(tl.float64, bitcast=True)
    eps = tl.load(here + 9 * count).to(tl.float64, bitcast=True)
    log1, log2 = tl.log(tl.full((1,), BETA1, tl.float64)), tl.log(tl.full((1,), BETA2, tl.float64))
    b = (1 - tl.exp(t.to(tl.float64) * log1)) / lr
    a = b / tl.sqrt(1 - tl.exp(t.to(tl.float64) * log2))
    place = factors + tl.load(here + 7 * count) + at
    tl.store(place, a.to(tl.float32), mask=at < vectors)
    tl.store(place + vectors, (b * eps).to(tl.float32), mask=at < vectors)


@triton.jit(do_not_specialize=["count"])
def _step(
    table, factors, void, count, keep,
    AXIS: tl.constexpr, MOVES: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    BETA1: tl.constexpr, BETA2: tl.constexpr, VOID: tl.constexpr,
):  # fmt: skip
    here = table + tl.program_id(1)
    n, m = tl.load(here + 5 * count).to(tl.int32), 4 * tl.load(here + 6 * count).to(tl.int32)
    across = tl.cdiv(m, M)
    rows = tl.program_id(0) // across * N + tl.arange(0, N)
    columns = tl.program_id(0) % across * M + tl.arange(0, M)
    last = n
    if VOID:
        last = tl.where(tl.load(void) == 0, n, 0)  # no row is inside
    inside = (rows < last)[:, None] & (columns < m)[None, :]
    place = rows.to(tl.int64)[:, None] * m + columns[None, :]
    g = tl.load(_pointer(here, 1, count) + place, mask=inside, other=0.0).to(tl.float64)
    first, second = _pointer(here, 2, count) + place, _pointer(here, 3, count) + place
    mean = tl.load(first, mask=inside, other=0.0).to(tl.float64)
    square = tl.load(second, mask=inside, other=0.0).to(tl.float64)
    mean = (BETA1 * mean + (1 - BETA1) * g).to(tl.float32)
    square = (BETA2 * square + (1 - BETA2) * g * g).to(tl.float32)
    tl.store(first, mean, mask=inside)
    tl.store(second, square, mask=inside)
    if MOVES:
        p = _pointer(here, 0, count) + place
        factor = factors + tl.load(here + 7 * count)
        if AXIS == 0:
            a = tl.load(factor + rows[:, None], mask=(rows < n)[:, None], other=1.0)
            b = tl.load(factor + n + rows[:, None], mask=(rows < n)[:, None], other=1.0)
        else:
            a = tl.load(factor + columns[None, :], mask=(columns < m)[None, :], other=1.0)
            b = tl.load(factor + m + columns[None, :], mask=(columns < m)[None, :], other=1.0)
        d = tl.div_rn(mean, tl.sqrt_rn(square) * a + b)
        tl.store(p, tl.load(p, mask=inside, other=0.0) * keep - d, mask=inside)


@triton.jit
def _pointer(here, field: tl.constexpr, count):
    """To a tensor in fp32, a multiple of 16."""
    return tl.multiple_of(tl.load(here + field * count).to(tl.pointer_type(tl.float32)), 16)
