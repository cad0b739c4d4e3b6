"""What goes to the kernel that folds steps into their weights. The kernel itself is in test_kernels.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankshift.ops.projected_fold import fits, op


def test_what_the_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    n, m, r = 6, 8, 3
    W, left, right = (nn.Parameter(torch.zeros(size)) for size in ((n, m), (n, r), (m, r)))
    assert not fits(W, left, right), "there is no GPU"
    monkeypatch.setattr(op, "runs_on", lambda device: True)
    assert fits(W, left, right)
    assert fits(W.bfloat16(), left, right)
    assert fits(W.half(), left, right)
    wide = [t.double() for t in (W, left, right)]
    assert not fits(*wide), "of float64 the sums would lose"
    assert not fits(W.double(), left, right)
    assert not fits(W.bfloat16(), left.bfloat16(), right)
    assert not fits(W, left, right.to("meta")), "elsewhere"
    assert not fits(torch.zeros(n, 10), left, right), "noise comes for four columns at a time"
    assert not fits(torch.zeros(n, m, 1), left, right)
    assert not fits(torch.zeros(m, n).t(), left, right)
    assert not fits(W, torch.zeros(r, n).t(), right)
    assert not fits(W, left, torch.zeros(m, 2 * r)[:, ::2])
    assert not fits(torch.zeros(n * m + 1)[1:].view(n, m), left, right), "addresses are multiples of 16 bytes"


def test_a_kind_of_tensor_that_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(torch.Tensor):
        """As DTensor: what it holds is not where data_ptr says."""

    monkeypatch.setattr(op, "runs_on", lambda device: True)
    W, left, right = torch.zeros(6, 8), torch.zeros(6, 3), torch.zeros(8, 3)
    assert fits(W, left, right)
    for at in range(3):
        tensors = [W, left, right]
        tensors[at] = tensors[at].as_subclass(Elsewhere)
        assert not fits(*tensors)
