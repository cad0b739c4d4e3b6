"""The kernel, and what others need to round in the same way. Numbers in bf16 are handled as the upper halves of their
fp32 bits."""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SIZE = 1024  # numbers for each program
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)  # SplitMix64, as in core/random.py
_MIX_A = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_B = tl.constexpr(0x94D049BB133111EB)


def launch(target: Tensor, value: Tensor, word: int, first: int) -> None:
    """target ← value; ``word`` as an int64 has its bits."""
    kind = "bf16" if target.dtype == torch.bfloat16 else "fp16"
    target = target.view(torch.int16) if kind == "bf16" else target
    count = value.numel()
    with torch.cuda.device_of(value):
        _round[(triton.cdiv(count, _SIZE),)](target, value, count, word, first, KIND=kind, SIZE=_SIZE)


@triton.jit(do_not_specialize=["word", "first"])
def _round(target, value, count, word, first, KIND: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    element = at + first
    number = numbers(word.to(tl.int64), element // 4)
    noise = ((number >> (element % 4 * 16).to(tl.uint64)) & 0xFFFF).to(tl.int32)
    result = narrow(tl.load(value + at, mask=at < count, other=0.0), noise, KIND, True)
    tl.store(target + at, result, mask=at < count)


@triton.jit
def numbers(word, count):
    """Numbers count, count + 1, … of the stream of ``word``, uint64, each of which serves four elements."""
    z = (count + 1).to(tl.uint64) * _GAMMA + word.to(tl.uint64, bitcast=True)
    z = (z ^ (z >> 30)) * _MIX_A
    z = (z ^ (z >> 27)) * _MIX_B
    return z ^ (z >> 31)


@triton.jit
def narrow(value, noise, KIND: tl.constexpr, RANDOM: tl.constexpr):
    """fp32 as it is stored in 16 bits: bf16 as int16. Without RANDOM to the nearest."""
    bits = value.to(tl.int32, bitcast=True)
    if KIND == "bf16":
        if not RANDOM:
            noise = 0x7FFF + ((bits >> 16) & 1)  # half, and half to even
        bits = tl.where(value == value, bits + noise, bits | 0x400000)
        result = (bits >> 16).to(tl.int16)
    else:
        if RANDOM:
            rounded = ((bits + (noise >> 3)) & -8192).to(tl.float32, bitcast=True)
            even = tl.floor(value * 16777216.0 + noise.to(tl.float32) / 65536.0) / 16777216.0
            value = tl.where(value == value, tl.where(tl.abs(value) < 0.00006103515625, even, rounded), value)
        result = value.to(tl.float16)
    return result
