"""8 bits as bitsandbytes holds them: its bits, its layers, and one function for training and evaluation."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant
from torch import Tensor, nn

from rankshift.core.base import Dense, storage_of
from rankshift.core.errors import UnsupportedLayer
from rankshift.core.form import Form, TransposedForm
from rankshift.ops.lora_linear import lora_linear
from rankshift.storage import held_as
from rankshift.storage.int8 import Int8

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SHAPES = [(24, 40), (1, 1), (5, 7), (17, 130)]
TOLERANCE = {BF16: 2e-2, FP16: 2e-3, FP32: 1e-5, FP64: 1e-12}


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = FP64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FP64).to(dtype)


def linear(out: int, into: int, dtype: torch.dtype = FP32, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(into, out, bias, dtype=dtype).requires_grad_(False)
    layer.weight.copy_(seeded(out, into, seed=1) * 0.1)
    if bias:
        layer.bias.copy_(seeded(out, seed=2))
    return layer


def theirs(layer: nn.Linear, threshold: float = 6.0) -> bnb.nn.Linear8bitLt:
    """As transformers makes it: quantised when it is moved."""
    out, into = layer.weight.shape
    made = bnb.nn.Linear8bitLt(into, out, layer.bias is not None, has_fp16_weights=False, threshold=threshold)
    made.weight = bnb.nn.Int8Params(layer.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    return made.to("cpu")


def ours(layer: nn.Linear, keep: Tensor | None = None) -> Int8:
    return Int8.of(Dense(layer, Form()), "int8", keep)


def dequantised(layer: nn.Linear) -> Tensor:
    """The formula in float64."""
    half = layer.weight.to(FP16).to(FP64)
    largest = half.abs().amax(1, keepdim=True)
    return torch.round(half * (127 / largest)) * largest / 127


def close(value: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    size = want.abs().max().item() or 1.0
    torch.testing.assert_close(value.to(FP64), want.to(FP64), rtol=0, atol=TOLERANCE[dtype] * size)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
def test_the_bits_are_those_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    layer = linear(*shape, dtype)
    made, base = theirs(layer), ours(layer)
    assert base.codes.dtype is torch.int8
    assert torch.equal(base.codes, made.weight.data)
    assert torch.equal(base.absmax.view(FP32), made.weight.SCB)
    assert base.dense().dtype is dtype
    close(base.dense(), int8_vectorwise_dequant(made.weight.data, made.weight.SCB), FP32 if dtype is FP64 else dtype)


def test_a_transposed_layer_is_quantised_by_rows_of_its_matrix() -> None:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(6, 9).requires_grad_(False)  # stores (in, out)
    base = Int8.of(Dense(layer, TransposedForm()), "int8")
    codes, absmax, _ = int8_vectorwise_quant(layer.weight.t().half().contiguous())
    assert torch.equal(base.codes, codes)
    assert torch.equal(base.absmax.view(FP32), absmax)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_and_its_gradient_are_those_of_the_dequantised_weight(
    shape: tuple[int, int], dtype: torch.dtype, bias: bool
) -> None:
    layer = linear(*shape, dtype, bias)
    base, W = ours(layer), dequantised(layer)
    x, dy = seeded(2, 3, shape[1], seed=3, dtype=dtype), seeded(2, 3, shape[0], seed=4, dtype=dtype)
    leaf = x.clone().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = base.linear(leaf)
    y.backward(dy)
    want = x.to(FP64) @ W.t()
    close(base.product(x), want, dtype)
    close(y.detach(), want + layer.bias.to(FP64) if bias else want, dtype)
    close(leaf.grad, dy.to(FP64) @ W, dtype)
    assert y.dtype is dtype
    assert {t.data_ptr() for t in kept} == {base.codes.data_ptr(), base.absmax.data_ptr()}, "codes, by reference"


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
def test_lora_beside_it(dtype: torch.dtype) -> None:
    layer = linear(12, 20, dtype)
    base, W = ours(layer), dequantised(layer)
    A, B = seeded(3, 20, seed=5).requires_grad_(), (seeded(12, 3, seed=6) * 0.1).requires_grad_()
    x, dy = seeded(7, 20, seed=3, dtype=dtype).requires_grad_(), seeded(7, 12, seed=4, dtype=dtype)
    y = lora_linear(x, A, B, 0.5, base.bias, base.format, base.packed)
    y.backward(dy)
    X, G = x.detach().to(FP64), dy.to(FP64)
    merged = W + 0.5 * B.detach() @ A.detach()
    close(y.detach(), X @ merged.t() + layer.bias.to(FP64), dtype)
    close(x.grad, G @ merged, dtype)
    close(A.grad, 0.5 * B.detach().t() @ G.t() @ X, dtype)
    close(B.grad, 0.5 * G.t() @ X @ A.detach().t(), dtype)


def test_it_computes_in_the_dtype_of_its_input() -> None:
    layer = linear(8, 16, FP32)
    base, W, x = ours(layer), dequantised(layer), seeded(4, 16, seed=3)
    for dtype in (BF16, FP16, FP64):
        y = base.linear(x.to(dtype))
        assert y.dtype is dtype
        close(y, x.to(dtype).to(FP64) @ W.t() + layer.bias.to(FP64), dtype)
    with torch.autocast("cpu", BF16):
        assert base.linear(x.float()).dtype is BF16


@pytest.mark.parametrize("wide", [FP32, FP64], ids=str)
def test_a_wider_input_gets_the_weight_unrounded(wide: torch.dtype) -> None:
    """In backward as in forward: bf16 holds 8 bits of it."""
    layer = linear(12, 20, BF16)
    base, W = ours(layer), dequantised(layer)
    x, dy = seeded(5, 20, seed=3, dtype=wide).requires_grad_(), seeded(5, 12, seed=4, dtype=wide)
    y = base.product(x)
    y.backward(dy)
    close(y.detach(), x.detach().to(FP64) @ W.t(), wide)
    close(x.grad, dy.to(FP64) @ W, wide)


def test_one_byte_a_weight() -> None:
    base = ours(linear(64, 128, bias=False))
    held = sum(p.numel() * p.element_size() for p in base.parameters())
    assert held == 64 * 128 + 64 * 4


@pytest.mark.parametrize("called", [False, True], ids=["new", "called"])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_bitsandbytes_are_taken_and_given_back(called: bool, bias: bool) -> None:
    """Before a first call, which moves the scales to the layer's state, and after it."""
    made, x = theirs(linear(16, 32, BF16, bias), threshold=5.0), seeded(3, 32, seed=3, dtype=BF16)
    untouched = copy.deepcopy(made)
    if called:
        made(x)
        assert made.weight.SCB is None
    assert storage_of(made) is Int8
    assert Int8.measure(made) == (16, 32, BF16 if bias else FP16, torch.device("cpu"))
    base = Int8.over(made)
    assert base.codes.data_ptr() == made.weight.data_ptr(), "copied"
    assert base.bias is made.bias
    back = base.plain()
    assert type(back) is bnb.nn.Linear8bitLt
    assert torch.equal(back(x), untouched(x))
    assert back.state.threshold == 5.0
    saved, wanted = back.state_dict(), untouched.state_dict()
    assert saved.keys() == wanted.keys()
    assert torch.equal(saved["weight"], wanted["weight"])
    assert torch.equal(Int8.over(back).absmax, base.absmax)


def test_layers_that_still_hold_16_bits_are_not_of_it() -> None:
    assert storage_of(bnb.nn.Linear8bitLt(8, 4, has_fp16_weights=True)) is None
    assert storage_of(bnb.nn.Linear8bitLt(8, 4, has_fp16_weights=False)) is None
    assert held_as("int8") is Int8


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
def test_columns_beside_are_exact(dtype: torch.dtype) -> None:
    layer, at = linear(12, 20, dtype), torch.tensor([2, 3, 19])
    layer.weight[:, 3] = 7.0  # would be the scale of every row
    base = ours(layer, at)
    without = linear(12, 20, dtype)
    without.weight[:, at] = 0
    assert torch.equal(base.codes, theirs(without).weight.data)
    W = dequantised(without)
    W[:, at] = layer.weight[:, at].to(FP64)
    assert torch.equal(base.dense()[:, at], layer.weight[:, at])
    x = seeded(5, 20, seed=3, dtype=dtype).requires_grad_()
    y = base.linear(x)
    y.backward(torch.ones_like(y))
    close(y.detach(), x.detach().to(FP64) @ W.t() + layer.bias.to(FP64), dtype)
    close(x.grad, W.sum(0).expand(5, 20), dtype)
    rounded = Int8.over(base.plain()).dense().to(FP64)
    assert (rounded - W).abs().amax() <= 7.0 / 127 / 2 * 1.05, "given back without the columns"


def test_columns_that_were_only_borrowed_leave_the_bits() -> None:
    made = theirs(linear(12, 20, BF16))
    before, base = made.weight.data.clone(), Int8.over(made)
    at = torch.tensor([1, 4])
    base.put_(at, base.columns(at, slice(0, 12)))
    assert base.columns_beside is not None
    assert torch.equal(base.plain().weight.data, before)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("beside", [False, True])
def test_what_is_added_is_rounded_once(dtype: torch.dtype, beside: bool) -> None:
    layer, at = linear(12, 20, dtype), torch.tensor([0, 7])
    base = ours(layer, at if beside else None)
    before, delta = base.dense().to(FP64), seeded(12, 20, seed=8, dtype=FP32) * 0.01
    base.add_(lambda rows: delta[rows])
    assert base.changed
    want = before + delta
    step = want.abs().amax(1, keepdim=True) / 127
    assert ((base.dense() - want).abs() <= 0.55 * step + TOLERANCE[dtype] * 0.3).all()
    if beside:
        close(base.dense()[:, at], want[:, at], dtype)


def test_a_row_of_zeros_stays() -> None:
    layer = linear(4, 6)
    layer.weight[1] = 0
    base = ours(layer)
    assert torch.equal(base.dense()[1], torch.zeros(6))
    assert base.dense().isfinite().all()


def test_what_fp16_cannot_hold_is_refused() -> None:
    layer = linear(4, 6)
    layer.weight[1, 1] = 1e6
    with pytest.raises(UnsupportedLayer, match="fp16"):
        ours(layer)


def test_copies_and_saved_tensors_are_its_own() -> None:
    base, other = ours(linear(6, 8)), ours(linear(6, 8))
    other.codes.data.zero_()
    other.load_state_dict(base.state_dict())
    twin, x = copy.deepcopy(base), seeded(3, 8, dtype=FP32)
    assert twin.codes.data_ptr() != base.codes.data_ptr()
    assert torch.equal(twin.linear(x), base.linear(x))
    assert torch.equal(other.linear(x), base.linear(x))
