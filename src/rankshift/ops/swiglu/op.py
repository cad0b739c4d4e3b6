"""h = act(g + Zg Bgᵀ) · (u + Zu Buᵀ) and its gradient, each in one pass over what has T · F numbers.

The low-rank terms are added where g, u and dh are read, so that they are never written. What is summed over T is summed
in the same pass, in an order that depends on the shapes only. Nothing here is recorded by autograd.

All activations and factors are of one dtype, with rows in one piece and any row stride (slices of wider buffers). bf16
and fp16 on an NVIDIA GPU go to kernels; the rest to reference.py. Sums are in fp32, in float64 of float64.

A gain, (G, 2F) in fp32 for the columns of g and u, is one as :func:`rankshift.ops.skinny.gains` makes them: rows c,
then a bias b if there is one, then ρ. Where g + Zg Bgᵀ stands comes c (g + Zg Bgᵀ) + b then, and of u likewise, as DoRA
has it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from rankshift.ops.launch import unrecorded
from rankshift.ops.stochastic_rounding.op import runs_on
from rankshift.ops.swiglu import reference
from rankshift.ops.swiglu.reference import ACTIVATIONS, Back, Low

_WIDEST = 128  # the largest rank of a term that the kernels take
_SUMMED = 64  # the largest rank of which a program holds the sums; with more, they are products of their own


@unrecorded
def swiglu(
    g: Tensor, u: Tensor, low_g: Low | None = None, low_u: Low | None = None, activation: str = "silu",
    gain: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """h (T, F), rounded once.

    Args:
        g: (T, F).
        u: (T, F).
        low_g: Zg (T, r) and Bg (F, r); None where nothing is to be added.
        low_u: Zu and Bu, likewise.
        activation: "silu" or "gelu_tanh".
        gain: (G, 2F), of g and u.
    """
    _known(activation)
    if not _launches((g, u), low_g, low_u):
        return reference.swiglu(g, u, low_g, low_u, activation, gain)
    from rankshift.ops.swiglu.triton import forward

    return forward(g, u, low_g, low_u, activation, gain)


@unrecorded
def swiglu_back(
    dh: Tensor,
    g: Tensor,
    u: Tensor,
    low_g: Low | None = None,
    low_u: Low | None = None,
    low_h: Low | None = None,
    activation: str = "silu",
    *,
    out: tuple[Tensor, Tensor] | None = None,
    want_h: bool = False,
    grads: Collection[str] = (),
    scale: float = 1.0,
    gain: Tensor | None = None,
) -> Back:
    """From dh + S A, g + Zg Bgᵀ and u + Zu Buᵀ: the gradients of these, and what else is asked for.

    Args:
        dh: (T, F).
        g: (T, F), as swiglu had it.
        u: (T, F).
        low_g: Zg (T, r) and Bg (F, r), or None.
        low_u: Zu and Bu, or None.
        low_h: S (T, r) and A (r, F), or None.
        activation: "silu" or "gelu_tanh".
        out: where dg and du go, (T, F) each: slices, which may be g and u themselves.
        want_h: whether h (T, F) is handed back.
        grads: of "g", "u" and "h", those for whose low-rank pair a gradient is wanted: db_g = scale · dgᵀ Zg (F, r),
            db_u = scale · duᵀ Zu (F, r), da_h = Sᵀ h (r, F). None where there is no pair.
        scale: what db_g and db_u are multiplied by.
        gain: (G, 2F), of g and u: the sums are then handed back too, of DoRA's μ.
    """
    _known(activation)
    dg, du = out if out is not None else (torch.empty_like(g), torch.empty_like(u))
    lows = low_g, low_u, low_h
    if not _launches((dh, g, u, dg, du), *lows):
        return reference.swiglu_back(
            dh, g, u, *lows, activation, out=(dg, du), want_h=want_h, grads=grads, scale=scale, gain=gain
        )
    from rankshift.ops.swiglu.triton import backward

    fused: list[str] = []
    apart: list[str] = []
    for name, low in zip("guh", lows, strict=True):
        if low is not None and name in grads:
            (fused if low[0].shape[1] <= _SUMMED else apart).append(name)
    h = torch.empty_like(dh) if want_h or "h" in apart else None
    *found, dm = backward(dh, g, u, *lows, activation, dg, du, h, fused, scale, gain)
    sums: Sequence[Tensor | None] = found
    increment_version([dg, du])  # the kernel writes past autograd
    if apart:
        rest = reference.sums(dg, du, h, *lows, apart, scale)
        sums = [one if one is not None else other for one, other in zip(sums, rest, strict=True)]
    db_g, db_u, da_h = sums
    return Back(dg, du, h if want_h else None, db_g, db_u, da_h, dm)


def _known(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, not {activation!r}")


def _launches(tensors: Sequence[Tensor], *lows: Low | None) -> bool:
    first = tensors[0]
    if first.dtype not in (torch.bfloat16, torch.float16) or not first.numel() or not runs_on(first.device):
        return False
    terms = [low for low in lows if low is not None]
    return {(t.dtype, t.stride(1)) for t in chain(tensors, *terms)} == {(first.dtype, 1)} and all(
        Z.shape[1] <= _WIDEST for Z, _ in terms
    )
