"""Examples: the rows of a config as tensors, for training and validation, and how a batch of them is put together."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rankshift.core.errors import ConfigError, DataError
from rankshift.core.random import Key
from rankshift.train import sources, tokens
from rankshift.train.columns import Columns, no_gaps, select
from rankshift.train.config import DataConfig
from rankshift.train.labels import Classes, numbered

if TYPE_CHECKING:
    from datasets import Dataset

_FEW = 20  # fewer texts than this are split by cutting each
_TEXTS = ("text", "text2", "prompt", "completion", "messages")


@dataclass(frozen=True)
class Rows:
    """Rows as they were found, before they are tokens."""

    train: Dataset
    validation: Dataset | None
    split: str  # how validation came about, in words


@dataclass(frozen=True)
class Examples:
    """What a model trains on and is measured with."""

    train: Dataset
    validation: Dataset | None
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
    bytes_per_token: float | None = None
    notes: tuple[str, ...] = ()
    unit: str = "examples"


def split(rows: Dataset, config: DataConfig, seed: int) -> Rows:
    """Rows to train on and rows held out.

    Raises:
        DataError: nothing is left for one of the two.
    """
    import datasets

    if config.validation_split is not None:
        held = sources.load(config.train, "data.train", config.validation_split, config.subset)
        return Rows(rows, held, f"split {config.validation_split!r}")
    if not isinstance(config.validation, float):
        held = sources.load(config.validation, "data.validation", config.split, config.subset)
        return Rows(rows, held, sources.describe(config.validation))
    share = config.validation
    if share == 0:
        return Rows(rows, None, "none")
    percent = f"{100 * share:g} %"
    if len(rows) < _FEW and rows.column_names == ["text"]:
        heads, tails = zip(*(_cut(text, share) for text in rows["text"]), strict=True)
        if not all(tails):
            raise DataError(
                f"data.validation = {share:g} of so short a text is nothing. Give a file or a larger share."
            )
        begin, end = (datasets.Dataset.from_dict({"text": list(part)}) for part in (heads, tails))
        return Rows(begin, end, f"the last {percent} of the text" + ("s" if len(rows) > 1 else ""))
    count = round(share * len(rows)) or 1
    if count >= len(rows):
        raise DataError(f"data.validation = {share:g} of {len(rows)} rows leaves none to train on. Lower it, or set 0.")
    order = np.random.Generator(np.random.Philox(key=(Key(seed) / "validation").word)).permutation(len(rows))
    drawn, kept = (sorted(part.tolist()) for part in (order[:count], order[count:]))
    return Rows(rows.select(kept), rows.select(drawn), f"{percent} of the rows, drawn by seed")


def _cut(text: str, share: float) -> tuple[str, str]:
    """The text in two, at the end of a line or a word."""
    at = len(text) - round(len(text) * share)
    for mark in ("\n", " "):
        found = text.find(mark, at, at + 1000)
        if found >= 0:
            return text[: found + 1], text[found + 1 :]
    return text[:at], text[at:]


# ---- language models -------------------------------------------------------------------------------------------------


def language(rows: Rows, columns: Columns, config: DataConfig, tokenizer: Any, model: type, length: int) -> Examples:
    """Examples of a causal language model."""
    plain = "text" in columns
    if not plain and "messages" not in columns and config.chat and not tokenizer.chat_template:
        raise ConfigError(
            "data.chat = true, but the tokenizer has no chat template. Leave it out, or use another model."
        )
    packing = plain if config.packing is None else config.packing
    bos = tokens_at_start(tokenizer)
    train, found, bytes_train = _encode(rows.train, columns, config, tokenizer, length, packing, bos, "data.train")
    notes = [f"{found} longer than {length} tokens were cut"] if found else []
    validation, share = None, None
    if rows.validation is not None:
        validation, _, counted = _encode(
            rows.validation, columns, config, tokenizer, length, packing, bos, "data.validation"
        )
        share = counted or bytes_train
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters  # type: ignore[attr-defined]
    if packing and not takes_positions:
        notes.append(f"{model.__name__} takes no positions: texts packed into one block see each other")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    collate = LanguageBatch(pad, packing and takes_positions)
    unit = f"blocks of {length} tokens" if packing else "examples"
    return Examples(train, validation, collate, share, tuple(notes), unit)


def tokens_at_start(tokenizer: Any) -> int | None:
    """The token that the tokenizer itself puts before a text, if it does."""
    first = tokenizer("a", verbose=False).input_ids[:1]
    bos = tokenizer.bos_token_id
    return bos if bos is not None and first == [bos] else None


def _encode(
    rows: Dataset,
    columns: Columns,
    config: DataConfig,
    tokenizer: Any,
    length: int,
    packing: bool,
    bos: int | None,
    where: str,
) -> tuple[Dataset, int, float | None]:
    """(examples, how many were cut, bytes per token of plain text)."""
    rows = select(rows, columns, where)
    every = config.loss == "all"
    cut, size, count = 0, 0, 0
    if "text" not in columns:
        no_gaps(rows, ("completion", "messages"), where)

    def documents(batch: dict[str, list[Any]]) -> Iterator[list[int]]:
        nonlocal size, count
        texts = [text for text in batch["text"] if text]
        size += sum(len(text.encode()) for text in texts)
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else ():
            count += len(ids)
            yield ids

    def alone(batch: dict[str, list[Any]]) -> Iterator[tokens.Example]:
        if "text" in batch:
            eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            for ids in documents(batch):
                yield tokens.document([*([] if bos is None else [bos]), *ids, *eos])
        elif "messages" in batch:
            for messages in batch["messages"]:
                yield tokens.chat(tokenizer, _messages(messages), every)
        else:
            for prompt, answer in zip(batch["prompt"], batch["completion"], strict=True):
                if config.chat:
                    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                    yield tokens.chat(tokenizer, turns, every)
                else:
                    yield tokens.completion(tokenizer, prompt or "", answer, bos, every)

    def shorten(examples: Iterable[tokens.Example]) -> Iterator[tokens.Example]:
        nonlocal cut
        for e in examples:
            cut += len(e.ids) > length
            e = tokens.Example(e.ids[:length], e.labels[:length], e.positions[:length])
            if any(label != tokens.IGNORE for label in e.labels):
                yield e

    def work(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if packing and "text" in batch:
            made: Iterable[tokens.Example] = tokens.blocks(documents(batch), length, bos, tokenizer.eos_token_id)
            made = (e for e in made if any(label != tokens.IGNORE for label in e.labels))
        else:
            made = tokens.bundle(shorten(alone(batch)), length) if packing else shorten(alone(batch))
        made = list(made)
        return {
            "input_ids": [np.array(e.ids, np.int32) for e in made],
            "labels": [np.array(e.labels, np.int32) for e in made],
            **({"position_ids": [np.array(e.positions, np.int32) for e in made]} if packing else {}),
        }

    done = _map(rows, work)
    if len(done) == 0:
        raise DataError(
            f"{where} has no token to learn from: texts are empty, or prompts fill all {length} tokens. "
            "Check data.columns, or raise data.max_length."
        )
    return done, cut, size / count if count else None


def _messages(value: Any) -> list[dict[str, Any]]:
    """Turns with role and content; ShareGPT's from and value are read too."""
    names = {"human": "user", "gpt": "assistant"}
    turns = []
    for turn in value:
        turn = {key: v for key, v in turn.items() if v is not None}
        if "from" in turn and "value" in turn:
            turn = {"role": names.get(turn["from"], turn["from"]), "content": turn["value"]}
        if "role" not in turn:
            raise DataError(f"a message is {str(turn)[:60]}, without a role. Write {{role: user, content: …}}.")
        turns.append(turn)
    return turns


@dataclass(frozen=True)
class LanguageBatch:
    """Sequences padded on the right to one length. Padding is not learned, and nothing attends to it."""

    pad: int
    packed: bool

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = {"input_ids": _padded(rows, "input_ids", self.pad), "labels": _padded(rows, "labels", tokens.IGNORE)}
        if self.packed:
            # transformers tells packed texts apart where positions restart, if there is no mask
            batch["position_ids"] = _padded(rows, "position_ids", 0)
        else:
            batch["attention_mask"] = _lengths(rows)
        return batch


def masked(rows: Rows, columns: Columns, config: DataConfig, tokenizer: Any, length: int, seed: int) -> Examples:
    """Examples of a masked language model: each text by itself, cut into windows. Validation is masked once."""
    if config.packing:
        raise ConfigError("data.packing: a masked LM attends both ways, so texts would see each other. Leave it out.")
    if tokenizer.mask_token_id is None:
        raise ConfigError(
            "task masked-lm needs a tokenizer with a mask token. Use a model such as BERT, or another task."
        )

    def windows(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [text for text in batch["text"] if text]
        if not texts:
            return {"input_ids": []}
        found = tokenizer(
            texts, truncation=True, max_length=length, return_overflowing_tokens=True, verbose=False
        ).input_ids
        return {"input_ids": [np.array(ids, np.int32) for ids in found]}

    collate = MaskedBatch(tokenizer, config.mask_probability)
    parts = []
    for part, where in ((rows.train, "data.train"), (rows.validation, "data.validation")):
        if part is not None:
            part = _map(select(part, columns, where), windows)
            part = part.filter(lambda ids: _has_words(ids, tokenizer), input_columns="input_ids", keep_in_memory=True)
            if len(part) == 0:
                raise DataError(f"{where} has no text to learn from. Check data.columns.")
        parts.append(part)
    train, validation = parts
    if validation is not None:
        draw = np.random.Generator(np.random.Philox(key=(Key(seed) / "mask").word))

        def once(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            pairs = [collate.mask(np.array(ids)[None], draw) for ids in batch["input_ids"]]
            return {"input_ids": [a[0] for a, _ in pairs], "labels": [b[0] for _, b in pairs]}

        validation = _map(validation, once)
    return Examples(train, validation, collate)


def _has_words(ids: Sequence[int], tokenizer: Any) -> bool:
    return any(i not in tokenizer.all_special_ids for i in ids)


@dataclass(frozen=True)
class MaskedBatch:
    """Padded sequences, newly masked each time they are seen; rows that have labels are masked already."""

    tokenizer: Any
    share: float

    def mask(self, ids: np.ndarray[Any, Any], draw: np.random.Generator) -> tuple[Any, Any]:
        """(masked ids, labels) of a batch (B, L)."""
        special = np.isin(ids, self.tokenizer.all_special_ids)
        return tokens.mask(ids, special, self.share, self.tokenizer.mask_token_id, len(self.tokenizer), draw)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = _padded(rows, "input_ids", self.tokenizer.pad_token_id)
        if "labels" in rows[0]:
            labels = _padded(rows, "labels", tokens.IGNORE)
        else:
            # from torch's generator, whose state a checkpoint holds
            draw = np.random.Generator(np.random.Philox(key=int(torch.randint(2**62, ()))))
            ids, labels = (torch.from_numpy(part) for part in self.mask(ids.numpy(), draw))
        return {"input_ids": ids, "attention_mask": _lengths(rows), "labels": labels}


# ---- classification --------------------------------------------------------------------------------------------------


def sequences(rows: Rows, columns: Columns, tokenizer: Any, length: int, classes: Classes | None) -> Examples:
    """Texts, or pairs of them, with a class or (``classes`` None) a number each."""

    def work(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        second = [batch["text2"]] if "text2" in batch else []
        found = tokenizer(batch["text"], *second, truncation=True, max_length=length, verbose=False)
        return {**found, "labels": batch["labels"]}

    parts = []
    for part, where in ((rows.train, "data.train"), (rows.validation, "data.validation")):
        if part is not None:
            part = select(part, columns, where)
            no_gaps(part, ("text", "text2"), where)
            part = _map(_with_labels(part, classes, where), work)
        parts.append(part)
    return Examples(parts[0], parts[1], SequenceBatch(tokenizer))


def _with_labels(rows: Dataset, classes: Classes | None, where: str) -> Dataset:
    if classes is not None:
        labels: list[Any] = numbered(rows, classes, where)
    else:
        labels = []
        for i, value in enumerate(rows["label"]):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise DataError(f"row {i + 1} of {where} has the label {value!r}, which is no number. Correct the row.")
            labels.append(float(value))
    return rows.remove_columns("label").add_column("labels", labels)


@dataclass(frozen=True)
class SequenceBatch:
    """Sequences padded as the tokenizer pads, with their labels."""

    tokenizer: Any

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        inputs = [{key: value for key, value in row.items() if key != "labels"} for row in rows]
        batch = dict(self.tokenizer.pad(inputs, return_tensors="pt"))
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch


def images(rows: Rows, columns: Columns, config: DataConfig, processor: Any, classes: Classes) -> Examples:
    """Images, or paths of images, with a class each; they are opened and scaled when a batch is made."""
    parts: list[Dataset | None] = []
    held = config.train if isinstance(config.validation, float) else config.validation
    for part, where, source in (
        (rows.train, "data.train", config.train),
        (rows.validation, "data.validation", held),
    ):
        if part is None:
            parts.append(None)
            continue
        part = _pictures(select(part, columns, where), columns.of["image"], where, source)
        parts.append(_with_labels(part, classes, where))
    assert parts[0] is not None
    return Examples(parts[0], parts[1], ImageBatch(processor), unit="images")


def _pictures(rows: Dataset, column: str, where: str, source: str | tuple[str, ...]) -> Dataset:
    """The same rows; paths of images as they can be opened, from here or from the directory of the file they are in.

    Raises:
        DataError: the column holds neither images nor paths, or a path leads nowhere.
    """
    from datasets import Image, Value

    kind = rows.features["image"]
    if isinstance(kind, Image):
        return rows
    if not isinstance(kind, Value) or "string" not in kind.dtype:
        raise DataError(
            f"{where}: column {column!r} holds neither images nor paths of image files. Write a path in each row, such "
            'as {"image": "photos/1.png", "label": "cat"}, or give a directory of images.'
        )
    places = [Path(), *{file.parent: None for file in sources.find(source, where) or ()}]
    found = []
    for i, name in enumerate(rows["image"]):
        path = next((at / name for at in places if (at / name).is_file()), None) if name else None
        if path is None:
            looked = " or ".join(str(at.absolute()) for at in places)
            raise DataError(
                f"row {i + 1} of {where} has the image {name!r}, which is no file in {looked}. Correct the path, or "
                "remove the row."
            )
        found.append(str(path))
    return rows.remove_columns("image").add_column("image", found)


def _picture(image: Any) -> Any:
    """An image, or the file of one, in RGB."""
    from PIL import Image

    try:
        return (Image.open(image) if isinstance(image, str) else image).convert("RGB")
    except OSError as error:
        raise DataError(
            f"{image} cannot be opened as an image: {error}. Replace the file, or remove its row."
        ) from error


@dataclass(frozen=True)
class ImageBatch:
    """Images as the model's processor prepares them, with their labels."""

    processor: Any

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        pictures = [_picture(row["image"]) for row in rows]
        batch = dict(self.processor(images=pictures, return_tensors="pt"))
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _map(rows: Dataset, work: Callable[[dict[str, list[Any]]], dict[str, list[Any]]]) -> Dataset:
    """Rows made anew, a thousand at a time. In memory: a cache on disk would outlive the code that made it."""
    return rows.map(work, batched=True, remove_columns=rows.column_names, keep_in_memory=True, new_fingerprint="0" * 16)


def _padded(rows: list[dict[str, Any]], key: str, fill: int) -> Tensor:
    """(B, L) int64."""
    longest = max(len(row[key]) for row in rows)
    batch = np.full((len(rows), longest), fill, np.int64)
    for line, row in zip(batch, rows, strict=True):
        line[: len(row[key])] = row[key]
    return torch.from_numpy(batch)


def _lengths(rows: list[dict[str, Any]]) -> Tensor:
    """(B, L) int64: 1 where a row has a token."""
    return _padded([{"m": np.ones(len(row["input_ids"]), np.int64)} for row in rows], "m", 0)
