"""From texts to token ids and labels. Plain functions of lists; -100 marks what is not learned.

text                  every token; long documents are cut into blocks, short ones share one (packing)
prompt + completion   the completion and the end token
messages              what the assistant says
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankshift.core.errors import DataError

IGNORE = -100


@dataclass(frozen=True)
class Example:
    """One sequence; ``positions`` restart where another document begins."""

    ids: list[int]
    labels: list[int]
    positions: list[int]


def document(ids: Sequence[int], labels: Sequence[int] | None = None) -> Example:
    """A sequence by itself. Its first token has nothing before it, so it is not learned."""
    wanted = list(ids if labels is None else labels)
    return Example(list(ids), [IGNORE, *wanted[1:]], list(range(len(ids))))


def blocks(documents: Iterable[Sequence[int]], length: int, bos: int | None, eos: int | None) -> Iterator[Example]:
    """Documents laid end to end and cut every ``length`` tokens; the last block may be shorter.

    Each document, and each continuation of one in the next block, begins with ``bos`` if there is one: models that were
    trained with it rely on it at position 0. ``eos`` ends each document. No token is dropped, and all are learned but
    the first of each document, which would have to be guessed from the text before it.
    """
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    lead = [] if bos is None else [bos]
    for text in documents:
        rest, at = ([*text] if eos is None else [*text, eos]), 0
        while at < len(rest):
            room = length - len(ids) - len(lead)
            if room > 0:
                whole = document([*lead, *rest[at : at + room]])
                at += room
                ids += whole.ids
                labels += whole.labels
                positions += whole.positions
            if len(ids) >= length - len(lead) or room <= 0:
                yield Example(ids, labels, positions)
                ids, labels, positions = [], [], []
    if ids:
        yield Example(ids, labels, positions)


def bundle(examples: Iterable[Example], length: int) -> Iterator[Example]:
    """Whole examples put into blocks of at most ``length`` tokens, in order; none is cut."""
    held: list[Example] = []
    for example in examples:
        if held and sum(len(e.ids) for e in held) + len(example.ids) > length:
            yield _joined(held)
            held = []
        held.append(example)
    if held:
        yield _joined(held)


def _joined(examples: list[Example]) -> Example:
    return Example(
        [i for e in examples for i in e.ids],
        [i for e in examples for i in e.labels],
        [i for e in examples for i in e.positions],
    )


def completion(tokenizer: Any, prompt: str, answer: str, bos: int | None, learn_all: bool) -> Example:
    """Prompt, completion and the end token; the two are tokenized apart, as they are when the model is asked."""
    before = ([] if bos is None else [bos]) + tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    after = tokenizer(answer, add_special_tokens=False, verbose=False).input_ids
    if tokenizer.eos_token_id is not None:
        after = [*after, tokenizer.eos_token_id]
    labels = None if learn_all else [IGNORE] * len(before) + after
    return document(before + after, labels)


def chat(tokenizer: Any, messages: list[dict[str, Any]], learn_all: bool) -> Example:
    """A conversation in the tokenizer's template.

    What the assistant says is found by the template's ``{% generation %}`` marks; without them, as what is added to the
    rendering of the turns before it.

    Raises:
        DataError: there is no template, it refuses the messages, or it rewrites earlier turns.
    """
    template = tokenizer.chat_template
    if not template:
        raise DataError(
            "the data has chats, but the tokenizer has no chat template. Use a model that was trained on chats, or "
            "columns for prompt and completion."
        )
    marked = "{% generation" in template or "{%- generation" in template
    try:
        if learn_all or marked:
            whole = tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=marked and not learn_all
            )
            ids = list(whole["input_ids"])
            if learn_all:
                return document(ids)
            said = whole["assistant_masks"]
            return document(ids, [i if on else IGNORE for i, on in zip(ids, said, strict=True)])
        ids = _render(tokenizer, messages, False)
        labels = [IGNORE] * len(ids)
        for turn, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before = _render(tokenizer, messages[:turn], True)
            after = _render(tokenizer, messages[: turn + 1], False)
            if ids[: len(after)] != after or after[: len(before)] != before:
                raise DataError(
                    "this chat template rewrites earlier turns and has no {% generation %} marks, so what the "
                    "assistant says cannot be told apart. Set data.loss=all, or add the marks to the template."
                )
            labels[len(before) : len(after)] = after[len(before) :]
    except DataError:
        raise
    except Exception as error:  # templates raise what their authors chose
        first = str(error).split("\n")[0].rstrip(".")
        raise DataError(
            f"the chat template refuses the messages {str(messages)[:80]}…: {first}. Correct the data."
        ) from error
    return document(ids, labels)


def _render(tokenizer: Any, messages: list[dict[str, Any]], ask: bool) -> list[int]:
    return list(
        tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=ask, return_dict=True)["input_ids"]
    )


def mask(
    ids: np.ndarray[Any, Any],
    special: np.ndarray[Any, Any],
    share: float,
    mask_id: int,
    vocabulary: int,
    draw: np.random.Generator,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """BERT's masking (Devlin et al. 2018): of the chosen tokens 80 % become the mask, 10 % any token, 10 % stay.

    At least one token of a row that has an ordinary one is chosen. Returns (ids, labels), shapes as given: (B, L).
    """
    chance = np.where(special, 2.0, draw.random(ids.shape))
    chosen = (chance < share) | ((chance == chance.min(-1, keepdims=True)) & ~special)
    fate = draw.random(ids.shape)
    masked = np.where(chosen & (fate < 0.8), mask_id, ids)
    masked = np.where(chosen & (fate >= 0.9), draw.integers(0, vocabulary, ids.shape), masked)
    return masked, np.where(chosen, ids, IGNORE)
