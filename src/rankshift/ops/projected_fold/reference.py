"""One weight's step in plain torch. Tests hold the kernel to this."""

from __future__ import annotations

from torch import Tensor

from rankshift.core.random import dither, stochastic


def fold(weight: Tensor, left: Tensor, right: Tensor, keep: float, word: int | None) -> Tensor:
    """keep·W + L Rᵀ, summed in the dtype of L and rounded once.

    Args:
        weight: (n, m).
        left: (n, r).
        right: (m, r).
        word: of the noise by which 16 bits are rounded at random; None: to the nearest.
    """
    value = keep * weight.to(left.dtype) + left @ right.t()
    if word is not None and weight.dtype.itemsize == 2:
        noise = dither(word, weight.numel(), 0, weight.device).view(weight.shape)
        value = stochastic(value, weight.dtype, noise)
    return value.to(weight.dtype)
