"""The kernels of ops/vector_exchange under Triton's interpreter, on the CPU: see kernels_interpreted.py.

Sums of products of small multiples of powers of two are exact, so that what is compared is compared to the bit.
"""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rankshift as rs
from rankshift.methods import switchlora, switchlora_pool
from rankshift.ops import vector_exchange
from rankshift.ops.vector_exchange import op, reference, triton

CPU = torch.device("cpu")
SHAPES = [[(12, 8)], [(7, 12), (40, 36), (9, 20)], [(33, 16), (5, 8)]]  # (m, n) of layers that go together


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton, "_LENGTH", 16)
    monkeypatch.setattr(triton, "_TILE", (8, 16))
    monkeypatch.setattr(triton, "_BLOCK", (16, 4))
    yield
    gc.collect()  # what was lent is taken back while that is not the driver's


def few_bits(*shape: int, seed: int) -> Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)) * 2.0**-6


def made(shapes: list[tuple[int, int]], r: int) -> list[list[Tensor]]:
    """W, A, B and both pools of each layer."""
    return [
        [few_bits(*size, seed=10 * at + k) for k, size in enumerate(((m, n), (r, n), (m, r), (c, n), (c, m)))]
        for at, ((m, n), c) in enumerate((shape, min(shape)) for shape in shapes)
    ]


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@pytest.mark.parametrize("void", [None, 0.0, 1.0])
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize(("r", "before", "count"), [(2, 0, 1), (4, 3, 1), (4, 1 << 33, 1), (5, 13, 0)], ids=str)
def test_exchanges_are_those_of_the_reference(
    shapes: list[tuple[int, int]], r: int, before: int, count: int, void: float | None
) -> None:
    swaps(shapes, r, [before + 3 * i for i in range(len(shapes))], [count or 1, *[count] * 2][: len(shapes)], void)


@pytest.mark.parametrize("before", [0, 7, 21])
@pytest.mark.parametrize(("r", "counts"), [(16, (8, 3, 0)), (9, (4, 4, 1)), (6, (2, 0, 3))], ids=str)
def test_layers_exchange_as_many_as_they_like(r: int, counts: tuple[int, ...], before: int) -> None:
    swaps([(33, 36), (24, 24), (19, 20)], r, [before, before + 30, 2], list(counts), None)


def swaps(shapes: list[tuple[int, int]], r: int, before: list[int], counts: list[int], void: float | None) -> None:
    layers, want = made(shapes, r), made(shapes, r)
    for layer, start, count in zip(want, before, counts, strict=True):
        reference.swap_(*layer, start, 0 if void else count, 0.5)  # type: ignore[call-arg]
    vector_exchange.swap_(
        known(layers), numbers(*before), numbers(*counts), r, 0.5, CPU, None if void is None else torch.tensor(void)
    )
    for got, expected in zip(layers, want, strict=True):
        assert all(torch.equal(t, e) for t, e in zip(got, expected, strict=True))


def known(layers: list[list[Tensor]]) -> np.ndarray:
    return np.stack(
        [vector_exchange.described(*some[:3], *(pool.data_ptr() for pool in some[3:])) for some in layers], 1
    )


def test_the_reference_keeps_the_product_and_loses_no_vector() -> None:
    """In float64, through several rounds: W + s·BA stays, and rows and candidates together are always the same."""
    W, A, B, pool_A, pool_B = (t.double() for t in made([(11, 9)], 4)[0])
    pool_A[-4:] = A  # as at the start: the last r candidates are out
    pool_B[-4:] = B.roll(-2, 1).t()
    before, sums = W + 0.5 * B @ A, (pool_A.sum(0), pool_B.sum(0))
    for t in range(60):
        reference.swap_(W, A, B, pool_A, pool_B, t, 1, 0.5)
        torch.testing.assert_close(W + 0.5 * B @ A, before, rtol=0, atol=1e-12)
    out = [(60 - 4 + i) % 9 for i in range(4)]  # whose places in the pool say what they were when they were taken
    back = [i for i in range(9) if i not in out]
    held_A, held_B = pool_A[back].sum(0) + A.sum(0), pool_B[back].sum(0) + B.sum(1)
    torch.testing.assert_close(held_A, sums[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(held_B, sums[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("void", [None, 0.0, 1.0])
@pytest.mark.parametrize(
    ("r", "after", "held", "anew"), [(2, 1, 1, 1), (5, 7, 2, 0), (16, 35, 8, 3), (64, 1 << 33, 32, 9)]
)
def test_what_is_held_is_that_of_the_reference(r: int, after: int, held: int, anew: int, void: float | None) -> None:
    shapes = [(7, 12), (40, 36)]
    told = numbers(after, after + 5, held, 1, anew, 1).reshape(3, 2)

    def tensors() -> list[list[Tensor]]:
        of = [((r, n), (r, n), (r, n), (r, 1), (m, r), (m, r), (m, r), (1, r)) for m, n in shapes]
        return [[torch.randn(size, generator=torch.Generator().manual_seed(9)) for size in sizes] for sizes in of]

    layers, want = tensors(), tensors()
    for some, numbers_of in zip(want, told.T.tolist(), strict=True):
        if not void:
            reference.hold_((some[0], some[4]), (some[1:4], some[5:]), *numbers_of)
    addresses = np.array([[t.data_ptr() for t in some] for some in layers]).T
    tensor = None if void is None else torch.tensor(void)
    vector_exchange.hold_(known(made(shapes, r)), addresses, told, r, CPU, tensor)
    for got, expected in zip(layers, want, strict=True):
        assert all(torch.equal(t, e) for t, e in zip(got, expected, strict=True))


def test_what_is_not_there_is_left_out() -> None:
    """A layer that the batch did not reach has no gradient; before the first update nothing has moments."""
    gradient = torch.ones(4, 8)
    addresses = np.array([[0] * 8, [gradient.data_ptr(), *[0] * 7]]).T
    vector_exchange.hold_(known(made([(6, 8)] * 2, 4)), addresses, numbers(1, 1, 1, 1, 1, 1).reshape(3, 2), 4, CPU)
    assert gradient.sum(1).tolist() == [8, 8, 0, 8]


# ---- in training -----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers of three shapes, one that the kernels do not take, and one that a batch may leave out."""

    def __init__(self) -> None:
        super().__init__()
        widths = [(8, 12), (12, 12), (12, 12), (12, 10), (10, 8)]
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in widths)
        self.spare = nn.Linear(8, 8)

    def forward(self, x: Tensor, spare: bool) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.spare(x) if spare else x


def made_run(**fields: Any) -> rs.Run:
    torch.manual_seed(0)
    method = rs.SwitchLoRA(rank=6, interval=6, freeze=2, rho=1.0, targets=("layers.*", "spare"), **fields)
    return rs.attach(Net(), method, seed=3, total_steps=40)


def update(run: rs.Run, optimizer: torch.optim.Optimizer, t: int) -> None:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(t))
    loss = (run.model(x, t % 4 != 1) - 1).square().mean() * (float("nan") if t == 5 else 1.0)
    loss.backward()
    if t == 7:
        factor = run.adapter()["layers.1"].get_parameter("A")
        factor.grad = factor.grad.t().contiguous().t()  # type: ignore[union-attr]
    optimizer.step()
    optimizer.zero_grad()


def lent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As if the CPU were a GPU; what is done with memory."""
    done: list[str] = []
    monkeypatch.setattr(op, "runs_on", lambda device: True)
    monkeypatch.setattr(switchlora_pool, "lend", lambda at, size: (done.append("lent"), at)[1])
    monkeypatch.setattr(switchlora_pool, "take_back", lambda at: done.append("back"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("waited"))
    return done


def state_of(run: rs.Run, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    moments = {f"{i} {key}": value for i, state in enumerate(optimizer.state.values()) for key, value in state.items()}
    return {name: tensor.clone() for name, tensor in (run.state_dict()["tensors"] | moments).items()}


@pytest.mark.parametrize("launched", [False, True], ids=["known to be finite", "launched before that is known"])
def test_training_is_that_without_kernels(launched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One update is void, in some a layer has no gradient, in one a gradient lies otherwise, and one layer is not for
    the kernels."""
    if launched:
        monkeypatch.setattr("rankshift.core.event._on_one_gpu", lambda gradients: True)
    found = []
    swaps: list[int] = []
    swap = triton.swap
    monkeypatch.setattr(triton, "swap", lambda table, *rest: (swaps.append(table.shape[1]), swap(table, *rest)))
    for kernels in (False, True):
        if kernels:
            lent(monkeypatch)
        run = made_run()
        optimizer = run.optimizer(lr=1e-3, check_gradients=False)
        for t in range(14):
            update(run, optimizer, t)
            assert not kernels or sum(swaps) > 0
        assert run.skipped == 1
        found.append(state_of(run, optimizer))
        assert run.metrics()["exchanged"] > 80
    assert max(swaps) == 5
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=0, atol=2e-6, msg=name)
    assert torch.equal(found[0]["default/layers.0.clock"], found[1]["default/layers.0.clock"])


def test_autograd_knows_and_the_run_saves_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    lent(monkeypatch)
    run = made_run()
    optimizer = run.optimizer(lr=0.0, check_gradients=False)
    update(run, optimizer, 0)
    (layer,) = [layer for name, layer in run.adapter().items() if name == "layers.0"]
    tensors = layer.base.weight, layer.A, layer.B
    versions, layer.base.changed = [t._version for t in tensors], False
    while int(layer.clock[0]) < 2:
        update(run, optimizer, 2)
    assert all(t._version > v for t, v in zip(tensors, versions, strict=True))
    assert layer.base.changed


def test_a_tensor_that_moved_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lent(monkeypatch)
    run = made_run()
    optimizer = run.optimizer(lr=0.0, check_gradients=False)
    update(run, optimizer, 0)
    layer = run.adapter()["layers.1"]
    assert isinstance(layer, switchlora.SwitchLayer)
    product = (layer.base.weight + layer.delta()).detach()
    old = layer.base.weight.data, layer.A.data, layer.B.data
    for p in (layer.base.weight, layer.A, layer.B):
        p.data = p.data.clone()
    before = [t.clone() for t in old]
    count = int(layer.clock[0])
    while int(layer.clock[0]) < count + 3:
        update(run, optimizer, 2)
    assert all(torch.equal(t, b) for t, b in zip(old, before, strict=True))
    torch.testing.assert_close((layer.base.weight + layer.delta()).detach(), product, rtol=0, atol=1e-6)


def test_memory_is_lent_once_waited_for_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    done = lent(monkeypatch)
    ring = switchlora_pool.Ring(5, 7, torch.float32)
    ring.values[:] = np.arange(35).reshape(5, 7)
    assert ring.address(CPU) == ring.address(CPU) == ring.values.ctypes.data
    assert ring.values.ctypes.data % 4096 == 0
    assert done == ["lent", "waited", "waited"]
    for other in (copy.deepcopy(ring), pickle.loads(pickle.dumps(ring))):
        assert np.array_equal(other.values, ring.values)
        assert other.values.ctypes.data != ring.values.ctypes.data
    assert done.count("lent") == 1, "a copy is nobody's"
    done.clear()
    tensor = torch.from_numpy(ring.values)
    del ring
    assert "back" not in done, "the memory is still somebody's"
    del tensor
    assert done == ["waited", "waited", "back"]


def test_where_no_memory_can_be_lent_it_goes_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    lent(monkeypatch)
    asked: list[int] = []
    monkeypatch.setattr(switchlora_pool, "lend", lambda at, size: asked.append(at) or 0)
    monkeypatch.setattr(triton, "swap", None)
    run = made_run()
    optimizer = run.optimizer(lr=1e-3, check_gradients=False)
    for t in range(6):
        update(run, optimizer, t)
    assert run.metrics()["exchanged"] > 20
    assert len(asked) == len(set(asked)) == 10
