"""Adam with decoupled decay (AdamW). Kingma & Ba 2015, arXiv 1412.6980; Loshchilov & Hutter 2019, arXiv 1711.05101.

    m ← β1 m + (1−β1) g      v ← β2 v + (1−β2) g²      d = (m / (1−β1ᵗ)) / (√(v / (1−β2ᵗ)) + ε)
    p ← (1 − lr·wd) p − lr·d

t counts the updates of one tensor; m and v have its dtype, as in torch.optim.AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam

from rankshift.core.random import Key
from rankshift.optim.transform import Hyper


@dataclass(frozen=True)
class Adam:
    """The state names and bits of ``torch.optim.AdamW``; whole parameters go through torch's own kernel."""

    def init(
        self, p: Tensor, key: Key | None = None, rank: int | None = None, place: tuple[int, int] = (1, 1)
    ) -> dict[str, Tensor]:
        return {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
        }

    def update(self, g: Tensor, state: dict[str, Tensor], p: Tensor | None, hyper: Hyper) -> Tensor:
        beta1, beta2 = hyper.betas
        state["step"] += 1
        t = state["step"].item()
        m = state["exp_avg"].lerp_(g, 1 - beta1)
        v = state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        return (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt_() + hyper.eps)

    def step(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        hyper: Hyper,
    ) -> None:
        if not parameters:
            return
        adam(
            list(parameters),
            list(gradients),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            decoupled_weight_decay=True,
            amsgrad=False,
            beta1=hyper.betas[0],
            beta2=hyper.betas[1],
            lr=hyper.lr,
            weight_decay=hyper.weight_decay,
            eps=hyper.eps,
            maximize=False,
        )
