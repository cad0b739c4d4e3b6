"""What the fused nodes share: the dtype they compute in, products into memory that is there or wider than factors."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rankshift.core.base import Format


def compute_dtype(
    x: Tensor, format: Format | None = None
) -> tuple[torch.dtype, contextlib.AbstractContextManager[Any]]:
    """What a layer computes in here, and a ``with`` block in which nothing is cast again."""
    kind = x.device.type
    own = x.dtype
    if format is not None and format.computes is not None and x.dtype.itemsize >= format.computes.itemsize:
        own = format.computes  # but for an input that was made narrower: FSDP2's mixed precision does that
    if _autocast(kind):
        return torch.get_autocast_dtype(kind), torch.autocast(kind, enabled=False)
    return own, contextlib.nullcontext()


def delivered(y: Tensor, x: Tensor) -> Tensor:
    """What a layer computed, in the dtype that it hands on: autocast's, else that of its input."""
    return y if y.dtype == x.dtype or _autocast(x.device.type) else y.to(x.dtype)


def _autocast(kind: str) -> bool:
    return kind != "meta" and torch.is_autocast_enabled(kind)  # which has none


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right in the memory of ``total``."""
    if torch.compiler.is_compiling():
        return added(total, left @ right)
    return torch.addmm(total, left, right, out=total)  # addmm_ would escape torch's FlopCounterMode


def added(total: Tensor, change: Tensor) -> Tensor:
    """total + change, for the compiler: a sum in fp32 it takes into whatever reads it next. Of one in 16 bits it makes
    a GEMM that adds, for which it copies ``total`` first."""
    wide = torch.promote_types(total.dtype, torch.float32)
    return (total.to(wide) + change.to(wide)).to(total.dtype)


def scaled(tensor: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale · tensor in ``dtype``, rounded once, in one kernel."""
    if scale == 1 or tensor.dtype == dtype or torch.compiler.is_compiling():
        return (tensor if scale == 1 else scale * tensor).to(dtype)
    return torch.mul(tensor, scale, out=torch.empty_like(tensor, dtype=dtype))


def ready(factors: Sequence[tuple[Tensor, float]], dtype: torch.dtype) -> list[Tensor]:
    """scale · tensor of some of them in ``dtype``; compiled, one kernel casts all."""
    if torch.compiler.is_compiling() and any(tensor.dtype != dtype for tensor, _ in factors):
        flat = torch.cat([(t if scale == 1 else scale * t).reshape(-1) for t, scale in factors]).to(dtype)
        parts = flat.split_with_sizes([t.numel() for t, _ in factors])
        return [part.view(t.shape) for part, (t, _) in zip(parts, factors, strict=True)]
    return [scaled(tensor, scale, dtype) for tensor, scale in factors]


def into(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, accumulated in fp32 and handed over in ``dtype`` without a stop in a narrower one where it can."""
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda and dtype is torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)
