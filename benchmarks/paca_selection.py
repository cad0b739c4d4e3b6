"""PaCA's channels one by one at random against aligned blocks of them: what a user loses who takes the faster choice.

    PYTHONPATH=src python benchmarks/paca_selection.py --out benchmarks/results/paca_selection.json

The package's small pretrained Llama (1.1 M parameters) learns Shakespeare by characters, all linear layers adapted,
fp32: 200 updates of 16 × 128 characters, then the loss of 64 rows that were held out. A seed draws the channels and the
batches; both choices see the same batches. Prints means and standard deviations over seeds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path

import torch
import transformers

import rankshift as rs
from rankshift.train import bundled

RANK, STEPS, ROWS, LENGTH, HELD, LR = 32, 200, 16, 128, 64, 2e-3
CHOICES = {"random": rs.PaCA(rank=RANK), "blocks": rs.PaCA(rank=RANK, select="blocks")}


def rows() -> torch.Tensor:
    """(rows, LENGTH) of token numbers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled.model_path("babyllama"))
    ids = torch.tensor(tokenizer(bundled.text("tinyshakespeare"), add_special_tokens=False)["input_ids"])
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def held_out_loss(method: rs.Method, seed: int, data: torch.Tensor) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(bundled.model_path("babyllama"), dtype=torch.float32)
    run = rs.attach(model.train(), method, seed=seed, total_steps=STEPS)
    optimizer = run.optimizer(lr=LR)
    order = torch.randperm(len(data) - HELD, generator=torch.Generator().manual_seed(seed))
    for at in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (at + 1) / 20)
        batch = data[order[at * ROWS : (at + 1) * ROWS]]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return float(model.eval()(input_ids=data[-HELD:], labels=data[-HELD:]).loss)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    data, began = rows(), time.perf_counter()
    found: dict[str, list[float]] = {name: [] for name in CHOICES}
    for seed in range(options.seeds):
        for name, method in CHOICES.items():
            found[name].append(held_out_loss(method, seed, data))
            print(f"seed {seed} {name:8} {found[name][-1]:.4f}   {time.perf_counter() - began:.0f} s", flush=True)
    for name, losses in found.items():
        print(f"{name:8} {statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}")
    apart = [b - r for b, r in zip(found["blocks"], found["random"], strict=True)]
    print(f"blocks − random {statistics.mean(apart):+.4f} ± {statistics.stdev(apart):.4f}")
    if options.out:
        head = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "rank": RANK, "steps": STEPS}
        options.out.write_text(json.dumps(head | {"lr": LR, "losses": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
