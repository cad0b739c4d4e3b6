"""x εᵀ with ε = diag(v) Z, Z of standard normals: drawn in forward, drawn again in backward, never kept.

Z comes from a generator made for the call and seeded with a key, so the same key gives the same ε in every forward of
an update, in backward and in what checkpointing recomputes, and no other random state is read or written. It is drawn
for the whole weight, so world size does not matter, in blocks of rows, so scratch is bounded; in fp32 on the weight's
device. One key gives one ε on one kind of device; the CPU's generator reads its low 32 bits.

Forward and backward are opaque to the compiler. Were the draws in the graph, it would find the two alike and keep ε.
The key is a tensor on the CPU: another value is no other graph, and reading it waits for no device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad

from rankshift.core.base import blocks
from rankshift.core.form import ConvForm, Form
from rankshift.ops.products import compute_dtype


def noise_product(x: Tensor, v: Tensor, word: Tensor, form: Form) -> Tensor:
    """What a layer of this form makes of ``x`` with ε (out, in) in place of its weight, without bias.

    Args:
        x: input of the layer, linear (…, in) or convolution.
        v: (out,), standard deviation of ε in each row.
        word: the key, int64 on the CPU.
    """
    dtype, uncast = compute_dtype(x)
    with uncast:
        x = x.to(dtype)
        if not isinstance(form, ConvForm):
            linear: Tensor = _product(x, v, word, (), (), ())
            return linear
        alone = x.dim() == len(form.kernel) + 1
        x = F.pad(
            x[None] if alone else x,
            form.padding_pairs,
            "constant" if form.padding_mode == "zeros" else form.padding_mode,
        )
        y: Tensor = _product(x, v, word, form.kernel, form.stride, form.dilation)
        return y[0] if alone else y


def draw(v: Tensor, width: int, word: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of ε (out, width) block by block: (which, values in v's dtype)."""
    generator = torch.Generator(device=v.device).manual_seed(int(word))
    for rows in blocks(slice(0, len(v)), width):
        z = torch.empty(rows.stop - rows.start, width, dtype=torch.float32, device=v.device)
        yield rows, z.normal_(generator=generator).to(v.dtype).mul_(v[rows, None])


@torch.library.custom_op("rankshift::noise_product", mutates_args=())
def _product(
    x: Tensor, v: Tensor, word: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Linear if ``kernel`` is empty, else a convolution of (b, in, *places) that is padded already."""
    y = x.new_empty(_shape(x, v, kernel, stride, dilation))
    if not kernel:
        flat, out = x.reshape(-1, x.shape[-1]), y.view(-1, len(v))
        for rows, epsilon in draw(v, x.shape[-1], word):
            torch.mm(flat, epsilon.to(x.dtype).t(), out=out[:, rows])
        return y
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
    for rows, epsilon in draw(v, x.shape[1] * math.prod(kernel), word):
        weight = epsilon.to(x.dtype).reshape(-1, x.shape[1], *kernel)
        y[:, rows] = conv(x, weight, None, tuple(stride), 0, tuple(dilation))
    return y


@torch.library.custom_op("rankshift::noise_product_backward", mutates_args=())
def _product_backward(
    dy: Tensor,
    v: Tensor,
    word: Tensor,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The gradient of x, of this shape: dy ε, block by block."""
    dx = dy.new_zeros(shape)
    if not kernel:
        flat, total = dy.reshape(-1, len(v)), dx.view(-1, shape[-1])
        for rows, epsilon in draw(v, shape[-1], word):
            total.addmm_(flat[:, rows], epsilon.to(dy.dtype))
        return dx
    gradient: Any = (grad.conv1d_input, grad.conv2d_input, grad.conv3d_input)[len(kernel) - 1]
    for rows, epsilon in draw(v, shape[1] * math.prod(kernel), word):
        weight = epsilon.to(dy.dtype).reshape(-1, shape[1], *kernel)
        dx += gradient(tuple(shape), weight, dy[:, rows], tuple(stride), 0, tuple(dilation))
    return dx


def _shape(
    x: Tensor, v: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    if not kernel:
        return (*x.shape[:-1], v.shape[0])
    places = zip(x.shape[2:], kernel, stride, dilation, strict=True)
    return (x.shape[0], v.shape[0], *((size - d * (k - 1) - 1) // s + 1 for size, k, s, d in places))


@_product.register_fake
def _(
    x: Tensor, v: Tensor, word: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    return x.new_empty(_shape(x, v, kernel, stride, dilation))


@_product_backward.register_fake
def _(
    dy: Tensor,
    v: Tensor,
    word: Tensor,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    return dy.new_empty(shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, v, word, *geometry = inputs
    # copies: backward means the ε that forward had, also where the next update has begun, or DDP has broadcast buffers
    ctx.save_for_backward(v.clone(), word.clone())
    ctx.shape, ctx.geometry = x.shape, geometry


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    v, word = ctx.saved_tensors
    return _product_backward(dy, v, word, ctx.shape, *ctx.geometry), None, None, None, None, None


_product.register_autograd(_differentiate, setup_context=_keep)
