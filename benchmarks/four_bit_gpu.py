"""Weights out of 4 bits on one GPU: the kernels against bitsandbytes and the reference, bit by bit, then how fast.

    PYTHONPATH=src python benchmarks/four_bit_gpu.py --out benchmarks/results/four_bit_gpu.json

"bits": how many numbers differ. "speed": nf4 in blocks of 64, bf16, microseconds a weight: the median over replays of a
CUDA graph that goes through so many weights that no cache holds them, and called one by one ("eager"). "copy" moves as
many bytes, half of them each way; "fill" only writes the weight. "share": copy's time by ours. Tiles are (runs, warps).

"merged bits": with a product B A added. "none": how many numbers differ from the weight's if B is zero; "reference":
what share of numbers is another than the reference's (their sums are rounded in another order); "units": how far the
furthest is from the sum in float64, in units of its last place. "merged": the same times with B A of rank 16 and 64
added. Tiles are (warps, columns of each, programs at once on a multiprocessor).

"layer": microseconds of a forward and backward of LoRA's linear layer on such a weight, 8192 tokens: as a CUDA graph,
and called by the host ("eager"). "frozen" has no LoRA; "merged" forms W + B A (orders f2, b5), "unmerged" does not (f1,
b1s); "dense" is that on a weight in bf16.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from rankshift.core.base import Format, Plain
from rankshift.ops.four_bit import dequantised, merged, reference, triton
from rankshift.ops.four_bit.op import _table
from rankshift.ops.frozen_linear import frozen_linear
from rankshift.ops.lora_linear import lora_linear
from rankshift.ops.stochastic_rounding.op import runs_on
from rankshift.storage.four_bit import FourBitLayout

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [(14336, 4096), (4096, 14336), (4096, 4096), (2048, 8192), (2048, 2048)]
TILES = [(512, 4), (256, 2), (256, 4), (1024, 4), (1024, 8), (2048, 8)]
MERGED_SHAPES = [(14336, 4096), (8192, 2048), (2048, 2048)]
MERGED_TILES = [
    *((warps, 64, at_once) for warps in (2, 4, 8) for at_once in (2, 4, 8, 16)),
    *((warps, 32, at_once) for warps in (4, 8) for at_once in (2, 4, 8)),
]
CACHES = 256 << 20  # bytes; an H200 has 60 MB
CHECKED = [  # shape, block, nested, dtype
    *((shape, 64, True, BF16) for shape in SHAPES),
    *(((4096, 4096), 64, nested, dtype) for nested in (True, False) for dtype in (BF16, FP16, FP32)),
    *(((4096, 4096), block, True, BF16) for block in (32, 4096)),
    *(((1001, 333), 64, nested, BF16) for nested in (True, False)),
    *(((300, 70), 64, True, dtype) for dtype in (BF16, FP32)),
]


def packed(n: int, block: int, nested: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Every code is as likely as any other."""
    codes = torch.randint(256, (-(-n // 2), 1), dtype=torch.uint8, device="cuda")
    blocks = -(-n // block)
    if not nested:
        return codes, torch.rand(blocks, device="cuda").view(torch.int32), None
    absmax = torch.randint(256, (blocks,), dtype=torch.uint8, device="cuda")
    return codes, absmax, torch.rand(1 + -(-blocks // 256), device="cuda").view(torch.int32)


def state(
    absmax: Tensor, scales: Tensor | None, shape: tuple[int, int], block: int, quant_type: str, dtype: torch.dtype
) -> bnb.QuantState:
    common = {"shape": torch.Size(shape), "blocksize": block, "quant_type": quant_type, "dtype": dtype}
    if scales is None:
        return bnb.QuantState(absmax.view(FP32), **common)
    levels = bnb.create_dynamic_map().cuda()
    inner = bnb.QuantState(scales.view(FP32)[1:], code=levels, blocksize=256, dtype=FP32)
    return bnb.QuantState(absmax, **common, offset=scales.view(FP32)[0], state2=inner)


def bits() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for shape, block, nested, dtype in dict.fromkeys(CHECKED):
        for quant_type in ("nf4", "fp4"):
            tensors = packed(shape[0] * shape[1], block, nested)
            ours = dequantised(*tensors, shape, block, quant_type, dtype)
            theirs = bnb.dequantize_4bit(tensors[0], state(*tensors[1:], shape, block, quant_type, dtype))
            plain = reference.dequantised(*tensors, shape, block, quant_type, dtype)
            name = f"{shape}, {block}, {'nested' if nested else 'plain'}, {quant_type}, {str(dtype)[6:]}"
            found[name] = {"bitsandbytes": int((ours != theirs).sum()), "reference": int((ours != plain).sum())}
    shape = (32769, 65536)  # more than 2³¹ numbers; the last row begins with a block and a scale of its own
    for nested in (True, False):
        codes, absmax, scales = packed(shape[0] * shape[1], 64, nested)
        last = dequantised(codes, absmax, scales, shape, 64, "nf4", BF16)[-1:]
        if scales is not None:
            scales = torch.cat([scales[:1], scales[-4:]])
        row = codes[-32768:], absmax[-1024:], scales, (1, 65536), 64, "nf4", BF16
        name = f"last row of {shape}, {'nested' if nested else 'plain'}"
        found[name] = {"reference": int((last != reference.dequantised(*row)).sum())}
    torch.cuda.empty_cache()
    return found


def factors(shape: tuple[int, int], r: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    B, A = (torch.randn(*size, device="cuda") for size in ((shape[0], r), (r, shape[1])))
    return (0.01 * B).to(dtype), A.to(dtype)


def merged_bits() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for shape in [*MERGED_SHAPES, (1001, 320), (300, 70)]:
        for nested, dtype, r in (
            (True, BF16, 16),
            (True, BF16, 64),
            (False, FP16, 5),
            (True, BF16, 128),
            (True, FP16, 200),
        ):
            tensors, (B, A) = packed(shape[0] * shape[1], 64, nested), factors(shape, r, dtype)
            args = (*tensors, shape, 64, "nf4")
            none = merged(*args, torch.zeros_like(B), A)
            some, plain = merged(*args, B, A), reference.merged(*args, B, A)
            exact = reference.dequantised(*args, FP32).double() + B.double() @ A.double()
            unit = torch.exp2(exact.abs().clamp_min(1e-3).log2().floor()) * torch.finfo(dtype).eps
            found[f"{shape}, {'nested' if nested else 'plain'}, {str(dtype)[6:]}, rank {r}"] = {
                "none": int((none != reference.dequantised(*args, dtype)).sum()),
                "reference": float((some != plain).float().mean()),
                "units": float(((some.double() - exact).abs() / unit).max()),
            }
    return found


def microseconds(calls: list[Callable[[], object]], rounds: int = 30) -> float:
    """Of one call, the median over rounds through all of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return clocked(graph.replay, len(calls), rounds)


def clocked(work: Callable[[], object], calls: int, rounds: int) -> float:
    times = []
    for _ in range(rounds + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(stop) / calls)
    return statistics.median(times[3:])


def speed(shape: tuple[int, int], nested: bool, tiles: bool) -> dict[str, Any]:
    n = shape[0] * shape[1]
    moved = n // 2 + n // 64 * (1 if nested else 4) + 2 * n
    weights = [packed(n, 64, nested) for _ in range(max(2, -(-CACHES // moved)))]
    outs = [torch.empty(shape, dtype=BF16, device="cuda") for _ in weights]
    states = [state(*tensors[1:], shape, 64, "nf4", BF16) for tensors in weights]
    bytes_ = [torch.empty(2, moved // 2, dtype=torch.uint8, device="cuda") for _ in weights]

    ours = [
        lambda w=w, out=out: dequantised(*w, shape, 64, "nf4", BF16, out=out)
        for w, out in zip(weights, outs, strict=True)
    ]
    theirs = [
        lambda w=w, s=s, out=out: bnb.dequantize_4bit(w[0], s, out=out)
        for w, s, out in zip(weights, states, outs, strict=True)
    ]
    found: dict[str, Any] = {
        "ours": microseconds(ours),
        "bitsandbytes": microseconds(theirs),
        "copy": microseconds([lambda b=b: b[1].copy_(b[0]) for b in bytes_]),
        "fill": microseconds([lambda out=out: out.zero_() for out in outs]),
    }
    found["GB/s"] = {name: moved / 1e3 / found[name] for name in ("ours", "bitsandbytes", "copy")}
    found["share"] = {name: found["copy"] / found[name] for name in ("ours", "bitsandbytes")}
    found["eager"] = {
        name: clocked(lambda calls=calls: [call() for call in calls], len(calls), 10)
        for name, calls in (("ours", ours), ("bitsandbytes", theirs))
    }
    chosen = triton._TILE
    for tile in TILES if tiles else ():
        triton._TILE = tile
        try:
            found[f"tile {tile}"] = microseconds(ours)
        except Exception as error:  # a tile that does not fit must not cost the others their machine time
            found[f"tile {tile}"] = repr(error)[:300]
    triton._TILE = chosen
    return found


def merged_speed(shape: tuple[int, int], r: int, tiles: bool) -> dict[str, Any]:
    n = shape[0] * shape[1]
    moved = n // 2 + n // 64 + 2 * n
    weights = [packed(n, 64, True) for _ in range(max(2, -(-CACHES // moved)))]
    outs = [torch.empty(shape, dtype=BF16, device="cuda") for _ in weights]
    bytes_ = [torch.empty(2, moved // 2, dtype=torch.uint8, device="cuda") for _ in weights]
    B, A = factors(shape, r)
    plain = [
        lambda w=w, out=out: dequantised(*w, shape, 64, "nf4", BF16, out=out)
        for w, out in zip(weights, outs, strict=True)
    ]
    with_product = [
        lambda w=w, out=out: merged(*w, shape, 64, "nf4", B, A, out=out) for w, out in zip(weights, outs, strict=True)
    ]
    found: dict[str, Any] = {
        "plain": microseconds(plain),
        "merged": microseconds(with_product),
        "copy": microseconds([lambda b=b: b[1].copy_(b[0]) for b in bytes_]),
    }
    found["share"] = {name: found["copy"] / found[name] for name in ("plain", "merged")}
    found["eager"] = {
        name: clocked(lambda calls=calls: [call() for call in calls], len(calls), 10)
        for name, calls in (("plain", plain), ("merged", with_product))
    }
    chosen = triton._MERGED[r]
    for tile in MERGED_TILES if tiles else ():
        triton._MERGED[r] = tile
        try:
            found[f"tile {tile}"] = microseconds(with_product)
        except Exception as error:  # as above
            found[f"tile {tile}"] = repr(error)[:300]
    triton._MERGED[r] = chosen
    return found


def layer_speed(shape: tuple[int, int], r: int, tokens: int = 8192) -> dict[str, Any]:
    out, into = shape
    nf4, W = FourBitLayout(shape, BF16, "nf4", 64, True), packed(out * into, 64, True)
    x, dy = (torch.randn(tokens, width, device="cuda", dtype=BF16) for width in (into, out))
    B, A = (factor.requires_grad_() for factor in factors(shape, r, FP32))
    dense = nf4.dense(*W)

    def layer(*order: Any, format: Format = nf4, weight: tuple[Tensor, ...] = W) -> None:
        y = lora_linear(x, A, B, 1.0, None, format, weight, *order)
        torch.autograd.grad(y, (x, A, B), dy)

    calls: dict[str, Callable[[], Any]] = {
        "frozen": lambda: torch.autograd.grad(frozen_linear(x, None, nf4, W), x, dy),
        "merged": lambda: layer("f2", "b5"),
        "unmerged": lambda: layer("f1", "b1s"),
        "dense": lambda: layer("f1", "b1s", format=Plain(), weight=(dense,)),
    }
    x.requires_grad_()
    found: dict[str, Any] = {name: microseconds([call] * 4) for name, call in calls.items()}
    found["eager"] = {name: clocked(call, 1, 30) for name, call in calls.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only-merged", action="store_true", help="leave out the weights alone")
    options = parser.parse_args()
    torch.manual_seed(0)
    assert runs_on(torch.device("cuda", 0)), "there is no GPU that the kernel runs on"
    assert torch.equal(_table("nf4", torch.device("cuda", 0))[:256].cpu(), bnb.create_dynamic_map())
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}

    def found(name: str, what: Callable[[], Any], part: str | None = None) -> None:
        value = what()
        (result if part is None else result.setdefault(part, {}))[name] = value
        print(part or "", name, json.dumps(value, indent=1, ensure_ascii=False), flush=True)

    found("merged bits", merged_bits)
    for shape in MERGED_SHAPES:
        for r in (16, 64):
            found(f"{shape[0]}×{shape[1]}, rank {r}", partial(merged_speed, shape, r, shape != (8192, 2048)), "merged")
            found(f"{shape[0]}×{shape[1]}, rank {r}", partial(layer_speed, shape, r), "layer")
    if not options.only_merged:
        found("bits", bits)
        for shape in SHAPES:
            for nested in (True, False):
                name = f"{shape[0]}×{shape[1]}, {'nested' if nested else 'plain'}"
                found(name, partial(speed, shape, nested, nested), "speed")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
