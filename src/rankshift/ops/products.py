"""Products that the fused nodes share: into memory that is there, and accumulated wider than their factors."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right in the memory of ``total``."""
    if torch.compiler.is_compiling():  # the compiler reuses the memory; told to write in place, it copies first
        return torch.addmm(total, left, right)
    return torch.addmm(total, left, right, out=total)  # addmm_ would escape torch's FlopCounterMode


def into(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, accumulated in fp32 and handed over in ``dtype`` without a stop in a narrower one where it can."""
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda and dtype is torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)
