"""Two launches for all matrices of a group, on a GPU: one for what belongs to vectors, one for the rest.

The kernels find the tensors by a table of addresses, which goes to the device with the numbers of an update.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from rankshift.ops.stochastic_rounding.op import runs_on
from rankshift.ops.vector_exchange import sent


def fits(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> bool:
    """Whether the kernels take these: whole matrices in fp32, in one piece, on one GPU that they run on. Moments are
    made like their parameters."""
    device, both = parameters[0].device, (*parameters, *gradients)
    return (
        runs_on(device)
        and {type(t) for t in both} <= {Tensor, nn.Parameter}
        and {(t.dtype, t.device) for t in both} == {(torch.float32, device)}
        and all(t.is_contiguous() and not t.data_ptr() % 16 for t in both)
        and all(p.dim() == 2 and not p.shape[1] % 4 for p in parameters)
    )


@torch.no_grad()
def step_(
    tensors: Sequence[Sequence[Tensor]],
    axis: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    keep: float,
    void: Tensor | None = None,
) -> None:
    """Take a step with each matrix; moments are computed in float64 and rounded once. Autograd is told.

    Args:
        tensors: matrices, their gradients, first and second moments, and step counts: (rows, 1) if axis is 0, else
            (1, columns).
        keep: factor of the matrices before the step.
        void: () fp32 on the device; where it is not 0, nothing changes.
    """
    from rankshift.ops.vector_adam.triton import launch

    ps = tensors[0]
    rows, columns = np.array([p.shape for p in ps]).T
    vectors = (rows, columns)[axis]
    numbers = np.array([lr, eps], np.float64).view(np.int64)
    table = np.concatenate(
        [
            np.array([[t.data_ptr() for t in some] for some in tensors]),
            [rows, columns // 4, np.cumsum(2 * vectors) - 2 * vectors],
            np.broadcast_to(numbers[:, None], (2, len(ps))),
        ]
    )
    factors = torch.empty(2 * int(vectors.sum()), device=ps[0].device)
    launch(
        sent(table, ps[0].device), factors, axis, int(vectors.max()), int(rows.max()), int(columns.max()), betas, keep,
        lr != 0, void,
    )  # fmt: skip
    torch.autograd.graph.increment_version(list(ps))  # the kernel writes past autograd
