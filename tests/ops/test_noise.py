"""Noise on a weight that is never formed whole: one ε for one key, its product, its gradient, and what it costs."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankshift.core import base
from rankshift.core.form import ConvForm, Form, TransposedForm
from rankshift.core.site import form_of
from rankshift.ops.noise import noise_product, op, reference

D = torch.float64


def key(word: int) -> Tensor:
    return torch.tensor(word, dtype=torch.int64)


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = D) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D).to(dtype)


@pytest.fixture(params=[1 << 24, 20], ids=["one block", "blocks of rows"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(base, "_BLOCK", request.param)
    return request.param


@pytest.mark.parametrize("shape", [(6,), (1, 6), (0, 6), (5, 6), (2, 3, 6)])
def test_it_is_the_product_with_epsilon(shape: tuple[int, ...], block: int):
    v, word = seeded(7, seed=1).abs(), key(-(1 << 62) - 12345)
    epsilon = reference.noise(v, 6, word)
    x = seeded(*shape).requires_grad_()
    for form in (Form(), TransposedForm()):
        y = noise_product(x, v, word, form)
        torch.testing.assert_close(y, x @ epsilon.t(), rtol=1e-12, atol=1e-12)
        dy = seeded(*y.shape, seed=2)
        (dx,) = torch.autograd.grad(y, x, dy)
        torch.testing.assert_close(dx, dy @ epsilon, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(reference.noise_product(x, v, word, form, 6), y, rtol=1e-12, atol=1e-12)


def test_one_key_one_epsilon(block: int):
    """Bit for bit what forward used: the product with the identity."""
    v, eye = seeded(9, seed=1).abs(), torch.eye(6, dtype=D)
    first = reference.noise(v, 6, key(5))
    assert torch.equal(noise_product(eye, v, key(5), Form()), first.t())
    assert torch.equal(reference.noise(v, 6, key(5)), first)
    assert not torch.equal(reference.noise(v, 6, key(6)), first)
    assert torch.equal(reference.noise(2 * v, 6, key(5)), 2 * first)
    x = torch.eye(9, dtype=D)
    leaf = torch.zeros(9, 6, dtype=D, requires_grad=True)
    (dx,) = torch.autograd.grad(noise_product(leaf, v, key(5), Form()), leaf, x)
    assert torch.equal(dx, first)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions(dims: int, block: int):
    for stride, padding, dilation, mode in [
        (1, 0, 1, "zeros"), (2, 1, 1, "zeros"), (1, 1, 2, "circular"), (1, "same", 1, "reflect"), (3, 2, 1, "zeros"),
    ]:  # fmt: skip
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        layer = kind(3, 5, 3, stride=stride, padding=padding, dilation=dilation, padding_mode=mode, bias=False).double()
        form = form_of(layer)
        assert isinstance(form, ConvForm)
        v, word = seeded(5, seed=1).abs(), key(8)
        layer.weight.data.copy_(form.stored(reference.noise(v, 3 * 3**dims, word)))
        for batch in ((2,), ()):
            x, twin = (seeded(*batch, 3, *(7, 6, 5)[:dims]).requires_grad_() for _ in range(2))
            y, want = noise_product(x, v, word, form), layer(twin)
            torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
            torch.sin(y).sum().backward(), torch.sin(want).sum().backward()
            torch.testing.assert_close(x.grad, twin.grad, rtol=1e-10, atol=1e-10)


def test_epsilon_is_normal():
    """Moments of 2e5 draws within five standard errors, rows in proportion to v, nothing in common between keys."""
    v = torch.tensor([0.0, 1e-3, 1.0, 40.0])
    count = 200_000
    one, other = (reference.noise(v, count, key(word)).double() for word in (1, 2))
    assert not one[0].any()
    z = one[1:] / v[1:, None]
    assert (z.mean(1).abs() < 5 / count**0.5).all()
    assert ((z.square().mean(1) - 1).abs() < 5 * (2 / count) ** 0.5).all()
    assert ((z.pow(4).mean(1) - 3).abs() < 5 * (96 / count) ** 0.5).all()
    rows = [*z, *(other[1:] / v[1:, None])]
    for a, b in itertools.combinations(rows, 2):
        assert abs((a * b).mean().item()) < 5 / count**0.5


def test_draws_are_fp32_and_not_rounded_on_the_way():
    """Those of torch's own generator, bit for bit: rounded to bf16, noise of fp32 layers would take 2^8 steps only."""
    v = seeded(5, seed=1).abs().float()
    z = torch.empty(5, 64).normal_(generator=torch.Generator().manual_seed(77))
    eye = torch.eye(64, requires_grad=True)
    y = noise_product(eye, v, key(77), Form())
    assert torch.equal(y.t(), z * v[:, None])
    (dx,) = torch.autograd.grad(y, eye, torch.ones_like(y))
    torch.testing.assert_close(dx, (z * v[:, None]).sum(0).expand(64, 64), rtol=1e-5, atol=1e-6)


def test_global_random_state_is_left_alone():
    torch.manual_seed(3)
    state, x = torch.get_rng_state(), seeded(4, 6).requires_grad_()
    y = noise_product(x, torch.ones(5, dtype=D), key(1), Form())
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(noise_product(x, torch.ones(5, dtype=D), key(1), Form()), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype: torch.dtype):
    """ε is made in v's dtype and rounded once to that of the product: draws do not depend on what the layer runs in."""
    v = seeded(7, seed=1).abs().float()
    epsilon = reference.noise(v, 64, key(5)).double()
    assert (reference.noise(v.double(), 64, key(5)) - epsilon).abs().max() < 1e-6
    x = seeded(12, 64, dtype=dtype).requires_grad_()
    y = noise_product(x, v, key(5), Form())
    assert y.dtype == dtype
    y.backward(seeded(12, 7, seed=2, dtype=dtype))
    for got, want in ((y, x.double() @ epsilon.t()), (x.grad, seeded(12, 7, seed=2, dtype=dtype).double() @ epsilon)):
        assert (got.double() - want).norm() / want.norm() < 2 * torch.finfo(dtype).eps


def test_autocast_multiplies_in_its_own_dtype():
    x, v = seeded(12, 64, dtype=torch.float32).requires_grad_(), torch.ones(7)
    with torch.autocast("cpu", torch.bfloat16):
        y = noise_product(x, v, key(5), Form())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, noise_product(x.bfloat16(), v, key(5), Form()), rtol=0, atol=0)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


# ---- memory


class Widest(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that any call makes."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.values = max(self.values, made.numel())
        return made


def test_scratch_is_bounded(monkeypatch: pytest.MonkeyPatch):
    """Whatever the size of the weight, no more than a block of rows of it exists at a time."""
    out, into, tokens = 300, 200, 4
    monkeypatch.setattr(base, "_BLOCK", 5 * into)
    v, x = torch.ones(out), torch.randn(tokens, into)
    run = op._product._init_fn, op._product_backward._init_fn  # as functions, so that calls within are seen
    for call in (
        lambda: run[0](x, v, key(1), (), (), ()),
        lambda: run[1](torch.randn(tokens, out), v, key(1), x.shape, (), (), ()),
    ):
        with Widest() as widest:
            call()
        assert widest.values == max(5 * into, tokens * out)


def test_nothing_of_the_size_of_the_weight_survives():
    out, into = 301, 203
    x, v = torch.randn(4, into, requires_grad=True), torch.ones(out)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = noise_product(x, v, key(1), Form())
    assert sorted(t.numel() for t in kept) == [1, out]
    gc.collect()
    assert not [t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.numel() == out * into]
    y.sum().backward()
    gc.collect()
    assert not [t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.numel() == out * into]


def test_backward_means_the_noise_that_forward_had():
    """A loop may begin the next update, and DDP write its buffers again, between the two."""
    x, v, word = torch.randn(4, 6, dtype=D, requires_grad=True), torch.ones(5, dtype=D), key(1)
    epsilon = reference.noise(v, 6, word)
    y = noise_product(x, v, word, Form())
    word.fill_(2), v.fill_(3)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(4, 5, dtype=D) @ epsilon)


# ---- the compiler


def test_torch_says_that_it_is_an_operator():
    x, v = seeded(3, 6).requires_grad_(), seeded(5, seed=1).abs()
    image = seeded(2, 3, 6, 5).requires_grad_()
    torch.library.opcheck(op._product, (x, v, key(4), (), (), ()))
    torch.library.opcheck(op._product, (image, v, key(4), (2, 3), (2, 1), (1, 2)))


def test_epsilon_is_not_in_the_graph():
    """Forward and backward draw the same numbers; a compiler that saw the draws would keep them between the two."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    made: list[int] = []

    def look(graph, inputs):
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            if node.op == "call_function" and isinstance(value, Tensor):
                made.append(value.numel())
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=look, bw_compiler=look)
    v, word = torch.ones(30), key(1)
    compiled = torch.compile(
        lambda x: noise_product(x, v, word, Form()).square().sum(), backend=backend, fullgraph=True
    )
    x, twin = (torch.randn(2, 20, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            word.fill_(step)  # another key is no other graph
            compiled(x).backward()
            noise_product(twin, v, word, Form()).square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    assert made
    assert max(made) <= 2 * 30


def test_shapes_on_the_meta_device():
    x, v = torch.empty(2, 4, 6, device="meta", requires_grad=True), torch.empty(5, device="meta")
    y = noise_product(x, v, key(1), Form())
    assert (y.device.type, y.shape) == ("meta", (2, 4, 5))
    y.sum().backward()
    assert x.grad.shape == (2, 4, 6)
    form = form_of(nn.Conv2d(3, 5, 3, padding=1, device="meta"))
    image = torch.empty(2, 3, 8, 7, device="meta")
    assert (
        noise_product(image, v, key(1), form).shape
        == F.conv2d(image, torch.empty(5, 3, 3, 3, device="meta"), padding=1).shape
    )
