"""Keyed random numbers: a pure function of (seed, path, element index).

Philox-4x32-10 (Salmon et al., SC 2011) with a key of 64 bits hashed from the seed and a path of names. For element i
the counter is (i mod 2³², i div 2³², 0, 0) and the key (low word, high word). That is Triton's
``tl.philox(seed, i, i >> 32, 0, 0)`` on 32-bit words and, for i below 2³¹, its ``tl.randint4x(seed, i)``, both with
``seed = key.word``: a kernel can regenerate what was drawn here.
No global generator is read or written; every rank, world size and resumed run draws the same numbers.

Where much is drawn in mid-training, :func:`dither` (16 bits an element, for what is rounded at random) and
:func:`swift_uniform` draw with SplitMix64 (Steele, Lea & Flood, OOPSLA 2014) on the tensor's own device: a tenth of the
work.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57  # multipliers and Weyl constants of Philox-4x32
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_GAMMA, _MIX_A, _MIX_B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of SplitMix64
_CHUNK = 1 << 14  # elements per pass: torch spreads larger steps over threads, which some hundred small ones do not pay
_DITHER = 1 << 24  # int64 temporaries stay below 128 MB


@dataclass(frozen=True)
class Key:
    """A seed and a path of names. ``key / "A"`` is the key of a child."""

    seed: int
    path: tuple[str, ...] = ()

    def __truediv__(self, part: str | int) -> Key:
        return Key(self.seed, (*self.path, str(part)))

    @property
    def word(self) -> int:
        """The 64-bit Philox key."""
        return next(self.words([()]))

    def words(self, paths: Iterable[Sequence[str]]) -> Iterator[int]:
        """:attr:`word` of the key under each of many paths."""
        own = "\x1f".join((str(self.seed), *self.path))
        for path in paths:
            text = "\x1f".join((own, *path)).encode()
            yield int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _mul(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of a * constant; a holds 32-bit words in int64."""
    low_part = (a & 0xFFFF) * constant
    high_part = (a >> 16) * constant
    high = (high_part + (low_part >> 16)) >> 16
    low = (low_part + ((high_part & 0xFFFF) << 16)) & _MASK
    return high & _MASK, low


def philox(word: int, counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words (as int64) for each element of ``counter`` (int64, ≥ 0)."""
    c0, c1 = counter & _MASK, (counter >> 32) & _MASK
    zero = torch.zeros_like(c0)
    return _rounds((c0, c1, zero, zero), (word & _MASK, (word >> 32) & _MASK))


def _rounds(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox-4x32 on a counter of four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high_b, low_b = _mul(c2, _ROUND_B)
        high_a, low_a = _mul(c0, _ROUND_A)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return c0, c1, c2, c3


def _unit(a: Tensor, b: Tensor) -> Tensor:
    """Two words to one float64 in (0, 1]: 53 bits, never 0, so that its logarithm is finite."""
    bits = ((a & 0xFFFFF800) << 21) | b  # 21 bits of a above 32 bits of b
    return (bits.to(torch.float64) + 0.5) * 2.0**-53


def _draw(key: Key, shape: tuple[int, ...], first: int, normal: bool) -> Tensor:
    count = math.prod(shape)
    out = torch.empty(count, dtype=torch.float64, device="cpu")
    word = key.word
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        index = torch.arange(first + start, first + stop, dtype=torch.int64, device="cpu")
        a, b, c, d = philox(word, index)
        value = _unit(a, b)
        if normal:
            value = torch.sqrt(-2.0 * torch.log(value)) * torch.cos(2.0 * math.pi * _unit(c, d))
        out[start:stop] = value
    return out.view(shape)


def uniform(
    key: Key,
    shape: tuple[int, ...],
    low: float = 0.0,
    high: float = 1.0,
    *,
    dtype: torch.dtype = torch.float32,
    first: int = 0,
) -> Tensor:
    """U(low, high) on the CPU. ``first`` is the index of the first element, so a shard draws its own part."""
    return (low + (high - low) * _draw(key, shape, first, normal=False)).to(dtype)


def normal(
    key: Key, shape: tuple[int, ...], std: float = 1.0, *, dtype: torch.dtype = torch.float32, first: int = 0
) -> Tensor:
    """N(0, std²) on the CPU, computed in float64 and rounded once. ``first`` as in :func:`uniform`."""
    return (std * _draw(key, shape, first, normal=True)).to(dtype)


def permutation(key: Key, n: int) -> Tensor:
    """A permutation of 0…n−1 (int64, CPU): the order of n keyed 64-bit draws, ties broken by index."""
    return torch.argsort(_draw(key, (n,), 0, normal=False), stable=True)


def dither(word: int, count: int, first: int, device: torch.device) -> Tensor:
    """``count`` random numbers in 0 … 2¹⁶ − 1, (count,) int32: elements first, first + 1, … of the stream of ``word``.

    Four of them are one number of SplitMix64 started at ``word`` (take a hash, as :attr:`Key.word` is).
    """
    return _lanes(word, count, first, device, torch.int16).bitwise_and_(0xFFFF)


def swift_uniform(key: Key, count: int, first: int, device: torch.device) -> Tensor:
    """``count`` numbers of U(0, 1), (count,) fp32 of 23 random bits each, drawn on the device: elements first,
    first + 1, … of the stream of ``key``. Two of them are one number of SplitMix64."""
    bits = _lanes(key.word, count, first, device, torch.int32)
    return bits.bitwise_right_shift_(9).bitwise_and_((1 << 23) - 1).to(torch.float32).add_(0.5).mul_(2.0**-23)


def _lanes(word: int, count: int, first: int, device: torch.device, width: torch.dtype) -> Tensor:
    """SplitMix64 started at ``word``, cut into integers of this width: ``count`` of them, as int32."""
    out = torch.empty(count, dtype=torch.int32, device=device)
    of_one = 8 // width.itemsize
    for start in range(first, first + count, _DITHER):
        stop = min(start + _DITHER, first + count)
        z = torch.arange(start // of_one + 1, -(-stop // of_one) + 1, dtype=torch.int64, device=device)
        z.mul_(signed(_GAMMA)).add_(signed(word))
        z = z.bitwise_xor_((z >> 30).bitwise_and_((1 << 34) - 1)).mul_(signed(_MIX_A))
        z = z.bitwise_xor_((z >> 27).bitwise_and_((1 << 37) - 1)).mul_(signed(_MIX_B))
        z = z.bitwise_xor_((z >> 31).bitwise_and_((1 << 33) - 1))
        lanes = z.view(width)[start % of_one : start % of_one + stop - start]
        out[start - first : stop - first] = lanes
    return out


def stochastic(value: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """fp32 numbers as one of their two neighbours in bf16 or fp16, in fp32 still.

    Args:
        noise: int32 of the same shape, uniform in 0 … 2¹⁶ − 1, as :func:`dither` draws it; equal noise rounds equal
            values equally.
    """
    dropped = 16 if dtype == torch.bfloat16 else 13  # bits of the fraction
    bits = value.view(torch.int32) + (noise >> (16 - dropped))
    rounded = bits.bitwise_and_(-(1 << dropped)).view(torch.float32)
    if dtype != torch.bfloat16:
        # below its smallest normal number fp16 is an even grid
        even = (value * 2.0**24 + noise * 2.0**-16).floor() * 2.0**-24
        rounded = torch.where(value.abs() < 2.0**-14, even, rounded)
    return torch.where(value.isnan(), value, rounded)  # whose bits may become those of a number


def signed(word: int) -> int:
    """64 bits as the int64 that holds them."""
    return word - (word >> 63 << 64)
