"""Products of a wide gradient with LoRA's factors: the reference against autograd, the kernels against the reference.

Without a GPU the kernels run under Triton's interpreter, which is chosen when Triton is imported: in a process of its
own, which runs what is marked ``kernels`` here.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from elsewhere import run
from torch import Tensor

from rankshift.ops import arrivals
from rankshift.ops.skinny import down_back, gains, op, pack, reference, up_gradient, weight_gradient

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = BF16 if DEVICE == "cuda" else FP16  # the interpreter multiplies no bf16
kernels = pytest.mark.skipif(DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="in another process")


def randn(*shape: int, seed: int, dtype: torch.dtype = FP64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FP64).to(DEVICE, dtype)


def sliced(x: Tensor) -> Tensor:
    """x as columns of a wider buffer, whose other numbers must not be read."""
    wide = x.new_full((x.shape[0], x.shape[1] + 16), float("nan"))
    wide[:, 8:-8] = x
    return wide[:, 8:-8]


def all_zero() -> bool:
    """Whether launches left their counters as they found them."""
    return not any(counts.any() for counts in arrivals._kept.values())


def same(found: tuple[Tensor | None, ...], again: tuple[Tensor | None, ...]) -> bool:
    """To the bit."""
    return all(torch.equal(a, b) for a, b in zip(found, again, strict=True) if a is not None and b is not None)


def near(half: Tensor, want: Tensor) -> None:
    """Rounded once."""
    torch.testing.assert_close(half.double(), want, rtol=1.01 * torch.finfo(HALF).eps, atol=1e-3)


def problem(T: int, widths: tuple[int, ...], r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    N = sum(widths)
    sizes = (T, N), (N, r), (T, len(widths) * r)
    dY, B, Z = (sliced(randn(*size, seed=seed, dtype=dtype)) for seed, size in enumerate(sizes))
    return dY, B, Z


# ---- the references --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(12,), (8, 3, 4)], ids=str)
def test_both_are_gradients_of_the_plain_equation(widths: tuple[int, ...]) -> None:
    """Y = Z Bᵀ, layer by layer: S is the gradient of Z, dB that of B."""
    dY, B, Z = problem(7, widths, 2, FP64)
    B.requires_grad_()
    Z.requires_grad_()
    y = torch.cat([z @ b.t() for z, b in zip(torch.split(Z, 2, 1), torch.split(B, list(widths)), strict=True)], 1)
    want = torch.autograd.grad(y, (Z, B), dY)
    rows = randn(7, seed=9)
    normed = torch.empty_like(Z)
    S, dB = down_back(dY, B, Z, widths if len(widths) > 1 else None, 0.5, (rows, normed))
    torch.testing.assert_close((S, dB, normed), (want[0], 0.5 * want[1], want[0] * rows[:, None]))
    assert not S.requires_grad
    only, none = down_back(dY, B, widths=widths)
    assert torch.equal(only, S)
    assert none is None
    torch.testing.assert_close(up_gradient(dY, Z, widths), want[1])


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_it_is_the_gradient_of_the_weight(offset: float) -> None:
    """Z = n Aᵀ for n = x · (offset + gain): what autograd gives A where dZ is S."""
    S, x, A, gain = (randn(*size, seed=i) for i, size in enumerate([(7, 3), (7, 12), (3, 12), (12,)]))
    A.requires_grad_()
    (want,) = torch.autograd.grad(x * (offset + gain) @ A.t(), A, S)
    found = weight_gradient(sliced(S), sliced(x), gain, offset)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(weight_gradient(S, x), S.t() @ x)
    assert not found.requires_grad


def test_dtypes() -> None:
    for dtype, wide in ((BF16, FP32), (FP16, FP32), (FP32, FP32), (FP64, FP64)):
        assert weight_gradient(randn(7, 3, seed=1, dtype=dtype), randn(7, 12, seed=2, dtype=dtype)).dtype == wide
        S, dB = down_back(*problem(7, (12,), 2, dtype))
        assert dB is not None
        assert (S.dtype, dB.dtype) == (dtype, wide)


def filled(dtype: torch.dtype) -> tuple[list[Tensor], list[float], list[Tensor], list[Tensor]]:
    """Sources, scales, targets and the buffers that these are in."""
    sources = [randn(5, 33, seed=1, dtype=FP32), randn(33, 5, seed=2, dtype=FP32).t(), randn(1, 7, seed=3, dtype=dtype)]
    sources += [randn(3, 3, seed=4 + i, dtype=FP32) for i in range(15)]
    scales = [1.0, 0.3, 2.0] + [1.0 + i for i in range(15)]
    buffers = [torch.full((s.shape[0] + 1, s.shape[1] + 8), 3.0, dtype=dtype, device=DEVICE) for s in sources]
    targets = [b[: s.shape[0], : s.shape[1]] for b, s in zip(buffers, sources, strict=True)]
    turned = torch.full((33 + 8, 5 + 1), 3.0, dtype=dtype, device=DEVICE).t()
    buffers[0], targets[0] = turned, turned[:5, :33]
    return sources, scales, targets, buffers


def written(dtype: torch.dtype, rtol: float = 0.0) -> None:
    sources, scales, targets, buffers = filled(dtype)
    before = [t._version for t in targets]
    pack(sources, scales, targets)
    for source, scale, target, buffer, version in zip(sources, scales, targets, buffers, before, strict=True):
        want = (source.float() * torch.tensor(scale)).to(dtype)
        torch.testing.assert_close(target, want, rtol=rtol, atol=0)
        assert target._version > version
        assert (buffer[target.shape[0] :] == 3).all()
        assert (buffer[:, target.shape[1] :] == 3).all()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_packed(dtype: torch.dtype) -> None:
    written(dtype)
    pack([], [], [])


# ---- gains -----------------------------------------------------------------------------------------------------------

SCALED = [
    ((12,), (True,), (False,)),
    ((8, 3, 4), (True, False, True), (True, False, False)),
    ((5, 6), (True,) * 2, (False,) * 2),
]


def dora(
    widths: tuple[int, ...], scaled: tuple[bool, ...], biased: tuple[bool, ...], K: int, r: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None], list[Tensor | None]]:
    """W, A, B, magnitudes and biases; a row of zeros."""
    N = sum(widths)
    sizes = (N, K), (len(widths) * r, K), (N, r)
    W, A, B = (sliced(randn(*size, seed=seed, dtype=dtype)) for seed, size in enumerate(sizes))
    W[0], B[0] = 0, 0
    magnitudes = [randn(n, seed=n, dtype=FP32) if some else None for n, some in zip(widths, scaled, strict=True)]
    biases = [randn(n, seed=n + 1, dtype=dtype) if some else None for n, some in zip(widths, biased, strict=True)]
    return W, A, B, magnitudes, biases


@pytest.mark.parametrize(("widths", "scaled", "biased"), SCALED, ids=str)
def test_gains_are_of_norms_of_rows(widths: Any, scaled: Any, biased: Any) -> None:
    W, A, B, magnitudes, biases = dora(widths, scaled, biased, 9, 2, FP64)
    found = gains((W,), A, B, widths, magnitudes, biases)
    assert found.dtype == FP64
    for weights in (W.split(widths), tuple(w.contiguous() for w in W.split(widths))):
        assert torch.equal(found, gains(weights, A, B, widths, magnitudes, biases))
    per_layer = zip(
        W.split(widths), A.split(2), B.split(widths), magnitudes, biases, found.split(widths, 1), strict=True
    )
    for i, (w, a, b, magnitude, bias, got) in enumerate(per_layer):
        norm = (w + b @ a).pow(2).sum(1).sqrt()
        rho = 1 / norm if magnitude is not None else torch.zeros_like(norm)
        rho[norm == 0] = 0
        c = rho * magnitude if magnitude is not None else torch.ones_like(norm)
        c[norm == 0] = 1
        assert bool((norm == 0).any()) == (i == 0)
        torch.testing.assert_close((got[0], got[-1]), (c, rho))
        assert len(got) == 2 + any(biased)
        if any(biased):
            torch.testing.assert_close(got[1], torch.zeros_like(norm) if bias is None else bias)
    one = gains((W,), A[:2], B, widths, magnitudes, biases)
    torch.testing.assert_close(one, gains((W,), A[:2].repeat(len(widths), 1), B, widths, magnitudes, biases))


# ---- counters --------------------------------------------------------------------------------------------------------


def test_counters_are_kept_and_grow() -> None:
    cpu = torch.device("cpu")
    few = arrivals.counters(5, cpu)
    assert arrivals.counters(7, cpu) is few
    many = arrivals.counters(len(few) + 1, cpu)
    assert len(many) > len(few)
    assert arrivals.counters(5, cpu) is many
    assert (many.dtype, int(many.count_nonzero())) == (torch.int32, 0)


def test_each_stream_has_its_own_and_each_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches on two streams may run at once; what is captured runs on another stream than it is captured on."""
    device, new = torch.device("cuda", 0), arrivals.new
    at = SimpleNamespace(cuda_stream=0)
    capturing = [False]
    monkeypatch.setattr(arrivals, "_kept", {})
    monkeypatch.setattr(arrivals, "new", lambda device, *count: new(torch.device("cpu"), *count))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: at)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    first = arrivals.counters(5, device)
    at.cuda_stream = 7
    second = arrivals.counters(5, device)
    assert second is not first
    assert arrivals.counters(5, device) is second
    capturing[0] = True
    third = arrivals.counters(5, device)
    assert all(third is not other for other in (first, second, arrivals.counters(5, device)))
    own = arrivals.new(device, 9)
    with arrivals.lent(own):
        assert arrivals.counters(9, device) is own
        assert arrivals.counters(10, device) is not own
        capturing[0] = False
        assert arrivals.counters(9, device) is second
    capturing[0] = True
    assert arrivals.counters(9, device) is not own


@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA graphs")
@pytest.mark.parametrize("lends", [False, True])
def test_captured(lends: bool) -> None:
    """Replayed again and again, between launches that are not, on the stream that comes."""
    dY, B, Z = problem(512, (2048,), 16, HALF)
    want = down_back(dY, B, Z)
    graph, own = torch.cuda.CUDAGraph(), arrivals.new(dY.device)
    with torch.cuda.graph(graph), arrivals.lent(own) if lends else nullcontext():
        found = down_back(dY, B, Z)
    for _ in range(3):
        graph.replay()
        assert same(want, found)
        assert same(want, down_back(dY, B, Z))
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            graph.replay()
        torch.cuda.synchronize()
        assert same(want, found)
    assert not own.any()


# ---- the kernels -----------------------------------------------------------------------------------------------------


@pytest.fixture
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "runs_on", lambda device: True)


@kernels
@pytest.mark.usefixtures("_on_the_cpu")
@pytest.mark.parametrize(
    ("T", "widths"),
    [(33, (77,)), (256, (64,)), (1, (1,)), (512, (256, 64, 64)), (300, (130, 33, 70)), (260, (1100, 5))],
    ids=str,
)
@pytest.mark.parametrize("r", [1, 5, 16, 24, 100])
def test_it_does_what_the_reference_does(r: int, T: int, widths: tuple[int, ...]) -> None:
    dY, B, Z = problem(T, widths, r, HALF)
    want = reference.down_back(dY.double(), B.double(), Z.double(), widths, 0.5)
    rows, normed = randn(T, seed=9, dtype=FP32), torch.empty(Z.shape, dtype=HALF, device=DEVICE)
    S, dB = down_back(dY, B, Z, widths, 0.5, (rows, normed))
    assert dB is not None
    assert (S.dtype, dB.dtype) == (HALF, FP32)
    near(S, want[0])
    near(normed, want[0] * rows[:, None].double())
    torch.testing.assert_close(dB.double(), want[1], rtol=1e-4, atol=1e-3)
    again = normed.clone()
    assert same((S, dB, normed), (*down_back(dY, B, Z, widths, 0.5, (rows, again)), again))
    only, none = down_back(dY, B, None, widths, 1.0, (rows, normed))
    assert none is None
    near(only, want[0])
    near(normed, want[0] * rows[:, None].double())
    assert same((only, normed), (down_back(dY, B, None, widths, 1.0, (rows, again))[0], again))
    alone = up_gradient(dY, Z, widths)
    assert alone.dtype == FP32
    torch.testing.assert_close(alone.double(), 2 * want[1], rtol=1e-4, atol=1e-3)
    assert torch.equal(alone, up_gradient(dY, Z, widths))
    assert all_zero()


@kernels
@pytest.mark.usefixtures("_on_the_cpu")
@pytest.mark.parametrize(("T", "K"), [(33, 77), (256, 64), (1, 1), (700, 130), (512, 256)], ids=str)
@pytest.mark.parametrize("r", [1, 5, 16, 48, 64])
def test_gradients_of_weights_are_those_of_the_reference(r: int, T: int, K: int) -> None:
    S, x = (sliced(randn(T, n, seed=n, dtype=HALF)) for n in (r, K))
    gain = randn(K, seed=3, dtype=HALF)
    for given in ((), (gain,), (gain, 1.0)):
        dA = weight_gradient(S, x, *given)
        assert dA.dtype == FP32
        want = reference.weight_gradient(S.double(), x.double(), *(given[:1] and (gain.double(), *given[1:])))
        torch.testing.assert_close(dA.double(), want, rtol=1e-4, atol=1e-3)
        assert torch.equal(dA, weight_gradient(S, x, *given))
    assert all_zero()


@kernels
@pytest.mark.usefixtures("_on_the_cpu")
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has an order of its own")
@pytest.mark.parametrize("r", [1, 40])
def test_whoever_comes_last(r: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs in other orders leave the same bits: each sums when all is there, and in the same order."""
    from triton.runtime.interpreter import interpreter_builder as builder

    T, widths = 300, (600, 70)
    dY, B, Z = problem(T, widths, r, HALF)

    def found() -> tuple[Tensor | None, ...]:
        return *down_back(dY, B, Z, widths), *down_back(dY, B, None, widths), weight_gradient(Z, dY)

    first, place = found(), builder.set_grid_idx
    for seed in range(3):

        def shuffled(x: int, y: int, z: int, seed: int = seed) -> None:
            across, down, _ = builder.grid_dim
            order = torch.randperm(across * down, generator=torch.Generator().manual_seed(seed))
            index = int(order[x * down + y])
            place(index // down, index % down, z)

        monkeypatch.setattr(builder, "set_grid_idx", shuffled)
        assert same(first, found())
        assert all_zero()


@kernels
@pytest.mark.usefixtures("_on_the_cpu")
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU does not say who writes where")
@pytest.mark.parametrize("r", [1, 16])
def test_no_number_is_written_twice(r: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that wrote what others sum would do so too early or too late, or in time: nobody would notice."""
    from triton.runtime.interpreter import interpreter_builder as builder

    store, seen = builder.create_masked_store, []

    def noted(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        seen.append(pointers.data[mask.data])
        return store(pointers, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_store", noted)
    widths = (600, 70)
    dY, B, Z = problem(300, widths, r, HALF)
    for work in (
        lambda: down_back(dY, B, Z, widths), lambda: down_back(dY, B, None, widths), lambda: weight_gradient(Z, dY)
    ):  # fmt: skip
        seen.clear()
        work()
        places = np.concatenate([part.ravel() for part in seen])
        assert len(np.unique(places)) == len(places)


@kernels
@pytest.mark.usefixtures("_on_the_cpu")
@pytest.mark.parametrize("plan", [(64, 128), (1024, 256)], ids=str)
@pytest.mark.parametrize("r", [3, 40])
def test_as_many_parts_as_there_may_be(r: int, plan: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are summed at once, or as few as there can be, whatever the plan says of so small a problem."""
    from rankshift.ops.skinny import triton

    T, widths = 700, (330, 130)
    length, slab = plan
    monkeypatch.setattr(triton, "_plan_across", lambda T, *rest: (max(length, 128), -(-T // max(length, 128))))
    monkeypatch.setattr(triton, "_plan_along", lambda T, widths, r: (slab, [-(-n // slab) for n in widths]))
    for name in ("_how_across", "_how_along"):
        monkeypatch.setattr(triton, name, getattr(triton, name).__wrapped__)  # what is kept was planned otherwise
    monkeypatch.setattr(triton, "_round", lambda parts, warps: {"AT_ONCE": 2, "SIZE": 256})
    dY, B, Z = problem(T, widths, r, HALF)
    want = reference.down_back(dY.double(), B.double(), Z.double(), widths)
    for given in (Z, None):
        S, dB = down_back(dY, B, given, widths)
        near(S, want[0])
        if dB is not None:
            torch.testing.assert_close(dB.double(), want[1], rtol=1e-4, atol=1e-3)
    found = weight_gradient(Z[:, :r], dY)
    torch.testing.assert_close(found.double(), Z[:, :r].double().t() @ dY.double(), rtol=1e-4, atol=1e-3)
    assert all_zero()


@kernels
@pytest.mark.usefixtures("_on_the_cpu")
@pytest.mark.parametrize(("K", "tall"), [(70, 1), (70, 4224), (512, 30)])
@pytest.mark.parametrize("r", [1, 5, 16, 24, 100])
def test_gains_by_the_kernel(r: int, K: int, tall: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankshift.ops.skinny import triton

    monkeypatch.setattr(triton, "_TALL", tall)
    for widths, scaled, biased in (*SCALED, ((64, 32), (True, True), (False, True)), ((33,), (True,), (True,))):
        W, A, B, magnitudes, biases = dora(widths, scaled, biased, K, r, HALF)
        exact = [None if t is None else t.double() for t in (*magnitudes, *biases)]
        rest = exact[: len(widths)], exact[len(widths) :]
        for weights in ((W,), W.split(widths)):
            for factor in (A, A[:r]):
                found = gains(weights, factor, B, widths, magnitudes, biases)
                want = reference.gains((W.double(),), factor.double(), B.double(), widths, *rest)
                assert found.dtype == FP32
                torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6)


@kernels
@pytest.mark.usefixtures("_on_the_cpu")
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_packed_by_the_kernel(dtype: torch.dtype) -> None:
    cut = dtype == BF16 and DEVICE == "cpu"  # the interpreter does not round to the nearest
    written(dtype, rtol=torch.finfo(dtype).eps if cut else 0.0)


# ---- all without a GPU -----------------------------------------------------------------------------------------------

COMPILED = """
import os
import subprocess
import sys

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rankshift.ops.skinny.triton import _ACROSS, _ACROSS_FEW, _ALONG, _BOTH, _GAINS, _GAINS_TALL, _PACK
from rankshift.ops.skinny.triton import _columns, _gains, _pack, _round, _rows

def compiled(kernel, types, round, constants, num_warps):
    named = {kernel.arg_names[at[0]]: "constexpr" for at in constants if len(at) == 1}
    names = [name for name in kernel.arg_names if name not in named]
    signature = {**dict(zip(names, types, strict=True)), **named}
    attributes = {at: [["tt.divisibility", 16]] for at in round}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    assert found.metadata.shared <= 227 << 10, "more than a multiprocessor has"
    return found.asm["ptx"]

def constant(kernel, **values):
    return {(kernel.arg_names.index(name),): value for name, value in values.items()}

def checked(ptx, apart):
    assert ptx.count("wgmma.mma_async") > 0, "products are not on the tensor cores"
    assert "ld.global.b16" not in ptx, "what a thread reads at once is not 16 bytes"
    assert ptx.count("ld.global.cg.") == ptx.count("ld.global.cg.v4"), "nor are parts"
    assert (ptx.count("ld.global.cg.") > 0) == ("atom.global.gpu.acq_rel" in ptx) == apart
    unspilled(ptx)

def unspilled(ptx):
    with open(sys.argv[1], "w") as file:
        file.write(ptx)
    command = [knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", sys.argv[1], "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert " 0 bytes spill stores" in said.stderr, said.stderr

for rank, (rows, columns, stages, warps, _) in _ALONG.items():
    for half, apart in (("*bf16", True), ("*fp16", False)):
        values = constant(
            _rows, WIDTHS=(2048, 512, 512), SLAB=512, r=rank, NORMED=True, APART=apart, EVEN=apart,
            ROWS=rows, COLUMNS=columns, STAGES=stages, **_round(4, warps),
        )
        types = [half] * 3 + ["*fp32"] * 2 + [half, "*i32"] + ["i32"] * 3
        checked(compiled(_rows, types, [(i,) for i in range(10)], values, warps), apart)

for both, tiles in ((True, _BOTH), (False, _ACROSS), (False, _ACROSS_FEW)):
    for rank, (rows, columns, stages, warps, _) in tiles.items():
        values = constant(
            _columns, WIDTHS=(2048, 512, 512) if both else (2048,), r=rank * 3 // 4 if rank == 64 else rank, BOTH=both,
            NORMED=both, GAIN=not both, TURNED=not both, APART=True, EVEN=True,
            ROWS=rows, COLUMNS=columns, STAGES=stages, **_round(11, warps),
        )
        types = ["*bf16"] * 4 + ["*fp32"] * 4 + ["*bf16"] * 2 + ["*i32"] + ["i32"] * 6 + ["fp32"] * 2
        checked(compiled(_columns, types, [(i,) for i in range(17)], values, warps), True)

for rank, (rows, columns, stages, warps) in (*_GAINS.items(), *_GAINS_TALL.items()):
    values = constant(
        _gains, WIDTHS=(2048, 512, 512), SCALED=(True, False, True), BIASED=(True, False, False), r=rank, GAINS=3,
        EVEN=True, ROWS=rows, COLUMNS=columns, STAGES=stages,
    )
    types = ["*bf16"] * 3 + ["*fp32", ("*fp32",) * 3, ("*bf16", "*fp32", "*fp32")] + ["i32"] * 6
    even = [(i,) for i in (0, 1, 2, 3, 6, 7, 8, 9, 10, 11)]
    ptx = compiled(_gains, types, even, values, warps)
    assert "mma.sync" in ptx, "products are not on the tensor cores"
    assert "cp.async.cg.shared.global" in ptx, "nothing is on its way while it computes"
    unspilled(ptx)

strides = (("i32", "constexpr"),) * 2
types = [("*fp32", "*bf16"), ("*bf16",) * 2, ("fp32",) * 2, ("i32",) * 2, ("i32",) * 2, strides, strides]
warps = _PACK.pop("num_warps")
values = constant(_pack, **_PACK) | {(i, j, 1): 1 for i in (5, 6) for j in (0, 1)}
round = [(i, j) for i in (0, 1, 3, 4) for j in (0, 1)] + [(i, j, 0) for i in (5, 6) for j in (0, 1)]
ptx = compiled(_pack, types, round, values, warps)
assert ptx.count("st.global") == ptx.count("st.global.v4") == 2, "what a thread writes at once is not 16 bytes"
"""


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1" or DEVICE == "cuda", reason="they run in this process")
def test_the_kernels() -> None:
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    run("-m", "pytest", "-p", "no:cacheprovider", Path(__file__), TRITON_INTERPRET="1")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_they_compile(tmp_path: Path) -> None:
    """For a GPU that is not here: the interpreter takes what the compiler refuses."""
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED)
    run(script, tmp_path / "kernel.ptx", TRITON_CACHE_DIR=str(tmp_path))
