"""Tiny models of every shape that adapters meet, with weights that depend on a seed only."""

from __future__ import annotations

import torch
import transformers
from torch import nn


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


def llama(tie=False, seed=0, **more):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 61, "max_position_embeddings": 64, "tie_word_embeddings": tie}
    sizes |= {"initializer_range": 0.06}
    config = transformers.LlamaConfig(**sizes | {"attention_bias": True, "mlp_bias": True} | more)
    return seeded(lambda: transformers.LlamaForCausalLM(config), seed)


def gpt2(seed=0):
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=61, n_positions=64, initializer_range=0.06, tie_word_embeddings=False
    )
    return seeded(lambda: transformers.GPT2LMHeadModel(config), seed)


def bert(seed=0, labels=3):
    config = transformers.DistilBertConfig(
        dim=32,
        hidden_dim=48,
        n_layers=2,
        n_heads=4,
        vocab_size=61,
        max_position_embeddings=64,
        initializer_range=0.06,
        num_labels=labels,
    )
    return seeded(lambda: transformers.DistilBertForSequenceClassification(config), seed)


def moe(seed=0):
    config = transformers.Qwen3MoeConfig(
        hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=61, num_experts=4, num_experts_per_tok=2,
        tie_word_embeddings=False, initializer_range=0.06, decoder_sparse_step=1,
    )  # fmt: skip
    return seeded(lambda: transformers.Qwen3MoeForCausalLM(config), seed)


def gpt_oss(seed=0):
    config = transformers.GptOssConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=61, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False,
        layer_types=["full_attention", "full_attention"],
    )  # fmt: skip

    def make():
        model = transformers.GptOssForCausalLM(config)
        for p in model.parameters():
            nn.init.normal_(p, std=0.06)
        return model

    return seeded(make, seed)


class Mixed(nn.Module):
    """Embedding, convolutions of one, two and three dimensions, a batch norm and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.one = nn.Conv1d(8, 16, 3, padding=1)
        self.two = nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=1)
        self.three = nn.Conv3d(2, 5, 2)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 7)

    def forward(self, ids):  # (batch, 8) → (batch, 7)
        x = self.one(self.embed(ids).mT)  # (batch, 16, 8)
        x = self.two(x.reshape(-1, 4, 8, 4)).tanh()  # (batch, 6, 8, 3)
        x = self.three(x.reshape(-1, 2, 3, 8, 3)).flatten(2).mean(2)
        return self.head(self.norm(x))


def mixed(seed=0):
    return seeded(Mixed, seed)


def logits(model, batch=3, seed=1):
    """The output on ids that depend on a seed."""
    generator = torch.Generator().manual_seed(seed)
    plain = not hasattr(model, "config") or any(isinstance(module, Mixed) for module in model.modules())
    ids = torch.randint(0, 13 if plain else 61, (batch, 8), generator=generator)
    with torch.no_grad():
        return model(ids) if plain else model(input_ids=ids).logits


def stir(named, seed=2, scale=0.05):
    """Add keyed noise to tensors, so that nothing stands where it started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted(named, key=lambda pair: pair[0]):
            p.add_(scale * torch.randn(p.shape, generator=generator).to(p.dtype))


def loss(model, seed):
    """A loss to train on, from data that depend on a seed."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, Mixed):
        ids = torch.randint(0, 13, (4, 8), generator=generator)
        return model(ids).square().mean()
    ids = torch.randint(0, 61, (2, 9), generator=generator)
    return model(input_ids=ids, labels=ids).loss
