"""Tiny models whose blocks can be lowered, their batches, and what is compared of them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB, LENGTH = 61, 9
_SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "initializer_range": 0.08,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def llama(**more: Any) -> nn.Module:
    return _made(transformers.LlamaConfig, transformers.LlamaForCausalLM, more)


def mistral(**more: Any) -> nn.Module:
    """Looks 4 tokens back."""
    return _made(transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": 4} | more)


def qwen2(**more: Any) -> nn.Module:
    """Biases at q, k and v; the second block looks 4 tokens back."""
    sliding = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}
    return _made(transformers.Qwen2Config, transformers.Qwen2ForCausalLM, sliding | more)


def gemma(**more: Any) -> nn.Module:
    """Norms multiply by 1 + w; heads are wider than their share."""
    return _made(transformers.GemmaConfig, transformers.GemmaForCausalLM, {"head_dim": 12} | more)


def qwen3(**more: Any) -> nn.Module:
    """Norms each head of q and k; heads are wider than their share; the second block looks 4 tokens back."""
    sliding = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1, "head_dim": 12}
    return _made(transformers.Qwen3Config, transformers.Qwen3ForCausalLM, sliding | more)


def _made(config: Any, kind: Any, more: dict[str, Any]) -> nn.Module:
    """The same on every call; norms and biases have values of their own."""
    more = dict(more)
    dtype = more.pop("dtype", torch.float32)
    options = {"attn_implementation": more.pop("attn", "sdpa")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = kind._from_config(config(**_SIZES | more), **options)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "norm" in name:
                    p.copy_(1 + 0.3 * torch.randn_like(p))
                elif name.endswith("bias"):
                    p.copy_(0.2 * torch.randn_like(p))
    return model.to(dtype).train()


def stir(run: Any) -> None:
    """Let nothing that trains be zero: another number for each name."""
    with torch.no_grad():
        for i, (_, p) in enumerate(run.trainable()):
            generator = torch.Generator().manual_seed(i)
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.add_((0.05 * noise).to(p))
    for site in run.sites.values():  # columns stand in weights
        site.leave()
        site.enter()


def ids(seed: int = 0, size: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCAB, (size, length), generator=torch.Generator().manual_seed(seed))


def outcome(model: nn.Module, run: Any, **batch: Any) -> dict[str, Tensor]:
    """Loss, logits and gradients of one batch."""
    batch = {"input_ids": ids(), "labels": ids()} | batch
    model.zero_grad()
    out = model(**batch)
    run.loss(out.loss, **batch).backward()
    found = {"loss": out.loss.detach(), "logits": out.logits.detach()}
    found |= {name: p.grad.clone() for name, p in run.trainable() if p.grad is not None}
    model.zero_grad()
    return found


def close(a: dict[Any, Tensor], b: dict[Any, Tensor], tolerance: float = 2e-5) -> None:
    """Every tensor of one is that of the other, relative to its norm."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    for name in a:
        x, y = a[name].detach().double(), b[name].detach().double()
        off = float((x - y).norm() / y.norm().clamp_min(1e-12))
        assert off <= tolerance, f"{name} is off by {off:.2g}"
