"""The kernels. A program turns M tokens by N pairs: a pair is a column of the first half of a head and the same of the
second. Columns of q come first, then those of k, then those of v, which is not turned."""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankshift.ops.arrivals import counters
from rankshift.ops.arrivals.triton import is_last, total
from rankshift.ops.launch import Launcher
from rankshift.ops.rms_norm.triton import gain_of, gained, put, take, times, vector
from rankshift.ops.rotary.reference import Low, Three

_TILE = {64: (64, 64, 4), 128: (32, 64, 4)}  # up to which rank: tokens, pairs, warps
_BACK = (32, 128, 4)  # tokens, pairs, warps
_BACK_GAINED = (16, 128, 4)
_PROGRAMS = 3 * 132  # of the latter, that share the tokens: what runs at once


def rotate_(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, low: tuple[Low | None, Low | None, Low | None],
    head: int, gain: Tensor | None = None,
) -> None:  # fmt: skip
    """In place, as :func:`.op.rotate_`."""
    T, ranks = len(q), [0 if term is None else term[0].shape[1] for term in low]
    M, N, warps = next(tile for limit, tile in _TILE.items() if max(ranks) <= limit)
    pairs = [q.shape[1] // 2, k.shape[1] // 2, v.shape[1] // 2 if low[2] is not None or gain is not None else 0]
    terms = [(x, x) if term is None else term for x, term in zip((q, k, v), low, strict=True)]
    factors = [factor for term in terms for factor in term]
    C, rows = gain_of(gain, q)
    tensors = (q, k, v, cos, sin, *factors, C)
    _launch_rotate(
        (sum([triton.cdiv(p, N) for p in pairs]), triton.cdiv(T, M), 1), tensors,
        (T, len(cos), *[t.stride(0) for t in tensors]), Q=pairs[0], K=pairs[1], V=pairs[2],
        RQ=ranks[0], RK=ranks[1], RV=ranks[2], GAINS=rows, HALF=head // 2, EVEN=T % M == 0, M=M, N=N, num_warps=warps,
    )  # fmt: skip


def rotate_back(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, out: Three, of: Three | None = None,
    gain: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Into ``out``, as :func:`.op.rotate_back`."""
    if of is not None and gain is not None:
        return _rotate_back_with(dq, dk, dv, cos, sin, out, of, gain)
    batch, _, S, D = dq.shape
    M, N, warps = _BACK
    pairs = [x.shape[1] * D // 2 for x in (dq, dk, dv)]
    _launch_back(
        (sum([triton.cdiv(p, N) for p in pairs]), triton.cdiv(batch * S, M), 1), (dq, dk, dv, cos, sin, *out),
        (
            batch * S, S, len(cos), *dq.stride(), *dk.stride(), *dv.stride(), cos.stride(0), sin.stride(0),
            *[x.stride(0) for x in out],
        ),
        Q=pairs[0], K=pairs[1], V=pairs[2], HALF=D // 2, EVEN=batch * S % M == 0, M=M, N=N, num_warps=warps,
    )  # fmt: skip
    return None


def _rotate_back_with(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, out: Three, of: Three, gain: Tensor
) -> Tensor:
    """The same, with a gain."""
    batch, _, S, D = dq.shape
    T, columns = batch * S, gain.shape[1]
    M, N, warps = _BACK_GAINED
    pairs = [x.shape[1] * D // 2 for x in (dq, dk, dv)]
    across = sum([triton.cdiv(p, N) for p in pairs])
    length = triton.cdiv(triton.cdiv(T, max(1, _PROGRAMS // across)), M) * M
    down = triton.cdiv(T, length)
    parts, sums = (torch.empty(n * columns, dtype=torch.float32, device=dq.device) for n in (down, 1))
    _launch_back_gained(
        (across, down, 1), (dq, dk, dv, *of, cos, sin, gain, *out, parts, sums, counters(across, dq.device)),
        (
            T, S, len(cos), length, *dq.stride(), *dk.stride(), *dv.stride(), *[x.stride(0) for x in of],
            cos.stride(0), sin.stride(0), gain.stride(0), *[x.stride(0) for x in out],
        ),
        Q=pairs[0], K=pairs[1], V=pairs[2], GAINS=len(gain), HALF=D // 2, EVEN=T % M == 0, M=M, N=N, num_warps=warps,
    )  # fmt: skip
    return sums


@triton.jit
def _rotate(
    q, k, v, cos, sin, zq, bq, zk, bk, zv, bv, gain, T, period, q_row, k_row, v_row, cos_row, sin_row,
    zq_row, bq_row, zk_row, bk_row, zv_row, bv_row, gain_row, Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    RQ: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr, GAINS: tl.constexpr, HALF: tl.constexpr, EVEN: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * M + tl.arange(0, M)
    block = tl.program_id(0)
    there, turn = rows < T, rows % period
    cos += turn[:, None] * cos_row
    sin += turn[:, None] * sin_row
    at = rows.to(tl.int64)[:, None]
    if block < tl.cdiv(Q, N):
        _turn(
            q + at * q_row, cos, sin, zq + at * zq_row, bq, bq_row, gain, gain_row, block, there,
            Q, RQ, GAINS, HALF, True, EVEN, M, N,
        )  # fmt: skip
    elif block < tl.cdiv(Q, N) + tl.cdiv(K, N):
        block -= tl.cdiv(Q, N)
        _turn(
            k + at * k_row, cos, sin, zk + at * zk_row, bk, bk_row, gain + 2 * Q, gain_row, block, there,
            K, RK, GAINS, HALF, True, EVEN, M, N,
        )  # fmt: skip
    elif V > 0:
        block -= tl.cdiv(Q, N) + tl.cdiv(K, N)
        _turn(
            v + at * v_row, cos, sin, zv + at * zv_row, bv, bv_row, gain + 2 * (Q + K), gain_row, block, there,
            V, RV, GAINS, HALF, False, EVEN, M, N,
        )  # fmt: skip


@triton.jit
def _turn(
    x, cos, sin, z, b, b_row, gain, gain_row, block, there, PAIRS: tl.constexpr, R: tl.constexpr,
    GAINS: tl.constexpr, HALF: tl.constexpr, TURN: tl.constexpr, EVEN: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """In place, rows that begin at ``x``."""
    pair = block * N + tl.arange(0, N)
    near = pair // HALF * (2 * HALF) + pair % HALF
    inside = pair < PAIRS
    WHOLE: tl.constexpr = PAIRS % N == 0
    first = take(x + near[None, :], there, inside, EVEN, WHOLE)
    second = take(x + near[None, :] + HALF, there, inside, EVEN, WHOLE)
    if R > 0:
        first += times(z, b + near[:, None] * b_row, there, inside, R, EVEN, WHOLE, M, N)
        second += times(z, b + (near[:, None] + HALF) * b_row, there, inside, R, EVEN, WHOLE, M, N)
    if GAINS > 0:
        first = gained(first, gain + near, gain_row, inside, GAINS, WHOLE)
        second = gained(second, gain + near + HALF, gain_row, inside, GAINS, WHOLE)
    if TURN:
        c = take(cos + (pair % HALF)[None, :], there, inside, EVEN, WHOLE)
        s = take(sin + (pair % HALF)[None, :], there, inside, EVEN, WHOLE)
        first, second = first * c - second * s, second * c + first * s
    put(x + near[None, :], first, there, inside, EVEN, WHOLE)
    put(x + near[None, :] + HALF, second, there, inside, EVEN, WHOLE)


@triton.jit
def _rotate_back(
    dq, dk, dv, cos, sin, q, k, v, T, S, period, dq_batch, dq_head, dq_row, dq_one, dk_batch, dk_head, dk_row, dk_one,
    dv_batch, dv_head, dv_row, dv_one, cos_row, sin_row, q_row, k_row, v_row, Q: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, HALF: tl.constexpr, EVEN: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * M + tl.arange(0, M)
    block = tl.program_id(0)
    there, turn = rows < T, rows % period
    cos += turn[:, None] * cos_row
    sin += turn[:, None] * sin_row
    at = rows.to(tl.int64)[:, None]
    batch, token = (rows // S).to(tl.int64)[:, None], (rows % S).to(tl.int64)[:, None]
    if block < tl.cdiv(Q, N):
        x, to = dq + batch * dq_batch + token * dq_row, q + at * q_row
        _turn_back(x, to, dq_head, dq_one, cos, sin, block, there, Q, HALF, True, EVEN, N)
    elif block < tl.cdiv(Q, N) + tl.cdiv(K, N):
        block -= tl.cdiv(Q, N)
        x, to = dk + batch * dk_batch + token * dk_row, k + at * k_row
        _turn_back(x, to, dk_head, dk_one, cos, sin, block, there, K, HALF, True, EVEN, N)
    else:
        block -= tl.cdiv(Q, N) + tl.cdiv(K, N)
        x, to = dv + batch * dv_batch + token * dv_row, v + at * v_row
        _turn_back(x, to, dv_head, dv_one, cos, sin, block, there, V, HALF, False, EVEN, N)


@triton.jit
def _turn_back(
    x, out, head, one, cos, sin, block, there, PAIRS: tl.constexpr, HALF: tl.constexpr, TURN: tl.constexpr,
    EVEN: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    pair = block * N + tl.arange(0, N)
    near = pair // HALF * (2 * HALF) + pair % HALF
    inside = pair < PAIRS
    WHOLE: tl.constexpr = PAIRS % N == 0
    x += (pair // HALF).to(tl.int64)[None, :] * head
    first = take(x + (pair % HALF * one)[None, :], there, inside, EVEN, WHOLE)
    second = take(x + ((pair % HALF + HALF) * one)[None, :], there, inside, EVEN, WHOLE)
    if TURN:
        c = take(cos + (pair % HALF)[None, :], there, inside, EVEN, WHOLE)
        s = take(sin + (pair % HALF)[None, :], there, inside, EVEN, WHOLE)
        first, second = first * c + second * s, second * c - first * s
    put(out + near[None, :], first, there, inside, EVEN, WHOLE)
    put(out + near[None, :] + HALF, second, there, inside, EVEN, WHOLE)


@triton.jit
def _rotate_back_gained(
    dq, dk, dv, yq, yk, yv, cos, sin, gain, q, k, v, parts, sums, counts, T, S, period, length,
    dq_batch, dq_head, dq_row, dq_one, dk_batch, dk_head, dk_row, dk_one, dv_batch, dv_head, dv_row, dv_one,
    yq_row, yk_row, yv_row, cos_row, sin_row, gain_row, q_row, k_row, v_row, Q: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, GAINS: tl.constexpr, HALF: tl.constexpr, EVEN: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    width: tl.constexpr = 2 * (Q + K + V)
    if block < tl.cdiv(Q, N):
        _some_back(
            dq, yq, cos, sin, gain, q, parts, sums, counts, T, S, period, length, dq_batch, dq_head, dq_row, dq_one,
            yq_row, cos_row, sin_row, gain_row, q_row, block, width, Q, GAINS, HALF, True, EVEN, M, N,
        )  # fmt: skip
    elif block < tl.cdiv(Q, N) + tl.cdiv(K, N):
        block -= tl.cdiv(Q, N)
        _some_back(
            dk, yk, cos, sin, gain + 2 * Q, k, parts + 2 * Q, sums + 2 * Q, counts, T, S, period, length, dk_batch,
            dk_head, dk_row, dk_one, yk_row, cos_row, sin_row, gain_row, k_row, block, width, K, GAINS, HALF, True,
            EVEN, M, N,
        )  # fmt: skip
    else:
        block -= tl.cdiv(Q, N) + tl.cdiv(K, N)
        _some_back(
            dv, yv, cos, sin, gain + 2 * (Q + K), v, parts + 2 * (Q + K), sums + 2 * (Q + K), counts, T, S, period,
            length, dv_batch, dv_head, dv_row, dv_one, yv_row, cos_row, sin_row, gain_row, v_row, block, width, V,
            GAINS, HALF, False, EVEN, M, N,
        )  # fmt: skip


@triton.jit
def _some_back(
    x, y, cos, sin, gain, out, parts, sums, counts, T, S, period, length, batch_step, head, token_step, one,
    y_row, cos_row, sin_row, gain_row, out_row, block, width, PAIRS: tl.constexpr, GAINS: tl.constexpr,
    HALF: tl.constexpr, TURN: tl.constexpr, EVEN: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Some columns of ``length`` rows; the last program of those columns sums what all have."""
    pair = block * N + tl.arange(0, N)
    near = pair // HALF * (2 * HALF) + pair % HALF
    inside = pair < PAIRS
    WHOLE: tl.constexpr = PAIRS % N == 0
    x += (pair // HALF).to(tl.int64)[None, :] * head
    gain += near
    c_first, c_second = vector(gain, inside, WHOLE), vector(gain + HALF, inside, WHOLE)
    sum_first = tl.zeros((M, N), dtype=tl.float32)
    sum_second = tl.zeros((M, N), dtype=tl.float32)
    start, down = tl.program_id(1) * length, tl.num_programs(1)
    for t in tl.range(start, tl.minimum(start + length, T), M, num_stages=2):
        rows = t + tl.arange(0, M)
        there, turn = rows < T, rows % period
        at = rows.to(tl.int64)[:, None]
        from_ = x + (rows // S).to(tl.int64)[:, None] * batch_step + (rows % S).to(tl.int64)[:, None] * token_step
        first = take(from_ + (pair % HALF * one)[None, :], there, inside, EVEN, WHOLE)
        second = take(from_ + ((pair % HALF + HALF) * one)[None, :], there, inside, EVEN, WHOLE)
        y_first = take(y + at * y_row + near[None, :], there, inside, EVEN, WHOLE)
        y_second = take(y + at * y_row + near[None, :] + HALF, there, inside, EVEN, WHOLE)
        if TURN:
            c = take(cos + turn[:, None] * cos_row + (pair % HALF)[None, :], there, inside, EVEN, WHOLE)
            s = take(sin + turn[:, None] * sin_row + (pair % HALF)[None, :], there, inside, EVEN, WHOLE)
            first, second = first * c + second * s, second * c - first * s
            stretch = c * c + s * s  # for they are rounded
            if not (EVEN and WHOLE):
                stretch = tl.where(stretch == 0, 1.0, stretch)  # of what is not there
            back = 1 / stretch
            y_first, y_second = (y_first * c + y_second * s) * back, (y_second * c - y_first * s) * back
        if GAINS > 2:
            y_first -= vector(gain + gain_row, inside, WHOLE)[None, :]
            y_second -= vector(gain + gain_row + HALF, inside, WHOLE)[None, :]
        sum_first += first * y_first
        sum_second += second * y_second
        put(out + at * out_row + near[None, :], first * c_first[None, :], there, inside, EVEN, WHOLE)
        put(out + at * out_row + near[None, :] + HALF, second * c_second[None, :], there, inside, EVEN, WHOLE)
    part = parts + tl.program_id(1) * width + near
    tl.store(part, tl.sum(sum_first, 0), mask=inside)
    tl.store(part + HALF, tl.sum(sum_second, 0), mask=inside)
    counter = counts + tl.program_id(0)
    if is_last(counter, down):
        rho = gain + (GAINS - 1) * gain_row
        ratio = tl.where(c_first == 0, 0.0, vector(rho, inside, WHOLE) / tl.where(c_first == 0, 1.0, c_first))
        tl.store(sums + near, ratio * total(parts, down, width, near, inside, 16), mask=inside)
        ratio = tl.where(c_second == 0, 0.0, vector(rho + HALF, inside, WHOLE) / tl.where(c_second == 0, 1.0, c_second))
        tl.store(sums + near + HALF, ratio * total(parts, down, width, near + HALF, inside, 16), mask=inside)
        tl.store(counter, 0)


_launch_rotate, _launch_back = Launcher(_rotate), Launcher(_rotate_back)
_launch_back_gained = Launcher(_rotate_back_gained)
