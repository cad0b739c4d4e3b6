"""The kernel: a tile of (N, M) numbers of one weight for each program."""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankshift.ops.stochastic_rounding.triton import narrow, numbers

_TILE = (128, 64, 32)  # N, M, and how many of the r at a time


def launch(table: Tensor, words: Tensor | None, like: Tensor, r: int, keep: float, void: Tensor | None = None) -> None:
    """Take the steps of weights of one shape and dtype.

    Args:
        table: (weights, 3) int64, addresses of W (n, m), L (n, r) and R (m, r).
        words: (weights,) int64, of the noise; None: round to the nearest.
        like: one of the weights.
        void: () fp32; where it is not 0, nothing is stored.
    """
    n, m = like.shape
    N, M, R = _TILE
    grid = (triton.cdiv(n, N) * triton.cdiv(m, M), len(table))
    precision = "tf32x3" if like.dtype == torch.float32 else "tf32"
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[like.dtype]
    with torch.cuda.device_of(table):
        _fold[grid](
            table, table if words is None else words, table if void is None else void, keep, n, m, r=r,
            KIND=kind, RANDOM=words is not None, VOID=void is not None, PRECISION=precision,
            N=N, M=M, R=R, num_warps=8, num_stages=3,
        )  # fmt: skip


@triton.jit
def _fold(
    table, words, void, keep, n, m, r: tl.constexpr,
    KIND: tl.constexpr, RANDOM: tl.constexpr, VOID: tl.constexpr, PRECISION: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    if VOID:
        n = tl.where(tl.load(void) == 0, n, 0)  # of which no row is inside
    which = tl.program_id(1)
    across = tl.cdiv(m, M)
    row, column = tl.program_id(0) // across * N, tl.program_id(0) % across * M
    rows, columns, ranks = row + tl.arange(0, N), column + tl.arange(0, M), tl.arange(0, R)
    left = _pointer(table + 3 * which + 1, tl.float32)
    right = _pointer(table + 3 * which + 2, tl.float32)
    total = tl.zeros((N, M), dtype=tl.float32)
    for k in range(0, r, R):
        there = (k + ranks)[None, :] < r
        L = tl.load(left + rows[:, None] * r + (k + ranks)[None, :], mask=(rows < n)[:, None] & there, other=0.0)
        C = tl.load(right + columns[:, None] * r + (k + ranks)[None, :], mask=(columns < m)[:, None] & there, other=0.0)
        total = tl.dot(L, tl.trans(C), total, input_precision=PRECISION)

    here = rows.to(tl.int64)[:, None] * m + columns[None, :]
    inside = (rows < n)[:, None] & (columns < m)[None, :]
    noise = tl.full((N, M), 0, tl.int32)
    if RANDOM:
        quarters = column // 4 + tl.arange(0, M // 4)  # m is a multiple of 4: one number serves four columns of a row
        noise = _noise(tl.load(words + which), rows.to(tl.int64)[:, None] * (m // 4) + quarters[None, :], N, M)
    if KIND == "bf16":
        at = _pointer(table + 3 * which, tl.int16) + here
        weight = (tl.load(at, mask=inside, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif KIND == "fp16":
        at = _pointer(table + 3 * which, tl.float16) + here
        weight = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    else:
        at = _pointer(table + 3 * which, tl.float32) + here
        weight = tl.load(at, mask=inside, other=0.0)
    value = keep * weight + total
    if KIND != "fp32":
        value = narrow(value, noise, KIND, RANDOM)
    tl.store(at, value, mask=inside)


@triton.jit
def _pointer(entry, dtype: tl.constexpr):
    """The address in an entry of the table."""
    return tl.multiple_of(tl.load(entry).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _noise(word, count, N: tl.constexpr, M: tl.constexpr):
    """(N, M) int32 in 0 … 2¹⁶ − 1 from numbers (N, M / 4) of the stream of ``word``."""
    z = numbers(word, count)
    first, second = (z & 0xFFFF).to(tl.int32), ((z >> 16) & 0xFFFF).to(tl.int32)
    third, fourth = ((z >> 32) & 0xFFFF).to(tl.int32), (z >> 48).to(tl.int32)
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (N, M))
