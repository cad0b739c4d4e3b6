"""The kernels. A program has M tokens of one head, whose norm is within a row of it; heads of q come first, then those
of k, then those of v, which are neither normed nor turned."""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankshift.ops.head_norm.reference import Two
from rankshift.ops.launch import Launcher
from rankshift.ops.rms_norm.triton import put, take, times, vector
from rankshift.ops.rotary.reference import Low, Three

_WARPS = 4


def norm_rotate_(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, weights: Two, eps: float,
    low: tuple[Low | None, Low | None, Low | None],
) -> Tensor:  # fmt: skip
    """In place, as :func:`.op.norm_rotate_`."""
    T, D = len(q), len(weights[0])
    heads = [x.shape[1] // D for x in (q, k, v)]
    ranks = [0 if term is None else term[0].shape[1] for term in low]
    M = rows(D // 2, max(ranks))
    rho = torch.empty(T, heads[0] + heads[1], dtype=torch.float32, device=q.device)
    terms = [(x, x) if term is None else term for x, term in zip((q, k, v), low, strict=True)]
    tensors = (q, k, v, cos, sin, *[factor for term in terms for factor in term])
    _launch(
        (heads[0] + heads[1] + heads[2] * (ranks[2] > 0), triton.cdiv(T, M), 1), (*tensors, *weights, rho),
        (T, len(cos), *[t.stride(0) for t in tensors]), (eps,), HQ=heads[0], HK=heads[1],
        RQ=ranks[0], RK=ranks[1], RV=ranks[2], HALF=D // 2, EVEN=T % M == 0, M=M, num_warps=_WARPS,
    )  # fmt: skip
    return rho


def norm_rotate_back(
    dq: Tensor, dk: Tensor, dv: Tensor, of: Two, rho: Tensor, cos: Tensor, sin: Tensor, weights: Two, out: Three
) -> None:
    """Into ``out``, as :func:`.op.norm_rotate_back`."""
    batch, _, S, D = dq.shape
    M = rows(D // 2, 0) // 2
    _launch_back(
        (sum([x.shape[1] for x in (dq, dk, dv)]), triton.cdiv(batch * S, M), 1),
        (dq, dk, dv, *of, rho, cos, sin, *weights, *out),
        (
            batch * S, S, len(cos), *dq.stride(), *dk.stride(), *dv.stride(), *[x.stride(0) for x in of],
            cos.stride(0), sin.stride(0), *[x.stride(0) for x in out],
        ),
        HQ=dq.shape[1], HK=dk.shape[1], HALF=D // 2, EVEN=batch * S % M == 0, M=M, num_warps=_WARPS,
    )  # fmt: skip


def rows(half: int, rank: int) -> int:
    """Tokens of a program: what its registers hold."""
    return min(64, 4096 // max(16, triton.next_power_of_2(half))) // (1 if rank <= 64 else 2)


@triton.jit
def _norm_rotate(
    q, k, v, cos, sin, zq, bq, zk, bk, zv, bv, wq, wk, rho, T, period, q_row, k_row, v_row, cos_row, sin_row,
    zq_row, bq_row, zk_row, bk_row, zv_row, bv_row, eps, HQ: tl.constexpr, HK: tl.constexpr,
    RQ: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr, HALF: tl.constexpr, EVEN: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    rows, head = tl.program_id(1) * M + tl.arange(0, M), tl.program_id(0)
    there, turn = rows < T, rows % period
    cos += turn[:, None] * cos_row
    sin += turn[:, None] * sin_row
    at = rows.to(tl.int64)[:, None]
    to = rho + at * (HQ + HK) + head
    if head < HQ:
        _one(q + at * q_row, zq + at * zq_row, bq, bq_row, cos, sin, wq, to, eps, head, there, RQ, HALF, True, EVEN, M)
    elif head < HQ + HK:
        head -= HQ
        _one(k + at * k_row, zk + at * zk_row, bk, bk_row, cos, sin, wk, to, eps, head, there, RK, HALF, True, EVEN, M)
    elif RV > 0:
        head -= HQ + HK
        _one(v + at * v_row, zv + at * zv_row, bv, bv_row, cos, sin, wk, to, eps, head, there, RV, HALF, False, EVEN, M)


@triton.jit
def _one(
    x, z, b, b_row, cos, sin, weight, rho, eps, head, there, R: tl.constexpr, HALF: tl.constexpr,
    TURN: tl.constexpr, EVEN: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """In place, rows that begin at ``x``."""
    N: tl.constexpr = triton.next_power_of_2(HALF) if HALF > 16 else 16
    WHOLE: tl.constexpr = N == HALF
    pair = tl.arange(0, N)
    inside = pair < HALF
    x += head * (2 * HALF) + pair[None, :]
    first = take(x, there, inside, EVEN, WHOLE)
    second = take(x + HALF, there, inside, EVEN, WHOLE)
    if R > 0:
        b += (head * (2 * HALF) + pair[:, None]) * b_row
        first += times(z, b, there, inside, R, EVEN, WHOLE, M, N)
        second += times(z, b + HALF * b_row, there, inside, R, EVEN, WHOLE, M, N)
    if TURN:
        r = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + eps)[:, None]
        tl.store(rho, r, mask=there[:, None])
        first *= r * vector(weight + pair, inside, WHOLE)[None, :]
        second *= r * vector(weight + HALF + pair, inside, WHOLE)[None, :]
        c = take(cos + pair[None, :], there, inside, EVEN, WHOLE)
        s = take(sin + pair[None, :], there, inside, EVEN, WHOLE)
        first, second = first * c - second * s, second * c + first * s
    put(x, first, there, inside, EVEN, WHOLE)
    put(x + HALF, second, there, inside, EVEN, WHOLE)


@triton.jit
def _norm_rotate_back(
    dq, dk, dv, yq, yk, rho, cos, sin, wq, wk, q, k, v, T, S, period, dq_batch, dq_head, dq_row, dq_one,
    dk_batch, dk_head, dk_row, dk_one, dv_batch, dv_head, dv_row, dv_one, yq_row, yk_row, cos_row, sin_row,
    q_row, k_row, v_row, HQ: tl.constexpr, HK: tl.constexpr, HALF: tl.constexpr, EVEN: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    rows, head = tl.program_id(1) * M + tl.arange(0, M), tl.program_id(0)
    there, turn = rows < T, rows % period
    cos += turn[:, None] * cos_row
    sin += turn[:, None] * sin_row
    at = rows.to(tl.int64)[:, None]
    batch, token = (rows // S).to(tl.int64)[:, None], (rows % S).to(tl.int64)[:, None]
    of = rho + at * (HQ + HK) + head
    if head < HQ:
        x = dq + batch * dq_batch + token * dq_row + head.to(tl.int64) * dq_head
        _one_back(x, dq_one, yq + at * yq_row, of, cos, sin, wq, q + at * q_row, head, there, HALF, True, EVEN)
    elif head < HQ + HK:
        head -= HQ
        x = dk + batch * dk_batch + token * dk_row + head.to(tl.int64) * dk_head
        _one_back(x, dk_one, yk + at * yk_row, of, cos, sin, wk, k + at * k_row, head, there, HALF, True, EVEN)
    else:
        head -= HQ + HK
        x = dv + batch * dv_batch + token * dv_row + head.to(tl.int64) * dv_head
        _one_back(x, dv_one, yk + at * yk_row, of, cos, sin, wk, v + at * v_row, head, there, HALF, False, EVEN)


@triton.jit
def _one_back(
    x, one, y, rho, cos, sin, weight, out, head, there, HALF: tl.constexpr, TURN: tl.constexpr, EVEN: tl.constexpr
):
    N: tl.constexpr = triton.next_power_of_2(HALF) if HALF > 16 else 16
    WHOLE: tl.constexpr = N == HALF
    pair = tl.arange(0, N)
    inside = pair < HALF
    column = head * (2 * HALF) + pair[None, :]
    first = take(x + (pair * one)[None, :], there, inside, EVEN, WHOLE)
    second = take(x + ((pair + HALF) * one)[None, :], there, inside, EVEN, WHOLE)
    if TURN:
        c = take(cos + pair[None, :], there, inside, EVEN, WHOLE)
        s = take(sin + pair[None, :], there, inside, EVEN, WHOLE)
        near, far = vector(weight + pair, inside, WHOLE)[None, :], vector(weight + HALF + pair, inside, WHOLE)[None, :]
        near, far = tl.where(near == 0, 1.0, near), tl.where(far == 0, 1.0, far)  # past the end
        first, second = (first * c + second * s) * near, (second * c - first * s) * far
        y_first = take(y + column, there, inside, EVEN, WHOLE)
        y_second = take(y + column + HALF, there, inside, EVEN, WHOLE)
        stretch = tl.where(inside[None, :], c * c + s * s, 1.0)  # cos and sin are rounded
        y_first, y_second = (y_first * c + y_second * s) / stretch, (y_second * c - y_first * s) / stretch
        y_first, y_second = y_first / near, y_second / far
        r = tl.load(rho, mask=there[:, None], other=0.0)
        mean = (tl.sum(first * y_first, 1) + tl.sum(second * y_second, 1))[:, None] / (2 * HALF)
        first, second = r * (first - y_first * mean), r * (second - y_second * mean)
    put(out + column, first, there, inside, EVEN, WHOLE)
    put(out + column + HALF, second, there, inside, EVEN, WHOLE)


_launch, _launch_back = Launcher(_norm_rotate), Launcher(_norm_rotate_back)
