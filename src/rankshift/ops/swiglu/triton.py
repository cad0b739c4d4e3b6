"""The kernels: a program takes some columns of some rows, and passes over the rows a tile at a time.

With low-rank terms each warp has columns of its own, and tiles are (WARPS, ROWS, COLUMNS). Which column stands where in
a tile is chosen so that what a thread reads or writes at once, 16 bytes, is what the tensor cores have it hold of a
product: nothing goes through shared memory but factors. Without terms a tile is (ROWS, WARPS · COLUMNS) as it lies.

What a program of the backward sums of large ranks takes its registers. There tiles are (COLUMNS, ROWS), and factors
wait in shared memory.
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
from rankshift.ops.rms_norm.triton import gain_of
from rankshift.ops.swiglu import reference
from rankshift.ops.swiglu.reference import Low

# By the padded rank, 0 without terms: the tile, and programs that run at once on a multiprocessor.
_NARROW = {"ROWS": 16, "WARPS": 4, "COLUMNS": 64}
_FORWARD = {
    0: ({"ROWS": 8, "WARPS": 4, "COLUMNS": 64}, 1),
    16: (_NARROW, 4),
    32: (_NARROW, 3),
    64: (_NARROW, 3),
    128: ({"ROWS": 16, "WARPS": 8, "COLUMNS": 16}, 2),
}
_BACKWARD = {0: ({"ROWS": 4, "WARPS": 4, "COLUMNS": 64}, 1), 16: ({"ROWS": 16, "WARPS": 4, "COLUMNS": 32}, 3)}
_REGISTERS = {16: 168}  # of a thread of the backward at most, so that as many programs fit
_WIDE = {"ROWS": 32, "COLUMNS": 64, "STAGES": 2, "num_warps": 4}  # the backward's tile with larger ranks
_AT_ONCE_WIDE = {32: 3, 64: 2, 128: 2}
# With a gain the backward holds what stood before it too.
_AT_ONCE_GAINED = 2
_WIDE_GAINED = _WIDE | {"ROWS": 16}
_MULTIPROCESSORS = 132
_DEEPEST = 65535  # programs below one another in a grid
TWICE, CUBE = tl.constexpr(reference.TWICE), tl.constexpr(reference.CUBE)
MINUS_LOG2E = tl.constexpr(-math.log2(math.e))


def forward(
    g: Tensor, u: Tensor, low_g: Low | None, low_u: Low | None, activation: str, gain: Tensor | None = None
) -> Tensor:
    """See op.swiglu."""
    T, F = g.shape
    h = torch.empty(T, F, dtype=g.dtype, device=g.device)
    (zg, bg), (zu, bu) = low_g or (g, g), low_u or (g, g)
    (C, gains), ranks = gain_of(gain, g), (_rank(low_g), _rank(low_u), 0)
    padded = _padded(max(*ranks, gains))
    tile, at_once = _FORWARD[padded]
    rows, columns = tile["ROWS"], tile["WARPS"] * tile["COLUMNS"]
    across, length = triton.cdiv(F, columns), _share(T, triton.cdiv(F, columns), ranks, gains, rows, at_once)
    tensors = (g, u, h, zg, bg, zu, bu, C)
    _launch_forward(
        (across, triton.cdiv(T, length), 1), tensors, (T, F, length, *[t.stride(0) for t in tensors]),
        GELU=activation == "gelu_tanh", RG=ranks[0], RU=ranks[1], GAINS=gains,
        EVEN=T % rows == 0 and F % columns == 0, **tile, num_warps=tile["WARPS"],
    )  # fmt: skip
    return h


def backward(
    dh: Tensor, g: Tensor, u: Tensor, low_g: Low | None, low_u: Low | None, low_h: Low | None, activation: str,
    dg: Tensor, du: Tensor, h: Tensor | None, grads: Collection[str], scale: float, gain: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """See op.swiglu_back: writes dg, du and h, where there is one.

    Args:
        grads: which of db_g, db_u and da_h are wanted, by "g", "u" and "h"; their ranks are 64 at most.
    """
    T, F = g.shape
    (zg, bg), (zu, bu), (s, a) = low_g or (g, g), low_u or (g, g), low_h or (g, g)
    ranks = _rank(low_g), _rank(low_u), _rank(low_h)
    summed = [r * (name in grads) for name, r in zip("guh", ranks, strict=True)]
    C, gains = gain_of(gain, g)
    padded = _padded(max(*ranks, gains))
    if padded in _BACKWARD:
        tile, at_once = _BACKWARD[padded]
        launch, columns = _launch_backward, tile["WARPS"] * tile["COLUMNS"]
        tile = {**tile, "num_warps": tile["WARPS"]}
        if gains:
            at_once = _AT_ONCE_GAINED
        elif padded in _REGISTERS:
            tile["maxnreg"] = _REGISTERS[padded]
    else:
        tile, at_once = _WIDE_GAINED if gains else _WIDE, _AT_ONCE_WIDE[padded]
        launch, columns = _launch_backward_wide, tile["COLUMNS"]
    across, rows = triton.cdiv(F, columns), tile["ROWS"]
    length = _share(T, across, ranks, gains, rows, at_once)
    slabs = triton.cdiv(T, length)
    parts = torch.empty(slabs, F * (sum(summed) + 2 * (gains > 0)), dtype=torch.float32, device=g.device)
    tensors = (dh, g, u, dg, du, dh if h is None else h, parts, s, a, zg, bg, zu, bu, C)
    launch(
        (across, slabs, 1), tensors, (T, F, length, *[t.stride(0) for t in tensors]), (scale,),
        GELU=activation == "gelu_tanh", H=h is not None, RG=ranks[0], RU=ranks[1], RH=ranks[2], GAINS=gains,
        SG=summed[0] > 0, SU=summed[1] > 0, SH=summed[2] > 0, EVEN=T % rows == 0 and F % columns == 0, **tile,
    )  # fmt: skip
    db_g, db_u, da_h, dm = (parts[0] if slabs == 1 else parts.sum(0)).split([F * r for r in (*summed, 2 * (gains > 0))])
    return (
        db_g.view(F, -1) if summed[0] else None,
        db_u.view(F, -1) if summed[1] else None,
        da_h.view(-1, F) if summed[2] else None,
        dm if gains else None,
    )


def _rank(low: Low | None) -> int:
    return 0 if low is None else low[0].shape[1]


def _padded(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank)) if rank else 0


@functools.lru_cache(256)
def _share(T: int, across: int, ranks: tuple[int, int, int], gains: int, rows: int, at_once: int) -> int:
    """Rows of a program, of which ``across`` stand side by side: a tile without terms, or more if the grid would be too
    deep; with them so many that the last round of programs is full, and not so few that what they write for others to
    sum, and the factors that each begins with, are much beside the tiles.
    """
    if not (any(ranks) or gains):
        return rows * triton.cdiv(T, rows * _DEEPEST)
    slots = _MULTIPROCESSORS * at_once

    def cost(slabs: int) -> float:
        programs = slabs * across
        return math.ceil(programs / slots) * slots / programs + slabs * 8 * sum(ranks) / (10 * T)

    slabs = min(range(1, min(64, triton.cdiv(T, rows)) + 1), key=cost)
    return triton.cdiv(triton.cdiv(T, slabs), rows) * rows


@triton.jit
def _forward(
    g, u, h, zg, bg, zu, bu, gain, T, F, length, g_row, u_row, h_row, zg_row, bg_row, zu_row, bu_row, gain_row,
    GELU: tl.constexpr, RG: tl.constexpr, RU: tl.constexpr, GAINS: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, WARPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    TERMS: tl.constexpr = RG + RU + GAINS > 0
    first = tl.program_id(0) * (WARPS * COLUMNS)
    start = tl.program_id(1) * length
    if RG > 0:
        bg_tile = _up(bg, first, F, bg_row, RG, WARPS, COLUMNS)
    if RU > 0:
        bu_tile = _up(bu, first, F, bu_row, RU, WARPS, COLUMNS)
    for t in tl.range(start, tl.minimum(start + length, T), ROWS, num_stages=1):
        x = _read(g, t, first, T, F, g_row, EVEN, TERMS, ROWS, WARPS, COLUMNS)
        y = _read(u, t, first, T, F, u_row, EVEN, TERMS, ROWS, WARPS, COLUMNS)
        if RG > 0:
            x = tl.dot(_narrow(zg, t, T, zg_row, RG, EVEN, ROWS, WARPS), tl.trans(bg_tile, 0, 2, 1), x)
        if RU > 0:
            y = tl.dot(_narrow(zu, t, T, zu_row, RU, EVEN, ROWS, WARPS), tl.trans(bu_tile, 0, 2, 1), y)
        if GAINS > 0:
            x *= _along(gain, first, F, WARPS, COLUMNS)
            y *= _along(gain + F, first, F, WARPS, COLUMNS)
        if GAINS > 2:
            x += _along(gain + gain_row, first, F, WARPS, COLUMNS)
            y += _along(gain + gain_row + F, first, F, WARPS, COLUMNS)
        gate, _ = _gate(x, GELU)
        out = (x * gate * y).to(h.dtype.element_ty)
        _put(h, out, t, first, T, F, h_row, EVEN, TERMS, ROWS, WARPS, COLUMNS)


@triton.jit
def _backward(
    dh, g, u, dg, du, h, parts, s, a, zg, bg, zu, bu, gain, T, F, length, dh_row, g_row, u_row, dg_row, du_row, h_row,
    total, s_row, a_row, zg_row, bg_row, zu_row, bu_row, gain_row, scale,
    GELU: tl.constexpr, H: tl.constexpr, RG: tl.constexpr, RU: tl.constexpr, RH: tl.constexpr, GAINS: tl.constexpr,
    SG: tl.constexpr, SU: tl.constexpr, SH: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, WARPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    TERMS: tl.constexpr = RG + RU + RH + GAINS > 0
    first = tl.program_id(0) * (WARPS * COLUMNS)
    start = tl.program_id(1) * length
    if RH > 0:
        a_tile = _down(a, first, F, a_row, RH, WARPS, COLUMNS)
    if RG > 0:
        bg_tile = _up(bg, first, F, bg_row, RG, WARPS, COLUMNS)
    if RU > 0:
        bu_tile = _up(bu, first, F, bu_row, RU, WARPS, COLUMNS)
    if SH:
        sum_h = _zeros(WARPS, COLUMNS, RH)
    if SG:
        sum_g = _zeros(WARPS, COLUMNS, RG)
    if SU:
        sum_u = _zeros(WARPS, COLUMNS, RU)
    if GAINS > 0:
        gain_g = tl.zeros((WARPS, COLUMNS), dtype=tl.float32)
        gain_u = tl.zeros((WARPS, COLUMNS), dtype=tl.float32)
        c_g, c_u = _along(gain, first, F, WARPS, COLUMNS), _along(gain + F, first, F, WARPS, COLUMNS)
    half = dg.dtype.element_ty
    for t in tl.range(start, tl.minimum(start + length, T), ROWS, num_stages=1):
        d = _read(dh, t, first, T, F, dh_row, EVEN, TERMS, ROWS, WARPS, COLUMNS)
        x = _read(g, t, first, T, F, g_row, EVEN, TERMS, ROWS, WARPS, COLUMNS)
        y = _read(u, t, first, T, F, u_row, EVEN, TERMS, ROWS, WARPS, COLUMNS)
        if RH > 0:
            s_tile = _narrow(s, t, T, s_row, RH, EVEN, ROWS, WARPS)
            d = tl.dot(s_tile, a_tile, d)
        if RG > 0:
            zg_tile = _narrow(zg, t, T, zg_row, RG, EVEN, ROWS, WARPS)
            x = tl.dot(zg_tile, tl.trans(bg_tile, 0, 2, 1), x)
        if RU > 0:
            zu_tile = _narrow(zu, t, T, zu_row, RU, EVEN, ROWS, WARPS)
            y = tl.dot(zu_tile, tl.trans(bu_tile, 0, 2, 1), y)
        if GAINS > 0:
            before_x, before_y = x, y
            x *= c_g
            y *= c_u
        if GAINS > 2:
            x += _along(gain + gain_row, first, F, WARPS, COLUMNS)
            y += _along(gain + gain_row + F, first, F, WARPS, COLUMNS)
        gate, slope = _gate(x, GELU)
        act = x * gate
        wide_g = d * y * slope
        wide_u = d * act
        if GAINS > 0:
            gain_g += tl.sum(wide_g * before_x, 1)
            gain_u += tl.sum(wide_u * before_y, 1)
            wide_g *= c_g
            wide_u *= c_u
        out_g = wide_g.to(half)
        out_u = wide_u.to(half)
        out_h = (act * y).to(half)
        _put(dg, out_g, t, first, T, F, dg_row, EVEN, TERMS, ROWS, WARPS, COLUMNS)
        _put(du, out_u, t, first, T, F, du_row, EVEN, TERMS, ROWS, WARPS, COLUMNS)
        if H:
            _put(h, out_h, t, first, T, F, h_row, EVEN, TERMS, ROWS, WARPS, COLUMNS)
        if SG:
            sum_g = tl.dot(tl.trans(out_g, 0, 2, 1), zg_tile, sum_g)
        if SU:
            sum_u = tl.dot(tl.trans(out_u, 0, 2, 1), zu_tile, sum_u)
        if SH:
            sum_h = tl.dot(tl.trans(out_h, 0, 2, 1), s_tile, sum_h)
    part = parts + tl.program_id(1).to(tl.int64) * total
    if SG:
        _write_columns(part, sum_g * scale, first, F, RG, 1, RG, WARPS, COLUMNS)
        part += F * RG
    if SU:
        _write_columns(part, sum_u * scale, first, F, RU, 1, RU, WARPS, COLUMNS)
        part += F * RU
    if SH:
        _write_columns(part, sum_h, first, F, 1, F, RH, WARPS, COLUMNS)
        part += F * RH
    if GAINS > 0:
        rho = gain + (GAINS - 1) * gain_row
        _write_gained(part, gain_g, rho, first, F, WARPS, COLUMNS)
        _write_gained(part + F, gain_u, rho + F, first, F, WARPS, COLUMNS)


@triton.jit
def _backward_wide(
    dh, g, u, dg, du, h, parts, s, a, zg, bg, zu, bu, gain, T, F, length, dh_row, g_row, u_row, dg_row, du_row, h_row,
    total, s_row, a_row, zg_row, bg_row, zu_row, bu_row, gain_row, scale,
    GELU: tl.constexpr, H: tl.constexpr, RH: tl.constexpr, RG: tl.constexpr, RU: tl.constexpr, GAINS: tl.constexpr,
    SH: tl.constexpr, SG: tl.constexpr, SU: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * length
    if RH > 0:
        a_tile = _wide_factor(a, columns, F, 1, a_row, RH, EVEN)
    if RG > 0:
        bg_tile = _wide_factor(bg, columns, F, bg_row, 1, RG, EVEN)
    if RU > 0:
        bu_tile = _wide_factor(bu, columns, F, bu_row, 1, RU, EVEN)
    if SH:
        sum_h = _wide_zeros(COLUMNS, RH)
    if SG:
        sum_g = _wide_zeros(COLUMNS, RG)
    if SU:
        sum_u = _wide_zeros(COLUMNS, RU)
    if GAINS > 0:
        gain_g = tl.zeros((COLUMNS,), dtype=tl.float32)
        gain_u = tl.zeros((COLUMNS,), dtype=tl.float32)
    for t in tl.range(first, tl.minimum(first + length, T), ROWS, num_stages=STAGES):
        d = _wide_tile(dh, t, columns, T, F, dh_row, EVEN, ROWS)
        x = _wide_tile(g, t, columns, T, F, g_row, EVEN, ROWS)
        y = _wide_tile(u, t, columns, T, F, u_row, EVEN, ROWS)
        if RH > 0:
            s_tile = _wide_narrow(s, t, T, s_row, RH, EVEN, ROWS)
            d = tl.dot(a_tile, tl.trans(s_tile), d)
        if RG > 0:
            zg_tile = _wide_narrow(zg, t, T, zg_row, RG, EVEN, ROWS)
            x = tl.dot(bg_tile, tl.trans(zg_tile), x)
        if RU > 0:
            zu_tile = _wide_narrow(zu, t, T, zu_row, RU, EVEN, ROWS)
            y = tl.dot(bu_tile, tl.trans(zu_tile), y)
        if GAINS > 0:
            before_x, before_y = x, y
            x = _wide_gain(x, gain, gain_row, columns, F, GAINS)
            y = _wide_gain(y, gain + F, gain_row, columns, F, GAINS)
        gate, slope = _gate(x, GELU)
        act = x * gate
        half = dg.dtype.element_ty
        wide_g = d * y * slope
        wide_u = d * act
        if GAINS > 0:
            gain_g += tl.sum(wide_g * before_x, 1)
            gain_u += tl.sum(wide_u * before_y, 1)
            wide_g = _wide_gain(wide_g, gain, gain_row, columns, F, 2)
            wide_u = _wide_gain(wide_u, gain + F, gain_row, columns, F, 2)
        out_g = wide_g.to(half)
        out_u = wide_u.to(half)
        out_h = (act * y).to(half)
        _wide_put(dg, out_g, t, columns, T, F, dg_row, EVEN, ROWS)
        _wide_put(du, out_u, t, columns, T, F, du_row, EVEN, ROWS)
        if H:
            _wide_put(h, out_h, t, columns, T, F, h_row, EVEN, ROWS)
        if SG:
            sum_g = tl.dot(out_g, zg_tile, sum_g)
        if SU:
            sum_u = tl.dot(out_u, zu_tile, sum_u)
        if SH:
            sum_h = tl.dot(out_h, s_tile, sum_h)
    part = parts + tl.program_id(1).to(tl.int64) * total
    if SG:
        _wide_part(part, sum_g * scale, columns, F, RG, 1, RG)
        part += F * RG
    if SU:
        _wide_part(part, sum_u * scale, columns, F, RU, 1, RU)
        part += F * RU
    if SH:
        _wide_part(part, sum_h, columns, F, 1, F, RH)
        part += F * RH
    if GAINS > 0:
        rho = gain + (GAINS - 1) * gain_row + columns
        tl.store(part + columns, gain_g * tl.load(rho, mask=columns < F), mask=columns < F)
        tl.store(part + F + columns, gain_u * tl.load(rho + F, mask=columns < F), mask=columns < F)


@triton.jit
def _order(SIZE: tl.constexpr):
    """Which column of a warp's stands where: four threads hold a row of a product, two columns in every eight each."""
    P: tl.constexpr = SIZE if SIZE < 32 else 32
    n = tl.arange(0, SIZE)
    return n // P * P + n % 8 // 2 * (P // 4) + n % P // 8 * 2 + n % 2


@triton.jit
def _places(first, TERMS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows and columns of a tile as it is read: a warp's threads take eight rows, four of them 32 columns of each."""
    if TERMS:
        P: tl.constexpr = COLUMNS if COLUMNS < 32 else 32
        m, n = tl.arange(0, ROWS * WARPS * (COLUMNS // P))[:, None], tl.arange(0, P)[None, :]
        if P == 16:
            n = n // 4 * 4 + n % 4  # the compiler sees four in a row, and lets a thread take four
        rows = m // (8 * WARPS) % (ROWS // 8) * 8 + m % 8
        return rows, first + m // 8 % WARPS * COLUMNS + m // (ROWS * WARPS) * P + n
    else:  # noqa: RET505
        return tl.arange(0, ROWS)[:, None], first + tl.arange(0, WARPS * COLUMNS)[None, :]


@triton.jit
def _read(
    x, t, first, T, F, row, EVEN: tl.constexpr, TERMS: tl.constexpr,
    ROWS: tl.constexpr, WARPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile; with terms as (WARPS, ROWS, COLUMNS), columns in _order."""
    rows, columns = _places(first, TERMS, ROWS, WARPS, COLUMNS)
    at = x + tl.cast(t, tl.int64) * row + (rows * row + columns)
    tile = tl.load(at) if EVEN else tl.load(at, mask=(t + rows < T) & (columns < F), other=0.0)
    if TERMS:
        P: tl.constexpr = COLUMNS if COLUMNS < 32 else 32
        tile = tl.reshape(tile, (COLUMNS // P, ROWS // 8, WARPS, 8, 4, P // 8, 2))
        tile = tl.reshape(tl.permute(tile, (2, 1, 3, 0, 5, 4, 6)), (WARPS, ROWS, COLUMNS))
    return tile.to(tl.float32)


@triton.jit
def _put(
    x, tile, t, first, T, F, row, EVEN: tl.constexpr, TERMS: tl.constexpr,
    ROWS: tl.constexpr, WARPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """_read's inverse."""
    rows, columns = _places(first, TERMS, ROWS, WARPS, COLUMNS)
    at = x + tl.cast(t, tl.int64) * row + (rows * row + columns)
    if TERMS:
        P: tl.constexpr = COLUMNS if COLUMNS < 32 else 32
        tile = tl.reshape(tile, (WARPS, ROWS // 8, 8, COLUMNS // P, P // 8, 4, 2))
        tile = tl.reshape(tl.permute(tile, (3, 1, 0, 2, 5, 4, 6)), (COLUMNS // P * ROWS * WARPS, P))
    if EVEN:
        tl.store(at, tile)
    else:
        tl.store(at, tile, mask=(t + rows < T) & (columns < F))


@triton.jit
def _narrow(Z, t, T, row, r: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """Rows of Z, once for each warp: (WARPS, ROWS, R)."""
    R: tl.constexpr = triton.next_power_of_2(r) if r > 16 else 16
    rows, ranks = tl.arange(0, WARPS * ROWS)[:, None] % ROWS, tl.arange(0, R)[None, :]
    at = Z + tl.cast(t, tl.int64) * row + (rows * row + ranks)
    tile = tl.load(at) if EVEN and r == R else tl.load(at, mask=(t + rows < T) & (ranks < r), other=0.0)
    return tl.reshape(tile, (WARPS, ROWS, R))


@triton.jit
def _up(B, first, F, row, r: tl.constexpr, WARPS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of B (F, r), as (WARPS, COLUMNS, R)."""
    R: tl.constexpr = triton.next_power_of_2(r) if r > 16 else 16
    columns = first + tl.arange(0, WARPS)[:, None, None] * COLUMNS + _order(COLUMNS)[None, :, None]
    ranks = tl.arange(0, R)[None, None, :]
    return tl.load(B + (columns * row + ranks), mask=(columns < F) & (ranks < r), other=0.0)


@triton.jit
def _down(A, first, F, row, r: tl.constexpr, WARPS: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns of A (r, F), as (WARPS, R, COLUMNS): read as they lie, and then put in order."""
    R: tl.constexpr = triton.next_power_of_2(r) if r > 16 else 16
    P: tl.constexpr = COLUMNS if COLUMNS < 32 else 32
    columns = first + tl.arange(0, WARPS)[:, None, None] * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    ranks = tl.arange(0, R)[None, :, None]
    tile = tl.load(A + (columns + ranks * row), mask=(columns < F) & (ranks < r), other=0.0)
    tile = tl.reshape(tile, (WARPS, R, COLUMNS // P, 4, P // 8, 2))
    return tl.reshape(tl.permute(tile, (0, 1, 2, 4, 3, 5)), (WARPS, R, COLUMNS))


@triton.jit
def _zeros(WARPS: tl.constexpr, COLUMNS: tl.constexpr, r: tl.constexpr):
    R: tl.constexpr = triton.next_power_of_2(r) if r > 16 else 16
    return tl.zeros((WARPS, COLUMNS, R), dtype=tl.float32)


@triton.jit
def _write_columns(part, value, first, F, row, rank, r: tl.constexpr, WARPS: tl.constexpr, COLUMNS: tl.constexpr):
    """What these rows have of sums over all rows, (WARPS, COLUMNS, R)."""
    R: tl.constexpr = triton.next_power_of_2(r) if r > 16 else 16
    columns = first + tl.arange(0, WARPS)[:, None, None] * COLUMNS + _order(COLUMNS)[None, :, None]
    ranks = tl.arange(0, R)[None, None, :]
    tl.store(part + (columns * row + ranks * rank), value, mask=(columns < F) & (ranks < r))


@triton.jit
def _along(row, first, F, WARPS: tl.constexpr, COLUMNS: tl.constexpr):
    """A row of a gain, for tiles (WARPS, ROWS, COLUMNS)."""
    columns = first + tl.arange(0, WARPS)[:, None, None] * COLUMNS + _order(COLUMNS)[None, None, :]
    return tl.load(row + columns, mask=columns < F, other=0.0)


@triton.jit
def _write_gained(part, value, rho, first, F, WARPS: tl.constexpr, COLUMNS: tl.constexpr):
    """ρ times what these rows have of a sum over all rows, (WARPS, COLUMNS)."""
    columns = first + tl.arange(0, WARPS)[:, None] * COLUMNS + _order(COLUMNS)[None, :]
    tl.store(part + columns, value * tl.load(rho + columns, mask=columns < F), mask=columns < F)


@triton.jit
def _gate(x, GELU: tl.constexpr):
    """act(x) / x and the derivative of act."""
    w = x
    if GELU:
        w = TWICE * (x + CUBE * x * x * x)
    root = tl.rsqrt(1 + tl.exp2(w * MINUS_LOG2E))  # its square takes fewer instructions than a division
    gate = root * root
    rest = x * gate * (1 - gate)
    if GELU:
        rest *= TWICE * (1 + 3 * CUBE * x * x)
    return gate, gate + rest


@triton.jit
def _wide_zeros(COLUMNS: tl.constexpr, r: tl.constexpr):
    R: tl.constexpr = triton.next_power_of_2(r) if r > 16 else 16
    return tl.zeros((COLUMNS, R), dtype=tl.float32)


@triton.jit
def _wide_factor(B, columns, F, b_row, b_rank, r: tl.constexpr, EVEN: tl.constexpr):
    """Rows of B (COLUMNS, R): its columns past r are zero."""
    R: tl.constexpr = triton.next_power_of_2(r) if r > 16 else 16
    ranks = tl.arange(0, R)
    at = B + columns[:, None] * b_row + ranks[None, :] * b_rank
    inside = (columns < F)[:, None] & (ranks < r)[None, :]
    return tl.load(at) if EVEN and r == R else tl.load(at, mask=inside, other=0.0)


@triton.jit
def _wide_narrow(Z, t, T, z_row, r: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr):
    """Rows of Z (ROWS, R)."""
    R: tl.constexpr = triton.next_power_of_2(r) if r > 16 else 16
    rows, ranks = tl.arange(0, ROWS), tl.arange(0, R)
    at = Z + tl.cast(t, tl.int64) * z_row + rows[:, None] * z_row + ranks[None, :]
    inside = (t + rows < T)[:, None] & (ranks < r)[None, :]
    return tl.load(at) if EVEN and r == R else tl.load(at, mask=inside, other=0.0)


@triton.jit
def _wide_tile(x, t, columns, T, F, row, EVEN: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    at = x + tl.cast(t, tl.int64) * row + columns[:, None] + rows[None, :] * row
    inside = (columns < F)[:, None] & (t + rows < T)[None, :]
    tile = tl.load(at) if EVEN else tl.load(at, mask=inside, other=0.0)
    return tile.to(tl.float32)


@triton.jit
def _wide_put(x, value, t, columns, T, F, row, EVEN: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    at = x + tl.cast(t, tl.int64) * row + columns[:, None] + rows[None, :] * row
    if EVEN:
        tl.store(at, value.to(x.dtype.element_ty))
    else:
        tl.store(at, value.to(x.dtype.element_ty), mask=(columns < F)[:, None] & (t + rows < T)[None, :])


@triton.jit
def _wide_gain(value, gain, row, columns, F, GAINS: tl.constexpr):
    """c · value + b, of a tile (COLUMNS, ROWS)."""
    value *= tl.load(gain + columns, mask=columns < F, other=0.0)[:, None]
    if GAINS > 2:
        value += tl.load(gain + row + columns, mask=columns < F, other=0.0)[:, None]
    return value


@triton.jit
def _wide_part(part, value, columns, F, row, rank, r: tl.constexpr):
    R: tl.constexpr = triton.next_power_of_2(r) if r > 16 else 16
    ranks = tl.arange(0, R)
    at = part + columns[:, None] * row + ranks[None, :] * rank
    tl.store(at, value, mask=(columns < F)[:, None] & (ranks < r)[None, :])


_launch_forward, _launch_backward = Launcher(_forward), Launcher(_backward)
_launch_backward_wide = Launcher(_backward_wide)
