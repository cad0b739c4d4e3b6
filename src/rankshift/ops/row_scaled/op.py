"""Codes times the scales of their rows, written into the memory of the weight without another copy of it."""

from __future__ import annotations

import torch
from torch import Tensor


def row_scaled(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (out, in).

    Args:
        codes: (out, in), integers as int8 or the bits of e4m3 as uint8.
        scales: (out,) or one for all, (1,), in fp32 or float64.
        dtype: of the weight: bf16, fp16, fp32 or float64. The product is in the scales' dtype, rounded once.
    """
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if torch.compiler.is_compiling():
        # Into memory made for the call: of a function of the codes, the compiler would find forward's and backward's
        # alike, and keep the weight.
        _into(codes, scales, out)
        return out
    return _filled(codes, scales, out)


def _filled(codes: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    # e4m3 is promoted with no other dtype, and each of its numbers is one of ``out``'s
    numbers = codes if codes.dtype is torch.int8 else out.copy_(codes.view(torch.float8_e4m3fn))
    return torch.mul(numbers, scales[:, None], out=out)


@torch.library.custom_op("rankshift::row_scaled_into", mutates_args=("out",))
def _into(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    _filled(codes, scales, out)
