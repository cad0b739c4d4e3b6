"""All in plain torch. Tests hold the kernels to this."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
