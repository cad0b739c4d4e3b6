"""The kernels of ops/four_bit under Triton's interpreter, on the CPU: see kernels_interpreted.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from rankshift.ops.four_bit import op, reference, triton

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is taken, in programs of 512 or 256 weights. The interpreter cuts bf16 off where GPUs round, and
    takes its bits for numbers in a product."""
    cut, product = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounded(number, source, target, mode):  # type: ignore[no-untyped-def]
        if str(target) != "bf16":
            return cut(number, source, target, mode)
        return torch.from_numpy(number).to(BF16).view(torch.int16).numpy()

    def multiplied(self, a, b, *rest):  # type: ignore[no-untyped-def]
        if str(a.dtype) == "bf16":
            wide = (torch.from_numpy(x.data.view("int16")).view(BF16).float().numpy() for x in (a, b))
            a, b = (interpreter.TensorHandle(x, triton.tl.float32) for x in wide)
        return product(self, a, b, *rest)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", multiplied)
    monkeypatch.setattr(op, "runs_on", lambda device: True)
    monkeypatch.setattr(triton, "_TILE", (64, 4))


def packed(n: int, block: int, nested: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Every code is as likely as any other."""
    draw = torch.Generator().manual_seed(n + block)
    codes = torch.randint(256, (-(-n // 2), 1), dtype=torch.uint8, generator=draw)
    blocks = -(-n // block)
    if not nested:
        return codes, torch.rand(blocks, generator=draw).view(torch.int32), None
    absmax = torch.randint(256, (blocks,), dtype=torch.uint8, generator=draw)
    return codes, absmax, torch.rand(1 + -(-blocks // 256), generator=draw).view(torch.int32)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("shape", "block"),
    [((24, 64), 64), ((3, 8), 32), ((5, 7), 64), ((1, 1), 64), ((23, 70), 128), ((50, 100), 4096), ((3, 501), 32)],
    ids=str,
)
def test_it_is_the_reference_to_the_bit(
    shape: tuple[int, int], block: int, quant_type: str, nested: bool, dtype: torch.dtype
) -> None:
    n = shape[0] * shape[1]
    tensors = packed(n, block, nested)
    want = reference.dequantised(*tensors, shape, block, quant_type, dtype)
    room = torch.full((n + 32,), 3.0, dtype=dtype)
    out = room[16:-16].view(shape)
    version = out._version
    assert op.dequantised(*tensors, shape, block, quant_type, dtype, out=out) is out
    assert out._version > version
    assert torch.equal(out.view(torch.int16), want.view(torch.int16))  # the sign of zero too
    assert (torch.cat([room[:16], room[-16:]]) == 3).all()


def test_a_second_scale_is_found() -> None:
    """256 blocks of 32 numbers share one, and programs know only where they begin."""
    shape, block = (65, 256), 32
    codes, absmax, _ = packed(65 * 256, block, True)
    scales = torch.tensor([0.5, 1.0, 100.0, 10000.0]).view(torch.int32)
    want = reference.dequantised(codes, absmax, scales, shape, block, "nf4", FP32)
    assert torch.equal(op.dequantised(codes, absmax, scales, shape, block, "nf4", FP32), want)
    largest = want.abs().view(-1)
    assert largest[: 256 * 32].max() < 2 < largest[256 * 32 : 512 * 32].max() < 110 < largest[512 * 32 :].max()


def test_a_weight_without_numbers() -> None:
    codes, absmax, scales = packed(0, 64, True)
    assert op.dequantised(codes, absmax, scales, (0, 8), 64, "nf4", BF16).shape == (0, 8)


# ---- with a product added


def factors(shape: tuple[int, int], r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(r)
    B, A = (torch.randn(*size, generator=draw) for size in ((shape[0], r), (r, shape[1])))
    return B.to(dtype), (A / 4).to(dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize(
    ("shape", "block", "r"),
    [
        ((48, 256), 64, 16), ((37, 320), 64, 5), ((1, 64), 128, 1), ((70, 192), 4096, 64), ((16, 192), 64, 32),
        ((50, 320), 128, 100), ((20, 128), 64, 200), ((32, 256), 64, 128),
    ],
    ids=str,
)  # fmt: skip
def test_a_product_is_added_before_the_rounding(
    shape: tuple[int, int], block: int, r: int, nested: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = shape[0] * shape[1]
    tensors, (B, A) = packed(n, block, nested), factors(shape, r, dtype)
    monkeypatch.setattr(op, "_dequantised", None)  # it is not the other path that runs
    for slots in (132, 2):  # programs of one tile of rows, and of all rows
        monkeypatch.setattr(triton, "_MULTIPROCESSORS", slots)
        room = torch.full((n + 32,), 3.0, dtype=dtype)
        out = room[16:-16].view(shape)
        version = out._version
        assert op.merged(*tensors, shape, block, "nf4", B, A, out=out) is out
        assert out._version > version
        assert (torch.cat([room[:16], room[-16:]]) == 3).all()
        exact = reference.dequantised(*tensors, shape, block, "nf4", FP32).double() + B.double() @ A.double()
        assert ((out.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5).all()
        assert (out != reference.merged(*tensors, shape, block, "nf4", B, A)).float().mean() < 2e-3


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("shape", [(48, 256), (37, 320)], ids=str)
def test_nothing_added_is_the_weight_to_the_bit(shape: tuple[int, int], nested: bool, quant_type: str) -> None:
    tensors = packed(shape[0] * shape[1], 64, nested)
    for dtype in (BF16, FP16):
        B, A = factors(shape, 16, dtype)
        want = reference.dequantised(*tensors, shape, 64, quant_type, dtype)
        assert torch.equal(op.merged(*tensors, shape, 64, quant_type, torch.zeros_like(B), A), want)


@pytest.mark.parametrize(("shape", "block", "r"), [((9, 40), 64, 4), ((8, 64), 32, 4), ((8, 64), 64, 300)], ids=str)
def test_other_weights_take_a_product_too(shape: tuple[int, int], block: int, r: int) -> None:
    """Rows that are no multiple of 64, smaller blocks, larger ranks: by way of fp32."""
    tensors, (B, A) = packed(shape[0] * shape[1], block, True), factors(shape, r, BF16)
    assert not triton.adds(shape[1], block, r)
    found = op.merged(*tensors, shape, block, "nf4", B, A)
    torch.testing.assert_close(found, reference.merged(*tensors, shape, block, "nf4", B, A), rtol=2**-7, atol=1e-5)


def test_a_second_scale_is_found_with_a_product() -> None:
    shape, block = (130, 320), 64  # rows of five blocks: the first scale ends within a row
    codes, absmax, _ = packed(130 * 320, block, True)
    scales = torch.tensor([0.5, 1.0, 100.0, 10000.0]).view(torch.int32)
    B, A = factors(shape, 8, FP16)
    want = reference.dequantised(codes, absmax, scales, shape, block, "nf4", FP16)
    assert torch.equal(op.merged(codes, absmax, scales, shape, block, "nf4", torch.zeros_like(B), A), want)


def test_factors_that_are_parts_of_others() -> None:
    shape = (40, 128)
    tensors, (B, A) = packed(40 * 128, 64, True), factors(shape, 12, BF16)
    wide, tall = torch.full((40, 20), 7.0, dtype=BF16), torch.full((12, 300), 7.0, dtype=BF16)
    wide[:, 4:16], tall[:, 100:228] = B, A
    want = op.merged(*tensors, shape, 64, "nf4", B, A)
    assert torch.equal(op.merged(*tensors, shape, 64, "nf4", wide[:, 4:16], tall[:, 100:228]), want)
    assert torch.equal(op.merged(*tensors, shape, 64, "nf4", B.t().contiguous().t(), A), want)
