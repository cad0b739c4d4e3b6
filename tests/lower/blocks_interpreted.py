"""Whole blocks by their kernels, under Triton's interpreter. test_nodes.py runs this in a process of its own.

In fp16: the interpreter does not know products in bf16.
"""

from __future__ import annotations

import lower_models as models
import pytest
import torch

import rankshift as rs
from rankshift.ops.rms_norm import op as rms_norm
from rankshift.ops.rotary import op as rotary
from rankshift.ops.skinny import op as skinny
from rankshift.ops.swiglu import op as swiglu


def gone(make, method, dtype, lower):
    model = make(dtype=dtype, hidden_size=64, intermediate_size=96)
    run = rs.attach(model, method)
    models.stir(run)
    assert not lower or not run.lower().aside
    return models.outcome(model, run)


@pytest.mark.parametrize("make", [models.llama, models.qwen2])
@pytest.mark.parametrize("rank", [5, 16, 20])
@pytest.mark.parametrize("dora", [False, True])
def test_blocks_by_their_kernels_are_as_near_as_without(make, rank, dora, monkeypatch):
    """To the model in fp32: the kernels, and the equations in fp16."""
    method = rs.LoRA(rank=rank, dora=dora)
    exact = gone(make, method, torch.float32, lower=False)
    by_equations = gone(make, method, torch.float16, lower=True)
    seen = []
    for op in (rms_norm, rotary):
        monkeypatch.setattr(op, "_kernel", lambda tensor: seen.append(tensor) or tensor.dtype is torch.float16)
    for op in (skinny, swiglu):
        monkeypatch.setattr(op, "runs_on", lambda device: True)
    by_kernels = gone(make, method, torch.float16, lower=True)
    assert seen
    for name, want in exact.items():
        ways = (found[name].double() - want.double() for found in (by_kernels, by_equations))
        off, near = (float(far.norm() / want.norm()) for far in ways)
        assert off < 1.5 * near + 5e-4, f"{name} is off by {off:.2g}, without kernels by {near:.2g}"
