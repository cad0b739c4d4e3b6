"""A Llama of 70 B parameters on one GPU: built a layer at a time in four bits, then steps of QLoRA and QPaCA.

    PYTHONPATH=src python benchmarks/large_gpu.py --out benchmarks/results/large_gpu.json

Shape: hidden 8192, ffn 28672, 64 heads / 8 KV, 80 layers, vocabulary 128,256, untied; random weights. Each layer is
made in bf16 on the GPU and put into nf4 with double quantisation before the next is, so the model never is there in 16
bits. Gradient checkpointing, 1×2048 tokens; QLoRA of rank 64 and QPaCA of rank 64 on all linear layers, AdamW in fp32.
Peak memory is that of the whole device from the beginning on.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from torch import nn

import rankshift as rs

LARGE = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512}


def four_bit(layer: nn.Linear, device: str) -> nn.Module:
    """A layer of bitsandbytes with random weights of the size that initialisation gives."""
    made = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
    )
    weight = 0.02 * torch.randn(layer.out_features, layer.in_features, dtype=torch.bfloat16, device=device)
    codes, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    made.weight = bitsandbytes.nn.Params4bit(
        codes, requires_grad=False, quant_state=state, quant_type="nf4", module=made, bnb_quantized=True
    )
    made.quant_state = state
    return made


def built(shape: dict[str, int], device: str) -> nn.Module:
    heads = {"num_attention_heads": shape["hidden_size"] // 128, "num_key_value_heads": 8}
    if shape is SMALL:
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**shape, **heads, tie_word_embeddings=False, use_cache=False)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, four_bit(module, device))
    with torch.no_grad():
        for module in model.modules():
            for name, tensor in list(module._parameters.items()):
                if tensor is not None and tensor.is_meta:
                    value = torch.ones(tensor.shape, dtype=tensor.dtype, device=device)
                    module._parameters[name] = nn.Parameter(
                        value if tensor.dim() == 1 else value.normal_(0, 0.02), False
                    )
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(device)
    return model.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a small shape on a CPU")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device, shape = ("cpu", SMALL) if options.toy else ("cuda", LARGE)
    start = time.perf_counter()
    model: Any = built(shape, device)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "gpu": "cpu" if options.toy else torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "rankshift": rs.__version__},
        "shape": shape, "tokens": options.tokens, "built in seconds": time.perf_counter() - start, "arms": {},
    }  # fmt: skip
    print(f"built in {result['built in seconds']:.0f} s", flush=True)
    ids = torch.randint(0, shape["vocab_size"], (1, options.tokens), device=device)
    for name, method in (("QLoRA", rs.LoRA(rank=64)), ("QPaCA", rs.PaCA(rank=64))):
        run = rs.attach(model, method)
        optimizer = run.optimizer(lr=1e-4)
        times = []
        for _ in range(1 + options.steps):
            begun = time.perf_counter()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append((time.perf_counter() - begun, loss.item()))  # .item() waits for the device
        seconds = statistics.median(t for t, _ in times[1:])
        row = {"seconds": seconds, "tokens/s": options.tokens / seconds, "loss": times[-1][1]}
        row["trainable"] = sum(p.numel() for _, p in run.trainable())
        if not options.toy:
            row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
        result["arms"][name] = row
        print(name, {k: round(v, 3) for k, v in row.items()}, flush=True)
        print(run.summary() if name == "QLoRA" else "", flush=True)
        model = run.detach()
        del run, optimizer
        gc.collect()
        if not options.toy:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
