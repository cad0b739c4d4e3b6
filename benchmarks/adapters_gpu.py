"""One GPU: whole steps of every adapter method beside the frozen base, and what PaCA's column write costs.

    PYTHONPATH=src python benchmarks/adapters_gpu.py --out benchmarks/results/adapters_gpu.json

Model and protocol are those of lora_gpu.py (random-weight Llama of 1.1 B parameters, bf16, 8×1024 tokens, eager). The
second table is about where PaCA's trained columns live: written once an optimizer step into the weight as it is stored
(rows × columns), or into a copy stored columns first; times for the seven linear layers of one block of an 8B Llama.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from lora_gpu import SHAPES, Step, arm_frozen, llama, measure

import rankshift as rs

BLOCK_8B = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]


def methods() -> dict[str, rs.Method]:
    return {
        "LoRA r16": rs.LoRA(rank=16),
        "VeRA r256": rs.VeRA(rank=256),
        "PaCA r16": rs.PaCA(rank=16),
        "PaCA r64": rs.PaCA(rank=64),
        "MELoRA 4×r4": rs.MELoRA(rank=4, blocks=4),
        "SoRA r16": rs.SoRA(rank=16),
        "Flat-LoRA r16": rs.FlatLoRA(rank=16),
        "PC-LoRA r16": rs.PCLoRA(rank=16),
    }


def arms(shape: str, batch: dict[str, torch.Tensor], device: str) -> dict[str, Callable[[], Step]]:
    def ours(method: rs.Method) -> Step:
        model = llama(shape, device)
        run = rs.attach(model, method, total_steps=100)
        optimizer = run.optimizer(lr=1e-4)

        def step() -> None:
            run.loss(model(**batch).loss, **batch).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    found: dict[str, Callable[[], Step]] = {"frozen": lambda: arm_frozen(llama(shape, device), batch)}
    for name, method in methods().items():
        found[name] = lambda method=method: ours(method)  # type: ignore[misc]
    return found


def writes(rank: int, device: str) -> dict[str, float]:
    """Microseconds to write r columns of a block's seven weights, as stored and columns first."""
    out: dict[str, float] = {}
    generator = torch.Generator(device).manual_seed(0)
    layers = []
    for rows, columns in BLOCK_8B:
        W = torch.randn(rows, columns, device=device, dtype=torch.bfloat16, generator=generator)
        at = torch.randperm(columns, generator=generator, device=device)[:rank].sort().values
        layers.append((W, W.t().contiguous(), at, torch.randn(rows, rank, device=device, generator=generator)))

    def stored() -> None:
        for W, _, at, D in layers:
            W.index_copy_(1, at, D.to(W.dtype))

    def columns_first() -> None:
        for _, Wt, at, D in layers:
            Wt.index_copy_(0, at, D.t().to(Wt.dtype))

    for name, write in (("as stored", stored), ("columns first", columns_first)):
        graph = torch.cuda.CUDAGraph()
        write()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            write()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(30):
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop))
        out[name] = 1e3 * sorted(times)[15]
    xs = [torch.randn(8192, W.shape[1], device=device, dtype=torch.bfloat16) for W, *_ in layers]
    for name, which in (("forward product, as stored", 0), ("forward product, columns first", 1)):
        times = []
        for _ in range(12):
            start.record()
            for x, layer in zip(xs, layers, strict=True):
                torch.mm(x, layer[1] if which else layer[0].t())
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop))
        out[name] = 1e3 * sorted(times)[6]
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="1.1B", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = "cuda"
    ids = torch.randint(0, 32000, (8, 1024), device=device)
    batch = {"input_ids": ids, "labels": ids}
    steps, failed = {}, {}
    for name, build in arms(options.shape, batch, device).items():
        try:
            steps[name] = build()
            steps[name]()
        except Exception as error:  # one arm must not cost the others their machine time
            steps.pop(name, None)
            failed[name] = f"{type(error).__name__}: {error}"
            print(f"{name}: {failed[name]}")
    table = measure(steps, options.rounds)
    print(f"{'arm':16} {'ms':>8} {'p10':>8} {'p90':>8} {'× frozen':>8} {'step GiB':>8}")
    for name, row in table.items():
        row["x_frozen"] = row["ms"] / table["frozen"]["ms"]
        cells = "".join(f" {row[key]:8.2f}" for key in ("ms", "p10", "p90", "x_frozen", "step_gib"))
        print(f"{name:16}{cells}")
    columns: dict[str, Any] = {f"r={rank}": writes(rank, device) for rank in (16, 64)}
    for rank, times in columns.items():
        print(rank, {k: f"{v:.0f} µs" for k, v in times.items()})
    if options.out:
        result = {
            "date": datetime.date.today().isoformat(),
            "gpu": torch.cuda.get_device_name(),
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "rankshift": rs.__version__,
            },
            "shape": options.shape,
            "tokens": ids.numel(),
            "arms": table,
            "failed": failed,
            "columns_us_per_block": columns,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
