"""RMSNorm that adds what it reads: the residual, and the low-rank terms that no GEMM has written.

No autograd: a fused block's node calls these. Activations are (T, K) with unit stride along K and any stride between
rows; Z, B, S and A likewise. On an NVIDIA GPU that Triton knows, tensors of 16 bits, all of one dtype but for the
weight, take one launch, with ranks r up to 128 and R up to 384; all others the reference.

What is added to x may have a gain, rows of (G, K) in fp32, as :func:`rankshift.ops.skinny.gains` makes them: c, then a
bias b if there is one, then ρ. It is c (y + Z Bᵀ) + b then, as DoRA has it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankshift.ops.launch import unrecorded
from rankshift.ops.rms_norm import reference
from rankshift.ops.rms_norm.reference import Low
from rankshift.ops.stochastic_rounding.op import runs_on


@unrecorded
def norm(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, y: Tensor | None = None, low: Low | None = None,
    gain: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x₂ = x + y + Z Bᵀ and its norm n = x₂ ρ (offset + w), where ρ = (mean(x₂²) + ε)^-½.

    Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv:1910.07467); an offset of 1 is Gemma's.

    Args:
        x: (T, K).
        weight: (K,), w.
        y: (T, K), added to x.
        low: Z (T, r) and B (K, r), whose product is added to y.
        gain: (G, K), of y and that product.

    Returns:
        x₂ (T, K), which is x itself without y; n (T, K); ρ (T,) in fp32, of x₂ as it was rounded.

    Raises:
        ValueError: low or gain without y.
    """
    if y is None and not (low is None and gain is None):
        raise ValueError("low is a term of y, gain its factor: give y as well")
    if not _kernel(x):
        return reference.norm(x, weight, eps, offset, y, low, gain)
    from rankshift.ops.rms_norm.triton import norm as launch

    return launch(x, weight, eps, offset, y, low, gain)


@unrecorded
def norm_back(
    dn: Tensor,
    x2: Tensor,
    rstd: Tensor,
    weight: Tensor,
    offset: float = 0.0,
    low: Low | None = None,
    residual: Tensor | None = None,
    z: Tensor | None = None,
    more: Sequence[Tensor] = (),
) -> Tensor:
    """The gradient of x₂ from that of n: residual + ρ (g − x₂ ρ² mean(g x₂)), where g = (Σ dn + S A)(offset + w).

    Args:
        dn: (T, K).
        x2: (T, K), as ``norm`` returned it.
        rstd: (T,), ρ.
        weight: (K,), frozen: no gradient is formed.
        low: S (T, R) and A (R, K), whose product is added to dn.
        residual: (T, K), the gradient that reaches x₂ past the norm.
        z: (T, R), n Aᵀ of the forward, if it was kept: the kernel then needs no A for the mean, which is faster.
        more: (T, K) each, two at most: what else makes up dn, of layers that read n by products of their own.

    Returns:
        (T, K), in dn's dtype.
    """
    if not _kernel(dn):
        return reference.norm_back(dn, x2, rstd, weight, offset, low, residual, more)
    from rankshift.ops.rms_norm.triton import norm_back as launch

    return launch(dn, x2, rstd, weight, offset, low, z, residual, more)


@unrecorded
def add(x: Tensor, y: Tensor, low: Low | None = None, gain: Tensor | None = None) -> Tensor:
    """x + y + Z Bᵀ: x, y (T, K); Z (T, r); B (K, r); a gain (G, K). Summed in fp32, rounded once."""
    if not _kernel(x):
        return reference.add(x, y, low, gain)
    from rankshift.ops.rms_norm.triton import add as launch

    return launch(x, y, low, gain)


@unrecorded
def add_back(dx: Tensor, y: Tensor, low: Low | None, gain: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of y + Z Bᵀ where c (y + Z Bᵀ) + b was added, and ρ times that of c, which is that of DoRA's μ.

    Args:
        dx: (T, K), the gradient of the sum.
        y: (T, K), as it was added.
        low: Z (T, r) and B (K, r), likewise.
        gain: (G, K).

    Returns:
        c dx (T, K), and ρ Σₜ dx (y + Z Bᵀ) (K,) in fp32, in an order that depends on the shapes only.
    """
    if not _kernel(dx):
        return reference.add_back(dx, y, low, gain)
    from rankshift.ops.rms_norm.triton import add_back as launch

    return launch(dx, y, low, gain)


@unrecorded
def pick(
    x: Tensor, channels: Tensor | Sequence[Tensor], rstd: Tensor | None = None, weight: Tensor | None = None,
    offset: float = 0.0, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Some columns of scale · x, or of scale · n for the norm n of x: (T, k).

    Args:
        x: (T, K).
        channels: (k,) int64, which columns; or several such: the columns of all of them behind one another.
        rstd: (T,), ρ of the norm; None for x itself.
        weight: (K,), the norm's; with rstd.
        scale: what they are multiplied by, before they are rounded, once.
    """
    channels = (channels,) if isinstance(channels, Tensor) else tuple(channels)
    if not _kernel(x):
        every = channels[0] if len(channels) == 1 else torch.cat(channels)
        return reference.pick(x, every, rstd, weight, offset, scale)
    from rankshift.ops.rms_norm.triton import pick as launch

    return launch(x, channels, rstd, weight, offset, scale)


def _kernel(tensor: Tensor) -> bool:
    return tensor.dtype.itemsize == 2 and runs_on(tensor.device)
