"""Weights out of 8 bits: the op against the formula, bit by bit, and what the compiler keeps of a layer with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankshift.ops.frozen_linear import frozen_linear
from rankshift.ops.row_scaled import reference, row_scaled
from rankshift.storage.fp8 import FP8
from rankshift.storage.int8 import Int8

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def gaussian(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(dtype)


def every_code(dtype: torch.dtype) -> Tensor:
    """(4, 64): of e4m3 but for its two NaN."""
    codes = torch.arange(256).to(torch.uint8)
    codes = codes.where((codes & 127) != 127, torch.zeros_like(codes)) if dtype is torch.uint8 else codes
    return codes.view(dtype).view(4, 64)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
@pytest.mark.parametrize("stored", [torch.int8, torch.uint8], ids=["int8", "e4m3"])
@pytest.mark.parametrize("each", [True, False], ids=["row", "tensor"])
def test_it_is_the_formula_to_the_bit(each: bool, stored: torch.dtype, dtype: torch.dtype) -> None:
    codes, wide = every_code(stored), torch.promote_types(dtype, FP32)
    scales = (gaussian(4 if each else 1).abs() * 1e-2).to(wide)
    numbers = (codes if stored is torch.int8 else codes.view(torch.float8_e4m3fn)).to(FP64)
    exact = numbers * scales.to(FP64)[:, None]
    found = row_scaled(codes, scales, dtype)
    assert found.dtype is dtype
    assert torch.equal(found, exact.to(wide).to(dtype))
    assert torch.equal(found, reference.row_scaled(codes, scales, dtype))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("storage", ["int8", "fp8-row", "fp8-tensor"])
def test_the_compiler_keeps_codes_not_the_weight(storage: str, dtype: torch.dtype) -> None:
    """One graph, and what forward computes is computed again in backward. fp8 that rounds its factors is asked for the
    backward that needs the weight."""
    W = gaussian(96, 64, dtype=dtype)
    if storage == "int8":
        layout, tensors = Int8.quantised(W)
    else:
        layout, tensors = FP8.quantised(W, scaling=storage.removeprefix("fp8-"), backward="bf16")

    def layer(x: Tensor) -> Tensor:
        return frozen_linear(x, None, layout, tuple(tensors))

    compiled = torch.compile(layer, backend="aot_eager_decomp_partition", fullgraph=True)
    x, dy = gaussian(7, 64, dtype=dtype).requires_grad_(), gaussian(7, 96, dtype=dtype)
    y = compiled(x)
    kept = [t for t in y.grad_fn.saved_tensors if t.numel() >= W.numel()]  # type: ignore[union-attr]
    assert [(t.shape, t.dtype) for t in kept] == [(W.shape, tensors[0].dtype)]
    (dx,) = torch.autograd.grad(y, x, dy)
    eager = x.detach().requires_grad_()
    want = layer(eager)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(dx, torch.autograd.grad(want, eager, dy)[0])
    assert (dx - dy @ W).norm() < 0.05 * (dy @ W).norm()
