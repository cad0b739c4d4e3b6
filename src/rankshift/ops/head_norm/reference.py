"""The equations in plain torch. Tests hold the kernels to this. In fp32, or in fp64 if the tensors are."""

from __future__ import annotations

import torch
from torch import Tensor

from rankshift.ops.rms_norm.reference import whole
from rankshift.ops.rotary.reference import Low, Three, turned, unturned, wide

Two = tuple[Tensor, Tensor]


def norm_rotate_(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, weights: Two, eps: float,
    low: tuple[Low | None, Low | None, Low | None],
) -> Tensor:  # fmt: skip
    """Every head y of q and k, with its term, ← y ρ w turned; ρ of all."""
    found = []
    for x, weight, term in zip((q, k), weights, low[:2], strict=True):
        heads = whole(x, term).view(len(x), -1, len(weight))
        rho = (heads.square().mean(2) + eps).rsqrt()
        x.copy_(turned(heads * rho[:, :, None] * wide(weight), cos, sin).flatten(1))
        found.append(rho)
    v.copy_(whole(v, low[2]))
    return torch.cat(found, 1)


def norm_rotate_back(
    dq: Tensor, dk: Tensor, dv: Tensor, of: Two, rho: Tensor, cos: Tensor, sin: Tensor, weights: Two, out: Three
) -> None:
    """With g = w ∘ dn and ŷ = n / w: dy = ρ (g − ŷ mean(g ŷ))."""
    for d, y, r, weight, to in zip(
        (dq, dk), of, rho.split_with_sizes([dq.shape[1], dk.shape[1]], 1), weights, out, strict=False
    ):
        value = wide(d).transpose(1, 2).flatten(0, 1)  # (T, H, D)
        g = turned(value, cos, -sin) * wide(weight)
        unit = unturned(wide(y).view_as(value), cos, sin) / wide(weight)
        to.copy_((r[:, :, None] * (g - unit * (g * unit).mean(2, keepdim=True))).flatten(1))
    out[2].copy_(dv.transpose(1, 2).flatten(2).flatten(0, 1))
