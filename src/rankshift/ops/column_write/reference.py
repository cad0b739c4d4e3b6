"""One layer's columns in plain torch. Tests hold the kernel to this."""

from __future__ import annotations

from torch import Tensor


def write_(W: Tensor, D: Tensor, origin: Tensor, channels: Tensor, scale: float) -> None:
    """W[:, channels] ← origin + scale · D, the product and the sum each rounded to D's dtype, then to W's.

    Args:
        W: (out, in).
        D: (out, r), as origin.
        channels: (r,), sorted.
    """
    W.index_copy_(1, channels, (origin + scale * D).to(W.dtype))
