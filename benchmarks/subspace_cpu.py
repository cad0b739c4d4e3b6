"""How long a subspace takes to find, and how much of the gradient it holds: every finder on the CPU.

    python benchmarks/subspace_cpu.py [--threads 1 2] [--rounds 5] [--json benchmarks/results/subspace_cpu.json]

A gradient of 1024 × 2736 (an MLP of the 350M Llama of GaLore's paper), r = 256, fp32. "svd" is what galore-torch calls,
torch.linalg.svd of G as it is stored; the rest are the finders of rankshift.optim.subspace, of the shorter side.
"range" is GaLore's default: no power iteration, 8 directions more than are kept, and eigenvectors to choose by. "warm"
begins with the basis of the same gradient with a tenth of its energy added as other noise. Two spectra: σ_i = 1/i with
1 % of its energy in white noise, which is like those of gradients, and white noise alone, which has no subspace. Rounds
are interleaved; times are medians. Each thread count runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

ROWS, COLUMNS, RANK, MORE = 1024, 2736, 256, 8


def spectra():
    import torch

    g = torch.Generator().manual_seed(0)
    noise = torch.randn(ROWS, COLUMNS, generator=g)
    noise /= noise.norm()
    U = torch.linalg.qr(torch.randn(ROWS, ROWS, generator=g)).Q
    V = torch.linalg.qr(torch.randn(COLUMNS, ROWS, generator=g)).Q
    falling = (U / torch.arange(1, ROWS + 1)) @ V.mT
    return {"1/i with noise": falling / falling.norm() * 0.99**0.5 + 0.01**0.5 * noise, "white noise": noise}


def measure(threads: int, rounds: int) -> list[dict]:
    import torch

    from rankshift.optim.subspace import find

    torch.set_num_threads(threads)
    rows = []
    for name, G in spectra().items():
        A = G.mT  # the shorter side of G are the columns of A
        g = torch.Generator().manual_seed(1)
        draw = torch.randn(ROWS, RANK + MORE, generator=g)
        change = torch.randn(G.shape, generator=g)
        sigma = torch.linalg.eigvalsh((G @ G.mT).double()).flip(0)
        best, total = sigma[:RANK].sum(), sigma.sum()
        last = find(A + 0.1**0.5 * (change / change.norm() * G.norm()).mT, RANK, "eigh").narrow(RANK)
        start = torch.cat([last, draw], -1)[:, : RANK + MORE]
        arms = {
            "svd": lambda G=G: torch.linalg.svd(G, full_matrices=False)[0],
            "eigh": lambda A=A: find(A, RANK, "eigh").vectors,
            "range": lambda A=A, z=draw: find(A, RANK + MORE, "range", begin=z, power=0).vectors,
            "range, power 1": lambda A=A, z=draw: find(A, RANK + MORE, "range", begin=z, power=1).vectors,
            "warm": lambda A=A, z=start: find(A, RANK + MORE, "warm", begin=z, power=0).vectors,
        }
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        kept: dict[str, float] = {}
        for arm in arms:  # warm up; and what each holds, in float64
            Q = torch.linalg.qr(arms[arm]()[:, :RANK].double()).Q
            kept[arm] = float((G.double().mT @ Q).square().sum() / best)
        for _ in range(rounds):
            for arm, run in arms.items():
                begin = time.perf_counter()
                run()
                times[arm].append(time.perf_counter() - begin)
        slow = statistics.median(times["svd"])
        for arm in arms:
            middle = statistics.median(times[arm])
            rows.append(
                {
                    "threads": threads, "spectrum": name, "optimal": float(best / total), "finder": arm,
                    "seconds": middle, "fastest": min(times[arm]), "times_faster": slow / middle,
                    "share_of_optimal": kept[arm],
                }
            )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "subspace_cpu.json")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.worker, args.rounds)))
        return
    import torch

    rows = []
    for threads in dict.fromkeys(args.threads):
        command = [sys.executable, __file__, "--worker", str(threads), "--rounds", str(args.rounds)]
        limits = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        rows += json.loads(subprocess.run(command, env=limits, check=True, capture_output=True, text=True).stdout)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    about = {"date": str(date.today()), "cpu": cpu, "torch": torch.__version__, "rounds": args.rounds,
             "load": os.getloadavg()[0], "shape": [ROWS, COLUMNS], "rank": RANK}  # fmt: skip
    args.json.parent.mkdir(exist_ok=True)
    args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    print("| threads | spectrum | finder | ms | × faster than svd | % of the optimal energy |")
    print("|--:|---|---|--:|--:|--:|")
    for row in rows:
        print(
            f"| {row['threads']} | {row['spectrum']} | {row['finder']} | {1000 * row['seconds']:.0f} | "
            f"{row['times_faster']:.1f} | {100 * row['share_of_optimal']:.2f} |"
        )


if __name__ == "__main__":
    main()
