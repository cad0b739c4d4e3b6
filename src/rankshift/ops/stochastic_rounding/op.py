"""One launch for a rounding that in plain torch takes thirty, on a GPU: each number is read and written once."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor, nn

from rankshift.core.random import signed


def fits(target: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes these: plain tensors, in one piece, on a GPU that it runs on."""
    return (
        runs_on(target.device)
        and target.dtype in (torch.bfloat16, torch.float16)
        and value.dtype == torch.float32
        and value.device == target.device
        and value.shape == target.shape
        and all(type(t) in (Tensor, nn.Parameter) and t.is_contiguous() for t in (target, value))
    )


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether there are Triton and an NVIDIA GPU that it knows well: from Ampere on."""
    if device.type != "cuda" or torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@torch.no_grad()
def round_(target: Tensor, value: Tensor, word: int, first: int) -> None:
    """target ← value, each number as one of its two neighbours in 16 bits.

    Args:
        word: of the noise of :func:`rankshift.core.random.dither`.
        first: which of its elements belongs to the first number.
    """
    from rankshift.ops.stochastic_rounding.triton import launch

    if value.numel():
        launch(target.detach(), value.detach(), signed(word), first)
        torch.autograd.graph.increment_version(target)  # the kernel writes past autograd
