"""Exchanges of all layers in two launches, and what is held for them in a third, on a GPU.

The kernels find tensors by a table of addresses, which goes to the device with the numbers of an update. Candidates lie
in memory of the host that the GPU was lent: it reads and writes them by itself.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rankshift.ops.stochastic_rounding.op import runs_on

Ints = NDArray[np.int64]


def fits(weight: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether the kernels take these: whole matrices in fp32, in one piece, on a GPU that they run on."""
    return (
        runs_on(A.device)
        and weight.device == A.device == B.device
        and plain(weight)
        and plain(A)
        and plain(B)
        and weight.dim() == 2
        and weight.shape[1] % 4 == 0
        and not any(t.data_ptr() % 16 for t in (weight, A, B))
    )


def plain(tensor: Tensor) -> bool:
    """Whether a tensor is whole, in fp32 and in one piece."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype is torch.float32 and tensor.is_contiguous()


def sent(numbers: Ints, device: torch.device) -> Tensor:
    """Numbers of the host on the device, in C's order; the host does not wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(numbers))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def described(weight: Tensor, A: Tensor, B: Tensor, pool_A: int, pool_B: int) -> Ints:
    """A layer as the kernels know it, (8,), as long as its tensors stay where they are.

    Args:
        weight: W (m, n); A (r, n); B (m, r).
        pool_A: address of c = min(m, n) candidates for rows of A, (c, n); pool_B: for columns of B, (c, m).
    """
    m, n = weight.shape
    return np.array([weight.data_ptr(), A.data_ptr(), B.data_ptr(), pool_A, pool_B, m, n // 4, min(m, n)])


@torch.no_grad()
def swap_(
    layers: Ints,
    before: Ints,
    count: Ints,
    rank: int,
    scale: float,
    device: torch.device,
    void: Tensor | None = None,
) -> None:
    """Exchange vectors of layers on one device, all of one rank. Autograd is not told that W, A and B change.

    Args:
        layers: (8, L), each :func:`described`.
        before: (L,), exchanges so far.
        count: (L,), of A now, and as many of B; at most r//2 and c − r.
        void: () fp32 on the device; where it is not 0, nothing changes.
    """
    from rankshift.ops.vector_exchange.triton import swap

    (m, n, c), most = layers[5:], int(count.max())
    sizes = 2 * most * np.concatenate([n, m])  # of differences that W takes, (2·most, n) / 4 of each, then (2·most, m)
    starts = np.cumsum(sizes) - sizes
    starts[len(n) :] += 3 * sizes[: len(n)].sum()
    places = [count, before % rank, before % c, (before - rank) % c]
    table = np.concatenate([layers, places, starts.reshape(2, -1)])
    scratch = torch.empty(int(2 * most * (m + 4 * n).sum()), device=device)
    swap(sent(table, device), scratch, rank, most, scale, int(m.max()), 4 * int(n.max()), void)


@torch.no_grad()
def hold_(
    layers: Ints, addresses: Ints, told: Ints, rank: int, device: torch.device, void: Tensor | None = None
) -> None:
    """What must not move gets no gradient, and what begins anew no past; in layers on one device, all of one rank.

    Args:
        addresses: (8, L), of the gradient (r, n) of A, its moments and step counts (r, 1), then of those of B, (m, r)
            and (1, r); 0 where there is none.
        told: (3, L), exchanges after this update, of how many of the last the counterparts are held, and of how many
            they begin anew.
    """
    from rankshift.ops.vector_exchange.triton import hold

    m, n = layers[5:7]
    table = np.concatenate([addresses, [m, n, (told[0] - 1) % rank], told[1:]])
    hold(sent(table, device), rank, max(int(m.max()), 4 * int(n.max())), void)
