"""Storages: how frozen weights are held in fewer bits, one format per file, each a ``core.base.Base``.

The dense one, the format models come in, is in core. Formats are loaded when a model has them or asks for them.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal, get_args

from torch import nn

from rankshift.core.base import Base, storages
from rankshift.core.errors import ConfigError
from rankshift.storage.opaque import Opaque
from rankshift.storage.quantised import Held

Kind = Literal["nf4", "fp4", "int8", "fp8"]
KINDS: tuple[str, ...] = get_args(Kind)


def check_known(kind: str) -> None:
    """Raise ConfigError where there is no storage of this name, or what it needs is not installed; loads nothing."""
    if kind not in KINDS:
        raise ConfigError(f"base={kind!r} is none of {', '.join(KINDS)}; None leaves the weights as they are.")
    if kind != "fp8" and find_spec("bitsandbytes") is None:
        raise ConfigError(f'base="{kind}" needs bitsandbytes. Install it: pip install "rankshift[quant]".')


def held_as(kind: str) -> type[Held]:
    """The base of a storage.

    Raises:
        ConfigError: there is none of this name, or what it needs is not installed.
    """
    check_known(kind)
    if kind in ("nf4", "fp4"):
        from rankshift.storage.four_bit import FourBit

        return FourBit
    if kind == "int8":
        from rankshift.storage.int8 import Int8

        return Int8
    from rankshift.storage.fp8 import FP8

    return FP8


def _known(module: nn.Module) -> type[Base] | None:
    """The storage that a layer came in, or is."""
    if isinstance(module, Held):
        return type(module)
    package, _, rest = type(module).__module__.partition(".")
    if package == "bitsandbytes":
        from rankshift.storage.four_bit import FourBit
        from rankshift.storage.int8 import Int8

        return next((storage for storage in (FourBit, Int8) if storage.describe(module) is not None), None)
    if package == "rankshift" and rest == "storage.fp8":
        from rankshift.storage.fp8 import FP8

        return FP8
    return Opaque if Opaque.describe(module) is not None else None


storages.append(_known)
