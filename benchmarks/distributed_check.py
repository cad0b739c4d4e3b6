"""DDP and FSDP2 on real GPUs: the same weights as one process, and an exact resume.

    PYTHONPATH=src torchrun --nproc-per-node 2 benchmarks/distributed_check.py --out benchmarks/results/distributed.json

Runs on CPU with gloo as well. For each method and engine: six updates of a small Llama in float64 on a global batch
split over the ranks, against the same six in one process; then stop after three, rebuild everything, load, and go on.
Prints the largest relative difference of a trained tensor, and whether the resumed run equals the other bit for bit.

``--lowered``: in bf16, as the model comes and in fused blocks, with DDP by CUDA graphs too, against one process in
float64: fused blocks should be no further from it than the model's own.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import rankshift as rs

METHODS: dict[str, rs.Method] = {
    "lora": rs.LoRA(rank=8),
    "lora, dora": rs.LoRA(rank=8, dora=True),
    "lora, pissa": rs.LoRA(rank=8, init="pissa"),
    "lora-fa": rs.LoRA(rank=8, train="B", precondition=True),
    "full": rs.Full(),
}
LOWERED: dict[str, rs.Method] = {
    "lora": rs.LoRA(rank=16),
    "lora, dora": rs.LoRA(rank=16, dora=True),
    "paca": rs.PaCA(rank=16),
    "vera": rs.VeRA(rank=64),
}
FULL = StateDictOptions(full_state_dict=True, cpu_offload=False)


def base(device: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=211, use_cache=False, attn_implementation="eager" if dtype == torch.float64 else "sdpa",
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).to(device, dtype).train()


def build(method: rs.Method, engine: str, device: str) -> tuple[nn.Module, nn.Module, rs.Run, torch.optim.Optimizer]:
    """``engine``: "one", "ddp" or "fsdp2", and behind a comma how blocks run in bf16, or "exact"."""
    engine, _, mode = engine.partition(", ")
    model = base(device, torch.bfloat16 if mode else torch.float64)
    if mode == "exact":
        model = model.double()
    run = rs.attach(model, method, seed=7, total_steps=8)
    if mode in ("lowered", "graphs"):
        run.lower(graphs=mode == "graphs")
    torch.manual_seed(1000 + (dist.get_rank() if dist.is_initialized() else 0))  # ranks must agree all the same
    wrapped: nn.Module = model
    if engine == "fsdp2":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    if engine == "ddp":
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    return model, wrapped, run, run.optimizer(lr=1e-2, weight_decay=0.1)


def batches(steps: int, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 211, (8, 32), generator=generator).to(device) for _ in range(steps)]


def updates(wrapped: nn.Module, optimizer: torch.optim.Optimizer, data: list[Tensor], share: slice) -> None:
    for ids in data:
        wrapped(input_ids=ids[share], labels=ids[share]).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()


def check(method: rs.Method, engine: str, device: str) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    data = batches(6, device)
    _, wrapped, run, optimizer = build(method, "one, exact" if ", " in engine else "one", device)
    updates(wrapped, optimizer, data, slice(None))
    alone = run.state_dict()["tensors"]

    model, wrapped, run, optimizer = build(method, engine, device)
    updates(wrapped, optimizer, data, share)
    together = run.state_dict()["tensors"]
    numbers = [k for k, t in alone.items() if t.is_floating_point()]
    worst = max(float((together[k] - alone[k]).norm() / alone[k].norm().clamp_min(1e-12)) for k in numbers)

    model, wrapped, run, optimizer = build(method, engine, device)
    updates(wrapped, optimizer, data[:3], share)
    saved = copy.deepcopy(run.state_dict()), copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=FULL))
    model, wrapped, run, optimizer = build(method, engine, device)
    run.load_state_dict(saved[0])
    set_optimizer_state_dict(model, optimizer, saved[1], options=FULL)
    updates(wrapped, optimizer, data[3:], share)
    resumed = run.state_dict()["tensors"]
    exact = all(torch.equal(resumed[k], together[k]) for k in together) and run.step == 6
    return {"worst_relative_difference": worst, "resume_exact": exact}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lowered", action="store_true", help="bf16: fused blocks against the model's own")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    table: dict[str, dict[str, Any]] = {}
    modes = ("ddp, bf16", "ddp, lowered", "ddp, graphs", "fsdp2, bf16", "fsdp2, lowered")
    for name, method in (LOWERED if options.lowered else METHODS).items():
        for engine in modes if options.lowered else ("ddp", "fsdp2"):
            table[f"{name} | {engine}"] = check(method, engine, device)
    if dist.get_rank() == 0:
        for name, row in table.items():
            print(f"{name:28} {row['worst_relative_difference']:.1e}  resume exact: {row['resume_exact']}")
        if options.out:
            result = {
                "date": datetime.date.today().isoformat(),
                "device": torch.cuda.get_device_name() if cuda else "cpu",
                "ranks": dist.get_world_size(),
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
                "checks": table,
            }
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
