"""What 4 bits stand for, in plain torch. Tests hold the kernel and bitsandbytes to this.

    w = level[code] · c      c: absmax of its block along the flattened rows
    c = μ + level₈[ĉ] · s    double quantisation: s is shared by 256 blocks

Every product and sum is rounded to fp32, the weight once more to its dtype, with B A added before that if there is one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LEVELS = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (
        0.0, 0.0052083334885537624, 0.6666666865348816, 1.0,
        0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
        -0.0, -0.0052083334885537624, -0.6666666865348816, -1.0,
        -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
    ),
}  # fmt: skip
"""NormalFloat of QLoRA (the table its authors released), and bitsandbytes' float of 4 bits divided by 12."""

NESTED = 256
"""Absmax values that share a scale."""


def dequantised(
    codes: Tensor,
    absmax: Tensor,
    scales: Tensor | None,
    shape: Sequence[int],
    block: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    """(out, in) from the tensors that op.py describes."""
    n = shape[0] * shape[1]
    nibbles = torch.stack([codes.flatten() // 16, codes.flatten() % 16], 1).flatten()[:n]
    level = torch.tensor(LEVELS[quant_type], device=codes.device)[nibbles.long()]
    if scales is None:
        largest = absmax.view(torch.float32)
    else:
        mean, *_ = numbers = scales.view(torch.float32)
        shared = numbers[1:].repeat_interleave(NESTED)[: len(absmax)]
        largest = dynamic_levels().to(codes.device)[absmax.long()] * shared + mean
    return (level * largest.repeat_interleave(block)[:n]).to(dtype).view(*shape)


def merged(
    codes: Tensor,
    absmax: Tensor,
    scales: Tensor | None,
    shape: Sequence[int],
    block: int,
    quant_type: str,
    B: Tensor,
    A: Tensor,
) -> Tensor:
    """The same + B A, (out, r) and (r, in), summed in fp32 and rounded once to their dtype."""
    weight = dequantised(codes, absmax, scales, shape, block, quant_type, torch.float32)
    return (weight + B.float() @ A.float()).to(A.dtype)


def dynamic_levels() -> Tensor:
    """(256,) fp32, ascending, as in bitsandbytes: 0, 1, and with both signs the middles of the 2ⁱ equal parts of the
    decade up to 10ⁱ⁻⁶, i = 0 … 6. In fp32 at every step: computed wider, some would round otherwise."""
    found = [0.0, 1.0]
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        middles = (ends[:-1] + ends[1:]) / 2 * 10.0 ** (i - 6)
        found += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(found), dtype=torch.float32, device="cpu")
