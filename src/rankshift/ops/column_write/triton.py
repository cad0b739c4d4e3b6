"""The kernel. Programs find their layer in a table (fields, layers) of int64: addresses, then numbers.

A program has all columns of some rows, and a thread one column of each: columns are sorted, and those of a row that
stand in the same 32 bytes are written together.
"""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankshift.ops.launch import Launcher

_TILE = (8, 1024, 4)  # rows, numbers of them at most, warps at most
_KINDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def launch(table: Tensor, rank: int, dtype: torch.dtype, rows: int) -> None:
    """Write columns of all layers.

    Args:
        table: addresses of W, D, origin and channels; out, in; the bits of scale.
        rank: of all of them; ``dtype`` likewise.
        rows: the largest out.
    """
    most, size, warps = _TILE
    N = triton.next_power_of_2(rank)
    M = max(1, min(most, size // N))
    _launch_write(
        (triton.cdiv(rows, M), table.shape[1], 1), (table,), (table.shape[1],), R=rank, KIND=_KINDS[dtype], M=M, N=N,
        num_warps=max(1, min(warps, N // 32)), enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def _write(table, count, R: tl.constexpr, KIND: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    here = table + tl.program_id(1)
    out = tl.load(here + 4 * count).to(tl.int32)
    first = tl.program_id(0) * M
    if first < out:
        W, origin = _pointer(here, 0, count, KIND), _pointer(here, 2, count, KIND)
        D, channels = _pointer(here, 1, count, tl.float32), _pointer(here, 3, count, tl.int64)
        into = tl.load(here + 5 * count)
        scale = tl.load(here + 6 * count).to(tl.float64, bitcast=True).to(tl.float32)
        columns = tl.arange(0, N)
        channel = tl.load(channels + columns, mask=columns < R, other=0)
        values = ()
        for m in tl.static_range(M):
            row = first + m
            inside = (columns < R) & (row < out)
            place = tl.cast(row, tl.int64) * R + columns
            change = scale * tl.load(D + place, mask=inside, other=0.0)  # not fused with the sum: each is rounded
            values += (tl.load(origin + place, mask=inside, other=0.0).to(tl.float32) + change,)
        for m in tl.static_range(M):  # all has been read: what is written may be D, for all the compiler knows
            row = first + m
            inside = (columns < R) & (row < out)
            tl.store(W + tl.cast(row, tl.int64) * into + channel, values[m].to(KIND), mask=inside)


@triton.jit
def _pointer(here, field: tl.constexpr, count, KIND: tl.constexpr):
    return tl.load(here + field * count).to(tl.pointer_type(KIND))


_launch_write = Launcher(_write)
