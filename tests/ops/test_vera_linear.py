"""The fused VeRA linear: value, gradients, what it keeps and what it multiplies."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import rankshift as rs
from rankshift.core.base import Plain
from rankshift.ops.vera_linear import reference, vera_linear
from rankshift.ops.vera_linear.op import fused_factor

SHAPES = [(0, 5), (1, 5), (7, 5), (2, 3, 5), (2, 1, 4, 5), (5,)]
F64 = torch.float64


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = F64, grad: bool = False) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return values.to(dtype).requires_grad_(grad)


def by_hand(x: Tensor, W: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Value and gradients through the dense weight and the dense gradient of it, written out in float64."""
    x, W, A, B, d, b, dy = (t.detach().to(F64) for t in (x, W, A, B, d, b, dy))
    merged = W + torch.einsum("o,or,r,ri->oi", b, B, d, A)
    G = torch.einsum("to,ti->oi", dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]))
    return {
        "y": torch.einsum("...i,oi->...o", x, merged),
        "x": torch.einsum("...o,oi->...i", dy, merged),
        "d": torch.einsum("o,or,oi,ri->r", b, B, G, A),
        "b": torch.einsum("or,r,ri,oi->o", B, d, A, G),
        "bias": dy.reshape(-1, dy.shape[-1]).sum(0),
    }


def check(x: Tensor, m: int, r: int, flags: tuple[bool, bool, bool, bool], wider: int = 0) -> None:
    need_x, need_d, need_b, has_bias = flags
    n = x.shape[-1]
    W, A, B = seeded(m, n, seed=1), seeded(r, n + wider, seed=2)[:, :n], seeded(m + wider, r, seed=3)[:m]
    d, b = seeded(r, seed=4, grad=need_d), seeded(m, seed=5, grad=need_b)
    bias = seeded(m, seed=6, grad=True) if has_bias else None
    x = x.detach().requires_grad_(need_x)
    y = vera_linear(x, A, B, d, b, bias, Plain(), (W,))
    dy = seeded(*y.shape, seed=7)
    want = by_hand(x, W, A, B, d, b, dy)
    torch.testing.assert_close(y.detach(), want["y"] if bias is None else want["y"] + bias.detach())
    leaves = {"x": x, "d": d, "b": b} | ({"bias": bias} if has_bias else {})
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if not leaves:
        assert not y.requires_grad
        return
    for name, grad in zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True):
        torch.testing.assert_close(grad, want[name], rtol=1e-9, atol=1e-9, msg=lambda t, name=name: f"{name}: {t}")


def test_value_and_gradients():
    for shape in SHAPES:
        for flags in itertools.product((True, False), repeat=4):
            check(seeded(*shape), 3, 2, flags)


def test_columns_and_rows_of_a_wider_pair():
    check(seeded(6, 5), 3, 4, (True, True, True, True), wider=7)


def test_inputs_that_are_not_contiguous():
    wide = seeded(6, 4, 10)
    for x in (wide[..., ::2], wide.transpose(0, 1)[..., :5], seeded(5, 9).t(), wide[:, :1].expand(6, 3, 10)[..., 5:]):
        assert not x.is_contiguous()
        check(x, 8, 3, (True, True, True, True))


@settings(max_examples=40, deadline=None)
@given(
    t=st.integers(0, 70), n=st.integers(1, 33), m=st.integers(1, 33), r=st.integers(1, 40),
    flags=st.tuples(*[st.booleans()] * 4),
)  # fmt: skip
def test_any_shape(t: int, n: int, m: int, r: int, flags: tuple[bool, bool, bool, bool]):
    check(seeded(t, n), m, r, flags)


def test_the_reference_is_the_paper():
    x, W, A, B = seeded(2, 3, 5, grad=True), seeded(4, 5, seed=1), seeded(6, 5, seed=2), seeded(4, 6, seed=3)
    d, b = seeded(6, seed=4, grad=True), seeded(4, seed=5, grad=True)
    y = reference.vera_linear(x, W, A, B, d, b)
    dy = seeded(2, 3, 4, seed=6)
    want = torch.autograd.grad(y, (x, d, b), dy)
    for got, grad in zip(reference.gradients(x, W, A, B, d, b, dy), want, strict=True):
        torch.testing.assert_close(got, grad)
    torch.testing.assert_close(vera_linear(x, A, B, d, b, None, Plain(), (W,)), y)


def test_second_derivatives_are_refused():
    x, W, A, B = seeded(4, 5, grad=True), seeded(3, 5), seeded(2, 5), seeded(3, 2)
    y = vera_linear(x, A, B, seeded(2, grad=True), seeded(3, grad=True), None, Plain(), (W,))
    (gx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable"):
        gx.sum().backward()


# ---- operations


class Products(TorchDispatchMode):
    """Shapes of the results of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.made: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in ("mm", "addmm"):
            self.shapes.append(tuple(out.shape))
        elif isinstance(out, Tensor) and name not in ("t", "view", "transpose", "detach", "unsqueeze", "alias"):
            self.made.append(tuple(out.shape))
        return out


@pytest.mark.parametrize(("need_x", "need_d", "need_b"), [(1, 1, 1), (0, 1, 1), (1, 1, 0), (1, 0, 1), (1, 0, 0)])
def test_one_product_gives_both_gradients(need_x: int, need_d: int, need_b: int):
    t, n, m, r = 24, 20, 12, 3
    x, W, A, B = seeded(t, n, grad=bool(need_x)), seeded(m, n), seeded(r, n), seeded(m, r)
    d, b = seeded(r, grad=bool(need_d)), seeded(m, grad=bool(need_b))
    with FlopCounterMode(display=False) as flops, Products() as forward:
        y = vera_linear(x, A, B, d, b, None, Plain(), (W,))
    assert flops.get_total_flops() == 2 * t * n * m + 2 * t * r * (n + m)
    assert sorted(forward.shapes) == sorted([(t, r), (t, m), (t, m)])
    dy = torch.ones_like(y)
    with FlopCounterMode(display=False) as flops, Products() as backward:
        y.backward(dy)
    learns = bool(need_d or need_b)
    products = need_x * (2 * t * n * m + 2 * t * r * (n + m)) + learns * 2 * t * m * r
    assert 0 <= flops.get_total_flops() - products <= 4 * m * r  # (B ⊙ G) d and bᵀ (B ⊙ G): no tokens in them
    assert backward.shapes.count((m, r)) == learns
    assert (t, m) not in forward.made + backward.made, "an elementwise operation of the output's size"


# ---- precision


@pytest.mark.parametrize("how", ["autocast", "bf16 base", "fp16 base"])
def test_wide_vectors_of_a_narrow_layer(how: str):
    """Value within a few roundings of the compute dtype; gradients of fp32 vectors are fp32 and as close."""
    dtype = torch.float16 if how == "fp16 base" else torch.bfloat16
    narrow = torch.float32 if how == "autocast" else dtype
    t, n, m, r = 12, 16, 8, 32
    x, W, bias = seeded(t, n, dtype=narrow, grad=True), seeded(m, n, seed=1, dtype=narrow), seeded(m, dtype=narrow)
    A, B = seeded(r, n, seed=2, dtype=torch.float32) / 4, seeded(m, r, seed=3, dtype=torch.float32) / 5
    d, b = seeded(r, seed=4, dtype=torch.float32, grad=True), seeded(m, seed=5, dtype=torch.float32, grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        y = vera_linear(x, A, B, d, b, bias, Plain(), (W,))
    assert y.dtype == dtype
    dy = seeded(t, m, seed=6, dtype=dtype)
    y.backward(dy)
    assert (d.grad.dtype, b.grad.dtype, x.grad.dtype) == (torch.float32, torch.float32, narrow)
    want = by_hand(x, W, A, B, d, b, dy)
    want["y"] += bias.double()
    for got, name in ((y, "y"), (x.grad, "x"), (d.grad, "d"), (b.grad, "b")):
        error = (got.detach().double() - want[name]).norm() / want[name].norm()
        assert error < 4 * torch.finfo(dtype).eps, name  # inputs, Z and the result are rounded


def test_a_tiny_start_learns_in_half_precision():
    """d₀ = 1e-7 is no number of fp16: the gradient of b is taken with the fp32 vector all the same."""
    t, n, m, r = 12, 16, 8, 32
    x, W = seeded(t, n, dtype=torch.float16), seeded(m, n, seed=1, dtype=torch.float16)
    A, B = seeded(r, n, seed=2, dtype=torch.float32), seeded(m, r, seed=3, dtype=torch.float32)
    d, b = torch.full((r,), 1e-7), torch.zeros(m, requires_grad=True)
    y = vera_linear(x, A, B, d, b, None, Plain(), (W,))
    dy = seeded(t, m, seed=6, dtype=torch.float16)
    y.backward(dy)
    want = by_hand(x, W, A, B, d, b, dy)["b"]
    assert (b.grad.double() - want).norm() < 2**-8 * want.norm()


def test_bf16_keeps_a_small_update():
    """W = [V, −V] and x = [t, t], so that W x is exactly 0 and y is the branch alone, error and all."""
    V, t = seeded(32, 32, dtype=torch.float32), seeded(64, 32, seed=1, dtype=torch.float32)
    W, x = torch.cat([V, -V], 1).bfloat16(), torch.cat([t, t], 1).bfloat16()
    A, B = seeded(16, 64, seed=2, dtype=torch.float32), seeded(32, 16, seed=3, dtype=torch.float32)
    d, b = seeded(16, seed=4, dtype=torch.float32), seeded(32, seed=5, dtype=torch.float32)
    b *= 7e-4 * W.float().norm() / (b[:, None] * (B * d) @ A).norm()
    exact = x.double() @ (b[:, None] * (B * d) @ A).double().t()
    got = vera_linear(x, A, B, d, b, None, Plain(), (W,)).double()
    assert (got - exact).norm() < 0.02 * exact.norm()


def test_autocast_equals_the_plain_composition():
    x = seeded(6, 8, dtype=torch.float32)
    W, A, B = (seeded(*s, seed=i, dtype=torch.float32) for i, s in enumerate([(4, 8), (16, 8), (4, 16)], 1))
    d, b = seeded(16, seed=4, dtype=torch.float32), seeded(4, seed=5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        fused = vera_linear(x, A, B, d, b, None, Plain(), (W,))
        linear = nn.functional.linear
        plain = linear(x, W) + b * linear(d * linear(x, A), B)
    assert fused.dtype == torch.bfloat16
    torch.testing.assert_close(fused.float(), plain.float(), rtol=2**-5, atol=2**-3)  # three roundings of numbers ~ 30


# ---- memory

T, N, M, R = 50, 32, 24, 8


def layer(dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(N, M, dtype=dtype))
    rs.attach(model, rs.VeRA(rank=R, targets="0"))
    return model


def kept(model: nn.Module, x: Tensor, autocast: bool = False) -> int:
    """Bytes kept for backward, in unique storages that are not the model's own."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        alive.append(model(x))
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("input_grad", [True, False])
def test_kept_is_z_alone(dtype: torch.dtype, input_grad: bool):
    assert kept(layer(dtype), torch.randn(T, N, dtype=dtype, requires_grad=input_grad)) == T * R * dtype.itemsize


def test_kept_under_autocast():
    assert kept(layer(torch.float32), torch.randn(T, N), autocast=True) == T * R * 2


def test_nothing_is_kept_without_gradients():
    model = layer(torch.float32)
    x = torch.randn(T, N, requires_grad=True)
    with torch.no_grad():
        assert kept(model, x) == 0
    for p in model.parameters():
        p.requires_grad_(False)
    assert kept(model, x) == 0  # frozen: the input's gradient needs the weights only


# ---- precision


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
def test_the_factor_by_itself(dtype: torch.dtype):
    """diag(b) B diag(d) for a block that multiplies by it: its gradients, and nothing kept but B and the vectors."""
    wide = torch.promote_types(dtype, torch.float32)
    B, dC = seeded(7, 5, seed=1, dtype=wide), seeded(7, 5, seed=2, dtype=wide)
    d, b = seeded(5, seed=3, dtype=dtype, grad=True), seeded(7, seed=4, dtype=dtype, grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        C = fused_factor(B, d, b)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (B, d, b)}
    close = {"rtol": 1e-12 if dtype is F64 else 1e-2, "atol": 1e-12 if dtype is F64 else 1e-2}
    torch.testing.assert_close(C.to(F64), torch.einsum("o,or,r->or", b.to(F64), B.to(F64), d.to(F64)), **close)
    dd, db = torch.autograd.grad(C, (d, b), dC)
    assert dd.dtype == db.dtype == dtype
    torch.testing.assert_close(dd.to(F64), torch.einsum("o,or,or->r", b.to(F64), B.to(F64), dC.to(F64)), **close)
    torch.testing.assert_close(db.to(F64), torch.einsum("or,r,or->o", B.to(F64), d.to(F64), dC.to(F64)), **close)
    assert torch.autograd.grad(fused_factor(B, d.detach(), b), b, dC)[0].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_narrow_vectors_are_summed_as_wide_as_the_pair(dtype: torch.dtype):
    """FSDP2's mixed precision hands d and b over in bf16. Their gradients are rounded to it once, at the end: each is
    the bf16 number next to the sum in float64."""
    m, n, r, tokens = 70, 30, 50, 9
    W, A, B = seeded(m, n, seed=1, dtype=dtype), seeded(r, n, seed=2).float(), seeded(m, r, seed=3).float()
    d, b = (seeded(k, seed=4 + k, dtype=torch.bfloat16, grad=True) for k in (r, m))
    x = seeded(tokens, n, seed=5, dtype=dtype)
    y = vera_linear(x, A, B, d, b, None, Plain(), (W,))
    assert y.dtype == dtype
    dy = seeded(*y.shape, seed=6, dtype=dtype)
    dd, db = torch.autograd.grad(y, (d, b), dy)
    G = (dy.t() @ (x @ A.to(dtype).t())).to(F64)  # its factors are of the layer's dtype, and so is what it comes in
    want = {
        "d": torch.einsum("o,or,or->r", b.detach().to(F64), B.to(F64), G),
        "b": torch.einsum("or,r,or->o", B.to(F64), d.detach().to(F64), G),
    }
    for name, found in {"d": dd, "b": db}.items():
        assert found.dtype is torch.bfloat16
        assert (found == want[name].to(torch.bfloat16)).float().mean() > 0.95, name


# ---- meta and compile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_on_the_meta_device(dtype: torch.dtype):
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(24, 12, dtype=dtype)), torch.empty(3, 5, 24, dtype=dtype)
    run = rs.attach(model, rs.VeRA(rank=2, targets="0"))
    y = model(x)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (3, 5, 12), dtype)
    y.sum().backward()
    assert run.adapter()["0"].lambda_b.grad.shape == (12,)


def test_compiles_whole():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(N, M), nn.ReLU(), nn.Linear(M, N))  # the second layer reads the first one's pair
    run = rs.attach(model, rs.VeRA(rank=R, targets=("0", "2")))
    with torch.no_grad():
        for _, p in run.trainable():
            p.normal_()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(T, N, requires_grad=True)
    leaves = [x, *(p for _, p in run.trainable())]
    plain, y = model(x), compiled(x)
    torch.testing.assert_close(y, plain)
    want = torch.autograd.grad(plain.square().sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), leaves), want)
