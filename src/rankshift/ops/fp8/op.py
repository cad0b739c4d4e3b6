"""Rounding to e4m3 in one pass over the numbers, and products on tensor cores for 8 bits, where there are any."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rankshift.core.errors import ConfigError
from rankshift.ops.fp8 import reference
from rankshift.ops.stochastic_rounding.op import runs_on

E4M3 = torch.float8_e4m3fn
_ALIGNED = 16  # rows and columns of a second factor, and what is summed over, come in multiples of this
_FAST = True
"""Sums stay in the tensor core, in 22 bits. Promoted to fp32 every 128 terms, row-wise kernels are far slower."""
_WIDEST = 1 << 16  # numbers in a row that a program of the kernel can hold


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def multiplies(device: torch.device) -> bool:
    """Whether there are tensor cores for e4m3: NVIDIA's from Ada and Hopper on."""
    return _capable(device)


@functools.cache
def _capable(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def check(device: torch.device) -> None:
    """Raise ConfigError on a GPU without such cores: what they multiply would be computed in fp32, and slowly."""
    if device.type == "cuda" and not multiplies(device):
        raise ConfigError(
            f'base="fp8" multiplies in 8 bits, and {torch.cuda.get_device_name(device)} cannot: that takes an '
            'NVIDIA GPU of compute capability 8.9 (Ada, Hopper) or later. Use base="int8" or base="nf4".'
        )


def rounded_rows(x: Tensor, fold: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x diag(fold), (b, k), as codes (b, k) in e4m3 and the size of each row, (b,) in fp32: see reference.py."""
    if torch.compiler.is_compiling() or not _launches(x):  # the compiler makes one kernel of it by itself
        return reference.rounded_rows(x, fold)
    from rankshift.ops.fp8.triton import launch

    return launch(x if x.stride(1) == 1 else x.contiguous(), fold)


def _launches(x: Tensor) -> bool:
    return runs_on(x.device) and multiplies(x.device) and x.numel() > 0 and x.shape[1] <= _WIDEST


def rounded_whole(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (b, k) as codes in e4m3 and one size for all of it, (1,)."""
    return reference.rounded_whole(x)


def product(a: Tensor, b: Tensor, sizes: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """diag(sizes) a bᵀ diag(scales) + bias from codes (m, k) and (n, k) → (m, n) in ``dtype``, of 16 bits.

    Both have a scale for each row, (m,) and (n,), or both one in all, (1,). Tensor cores deliver bf16.

    Raises:
        ConfigError: on a GPU that has none for 8 bits.
    """
    check(a.device)
    fits = multiplies(a.device) and a.shape[0] > 0 and not any(size % _ALIGNED for size in b.shape)
    if not fits:
        return reference.product(a, b, sizes, scales, bias, dtype)
    each = scales.numel() == b.shape[0]
    y = torch._scaled_mm(
        a.contiguous(), b.contiguous().t(),
        scale_a=sizes[:, None] if each else sizes, scale_b=scales[None] if each else scales,
        bias=None if bias is None else bias.to(torch.bfloat16), out_dtype=torch.bfloat16, use_fast_accum=_FAST,
    )  # fmt: skip
    return y.to(dtype)
