"""Normed heads, rotated: the equations against transformers and autograd, and the kernels without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from elsewhere import run
from torch import Tensor

from rankshift.ops.head_norm import norm_rotate_, norm_rotate_back

BATCH, S, HQ, HK, D, R, EPS = 2, 5, 4, 2, 6, 3, 1e-3
T, WIDTHS = BATCH * S, (HQ * D, HK * D, HK * D)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tables(rows: int) -> tuple[Tensor, Tensor]:
    """As if they had been rounded: no rotation leaves a length as it is."""
    angle = drawn(rows, D // 2).repeat(1, 2)
    return 1.1 * angle.cos(), 1.1 * angle.sin()


def heads(rows: Tensor) -> Tensor:
    """(T, H·D) as attention takes it, (batch, H, S, D)."""
    return rows.view(BATCH, S, -1, D).transpose(1, 2)


@pytest.mark.parametrize("terms", [False, True])
@pytest.mark.parametrize("rows", [S, T])
def test_it_is_what_transformers_does_and_its_gradient(rows: int, terms: bool) -> None:
    from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

    cos, sin = tables(rows)
    packed = drawn(T, sum(WIDTHS) + 3)
    pairs = tuple((drawn(T, R, seed=i), drawn(n, R, seed=9 + i)) for i, n in enumerate(WIDTHS))
    low = pairs if terms else (None, None, None)
    weights = drawn(D, seed=20), drawn(D, seed=21)
    q, k, v, rest = packed.split((*WIDTHS, 3), 1)
    leaves = [(t + (Z @ B.t() if terms else 0)).requires_grad_() for t, (Z, B) in zip((q, k, v), pairs, strict=True)]
    normed = [torch.nn.functional.rms_norm(heads(t), (D,), w, EPS) for t, w in zip(leaves, weights, strict=False)]
    by_sequence = (t.view(-1, S, D).expand(BATCH, -1, -1) for t in (cos, sin))
    turned = [*apply_rotary_pos_emb(*normed, *by_sequence), heads(leaves[2])]
    grads = [drawn(*t.shape, seed=i) for i, t in enumerate(turned)]
    torch.autograd.backward(turned, grads)
    before = rest.clone()
    rho = norm_rotate_(q, k, v, cos, sin, weights, EPS, low)  # type: ignore[arg-type]
    assert rho.shape == (T, HQ + HK)
    out = packed.clone().split((*WIDTHS, 3), 1)
    norm_rotate_back(*grads, (q, k), rho, cos, sin, weights, out[:3])  # type: ignore[arg-type]
    for got, want, back, leaf in zip((q, k, v), turned, out[:3], leaves, strict=True):
        torch.testing.assert_close(heads(got), want.detach())
        torch.testing.assert_close(back, leaf.grad)
    assert torch.equal(rest, before)
    assert torch.equal(out[3], before)


def test_what_was_rounded_gives_gradients_as_exact() -> None:
    """The heads that attention keeps are in bf16; their gradient is as far from that of float64 as bf16 is."""
    cos, sin = tables(S)
    weights = drawn(D, seed=20), drawn(D, seed=21)
    exact = [drawn(T, n, seed=n) for n in WIDTHS]
    grads = [heads(drawn(T, n, seed=1 + n)) for n in WIDTHS]
    outs = []
    for dtype in (torch.float64, torch.bfloat16):
        q, k, v = (t.to(dtype).clone() for t in exact)
        lower = [t.to(dtype) for t in (cos, sin)], tuple(w.to(dtype) for w in weights)
        rho = norm_rotate_(q, k, v, *lower[0], lower[1], EPS)  # type: ignore[arg-type]
        assert rho.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        out = tuple(torch.empty(T, n, dtype=dtype) for n in WIDTHS)
        norm_rotate_back(*(g.to(dtype) for g in grads), (q, k), rho, *lower[0], lower[1], out)  # type: ignore[arg-type]
        outs.append(out)
    for want, got in zip(*outs, strict=True):
        assert float((got.double() - want).norm() / want.norm()) < 0.02


# ---- the kernels -----------------------------------------------------------------------------------------------------

COMPILED = """
import os
import subprocess
import sys

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rankshift.ops.head_norm.triton import _WARPS, _norm_rotate, _norm_rotate_back, rows

def compiled(kernel, types, warps, **constants):
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {**dict(zip(names, types, strict=True)), **dict.fromkeys(constants, "constexpr")}
    whole = [name for name, kind in zip(names, types, strict=True) if kind != "fp32"]
    places = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in whole}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=places)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]
    with open(sys.argv[1], "w") as file:
        file.write(ptx)
    command = [knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", sys.argv[1], "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True)
    assert " 0 bytes spill stores" in said.stderr, said.stderr
    return ptx

for r in (64, 128):
    for half in (32, 40, 64, 128):
        types = ["*bf16"] * 13 + ["*fp32"] + ["i32"] * 13 + ["fp32"]
        sizes = dict(HQ=32, HK=8, HALF=half, M=rows(half, r))
        ptx = compiled(_norm_rotate, types, _WARPS, RQ=r, RK=r, RV=r, EVEN=True, **sizes)
        assert "mma" in ptx
        compiled(_norm_rotate, types, _WARPS, RQ=0, RK=0, RV=0, EVEN=True, **sizes)
for half in (32, 40, 64, 128):
    types = ["*bf16"] * 5 + ["*fp32"] + ["*bf16"] * 7 + ["i32"] * 19
    ones = dict(dq_one=1, dk_one=1, dv_one=1)
    ptx = compiled(_norm_rotate_back, types, _WARPS, HQ=32, HK=8, HALF=half, EVEN=True, M=rows(half, 0) // 2, **ones)
    assert ptx.count("ld.global.v4.b32") >= 4, "it does not load 16 bytes at once"
"""


def test_the_kernels_compute_the_same() -> None:
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    run(
        "-m", "pytest", "-p", "no:cacheprovider", Path(__file__).with_name("head_norm_interpreted.py"),
        TRITON_INTERPRET="1",
    )  # fmt: skip


def test_the_kernels_compile(tmp_path: Path) -> None:
    """For a GPU that is not here: the interpreter takes what the compiler refuses."""
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED)
    run(script, tmp_path / "kernel.ptx", TRITON_CACHE_DIR=str(tmp_path))
