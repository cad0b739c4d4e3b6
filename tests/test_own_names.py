"""A model may call its own parameters A, B, C, g or subspace: a method knows its tensors by the adapter they are in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rankshift as rs
from rankshift.optim.vectors import Vectors

NAMES = {"A": (), "B": (8,), "C": (1, 8), "g": (8,), "subspace": (8,)}


class Scan(nn.Module):
    """Vectors of the model's own, under the names that methods give to theirs."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in NAMES.items():
            setattr(self, name, nn.Parameter(torch.ones(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.A * self.B * self.C * self.g * self.subspace


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.ssm, self.second = nn.Linear(8, 8), Scan(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.ssm(self.first(x)).tanh())


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
BODY = ("first", "second")
JOINT = rs.PreLoRA(stage="joint", then=rs.LoRA(rank=2, lr_ratio=16.0), min_rank=1, max_rank=2, targets=BODY)
WHOLE = {"targets": BODY, "modules_to_save": ("ssm",)}


def begun(method: rs.core.method.Method) -> tuple[rs.Run, rs.optim.Optimizer, dict[str, tuple[float, float, object]]]:
    """A run, its optimizer; and of every tensor that trains factor on lr, weight decay and transform, by name."""
    run = rs.attach(Net().double(), method, total_steps=40)
    optimizer = run.optimizer(lr=1.0, weight_decay=0.5)
    seen = {
        name: (group["lr"], group["weight_decay"], rule)
        for group, rule in zip(optimizer.param_groups, optimizer.transforms, strict=True)
        for name in group["param_names"]
    }
    return run, optimizer, seen


@pytest.mark.parametrize(
    ("method", "theirs", "own"),
    [
        (rs.LoRA(rank=2, lr_ratio=16.0, **WHOLE), {"B": (16, 0.5)}, (1, 0.5)),
        (rs.SoRA(rank=2, gate_lr_ratio=4.0, **WHOLE), {"g": (4, 0.0)}, (1, 0.5)),
        (rs.PCLoRA(rank=2, features=False, **WHOLE), {"C": (1, 0.0)}, (1, 0.5)),
        (JOINT, {"B": (16, 0.5)}, (1, 0.5)),
        (rs.SwitchLoRA(rank=2, interval=4, freeze=2, rest_lr_ratio=0.25, targets=BODY), {}, (0.25, 0.5)),
        (rs.GaLore(rank=2, gradient="projected", every=0, targets=BODY), {}, (1, 0.5)),
    ],
    ids=lambda value: value.name if isinstance(value, rs.core.method.Method) else "",
)
def test_a_models_own_tensors_train_as_the_rest_of_it(
    method: rs.core.method.Method, theirs: dict[str, tuple[float, float]], own: tuple[float, float]
) -> None:
    run, optimizer, seen = begun(method)
    for name in NAMES:
        lr, decay, rule = seen[f"ssm.{name}"]
        assert (lr, decay) == own, name
        assert type(rule) is rs.optim.Adam, name
    for name, (lr, decay, _) in seen.items():
        if name.startswith(BODY) and (leaf := name.rpartition(".")[2]) not in ("weight", "bias"):
            assert (lr, decay) == theirs.get(leaf, (1, 0.5)), name
    for _ in range(3):
        run.loss(run.model(X).square().mean(), X).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(optimizer.state[p]["step"].dim() == 0 for n, p in run.trainable() if n.startswith("ssm."))
    run.summary()


def test_switchloras_factors_count_by_vectors() -> None:
    *_, seen = begun(rs.SwitchLoRA(rank=2, interval=4, freeze=2, targets=BODY))
    assert [seen[f"first.{leaf}"][2] for leaf in "AB"] == [Vectors(0), Vectors(1)]
