"""What is left of a matrix of full rank that LoRA and ReLoRA learn: 64 × 64, r = 4, 4,000 updates, no noise, CPU.

    python benchmarks/relora_residual.py [--lr 1e-2] [--json benchmarks/results/relora_residual.json]

‖W − W*‖² / ‖W*‖² after training from W = 0 on ½‖W − W*‖², AdamW, the schedule of the method with warm-ups of 50. No
matrix of rank 4 is nearer than the bound of Eckart and Young.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import torch
from torch import nn

import rankshift as rs

SIDE, RANK, UPDATES, WARMUP = 64, 4, 4000, 50


def learn(every: int | None, lr: float, **fields: object) -> tuple[torch.Tensor, torch.Tensor]:
    """(W, W*)."""
    target = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)) / SIDE**0.5
    model = nn.Sequential(nn.Linear(SIDE, SIDE, bias=False))
    nn.init.zeros_(model[0].weight)
    warm = {} if every is None else {"rewarm": WARMUP}
    method = rs.ReLoRA(rank=RANK, alpha=RANK, every=every, rest="freeze", targets="0", **warm, **fields)  # type: ignore[arg-type]
    run = rs.attach(model, method, total_steps=UPDATES)
    optimizer = run.optimizer(lr=lr)
    schedule = run.scheduler(optimizer, WARMUP)
    eye = torch.eye(SIDE)
    for _ in range(UPDATES):
        (0.5 * (model(eye) - target.t()).square().sum()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return run.merge()[0].weight.detach(), target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lr", type=float, nargs="*", default=[3e-3, 1e-2, 3e-2])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    arms: dict[str, dict] = {"LoRA": {"every": None}}
    arms |= {f"ReLoRA, K = {every}": {"every": every} for every in (500, 250, 100)}
    arms |= {
        f"ReLoRA, K = 100, {how} 0.9": {"every": 100, "reset": how, "ratio": 0.9} for how in ("magnitude", "random")
    }
    rows = []
    for name, arm in arms.items():
        for lr in args.lr:
            W, target = learn(lr=lr, **arm)
            S = torch.linalg.svdvals(target)
            rows.append(
                {
                    "arm": name,
                    "lr": lr,
                    "residual": ((W - target).square().sum() / target.square().sum()).item(),
                    "rank": int(torch.linalg.matrix_rank(W, rtol=1e-4)),
                    "bound": (S[RANK:].square().sum() / S.square().sum()).item(),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
