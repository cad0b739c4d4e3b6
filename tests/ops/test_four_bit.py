"""Weights out of 4 bits: the reference against bitsandbytes, bit by bit, and both behind ops.four_bit on the CPU.

The kernels are held to the reference in four_bit_interpreted.py."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes
import bitsandbytes.functional as F
import pytest
import torch
from elsewhere import run
from torch import Tensor

from rankshift.core.errors import UnsupportedLayer
from rankshift.ops.four_bit import dequantised, merged, reference
from rankshift.ops.frozen_linear import frozen_linear
from rankshift.storage.four_bit import FourBit

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [(64, 64), (5, 7), (1, 3), (33, 70), (48, 48), (8, 16), (300, 64), (2, 4096)]
BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]


def gaussian(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(dtype)


def test_the_tables_are_those_of_bitsandbytes() -> None:
    for name, levels in reference.LEVELS.items():
        assert torch.equal(torch.tensor(levels), F.get_4bit_type(name, device="cpu"))
    assert torch.equal(reference.dynamic_levels(), F.create_dynamic_map())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_the_reference_is_bitsandbytes_to_the_bit(nested: bool, quant_type: str, block: int) -> None:
    """Of weights in one row: of others see below."""
    for shape in SHAPES:
        for dtype in (BF16, FP16, FP32):
            W = gaussian(*shape, dtype=dtype).view(1, -1)
            codes, state = F.quantize_4bit(W, blocksize=block, compress_statistics=nested, quant_type=quant_type)
            scales, absmax = None, state.absmax
            if nested:
                scales = torch.cat([state.offset.view(1), state.state2.absmax]).view(torch.int32)
            else:
                absmax = absmax.view(torch.int32)
            rest = (block, quant_type, dtype)
            want = F.dequantize_4bit(codes, state)
            assert torch.equal(reference.dequantised(codes, absmax, scales, W.shape, *rest), want)
            found = dequantised(codes, absmax, scales, shape, *rest)
            assert found.shape == shape
            assert found.dtype == dtype
            assert torch.equal(found.view(1, -1), want)
            room = torch.empty_like(found)
            assert dequantised(codes, absmax, scales, shape, *rest, out=room) is room
            assert torch.equal(room, found)


@pytest.mark.parametrize("block", [32, 64, 256, 1024])
@pytest.mark.parametrize(("quant_type", "error"), [("nf4", 0.0919), ("fp4", 0.1219)])
def test_a_block_reaches_from_row_to_row(quant_type: str, error: float, block: int) -> None:
    """bitsandbytes' kernel for CPUs with AVX-512 takes the wrong absmax where rows are no whole blocks (0.50.2). The
    error of a Gaussian weight, in blocks of 64; it grows with the block."""
    for shape in [(1024, 16), (256, 48), (200, 96), (128, 100), (64, 257)]:
        W = gaussian(*shape)
        layout, tensors = FourBit.quantised(W, quant_type, block=block)
        codes, absmax, scales = tensors
        found = layout.dense(*tensors)
        assert torch.equal(found, reference.dequantised(codes, absmax, scales, shape, block, quant_type, FP32))
        far = float((found - W).norm() / W.norm())
        assert 0.75 * error < far < 1.5 * error
        if block == 64:
            assert far == pytest.approx(error, rel=0.02)


def test_a_layout_in_float64() -> None:
    W = gaussian(40, 24)
    layout, tensors = FourBit.quantised(W.double(), "nf4")
    single, _ = FourBit.quantised(W, "nf4")
    dense = layout.dense(*tensors)
    assert dense.dtype is layout.dtype is torch.float64
    assert torch.equal(dense, single.dense(*tensors).double())


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_weights_that_are_not_finite_are_refused(value: float, nested: bool) -> None:
    W = gaussian(8, 64)
    W[3, 5] = value
    for dtype in (BF16, FP16, FP32, torch.float64):
        with pytest.raises(UnsupportedLayer, match="not finite"):
            FourBit.quantised(W.to(dtype), "nf4", nested=nested)
    W[3, 5] = 1.0
    far = W.double()
    far[0, 0] = 1e300
    with pytest.raises(UnsupportedLayer, match="not finite in fp32"):
        FourBit.quantised(far, "nf4", nested=nested)
    FourBit.quantised(W, "nf4", nested=nested)


@pytest.mark.parametrize("fault", ["block", "levels"])
def test_absmax_quantised_in_another_way_is_refused(fault: str) -> None:
    W = gaussian(32, 64)
    codes, state = F.quantize_4bit(W, blocksize=64, compress_statistics=True, quant_type="nf4")
    layer = bitsandbytes.nn.Linear4bit(64, 32, bias=False, device="meta")
    layer.weight = bitsandbytes.nn.Params4bit(codes, requires_grad=False, quant_state=state, bnb_quantized=True)
    FourBit.taken(layer)
    if fault == "block":
        state.state2.blocksize = 128
    else:
        state.state2.code = state.state2.code.clone()
        state.state2.code[7] += 1e-3
    with pytest.raises(UnsupportedLayer, match="another way"):
        FourBit.taken(layer)


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_the_compiler_keeps_codes_not_the_weight(nested: bool) -> None:
    """One graph, and what forward computes is computed again in backward."""
    layout, tensors = FourBit.quantised(gaussian(96, 64), "nf4", nested=nested)

    def layer(x: Tensor) -> Tensor:
        return frozen_linear(x, None, layout, tuple(tensors))

    compiled = torch.compile(layer, backend="aot_eager_decomp_partition", fullgraph=True)
    x, dy = gaussian(7, 64).requires_grad_(), gaussian(7, 96)
    y = compiled(x)
    kept = [t for t in y.grad_fn.saved_tensors if t.numel() > x.numel()]  # type: ignore[union-attr]
    assert [(t.shape, t.dtype) for t in kept] == [(tensors[0].shape, torch.uint8)]
    (dx,) = torch.autograd.grad(y, x, dy)
    W = layout.dense(*tensors)
    torch.testing.assert_close(y, x @ W.t())
    torch.testing.assert_close(dx, dy @ W)


# ---- with a product added


def factors(shape: tuple[int, int], r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(10 + r)
    B, A = (torch.randn(*size, generator=draw) for size in ((shape[0], r), (r, shape[1])))
    return B.to(dtype), A.to(dtype)


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_a_product_is_added_before_the_rounding(nested: bool) -> None:
    """Of an independent sum in float64 the nearest number, but for ties that fp32 cannot tell."""
    for shape in SHAPES:
        for dtype, r in ((BF16, 1), (BF16, 5), (FP16, 16), (BF16, 64)):
            layout, tensors = FourBit.quantised(gaussian(*shape), "nf4", nested=nested)
            codes, absmax, *scales = tensors
            B, A = factors(shape, r, dtype)
            args = (codes, absmax, scales[0] if nested else None, shape, 64, "nf4")
            exact = layout.dense(*tensors).double() + torch.einsum("or,ri->oi", B.double(), A.double())
            room = torch.empty(shape, dtype=dtype)
            for found in (reference.merged(*args, B, A), merged(*args, B, A), merged(*args, B, A, out=room), room):
                assert (found.shape, found.dtype) == (shape, dtype)
                assert ((found.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 3e-6 * r).all()
            assert torch.equal(merged(*args, torch.zeros_like(B), A), dequantised(*args, dtype))
            assert torch.equal(layout.merged(B, A, *tensors), found)


@pytest.mark.parametrize("size", [1e-4, 1e-3])
def test_a_small_product_comes_through(size: float) -> None:
    """How much of BA, ‖BA‖ = size · ‖W‖, is in the difference that it makes: in bf16 weights lie on the grid and most
    are rounded back; here they lie anywhere, so that as many pass to their neighbours as must in the mean."""
    shape = (512, 1024)
    _, (codes, absmax, scales) = FourBit.quantised(gaussian(*shape), "nf4")
    args = (codes, absmax, scales, shape, 64, "nf4")
    W = dequantised(*args, BF16)
    B, A = factors(shape, 16, FP32)
    A *= size * W.float().norm() / (B @ A).norm()
    B, A = B.bfloat16(), A.bfloat16()
    change = B.double() @ A.double()

    def share(after: Tensor) -> float:
        return float(((after.double() - W.double()) * change).sum() / change.square().sum())

    twice = (W.float() + B.float() @ A.float()).bfloat16()
    assert share(merged(*args, B, A)) == pytest.approx(1, abs=0.03)
    assert share(twice) < (0.2 if size == 1e-4 else 0.7)


COMPILED = """
import re
import subprocess
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rankshift.ops.four_bit.triton import _EXACT, _MERGED, _ROWS, _merge

def compiled(types, warps, **constants):
    names = [name for name in _merge.arg_names if name not in constants]
    signature = {**dict(zip(names, types, strict=True)), **dict.fromkeys(constants, "constexpr")}
    round = {(_merge.arg_names.index(name),): [["tt.divisibility", 16]] for name in names}
    source = ASTSource(fn=_merge, signature=signature, constexprs=constants, attrs=round)
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, **_EXACT})
    cubin = Path(sys.argv[1]) / "kernel.cubin"
    cubin.write_bytes(found.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    used = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(name + ":(\\d+)", used)[1]) for name in ("REG", "STACK"))
    assert stack == 0, "registers are spilled: " + used
    return found.asm["ptx"], registers, found.metadata.shared

for rank, (warps, columns, at_once) in _MERGED.items():
    for kind, nested, even, block in (("bf16", True, True, 64), ("fp16", False, False, 128)):
        ptx, registers, shared = compiled(
            ["*u8", "*u8" if nested else "*fp32", "*fp32", "*fp32", *["*" + kind] * 3, *["i32"] * 5], warps,
            BLOCK=block, NESTED=nested, RANK=rank - (not even), EVEN=even, ROWS=_ROWS, WARPS=warps, COLUMNS=columns,
        )
        assert "mma.sync" in ptx, "the product is not on the tensor cores"
        assert "fma.rn" not in ptx, "a product and a sum are rounded once"
        words = _ROWS * columns // 256
        assert ptx.count("st.global.v4.b32") == words, "what a thread writes at once is not 16 bytes"
        assert ptx.count("ld.shared.b32") == 8 * words, "it is not only levels that are looked up in shared memory"
        if even:
            assert 32 * warps * registers * at_once <= 65536, registers
            assert (shared + 1024) * at_once <= 227 << 10, shared
"""


def test_it_compiles(tmp_path: Path) -> None:
    """For a GPU that is not here: the interpreter takes what the compiler refuses."""
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED)
    run(script, tmp_path, TRITON_CACHE_DIR=str(tmp_path))
