"""LoRA on one GPU: gradients against float64, then whole-step times against the frozen base and PEFT.

    PYTHONPATH=src python benchmarks/lora_gpu.py --out benchmarks/results/lora_gpu.json

Model: a random-weight Llama of 1.1 B parameters (2048 hidden, 8192 ffn, 16 layers, 32 heads / 8 KV, vocabulary 32,000),
bf16, 8×1024 tokens, SDPA, no gradient checkpointing. All arms are built once and their steps interleaved; the table
gives medians over rounds, and ratios to the frozen base (input gradients only), eager and compiled. Single times vary
between machines; ratios within one run count.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn

import rankshift as rs

SHAPES = {
    "1.1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
}


def llama(shape: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SHAPES[shape],
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        tie_word_embeddings=False,
        use_cache=False,  # a cache in training recompiles every block
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.train()


def gradients(device: str) -> dict[str, float]:
    """Relative error of y, dx, dA, dB of one bf16 layer with fp32 factors, against float64 on the same values."""
    torch.manual_seed(0)
    layer = nn.Linear(1024, 2048, device=device, dtype=torch.bfloat16)
    model = nn.Sequential(layer)
    run = rs.attach(model, rs.LoRA(rank=16))
    (adapter,) = run.adapter().values()
    nn.init.normal_(adapter.B, std=0.02)
    x = torch.randn(4, 300, 1024, device=device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(4, 300, 2048, device=device, dtype=torch.bfloat16)
    y = model(x)
    y.backward(dy)
    W, A, B, X, G = (t.detach().double() for t in (layer.weight, adapter.A, adapter.B, x, dy))
    dense = torch.einsum("bto,bti->oi", G, X)
    wanted = {
        "y": (X @ (W + adapter.scale * B @ A).t() + layer.bias.double(), y),
        "dx": (G @ (W + adapter.scale * B @ A), x.grad),
        "dA": (adapter.scale * B.t() @ dense, adapter.A.grad),
        "dB": (adapter.scale * dense @ A.t(), adapter.B.grad),
    }
    assert adapter.A.grad.dtype == torch.float32
    return {k: float((got.double() - want).norm() / want.norm()) for k, (want, got) in wanted.items()}


Step = Callable[[], None]


def arm_frozen(model: nn.Module, batch: dict[str, torch.Tensor]) -> Step:
    model.requires_grad_(False)
    embed = model.get_input_embeddings()

    def step() -> None:
        inputs = embed(batch["input_ids"]).requires_grad_()
        model(inputs_embeds=inputs, labels=batch["labels"]).loss.backward()

    return step


def arm(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor], amp: bool = False) -> Step:
    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compiled(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module).__name__ == "LlamaDecoderLayer":
            module.compile()
    return model


def arms(shape: str, rank: int, batch: dict[str, torch.Tensor], device: str) -> dict[str, Callable[[], Step]]:
    def ours(compile_blocks: bool) -> Step:
        model = llama(shape, device)
        run = rs.attach(model, rs.LoRA(rank=rank))
        if compile_blocks:
            compiled(model)
        return arm(model, run.optimizer(lr=1e-4), batch)

    def peft(bf16: bool, compile_blocks: bool) -> Step:
        import peft

        config = peft.LoraConfig(r=rank, lora_alpha=32, target_modules="all-linear")
        model = peft.get_peft_model(llama(shape, device), config, autocast_adapter_dtype=not bf16)
        if compile_blocks:
            compiled(model)
        params = [p for p in model.parameters() if p.requires_grad]
        return arm(model, torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, fused=True), batch, amp=not bf16)

    return {
        "frozen": lambda: arm_frozen(llama(shape, device), batch),
        "frozen, blocks compiled": lambda: arm_frozen(compiled(llama(shape, device)), batch),
        "rankshift": lambda: ours(False),
        "rankshift, blocks compiled": lambda: ours(True),
        "peft bf16": lambda: peft(True, False),
        "peft bf16, blocks compiled": lambda: peft(True, True),
        "peft as shipped": lambda: peft(False, False),
    }


def measure(steps: dict[str, Step], rounds: int) -> dict[str, dict[str, float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, float] = {}
    for name, step in steps.items():
        for _ in range(5):
            step()
        torch.cuda.synchronize()
        resident = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        peaks[name] = (torch.cuda.max_memory_allocated() - resident) / 2**30
    for _ in range(rounds):
        for name, step in steps.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            stop.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(stop))
    table = {}
    for name, values in times.items():
        values.sort()
        table[name] = {
            "ms": statistics.median(values),
            "p10": values[len(values) // 10],
            "p90": values[len(values) * 9 // 10],
            "step_gib": peaks[name],
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="1.1B", choices=SHAPES)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = "cuda"
    errors = gradients(device)
    ids = torch.randint(0, 32000, (8, 1024), device=device)
    batch = {"input_ids": ids, "labels": ids}
    steps: dict[str, Step] = {}
    for name, build in arms(options.shape, options.rank, batch, device).items():
        try:
            steps[name] = build()
        except ImportError as error:
            print(f"{name}: left out ({error})")
    table = measure(steps, options.rounds)
    print("relative error against float64:", {k: f"{v:.1e}" for k, v in errors.items()})
    print(f"{'arm':30} {'ms':>8} {'p10':>8} {'p90':>8} {'× frozen':>9} {'× compiled':>10} {'step GiB':>9}")
    for name, row in table.items():
        row["x_frozen"] = row["ms"] / table["frozen"]["ms"]
        row["x_frozen_compiled"] = row["ms"] / table["frozen, blocks compiled"]["ms"]
        print(
            f"{name:30} {row['ms']:8.1f} {row['p10']:8.1f} {row['p90']:8.1f} {row['x_frozen']:9.2f} "
            f"{row['x_frozen_compiled']:10.2f} {row['step_gib']:9.2f}"
        )
    if options.out:
        result = {
            "date": datetime.date.today().isoformat(),
            "gpu": torch.cuda.get_device_name(),
            "versions": {
                **({"peft": importlib.metadata.version("peft")} if "peft bf16" in table else {}),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "rankshift": rs.__version__,
            },
            "shape": options.shape,
            "rank": options.rank,
            "tokens": ids.numel(),
            "relative_error": errors,
            "arms": table,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
