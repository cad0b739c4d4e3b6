"""Columns of all layers in one launch for each rank and dtype, on a GPU.

The kernel finds the tensors by a table of addresses, which stays on the device as long as they stay where they are.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rankshift.ops.stochastic_rounding.op import runs_on
from rankshift.ops.vector_exchange import sent

_HALF = (torch.bfloat16, torch.float16)
_PLAIN = (Tensor, nn.Parameter)


class Layer(NamedTuple):
    """W[:, channels] is to be origin + scale · D."""

    W: Tensor  # (out, in)
    D: Tensor  # (out, r)
    origin: Tensor  # (out, r)
    channels: Tensor  # (r,) int64, none twice
    scale: float


def fits(layer: Layer) -> bool:
    """Whether the kernel takes it: on a GPU that it runs on, W and origin of 16 bits and D in fp32, whole and in one
    piece."""
    W, D, origin, channels, _ = layer
    device = W.device
    return (
        runs_on(device)
        and W.dtype in _HALF
        and origin.dtype is W.dtype
        and D.dtype is torch.float32
        and channels.dtype is torch.int64
        and all(type(t) in _PLAIN and t.device == device and t.is_contiguous() for t in layer[:4])
    )


@torch.no_grad()
def write_(layers: Sequence[Layer]) -> None:
    """Write the columns of layers that fit. Autograd is told."""
    from rankshift.ops.column_write.triton import launch

    alike: dict[tuple[int, torch.dtype, torch.device], list[Layer]] = defaultdict(list)
    for layer in layers:
        alike[layer.D.shape[1], layer.W.dtype, layer.W.device].append(layer)
    for (rank, dtype, device), some in alike.items():
        numbers = [
            (*[t.data_ptr() for t in (W, D, origin, channels)], *W.shape, scale)
            for W, D, origin, channels, scale in some
        ]
        launch(_table(tuple(numbers), device), rank, dtype, max(layer.W.shape[0] for layer in some))
    torch.autograd.graph.increment_version([layer.W for layer in layers])  # the kernel writes past autograd


@functools.lru_cache(8)
def _table(numbers: tuple[tuple[int | float, ...], ...], device: torch.device) -> Tensor:
    """(fields, layers) int64 on the device: addresses of W, D, origin and channels, out, in, the bits of scale."""
    scales = np.array([row[-1] for row in numbers], np.float64).view(np.int64)
    return sent(np.array([*zip(*[row[:-1] for row in numbers], strict=True), scales], np.int64), device)
