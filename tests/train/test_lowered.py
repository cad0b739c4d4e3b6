"""rs.Trainer(lower=True): fused blocks and a loss without logits, through phases too; or it says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import TrainingArguments

import rankshift as rs
from rankshift.core.errors import ConfigError
from rankshift.core.phase import Then
from rankshift.core.site import Site
from rankshift.lower.stand_in import stands_in


def llama() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def rows() -> list[dict[str, list[int]]]:
    ids = torch.randint(0, 64, (24, 10), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(tmp_path: Path, steps: int = 4, **words: Any) -> rs.Trainer:
    args = TrainingArguments(
        str(tmp_path), max_steps=steps, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        learning_rate=1e-3,
    )  # fmt: skip
    return rs.Trainer(model=llama(), args=args, train_dataset=rows(), **words)


def lowered(model: Any) -> list[bool]:
    return [*map(stands_in, model.model.layers), stands_in(model.lm_head)]


@pytest.mark.parametrize("budget", [None, "auto", "1GiB"])
def test_trains_as_without(tmp_path: Path, budget: str | None) -> None:
    plain = trainer(tmp_path, method=rs.LoRA(rank=4))
    fused = trainer(tmp_path, method=rs.LoRA(rank=4), lower=True, memory_budget=budget)
    assert all(lowered(fused.model))
    assert plain.train().training_loss == pytest.approx(fused.train().training_loss, rel=1e-5)
    assert fused.run.lower(memory_budget=budget).aside == {}


def test_stays_through_phases(tmp_path: Path) -> None:
    found = trainer(tmp_path, method=rs.LoRA(rank=4), lower=True, then=[Then(rs.VeRA(rank=4), steps=2)])
    found.train()
    assert found.run.method == rs.VeRA(rank=4)
    assert all(lowered(found.run.model))


def test_what_cannot_run_fused_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"under LoRA no block can be fused: LoRALayer"):
        trainer(tmp_path, method=rs.LoRA(rank=4, lora_bias=True), lower=True)
    with pytest.raises(ConfigError, match="memory_budget"):
        trainer(tmp_path, method=rs.LoRA(rank=4), memory_budget="auto")
    model = llama()
    with pytest.raises(ConfigError, match="under Full no block"):
        rs.Trainer(model=model, method=rs.Full(), lower=True, args=TrainingArguments(str(tmp_path), use_cpu=True))
    assert not any(lowered(model))
    assert not any(isinstance(module, Site) for module in model.modules())
    with pytest.raises(ConfigError, match="no block of this Linear"):
        rs.Trainer(
            model=torch.nn.Linear(2, 2), method=rs.LoRA(rank=1, targets="*"), lower=True,
            args=TrainingArguments(str(tmp_path), use_cpu=True),
        )  # fmt: skip
