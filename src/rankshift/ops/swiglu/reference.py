"""act(g) · u and its gradient in plain torch, g and u with their low-rank terms. Tests hold the kernels to this.

SwiGLU and GEGLU are those of Shazeer 2020, https://arxiv.org/abs/2002.05202. Both activations are x · σ(w): SiLU has
w = x, the GELU by tanh (Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415) w = √(8/π) · (x + 0.044715 x³).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from rankshift.ops.products import into
from rankshift.ops.rms_norm.reference import gained, whole

Low = tuple[Tensor, Tensor]
"""Z (T, r) and B (F, r) for Z Bᵀ."""
ACTIVATIONS = ("silu", "gelu_tanh")
TWICE, CUBE = math.sqrt(8 / math.pi), 0.044715


class Back(NamedTuple):
    """What :func:`rankshift.ops.swiglu.swiglu_back` gives; None for what was not asked for."""

    dg: Tensor  # (T, F)
    du: Tensor  # (T, F)
    h: Tensor | None  # (T, F)
    db_g: Tensor | None  # (F, r), this and the next three in fp32
    db_u: Tensor | None  # (F, r)
    da_h: Tensor | None  # (r, F)
    dm: Tensor | None  # (2F,), ρ times the gradient of c


def swiglu(
    g: Tensor, u: Tensor, low_g: Low | None = None, low_u: Low | None = None, activation: str = "silu",
    gain: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(g + Zg Bgᵀ) · (u + Zu Buᵀ), each with its gain, in fp32 or wider and rounded once."""
    gain_g, gain_u = _halves(gain)
    act, _ = _activated(gained(whole(g, low_g), gain_g), activation)
    return (act * gained(whole(u, low_u), gain_u)).to(g.dtype)


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
    """See op.py. The sums over T are of dg, du and h as they are handed over, rounded; but for that of a gain."""
    gain_g, gain_u = _halves(gain)
    before = whole(g, low_g), whole(u, low_u)
    G, U = gained(before[0], gain_g), gained(before[1], gain_u)
    act, slope = _activated(G, activation)
    dH = dh.to(G.dtype) if low_h is None else dh.to(G.dtype) + low_h[0].to(G.dtype) @ low_h[1].to(G.dtype)
    dg, du = out if out is not None else (torch.empty_like(g), torch.empty_like(u))
    h = (act * U).to(g.dtype)
    dG, dU, dm = dH * U * slope, dH * act, None
    if gain_g is not None and gain_u is not None:
        dm = torch.cat([gain_g[-1] * (dG * before[0]).sum(0), gain_u[-1] * (dU * before[1]).sum(0)])
        dG, dU = gain_g[0] * dG, gain_u[0] * dU
    dg.copy_(dG)
    du.copy_(dU)
    return Back(dg, du, h if want_h else None, *sums(dg, du, h, low_g, low_u, low_h, grads, scale), dm)


def sums(
    dg: Tensor,
    du: Tensor,
    h: Tensor | None,
    low_g: Low | None,
    low_u: Low | None,
    low_h: Low | None,
    grads: Collection[str],
    scale: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """db_g, db_u and da_h, those that ``grads`` names."""
    dtype = torch.promote_types(dg.dtype, torch.float32)
    db_g = into(dg.t(), low_g[0], dtype) * scale if low_g is not None and "g" in grads else None
    db_u = into(du.t(), low_u[0], dtype) * scale if low_u is not None and "u" in grads else None
    da_h = into(low_h[0].t(), h, dtype) if low_h is not None and h is not None and "h" in grads else None
    return db_g, db_u, da_h


def _halves(gain: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """That of g, and that of u."""
    if gain is None:
        return None, None
    of_g, of_u = gain.chunk(2, 1)
    return of_g, of_u


def _activated(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act(x) and its derivative."""
    if activation == "silu":
        gate = torch.sigmoid(x)
        return x * gate, gate + x * gate * (1 - gate)
    gate = torch.sigmoid(TWICE * (x + CUBE * x**3))
    return x * gate, gate + x * gate * (1 - gate) * TWICE * (1 + 3 * CUBE * x**2)
