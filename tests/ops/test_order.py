"""The order of multiplication: operations as the card counts them, and the choice among them."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rankshift as rs
from rankshift.ops.lora_linear.order import backward_flops, choose, forward_flops

# The full tables of the RunLoRA card, U = Aᵀ (n×r), V = Bᵀ (r×m): every order of the paper, written down again here.
FORWARD = {
    "f1": lambda b, n, m, r: 2 * b * n * m + 2 * b * r * (n + m),
    "f2": lambda b, n, m, r: 2 * b * n * m + 2 * n * m * r,
    "f3": lambda b, n, m, r: 2 * b * n * m + 2 * b * r * (n + m),
    "f4": lambda b, n, m, r: 2 * b * n * m + 2 * n * m * r,
}
BACKWARD = {
    "b1": lambda b, n, m, r: 2 * b * n * m + 6 * b * n * r + 4 * b * m * r,
    "b2": lambda b, n, m, r: 4 * b * n * m + 4 * b * n * r + 2 * b * m * r + 2 * n * m * r,
    "b3": lambda b, n, m, r: 4 * b * n * m + 2 * b * n * r + 2 * b * m * r + 4 * n * m * r,
    "b4": lambda b, n, m, r: 4 * b * n * m + 6 * n * m * r,
    "b5": lambda b, n, m, r: 2 * b * n * m + 4 * b * n * r + 4 * b * m * r + 2 * n * m * r,
    "b6": lambda b, n, m, r: 4 * b * n * m + 4 * b * n * r + 4 * b * m * r + 2 * n * m * r,
    "b7": lambda b, n, m, r: 4 * b * n * m + 2 * b * n * r + 2 * b * m * r + 4 * n * m * r,
    "b8": lambda b, n, m, r: 4 * b * n * m + 2 * b * n * r + 2 * b * m * r + 4 * n * m * r,
}
SAVED = {"b1s": "b1", "b5s": "b5"}  # Z kept by the forward: 2bnr less in backward; f2 and f4 have no Z, so they pay it

SIDES = (4, 7, 16, 48, 64)
GRID = [
    (b, n, m, r)
    for b in (1, 3, 16, 17, 40, 64, 300, 5000)
    for n, m in itertools.product(SIDES, SIDES)
    for r in (1, 2, 8, 20)
    if r * (n + m) < n * m
]


def total(f: str, w: str, b: int, n: int, m: int, r: int) -> int:
    cost = FORWARD[f](b, n, m, r) + BACKWARD[SAVED.get(w, w)](b, n, m, r)
    if w in SAVED:
        cost -= 2 * b * n * r if f in ("f1", "f3") else 0
    return cost


def test_tables_are_the_cards():
    for b, n, m, r in GRID:
        for f in ("f1", "f2"):
            assert forward_flops(f, b, n, m, r) == FORWARD[f](b, n, m, r)
        for w in ("b1", "b4", "b5"):
            assert backward_flops(w, b, n, m, r) == BACKWARD[w](b, n, m, r)
        for w, plain in SAVED.items():
            assert backward_flops(w, b, n, m, r) == BACKWARD[plain](b, n, m, r) - 2 * b * n * r


def test_choice_is_the_cheapest_of_all_orders_of_the_paper():
    assert len(GRID) > 300
    seen = set()
    for b, n, m, r in GRID:
        cheapest = min(total(f, w, b, n, m, r) for f in FORWARD for w in (*BACKWARD, *SAVED))
        f, w = choose(b, n, m, r, torch.float64)
        assert total(f, w, b, n, m, r) == cheapest, (b, n, m, r, f, w)
        seen.add((f, w))
    assert {("f1", "b1s"), ("f1", "b5s"), ("f2", "b5"), ("f2", "b4")} <= seen
    assert not seen & {("f1", "b1"), ("f1", "b5"), ("f2", "b5s"), ("f2", "b1s")}  # Z is saved where it is at hand


def test_orders_left_out_never_win():
    for b, n, m, r in GRID:
        kept = min(total(f, w, b, n, m, r) for f in FORWARD for w in ("b1", "b4", "b5", *SAVED))
        for w in ("b2", "b3", "b6", "b7", "b8"):
            assert min(total(f, w, b, n, m, r) for f in FORWARD) > kept


@pytest.mark.parametrize(("n", "m"), [(64, 64), (48, 16), (16, 48)])
def test_crossovers(n: int, m: int):
    """f2 wins from b > nm/(n+m) on in a forward alone, and b5 over b1 from b > m."""
    for b in range(1, 3 * max(n, m)):
        alone, _ = choose(b, n, m, 2, torch.float32, x=False, A=False, B=False)
        assert alone == ("f2" if b * (n + m) > n * m else "f1")
        _, w = choose(b, n, m, 2, torch.float32, forward="f1")
        assert w == ("b5s" if b > m else "b1s")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 500), st.integers(1, 80), st.integers(1, 80), st.integers(1, 16), st.booleans(), st.booleans())
def test_a_frozen_a_never_keeps_the_input(b: int, n: int, m: int, r: int, x: bool, narrow: bool):
    dtype = torch.bfloat16 if narrow else torch.float32
    assert choose(b, n, m, r, dtype, x=x, A=False)[1] in ("b1s", "b5s")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_never_merge(dtype: torch.dtype):
    for b, n, m, r in GRID:
        assert choose(b, n, m, r, dtype) == ("f1", "b1s")
    for field in ({"forward": "f2"}, {"backward": "b4"}, {"backward": "b5"}, {"backward": "b5s"}):
        with pytest.raises(rs.errors.ConfigError, match=r"loses most of a small update"):
            choose(4, 8, 8, 2, dtype, **field)
    assert choose(4, 8, 8, 2, dtype, backward="b1") == ("f1", "b1")


def test_a_format_that_adds_before_it_rounds_is_merged_in_narrow_dtypes():
    """With many tokens all three products are; with few the product with W + BA is not worth its operations."""
    for n, m in ((4096, 14336), (14336, 4096), (2048, 2048)):
        for r in (16, 64):
            assert choose(8192, n, m, r, torch.bfloat16, adds=True) == ("f2", "b5")
            assert choose(8192, n, m, r, torch.bfloat16, A=False, adds=True) == ("f2", "b5s")
            assert choose(8192, n, m, r, torch.bfloat16, x=False, A=False, B=False, adds=True)[0] == "f2"
            assert choose(8, n, m, r, torch.bfloat16, adds=True) == ("f1", "b1s")
            assert choose(8192, n, m, r, torch.bfloat16) == ("f1", "b1s")
    for b, n, m, r in GRID:
        assert choose(b, n, m, r, torch.float32, adds=True) == choose(b, n, m, r, torch.float32)
        for f in ("f1", "f2"):
            for w in ("b1", "b1s", "b4", "b5", "b5s"):
                assert choose(b, n, m, r, torch.float16, forward=f, backward=w, adds=True) == (f, w)


def test_in_narrow_dtypes_what_is_written_twice_counts():
    """f2 wins from on where its operations are those of 2br(n+m) and of moving 2bm numbers, b5 over b1s likewise."""
    n, m, r = 96, 64, 30
    for b in range(1, 100):
        alone, _ = choose(b, n, m, r, torch.bfloat16, x=False, A=False, B=False, adds=True)
        assert alone == ("f2" if b * (2 * r * (n + m) + 2 * 367 * m) > 2 * n * m * r else "f1")
        _, w = choose(b, n, m, r, torch.bfloat16, forward="f1", adds=True)
        assert w == ("b5s" if b * (2 * n * r + 2 * 367 * n) > 2 * n * m * r else "b1s")
