"""All in plain torch. Tests hold the kernels to this."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankshift.core.base import blocks
from rankshift.ops.products import into


def down_back(
    dY: Tensor,
    B: Tensor,
    Z: Tensor | None = None,
    widths: Sequence[int] | None = None,
    scale: float = 1.0,
    normed: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See op.py."""
    widths = list(dY.shape[1:] if widths is None else widths)
    parts, factors = torch.split(dY, widths, 1), torch.split(B, widths)
    S = torch.cat([part @ factor for part, factor in zip(parts, factors, strict=True)], 1)
    if normed is not None:
        normed[1].copy_(S * normed[0][:, None])
    return S, None if Z is None else up_gradient(dY, Z, widths) * scale


def up_gradient(dY: Tensor, Z: Tensor, widths: Sequence[int]) -> Tensor:
    """See op.py."""
    dtype = torch.promote_types(dY.dtype, torch.float32)
    parts, zs = torch.split(dY, list(widths), 1), Z.chunk(len(widths), 1)
    return torch.cat([into(part.t(), z, dtype) for part, z in zip(parts, zs, strict=True)])


def weight_gradient(S: Tensor, x: Tensor, gain: Tensor | None = None, offset: float = 0.0) -> Tensor:
    """See op.py."""
    dA = into(S.t(), x, torch.promote_types(x.dtype, torch.float32))
    return dA if gain is None else dA.mul_(offset + gain.to(dA.dtype))


def pack(sources: Sequence[Tensor], scales: Sequence[float], targets: Sequence[Tensor]) -> None:
    """See op.py."""
    for source, scale, target in zip(sources, scales, targets, strict=True):
        target.copy_(source.to(torch.promote_types(source.dtype, torch.float32)) * scale)


def gains(
    weights: Sequence[Tensor], A: Tensor, B: Tensor, widths: Sequence[int], magnitudes: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
) -> Tensor:  # fmt: skip
    """See op.py. Of W + B A some rows at a time."""
    r, dtype = B.shape[1], torch.promote_types(B.dtype, torch.float32)
    biased = any(bias is not None for bias in biases)
    gain = torch.zeros(2 + biased, len(B), dtype=dtype, device=B.device)
    gain[0] = 1
    if len(weights) < len(widths):
        weights = torch.split(weights[0], list(widths))
    parts = zip(weights, torch.split(B, list(widths)), gain.split_with_sizes(list(widths), 1), strict=True)
    for i, (W, own, found) in enumerate(parts):
        magnitude, bias = magnitudes[i], biases[i]
        down = (A[i * r : i * r + r] if len(A) > r else A).to(dtype)
        if magnitude is not None:
            for rows in blocks(slice(0, len(W)), W.shape[1]):
                norm = torch.linalg.vector_norm(W[rows].to(dtype) + own[rows].to(dtype) @ down, dim=1)
                found[-1, rows] = torch.where(norm == 0, 0, 1 / norm)
            found[0] = torch.where(found[-1] == 0, 1, magnitude.to(dtype) * found[-1])
        if bias is not None:
            found[1] = bias
    return gain
