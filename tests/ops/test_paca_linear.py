"""The PaCA node: value, gradients, bytes that it keeps, operations. Oracle: autograd on a dense weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rankshift.core.base import Plain
from rankshift.core.form import ConvForm
from rankshift.core.site import form_of
from rankshift.ops.paca_linear import paca_conv, paca_linear, reference

F64 = torch.float64
SHAPES = [(0, 6), (1, 6), (7, 6), (2, 3, 6), (2, 1, 4, 6), (6,)]
CHANNELS = torch.tensor([1, 2, 5])


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = F64, grad: bool = False) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return values.to(dtype).requires_grad_(grad)


def kept(call: object, mine: list[Tensor]) -> tuple[Tensor, dict[int, int]]:
    """What a call returns, and the bytes of every storage that it keeps for backward besides some tensors'."""
    known = {t.untyped_storage().data_ptr() for t in mine}
    found: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        return call(), found  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_the_dense_weight(shape: tuple[int, ...], bias: bool, dtype: torch.dtype):
    """dP is the selected columns of the full gradient: to 1e-12 in float64, to 1e-6 in float32."""
    W, D, s = noise(4, 6, seed=1, dtype=dtype), noise(4, 3, seed=2, dtype=dtype, grad=True), 0.7
    b = noise(4, seed=3, dtype=dtype, grad=True) if bias else None
    x = noise(*shape, dtype=dtype, grad=True)
    now = W.clone()
    now[:, CHANNELS] += s * D.detach()
    y = paca_linear(x, D, s, CHANNELS, b, Plain(), (now,))
    dense = now.clone().requires_grad_()
    want = F.linear(x.detach().requires_grad_(), dense, b)
    assert torch.equal(y, want) or torch.allclose(y, want, rtol=1e-6)
    dy = noise(*y.shape, seed=4, dtype=dtype)
    leaves = [x, D] + ([b] if b is not None else [])
    got = torch.autograd.grad(y, leaves, dy)
    x2 = x.detach().requires_grad_()
    full = torch.autograd.grad(F.linear(x2, dense, b), [x2, dense] + ([b] if b is not None else []), dy)
    tight = {"rtol": 0, "atol": 1e-12} if dtype is F64 else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(got[0], full[0], **tight)
    torch.testing.assert_close(got[1], s * full[1][:, CHANNELS], **tight)
    if b is not None:
        torch.testing.assert_close(got[2], full[2], **tight)
    by_hand = reference.gradients(x.detach(), W, D.detach(), CHANNELS, s, dy)
    for mine, theirs in zip(got, by_hand, strict=False):
        torch.testing.assert_close(mine, theirs, **tight)
    torch.testing.assert_close(y, reference.paca_linear(x, W, D, CHANNELS, s, b), **tight)


def test_inputs_that_are_not_contiguous():
    x = noise(6, 5, 2).permute(2, 1, 0).requires_grad_()
    W, D = noise(4, 6, seed=1), noise(4, 3, seed=2, grad=True)
    dy = noise(2, 5, 4, seed=3).transpose(0, 1).contiguous().transpose(0, 1)
    got = torch.autograd.grad(paca_linear(x, D, 1.0, CHANNELS, None, Plain(), (W,)), [x, D], dy)
    torch.testing.assert_close(got[0], dy @ W)
    torch.testing.assert_close(got[1], torch.einsum("...o,...i->oi", dy, x)[:, CHANNELS])


@pytest.mark.parametrize(("trains", "biased"), [(True, False), (False, True), (False, False), (True, True)])
def test_each_gradient_comes_by_itself(trains: bool, biased: bool):
    """A trained bias does not hang on trained columns, nor they on it; what does not train keeps nothing."""
    x, W = noise(5, 6), noise(4, 6, seed=1)
    D, b = noise(4, 3, seed=2, grad=trains), noise(4, seed=3, grad=biased)
    y, bytes_kept = kept(lambda: paca_linear(x, D, 1.0, CHANNELS, b, Plain(), (W,)), [W])
    assert y.requires_grad == (trains or biased)
    assert sum(bytes_kept.values()) == (5 * 3 * 8 if trains else 0)
    if y.requires_grad:
        y.sum().backward()
    assert (D.grad is not None, b.grad is not None) == (trains, biased)
    assert W.grad is None


@pytest.mark.parametrize("shape", [(50, 6), (5, 10, 6)], ids=str)
def test_bytes_kept_are_b_times_r(shape: tuple[int, ...]):
    """Exactly: a view would keep all of x alive, and so would saving x and picking in backward."""
    W, D = noise(4, 6, seed=1, dtype=torch.float32), noise(4, 3, seed=2, dtype=torch.float32, grad=True)
    x = noise(*shape, dtype=torch.float32, grad=True)
    y, found = kept(lambda: paca_linear(x, D, 1.0, CHANNELS, None, Plain(), (W,)), [W])
    assert sorted(found.values()) == [50 * 3 * 4]
    assert x.untyped_storage().data_ptr() not in found
    with torch.no_grad():
        _, found = kept(lambda: paca_linear(x, D, 1.0, CHANNELS, None, Plain(), (W,)), [W])
    assert not found
    del y


def test_operations():
    """2bnm forward, and backward 2bnm + 2bmr: no branch, no dense gradient."""
    b, n, m, r = 50, 6, 4, 3
    W, D, x = noise(m, n, seed=1), noise(m, r, seed=2, grad=True), noise(b, n, grad=True)
    with FlopCounterMode(display=False) as forward:
        y = paca_linear(x, D, 1.0, CHANNELS, None, Plain(), (W,))
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert forward.get_total_flops() == 2 * b * n * m
    assert backward.get_total_flops() == 2 * b * n * m + 2 * b * m * r


def test_a_write_between_forward_and_backward_raises():
    W, D, x = noise(4, 6, seed=1), noise(4, 3, seed=2, grad=True), noise(5, 6, grad=True)
    y = paca_linear(x, D, 1.0, CHANNELS, None, Plain(), (W,))
    W[:, 0] = 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("wide", [True, False])
def test_autocast_gathers_after_the_cast(wide: bool):
    """Compute and what is kept are bf16, the gradient of D fp32; the value is F.linear's under autocast."""
    W, D = noise(4, 6, seed=1, dtype=torch.float32), noise(4, 3, seed=2, dtype=torch.float32, grad=True)
    W = W if wide else W.bfloat16()
    bias = noise(4, seed=3, dtype=W.dtype)
    x = noise(50, 6, dtype=torch.float32, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, found = kept(lambda: paca_linear(x, D, 1.0, CHANNELS, bias, Plain(), (W,)), [W])
        assert torch.equal(y, F.linear(x, W, bias))
    assert y.dtype is torch.bfloat16
    assert sorted(found.values()) == [50 * 3 * 2]
    y.sum().backward()
    assert D.grad is not None
    assert D.grad.dtype is torch.float32
    assert x.grad is not None
    assert x.grad.dtype is torch.float32
    want = torch.ones(4, 50) @ x.detach().bfloat16().float()[:, CHANNELS]
    assert torch.allclose(D.grad, want, rtol=2**-7, atol=2**-7)


def test_the_output_can_be_changed_in_place():
    W, D, x = noise(4, 6, seed=1), noise(4, 3, seed=2, grad=True), noise(2, 5, 6, grad=True)
    y = paca_linear(x, D, 1.0, CHANNELS, None, Plain(), (W,))
    y += 1
    y *= 2
    y.sum().backward()
    assert torch.allclose(x.grad, (2 * torch.ones(2, 5, 4, dtype=F64)) @ W)  # type: ignore[arg-type]


def test_meta():
    x = torch.empty(2, 6, device="meta", requires_grad=True)
    D = torch.empty(4, 3, device="meta", requires_grad=True)
    y = paca_linear(x, D, 1.0, CHANNELS.to("meta"), None, Plain(), (torch.empty(4, 6, device="meta"),))
    y.sum().backward()
    assert D.grad is not None
    assert D.grad.shape == (4, 3)


CONVS = {
    "1d": (nn.Conv1d(6, 4, 3, padding=1), (2, 6, 8)),
    "1d circular": (nn.Conv1d(6, 4, 3, padding=2, padding_mode="circular"), (2, 6, 8)),
    "1d unbatched": (nn.Conv1d(6, 4, 3), (6, 8)),
    "2d": (nn.Conv2d(6, 4, (2, 3), stride=2, dilation=(1, 2)), (2, 6, 7, 9)),
    "2d same": (nn.Conv2d(6, 4, (2, 3), padding="same", dilation=(2, 1)), (2, 6, 5, 7)),
    "2d valid": (nn.Conv2d(6, 4, 3, padding="valid", bias=False), (2, 6, 5, 7)),
    "2d reflect": (nn.Conv2d(6, 4, 3, padding=(1, 2), padding_mode="reflect"), (2, 6, 5, 7)),
    "2d replicate": (nn.Conv2d(6, 4, 3, stride=2, padding=1, padding_mode="replicate"), (2, 6, 5, 7)),
    "2d one": (nn.Conv2d(6, 4, 1), (3, 6, 5, 5)),
    "2d channels last": (nn.Conv2d(6, 4, 3).to(memory_format=torch.channels_last), (2, 6, 5, 7)),
    "3d": (nn.Conv3d(6, 4, (1, 2, 2), padding=1), (2, 6, 3, 4, 4)),
    "no batch": (nn.Conv2d(6, 4, 3), (0, 6, 5, 5)),
}


@pytest.mark.parametrize("name", CONVS)
def test_convolutions(name: str):
    """Value and gradients are autograd's through the dense convolution; of the input r channels are kept."""
    layer, shape = CONVS[name]
    layer = layer.to(F64)
    form = form_of(layer)
    assert isinstance(form, ConvForm)
    x, taps = noise(*shape, grad=True), layer.weight[0, 0].numel()
    D = noise(4, 3 * taps, seed=2, grad=True)
    weight = layer.weight.detach().clone(memory_format=torch.preserve_format)
    y, found = kept(lambda: paca_conv(x, D, 0.7, CHANNELS, weight, layer.bias, form), [weight])
    want = layer(x)
    assert torch.equal(y, want)
    assert list(found.values()) == [8 * x.numel() // 2] or (not found and x.numel() == 0) or name == "no batch"
    dy = noise(*y.shape, seed=4)
    got = torch.autograd.grad(y, [x, D], dy)
    full = torch.autograd.grad(want, [x, layer.weight], dy)
    torch.testing.assert_close(got[0], full[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(got[1], 0.7 * full[1][:, CHANNELS].flatten(1), rtol=0, atol=1e-12)


def test_a_convolution_under_autocast_and_with_a_trained_bias():
    layer = nn.Conv2d(6, 4, 3, padding="same")
    form = form_of(layer)
    assert isinstance(form, ConvForm)
    x, D = noise(2, 6, 5, 5, dtype=torch.float32, grad=True), noise(4, 27, dtype=torch.float32, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = paca_conv(x, D, 1.0, CHANNELS, layer.weight.detach(), layer.bias, form)
        want = layer(x)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, want)
    y.sum().backward()
    assert D.grad is not None
    assert D.grad.dtype is torch.float32
    assert torch.allclose(layer.bias.grad, torch.full((4,), 50.0))  # type: ignore[arg-type, union-attr]
