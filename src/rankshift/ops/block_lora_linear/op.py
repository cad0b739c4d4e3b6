"""One autograd node for a frozen linear layer with a block-diagonal low-rank branch.

    y = x Wᵀ + [Z₁B₁ᵀ … ZₙBₙᵀ] + bias,   Zᵢ = xᵢ (sAᵢ)ᵀ,   x = [x₁ … xₙ]

All blocks go through one batched product; no zero is stored or multiplied. Kept for backward: x (if A trains) and Z (if
B trains), b·in and b·n·r values. As in lora_linear, the scale is folded into A, and A and B may be wider than the
compute dtype; their gradients come back in their own. One block is that op itself, with the orders that it chooses;
with more of them W + BA is never formed.

    b tokens   n blocks   i = in/n   o = out/n   r rank of a block
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankshift.core.base import Format
from rankshift.ops.lora_linear import lora_linear
from rankshift.ops.products import added, compute_dtype, delivered


def block_lora_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    blocks: int,
    scale: float,
    bias: Tensor | None,
    format: Format,
    packed: tuple[Tensor, ...],
) -> Tensor:
    """x (…, in), A (n·r, in/n), B (out, r), bias (out,) → (…, out).

    ``packed`` holds the frozen (out, in) weight in some ``format``: it is saved, what it unpacks to is not.
    """
    if blocks == 1:
        return lora_linear(x, A, B, scale, bias, format, packed)
    dtype, uncast = compute_dtype(x, format)
    graph, m, (r, i) = torch.is_grad_enabled(), B.shape[0], (B.shape[1], A.shape[1])
    with uncast:
        y: Tensor = _BlockLoRALinear.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, blocks * i).to(dtype), A.view(blocks, r, i), B.view(blocks, -1, r), bias, scale,
            graph and A.requires_grad, graph and B.requires_grad, format, *packed,
        )  # fmt: skip
    return delivered(
        y.view(*x.shape[:-1], m), x
    )  # outside the node: a view that it returned could not be changed in place


class _BlockLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,  # (b, n·i)
        A: Tensor,  # (n, r, i)
        B: Tensor,  # (n, o, r)
        bias: Tensor | None,  # (n·o,)
        scale: float,
        train_a: bool,
        train_b: bool,
        format: Format,
        *packed: Tensor,
    ) -> Tensor:
        z = torch.bmm(_split(x, len(A)), (scale * A).to(x.dtype).mT)  # (n, b, r)
        y = format.times(x, bias, *packed)
        y = _accumulate(y, z, B.to(x.dtype).mT)
        ctx.save_for_backward(x if train_a else None, z if train_b else None, A, B, *packed)
        ctx.scale, ctx.format = scale, format
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, z, A, B, *packed = ctx.saved_tensors
        need_x, need_A, need_B, need_bias = ctx.needs_input_grad[:4]
        dX = dA = dB = S = None
        D = _split(dY, len(B))  # (n, b, o)
        if need_A or need_x:
            S = torch.bmm(D, B.to(dY.dtype))  # (n, b, r)
        if need_A:
            assert S is not None
            dA = ctx.scale * _into(S.mT, _split(x, len(A)), A.dtype)
        if need_B:
            dB = _into(D.mT, z, B.dtype)
        if need_x:
            assert S is not None
            dX = _accumulate(ctx.format.back(dY, *packed), S, (ctx.scale * A).to(dY.dtype))
        dbias = dY.sum(0) if need_bias else None
        return (dX, dA, dB, dbias, *(None,) * (len(ctx.needs_input_grad) - 4))


def _split(x: Tensor, blocks: int) -> Tensor:
    """(b, n·k) as (n, b, k), a view where it can be."""
    return x.reshape(x.shape[0], blocks, x.shape[1] // blocks).transpose(0, 1)


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total (b, n·k) + the batched left @ right, (n, b, k), in the memory of ``total``."""
    if torch.compiler.is_compiling():
        return added(total, torch.bmm(left, right).transpose(0, 1).reshape(total.shape))
    here = _split(total, len(left))
    torch.baddbmm(here, left, right, out=here)  # strided: each block's columns of ``total``
    return total


def _into(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, accumulated in fp32 and handed over in ``dtype`` without a stop in a narrower one where it can."""
    if left.dtype != dtype and left.is_cuda and dtype is torch.float32:
        return torch.bmm(left, right, out_dtype=dtype)
    return torch.bmm(left, right).to(dtype)
