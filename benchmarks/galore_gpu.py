"""GaLore on one GPU: whole steps of the frozen base, full fine-tuning, GaLore in both modes, galore-torch; renewals.

    PYTHONPATH=src python benchmarks/galore_gpu.py --out benchmarks/results/galore_gpu.json

Model and protocol are those of lora_gpu.py (random-weight Llama of 1.1 B parameters, bf16, 8×1024 tokens); every arm
but "frozen" trains all parameters. Steps are interleaved; a basis is found once before, so the table is of the steps
between renewals. "GiB" is the peak of a step with everything an arm keeps (weights, states, gradients). The second part
takes T = 200 steps in a row with renewals spread over them, and as many without, in turns.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from lora_gpu import SHAPES, Step, arm_frozen, compiled, llama, measure
from torch import nn

import rankshift as rs


def stepper(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> Step:
    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(shape: str, device: str, batch: dict[str, torch.Tensor], compile_blocks: bool, **options: Any) -> Step:
    model = llama(shape, device)
    fused = options.pop("fused_backward", False)
    run = rs.attach(model, rs.GaLore(**{"rounding": "nearest", "every": 0, **options}))
    if compile_blocks:
        compiled(model)
    return stepper(model, run.optimizer(lr=1e-3, fused_backward=fused), batch)


def full(shape: str, device: str, batch: dict[str, torch.Tensor], compile_blocks: bool) -> Step:
    model = llama(shape, device)
    if compile_blocks:
        compiled(model)
    return stepper(model, torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True), batch)


def theirs(shape: str, device: str, batch: dict[str, torch.Tensor], rank: int, clock: dict[str, float]) -> Step:
    from galore_torch import GaLoreAdamW

    model = llama(shape, device)
    chosen = {id(m.weight) for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in chosen]},
        {
            "params": [p for p in model.parameters() if id(p) in chosen],
            "rank": rank, "update_proj_gap": 10**9, "scale": 0.25, "proj_type": "std",
        },
    ]  # fmt: skip
    optimizer = GaLoreAdamW(groups, lr=1e-5, no_deprecation_warning=True)
    step = stepper(model, optimizer, batch)
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()  # finds every basis
    torch.cuda.synchronize()
    clock["galore-torch, first step, s"] = time.perf_counter() - start
    return step


def arms(
    shape: str, rank: int, batch: dict[str, torch.Tensor], device: str, clock: dict[str, float]
) -> dict[str, Callable[[], Step]]:
    basis = {"rank": rank, "side": "in"}
    found: dict[str, Callable[[], Step]] = {  # what the figures need first
        "frozen, blocks compiled": lambda: arm_frozen(compiled(llama(shape, device)), batch),
        "projected, blocks compiled": lambda: ours(shape, device, batch, True, **basis, gradient="projected"),
        "full, fused AdamW": lambda: full(shape, device, batch, False),
        "full, fused AdamW, blocks compiled": lambda: full(shape, device, batch, True),
        "galore-torch": lambda: theirs(shape, device, batch, rank, clock),
        "frozen": lambda: arm_frozen(llama(shape, device), batch),
        "projected": lambda: ours(shape, device, batch, False, **basis, gradient="projected"),
        "GaLore": lambda: ours(shape, device, batch, False, **basis),
        "GaLore, fused backward": lambda: ours(shape, device, batch, False, **basis, fused_backward=True),
        "projected, stochastic rounding, blocks compiled": lambda: ours(
            shape, device, batch, True, **basis, gradient="projected", rounding="stochastic"
        ),
        "GaLore, blocks compiled": lambda: ours(shape, device, batch, True, **basis),
    }
    return found


def build(
    found: dict[str, Callable[[], Step]], failed: dict[str, str], until: float
) -> tuple[dict[str, Step], dict[str, float]]:
    """Every arm after four steps, and the most memory that it needs alone, GiB."""
    steps, peaks = {}, {}
    for name, make in found.items():
        if time.perf_counter() > until:
            failed[name] = "left out: the time for building arms was over"
            continue
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        try:
            step = make()
            for _ in range(3):
                step()
            torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
        except Exception as error:  # one arm must not cost the others their machine time
            failed[name] = f"{type(error).__name__}: {str(error)[:400]}"
            print(f"{name}: {failed[name]}", flush=True)
            continue
        steps[name], peaks[name] = step, (torch.cuda.max_memory_allocated() - before) / 2**30
        print(f"{name}: {peaks[name]:.1f} GiB, ready after {time.perf_counter() - start:.0f} s", flush=True)
    return steps, peaks


def once(step: Step) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def renewals(
    shape: str, rank: int, batch: dict[str, torch.Tensor], device: str, every: int, listed: bool
) -> dict[str, float]:
    """Milliseconds a step over one whole period with renewals spread over it, and without, in turns."""
    options = {"rank": rank, "side": "in", "gradient": "projected"}
    with_, without = (ours(shape, device, batch, True, **options, every=period) for period in (every, 0))
    torch.cuda.synchronize()
    start = time.perf_counter()
    with_()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    for _ in range(3):
        without()
    a: list[float] = []
    b: list[float] = []
    if listed:
        profile({"ten updates, with renewals": lambda: [with_() for _ in range(10)] and None})
    for _ in range(every):
        a.append(once(with_))
        b.append(once(without))
    return {
        "every": every,
        "first step, s": first,
        "with renewals, mean ms": statistics.mean(a),
        "without, mean ms": statistics.mean(b),
        "with renewals, longest ms": max(a[5:]),
        "share of run time": statistics.mean(a) / statistics.mean(b) - 1,
        "share, medians of tenths": statistics.median(
            sum(a[i : i + every // 10]) / sum(b[i : i + every // 10]) for i in range(0, every, every // 10)
        )
        - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="1.1B", choices=SHAPES)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--every", type=int, default=200)
    parser.add_argument("--profile", nargs="*", default=[], help="arms whose kernels are listed")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which no arm is built")
    parser.add_argument("--arms", nargs="*", help="only these")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = "cuda"
    ids = torch.randint(0, 32000, (8, 1024), device=device)
    batch = {"input_ids": ids, "labels": ids}
    clock: dict[str, float] = {}
    failed: dict[str, str] = {}
    found = arms(options.shape, options.rank, batch, device, clock)
    if options.arms:
        found = {name: make for name, make in found.items() if name in options.arms}
    torch._dynamo.config.recompile_limit = 64  # arms share the code of a block
    steps, peaks = build(found, failed, time.perf_counter() + options.deadline)
    table = measure(steps, options.rounds)
    floor = min((row["ms"] for name, row in table.items() if name.startswith("frozen")), default=float("nan"))
    print(f"{'arm':50} {'ms':>8} {'p10':>8} {'p90':>8} {'× floor':>8} {'GiB':>7}")
    for name, row in table.items():
        row["x_floor"], row["gib"] = row["ms"] / floor, peaks[name]
        cells = f"{row['ms']:8.1f} {row['p10']:8.1f} {row['p90']:8.1f} {row['x_floor']:8.2f} {row['gib']:7.2f}"
        print(f"{name:50} {cells}", flush=True)
    spread: dict[str, float] = {}
    record(options, table, clock, spread, failed, ids.numel())
    profile({name: steps[name] for name in options.profile if name in steps})
    steps.clear()
    gc.collect()
    torch.cuda.empty_cache()
    if options.every:
        try:
            spread = renewals(options.shape, options.rank, batch, device, options.every, bool(options.profile))
        except Exception as error:
            failed["renewals"] = f"{type(error).__name__}: {str(error)[:400]}"
    print(clock, spread, failed)
    record(options, table, clock, spread, failed, ids.numel())


def profile(steps: dict[str, Step]) -> None:
    """What the GPU does in a step of each arm, and for how long it does anything."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for name, step in steps.items():
        with torch.profiler.profile(activities=kinds) as seen:
            start = time.perf_counter()
            for _ in range(3):
                step()
            torch.cuda.synchronize()
            wall = time.perf_counter() - start
        rows = [e for e in seen.key_averages() if e.self_device_time_total > 0 and e.device_type.name == "CUDA"]
        rows = [e for e in rows if "#" not in e.key or "lambda" in e.key]  # else a range of code
        busy = sum(e.self_device_time_total for e in rows) / 3e3
        print(f"{name}: kernels {busy:.1f} ms of {1e3 * wall / 3:.1f} ms a step, {sum(e.count for e in rows) // 3}")
        for e in sorted(rows, key=lambda e: -e.self_device_time_total)[:14]:
            print(f"    {e.self_device_time_total / 3e3:7.2f} ms {e.count // 3:5} {e.key[:110]}")
        calls = [e for e in seen.key_averages() if e.self_cpu_time_total > 0 and e.device_type.name == "CPU"]
        for e in sorted(calls, key=lambda e: -e.self_cpu_time_total)[:10]:
            print(f"    CPU {e.self_cpu_time_total / 3e3:7.2f} ms {e.count // 3:5} {e.key[:90]}", flush=True)


def record(
    options: argparse.Namespace,
    table: dict[str, dict[str, float]],
    clock: dict[str, float],
    spread: dict[str, float],
    failed: dict[str, str],
    tokens: int,
) -> None:
    if not options.out:
        return
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "rankshift": rs.__version__}
    if "galore-torch" in table:
        versions["galore-torch"] = importlib.metadata.version("galore-torch")
    result = {
        "date": datetime.date.today().isoformat(), "gpu": torch.cuda.get_device_name(), "versions": versions,
        "shape": options.shape, "rank": options.rank, "tokens": tokens, "arms": table, "clock": clock,
        "renewals": spread, "failed": failed,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
