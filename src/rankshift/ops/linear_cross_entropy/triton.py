"""The kernel: one program for each row of logits, which it reads twice and writes once.

A tile is (SIZE / 8, 8): the eight numbers that a thread loads at once share a running maximum, so that reading a number
for the first time takes one exponential.
"""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SIZE, _WARPS = 16384, 32  # so wide that few rows are under way, and what is read again is still in L2


def launch(
    logits: Tensor, width: int, labels: Tensor, ignore_index: int, multiplier: float, softcap: float | None, grad: bool
) -> Tensor:
    """The losses (n,) in fp32; with ``grad``, logits become the gradient of their sum.

    Args:
        logits: (n, at least width), in one piece; what is beyond ``width`` may hold anything.
        labels: (n,); one that is neither ignored nor in [0, width) makes its loss NaN.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    size = min(_SIZE, max(256, triton.next_power_of_2(width)))
    with torch.cuda.device_of(logits):
        _rows[(len(logits),)](
            logits, labels, losses, width, logits.stride(0), ignore_index, multiplier, softcap or 0.0,
            CAP=softcap is not None, GRAD=grad, SIZE=size, num_warps=max(1, min(_WARPS, size // 512)),
        )  # fmt: skip
    return losses


@triton.jit(do_not_specialize=["width", "ignore_index"])
def _rows(
    logits, labels, losses, width, stride, ignore_index, multiplier, softcap,
    CAP: tl.constexpr, GRAD: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    columns = tl.arange(0, SIZE // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    label = tl.load(labels + row)
    if label == ignore_index:
        tl.store(losses + row, 0.0)
        if GRAD:
            nothing = tl.zeros((SIZE // 8, 8), logits.dtype.element_ty)
            for at in range(0, stride, SIZE):
                tl.store(logits + at + columns, nothing, mask=at + columns < stride)
    else:
        # before anything is written: the label's own number
        own = tl.load(logits + label, mask=(label >= 0) & (label < width), other=float("nan")).to(tl.float32)
        own = _shaped(own, multiplier, softcap, CAP)
        peak = tl.full((SIZE // 8,), float("-inf"), tl.float32)
        total = tl.zeros((SIZE // 8,), tl.float32)
        for at in range(0, width, SIZE):
            x = _part(logits, at + columns, width, stride, multiplier, softcap, CAP)
            above = tl.maximum(peak, tl.max(x, 1))
            base = tl.where(above == float("-inf"), 0.0, above)  # eight numbers of which none is inside
            total = total * tl.exp(peak - base) + tl.sum(tl.exp(x - base[:, None]), 1)
            peak = above
        top = tl.max(peak, 0)
        entropy = top + tl.log(tl.sum(total * tl.exp(peak - top), 0))
        tl.store(losses + row, entropy - own)
        if GRAD:
            last = (width - 1) // SIZE * SIZE
            for back in range(0, width, SIZE):  # backwards: what was read last is still near
                here = last - back + columns
                x = _part(logits, here, width, stride, multiplier, softcap, CAP)
                slope = tl.exp(x - entropy) - tl.where(here == label, 1.0, 0.0)
                if CAP:
                    slope *= 1.0 - (x / softcap) * (x / softcap)
                slope = tl.where(here < width, slope * multiplier, 0.0)
                tl.store(logits + here, slope.to(logits.dtype.element_ty), mask=here < stride)


@triton.jit
def _part(logits, here, width, stride, multiplier, softcap, CAP: tl.constexpr):
    """Logits as the loss sees them, −∞ beyond the row. Loads are masked by the memory's end: 16 bytes come at once."""
    x = tl.load(logits + here, mask=here < stride, other=0.0).to(tl.float32)
    return tl.where(here < width, _shaped(x, multiplier, softcap, CAP), float("-inf"))


@triton.jit
def _shaped(x, multiplier, softcap, CAP: tl.constexpr):
    x *= multiplier
    if CAP:
        e = tl.exp(-2.0 * tl.abs(x / softcap))
        t = (1.0 - e) / (1.0 + e)
        x = softcap * tl.where(x < 0, -t, t)
    return x
