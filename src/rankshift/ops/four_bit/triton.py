"""The kernel: some thousand weights of a matrix for each program.

A thread reads 8 codes as one word and writes 8 weights as 16 bytes, several times over, so that reads are under way
together. Levels are looked up in shared memory, where 16 numbers lie in 16 banks: no two lookups wait for each other.
"""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = (512, 4)  # runs of weights for each program, and its warps
_EXACT = {"enable_fp_fusion": False}  # bitsandbytes rounds between a product and a sum


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
