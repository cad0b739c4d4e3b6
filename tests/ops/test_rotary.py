"""Rotary positions: the equations against transformers and autograd, and the kernels without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from elsewhere import run
from torch import Tensor

from rankshift.ops.rotary import rotate_, rotate_back

BATCH, S, HQ, HK, D, R = 2, 5, 4, 2, 6, 3
T, WIDTHS = BATCH * S, (HQ * D, HK * D, HK * D)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tables(rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    angle = drawn(rows, D // 2).repeat(1, 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def heads(rows: Tensor) -> Tensor:
    """(T, H·D) as attention takes it, (batch, H, S, D)."""
    return rows.view(BATCH, S, -1, D).transpose(1, 2)


@pytest.mark.parametrize("rows", [S, T])
def test_it_is_the_rotation_of_transformers_and_its_gradient(rows: int) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = tables(rows)
    packed = drawn(T, sum(WIDTHS) + 3)
    low = tuple((drawn(T, R, seed=i), drawn(n, R, seed=9 + i)) for i, n in enumerate(WIDTHS))
    q, k, v, rest = packed.split((*WIDTHS, 3), 1)
    leaves = [(t + Z @ B.t()).requires_grad_() for t, (Z, B) in zip((q, k, v), low, strict=True)]
    by_sequence = (t.view(-1, S, D).expand(BATCH, -1, -1) for t in (cos, sin))
    turned = [*apply_rotary_pos_emb(heads(leaves[0]), heads(leaves[1]), *by_sequence), heads(leaves[2])]
    grads = [drawn(*t.shape, seed=i) for i, t in enumerate(turned)]
    torch.autograd.backward(turned, grads)
    before = rest.clone()
    rotate_(q, k, v, cos, sin, low, head=D)  # type: ignore[arg-type]
    out = packed.clone().split((*WIDTHS, 3), 1)
    rotate_back(*grads, cos, sin, out[:3])  # type: ignore[arg-type]
    for got, want, back, leaf in zip((q, k, v), turned, out[:3], leaves, strict=True):
        torch.testing.assert_close(heads(got), want.detach())
        torch.testing.assert_close(back, leaf.grad)
    assert torch.equal(rest, before)
    assert torch.equal(out[3], before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_it_is_rounded_once(dtype: torch.dtype) -> None:
    cos, sin = tables(S, dtype)
    q, k, v = (drawn(T, n, seed=n, dtype=dtype) for n in WIDTHS)
    term = drawn(T, R, dtype=dtype), drawn(WIDTHS[0], R, seed=5, dtype=dtype)
    exact = [t.double() for t in (q, k, v)]
    rotate_(*exact, cos.double(), sin.double(), ((term[0].double(), term[1].double()), None, None), head=D)
    same = v.clone()
    rotate_(q, k, v, cos, sin, (term, None, None), head=D)
    for got, want in zip((q, k), exact[:2], strict=True):
        assert got.dtype == dtype
        far = (got.double() - want).abs()
        assert (far <= torch.finfo(dtype).eps / 2 * want.abs() + 1e-6).all()
    assert torch.equal(v, same)


@pytest.mark.parametrize("terms", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_a_gain(biased: bool, terms: bool) -> None:
    """μ ρ (y + Z Bᵀ) + b, rotated, by tables that are rounded; the gradient of μ, ρ being a constant."""
    cos, sin = (table.bfloat16().double() for table in tables(S))
    packed, columns = drawn(T, sum(WIDTHS)), sum(WIDTHS)
    low = tuple((drawn(T, R, seed=i), drawn(n, R, seed=9 + i)) if terms else None for i, n in enumerate(WIDTHS))
    mu, rho, b = drawn(3, columns, seed=4).unbind()
    ys = packed.split(WIDTHS, 1)
    leaves = [
        (y + (0 if term is None else term[0] @ term[1].t())).requires_grad_() for y, term in zip(ys, low, strict=True)
    ]
    whole = mu.requires_grad_() * rho * torch.cat(leaves, 1) + (b if biased else 0)
    turned = [heads(t) for t in whole.split(WIDTHS, 1)]
    for i in (0, 1):
        first, second = turned[i].chunk(2, -1)
        c, s = (table[:, : D // 2] for table in (cos, sin))
        turned[i] = torch.cat((first * c - second * s, second * c + first * s), -1)
    grads = [drawn(*t.shape, seed=i) for i, t in enumerate(turned)]
    want = torch.autograd.grad(turned, (*leaves, mu), grads)
    gain = torch.stack((mu * rho, b, rho) if biased else (mu * rho, rho)).detach()
    q, k, v = (y.clone() for y in ys)
    rotate_(q, k, v, cos, sin, low, head=D, gain=gain)  # type: ignore[arg-type]
    torch.testing.assert_close([heads(y) for y in (q, k, v)], [t.detach() for t in turned])
    out = packed.clone().split(WIDTHS, 1)
    found = rotate_back(*grads, cos, sin, out, (q, k, v), gain)  # type: ignore[arg-type]
    torch.testing.assert_close((*out, found), want)
    assert rotate_back(*grads, cos, sin, out) is None  # type: ignore[arg-type]


def test_a_gain_of_zero_has_no_gradient() -> None:
    cos, sin = tables(S)
    gain = torch.ones(2, sum(WIDTHS), dtype=torch.float64)
    gain[0, 5] = 0
    ys = [drawn(T, n, seed=n) for n in WIDTHS]
    out = tuple(torch.empty_like(y) for y in ys)
    rotate_(*ys, cos, sin, head=D, gain=gain)  # type: ignore[arg-type]
    found = rotate_back(*map(heads, ys), cos, sin, out, tuple(ys), gain)  # type: ignore[arg-type]
    assert found is not None
    assert ((found == 0) == (gain[0] == 0)).all()
    assert found.isfinite().all()


def test_gradients_come_in_any_layout() -> None:
    cos, sin = tables(S)
    grads = [drawn(D, S, h, BATCH, seed=h).permute(3, 2, 1, 0) for h in (HQ, HK, HK)]
    outs = []
    for some in (grads, [g.contiguous() for g in grads]):
        outs.append(tuple(torch.zeros(T, n, dtype=torch.float64) for n in WIDTHS))
        rotate_back(*some, cos, sin, outs[-1])  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


# ---- the kernels -----------------------------------------------------------------------------------------------------

COMPILED = """
import os
import subprocess
import sys

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rankshift.ops.rotary.triton import _BACK, _BACK_GAINED, _TILE, _rotate, _rotate_back, _rotate_back_gained

def compiled(kernel, types, warps, **constants):
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {**dict(zip(names, types, strict=True)), **dict.fromkeys(constants, "constexpr")}
    places = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=places)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]
    small = 13 if kernel is _rotate_back_gained else 0  # sums and their parts
    assert ptx.count("st.global") - small <= ptx.count("st.global.v4.b32"), "it does not store 16 bytes at once"
    with open(sys.argv[1], "w") as file:
        file.write(ptx)
    command = [knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", sys.argv[1], "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True)
    assert " 0 bytes spill stores" in said.stderr, said.stderr
    return ptx

for r, (M, N, warps) in _TILE.items():
    for half in (32, 40, 64):
        sizes = dict(Q=32 * half, K=8 * half, V=8 * half, HALF=half, M=M, N=N)
        for gains in (0, 2, 3):
            types = ["*bf16"] * 11 + ["*fp32"] + ["i32"] * 14
            ptx = compiled(_rotate, types, warps, RQ=r, RK=r, RV=r, GAINS=gains, EVEN=True, **sizes)
            assert "mma" in ptx
compiled(_rotate, types, 4, RQ=5, RK=1, RV=0, GAINS=0, EVEN=False, **sizes | dict(V=0))
M, N, warps = _BACK
for half in (32, 40):
    sizes = dict(Q=32 * half, K=8 * half, V=8 * half, HALF=half, M=M, N=N)
    ones = dict(dq_one=1, dk_one=1, dv_one=1)
    ptx = compiled(_rotate_back, ["*bf16"] * 8 + ["i32"] * 17, warps, EVEN=True, **ones, **sizes)
    assert ptx.count("ld.global") == ptx.count("ld.global.v4.b32"), "it does not load 16 bytes at once"
M, N, warps = _BACK_GAINED
for half in (32, 40):
    sizes = dict(Q=32 * half, K=8 * half, V=8 * half, HALF=half, M=M, N=N)
    for gains in (2, 3):
        types = ["*bf16"] * 8 + ["*fp32"] + ["*bf16"] * 3 + ["*fp32"] * 2 + ["*i32"] + ["i32"] * 22
        ptx = compiled(_rotate_back_gained, types, warps, GAINS=gains, EVEN=True, **ones, **sizes)
        assert "ld.global.b16" not in ptx, "it does not load 16 bytes at once"
"""


def test_the_kernels_compute_the_same() -> None:
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    run(
        "-m", "pytest", "-p", "no:cacheprovider", Path(__file__).with_name("rotary_interpreted.py"),
        TRITON_INTERPRET="1",
    )  # fmt: skip


def test_the_kernels_compile(tmp_path: Path) -> None:
    """For a GPU that is not here: the interpreter takes what the compiler refuses."""
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED)
    run(script, tmp_path / "kernel.ptx", TRITON_CACHE_DIR=str(tmp_path))
