"""The fused LoRA linear: one value and one gradient whatever the order, the operations and the memory it promises."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import rankshift as rs
from rankshift.core.base import Plain
from rankshift.ops.frozen_linear import frozen_linear
from rankshift.ops.lora_linear import lora_linear
from rankshift.ops.lora_linear.order import backward_flops, forward_flops
from rankshift.storage.four_bit import FourBit, FourBitLayout

FORWARDS, BACKWARDS = ("f1", "f2"), ("b1", "b1s", "b4", "b5", "b5s")
SHAPES = [(0, 5), (1, 5), (7, 5), (2, 3, 5), (2, 1, 4, 5), (5,)]


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_(grad)


def by_hand(x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float, bias: Tensor | None, dy: Tensor) -> dict[str, Tensor]:
    """Value and gradients through the dense weight and the dense gradient G = dYᵀX, written out."""
    merged = W + s * torch.einsum("or,ri->oi", B, A)
    y = torch.einsum("...i,oi->...o", x, merged)
    G = torch.einsum("bo,bi->oi", dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]))
    return {
        "y": y if bias is None else y + bias,
        "x": torch.einsum("...o,oi->...i", dy, merged),
        "A": s * torch.einsum("or,oi->ri", B, G),
        "B": s * torch.einsum("oi,ri->or", G, A),
        "bias": dy.reshape(-1, dy.shape[-1]).sum(0),
    }


def check(x: Tensor, n: int, m: int, r: int, forward: str, backward: str, flags: tuple[bool, bool, bool, bool]) -> None:
    need_x, need_a, need_b, has_bias = flags
    W, A, B = seeded(m, n, seed=1), seeded(r, n, seed=2, grad=need_a), seeded(m, r, seed=3, grad=need_b)
    bias = seeded(m, seed=4, grad=True) if has_bias else None
    x = x.detach().requires_grad_(need_x)
    y = lora_linear(x, A, B, 0.7, bias, Plain(), (W,), forward, backward)  # type: ignore[arg-type]
    dy = seeded(*y.shape, seed=5)
    want = by_hand(x.detach(), W, A.detach(), B.detach(), 0.7, None if bias is None else bias.detach(), dy)
    torch.testing.assert_close(y.detach(), want["y"], rtol=1e-10, atol=1e-10)
    leaves = {"x": x, "A": A, "B": B} | ({"bias": bias} if has_bias else {})
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if not leaves:
        assert not y.requires_grad
        return
    for name, grad in zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True):
        torch.testing.assert_close(
            grad, want[name], rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(("forward", "backward"), list(itertools.product(FORWARDS, BACKWARDS)))
def test_every_order_is_the_same_layer(forward: str, backward: str):
    for shape in SHAPES:
        for flags in itertools.product((True, False), repeat=4):
            check(seeded(*shape), shape[-1], 3, 2, forward, backward, flags)


@pytest.mark.parametrize("backward", BACKWARDS)
def test_inputs_that_are_not_contiguous(backward: str):
    wide = seeded(6, 4, 10)
    for x in (wide[..., ::2], wide.transpose(0, 1)[..., :5], seeded(5, 9).t(), wide[:, :1].expand(6, 3, 10)[..., 5:]):
        assert not x.is_contiguous()
        check(x, 5, 8, 3, "f1", backward, (True, True, True, True))
        check(x, 5, 8, 3, "f2", backward, (True, True, True, True))


@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(0, 70), n=st.integers(1, 33), m=st.integers(1, 33), r=st.integers(1, 9),
    forward=st.sampled_from([None, *FORWARDS]), backward=st.sampled_from([None, *BACKWARDS]),
    flags=st.tuples(*[st.booleans()] * 4),
)  # fmt: skip
def test_any_shape(b: int, n: int, m: int, r: int, forward: str, backward: str, flags: tuple[bool, bool, bool, bool]):
    check(seeded(b, n), n, m, r, forward, backward, flags)


def test_incoming_gradient_that_is_not_contiguous():
    x, W, A, B = seeded(4, 5, grad=True), seeded(3, 5), seeded(2, 5, grad=True), seeded(3, 2, grad=True)
    y = lora_linear(x, A, B, 1.0, None, Plain(), (W,))
    y.sum().backward()  # the gradient of a sum is an expanded scalar
    want = by_hand(x.detach(), W, A.detach(), B.detach(), 1.0, None, torch.ones(4, 3, dtype=torch.float64))
    for leaf, name in ((x, "x"), (A, "A"), (B, "B")):
        torch.testing.assert_close(leaf.grad, want[name], rtol=1e-10, atol=1e-10)


# ---- operations


@pytest.mark.parametrize(("forward", "backward"), list(itertools.product(FORWARDS, BACKWARDS)))
@pytest.mark.parametrize("flags", [(True, True, True), (False, True, True), (True, False, True), (True, True, False)])
def test_operations_are_those_of_the_table(forward: str, backward: str, flags: tuple[bool, bool, bool]):
    b, n, m, r = 24, 20, 12, 3
    need_x, need_a, need_b = flags
    x, W = seeded(b, n, grad=need_x), seeded(m, n)
    A, B = seeded(r, n, grad=need_a), seeded(m, r, grad=need_b)
    with FlopCounterMode(display=False) as counter:
        y = lora_linear(x, A, B, 0.5, None, Plain(), (W,), forward, backward)  # type: ignore[arg-type]
    keeps_z = need_b and backward in ("b1s", "b5s")
    assert counter.get_total_flops() == forward_flops(forward, b, n, m, r, keeps_z)  # type: ignore[arg-type]
    with FlopCounterMode(display=False) as counter:
        y.backward(torch.ones_like(y))
    assert counter.get_total_flops() == backward_flops(backward, b, n, m, r, *flags)  # type: ignore[arg-type]


@pytest.mark.parametrize("b", [2, 9, 13, 40])
def test_the_order_that_is_named_is_the_one_that_runs(b: int):
    n, m, r = 24, 12, 2
    model = nn.Sequential(nn.Linear(n, m))
    adapter = rs.attach(model, rs.LoRA(rank=r, targets="0")).adapter()["0"]
    f, w = adapter.orders(b)
    x = torch.randn(b, n, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    want = forward_flops(f, b, n, m, r, w in ("b1s", "b5s")) + backward_flops(w, b, n, m, r)
    assert counter.get_total_flops() == want
    others = {
        forward_flops(g, b, n, m, r, v in ("b1s", "b5s")) + backward_flops(v, b, n, m, r)
        for g in FORWARDS
        for v in BACKWARDS
    }
    assert want == min(others)
    assert len(others) > 3


@pytest.mark.parametrize(("forward", "backward"), [("f1", "b4"), ("f2", None), (None, "b5s"), (None, None)])
def test_orders_reports_the_order_that_was_asked_for(forward: str | None, backward: str | None):
    method = rs.LoRA(rank=2, targets="0", forward_order=forward, backward_order=backward)  # type: ignore[arg-type]
    adapter = rs.attach(nn.Sequential(nn.Linear(24, 12)), method).adapter()["0"]
    for tokens in (1, 2, 9, 40, 1000):
        f, w = adapter.orders(tokens)
        assert f == (forward or f)
        assert w == (backward or w)
        with FlopCounterMode(display=False) as counter:
            adapter(torch.randn(tokens, 24, requires_grad=True)).sum().backward()
        want = forward_flops(f, tokens, 24, 12, 2, w in ("b1s", "b5s")) + backward_flops(w, tokens, 24, 12, 2)
        assert counter.get_total_flops() == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_on_the_meta_device(dtype: torch.dtype):
    """A model without values tells its shapes, forward and backward."""
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(24, 12, dtype=dtype)), torch.empty(3, 5, 24, dtype=dtype)
    run = rs.attach(model, rs.LoRA(rank=2, targets="0"))
    y = model(x)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (3, 5, 12), dtype)
    y.sum().backward()
    assert run.adapter()["0"].B.grad.shape == (12, 2)


# ---- precision


def test_bf16_keeps_a_small_update():
    """W = [V, −V] and x = [t, t], so that W x is exactly 0 and y is the branch alone, error and all."""
    gen = torch.Generator().manual_seed(0)
    V, t = torch.randn(32, 32, generator=gen), torch.randn(64, 32, generator=gen)
    W, x = torch.cat([V, -V], 1).bfloat16(), torch.cat([t, t], 1).bfloat16()
    A, B = torch.randn(4, 64, generator=gen), torch.randn(32, 4, generator=gen)
    B *= 7e-4 * W.float().norm() / (B @ A).norm()  # ‖BA‖ = 7e-4 ‖W‖
    exact = x.double() @ (B.double() @ A.double()).t()

    def error(y: Tensor) -> float:
        return float((y.double() - exact).norm() / exact.norm())

    assert error(lora_linear(x, A, B, 1.0, None, Plain(), (W,))) < 0.02
    naive = x @ (W + (B @ A).to(W.dtype)).t()  # what the merged orders would do
    assert error(naive) > 0.3
    for order in ({"forward": "f2"}, {"backward": "b5"}):
        with pytest.raises(rs.errors.ConfigError, match=r"loses most of a small update"):
            lora_linear(x, A, B, 1.0, None, Plain(), (W,), **order)


@pytest.mark.parametrize("bias", [False, True])
def test_what_is_rounded_first_is_the_change(bias: bool):
    """y and dX in bf16 are no further from float64 than with the large product rounded first."""
    x, W, dy = (seeded(*s, seed=i, dtype=torch.bfloat16) for i, s in enumerate([(64, 96), (80, 96), (64, 80)], 1))
    A, B = seeded(8, 96, seed=4, dtype=torch.float32), 0.02 * seeded(80, 8, seed=5, dtype=torch.float32)
    b = seeded(80, seed=6, dtype=torch.bfloat16) if bias else None
    x.requires_grad_()
    y = lora_linear(x, A, B, 0.7, b, Plain(), (W,))
    y.backward(dy)
    exact = by_hand(*(t.detach().double() for t in (x, W, A, B)), 0.7, None if b is None else b.double(), dy.double())
    with torch.no_grad():
        Ac, Bc = A.bfloat16(), (0.7 * B).bfloat16()
        large = torch.addmm(nn.functional.linear(x, W, b), x @ Ac.t(), Bc.t()), torch.addmm(dy @ W, dy @ Bc, Ac)
    for got, before, name in ((y, large[0], "y"), (x.grad, large[1], "x")):
        error, other = ((t.double() - exact[name]).norm() / exact[name].norm() for t in (got.detach(), before))
        assert error < 0.85 * other, (name, error / other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("forward", "backward"), list(itertools.product(FORWARDS, BACKWARDS)))
def test_every_order_on_a_base_in_4_bits(forward: str, backward: str, dtype: torch.dtype):
    """Against float64, and with the numbers that the codes stand for before they are rounded to ``dtype``."""
    b, n, m, r = 30, 40, 24, 5
    layout, tensors = FourBit.quantised(seeded(m, n, dtype=torch.float32), "nf4")
    packed, exact = tuple(tensors), layout.dense(*tensors).double()
    layout = replace(layout, dtype=dtype)
    x, dy = seeded(b, n, seed=1, dtype=dtype, grad=True), seeded(b, m, seed=2, dtype=dtype)
    A, B = seeded(r, n, seed=3, dtype=torch.float32, grad=True), seeded(m, r, seed=4, dtype=torch.float32, grad=True)
    bias = seeded(m, seed=5, dtype=dtype)
    y = lora_linear(x, A, B, 0.3, bias, layout, packed, forward, backward)  # type: ignore[arg-type]
    y.backward(dy)
    want = by_hand(*(t.detach().double() for t in (x, exact, A, B)), 0.3, bias.double(), dy.double())
    for got, name in ((y, "y"), (x.grad, "x"), (A.grad, "A"), (B.grad, "B")):
        error = (got.detach().double() - want[name]).norm() / want[name].norm()
        assert error < (8 if dtype is torch.float32 else 1) * torch.finfo(dtype).eps, (name, float(error))


@pytest.mark.parametrize("forward", [None, *FORWARDS])
def test_a_base_in_4_bits_is_the_layer_itself_where_nothing_was_learned(forward: str | None):
    layout, tensors = FourBit.quantised(seeded(24, 64, dtype=torch.bfloat16), "nf4")
    for b in (1, 3, 200):
        x, A, B = (seeded(*s, dtype=torch.bfloat16) for s in ((b, 64), (4, 64), (24, 4)))
        y = lora_linear(x, A, torch.zeros_like(B), 0.3, None, layout, tuple(tensors), forward)  # type: ignore[arg-type]
        assert torch.equal(y, frozen_linear(x, None, layout, tuple(tensors)))


def test_the_order_that_runs_on_a_base_in_4_bits(monkeypatch: pytest.MonkeyPatch):
    """Merged with many tokens, in forward and backward, and nothing is added onto y or dX; and as asked for."""
    merges: list[torch.dtype] = []
    usual = FourBitLayout.merged

    def merged(layout: FourBitLayout, B: Tensor, *rest: Tensor) -> Tensor:
        merges.append(B.dtype)
        return usual(layout, B, *rest)

    monkeypatch.setattr(FourBitLayout, "merged", merged)
    layout, tensors = FourBit.quantised(seeded(24, 64, dtype=torch.bfloat16), "nf4")
    orders = [(200, (), 2), (1, (), 0), (200, ("f1", "b1s"), 0), (1, ("f2", "b1"), 1), (1, ("f1", "b4"), 1)]
    for b, order, count in orders:
        merges.clear()
        x, A, B = (seeded(*s, dtype=torch.bfloat16, grad=True) for s in ((b, 64), (20, 64), (24, 20)))
        with Kernels() as kernels:
            lora_linear(x, A, B, 0.3, None, layout, tuple(tensors), *order).sum().backward()  # type: ignore[arg-type]
        assert merges == [torch.bfloat16] * count
        if b == 200 and not order:
            assert "addmm" not in kernels.names


@pytest.mark.parametrize("how", ["autocast", "bf16 base", "fp16 base"])
def test_wide_factors_of_a_narrow_layer(how: str):
    """Value within a few roundings of the compute dtype; gradients of fp32 factors are fp32 and as close."""
    dtype = torch.float16 if how == "fp16 base" else torch.bfloat16
    narrow = torch.float32 if how == "autocast" else dtype
    b, n, m, r = 12, 16, 8, 4
    x, W, bias = seeded(b, n, dtype=narrow, grad=True), seeded(m, n, seed=1, dtype=narrow), seeded(m, dtype=narrow)
    A, B = (
        seeded(r, n, seed=2, dtype=torch.float32, grad=True),
        seeded(m, r, seed=3, dtype=torch.float32, grad=True),
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        y = lora_linear(x, A, B, 0.5, bias, Plain(), (W,))
    assert y.dtype == dtype
    dy = seeded(b, m, seed=5, dtype=dtype)
    y.backward(dy)
    assert (A.grad.dtype, B.grad.dtype, x.grad.dtype) == (torch.float32, torch.float32, narrow)
    up = [t.detach().double() for t in (x, W, A, B)]
    want = by_hand(*up, 0.5, bias.double(), dy.double())
    for got, name in ((y, "y"), (x.grad, "x"), (A.grad, "A"), (B.grad, "B")):
        error = (got.detach().double() - want[name]).norm() / want[name].norm()
        assert error < 4 * torch.finfo(dtype).eps, (
            name
        )  # bf16 2⁻⁷, fp16 2⁻¹⁰: inputs, Z or S and the result are rounded


def test_autocast_equals_the_plain_composition():
    x = seeded(6, 8, dtype=torch.float32, grad=True)
    W, A, B = (seeded(*s, seed=i, dtype=torch.float32) for i, s in enumerate([(4, 8), (2, 8), (4, 2)], 1))
    with torch.autocast("cpu", torch.bfloat16):
        fused = lora_linear(x, A, B, 1.0, None, Plain(), (W,))
        plain = nn.functional.linear(x, W) + nn.functional.linear(nn.functional.linear(x, A), B)
    assert fused.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(fused, plain, rtol=2**-6, atol=2**-5)


def test_second_derivatives_are_refused():
    x, W, A, B = seeded(4, 5, grad=True), seeded(3, 5), seeded(2, 5, grad=True), seeded(3, 2, grad=True)
    y = lora_linear(x, A, B, 1.0, None, Plain(), (W,))
    (gx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable"):
        gx.sum().backward()


# ---- memory and kernels


def saved_bytes(model: nn.Module, x: Tensor, autocast: bool = False) -> int:
    """Bytes kept for backward: unique storages, parameters and x's own storage included once, parameters excluded."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    alive = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: alive.append(t) or pack(t), lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        alive.append(model(x))
    return sum(kept.values())


B_, N, M, R = 6, 32, 24, 4  # few tokens: the order is f1 with Z saved


def layer(dtype: torch.dtype, **fields: object) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(N, M, dtype=dtype))
    rs.attach(model, rs.LoRA(rank=R, targets="0", **fields))  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("input_grad", [True, False])
def test_saved_bytes_of_lora(dtype: torch.dtype, input_grad: bool):
    """b·n·e for X and b·r·e for Z; fp32 factors of a bf16 layer cost no fp32 copy of X."""
    model = layer(dtype)
    x = torch.randn(B_, N, dtype=dtype, requires_grad=input_grad)
    assert saved_bytes(model, x) == B_ * (N + R) * dtype.itemsize


def test_saved_bytes_under_autocast():
    """X is kept in the dtype it is multiplied in."""
    model = layer(torch.float32)
    assert saved_bytes(model, torch.randn(B_, N), autocast=True) == B_ * (N + R) * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [B_, 10 * N])
def test_lora_fa_frees_its_input(dtype: torch.dtype, tokens: int):
    model = layer(dtype, train="B")
    x = torch.randn(tokens, N, dtype=dtype, requires_grad=True)
    assert saved_bytes(model, x) == tokens * R * dtype.itemsize


def test_merged_orders_keep_the_input_alone():
    """RunLoRA's claim: with many tokens XA is not saved."""
    model = layer(torch.float32)
    tokens = 10 * N
    assert saved_bytes(model, torch.randn(tokens, N, requires_grad=True)) == tokens * N * 4


def test_saved_bytes_of_dora():
    """X and Z as in LoRA, and W x + s·B(A x) with its factor of each row, from which the magnitude learns."""
    for dtype in (torch.float32, torch.bfloat16):
        model = layer(dtype, dora=True)
        vectors = M * dtype.itemsize + (M * 4)  # μ/‖·‖ in the layer's dtype, 1/‖·‖ in fp32
        x = torch.randn(B_, N, dtype=dtype, requires_grad=True)
        kept = saved_bytes(model, x)
        assert B_ * (N + R + M) * dtype.itemsize <= kept <= B_ * (N + R + M) * dtype.itemsize + vectors


def test_no_input_is_kept_without_gradients():
    model = layer(torch.float32)
    with torch.no_grad():
        assert saved_bytes(model, torch.randn(B_, N)) == 0


class Kernels(TorchDispatchMode):
    """Counts aten calls that compute: views and detaches move no data."""

    FREE = ("view", "t", "transpose", "detach", "expand", "reshape", "_unsafe_view", "alias", "unsqueeze", "permute")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        if name not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels(dtype: torch.dtype):
    """Forward: scale A, Z, W, B (and two casts); backward: scale A, S, dA, its scale, dB, dX twice. PEFT needs more."""
    peft = pytest.importorskip("peft")

    def count(model: nn.Module) -> int:
        x = torch.randn(B_, N, dtype=dtype, requires_grad=True)
        with Kernels() as kernels:
            y = model(x)
            torch.autograd.backward(y, torch.ones_like(y.detach()))
        kernels.names.remove("ones_like")
        return len(kernels.names)

    ours = count(layer(dtype))
    config = peft.LoraConfig(r=R, lora_alpha=8, target_modules=["0"])
    theirs = count(peft.get_peft_model(nn.Sequential(nn.Linear(N, M, dtype=dtype)), config))
    assert ours <= (11 if dtype is torch.float32 else 17)
    assert ours <= theirs


# ---- torch.compile


@pytest.mark.parametrize("fields", [{}, {"dora": True}, {"init": "pissa"}, {"train": "B"}], ids=str)
def test_compiles_whole(fields: dict):
    torch._dynamo.reset()
    model = layer(torch.float32, **fields)
    adapter = model[0]["default"]
    with torch.no_grad():
        adapter.B.normal_()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(B_, N, requires_grad=True)
    leaves = [x, *(p for p in adapter.parameters() if p.requires_grad)]
    plain = model(x)
    y = compiled(x)
    torch.testing.assert_close(y, plain)
    want = torch.autograd.grad(plain.square().sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), leaves), want)


@pytest.mark.parametrize("order", [(), ("f2", "b5"), ("f2", "b1"), ("f1", "b4")], ids=str)
def test_compiles_whole_on_a_base_in_4_bits(order: tuple[str, ...]):
    """One graph; codes are kept, not the weight nor what it is merged to."""
    torch._dynamo.reset()
    layout, tensors = FourBit.quantised(seeded(64, 96, dtype=torch.bfloat16), "nf4")

    def layer(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return lora_linear(x, A, B, 0.3, None, layout, tuple(tensors), *order)  # type: ignore[arg-type]

    leaves = [seeded(*s, seed=i, dtype=torch.bfloat16, grad=True) for i, s in enumerate([(9, 96), (4, 96), (64, 4)])]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition")
    plain, y = layer(*leaves), compiled(*leaves)
    kept = [t for t in y.grad_fn.saved_tensors if t.numel() > 9 * 96]  # type: ignore[union-attr]
    assert [(t.shape, t.dtype) for t in kept] == [(tensors[0].shape, torch.uint8)]
    dy = seeded(9, 64, seed=7, dtype=torch.bfloat16)
    wanted, found = ([out, *torch.autograd.grad(out, leaves, dy)] for out in (plain, y))
    for got, want in zip(found, wanted, strict=True):
        assert (got - want).double().norm() < 2**-7 * want.double().norm()


def test_compiles_for_any_number_of_tokens():
    """The order depends on how many there are: one graph an order, not one a batch."""
    torch._dynamo.reset()
    model, graphs = layer(torch.float32), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (3, 5, 9, 17, 23, 40, 80, 81):
        x = torch.randn(tokens, N, requires_grad=True)
        torch.testing.assert_close(compiled(x), model(x))
    assert len(graphs) <= 4


def test_switching_back_and_forth_does_not_recompile():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(N, M), nn.ReLU(), nn.Linear(M, N))
    run = rs.attach(model, rs.LoRA(rank=R, targets=("0", "2")))
    run.add("other", rs.LoRA(rank=2, targets=("0", "2")))
    for adapters in run.adapter("other"), run.adapter():
        for adapter in adapters.values():
            torch.nn.init.normal_(adapter.B)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(B_, N)

    def use(*names: str) -> None:
        run.use(*names)
        torch.testing.assert_close(compiled(x), model(x))

    for names in (("default",), ("other",), ("default", "other"), ()):
        use(*names)
    seen = len(graphs)
    assert seen <= 4
    for names in ((), ("other",), ("default",), ("default", "other"), ("other",)):
        use(*names)
    assert len(graphs) == seen


def test_columns_beside_four_bits_count_in_every_order():
    """What is added before it is rounded are the codes; columns held beside them are none of those."""
    W, at = seeded(64, 128, seed=1, dtype=torch.bfloat16), torch.tensor([3, 70])
    layout, tensors = FourBit.quantised(W, "nf4")
    columns = 20 * seeded(64, 2, seed=2, dtype=torch.bfloat16)
    A, B = seeded(4, 128, seed=3, dtype=torch.float32), seeded(64, 4, seed=4, dtype=torch.float32)
    x, dy = seeded(4096, 128, seed=5, dtype=torch.bfloat16, grad=True), seeded(4096, 64, seed=6, dtype=torch.bfloat16)
    whole = layout.dense(*tensors).double().index_copy_(1, at, columns.double()) + B.double() @ A.double()
    y = lora_linear(x, A, B, 1.0, None, layout.beside, (columns, at, *tensors))
    y.backward(dy)
    for got, want in ((y, x.double() @ whole.t()), (x.grad, dy.double() @ whole)):
        assert float((got.double() - want).norm() / want.norm()) < 0.01
