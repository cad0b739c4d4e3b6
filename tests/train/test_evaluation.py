"""Metrics against scikit-learn and SciPy, and token sums against a plain loop."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankshift.train import evaluation as ev

sklearn = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.integers(1, 60), st.integers(0, 10**6))
def test_classification_metrics(classes, rows, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, classes, (2, rows))
    average = "binary" if classes == 2 else "macro"
    labels = None if classes == 2 else sorted(set(x) | set(y))
    expected = sklearn.f1_score(y, x, average=average, labels=labels, zero_division=0)
    assert ev.f1(x, y, classes) == pytest.approx(expected)
    assert ev.accuracy(x, y) == pytest.approx(sklearn.accuracy_score(y, x))
    assert ev.matthews(x, y) == pytest.approx(sklearn.matthews_corrcoef(y, x))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.booleans(), st.integers(0, 10**6))
def test_correlations(rows, ties, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, rows))
    if ties:
        x, y = np.round(x), np.round(y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert ev.pearson(x, y) == ev.spearman(x, y) == 0
        return
    assert ev.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert ev.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


@pytest.mark.parametrize("shift", [True, False])
def test_token_sums_are_those_of_a_loop(shift):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=generator)
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    labels[0, 3:] = -100
    labels[2] = -100
    sums = ev.token_sums(logits, labels, shift)
    for row in range(3):
        loss = count = right = 0
        for t in range(7 - shift):
            wanted = labels[row, t + shift].item()
            if wanted != -100:
                scores = logits[row, t].double()
                loss += (scores.logsumexp(0) - scores[wanted]).item()
                right += scores.argmax().item() == wanted
                count += 1
        assert sums[row].tolist() == pytest.approx([loss, count, right], abs=1e-5)


def test_every_token_counts_the_same_however_rows_are_cut():
    sums = np.array([[10.0, 2, 1], [1.0, 8, 8]])
    found = ev.language_metrics(sums, 4.0, causal=True)
    assert found["loss"] == pytest.approx(1.1)  # not the mean of 5 and 0.125
    assert found["perplexity"] == pytest.approx(math.exp(1.1))
    assert found["bits_per_byte"] == pytest.approx(1.1 / math.log(2) / 4)
    assert found["accuracy"] == 0.9


def test_a_line_of_metrics_fits_a_terminal():
    names = ev.measure("sequence-classification", 2).shown
    line = f"  {'step 10000'} validation {ev.show(dict.fromkeys(names, -0.123456), names)}"
    assert all(name in line for name in names)
    assert len(line.replace("-", "")) <= 80


def test_classification_loss_is_cross_entropy():
    logits = np.random.default_rng(0).standard_normal((20, 4)) * 50
    labels = np.arange(20) % 4
    found = ev.measure("sequence-classification", 4).compute(SimpleNamespace(predictions=logits, label_ids=labels))
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)).item()
    assert found["loss"] == pytest.approx(expected)
