"""Fused blocks in bf16 by their kernels: gradients as far from those of float64 as the model's own blocks' are."""

from __future__ import annotations

from collections.abc import Callable

import lower_models as models
import pytest
import torch
from torch import Tensor, nn

import rankshift as rs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
SIZES = {"hidden_size": 256, "intermediate_size": 640, "max_position_embeddings": 256}
METHODS = {
    **{f"lora {rank}": rs.LoRA(rank=rank) for rank in (5, 16, 32, 64, 128)},
    **{f"dora {rank}": rs.LoRA(rank=rank, dora=True) for rank in (16, 64)},
    "sora": rs.SoRA(rank=8), "paca": rs.PaCA(rank=16), "vera": rs.VeRA(rank=256),
}  # fmt: skip


def gradients(
    method: rs.Method, base: str | None, dtype: torch.dtype, lower: bool, make: Callable[..., nn.Module] = models.llama
) -> dict[str, Tensor]:
    model = make(dtype=torch.bfloat16, **SIZES).cuda()
    run = rs.attach(model, method, base=base, total_steps=4)
    models.stir(run)
    model.to(dtype)
    report = run.lower() if lower else None
    ids = torch.randint(0, models.VOCAB, (3, 200), generator=torch.Generator().manual_seed(0)).cuda()
    model(input_ids=ids, labels=ids).loss.backward()
    assert report is None or not report.aside, report
    return {name: p.grad.double() for name, p in run.trainable()}


@pytest.mark.parametrize("base", [None, "nf4", "fp8"])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_as_near_to_float64(name: str, base: str | None) -> None:
    """Of a base in fewer bits, to those of the base that it was made of."""
    compare(METHODS[name], base)


@pytest.mark.parametrize("name", ["lora 16", "dora 16", "paca"])
@pytest.mark.parametrize("make", [models.mistral, models.gemma, models.qwen2, models.qwen3])
def test_families(name: str, make: Callable[..., nn.Module]) -> None:
    if make is models.qwen3 and name == "dora 16":
        pytest.skip("runs unfused")
    compare(METHODS[name], None, make)


def compare(method: rs.Method, base: str | None, make: Callable[..., nn.Module] = models.llama) -> None:
    truth = gradients(method, None, torch.float64, False, make)
    own, fused = (gradients(method, base, torch.bfloat16, lower, make) for lower in (False, True))
    for k, exact in truth.items():
        by_own, by_fused = (float((found[k] - exact).norm() / exact.norm()) for found in (own, fused))
        assert by_fused < 1.5 * by_own + 0.05, k
