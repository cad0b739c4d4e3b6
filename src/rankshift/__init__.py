"""rankshift: train PyTorch models in small subspaces.

>>> import rankshift as rs
>>> run = rs.attach(model, rs.LoRA(rank=16))
>>> optimizer = run.optimizer(lr=2e-4)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "attach": "run",
    "load": "run",
    "load_compressed": "train.compressed",
    "restore": "run",
    "Run": "run",
    "AdaRankGrad": "methods",
    "FlatLoRA": "methods",
    "Full": "methods",
    "GaLore": "methods",
    "LoRA": "methods",
    "MELoRA": "methods",
    "SoRA": "methods",
    "Method": "methods",
    "PaCA": "methods",
    "PCLoRA": "methods",
    "PreLoRA": "methods",
    "ReLoRA": "methods",
    "SwitchLoRA": "methods",
    "Then": "core.phase",
    "VeRA": "methods",
    "to_dict": "methods",
    "from_dict": "methods",
    "Trainer": "train.trainer",
    "RankshiftError": "core.errors",
    "errors": "core.errors",
}

__all__ = sorted([*_HOME, "__version__"])

if TYPE_CHECKING:
    from rankshift.core import errors as errors
    from rankshift.core.errors import RankshiftError as RankshiftError
    from rankshift.core.phase import Then as Then
    from rankshift.methods import AdaRankGrad as AdaRankGrad
    from rankshift.methods import FlatLoRA as FlatLoRA
    from rankshift.methods import Full as Full
    from rankshift.methods import GaLore as GaLore
    from rankshift.methods import LoRA as LoRA
    from rankshift.methods import MELoRA as MELoRA
    from rankshift.methods import Method as Method
    from rankshift.methods import PaCA as PaCA
    from rankshift.methods import PCLoRA as PCLoRA
    from rankshift.methods import PreLoRA as PreLoRA
    from rankshift.methods import ReLoRA as ReLoRA
    from rankshift.methods import SoRA as SoRA
    from rankshift.methods import SwitchLoRA as SwitchLoRA
    from rankshift.methods import VeRA as VeRA
    from rankshift.methods import from_dict as from_dict
    from rankshift.methods import to_dict as to_dict
    from rankshift.run import Run as Run
    from rankshift.run import attach as attach
    from rankshift.run import load as load
    from rankshift.run import restore as restore
    from rankshift.train.compressed import load_compressed as load_compressed
    from rankshift.train.trainer import Trainer as Trainer


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'rankshift' has no attribute {name!r}")
    module = importlib.import_module(f"rankshift.{home}")
    value = module if name == "errors" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
