"""Columns of many weights written at once: which tensors the kernel takes, what it computes, that it compiles."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from elsewhere import run
from torch import nn

from rankshift.ops.column_write import Layer, fits, op, reference, write_

COMPILED = """
import os
import subprocess
import sys

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rankshift.ops.column_write.triton import _TILE, _write

M, most, warps = _TILE
for kind, rank in ((tl.bfloat16, 64), (tl.float16, 64), (tl.bfloat16, 5), (tl.bfloat16, 128)):
    constants = {"R": rank, "KIND": kind, "M": M, "N": triton.next_power_of_2(rank)}
    signature = {"table": "*i64", "count": "i32", **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=_write, signature=signature, constexprs=constants, attrs={(0,): [["tt.divisibility", 16]]})
    options = {"num_warps": max(1, min(warps, constants["N"] // 32)), "enable_fp_fusion": False}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert "fma.rn" not in ptx, "a product and a sum are rounded once"
    assert ("cvt.rn.bf16.f32" if kind == tl.bfloat16 else "cvt.rn.f16.f32") in ptx
    assert ptx.count("st.global.b16") == M, "a thread does not have a column"
    assert ptx.rindex("ld.global") < ptx.index("st.global"), "it waits for what it reads more than once"
    with open(sys.argv[1], "w") as file:
        file.write(ptx)
    command = [knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", sys.argv[1], "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert " 0 bytes spill stores" in said.stderr, said.stderr
"""


def layer(out: int = 6, into: int = 10, rank: int = 4, dtype: torch.dtype = torch.bfloat16) -> Layer:
    W, origin = nn.Parameter(torch.zeros(out, into, dtype=dtype), False), torch.zeros(out, rank, dtype=dtype)
    return Layer(W, nn.Parameter(torch.zeros(out, rank)), origin, torch.arange(rank), 0.5)


def test_what_the_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    good = layer()
    assert not fits(good), "there is no GPU"
    monkeypatch.setattr(op, "runs_on", lambda device: True)
    assert fits(good)
    assert fits(layer(dtype=torch.float16))
    assert fits(good._replace(W=torch.zeros(9, 10).bfloat16()[3:]))
    assert not fits(layer(dtype=torch.float32))
    assert not fits(good._replace(origin=good.origin.half()))
    assert not fits(good._replace(D=good.D.double()))
    assert not fits(good._replace(D=torch.zeros(4, 6).t()))
    assert not fits(good._replace(D=good.D.detach().to("meta")))
    assert not fits(good._replace(W=torch.zeros(10, 6).bfloat16().t()))
    assert not fits(good._replace(channels=good.channels.int()))

    class Elsewhere(torch.Tensor):
        """As DTensor: what it holds is not where data_ptr says."""

    assert not fits(good._replace(W=good.W.detach().as_subclass(Elsewhere)))


def test_the_reference_is_the_weight_plus_the_change() -> None:
    """In float64, by a product with rows of the identity."""
    draw = torch.Generator().manual_seed(0)
    W, D = (torch.randn(5, n, generator=draw, dtype=torch.float64) for n in (9, 3))
    channels = torch.tensor([1, 4, 8])
    want = W + 0.3 * D @ torch.eye(9, dtype=torch.float64)[channels]
    reference.write_(W, D, W[:, channels].clone(), channels, 0.3)
    torch.testing.assert_close(W, want, rtol=1e-15, atol=1e-15)


def test_it_computes_what_its_reference_does() -> None:
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    tests = Path(__file__).with_name("column_write_interpreted.py")
    run("-m", "pytest", "-p", "no:cacheprovider", tests, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


def test_it_compiles(tmp_path: Path) -> None:
    """For a GPU that is not here: the interpreter takes what the compiler refuses."""
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED)
    run(script, str(tmp_path / "ptx"), TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [5, 64])
def test_on_a_gpu_the_bits_are_those_of_torch(rank: int, dtype: torch.dtype) -> None:
    draw = torch.Generator("cuda").manual_seed(0)
    layers = []
    for out, into in ((2048, 2048), (512, 2048), (333, 130)):
        W, origin = (torch.randn(out, n, generator=draw, device="cuda").to(dtype) for n in (into, rank))
        D = torch.randn(out, rank, generator=draw, device="cuda")
        channels = torch.randperm(into, device="cuda")[:rank].sort().values
        layers.append(Layer(W, D, origin, channels, 0.3))
    wants = [one.W.clone() for one in layers]
    for one, want in zip(layers, wants, strict=True):
        reference.write_(want, *one[1:])
    write_(layers)
    assert all(torch.equal(one.W, want) for one, want in zip(layers, wants, strict=True))
