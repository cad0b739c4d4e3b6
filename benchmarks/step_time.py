"""Whole training steps on one GPU, ours and the peers', in turns, against the best frozen floor of the run.

    PYTHONPATH=src python benchmarks/step_time.py run --shape 1.1B --out benchmarks/results/step_time.json
    python benchmarks/step_time.py table benchmarks/results/step_time*.json
    python benchmarks/step_time.py plot benchmarks/results/step_time*.json --out docs/img/step_time.png
    PYTHONPATH=src python benchmarks/step_time.py run --shape tiny --device cpu --rounds 3 --warmup 2
    PYTHONPATH=src python benchmarks/step_time.py block --shape 1.1B --device cpu --tokens 64 --arms 'LoRA r16*'
    PYTHONPATH=src python benchmarks/step_time.py loss --shape babyllama --out benchmarks/results/step_time_loss.json

Random weights in bf16, SDPA, every linear layer of every block adapted, dropout 0, no checkpointing, no clipping, the
same random tokens; B is not zero. A step is forward, loss, backward, optimizer (fused AdamW) and zero_grad. "Frozen"
is the gradient of the input alone: a floor, since every adapter needs it.

Every arm is a process of its own, because some peers patch classes of the process and compiled arms share the code of
a block. Processes build side by side (GPU work that is timed or tunes kernels under a lock); as many as fit into memory
stay, and one step each is timed in turns, the floor "frozen, blocks compiled" among them in every batch. "× best floor"
is the ratio to that floor in the same turns, over the ratio of the best floor. GiB: the most that was allocated in a
step, with weights and state. An arm that cannot be imported is left out, one that fails loses only itself; both are
kept in the results, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fnmatch
import importlib
import importlib.metadata
import json
import os
import queue
import statistics
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
PACKAGES = (
    "torch", "triton", "transformers", "peft", "liger_kernel", "unsloth", "unsloth_zoo", "trl", "bitsandbytes",
    "galore_torch",
)  # fmt: skip
REFERENCE = "frozen, blocks compiled"
PEERS = HERE.parent / ".peers"  # packages that only some peers' processes see, where there is such a folder
Events = queue.Queue[tuple["Worker", dict[str, Any]]]  # what processes say


# ---- one arm's process


def child() -> None:
    """Build the arm that the first line of the input names, then do what each further line says."""
    reply = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is for the log

    def say(**values: Any) -> None:
        print(json.dumps(values), file=reply, flush=True)

    spec = json.loads(sys.stdin.readline())
    try:
        if spec["first"]:
            importlib.import_module(spec["first"])
        import step_time_arms as arms

        if "curve" in spec:
            return say(curve=arms.curve(**spec["curve"]))
        arm = arms.ARMS[spec["arm"]]
        job = arms.Job(arms.SHAPES[spec["shape"]], spec["device"], tokens=spec.get("tokens"))
        if spec.get("block"):
            return say(block=arms.block(arm, job))
        served = arms.Served(arm, job, spec["warmup"])
        say(ready=served.ready())
    except ImportError as error:
        traceback.print_exc()
        return say(missing=f"{type(error).__name__}: {error}"[:400])
    except BaseException as error:  # the parent goes on with the others
        traceback.print_exc()
        return say(failed=f"{type(error).__name__}: {error}"[:600])
    for line in sys.stdin:
        order = json.loads(line)
        try:
            say(done=served.time(order["steps"]) if order["do"] == "time" else served.kernels())
        except BaseException as error:
            traceback.print_exc()
            return say(failed=f"{type(error).__name__}: {error}"[:600])
    return None


class Worker:
    """A process with one arm, and what it has said."""

    def __init__(self, arm: Any, spec: dict[str, Any], events: Events, locks: str):
        self.arm, self.name, self.began = arm, spec.get("arm", ""), time.monotonic()
        self.info: dict[str, Any] = {}
        self.samples: list[dict[str, float]] = []
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read when the process has ended
        environment = os.environ | {"STEP_TIME_LOCKS": locks} | (arm.environment if arm else {})
        if arm and arm.outside:
            path = os.environ.get("PYTHONPATH", "")
            environment["PYTHONPATH"] = os.pathsep.join([*path.split(os.pathsep), str(PEERS)])
        environment |= {
            "UNSLOTH_COMPILE_LOCATION": tempfile.gettempdir() + f"/unsloth_{os.getpid()}_{id(self)}",
            "TORCHINDUCTOR_COMPILE_THREADS": "4",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "step_time.py"), "child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log, text=True, env=environment, bufsize=1,
        )  # fmt: skip
        self.tell(spec)
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def tell(self, order: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended, and says so
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()

    def _listen(self, events: Events) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            events.put((self, json.loads(line)))
        events.put((self, {"failed": f"the process ended (code {self.process.wait()})"}))

    def dismiss(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended
            self.process.stdin.close()

    def end(self, log: Path | None) -> None:
        self.dismiss()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if log is not None:
            self.log.seek(0)
            with log.open("a") as file:
                file.write(f"==== {self.name}\n{self.log.read()[-20000:]}\n")
        self.log.close()


# ---- a run


class Bench:
    """Builds arms batch by batch, times them in turns, and keeps the result."""

    def __init__(self, options: argparse.Namespace):
        import step_time_arms as arms
        import torch

        self.options, self.arms, self.shape = options, arms, arms.SHAPES[options.shape]
        self.events: Events = queue.Queue()
        self.began = time.monotonic()
        self.locks = tempfile.mkdtemp(prefix="step_time_")
        self.clock = Clock()
        self.cuda = options.device.startswith("cuda")
        gpu = torch.cuda.get_device_properties(0) if self.cuda else None
        self.total = gpu.total_memory / 2**30 if gpu else float("inf")
        self.retried: set[str] = set()
        self.dead: dict[Worker, dict[str, Any]] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        self.result: dict[str, Any] = {
            "date": datetime.date.today().isoformat(), "gpu": gpu.name if gpu else "", "versions": versions(),
            "shape": options.shape, "layers": self.shape.layers, "tokens": self.shape.batch * self.shape.length,
            "sequences": self.shape.batch, "rounds": options.rounds, "steps_a_turn": options.turn,
            "warmup": options.warmup, "reference": REFERENCE, "arms": self.rows, "left_out": {}, "failed": {},
            "batches": [],
        }  # fmt: skip

    def spent(self) -> float:
        return time.monotonic() - self.began

    def note(self, text: str) -> None:
        print(f"{self.spent():6.0f} s  {text}", flush=True)

    def start(self, name: str) -> Worker:
        arm, options = self.arms.ARMS[name], self.options
        spec = {
            "arm": name, "shape": options.shape, "device": options.device, "warmup": options.warmup,
            "first": arm.first,
        }  # fmt: skip
        return Worker(arm, spec, self.events, self.locks)

    def wait(self, seconds: float) -> tuple[Worker, dict[str, Any]] | None:
        try:
            return self.events.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            return None

    def lose(self, worker: Worker, said: dict[str, Any]) -> None:
        kind = "left_out" if "missing" in said else "failed"
        why = said.get("missing") or said["failed"]
        self.result[kind][worker.name] = why
        self.note(f"{worker.name}: {kind.replace('_', ' ')}: {why}")

    def build(self, todo: list[str], held: list[Worker]) -> list[Worker]:
        """Arms of ``todo``, in order, as many as fit beside ``held``; what was begun is taken from the list."""
        building: list[Worker] = []
        ready: list[Worker] = []
        options, closed = self.options, False
        while True:
            while todo and not closed and len(building) < options.parallel:
                if self.spent() > options.deadline:
                    self.result["left_out"] |= dict.fromkeys(todo, "the time for building arms was over")
                    todo.clear()
                    break
                used = sum(w.info.get("reserved_gib", 0.0) + 0.8 for w in held + ready)
                used += sum(self.guess(w.name) for w in building)
                alone = todo[0] in self.retried
                if (building or ready) and (alone or used + self.guess(todo[0]) > 0.94 * self.total):
                    closed = True
                    break
                building.append(self.start(todo.pop(0)))
                closed = alone
            if not building:
                return ready
            oldest = min(building, key=lambda w: w.began)
            got = self.wait(oldest.began + options.build_limit - time.monotonic())
            said: dict[str, Any]
            if got is None:
                worker, said = oldest, {"failed": f"not ready in {options.build_limit:.0f} s"}
                worker.process.kill()
            else:
                worker, said = got
            if worker not in building:
                self.dead[worker] = said
                continue
            building.remove(worker)
            if "ready" in said:
                worker.info = said["ready"]
                ready.append(worker)
                memory = f", {worker.info['gib']:.1f} GiB" if "gib" in worker.info else ""
                self.note(f"{worker.name}: ready after {worker.info['built_s']:.0f} s{memory}")
            elif (
                "out of memory" in said.get("failed", "").lower()
                and worker.name not in self.retried
                and (held or ready or building)
            ):
                self.retried.add(worker.name)
                todo.append(worker.name)
                closed = True
                self.note(f"{worker.name}: no memory left beside the others; later, alone")
                worker.end(options.log)
            else:
                self.lose(worker, said)
                worker.end(options.log)

    def guess(self, name: str) -> float:
        return float(self.shape.guess * self.arms.ARMS[name].size)

    def ask(self, worker: Worker, order: dict[str, Any], seconds: float = 120) -> Any:
        """The answer, or None if the arm failed."""
        worker.tell(order)
        until = time.monotonic() + seconds
        if worker in self.dead:
            self.lose(worker, self.dead[worker])
            return None
        while True:
            got = self.wait(until - time.monotonic())
            if got is None:
                worker.process.kill()
                self.lose(worker, {"failed": f"a step took longer than {seconds:.0f} s"})
                return None
            if got[0] is worker:
                if "done" in got[1]:
                    return got[1]["done"]
                self.lose(worker, got[1])
                return None
            self.dead[got[0]] = got[1]  # ended while it was not its turn

    def turns(self, workers: list[Worker]) -> list[Worker]:
        """Times all in turns; those that came through."""
        for worker in workers:
            worker.samples = []
        for round_ in range(self.options.rounds):
            if self.spent() > self.options.deadline and round_ >= 10:
                break
            for worker in list(workers):
                done = self.ask(worker, {"do": "time", "steps": self.options.turn})
                if done is None:
                    workers.remove(worker)
                else:
                    worker.samples.append(done)
            self.clock.sample()
        return workers

    def record(self, workers: list[Worker], reference: list[Worker]) -> None:
        base = median(reference[0].samples, "ms") if reference else None
        batch: dict[str, Any] = {"arms": [w.name for w in workers], "reference_ms": base}
        self.result["batches"].append(batch | self.clock.report())
        for worker in workers:
            times = sorted(sample["ms"] for sample in worker.samples)
            row: dict[str, Any] = {
                "ms": statistics.median(times), "p10": times[len(times) // 10], "p90": times[len(times) * 9 // 10],
                "host_ms": median(worker.samples, "host_ms"), "wall_ms": median(worker.samples, "wall_ms"),
                "x_reference": statistics.median(times) / base if base else None, "rounds": len(times),
                "owner": worker.arm.owner, "arithmetic": worker.arm.arithmetic,
            }  # fmt: skip
            keys = ("gib", "resident_gib", "reserved_gib", "loss", "lowered", "built_s")
            row |= {key: worker.info[key] for key in keys if key in worker.info}
            kept = self.rows.get(worker.name)
            if kept is None:
                self.rows[worker.name] = row
            else:  # the reference, which is in every batch
                kept["ms"] = statistics.median(b["reference_ms"] for b in self.result["batches"])
        ratios(self.rows)
        for name in batch["arms"]:
            row = self.rows[name]
            memory = f"{row['gib']:7.2f} GiB" if "gib" in row else ""
            print(
                f"    {name:40} {row['ms']:8.2f} ms [{row['p10']:.2f}, {row['p90']:.2f}]  host {row['host_ms']:7.2f}"
                f"  × best floor {shown(row['x_floor'])}  {memory}",
                flush=True,
            )
        self.write()

    def kernels(self, workers: list[Worker]) -> None:
        for worker in workers:
            if worker.name not in self.rows or "launches" in self.rows[worker.name]:
                continue
            done = self.ask(worker, {"do": "kernels"})
            if done is None:
                continue
            text = done.pop("text")
            self.rows[worker.name] |= done
            with self.options.kernels.open("a") as file:
                file.write(f"{worker.name}: {done['launches']:.0f} launches, {done['kernel_ms']:.2f} ms\n{text}\n\n")
        self.write()

    def write(self) -> None:
        if self.options.out:
            self.options.out.parent.mkdir(parents=True, exist_ok=True)
            self.options.out.write_text(json.dumps(self.result, indent=1) + "\n")

    def run(self, names: list[str]) -> None:
        todo = [REFERENCE, *(name for name in names if name != REFERENCE)]
        for name in [name for name in todo if self.arms.ARMS[name].llama and self.shape.family != "llama"]:
            self.result["left_out"][name] = "it is for Llama's blocks"
            todo.remove(name)
        reference: list[Worker] = []
        while todo:
            batch = self.build(todo, reference)
            if not batch:
                continue
            workers = self.turns(reference + batch)
            reference = [worker for worker in workers if worker.name == REFERENCE]
            if workers:
                self.record(workers, reference)
            if self.options.kernels and self.cuda:
                self.kernels(workers)
            gone = [worker for worker in batch if worker not in reference]
            for worker in gone:
                worker.dismiss()
            for worker in gone:
                worker.end(self.options.log)
        for worker in reference:
            worker.end(self.options.log)
        self.write()


class Clock:
    """The GPU's clock and power, asked of the driver after each round."""

    def __init__(self) -> None:
        self.handle: Any = None
        self.seen: list[tuple[float, float, float]] = []
        try:
            import pynvml

            pynvml.nvmlInit()
            self.handle, self.nvml = pynvml.nvmlDeviceGetHandleByIndex(0), pynvml
        except Exception:  # no driver, or not its library: no clocks
            self.handle = None

    def sample(self) -> None:
        if self.handle is not None:
            nvml, handle = self.nvml, self.handle
            self.seen.append((
                nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
                nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
                nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            ))  # fmt: skip

    def report(self) -> dict[str, Any]:
        seen, self.seen = self.seen, []
        if not seen:
            return {}
        clocks, watts, degrees = zip(*seen, strict=True)
        return {
            "sm_mhz": statistics.median(clocks), "sm_mhz_min": min(clocks), "watts": statistics.median(watts),
            "celsius": max(degrees),
        }  # fmt: skip


def median(samples: list[dict[str, float]], key: str) -> float:
    return statistics.median(sample[key] for sample in samples)


def ratios(rows: dict[str, dict[str, Any]]) -> str | None:
    """Writes each row's ratio to the best floor; its name. Both were measured in turns with the same reference."""
    floors = {name: row["x_reference"] for name, row in rows.items() if row["owner"] == "floor" and row["x_reference"]}
    best = min(floors, key=lambda name: floors[name], default=None)
    for row in rows.values():
        row["x_floor"] = row["x_reference"] / floors[best] if best and row["x_reference"] else None
    return best


def shown(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form)


def versions() -> dict[str, str]:
    places = [str(PEERS), *reversed(sys.path)]  # the first on the path counts
    found = {d.name.replace("-", "_"): d.version for d in importlib.metadata.distributions(path=places)}
    import rankshift

    return {name: found[name] for name in PACKAGES if name in found} | {"rankshift": rankshift.__version__}


# ---- tables and plots


def merged(files: list[Path]) -> dict[str, dict[str, Any]]:
    """Results by shape. Of an arm that several files have, the last one's row counts."""
    shapes: dict[str, dict[str, Any]] = {}
    for file in files:
        result = json.loads(file.read_text())
        if "batches" not in result:
            continue
        into = shapes.setdefault(result["shape"], result | {"arms": {}, "left_out": {}, "failed": {}})
        for key in ("versions", "left_out", "failed", "arms"):
            into[key] = into[key] | result[key]
    for result in shapes.values():
        result["best"] = ratios(result["arms"])
        owners = ("floor", "ours", "peer")
        order = sorted(result["arms"].items(), key=lambda arm: (owners.index(arm[1]["owner"]), arm[1]["ms"]))
        result["arms"] = dict(order)
        for key in ("left_out", "failed"):
            result[key] = {name: why for name, why in result[key].items() if name not in result["arms"]}
    return shapes


def table(files: list[Path]) -> str:
    out = []
    for shape, result in merged(files).items():
        out.append(f"**{shape}**, {result['sequences']}×{result['tokens'] // result['sequences']} tokens, ")
        out[-1] += f"{result['gpu'] or 'CPU'}, {result['date']}; " + ", ".join(
            f"{name} {version}" for name, version in result["versions"].items()
        )
        groups = [
            ("", {n: r for n, r in result["arms"].items() if r["arithmetic"] == "bf16"}),
            ("base in fewer bits", {n: r for n, r in result["arms"].items() if r["arithmetic"] != "bf16"}),
        ]
        for title, rows in groups:
            if not rows:
                continue
            out.append("")
            out.append(f"| {title or 'arm'} | ms | p10–p90 | × best floor | GiB | host ms | kernels, ms | a block |")
            out.append("|---|--:|--:|--:|--:|--:|--:|--:|")
            for name, row in rows.items():
                bold = "**" if name == result["best"] else ""
                out.append(
                    f"| {bold}{name}{bold} | {row['ms']:.1f} | {row['p10']:.1f}–{row['p90']:.1f} "
                    f"| {shown(row['x_floor'])} | {shown(row.get('gib'), '.2f')} | {row['host_ms']:.1f} "
                    f"| {shown(row.get('kernel_ms'), '.1f')} | {shown(row.get('kernels_a_block'), '.0f')} |"
                )
        for key, title in (("left_out", "Left out"), ("failed", "Failed")):
            if result[key]:
                out.append("")
                out.append(f"{title}: " + "; ".join(f"{name} ({why[:120]})" for name, why in result[key].items()))
        out.append("")
    return "\n".join(out)


def plot(files: list[Path], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = merged(files)
    heights = [0.24 * len(result["arms"]) + 0.9 for result in shapes.values()]
    figure, axes = plt.subplots(
        len(shapes), 2, figsize=(11, sum(heights)), squeeze=False, layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    colours = {"floor": "#4d4d4d", "ours": "#1b7fb8", "peer": "#d9a441"}
    for (shape, result), (left, right) in zip(shapes.items(), axes, strict=True):
        rows = {name: row for name, row in result["arms"].items() if row["x_floor"]}
        rows = dict(sorted(rows.items(), key=lambda item: -item[1]["x_floor"]))
        shades = [colours[row["owner"]] for row in rows.values()]
        for axis, values, title in (
            (left, [row["x_floor"] for row in rows.values()], f"{shape}: time of a step × best frozen floor"),
            (right, [row.get("gib", 0.0) for row in rows.values()], "most memory in a step, GiB"),
        ):
            bars = axis.barh(list(rows), values, color=shades)
            axis.bar_label(bars, fmt="%.2f" if axis is left else "%.1f", padding=2, fontsize=7)
            axis.set_title(title, fontsize=9)
            axis.tick_params(labelsize=7)
            axis.margins(x=0.12, y=0.01)
            axis.spines[["top", "right"]].set_visible(False)
        left.axvline(1, color="black", linewidth=0.8)
        right.set_yticklabels([])
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


# ---- verbs


def gather(
    options: argparse.Namespace, specs: dict[str, dict[str, Any]], key: str, show: Callable[[Any], str]
) -> dict[str, Any]:
    """What one process for each spec answers, a few at a time."""
    import step_time_arms as arms

    events: Events = queue.Queue()
    locks = tempfile.mkdtemp(prefix="step_time_")
    todo, found = list(specs), {}
    running: list[Worker] = []
    while todo or running:
        while todo and len(running) < options.parallel:
            name = todo.pop(0)
            arm = arms.ARMS[name]
            running.append(Worker(arm, {"arm": name, "first": arm.first} | specs[name], events, locks))
        worker, said = events.get()
        if worker in running:
            running.remove(worker)
            worker.end(options.log)
            found[worker.name] = said.get(key) or said
            print(f"{worker.name:42} {show(said[key]) if key in said else said}", flush=True)
    return found


def block(options: argparse.Namespace) -> None:
    common = {"shape": options.shape, "device": options.device, "tokens": options.tokens, "block": True}

    def show(row: dict[str, float]) -> str:
        launches = f", {row['launches']:.0f} launches" if "launches" in row else ""
        return (
            f"a block: {row['saved_bytes_per_token'] / 1024:.2f} KiB kept a token and {row['saved_bytes'] / 2**20:.2f} "
            f"MiB{launches}"
        )

    found = gather(options, dict.fromkeys(chosen(options), common), "block", show)
    write(options, {"shape": options.shape, "tokens": options.tokens, "block": found})


def loss(options: argparse.Namespace) -> None:
    import step_time_arms as arms

    specs = {
        name: {
            "curve": {
                "name": name, "shape": options.shape, "device": options.device, "steps": options.steps,
                "lr": options.lr, "seed": 0,
            }
        }
        for name in arms.LOSS_ARMS
    }  # fmt: skip
    found = gather(options, specs, "curve", lambda row: f"{row['seconds']:.0f} s")
    curves = {name: row["losses"] for name, row in found.items() if "losses" in row}
    wanted = smooth(curves[next(iter(arms.LOSS_ARMS))])
    apart = {}
    for name, curve in curves.items():
        off = [abs(a - b) for a, b in zip(smooth(curve), wanted, strict=True)]
        apart[name] = {"first": curve[0], "last": smooth(curve)[-1], "largest_difference": max(off)}
        print(f"{name:24} {curve[0]:.4f} → {smooth(curve)[-1]:.4f}, at most {max(off):.4f} from PEFT's")
    write(options, {
        "shape": options.shape, "steps": options.steps, "lr": options.lr, "smoothed_over": 20, "curves": apart,
        "arms": found,
    })  # fmt: skip


def smooth(curve: list[float], over: int = 20) -> list[float]:
    """Means of the last ``over`` values."""
    return [statistics.mean(curve[max(0, at - over + 1) : at + 1]) for at in range(len(curve))]


def write(options: argparse.Namespace, result: dict[str, Any]) -> None:
    if options.out:
        head = {"date": datetime.date.today().isoformat(), "versions": versions(), "device": options.device}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(head | result, indent=1) + "\n")


def chosen(options: argparse.Namespace) -> list[str]:
    """The arms that the patterns name, pattern by pattern; a pattern after a "!" leaves arms out."""
    import step_time_arms as arms

    names: dict[str, None] = {}
    for pattern in [p for p in options.arms if p[0] != "!"]:
        names |= dict.fromkeys(fnmatch.filter(arms.ARMS, pattern))
    for pattern in [p[1:] for p in options.arms if p[0] == "!"]:
        names = {name: None for name in names if not fnmatch.fnmatch(name, pattern)}
    if not names:
        raise SystemExit(f"no arm is named {options.arms}; step_time.py list names them")
    return list(names)


def main() -> None:
    if sys.argv[1:] == ["child"]:
        child()
        sys.stderr.flush()
        os._exit(0)  # at once: the next arms wait for the memory
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="the arms")
    for verb in ("run", "block", "loss"):
        sub = verbs.add_parser(verb)
        sub.add_argument("--shape", default="babyllama" if verb == "loss" else "1.1B")
        sub.add_argument("--device", default="cuda")
        sub.add_argument(
            "--parallel", type=int, default=1 if verb == "loss" else 5, help="processes that build at once"
        )
        sub.add_argument("--log", type=Path, help="what the processes print")
        sub.add_argument("--out", type=Path)
        if verb != "loss":
            sub.add_argument("--arms", nargs="*", default=["*"], help="patterns, in this order; !pattern leaves out")
        if verb == "run":
            sub.add_argument("--rounds", type=int, default=30)
            sub.add_argument("--turn", type=int, default=1, help="steps a turn, timed together")
            sub.add_argument("--warmup", type=int, default=10)
            sub.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which none is begun")
            sub.add_argument("--build-limit", type=float, default=300, help="seconds that an arm may take to be ready")
            sub.add_argument("--kernels", type=Path, help="also count launches; the longest kernels go to this file")
        elif verb == "block":
            sub.add_argument("--tokens", type=int, help="one sequence of so many instead of the shape's batch")
        else:
            sub.add_argument("--steps", type=int, default=200)
            sub.add_argument("--lr", type=float, default=2e-3)
    for verb in ("table", "plot"):
        sub = verbs.add_parser(verb)
        sub.add_argument("files", nargs="+", type=Path)
        if verb == "plot":
            sub.add_argument("--out", type=Path, default=HERE.parent / "docs/img/step_time.png")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE))
    if options.verb == "list":
        import step_time_arms as arms

        print("\n".join(arms.ARMS))
    elif options.verb == "run":
        Bench(options).run(chosen(options))
    elif options.verb == "block":
        block(options)
    elif options.verb == "loss":
        loss(options)
    elif options.verb == "table":
        print(table(options.files))
    else:
        plot(options.files, options.out)


if __name__ == "__main__":
    main()
