"""A module of another class with the state of one that was there: the way in which single modules are lowered.

The stand-in's class is derived from the module's, and both have one dictionary of parameters, submodules, hooks and
flags. So names, states, sites and sharding are those of the module; what differs is ``forward``. Nothing is patched,
and the module itself can be put back, with its state as it then is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn


def stand_in(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """What to put in the place of ``module``; ``forward`` takes the stand-in and the arguments of a call."""
    new = _new(type(module), forward)
    new.__dict__ = module.__dict__
    return new


def original(new: nn.Module) -> nn.Module:
    """The module whose place a stand-in took, with the state as it now is."""
    own: Any = type(new)
    module: nn.Module = object.__new__(_without(own))  # FSDP2's own __new__ makes another class's
    module.__dict__ = new.__dict__
    return module


@functools.cache
def _without(kind: Any) -> Any:
    """A class without the stand-in's, with what has been wrapped around it since: FSDP2 derives a class from it."""
    if not hasattr(kind, "stands_for"):
        return kind
    if "stands_for" in vars(kind):
        return kind.stands_for
    words = {name: value for name, value in vars(kind).items() if name in ("__module__", "__deepcopy__")}
    return type(kind)(kind.__name__, tuple(map(_without, kind.__bases__)), words)


def own_class(new: nn.Module) -> type[nn.Module]:
    """The class of the module whose place a stand-in took; it may itself have been wrapped since, as FSDP2 does."""
    kind: type[nn.Module] = new.stands_for  # type: ignore[assignment]
    return kind


def stands_in(module: nn.Module) -> bool:
    """Whether this is a stand-in."""
    return hasattr(type(module), "stands_for")


@functools.cache
def _class(kind: Any, forward: Callable[..., Any]) -> Any:
    """Derived from ``kind`` under its name, by which wrapping policies know it."""

    def reduced(new: nn.Module, protocol: Any) -> Any:  # copied and pickled by the class of the module
        return _new, (kind, forward), new.__dict__

    words = {"forward": forward, "stands_for": kind, "__reduce_ex__": reduced, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), words)


def _new(kind: type[nn.Module], forward: Callable[..., Any]) -> nn.Module:
    found = _class(kind, forward)  # type: ignore[arg-type]
    new: nn.Module = found.__new__(found)
    return new
