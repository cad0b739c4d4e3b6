"""Codes times the scales of their rows, in plain torch. Tests hold the op to this."""

from __future__ import annotations

import torch
from torch import Tensor


def row_scaled(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """diag(scales) codes (out, in), the product in the dtype of the scales, rounded to ``dtype`` once."""
    numbers = codes if codes.dtype is torch.int8 else codes.view(torch.float8_e4m3fn)
    return (numbers.to(scales.dtype) * scales[:, None]).to(dtype)
