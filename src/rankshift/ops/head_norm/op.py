"""Rotary positions of models that norm each head of q and k first, as Qwen3 does: an RMSNorm over its D numbers.

No autograd: a fused block's node calls these. Tensors and tables are as :mod:`rankshift.ops.rotary` has them. Nothing
is kept for the backward but a number a head and token: the heads as attention keeps them, turned back and divided by
the norm's weight, are what the norm made of its input. So no weight of such a norm may be zero.
"""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import increment_version

from rankshift.ops.head_norm import reference
from rankshift.ops.head_norm.reference import Two
from rankshift.ops.launch import unrecorded
from rankshift.ops.rotary.reference import Low, Three
from rankshift.ops.stochastic_rounding.op import runs_on


@unrecorded
def norm_rotate_(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, weights: Two, eps: float,
    low: tuple[Low | None, Low | None, Low | None] = (None, None, None),
) -> Tensor:  # fmt: skip
    """Add their low-rank terms to q, k and v, norm and rotate the heads of q and k, in place; rounded once.

    A head y (D) becomes y ρ w turned, with ρ = 1/√(mean(y²) + ε); Yang et al., "Qwen3 Technical Report"
    (arXiv:2505.09388).

    Args:
        q: (T, Hq·D), unit stride along rows.
        k: (T, Hk·D), likewise.
        v: (T, Hk·D), likewise; untouched if it has no term.
        cos: (T', D), T' dividing T; first halves alone are read.
        sin: (T', D), likewise.
        weights: of the norms of q and of k, (D,) each.
        eps: ε.
        low: of each, Z (T, r) and B (H·D, r).

    Returns:
        ρ (T, Hq + Hk) in fp32, of float64 in float64.
    """
    if _kernel(q):
        from rankshift.ops.head_norm.triton import norm_rotate_ as run
    else:
        run = reference.norm_rotate_
    rho = run(q, k, v, cos, sin, weights, eps, low)
    increment_version((q, k, v))  # the kernel writes past autograd
    return rho


@unrecorded
def norm_rotate_back(
    dq: Tensor, dk: Tensor, dv: Tensor, of: Two, rho: Tensor, cos: Tensor, sin: Tensor, weights: Two, out: Three
) -> None:
    """The gradients before norm and rotation; that of v as it is.

    Args:
        dq: (batch, Hq, S, D), of any strides.
        dk: (batch, Hk, S, D), likewise.
        dv: (batch, Hk, S, D), likewise.
        of: q and k as :func:`norm_rotate_` left them, (T, H·D).
        rho: what it returned.
        cos: (T', D).
        sin: (T', D).
        weights: of the norms, (D,) each, nowhere zero.
        out: where they are written: (T, Hq·D), (T, Hk·D) and (T, Hk·D), T = batch·S.
    """
    if _kernel(dq):
        from rankshift.ops.head_norm.triton import norm_rotate_back as run
    else:
        run = reference.norm_rotate_back
    run(dq, dk, dv, of, rho, cos, sin, weights, out)


def _kernel(tensor: Tensor) -> bool:
    return tensor.dtype.itemsize == 2 and runs_on(tensor.device)
