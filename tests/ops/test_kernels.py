"""Triton's kernels without a GPU: what they compute, under the interpreter, and that they compile for one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is there on Linux only")

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rankshift.ops.projected_fold.triton import _TILE, _fold
from rankshift.ops.stochastic_rounding.triton import _round

def compiled(kernel, types, **constants):
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {**dict(zip(names, types, strict=True)), **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

for kind in ("bf16", "fp16"):
    compiled(_round, ["*i16" if kind == "bf16" else "*fp16", "*fp32", "i32", "i64", "i32"], KIND=kind, SIZE=1024)
tile = dict(zip("NMR", _TILE))
for kind, random in (("bf16", True), ("bf16", False), ("fp16", True), ("fp32", False)):
    ptx = compiled(
        _fold, ["*i64", "*i64", "*fp32", "fp32", "i32", "i32"], r=128, KIND=kind, RANDOM=random, VOID=True,
        PRECISION="tf32x3" if kind == "fp32" else "tf32", **tile,
    )
    assert "wgmma" in ptx, "the product is not on the tensor cores"
"""


def run(*command: str | Path, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, *command], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


def test_they_compute_what_their_references_do() -> None:
    tests = Path(__file__).with_name("kernels_interpreted.py")
    run("-m", "pytest", "-p", "no:cacheprovider", tests, TRITON_INTERPRET="1")


def test_they_compile(tmp_path: Path) -> None:
    """For a GPU that is not here: the interpreter takes what the compiler refuses."""
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED)
    run(script, TRITON_CACHE_DIR=str(tmp_path))
