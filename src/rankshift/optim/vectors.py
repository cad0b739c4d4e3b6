"""Adam whose step count belongs to single vectors of a matrix, because single vectors may begin anew.

    m ← β1 m + (1−β1) g      v ← β2 v + (1−β2) g²      tᵢ ← tᵢ + 1
    d = (m / (1−β1^tᵢ)) / (√(v / (1−β2^tᵢ)) + ε)       p ← (1 − lr·wd) p − lr·d       i: the row, or the column

With equal counts it is ``torch.optim.AdamW``, up to rounding. Whoever lets a vector begin anew zeroes
its m, v and t together: with t left as it was, its first steps would be several times too long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rankshift.core import shard
from rankshift.core.errors import ConfigError
from rankshift.core.random import Key
from rankshift.ops import vector_adam
from rankshift.optim.moments import Wide, adopt
from rankshift.optim.transform import Hyper

_TOGETHER = 1 << 24  # numbers of parameters that are stepped at once: one more of each is held meanwhile


@dataclass(frozen=True)
class Vectors:
    """AdamW with ``step`` of (rows, 1) or (1, columns); parameters of one shape are stepped together."""

    defers: ClassVar[bool] = True

    axis: int = 0  # vectors are the rows (0), whose counts are sharded with them, or the columns (1)

    def init(
        self, p: Tensor, key: Key | None = None, rank: int | None = None, place: tuple[int, int] = (1, 1)
    ) -> dict[str, Tensor]:
        counts = [1] * p.dim()
        counts[self.axis] = p.shape[self.axis]
        return {
            "step": shard.zeros(counts, p, torch.float32, split=self.axis == 0),
            "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
        }

    def step(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        hyper: Hyper,
    ) -> None:
        tensors = [list(parameters), list(gradients)]
        tensors += ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        kinds: dict[tuple[type, torch.dtype, torch.device], dict[torch.Size, list[int]]] = {}
        for index, p in enumerate(parameters):
            kinds.setdefault((type(p), p.dtype, p.device), {}).setdefault(p.shape, []).append(index)
        for shapes in kinds.values():
            some = [[each[index] for found in shapes.values() for index in found] for each in tensors]
            if shard.is_sharded(some[0][0]):
                some = [[shard.held(t) for t in each] for each in some]
            if vector_adam.fits(some[0], some[1]):
                keep = 1 - hyper.lr * hyper.weight_decay
                vector_adam.step_(some, self.axis, hyper.lr, hyper.betas, hyper.eps, keep, hyper.void)
            else:
                _step(some, [len(found) for found in shapes.values()], self.axis, hyper)

    def retract(self, states: Sequence[dict[str, Tensor]], hyper: Hyper) -> None:
        """Nothing: it counts on the device, which did not."""

    def adopt(self, p: Tensor, saved: dict[str, Tensor], fresh: dict[str, Tensor]) -> list[str]:
        if "basis" in saved:
            raise ConfigError("it is that of a projected gradient, and here this tensor takes plain AdamW.")
        count = saved.get("step")
        if count is not None and count.dim() == 0:  # of an Adam that counts for the whole tensor
            shard.held(fresh["step"]).fill_(float(count))
            saved = {name: value for name, value in saved.items() if name != "step"}
        return adopt(Wide(), saved, fresh, tuple(p.shape), p, shard.is_sharded(p))


def _runs(ps: Sequence[Tensor], counts: Sequence[int]) -> Iterator[slice]:
    """Runs of tensors, so many of each shape, that together stay below a bound."""
    start = 0
    for count in counts:
        most, stop = max(1, _TOGETHER // max(1, ps[start].numel())), start + count
        for begin in range(start, stop, most):
            yield slice(begin, min(begin + most, stop))
        start = stop


@torch.no_grad()
def _step(tensors: Sequence[list[Tensor]], counts: Sequence[int], axis: int, hyper: Hyper) -> None:
    """One update of matrices of one dtype and device.

    Args:
        tensors: them, their gradients, first and second moments, and step counts.
        counts: how many there are of each shape, in a row.
        axis: along which their vectors are counted.
    """
    ps, gs, ms, vs, steps = tensors
    (beta1, beta2), dtype, void = hyper.betas, ps[0].dtype, hyper.void
    taken = 1.0 if void is None else 1 - void.double()  # 0: nothing may change after all
    torch._foreach_add_(steps, taken if isinstance(taken, float) else taken.to(steps[0].dtype))
    # torch's kernel makes the moments and passes over those of a void update; at lr = 0 it leaves p, and needs no count
    torch._fused_adamw_(
        ps,
        [g if g.stride() == p.stride() else torch.empty_like(p).copy_(g) for g, p in zip(gs, ps, strict=True)],
        ms,
        vs,
        [],
        [torch.ones((), device=ps[0].device)] * len(ps),
        lr=0.0,
        beta1=beta1,
        beta2=beta2,
        weight_decay=0.0,
        eps=1.0,
        amsgrad=False,
        maximize=False,
        found_inf=void,
    )
    if hyper.lr == 0:
        return
    if hyper.weight_decay:
        keep = 1 - hyper.lr * hyper.weight_decay * taken
        torch._foreach_mul_(ps, keep if isinstance(keep, float) else keep.to(dtype))
    # lr·d = m / (a √v + b), with an a and a b for each vector: in double, as torch has 1 − β^t, then rounded once
    t = torch.cat(steps, axis).flatten().to(torch.float64).clamp_(min=1)
    b = (1 - beta1**t).div_(hyper.lr)
    a = b / (1 - beta2**t).sqrt_()
    b.mul_(hyper.eps)
    if void is not None:
        b += void / taken  # inf where nothing may change
    runs = list(_runs(ps, counts))
    sizes = [(run.stop - run.start) * steps[run.start].numel() for run in runs]
    for run, *factors in zip(
        runs, a.to(dtype).split_with_sizes(sizes), b.to(dtype).split_with_sizes(sizes), strict=True
    ):
        a, b = (x.view(run.stop - run.start, *steps[run.start].shape) for x in factors)
        spread = torch.stack(vs[run]).sqrt_().mul_(a).add_(b)
        torch._foreach_addcdiv_(ps[run], ms[run], spread.unbind(), value=-1.0)
