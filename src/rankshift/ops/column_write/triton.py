"""The kernel. Programs find their layer in a table (fields, layers) of int64: addresses, then numbers.

A program has all columns of some rows, sorted: columns of one row that stand in the same 32 bytes are written together.
"""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankshift.ops.launch import Launcher

_TILE = (16, 64, 4)  # rows, columns at a time, warps
_KINDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def launch(table: Tensor, rank: int, dtype: torch.dtype, rows: int) -> None:
    """Write columns of all layers.

    Args:
        table: addresses of W, D, origin and channels; out, in; the bits of scale.
        rank: of all of them; ``dtype`` likewise.
        rows: the largest out.
    """
    M, N, warps = _TILE
    _launch_write(
        (triton.cdiv(rows, M), table.shape[1], 1), (table,), (table.shape[1],), R=rank, KIND=_KINDS[dtype], M=M,
        N=min(N, triton.next_power_of_2(rank)), num_warps=warps, enable_fp_fusion=False,
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
        rows = first + tl.arange(0, M)
        at = rows.to(tl.int64)[:, None]
        for begin in tl.static_range(0, R, N):
            columns = begin + tl.arange(0, N)
            inside = (rows < out)[:, None] & (columns < R)[None, :]
            place = at * R + columns[None, :]
            channel = tl.load(channels + columns, mask=columns < R, other=0)
            change = scale * tl.load(D + place, mask=inside, other=0.0)  # not fused with the sum: each is rounded
            value = tl.load(origin + place, mask=inside, other=0.0).to(tl.float32) + change
            tl.store(W + at * into + channel[None, :], value.to(KIND), mask=inside)


@triton.jit
def _pointer(here, field: tl.constexpr, count, KIND: tl.constexpr):
    return tl.load(here + field * count).to(tl.pointer_type(KIND))


_launch_write = Launcher(_write)
