"""Rounding at random in plain torch. Tests hold the kernel to this."""

from __future__ import annotations

import torch
from torch import Tensor

from rankshift.core.random import dither, stochastic


def rounded(value: Tensor, dtype: torch.dtype, word: int, first: int) -> Tensor:
    """fp32 numbers in bf16 or fp16, by the elements first, first + 1, … of the noise of ``word``."""
    noise = dither(word, value.numel(), first, value.device).view(value.shape)
    return stochastic(value, dtype, noise).to(dtype)
