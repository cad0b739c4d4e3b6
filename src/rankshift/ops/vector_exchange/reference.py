"""One layer's exchanges in plain torch. Tests hold the kernels to this.

W (m, n) is the weight, A (r, n) and B (m, r) the factors; pools of c candidates, (c, n) and (c, m), are gone through in
order. ``before`` exchanges have been; ``count`` are to come, of rows of A and as many of columns of B, r//2 ahead.
"""

from __future__ import annotations

from torch import Tensor


def swap_(
    weight: Tensor, A: Tensor, B: Tensor, pool_A: Tensor, pool_B: Tensor, before: int, count: int, scale: float
) -> None:
    """aᵢ → a', bⱼ → b' with W + scale·BA as it was; what goes out takes the place of what was taken r exchanges ago."""
    r, c = len(A), len(pool_A)
    for t in range(before, before + count):
        i, j, there, back = t % r, (t + r // 2) % r, t % c, (t - r) % c
        a, b, old_a, old_b = pool_A[there].clone(), pool_B[there].clone(), A[i].clone(), B[:, j].clone()
        weight += (scale * B[:, i]).outer(old_a - a) + (scale * (old_b - b)).outer(A[j])
        pool_A[back], pool_B[back], A[i], B[:, j] = old_a, old_b, a, b


def hold_(
    gradients: tuple[Tensor, Tensor], moments: tuple[list[Tensor], list[Tensor]], after: int, frozen: int, count: int
) -> None:
    """Columns of B whose rows of A were among the last ``frozen`` of ``after`` exchanges get no gradient, and those
    among the last ``count`` begin anew; likewise rows of A.

    Args:
        gradients: of A and of B.
        moments: of A and of B: (r, n) and (m, r), and step counts (r, 1) and (1, r).
    """
    r = len(gradients[0])
    for age in range(frozen):
        column = (after - 1 - age) % r
        row = (column + r // 2) % r
        of_A, of_B = moments if age < count else ([], [])
        for tensor in (gradients[0], *of_A):
            tensor[row] = 0
        for tensor in (gradients[1], *of_B):
            tensor[:, column] = 0
