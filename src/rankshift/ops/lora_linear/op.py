"""One autograd node for a frozen linear layer with a low-rank branch.

    y = x Wᵀ + Z Bᵀ + bias,   Z = x (sA)ᵀ

Kept for backward: x (only if A trains, or the order recomputes Z) and Z (only if B trains and the order saves it), b·n
and b·r values; never a scaled copy, never the (out, in) gradient, and no weight other than by reference. The scale is
folded into the small factor. A and B may be wider than the compute dtype (fp32 masters of a bf16 layer); their
gradients come back in their own dtype.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankshift.ops.lora_linear.order import SAVES_Z, Backward, Forward, choose


def lora_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    bias: Tensor | None,
    dense: Callable[..., Tensor],
    packed: tuple[Tensor, ...],
    forward: Forward | None = None,
    backward: Backward | None = None,
) -> Tensor:
    """x (…, in), A (r, in), B (out, r), bias (out,) → (…, out).

    ``dense(*packed)`` gives the frozen (out, in) weight; ``packed`` is saved, what it unpacks to is not. ``forward``
    and ``backward`` name an order of multiplication (see :mod:`.order`); None chooses the cheapest that is safe.
    """
    kind = x.device.type
    castable = torch.amp.is_autocast_available(kind)  # the meta device has no autocast, and raises when asked
    dtype = torch.get_autocast_dtype(kind) if castable and torch.is_autocast_enabled(kind) else x.dtype
    b, n, m, r = x.shape[:-1].numel(), A.shape[1], B.shape[0], A.shape[0]
    graph = torch.is_grad_enabled()
    needs = (graph and x.requires_grad, graph and A.requires_grad, graph and B.requires_grad)
    forward, backward = choose(b, n, m, r, dtype, *needs, forward, backward)
    cast = dtype != x.dtype or dtype != packed[0].dtype
    with torch.autocast(kind, enabled=False) if castable else contextlib.nullcontext():
        y: Tensor = _LoRALinear.apply(  # type: ignore[no-untyped-call]
            x.to(dtype), A, B, bias, scale, forward, backward, needs[1], needs[2], cast, dense, *packed
        )
    return y


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        scale: float,
        forward: Forward,
        backward: Backward,
        train_a: bool,
        train_b: bool,
        cast: bool,
        dense: Callable[..., Tensor],
        *packed: Tensor,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (b, in)
        W = dense(*packed)
        if cast:  # autocast: the layer computes in another dtype than it is stored in
            W = W.to(x.dtype)
            bias = None if bias is None else bias.to(x.dtype)
        sA, Bc = (scale * A).to(x.dtype), B.to(x.dtype)
        keep_z = train_b and backward in SAVES_Z
        z = flat @ sA.t() if forward == "f1" or keep_z else None  # (b, r)
        if forward == "f1":
            y = flat @ W.t() if bias is None else torch.addmm(bias, flat, W.t())
            assert z is not None
            torch.addmm(y, z, Bc.t(), out=y)  # accumulates in place; addmm_ would escape torch's FlopCounterMode
        else:
            y = torch.nn.functional.linear(flat, torch.addmm(W, Bc, sA), bias)
        keep_x = train_a or (train_b and not keep_z)
        ctx.save_for_backward(flat if keep_x else None, z if keep_z else None, A, B, *packed)
        ctx.scale, ctx.order, ctx.dense, ctx.shape, ctx.cast = scale, backward, dense, x.shape, cast
        # not y.view: autograd forbids in-place changes of a view that a Function returns, and models add in place
        shaped: Tensor = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], B.shape[0]])
        return shaped

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, z, A, B, *packed = ctx.saved_tensors
        need_x, need_A, need_B, need_bias = ctx.needs_input_grad[:4]
        dY = dy.reshape(-1, dy.shape[-1])  # (b, out)
        sA, Bc = (ctx.scale * A).to(dY.dtype), B.to(dY.dtype)
        dX = dA = dB = S = None
        if ctx.order == "b4" and (need_A or need_B):
            G = dY.t() @ x  # (out, in)
            dA = ctx.scale * _into(Bc.t(), G, A.dtype) if need_A else None
            dB = _into(G, sA.t(), B.dtype) if need_B else None
        else:
            if need_A or (need_x and ctx.order in ("b1", "b1s")):
                S = dY @ Bc  # (b, r)
            if need_A:
                assert S is not None
                dA = ctx.scale * _into(S.t(), x, A.dtype)
            if need_B:
                dB = _into(dY.t(), x @ sA.t() if z is None else z, B.dtype)
        if need_x:
            W = ctx.dense(*packed)
            W = W.to(dY.dtype) if ctx.cast else W
            if ctx.order in ("b1", "b1s"):
                dX = dY @ W
                assert S is not None
                torch.addmm(dX, S, sA, out=dX)
            else:
                dX = dY @ torch.addmm(W, Bc, sA)
            dX = dX.view(ctx.shape)
        dbias = dY.sum(0) if need_bias else None
        return (dX, dA, dB, dbias, *(None,) * (len(ctx.needs_input_grad) - 4))


def _into(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, accumulated in fp32 and handed over in ``dtype`` without a stop in a narrower one where it can."""
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda and dtype is torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)
