"""bitsandbytes' AdamW under a run: its state in 8 bits, or in memory that the GPU pages out to the host (QLoRA).

The method's own optimizer stays what it is by default; here another carries its events, so methods that transform
gradients or reach into Adam's state are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankshift.core.errors import ConfigError
from rankshift.core.method import Method
from rankshift.optim import Adam

if TYPE_CHECKING:
    from rankshift.run import Run

OPTIMIZERS: Mapping[str, tuple[int, bool]] = {  # name → bits of the state, and whether it is paged
    "adamw_8bit": (8, False),
    "adamw_bnb_8bit": (8, False),
    "paged_adamw_8bit": (8, True),
    "paged_adamw_32bit": (32, True),
}


def check(name: str, method: Method, device: torch.device | None = None) -> None:
    """Raise ConfigError where a method cannot train with this optimizer, or it does not run on this device."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError(f'optim={name!r} needs bitsandbytes. Install it: pip install "rankshift[quant]".')
    if OPTIMIZERS[name][1] and device is not None and device.type != "cuda":
        raise ConfigError(
            f"optim={name!r} keeps its state in memory that an NVIDIA GPU pages out to the host, and this training is "
            f"on {device.type}. Use adamw_8bit, or the run's own AdamW."
        )
    if why := method.cannot_ride(_made(name, [{"params": [nn.Parameter(torch.zeros(1))]}], {"lr": 0.0})):
        raise ConfigError(f"optim={name!r}: {type(method).__name__} {why}")


def build(
    run: Run,
    name: str,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    decay: Callable[[str, Tensor], bool] | None,
) -> torch.optim.Optimizer:
    """This optimizer over what trains, with the method's rates and decay; it carries the method's events."""
    grouped = run.grouped(lr, weight_decay, decay)
    if odd := next((group["params"][0][0] for key, group in grouped.items() if key[0] != Adam()), None):
        raise ConfigError(
            f"optim={name!r}: {type(run.method).__name__} decides how the gradient of {odd} becomes a step, which this "
            "optimizer would not ask. Leave optim out."
        )
    groups = [{**group, "params": [tensor for _, tensor in group["params"]]} for group in grouped.values()]
    optimizer = _made(name, groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
    run.carry(optimizer)
    return optimizer


def _made(name: str, groups: list[dict[str, Any]], numbers: dict[str, Any]) -> torch.optim.Optimizer:
    import bitsandbytes

    class AdamW(bitsandbytes.optim.AdamW):  # type: ignore[misc]
        """bitsandbytes' own; a state that is loaded is paged as one that is made, and whoever asked is told."""

        def load_state_dict(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            super().load_state_dict(state_dict, *args, **kwargs)
            for tensor, state in self.state.items() if self.is_paged else ():
                for moment in state.keys() & {"state1", "state2"}:
                    paged = self.get_state_buffer(tensor, state[moment].dtype)
                    state[moment] = paged.copy_(state[moment])
            for told in self._optimizer_load_state_dict_post_hooks.values():
                told(self)

    bits, paged = OPTIMIZERS[name]
    return AdamW(groups, **numbers, optim_bits=bits, is_paged=paged)  # type: ignore[no-any-return]
