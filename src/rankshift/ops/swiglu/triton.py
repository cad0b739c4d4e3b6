"""The kernels: a program takes some columns of some rows, and passes over the rows a tile at a time.

Tiles are held as (COLUMNS, ROWS): what a product with a low-rank factor leaves in registers is then what the sums over
rows take from there. Tiles are small, so that several programs run on a multiprocessor and wait by turns.
"""
# mypy: ignore-errors

from __future__ import annotations

import functools
import math
from collections.abc import Collection

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankshift.ops.launch import Launcher
from rankshift.ops.swiglu import reference
from rankshift.ops.swiglu.reference import Low

_FORWARD = {"ROWS": 32, "COLUMNS": 128, "STAGES": 2, "num_warps": 8}
_BACKWARD = {"ROWS": 32, "COLUMNS": 64, "STAGES": 2, "num_warps": 4}
_LENGTH = 512  # rows of a program that sums nothing over them
_SLOTS = {16: 396, 32: 396, 64: 264}  # programs that run at once on 132 multiprocessors, by the padded rank
TWICE, CUBE = tl.constexpr(reference.TWICE), tl.constexpr(reference.CUBE)


def forward(g: Tensor, u: Tensor, low_g: Low | None, low_u: Low | None, activation: str) -> Tensor:
    """See op.swiglu."""
    T, F = g.shape
    h = torch.empty(T, F, dtype=g.dtype, device=g.device)
    (zg, bg), (zu, bu) = low_g or (g, g), low_u or (g, g)
    rows, columns = _FORWARD["ROWS"], _FORWARD["COLUMNS"]
    tensors = (g, u, h, zg, bg, zu, bu)
    _launch_forward(
        (triton.cdiv(F, columns), triton.cdiv(T, _LENGTH), 1), tensors,
        (T, F, _LENGTH, *[t.stride(0) for t in tensors]),
        GELU=activation == "gelu_tanh", RG=_rank(low_g), RU=_rank(low_u),
        EVEN=T % rows == 0 and F % columns == 0, **_FORWARD,
    )  # fmt: skip
    return h


def backward(
    dh: Tensor, g: Tensor, u: Tensor, low_g: Low | None, low_u: Low | None, low_h: Low | None, activation: str,
    dg: Tensor, du: Tensor, h: Tensor | None, grads: Collection[str], scale: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """See op.swiglu_back: writes dg, du and h, where there is one.

    Args:
        grads: which of db_g, db_u and da_h are wanted, by "g", "u" and "h"; their ranks are 64 at most.
    """
    T, F = g.shape
    (zg, bg), (zu, bu) = low_g or (g, g), low_u or (g, g)
    s, a = low_h or (g, g)
    out_h = g if h is None else h
    ranks = [_rank(low) * (name in grads) for name, low in zip("guh", (low_g, low_u, low_h), strict=True)]
    rows, columns = _BACKWARD["ROWS"], _BACKWARD["COLUMNS"]
    length = _share(T, triton.cdiv(F, columns), tuple(ranks), rows) if any(ranks) else _LENGTH
    slabs = triton.cdiv(T, length)
    parts = torch.empty(slabs, F * sum(ranks), dtype=torch.float32, device=g.device)
    tensors = (dh, g, u, dg, du, out_h, parts, s, a, zg, bg, zu, bu)
    _launch_backward(
        (triton.cdiv(F, columns), slabs, 1), tensors, (T, F, length, *[t.stride(0) for t in tensors]), (scale,),
        GELU=activation == "gelu_tanh", H=h is not None, RH=_rank(low_h), RG=_rank(low_g), RU=_rank(low_u),
        SG=ranks[0] > 0, SU=ranks[1] > 0, SH=ranks[2] > 0, EVEN=T % rows == 0 and F % columns == 0, **_BACKWARD,
    )  # fmt: skip
    db_g, db_u, da_h = (parts[0] if slabs == 1 else parts.sum(0)).split([F * r for r in ranks])
    return (
        db_g.view(F, -1) if ranks[0] else None,
        db_u.view(F, -1) if ranks[1] else None,
        da_h.view(-1, F) if ranks[2] else None,
    )


def _rank(low: Low | None) -> int:
    return 0 if low is None else low[0].shape[1]


@functools.cache
def _share(T: int, across: int, ranks: tuple[int, ...], rows: int) -> int:
    """Rows of a program, of which ``across`` stand side by side: so many that the last round of programs is full, and
    not so few that what they write for others to sum is much beside the tiles.
    """
    slots = _SLOTS[max(16, triton.next_power_of_2(max(ranks)))]

    def cost(slabs: int) -> float:
        programs = slabs * across
        return math.ceil(programs / slots) * slots / programs + slabs * 8 * sum(ranks) / (10 * T)

    slabs = min(range(1, min(16, triton.cdiv(T, rows)) + 1), key=cost)
    return triton.cdiv(triton.cdiv(T, slabs), rows) * rows


@triton.jit
def _forward(
    g, u, h, zg, bg, zu, bu, T, F, length, g_row, u_row, h_row, zg_row, bg_row, zu_row, bu_row,
    GELU: tl.constexpr, RG: tl.constexpr, RU: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * length
    if RG > 0:
        bg_tile = _factor(bg, columns, F, bg_row, 1, RG, EVEN)
    if RU > 0:
        bu_tile = _factor(bu, columns, F, bu_row, 1, RU, EVEN)
    for t in tl.range(first, tl.minimum(first + length, T), ROWS, num_stages=STAGES):
        x = _tile(g, t, columns, T, F, g_row, EVEN, ROWS)
        y = _tile(u, t, columns, T, F, u_row, EVEN, ROWS)
        if RG > 0:
            x = tl.dot(bg_tile, tl.trans(_narrow(zg, t, T, zg_row, RG, EVEN, ROWS)), x)
        if RU > 0:
            y = tl.dot(bu_tile, tl.trans(_narrow(zu, t, T, zu_row, RU, EVEN, ROWS)), y)
        gate, _ = _gate(x, GELU)
        _put(h, x * gate * y, t, columns, T, F, h_row, EVEN, ROWS)


@triton.jit
def _backward(
    dh, g, u, dg, du, h, parts, s, a, zg, bg, zu, bu, T, F, length,
    dh_row, g_row, u_row, dg_row, du_row, h_row, total, s_row, a_row, zg_row, bg_row, zu_row, bu_row, scale,
    GELU: tl.constexpr, H: tl.constexpr, RH: tl.constexpr, RG: tl.constexpr, RU: tl.constexpr,
    SH: tl.constexpr, SG: tl.constexpr, SU: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * length
    if RH > 0:
        a_tile = _factor(a, columns, F, 1, a_row, RH, EVEN)
    if RG > 0:
        bg_tile = _factor(bg, columns, F, bg_row, 1, RG, EVEN)
    if RU > 0:
        bu_tile = _factor(bu, columns, F, bu_row, 1, RU, EVEN)
    if SH:
        sum_h = _zeros(COLUMNS, RH)
    if SG:
        sum_g = _zeros(COLUMNS, RG)
    if SU:
        sum_u = _zeros(COLUMNS, RU)
    for t in tl.range(first, tl.minimum(first + length, T), ROWS, num_stages=STAGES):
        d = _tile(dh, t, columns, T, F, dh_row, EVEN, ROWS)
        x = _tile(g, t, columns, T, F, g_row, EVEN, ROWS)
        y = _tile(u, t, columns, T, F, u_row, EVEN, ROWS)
        if RH > 0:
            s_tile = _narrow(s, t, T, s_row, RH, EVEN, ROWS)
            d = tl.dot(a_tile, tl.trans(s_tile), d)
        if RG > 0:
            zg_tile = _narrow(zg, t, T, zg_row, RG, EVEN, ROWS)
            x = tl.dot(bg_tile, tl.trans(zg_tile), x)
        if RU > 0:
            zu_tile = _narrow(zu, t, T, zu_row, RU, EVEN, ROWS)
            y = tl.dot(bu_tile, tl.trans(zu_tile), y)
        gate, slope = _gate(x, GELU)
        act = x * gate
        half = dg.dtype.element_ty
        out_g = (d * y * slope).to(half)
        out_u = (d * act).to(half)
        out_h = (act * y).to(half)
        _put(dg, out_g, t, columns, T, F, dg_row, EVEN, ROWS)
        _put(du, out_u, t, columns, T, F, du_row, EVEN, ROWS)
        if H:
            _put(h, out_h, t, columns, T, F, h_row, EVEN, ROWS)
        if SG:
            sum_g = tl.dot(out_g, zg_tile, sum_g)
        if SU:
            sum_u = tl.dot(out_u, zu_tile, sum_u)
        if SH:
            sum_h = tl.dot(out_h, s_tile, sum_h)
    part = parts + tl.program_id(1).to(tl.int64) * total
    if SG:
        _part(part, sum_g * scale, columns, F, RG, 1, RG)
        part += F * RG
    if SU:
        _part(part, sum_u * scale, columns, F, RU, 1, RU)
        part += F * RU
    if SH:
        _part(part, sum_h, columns, F, 1, F, RH)


@triton.jit
def _zeros(COLUMNS: tl.constexpr, r: tl.constexpr):
    R: tl.constexpr = triton.next_power_of_2(r) if r > 16 else 16
    return tl.zeros((COLUMNS, R), dtype=tl.float32)


@triton.jit
def _factor(B, columns, F, b_row, b_rank, r: tl.constexpr, EVEN: tl.constexpr):
    """Rows of B (COLUMNS, R): its columns past r are zero."""
    R: tl.constexpr = triton.next_power_of_2(r) if r > 16 else 16
    ranks = tl.arange(0, R)
    at = B + columns[:, None] * b_row + ranks[None, :] * b_rank
    inside = (columns < F)[:, None] & (ranks < r)[None, :]
    return tl.load(at) if EVEN and r == R else tl.load(at, mask=inside, other=0.0)


@triton.jit
def _narrow(Z, t, T, z_row, r: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr):
    """Rows of Z (ROWS, R)."""
    R: tl.constexpr = triton.next_power_of_2(r) if r > 16 else 16
    rows, ranks = tl.arange(0, ROWS), tl.arange(0, R)
    at = Z + tl.cast(t, tl.int64) * z_row + rows[:, None] * z_row + ranks[None, :]
    inside = (t + rows < T)[:, None] & (ranks < r)[None, :]
    return tl.load(at) if EVEN and r == R else tl.load(at, mask=inside, other=0.0)


@triton.jit
def _tile(x, t, columns, T, F, row, EVEN: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    at = x + tl.cast(t, tl.int64) * row + columns[:, None] + rows[None, :] * row
    inside = (columns < F)[:, None] & (t + rows < T)[None, :]
    tile = tl.load(at) if EVEN else tl.load(at, mask=inside, other=0.0)
    return tile.to(tl.float32)


@triton.jit
def _put(x, value, t, columns, T, F, row, EVEN: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    at = x + tl.cast(t, tl.int64) * row + columns[:, None] + rows[None, :] * row
    if EVEN:
        tl.store(at, value.to(x.dtype.element_ty))
    else:
        tl.store(at, value.to(x.dtype.element_ty), mask=(columns < F)[:, None] & (t + rows < T)[None, :])


@triton.jit
def _part(part, value, columns, F, row, rank, r: tl.constexpr):
    R: tl.constexpr = triton.next_power_of_2(r) if r > 16 else 16
    ranks = tl.arange(0, R)
    at = part + columns[:, None] * row + ranks[None, :] * rank
    tl.store(at, value, mask=(columns < F)[:, None] & (ranks < r)[None, :])


@triton.jit
def _gate(x, GELU: tl.constexpr):
    """act(x) / x and the derivative of act."""
    w = x
    if GELU:
        w = TWICE * (x + CUBE * x * x * x)
    gate = 1 / (1 + tl.exp(-w))
    rest = x * gate * (1 - gate)
    if GELU:
        rest *= TWICE * (1 + 3 * CUBE * x * x)
    return gate, gate + rest


_launch_forward, _launch_backward = Launcher(_forward), Launcher(_backward)
