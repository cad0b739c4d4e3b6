"""RMSNorm with the sum before it: the equations against autograd, and the kernels without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from elsewhere import run
from torch import Tensor

from rankshift.ops.rms_norm import add, add_back, norm, norm_back, pick

T, K, R, EPS = 5, 12, 3, 1e-3


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def plain(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    return x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + EPS).sqrt() * (weight + offset)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_forward_and_back_are_the_plain_equation(offset: float) -> None:
    x, y, Z, B, weight, dn, past = (
        drawn(T, K),
        drawn(T, K),
        drawn(T, R),
        drawn(K, R),
        drawn(K),
        drawn(T, K),
        drawn(T, K),
    )
    y, past = y.flip(0), past.flip(1)
    S, A = drawn(T, R).flip(0), drawn(R, K)
    total = (x + y + torch.einsum("tr,kr->tk", Z, B)).requires_grad_()
    n = plain(total, weight, offset)
    got = norm(x, weight, EPS, offset, y, (Z, B))
    torch.testing.assert_close(got[0], total.detach())
    torch.testing.assert_close(got[1], n.detach())
    torch.testing.assert_close(got[2], (total.pow(2).mean(1) + EPS).rsqrt().detach())
    torch.testing.assert_close(add(x, y, (Z, B)), total.detach())
    torch.testing.assert_close(add(x, y), x + y)
    ((n * (dn + S @ A)).sum() + (total * past).sum()).backward()
    torch.testing.assert_close(norm_back(dn, got[0], got[2], weight, offset, (S, A), past), total.grad)
    z = got[1] @ A.t()
    torch.testing.assert_close(norm_back(dn, got[0], got[2], weight, offset, (S, A), past, z), total.grad)
    parts = dn - 0.75 * past, past / 4, past / 2
    got_of_parts = norm_back(parts[0], got[0], got[2], weight, offset, (S, A), past, more=parts[1:])
    torch.testing.assert_close(got_of_parts, total.grad)
    (bare,) = torch.autograd.grad(plain(total, weight, offset), total, dn)
    torch.testing.assert_close(norm_back(dn, got[0], got[2], weight, offset), bare)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("term", [False, True])
def test_a_gain_of_what_is_added(term: bool, biased: bool) -> None:
    """x + μ ρ (y + Z Bᵀ) + b; the gradient of μ, ρ being a constant."""
    x, y, Z, B, weight, dx = drawn(T, K), drawn(K, T).t(), drawn(T, R), drawn(K, R), drawn(K), drawn(T, K).flip(0)
    mu, rho, b = drawn(3, K).unbind()
    low = (Z, B) if term else None
    gain = torch.stack((mu * rho, b, rho) if biased else (mu * rho, rho))
    base = (y + Z @ B.t() if term else y.clone()).requires_grad_()
    total = x + mu.requires_grad_() * rho * base + (b if biased else 0)
    torch.testing.assert_close(add(x, y, low, gain), total.detach())
    x2, n, _ = norm(x, weight, EPS, 0.0, y, low, gain)
    torch.testing.assert_close(x2, total.detach())
    torch.testing.assert_close(n, plain(total, weight, 0.0).detach())
    torch.testing.assert_close(add_back(dx, y, low, gain), torch.autograd.grad(total, (base, mu), dx))


def test_it_is_the_norm_of_transformers() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    module = LlamaRMSNorm(K, EPS)
    with torch.no_grad():
        module.weight.copy_(drawn(K))
        x = drawn(T, K, dtype=torch.float32)
        torch.testing.assert_close(norm(x, module.weight, EPS)[1], module(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_sums_are_rounded_once(dtype: torch.dtype) -> None:
    x, y, Z, B, weight = (drawn(*s, dtype=dtype) for s in [(T, K), (K, T), (T, R), (K, R), (K,)])
    y = y.t().contiguous()
    before = [t.clone() for t in (x, y, Z, B)]
    x2, n, rstd = norm(x, weight, EPS, 0.0, y, (Z, B))
    exact = x.double() + y.double() + Z.double() @ B.double().t()
    assert x2.dtype == n.dtype == dtype
    assert rstd.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype.itemsize == 2:
        assert torch.equal(x2, exact.to(dtype))
        torch.testing.assert_close(rstd.double(), (x2.double().pow(2).mean(1) + EPS).rsqrt(), rtol=1e-6, atol=0)
        assert torch.equal(n, plain(x2.double(), weight.double(), 0.0).to(dtype))
        assert norm_back(n, x2, rstd, weight, residual=x).dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(before, (x, y, Z, B), strict=True)), "an input was changed"
    assert norm(x, weight, EPS)[0] is x


def test_a_term_without_what_it_is_added_to_is_refused() -> None:
    with pytest.raises(ValueError, match="give y"):
        norm(drawn(T, K), drawn(K), EPS, low=(drawn(T, R), drawn(K, R)))
    with pytest.raises(ValueError, match="give y"):
        norm(drawn(T, K), drawn(K), EPS, gain=drawn(2, K))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_picked(dtype: torch.dtype) -> None:
    x, w, channels = drawn(T, K).to(dtype), drawn(K).to(dtype), torch.tensor([4, 0, 9])
    _, n, rstd = norm(x, w, EPS, 1.0)
    close = {"rtol": 0.01 if dtype is torch.bfloat16 else 1e-12, "atol": 0}
    torch.testing.assert_close(pick(x, channels, rstd, w, 1.0, 0.3), 0.3 * n[:, channels], **close)
    torch.testing.assert_close(pick(x, channels, scale=0.3), 0.3 * x[:, channels], **close)
    assert torch.equal(pick(x, channels), x[:, channels])
    more = torch.tensor([1, 4])
    assert torch.equal(pick(x, (channels, more)), x[:, [4, 0, 9, 1, 4]])


# ---- the kernels -----------------------------------------------------------------------------------------------------

COMPILED = """
import os
import subprocess
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from triton import knobs

from rankshift.ops.rms_norm.triton import (
    _ADD, _ADD_BACK, _BACK, _NORM, _PICK, _add, _add_back, _norm, _norm_back, _pick
)

def compiled(kernel, types, warps, **constants):
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {**dict(zip(names, types, strict=True)), **dict.fromkeys(constants, "constexpr")}
    even = [kernel.arg_names.index(name) for name in names if signature[name] in ("i32", "*bf16", "*fp32")]
    places = {(i,): [["tt.divisibility", 16]] for i in even}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=places)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    wide = made.asm["ptx"].count("st.global.v4.b32")
    singly = {_norm: 1, _add_back: 3}.get(kernel, 0)  # vectors, and a counter
    assert made.asm["ptx"].count("st.global") <= wide + singly, "it does not store 16 bytes at once"
    assert made.metadata.shared < 160_000
    return made

def unspilled(made):
    with open(sys.argv[1], "w") as file:
        file.write(made.asm["ptx"])
    command = [knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", sys.argv[1], "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True)
    assert " 0 bytes spill stores" in said.stderr, said.stderr

P = ["*bf16"]
norm = P * 4 + ["*fp32"] + P * 3 + ["*fp32"] + ["i32"] * 6 + ["fp32"] * 2
for r, (M, N, warps, deep) in _NORM.items():
    for gains in (0, 2, 3):
        made = compiled(_norm, norm, warps, K=2048, R=r, GAINS=gains, SUM=True, EVEN=True, M=M, N=N, DEEP=deep)
        assert "mma.sync" in made.asm["ptx"]
        assert "cp.async.cg.shared.global" in made.asm["ptx"], "nothing is on its way while it computes"
        unspilled(made)
compiled(_norm, norm, 8, K=520, R=0, GAINS=0, SUM=False, EVEN=False, M=16, N=512, DEEP=3)
for r, (M, N, warps, deep) in _BACK.items():
    for known, more in ((True, 0), (False, 0), (True, 2)):
        compiled(_norm_back, P * 4 + ["*fp32"] + P * 6 + ["i32"] * 9 + ["fp32"], warps, K=2048, R=r, KNOWN=known,
                 PAST=True, MORE=more, EVEN=True, M=M, N=N, DEEP=deep)
for r, (M, N, warps) in _ADD.items():
    for gains in (0, 3):
        unspilled(compiled(_add, P * 4 + ["*fp32"] + P + ["i32"] * 6, warps, K=2048, R=r, GAINS=gains, EVEN=True,
                           M=M, N=N))
for r, (M, N, warps) in _ADD_BACK.items():
    types = P * 4 + ["*fp32"] + P + ["*fp32"] * 2 + ["*i32"] + ["i32"] * 7
    unspilled(compiled(_add_back, types, warps, K=2048, R=r, GAINS=2, EVEN=True, M=M, N=N))
M = _PICK[0]
for ranks in ((64,), (64, 64, 64), (64, 16, 5)):
    last = {"RANKS": ranks, "NORMED": True, "M": M, "N": 64}
    kinds = dict.fromkeys(last, "constexpr")
    types = ["*bf16", ("*i64",) * len(ranks), "*fp32", "*bf16", "*bf16", "i32", "i32", "i32", "fp32", "fp32"]
    signature = {**dict(zip(_pick.arg_names, types)), **kinds}
    even = [(0,), *[(1, i) for i in range(len(ranks))], (2,), (3,), (4,), (5,), (7,)]
    places = {at: [["tt.divisibility", 16]] for at in even}
    constants = {(_pick.arg_names.index(name),): value for name, value in last.items()}
    source = ASTSource(fn=_pick, signature=signature, constexprs=constants, attrs=places)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 2}).asm["ptx"]
    assert ptx.count("st.global.b16") == M * len(ranks), "a thread does not have a column"
    assert ptx.rindex("ld.global") < ptx.index("st.global"), "it waits for what it reads more than once"
    assert "shared" not in ptx
"""


def test_the_kernels_compute_the_same() -> None:
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    run(
        "-m", "pytest", "-p", "no:cacheprovider", Path(__file__).with_name("rms_norm_interpreted.py"),
        TRITON_INTERPRET="1",
    )  # fmt: skip


def test_the_kernels_compile(tmp_path: Path) -> None:
    """For a GPU that is not here: the interpreter takes what the compiler refuses."""
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED)
    run(script, tmp_path / "kernel.ptx", TRITON_CACHE_DIR=str(tmp_path))
