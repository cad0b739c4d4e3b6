"""The kernel: a tile of (N, M) numbers of one weight for each program.

Numbers in bf16 are handled as the upper halves of their fp32 bits.
"""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = (128, 64, 32)  # N, M, and how many of the r at a time

_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)  # SplitMix64, as in core/random.py
_MIX_A = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_B = tl.constexpr(0x94D049BB133111EB)


def launch(table: Tensor, words: Tensor | None, like: Tensor, r: int, keep: float) -> None:
    """Take the steps of weights of one shape and dtype.

    Args:
        table: (weights, 3) int64, addresses of W (n, m), L (n, r) and R (m, r).
        words: (weights,) int64, of the noise; None: round to the nearest.
        like: one of the weights.
    """
    n, m = like.shape
    N, M, R = _TILE
    grid = (triton.cdiv(n, N) * triton.cdiv(m, M), len(table))
    precision = "tf32x3" if like.dtype == torch.float32 else "tf32"
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[like.dtype]
    with torch.cuda.device_of(table):
        _fold[grid](
            table, table if words is None else words, keep, n, m, r=r,
            KIND=kind, RANDOM=words is not None, PRECISION=precision, N=N, M=M, R=R, num_warps=8, num_stages=3,
        )  # fmt: skip


@triton.jit
def _fold(
    table, words, keep, n, m, r: tl.constexpr,
    KIND: tl.constexpr, RANDOM: tl.constexpr, PRECISION: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
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
        value = keep * weight + total
        bits = value.to(tl.int32, bitcast=True)
        if not RANDOM:
            noise = 0x7FFF + ((bits >> 16) & 1)  # half, and half to even
        bits = tl.where(value == value, bits + noise, bits | 0x400000)
        tl.store(at, (bits >> 16).to(tl.int16), mask=inside)
    elif KIND == "fp16":
        at = _pointer(table + 3 * which, tl.float16) + here
        value = keep * tl.load(at, mask=inside, other=0.0).to(tl.float32) + total
        if RANDOM:
            bits = value.to(tl.int32, bitcast=True)
            rounded = ((bits + (noise >> 3)) & -8192).to(tl.float32, bitcast=True)
            even = tl.floor(value * 16777216.0 + noise.to(tl.float32) / 65536.0) / 16777216.0
            value = tl.where(value == value, tl.where(tl.abs(value) < 0.00006103515625, even, rounded), value)
        tl.store(at, value.to(tl.float16), mask=inside)
    else:
        at = _pointer(table + 3 * which, tl.float32) + here
        tl.store(at, keep * tl.load(at, mask=inside, other=0.0) + total, mask=inside)


@triton.jit
def _pointer(entry, dtype: tl.constexpr):
    """The address in an entry of the table."""
    return tl.multiple_of(tl.load(entry).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _noise(word, count, N: tl.constexpr, M: tl.constexpr):
    """(N, M) int32 in 0 … 2¹⁶ − 1 from numbers (N, M / 4) of the stream of ``word``, four from each."""
    z = (count + 1).to(tl.uint64) * _GAMMA + word.to(tl.uint64, bitcast=True)
    z = (z ^ (z >> 30)) * _MIX_A
    z = (z ^ (z >> 27)) * _MIX_B
    z = z ^ (z >> 31)
    first, second = (z & 0xFFFF).to(tl.int32), ((z >> 16) & 0xFFFF).to(tl.int32)
    third, fourth = ((z >> 32) & 0xFFFF).to(tl.int32), (z >> 48).to(tl.int32)
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (N, M))
