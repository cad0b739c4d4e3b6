"""Trainable parameters at the size of real models, on the meta device: what is attached, what each method's formula
says, and what the papers print are one number."""

from __future__ import annotations

import ast
import copy
import functools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import rankshift as rs
from rankshift.methods import Method, methods

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SYMBOLS = {"r": "rank", "n": "blocks"}  # of a formula: fields of the method; out and in are those of the layer


def meta(config: Any, kind: Any) -> nn.Module:
    with torch.device("meta"):
        return kind(config)


@functools.cache
def llama(
    layers: int, hidden: int = 4096, ffn: int = 11008, kv: int | None = None, vocab: int = 32000, heads: int = 0
) -> nn.Module:
    """LLaMA-7B with so many of its 32 layers, or a relative of it."""
    heads = heads or hidden // 128
    return meta(
        tf.LlamaConfig(
            hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv or heads, vocab_size=vocab,
        ),
        tf.LlamaForCausalLM,
    )  # fmt: skip


@functools.cache
def roberta(hidden: int) -> nn.Module:
    """One layer of RoBERTa."""
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": hidden // 64}
    return meta(tf.RobertaConfig(**sizes, num_hidden_layers=1), tf.RobertaModel)


def vit_fused() -> nn.Module:
    """The linear layers of a block of ViT-B where query, key and value are one, as in timm."""
    shapes = {"qkv": (768, 2304), "proj": (768, 768), "fc1": (768, 3072), "fc2": (3072, 768)}
    with torch.device("meta"):
        return nn.ModuleDict({name: nn.Linear(*shape) for name, shape in shapes.items()})


# one layer of each model, and how many layers it has: what is trained in them adds up
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "LLaMA-7B": (lambda: llama(1), 32),
    "LLaMA-13B": (lambda: llama(1, 5120, 13824), 40),
    "Llama-3-8B": (lambda: llama(1, 4096, 14336, 8, 128256), 32),
    "Llama-60M": (lambda: llama(1, 512, 1376, vocab=32100, heads=8), 8),
    "Llama-130M": (lambda: llama(1, 768, 2048, vocab=32100, heads=12), 12),
    "RoBERTa-base": (lambda: roberta(768), 12),
    "RoBERTa-large": (lambda: roberta(1024), 24),
    "ViT-B": (vit_fused, 12),
}


def evaluate(formula: str, **values: int) -> int:
    """A formula as methods write it: sums and · products of numbers and of the values given."""
    tree = ast.parse(re.sub(r"\bin\b", "into", formula.replace("·", "*")), mode="eval")

    def value(node: Any) -> int:
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
            a, b = value(node.left), value(node.right)
            return a + b if isinstance(node.op, ast.Add) else a * b
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        assert isinstance(node, ast.Name), f"{formula!r}: {ast.unparse(node)}"
        return values[node.id]

    return value(tree.body)


def expected(method: Method, model: nn.Module, leaves: tuple[str, ...]) -> int:
    """The method's formula, summed over the linear layers of these names."""
    sizes = {symbol: getattr(method, name) for symbol, name in SYMBOLS.items() if hasattr(method, name)}
    shapes = [m.weight.shape for name, m in model.named_modules() if name.rpartition(".")[2] in leaves]
    return sum(evaluate(method.formula, out=out, into=into, **sizes) for out, into in shapes)


def attached(method: Method, model: nn.Module, leaves: tuple[str, ...]) -> int:
    """Parameters that train, of the method at these layers. The model is left as it was."""
    model = copy.deepcopy(model)
    alone = {"rest": "freeze"} if hasattr(method, "rest") else {}  # of what trains in place, these layers
    if method.trains_base and not alone:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.split(".")[-2] in leaves)
    run = rs.attach(model, replace(method, targets=leaves, **alone), total_steps=10 if method.needs_total else None)
    count = sum(p.numel() for _, p in run.trainable())
    assert count == run.summary().trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert all(p.is_meta for _, p in run.trainable())
    return count


@pytest.mark.parametrize("kind", methods().values(), ids=lambda kind: kind.name)
def test_the_formula_is_what_trains_in_llama_7b(kind: type[Method]) -> None:
    method: Any = kind()
    whole = llama(32)
    assert attached(method, whole, LINEARS) == expected(method, whole, LINEARS)
    for name in set(SYMBOLS.values()) & set(vars(method)):  # and it says how the number grows
        more: Any = replace(method, **{name: 2 * getattr(method, name)})
        assert attached(more, llama(1), LINEARS) == expected(more, llama(1), LINEARS)


def test_what_is_trained_adds_up_over_layers() -> None:
    for method in (rs.LoRA(rank=64), rs.from_dict({"method": "vera", "rank": 1024})):
        assert attached(method, llama(3), LINEARS) == 3 * attached(method, llama(1), LINEARS)


QV, QUERY_VALUE = ("q_proj", "v_proj"), ("query", "value")
# method → (model, settings, layers, parameters), each as a paper prints it
PUBLISHED: dict[str, list[tuple[str, dict[str, Any], tuple[str, ...], int]]] = {
    "full": [("LLaMA-7B", {}, LINEARS, 6_476_005_376)],
    "galore": [("LLaMA-7B", {"rank": 1024}, LINEARS, 6_476_005_376)],  # all of it: what is small is the state, below
    "adarankgrad": [("LLaMA-7B", {"rank": 1024}, LINEARS, 6_476_005_376)],
    "lora": [
        ("LLaMA-7B", {"rank": 64}, LINEARS, 159_907_840),  # VeRA's table
        ("LLaMA-7B", {"rank": 8}, LINEARS, 19_988_480),  # 20.0M in PaCA's
        ("LLaMA-7B", {"rank": 64}, QV, 33_554_432),  # what MELoRA is compared with
        ("LLaMA-13B", {"rank": 8}, LINEARS, 31_293_440),  # 31.3M in PaCA's
        ("Llama-3-8B", {"rank": 64}, LINEARS, 167_772_160),  # 167.8M in PaCA's
        ("RoBERTa-base", {"rank": 8}, QUERY_VALUE, 294_912),
    ],
    "vera": [
        ("LLaMA-7B", {"rank": 1024}, LINEARS, 1_589_248),
        ("LLaMA-13B", {"rank": 1024}, LINEARS, 2_416_640),
        ("RoBERTa-base", {"rank": 1024}, QUERY_VALUE, 43_008),
        ("RoBERTa-large", {"rank": 256}, QUERY_VALUE, 61_440),
    ],
    "paca": [
        ("LLaMA-7B", {"rank": 8}, LINEARS, 10_878_976),  # 10.9M
        ("LLaMA-7B", {"rank": 16}, LINEARS, 21_757_952),  # 21.8M
        ("LLaMA-13B", {"rank": 8}, LINEARS, 17_039_360),  # 17.0M
        ("Llama-3-8B", {"rank": 8}, LINEARS, 11_010_048),  # 11.0M
    ],
    "melora": [
        ("LLaMA-7B", {"rank": 1, "blocks": 64}, QV, 524_288),  # a 64th of LoRA's at r = 64
        ("RoBERTa-base", {"rank": 1, "blocks": 8}, QUERY_VALUE, 36_864),  # an eighth of LoRA's at r = 8
    ],
    "pc-lora": [("ViT-B", {"rank": 32}, ("qkv", "proj", "fc1", "fc2"), 4_801_536)],  # 94.35 % of these layers are gone
    "prelora": [("LLaMA-7B", {}, LINEARS, 6_476_005_376)],  # at first; what is left at the end is in its own tests
    "relora": [
        ("Llama-60M", {}, LINEARS, 9_994_240),  # 43M with embedding and head, 2 · 32100 · 512
        ("Llama-130M", {}, LINEARS, 22_413_312),  # 72M likewise
    ],
    "switchlora": [("Llama-130M", {"rank": 192}, LINEARS, 33_619_968)],  # 61.8 % of all with embedding and head
    "sora": [("LLaMA-7B", {"rank": 64}, LINEARS, 159_907_840 + 224 * 64)],  # LoRA's, and a gate for every rank
    "flat-lora": [("LLaMA-7B", {"rank": 64}, LINEARS, 159_907_840)],
}
ROWS = [(name, *row) for name, rows in PUBLISHED.items() for row in rows]


@pytest.mark.parametrize(
    ("name", "model", "fields", "leaves", "number"), [pytest.param(*row, id=f"{row[0]}-{row[4]}") for row in ROWS]
)
def test_numbers_of_the_papers(name: str, model: str, fields: dict[str, Any], leaves: Any, number: int) -> None:
    method = rs.from_dict({"method": name, **fields})
    make, layers = MODELS[model]
    assert layers * attached(method, make(), leaves) == number
    assert layers * expected(method, make(), leaves) == number


def test_state_of_galore_is_its_formula() -> None:
    """s·r of basis, 2·l·r of moments and r of mass a layer, in fp32, s the smaller side."""
    h, f, rank = 4096, 11008, 1024
    layer = 4 * (h * rank + 2 * h * rank + rank) + 3 * (h * rank + 2 * f * rank + rank)
    run = rs.attach(copy.deepcopy(llama(1)), rs.GaLore(rank=rank, targets=LINEARS, rest="freeze"))
    summary = run.summary()
    assert summary.bytes_optimizer == 4 * layer
    assert summary.bytes_adamw == 2 * 4 * (4 * h * h + 3 * h * f)
    rest = 2 * 32000 * h + 3 * h  # embedding, head, norms: AdamW's two moments
    run = rs.attach(copy.deepcopy(llama(1)), rs.GaLore(rank=rank, targets=LINEARS))
    assert run.summary().bytes_optimizer == 4 * layer + 2 * 4 * rest
    assert {row.layer: row.rank for row in run.summary().rows} == {
        **dict.fromkeys(LINEARS, "1024"), "whole tensors": "–"
    }  # fmt: skip


DOCUMENTED = re.findall(
    r"^\| (1\.1B|7B), (.+), (fp32|bf16) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$",
    (Path(__file__).parents[1] / "docs" / "galore.md").read_text(encoding="utf-8"),
    re.M,
)


@pytest.mark.parametrize("row", DOCUMENTED, ids=lambda row: " ".join(row[:3]))
def test_memory_in_the_documentation(row: tuple[str, ...]) -> None:
    """GiB of weights, gradients and state of whole models."""
    size, written, dtype, *numbers = row
    model = copy.deepcopy(llama(16, 2048, 8192, 8, heads=32) if size == "1.1B" else llama(32))
    method = rs.Full() if written == "full, AdamW" else eval(f"rs.{written}")
    summary = rs.attach(model.to(torch.float32 if dtype == "fp32" else torch.bfloat16), method).summary()
    found = (summary.bytes_trainable, summary.bytes_gradients, summary.bytes_optimizer)
    assert [f"{count / 2**30:.1f}" for count in found] == numbers


def test_the_documentation_has_that_table() -> None:
    assert len(DOCUMENTED) == 10


def test_every_method_has_a_number() -> None:
    assert set(PUBLISHED) == set(methods())


def test_a_formula_that_is_not_so_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("r·(out + in) + out", "r·out", "2·r·(out + in)"):
        monkeypatch.setattr(rs.LoRA, "formula", wrong)
        assert attached(rs.LoRA(), llama(1), LINEARS) != expected(rs.LoRA(), llama(1), LINEARS)
    assert evaluate("r·(out + in + 1) + 2·n", out=5, into=7, r=3, n=4) == 47
    for wrong in ("r·(out - in)", "min(out, in)", "r.real", "q·out"):
        with pytest.raises((AssertionError, KeyError)):
            evaluate(wrong, out=5, into=7, r=3)


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4.127), ("fp4", 4.127), ("int8", 8.047), ("fp8", 16.047)])
def test_bits_of_a_base_in_fewer(kind: Any, bits: float) -> None:
    """4 bits, 8 for 64 numbers, 32 for 64 · 256 and μ; 8 bits and 32 for a row; with a transposed copy twice that."""
    model = nn.Sequential(nn.Linear(512, 1024, bias=False), nn.Linear(1024, 512, bias=False), nn.LayerNorm(512))
    run = rs.attach(model, rs.LoRA(rank=2, targets=("0", "1")), base=kind)
    summary = run.summary()
    assert [(k, n) for k, n, _ in summary.held] == [(kind, 2)]
    assert summary.held[0][2] == pytest.approx(bits, abs=1e-3)
    assert summary.bytes_base == pytest.approx(bits / 8 * 2 * 512 * 1024 + 4 * 1024, rel=1e-3)
    assert f", 2 layers in {kind} ({bits:.3g} bits a weight)" in str(summary)
    assert rs.attach(nn.Sequential(nn.Linear(8, 8)), rs.LoRA(rank=2, targets="0")).summary().held == ()
