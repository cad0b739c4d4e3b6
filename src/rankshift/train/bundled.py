"""What the package brings along: a small pretrained Llama, a public-domain text, and the recipe that joins them."""

from __future__ import annotations

import lzma
from pathlib import Path

_DATA = Path(__file__).parents[1] / "data"

MODELS = {"babyllama": _DATA / "babyllama"}
TEXTS = {"tinyshakespeare": _DATA / "tinyshakespeare" / "text.txt.xz"}
RECIPE = _DATA / "default.yaml"
RATES = {"full": 6e-4, "galore": 3e-3, "adarankgrad": 3e-3, "relora": 3e-3, "vera": 6e-2, "paca": 1e-3}
"""Learning rates for the recipe with another method than its own; 6e-3 where none is here. Found on this small model,
which wants more than the large ones that papers give rates for."""


def model_path(name: str) -> str:
    """The directory of a bundled model by its name; anything else as it is. A directory of that name here wins."""
    return str(MODELS[name]) if name in MODELS and not Path(name).exists() else name


def text(name: str) -> str:
    """A bundled text."""
    return lzma.open(TEXTS[name], "rt", encoding="utf-8").read()
