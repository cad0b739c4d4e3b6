"""The kernels. Programs find their layer in a table (fields, layers) of int64: addresses, then numbers."""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LENGTH = 512  # of a vector, for each program of _swap
_TILE = (8, 512)  # of W, for each program of _rewrite
_BLOCK = (64, 32)  # of A, or of B: along vectors, and how many of them at a time


def swap(
    table: Tensor, scratch: Tensor, r: int, most: int, scale: float, m: int, n: int, void: Tensor | None = None
) -> None:
    """Exchange the vectors, then let the weights take the differences.

    Args:
        table: addresses of W, A, B and both pools; out, in/4, candidates, exchanges; what
            i, t and t − r of the first are; where the differences along in and out begin in ``scratch``.
        most: the largest number of exchanges.
        m: the largest out; n: the largest in.
    """
    layers, nothing = table.shape[1], table if void is None else void
    M, N = _TILE
    with torch.cuda.device_of(table):
        _swap[(triton.cdiv(max(m, n), _LENGTH), 2 * most, layers)](
            table, scratch, nothing, scale, layers, r, most, VOID=void is not None, SIZE=_LENGTH, num_warps=4,
        )  # fmt: skip
        _rewrite[(triton.cdiv(m, M) * triton.cdiv(n, N), layers)](
            table, scratch, nothing, layers, most, VOID=void is not None, M=M, N=N, num_warps=4,
        )  # fmt: skip


def hold(table: Tensor, r: int, longest: int, void: Tensor | None = None) -> None:
    """Put zeros where vectors are held or begin anew.

    Args:
        table: addresses of the gradient, moments and counts of A, then of B, 0 where there is none; out, in/4; which
            row of A was exchanged last; how many are held, and how many begin anew.
        longest: the largest out or in.
    """
    layers, nothing = table.shape[1], table if void is None else void
    length, some = _BLOCK
    with torch.cuda.device_of(table):
        _hold[(triton.cdiv(longest, length), 2, layers)](
            table, nothing, layers, r, VOID=void is not None, LENGTH=length, SOME=some, num_warps=4,
        )  # fmt: skip


@triton.jit(do_not_specialize=["layers", "most"])
def _swap(table, scratch, void, scale, layers, r, most, VOID: tl.constexpr, SIZE: tl.constexpr):
    here = table + tl.program_id(2)
    m, n, c = _number(here, 5, layers), 4 * _number(here, 6, layers), _number(here, 7, layers)
    count = _number(here, 8, layers)
    if VOID:
        count = tl.where(tl.load(void) == 0, count, 0)
    which = tl.program_id(1) % most
    i = (_number(here, 9, layers) + which) % r
    j = (i + r // 2) % r
    there, back = (_number(here, 10, layers) + which) % c, (_number(here, 11, layers) + which) % c
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    if tl.program_id(1) < most:  # row i of A goes; row j, whose column of B goes, is needed as it is
        inside = (at < n) & (which < count)
        A, pool = _pointer(here, 1, layers), _pointer(here, 3, layers)
        right = scratch + 4 * tl.load(here + 12 * layers) + which.to(tl.int64) * n + at
        new = tl.load(pool + there.to(tl.int64) * n + at, mask=inside)
        old = tl.load(A + i.to(tl.int64) * n + at, mask=inside)
        other = tl.load(A + j.to(tl.int64) * n + at, mask=inside)
        tl.store(right, old - new, mask=inside)
        tl.store(right + tl.cast(most, tl.int64) * n, other, mask=inside)
        tl.store(A + i.to(tl.int64) * n + at, new, mask=inside)
        tl.store(pool + back.to(tl.int64) * n + at, old, mask=inside)
    else:  # column j of B goes
        inside = (at < m) & (which < count)
        B, pool = _pointer(here, 2, layers) + at.to(tl.int64) * r, _pointer(here, 4, layers)
        left = scratch + tl.load(here + 13 * layers) + which.to(tl.int64) * m + at
        new = tl.load(pool + there.to(tl.int64) * m + at, mask=inside)
        old = tl.load(B + j, mask=inside)
        other = tl.load(B + i, mask=inside)
        tl.store(left, other * scale, mask=inside)
        tl.store(left + tl.cast(most, tl.int64) * m, (old - new) * scale, mask=inside)
        tl.store(B + j, new, mask=inside)
        tl.store(pool + back.to(tl.int64) * m + at, old, mask=inside)


@triton.jit(do_not_specialize=["layers", "most"])
def _rewrite(table, scratch, void, layers, most, VOID: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    here = table + tl.program_id(1)
    m, n, count = _number(here, 5, layers), 4 * _number(here, 6, layers), _number(here, 8, layers)
    if VOID:
        count = tl.where(tl.load(void) == 0, count, 0)
    across = tl.cdiv(n, N)
    rows = tl.program_id(0) // across * M + tl.arange(0, M)
    columns = tl.program_id(0) % across * N + tl.arange(0, N)
    inside = ((rows < m) & (count > 0))[:, None] & (columns < n)[None, :]
    W = _pointer(here, 0, layers) + rows.to(tl.int64)[:, None] * n + columns[None, :]
    weight = tl.load(W, mask=inside)
    right = scratch + 4 * tl.load(here + 12 * layers) + columns[None, :]
    left = scratch + tl.load(here + 13 * layers) + rows[:, None]
    total = tl.zeros((M, N), dtype=tl.float32)
    for k in tl.range(0, 2 * count, loop_unroll_factor=2):
        of = (k + tl.where(k < count, 0, most - count)).to(tl.int64)  # A's, then B's
        L = tl.load(left + of * m, mask=(rows < m)[:, None], other=0.0)
        R = tl.load(right + of * n, mask=(columns < n)[None, :], other=0.0)
        total += L * R
    tl.store(W, weight + total, mask=inside)


@triton.jit(do_not_specialize=["layers"])
def _hold(table, void, layers, r, VOID: tl.constexpr, LENGTH: tl.constexpr, SOME: tl.constexpr):
    here = table + tl.program_id(2)
    m, n, last = _number(here, 8, layers), 4 * _number(here, 9, layers), _number(here, 10, layers)
    held, anew = _number(here, 11, layers), _number(here, 12, layers)
    if VOID:
        held = tl.where(tl.load(void) == 0, held, 0)
    at = tl.program_id(0) * LENGTH + tl.arange(0, LENGTH)
    for start in range(0, held, SOME):
        age = start + tl.arange(0, SOME)
        column = (last + r - age) % r
        counts = (age < anew) & (tl.program_id(0) == 0)
        if tl.program_id(1) == 0:
            row = (column + r // 2) % r
            across = row.to(tl.int64)[:, None] * n + at[None, :]
            rows = (age < held)[:, None] & (at < n)[None, :]
            _clear(here, layers, across, rows, 0)
            _clear(here, layers, across, rows & (age < anew)[:, None], 1)
            _clear(here, layers, across, rows & (age < anew)[:, None], 2)
            _clear(here, layers, row, counts, 3)
        else:
            down = at.to(tl.int64)[:, None] * r + column[None, :]
            columns = (at < m)[:, None] & (age < held)[None, :]
            _clear(here, layers, down, columns, 4)
            _clear(here, layers, down, columns & (age < anew)[None, :], 5)
            _clear(here, layers, down, columns & (age < anew)[None, :], 6)
            _clear(here, layers, column, counts, 7)


@triton.jit
def _clear(here, layers, place, mask, field: tl.constexpr):
    """Zeros in some places of a tensor, if it is there."""
    address = tl.load(here + field * layers)
    zeros = tl.zeros_like(place).to(tl.float32)
    tl.store(address.to(tl.pointer_type(tl.float32)) + place, zeros, mask=mask & (address != 0))


@triton.jit
def _number(here, field: tl.constexpr, layers):
    return tl.load(here + field * layers).to(tl.int32)


@triton.jit
def _pointer(here, field: tl.constexpr, layers):
    """To a tensor in fp32, a multiple of 16."""
    return tl.multiple_of(tl.load(here + field * layers).to(tl.pointer_type(tl.float32)), 16)
