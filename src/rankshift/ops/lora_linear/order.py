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

The paper's b2, b3, b6, b7 and b8 never win while r (n + m) < nm and are left out. What needs no gradient drops its
terms. f1 has Z at hand, so saving it costs nothing; f2 would have to form it (2bnr) for a backward that wants it saved.
Forward and backward are therefore chosen together.

f2, b4 and b5 round W + BA to the compute dtype. In bf16 and fp16 a weight lies on the grid of that dtype, and most of a
small update is rounded away (a delta of 7e-4 of the weight comes through with 86 % error): there they are never chosen
and, when asked for, refused.

A weight in fewer bits to which BA is added before it is rounded (``Format.adds``) lies on no grid: 99 % of an update
of 1e-4 comes through, and all orders are open. In 16 bits numbers that are written and read again cost more than the
operations: Z Bᵀ, b·m of them, and S A, b·n, where merged orders write nothing. They are counted as well.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from rankshift.core.errors import ConfigError

Forward = Literal["f1", "f2"]
Backward = Literal["b1", "b1s", "b4", "b5", "b5s"]  # of two that cost the same, the first is chosen
SAVES_Z = frozenset({"b1s", "b5s"})
MERGED = frozenset({"f2", "b4", "b5", "b5s"})
LOW_PRECISION = frozenset({torch.bfloat16, torch.float16})
MOVED = 367
"""Operations of an H200 in the time that it moves a number of 16 bits (790 TFLOP/s, 4.3 TB/s)."""


def forward_flops(forward: Forward, b: int, n: int, m: int, r: int, save_z: bool = False) -> int:
    """Operations of a forward order that leaves Z behind (``save_z``) or not."""
    if forward == "f1":
        return 2 * b * n * m + 2 * b * r * (n + m)
    return 2 * b * n * m + 2 * n * m * r + (2 * b * n * r if save_z else 0)


def backward_flops(
    backward: Backward, b: int, n: int, m: int, r: int, x: bool = True, A: bool = True, B: bool = True
) -> int:
    """Operations of a backward order; ``x``, ``A`` and ``B`` say what needs a gradient."""
    low_x = 2 * b * n * r if backward in ("b1", "b1s") else 2 * n * m * r  # S A, or W + BA
    dX = (2 * b * n * m + low_x) if x else 0
    if backward == "b4":
        dense = 2 * b * n * m if A or B else 0  # dYᵀX
        return dX + dense + 2 * n * m * r * (A + B)
    S = 2 * b * m * r if A or (x and backward in ("b1", "b1s")) else 0
    Z = 2 * b * n * r if B and backward not in SAVES_Z else 0
    return dX + S + Z + (2 * b * n * r if A else 0) + (2 * b * m * r if B else 0)


def choose(
    b: int,
    n: int,
    m: int,
    r: int,
    dtype: torch.dtype,
    x: bool = True,
    A: bool = True,
    B: bool = True,
    forward: Forward | None = None,
    backward: Backward | None = None,
    adds: bool = False,
) -> tuple[Forward, Backward]:
    """The cheapest pair of orders that ``dtype`` can hold; of equals the one that does not save Z.

    ``x``, ``A`` and ``B`` say what needs a gradient: if nothing does, only the forward counts. A frozen A (LoRA-FA) is
    there to free X, so with it no order is chosen that keeps X. ``forward`` and ``backward`` fix one or both. ``adds``
    is the format's: BA is added to a weight that is not rounded yet.

    Raises:
        ConfigError: an order that was fixed would lose the update in this dtype.
    """
    narrow = dtype in LOW_PRECISION
    lossy = narrow and not adds
    if lossy and forward is None and backward is None:
        return "f1", "b1s"
    for order in (forward, backward):
        if lossy and order in MERGED:
            raise ConfigError(
                f"order {order!r} rounds W + BA to {str(dtype).removeprefix('torch.')} and loses most of a small "
                'update. Use "f1" with "b1" or "b1s", leave the order open, or compute in float32.'
            )
    forwards: tuple[Forward, ...] = (forward,) if forward else ("f1",) if lossy else get_args(Forward)
    backwards: tuple[Backward, ...] = (backward,) if backward else ("b1s",) if lossy else get_args(Backward)
    if not A and backward is None:
        backwards = tuple(order for order in backwards if order in SAVES_Z)
    best, chosen = None, (forwards[0], backwards[0])
    for f in forwards:
        for w in backwards:
            cost = forward_flops(f, b, n, m, r, B and w in SAVES_Z)
            if x or A or B:
                cost += backward_flops(w, b, n, m, r, x, A, B)
            if narrow:
                cost += 2 * MOVED * b * (m * (f == "f1") + n * (x and w in ("b1", "b1s")))
            if best is None or cost < best:
                best, chosen = cost, (f, w)
    return chosen
