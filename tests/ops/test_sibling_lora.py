"""LoRA linears of one input: values and gradients of the plain equation, whoever trains and whoever is used."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rankshift.core.base import Plain
from rankshift.ops.lora_linear import lora_linear
from rankshift.ops.sibling_lora import down, up
from rankshift.ops.sibling_lora.reference import sibling_lora
from rankshift.storage.four_bit import FourBit
from rankshift.storage.fp8 import FP8

OUTS, RANKS, SCALES = (6, 4, 5), (3, 1, 2), (0.7, 0.7, 1.3)


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_(grad)


def layers(n: int, trains: Sequence[str], scales: Sequence[float] = SCALES) -> list[tuple]:
    """(W, A, B, s, bias) of three layers; ``trains``: which of A, B and c (the bias) do in each."""
    found = []
    for i, (m, r, t) in enumerate(zip(OUTS, RANKS, trains, strict=True)):
        A, B = seeded(r, n, seed=10 + i, grad="A" in t), seeded(m, r, seed=20 + i, grad="B" in t)
        bias = seeded(m, seed=30 + i, grad="c" in t) if i != 1 else None
        found.append((seeded(m, n, seed=i), A, B, scales[i], bias))
    return found


def run(
    x: Tensor, group: list[tuple], order: Sequence[int] = (0, 1, 2), dtype: torch.dtype | None = None
) -> list[Tensor]:
    """The outputs in the order in which they are computed."""
    _, As, Bs, scales, _ = zip(*group, strict=True)
    inner, zs, cast = down(x, dtype or x.dtype, As, Bs, scales)
    ys = []
    for i in order:
        W, _, B, s, bias = group[i]
        y, inner = up(inner, zs[i], B, cast[i], s, bias, Plain(), (W,), i == order[-1] and len(order) == len(group))
        ys.append(y.view(*x.shape[:-1], W.shape[0]))
    return ys


def same(got: Sequence[Tensor | None], want: Sequence[Tensor | None], tolerance: float = 1e-12) -> None:
    for a, b in zip(got, want, strict=True):
        if b is None or a is None:
            assert a is b
        else:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def compare(x: Tensor, group: list[tuple], order: Sequence[int] = (0, 1, 2), used: Sequence[int] = (0, 1, 2)) -> None:
    leaves = [t for t in (x, *(t for layer in group for t in layer if isinstance(t, Tensor))) if t.requires_grad]
    ys = dict(zip(order, run(x, group, order), strict=True))
    plain = sibling_lora(x, group)
    same([ys[i].detach() for i in order], [plain[i].detach() for i in order])
    dys = [seeded(*plain[i].shape, seed=40 + i) for i in used]
    for outs in (ys, plain):
        assert all(outs[i].requires_grad for i in used) or not leaves
    if leaves and used:
        mine, theirs = (
            torch.autograd.grad([outs[i] for i in used], leaves, dys, allow_unused=True) for outs in (ys, plain)
        )
        same(mine, theirs)


@pytest.mark.parametrize("shape", [(0, 7), (1, 7), (5, 7), (2, 3, 7), (7,)])
def test_it_is_the_plain_equation(shape: tuple[int, ...]) -> None:
    for grad in (True, False):
        compare(seeded(*shape, seed=50, grad=grad), layers(7, ("AB", "AB", "AB")))
    compare(seeded(*shape, seed=50, grad=True), layers(7, ("ABc", "AB", "ABc"), (2.0, 2.0, 2.0)))


@pytest.mark.parametrize("trains", list(itertools.product(("AB", "A", "B", ""), repeat=3)))
def test_whoever_trains(trains: tuple[str, str, str]) -> None:
    for grad in (True, False):
        if grad or all(trains):
            compare(seeded(4, 7, seed=50, grad=grad), layers(7, trains))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_in_any_order_and_whatever_leads_to_the_loss(order: tuple[int, ...]) -> None:
    x, group = seeded(4, 7, seed=50, grad=True), layers(7, ("AB", "AB", "AB"))
    for count in (1, 2, 3):
        for used in itertools.combinations(range(3), count):
            compare(x, group, order, used)


@pytest.mark.parametrize("order", [(0,), (2,), (0, 2), (2, 1)])
def test_a_layer_that_is_not_called(order: tuple[int, ...]) -> None:
    compare(seeded(4, 7, seed=50, grad=True), layers(7, ("AB", "AB", "AB")), order, order)


def test_inputs_and_gradients_that_are_not_contiguous() -> None:
    compare(seeded(7, 9, seed=50).t()[:, :7].detach().requires_grad_(), layers(7, ("AB", "AB", "AB")))
    x, group = seeded(4, 7, seed=50, grad=True), layers(7, ("AB", "AB", "AB"))
    grads = [torch.autograd.grad(sum(y.sum() for y in ys), x) for ys in (run(x, group), sibling_lora(x, group))]
    same(*grads)


@pytest.mark.parametrize("autocast", [False, True])
def test_factors_wider_than_the_layer(autocast: bool) -> None:
    """In bf16 no further from float64 than each layer by itself; gradients come in the dtype of what they belong to."""
    n, r, b = 96, 8, 64
    x = seeded(b, n, seed=1, dtype=torch.float32 if autocast else torch.bfloat16, grad=True)
    group, exact = [], []
    for i, m in enumerate((80, 48, 64)):
        W, bias = seeded(m, n, seed=2 + i, dtype=torch.bfloat16), seeded(m, seed=6 + i, dtype=torch.bfloat16)
        A, B = (seeded(*s, seed=10 + i, dtype=torch.float32, grad=True) for s in ((r, n), (m, r)))
        group.append((W, A, B, 0.7, bias))
        exact.append(
            tuple(
                t.detach().double().requires_grad_(j in (1, 2)) if isinstance(t, Tensor) else t
                for j, t in enumerate(group[-1])
            )
        )
    wide = x.detach().to(torch.bfloat16).double().requires_grad_()
    dys = [seeded(b, len(layer[0]), seed=30 + i, dtype=torch.bfloat16) for i, layer in enumerate(group)]
    leaves = [x, *(t for layer in group for t in layer[1:3])]
    together = run(x, group, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        apart = [lora_linear(x, A, B, s, bias, Plain(), (W,)) for W, A, B, s, bias in group]
    assert [y.dtype for y in together] == [torch.bfloat16] * 3
    wanted = sibling_lora(wide, exact)
    ends = [torch.autograd.grad(ys, leaves, dys) for ys in (together, apart)]
    ends.append(torch.autograd.grad(wanted, [wide, *(t for e in exact for t in e[1:3])], [d.double() for d in dys]))
    assert [g.dtype for g in ends[0]] == [leaf.dtype for leaf in leaves]
    off = [
        [float((g.double() - w).norm() / w.norm()) for g, w in zip(grads, ends[2], strict=True)] for grads in ends[:2]
    ]
    assert all(mine < 1.1 * theirs + 1e-4 for mine, theirs in zip(*off, strict=True)), off
    for y, z, w in zip(together, apart, wanted, strict=True):
        assert (y - w).norm() <= 1.1 * (z - w).norm()


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_other_storages(kind: str) -> None:
    n, m, r = 64, 32, 3
    x = seeded(5, n, seed=50, dtype=torch.float32, grad=True)
    held = {"nf4": lambda W: FourBit.quantised(W, "nf4"), "fp8": lambda W: FP8.quantised(W)}[kind]
    packs = [
        (layout, tuple(tensors))
        for layout, tensors in (held(seeded(m, n, seed=i, dtype=torch.float32)) for i in (1, 2))
    ]
    As, Bs = ([seeded(*s, seed=9 + i, dtype=torch.float32, grad=True) for i in range(2)] for s in ((r, n), (m, r)))
    inner, zs, cast = down(x, torch.float32, As, Bs, [0.5, 0.5])
    together = []
    for i, (format, tensors) in enumerate(packs):
        y, inner = up(inner, zs[i], Bs[i], cast[i], 0.5, None, format, tensors, i == 1)
        together.append(y)
    apart = [lora_linear(x, A, B, 0.5, None, f, p, "f1", "b1s") for A, B, (f, p) in zip(As, Bs, packs, strict=True)]
    same(together, apart, 1e-5)
    dys = [seeded(5, m, seed=60 + i, dtype=torch.float32) for i in range(2)]
    same(*(torch.autograd.grad(ys, [x, *As, *Bs], dys) for ys in (together, apart)), 2e-5)


def test_operations_and_launches() -> None:
    """The operations are those of the layers alone, in fewer launches; in bf16 no sum is written by itself."""
    b, n = 24, 20
    x = seeded(b, n, dtype=torch.bfloat16, grad=True)
    group = [
        tuple(t.detach().to(torch.bfloat16) if isinstance(t, Tensor) else t for t in layer)
        for layer in layers(n, ("", "", ""))
    ]
    group = [(W, A.float().requires_grad_(), B.float().requires_grad_(), 2.0, bias) for W, A, B, _, bias in group]
    per = b * n * sum(OUTS) + b * n * sum(RANKS) + b * sum(m * r for m, r in zip(OUTS, RANKS, strict=True))
    with FlopCounterMode(display=False) as counter, Calls() as calls:
        ys = run(x, group)
    assert counter.get_total_flops() == 2 * per
    assert calls.seen.count("aten::mm") + calls.seen.count("aten::addmm") <= 1 + 2 * 3
    with FlopCounterMode(display=False) as counter, Calls() as calls:
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    more = b * n * sum(RANKS) + b * sum(m * r for m, r in zip(OUTS, RANKS, strict=True))  # dA; dB beside S
    assert counter.get_total_flops() == 2 * (per + more)
    assert not {"aten::add", "aten::add_"} & set(calls.seen), calls.seen


class Calls(TorchDispatchMode):
    """The operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(func.overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


def test_kept_for_backward_are_x_once_and_each_z() -> None:
    kept: dict[int, Tensor] = {}
    x, group = seeded(50, 7, grad=True), layers(7, ("AB", "AB", "AB"))
    known = {t.untyped_storage().data_ptr() for layer in group for t in layer if isinstance(t, Tensor)}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ys = run(x, group)
    extra = [t.untyped_storage().nbytes() for at, t in kept.items() if at not in known]
    assert sorted(extra) == sorted([50 * 7 * 8, 50 * sum(RANKS) * 8])
    del ys


def test_frozen_factors_keep_no_input() -> None:
    kept: list[Tensor] = []
    x, group = seeded(50, 7, grad=True), layers(7, ("B", "B", "B"))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        ys = run(x, group)
    assert all(t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for t in kept)
    del ys
