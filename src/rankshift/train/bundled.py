"""What the package brings along: a small pretrained Llama, a public-domain text, and the recipe that joins them."""

from __future__ import annotations

import lzma
from pathlib import Path

_DATA = Path(__file__).parents[1] / "data"

MODELS = {"babyllama": _DATA / "babyllama"}
TEXTS = {"tinyshakespeare": _DATA / "tinyshakespeare" / "text.txt.xz"}
RECIPE = _DATA / "default.yaml"


def model_path(name: str) -> str:
    """The directory of a bundled model by its name; anything else as it is. A directory of that name here wins."""
    return str(MODELS[name]) if name in MODELS and not Path(name).exists() else name


def text(name: str) -> str:
    """A bundled text."""
    return lzma.open(TEXTS[name], "rt", encoding="utf-8").read()
