"""The linear layer with a projected gradient: value, gradients, what it keeps, what it forms, one graph."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from rankshift.ops.projected_linear import Listener, op, projected_linear, reference

SHAPES = [(0, 5), (1, 5), (7, 5), (2, 3, 5), (2, 1, 4, 5), (5,)]
F64 = torch.float64


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = F64, grad: bool = False) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return values.to(dtype).requires_grad_(grad)


def listening(yes: bool = True) -> Listener:
    listener = Listener()
    listener.start(yes)
    return listener


class Layer(nn.Module):
    """A linear layer n → m as methods hold it."""

    def __init__(self, n: int, m: int, r: int, on_input: bool, seed: int = 0, dtype: torch.dtype = F64) -> None:
        super().__init__()
        length, s = (m, n) if on_input else (n, m)
        wide = torch.promote_types(dtype, torch.float32)
        self.weight = nn.Parameter(seeded(m, n, seed=seed, dtype=dtype) / n**0.5, requires_grad=False)
        self.bias = nn.Parameter(seeded(m, seed=seed + 1, dtype=dtype))
        self.X = nn.Parameter(torch.zeros(length, r, dtype=wide))
        self.Q = nn.Parameter(seeded(s, r, seed=seed + 2, dtype=wide), requires_grad=False)
        self.on_input, self.listener = on_input, Listener()

    def forward(self, x: Tensor) -> Tensor:
        return projected_linear(x, self.weight, self.bias, self.X, self.Q, self.on_input, self.listener)


def check(x: Tensor, m: int, r: int, flags: tuple[bool, bool, bool, bool, bool]) -> None:
    """Against F.linear, and autograd's own gradient of the dense weight."""
    need_x, need_X, has_bias, on_input, listens = flags
    n = x.shape[-1]
    W, bias = seeded(m, n, seed=1), seeded(m, seed=2, grad=True) if has_bias else None
    Q = seeded(n if on_input else m, r, seed=3)
    X = torch.zeros(m if on_input else n, r, dtype=F64, requires_grad=need_X)
    x, listener = x.detach().requires_grad_(need_x), listening(listens)
    y = projected_linear(x, W, bias, X, Q, on_input, listener)
    plain_x, plain_W = x.detach().clone().requires_grad_(), W.clone().requires_grad_()
    plain_bias = None if bias is None else bias.detach().clone().requires_grad_()
    plain = F.linear(plain_x, plain_W, plain_bias)
    torch.testing.assert_close(y, plain)
    dy = seeded(*y.shape, seed=7)
    plain.backward(dy)
    G = plain_W.grad
    want = {"x": plain_x.grad, "X": (G if on_input else G.t()) @ Q}
    leaves = {"x": x, "X": X} | ({} if bias is None else {"bias": bias})
    want |= {} if plain_bias is None else {"bias": plain_bias.grad}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if not leaves:
        assert not y.requires_grad
        return
    for name, grad in zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True):
        torch.testing.assert_close(grad, want[name], rtol=1e-9, atol=1e-9, msg=lambda t, name=name: f"{name}: {t}")
    if listens and need_X:
        torch.testing.assert_close(listener.gradient, G)
    else:
        assert listener.gradient is None


def test_value_and_gradients() -> None:
    for shape in SHAPES:
        for flags in itertools.product((True, False), repeat=5):
            check(seeded(*shape), 3, 2, flags)


def test_inputs_that_are_not_contiguous() -> None:
    wide = seeded(6, 4, 10)
    for x in (wide[..., ::2], wide.transpose(0, 1)[..., :5], seeded(5, 9).t(), wide[:, :1].expand(6, 3, 10)[..., 5:]):
        assert not x.is_contiguous()
        check(x, 8, 3, (True, True, True, True, True))
        check(x, 8, 3, (True, True, True, False, True))


@settings(max_examples=40, deadline=None)
@given(
    t=st.integers(0, 70), n=st.integers(1, 33), m=st.integers(1, 33), r=st.integers(1, 40),
    flags=st.tuples(*[st.booleans()] * 5),
)  # fmt: skip
def test_any_shape(t: int, n: int, m: int, r: int, flags: tuple[bool, bool, bool, bool, bool]) -> None:
    check(seeded(t, n), m, r, flags)


@pytest.mark.parametrize("on_input", [True, False])
def test_the_reference_is_the_chain_rule(on_input: bool) -> None:
    """dX is the gradient of W + X Qᵀ with respect to X, which autograd takes by itself."""
    x, W, X = seeded(2, 3, 5, grad=True), seeded(4, 5, seed=1), seeded(4 if on_input else 5, 2, seed=2, grad=True)
    Q, dy = seeded(5 if on_input else 4, 2, seed=3), seeded(2, 3, 4, seed=4)
    moved = X @ Q.t() if on_input else Q @ X.t()
    dx, dX = torch.autograd.grad(F.linear(x, W + moved), (x, X), dy)
    got = reference.gradients(x, W + moved, Q, dy, on_input)
    torch.testing.assert_close(got[0], dx)
    torch.testing.assert_close(got[1], dX)


def test_the_bits_are_those_of_the_plain_layer() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for on_input in (True, False):
            layer = Layer(20, 12, 3, on_input, dtype=dtype)
            x = seeded(2, 9, 20, dtype=dtype, grad=True)
            y, plain = layer(x), F.linear(x, layer.weight, layer.bias)
            assert torch.equal(y, plain)
            dy = seeded(2, 9, 12, seed=3, dtype=dtype)
            mine, theirs = (torch.autograd.grad(out, (x, layer.bias), dy) for out in (y, plain))
            assert torch.equal(mine[0], theirs[0])


def test_second_derivatives_are_refused() -> None:
    x = seeded(4, 5, grad=True)
    (gx,) = torch.autograd.grad(Layer(5, 3, 2, True)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable"):
        gx.sum().backward()


# ---- what is formed and kept

T, N, M, R = 48, 20, 12, 3


class Seen(TorchDispatchMode):
    """Shapes of all that is made, and of what products make."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, ...]] = []
        self.products: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not out._is_view():
            self.made.append(tuple(out.shape))
            if func.name().split(".")[0] in ("aten::mm", "aten::addmm"):
                self.products.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("on_input", [True, False])
@pytest.mark.parametrize("listens", [True, False])
def test_no_gradient_of_the_weight_is_formed(on_input: bool, listens: bool) -> None:
    layer, x = Layer(N, M, R, on_input), seeded(T, N, grad=True)
    layer.listener.start(listens)
    with Seen() as forward, FlopCounterMode(display=False) as flops:
        y = layer(x)
    assert sorted(forward.products) == sorted([(T, M), (T, R)] if on_input else [(T, M)])
    assert flops.get_total_flops() == 2 * T * N * M + on_input * 2 * T * N * R
    with Seen() as backward, FlopCounterMode(display=False) as flops:
        y.backward(torch.ones_like(y))
    small = 2 * T * M * R if on_input else 2 * T * M * R + 2 * T * N * R
    assert flops.get_total_flops() == 2 * T * N * M * (1 + listens) + small
    assert ((M, N) in backward.made) == listens
    assert (M, N) not in forward.made
    assert len(backward.products) == (2 if on_input else 3) + listens


def kept(layer: nn.Module, x: Tensor, autocast: bool = False) -> int:
    """Bytes kept for backward, in unique storages that are not the layer's own."""
    own = {t.untyped_storage().data_ptr() for t in layer.parameters()}
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
        alive.append(layer(x))
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_kept_is_x_in_the_subspace(dtype: torch.dtype) -> None:
    x = seeded(T, N, dtype=dtype, grad=True)
    layer = Layer(N, M, R, True, dtype=dtype)
    assert kept(layer, x) == T * R * dtype.itemsize
    layer.listener.start(True)
    assert kept(layer, x) == T * (R + N) * dtype.itemsize
    assert kept(Layer(N, M, R, False, dtype=dtype), x) == T * N * dtype.itemsize
    with torch.no_grad():
        assert kept(layer, x) == 0


def test_kept_under_autocast() -> None:
    assert kept(Layer(N, M, R, True, dtype=torch.float32), torch.randn(T, N), autocast=True) == T * R * 2


# ---- listening


def test_a_listener_sums_up_passes_until_it_starts_anew() -> None:
    layer, listener = Layer(N, M, R, True), None
    listener = layer.listener
    listener.start(True)
    whole = torch.zeros(M, N, dtype=F64)
    for i in range(3):
        x, dy = seeded(T, N, seed=i), seeded(T, M, seed=10 + i)
        layer(x).backward(dy)
        whole += dy.t() @ x
    torch.testing.assert_close(listener.gradient, whole)
    listener.start(False)
    layer(seeded(T, N)).sum().backward()
    assert listener.gradient is None


def test_a_copy_has_a_listener_of_its_own() -> None:
    layer = Layer(N, M, R, True)
    layer.listener.start(True)
    other = copy.deepcopy(layer)
    assert int(other.listener.number) != int(layer.listener.number)
    other(seeded(T, N)).sum().backward()
    assert layer.listener.gradient is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_hears_the_same(reentrant: bool) -> None:
    heard = []
    for wrapped in (False, True):
        layer, x = Layer(N, M, R, True), seeded(T, N, grad=True)
        layer.listener.start(True)
        y = checkpoint(layer, x, use_reentrant=reentrant) if wrapped else layer(x)
        y.backward(seeded(T, M, seed=9))
        heard.append((layer.listener.gradient, layer.X.grad))
    assert all(torch.equal(a, b) for a, b in zip(*heard, strict=True))


# ---- precision


@pytest.mark.parametrize("on_input", [True, False])
@pytest.mark.parametrize("how", ["autocast", "bf16 base"])
def test_gradients_of_a_narrow_layer_are_summed_wide(how: str, on_input: bool) -> None:
    """X.grad and G are fp32, within the rounding of what is multiplied."""
    t, n, m, r = 64, 16, 24, 4
    narrow = torch.float32 if how == "autocast" else torch.bfloat16
    layer = Layer(n, m, r, on_input, dtype=narrow)
    layer.listener.start(True)
    x = seeded(t, n, dtype=narrow, grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    dy = seeded(t, m, seed=6, dtype=torch.bfloat16)
    y.backward(dy)
    assert layer.X.grad is not None
    assert layer.listener.gradient is not None
    assert layer.X.grad.dtype == layer.listener.gradient.dtype == torch.float32
    exact = x.detach().bfloat16().double(), layer.weight.bfloat16().double(), layer.Q.double(), dy.double()
    _, want_X, want_G = reference.gradients(*exact, on_input)
    for got, want in ((layer.X.grad, want_X), (layer.listener.gradient, want_G)):
        assert (got.double() - want).norm() / want.norm() < 4 * torch.finfo(torch.bfloat16).eps
    assert x.grad is not None
    assert x.grad.dtype == narrow


# ---- compiled


class Block(nn.Module):
    """Three layers, of both sides."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.a, self.b, self.c = Layer(8, 8, 2, True, seed), Layer(8, 6, 2, False, seed + 3), Layer(6, 8, 2, True, 9)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c(torch.tanh(self.b(self.a(x))))


def test_blocks_share_one_graph_whoever_listens_and_one_where_nobody_does() -> None:
    """The first time all layers listen, then each in a window of its own, then nobody, then one again."""
    for listener in list(op._OPEN):  # of models that are gone and not yet collected
        listener.start(False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = nn.Sequential(*(Block(i) for i in range(3))).double()
    compiled = [torch.compile(block, backend="aot_eager", fullgraph=True) for block in model]
    layers = [layer for layer in model.modules() if isinstance(layer, Layer)]
    x = seeded(3, 5, 8, grad=True)
    for listening in (range(1, 10), *([i] for i in range(1, 10)), (), (), [2]):
        results = []
        for blocks in (list(model), compiled):
            model.zero_grad()
            for i, layer in enumerate(layers, 1):
                layer.listener.start(i in listening)
            for micro in range(2):
                h = x + micro
                for block in blocks:
                    h = block(h)
                h.square().sum().backward()
            heard = [layer.listener.gradient for layer in layers]
            assert [g is not None for g in heard] == [i in listening for i in range(1, 10)]
            results.append(
                [p.grad for p in model.parameters() if p.grad is not None] + [g for g in heard if g is not None]
            )
        for plain, mine in zip(*results, strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    assert not any(layer.listener._inputs for layer in layers), "an input is kept for longer than its backward pass"


def test_the_opaque_operations_are_well_formed() -> None:
    listener, x, dy = listening(), seeded(T, N), seeded(T, M, seed=1)
    ticket = op._keep(x, listener.number)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op._keep, (x, listener.number), test_utils=checks)
    for kept, Q, ticket_or_none in ((seeded(T, R), None, ticket), (x, seeded(M, R), None)):
        arguments = (dy, kept, Q, ticket_or_none, listener.number, F64)
        torch.library.opcheck(op._gradient, arguments, test_utils=checks)
