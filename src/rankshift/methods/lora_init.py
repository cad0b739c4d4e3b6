"""Where LoRA's A and B start. Each function returns fp32-or-wider CPU tensors (A (r, in), B (out, r)).

    kaiming      A ~ U(±1/√in), B = 0                        loralib's and PEFT's form of Hu et al. 2021
    gaussian     A ~ N(0, 1/r²), B = 0                       Hu et al. 2021, with PEFT's standard deviation
    orthogonal   A = Q₁N₁, B = N₂Q₂ᵀ with Q₂ᵀQ₁ = 0          both move in the first step and B A = 0 all the same
    pissa        A = √(S/s) Vᵀ, B = U √(S/s), top r of W     Meng et al. 2024, arXiv 2404.02948
    olora        A = R[:r], B = Q[:, :r] of W = QR           Büyükakyüz 2024, arXiv 2406.01775
    eva          A = top r right singular vectors of the layer's input, B = 0    Paischer et al. 2024, arXiv 2410.07170

PiSSA and OLoRA start at s B A ≠ 0 and, in their papers, subtract that from W. Here the start is kept as an anchor,
ΔW = s (B A − B₀A₀), which is the same function with the base's bits untouched: it stays exact in bf16, shared, and
portable.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankshift.core.random import Key, normal, uniform


def kaiming(key: Key, out: int, into: int, rank: int) -> tuple[Tensor, Tensor]:
    """A uniform in ±1/√in, so that A x has the scale of a linear layer's output at its own start; B = 0."""
    bound = 1 / math.sqrt(into)
    return uniform(key / "A", (rank, into), -bound, bound, dtype=torch.float64), torch.zeros(out, rank, device="cpu")


def gaussian(key: Key, out: int, into: int, rank: int) -> tuple[Tensor, Tensor]:
    """A normal with standard deviation 1/r; B = 0."""
    return normal(key / "A", (rank, into), 1 / rank, dtype=torch.float64), torch.zeros(out, rank, device="cpu")


def embedding(key: Key, out: int, into: int, rank: int) -> tuple[Tensor, Tensor]:
    """A = 0, B ~ N(0, 1): an embedding reads columns of A, so that is the factor to start at zero."""
    return torch.zeros(rank, into, device="cpu"), normal(key / "B", (out, rank), dtype=torch.float64)


def orthogonal(key: Key, out: int, into: int, rank: int) -> tuple[Tensor, Tensor]:
    """The two halves of the columns of one orthogonal r×r matrix span complements of the rank space, so B A = 0."""
    Q = torch.linalg.qr(normal(key / "Q", (rank, rank), dtype=torch.float64))[0]
    half = rank // 2
    A = Q[:, :half] @ normal(key / "A", (half, into), 1 / math.sqrt(into), dtype=torch.float64)
    B = normal(key / "B", (out, rank - half), 1 / math.sqrt(into), dtype=torch.float64) @ Q[:, half:].t()
    return A, B


def pissa(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """s B A is the best rank-r approximation of W, its singular values shared evenly between the factors."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    root = (S[:rank] / scale).sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def olora(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B has orthonormal columns, so ‖B‖ = √r."""
    Q, R = torch.linalg.qr(weight)
    return R[:rank], Q[:, :rank]
