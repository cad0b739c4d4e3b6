"""The kernels. A program of the first keeps the rows of S that it takes, and passes once over the columns of dY."""
# mypy: ignore-errors

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankshift.ops.launch import Launcher

_TILES = {  # by the padded rank: several programs fit on a multiprocessor, or one with more of its tiles on their way
    16: {"ROWS": 256, "COLUMNS": 64, "STAGES": 2, "num_warps": 8},
    32: {"ROWS": 256, "COLUMNS": 64, "STAGES": 2, "num_warps": 8},
    64: {"ROWS": 256, "COLUMNS": 64, "STAGES": 3, "num_warps": 8},
    128: {"ROWS": 128, "COLUMNS": 64, "STAGES": 3, "num_warps": 8},
}
# programs that run at once on 132 multiprocessors, by the padded rank: with S alone, and with dB
_SLOTS = {16: (396, 264), 32: (264, 264), 64: (132, 132), 128: (264, 132)}
_SUM = {"AT_ONCE": 16, "SIZE": 512, "num_warps": 8}
_PACK = {"SIZE": 2048, "num_warps": 8}


def down_back(
    dY: Tensor,
    B: Tensor,
    Z: Tensor | None,
    widths: tuple[int, ...],
    scale: float,
    normed: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    """See op.down_back."""
    T, r, sums = dY.shape[0], B.shape[1], Z is not None
    tile, slab, across, down, even = _plan(T, widths, r, sums)
    N, layers = sum(widths), len(widths)
    new = functools.partial(torch.empty, dtype=torch.float32, device=dY.device)
    parts_s, parts_b = new(across, T, r), new(down if sums else 0, N, r)
    S = torch.empty(T, layers * r, dtype=dY.dtype, device=dY.device)
    dB = new(N, r) if sums else S
    blocks, rest = triton.cdiv(T * r, _SUM["SIZE"]) * layers, triton.cdiv(N * r, _SUM["SIZE"]) * sums
    _launch_down(
        (across, down, 1), (dY, B, Z if sums else B, parts_s, parts_b),
        (T, N, dY.stride(0), B.stride(0), Z.stride(0) if sums else 0), (scale,),
        WIDTHS=widths, SLAB=slab, r=r, SUMS=sums, EVEN=even, **tile,
    )  # fmt: skip
    _launch_sum(
        (blocks + rest, 1, 1), (parts_s, parts_b, S, dB, *(normed or (S, S))), (T, N, down, blocks),
        WIDTHS=widths, SLAB=slab, r=r, NORMED=normed is not None, **_SUM,
    )  # fmt: skip
    return S, dB if sums else None


@functools.lru_cache(256)
def _plan(T: int, widths: tuple[int, ...], r: int, sums: bool) -> tuple[dict[str, int], int, int, int, bool]:
    """The tile, how many columns a program takes, how many programs stand side by side and below one another, and
    whether all their tiles are full.

    As many columns as let the programs run in full rounds, without much that they write for others to sum.
    """
    padded = max(16, triton.next_power_of_2(r))
    tile, slots = _TILES[padded], _SLOTS[padded][sums]
    rows, columns = tile["ROWS"], tile["COLUMNS"]
    down = triton.cdiv(T, rows)

    def across(slab: int) -> int:
        return sum(triton.cdiv(n, slab) for n in widths)

    def cost(slab: int) -> int:
        """In bytes: what rounds of programs might read, and what is written and read again."""
        return triton.cdiv(across(slab) * down, slots) * slots * rows * slab * 2 + across(slab) * T * r * 8

    slab = min(range(2 * columns, 4096 + 1, columns), key=cost)
    even = T % rows == 0 and all(n % columns == 0 for n in widths)
    return tile, slab, across(slab), down, even


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


@triton.jit
def _down(
    dY, B, Z, S, dB, T, N, y_row, b_row, z_row, scale,
    WIDTHS: tl.constexpr, SLAB: tl.constexpr, r: tl.constexpr, SUMS: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = triton.next_power_of_2(r) if r > 16 else 16
    slab = tl.program_id(0)
    layer, first, end = _place(slab, WIDTHS, SLAB)
    t = tl.program_id(1) * ROWS
    rows, columns, ranks = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, R)
    there, ranked = t + rows < T, ranks < r
    dY += tl.cast(t, tl.int64) * y_row
    if SUMS:
        Z += tl.cast(t, tl.int64) * z_row + layer * r
        z = _read(Z, rows, ranks, z_row, there, ranked, EVEN and r == R)
    total = tl.zeros((ROWS, R), dtype=tl.float32)
    for n in tl.range(first, tl.minimum(first + SLAB, end), COLUMNS, num_stages=STAGES):
        here = n + columns
        y = _read(dY, rows, here, y_row, there, here < end, EVEN)
        b = _read(B, here, ranks, b_row, here < end, ranked, EVEN and r == R)
        total = tl.dot(y, b, total)
        if SUMS:
            part = dB + tl.cast(tl.program_id(1), tl.int64) * N * r
            _write(part, tl.dot(tl.trans(y), z) * scale, here, ranks, r, here < end, ranked)
    S += (tl.cast(slab, tl.int64) * T + t) * r
    _write(S, total, rows, ranks, r, there, ranked)


@triton.jit
def _read(x, rows, columns, row, there, inside, EVEN: tl.constexpr):
    at = x + rows[:, None] * row + columns[None, :]
    return tl.load(at) if EVEN else tl.load(at, mask=there[:, None] & inside[None, :], other=0.0)


@triton.jit
def _write(x, value, rows, columns, row, there, inside):
    tl.store(x + rows[:, None] * row + columns[None, :], value, mask=there[:, None] & inside[None, :])


@triton.jit
def _place(slab, WIDTHS: tl.constexpr, SLAB: tl.constexpr):
    """Which layer a slab belongs to, where it begins, and where the layer ends."""
    layer, first, end = 0, 0, 0
    offset = 0
    before = 0
    for i in tl.static_range(len(WIDTHS)):
        inside = slab >= before
        layer = tl.where(inside, i, layer)
        first = tl.where(inside, offset + (slab - before) * SLAB, first)
        end = tl.where(inside, offset + WIDTHS[i], end)
        offset += WIDTHS[i]
        before += (WIDTHS[i] + SLAB - 1) // SLAB
    return layer, first, end


@triton.jit
def _sum(
    parts_s, parts_b, S, dB, rstd, scaled, T, N, down, blocks,
    WIDTHS: tl.constexpr, SLAB: tl.constexpr, r: tl.constexpr, NORMED: tl.constexpr,
    AT_ONCE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """S from what each slab of columns has, dB from what each tile of rows has."""
    block = tl.program_id(0)
    if block < blocks:
        layers: tl.constexpr = len(WIDTHS)
        layer = block % layers
        at = block // layers * SIZE + tl.arange(0, SIZE)
        before, count = 0, 0
        slabs = 0
        for i in tl.static_range(layers):
            before = tl.where(layer == i, slabs, before)
            count = tl.where(layer == i, (WIDTHS[i] + SLAB - 1) // SLAB, count)
            slabs += (WIDTHS[i] + SLAB - 1) // SLAB
        total = _total(parts_s + tl.cast(before, tl.int64) * T * r, count, T * r, at, AT_ONCE)
        where = tl.cast(at // r, tl.int64) * (layers * r) + layer * r + at % r
        tl.store(S + where, total.to(S.dtype.element_ty), mask=at < T * r)
        if NORMED:
            total *= tl.load(rstd + at // r, mask=at < T * r, other=0.0)
            tl.store(scaled + where, total.to(S.dtype.element_ty), mask=at < T * r)
    else:
        at = (block - blocks) * SIZE + tl.arange(0, SIZE)
        tl.store(dB + at, _total(parts_b, down, N * r, at, AT_ONCE).to(dB.dtype.element_ty), mask=at < N * r)


@triton.jit
def _total(parts, count, size, at, AT_ONCE: tl.constexpr):
    """The numbers ``at`` of ``count`` parts of ``size`` numbers, summed."""
    total = tl.zeros(at.shape, dtype=tl.float32)
    for first in range(0, count, AT_ONCE):
        which = first + tl.arange(0, AT_ONCE)
        inside = (which < count)[:, None] & (at < size)[None, :]
        total += tl.sum(tl.load(parts + which.to(tl.int64)[:, None] * size + at[None, :], mask=inside, other=0.0), 0)
    return total


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


_launch_down, _launch_sum, _launch_pack = Launcher(_down), Launcher(_sum), Launcher(_pack)
