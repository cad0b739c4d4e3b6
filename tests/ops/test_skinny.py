"""Products of a wide gradient with LoRA's factors: the reference against autograd, the kernels against the reference.

Without a GPU the kernels run under Triton's interpreter, which is chosen when Triton is imported: in a process of its
own, which runs what is marked ``kernels`` here.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from elsewhere import run
from torch import Tensor

from rankshift.ops.skinny import down_back, op, pack, reference

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


def test_dtypes() -> None:
    for dtype, wide in ((BF16, FP32), (FP16, FP32), (FP32, FP32), (FP64, FP64)):
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
@pytest.mark.parametrize("r", [1, 5, 16, 64, 100])
def test_it_does_what_the_reference_does(r: int, T: int, widths: tuple[int, ...]) -> None:
    dY, B, Z = problem(T, widths, r, HALF)
    want = reference.down_back(dY.double(), B.double(), Z.double(), widths, 0.5)
    rows, normed = randn(T, seed=9, dtype=FP32), torch.empty(Z.shape, dtype=HALF, device=DEVICE)
    S, dB = down_back(dY, B, Z, widths, 0.5, (rows, normed))
    assert dB is not None
    assert (S.dtype, dB.dtype) == (HALF, FP32)
    eps = torch.finfo(HALF).eps
    torch.testing.assert_close(S.double(), want[0], rtol=1.01 * eps, atol=1e-3)
    torch.testing.assert_close(normed.double(), want[0] * rows[:, None].double(), rtol=1.01 * eps, atol=1e-3)
    torch.testing.assert_close(dB.double(), want[1], rtol=1e-4, atol=1e-3)
    only, none = down_back(dY, B, None, widths)
    assert torch.equal(only, S)
    assert none is None


@kernels
@pytest.mark.usefixtures("_on_the_cpu")
def test_more_parts_than_are_summed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from rankshift.ops.skinny import triton

    monkeypatch.setitem(triton._SUM, "AT_ONCE", 2)
    dY, B, Z = problem(1300, (640, 130), 3, HALF)
    want = reference.down_back(dY.double(), B.double(), Z.double(), (640, 130))
    S, dB = down_back(dY, B, Z, (640, 130))
    torch.testing.assert_close(S.double(), want[0], rtol=2 * torch.finfo(HALF).eps, atol=1e-3)
    torch.testing.assert_close(dB, want[1].float(), rtol=1e-4, atol=1e-3)  # type: ignore[union-attr]


@kernels
@pytest.mark.usefixtures("_on_the_cpu")
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_packed_by_the_kernel(dtype: torch.dtype) -> None:
    cut = dtype == BF16 and DEVICE == "cpu"  # the interpreter does not round to the nearest
    written(dtype, rtol=torch.finfo(dtype).eps if cut else 0.0)


# ---- both without a GPU ----------------------------------------------------------------------------------------------

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rankshift.ops.skinny.triton import _PACK, _SUM, _TILES, _down, _pack, _sum

def compiled(kernel, types, round, constants, num_warps):
    named = {kernel.arg_names[at[0]]: "constexpr" for at in constants if len(at) == 1}
    names = [name for name in kernel.arg_names if name not in named]
    signature = {**dict(zip(names, types, strict=True)), **named}
    attributes = {at: [["tt.divisibility", 16]] for at in round}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps}).asm["ptx"]

def constant(kernel, **values):
    return {(kernel.arg_names.index(name),): value for name, value in values.items()}

for rank, tile in _TILES.items():
    warps = tile.pop("num_warps")
    for half, sums in (("*bf16", True), ("*fp16", False)):
        values = constant(_down, WIDTHS=(2048, 512, 512), SLAB=512, r=rank, SUMS=sums, EVEN=sums, **tile)
        types = [half] * 3 + ["*fp32"] * 2 + ["i32"] * 5 + ["fp32"]
        ptx = compiled(_down, types, [(i,) for i in range(10)], values, warps)
        assert ptx.count("wgmma.mma_async") > 0, "products are not on the tensor cores"
        assert "ld.global.b16" not in ptx, "what a thread reads at once is not 16 bytes"

warps = _SUM.pop("num_warps")
values = constant(_sum, WIDTHS=(2048, 512), SLAB=512, r=16, NORMED=True, **_SUM)
types = ["*fp32", "*fp32", "*bf16", "*fp32", "*fp32", "*bf16"] + ["i32"] * 4
compiled(_sum, types, [(i,) for i in range(10)], values, warps)

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
    run(script, TRITON_CACHE_DIR=str(tmp_path))
