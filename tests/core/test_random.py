"""Keyed random numbers: the published generator, the promised distributions, nothing global."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankshift.core import random
from rankshift.core.random import Key, normal, permutation, philox, swift_uniform, uniform

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key → result
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words(values: tuple[torch.Tensor, ...]) -> tuple[int, ...]:
    return tuple(int(v) for v in values)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], result: tuple[int, ...]):
    got = random._rounds(tuple(torch.tensor([c]) for c in counter), key)  # type: ignore[arg-type]
    assert words(got) == result


def triton_randint4x(seed: int, offset: int) -> tuple[int, ...]:
    """triton.language.random written with Python integers: philox(seed, offset, 0, 0, 0), seed split in two words."""
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = offset & mask, offset >> 32, 0, 0
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        before0, before2 = c0, c2
        c0 = ((0xCD9E8D57 * before2) >> 32) ^ c1 ^ k0
        c2 = ((0xD2511F53 * before0) >> 32) ^ c3 ^ k1
        c1 = (0xCD9E8D57 * before2) & mask
        c3 = (0xD2511F53 * before0) & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**62))
def test_words_are_tritons(word: int, offset: int):
    assert words(philox(word, torch.tensor([offset]))) == triton_randint4x(word, offset)


@settings(max_examples=50, deadline=None)
@given(st.integers(-5, 2**70), st.integers(0, 2**40))
def test_draws_are_the_words(seed: int, first: int):
    """uniform is 21 bits of word 0 above word 1; normal is Box–Muller of that and of words 2 and 3."""
    key = Key(seed) / "layer" / "A"
    a, b, c, d = triton_randint4x(key.word, first)
    u = (((a >> 11) << 32 | b) + 0.5) / 2**53
    v = (((c >> 11) << 32 | d) + 0.5) / 2**53
    assert float(uniform(key, (1,), dtype=torch.float64, first=first)) == u
    z = math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v)
    assert float(normal(key, (1,), dtype=torch.float64, first=first)) == pytest.approx(z, rel=1e-12, abs=1e-12)


def test_uniform_is_uniform():
    n = 200_000
    values = uniform(Key(1) / "u", (n,), -2, 3, dtype=torch.float64)
    assert values.min() > -2
    assert values.max() <= 3
    unit = (values + 2) / 5
    assert abs(unit.mean() - 0.5) < 4 * math.sqrt(1 / 12 / n)
    assert abs(unit.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / n)
    distance = (unit.sort().values - torch.arange(1, n + 1) / n).abs().max()
    assert distance < 1.95 / math.sqrt(n)  # Kolmogorov–Smirnov at 0.1 %


def test_normal_is_normal():
    n = 200_000
    values = normal(Key(2) / "n", (n,), 3.0, dtype=torch.float64) / 3
    assert abs(values.mean()) < 4 / math.sqrt(n)
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((values**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((values**4).mean() - 3) < 4 * math.sqrt(96 / n)
    below = torch.special.ndtr(values.sort().values)
    assert (below - torch.arange(1, n + 1) / n).abs().max() < 1.95 / math.sqrt(n)
    assert abs((values[1:] * values[:-1]).mean()) < 4 / math.sqrt(n)


def test_keys_of_other_paths_are_unrelated():
    keys = [Key(0) / "a" / "b", Key(0) / "ab", Key(0) / "b" / "a", Key(1) / "a" / "b", Key(0) / "a" / "b" / 0, Key(0)]
    draws = [normal(key, (20_000,)) for key in keys]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert abs((one * other).mean()) < 0.03
    assert torch.equal(normal(Key(0) / "a" / "b", (5,)), draws[0][:5])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_a_part_is_drawn_as_part_of_the_whole(start: int, length: int):
    key = Key(3) / "part"
    for draw in (uniform, normal):
        whole = draw(key, (120,))
        assert torch.equal(draw(key, (length,), first=start), whole[start : start + length])


def test_passes_of_bounded_size_join(monkeypatch: pytest.MonkeyPatch):
    whole = normal(Key(0), (50,))
    monkeypatch.setattr(random, "_CHUNK", 7)
    assert torch.equal(normal(Key(0), (50,)), whole)


def test_beyond_32_bits():
    key = Key(0)
    assert not torch.equal(uniform(key, (4,), first=2**32), uniform(key, (4,)))
    assert torch.equal(uniform(key, (4,), first=2**32 - 2)[2:], uniform(key, (2,), first=2**32))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 300))
def test_permutation(n: int):
    order = permutation(Key(5) / n, n)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(n))


def test_permutations_differ_and_repeat():
    assert torch.equal(permutation(Key(0), 50), permutation(Key(0), 50))
    assert not torch.equal(permutation(Key(0), 50), permutation(Key(1), 50))


def test_nothing_global():
    """Neither the generator's state, nor the default dtype, nor a default device changes a draw or is changed by it."""
    want = normal(Key(0), (9,))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    uniform(Key(0), (9,)), permutation(Key(0), 9)
    with torch.device("meta"):
        assert torch.equal(normal(Key(0), (9,)), want)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(normal(Key(0), (9,)), want)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_words():
    """The 64-bit key of a path is fixed for good: checkpoints and kernels rely on it."""
    import hashlib

    text = b"7\x1fdefault\x1flayers.0\x1fA"
    word = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    assert (Key(7) / "default" / "layers.0" / "A").word == word
    many = (Key(7) / "default").words([("layers.0", "A"), ("layers.0", "B"), ()])
    assert list(many) == [word, (Key(7) / "default" / "layers.0" / "B").word, (Key(7) / "default").word]


def test_swift_numbers_are_those_of_splitmix64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the published first numbers for the seed 1234567, two of 23 bits of each; and any part alone."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    wanted = [((number >> shift & 0xFFFFFFFF) // 512 + 0.5) / 2**23 for number in known for shift in (0, 32)]
    key, cpu = Key(0), torch.device("cpu")
    with monkeypatch.context() as patch:
        patch.setattr(Key, "word", 1234567)
        found = swift_uniform(key, 10, 0, cpu)
    assert found.dtype == torch.float32
    assert found.tolist() == wanted
    whole = swift_uniform(key, 1000, 0, cpu)
    for first, count in ((0, 1000), (1, 3), (333, 667), (999, 1), (10, 0)):
        assert torch.equal(swift_uniform(key, count, first, cpu), whole[first : first + count])
    monkeypatch.setattr("rankshift.core.random._DITHER", 101)
    assert torch.equal(swift_uniform(key, 997, 3, cpu), whole[3:])


def test_swift_numbers_are_even_and_unrelated_between_keys() -> None:
    a, b = (swift_uniform(Key(0) / "w" / step, 1 << 18, 0, torch.device("cpu")).double() for step in (1, 2))
    assert 0 < a.min() < a.max() < 1
    assert ((torch.histc(a, 64, 0, 1) - 4096).abs() < 5 * 64).all()
    for other in (b, a.roll(1), a.roll(2), b.roll(1)):
        assert torch.corrcoef(torch.stack([a, other]))[0, 1].abs() < 5 / 512
