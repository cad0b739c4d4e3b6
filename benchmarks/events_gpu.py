"""What the events of SwitchLoRA and ReLoRA cost on one GPU: a Llama of 130 M parameters, r = d/4.

    PYTHONPATH=src python benchmarks/events_gpu.py --out benchmarks/results/events_gpu.json

Model: hidden 768, ffn 2048, 12 heads, 12 layers, vocabulary 32,000, untied; fp32 weights, bf16 autocast, 64×256 tokens,
blocks compiled, and eager. SwitchLoRA's events run in every update: whole steps with the paper's first rate of
exchanges (r / 40 an update, the highest) in turns with steps without any (interval = ∞), which keep the same optimizer.
The rate falls over the run: ``--at 0 0.1 0.2 0.4`` measures them at these shares of it too, with the clock that a
resumed run would have, and takes the mean over the run, of a cost that between measured rates is linear in the rate.
ReLoRA's restart comes once in K: the time of an update with one, less the others' median, over K = 1000 of them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from galore_gpu import once
from lora_gpu import Step, compiled
from torch import nn

import rankshift as rs
from rankshift.core.event import Tick

LONG = 40_000  # updates of the run, so that the rate hardly falls while it is measured


def llama(device: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, vocab_size=32000,
        tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    return model.train()


def stepper(
    method: rs.Method, ids: torch.Tensor, compile_blocks: bool, total: int
) -> tuple[Step, rs.Run, torch.optim.Optimizer]:
    model = llama(ids.device.type)
    run = rs.attach(model, method, total_steps=total)
    if compile_blocks:
        compiled(model)
    optimizer = run.optimizer(lr=1e-3)

    def step() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(5):
        step()
    return step, run, optimizer


def spread(times: list[float]) -> dict[str, float]:
    tenths = statistics.quantiles(times, n=10)
    return {"ms": statistics.median(times), "p10": tenths[0], "p90": tenths[-1], "mean": statistics.mean(times)}


def share(switch: list[float], still: list[float]) -> dict[str, float]:
    """What exchanges add to a step."""
    return {
        "share": statistics.median(switch) / statistics.median(still) - 1,
        "share, means": statistics.mean(switch) / statistics.mean(still) - 1,
        "ms": statistics.median(switch) - statistics.median(still),
    }


def over_the_run(run: rs.Run, rounds: int, at: list[float], switch: Any, still: Any) -> dict[str, Any]:
    """The cost at some shares of the run; and its mean over all of it, by the trapezoidal rule."""
    (event,) = run.method.events()  # type: ignore[union-attr]
    found: dict[str, Any] = {}
    rates: list[float] = []
    for x in at:
        for _, _, optimizer in (switch, still):
            optimizer.param_groups[0]["updates"] = int(x * LONG)
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(-6, rounds):  # first what was frozen before moves again
            for (step, _, _), of in zip((switch, still), times, strict=True):
                ms = once(step)
                if turn >= 0:
                    of.append(ms)
        rates.append(event.rate(Tick(int(x * LONG), LONG, 0, None)))  # type: ignore[attr-defined]
        found[f"at {x:g}"] = {"rate": rates[-1], **share(*times)}
    everywhere = [event.rate(Tick(t, LONG, 0, None)) for t in range(0, LONG, 10)]  # type: ignore[attr-defined]
    up = sorted(range(len(at)), key=rates.__getitem__)
    for key in ("share", "share, means", "ms"):
        values = [found[f"at {at[i]:g}"][key] for i in up]
        costs = np.interp(everywhere, [rates[i] for i in up], values)
        found[f"mean over the run, {key}"] = float((costs[1:] + costs[:-1]).mean() / 2)
    return found


def measured(ids: torch.Tensor, rounds: int, compile_blocks: bool, at: list[float]) -> dict[str, Any]:
    arms: dict[str, Callable[[], rs.Method]] = {
        "SwitchLoRA": lambda: rs.SwitchLoRA(rank=192, interval=40),
        "SwitchLoRA without exchanges": lambda: rs.SwitchLoRA(rank=192, interval=math.inf),
        "ReLoRA": lambda: rs.ReLoRA(rank=192, alpha=192, every=10),
        "LoRA": lambda: rs.ReLoRA(rank=192, alpha=192, every=None),
        "AdamW": rs.Full,
    }
    steps = {name: stepper(make(), ids, compile_blocks, LONG) for name, make in arms.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    restarts: list[float] = []
    for _ in range(rounds):
        for name, (step, run, _) in steps.items():
            due = name == "ReLoRA" and run.step > 0 and run.step % 10 == 0
            (restarts if due else times[name]).append(once(step))
    table: dict[str, Any] = {name: spread(found) for name, found in times.items()}
    switch, still = table["SwitchLoRA"], table["SwitchLoRA without exchanges"]
    plain = table["ReLoRA"]["ms"]
    table["exchanges, share of a step"] = switch["ms"] / still["ms"] - 1
    table["exchanges, share of a step, means"] = switch["mean"] / still["mean"] - 1
    table["a restart, ms"] = statistics.median(restarts) - plain
    table["restarts, share of a step at K = 1000"] = (statistics.median(restarts) - plain) / plain / 1000
    if at:
        both = steps["SwitchLoRA"], steps["SwitchLoRA without exchanges"]
        table["exchanges over the run"] = over_the_run(both[0][1], rounds, at, *both)
    table["matrices"] = len(steps["SwitchLoRA"][1].sites)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--compiled-only", action="store_true")
    parser.add_argument("--at", type=float, nargs="*", default=[], help="shares of the run, such as 0 0.1 0.2 0.4")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64
    torch.set_float32_matmul_precision("high")
    ids = torch.randint(0, 32000, (64, 256), device="cuda")
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "gpu": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "rankshift": rs.__version__},
    }  # fmt: skip
    kinds = (("blocks compiled", True), ("eager", False))
    for name, compile_blocks in kinds[:1] if options.compiled_only else kinds:
        result[name] = measured(ids, options.rounds, compile_blocks, options.at)
        print(name, json.dumps(result[name], indent=1), flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
