"""The step of GaLore(gradient="projected") on one GPU: its kernel against the reference, and where the time goes.

    PYTHONPATH=src python benchmarks/projected_fold_gpu.py --out benchmarks/results/projected_fold_gpu.json

Model: that of lora_gpu.py. "kernel": folds of all its linear layers, milliseconds on the GPU, beside a matrix product a
layer. "step": of ``optimizer.step()`` from an idle GPU, milliseconds until it returns and until the GPU is done, and of
its parts, on the CPU. Tiles are (rows, columns, ranks at a time).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lora_gpu import SHAPES, llama

import rankshift as rs
from rankshift.core.event import Driver
from rankshift.methods import galore_projected
from rankshift.ops.projected_fold import Fold, fits, fold_, reference, triton
from rankshift.optim.adam import Adam
from rankshift.optim.inside import Inside

TILES = [(128, 64, 32), (128, 128, 32), (64, 128, 32), (64, 64, 32)]
CHECKED = [(16, 8, 3), (1000, 1004, 136), (512, 2048, 128), (2048, 512, 128), (1, 4, 1)]


def against_reference() -> dict[str, Any]:
    """With factors of few bits all sums are exact: how many numbers of a weight differ. With others: the largest error,
    of a step of about 1/30, in units of the last place."""
    found: dict[str, Any] = {}
    for dtype, stochastic in itertools.product((torch.bfloat16, torch.float16, torch.float32), (False, True)):
        differ, worst = 0, 0.0
        for n, m, r in CHECKED:
            weights = [torch.randn(n, m, device="cuda").to(dtype) for _ in range(3)]
            words = [(1 << 64) - 12345 + index for index in range(3)]
            few = [torch.randint(-8, 9, (size, r), device="cuda") * 2.0**-6 for size in (n, m)]
            assert fits(weights[0], *few)
            want = [
                reference.fold(w, *few, 0.5, word if stochastic else None)
                for w, word in zip(weights, words, strict=True)
            ]
            fold_([Fold(w, *few, 0.5, word) for w, word in zip(weights, words, strict=True)], stochastic)
            differ += sum(int((w != to).sum()) for w, to in zip(weights, want, strict=True))
            left, right = (torch.randn(size, r, device="cuda") for size in (n, m))
            right /= 30 * r**0.5
            exact = 0.5 * weights[0].double() + left.double() @ right.double().t()
            fold_([Fold(weights[0], left, right, 0.5)], stochastic)
            unit = exact.abs().clamp(min=2.0**-5) * torch.finfo(dtype).eps
            worst = max(worst, float(((weights[0].double() - exact) / unit).abs().max()))
        name = f"{str(dtype).removeprefix('torch.')}, {'stochastic' if stochastic else 'nearest'}"
        found[name] = {"differ": differ, "error": worst}
    return found


def milliseconds(work: Callable[[], None], rounds: int = 20) -> float:
    times = []
    for _ in range(rounds + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times[3:])


def kernel(shape: str, rank: int, side: str) -> dict[str, float]:
    layers = [m for n, m in llama(shape, "cuda").named_modules() if isinstance(m, torch.nn.Linear) and "head" not in n]
    folds = [
        Fold(m.weight.detach(), *(torch.randn(size, rank, device="cuda") * 1e-4 for size in m.weight.shape), 1.0, 7)
        for m in layers
    ]
    narrow = [(f.left.bfloat16(), f.right.bfloat16().t()) for f in folds]

    def products() -> None:
        for fold, (left, right) in zip(folds, narrow, strict=True):
            fold.weight.addmm_(left, right)

    found = {"a product a layer": milliseconds(products)}
    chosen = triton._TILE
    for tile in dict.fromkeys((chosen, *TILES)):
        triton._TILE = tile
        for name, stochastic in (("nearest", False), ("stochastic", True)):
            try:
                found[f"{tile}, {name}"] = milliseconds(lambda stochastic=stochastic: fold_(folds, stochastic))
            except Exception as error:  # a tile that does not fit must not cost the others their machine time
                print(tile, name, repr(error)[:300])
    triton._TILE = chosen
    return found


def clocked(owner: Any, name: str, times: dict[str, float]) -> None:
    plain = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        out = plain(*args, **kwargs)
        key = f"{owner.__name__}.{name}"
        times[key] = times.get(key, 0.0) + 1e3 * (time.perf_counter() - start)
        return out

    setattr(owner, name, timed)


def step(shape: str, rank: int, rounding: str, times: dict[str, float], rounds: int = 15) -> dict[str, Any]:
    model = llama(shape, "cuda")
    method = rs.GaLore(rank=rank, every=0, side="in", gradient="projected", rounding=rounding)
    optimizer = rs.attach(model, method).optimizer(lr=1e-3)
    ids = torch.randint(0, 32000, (2, 64), device="cuda")
    returned, done, parts = [], [], []
    for _ in range(rounds + 3):
        model(input_ids=ids, labels=ids).loss.backward()
        torch.cuda.synchronize()
        times.clear()
        start = time.perf_counter()
        optimizer.step()
        returned.append(1e3 * (time.perf_counter() - start))
        torch.cuda.synchronize()
        done.append(1e3 * (time.perf_counter() - start))
        parts.append(dict(times))
        optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as seen:
        optimizer.step()
        torch.cuda.synchronize()
    rows = [e for e in seen.key_averages() if e.self_device_time_total > 0 and e.device_type.name == "CUDA"]
    rows.sort(key=lambda e: -e.self_device_time_total)
    return {
        "returned": statistics.median(returned[3:]),
        "done": statistics.median(done[3:]),
        "kernels": sum(e.self_device_time_total for e in rows) / 1e3,
        "launches": sum(e.count for e in rows),
        "parts": {key: statistics.median(part[key] for part in parts[3:]) for key in parts[-1]},
        "longest": {e.key[:90]: [e.self_device_time_total / 1e3, e.count] for e in rows[:10]},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="1.1B", choices=SHAPES)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    result["reference"] = against_reference()
    print(json.dumps(result, indent=1), flush=True)
    result["kernel"] = kernel(options.shape, options.rank, "in")
    print(json.dumps(result["kernel"], indent=1), flush=True)
    times: dict[str, float] = {}
    for owner, name in (
        (Driver, "_judge"), (Driver, "_after"), (Driver, "open_window"), (Adam, "step"), (Inside, "step"),
        (galore_projected.Renew, "apply_all"), (galore_projected.FoldIn, "apply_all"),
    ):  # fmt: skip
        clocked(owner, name, times)
    for rounding in ("nearest", "stochastic"):
        result[f"step, {rounding}"] = step(options.shape, options.rank, rounding, times)
        print(json.dumps(result[f"step, {rounding}"], indent=1), flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
