"""A look at data before a method starts: what its survey shares with those of other methods."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankshift.core.site import Spec


def call(model: nn.Module, batch: Any) -> Any:
    """The model on a batch: keyword dictionaries, tuples of arguments, or one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(moved(value, device) for value in batch)
    return batch


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def attended(batch: Any) -> Tensor | None:
    """Which tokens of a batch are not padding, (batch, length); None if the batch does not say."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def rows(spec: Spec, x: Tensor, counted: Tensor | None = None) -> Tensor:
    """A layer's input as rows (b, in), without the tokens that do not count."""
    columns = spec.form.columns(x)
    flat = columns.flatten(0, -2)
    if counted is None:
        return flat
    if columns.shape[:-1] == counted.shape or columns.shape[:-1] == (counted.numel(),):
        return flat[counted.flatten()]
    return flat


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module returns to the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient for a while; then each again as it did."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
