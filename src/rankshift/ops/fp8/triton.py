"""The kernel: a row at a time is read, its largest magnitude found, and written in 8 bits."""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def launch(x: Tensor, fold: Tensor | None) -> tuple[Tensor, Tensor]:
    """See reference.rounded_rows; rows of x in one piece each."""
    rows, width = x.shape
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    sizes = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        _rows[(rows,)](
            x, x if fold is None else fold, codes, sizes, x.stride(0), width, FOLD=fold is not None, SIZE=block,
            num_warps=min(max(block // 1024, 1), 16),
        )  # fmt: skip
    return codes, sizes


@triton.jit
def _rows(x, fold, codes, sizes, stride, width, FOLD: tl.constexpr, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    inside = at < width
    numbers = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    if FOLD:
        numbers *= tl.load(fold + at, mask=inside, other=0.0)
    magnitude = tl.abs(numbers)
    largest = tl.max(magnitude, axis=0)
    finite = tl.sum((magnitude < float("inf")).to(tl.int32), axis=0) == SIZE  # a largest number may pass over NaN
    size = tl.where(finite, tl.div_rn(tl.maximum(largest, 1e-30), 448.0), float("nan"))
    tl.store(sizes + row, size)
    tl.store(codes + row * width + at, (numbers * tl.div_rn(1.0, size)).to(tl.float8e4nv), mask=inside)
