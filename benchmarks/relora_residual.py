"""What is left of a matrix of full rank that LoRA, ReLoRA and SwitchLoRA learn: 64 × 64, r = 4, CPU.

    python benchmarks/relora_residual.py [--lr 1e-2] [--json benchmarks/results/relora_residual.json]

LoRA, ReLoRA: ‖W − W*‖² / ‖W*‖² after 4,000 updates from W = 0 on ½‖W − W*‖², without noise; AdamW, the schedule of the
method with warm-ups of 50. No matrix of rank 4 is nearer than the bound of Eckart and Young.

SwitchLoRA (not at the rates of --lr): ‖W − W₀ − C‖² / ‖C‖² for a teacher W₀ + C on 64 new rows of noise an update, in
fp64; AdamW from 0.1 linearly to 0. Both of its factors begin at something, so the bound is that of rank 2r. "Without
the correction": exchanged vectors do not go into W. Then how far W + s·BA is from where it began, relative, after
exchanges alone (48 × 40, r = 12, a learning rate of 0, interval 4 throughout), with W in fp32 and in bf16.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import rankshift as rs

SIDE, RANK, UPDATES, WARMUP = 64, 4, 4000, 50
SWITCH: dict[str, Any] = {"rank": RANK, "interval": 4, "freeze": 2, "ratio": 1.0, "targets": "0"}


def learn(every: int | None, lr: float, **fields: object) -> tuple[Tensor, Tensor]:
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


def switched(updates: int, corrected: bool, lr: float = 0.1, **fields: Any) -> tuple[Tensor, Tensor]:
    """(W − W₀, C)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIDE, SIDE, bias=False)).double()
    start = model[0].weight.detach().clone()
    change = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=start.dtype) / SIDE**0.5
    run = rs.attach(model, rs.SwitchLoRA(**SWITCH | fields), total_steps=updates)
    optimizer = run.optimizer(lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / updates)
    noise = torch.Generator().manual_seed(2)
    lost = mock.patch("rankshift.methods.switchlora.add_products_")
    with contextlib.nullcontext() if corrected else lost:
        for _ in range(updates):
            x = torch.randn(SIDE, SIDE, generator=noise, dtype=start.dtype)
            (model(x) - x @ (start + change).T).square().mean().backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return run.merge()[0].weight.detach() - start, change


def drift(dtype: torch.dtype, updates: int) -> dict[str, Any]:
    torch.manual_seed(0)
    run = rs.attach(
        nn.Sequential(nn.Linear(48, 40, bias=False)),
        rs.SwitchLoRA(**SWITCH | {"rank": 12, "rho": 1.0}),
        total_steps=updates,
    )
    layer = run.adapter()["0"]
    layer.base.weight.data = layer.base.weight.data.to(dtype)  # which attach() would refuse
    start = layer.base.weight.double() + layer.delta().double()
    optimizer = run.optimizer(lr=0.0)
    for _ in range(updates):
        with torch.autocast("cpu", torch.bfloat16):
            run.model(torch.ones(1, 48)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    now = layer.base.weight.double() + layer.delta().double()
    off = ((now - start).norm() / start.norm()).item()
    return {"W": str(dtype), "exchanged": run.metrics()["exchanged"], "drift": off}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lr", type=float, nargs="*", default=[3e-3, 1e-2, 3e-2])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    arms: dict[str, dict[str, Any]] = {"LoRA": {"every": None}}
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
    of_switchlora = []
    for name, updates, corrected, fields in (
        ("SwitchLoRA", 600, True, {}),
        ("SwitchLoRA", 2000, True, {}),
        ("SwitchLoRA, no exchanges", 2000, True, {"interval": math.inf}),
        ("SwitchLoRA, without the correction", 600, False, {}),
    ):
        learned, change = switched(updates, corrected, **fields)
        S = torch.linalg.svdvals(change)
        of_switchlora.append(
            {
                "arm": name,
                "updates": updates,
                "residual": ((learned - change).square().sum() / change.square().sum()).item(),
                "rank": int(torch.linalg.matrix_rank(learned)),
                "bound": (S[2 * RANK :].square().sum() / S.square().sum()).item(),
            }
        )
        print(json.dumps(of_switchlora[-1]), flush=True)
    drifts = [drift(dtype, 200) for dtype in (torch.float32, torch.bfloat16)]
    print(json.dumps(drifts))
    if args.json:
        found = {"torch": torch.__version__, "rows": rows, "switchlora": of_switchlora, "drift": drifts}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
