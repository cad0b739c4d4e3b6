"""Subspaces of a gradient: finding one, choosing its rank, and carrying Adam's moments from one to the next.

A matrix A (l, s) is projected along its last axis: a basis Q (s, r) with orthonormal columns, X = A Q (l, r), lifted
X Qᵀ. Whoever projects the other axis hands over Aᵀ. Leading axes are a batch of matrices of one shape.

Zhao et al. 2024, arXiv 2403.03507 (GaLore); Refael et al. 2024, arXiv 2410.17881 (AdaRankGrad); Robert et al. 2024,
arXiv 2410.16103 (LDAdam).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Finder = Literal["eigh", "range", "warm", "svd"]
Transport = Literal["none", "reset", "square", "centred"]

FINDERS: tuple[str, ...] = ("eigh", "range", "warm", "svd")
TRANSPORTS: tuple[str, ...] = ("none", "reset", "square", "centred")


@dataclass(frozen=True)
class Basis:
    """Directions of a matrix, by falling energy."""

    vectors: Tensor  # (…, s, k), orthonormal columns
    energies: Tensor  # (…, k): ‖A q‖² of each
    total: Tensor  # (…): ‖A‖²_F

    def narrow(self, rank: int) -> Tensor:
        """(…, s, rank): the first directions, in memory of their own."""
        return self.vectors[..., :rank].clone(memory_format=torch.contiguous_format)


def find(
    A: Tensor,
    width: int,
    finder: Finder = "eigh",
    *,
    begin: Tensor | None = None,
    power: int = 1,
    reduce: Callable[[Tensor], Tensor] = lambda part: part,
) -> Basis:
    """The ``width`` leading right singular directions of A, exact ("svd", "eigh") or nearly so ("range", "warm"), the
    largest entry of each positive.

    "svd" decomposes A. "eigh" decomposes the Gram AᵀA: the same subspace as far as the dtype tells σ² apart. "range" is
    the randomised range finder (Halko, Martinsson & Tropp 2011) with ``power`` iterations. "warm" is the same, begun
    where the last basis was, which drifts slowly. Both choose the directions inside the span that they found by energy.

    Args:
        A: (…, l, s), in fp32 or wider. Rows may be spread over ranks.
        begin: (…, s, width) for "range" and "warm": random numbers, or a basis with random numbers beside it.
        reduce: sums over the ranks that hold other rows of A; "svd" needs all rows here.
    """
    width = min(width, A.shape[-1])
    total = reduce(torch.linalg.vector_norm(A, dim=(-2, -1)).square())
    if finder == "svd":
        _, sigma, Vh = torch.linalg.svd(A, full_matrices=False)
        width = min(width, sigma.shape[-1])
        return Basis(_signed(Vh[..., :width, :].mT), sigma[..., :width].square(), total)
    if finder == "eigh":
        energies, vectors = torch.linalg.eigh(reduce(A.mT @ A))
        return Basis(_signed(vectors.flip(-1)[..., :width]), energies.flip(-1)[..., :width].clamp(min=0), total)
    assert begin is not None
    Z = begin[..., :width]
    for _ in range(1 + power):
        Z = orthonormal(reduce(A.mT @ (A @ Z)), begin[..., :width])
    B = A @ Z
    energies, rotation = torch.linalg.eigh(reduce(B.mT @ B))
    return Basis(_signed(Z @ rotation.flip(-1)), energies.flip(-1).clamp(min=0), total)


def orthonormal(Y: Tensor, noise: Tensor) -> Tensor:
    """(…, s, k): an orthonormal basis of the columns of Y, by Householder. On a GPU, where that takes a launch a
    column, twice by Cholesky in float64, with 1e-7 of ``noise`` (…, s, k), which keeps it definite whatever rank Y
    has."""
    return cholesky_qr(Y, noise) if Y.is_cuda else torch.linalg.qr(Y).Q


def cholesky_qr(Y: Tensor, noise: Tensor) -> Tensor:
    """As :func:`orthonormal`."""
    Z = Y.double()
    Z = Z / torch.linalg.matrix_norm(Z, keepdim=True).clamp(min=torch.finfo(Y.dtype).tiny)
    Z = Z + (1e-7 / noise.shape[-2] ** 0.5) * noise
    for _ in range(2):
        R = torch.linalg.cholesky_ex(Z.mT @ Z, upper=True).L
        Z = torch.linalg.solve_triangular(R, Z, upper=True, left=False)
    basis: Tensor = Z.to(Y.dtype)
    return basis


def _signed(vectors: Tensor) -> Tensor:
    """The same directions, the largest entry of each positive: a factorisation leaves the sign to rounding."""
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)


def needed(basis: Basis, energy: float) -> Tensor:
    """(…): the fewest directions that keep ``energy`` of ‖A‖², int64; one more than there are if none do.

    The number r with E(r) ≥ energy > E(r − 1), E(r) = Σ_{i≤r} σ_i² / ‖A‖²_F; the published rule, read literally, is a
    supremum over a set without one.
    """
    share = basis.energies.cumsum(-1) / basis.total.clamp(min=torch.finfo(basis.total.dtype).tiny)[..., None]
    # energy = 1 is met when nothing but rounding is missing
    return (share < energy - 4 * torch.finfo(share.dtype).eps).sum(-1) + 1


def captured(kept: Tensor, total: Tensor) -> Tensor:
    """(…): E, the share of ‖A‖² along a basis Q, of ‖A Q‖² and ‖A‖²; 0 for a matrix of zeros."""
    return kept / total.clamp(min=torch.finfo(total.dtype).tiny)


@dataclass(frozen=True)
class Moments:
    """Adam's averages in some basis."""

    first: Tensor  # (…, l, r)
    second: Tensor  # (…, l, r)
    mass: Tensor  # (…, r): 1 − β2ᵗ of each direction, 0 for one never seen


def transport(moments: Moments, R: Tensor, how: Transport, seen: float) -> Moments:
    """The moments in a new basis.

    With R = Q_newᵀ Q_old: the first goes over exactly, M Rᵀ. The second is known as a diagonal only. "square" takes
    directions as uncorrelated around zero, (R∘R) V; "centred" as uncorrelated around their mean (LDAdam); both stay
    non-negative, where R V does not. What a direction was never seen along is said by the mass, (R∘R) c.

    Args:
        R: (…, r', r).
        how: "none" leaves the numbers where they stand, as GaLore does: r' = r. "reset" begins anew.
        seen: 1 − β1ᵗ, which the first moment is divided by, for "centred".
    """
    if how == "none":
        return moments
    square = R.square()
    mass = (square @ moments.mass[..., None])[..., 0]
    if how == "reset":
        shape = (*moments.first.shape[:-1], R.shape[-2])
        return Moments(moments.first.new_zeros(shape), moments.second.new_zeros(shape), torch.zeros_like(mass))
    first = moments.first @ R.mT
    if how == "square":
        return Moments(first, moments.second @ square.mT, mass)
    old = moments.mass.clamp(min=torch.finfo(mass.dtype).tiny)[..., None, :]
    mean = moments.first / max(seen, torch.finfo(mass.dtype).tiny)
    variance = moments.second / old - mean.square()
    second = (variance @ square.mT + (mean @ R.mT).square()).abs()
    return Moments(first, second * mass[..., None, :], mass)


def rounded_up(rank: int, multiple: int, most: int) -> int:
    """A rank as a multiple of some number, at most ``most``."""
    return min(-(-rank // multiple) * multiple, most)


def together(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Indices in order, in batches of at most ``limit`` elements."""
    batches: list[list[int]] = []
    room = 0
    for index, size in enumerate(sizes):
        if not batches or size > room:
            batches.append([])
            room = limit
        batches[-1].append(index)
        room -= size
    return batches


def alike(kinds: Sequence[Hashable], sizes: Sequence[int], limit: int) -> list[list[int]]:
    """The same, with nothing in a batch but what is of one kind."""
    found: dict[Hashable, list[int]] = {}
    for index, kind in enumerate(kinds):
        found.setdefault(kind, []).append(index)
    return [[some[i] for i in batch] for some in found.values() for batch in together([sizes[i] for i in some], limit)]
