"""Frozen bases in fewer bits on one GPU: products against float64, then whole steps against the bf16 base.

    PYTHONPATH=src python benchmarks/quantised_gpu.py --out benchmarks/results/quantised_gpu.json

Model and protocol of benchmarks/lora_gpu.py: 1.1 B parameters, 8×1024 tokens, no gradient checkpointing, steps in
turns. LoRA of rank 16 on a base in bf16, nf4 (double quantisation), int8 and fp8; QPaCA of rank 64; PEFT with
bitsandbytes' own layers. fp8 is another arithmetic, in a table of its own: its inputs are rounded to 8 bits too. Memory
is the peak of a step with weights and state.
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
from galore_gpu import once
from lora_gpu import Step, arm, arm_frozen, compiled, llama
from torch import nn

import rankshift as rs


def products(kind: str, device: str) -> dict[str, float]:
    """Relative error of y and dx of a bf16 layer, against float64 with the weight that is held; and of that weight."""
    torch.manual_seed(0)
    layer = nn.Linear(2048, 4096, device=device, dtype=torch.bfloat16)
    before = layer.weight.detach().double()
    model = nn.Sequential(layer)
    run = rs.attach(model, rs.LoRA(rank=16, targets="0"), base=kind)  # type: ignore[arg-type]
    W, b = run.sites["0"].base.dense().double(), layer.bias.double()
    x = torch.randn(512, 2048, device=device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(512, 4096, device=device, dtype=torch.bfloat16)
    y = model(x)
    y.backward(dy)
    wanted = {"y": (x.double() @ W.t() + b, y), "dx": (dy.double() @ W, x.grad), "weight": (before, W)}
    return {name: float((got.detach().double() - want).norm() / want.norm()) for name, (want, got) in wanted.items()}


def arms(shape: str, batch: dict[str, torch.Tensor], device: str) -> dict[str, Callable[[], Step]]:
    def ours(method: rs.Method, base: str | None, compile_blocks: bool = True) -> Step:
        model = llama(shape, device)
        run = rs.attach(model, method, base=base)  # type: ignore[arg-type]
        if compile_blocks:
            compiled(model)
        return arm(model, run.optimizer(lr=1e-4), batch)

    def peft() -> Step:
        import bitsandbytes
        import peft

        model = llama(shape, device)
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and name != "lm_head":
                quantised = bitsandbytes.nn.Linear4bit(
                    module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                quantised.weight = bitsandbytes.nn.Params4bit(module.weight.data.cpu(), quant_type="nf4")
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, quantised.to(device))
        model.is_loaded_in_4bit = True
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        params = [p for p in model.parameters() if p.requires_grad]
        return arm(model, torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, fused=True), batch)

    lora, paca = rs.LoRA(rank=16), rs.PaCA(rank=64)
    return {
        "frozen bf16, blocks compiled": lambda: arm_frozen(compiled(llama(shape, device)), batch),
        "LoRA bf16, blocks compiled": lambda: ours(lora, None),
        "LoRA nf4, blocks compiled": lambda: ours(lora, "nf4"),
        "LoRA fp8, blocks compiled": lambda: ours(lora, "fp8"),
        "PaCA nf4, blocks compiled": lambda: ours(paca, "nf4"),
        "LoRA int8, blocks compiled": lambda: ours(lora, "int8"),
        "LoRA bf16, eager": lambda: ours(lora, None, False),
        "LoRA nf4, eager": lambda: ours(lora, "nf4", False),
        "PEFT + bitsandbytes nf4, eager": peft,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1B")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--arms", nargs="*", help="only these")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which no arm is built")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    began, device = time.perf_counter(), "cuda"
    torch._dynamo.config.recompile_limit = 64
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "gpu": torch.cuda.get_device_name(),
        "versions": {
            "torch": torch.__version__, "transformers": transformers.__version__, "rankshift": rs.__version__,
            "bitsandbytes": importlib.metadata.version("bitsandbytes"),
        },
        "shape": options.shape, "tokens": 8192, "errors": {}, "arms": {}, "failed": {},
    }  # fmt: skip
    for kind in ("nf4", "fp4", "int8", "fp8"):
        try:
            result["errors"][kind] = products(kind, device)
        except Exception as error:  # the table says which are missing, and why
            result["failed"][kind] = repr(error)[:500]
    print(json.dumps({key: result[key] for key in ("errors", "failed")}, indent=1), flush=True)
    ids = torch.randint(0, 32000, (8, 1024), device=device)
    batch = {"input_ids": ids, "labels": ids}
    steps: dict[str, Step] = {}
    for name, build in arms(options.shape, batch, device).items():
        if (options.arms and name not in options.arms) or time.perf_counter() - began > options.deadline:
            continue
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        try:
            step = build()
            for _ in range(4):
                step()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
        except Exception as error:
            result["failed"][name] = repr(error)[:500]
            print(f"{name}: {error!r}"[:600], flush=True)
            continue
        steps[name] = step
        result["arms"][name] = {"gib": (torch.cuda.max_memory_allocated() - before) / 2**30}
        print(f"{name}: ready after {time.perf_counter() - began:.0f} s", flush=True)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            times[name].append(once(step))
    floor = statistics.median(times[next(iter(times))])
    print(f"{'arm':34} {'ms':>8} {'p10':>8} {'p90':>8} {'× first':>8} {'GiB':>7}")
    for name, row in result["arms"].items():
        tenths = statistics.quantiles(times[name], n=10)
        row |= {"ms": statistics.median(times[name]), "p10": tenths[0], "p90": tenths[-1]}
        row["x_first"] = row["ms"] / floor
        print(
            f"{name:34} {row['ms']:8.1f} {row['p10']:8.1f} {row['p90']:8.1f} {row['x_first']:8.2f} {row['gib']:7.2f}",
            flush=True,
        )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
