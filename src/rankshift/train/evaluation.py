"""Metrics of each task, in numpy, and what of a batch's logits they need.

language models       mean loss over predicted tokens, perplexity = e^loss, bits per byte = loss / ln 2 / bytes a token
classification        accuracy, F1 (of class 1 of two, else the mean over classes), Matthews correlation
regression            Pearson and Spearman correlation, mean squared error
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


def accuracy(predicted: Array, labels: Array) -> float:
    """Share of equal entries."""
    return float(np.mean(predicted == labels))


def confusion(predicted: Array, labels: Array) -> Array:
    """(classes, classes) counts: row the label, column the prediction."""
    classes = int(max(predicted.max(), labels.max())) + 1
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def f1(predicted: Array, labels: Array, classes: int) -> float:
    """2·TP / (2·TP + FP + FN): of class 1 of two classes, else the mean over the classes that occur."""
    table = confusion(predicted, labels).astype(np.float64)
    hit, guessed, true = np.diag(table), table.sum(0), table.sum(1)
    scores = np.divide(2 * hit, guessed + true, out=np.zeros_like(hit), where=guessed + true > 0)
    if classes == 2:
        return float(scores[1]) if len(scores) > 1 else 0.0
    return float(scores[guessed + true > 0].mean())


def matthews(predicted: Array, labels: Array) -> float:
    """The correlation of two class assignments (for two classes the phi coefficient); 0 if either is constant."""
    table = confusion(predicted, labels).astype(np.float64)
    n, hit, guessed, true = table.sum(), np.trace(table), table.sum(0), table.sum(1)
    spread = math.sqrt((n * n - guessed @ guessed) * (n * n - true @ true))
    return float((hit * n - guessed @ true) / spread) if spread else 0.0


def pearson(predicted: Array, labels: Array) -> float:
    """Linear correlation; 0 if either is constant."""
    x, y = predicted.astype(np.float64), labels.astype(np.float64)
    x, y = x - x.mean(), y - y.mean()
    spread = math.sqrt((x @ x) * (y @ y))
    return float(x @ y / spread) if spread else 0.0


def spearman(predicted: Array, labels: Array) -> float:
    """Linear correlation of ranks; ties share their mean rank."""
    return pearson(_ranks(predicted), _ranks(labels))


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Array = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks


@dataclass(frozen=True)
class Measure:
    """How a task is evaluated: what is kept of each batch, what is made of it, and which number is the headline."""

    keep: Callable[[Any, Tensor], Tensor]
    """(logits, labels) → what the metrics need, one row an example."""
    compute: Callable[[Any], dict[str, float]]
    """transformers' EvalPrediction → metrics."""
    headline: str
    shown: tuple[str, ...]


def measure(task: str, classes: int = 0, bytes_per_token: float | None = None) -> Measure:
    """The measure of a task. ``bytes_per_token`` of the validation text turns loss into bits per byte."""
    if task in ("causal-lm", "masked-lm"):
        causal = task == "causal-lm"

        def keep(logits: Any, labels: Tensor) -> Tensor:
            return token_sums(_first(logits), labels, causal)

        def language(prediction: Any) -> dict[str, float]:
            return language_metrics(prediction.predictions, bytes_per_token, causal)

        shown = ("loss", "perplexity", "bits_per_byte") if causal else ("loss", "perplexity", "accuracy")
        return Measure(keep, language, "loss", shown)
    if task == "regression":

        def numbers(prediction: Any) -> dict[str, float]:
            x, y = prediction.predictions.reshape(-1), prediction.label_ids.reshape(-1)
            return {"pearson": pearson(x, y), "spearman": spearman(x, y), "mse": float(np.mean((x - y) ** 2))}

        return Measure(lambda logits, _: _first(logits), numbers, "pearson", ("pearson", "spearman", "mse"))

    def classify(prediction: Any) -> dict[str, float]:
        logits, y = prediction.predictions, prediction.label_ids.reshape(-1)
        x = logits.argmax(-1)
        loss = float(_log_sum_exp(logits).mean() - np.take_along_axis(logits, y[:, None], 1).mean())
        return {"loss": loss, "accuracy": accuracy(x, y), "f1": f1(x, y, classes), "matthews": matthews(x, y)}

    return Measure(lambda logits, _: _first(logits), classify, "accuracy", ("loss", "accuracy", "f1", "matthews"))


def token_sums(logits: Tensor, labels: Tensor, shift: bool) -> Tensor:
    """(B, 3): each row's summed loss, predicted tokens, and tokens predicted right. Labels of -100 do not count."""
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != -100
    losses = F.cross_entropy(logits.transpose(1, 2).float(), labels, ignore_index=-100, reduction="none")
    right = (logits.argmax(-1) == labels) & counted
    return torch.stack([losses.double().sum(1), counted.sum(1).double(), right.sum(1).double()], 1)


def language_metrics(sums: Array, bytes_per_token: float | None, causal: bool) -> dict[str, float]:
    """Metrics from the rows of :func:`token_sums`; every token counts the same, however the batches were cut."""
    total, count, right = sums.astype(np.float64).sum(0)
    loss = float(total / max(count, 1))
    found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": float(count)}
    found["accuracy"] = float(right / max(count, 1))
    if causal and bytes_per_token:
        found["bits_per_byte"] = loss / math.log(2) / bytes_per_token
    return found


def show(metrics: Mapping[str, float], names: tuple[str, ...]) -> str:
    """Metrics in a line: "loss 1.6071 · perplexity 4.99 · 2.32 bits per byte"."""
    parts = []
    for name in names:
        if name not in metrics:
            continue
        value = metrics[name]
        if name == "bits_per_byte":
            parts.append(f"{value:.3f} bits per byte")
        else:
            digits = {"perplexity": 2, "loss": 4, "mse": 4}.get(name, 3)  # four scores fit a line of 80
            parts.append(f"{name} {value:.{digits}f}")
    return " · ".join(parts)


def _first(logits: Any) -> Tensor:
    """Some models return more than logits."""
    first: Tensor = logits[0] if isinstance(logits, tuple) else logits
    return first


def _log_sum_exp(logits: Array) -> Array:
    top = logits.max(-1, keepdims=True)
    total: Array = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    return total
