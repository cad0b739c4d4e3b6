"""The kernels: one keeps rows of S and passes over columns of dY, one keeps columns of dB and passes over rows.

Programs that share rows or columns write parts, and the last of them sums (ops/arrivals). One multiprocessor reads
parts at a fortieth of the rate at which all read dY: so few share.
"""
# mypy: ignore-errors

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankshift.ops.arrivals import counters
from rankshift.ops.arrivals.triton import is_last, total
from rankshift.ops.launch import Launcher

# by the padded rank: rows, columns, tiles on their way, warps, programs on a multiprocessor
_ALONG = {16: (64, 128, 4, 4, 2), 32: (64, 128, 4, 4, 2), 64: (64, 128, 3, 4, 2), 128: (128, 64, 3, 8, 1)}
_BOTH = {16: (64, 256, 4, 8, 1)}  # S and dB in one pass: wider ones have more to sum than to read
_ACROSS = {16: (128, 64, 4, 4, 2), 32: (128, 64, 4, 4, 2), 64: (64, 128, 4, 8, 1), 128: (64, 128, 4, 8, 1)}
_ACROSS_FEW = _ACROSS | {64: (128, 64, 4, 8, 1)}  # of one layer with few columns
_FEW = 4096
_MULTIPROCESSORS = 132
_ALONE = 40  # times slower than all multiprocessors is one
_ROUND = 64  # numbers that a thread sums at once
_PACK = {"SIZE": 2048, "num_warps": 8}
_GAINS = {16: (16, 256, 4, 4), 32: (16, 256, 3, 4), 64: (32, 128, 3, 4), 128: (32, 128, 3, 8)}  # all but programs
_GAINS_TALL = _GAINS | {16: (32, 256, 4, 8), 32: (32, 256, 3, 8)}  # of so many rows that all multiprocessors have some
_TALL = 32 * _MULTIPROCESSORS


def down_back(
    dY: Tensor,
    B: Tensor,
    Z: Tensor | None,
    widths: tuple[int, ...],
    scale: float,
    normed: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    """See op.down_back."""
    r = B.shape[1]
    S = torch.empty(len(dY), len(widths) * r, dtype=dY.dtype, device=dY.device)
    padded = _padded(r)
    if Z is None or padded not in _BOTH:
        _along(dY, B, S, widths, normed)
        return S, None if Z is None else _across(dY, Z, widths, r, (scale, 0.0))
    return S, _across(dY, Z, widths, r, (scale, 0.0), S=S, B=B, normed=normed)


def up_gradient(dY: Tensor, Z: Tensor, widths: tuple[int, ...]) -> Tensor:
    """See op.up_gradient."""
    return _across(dY, Z, widths, Z.shape[1] // len(widths), (1.0, 0.0))


def weight_gradient(S: Tensor, x: Tensor, gain: Tensor | None, offset: float) -> Tensor:
    """See op.weight_gradient."""
    return _across(x, S, (x.shape[1],), S.shape[1], (1.0, offset), gain=gain, turned=True)


def _along(dY: Tensor, B: Tensor, S: Tensor, widths: tuple[int, ...], normed: tuple[Tensor, Tensor] | None) -> None:
    """S, and ρ S, by themselves."""
    T, r = len(dY), B.shape[1]
    grid, parts, counted, constants = _how_along(T, widths, r)
    device = dY.device
    parts_s = torch.empty(parts, T, r, dtype=torch.float32, device=device)
    _launch_along(
        grid, (dY, B, S, parts_s, *(normed or (S, S)), counters(counted, device) if counted else S),
        (T, dY.stride(0), B.stride(0)), NORMED=normed is not None, **constants,
    )  # fmt: skip


def _across(
    dY: Tensor, Z: Tensor, widths: tuple[int, ...], r: int, floats: tuple[float, float], S: Tensor | None = None,
    B: Tensor | None = None, normed: tuple[Tensor, Tensor] | None = None, gain: Tensor | None = None,
    turned: bool = False,
) -> Tensor:  # fmt: skip
    """scale · dYᵀ Z (N, r), ``turned`` (r, N), and S if it is given."""
    T, N = dY.shape
    grid, length, down, across, counted, constants = _how_across(T, widths, r, S is not None)
    device = dY.device
    new = functools.partial(torch.empty, dtype=torch.float32, device=device)
    dB = new(r, N) if turned else new(N, r)
    out = dB if S is None else S
    b = Z if B is None else B
    _launch_across(
        grid,
        (
            dY, b, Z, out, dB, new(across, T, r), new(down, N, r), *(normed or (out, out)),
            dY if gain is None else gain, counters(counted, device) if counted else dB,
        ),
        (T, N, length, dY.stride(0), b.stride(0), Z.stride(0)), floats,
        NORMED=normed is not None, GAIN=gain is not None, TURNED=turned, **constants,
    )  # fmt: skip
    return dB


def _padded(r: int) -> int:
    return max(16, triton.next_power_of_2(r))


def _round(parts: int, warps: int) -> dict[str, int]:
    """How many parts are summed at once, and how many numbers of each."""
    at_once = min(16, triton.next_power_of_2(parts))
    return {"AT_ONCE": at_once, "SIZE": _ROUND * 32 * warps // at_once}


@functools.lru_cache(256)
def _how_along(T: int, widths: tuple[int, ...], r: int) -> tuple[tuple[int, int, int], int, int, dict[str, Any]]:
    """The grid, how many parts of S and how many counters there are, and constants."""
    rows, columns, stages, warps, _ = _ALONG[_padded(r)]
    slab, parts = _plan_along(T, widths, r)
    down, apart = triton.cdiv(T, rows), max(parts) > 1
    constants = {
        "WIDTHS": widths, "SLAB": slab, "r": r, "APART": apart,
        "EVEN": T % rows == 0 and all(n % columns == 0 for n in widths),
        "ROWS": rows, "COLUMNS": columns, "STAGES": stages, **_round(max(parts), warps), "num_warps": warps,
    }  # fmt: skip
    return (sum(parts), down, 1), apart * sum(parts), apart * down * len(widths), constants


@functools.lru_cache(256)
def _how_across(
    T: int, widths: tuple[int, ...], r: int, both: bool
) -> tuple[tuple[int, int, int], int, int, int, int, dict[str, Any]]:
    """The grid, a program's rows, how many parts of dB and of S and how many counters there are, and constants."""
    rows, columns, stages, warps, _ = _tile_across(widths, r, both)
    length, down = _plan_across(T, widths, r, both)
    chunks, apart = [triton.cdiv(n, columns) for n in widths], down > 1
    across = sum(chunks)
    constants = {
        "WIDTHS": widths, "r": r, "BOTH": both, "APART": apart,
        "EVEN": T % rows == 0 and all(n % columns == 0 for n in widths),
        "ROWS": rows, "COLUMNS": columns, "STAGES": stages, **_round(max(down, both * max(chunks)), warps),
        "num_warps": warps,
    }  # fmt: skip
    counted = (both or apart) * (down * len(widths) + across)
    return (across, down, 1), length, apart * down, both * across, counted, constants


def _tile_across(widths: tuple[int, ...], r: int, both: bool) -> tuple[int, int, int, int, int]:
    few = len(widths) == 1 and widths[0] <= _FEW
    return (_BOTH if both else _ACROSS_FEW if few else _ACROSS)[_padded(r)]


def _plan_along(T: int, widths: tuple[int, ...], r: int) -> tuple[int, list[int]]:
    """How many columns a program of :func:`_rows` takes, and how many programs share the rows of each layer."""
    rows, columns, _, _, each = _ALONG[_padded(r)]
    down = triton.cdiv(T, rows)

    def parts(slab: int) -> list[int]:
        return [triton.cdiv(n, slab) for n in widths]

    def cost(slab: int) -> int:
        """In bytes: what rounds of programs might read, what they write, and what the last one reads meanwhile."""
        count = parts(slab)
        apart = max(count) > 1
        rounds = triton.cdiv(sum(count) * down, each * _MULTIPROCESSORS)
        last = _ALONE * max(count) * rows * r * 4
        return rounds * each * _MULTIPROCESSORS * rows * slab * 2 + apart * (sum(count) * T * r * 4 + last)

    slab = min(range(columns, triton.cdiv(max(widths), columns) * columns + 1, columns), key=cost)
    return slab, parts(slab)


def _plan_across(T: int, widths: tuple[int, ...], r: int, both: bool) -> tuple[int, int]:
    """How many rows a program of :func:`_columns` takes, and how many programs share the columns."""
    rows, columns, _, _, each = _tile_across(widths, r, both)
    chunks = [triton.cdiv(n, columns) for n in widths]

    def cost(length: int) -> int:
        """As above."""
        down = triton.cdiv(T, length)
        rounds = triton.cdiv(sum(chunks) * down, each * _MULTIPROCESSORS)
        parts = (down > 1) * down * sum(widths) + both * sum(chunks) * T
        last = (down > 1) * down * columns + both * max(chunks) * length
        return rounds * each * _MULTIPROCESSORS * length * columns * 2 + (parts + _ALONE * last) * r * 4

    tiles = triton.cdiv(T, rows)
    lengths = {triton.cdiv(tiles, down) * rows for down in range(1, min(tiles, 128) + 1)}
    length = min(sorted(lengths), key=cost)
    return length, triton.cdiv(T, length)


def pack(sources: Sequence[Tensor], scales: Sequence[float], targets: Sequence[Tensor]) -> None:
    """See op.pack, of up to 16 matrices."""
    sizes = [source.numel() for source in sources]
    ints = (
        tuple([source.shape[1] for source in sources]), tuple(sizes),
        tuple([source.stride() for source in sources]), tuple([target.stride() for target in targets]),
    )  # fmt: skip
    _launch_pack(
        (triton.cdiv(max(sizes), _PACK["SIZE"]), len(sources), 1), (*sources, *targets), ints,
        args=(tuple(sources), tuple(targets), tuple(map(float, scales)), *ints), **_PACK,
    )  # fmt: skip


def gains(
    weights: Sequence[Tensor], A: Tensor, B: Tensor, widths: tuple[int, ...], magnitudes: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
) -> Tensor:  # fmt: skip
    """See op.gains: a launch for each piece of the weights."""
    r, device = B.shape[1], B.device
    biased = any(bias is not None for bias in biases)
    gain = torch.empty(2 + biased, len(B), dtype=torch.float32, device=device)
    apart, at = len(A) > r, 0
    for i, W in enumerate(weights):
        span = slice(i, i + 1) if len(weights) > 1 else slice(len(widths))
        own, here = widths[span], slice(at, at + len(W))
        rows, columns, stages, warps = (_GAINS_TALL if len(W) >= _TALL else _GAINS)[_padded(r)]
        at += len(W)
        tensors = (W, A[i * r :] if apart else A, B[here], gain[:, here])
        given = [tuple([gain if t is None else t for t in some[span]]) for some in (magnitudes, biases)]
        ints = (W.shape[1], W.stride(0), A.stride(0), apart * r * A.stride(0), B.stride(0), gain.stride(0))
        _launch_gains(
            (sum([triton.cdiv(n, rows) for n in own]), 1, 1), (*tensors, *given[0], *given[1]), ints,
            args=(*tensors, *given, *ints),
            WIDTHS=own, SCALED=tuple([m is not None for m in magnitudes[span]]),
            BIASED=tuple([b is not None for b in biases[span]]), r=r, GAINS=len(gain),
            EVEN=W.shape[1] % columns == 0 and all(n % rows == 0 for n in own),
            ROWS=rows, COLUMNS=columns, STAGES=stages, num_warps=warps,
        )  # fmt: skip
    return gain


@triton.jit
def _rows(
    dY, B, S, parts_s, rstd, scaled, counts, T, y_row, b_row,
    WIDTHS: tl.constexpr, SLAB: tl.constexpr, r: tl.constexpr, NORMED: tl.constexpr, APART: tl.constexpr,
    EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    AT_ONCE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Some rows of S, or of the part of S that comes from a slab of columns."""
    R: tl.constexpr = triton.next_power_of_2(r) if r > 16 else 16
    layers: tl.constexpr = len(WIDTHS)
    slab = tl.program_id(0)
    layer, first, end, before, count = _place(slab, WIDTHS, SLAB)
    t = tl.program_id(1) * ROWS
    rows, columns, ranks = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, R)
    there, ranked = t + rows < T, ranks < r
    dY += tl.cast(t, tl.int64) * y_row
    found = tl.zeros((ROWS, R), dtype=tl.float32)
    for n in tl.range(first, tl.minimum(first + SLAB, end), COLUMNS, num_stages=STAGES):
        here = n + columns
        y = _read(dY, rows, here, y_row, there, here < end, EVEN)
        b = _read(B, here, ranks, b_row, here < end, ranked, EVEN and r == R)
        found = tl.dot(y, b, found)
    if APART:
        part = parts_s + (tl.cast(slab, tl.int64) * T + t) * r
        _write(part, found, rows, ranks, r, 1, there, ranked)
        counter = counts + tl.program_id(1) * layers + layer
        if is_last(counter, count):
            own = tl.minimum(ROWS, T - t)
            _sum_rows(parts_s, S, rstd, scaled, T, t, own, before, count, layer, layers, r, NORMED, AT_ONCE, SIZE)
            tl.store(counter, 0)
    else:
        out = tl.cast(t, tl.int64) * (layers * r) + layer * r
        _write(S + out, found, rows, ranks, layers * r, 1, there, ranked)
        if NORMED:
            found *= tl.load(rstd + t + rows, mask=there, other=0.0)[:, None]
            _write(scaled + out, found, rows, ranks, layers * r, 1, there, ranked)


@triton.jit
def _columns(
    dY, B, Z, S, dB, parts_s, parts_b, rstd, scaled, gain, counts, T, N, length, y_row, b_row, z_row, scale, offset,
    WIDTHS: tl.constexpr, r: tl.constexpr, BOTH: tl.constexpr, NORMED: tl.constexpr, GAIN: tl.constexpr,
    TURNED: tl.constexpr, APART: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, AT_ONCE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Some columns of dY against Z, over some rows; and of those rows the part of S that comes from those columns."""
    R: tl.constexpr = triton.next_power_of_2(r) if r > 16 else 16
    layers: tl.constexpr = len(WIDTHS)
    chunk, slab, down = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    layer, first, end, before, count = _place(chunk, WIDTHS, COLUMNS)
    start = slab * length
    stop = tl.minimum(start + length, T)
    rows, ranks = tl.arange(0, ROWS), tl.arange(0, R)
    columns = first + tl.arange(0, COLUMNS)
    inside, ranked = columns < end, ranks < r
    if BOTH:
        b = _read(B, columns, ranks, b_row, inside, ranked, EVEN and r == R)
    found = tl.zeros((COLUMNS, R), dtype=tl.float32)
    for t in tl.range(start, stop, ROWS, num_stages=STAGES):
        there = t + rows < T
        y = _read(dY + tl.cast(t, tl.int64) * y_row, rows, columns, y_row, there, inside, EVEN)
        z = _read(Z + tl.cast(t, tl.int64) * z_row + layer * r, rows, ranks, z_row, there, ranked, EVEN and r == R)
        found = tl.dot(tl.trans(y), z, found)
        if BOTH:
            part = parts_s + (tl.cast(chunk, tl.int64) * T + t) * r
            _write(part, tl.dot(y, b), rows, ranks, r, 1, there, ranked)
    row, rank = (1, N) if TURNED else (r, 1)
    if APART:
        part = parts_b + tl.cast(slab, tl.int64) * N * r
        _write(part, found, columns, ranks, row, rank, inside, ranked)
        counter = counts + down * layers + chunk
        if is_last(counter, down):
            for begin in range(0, COLUMNS * r, SIZE):
                at = begin + tl.arange(0, SIZE)
                column, k = (at % COLUMNS, at // COLUMNS) if TURNED else (at // r, at % r)
                column += first
                own = (at < COLUMNS * r) & (column < end)
                where = column * row + k * rank
                value = total(parts_b, down, N * r, where, own, AT_ONCE) * scale
                if GAIN:
                    value *= offset + tl.load(gain + column, mask=own, other=0.0).to(tl.float32)
                tl.store(dB + where, value, mask=own)
            tl.store(counter, 0)
    else:
        found *= scale
        if GAIN:
            found *= offset + tl.load(gain + columns, mask=inside, other=0.0).to(tl.float32)[:, None]
        _write(dB, found, columns, ranks, row, rank, inside, ranked)
    if BOTH:
        counter = counts + slab * layers + layer
        if is_last(counter, count):
            own = stop - start
            _sum_rows(parts_s, S, rstd, scaled, T, start, own, before, count, layer, layers, r, NORMED, AT_ONCE, SIZE)
            tl.store(counter, 0)


@triton.jit
def _sum_rows(
    parts_s, S, rstd, scaled, T, t, own, before, count, layer, layers: tl.constexpr, r: tl.constexpr,
    NORMED: tl.constexpr, AT_ONCE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """``own`` rows of a layer's S, from t on, and of ρ S, out of ``count`` parts."""
    parts_s += (tl.cast(before, tl.int64) * T + t) * r
    for begin in range(0, own * r, SIZE):
        at = begin + tl.arange(0, SIZE)
        inside = at < own * r
        value = total(parts_s, count, T * r, at, inside, AT_ONCE)
        row = t + at // r
        where = row.to(tl.int64) * (layers * r) + layer * r + at % r
        tl.store(S + where, value.to(S.dtype.element_ty), mask=inside)
        if NORMED:
            value *= tl.load(rstd + row, mask=inside, other=0.0)
            tl.store(scaled + where, value.to(scaled.dtype.element_ty), mask=inside)


@triton.jit
def _read(x, rows, columns, row, there, inside, EVEN: tl.constexpr):
    at = x + rows[:, None] * row + columns[None, :]
    return tl.load(at) if EVEN else tl.load(at, mask=there[:, None] & inside[None, :], other=0.0)


@triton.jit
def _write(x, value, rows, columns, row, column, there, inside):
    at = x + rows[:, None] * row + columns[None, :] * column
    tl.store(at, value.to(x.dtype.element_ty), mask=there[:, None] & inside[None, :])


@triton.jit
def _place(slab, WIDTHS: tl.constexpr, SLAB: tl.constexpr):
    """Of a slab its layer, its first column and the layer's last; of the layer its first slab and how many it has."""
    layer, first, end, begin, count = 0, 0, 0, 0, 0
    offset = 0
    before = 0
    for i in tl.static_range(len(WIDTHS)):
        inside = slab >= before
        layer = tl.where(inside, i, layer)
        first = tl.where(inside, offset + (slab - before) * SLAB, first)
        end = tl.where(inside, offset + WIDTHS[i], end)
        begin = tl.where(inside, before, begin)
        count = tl.where(inside, (WIDTHS[i] + SLAB - 1) // SLAB, count)
        offset += WIDTHS[i]
        before += (WIDTHS[i] + SLAB - 1) // SLAB
    return layer, first, end, begin, count


@triton.jit
def _pack(sources, targets, scales, widths, sizes, source_strides, target_strides, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    for i in tl.static_range(len(sources)):
        if tl.program_id(1) == i:
            row, column = at // widths[i], at % widths[i]
            source = sources[i] + row * source_strides[i][0] + column * source_strides[i][1]
            target = targets[i] + row * target_strides[i][0] + column * target_strides[i][1]
            value = tl.load(source, mask=at < sizes[i]).to(tl.float32) * scales[i]
            tl.store(target, value.to(targets[i].dtype.element_ty), mask=at < sizes[i])


@triton.jit
def _gains(
    W, A, B, gain, magnitudes, biases, K, w_row, a_row, a_layer, b_row, gain_row,
    WIDTHS: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, r: tl.constexpr, GAINS: tl.constexpr,
    EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of some rows of one layer."""
    R: tl.constexpr = triton.next_power_of_2(r) if r > 16 else 16
    layer, first, end, _, _ = _place(tl.program_id(0), WIDTHS, ROWS)
    rows, columns, ranks = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, R)
    inside, ranked = first + rows < end, ranks < r
    b = _read(B + first * b_row, rows, ranks, b_row, inside, ranked, EVEN and r == R)
    W += tl.cast(first, tl.int64) * w_row
    A += layer * a_layer
    squares = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for k in tl.range(0, K, COLUMNS, num_stages=STAGES):
        here = k + columns
        w = _read(W, rows, here, w_row, inside, here < K, EVEN)
        a = _read(A, ranks, here, a_row, ranked, here < K, EVEN and r == R)
        w = tl.dot(b, a, w.to(tl.float32))
        squares += w * w
    norm = tl.sqrt(tl.sum(squares, 1))
    c = tl.full((ROWS,), 1.0, dtype=tl.float32)
    rho = tl.zeros((ROWS,), dtype=tl.float32)
    shift = tl.zeros((ROWS,), dtype=tl.float32)
    start = 0
    for i in tl.static_range(len(WIDTHS)):
        own = inside & (layer == i)
        if SCALED[i]:
            some = own & (norm > 0)
            inverse = 1 / tl.where(some, norm, 1.0)
            rho = tl.where(some, inverse, rho)
            magnitude = tl.load(magnitudes[i] + (first - start) + rows, mask=own, other=0.0).to(tl.float32)
            c = tl.where(some, magnitude * inverse, c)
        if BIASED[i]:
            shift += tl.load(biases[i] + (first - start) + rows, mask=own, other=0.0).to(tl.float32)
        start += WIDTHS[i]
    gain += first + rows
    tl.store(gain, c, mask=inside)
    if GAINS > 2:
        tl.store(gain + gain_row, shift, mask=inside)
    tl.store(gain + (GAINS - 1) * gain_row, rho, mask=inside)


_launch_along, _launch_across, _launch_pack = Launcher(_rows), Launcher(_columns), Launcher(_pack)
_launch_gains = Launcher(_gains)
