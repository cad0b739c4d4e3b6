"""What LoRA's backward does with a wide gradient, in one pass over it; a block's factors made ready in one launch, and
the norms that DoRA divides by.

bf16 and fp16 on an NVIDIA GPU go to kernels; the rest to reference.py. Nothing here is recorded by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from rankshift.ops.launch import unrecorded
from rankshift.ops.skinny import reference
from rankshift.ops.stochastic_rounding.op import runs_on

_HALF = (torch.bfloat16, torch.float16)
_WIDEST = 128  # the largest rank that down_back's kernels take
_WIDEST_GRADIENT = 64  # and weight_gradient's: a GEMM is faster from there on
_TOGETHER = 16  # matrices in a launch


@unrecorded
def down_back(
    dY: Tensor,
    B: Tensor,
    Z: Tensor | None = None,
    widths: Sequence[int] | None = None,
    scale: float = 1.0,
    normed: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S = dY B (T, r) in the dtype of dY, and dB = scale · dYᵀ Z (N, r) in fp32, of float64 in float64.

    Sums are in fp32, in an order that depends on the shapes only. Layers side by side, of ``widths`` N₁, N₂, … whose
    sum is N: each takes its columns of dY, its rows of B, its r columns of Z and S, which are (T, layers · r), and its
    rows of dB.

    Args:
        dY: (T, N) with rows in one piece and any row stride.
        B: (N, r), in the dtype of dY.
        Z: (T, r), likewise; None where no dB is wanted: it is None then.
        widths: None for one layer.
        scale: what dB is multiplied by.
        normed: ρ (T,) in fp32, and (T, layers · r), where ρ S is written.
    """
    widths = tuple(dY.shape[1:] if widths is None else widths)
    given = (dY, B) if Z is None else (dY, B, Z)
    fits = B.shape[1] <= _WIDEST and all(t.dtype == dY.dtype and t.stride(1) == 1 for t in given)
    if not (fits and dY.dtype in _HALF and dY.numel() and runs_on(dY.device)):
        return reference.down_back(dY, B, Z, widths, scale, normed)
    from rankshift.ops.skinny.triton import down_back as launch

    return launch(dY, B, Z, widths, scale, normed)


@unrecorded
def up_gradient(dY: Tensor, Z: Tensor, widths: Sequence[int]) -> Tensor:
    """dB = dYᵀ Z (N, r), as :func:`down_back` has it, by itself.

    Args:
        dY: (T, N) with rows in one piece and any row stride: of layers side by side, of ``widths``.
        Z: (T, layers · r), likewise, in the dtype of dY.
    """
    r = Z.shape[1] // len(widths)
    fits = Z.dtype == dY.dtype and dY.dtype in _HALF and dY.stride(1) == Z.stride(1) == 1
    if not (fits and r <= _WIDEST and dY.numel() and runs_on(dY.device)):
        return reference.up_gradient(dY, Z, widths)
    from rankshift.ops.skinny.triton import up_gradient as launch

    return launch(dY, Z, tuple(widths))


@unrecorded
def weight_gradient(S: Tensor, x: Tensor, gain: Tensor | None = None, offset: float = 0.0) -> Tensor:
    """dA = Sᵀ x · (offset + gain), (R, K), in fp32, of float64 in float64: the gradient of A for Z = x Aᵀ.

    Sums are in fp32, in an order that depends on the shapes only. Up to R = 64 x is read once.

    Args:
        S: (T, R) with rows in one piece and any row stride: dZ.
        x: (T, K), likewise, in the dtype of S.
        gain: (K,), what each column is multiplied by: the weight of a norm; None for 1, whatever ``offset``.
    """
    fits = S.dtype == x.dtype and S.dtype in _HALF and S.stride(1) == x.stride(1) == 1
    if not (fits and S.shape[1] <= _WIDEST_GRADIENT and S.numel() and x.numel() and runs_on(S.device)):
        return reference.weight_gradient(S, x, gain, offset)
    from rankshift.ops.skinny.triton import weight_gradient as launch

    return launch(S, x, gain, offset)


@unrecorded
def pack(sources: Sequence[Tensor], scales: Sequence[float], targets: Sequence[Tensor]) -> None:
    """target ← scale · source for each, the product in fp32 or wider and rounded once.

    Args:
        sources: matrices, of any strides.
        scales: as many numbers.
        targets: as many matrices of the same shapes, of any strides: slices, of which none overlap.
    """
    if not targets or not runs_on(targets[0].device) or max(t.dtype.itemsize for t in (*sources, *targets)) > 4:
        reference.pack(sources, scales, targets)
        return
    from rankshift.ops.skinny.triton import pack as launch

    for at in range(0, len(targets), _TOGETHER):
        some = slice(at, at + _TOGETHER)
        launch(sources[some], scales[some], targets[some])
    increment_version(list(targets))  # the kernel writes past autograd


@unrecorded
def gains(
    weights: Sequence[Tensor], A: Tensor, B: Tensor, widths: Sequence[int], magnitudes: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
) -> Tensor:  # fmt: skip
    """What layers side by side make of their W x + B A x, if they are DoRA's (Liu et al., arXiv:2402.09353): times c,
    plus b. Rows c = μ ρ, then b if a layer has a bias, then ρ = 1 / ‖W + B A‖: (2 or 3, N) in fp32, of float64 in
    float64.

    The norms are of rows, in one pass over the weights. Where one is 0, and in layers without μ, c is 1 and ρ is 0.

    Args:
        weights: (N, K) of all layers, of ``widths`` N₁, N₂, … whose sum is N; or (N₁, K), (N₂, K), …
        A: (layers · r, K), or (r, K) for all layers, in the dtype of the weights; rows in one piece.
        B: (N, r), likewise.
        magnitudes: μ (Nᵢ,) of each layer, or None.
        biases: (Nᵢ,) of each layer, or None.
    """
    widths = tuple(widths)
    fits = B.shape[1] <= _WIDEST and all(t.dtype == B.dtype and t.stride(1) == 1 for t in (*weights, A, B))
    if not (fits and B.dtype in _HALF and runs_on(B.device)):
        return reference.gains(weights, A, B, widths, magnitudes, biases)
    from rankshift.ops.skinny.triton import gains as launch

    return launch(weights, A, B, widths, magnitudes, biases)
