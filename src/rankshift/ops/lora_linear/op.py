"""One autograd node for a frozen linear layer with a low-rank branch.

    y = x Wᵀ + Z Bᵀ + bias,   Z = x (sA)ᵀ

Kept for backward: x (only if A trains, or the order recomputes Z) and Z (only if B trains and the order saves it), b·n
and b·r values; never a scaled copy, never the (out, in) gradient, and no weight other than by reference. The scale is
folded into the small factor as that is cast: into A for Z, into B for S = s dY B, so that no kernel scales a gradient
(dA = Sᵀ x, dB = dYᵀ Z). A and B may be wider than the compute dtype (fp32 masters of a bf16 layer); their
gradients come back in their own dtype.

In 16 bits the small product is written first and the large one adds itself onto it, which reads while it computes: the
other way round y would be read and written once more. What is rounded before the sum is then the change and not the
whole. The compiler would copy what is added onto; compiled, the sum is left to whatever reads y next.

Orders that merge form W + BA for one product and drop it. In 16 bits that is for formats that add BA to numbers that
are not rounded yet, which costs them little: they unpack the weight anyhow, and y is written once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankshift.core.base import Format
from rankshift.ops.lora_linear.order import LOW_PRECISION, SAVES_Z, Backward, Forward, choose
from rankshift.ops.products import accumulate, compute_dtype, delivered, into, ready, scaled


def lora_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    bias: Tensor | None,
    format: Format,
    packed: tuple[Tensor, ...],
    forward: Forward | None = None,
    backward: Backward | None = None,
) -> Tensor:
    """x (…, in), A (r, in), B (out, r), bias (out,) → (…, out).

    ``packed`` holds the frozen (out, in) weight in some ``format``: it is saved, what it unpacks to is not. ``forward``
    and ``backward`` name an order of multiplication (see :mod:`.order`); None chooses the cheapest that is safe.
    """
    dtype, uncast = compute_dtype(x, format)
    b, n, m, r = x.shape[:-1].numel(), A.shape[1], B.shape[0], A.shape[0]
    graph = torch.is_grad_enabled()
    needs = (graph and x.requires_grad, graph and A.requires_grad, graph and B.requires_grad)
    forward, backward = choose(b, n, m, r, dtype, *needs, forward, backward, format.adds)
    with uncast:
        y: Tensor = _LoRALinear.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, n).to(dtype), A, B, bias, scale, forward, backward, needs[1], needs[2], format, *packed
        )
    # the node knows (b, in) and (b, out) only: a view that it returned could not be changed in place, and models do
    return delivered(y.view(*x.shape[:-1], m), x)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,  # (b, in)
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        scale: float,
        forward: Forward,
        backward: Backward,
        train_a: bool,
        train_b: bool,
        format: Format,
        *packed: Tensor,
    ) -> Tensor:
        sA, Bc = ready([(A, scale), (B, 1.0)], x.dtype)
        keep_z = train_b and backward in SAVES_Z
        z = x @ sA.t() if forward == "f1" or keep_z else None  # (b, r)
        if forward == "f1":
            assert z is not None
            y = spread(x, z, Bc, bias, format, packed)
        else:
            bias = None if bias is None else bias.to(x.dtype)
            y = torch.nn.functional.linear(x, format.merged(Bc, sA, *packed), bias)
        keep_x = train_a or (train_b and not keep_z)
        ctx.save_for_backward(x if keep_x else None, z if keep_z else None, A, B, *packed)
        ctx.scale, ctx.order, ctx.format = scale, backward, format
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, z, A, B, *packed = ctx.saved_tensors
        need_x, need_A, need_B, need_bias = ctx.needs_input_grad[:4]
        dtype, scale, small = dY.dtype, ctx.scale, ctx.order in ("b1", "b1s")
        dX = dA = dB = S = None
        if ctx.order == "b4" and (need_A or need_B):
            G = dY.t() @ x  # (out, in)
            dA = into(scaled(B, scale, dtype).t(), G, A.dtype) if need_A else None
            dB = into(G, scaled(A, scale, dtype).t(), B.dtype) if need_B else None
        else:
            if need_A or (need_x and small):
                sB, *cast = ready([(B, scale), (A, 1.0)] if need_x and small else [(B, scale)], dtype)
                S = dY @ sB  # (b, r)
            if need_A:
                assert S is not None
                dA = into(S.t(), x, A.dtype)
            if need_B:
                dB = into(dY.t(), x @ scaled(A, scale, dtype).t() if z is None else z, B.dtype)
        if need_x:
            if small:
                assert S is not None
                if _small_first(ctx.format, dtype):
                    dX = accumulate(S @ cast[0], dY, ctx.format.dense(*packed).to(dtype))
                else:
                    dX = accumulate(ctx.format.back(dY, *packed), S, cast[0])
            else:
                dX = dY @ ctx.format.merged(B.to(dtype), scaled(A, scale, dtype), *packed)
        dbias = dY.sum(0) if need_bias else None
        return (dX, dA, dB, dbias, *(None,) * (len(ctx.needs_input_grad) - 4))


def spread(x: Tensor, z: Tensor, B: Tensor, bias: Tensor | None, format: Format, packed: tuple[Tensor, ...]) -> Tensor:
    """x Wᵀ + z Bᵀ + bias, (b, in), (b, r) and (out, r) in one dtype → (b, out)."""
    if _small_first(format, x.dtype):
        W = format.dense(*packed).to(x.dtype)
        y = torch.nn.functional.linear(z, B, None if bias is None else bias.to(x.dtype))
        return accumulate(y, x, W.t())
    return accumulate(format.times(x, bias, *packed), z, B.t())


def _small_first(format: Format, dtype: torch.dtype) -> bool:
    """Whether the product with the weight can be added onto another one, and gains by it."""
    return dtype in LOW_PRECISION and not format.multiplies and not torch.compiler.is_compiling()
