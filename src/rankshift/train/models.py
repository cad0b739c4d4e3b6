"""The base model of a run: its config, tokenizer or image processor, the task it can do, and its weights."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from rankshift.core.errors import ConfigError, MissingFile, beside, nearest
from rankshift.core.method import Method
from rankshift.train import bundled
from rankshift.train.config import Task
from rankshift.train.labels import Classes

_AUTO: dict[str, tuple[str, str]] = {  # task → (Auto class, ending of architectures that do it)
    "causal-lm": ("AutoModelForCausalLM", "ForCausalLM"),
    "masked-lm": ("AutoModelForMaskedLM", "ForMaskedLM"),
    "sequence-classification": ("AutoModelForSequenceClassification", "ForSequenceClassification"),
    "regression": ("AutoModelForSequenceClassification", "ForSequenceClassification"),
    "image-classification": ("AutoModelForImageClassification", "ForImageClassification"),
}


def settings(name: str) -> Any:
    """The model's config, before any weight is read.

    Raises:
        MissingFile: no such directory, no config in it, or no such model on the hub.
    """
    import transformers

    path = Path(bundled.model_path(name)).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        hint = " It is a PEFT adapter; name the model it stands on." if (path / "adapter_config.json").exists() else ""
        raise MissingFile(f"model = {name} is a directory without config.json.{hint or ' Name a transformers model.'}")
    if not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists()):
        hint = beside(path, directories=True) or "Name a transformers model."
        raise MissingFile(f"model = {name} is no directory. {hint}")
    try:
        with quiet():
            return transformers.AutoConfig.from_pretrained(str(path) if path.is_dir() else name)
    except Exception as error:  # the hub's client, JSON and transformers raise what they like
        first = str(error).split("\n")[0].rstrip(".")
        if path.is_dir():
            raise MissingFile(f"{path / 'config.json'} cannot be read: {first}. Correct it.") from error
        close = nearest(name, bundled.MODELS)
        raise MissingFile(
            f"model = {name!r} is no directory here ({Path(name).absolute()}), and as a model of the Hugging Face hub "
            f"it could not be loaded: {first}. {close if 'mean' in close else 'Check path, id and connection.'}"
        ) from error


def suited(config: Any) -> Task | None:
    """The language-model task of an architecture, or image-classification if images are all it reads."""
    from transformers.models.auto import modeling_auto as auto

    names = config.architectures or ()
    for task in ("causal-lm", "masked-lm"):
        if any(
            name.endswith((_AUTO[task][1], "LMHeadModel") if task == "causal-lm" else _AUTO[task][1]) for name in names
        ):
            return task
    if config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        return "masked-lm"
    if config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "causal-lm"
    return "image-classification" if config.model_type in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES else None


def tokenizer(name: str) -> Any:
    """The model's tokenizer, with a token to pad with.

    Raises:
        MissingFile: the model has none.
    """
    import transformers

    try:
        with quiet():
            found = transformers.AutoTokenizer.from_pretrained(bundled.model_path(name))
    except Exception as error:
        first = str(error).split("\n")[0].rstrip(".")
        raise MissingFile(f"model = {name} has no tokenizer that can be read: {first}. Put its files there.") from error
    if found.pad_token_id is None and found.eos_token_id is not None:
        found.pad_token = found.eos_token  # padding is masked out, so which token it is does not matter
    if len(found) == 0:
        raise MissingFile(f"model = {name} has no tokenizer files. Put tokenizer.json there.")
    return found


def processor(name: str) -> Any:
    """The model's image processor.

    Raises:
        ConfigError: Pillow is not installed.
        MissingFile: the model has none.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ConfigError("Images need Pillow, which is not installed. Install it: pip install Pillow") from error
    import transformers

    try:
        with quiet():
            return transformers.AutoImageProcessor.from_pretrained(bundled.model_path(name))  # type: ignore[no-untyped-call]
    except Exception as error:
        first = str(error).split("\n")[0].rstrip(".")
        raise MissingFile(
            f"model = {name} has no image processor that can be read: {first}. Put its files there."
        ) from error


def head_of(config: Any, task: str) -> tuple[str, ...] | None:
    """Class names of the trained head that a checkpoint brings for this task; None if it brings none."""
    ending = _AUTO[task][1]
    if not any(name.endswith(ending) for name in config.architectures or ()):
        return None
    names = tuple(config.id2label[k] for k in sorted(config.id2label))
    return tuple(str(k) for k in range(len(names))) if all(n.startswith("LABEL_") for n in names) else names


def max_length(config: Any, tokenizer: Any, task: str, wish: int | None) -> int:
    """Tokens of the longest example: as wished, or what model and task suggest.

    Raises:
        ConfigError: the model has no positions for so many.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 1 << 20
    if "roberta" in config.model_type or config.model_type == "camembert":
        most -= 2  # its positions begin at 2
    most = min(most, getattr(tokenizer, "model_max_length", None) or most)
    if wish is not None and wish > most:
        raise ConfigError(f"data.max_length = {wish} exceeds the {most} positions of the model. Lower it to {most}.")
    return wish or min(most, 1024 if task.endswith("lm") else 512)


def architecture(config: Any, task: str) -> type[nn.Module]:
    """The class that :func:`load` will make.

    Raises:
        ConfigError: this architecture cannot do the task, or would see what it is to predict.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    kind, images = config.model_type, task == "image-classification"
    of_images = kind in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    of_text = any(kind in names for names in (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ))  # fmt: skip
    if of_images and not of_text and not images:
        raise ConfigError(
            f"task = {task} reads text, but {kind} is a model of images. "
            "Give data with a column of images (data.columns.image=…) and labels, or another model=."
        )
    if of_text and not of_images and images:
        raise ConfigError(
            f"task = {task} reads images, but {kind} is a model of text. "
            "Give data with a column of text (data.columns.text=…), or another model=."
        )
    if task == "causal-lm" and _sees_both_ways(config):
        raise ConfigError(
            f"task = causal-lm, but {kind} is an encoder: each token sees the tokens after it, so there is nothing to "
            "predict. Set task=masked-lm, choose another model=, or set is_decoder in its config.json."
        )
    mapping = getattr(transformers, _AUTO[task][0])._model_mapping
    try:
        found = mapping[type(config)]
    except KeyError:
        raise ConfigError(
            f"task = {task}: transformers has no {kind} for it. Choose another task= or model=."
        ) from None
    return found[0] if isinstance(found, (tuple, list)) else found  # type: ignore[no-any-return]


def _sees_both_ways(config: Any) -> bool:
    """Whether attention is not masked: what can be a masked LM, and is not told to be a decoder."""
    from transformers.models.auto import modeling_auto as auto

    causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False) or config.is_encoder_decoder
    return config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not causal


@dataclass(frozen=True)
class Loaded:
    """A base model and the modules of it that came without weights."""

    model: nn.Module
    fresh: tuple[str, ...]


def load(
    name: str,
    config: Any,
    task: Task,
    classes: Classes | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    pad: int | None = None,
) -> Loaded:
    """The base with the head for a task. A new head is drawn by ``seed``; global random state is left as it was.

    Raises:
        MissingFile, ConfigError: weights are missing, damaged or of another architecture.
    """
    import transformers

    auto = getattr(transformers, _AUTO[task][0])
    extra: dict[str, Any] = {}
    if task == "regression":
        extra = {"num_labels": 1, "problem_type": "regression"}
    elif classes is not None:
        names = dict(enumerate(classes.names))
        extra = {"id2label": names, "label2id": {v: k for k, v in names.items()}}
        extra |= {"num_labels": len(names), "problem_type": "single_label_classification"}
    config = type(config).from_dict({**config.to_dict(), **extra})
    if (
        pad is not None
        and config.get_text_config().pad_token_id is None
        and task in ("sequence-classification", "regression")
    ):
        config.get_text_config().pad_token_id = pad  # a decoder finds the last token of a row by it
    try:
        with quiet(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)  # transformers draws new heads from the global generator
            model, report = auto.from_pretrained(
                bundled.model_path(name), config=config, dtype=dtype, output_loading_info=True,
                ignore_mismatched_sizes=task.endswith(("classification", "regression")),
            )  # fmt: skip
    except ValueError as error:
        first = str(error).split("\n")[0].rstrip(".")
        raise ConfigError(
            f"{name} ({config.model_type}) cannot do {task}: {first[:200]}. Choose another task or model."
        ) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        first = str(error).split("\n")[0].rstrip(".")
        raise MissingFile(f"the weights of {name} cannot be read: {first}. Copy or download them again.") from error
    odd = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    fresh = _modules_of(model, {*report["missing_keys"], *odd})
    body = [
        module
        for module in fresh
        if task.endswith("lm") and module in ("model", "transformer", model.base_model_prefix)
    ]
    if body:
        raise MissingFile(f"the files of {name} hold no weights of {type(model).__name__}. Name another model or task.")
    return Loaded(model, fresh)


def _modules_of(model: nn.Module, missing: set[str]) -> tuple[str, ...]:
    """The outermost modules all of whose parameters are missing: a new head, a pooler."""
    chosen: list[str] = []
    for name, module in model.named_modules():
        names = {f"{name}.{leaf}" for leaf, _ in module.named_parameters()}
        if name and names and names <= missing and not any(name.startswith(f"{c}.") for c in chosen):
            chosen.append(name)
    return tuple(chosen)


def train_whole(method: Method, fresh: tuple[str, ...]) -> Method:
    """The method with these modules trained whole, since what they hold is random."""
    import dataclasses

    if not fresh or not method.reversible:  # what trains in place trains the head too
        return method
    have = method.modules_to_save
    more = tuple(name for name in fresh if name not in have)
    return dataclasses.replace(method, modules_to_save=(*have, *more))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without bars and advice: a new head is told by the recipe, a failure is in the error."""
    import transformers

    theirs: Any = transformers.utils.logging
    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub")
    before = hub.level
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    hub.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        hub.setLevel(before)
        if bars:
            theirs.enable_progress_bar()
