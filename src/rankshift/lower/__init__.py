"""Lowering: blocks of a model run as fused forms that hold the same parameters; explicit, reported and reversible."""

import rankshift.storage  # noqa: F401  who knows layers in fewer bits
from rankshift.lower.lowered import Lowered, how, lower, undo

__all__ = ["Lowered", "how", "lower", "undo"]
