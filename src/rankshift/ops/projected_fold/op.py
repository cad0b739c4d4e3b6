"""W ← keep·W + L Rᵀ for many weights at once, on a GPU: as many launches as there are shapes.

L (n, r) and R (m, r) are in fp32. Sums are in fp32 and rounded once. Products are in TF32 for weights in 16 bits, and
for weights in fp32 in three times TF32, which is fp32 but for its last bits.

The kernel finds the tensors by a table of addresses, which is made again only when a tensor has moved.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from rankshift.ops.stochastic_rounding.op import runs_on


class Fold(NamedTuple):
    """One weight and its step."""

    weight: Tensor  # (n, m), changed in place
    left: Tensor  # (n, r)
    right: Tensor  # (m, r)
    keep: float
    word: int = 0  # of the noise of :func:`rankshift.core.random.dither`, where it is rounded at random


def fits(weight: Tensor, left: Tensor, right: Tensor) -> bool:
    """Whether the kernel takes this weight: an ordinary matrix, whole and in one piece, on a GPU that it runs on."""
    device = weight.device
    return (
        runs_on(device)
        and weight.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and left.dtype == right.dtype == torch.float32
        and left.device == right.device == device
        and weight.dim() == 2
        and weight.shape[1] % 4 == 0  # one number of the noise serves four columns
        and _plain(weight)
        and _plain(left)
        and _plain(right)
    )


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


@torch.no_grad()
def fold_(folds: Sequence[Fold], stochastic: bool, void: Tensor | None = None) -> None:
    """Take these steps.

    Args:
        stochastic: weights in 16 bits are rounded at random, else to the nearest.
        void: () fp32 on the device; where it is not 0, nothing changes.
    """
    from rankshift.ops.projected_fold.triton import launch

    alike: dict[tuple[object, ...], list[Fold]] = {}
    for fold in folds:
        weight, left, _, keep, _ = fold
        alike.setdefault((weight.shape, left.shape[1], weight.dtype, weight.device, keep), []).append(fold)
    for some in alike.values():
        weight, left, _, keep, _ = some[0]
        addresses = tuple(t.data_ptr() for fold in some for t in fold[:3])
        words = None
        if stochastic and weight.dtype != torch.float32:
            words = torch.tensor([fold.word for fold in some], dtype=torch.uint64)
            words = words.view(torch.int64).to(weight.device, non_blocking=True)
        launch(_table(addresses, weight.device), words, weight, left.shape[1], keep, void)
    increment_version([fold.weight for fold in folds])  # the kernel writes past autograd


@functools.lru_cache(maxsize=64)
def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """(weights, 3) int64: where each weight, its left and its right factor lie."""
    return torch.tensor(addresses, dtype=torch.int64).view(-1, 3).to(device)
