"""8 bits as floating point: what is rounded and to what, written out by hand; its products; its layer."""

from __future__ import annotations

import copy
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import rankshift as rs
from rankshift.core.base import Dense, storage_of
from rankshift.core.errors import ConfigError, UnsupportedLayer
from rankshift.core.form import Form
from rankshift.ops import fp8 as products
from rankshift.ops.fp8 import op, reference
from rankshift.ops.lora_linear import lora_linear
from rankshift.ops.paca_linear import paca_linear
from rankshift.storage import fp8, held_as
from rankshift.storage.fp8 import FP8, FP8Linear

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SHAPES = [(24, 40), (1, 1), (5, 7), (17, 130)]
TOLERANCE = {BF16: 1e-2, FP16: 2e-3, FP32: 1e-5, FP64: 1e-12}
SCALINGS, BACKWARDS = ("row", "tensor"), ("fp8", "bf16")


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = FP64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FP64).to(dtype)


def linear(out: int, into: int, dtype: torch.dtype = FP32, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(into, out, bias, dtype=dtype).requires_grad_(False)
    layer.weight.copy_(seeded(out, into, seed=1) * torch.logspace(-3, 0, out, dtype=FP64)[:, None])
    if bias:
        layer.bias.copy_(seeded(out, seed=2) * 0.1)
    return layer


def ours(layer: nn.Linear, keep: Tensor | None = None, scaling: str = "row", backward: str = "fp8") -> FP8:
    return FP8.of(Dense(layer, Form()), "fp8", keep, scaling=scaling, backward=backward)


def e4m3(x: Tensor) -> Tensor:
    """The nearest number of four bits of exponent (least 2⁻⁶) and three of mantissa, written out in float64."""
    exponent = torch.floor(torch.log2(x.abs().clamp_min(2.0**-60))).clamp_min(-6)
    step = torch.exp2(exponent - 3)
    return torch.round(x / step) * step  # to even, where it is between


def rounded(x: Tensor, scaling: str) -> Tensor:
    """x as it is multiplied: brought to size in fp32, which decides what lies in the middle."""
    x = x.to(FP32)
    size = (x.abs().amax(1, keepdim=True) if scaling == "row" else x.abs().amax()) / 448
    return e4m3((x * (1 / size)).to(FP64)) * size.to(FP64)


def close(value: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """To the dtype's rounding of the largest of each row."""
    size = want.abs().amax(-1, keepdim=True).to(FP64)
    bound = TOLERANCE[dtype] * size + (6e-8 if dtype is FP16 else 1e-30)  # fp16 is denormal below 6e-5
    apart = (value.to(FP64) - want.to(FP64)).abs()
    assert (apart <= bound).all(), (apart / bound).max()


# ---- the weight


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
def test_the_weight_is_rounded_to_the_nearest(shape: tuple[int, int], dtype: torch.dtype, scaling: str) -> None:
    layer = linear(*shape, dtype)
    base, want = ours(layer, scaling=scaling), rounded(layer.weight, scaling)
    assert base.dense().dtype is dtype
    codes = base.codes.view(torch.float8_e4m3fn).to(FP64)
    assert codes.abs().amax() == 448
    assert base.scales.shape == ((shape[0],) if scaling == "row" else (1,))
    exact = codes * base.scales.view(FP32).to(FP64)[:, None]
    # numbers so near to the middle that fp32 rounds them there
    assert ((exact - want).abs() <= 1e-6 * want.abs()).to(FP64).mean() > 0.99
    assert (
        (exact - layer.weight).abs() <= layer.weight.abs() / 16 * 1.001 + 2.0**-9 * base.scales.view(FP32)[:, None]
    ).all()
    close(base.dense(), exact, dtype)
    assert torch.equal(base.transposed, base.codes.t())


def test_bytes() -> None:
    def held(base: FP8) -> int:
        return sum(p.numel() * p.element_size() for p in base.parameters())

    layer = linear(64, 128, bias=False)
    assert held(ours(layer)) == 2 * 64 * 128 + 64 * 4
    assert held(ours(layer, backward="bf16")) == 64 * 128 + 64 * 4
    assert held(ours(layer, backward="bf16", scaling="tensor")) == 64 * 128 + 4
    base = ours(layer)
    assert {p.dtype for p in base.parameters()} == {torch.uint8, torch.int32}, "a float would be cast by FSDP2"


def test_rows_of_zeros_and_what_is_not_finite() -> None:
    layer = linear(4, 6, BF16)
    layer.weight[1] = 0
    base = ours(layer)
    assert not base.dense()[1].any()
    assert torch.equal(base.linear(torch.zeros(2, 6, dtype=BF16)), layer.bias.expand(2, 4))
    for value in (torch.inf, torch.nan):
        x = seeded(3, 6, dtype=BF16)
        x[1, 2] = value
        y = base.linear(x)
        assert y[1].isnan().all(), "a loss that is not finite must be seen"
        assert y[[0, 2]].isfinite().all()
        layer.weight[1, 1] = value
        with pytest.raises(UnsupportedLayer, match="not finite"):
            ours(layer)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_a_row_that_is_not_finite_is_nan_in_both_products(value: float, scaling: str) -> None:
    """Its size already: no code could say that it overflowed. With one size for all, every row is."""
    base, codes_of = ours(linear(12, 20, BF16), scaling=scaling), f"rounded_{'rows' if scaling == 'row' else 'whole'}"
    x, dy = seeded(3, 20, seed=3, dtype=BF16), seeded(3, 12, seed=4, dtype=BF16)
    x[1, 2], dy[2, 5] = value, value
    lost = (slice(1, 2), slice(2, 3)) if scaling == "row" else (slice(0, 3), slice(0, 3))
    for numbers, rows in ((x, lost[0]), (dy, lost[1])):
        codes, sizes = getattr(products, codes_of)(numbers)
        which = torch.zeros(3, dtype=torch.bool)
        which[rows] = True
        assert torch.equal(sizes.isnan().expand(3), which)
        assert torch.equal(codes.to(FP32).isnan().all(1), which)
    leaf = x.clone().requires_grad_()
    y = base.linear(leaf)
    y.backward(dy)
    for found, rows in ((y, lost[0]), (leaf.grad, lost[1])):
        which = torch.zeros(3, dtype=torch.bool)
        which[rows] = True
        assert torch.equal(found.isnan().all(1), which)
        assert found[~which].isfinite().all()


# ---- products


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_16_bit_factors_are_rounded(
    shape: tuple[int, int], dtype: torch.dtype, bias: bool, scaling: str, backward: str
) -> None:
    layer = linear(*shape, dtype, bias)
    base = ours(layer, scaling=scaling, backward=backward)
    codes, scales = base.codes.view(torch.float8_e4m3fn).to(FP64), base.scales.view(FP32).to(FP64)
    W = codes * scales[:, None]
    x = seeded(2, 3, shape[1], seed=3, dtype=dtype) * torch.logspace(-2, 2, 3, dtype=dtype)[:, None]
    dy = seeded(2, 3, shape[0], seed=4, dtype=dtype) * torch.logspace(2, -2, 3, dtype=dtype)[:, None]
    leaf, kept = x.clone().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = base.linear(leaf)
    y.backward(dy)
    X, G = rounded(x.flatten(0, 1), scaling), dy.flatten(0, 1)
    want = (X @ W.t()).view(2, 3, -1)
    close(base.product(x), want, dtype)
    close(y.detach(), want + layer.bias.to(FP64) if bias else want, dtype)
    if backward == "fp8":
        dX = rounded(G * scales.to(FP32), scaling) @ codes if scaling == "row" else rounded(G, scaling) @ W
    else:
        dX = G.to(FP64) @ W
    close(leaf.grad, dX.view(2, 3, -1), dtype)
    assert y.dtype is dtype
    assert leaf.grad.dtype is dtype
    assert {t.data_ptr() for t in kept} == {p.data_ptr() for p in base.packed}, "codes, by reference"


@pytest.mark.parametrize("backward", BACKWARDS)
def test_it_is_near_to_the_layer_that_it_stands_for(backward: str) -> None:
    layer = linear(64, 256, BF16)
    base = ours(layer, backward=backward)
    x, dy = seeded(32, 256, seed=3, dtype=BF16).requires_grad_(), seeded(32, 64, seed=4, dtype=BF16)
    y = base.linear(x)
    y.backward(dy)
    W = layer.weight.to(FP64)
    for value, want in ((y, x.to(FP64) @ W.t() + layer.bias), (x.grad, dy.to(FP64) @ W)):
        error = (value - want).norm() / want.norm()
        assert 0.005 < error < 0.05


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
def test_wide_factors_are_not(dtype: torch.dtype, scaling: str) -> None:
    base = ours(linear(12, 20, dtype), scaling=scaling)
    W = base.codes.view(torch.float8_e4m3fn).to(FP64) * base.scales.view(FP32).to(FP64)[:, None]
    x, dy = seeded(5, 20, seed=3, dtype=dtype).requires_grad_(), seeded(5, 12, seed=4, dtype=dtype)
    y = base.linear(x)
    y.backward(dy)
    close(y.detach(), x.detach().to(FP64) @ W.t() + base.bias.to(FP64), dtype)
    close(x.grad, dy.to(FP64) @ W, dtype)
    with torch.autocast("cpu", BF16):
        narrow = base.linear(x.detach().float())
    assert narrow.dtype is BF16
    close(narrow, rounded(x.detach().to(BF16), scaling) @ W.t() + base.bias.to(FP64), BF16)


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 32])
def test_the_call_of_the_tensor_cores_means_the_reference(
    each: bool, bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch has its operator on the CPU too."""
    monkeypatch.setattr(op, "multiplies", lambda device: True)
    a, sizes = (reference.rounded_rows if each else reference.rounded_whole)(seeded(rows, 32, dtype=BF16))
    b, scales = (reference.rounded_rows if each else reference.rounded_whole)(seeded(48, 32, seed=1, dtype=BF16))
    shift = seeded(48, seed=2, dtype=FP32) if bias else None
    calls: list[int] = []
    call = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **rest: calls.append(1) or call(*args, **rest))
    for dtype in (BF16, FP16):
        y = products.product(a, b, sizes, scales, shift, dtype)
        assert y.dtype is dtype
        want = (a.to(FP64) * sizes[:, None]) @ (b.to(FP64) * scales[:, None]).t() + (0 if shift is None else shift)
        close(y, want, BF16)
    assert len(calls) == 2
    for odd in ((a[:, :31], b[:, :31]), (a, b[:47]), (a[:0], b)):
        size, scale = (sizes[: len(odd[0])], scales[: len(odd[1])]) if each else (sizes, scales)
        y = products.product(*odd, size, scale, None, BF16)
        assert y.shape == (len(odd[0]), len(odd[1]))
    assert len(calls) == 2, "what tensor cores do not take"


def test_lora_beside_it() -> None:
    layer = linear(12, 20, BF16)
    base = ours(layer)
    codes, scales = base.codes.view(torch.float8_e4m3fn).to(FP64), base.scales.view(FP32).to(FP64)
    A, B = seeded(3, 20, seed=5).requires_grad_(), (seeded(12, 3, seed=6) * 0.1).requires_grad_()
    x, dy = seeded(7, 20, seed=3, dtype=BF16).requires_grad_(), seeded(7, 12, seed=4, dtype=BF16)
    y = lora_linear(x, A, B, 0.5, base.bias, base.format, base.packed)
    y.backward(dy)
    X, G, BA = x.detach().to(FP64), dy.to(FP64), 0.5 * B.detach() @ A.detach()
    close(y.detach(), rounded(X, "row") @ (codes * scales[:, None]).t() + X @ BA.t() + layer.bias.to(FP64), BF16)
    close(x.grad, rounded(G * scales, "row") @ codes + G @ BA, BF16)
    close(A.grad, 0.5 * B.detach().t() @ G.t() @ X, BF16)
    close(B.grad, 0.5 * G.t() @ X @ A.detach().t(), BF16)


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@pytest.mark.parametrize("forward", ["f1", "f2"])
@pytest.mark.parametrize("backward", ["b1s", "b4", "b5"])
def test_every_order_of_lora_is_the_same_layer(dtype: torch.dtype, forward: str, backward: str) -> None:
    """Those that merge read the weight; they are for wide dtypes only, where nothing else is rounded."""
    base = ours(linear(12, 20, dtype))
    W = base.codes.view(torch.float8_e4m3fn).to(FP64) * base.scales.view(FP32).to(FP64)[:, None]
    A, B = seeded(3, 20, seed=5, dtype=dtype), seeded(12, 3, seed=6, dtype=dtype)
    x, dy = seeded(7, 20, seed=3, dtype=dtype).requires_grad_(), seeded(7, 12, seed=4, dtype=dtype)
    y = lora_linear(x, A, B, 0.5, None, base.format, base.packed, forward, backward)  # type: ignore[arg-type]
    y.backward(dy)
    merged = W + 0.5 * B.to(FP64) @ A.to(FP64)
    close(y.detach(), x.detach().to(FP64) @ merged.t(), dtype)
    close(x.grad, dy.to(FP64) @ merged, dtype)


def test_an_input_that_was_made_narrower_decides() -> None:
    """FSDP2's mixed precision casts the input of a layer that was loaded in fp32; a wider one is cast as ever."""
    wide, narrow = ours(linear(12, 20, FP32)), ours(linear(12, 20, BF16))
    x = seeded(5, 20, seed=3, dtype=BF16)
    W = wide.codes.view(torch.float8_e4m3fn).to(FP64) * wide.scales.view(FP32).to(FP64)[:, None]
    y = wide.linear(x)
    assert y.dtype is BF16
    close(y, rounded(x, "row") @ W.t() + wide.bias.to(FP64), BF16)
    assert torch.equal(narrow.linear(x.float()), narrow.linear(x).float())


# ---- columns beside


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("late", [False, True], ids=["kept", "lent"])
def test_columns_beside_are_multiplied_by_themselves(
    scaling: str, backward: str, dtype: torch.dtype, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the codes have zeros in their place or the columns' old values."""
    layer, at = linear(12, 20, dtype), torch.tensor([2, 3, 19])
    columns = seeded(12, 3, seed=9, dtype=dtype)
    base = ours(layer, None if late else at, scaling, backward)
    if late:
        assert torch.equal(base.columns(at, slice(0, 12)), base.dense()[:, at])
        base.house(Mock())
    else:
        assert torch.equal(base.columns(at, slice(0, 12)), layer.weight[:, at])
        assert not base.codes[:, at].any()
    base.put_(at, columns)
    codes, scales = base.codes.view(torch.float8_e4m3fn).to(FP64), base.scales.view(FP32).to(FP64)
    codes[:, at] = 0
    W = codes * scales[:, None]
    if dtype is BF16 and backward == "fp8":
        monkeypatch.setattr(fp8.FP8Layout, "dense", lambda *_: pytest.fail("the weight was formed"))
    x, dy = seeded(5, 20, seed=3, dtype=dtype).requires_grad_(), seeded(5, 12, seed=4, dtype=dtype)
    D = torch.zeros(12, 3, dtype=FP64, requires_grad=True)
    y = paca_linear(x, D, 0.5, at, base.bias, base.format, base.packed)
    y.backward(dy)
    X, G, P = x.detach().to(FP64), dy.to(FP64), columns.to(FP64)
    narrow = dtype is not FP64
    main = (rounded(X.index_fill(1, at, 0), scaling) if narrow else X) @ W.t()
    close(y.detach(), main + X[:, at] @ P.t() + layer.bias.to(FP64), dtype)
    if narrow and backward == "fp8":
        dX = rounded(G * scales, "row") @ codes if scaling == "row" else rounded(G, scaling) @ W
    else:
        dX = G @ W
    dX[:, at] = G @ P
    close(x.grad, dX, dtype)
    close(D.grad, 0.5 * G.t() @ X[:, at], dtype)


def test_the_compiler_takes_columns_beside() -> None:
    """inductor knows no other view of a tensor that it has not made."""
    layer = nn.Sequential(nn.Linear(32, 16, dtype=BF16))
    rs.attach(layer, rs.PaCA(rank=4, targets="0"), base="fp8")
    x = seeded(5, 32, dtype=BF16).requires_grad_()
    torch.compile(layer)(x).sum().backward()
    got, x.grad = x.grad, None
    layer(x).sum().backward()
    torch.testing.assert_close(got, x.grad, rtol=0.02, atol=0.02)


def test_columns_that_were_only_borrowed_leave_the_bits() -> None:
    base, at = ours(linear(12, 20, BF16)), torch.tensor([1, 4])
    before = base.codes.clone()
    base.put_(at, base.columns(at, slice(0, 12)))
    assert base.columns_beside is not None
    assert torch.equal(base.plain().codes, before)
    base.house(Mock())
    base.put_(at, torch.full((12, 2), 9.0))
    again = FP8.over(base.plain()).dense()
    assert torch.equal(again[:, at], torch.full((12, 2), 9.0, dtype=BF16)), "the largest of its row is exact"


# ---- writing


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_what_is_added_is_rounded_once(dtype: torch.dtype, beside: bool, scaling: str) -> None:
    layer, at = linear(12, 20, dtype), torch.tensor([0, 7])
    base = ours(layer, at if beside else None, scaling)
    before, delta = base.dense().to(FP64), seeded(12, 20, seed=8, dtype=FP32) * 0.01
    codes = base.codes.view(torch.float8_e4m3fn).float()
    base.add_(lambda rows: torch.zeros(12, 20)[rows])
    assert torch.equal(base.codes.view(torch.float8_e4m3fn).float(), codes), "rounding what is rounded changed it"
    base.add_(lambda rows: delta[rows])
    assert base.changed
    assert torch.equal(base.transposed, base.codes.t())
    want = before + delta
    step = base.scales.view(FP32).to(FP64)[:, None] * 2.0**-9
    assert ((base.dense() - want).abs() <= want.abs() * (1 / 16 + 0.01) + step).all()
    if beside:
        close(base.dense()[:, at], want[:, at], dtype)


# ---- the layer


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("bias", [True, False])
def test_its_layer_is_given_back_and_taken(scaling: str, backward: str, bias: bool) -> None:
    base = ours(linear(16, 32, BF16, bias), scaling=scaling, backward=backward)
    x = seeded(3, 32, seed=3, dtype=BF16)
    layer = base.plain()
    assert type(layer) is FP8Linear
    assert torch.equal(layer(x), base.linear(x))
    assert storage_of(layer) is FP8
    assert FP8.describe(layer) == {"kind": "fp8", "scaling": scaling, "backward": backward}
    assert FP8.measure(layer) == (16, 32, BF16, torch.device("cpu"))
    taken = FP8.over(layer)
    assert taken.layout == base.layout
    assert [t.data_ptr() for t in taken.packed] == [t.data_ptr() for t in base.packed], "copied"
    assert taken.bias is layer.bias
    fresh = FP8Linear(32, 16, bias, BF16, scaling, backward)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), base.linear(x))
    twin = copy.deepcopy(base)
    assert twin.codes.data_ptr() != base.codes.data_ptr()
    assert torch.equal(twin.linear(x), base.linear(x))
    assert f"backward='{backward}'" in repr(layer)
    dense = base.dequantised()
    assert torch.equal(dense.weight, base.dense())


def test_options_that_it_does_not_know() -> None:
    assert held_as("fp8") is FP8
    for options in ({"scaling": "block"}, {"backward": "e5m2"}):
        with pytest.raises(ConfigError, match="knows"):
            FP8Linear(4, 4, **options)
        with pytest.raises(ConfigError, match="knows"):
            FP8.of(Dense(linear(4, 4), Form()), "fp8", **options)


def test_a_gpu_that_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    for capability, fits in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)):
        op._capable.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        if fits:
            FP8.check({torch.device("cpu"), device})
        else:
            with pytest.raises(ConfigError, match=r"A100.*8\.9"):
                FP8.check({torch.device("cpu"), device})
    op._capable.cache_clear()


def test_a_model_on_such_a_gpu_is_refused_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "multiplies", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with FakeTensorMode():  # weights that only say they are on a GPU
        model = nn.Sequential(*(nn.Linear(16, 16, bias=False, device="meta") for _ in range(2)))
        for layer in model:
            layer.weight = nn.Parameter(torch.empty(16, 16, device="cuda"))
        before = [*model.modules(), *model.parameters()]
        with pytest.raises(ConfigError, match=r"A100.*8\.9"):
            rs.attach(model, rs.LoRA(rank=2, targets=["0"]), base="fp8")
        assert [*map(id, (*model.modules(), *model.parameters()))] == [*map(id, before)]
        assert all(parameter.requires_grad for parameter in model.parameters())
        taken = FP8Linear(16, 16, device="cuda")
        with pytest.raises(ConfigError, match=r"A100.*8\.9"):
            FP8.over(taken)
        model[1] = taken
        before = [*model.modules(), *model.parameters()]
        with pytest.raises(ConfigError, match=r"A100.*8\.9"):
            rs.attach(model, rs.LoRA(rank=2, targets=["0"]))
        assert [*map(id, (*model.modules(), *model.parameters()))] == [*map(id, before)]
        assert model[0].weight.requires_grad


def test_after_a_move_to_such_a_gpu_a_product_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be computed in fp32, and slowly; on the CPU it is."""
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    op._capable.cache_clear()
    layer = FP8Linear(16, 16, dtype=BF16)
    assert layer(seeded(4, 16, dtype=BF16)).shape == (4, 16)
    with FakeTensorMode():  # tensors that only say they are on a GPU
        codes = torch.empty(16, 16, dtype=op.E4M3, device="cuda")
        sizes = torch.empty(16, device="cuda")
        with pytest.raises(ConfigError, match=r'base="fp8".*A100.*8\.9.*base="nf4"'):
            op.product(codes, codes, sizes, sizes, None, BF16)
    op._capable.cache_clear()


def test_compiled_it_is_one_graph() -> None:
    base, at = ours(linear(16, 32, BF16)), torch.tensor([1, 4])
    x = seeded(8, 32, seed=3, dtype=BF16)
    for _ in range(2):
        want = base.linear(x)
        compiled = torch.compile(base.linear, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), want)
        base.columns(at, slice(0, 16))


def test_without_a_tenant_lent_columns_are_those_of_the_codes() -> None:
    """To the bit: beside they are multiplied in 16 bits."""
    model = nn.Sequential(ours(linear(16, 32, BF16)).plain())
    x = seeded(8, 32, seed=3, dtype=BF16)
    before = model(x)
    run = rs.attach(model, rs.PaCA(rank=4, targets=["0"]))
    optimizer = run.optimizer(lr=0.1)
    for _ in range(2):
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = model(x)
    assert not torch.equal(trained, before)
    with run.disabled():
        assert torch.equal(model(x), before)
    assert torch.equal(model(x), trained)
    assert torch.equal(run.detach()(x), before)
