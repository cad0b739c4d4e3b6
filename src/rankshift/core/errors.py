"""Every error a user can meet, in one tree. The text says what, where, why and what to do.

RankshiftError
├── ConfigError          (ValueError)    a field, a value or a combination is wrong
├── TargetError          (ValueError)    the method does not fit the model it was given
│   ├── UnmatchedTarget                  a pattern names no layer
│   ├── RankTooLarge                     rank exceeds min(out, in) of a layer
│   ├── TiedWeights                      the layer's weight is shared with another module
│   └── UnsupportedLayer                 a layer kind, storage or engine the method cannot serve
├── AttachError          (RuntimeError)  attach, add, use, delete in the wrong order
├── CheckpointError      (RuntimeError)  files of a run
│   ├── MissingFile                      the directory or a file in it is not there
│   ├── CorruptFile                      a file is not what its manifest says
│   ├── WrongBase                        the adapter was trained on another base
│   └── NotWritable                      no permission, no space, path in use
├── ExportError          (RuntimeError)  the wanted format cannot hold this exactly
├── DataError            (ValueError)    training data is missing, empty or of another shape
└── TrainingError        (RuntimeError)  found while training
    ├── NoGradient                       a trainable tensor receives no gradient
    ├── StepWithoutForward               the optimizer stepped on gradients of an unseen forward
    ├── NonFinite                        gradients stay NaN or Inf
    └── OutOfMemory                      the device is full; the text says what to lower
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class RankshiftError(Exception):
    """Root of the tree above."""


class ConfigError(RankshiftError, ValueError):
    """A field, a value or a combination of them is wrong."""


class TargetError(RankshiftError, ValueError):
    """The method does not fit the model."""


class UnmatchedTarget(TargetError):
    """A target pattern names no layer of the model."""


class RankTooLarge(TargetError):
    """The rank exceeds the smaller side of a layer."""


class TiedWeights(TargetError):
    """The weight of a layer is shared with another module."""


class UnsupportedLayer(TargetError):
    """A layer kind, storage or engine that the method cannot serve."""


class AttachError(RankshiftError, RuntimeError):
    """Attach, add, use, delete, shift in the wrong order."""


class CheckpointError(RankshiftError, RuntimeError):
    """Something about the files of a run."""


class MissingFile(CheckpointError):
    """The directory, or a file its manifest names, is not there."""


class CorruptFile(CheckpointError):
    """A file is not what the manifest says it is."""


class WrongBase(CheckpointError):
    """The adapter was trained on another base model."""


class NotWritable(CheckpointError):
    """The target cannot be written: permission, space, or a path in use."""


class ExportError(RankshiftError, RuntimeError):
    """The wanted format cannot hold this model exactly."""


class DataError(RankshiftError, ValueError):
    """Training data is missing, empty or of another shape than expected."""


class TrainingError(RankshiftError, RuntimeError):
    """Found while training."""


class NoGradient(TrainingError):
    """A trainable tensor receives no gradient."""


class StepWithoutForward(TrainingError):
    """The optimizer was stepped on gradients of a forward that the run did not see."""


class NonFinite(TrainingError):
    """Gradients stay NaN or Inf."""


class OutOfMemory(TrainingError):
    """The device is full."""


def nearest(word: str, known: Iterable[str], most: int = 12) -> str:
    """A hint ``Did you mean 'rank'?`` for an unknown word, or the list of what is known, ``most`` of it."""
    options = sorted(known)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]!r}?"
    shown = ", ".join(options[:most]) + (", …" if len(options) > most else "")
    return f"Known: {shown}." if options else ""


def beside(path: Path, directories: bool = False) -> str:
    """A hint like that of :func:`nearest` at a file or directory beside a missing one; empty if no name is close."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir() or not directories]
    except OSError:
        return ""
    hint = nearest(path.name, names)
    return hint if hint.startswith("Did") else ""
