"""One autograd node for a frozen linear layer with a VeRA branch.

    y = x Wᵀ + Z Cᵀ + bias,   Z = x Aᵀ,   C = diag(b) B diag(d)

A and B are frozen; the vectors d and b train. With G = dYᵀ Z (out, r) both their gradients follow from one product:

    db = (B ⊙ G) d,   dd = bᵀ (B ⊙ G),   dX = dY W + (dY C) A

Kept for backward: Z, tokens·r values. Neither x nor anything of tokens·out is kept, and C is formed anew. A and B are
rows and columns of a pair that many layers share, usually wider than the compute dtype: they are kept by reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankshift.core.base import Format
from rankshift.ops.products import accumulate, compute_dtype, delivered, into


def vera_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    d: Tensor,
    b: Tensor,
    bias: Tensor | None,
    format: Format,
    packed: tuple[Tensor, ...],
) -> Tensor:
    """x (…, in), A (r, in), B (out, r), d (r,), b (out,), bias (out,) → (…, out). A and B receive no gradient.

    ``packed`` holds the frozen (out, in) weight in some ``format``: it is saved, what it unpacks to is not.
    """
    dtype, uncast = compute_dtype(x, format)
    learns = torch.is_grad_enabled() and (d.requires_grad or b.requires_grad)
    with uncast:
        y: Tensor = _VeRALinear.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, A.shape[1]).to(dtype), A, B, d, b, bias, learns, format, *packed
        )
    # the node knows (tokens, …) only: a view that it returned could not be changed in place, and models do
    return delivered(y.view(*x.shape[:-1], B.shape[0]), x)


def factor(B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """diag(b) B diag(d), (…, out, r): with it VeRA is a LoRA. Experts in front, where there are any."""
    return b[..., :, None] * B * d[..., None, :]


def fused_factor(B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """:func:`factor`, (out, r), of which autograd keeps no product on the way."""
    return _Factor.apply(B, d, b)  # type: ignore[no-any-return, no-untyped-call]


class _Factor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, B: Tensor, d: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(B, d, b)
        return (b[:, None] * B).mul_(d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dC: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        B, d, b = ctx.saved_tensors
        _, need_d, need_b = ctx.needs_input_grad
        G = B * dC  # (out, r); FSDP2's mixed precision narrows the vectors
        dd = (b.to(G.dtype) @ G).to(d.dtype) if need_d else None
        db = (G @ d.to(G.dtype)).to(b.dtype) if need_b else None
        return None, dd, db


class _VeRALinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,  # (tokens, in)
        A: Tensor,
        B: Tensor,
        d: Tensor,
        b: Tensor,
        bias: Tensor | None,
        learns: bool,
        format: Format,
        *packed: Tensor,
    ) -> Tensor:
        z = x @ A.to(x.dtype).t()  # (tokens, r)
        y = format.times(x, bias, *packed)
        y = accumulate(y, z, factor(B, d, b).to(x.dtype).t())
        ctx.save_for_backward(z if learns else None, A, B, d, b, *packed)
        ctx.format = format
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z, A, B, d, b, *packed = ctx.saved_tensors
        need_x, _, _, need_d, need_b, need_bias = ctx.needs_input_grad[:6]
        dX = dd = db = None
        if need_d or need_b:
            wide = torch.promote_types(B.dtype, dY.dtype)  # not that of d: FSDP2's mixed precision narrows the vectors
            BG = B * into(dY.t(), z, wide)  # (out, r)
            db = (BG @ d.to(wide)).to(b.dtype) if need_b else None
            dd = (b.to(wide) @ BG).to(d.dtype) if need_d else None
        if need_x:
            dX = accumulate(ctx.format.back(dY, *packed), dY @ factor(B, d, b).to(dY.dtype), A.to(dY.dtype))
        dbias = dY.sum(0) if need_bias else None
        return (dX, None, None, dd, db, dbias, *(None,) * (len(ctx.needs_input_grad) - 6))
