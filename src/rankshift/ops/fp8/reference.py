"""Rounding to e4m3 and its product in plain torch, on any device. Tests hold the kernels to this."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 448.0  # of e4m3
_TINY = 1e-30  # a row of zeros is divided by this


def rounded_rows(x: Tensor, fold: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x diag(fold), (b, k), as diag(sizes) codes: codes (b, k) in e4m3, sizes (b,) = largest magnitude / 448 in fp32.

    What is not finite makes NaN of all products of its row.
    """
    wide = x.to(torch.float32)
    wide = wide if fold is None else wide * fold
    sizes = _size(torch.linalg.vector_norm(wide, torch.inf, dim=1))
    return (wide * sizes.reciprocal()[:, None]).to(torch.float8_e4m3fn), sizes


def rounded_whole(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same with one size for all of x, (1,)."""
    wide = x.to(torch.float32)
    size = _size(torch.linalg.vector_norm(wide, torch.inf).reshape(1))
    return (wide * size.reciprocal()).to(torch.float8_e4m3fn), size


def _size(largest: Tensor) -> Tensor:
    return torch.where(largest.isfinite(), largest.clamp_min(_TINY) / LARGEST, torch.nan)


def product(a: Tensor, b: Tensor, sizes: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """diag(sizes) a bᵀ diag(scales) + bias from codes (m, k) and (n, k), in fp32, rounded to ``dtype`` once."""
    y = (a.to(torch.float32) @ b.to(torch.float32).t()) * sizes[:, None] * scales
    return (y if bias is None else y + bias).to(dtype)
