"""The loss and its gradient in plain torch. Tests hold the op and the kernel to this."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    low: tuple[Tensor, Tensor] | None = None,
    ignore_index: int = -100,
    multiplier: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The sum over the rows of h (T, K), with weight (V, K), labels (T,), bias (V,), low = (A (r, K), B (V, r))."""
    logits = F.linear(h, weight, bias)
    if low is not None:
        A, B = low
        logits = logits + h @ A.t() @ B.t()
    logits = multiplier * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")


def rows_(
    logits: Tensor, labels: Tensor, ignore_index: int, multiplier: float, softcap: float | None, grad: bool
) -> Tensor:
    """The losses (n,) of some rows, in fp32 or wider; with ``grad``, logits (n, V) become the gradient of their sum."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32)) * multiplier
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    kept = labels != ignore_index
    at = labels.where(kept, 0)[:, None]
    total = x.logsumexp(1, keepdim=True)
    losses = (total - x.gather(1, at))[:, 0].masked_fill_(~kept, 0)
    if grad:
        slope = (x - total).exp_()
        slope.scatter_add_(1, at, slope.new_full(at.shape, -1))
        if softcap is not None:
            slope *= 1 - (x / softcap) ** 2
        logits.copy_(slope.mul_(multiplier)).masked_fill_(~kept[:, None], 0)
    return losses
