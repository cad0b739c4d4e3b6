"""One matrix's step in plain torch. Tests hold the kernel to this."""

from __future__ import annotations

from torch import Tensor


def step_(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    t: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    keep: float,
) -> None:
    """m ← β1 m + (1−β1) g, v ← β2 v + (1−β2) g², t ← t + 1, then p ← keep·p − lr·d with
    d = (m / (1−β1^t)) / (√(v / (1−β2^t)) + ε).

    Args:
        p: (rows, columns), as g, m and v.
        t: (rows, 1) or (1, columns).
    """
    beta1, beta2 = betas
    m.mul_(beta1).add_((1 - beta1) * g)
    v.mul_(beta2).add_((1 - beta2) * g * g)
    t += 1
    power = t.double()
    d = (m / (1 - beta1**power)) / ((v / (1 - beta2**power)).sqrt() + eps)
    p.copy_(keep * p - lr * d)
