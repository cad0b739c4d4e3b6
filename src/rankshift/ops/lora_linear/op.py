"""One autograd node for a frozen linear layer with a low-rank branch.

    y = (Z sBᵀ + bias) + x Wᵀ,   Z = x Aᵀ        dX = S A + dY W,   S = dY sB

The small product is written first and the large one adds itself onto it: so it reads as much as it writes anyway, while
the small one would take twice as long to read and write what is there. It is also nearer: what is rounded before the
sum is the change and not the whole.

Kept for backward: x (only if A trains, or the order recomputes Z) and Z (only if B trains and the order saves it), b·n
and b·r values; never a scaled copy, never the (out, in) gradient, and no weight other than by reference. The scale is
folded into B. A and B may be wider than the compute dtype (fp32 masters of a bf16 layer); their gradients come back in
their own dtype. In 16 bits on an NVIDIA GPU, S and dB are one pass over dY, and dA one over x (ops/skinny).

Compiled, the products of a layer are one operation to the compiler, which would copy what they add themselves onto.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankshift.core.base import Format
from rankshift.ops.lora_linear.order import LOW_PRECISION, SAVES_Z, Backward, Forward, choose
from rankshift.ops.products import accumulate, compute_dtype, delivered, into
from rankshift.ops.skinny import down_back, pack, weight_gradient
from rankshift.ops.stochastic_rounding.op import runs_on


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
    forward, backward = choose(b, n, m, r, dtype, *needs, forward, backward)
    with uncast:
        y: Tensor = _LoRALinear.apply(  # type: ignore[no-untyped-call]
            x, A, B, bias, scale, forward, backward, needs[1], needs[2], dtype, format, *packed
        )
    return delivered(y, x)


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
        dtype: torch.dtype,
        format: Format,
        *packed: Tensor,
    ) -> Tensor:
        ctx.scale, ctx.order, ctx.format, ctx.dtype, shape = scale, backward, format, x.dtype, x.shape[:-1]
        x = x.reshape(-1, x.shape[-1]).to(dtype)  # (b, in)
        Ac, Bc = _narrowed(A, B, scale, dtype)
        keep_z = train_b and backward in SAVES_Z
        z = None  # (b, r)
        if forward == "f1" and not format.multiplies:
            times = _OPS.lora_times if torch.compiler.is_compiling() else _times
            y, z = times(x, Ac, Bc, bias, format.dense(*packed).to(dtype))
        elif forward == "f1":
            z = x @ Ac.t()
            y = accumulate(format.times(x, bias, *packed), z, Bc.t())
        else:
            z = x @ Ac.t() if keep_z else None
            bias = None if bias is None else bias.to(dtype)
            y = F.linear(x, _merged(format.dense(*packed), Ac, Bc), bias)
        keep_x = train_a or (train_b and not keep_z)
        ctx.save_for_backward(x if keep_x else None, z if keep_z else None, A, B, *packed)
        # a view that a node returns could not be changed in place, and models do
        whole: Tensor = torch.ops.aten._unsafe_view.default(y, (*shape, y.shape[1]))
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, z, A, B, *packed = ctx.saved_tensors
        need_x, need_A, need_B, need_bias = ctx.needs_input_grad[:4]
        scale, order, format, shape = ctx.scale, ctx.order, ctx.format, dY.shape[:-1]
        dY = dY.reshape(-1, dY.shape[-1])
        Ac, Bc = _narrowed(A, B, scale, dY.dtype)
        low = need_x and order in ("b1", "b1s")  # dX by S A
        dX = dA = dB = None
        if order == "b4" and (need_A or need_B):
            G = dY.t() @ x  # (out, in)
            dA = into(Bc.t(), G, A.dtype) if need_A else None
            dB = scale * into(G, Ac.t(), B.dtype) if need_B else None
        else:
            W = format.dense(*packed).to(dY.dtype) if low and not format.multiplies else None
            back = _OPS.lora_back if torch.compiler.is_compiling() else _back
            found = back(dY, x, z, Ac, Bc, scale, W, low, need_A, need_B)
            dX = found[0] if low else None
            dA = found[int(low)].to(A.dtype) if need_A else None
            dB = found[-1].to(B.dtype) if need_B else None
        if low and format.multiplies:
            assert dX is not None  # S
            dX = accumulate(format.back(dY, *packed), dX, Ac)
        elif need_x and not low:
            dX = dY @ _merged(format.dense(*packed), Ac, Bc)
        dX = None if dX is None else dX.view(*shape, dX.shape[1]).to(ctx.dtype)
        dbias = dY.sum(0) if need_bias else None
        return (dX, dA, dB, dbias, *(None,) * (len(ctx.needs_input_grad) - 4))


def _narrowed(A: Tensor, B: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and s B in the dtype that is computed in."""
    if A.dtype == dtype or torch.compiler.is_compiling() or not runs_on(A.device):
        return A.to(dtype), (scale * B).to(dtype)
    Ac, Bc = torch.empty_like(A, dtype=dtype), torch.empty_like(B, dtype=dtype)
    pack((A, B), (1.0, scale), (Ac, Bc))  # one launch
    return Ac, Bc


def _merged(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """W + B A in the dtype of the factors."""
    return torch.addmm(W.to(A.dtype), B, A)


def _times(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, W: Tensor) -> tuple[Tensor, Tensor]:
    """y and Z, for A, s B and W in the dtype of x."""
    z = F.linear(x, A)
    y = F.linear(z, B, None if bias is None else bias.to(x.dtype))
    return accumulate(y, x, W.t()), z


def _back(
    dY: Tensor, x: Tensor | None, z: Tensor | None, A: Tensor, B: Tensor, scale: float, W: Tensor | None, need_x: bool,
    need_A: bool, need_B: bool,
) -> list[Tensor]:  # fmt: skip
    """Of dX, dA and dB those that are needed, for A, s B and W in the dtype of dY; dA and dB are in fp32 or wider.
    Without W there is S in the place of dX."""
    wide = torch.float32 if dY.dtype in LOW_PRECISION else dY.dtype
    S: Any = None
    dA: Any = None
    dB: Any = None
    if need_B and z is None:
        z = F.linear(_given(x), A)
    if dY.dtype in LOW_PRECISION and runs_on(dY.device):
        S, dB = down_back(dY, B, z if need_B else None, scale=scale)
        dA = weight_gradient(S, _given(x)) if need_A else None
    else:
        S = dY @ B if need_x or need_A else None
        dA = into(S.t(), _given(x), wide) if need_A else None
        dB = into(dY.t(), _given(z), wide).mul_(scale) if need_B else None
    dX = S if W is None or not need_x else accumulate(S @ A, dY, W)
    return [found for found, need in ((dX, need_x), (dA, need_A), (dB, need_B)) if need]


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


# ---- inside compiled graphs


def _times_fake(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, W: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], B.shape[0]), x.new_empty(x.shape[0], A.shape[0])


def _back_fake(
    dY: Tensor, x: Tensor | None, z: Tensor | None, A: Tensor, B: Tensor, scale: float, W: Tensor | None, need_x: bool,
    need_A: bool, need_B: bool,
) -> list[Tensor]:  # fmt: skip
    found = [dY.new_empty(dY.shape[0], (B if W is None else A).shape[1])] if need_x else []
    wide = torch.float32 if dY.dtype in LOW_PRECISION else dY.dtype
    return found + [t.new_empty(t.shape, dtype=wide) for t, need in ((A, need_A), (B, need_B)) if need]


def _define(name: str, schema: str, runs: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Not by ``custom_op``, which takes longer to call than a small product takes to launch."""
    torch.library.define(f"rankshift::{name}", schema)
    torch.library.impl(f"rankshift::{name}", "CompositeExplicitAutograd", runs)
    torch.library.register_fake(f"rankshift::{name}", fake)


_define(
    "lora_times",
    "(Tensor x, Tensor A, Tensor B, Tensor? bias, Tensor W) -> (Tensor, Tensor)",
    _times, _times_fake,
)  # fmt: skip
_define(
    "lora_back",
    "(Tensor dY, Tensor? x, Tensor? z, Tensor A, Tensor B, float scale, Tensor? W, bool need_x, bool need_A, "
    "bool need_B) -> Tensor[]",
    _back, _back_fake,
)  # fmt: skip
_OPS = torch.ops.rankshift
