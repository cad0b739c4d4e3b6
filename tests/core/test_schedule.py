"""Learning-rate schedules: the values of the released ReLoRA scheduler, and where their pieces meet."""

from __future__ import annotations

import itertools
import math

import pytest

from rankshift.core.schedule import cosine, jagged_cosine


@pytest.mark.parametrize(
    ("update", "factor"),
    [
        (0, 0.0),
        (250, 0.5),
        (500, 1.0),
        (4999, 0.886878),
        (5000, 0.0),
        (5050, 0.440989),
        (5099, 0.873159),
        (5100, 0.881979),
        (15050, 0.116543),
        (19999, 0.1),
    ],
)
def test_the_jagged_cosine_is_the_released_one(update: int, factor: float) -> None:
    """T = 20,000, first warm-up 500, cycle 5,000, re-warm-up 100, floor 0.1, from the authors' function."""
    assert jagged_cosine(update, 20000, 500, 5000, 100, 0.1) == pytest.approx(factor, abs=5e-7)


def test_without_its_teeth_the_jagged_cosine_is_a_cosine() -> None:
    for update in range(240):
        plain = cosine(update, 200, 20, 0.1)
        assert jagged_cosine(update, 200, 20, 40, 0, 0.1) == plain, "no warm-up"
        assert jagged_cosine(update, 200, 20, 240, 10, 0.1) == plain, "one cycle"
        tooth = jagged_cosine(update, 200, 20, 40, 10, 0.1)
        assert tooth == plain if update < 40 or update % 40 >= 10 else tooth < plain
        if update >= 40 and update % 40 == 0:
            assert tooth == 0


def test_a_cosine_rises_falls_and_stays() -> None:
    values = [cosine(u, 100, 10, 0.2) for u in range(130)]
    assert values[:11] == [u / 10 for u in range(11)]
    assert all(a > b for a, b in itertools.pairwise(values[10:101]))
    assert values[55] == pytest.approx(0.6)
    assert values[100:] == pytest.approx([0.2] * 30)
    assert [cosine(u, 4) for u in range(4)] == pytest.approx(
        [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    )
    assert cosine(0, 1) == 1
