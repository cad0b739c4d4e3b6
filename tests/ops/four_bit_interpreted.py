"""The kernel of ops/four_bit under Triton's interpreter, on the CPU: see kernels_interpreted.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from rankshift.ops.four_bit import op, reference, triton

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is taken, in programs of 512 or 256 weights. The interpreter cuts bf16 off where GPUs round."""
    cut = interpreter._convert_float

    def rounded(number, source, target, mode):  # type: ignore[no-untyped-def]
        if str(target) != "bf16":
            return cut(number, source, target, mode)
        return torch.from_numpy(number).to(BF16).view(torch.int16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
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
