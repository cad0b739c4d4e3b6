"""Transform: how one tensor's gradient becomes a direction; Optimizer: one torch optimizer over many of them.

As in optax, a transform is a pair of pure functions, ``init`` and ``update``, and transforms nest: a projection hands
its small gradient to the one inside it, with ``p=None`` because there is no parameter in the subspace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rankshift.core.errors import ConfigError
from rankshift.core.random import Key


@dataclass(frozen=True)
class Hyper:
    """The numbers of a parameter group at this step."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float  # decoupled: p ← (1 − lr·weight_decay) p before the step


def hyper_of(group: dict[str, Any]) -> Hyper:
    """The numbers of a parameter group as they are now."""
    return Hyper(float(group["lr"]), (group["betas"][0], group["betas"][1]), group["eps"], group["weight_decay"])


@runtime_checkable
class Transform(Protocol):
    """How the gradient of one tensor becomes a direction of descent."""

    def init(
        self, p: Tensor, key: Key | None = None, rank: int | None = None, place: tuple[int, int] = (1, 1)
    ) -> dict[str, Tensor]:
        """State for a tensor like ``p``: every key. Nothing adds one later; of a shape only the rank may change.

        Args:
            key: of what the transform draws for this tensor.
            rank: of its subspace, where it is known from a saved run; else the largest.
            place: which it is, from 1, of how many tensors that share the transform.
        """
        ...

    def update(self, g: Tensor, state: dict[str, Tensor], p: Tensor | None, hyper: Hyper) -> Tensor:
        """The direction d of ``p ← p − lr·d`` (decay not included), with ``state`` advanced in place."""
        ...

    def step(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        hyper: Hyper,
    ) -> None:
        """Decay and update whole parameters in place; :func:`plain_step` unless there is a faster form."""
        ...


def plain_step(
    transform: Transform,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[dict[str, Tensor]],
    hyper: Hyper,
) -> None:
    """p ← (1 − lr·wd) p − lr·update(g), tensor by tensor."""
    for p, g, state in zip(parameters, gradients, states, strict=True):
        direction = transform.update(g, state, p, hyper)
        p.mul_(1 - hyper.lr * hyper.weight_decay).sub_(direction, alpha=hyper.lr)


class Optimizer(torch.optim.Optimizer):
    """Runs one transform per parameter group; otherwise an ordinary ``torch.optim.Optimizer``.

    Groups are dictionaries with "params", optional "lr", "weight_decay", "betas", "eps" and "name", in the order of
    ``transforms``. State is made on the first step, tensors only, so ``state_dict`` loads with ``weights_only=True``;
    it has the dtype that the transform gave it, also after loading. (Adam's moments have that of their parameter, as in
    ``torch.optim.AdamW``; the tensors that a run trains are fp32 masters, except those that have the dtype of a bf16
    base: what trains in place, and modules_to_save.)
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        transforms: Sequence[Transform],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
        ranks: Mapping[str, int] | None = None,
    ):
        if lr < 0:
            raise ConfigError(f"lr = {lr} is negative.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"betas = {betas}: each must lie in [0, 1).")
        if eps < 0 or weight_decay < 0:
            raise ConfigError(f"eps = {eps} and weight_decay = {weight_decay} must not be negative.")
        super().__init__(list(groups), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.transforms = tuple(transforms)
        self.seed, self.ranks = seed, dict(ranks or {})
        if len(self.transforms) != len(self.param_groups):
            raise ConfigError(f"{len(self.transforms)} transforms for {len(self.param_groups)} parameter groups.")

    def initial(self, p: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        for group, transform in zip(self.param_groups, self.transforms, strict=True):
            for index, other in enumerate(group["params"]):
                if p is other:
                    name = group["param_names"][index] if "param_names" in group else str(index)
                    place = (index + 1, len(group["params"]))
                    return transform.init(p, Key(self.seed) / name, self.ranks.get(name), place)
        raise ConfigError(f"A tensor of shape {tuple(p.shape)} is not one that this optimizer steps.")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, transform in zip(self.param_groups, self.transforms, strict=True):
            self.advance([p for p in group["params"] if p.grad is not None], group, transform)
        return loss

    def advance(self, parameters: Sequence[Tensor], group: dict[str, Any], transform: Transform) -> None:
        """Update these parameters of one group, which have gradients."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        for p, g in zip(parameters, gradients, strict=True):
            if g.is_sparse or g.is_complex():
                raise ConfigError(f"A gradient of shape {tuple(p.shape)} is sparse or complex: not supported.")
            if not self.state[p]:
                self.state[p].update(self.initial(p))
        states = [self.state[p] for p in parameters]
        transform.step(parameters, gradients, states, hyper_of(group))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        mine = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, mine, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                # torch casts everything but "step" to the parameter's dtype
                if not torch.is_tensor(value):
                    continue
                if value.dim() == 0 and not value.is_floating_point():
                    self.state[p][key] = value.to("cpu", copy=True)  # a counter, read every step
                elif value.dtype != self.state[p][key].dtype:
                    self.state[p][key] = value.to(p.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "transforms": self.transforms,
            "seed": self.seed,
            "ranks": self.ranks,
        }  # torch's own names what is copied
