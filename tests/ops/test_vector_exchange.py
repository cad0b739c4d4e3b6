"""Exchanges of vectors: which layers the kernels take, what they compute under the interpreter, that they compile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rankshift.ops.vector_exchange import fits, op, plain

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rankshift.ops.vector_exchange.triton import _BLOCK, _LENGTH, _TILE, _hold, _rewrite, _swap

def compiled(kernel, *types, **constants):
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {**dict(zip(names, types, strict=True)), **dict.fromkeys(constants, "constexpr")}
    places = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types) if kind[0] == "*"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=places)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]

for void in (True, False):
    ptx = compiled(_swap, "*i64", "*fp32", "*fp32", "fp32", "i32", "i32", "i32", VOID=void, SIZE=_LENGTH)
    assert "ld.global.v4" in ptx, "rows of A are not read 16 bytes at a time"
    ptx = compiled(_rewrite, "*i64", "*fp32", "*fp32", "i32", "i32", VOID=void, M=_TILE[0], N=_TILE[1])
    assert "fma.rn.f32" in ptx
    assert ptx.count("st.global.v4") == _TILE[0] * _TILE[1] // (128 * 4), "W is not written 16 bytes at a time"
    compiled(_hold, "*i64", "*fp32", "i32", "i32", VOID=void, LENGTH=_BLOCK[0], SOME=_BLOCK[1])
"""


def test_what_the_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    m, n, r = 6, 8, 3
    W, A, B = (nn.Parameter(torch.zeros(size)) for size in ((m, n), (r, n), (m, r)))
    assert not fits(W, A, B), "there is no GPU"
    monkeypatch.setattr(op, "runs_on", lambda device: True)
    assert fits(W, A, B)
    assert not fits(W.double(), A.double(), B.double())
    assert not fits(W, A, B.to("meta")), "elsewhere"
    assert not fits(torch.zeros(m, 10), torch.zeros(r, 10), B), "rows of W begin at multiples of 16 bytes"
    assert not fits(torch.zeros(m, n, 1), A, B), "a convolution's"
    assert not fits(torch.zeros(n, m).t(), A, B)
    assert not fits(W, A, torch.zeros(r, m).t())
    assert not fits(torch.zeros(n * m + 1)[1:].view(m, n), A, B)


def test_a_kind_of_tensor_that_they_do_not_know() -> None:
    class Elsewhere(torch.Tensor):
        """As DTensor: what it holds is not where data_ptr says."""

    assert plain(torch.zeros(3))
    assert plain(nn.Parameter(torch.zeros(3)))
    assert not plain(torch.zeros(3).as_subclass(Elsewhere))


def run(*command: str | Path, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, *command], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


def test_they_compute_what_their_reference_does() -> None:
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    tests = Path(__file__).with_name("vector_exchange_interpreted.py")
    run("-m", "pytest", "-p", "no:cacheprovider", tests, TRITON_INTERPRET="1")


def test_they_compile(tmp_path: Path) -> None:
    """For a GPU that is not here: the interpreter takes what the compiler refuses."""
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED)
    run(script, TRITON_CACHE_DIR=str(tmp_path))
