"""Triton's kernels without a GPU: what they compute, under the interpreter, and that they compile for one."""

from __future__ import annotations

from pathlib import Path

import pytest
from elsewhere import run

pytest.importorskip("triton", reason="Triton is there on Linux only")

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rankshift.ops.four_bit.triton import _EXACT, _TILE as _RUNS, _dequantise
from rankshift.ops.fp8.triton import _rows
from rankshift.ops.projected_fold.triton import _TILE, _fold
from rankshift.ops.stochastic_rounding.triton import _round

def compiled(kernel, types, aligned=False, options=None, **constants):
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {**dict(zip(names, types, strict=True)), **dict.fromkeys(constants, "constexpr")}
    places = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types) if kind[0] == "*" and aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=places)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

for kind in ("bf16", "fp16"):
    compiled(_round, ["*i16" if kind == "bf16" else "*fp16", "*fp32", "i32", "i64", "i32"], KIND=kind, SIZE=1024)
tile = dict(zip("NMR", _TILE))
for kind, random in (("bf16", True), ("bf16", False), ("fp16", True), ("fp32", False)):
    ptx = compiled(
        _fold, ["*i64", "*i64", "*fp32", "fp32", "i32", "i32"], r=128, KIND=kind, RANDOM=random, VOID=True,
        PRECISION="tf32x3" if kind == "fp32" else "tf32", **tile,
    )
    assert "wgmma" in ptx, "the product is not on the tensor cores"
for kind, nested, whole in (
    ("bf16", True, True), ("bf16", False, True), ("fp32", True, True), ("fp16", True, False), ("fp32", False, False)
):
    ptx = compiled(
        _dequantise, ["*u8", "*u8" if nested else "*fp32", "*fp32", "*fp32", "*" + kind, "i32" if whole else "i64"],
        aligned=True, options={"num_warps": _RUNS[1], **_EXACT}, BLOCK=64, NESTED=nested, WHOLE=whole,
        RUNS=_RUNS[0], WIDTH=4 if kind == "fp32" else 8,
    )
    assert "fma.rn" not in ptx, "a product and a sum are rounded once"
    if whole:
        times = _RUNS[0] // (32 * _RUNS[1])
        assert ptx.count("st.global.v4.b32") == times, "what a thread writes at once is not 16 bytes"
        assert ptx.count("ld.global.b8") == (times if nested else 0), "it is not only absmax that comes byte by byte"
for kind, fold in (("bf16", False), ("bf16", True), ("fp16", False)):
    ptx = compiled(
        _rows, ["*" + kind, "*fp32", "*fp8e4nv", "*fp32", "i32", "i32"], aligned=True, options={"num_warps": 4},
        FOLD=fold, SIZE=4096,
    )
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx, "not by the instruction that rounds to the nearest"
"""


@pytest.mark.parametrize("file", ["kernels_interpreted.py", "four_bit_interpreted.py", "fp8_interpreted.py"])
def test_they_compute_what_their_references_do(file: str) -> None:
    tests = Path(__file__).with_name(file)
    run("-m", "pytest", "-p", "no:cacheprovider", tests, TRITON_INTERPRET="1")


def test_they_compile(tmp_path: Path) -> None:
    """For a GPU that is not here: the interpreter takes what the compiler refuses."""
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED)
    run(script, TRITON_CACHE_DIR=str(tmp_path))
