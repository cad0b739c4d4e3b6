"""The kernels: M whole rows for each program, N columns of them at a time.

A mean over a row is known only after its last column, so norm and norm_back go over their rows twice. The second time
back to front, so that much of it comes from the cache.
"""
# mypy: ignore-errors

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankshift.ops.arrivals import counters
from rankshift.ops.arrivals.triton import is_last
from rankshift.ops.arrivals.triton import total as summed
from rankshift.ops.launch import Launcher
from rankshift.ops.rms_norm.reference import Low

# up to which rank: rows, columns, warps, and how many blocks of columns are in work or on their way
_NORM = {16: (16, 512, 8, 3), 64: (16, 256, 8, 3), 128: (16, 128, 4, 3)}
_BACK = {64: (32, 128, 8, 3), 192: (32, 128, 8, 2), 384: (32, 64, 8, 2)}
_PICK = (8, 1024, 4)  # rows, numbers of them at most, warps at most
_ADD = {32: (32, 256, 8), 128: (32, 128, 8)}
_ADD_BACK = {32: (16, 256, 4), 128: (16, 128, 4)}
_PROGRAMS = 3 * 132  # of add_back, that share the rows: what runs at once


def norm(
    x: Tensor, weight: Tensor, eps: float, offset: float, y: Tensor | None, low: Low | None, gain: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x₂, n and ρ, as :func:`.op.norm`."""
    T, K = x.shape
    n, rstd = x.new_empty(T, K), x.new_empty(T, dtype=torch.float32)
    x2 = x if y is None else x.new_empty(T, K)
    M, N, warps, deep = _tile(_NORM, low)
    Z, B = (x, x) if low is None else low
    Y = x if y is None else y
    C, rows = gain_of(gain, x)
    _launch_norm(
        (triton.cdiv(T, M), 1, 1), (x, Y, Z, B, C, weight, x2, n, rstd),
        (T, x.stride(0), Y.stride(0), Z.stride(0), B.stride(0), C.stride(0)), (eps, offset),
        K=K, R=_rank(low), GAINS=rows, SUM=y is not None, EVEN=T % M == 0, M=M, N=N, DEEP=deep, num_warps=warps,
    )  # fmt: skip
    return x2, n, rstd


def norm_back(
    dn: Tensor, x2: Tensor, rstd: Tensor, weight: Tensor, offset: float, low: Low | None, z: Tensor | None,
    residual: Tensor | None, more: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """dx, as :func:`.op.norm_back`."""
    T, K = dn.shape
    dx = dn.new_empty(T, K)
    M, N, warps, deep = _tile(_BACK, low)
    S, A = (dn, dn) if low is None else low
    Z = dn if z is None else z
    past = dn if residual is None else residual
    second, third = (*more, dn, dn)[:2]
    _launch_norm_back(
        (triton.cdiv(T, M), 1, 1), (dn, second, third, x2, rstd, weight, S, A, Z, past, dx),
        (T, *[t.stride(0) for t in (dn, second, third, x2, S, A, Z, past)]), (offset,),
        K=K, R=_rank(low), KNOWN=low is None or z is not None, PAST=residual is not None, MORE=len(more),
        EVEN=T % M == 0, M=M, N=N, DEEP=deep, num_warps=warps,
    )  # fmt: skip
    return dx


def add(x: Tensor, y: Tensor, low: Low | None, gain: Tensor | None = None) -> Tensor:
    """x + y + Z Bᵀ, as :func:`.op.add`."""
    T, K = x.shape
    total = x.new_empty(T, K)
    M, N, warps = _tile(_ADD, low)
    Z, B = (x, x) if low is None else low
    C, rows = gain_of(gain, x)
    _launch_add(
        (triton.cdiv(T, M), triton.cdiv(K, N), 1), (x, y, Z, B, C, total),
        (T, x.stride(0), y.stride(0), Z.stride(0), B.stride(0), C.stride(0)),
        K=K, R=_rank(low), GAINS=rows, EVEN=T % M == 0, M=M, N=N, num_warps=warps,
    )  # fmt: skip
    return total


def add_back(dx: Tensor, y: Tensor, low: Low | None, gain: Tensor) -> tuple[Tensor, Tensor]:
    """c dx and ρ Σ dx (y + Z Bᵀ), as :func:`.op.add_back`."""
    T, K = dx.shape
    M, N, warps = _tile(_ADD_BACK, low)
    across = triton.cdiv(K, N)
    length = triton.cdiv(triton.cdiv(T, max(1, _PROGRAMS // across)), M) * M
    down = triton.cdiv(T, length)
    new = functools.partial(torch.empty, dtype=torch.float32, device=dx.device)
    dy, parts, sums = dx.new_empty(T, K), new(down, K), new(K)
    Z, B = (dx, dx) if low is None else low
    _launch_add_back(
        (across, down, 1), (dx, y, Z, B, gain, dy, parts, sums, counters(across, dx.device)),
        (T, length, dx.stride(0), y.stride(0), Z.stride(0), B.stride(0), gain.stride(0)),
        K=K, R=_rank(low), GAINS=len(gain), EVEN=T % M == 0, M=M, N=N, num_warps=warps,
    )  # fmt: skip
    return dy, sums


def gain_of(gain: Tensor | None, other: Tensor) -> tuple[Tensor, int]:
    """A gain as kernels take it, and how many rows it has: 0 where there is none."""
    return (other, 0) if gain is None else (gain, len(gain))


def pick(
    x: Tensor, channels: Sequence[Tensor], rstd: Tensor | None, weight: Tensor | None, offset: float, scale: float
) -> Tensor:
    """Some channels, as :func:`.op.pick`."""
    ranks = tuple([len(some) for some in channels])
    T, k = len(x), sum(ranks)
    picked = x.new_empty(T, k)
    rows, most, warps = _PICK
    N = triton.next_power_of_2(max(ranks))
    M = max(1, min(rows, most // N))
    rest = x if rstd is None else rstd, x if weight is None else weight, picked
    _launch_pick(
        (triton.cdiv(T, M), 1, 1), (x, *channels, *rest), (T, k, x.stride(0)), (offset, scale),
        args=(x, tuple(channels), *rest, T, k, x.stride(0), float(offset), float(scale)),
        RANKS=ranks, NORMED=rstd is not None, M=M, N=N, num_warps=max(1, min(warps, N // 32)),
    )  # fmt: skip
    return picked


def _tile(table: dict[int, tuple[int, ...]], low: Low | None) -> tuple[int, ...]:
    return next(tile for limit, tile in table.items() if _rank(low) <= limit)


def _rank(low: Low | None) -> int:
    return 0 if low is None else low[0].shape[1]


@triton.jit
def _norm(
    x, y, z, b, gain, weight, x2, n, rstd, T, x_row, y_row, z_row, b_row, gain_row, eps, offset,
    K: tl.constexpr, R: tl.constexpr, GAINS: tl.constexpr, SUM: tl.constexpr, EVEN: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * M + tl.arange(0, M)
    there = rows < T
    WHOLE: tl.constexpr = K % N == 0
    at = rows.to(tl.int64)[:, None]
    squares = tl.zeros((M,), dtype=tl.float32)
    for first in tl.range(0, K, N, num_stages=DEEP):
        columns = first + tl.arange(0, N)
        inside = columns < K
        value = take(x + at * x_row + columns[None, :], there, inside, EVEN, WHOLE)
        if SUM:
            more = take(y + at * y_row + columns[None, :], there, inside, EVEN, WHOLE)
            term = times(z + at * z_row, b + columns[:, None] * b_row, there, inside, R, EVEN, WHOLE, M, N)
            if GAINS > 0:
                value += gained(more + term, gain + columns, gain_row, inside, GAINS, WHOLE)
            else:
                value += more
                value += term
            value = put(x2 + at * K + columns[None, :], value, there, inside, EVEN, WHOLE)
        squares += tl.sum(value * value, 1)
    scale = tl.rsqrt(squares / K + eps)
    tl.store(rstd + rows, scale, mask=there)
    if SUM:
        tl.debug_barrier()  # what one thread has put another takes
        x = x2
        x_row = K
    for back in tl.range(0, K, N, num_stages=DEEP):
        columns = (K - 1) // N * N - back + tl.arange(0, N)
        inside = columns < K
        value = take(x + at * x_row + columns[None, :], there, inside, EVEN, WHOLE)
        w = offset + vector(weight + columns, inside, WHOLE)
        put(n + at * K + columns[None, :], value * scale[:, None] * w[None, :], there, inside, EVEN, WHOLE)


@triton.jit
def _norm_back(
    dn, second, third, x2, rstd, weight, s, a, z, past, dx,
    T, dn_row, second_row, third_row, x2_row, s_row, a_row, z_row, past_row, offset,
    K: tl.constexpr, R: tl.constexpr, KNOWN: tl.constexpr, PAST: tl.constexpr, MORE: tl.constexpr,
    EVEN: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * M + tl.arange(0, M)
    there = rows < T
    WHOLE: tl.constexpr = K % N == 0
    at = rows.to(tl.int64)[:, None]
    scale = tl.load(rstd + rows, mask=there, other=1.0)
    product = tl.zeros((M,), dtype=tl.float32)
    for first in tl.range(0, K, N, num_stages=DEEP):
        columns = first + tl.arange(0, N)
        inside = columns < K
        g = take(dn + at * dn_row + columns[None, :], there, inside, EVEN, WHOLE)
        if MORE > 0:
            g += take(second + at * second_row + columns[None, :], there, inside, EVEN, WHOLE)
        if MORE > 1:
            g += take(third + at * third_row + columns[None, :], there, inside, EVEN, WHOLE)
        value = take(x2 + at * x2_row + columns[None, :], there, inside, EVEN, WHOLE)
        if not KNOWN:
            g += _times_across(s + at * s_row, a + columns[None, :], a_row, there, inside, R, EVEN, WHOLE, M, N)
        w = offset + vector(weight + columns, inside, WHOLE)
        product += tl.sum(g * w[None, :] * value, 1)
    if KNOWN:  # Σ (S A) w x₂ = S Z / ρ, without A
        product += _inner(s + at * s_row, z + at * z_row, there, R, EVEN, M) / scale
    along = scale * scale * product / K
    for back in tl.range(0, K, N, num_stages=DEEP):
        columns = (K - 1) // N * N - back + tl.arange(0, N)
        inside = columns < K
        g = take(dn + at * dn_row + columns[None, :], there, inside, EVEN, WHOLE)
        if MORE > 0:
            g += take(second + at * second_row + columns[None, :], there, inside, EVEN, WHOLE)
        if MORE > 1:
            g += take(third + at * third_row + columns[None, :], there, inside, EVEN, WHOLE)
        value = take(x2 + at * x2_row + columns[None, :], there, inside, EVEN, WHOLE)
        if PAST:
            rest = take(past + at * past_row + columns[None, :], there, inside, EVEN, WHOLE)
        g += _times_across(s + at * s_row, a + columns[None, :], a_row, there, inside, R, EVEN, WHOLE, M, N)
        w = offset + vector(weight + columns, inside, WHOLE)
        g = (g * w[None, :] - value * along[:, None]) * scale[:, None]
        if PAST:
            g += rest
        put(dx + at * K + columns[None, :], g, there, inside, EVEN, WHOLE)


@triton.jit
def _add(
    x, y, z, b, gain, total, T, x_row, y_row, z_row, b_row, gain_row,
    K: tl.constexpr, R: tl.constexpr, GAINS: tl.constexpr, EVEN: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * M + tl.arange(0, M)
    columns = tl.program_id(1) * N + tl.arange(0, N)
    there, inside = rows < T, columns < K
    WHOLE: tl.constexpr = K % N == 0
    at = rows.to(tl.int64)[:, None]
    value = take(x + at * x_row + columns[None, :], there, inside, EVEN, WHOLE)
    more = take(y + at * y_row + columns[None, :], there, inside, EVEN, WHOLE)
    term = times(z + at * z_row, b + columns[:, None] * b_row, there, inside, R, EVEN, WHOLE, M, N)
    if GAINS > 0:
        value += gained(more + term, gain + columns, gain_row, inside, GAINS, WHOLE)
    else:
        value += more
        value += term
    put(total + at * K + columns[None, :], value, there, inside, EVEN, WHOLE)


@triton.jit
def _add_back(
    dx, y, z, b, gain, dy, parts, sums, counts, T, length, dx_row, y_row, z_row, b_row, gain_row,
    K: tl.constexpr, R: tl.constexpr, GAINS: tl.constexpr, EVEN: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Some columns of some rows; the last program of those columns sums what all have."""
    columns = tl.program_id(0) * N + tl.arange(0, N)
    inside = columns < K
    WHOLE: tl.constexpr = K % N == 0
    start, down = tl.program_id(1) * length, tl.num_programs(1)
    c = vector(gain + columns, inside, WHOLE)
    found = tl.zeros((M, N), dtype=tl.float32)
    for t in tl.range(start, tl.minimum(start + length, T), M, num_stages=2):
        rows = t + tl.arange(0, M)
        there = rows < T
        at = rows.to(tl.int64)[:, None]
        d = take(dx + at * dx_row + columns[None, :], there, inside, EVEN, WHOLE)
        value = take(y + at * y_row + columns[None, :], there, inside, EVEN, WHOLE)
        value += times(z + at * z_row, b + columns[:, None] * b_row, there, inside, R, EVEN, WHOLE, M, N)
        found += d * value
        put(dy + at * K + columns[None, :], d * c[None, :], there, inside, EVEN, WHOLE)
    tl.store(parts + tl.program_id(1) * K + columns, tl.sum(found, 0), mask=inside)
    if is_last(counts + tl.program_id(0), down):
        rho = vector(gain + (GAINS - 1) * gain_row + columns, inside, WHOLE)
        tl.store(sums + columns, rho * summed(parts, down, K, columns, inside, 16), mask=inside)
        tl.store(counts + tl.program_id(0), 0)


@triton.jit(do_not_specialize=["k"])
def _pick(
    x, channels, rstd, weight, picked, T, k, x_row, offset, scale,
    RANKS: tl.constexpr, NORMED: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Row by row, so that threads stand side by side along channels and read the same 32 bytes together; k as it comes,
    lest each be given several to write at once. What is written may be x, for all the compiler knows: so all is read
    first."""
    first = tl.program_id(0) * M
    columns = tl.arange(0, N)
    values = ()
    gains = ()
    rhos = ()
    for m in tl.static_range(M if NORMED else 0):
        rhos += (tl.load(rstd + first + m, mask=first + m < T, other=0.0),)
    for i in tl.static_range(len(RANKS)):
        channel = tl.load(channels[i] + columns, mask=columns < RANKS[i], other=0).to(tl.int32)
        for m in tl.static_range(M):
            row = first + m
            inside = (columns < RANKS[i]) & (row < T)
            values += (tl.load(x + tl.cast(row, tl.int64) * x_row + channel, mask=inside, other=0.0),)
        if NORMED:
            gains += (offset + tl.load(weight + channel, mask=columns < RANKS[i], other=0.0).to(tl.float32),)
    for m in tl.static_range(M):
        row = first + m
        at = picked + tl.cast(row, tl.int64) * k
        for i in tl.static_range(len(RANKS)):
            value = values[i * M + m].to(tl.float32)
            if NORMED:
                value *= rhos[m] * gains[i]
            tl.store(at + columns, (value * scale).to(picked.dtype.element_ty), mask=(columns < RANKS[i]) & (row < T))
            at += RANKS[i]


@triton.jit
def take(at, there, inside, EVEN: tl.constexpr, WHOLE: tl.constexpr):
    """(M, N) in fp32. EVEN: all rows are there. WHOLE: all columns are inside."""
    if EVEN and WHOLE:
        value = tl.load(at)
    elif WHOLE:
        value = tl.load(at, mask=there[:, None], other=0.0)
    else:
        value = tl.load(at, mask=there[:, None] & inside[None, :], other=0.0)
    return value.to(tl.float32)


@triton.jit
def put(at, value, there, inside, EVEN: tl.constexpr, WHOLE: tl.constexpr):
    """Store it, and return what was stored, in fp32."""
    value = value.to(at.dtype.element_ty)
    if EVEN and WHOLE:
        tl.store(at, value)
    elif WHOLE:
        tl.store(at, value, mask=there[:, None])
    else:
        tl.store(at, value, mask=there[:, None] & inside[None, :])
    return value.to(tl.float32)


@triton.jit
def times(
    z, b, there, inside, R: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """(M, N) of Z Bᵀ: rows of Z (., R) begin at ``z`` (M, 1), those of B (., R) at ``b`` (N, 1)."""
    total = tl.zeros((M, N), dtype=tl.float32)
    STEP: tl.constexpr = _step(R)
    for first in tl.static_range(0, R, STEP):
        ranks = first + tl.arange(0, STEP)
        Z = _ranks_of(z, ranks, there, R, STEP, EVEN)
        B = _ranks_of(b, ranks, inside, R, STEP, WHOLE)
        total = tl.dot(Z, tl.trans(B), total)
    return total


@triton.jit
def _times_across(
    s, a, a_row, there, inside, R: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """(M, N) of S A: rows of S (., R) begin at ``s`` (M, 1), columns of A (R, .) at ``a`` (1, N)."""
    total = tl.zeros((M, N), dtype=tl.float32)
    STEP: tl.constexpr = _step(R)
    for first in tl.static_range(0, R, STEP):
        ranks = first + tl.arange(0, STEP)
        S = _ranks_of(s, ranks, there, R, STEP, EVEN)
        if R % STEP == 0 and WHOLE:
            A = tl.load(a + ranks[:, None] * a_row)
        else:
            A = tl.load(a + ranks[:, None] * a_row, mask=(ranks < R)[:, None] & inside[None, :], other=0.0)
        total = tl.dot(S, A, total)
    return total


@triton.jit
def _inner(s, z, there, R: tl.constexpr, EVEN: tl.constexpr, M: tl.constexpr):
    """(M,) of the inner products of rows."""
    total = tl.zeros((M,), dtype=tl.float32)
    STEP: tl.constexpr = _step(R)
    for first in tl.static_range(0, R, STEP):
        ranks = first + tl.arange(0, STEP)
        S = _ranks_of(s, ranks, there, R, STEP, EVEN).to(tl.float32)
        total += tl.sum(S * _ranks_of(z, ranks, there, R, STEP, EVEN).to(tl.float32), 1)
    return total


@triton.jit
def _ranks_of(start, ranks, there, R: tl.constexpr, STEP: tl.constexpr, ALL: tl.constexpr):
    if ALL and R % STEP == 0:
        value = tl.load(start + ranks[None, :])
    else:
        value = tl.load(start + ranks[None, :], mask=there[:, None] & (ranks < R)[None, :], other=0.0)
    return value


@triton.jit
def gained(value, gain, row, inside, GAINS: tl.constexpr, WHOLE: tl.constexpr):
    """c · value + b of (M, N); b is there if the gain has three rows."""
    value *= vector(gain, inside, WHOLE)[None, :]
    if GAINS > 2:
        value += vector(gain + row, inside, WHOLE)[None, :]
    return value


@triton.jit
def vector(at, inside, WHOLE: tl.constexpr):
    """(N,) in fp32."""
    value = tl.load(at) if WHOLE else tl.load(at, mask=inside, other=0.0)
    return value.to(tl.float32)


@triton.constexpr_function
def _step(R):
    """How many of the ranks at a time."""
    return 16 if R % 32 else 32 if R % 64 else 64


_launch_norm, _launch_norm_back = Launcher(_norm), Launcher(_norm_back)
_launch_add, _launch_add_back, _launch_pick = Launcher(_add), Launcher(_add_back), Launcher(_pick)
