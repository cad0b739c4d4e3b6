"""The kernel of ops/fp8 under Triton's interpreter, on the CPU: see kernels_interpreted.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from rankshift.ops.fp8 import op, reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is taken. The interpreter loses a carry where GPUs round to e4m3."""
    convert = interpreter._convert_float

    def rounded(number, source, target, mode):  # type: ignore[no-untyped-def]
        if str(target) != "fp8e4nv":
            return convert(number, source, target, mode)
        return torch.from_numpy(number).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(op, "_launches", lambda x: True)


def numbers(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows of many sizes."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(width))
    return (x * torch.exp2(torch.arange(rows) * 3.0 - 6)[:, None]).to(dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("shape", [(3, 40), (5, 7), (1, 1), (2, 1500), (4, 64)], ids=str)
@pytest.mark.parametrize("folded", [False, True])
def test_it_is_the_reference_to_the_bit(shape: tuple[int, int], dtype: torch.dtype, folded: bool) -> None:
    x = numbers(*shape, dtype)
    fold = torch.rand(shape[1], generator=torch.Generator().manual_seed(1)) if folded else None
    codes, sizes = op.rounded_rows(x, fold)
    want, size = reference.rounded_rows(x, fold)
    assert torch.equal(sizes, size)
    assert torch.equal(codes.view(torch.uint8), want.view(torch.uint8))


def test_a_view_that_is_not_in_one_piece() -> None:
    x = numbers(8, 24, BF16)
    for view in (x[::2], x[:, 3:17], x.t(), x[:1].expand(4, 24)):
        codes, sizes = op.rounded_rows(view)
        want, size = reference.rounded_rows(view)
        assert codes.is_contiguous()
        assert torch.equal(sizes, size)
        assert torch.equal(codes.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_seen(value: float) -> None:
    x = numbers(4, 24, BF16)
    x[1] = 0
    x[2, 5] = value
    codes, sizes = op.rounded_rows(x)
    assert sizes[2].isnan()
    assert sizes[[0, 1, 3]].isfinite().all()
    assert not codes[1].float().any()
    assert (codes.float() * sizes[:, None])[[0, 1, 3]].isfinite().all()
