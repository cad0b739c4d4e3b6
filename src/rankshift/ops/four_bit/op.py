"""One launch for a weight in 4 bits, on a GPU: codes are read once, the absmax values of double quantisation decoded on
the way, weights written once, with a low-rank product added before they are rounded if one is given. Elsewhere
bitsandbytes does it. Without a product the numbers are the same to the bit."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor

from rankshift.ops.four_bit.reference import LEVELS, NESTED, dynamic_levels
from rankshift.ops.launch import unrecorded
from rankshift.ops.stochastic_rounding.op import runs_on


def dequantised(
    codes: Tensor,
    absmax: Tensor,
    scales: Tensor | None,
    shape: Sequence[int],
    block: int,
    quant_type: str,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """The weight (out, in).

    Args:
        codes: (⌈n/2⌉, 1) uint8, n = out·in; the first of two numbers in the high half.
        absmax: (⌈n/block⌉,), uint8 with double quantisation, else the bits of fp32 as int32.
        scales: bits of fp32 as int32: the mean of all absmax, then one scale for each 256 of them; None without double
            quantisation.
        block: numbers that share an absmax: 32, 64, … 4096.
        quant_type: "nf4" or "fp4".
        dtype: bf16, fp16 or fp32.
        out: where to put it, (out, in) of this dtype, contiguous.
    """
    if torch.compiler.is_compiling():
        # Written into memory made for the call: were it a function of the codes, the compiler would find forward's and
        # backward's alike, and keep the weight.
        out = torch.empty(tuple(shape), dtype=dtype, device=codes.device) if out is None else out
        _into(codes, absmax, scales, block, quant_type, out)
        return out
    return _dequantised(codes, absmax, scales, shape, block, quant_type, dtype, out)


def merged(
    codes: Tensor,
    absmax: Tensor,
    scales: Tensor | None,
    shape: Sequence[int],
    block: int,
    quant_type: str,
    B: Tensor,
    A: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """The weight + B A (out, in), summed in fp32 and rounded once, to the dtype of the factors.

    Args:
        codes, absmax, scales, block, quant_type: as above.
        B: (out, r), A: (r, in), both bf16 or both fp16; with the scale in one of them.
        out: where to put it, (out, in) of this dtype, contiguous.
    """
    if out is None:
        out = torch.empty(tuple(shape), dtype=A.dtype, device=codes.device)
    if torch.compiler.is_compiling():
        _merged_into(codes, absmax, scales, block, quant_type, B, A, out)
    else:
        _merged(codes, absmax, scales, block, quant_type, B, A, out)
    return out


@unrecorded
def _merged(
    codes: Tensor, absmax: Tensor, scales: Tensor | None, block: int, quant_type: str, B: Tensor, A: Tensor, out: Tensor
) -> None:
    if runs_on(codes.device):
        from rankshift.ops.four_bit.triton import adds, launch_merged

        if adds(out.shape[1], block, len(A)):
            B, A = (factor if factor.stride(1) == 1 else factor.contiguous() for factor in (B, A))
            torch.autograd.graph.increment_version(out)  # the kernel writes past autograd
            launch_merged(codes, absmax, scales, _table(quant_type, codes.device), block, B, A, out)
            return
    weight = _dequantised(codes, absmax, scales, out.shape, block, quant_type, torch.float32, None)
    out.copy_(weight.addmm_(B.float(), A.float()))


@torch.library.custom_op("rankshift::merged_into", mutates_args=("out",))
def _merged_into(
    codes: Tensor, absmax: Tensor, scales: Tensor | None, block: int, quant_type: str, B: Tensor, A: Tensor, out: Tensor
) -> None:
    _merged(codes, absmax, scales, block, quant_type, B, A, out)


@torch.no_grad()
def _dequantised(
    codes: Tensor,
    absmax: Tensor,
    scales: Tensor | None,
    shape: Sequence[int],
    block: int,
    quant_type: str,
    dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor:
    if not runs_on(codes.device):
        weight = _by_bitsandbytes(codes, absmax, scales, shape, block, quant_type, dtype)
        return weight if out is None else out.copy_(weight)
    from rankshift.ops.four_bit.triton import launch

    if out is None:
        out = torch.empty(tuple(shape), dtype=dtype, device=codes.device)
    else:
        torch.autograd.graph.increment_version(out)  # the kernel writes past autograd
    launch(codes, absmax, scales, _table(quant_type, codes.device), block, out)
    return out


@torch.library.custom_op("rankshift::dequantised_into", mutates_args=("out",))
def _into(codes: Tensor, absmax: Tensor, scales: Tensor | None, block: int, quant_type: str, out: Tensor) -> None:
    _dequantised(codes, absmax, scales, out.shape, block, quant_type, out.dtype, out)


@functools.cache
def _table(quant_type: str, device: torch.device) -> Tensor:
    """(272,) fp32: what a code of 8 bits stands for, then what one of 4 bits does."""
    return torch.cat([levels_on(device), torch.tensor(LEVELS[quant_type], device=device)])


@functools.cache
def levels_on(device: torch.device) -> Tensor:
    """(256,) fp32: what a code of 8 bits stands for, as bitsandbytes has it."""
    return dynamic_levels().to(device)


def _by_bitsandbytes(
    codes: Tensor,
    absmax: Tensor,
    scales: Tensor | None,
    shape: Sequence[int],
    block: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    if scales is None:
        largest = absmax.view(torch.float32)
    else:
        numbers = scales.view(torch.float32)
        largest = bitsandbytes.functional.dequantize_blockwise(
            absmax, absmax=numbers[1:], code=levels_on(codes.device), blocksize=NESTED
        )
        largest = largest + numbers[0]
    out, into = shape
    # as one row where blocks reach from row to row: its kernel for AVX-512 takes the wrong absmax there
    rows = (out, into) if into % block == 0 else (out * into,)
    state = QuantState(largest, torch.Size(rows), blocksize=block, quant_type=quant_type, dtype=dtype)
    weight: Tensor = bitsandbytes.functional.dequantize_4bit(codes, state)
    return weight.view(out, into)
