"""A compressed model from its directory alone: its architecture by transformers, its values from the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankshift.core.errors import ConfigError, MissingFile
from rankshift.io import compressed


def load_compressed(directory: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The model that ``run.export(directory, format="compressed")`` wrote, without the base that it came from.

    Args:
        directory: where it is.
        model: a model of the same class and size, whose values do not matter and which is turned into the compressed
            one; it may stand on the meta device. None: transformers builds one from the config in the directory.

    Returns:
        The model, in eval mode if it was built here.

    Raises:
        MissingFile, CorruptFile: the directory is not complete.
        ConfigError: there is no config to build the model from.
        WrongBase: ``model`` is of another class or size.
    """
    if model is not None:
        return compressed.read(model, directory)
    manifest = compressed.inspect(directory)
    kind, config = _architecture(Path(directory), manifest["class"])
    with torch.device("meta"):
        built = kind(config)
    if _plain_tensors(built):  # made in __init__ and no part of any state: they have to be made for real
        with torch.random.fork_rng():  # transformers draws values, which do not matter
            built = kind(config)
    if (Path(directory) / "generation_config.json").is_file():
        from transformers import GenerationConfig

        built.generation_config = GenerationConfig.from_pretrained(str(directory))
    return compressed.read(built, directory).eval()


def _architecture(directory: Path, name: str) -> tuple[Any, Any]:
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"{directory} holds a {name} and no config.json to build one from. Build it yourself and pass it: "
            "rs.load_compressed(directory, model)."
        )
    import transformers

    kind: Any = getattr(transformers, name, None)
    if kind is None:
        raise ConfigError(
            f"{name} is no class of transformers {transformers.__version__}. Build the model yourself and pass it: "
            "rs.load_compressed(directory, model)."
        )
    try:
        return kind, kind.config_class.from_pretrained(str(directory))
    except (OSError, ValueError) as error:
        raise MissingFile(f"{directory / 'config.json'} cannot be read: {error}. Export or copy it again.") from error


def _plain_tensors(model: nn.Module) -> bool:
    """Whether a module keeps a tensor on the meta device outside its parameters and buffers."""
    return any(isinstance(v, Tensor) and v.is_meta for module in model.modules() for v in vars(module).values())
