"""RunLoRA: which order of multiplication is cheapest. Cherniuk, Mikhalev, Oseledets, ACL 2025 (arXiv 2312.03415).

The result is the same in exact arithmetic; an order changes no parameter. With b tokens, n = in, m = out, rank r, a
multiply-add counted as 2, Z = X Aᵀ and S = dY B:

    forward   f1   X Wᵀ + Z Bᵀ                                              2bnm + 2br(n+m)
              f2   X (W + BA)ᵀ                                              2bnm + 2nmr
    backward  b1   dA = SᵀX, dB = dYᵀZ, dX = dY W + S A, Z recomputed       2bnm + 6bnr + 4bmr
              b1s  the same with Z saved by the forward                     2bnm + 4bnr + 4bmr
              b5   as b1 with dX = dY (W + BA)                              2bnm + 4bnr + 4bmr + 2nmr
              b5s  the same with Z saved                                    2bnm + 2bnr + 4bmr + 2nmr
              b4   dA = Bᵀ(dYᵀX), dB = (dYᵀX)Aᵀ, dX = dY (W + BA)           4bnm + 6nmr

The paper's b2, b3, b6, b7 and b8 never win while r (n + m) < nm and are left out. Without an input gradient the dX terms
drop out.

f2, b4 and b5 round W + BA to the compute dtype. In bf16 and fp16 that loses most of a small update (a delta of 7e-4 of
the weight comes through with 86 % error), so there they are never chosen and, when asked for, refused.
"""

from __future__ import annotations

from typing import Literal

import torch

from rankshift.core.errors import ConfigError

Forward = Literal["f1", "f2"]
Backward = Literal["b1", "b1s", "b4", "b5", "b5s"]
MERGED = frozenset({"f2", "b4", "b5", "b5s"})
LOW_PRECISION = frozenset({torch.bfloat16, torch.float16})


def forward_flops(order: Forward, b: int, n: int, m: int, r: int) -> int:
    """Operations of a forward order."""
    return {"f1": 2 * b * n * m + 2 * b * r * (n + m), "f2": 2 * b * n * m + 2 * n * m * r}[order]


def backward_flops(order: Backward, b: int, n: int, m: int, r: int, input_grad: bool = True) -> int:
    """Operations of a backward order in which A and B both train."""
    dx = 2 * b * n * m
    factors = {
        "b1": 4 * b * n * r + 4 * b * m * r,
        "b1s": 2 * b * n * r + 4 * b * m * r,
        "b5": 4 * b * n * r + 4 * b * m * r,
        "b5s": 2 * b * n * r + 4 * b * m * r,
        "b4": 2 * b * n * m + 4 * n * m * r,
    }[order]
    if not input_grad:
        return factors
    return factors + dx + {"b1": 2 * b * n * r, "b1s": 2 * b * n * r}.get(order, 2 * n * m * r)


def choose_forward(b: int, n: int, m: int, r: int, dtype: torch.dtype) -> Forward:
    """f2 where it is cheaper (b > nm / (n + m)) and the dtype can hold W + BA, else f1."""
    if dtype in LOW_PRECISION:
        return "f1"
    return min(("f1", "f2"), key=lambda order: forward_flops(order, b, n, m, r))


def choose_backward(b: int, n: int, m: int, r: int, dtype: torch.dtype, input_grad: bool = True) -> Backward:
    """The cheapest order with Z saved (b·r values: next to the saved X, nothing) that the dtype can hold."""
    orders: tuple[Backward, ...] = ("b1s",) if dtype in LOW_PRECISION else ("b1s", "b5s", "b4")
    return min(orders, key=lambda order: backward_flops(order, b, n, m, r, input_grad))


def check_order(order: str, dtype: torch.dtype) -> None:
    """Raise ConfigError for an order that would lose the update in this dtype."""
    if order in MERGED and dtype in LOW_PRECISION:
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"order {order!r} rounds W + BA to {name} and loses most of a small update. "
            'Use "f1" and "b1s" (or "auto"), or compute in float32.'
        )
