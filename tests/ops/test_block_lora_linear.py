"""The block-diagonal LoRA linear: the dense block-diagonal layer's value and gradients, without its zeros."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rankshift as rs
from rankshift.core.base import Plain
from rankshift.ops.block_lora_linear import block_diagonal, block_lora_linear, reference
from rankshift.ops.lora_linear import lora_linear


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_(grad)


def by_hand(x: Tensor, W: Tensor, A: Tensor, B: Tensor, n: int, s: float, dy: Tensor) -> dict[str, Tensor]:
    """Value and gradients through the dense weight and the dense gradient G = dYᵀX, entry by entry."""
    r, (i, o) = B.shape[1], (A.shape[1], B.shape[0] // n)
    merged = W.clone()
    for row, column in itertools.product(range(W.shape[0]), range(W.shape[1])):
        if row // o == column // i:  # in the same block
            k = row // o
            merged[row, column] += s * sum(B[row, q] * A[k * r + q, column % i] for q in range(r))
    X, dY = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    G = dY.t() @ X
    dA, dB = torch.zeros_like(A), torch.zeros_like(B)
    for k in range(n):
        block = G[k * o : (k + 1) * o, k * i : (k + 1) * i]
        dA[k * r : (k + 1) * r] = s * B[k * o : (k + 1) * o].t() @ block
        dB[k * o : (k + 1) * o] = s * block @ A[k * r : (k + 1) * r].t()
    return {"y": x @ merged.t(), "x": dy @ merged, "A": dA, "B": dB, "bias": dY.sum(0)}


def check(x: Tensor, n: int, i: int, o: int, r: int, flags: tuple[bool, bool, bool, bool]) -> None:
    need_x, need_a, need_b, has_bias = flags
    W = seeded(n * o, n * i, seed=1)
    A, B = seeded(n * r, i, seed=2, grad=need_a), seeded(n * o, r, seed=3, grad=need_b)
    bias = seeded(n * o, seed=4, grad=True) if has_bias else None
    x = x.detach().requires_grad_(need_x)
    y = block_lora_linear(x, A, B, n, 0.7, bias, Plain(), (W,))
    dy = seeded(*y.shape, seed=5)
    want = by_hand(x.detach(), W, A.detach(), B.detach(), n, 0.7, dy)
    value = want["y"] if bias is None else want["y"] + bias.detach()
    torch.testing.assert_close(y.detach(), value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(reference.block_lora_linear(x, W, A, B, n, 0.7, bias), y, rtol=1e-10, atol=1e-10)
    leaves = {"x": x, "A": A, "B": B} | ({"bias": bias} if has_bias else {})
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if not leaves:
        assert not y.requires_grad
        return
    for name, grad in zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True):
        torch.testing.assert_close(grad, want[name], rtol=1e-10, atol=1e-10, msg=lambda t, name=name: f"{name}: {t}")


@pytest.mark.parametrize("n", [1, 2, 3])
def test_it_is_the_dense_block_diagonal_layer(n: int):
    for shape in [(0,), (1,), (7,), (2, 3), (2, 1, 4), ()]:
        for flags in itertools.product((True, False), repeat=4):
            check(seeded(*shape, n * 3), n, 3, 2, 2, flags)


def test_inputs_that_are_not_contiguous():
    wide = seeded(6, 4, 12)
    for x in (wide[..., ::2], wide.transpose(0, 1)[..., :6], seeded(6, 9).t(), wide[:, :1].expand(6, 3, 12)[..., 6:]):
        assert not x.is_contiguous()
        check(x, 2, 3, 4, 2, (True, True, True, True))


@settings(max_examples=30, deadline=None)
@given(
    b=st.integers(0, 40), n=st.integers(1, 6), i=st.integers(1, 5), o=st.integers(1, 5), r=st.integers(1, 4),
    flags=st.tuples(*[st.booleans()] * 4),
)  # fmt: skip
def test_any_shape(b: int, n: int, i: int, o: int, r: int, flags: tuple[bool, bool, bool, bool]):
    check(seeded(b, n * i), n, i, o, r, flags)


def test_an_incoming_gradient_that_is_not_contiguous():
    x, W, A, B = seeded(4, 6, grad=True), seeded(8, 6), seeded(4, 3, grad=True), seeded(8, 2, grad=True)
    block_lora_linear(x, A, B, 2, 1.0, None, Plain(), (W,)).sum().backward()  # an expanded scalar
    want = by_hand(x.detach(), W, A.detach(), B.detach(), 2, 1.0, torch.ones(4, 8, dtype=torch.float64))
    for leaf, name in ((x, "x"), (A, "A"), (B, "B")):
        torch.testing.assert_close(leaf.grad, want[name], rtol=1e-10, atol=1e-10)


def test_block_diagonal():
    A, B = block_diagonal(torch.ones(4, 3), torch.ones(6, 2), 2)
    assert A.tolist() == [[1, 1, 1, 0, 0, 0]] * 2 + [[0, 0, 0, 1, 1, 1]] * 2
    assert B.tolist() == [[1, 1, 0, 0]] * 3 + [[0, 0, 1, 1]] * 3


@pytest.mark.parametrize("tokens", [3, 200])  # RunLoRA's choice differs
def test_one_block_is_the_lora_op_bit_for_bit(tokens: int):
    leaves = [seeded(tokens, 10, grad=True), seeded(2, 10, seed=1, grad=True), seeded(8, 2, seed=2, grad=True)]
    W, bias = seeded(8, 10, seed=3), seeded(8, seed=4)
    ys = [
        block_lora_linear(leaves[0], leaves[1], leaves[2], 1, 0.3, bias, Plain(), (W,)),
        lora_linear(leaves[0], leaves[1], leaves[2], 0.3, bias, Plain(), (W,)),
    ]
    assert torch.equal(*ys)
    grads = [torch.autograd.grad(y.square().sum(), leaves) for y in ys]
    assert all(map(torch.equal, *grads))


# ---- operations, memory, precision


@pytest.mark.parametrize("n", [2, 4])
def test_operations_do_not_grow_with_blocks(n: int):
    """2·r·(in + out) a token beside the base, forward; twice that backward: those of one LoRA of rank r."""
    b, into, out, r = 24, 20, 12, 3
    x, W = seeded(b, into, grad=True), seeded(out, into)
    A, B = seeded(n * r, into // n, grad=True), seeded(out, r, grad=True)
    with FlopCounterMode(display=False) as counter:
        y = block_lora_linear(x, A, B, n, 0.5, None, Plain(), (W,))
    assert counter.get_total_flops() == 2 * b * into * out + 2 * b * r * (into + out)
    with FlopCounterMode(display=False) as counter:
        y.backward(torch.ones_like(y))
    assert counter.get_total_flops() == 2 * b * into * out + 4 * b * r * (into + out)


@pytest.mark.parametrize("how", ["plain", "bf16 base", "autocast"])
def test_bytes_kept_for_backward(how: str):
    """X by reference and Z, b·(in + n·r) values in the dtype of the product; fp32 factors are not copied."""
    b, into, out, r, n = 6, 32, 24, 2, 4
    dtype = torch.bfloat16 if how == "bf16 base" else torch.float32
    model = nn.Sequential(nn.Linear(into, out, dtype=dtype))
    rs.attach(model, rs.MELoRA(rank=r, blocks=n, targets="0"))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in parameters:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(b, into, dtype=dtype, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"),
    ):
        y = model(x)
    assert y.dtype == (torch.float32 if how == "plain" else torch.bfloat16)
    assert sum(kept.values()) == b * (into + n * r) * y.dtype.itemsize


@pytest.mark.parametrize("how", ["autocast", "bf16 base", "fp16 base"])
def test_wide_factors_of_a_narrow_layer(how: str):
    """Value within a few roundings of the compute dtype; gradients of fp32 factors are fp32 and as close."""
    dtype = torch.float16 if how == "fp16 base" else torch.bfloat16
    narrow, wide = torch.float32 if how == "autocast" else dtype, torch.float32
    b, n, i, o, r = 12, 2, 8, 4, 3
    x, W = seeded(b, n * i, dtype=narrow, grad=True), seeded(n * o, n * i, seed=1, dtype=narrow)
    A, B = seeded(n * r, i, seed=2, dtype=wide, grad=True), seeded(n * o, r, seed=3, dtype=wide, grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        y = block_lora_linear(x, A, B, n, 0.5, None, Plain(), (W,))
    assert y.dtype == dtype
    dy = seeded(b, n * o, seed=5, dtype=dtype)
    y.backward(dy)
    assert (A.grad.dtype, B.grad.dtype, x.grad.dtype) == (wide, wide, narrow)
    want = by_hand(*(t.detach().double() for t in (x, W, A, B)), n, 0.5, dy.double())
    for got, name in ((y, "y"), (x.grad, "x"), (A.grad, "A"), (B.grad, "B")):
        error = (got.detach().double() - want[name]).norm() / want[name].norm()
        assert error < 4 * torch.finfo(dtype).eps, name


def test_bf16_keeps_a_small_update():
    """W x is exactly 0 by construction, so that y is the branch alone, error and all: W + ΔW is never rounded."""
    gen = torch.Generator().manual_seed(0)
    V, t = torch.randn(32, 32, generator=gen), torch.randn(64, 32, generator=gen)
    W, x = torch.cat([V, -V], 1).bfloat16(), torch.cat([t, t], 1).bfloat16()
    A, B = torch.randn(8, 32, generator=gen), torch.randn(32, 4, generator=gen)
    B *= 1e-3
    dense_A, dense_B = torch.block_diag(A[:4], A[4:]).double(), torch.block_diag(B[:16], B[16:]).double()
    exact = x.double() @ (dense_B @ dense_A).t()
    y = block_lora_linear(x, A, B, 2, 1.0, None, Plain(), (W,))
    assert (y.double() - exact).norm() / exact.norm() < 0.02


def test_second_derivatives_are_refused():
    x, W, A, B = seeded(4, 6, grad=True), seeded(4, 6), seeded(2, 3, grad=True), seeded(4, 1, grad=True)
    y = block_lora_linear(x, A, B, 2, 1.0, None, Plain(), (W,))
    (gx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable"):
        gx.sum().backward()


def test_shapes_on_the_meta_device():
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(24, 12)), torch.empty(3, 5, 24)
    run = rs.attach(model, rs.MELoRA(rank=2, blocks=3, targets="0"))
    y = model(x)
    assert (y.device.type, y.shape) == ("meta", (3, 5, 12))
    y.sum().backward()
    assert run.adapter()["0"].A.grad.shape == (6, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_whole(dtype: torch.dtype):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24, dtype=dtype))
    adapter = rs.attach(model, rs.MELoRA(rank=2, blocks=4, targets="0")).adapter()["0"]
    torch.nn.init.normal_(adapter.B)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 32, dtype=dtype, requires_grad=True)
    leaves = [x, *(p for p in adapter.parameters() if p.requires_grad)]
    plain, y = model(x), compiled(x)
    wanted = (plain, *torch.autograd.grad(plain.square().sum(), leaves))
    found = (y, *torch.autograd.grad(y.square().sum(), leaves))
    for got, want in zip(found, wanted, strict=True):  # compiled, the branch is rounded before it is added
        off = (got - want).double().norm() / want.double().norm()
        assert off < (2**-7 if dtype is torch.bfloat16 else 1e-6)
