"""One autograd node for a frozen layer some of whose weight's columns are the trained ones.

    y = x Wᵀ + bias,   W[:, I] = round(W₀[:, I] + s D)   written by whoever updates D
    dX = dY W          dD = s dYᵀ X[:, I]

The forward is the product of the plain layer; D takes part only to receive its gradient. Kept for backward: X[:, I] as
a tensor of its own, b·r values exactly (a view would keep all of X), and W by reference: if somebody writes into W
between forward and backward, autograd's version counter raises. D may be wider than the compute dtype; its gradient
comes back in its own dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import grad

from rankshift.core.base import Format
from rankshift.core.form import ConvForm
from rankshift.ops.products import compute_dtype, delivered, into


def paca_linear(
    x: Tensor,
    D: Tensor,
    scale: float,
    channels: Tensor,
    bias: Tensor | None,
    format: Format,
    packed: tuple[Tensor, ...],
) -> Tensor:
    """x (…, in), D (out, r), channels (r,) int64 → (…, out).

    ``packed`` holds the (out, in) weight with the trained columns, in some ``format``.
    """
    dtype, uncast = compute_dtype(x, format)
    with uncast:
        y: Tensor = _PaCALinear.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, x.shape[-1]).to(dtype), D, bias, scale, channels, _trains(D), format, *packed
        )
    # the node knows (b, in) and (b, out) only: a view that it returned could not be changed in place, and models do
    return delivered(y.view(*x.shape[:-1], D.shape[0]), x)


def paca_conv(
    x: Tensor, D: Tensor, scale: float, channels: Tensor, weight: Tensor, bias: Tensor | None, form: ConvForm
) -> Tensor:
    """The same for a convolution: channels of the input, D (out, r·∏kernel), weight as the layer stores it."""
    single = x.dim() == len(form.kernel) + 1
    dtype, uncast = compute_dtype(x)
    with uncast:
        x = (x[None] if single else x).to(dtype)
        y: Tensor = _PaCAConv.apply(  # type: ignore[no-untyped-call]
            x, D, weight, bias, scale, channels, _trains(D), dtype != weight.dtype, form
        )
    return y[0] if single else y


def _trains(D: Tensor) -> bool:
    return torch.is_grad_enabled() and D.requires_grad


class _PaCALinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,  # (b, in)
        D: Tensor,
        bias: Tensor | None,
        scale: float,
        channels: Tensor,
        train: bool,
        format: Format,
        *packed: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x.index_select(1, channels) if train else None, *packed)
        ctx.scale, ctx.wide, ctx.format = scale, D.dtype, format
        return format.times(x, bias, *packed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        Xs, *packed = ctx.saved_tensors
        need_x, need_D, need_bias = ctx.needs_input_grad[:3]
        dD = ctx.scale * into(dY.t(), Xs, ctx.wide) if need_D else None
        dX = ctx.format.back(dY, *packed) if need_x else None
        return (dX, dD, dY.sum(0) if need_bias else None, *(None,) * (len(ctx.needs_input_grad) - 3))


class _PaCAConv(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,  # (batch, in, *places)
        D: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        channels: Tensor,
        train: bool,
        cast: bool,
        form: ConvForm,
    ) -> Tensor:
        ctx.save_for_backward(form.pick(x, channels) if train else None, weight)
        ctx.scale, ctx.wide, ctx.cast, ctx.form, ctx.shape = scale, D.dtype, cast, form, x.shape
        if cast:
            weight = weight.to(x.dtype)
            bias = None if bias is None else bias.to(x.dtype)
        return form.run(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        Xs, W = ctx.saved_tensors
        form: ConvForm = ctx.form
        dims = len(form.kernel)
        need_x, need_D, _, need_bias = ctx.needs_input_grad[:4]
        padding, apart = _padding(form)
        by_input, by_weight = _ADJOINTS[dims - 1]
        dX = dD = None
        if need_D:
            Xs = _pad(Xs, form) if apart else Xs
            shape = (dY.shape[1], Xs.shape[1], *form.kernel)
            G = by_weight(Xs, shape, dY, form.stride, padding, form.dilation)
            dD = ctx.scale * G.flatten(1).to(ctx.wide)
        if need_x:
            W = W.to(dY.dtype) if ctx.cast else W
            shape = ctx.shape
            if apart:
                pairs = form.padding_pairs  # last axis first
                places = [n + pairs[2 * i] + pairs[2 * i + 1] for i, n in enumerate(reversed(shape[2:]))]
                shape = (*shape[:2], *reversed(places))
            dX = by_input(shape, W, dY, form.stride, padding, form.dilation)
            dX = _unpad(dX, form, ctx.shape) if apart else dX
        dbias = dY.sum([0, *range(2, dims + 2)]) if need_bias else None
        return (dX, dD, None, dbias, *(None,) * 5)


_ADJOINTS: tuple[tuple[Callable[..., Tensor], Callable[..., Tensor]], ...] = (
    (grad.conv1d_input, grad.conv1d_weight),
    (grad.conv2d_input, grad.conv2d_weight),
    (grad.conv3d_input, grad.conv3d_weight),
)


def _padding(form: ConvForm) -> tuple[tuple[int, ...], bool]:
    """What the convolution pads by itself, and whether the input is padded apart from it."""
    if form.padding_mode == "zeros" and not isinstance(form.padding, str):
        return form.padding, False
    return (0,) * len(form.kernel), True


def _pad(x: Tensor, form: ConvForm) -> Tensor:
    return F.pad(x, form.padding_pairs, mode="constant" if form.padding_mode == "zeros" else form.padding_mode)


def _unpad(gradient: Tensor, form: ConvForm, shape: torch.Size) -> Tensor:
    """The adjoint of :func:`_pad`, which is linear: its gradient anywhere."""
    with torch.enable_grad():
        anywhere = gradient.new_zeros(shape).requires_grad_()
        return torch.autograd.grad(_pad(anywhere, form), anywhere, gradient)[0]
