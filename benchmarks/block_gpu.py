"""The kernels of a fused Llama block on one GPU: each against plain torch, and how near it comes to copying its bytes.

    PYTHONPATH=src python benchmarks/block_gpu.py --out benchmarks/results/block_gpu.json

Shapes of a 1.1 B and an 8 B Llama at 8,192 tokens, bf16, low-rank terms of rank 16 and 64. Error: largest difference to
the reference in fp32, as a share of its largest number. Bytes: what must be read and written once; the rate is that of
the bytes, and of a plain copy in the same call. Medians of 20 rounds, the cache flushed before each.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rankshift as rs
from rankshift.ops import rms_norm, rotary, skinny, swiglu
from rankshift.ops.rms_norm import reference as rms_norm_reference
from rankshift.ops.rotary import reference as rotary_reference
from rankshift.ops.skinny import reference as skinny_reference
from rankshift.ops.swiglu import reference as swiglu_reference

SHAPES = {"1.1B": (2048, 8192, 32, 8, 64), "8B": (4096, 14336, 32, 8, 128), "tiny": (128, 256, 4, 2, 32)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def new(*shape: int, size: float = 1.0) -> Tensor:
    return size * torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def tensors(found: Any) -> list[Tensor]:
    """All tensors in a result."""
    if isinstance(found, Tensor):
        return [found]
    return [t for part in found or () for t in tensors(part)]


def wide(found: Any) -> Any:
    """Arguments in fp32."""
    if isinstance(found, Tensor):
        return found.float() if found.is_floating_point() else found
    if isinstance(found, (tuple, list)):
        return type(found)(wide(part) for part in found)
    return {k: wide(v) for k, v in found.items()} if isinstance(found, dict) else found


def cases(
    shape: str, rank: int, tokens: int
) -> dict[str, tuple[Callable[..., Any], Callable[..., Any], Any, Any, int]]:
    """name → (what runs, its reference, arguments, keywords, numbers of 2 bytes that must be moved)."""
    K, F, heads, few, D = SHAPES[shape]
    T, r, Nq, Nk = tokens, rank, heads * D, few * D
    x, y, w, dn = new(T, K), new(T, K), new(K), new(T, K)
    rstd = x.float().square().mean(1).add(1e-5).rsqrt()
    low, low3 = (new(T, r), new(K, r, size=0.05)), (new(T, 3 * r), new(3 * r, K, size=0.05))
    qkv = new(T, Nq + 2 * Nk)
    q, k, v = qkv.split([Nq, Nk, Nk], 1)
    angle = torch.rand(1024 if tokens % 1024 == 0 else tokens, D // 2, device=DEVICE).repeat(1, 2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    Z = new(T, 3 * r)
    lows = tuple((Z[:, i * r : (i + 1) * r], new(n, r, size=0.05)) for i, n in enumerate((Nq, Nk, Nk)))
    grads = [new(1, T, n // D, D).transpose(1, 2) for n in (Nq, Nk, Nk)]
    gu, Zgu, Bgu = new(T, 2 * F), new(T, 2 * r), new(2 * F, r, size=0.05)
    g, u = gu.split(F, 1)
    low_g, low_u = (Zgu[:, :r], Bgu[:F]), (Zgu[:, r:], Bgu[F:])
    S, A, dh, dgu = new(T, r), new(r, F, size=0.05), new(T, F), new(T, 2 * F)

    def rotated(q: Tensor, k: Tensor, v: Tensor, *rest: Any, how: Callable[..., Any]) -> tuple[Tensor, ...]:
        q, k, v = (t.clone() for t in (q, k, v))
        how(q, k, v, *rest)
        return q, k, v

    def back(how: Callable[..., Any], *parts: Any) -> tuple[Tensor, ...]:
        out = torch.empty(T, Nq + 2 * Nk, device=DEVICE, dtype=parts[0].dtype).split([Nq, Nk, Nk], 1)
        how(*parts, out)
        return out

    def gated(how: Callable[..., Any], *parts: Any, **words: Any) -> Any:
        out = torch.empty(T, 2 * F, device=DEVICE, dtype=parts[0].dtype).split(F, 1)
        return how(*parts, out=out, **words)

    asked = {"grads": ("g", "u", "h")} if r <= 64 else {}
    n, m, s = rms_norm, rms_norm_reference, skinny
    found = {
        "norm": (n.norm, m.norm, (x, w, 1e-5, 0.0, None, None), {}, 2 * T * K),
        "norm + residual + Z B": (n.norm, m.norm, (x, w, 1e-5, 0.0, y, low), {}, 4 * T * K),
        "norm back + S A, R = 3 r": (n.norm_back, m.norm_back, (dn, x, rstd, w, 0.0, low3, y), {}, 4 * T * K),
        "norm back": (n.norm_back, m.norm_back, (dn, x, rstd, w, 0.0, None, y), {}, 4 * T * K),
        "sum + Z B": (n.add, m.add, (x, y, low), {}, 3 * T * K),
        "rotate + Z B": (
            lambda *a: rotary.rotate_(*a, head=D), None, (q, k, v, cos, sin, lows), {}, 2 * T * (Nq + 2 * Nk)
        ),
        "rotate back": (
            lambda *a: back(rotary.rotate_back, *a), lambda *a: back(rotary_reference.rotate_back, *a),
            (*grads, cos, sin), {}, 2 * T * (Nq + 2 * Nk),
        ),
        "swiglu": (swiglu.swiglu, swiglu_reference.swiglu, (g, u), {}, 3 * T * F),
        "swiglu + Z B": (swiglu.swiglu, swiglu_reference.swiglu, (g, u, low_g, low_u), {}, 3 * T * F),
        "swiglu back": (
            lambda *a: gated(swiglu.swiglu_back, *a), lambda *a: gated(swiglu_reference.swiglu_back, *a), (dh, g, u),
            {}, 5 * T * F,
        ),
        "swiglu back + terms + sums": (
            lambda *a, **k: gated(swiglu.swiglu_back, *a, **k),
            lambda *a, **k: gated(swiglu_reference.swiglu_back, *a, **k),
            (dh, g, u, low_g, low_u, (S, A)), asked, 5 * T * F,
        ),
        "down back, N = K": (s.down_back, skinny_reference.down_back, (dn, new(K, r, size=0.05), new(T, r)), {}, T * K),
        "down back, q k v": (
            s.down_back, skinny_reference.down_back, (qkv, new(Nq + 2 * Nk, r, size=0.05), Z, [Nq, Nk, Nk]), {},
            T * (Nq + 2 * Nk),
        ),
        "S alone, gate up": (s.down_back, skinny_reference.down_back, (dgu, Bgu, None, [F, F]), {}, 2 * T * F),
        "dA, R = r": (s.weight_gradient, skinny_reference.weight_gradient, (S, x), {}, T * K),
        "dA, R = 3 r, gain": (s.weight_gradient, skinny_reference.weight_gradient, (Z, x, w), {}, T * K),
    }  # fmt: skip
    checked = lambda *a: rotated(*a, how=lambda *b: rotary.rotate_(*b, head=D))  # noqa: E731
    against = lambda *a: rotated(*a, how=lambda *b: rotary_reference.rotate_(*b, D))  # noqa: E731
    found["(rotate, checked)"] = (checked, against, (q, k, v, cos, sin, lows), {}, 0)
    return found


def median(run: Callable[[], Any], flush: Tensor, rounds: int = 20) -> float:
    """Microseconds."""
    times = []
    for _ in range(3):
        run()
    for _ in range(rounds):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(stop))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1.1B", "8B"], choices=SHAPES)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    flush = torch.empty(64 << 20, device=DEVICE) if DEVICE == "cuda" else torch.empty(0)
    result: dict[str, Any] = {"date": datetime.date.today().isoformat(), "tables": {}}
    result["versions"] = {"torch": torch.__version__, "rankshift": rs.__version__}
    if DEVICE == "cuda":
        result["gpu"] = torch.cuda.get_device_name()
        source, target = new(8192, 8192), new(8192, 8192)
        result["copy TB/s"] = 4 * source.numel() / median(lambda: target.copy_(source), flush) / 1e6
        print(f"copy {result['copy TB/s']:.2f} TB/s")
    for shape in options.shapes:
        for rank in options.ranks:
            print(f"\n{shape}, rank {rank}\n{'':32} {'µs':>8} {'TB/s':>6} {'of copy':>8} {'error':>9}")
            rows = result["tables"][f"{shape}, rank {rank}"] = {}
            for name, (run, reference, args, words, moved) in cases(shape, rank, options.tokens).items():
                row: dict[str, Any] = {}
                try:
                    if reference is not None:
                        wanted = tensors(reference(*wide(args), **words))
                        got = tensors(run(*args, **words))
                        assert len(got) == len(wanted), (len(got), len(wanted))
                        row["error"] = max(
                            float((a.float() - b.float()).abs().max() / b.abs().max().clamp_min(1e-9))
                            for a, b in zip(got, wanted, strict=True)
                        )
                        del wanted, got
                    if moved and DEVICE == "cuda":
                        row["us"] = median(lambda run=run, args=args, words=words: run(*args, **words), flush)
                        row["TB/s"] = 2 * moved / row["us"] / 1e6
                        row["of copy"] = row["TB/s"] / result["copy TB/s"]
                except Exception as error:
                    row["failed"] = f"{type(error).__name__}: {error}"
                rows[name] = row
                cells = [f"{row.get(key, float('nan')):{form}}" for key, form in
                         (("us", "8.1f"), ("TB/s", "6.2f"), ("of copy", "8.2f"), ("error", "9.1e"))]  # fmt: skip
                print(f"{name:32} {' '.join(cells)} {row.get('failed', '')[:200]}", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
