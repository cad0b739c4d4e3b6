"""Rotary positions, where q, k and v are next read after their GEMM: so their low-rank terms are added here.

No autograd: a fused block's node calls these. q, k and v are (T, H·D), slices with unit stride along their rows. On an
NVIDIA GPU that Triton knows, tensors of 16 bits take one launch, with ranks up to 128; all others the reference.

cos and sin are (T', D) as transformers makes them for ``rotate_half``: their second halves repeat the first, which
alone are read. T' divides T, and token t takes row t % T': with T' = S one table serves all sequences.

A gain, (G, N) in fp32 for the N columns of q, k and v, is one as :func:`rankshift.ops.skinny.gains` makes them: rows c,
then a bias b if there is one, then ρ. Before it is rotated y is c (y + Z Bᵀ) + b then, as DoRA has it.
"""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import increment_version

from rankshift.ops.launch import unrecorded
from rankshift.ops.rotary import reference
from rankshift.ops.rotary.reference import Low, Three
from rankshift.ops.stochastic_rounding.op import runs_on


@unrecorded
def rotate_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    low: tuple[Low | None, Low | None, Low | None] = (None, None, None),
    *,
    head: int,
    gain: Tensor | None = None,
) -> None:
    """Add their low-rank terms to q, k and v, and rotate q and k, in place; summed in fp32, rounded once.

    Su et al., "RoFormer" (arXiv:2104.09864), with the halves of a head as its pairs: (a, b) becomes
    (a cos − b sin, b cos + a sin).

    Args:
        q: (T, Hq·D).
        k: (T, Hk·D).
        v: (T, Hk·D), untouched if it has neither term nor gain.
        cos: (T', D).
        sin: (T', D).
        low: of each, Z (T, r) and B (H·D, r).
        head: D, even.
        gain: (G, N), of q, k and v side by side.
    """
    if _kernel(q):
        from rankshift.ops.rotary.triton import rotate_ as run
    else:
        run = reference.rotate_
    run(q, k, v, cos, sin, low, head, gain)
    increment_version((q, k, v))  # the kernel writes past autograd


@unrecorded
def rotate_back(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, out: Three, of: Three | None = None,
    gain: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """The gradients before the rotation: that of q and k turned back, that of v as it is; with a gain times c.

    Args:
        dq: (batch, Hq, S, D), of any strides.
        dk: (batch, Hk, S, D), likewise.
        dv: (batch, Hk, S, D), likewise.
        cos: (T', D).
        sin: (T', D).
        out: where they are written: (T, Hq·D), (T, Hk·D) and (T, Hk·D), T = batch·S.
        of: q, k and v as ``rotate_`` left them, of the shapes of ``out``; with a gain.
        gain: (G, N), as ``rotate_`` had it.

    Returns:
        With a gain ρ Σₜ dy (y + Z Bᵀ) (N,) in fp32, the gradient of DoRA's μ, in an order that depends on the shapes
        only. The sum is made of y, so that it is 0 in columns where c is.
    """
    if _kernel(dq):
        from rankshift.ops.rotary.triton import rotate_back as run
    else:
        run = reference.rotate_back
    return run(dq, dk, dv, cos, sin, out, of, gain)


def _kernel(tensor: Tensor) -> bool:
    return tensor.dtype.itemsize == 2 and runs_on(tensor.device)
