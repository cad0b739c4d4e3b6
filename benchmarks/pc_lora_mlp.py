"""PC-LoRA at its smallest: a trained MLP on 8×8 digits, its three hidden layers made thin, beside other ways to do so.

    python benchmarks/pc_lora_mlp.py --data DIR_WITH/digits8x8.npz --out benchmarks/results/pc_lora_mlp.json

MLP 64-256-256-256-10 with tanh, 1,437 images to train on and 360 to test. Every arm: the same number of updates, batch
128, AdamW with lr 2e-3 and a cosine to 0, the head frozen, the last network tested. Distillation is α·task + (1 − α)·
(mean over hidden layers of the squared difference before tanh + KL of the logits at T = 2), α = 0.2. Arms:

    PC-LoRA            rs.PCLoRA fading over 60 % of the updates, then run.compress()
    … no KD            the task's loss alone
    zero start (+ KD)  the thin network from where PC-LoRA's branch starts, B = C = 0, without the base: λ ≡ 0
    random start + KD  the thin network as torch draws it
    SVD start + KD     the thin network from the truncated SVD of each weight, C from its bias
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankshift as rs

HIDDEN = ("0", "2", "4")
ALPHA, TEMPERATURE, LR, BATCH = 0.2, 2.0, 2e-3, 128


def mlp() -> nn.Sequential:
    widths = (64, 256, 256, 256, 10)
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


class Data:
    def __init__(self, file: Path):
        found = np.load(file)
        x, y = torch.from_numpy(found["x"]).float().flatten(1) / 16, torch.from_numpy(found["y"]).long()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        self.x, self.y = x[order[360:]], y[order[360:]]
        self.x_test, self.y_test = x[order[:360]], y[order[:360]]

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        at = torch.randint(len(self.x), (BATCH,), generator=torch.Generator().manual_seed(1_000_000 * seed + step))
        return self.x[at], self.y[at]

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        return 100 * (model.eval()(self.x_test).argmax(-1) == self.y_test).float().mean().item()


def outputs(model: nn.Sequential, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """What the hidden layers put out, and the logits."""
    hidden = []
    for name, part in model.named_children():
        x = part(x)
        if name in HIDDEN:
            hidden.append(x)
    return hidden, x


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, loss: Callable[[int], Tensor]) -> None:
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for step in range(steps):
        loss(step).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def teach(data: Data, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = mlp()

    def loss(step: int) -> Tensor:
        x, y = data.batch(seed, step)
        return F.cross_entropy(model(x), y)

    train(model, torch.optim.AdamW(model.parameters(), lr=LR), 700, loss)
    return model.eval()


def faded(teacher: nn.Sequential, data: Data, seed: int, rank: int, steps: int, **more: Any) -> nn.Module:
    """PC-LoRA."""
    model = copy.deepcopy(teacher)
    settings = {"decay_end": 0.6, "task_weight": ALPHA, "logits": True, "temperature": TEMPERATURE} | more
    run = rs.attach(model, rs.PCLoRA(rank=rank, targets=HIDDEN, **settings), seed=seed, total_steps=steps)

    def loss(step: int) -> Tensor:
        x, y = data.batch(seed, step)
        return run.loss(F.cross_entropy(model(x), y), x)

    train(model, run.optimizer(lr=LR), steps, loss)
    return run.compress()


def thin(teacher: nn.Sequential, data: Data, seed: int, rank: int, steps: int, start: str, kd: bool) -> nn.Module:
    """The thin network by itself, from a start, with plain torch."""
    torch.manual_seed(seed)
    model = copy.deepcopy(teacher)
    trained: list[nn.Parameter] = []
    for name in HIDDEN:
        layer = teacher[int(name)]
        pair = nn.Sequential(nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features))
        with torch.no_grad():
            if start == "zero":
                pair[1].weight.zero_()
                pair[1].bias.zero_()
            elif start == "svd":
                U, S, V = torch.linalg.svd(layer.weight, full_matrices=False)
                pair[0].weight.copy_(S[:rank].sqrt()[:, None] * V[:rank])
                pair[1].weight.copy_(U[:, :rank] * S[:rank].sqrt())
                pair[1].bias.copy_(layer.bias)
        model[int(name)] = pair
        trained += pair.parameters()

    def loss(step: int) -> Tensor:
        x, y = data.batch(seed, step)
        hidden, logits = outputs(model, x)
        task = F.cross_entropy(logits, y)
        if not kd:
            return task
        with torch.no_grad():
            wanted, target = outputs(teacher, x)
        near = torch.stack([F.mse_loss(a, b) for a, b in zip(hidden, wanted, strict=True)]).mean()
        p, q = (target / TEMPERATURE).softmax(-1), (logits / TEMPERATURE).log_softmax(-1)
        divergence = TEMPERATURE**2 * F.kl_div(q, p, reduction="batchmean")
        return ALPHA * task + (1 - ALPHA) * (near + divergence)

    train(model, torch.optim.AdamW(trained, lr=LR, weight_decay=0.0), steps, loss)
    return model


ARMS: dict[str, Callable[..., nn.Module]] = {
    "PC-LoRA, linear": lambda *a: faded(*a, decay="linear"),
    "PC-LoRA, sine": lambda *a: faded(*a, decay="sine"),
    "PC-LoRA, cosine": lambda *a: faded(*a, decay="cosine"),
    "PC-LoRA, linear, no KD": lambda *a: faded(*a, features=False, logits=False),
    "zero start + KD": lambda *a: thin(*a, "zero", True),
    "zero start, no KD": lambda *a: thin(*a, "zero", False),
    "random start + KD": lambda *a: thin(*a, "random", True),
    "SVD start + KD": lambda *a: thin(*a, "svd", True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 16])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = Data(options.data)
    teachers = [teach(data, seed) for seed in range(options.seeds)]
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "rankshift": rs.__version__},
        "steps": options.steps,
        "seeds": options.seeds,
        "teacher": [data.accuracy(teacher) for teacher in teachers],
        "ranks": {},
    }
    print(f"teacher {statistics.mean(result['teacher']):.1f} %")
    for rank in options.ranks:
        report = rs.attach(copy.deepcopy(teachers[0]), rs.PCLoRA(rank=rank, targets=HIDDEN)).compression()
        row: dict[str, Any] = {"left_percent": 100 * report.adapted[1] / report.adapted[0], "arms": {}}
        print(f"rank {rank}: {row['left_percent']:.1f} % of the parameters of the hidden layers")
        for name, arm in ARMS.items():
            scores = [
                data.accuracy(arm(teacher, data, seed, rank, options.steps)) for seed, teacher in enumerate(teachers)
            ]
            row["arms"][name] = scores
            print(f"  {name:24} {statistics.mean(scores):5.1f}  {' '.join(f'{s:.1f}' for s in scores)}", flush=True)
        result["ranks"][str(rank)] = row
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
