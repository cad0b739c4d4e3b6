"""Adam with decoupled decay (AdamW). Kingma & Ba 2015, arXiv 1412.6980; Loshchilov & Hutter 2019, arXiv 1711.05101.

    m ← β1 m + (1−β1) g      v ← β2 v + (1−β2) g²      d = (m / (1−β1ᵗ)) / (√(v / (1−β2ᵗ)) + ε)
    p ← (1 − lr·wd) p − lr·d

t counts the updates of one tensor. By default m and v have its dtype, as in torch.optim.AdamW. For a tensor in bf16
they should not: β2 v is v again there, so v could only grow. A store keeps them wider, or in 8 bits; the arithmetic is
then in fp32 (float64 for float64), and ``rounding`` says how the result becomes bf16 again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam

from rankshift.core import shard
from rankshift.core.errors import ConfigError
from rankshift.core.random import Key, signed
from rankshift.optim import rounding
from rankshift.optim.moments import Store, Wide, adopt
from rankshift.optim.rounding import Rounding, Rows, offset
from rankshift.optim.transform import Hyper

_TOGETHER = 1 << 24  # numbers of parameters that are held wide at once


@dataclass(frozen=True)
class Adam:
    """The state names and bits of ``torch.optim.AdamW``; whole parameters go through torch's own kernel, on a GPU the
    fused one."""

    store: Store | None = None
    rounding: Rounding = "nearest"

    def init(
        self, p: Tensor, key: Key | None = None, rank: int | None = None, place: tuple[int, int] = (1, 1)
    ) -> dict[str, Tensor]:
        state = {"step": torch.zeros((), dtype=torch.float32)}
        if self.store is None:
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            return state
        state["key"] = torch.tensor(signed((Key(0) if key is None else key / "noise").word), dtype=torch.int64)
        state |= self.store.init("exp_avg", tuple(p.shape), p, shard.is_sharded(p))
        state |= self.store.init("exp_avg_sq", tuple(p.shape), p, shard.is_sharded(p))
        return state | rounding.init(p, self.rounding)

    @property
    def defers(self) -> bool:
        return self.store is None or isinstance(self.store, Wide)

    def retract(self, states: Sequence[dict[str, Tensor]], hyper: Hyper) -> None:
        for state in states:
            state["step"] -= 1

    def _moments(self, state: dict[str, Tensor], rows: Rows) -> tuple[Tensor, Tensor]:
        if self.store is None:
            return state["exp_avg"], state["exp_avg_sq"]
        return self.store.read(state, "exp_avg", rows), self.store.read(state, "exp_avg_sq", rows)

    def _keep(self, state: dict[str, Tensor], m: Tensor, v: Tensor, rows: Rows) -> None:
        if self.store is not None:
            self.store.write(state, "exp_avg", m, rows)
            self.store.write(state, "exp_avg_sq", v, rows)

    def step(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        hyper: Hyper,
    ) -> None:
        if self.store is None:
            moments, steps = [self._moments(state, ...) for state in states], [state["step"] for state in states]
            fused = hyper.void is not None or all(p.is_cuda and not shard.is_sharded(p) for p in parameters)
            _adamw(parameters, gradients, moments, steps, hyper, fused)
            if fused and steps:
                torch._foreach_add_(steps, 1)
            return
        for batch in _batches(parameters):
            ps, ss = [parameters[i] for i, _ in batch], [states[i] for i, _ in batch]
            pieces = [rows for _, rows in batch]
            wide = rounding.opened_together(ps, ss, pieces)
            gs = _as(wide, [shard.held(gradients[i])[rows] for i, rows in batch])
            moments = [self._moments(state, rows) for state, rows in zip(ss, pieces, strict=True)]
            for state, rows in zip(ss, pieces, strict=True):
                state["step"] += offset(rows) == 0  # once a tensor, in its first piece
            taken = [state["step"] - 1 for state in ss]
            _adamw(wide, gs, moments, taken, hyper, fused=hyper.void is not None or all(w.is_cuda for w in wide))
            for (m, v), state, rows in zip(moments, ss, pieces, strict=True):
                self._keep(state, m, v, rows)
            rounding.close_together(ps, wide, ss, self.rounding, pieces)

    def adopt(self, p: Tensor, saved: dict[str, Tensor], fresh: dict[str, Tensor]) -> list[str]:
        if "basis" in saved:
            raise ConfigError("it is that of a projected gradient, and here this tensor takes plain AdamW.")
        return adopt(self.store or Wide(), saved, fresh, tuple(p.shape), p, shard.is_sharded(p))


def _as(like: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors in the dtype of others; one launch for all that are not."""
    found = list(tensors)
    odd = [i for i, (t, other) in enumerate(zip(tensors, like, strict=True)) if t.dtype != other.dtype]
    if odd:
        copies = [torch.empty_like(tensors[i], dtype=like[i].dtype) for i in odd]
        torch._foreach_copy_(copies, [tensors[i] for i in odd])
        for i, copy in zip(odd, copies, strict=True):
            found[i] = copy
    return found


def _adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    moments: Sequence[tuple[Tensor, Tensor]],
    steps: Sequence[Tensor],
    hyper: Hyper,
    fused: bool = False,
) -> None:
    """torch's kernel; ``steps`` are counted up by it. ``fused``: that which reads and writes each number once, and
    leaves ``steps`` to the caller."""
    if not parameters:
        return
    if fused:  # it counts on the device: copies do; and it goes by the order in memory
        steps = _counts([float(step) for step in steps], [p.device for p in parameters])
        gradients = [
            g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)
            for p, g in zip(parameters, gradients, strict=True)
        ]
    adam(
        list(parameters),
        list(gradients),
        [m for m, _ in moments],
        [v for _, v in moments],
        [],
        list(steps),
        fused=fused,
        found_inf=hyper.void,
        decoupled_weight_decay=True,
        amsgrad=False,
        beta1=hyper.betas[0],
        beta2=hyper.betas[1],
        lr=hyper.lr,
        weight_decay=hyper.weight_decay,
        eps=hyper.eps,
        maximize=False,
    )


def _counts(ages: Sequence[float], devices: Sequence[torch.device]) -> list[Tensor]:
    """Numbers () fp32, each on its device."""
    counts: dict[int, Tensor] = {}
    for device in dict.fromkeys(devices):
        here = [i for i, other in enumerate(devices) if other == device]
        first = ages[here[0]]
        alike = all(ages[i] == first for i in here)  # then nothing is copied from the host
        some = (
            torch.full((len(here),), first, device=device)
            if alike
            else torch.tensor([ages[i] for i in here], device=device)
        )
        counts |= dict(zip(here, some.unbind(), strict=True))
    return [counts[i] for i in range(len(ages))]


def _batches(parameters: Sequence[Tensor]) -> Iterator[list[tuple[int, Rows]]]:
    """Parameters to step together, by index, and which rows of each: many small ones, or a piece of a large one."""
    batch: list[tuple[int, Rows]] = []
    size = 0
    for index, p in enumerate(parameters):
        for rows in rounding.pieces(p, _TOGETHER):
            count = shard.held(p)[rows].numel()
            if batch and size + count > _TOGETHER:
                yield batch
                batch, size = [], 0
            batch.append((index, rows))
            size += count
    if batch:
        yield batch
