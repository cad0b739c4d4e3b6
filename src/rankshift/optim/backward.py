"""Fused backward: every parameter is updated inside the backward pass, as soon as its gradient is complete.

    AccumulateGrad(p)   p.grad = G
    hook                p, state ← one step of p's transform on G;  p.grad = None
    …                   the next layer's gradient takes the memory of this one's
    optimizer.step()    ends the update: the clock goes on, events apply

Of all gradients the largest is alive at a time, instead of their sum (Lv et al. 2023, arXiv 2306.09782; GaLore, arXiv
2403.03507, §4.3). What a tensor becomes depends on its own gradient and state alone, so the numbers are those of the
ordinary way. What needs all gradients at once cannot be had: accumulation, loss scaling, the global norm.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankshift.core import shard
from rankshift.core.errors import ConfigError, TrainingError
from rankshift.core.event import Driver
from rankshift.core.method import Method
from rankshift.optim.transform import Hyper, Optimizer, hyper_of

_INSTEAD = ' (of GaLore and AdaRankGrad gradient="projected" has small gradients too, and bears that)'


class FusedOptimizer(Optimizer):
    """An optimizer whose updates are taken in the backward pass; ``step`` only ends them.

    Adam's steps do not depend on the scale of the gradients, so an update under a loss scale that is refused here is
    the one without, but for ε; its moments are too large by the scale, so begin anew after that error.
    """

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """torch.amp.GradScaler asks for this before it unscales and steps."""
        raise TrainingError(
            "A GradScaler unscales gradients after the backward pass, and fused_backward=True has used them by then. "
            "Train in bf16 or fp32 without a scaler, or leave fused_backward out. This run's moments have the scale "
            "in them: begin anew."
        )


@dataclass(eq=False)
class Backward:
    """Updates the tensors of an optimizer from hooks on them; the driver is asked and told."""

    optimizer: Optimizer
    driver: Driver
    clip: float | None = None
    _hooks: dict[int, Any] = field(default_factory=dict)  # by the id of a tensor
    _places: dict[int, int] = field(default_factory=dict)  # the parameter group of each
    _hypers: list[Hyper] = field(default_factory=list)  # of this update

    def __reduce__(self) -> tuple[Any, ...]:
        return _quiet, ()  # a copied or saved model has none of this run's updates in it

    def hooks(self, model: nn.Module) -> list[Any]:
        """Begin; what is returned ends it, each by its ``remove()``."""
        self._follow()
        return [self, model.register_forward_pre_hook(self), self.optimizer.register_step_pre_hook(self._end)]

    def remove(self) -> None:
        """Leave the tensors as they were."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {}

    def __call__(self, model: nn.Module, args: object) -> None:
        """Before a forward: an engine may have put other tensors into the optimizer since."""
        if not torch.compiler.is_compiling():
            self._follow()

    def _follow(self) -> None:
        """Hook every tensor of the optimizer, and no other."""
        groups = self.optimizer.param_groups
        self._places = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
        if self._places.keys() != self._hooks.keys():
            self.remove()
            take = weakref.WeakMethod(self._take)  # Python's collector does not see what the hooks of a tensor hold

            def hook(p: Tensor) -> None:
                if (method := take()) is not None:
                    method(p)

            for group in groups:
                for p in group["params"]:
                    self._hooks[id(p)] = p.register_post_accumulate_grad_hook(hook)

    @torch.no_grad()
    def _take(self, p: Tensor) -> None:
        """Use the complete gradient of one tensor, and let go of it."""
        optimizer, driver = self.optimizer, self.driver
        taken, g = driver.taken, p.grad
        assert taken is not None
        assert g is not None
        if taken and (driver.called() or id(p) in taken):
            raise TrainingError(
                "A second backward pass before optimizer.step(), but fused_backward=True has taken the update with the "
                "first: gradients cannot be accumulated. Step after every backward pass (also after one that was "
                "broken off), or leave fused_backward out."
            )
        if not taken:
            driver.permit()
            refuse_apart(tensor for group in optimizer.param_groups for tensor in group["params"])
            driver.called()
            self._hypers = [hyper_of(group) for group in optimizer.param_groups]
        taken[id(p)] = largest = _largest(g)
        if math.isfinite(largest):
            if self.clip is not None:
                _clip(g, self.clip)
            index = self._places[id(p)]
            if shard.is_sharded(p):
                shard.used_here(optimizer.state[p].values())
            optimizer.advance([p], optimizer.param_groups[index], optimizer.transforms[index])
        p.grad = None

    def _end(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before ``step``: what would have changed the update comes too late."""
        if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
            raise TrainingError(
                "step(closure) with fused_backward=True: every backward pass in a closure would be an update. Call "
                "loss.backward(), then step()."
            )
        if self.driver.taken and self._hypers != [hyper_of(group) for group in optimizer.param_groups]:
            raise TrainingError(
                "The learning rate, or another number of a parameter group, was changed between the backward pass and "
                "optimizer.step(), but fused_backward=True has taken the update with the old one. Change it before "
                "loss.backward()."
            )


def _nothing(*args: object) -> None:
    """What stands in a copy where a hook was."""


def _quiet() -> Callable[..., None]:
    return _nothing


def check_flag(fused: object) -> None:
    """Raise ConfigError for what is neither true nor false: a text such as "false" would count as true."""
    if not isinstance(fused, bool):
        raise ConfigError(f"fused_backward={fused!r} is not True or False.")


def refuse_apart(tensors: Iterable[Tensor]) -> None:
    """Raise ConfigError where ranks average gradients after the hooks: DDP does."""
    if shard.world() > 1 and not all(map(shard.is_sharded, tensors)):
        raise ConfigError(
            "fused_backward=True with several processes needs a sharded model: DDP averages gradients after they have "
            f"been used here. Use fully_shard (FSDP2), or leave fused_backward out{_INSTEAD}."
        )


def refuse_method(method: Method) -> None:
    """Raise ConfigError for a method that needs all gradients at once."""
    if method.waits:
        raise ConfigError(
            f"fused_backward=True, but {type(method).__name__} as configured {method.waits}, for which all of them "
            "must be there. Leave fused_backward out."
        )


def refuse_settings(args: Any) -> None:
    """Raise ConfigError for transformers' TrainingArguments that ask for what comes too late."""
    if args.gradient_accumulation_steps != 1:
        raise ConfigError(
            f"fused_backward=True with gradient_accumulation_steps={args.gradient_accumulation_steps}: each backward "
            "pass is an update. Set it to 1 and raise per_device_train_batch_size, or leave fused_backward "
            f"out{_INSTEAD}."
        )
    if args.max_grad_norm:
        raise ConfigError(
            f"fused_backward=True with max_grad_norm={args.max_grad_norm:g}: there is no gradient left to clip after "
            "the backward pass. Set max_grad_norm=0, and clip_each= if each tensor's gradient is to be clipped by "
            f"itself; or leave fused_backward out{_INSTEAD}."
        )
    if args.fp16:
        raise ConfigError(
            "fused_backward=True with fp16=True: the loss scale is taken out after the backward pass, when gradients "
            f"are used already. Use bf16=True, or leave fused_backward out{_INSTEAD}."
        )


def _largest(g: Tensor) -> float:
    """The largest magnitude in a gradient on all ranks, ∞ if one is not finite; one transfer to the host."""
    here = shard.held(g)
    zero = torch.zeros((), dtype=torch.float32, device=here.device)
    most = torch.linalg.vector_norm(here, math.inf) if here.numel() else zero
    return float(shard.max_like(torch.where(torch.isfinite(most), most, math.inf), g))


def _clip(g: Tensor, norm: float) -> None:
    """Scale one gradient down to ``norm``, as ``torch.nn.utils.clip_grad_norm_`` does all together."""
    here = shard.held(g)
    size = torch.linalg.vector_norm(here)
    if shard.is_sharded(g):
        size = shard.sum_like(size.square(), g).sqrt()
    here.mul_((norm / (size + 1e-6)).clamp(max=1.0))
