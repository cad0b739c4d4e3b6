"""The kernels: of a weight alone, some thousand numbers for each program.

A thread reads 8 codes as one word and writes 8 weights as 16 bytes, several times over, so that reads are under way
together. Levels are looked up in shared memory, where 16 numbers lie in 16 banks: no two lookups wait for each other.

With a product added, a program takes some columns of some rows and passes over the rows, 16 at a time; a warp has
columns of its own. Which column stands where is chosen so that the 8 weights of a word are what the tensor cores have
a thread hold of a product: weights are what the product is accumulated onto, and never go through shared memory.
"""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankshift.ops.launch import Launcher

_TILE = (512, 4)  # runs of weights for each program, and its warps
_EXACT = {"enable_fp_fusion": False}  # bitsandbytes rounds between a product and a sum
# by the padded rank: warps, columns of each, and programs that run at once on a multiprocessor
_MERGED = {16: (4, 64, 7), 32: (4, 64, 5), 64: (4, 64, 4), 128: (8, 32, 2), 256: (4, 32, 2)}
_ROWS = 16
_MULTIPROCESSORS = 132


def launch(codes: Tensor, absmax: Tensor, scales: Tensor | None, table: Tensor, block: int, out: Tensor) -> None:
    """Fill ``out`` (contiguous, of 16 or 32 bits).

    Args:
        table: 256 levels of absmax codes, then the 16 of weights.
    """
    runs, warps = _TILE
    count, width = out.numel(), 16 // out.element_size()
    if count == 0:
        return
    with torch.cuda.device_of(codes):
        _dequantise[(triton.cdiv(count, runs * width),)](
            codes, absmax if scales is not None else absmax.view(torch.float32),
            table if scales is None else scales.view(torch.float32), table, out, count,
            BLOCK=block, NESTED=scales is not None, WHOLE=count % width == 0, RUNS=runs, WIDTH=width,
            num_warps=warps, **_EXACT,
        )  # fmt: skip


def adds(into: int, block: int, rank: int) -> bool:
    """Whether :func:`launch_merged` takes a weight of so many columns: a warp's have one absmax in each row."""
    return into % 64 == 0 and block % 64 == 0 and rank <= max(_MERGED)


def launch_merged(
    codes: Tensor, absmax: Tensor, scales: Tensor | None, table: Tensor, block: int, B: Tensor, A: Tensor, out: Tensor
) -> None:
    """Fill ``out`` (m, n), of 16 bits and contiguous, with the weight + B A.

    Args:
        table: as above.
        B: (m, r), A: (r, n), of its dtype; numbers of a row side by side.
    """
    (m, n), rank = out.shape, len(A)
    warps, columns, at_once = _MERGED[max(16, triton.next_power_of_2(rank))]
    across = triton.cdiv(n, warps * columns)
    if m * n == 0:
        return
    slabs = max(1, _MULTIPROCESSORS * at_once // across)
    length = triton.cdiv(triton.cdiv(m, slabs), _ROWS) * _ROWS
    nested = scales is not None
    _launch_merged(
        (across, triton.cdiv(m, length), 1),
        (
            codes, absmax if nested else absmax.view(torch.float32), scales.view(torch.float32) if nested else table,
            table, B, A, out,
        ),
        (m, n // 64, length, B.stride(0), A.stride(0)),
        BLOCK=block, NESTED=nested, RANK=rank, EVEN=m % _ROWS == 0 and n % (warps * columns) == 0,
        ROWS=_ROWS, WARPS=warps, COLUMNS=columns, num_warps=warps, **_EXACT,
    )  # fmt: skip


@triton.jit
def _dequantise(
    codes, absmax, scales, table, out, count,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, WHOLE: tl.constexpr, RUNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A run is WIDTH weights side by side; WHOLE says that count is a multiple of it. No run has two absmax, and no
    program two scales."""
    tl.static_assert(BLOCK % WIDTH == 0 and RUNS * WIDTH <= 256 * BLOCK)
    first = tl.program_id(0).to(tl.int64) * (RUNS * WIDTH)
    left = tl.minimum(count - first, RUNS * WIDTH).to(tl.int32)
    runs = tl.arange(0, RUNS) * WIDTH
    across = tl.arange(0, WIDTH)
    inside = runs < left

    pairs = tl.arange(0, WIDTH // 2)
    there = inside[:, None] if WHOLE else runs[:, None] + pairs[None, :] * 2 < left
    byte = tl.load(codes + first // 2 + (runs // 2)[:, None] + pairs[None, :], mask=there, other=0)
    block = first // BLOCK
    largest = tl.load(absmax + block + runs // BLOCK, mask=inside, other=0)
    if NESTED:
        largest = tl.load(table + largest) * tl.load(scales + 1 + block // 256) + tl.load(scales)
    levels = tl.load(table + 256 + tl.arange(0, 16))

    # bytes of a run as one word, of which the compiler sees that it was loaded as such
    word = tl.xor_sum(byte.to(tl.uint32) << (pairs * 8).to(tl.uint32)[None, :], 1)
    code = (word[:, None] >> ((across ^ 1) * 4).to(tl.uint32)[None, :]) & 15  # the first of two in the high half
    level = tl.reshape(tl.gather(levels, tl.reshape(code.to(tl.int32), (RUNS * WIDTH,)), 0), (RUNS, WIDTH))
    weight = (level * largest[:, None]).to(out.dtype.element_ty)
    there = inside[:, None] if WHOLE else runs[:, None] + across[None, :] < left
    tl.store(out + first + runs[:, None] + across[None, :], weight, mask=there)


@triton.jit
def _merge(
    codes, absmax, scales, table, B, A, out, m, spans, length, b_row, a_row,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, RANK: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, WARPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A row is ``spans`` times 64 weights. Four threads have 32 of them, eight times four a warp's of eight rows."""
    tl.static_assert(BLOCK % 64 == 0 and 64 % COLUMNS == 0 and COLUMNS % 32 == 0 and ROWS % 16 == 0)
    PARTS: tl.constexpr = COLUMNS // 32
    TALL: tl.constexpr = ROWS * WARPS
    n = spans * 64
    first, start = tl.program_id(0) * (WARPS * COLUMNS), tl.program_id(1) * length
    word, half, across = tl.arange(0, 4), tl.arange(0, 4), tl.arange(0, 8)
    # where 32 weights begin, of all; and the first of each warp, whose absmax is that of its others
    many, few = tl.arange(0, PARTS * TALL), tl.arange(0, TALL)
    rows, few_rows = many // (8 * WARPS) % (ROWS // 8) * 8 + many % 8, few // (8 * WARPS) * 8 + few % 8
    columns = first + many // 8 % WARPS * COLUMNS + many // TALL * 32
    few_columns = first + few // 8 % WARPS * COLUMNS
    places = rows * n + columns
    few_places = (few_rows * n + few_columns)[:, None] + word[None, :] * 8

    levels = tl.load(table + 256 + tl.arange(0, 16))
    if NESTED:
        mean = tl.load(scales)
    a_tile = _factor(A, first, n, a_row, RANK, WARPS, COLUMNS)
    for t in tl.range(start, tl.minimum(start + length, m), ROWS, num_stages=1):
        begin = tl.cast(t, tl.int64) * n
        inside, few_inside = (t + rows < m) & (columns < n), (t + few_rows < m) & (few_columns < n)
        bytes_at = codes + begin // 2 + (places[:, None, None] // 2 + word[None, :, None] * 4 + half[None, None, :])
        byte = tl.load(bytes_at) if EVEN else tl.load(bytes_at, mask=inside[:, None, None], other=0)
        block = begin // BLOCK
        blocks = ((begin % BLOCK).to(tl.uint32) + few_places.to(tl.uint32)) // BLOCK
        largest_at = absmax + block + blocks
        largest = tl.load(largest_at) if EVEN else tl.load(largest_at, mask=few_inside[:, None], other=0)
        if NESTED:
            scale_at = scales + 1 + block // 256 + ((block % 256).to(tl.uint32) + blocks) // 256
            scale = tl.load(scale_at) if EVEN else tl.load(scale_at, mask=few_inside[:, None], other=0)
            largest = tl.load(table + largest) * scale + mean

        words = tl.xor_sum(byte.to(tl.uint32) << (half * 8).to(tl.uint32)[None, None, :], 2)
        code = (words[:, :, None] >> ((across ^ 1) * 4).to(tl.uint32)[None, None, :]) & 15
        level = tl.gather(levels, tl.reshape(code.to(tl.int32), (PARTS * TALL * 32,)), 0)
        weight = tl.reshape(level, (PARTS, TALL, 4, 8)) * largest[None, :, :, None]
        weight = tl.reshape(weight, (PARTS, ROWS // 8, WARPS, 8, 4, 4, 2))
        weight = tl.reshape(tl.permute(weight, (2, 1, 3, 0, 5, 4, 6)), (WARPS, ROWS, COLUMNS))
        weight = tl.dot(_rows(B, t, m, b_row, RANK, EVEN, ROWS, WARPS), a_tile, weight).to(out.dtype.element_ty)
        weight = tl.reshape(weight, (WARPS, ROWS // 8, 8, PARTS, 4, 4, 2))
        weight = tl.reshape(tl.permute(weight, (3, 1, 0, 2, 5, 4, 6)), (PARTS * TALL, 32))
        out_at = out + begin + (places[:, None] + tl.arange(0, 32)[None, :])
        if EVEN:
            tl.store(out_at, weight)
        else:
            tl.store(out_at, weight, mask=inside[:, None])


@triton.jit
def _rows(B, t, m, row, rank: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """Rows of B, once for each warp: (WARPS, ROWS, R)."""
    R: tl.constexpr = triton.next_power_of_2(rank) if rank > 16 else 16
    rows, ranks = tl.arange(0, WARPS * ROWS)[:, None] % ROWS, tl.arange(0, R)[None, :]
    at = B + tl.cast(t, tl.int64) * row + (rows * row + ranks)
    tile = tl.load(at) if EVEN and rank == R else tl.load(at, mask=(t + rows < m) & (ranks < rank), other=0.0)
    return tl.reshape(tile, (WARPS, ROWS, R))


@triton.jit
def _factor(A, first, n, row, rank: tl.constexpr, WARPS: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns of A, (WARPS, R, COLUMNS): in the order in which a product has them, two in every eight a thread's."""
    R: tl.constexpr = triton.next_power_of_2(rank) if rank > 16 else 16
    columns = first + tl.arange(0, WARPS)[:, None, None] * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    ranks = tl.arange(0, R)[None, :, None]
    tile = tl.load(A + (columns + ranks * row), mask=(columns < n) & (ranks < rank), other=0.0)
    tile = tl.reshape(tile, (WARPS, R, COLUMNS // 32, 4, 4, 2))
    return tl.reshape(tl.permute(tile, (0, 1, 2, 4, 3, 5)), (WARPS, R, COLUMNS))


_launch_merged = Launcher(_merge)
