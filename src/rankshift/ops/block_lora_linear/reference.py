"""The layer with a block-diagonal branch as the paper writes it, zeros and all. Tests hold the fast form to this.

A pair of factors is kept without zeros, its n blocks one below the other: A (n·r, in/n), B (out, r). With n = 1 they
are LoRA's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def block_diagonal(A: Tensor, B: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """(A (n·r, in), B (out, n·r)), dense: diag(A₁ … Aₙ) and diag(B₁ … Bₙ)."""
    diagonal: Callable[..., Tensor] = torch.block_diag
    return diagonal(*A.chunk(blocks, 0)), diagonal(*B.chunk(blocks, 0))


def block_lora_linear(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, blocks: int, scale: float, bias: Tensor | None = None
) -> Tensor:
    """y = x Wᵀ + s [B₁A₁x₁; …; BₙAₙxₙ] + bias, x = [x₁; …; xₙ].  x (…, in), A (n·r, in/n), B (out, r) → (…, out)."""
    parts = zip(x.chunk(blocks, -1), A.chunk(blocks, 0), B.chunk(blocks, 0), strict=True)
    y = x @ weight.t() + scale * torch.cat([x_i @ A_i.t() @ B_i.t() for x_i, A_i, B_i in parts], -1)
    return y if bias is None else y + bias
