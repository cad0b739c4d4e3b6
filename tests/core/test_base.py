"""Writing into a weight: as exact as its dtype, many layers at once as one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankshift.core import base as module
from rankshift.core.base import Dense, add_products_
from rankshift.core.site import form_of


def dense(layer: nn.Module) -> Dense:
    form = form_of(layer)
    assert form is not None
    with torch.no_grad():
        layer.weight.copy_(noise(*layer.weight.shape, seed=9))
    return Dense(layer, form)


def noise(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


LAYERS = {
    "linear": lambda: nn.Linear(6, 5),
    "narrow": lambda: nn.Linear(6, 5).bfloat16(),  # takes the wide product, rounded once
    "conv1d": lambda: nn.Conv1d(2, 5, 3),
    "transposed": lambda: Conv1D(5, 6),
}


@pytest.mark.parametrize("chunk", [1 << 24, 40])  # all at once, or a layer at a time
@pytest.mark.parametrize("kinds", [("linear", "linear", "linear"), ("linear", "conv1d", "transposed", "narrow")])
def test_products_for_many_layers_are_those_of_each(
    kinds: tuple[str, ...], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK", chunk)
    bases = [dense(LAYERS[kind]()) for kind in kinds]
    left, right = noise(len(kinds), 5, 2, seed=1), noise(len(kinds), 2, 6, seed=2)
    want = [base.rows() + a @ b for base, a, b in zip(bases, left, right, strict=True)]
    add_products_(bases, left, right)
    for base, value in zip(bases, want, strict=True):
        assert base.changed
        torch.testing.assert_close(base.rows(), value.to(base.dtype), rtol=0, atol=1e-6)


def test_what_is_added_is_not_rounded_by_autocast_or_tf32() -> None:
    base, before = dense(nn.Linear(64, 64)), torch.get_float32_matmul_precision()
    left, right, W = noise(64, 4, seed=1), noise(4, 64, seed=2), base.rows()
    seen: list[str] = []

    def delta(rows: slice) -> Tensor:
        seen.append(torch.backends.cuda.matmul.fp32_precision)  # GPUs alone have TF32
        return left[rows] @ right

    try:
        torch.set_float32_matmul_precision("high")
        with torch.autocast("cpu", torch.bfloat16):
            base.add_(delta)
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["ieee"]
    torch.testing.assert_close(base.rows(), W + left @ right, rtol=0, atol=1e-5)
