"""A gated MLP's product: the reference against autograd, and the kernels against the reference.

Without a GPU the kernels run under Triton's interpreter, which is chosen when Triton is imported: in a process of its
own, which runs what is marked ``kernels`` here.
"""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import run
from torch import Tensor
from torch.nn import functional

from rankshift.ops.swiglu import op, reference, swiglu, swiglu_back

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
PLAIN = {"silu": functional.silu, "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh")}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = BF16 if DEVICE == "cuda" else FP16  # the interpreter multiplies no bf16
kernels = pytest.mark.skipif(DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="in another process")


def randn(*shape: int, seed: int, dtype: torch.dtype = FP64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FP64).to(dtype)


def sliced(x: Tensor, room: float = float("nan")) -> Tensor:
    """x as columns of a wider buffer, whose other numbers must not be read."""
    wide = torch.full((x.shape[0], x.shape[1] + 16), room, dtype=x.dtype)
    wide[:, 8:-8] = x
    return wide[:, 8:-8]


def problem(T: int, F: int, ranks: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of swiglu_back; a rank of 0 leaves that pair out."""
    pairs = []
    for index, r in enumerate(ranks):
        left, right = randn(T, r, seed=9 * index, dtype=dtype), randn(F, r, seed=9 * index + 1, dtype=dtype) * 0.25
        pairs.append((sliced(left), sliced(right.t().contiguous() if index == 2 else right)) if r else None)
    tall = (sliced(randn(T, F, seed=seed, dtype=dtype)) for seed in (50, 51, 52))
    return dict(zip(("dh", "g", "u", "low_g", "low_u", "low_h"), (*tall, *pairs), strict=True))


def wide(x: Any, dtype: torch.dtype | None, device: str = "cpu") -> Any:
    if isinstance(x, tuple):
        return tuple(wide(t, dtype, device) for t in x)
    return x.to(device, dtype) if isinstance(x, Tensor) else x


# ---- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", PLAIN)
@pytest.mark.parametrize("ranks", [(0, 0, 0), (3, 5, 2), (3, 0, 0), (0, 2, 4)], ids=str)
def test_it_is_the_plain_equation(ranks: tuple[int, int, int], activation: str) -> None:
    given = problem(7, 12, ranks, FP64)
    leaves = {name: given[name].requires_grad_() for name in ("g", "u")}
    branches, factors = [], []
    for name in ("g", "u"):
        low = given[f"low_{name}"]
        if low is not None:
            factors.append(low[1].requires_grad_())
        branches.append(leaves[name] + (low[0] @ low[1].t() if low is not None else 0))
    h = PLAIN[activation](branches[0]) * branches[1]
    dh = given["dh"] + (given["low_h"][0] @ given["low_h"][1] if given["low_h"] is not None else 0)
    want = torch.autograd.grad(h, (*leaves.values(), *factors), dh)
    got = swiglu(given["g"], given["u"], given["low_g"], given["low_u"], activation)
    back = swiglu_back(**given, activation=activation, want_h=True, grads="guh", scale=0.5)
    assert not got.requires_grad
    torch.testing.assert_close(got, h.detach())
    torch.testing.assert_close(back.h, h.detach())
    torch.testing.assert_close((back.dg, back.du), want[:2])
    torch.testing.assert_close([db for db in (back.db_g, back.db_u) if db is not None], [0.5 * db for db in want[2:]])
    assert [x is None for x in back[3:]] == [*[r == 0 for r in ranks], True]
    if ranks[2]:
        torch.testing.assert_close(back.da_h, given["low_h"][0].t() @ h.detach())


def gain_of(F: int, biased: bool) -> Tensor:
    """Of g and u, as columns of a wider one."""
    return sliced(randn(2 + biased, 2 * F, seed=77))


@pytest.mark.parametrize("activation", PLAIN)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("ranks", [(0, 0, 0), (3, 5, 2)], ids=str)
def test_a_gain(ranks: tuple[int, int, int], biased: bool, activation: str) -> None:
    """g is μ ρ (g + Zg Bgᵀ) + b, and u likewise; the gradient of μ, ρ being a constant."""
    given = problem(7, 12, ranks, FP64)
    rho, b = (randn(24, seed=seed) for seed in (80, 81))
    mu = randn(24, seed=82).requires_grad_()
    gain = torch.stack((mu * rho, b, rho) if biased else (mu * rho, rho)).detach()
    leaves, branches, factors = [], [], []
    for name, span in (("g", slice(12)), ("u", slice(12, 24))):
        low = given[f"low_{name}"]
        leaves.append((given[name] + (low[0] @ low[1].t() if low is not None else 0)).requires_grad_())
        branches.append((mu * rho)[span] * leaves[-1] + (b[span] if biased else 0))
        factors += [] if low is None else [low]
    h = PLAIN[activation](branches[0]) * branches[1]
    dh = given["dh"] + (given["low_h"][0] @ given["low_h"][1] if given["low_h"] is not None else 0)
    dg, du, dm = torch.autograd.grad(h, (*leaves, mu), dh)
    got = swiglu(given["g"], given["u"], given["low_g"], given["low_u"], activation, gain)
    back = swiglu_back(**given, activation=activation, want_h=True, grads="guh", scale=0.5, gain=gain)
    torch.testing.assert_close((got, back.h), (h.detach(), h.detach()))
    torch.testing.assert_close((back.dg, back.du, back.dm), (dg, du, dm))
    for found, d, (Z, _) in zip((back.db_g, back.db_u), (dg, du), factors, strict=False):
        torch.testing.assert_close(found, 0.5 * d.t() @ Z)


def test_only_what_is_asked_for() -> None:
    given = problem(7, 12, (3, 5, 2), FP64)
    back = swiglu_back(**given)
    assert back[2:] == (None,) * 5
    assert [x is None for x in swiglu_back(**given, grads=("u",))[2:]] == [True, True, False, True, True]
    with pytest.raises(ValueError, match="activation must be one of"):
        swiglu(given["g"], given["u"], activation="relu")
    with pytest.raises(ValueError, match="activation must be one of"):
        swiglu_back(**given, activation="gelu")


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_narrow_numbers_are_rounded_once(dtype: torch.dtype) -> None:
    given = problem(7, 12, (3, 5, 2), dtype)
    exact = {name: wide(x, FP64) for name, x in given.items()}
    back, want = (swiglu_back(**some, want_h=True, grads="guh") for some in (given, exact))
    assert [x.dtype for x in back if x is not None] == [dtype] * 3 + [FP32] * 3
    for got, sure in ((back.dg, want.dg), (back.du, want.du), (back.h, want.h)):
        assert got is not None
        assert sure is not None
        torch.testing.assert_close(got.double(), sure, rtol=0.501 * torch.finfo(dtype).eps, atol=1e-6)
    h = swiglu(given["g"], given["u"], given["low_g"], given["low_u"])
    torch.testing.assert_close(h, back.h, rtol=0, atol=0)


def test_gradients_may_take_the_place_of_the_branches() -> None:
    for dtype in (BF16, FP64):
        given = problem(7, 12, (3, 5, 2), dtype)
        want = swiglu_back(**given, want_h=True, grads="guh")
        kept = given["dh"].clone()
        back = swiglu_back(**given, out=(given["g"], given["u"]), want_h=True, grads="guh")
        assert back.dg is given["g"]
        torch.testing.assert_close(tuple(back), tuple(want), rtol=0, atol=0)
        assert torch.equal(given["dh"], kept)


# ---- the kernels -----------------------------------------------------------------------------------------------------


@pytest.fixture
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "runs_on", lambda device: True)


def near(got: Tensor | None, want: Tensor | None) -> None:
    """A unit of the last place apart, where sums in fp32 fall on the other side."""
    assert got is not None
    assert want is not None
    torch.testing.assert_close(got.double(), want, rtol=1.01 * torch.finfo(got.dtype).eps, atol=1e-4)


def check(given: dict[str, Any], activation: str = "silu", gain: Tensor | None = None) -> None:
    given = {name: wide(x, None, DEVICE) for name, x in given.items()}
    exact = {name: wide(x, FP64, DEVICE) for name, x in given.items()}
    asked: dict[str, Any] = {"activation": activation, "want_h": True, "grads": "guh", "scale": 0.5}
    narrow = wide(gain, FP32, DEVICE)
    want = reference.swiglu_back(**exact, **asked, gain=wide(narrow, FP64, DEVICE))
    near(swiglu(given["g"], given["u"], given["low_g"], given["low_u"], activation, narrow), want.h)
    T, F = want.dg.shape
    buffer = torch.full((T + 1, 2 * F + 8), 3.0, dtype=HALF, device=DEVICE)
    back = swiglu_back(**given, **asked, out=(buffer[:T, :F], buffer[:T, F : 2 * F]), gain=narrow)
    assert back.dg.data_ptr() == buffer.data_ptr()
    near(back.dg, want.dg)
    near(back.du, want.du)
    near(back.h, want.h)
    assert (buffer[T:] == 3).all()
    assert (buffer[:, 2 * F :] == 3).all()
    dg, du, h = wide(tuple(back[:3]), FP64, DEVICE)
    sums = reference.sums(dg, du, h, exact["low_g"], exact["low_u"], exact["low_h"], "guh", 0.5)
    for got, sure in zip(back[3:], (*sums, want.dm), strict=True):
        assert (got is None) == (sure is None)
        if got is not None and sure is not None:
            assert got.dtype == FP32
            torch.testing.assert_close(got.double(), sure, rtol=1e-3, atol=1e-3)


@kernels
@pytest.mark.usefixtures("_on_the_cpu")
@pytest.mark.parametrize("shape", [(33, 77), (64, 128), (1, 1), (100, 200)], ids=str)
@pytest.mark.parametrize("r", [1, 5, 16, 64])
def test_the_kernels_do_what_the_reference_does(r: int, shape: tuple[int, int]) -> None:
    check(problem(*shape, (r, r, r), HALF))


@kernels
@pytest.mark.usefixtures("_on_the_cpu")
@pytest.mark.parametrize("ranks", [*product((0, 3), repeat=3), (1, 16, 64), (100, 3, 128), (17, 128, 5)], ids=str)
def test_pairs_of_any_ranks_and_none(ranks: tuple[int, int, int]) -> None:
    check(problem(35, 70, ranks, HALF))


@kernels
@pytest.mark.usefixtures("_on_the_cpu")
def test_sums_over_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one program, and by two that take several each."""
    from rankshift.ops.swiglu import triton

    for at_once in (1, 3):
        monkeypatch.setattr(triton, "_MULTIPROCESSORS", at_once)
        triton._share.cache_clear()
        for ranks in ((3, 5, 16), (20, 5, 16)):
            check(problem(300, 100, ranks, HALF))
    triton._share.cache_clear()


@kernels
@pytest.mark.usefixtures("_on_the_cpu")
def test_no_grid_is_deeper_than_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    from rankshift.ops.swiglu import triton

    for T in (8, 1 << 18, (1 << 20) + 3):
        for ranks in ((0, 0, 0), (16, 16, 16)):
            assert -(-T // triton._share(T, 32, ranks, 0, 4, 1)) <= 65535
    monkeypatch.setattr(triton, "_DEEPEST", 3)
    triton._share.cache_clear()
    check(problem(35, 70, (0, 0, 0), HALF))
    triton._share.cache_clear()


@kernels
@pytest.mark.usefixtures("_on_the_cpu")
@pytest.mark.parametrize("at_once", [1, 132])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("ranks", [(0, 0, 0), (0, 3, 0), (1, 16, 5), (64, 3, 20), (100, 3, 128)], ids=str)
def test_a_gain_in_the_kernels(
    ranks: tuple[int, int, int], biased: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankshift.ops.swiglu import triton

    monkeypatch.setattr(triton, "_MULTIPROCESSORS", at_once)
    triton._share.cache_clear()
    check(problem(70, 77, ranks, HALF), "gelu_tanh" if biased else "silu", gain_of(77, biased))
    check(problem(64, 128, ranks, HALF), "silu", gain_of(128, biased))
    triton._share.cache_clear()


@kernels
@pytest.mark.usefixtures("_on_the_cpu")
def test_gelu() -> None:
    check(problem(35, 70, (3, 3, 3), HALF), "gelu_tanh")


@kernels
@pytest.mark.usefixtures("_on_the_cpu")
def test_the_kernel_writes_over_the_branches() -> None:
    given = {name: wide(x, None, DEVICE) for name, x in problem(70, 70, (3, 3, 3), HALF).items()}
    want = swiglu_back(**given)
    swiglu_back(**given, out=(given["g"], given["u"]))
    assert torch.equal(given["g"], want.dg)
    assert torch.equal(given["u"], want.du)


@kernels
@pytest.mark.usefixtures("_on_the_cpu")
def test_bf16_without_products() -> None:
    given = {name: wide(x, None, DEVICE) for name, x in problem(35, 70, (0, 0, 0), BF16).items()}
    exact = {name: wide(x, FP64, DEVICE) for name, x in given.items()}
    back, want = swiglu_back(**given, want_h=True), reference.swiglu_back(**exact, want_h=True)
    near(back.dg, want.dg)
    near(back.du, want.du)
    near(back.h, want.h)


# ---- both without a GPU ----------------------------------------------------------------------------------------------

COMPILED = """
import re
import subprocess
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rankshift.ops.swiglu.triton import (
    _BACKWARD, _FORWARD, _REGISTERS, _WIDE, _WIDE_GAINED, _backward, _backward_wide, _forward
)

def compiled(kernel, types, num_warps, options={}, **constants):
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {**dict(zip(names, types, strict=True)), **dict.fromkeys(constants, "constexpr")}
    round = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in names if name != "scale"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=round)
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps, **options})
    cubin = Path(sys.argv[1]) / "kernel.cubin"
    cubin.write_bytes(found.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    used = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    assert re.search(r"STACK:(\\d+)", used)[1] == "0", "registers are spilled: " + used
    ptx = found.asm["ptx"]
    scalar = re.search(r"(ld|st)[.]global[.a-z:0-9]*[.]b16", ptx)
    assert not scalar or not constants["EVEN"], "what a thread takes at once is one number"
    return ptx

back = ["*bf16"] * 6 + ["*fp32"] + ["*bf16"] * 6 + ["*fp32"] + ["i32"] * 17 + ["fp32"]
for r, gains in ((0, 0), (16, 0), (64, 0), (128, 0), (16, 2), (16, 3), (64, 3), (128, 2)):
    ranks = dict(GELU=r == 64, RG=r, RU=r, GAINS=gains, EVEN=True)
    tile, _ = _FORWARD[r]
    ptx = compiled(_forward, ["*bf16"] * 7 + ["*fp32"] + ["i32"] * 11, tile["WARPS"], **ranks, **tile)
    assert ("mma.sync" in ptx) == (r > 0), "products are not on the tensor cores"
    sums = dict(H=r == 128, RH=r, SH=0 < r < 128, SG=0 < r < 128, SU=0 < r < 128)
    if r in _BACKWARD:
        tile, _ = _BACKWARD[r]
        options = {"maxnreg": _REGISTERS[r]} if r in _REGISTERS and not gains else {}
        ptx = compiled(_backward, back, tile["WARPS"], options, **sums, **ranks, **tile)
        assert ("mma.sync" in ptx) == (r > 0), "products are not on the tensor cores"
        assert "st.global.v4.b32" in ptx, "what a thread writes at once is less than it has in a row"
    else:
        tile = {k: v for k, v in (_WIDE_GAINED if gains else _WIDE).items() if k != "num_warps"}
        assert "wgmma" in compiled(_backward_wide, back, _WIDE["num_warps"], **sums, **ranks, **tile)
compiled(_backward, ["*fp16" if t == "*bf16" else t for t in back], 4, GELU=True, RG=5, RU=5, GAINS=2, EVEN=False,
         H=True, RH=5, SH=True, SG=True, SU=True, **_BACKWARD[16][0])
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
    run(script, tmp_path, TRITON_CACHE_DIR=str(tmp_path))
