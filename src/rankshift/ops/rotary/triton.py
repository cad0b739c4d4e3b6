"""The kernels. A program turns M tokens by N pairs: a pair is a column of the first half of a head and the same of the
second. Columns of q come first, then those of k, then those of v, which is not turned."""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rankshift.ops.launch import Launcher
from rankshift.ops.rms_norm.triton import put, take, times
from rankshift.ops.rotary.reference import Low, Three

_TILE = {64: (64, 64, 4), 128: (32, 64, 4)}  # up to which rank: tokens, pairs, warps
_BACK = (32, 128, 4)  # tokens, pairs, warps


def rotate_(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, low: tuple[Low | None, Low | None, Low | None], head: int
) -> None:
    """In place, as :func:`.op.rotate_`."""
    T, ranks = len(q), [0 if term is None else term[0].shape[1] for term in low]
    M, N, warps = next(tile for limit, tile in _TILE.items() if max(ranks) <= limit)
    pairs = [q.shape[1] // 2, k.shape[1] // 2, v.shape[1] // 2 if low[2] is not None else 0]
    terms = [(x, x) if term is None else term for x, term in zip((q, k, v), low, strict=True)]
    factors = [factor for term in terms for factor in term]
    tensors = (q, k, v, cos, sin, *factors)
    _launch_rotate(
        (sum([triton.cdiv(p, N) for p in pairs]), triton.cdiv(T, M), 1), tensors,
        (T, len(cos), *[t.stride(0) for t in tensors]), Q=pairs[0], K=pairs[1], V=pairs[2],
        RQ=ranks[0], RK=ranks[1], RV=ranks[2], HALF=head // 2, EVEN=T % M == 0, M=M, N=N, num_warps=warps,
    )  # fmt: skip


def rotate_back(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, out: Three) -> None:
    """Into ``out``, as :func:`.op.rotate_back`."""
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


@triton.jit
def _rotate(
    q, k, v, cos, sin, zq, bq, zk, bk, zv, bv, T, period, q_row, k_row, v_row, cos_row, sin_row,
    zq_row, bq_row, zk_row, bk_row, zv_row, bv_row, Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    RQ: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr, HALF: tl.constexpr, EVEN: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * M + tl.arange(0, M)
    block = tl.program_id(0)
    there, turn = rows < T, rows % period
    cos += turn[:, None] * cos_row
    sin += turn[:, None] * sin_row
    at = rows.to(tl.int64)[:, None]
    if block < tl.cdiv(Q, N):
        _turn(q + at * q_row, cos, sin, zq + at * zq_row, bq, bq_row, block, there, Q, RQ, HALF, True, EVEN, M, N)
    elif block < tl.cdiv(Q, N) + tl.cdiv(K, N):
        block -= tl.cdiv(Q, N)
        _turn(k + at * k_row, cos, sin, zk + at * zk_row, bk, bk_row, block, there, K, RK, HALF, True, EVEN, M, N)
    elif V > 0:
        block -= tl.cdiv(Q, N) + tl.cdiv(K, N)
        _turn(v + at * v_row, cos, sin, zv + at * zv_row, bv, bv_row, block, there, V, RV, HALF, False, EVEN, M, N)


@triton.jit
def _turn(
    x, cos, sin, z, b, b_row, block, there, PAIRS: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr,
    TURN: tl.constexpr, EVEN: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
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


_launch_rotate, _launch_back = Launcher(_rotate), Launcher(_rotate_back)
