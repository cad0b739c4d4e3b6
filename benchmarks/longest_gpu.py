# mypy: ignore-errors
"""The longest sequence that trains, ours and the peers', each with what it has against memory.

    PYTHONPATH=src python benchmarks/longest_gpu.py --gib 20 --out benchmarks/results/longest_gpu.json
    PYTHONPATH=src python benchmarks/longest_gpu.py --gib 0 --arms ours --tokens 262144 --most 262144 --steps 1
    PYTHONPATH=src python benchmarks/longest_gpu.py --toy

One sequence, LoRA r16 on every linear layer of a Llama of 8 B parameters in bf16 with random weights, fused AdamW. The
arms are processes of their own, side by side; --gib bounds each to a part of the GPU, as if it were a smaller one, so
that steps of its longest sequence are short. A process takes steps at two short lengths with as little memory as it
can; memory grows in a straight line from there, which says where it ends. There it takes --steps steps, and goes up or
down until the longest length that trained and the shortest that did not are within --within of each other.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PEERS = HERE.parent / ".peers"
ARMS = {
    "ours": "rankshift LoRA, lowered, memory_budget=auto",
    "peft": "PEFT LoRA bf16, gradient checkpointing",
    "unsloth": "Unsloth LoRA, its checkpointing",
}
SHORT = {"ours": (8192, 16384), "peft": (512, 1024), "unsloth": (6144, 12288)}  # past where the loss takes the most
EVEN = 256  # lengths are multiples of this


# ---- one arm's process


def built(arm: str, job: Any) -> tuple[Any, Callable[[str], str | None]]:
    """A step, and what prepares the next ones: as frugal as it can be, or as it would choose; it says what it chose."""
    import step_time_arms as arms

    if arm == "ours":
        import rankshift as rs

        model = job.model()
        run = rs.attach(model, rs.LoRA(targets=tuple(arms.targets(model)), rank=16))
        arms.fill({name: (adapter.A, adapter.B) for name, adapter in run.adapter().items()}, 0.01)
        step = arms.stepper(job, model, run.optimizer(lr=1e-4))
        report = run.lower()

        def prepare(how: str) -> str | None:
            nonlocal report
            said = report.memory
            report = run.lower(memory_budget="auto" if how == "auto" and job.device != "cpu" else "1KiB")
            return said

        return step, prepare
    if arm == "peft":
        step = arms.peft(job, "LoRA", 16, "bf16")
        step.model.enable_input_require_grads()
        step.model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        step = arms.unsloth(job, False, "unsloth")
    return step, lambda how: None


class Tries:
    """Steps of one arm at some lengths."""

    def __init__(self, arm: str, options: dict[str, Any]):
        import step_time_arms as arms
        import torch

        self.torch, self.options, self.cuda = torch, options, options["device"] == "cuda"
        self.saved_bytes = arms.saved_bytes
        if self.cuda:
            total = torch.cuda.get_device_properties(0).total_memory
            self.limit = int(options["gib"] * 2**30) or torch.cuda.mem_get_info()[0]
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.limit / total))
        else:
            self.limit = int(options["gib"] * 2**30)
        shape = arms.SHAPES[options["shape"]]
        self.vocabulary = shape.config["vocab_size"]
        job = arms.Job(arms.dataclasses.replace(shape, length=options["most"]), options["device"], tokens=EVEN)
        self.step, self.prepare = built(arm, job)

    def set(self, tokens: int) -> None:
        draw = self.torch.Generator().manual_seed(1)
        ids = self.torch.randint(3, self.vocabulary, (1, tokens), generator=draw).to(self.options["device"])
        for name in self.step.batch:
            self.step.batch[name] = ids

    def clean(self) -> None:
        self.step.optimizer.zero_grad()
        gc.collect()
        if self.cuda:
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()

    def run(self, tokens: int, steps: int) -> dict[str, Any]:
        """Whether it trains, how long a step takes, and bytes."""
        self.clean()
        self.set(tokens)
        began, bytes_ = time.perf_counter(), 0
        try:
            for _ in range(steps):
                if self.cuda:
                    loss = self.step()
                else:
                    bytes_ = self.saved_bytes(self.step)
                    if bytes_ > self.limit:
                        raise RuntimeError("more is kept than may be")
            if self.cuda:
                self.torch.cuda.synchronize()
                assert self.torch.isfinite(loss)
        except RuntimeError as error:
            if not any(words in str(error) for words in ("out of memory", "ALLOC_FAILED", "more is kept")):
                raise
            said = {"tokens": tokens, "fits": False, "why": str(error)[:160]}
        else:
            said = {"tokens": tokens, "fits": True}
        said["s_a_step"] = (time.perf_counter() - began) / steps
        if self.cuda:
            bytes_ = self.torch.cuda.max_memory_reserved()
        self.clean()
        return said | {"gib": bytes_ / 2**30}


def child() -> None:
    """Say every try as a line of JSON."""
    reply = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    options = json.loads(sys.stdin.readline())
    arm = options["arm"]

    def say(**values: Any) -> None:
        print(json.dumps(values), file=reply, flush=True)

    try:
        if arm == "unsloth":
            import unsloth  # noqa: F401  before all others
        tries = Tries(arm, options)
        tries.prepare("frugal")
        tries.run(EVEN, 2)  # state of the optimizer, kernels
        lengths = options["short"] or SHORT[arm]
        while True:
            short = [tries.run(tokens, 1) for tokens in lengths]
            for one in short:
                say(short=one)
            if all(one["fits"] for one in short):
                break
            lengths = [tokens // 2 for tokens in lengths]
            if lengths[0] < EVEN:
                return
        (t, a), (u, b) = ((one["tokens"], one["gib"] * 2**30) for one in short)
        slope = (b - a) / (u - t)
        end = (0.985 * tries.limit - a) / slope + t
        say(line={"mb_a_token": slope / 1e6, "gib_at_none": (a - slope * t) / 2**30, "ends_at": end})
        search(tries, options, int(end), say)
    except ImportError as error:
        traceback.print_exc()
        say(missing=f"{type(error).__name__}: {error}"[:300])
    except BaseException as error:
        traceback.print_exc()
        say(failed=f"{type(error).__name__}: {error}"[:500])


def search(tries: Tries, options: dict[str, Any], end: int, say: Callable[..., None]) -> None:
    low, high = 0, options["most"] + 1
    tokens, left = min(options["tokens"] or end, options["most"]) // EVEN * EVEN, options["tries"]
    while left and tokens > low:
        tries.prepare("auto")
        found = tries.run(tokens, options["steps"])
        say(one=found, plan=tries.prepare("auto"))
        if found["fits"]:
            low = tokens
        else:
            high = tokens
        left -= 1
        if low and high / low < 1 + options["within"]:
            return
        up = int(low * (1 + 2 * options["within"])) if low else int(high * (1 - 2 * options["within"]))
        tokens = (up if not low or up < high else (low + high) // 2) // EVEN * EVEN
        if tokens >= high or (options["tokens"] and found["fits"]):
            return


# ---- all arms


def follow(arm: str, options: dict[str, Any], row: dict[str, Any], began: float) -> None:
    """Start a process, and note what it says until it ends or its time is over."""
    import step_time_arms as arms

    environment = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    if arm == "unsloth":
        environment |= arms.ARMS["Unsloth LoRA r16, its checkpointing"].environment
        environment["UNSLOTH_COMPILE_LOCATION"] = tempfile.gettempdir() + f"/unsloth_{os.getpid()}"
        environment["PYTHONPATH"] = os.pathsep.join([*os.environ.get("PYTHONPATH", "").split(os.pathsep), str(PEERS)])
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), "child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            text=True, env=environment,
        )  # fmt: skip
        process.stdin.write(json.dumps(options | {"arm": arm}) + "\n")
        process.stdin.close()
        timer = threading.Timer(options["limit"], process.kill)
        timer.start()
        for line in process.stdout:
            said = json.loads(line)
            print(f"{time.monotonic() - began:5.0f} s  {arm}: {shown(said)}", flush=True)
            for name in ("short", "one"):
                if name in said:
                    row["tries" if name == "one" else name].append(said[name] | {"plan": said.get("plan")})
            row |= {name: said[name] for name in ("line", "missing", "failed") if name in said}
        if process.wait() == -9:
            row["stopped"] = f"after {options['limit']:.0f} s"
        timer.cancel()
        if "failed" in row or options["log"]:
            log.seek(0)
            print(log.read()[-3000:], flush=True)
    fitted = [one for one in row["tries"] if one["fits"]]
    row["longest"] = max((one["tokens"] for one in fitted), default=None)
    row["shortest_that_did_not_fit"] = min((one["tokens"] for one in row["tries"] if not one["fits"]), default=None)


def shown(said: dict[str, Any]) -> str:
    one = said.get("one") or said.get("short")
    if one is None:
        return json.dumps(said)
    plan = f"; {said['plan']}" if said.get("plan") else ""
    did = "trains" if one["fits"] else "does not fit"
    return f"{one['tokens']:,} tokens {did}, {one['gib']:.2f} GiB, {one['s_a_step']:.2f} s a step{plan}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=20.0, help="of the GPU, for each arm; 0: all of it")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--shape", default="8B")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--within", type=float, default=0.03)
    parser.add_argument("--short", type=int, nargs=2, help="lengths that surely fit")
    parser.add_argument("--tokens", type=int, help="try this length, and shorter ones if it does not fit")
    parser.add_argument("--most", type=int, default=2**17, help="the longest to try")
    parser.add_argument("--limit", type=float, default=200, help="seconds for each arm")
    parser.add_argument("--serial", action="store_true", help="one arm after the other")
    parser.add_argument("--log", action="store_true", help="print what processes wrote")
    parser.add_argument("--toy", action="store_true", help="on the CPU: a tiny model; bytes are those autograd keeps")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = "cpu" if options.toy else "cuda"
    if options.toy:
        options.shape, options.gib, options.arms, options.most = "tiny", 0.003, ["ours", "peft"], 8192
        options.short = [256, 512]
    words = vars(options) | {"device": device}
    told = {name: value for name, value in words.items() if name not in ("out", "toy")}
    began, rows, threads = time.monotonic(), {}, []
    for arm in options.arms:
        rows[arm] = {"what": ARMS[arm], "short": [], "tries": []}
        threads.append(threading.Thread(target=follow, args=(arm, told, rows[arm], began)))
        threads[-1].start()
        if options.serial:
            threads[-1].join()
    for thread in threads:
        thread.join()
    base = rows.get("peft", {}).get("longest")
    for arm, row in rows.items():
        if base and row["longest"]:
            row["x_peft"] = row["longest"] / base
        more = f", {row['x_peft']:.2f} × PEFT's" if "x_peft" in row else ""
        print(f"{ARMS[arm]:45} {row['longest'] or 0:9,} tokens{more}")
    if options.out:
        import torch
        from step_time import versions

        gpu = torch.cuda.get_device_name() if device == "cuda" else ""
        head = {"date": datetime.date.today().isoformat(), "gpu": gpu, "versions": versions()}
        kept = {name: words[name] for name in ("gib", "shape", "steps", "within")}
        options.out.write_text(json.dumps(head | kept | {"arms": rows}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["child"]:
        child()
    else:
        main()
