"""What a frozen base in fewer bits costs in loss: 500 updates of LoRA on real text, several seeds, on a CPU or a GPU.

    PYTHONPATH=src python benchmarks/quantised_loss.py --out benchmarks/results/quantised_loss.json

Model: the package's babyllama (1 M parameters, read children's stories), in bf16; text: Shakespeare by characters,
sequences of 128, 16 of them an update; LoRA of rank 16 on all linear layers, AdamW, warm-up of 25 updates and a cosine
to 10 %. Every base takes the same batches and the same start of A and B in the order of the seeds. Loss: of the last
tenth of the text, which is not trained on, in nats a character. On a CPU products in 8 bits are emulated: both factors
are rounded, sums are in fp32.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import rankshift as rs
from rankshift.train import bundled

transformers.logging.set_verbosity_error()

LENGTH, BATCH = 128, 16
BASES = (None, "fp8", "int8", "nf4", "fp4")


def characters(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, LENGTH) ids to train on, and to test on."""
    ids = torch.tensor(tokenizer(bundled.text("tinyshakespeare"), add_special_tokens=False)["input_ids"])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return rows[: len(rows) * 9 // 10], rows[len(rows) * 9 // 10 :][:256]


def train(base: Any, seed: int, steps: int, lr: float, device: str) -> dict[str, Any]:
    path = bundled.model_path("babyllama")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(device).train()
    rows, test = characters(transformers.AutoTokenizer.from_pretrained(path))
    run = rs.attach(model, rs.LoRA(rank=16), base=base, seed=seed)
    optimizer = run.optimizer(lr=lr)

    @torch.no_grad()
    def tested() -> float:
        model.eval()
        losses = [model(input_ids=part.to(device), labels=part.to(device)).loss.item() for part in test.split(64)]
        model.train()
        return statistics.mean(losses)

    before, seen = tested(), []
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).repeat(
        1 + steps * BATCH // len(rows)
    )
    start = time.perf_counter()
    for step in range(steps):
        share = step / steps
        factor = (step + 1) / 25 if step < 25 else 0.55 + 0.45 * math.cos(math.pi * share)
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        ids = rows[order[step * BATCH : (step + 1) * BATCH]].to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.detach())
    return {
        "base": base or "bf16", "seed": seed, "before": before, "test": tested(),
        "train": torch.stack(seen[-50:]).float().mean().item(), "seconds": time.perf_counter() - start,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs = []
    for seed in range(options.seeds):
        for base in BASES:
            runs.append(train(base, seed, options.steps, options.lr, device))
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in runs[-1].items()}, flush=True)
    whole = {row["seed"]: row["test"] for row in runs if row["base"] == "bf16"}
    print("| base | before | test loss | against bf16, same seed |\n|---|--:|--:|--:|")
    for base in BASES:
        mine = [row for row in runs if row["base"] == (base or "bf16")]
        off = [100 * (row["test"] / whole[row["seed"]] - 1) for row in mine]
        spread = statistics.stdev(off) if len(off) > 1 else 0.0
        print(
            f"| {base or 'bf16'} | {mine[0]['before']:.3f} | {statistics.mean(row['test'] for row in mine):.4f} "
            f"| {statistics.mean(off):+.2f} ± {spread:.2f} % |"
        )
    if options.out:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "rankshift": rs.__version__}
        result = {
            "date": datetime.date.today().isoformat(), "versions": versions, "steps": options.steps, "lr": options.lr,
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "runs": runs,
        }  # fmt: skip
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
