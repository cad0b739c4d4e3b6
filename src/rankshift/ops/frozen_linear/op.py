"""One autograd node for a linear layer whose weight is held in some format.

    y = x Wᵀ + bias,   dX = dY W

Kept for backward: the tensors that hold W, by reference. No activation, and never W itself, which autograd would keep
of an ordinary product with what they unpack to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankshift.core.base import Format
from rankshift.ops.products import compute_dtype, delivered


def frozen_linear(x: Tensor, bias: Tensor | None, format: Format, packed: tuple[Tensor, ...]) -> Tensor:
    """x (…, in), bias (out,) → (…, out). ``packed`` holds the (out, in) weight in some ``format``."""
    dtype, uncast = compute_dtype(x, format)
    with uncast:
        y: Tensor = _FrozenLinear.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, x.shape[-1]).to(dtype), bias, format, *packed
        )
    # the node knows (b, in) and (b, out) only: a view that it returned could not be changed in place, and models do
    return delivered(y.view(*x.shape[:-1], y.shape[-1]), x)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,  # (b, in)
        bias: Tensor | None,
        format: Format,
        *packed: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*packed)
        ctx.format = format
        return format.times(x, bias, *packed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        need_x, need_bias = ctx.needs_input_grad[:2]
        dX = ctx.format.back(dY, *ctx.saved_tensors) if need_x else None
        return (dX, dY.sum(0) if need_bias else None, *(None,) * (len(ctx.needs_input_grad) - 2))
