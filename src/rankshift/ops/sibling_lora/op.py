"""LoRA linear layers that read one input, one autograd node for their A's and one for each layer.

    down   z_i = s_i x A_iᵀ                     of all layers: one product, the A's one below the other
    up     y_i = x W_iᵀ + z_i B_iᵀ + bias_i     of one layer

Kept for backward: x, once, if an A trains, and of each layer z_i if its B trains; no factor in another dtype, and no
weight other than by reference.

The gradient of x is summed in these nodes and not by autograd, which would write every part of it. Each ``up`` hands x
on, as an alias, to the one that is called after it; so in backward it is given the sum of those after it, onto which
dY_i W_i is added by the product itself, and ``down`` adds S A of all layers in one product at the end. Compiled, sums
are left to whatever reads them next.

S_i = s_i dY_i B_i is what comes back for z_i: the gradient not of z_i but of x A_iᵀ. So dX = Σ dY_i W_i + S A,
dA = Sᵀ x, dB_i = dY_iᵀ z_i, and scales go into factors as they are cast: no kernel scales a gradient.

Both are called where autocast is off, in ``compute_dtype``'s block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankshift.core.base import Format
from rankshift.ops.lora_linear.op import spread
from rankshift.ops.products import accumulate, added, into, ready, scaled


def down(
    x: Tensor,
    dtype: torch.dtype,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """x (…, in), A_i (r_i, in), B_i → x as (b, in) in ``dtype``, for the first :func:`up`, and of each layer z_i
    (b, r_i) and B_i in ``dtype``."""
    graph = torch.is_grad_enabled()
    keep = graph and any(A.requires_grad for A in As)
    with torch.no_grad():
        sA, cast = _below(As, Bs, scales, dtype)
    x = x.reshape(-1, x.shape[-1]).to(dtype)
    hand = graph and x.requires_grad
    out = _Down.apply(x, sA, keep, hand, *As)  # type: ignore[no-untyped-call]
    return (out[0], list(out[1:]), cast) if hand else (x, list(out), cast)


def up(
    x: Tensor,
    z: Tensor,
    B: Tensor,
    cast: Tensor,
    scale: float,
    bias: Tensor | None,
    format: Format,
    packed: tuple[Tensor, ...],
    last: bool,
) -> tuple[Tensor, Tensor]:
    """x (b, in), z (b, r), B (out, r), bias (out,) → y (b, out), and x for the one after it unless this is the last.

    ``cast`` is B as it is multiplied. ``packed`` holds the frozen (out, in) weight in some ``format``.
    """
    graph = torch.is_grad_enabled()
    hand = graph and x.requires_grad and not last
    out = _Up.apply(  # type: ignore[no-untyped-call]
        x, z, B, bias, cast, scale, graph and B.requires_grad, hand, format, *packed
    )
    return out if hand else (out, x)


def _below(
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """s_i A_i one below the other, (Σ r_i, in), and each B_i, in ``dtype``."""
    if len(set(scales)) == 1:
        whole, *cast = ready([(torch.cat(list(As)), scales[0]), *((B.detach(), 1.0) for B in Bs)], dtype)
        return whole, cast
    return torch.cat([scaled(A, s, dtype) for A, s in zip(As, scales, strict=True)]), [B.detach().to(dtype) for B in Bs]


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,  # (b, in)
        sA: Tensor,  # (Σ r_i, in)
        keep: bool,
        hand: bool,
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        z = x @ sA.t()
        ctx.save_for_backward(x if keep else None, *factors)
        ctx.hand, ctx.dtype = hand, x.dtype
        ctx.set_materialize_grads(False)
        zs = z.split_with_sizes([A.shape[0] for A in factors], 1)
        return (x.view_as(x), *zs) if hand else zs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *factors = ctx.saved_tensors
        dX, parts = (grads[0], grads[1:]) if ctx.hand else (None, grads)
        dA: list[Tensor | None] = [None] * len(factors)
        here = [i for i, S in enumerate(parts) if S is not None]  # of layers that were called, and led to the loss
        if here:
            S = torch.cat([parts[i] for i in here], 1)  # type: ignore[misc]
            ranks = [factors[i].shape[0] for i in here]
            if ctx.needs_input_grad[0]:
                A = torch.cat([factors[i] for i in here]).to(ctx.dtype)
                dX = S @ A if dX is None else accumulate(dX, S, A)
            if any(ctx.needs_input_grad[4 + i] for i in here):
                rows = into(S.t(), x, factors[here[0]].dtype).split_with_sizes(ranks)
                for i, row in zip(here, rows, strict=True):
                    dA[i] = row.to(factors[i].dtype) if ctx.needs_input_grad[4 + i] else None
        return (dX, None, None, None, *dA)


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,  # (b, in)
        z: Tensor,  # (b, r)
        B: Tensor,
        bias: Tensor | None,
        cast: Tensor,
        scale: float,
        keep: bool,
        hand: bool,
        format: Format,
        *packed: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        y = spread(x, z, cast, bias, format, packed)
        ctx.save_for_backward(z if keep else None, B, *packed)
        ctx.scale, ctx.format = scale, format
        ctx.set_materialize_grads(False)
        return (y, x.view_as(x)) if hand else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor | None, dX: Tensor | None = None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z, B, *packed = ctx.saved_tensors
        need_x, need_z, need_B, need_bias = ctx.needs_input_grad[:4]
        S = dB = dbias = None
        if dY is not None:  # it is None where the output did not lead to the loss, and those after it did
            if need_z:
                S = dY @ scaled(B, ctx.scale, dY.dtype)
            if need_B:
                dB = into(dY.t(), z, B.dtype)
            if need_x:
                dX = _onto(dX, dY, ctx.format, packed)
            if need_bias:
                dbias = dY.sum(0)
        return (dX, S, dB, dbias, *(None,) * (len(ctx.needs_input_grad) - 4))


def _onto(dX: Tensor | None, dY: Tensor, format: Format, packed: Sequence[Tensor]) -> Tensor:
    """dX + dY W, in the memory of dX, which nobody else has."""
    if dX is None:
        return format.back(dY, *packed)
    if not format.multiplies:
        return accumulate(dX, dY, format.dense(*packed).to(dY.dtype))
    dense = format.back(dY, *packed)
    return added(dX, dense) if torch.compiler.is_compiling() else dX.add_(dense)
