"""PreLoRA on vision transformers: a step of its three stages on one GPU, and whole trainings on CIFAR-10.

    PYTHONPATH=src python benchmarks/prelora_vit.py step --images .img --out benchmarks/results/prelora_step.json
    PYTHONPATH=src python benchmarks/prelora_vit.py kernels --images .img --out benchmarks/results/prelora_kernels.json
    PYTHONPATH=src python benchmarks/prelora_vit.py cifar --images .img --out benchmarks/results/prelora_cifar.json
    python benchmarks/prelora_vit.py plot --results benchmarks/results/prelora_cifar.json --out docs/img/…png

``--images``: a folder with cifar10_train.npz.xz and cifar10_test.npz.xz (10,000 and 2,000 real images of 32 × 32, as
differences along rows that compress well; see images()).

"step": ViT-Large/16 at 224 × 224 with random weights, fp32 weights under bf16 autocast; the images are enlarged. Every
arm is built alone (peak memory: weights, states, gradients and activations of a whole step), then their steps are taken
in turns, at one batch size, in one process. Every linear layer but the head has an adapter of the same rank, the most
that the ladder gives; with PaCA there is no joint stage. Windows of the full stage do not end here, as they seldom do
in a training. Nothing is added to any time.

"kernels": what GPU kernels of such steps take by torch's profiler, and with nothing trained but the embeddings.

"cifar": a ViT of 6 layers, d 192, patches of 4 × 4, from scratch; random crops and flips; AdamW, warm-up of 5 % and a
cosine to 0 over the whole run, which goes on through all stages. The learning rates of full training and of LoRA are
the best of two each, on 1,000 images held out of the training set. τ and ζ = 5 τ are such that the test, on what the
full training of seed 0 looked like, fires nearest to the middle of it; all seeds then use these. Arms:

    full           every weight, to the end
    prelora        switched by the test, ranks by the ladder
    uniform rank   the same with one rank for all layers
    random time    the same as prelora, but switched at a random time between 10 and 90 %
    LoRA           from the start, everything that has no adapter trains too
    same compute   full training of so many updates as cost what prelora's did (matrix products of adapted layers),
                   along a schedule of that length; stopped without that is in full's curve
"""

from __future__ import annotations

import argparse
import datetime
import gc
import io
import json
import lzma
import math
import random
import statistics
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import rankshift as rs

NEVER = 10**9  # percent that nothing changes by; a window that nothing reaches


def images(directory: Path, part: str) -> tuple[Tensor, Tensor]:
    """(N, 3, 32, 32) uint8 RGB, and (N,) labels."""
    with np.load(io.BytesIO(lzma.open(directory / f"cifar10_{part}.npz.xz").read())) as file:
        x, y = np.cumsum(file["delta"], -1, dtype=np.uint8), file["y"]
    x[:, 0] += x[:, 1]
    x[:, 2] += x[:, 1]
    return torch.from_numpy(x), torch.from_numpy(y.astype(np.int64))


def scaled(x: Tensor) -> Tensor:
    """uint8 → float of mean about 0 and deviation about 1."""
    return (x.float() / 255 - 0.47) / 0.25


def vit(labels: int, **shape: int) -> nn.Module:
    config = transformers.ViTConfig(num_labels=labels, attn_implementation="sdpa", **shape)
    return transformers.ViTForImageClassification(config).train()


def on_to(run: rs.Run, **options: Any) -> tuple[rs.Run, Any] | None:
    """The next phase and its optimizer, if it is time."""
    method = run.due()
    if method is None:
        return None
    run = run.shift(method)
    return run, run.optimizer(**options)


# ---- one step --------------------------------------------------------------------------------------------------------

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}  # to try


class Arm:
    """A model in one stage, and its steps."""

    def __init__(
        self, shape: dict[str, int], stage: str, then: rs.Method, quantise: Any, pixels: Tensor, labels: Tensor,
        compiled: bool,
    ):  # fmt: skip
        self.pixels, self.labels = pixels, labels
        torch.manual_seed(0)
        with torch.device(pixels.device):
            self.model = vit(1000, image_size=224, patch_size=16, **shape)
        self.run: rs.Run | None = None
        if stage == "AdamW":  # plain torch
            self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=pixels.is_cuda)
        else:
            method = rs.PreLoRA(
                then=then, min_rank=then.rank, max_rank=then.rank, window=NEVER if stage == "full" else 1, windows=2,
                joint=0 if isinstance(then, rs.PaCA) else NEVER if stage == "joint" else 1,
                minimum=NEVER if stage == "full" else 0, weight_change=NEVER, loss_change=NEVER,
                quantise=quantise,
            )  # fmt: skip
            self.run = rs.attach(self.model, method)
            self.optimizer = self.run.optimizer(lr=1e-4)
            while self.run.method.stage != stage:
                self.step(slice(2))
                if (after := on_to(self.run, lr=1e-4)) is not None:
                    self.run, self.optimizer = after
        if compiled:
            for layer in self.model.vit.layers:
                layer.compile()

    def step(self, part: slice = slice(None)) -> None:
        pixels, labels = self.pixels[part], self.labels[part]
        with torch.autocast(pixels.device.type, torch.bfloat16):
            loss = F.cross_entropy(self.model(pixels).logits.float(), labels)
        if self.run is not None:
            loss = self.run.loss(loss)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def trainable(self) -> tuple[int, int]:
        """(trainable, total) parameters."""
        parameters = list(self.model.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def once(arm: Arm | Frozen) -> float:
    """Milliseconds of one step."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        arm.step()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    arm.step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def steps(options: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # arms share the code of a layer
    torch._dynamo.config.automatic_dynamic_shapes = False  # the second arm's code is as good as the first's
    began = time.perf_counter()
    shape = SMALL if options.toy else LARGE
    then = [
        (rs.PaCA(rank=int(r)) if m == "paca" else rs.LoRA(rank=int(r), alpha=2 * int(r)), *(kind or [None]))
        for m, r, *kind in options.then
    ]
    wanted = [(stage, then[0][0], None) for stage in ("AdamW", "full", "joint")]
    wanted += [("frozen", method, kind) for method, kind in then]
    x, _ = images(options.images, "train")
    tables: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for compiled in [True, False] if options.compile == "both" else [options.compile == "yes"]:
        for size in options.batches:
            torch.manual_seed(0)
            pixels = F.interpolate(scaled(x[:size].to(device)), 224, mode="bicubic")
            labels = torch.randint(1000, (size,), device=device)
            arms: dict[str, Arm] = {}
            rows: dict[str, dict[str, Any]] = {}
            for stage, method, kind in wanted:
                if time.perf_counter() - began > options.deadline:
                    break
                gc.collect()
                if device == "cuda":
                    torch.cuda.empty_cache()
                before = torch.cuda.memory_allocated() if device == "cuda" else 0
                name = stage if stage in ("AdamW", "full") else f"{stage}, {type(method).__name__} r {method.rank}"
                name += "" if kind is None else f", {kind}"
                try:
                    arm = Arm(shape, stage, method, kind, pixels, labels, compiled)
                    for _ in range(3):
                        arm.step()
                except Exception as error:  # the other arms are still worth their time
                    print(f"{name}: failed, {type(error).__name__}: {error}", flush=True)
                    failed.append({"arm": name, "batch": size, "compiled": compiled, "error": str(error)})
                    continue
                arms[name] = arm
                synchronize()
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                arm.step()
                synchronize()
                rows[name] = {"stage": stage, "rank": method.rank}
                rows[name]["trainable"], rows[name]["parameters"] = arm.trainable()
                if device == "cuda":
                    rows[name]["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
                    rows[name]["resident_gib"] = (torch.cuda.memory_allocated() - before) / 2**30
            times: dict[str, list[float]] = {name: [] for name in arms}
            for _ in range(options.rounds):
                for name, arm in arms.items():
                    times[name].append(once(arm))
            print(f"\nbatch {size}, blocks {'compiled' if compiled else 'eager'}; ratios to full")
            for name, row in rows.items():
                sample = sorted(times[name])
                row["ms"] = statistics.median(sample)
                row["p10"], row["p90"] = sample[len(sample) // 10], sample[len(sample) * 9 // 10]
            for name, row in rows.items():
                full = rows.get("full", row)
                row["x_full"] = row["ms"] / full["ms"]
                row["x_full_memory"] = row.get("peak_gib", 1) / full.get("peak_gib", 1)
                print(
                    f"{name:28} {row['ms']:8.1f} ms (p10 {row['p10']:.1f}, p90 {row['p90']:.1f}) × {row['x_full']:.3f}"
                    f"   {row.get('peak_gib', 0):7.2f} GiB × {row['x_full_memory']:.3f}   trainable "
                    f"{row['trainable'] / 1e6:6.1f} M = {100 * row['trainable'] / row['parameters']:.1f} %",
                    flush=True,
                )
            tables.append({"batch": size, "compiled": compiled, "arms": rows})
            arms.clear()
            del arm
            torch._dynamo.reset()
            result = {"shape": shape, "image": 224, "rounds": options.rounds, "tables": tables, "failed": failed}
            written(options.out, result)


class Frozen:
    """No adapter: the gradient goes through all layers to the embeddings, which no optimizer follows."""

    def __init__(self, shape: dict[str, int], pixels: Tensor, labels: Tensor):
        self.pixels, self.labels = pixels, labels
        torch.manual_seed(0)
        with torch.device(pixels.device):
            self.model = vit(1000, image_size=224, patch_size=16, **shape).requires_grad_(False)
        self.model.vit.embeddings.requires_grad_(True)
        for layer in self.model.vit.layers:
            layer.compile()

    def step(self) -> None:
        with torch.autocast(self.pixels.device.type, torch.bfloat16):
            loss = F.cross_entropy(self.model(self.pixels).logits.float(), self.labels)
        loss.backward()
        self.model.zero_grad()


def profiled(arm: Arm | Frozen, listed: int) -> dict[str, Any]:
    for _ in range(5):
        arm.step()
    ms = statistics.mean(once(arm) for _ in range(5))
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as seen:
        for _ in range(2):
            arm.step()
        synchronize()
    rows = [e for e in seen.key_averages() if e.device_type.name == "CUDA" and e.self_device_time_total > 0]
    rows = [e for e in rows if "#" not in e.key or "lambda" in e.key]  # else a range of code
    rows.sort(key=lambda e: -e.self_device_time_total)
    return {
        "ms": ms,
        "kernels": sum(e.count for e in rows) / 2,
        "kernel_ms": sum(e.self_device_time_total for e in rows) / 2e3,
        "top": [
            {"ms": e.self_device_time_total / 2e3, "count": e.count / 2, "kernel": e.key[:120]} for e in rows[:listed]
        ],
    }


def kernels(options: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("kernels: needs a GPU, whose kernels the profiler lists")
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.automatic_dynamic_shapes = False
    shape = SMALL if options.toy else LARGE
    pixels = F.interpolate(scaled(images(options.images, "train")[0][: options.batch].to("cuda")), 224, mode="bicubic")
    labels = torch.randint(1000, (options.batch,), device="cuda")
    lora, paca = rs.LoRA(rank=16, alpha=32), rs.PaCA(rank=64)
    rows = {}
    for name, stage, method in (
        ("frozen, no adapter", None, lora),
        ("full", "full", lora),
        ("frozen, PaCA r 64", "frozen", paca),
        ("frozen, LoRA r 16", "frozen", lora),
    ):
        arm = Arm(shape, stage, method, None, pixels, labels, True) if stage else Frozen(shape, pixels, labels)
        row = rows[name] = profiled(arm, options.listed)
        print(f"{name:20} {row['ms']:7.1f} ms, {row['kernels']:.0f} kernels of {row['kernel_ms']:.1f} ms", flush=True)
        del arm
        gc.collect()
        torch.cuda.empty_cache()
        torch._dynamo.reset()
        written(options.out, {"shape": shape, "image": 224, "batch": options.batch, "compiled": True, "arms": rows})


# ---- whole trainings -------------------------------------------------------------------------------------------------

SIX = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
TWO = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}  # to try
UNIFORM, LEAST, MOST = 16, 4, 32
REST = ("embeddings", "layernorm_before", "layernorm_after", "layernorm", "classifier")
LRS = {"full": (5e-4, 1e-3), "LoRA": (1e-3, 3e-3)}


def augmented(x: Tensor, at: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of 32 × 32 of (N, 3, 40, 40) at these indices, half of them mirrored."""
    device, size = x.device, len(at)
    span = torch.arange(32, device=device)
    top, left = torch.randint(9, (2, size, 1), generator=generator, device=device)
    mirrored = torch.rand((size, 1), generator=generator, device=device) < 0.5
    rows, columns = top + span, left + torch.where(mirrored, 31 - span, span)
    return x[at[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def method_of(arm: str, updates: int, seed: int, window: int, share: float, tau: float) -> rs.Method:
    lora = rs.LoRA(rank=UNIFORM, alpha=2 * UNIFORM)
    common = {"then": lora, "window": window, "windows": 3, "joint": max(1, int(share * updates))}
    if arm in ("full", "same compute"):
        return rs.PreLoRA(**common | {"minimum": NEVER})  # it looks, and never switches
    if arm == "LoRA":
        return rs.LoRA(rank=UNIFORM, alpha=2 * UNIFORM, modules_to_save=REST)
    if arm == "random time":
        when = int(random.Random(f"time {seed}").uniform(0.1, 0.9) * updates)
        ranks = {"min_rank": LEAST, "max_rank": MOST}
        return rs.PreLoRA(**common, **ranks, minimum=when, weight_change=NEVER, loss_change=NEVER)
    least, most = (UNIFORM, UNIFORM) if arm == "uniform rank" else (LEAST, MOST)
    return rs.PreLoRA(**common, min_rank=least, max_rank=most, weight_change=tau, loss_change=5 * tau)


def cost(run: rs.Run) -> float:
    """Multiply-adds of a step in the matrix products of linear layers, over those of full training."""
    spent = full = 0.0
    adapters = run.adapter() if run.adapters and run.sites else {}
    layers = {n: p for n, p in run.model.named_parameters() if p.dim() == 2 and ("proj" in n or "fc" in n)}
    for name, weight in layers.items():
        if name.endswith((".A", ".B")) or ".adapters." in name:
            continue
        out, into = weight.shape
        full += 6 * out * into
        spent += (6 if weight.requires_grad else 4) * out * into
    for adapter in adapters.values():
        spent += 6 * adapter.rank * (adapter.out_features + adapter.in_features)
    return spent / full


def train(job: dict[str, Any]) -> dict[str, Any]:
    """One run."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arm, seed, updates, lr = job["arm"], job["seed"], job["updates"], job["lr"]
    size, evaluations = job["batch"], job["evaluations"]
    x, y = images(Path(job["images"]), "train")
    x_test, y_test = images(Path(job["images"]), "test")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    if job["probe"]:  # what chooses a learning rate is no test image
        x_test, y_test = x[order[-1000:]], y[order[-1000:]]
        x, y = x[order[:-1000]], y[order[:-1000]]
    x, y, x_test, y_test = (t.to(device) for t in (x, y, x_test, y_test))
    x, x_test = F.pad(scaled(x), (4,) * 4), scaled(x_test)
    torch.manual_seed(seed)
    model = vit(10, image_size=32, patch_size=4, **(TWO if job["toy"] else SIX)).to(device)
    method = method_of(arm, updates, seed, job["window"], job["joint"], job["tau"])
    run = rs.attach(model, method, seed=seed)  # no total: "full" looks to the last window
    options = {"lr": lr, "weight_decay": 0.05, "decay": lambda _, tensor: tensor.dim() > 1}
    optimizer = run.optimizer(**options)
    warm = max(1, updates // 20)
    generator = torch.Generator(device).manual_seed(seed)

    def loss_of(pixels: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(pixels).logits
        return F.cross_entropy(logits.float(), labels)

    @torch.no_grad()
    def accuracy() -> float:
        model.eval()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            parts = zip(x_test.split(500), y_test.split(500), strict=True)
            hits = [(model(pixels).logits.argmax(-1) == labels).sum() for pixels, labels in parts]
        model.train()
        return 100 * torch.stack(hits).sum().item() / len(y_test)

    curve, seen, snapshots = [], [], []
    stages = [{"method": run.method.name, "from": 0, "cost": cost(run), "trainable": count(run)}]
    stages[0]["stage"] = getattr(run.method, "stage", "")
    spent, at = 0.0, torch.empty(0, dtype=torch.long, device=device)
    ranks: dict[str, int] = {}
    synchronize()
    start = time.perf_counter()
    for step in range(updates):
        now = lr * (
            (step + 1) / warm if step < warm else 0.5 + 0.5 * math.cos(math.pi * (step - warm) / (updates - warm))
        )
        for group in optimizer.param_groups:
            group["lr"] = now
        if len(at) < size:
            at = torch.randperm(len(x), generator=generator, device=device)
        part, at = at[:size], at[size:]
        loss = run.loss(loss_of(augmented(x, part, generator), y[part]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in run.trainable()], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.detach())
        spent += stages[-1]["cost"]
        if run.watch is not None and (step + 1) % job["window"] == 0:
            snapshots.append(run.watch.snapshots[-1].to_mapping())
        if step + 1 == updates or (step + 1) % max(1, updates // evaluations) == 0:
            row = {"step": step + 1, "train": torch.stack(seen).mean().item(), "test": accuracy(), "cost": spent}
            curve.append(row)
            seen = []
            if not math.isfinite(row["train"]):
                break
        if step + 1 < updates and (after := on_to(run, **options)) is not None:
            before = accuracy()
            run, optimizer = after
            ranks = {site: adapter.rank for site, adapter in run.adapter().items()}
            stages.append({
                "method": "prelora", "stage": run.method.stage, "from": step + 1, "cost": cost(run),
                "trainable": count(run), "test": before,
            })  # fmt: skip
    synchronize()
    return {
        "arm": arm, "seed": seed, "lr": lr, "probe": job["probe"], "updates": updates, "tau": job["tau"],
        "test": curve[-1]["test"], "train": curve[-1]["train"], "cost": spent, "stages": stages, "ranks": ranks,
        "switched": stages[1]["from"] / updates if len(stages) > 1 else None,
        "seconds": time.perf_counter() - start, "curve": curve,
        "snapshots": snapshots if arm == "full" and seed == 0 else [],  # what τ is chosen by
    }  # fmt: skip


def count(run: rs.Run) -> int:
    return sum(p.numel() for _, p in run.trainable())


def fires(snapshots: list[dict[str, Any]], tau: float) -> int | None:
    """The update after which the test would first have fired; None: never."""
    from rankshift.core.watch import Snapshot, converged

    seen = [Snapshot.from_mapping(values) for values in snapshots]
    return next((s.step for i, s in enumerate(seen) if converged(seen[: i + 1], 3, 5 * tau, tau)), None)


def calibrated(snapshots: list[dict[str, Any]], updates: int) -> float:
    """τ for which the test fires nearest to the middle."""
    grid = [0.01 * 1.05**i for i in range(160)]  # percent, up to 23
    times = {tau: fires(snapshots, tau) for tau in grid}
    off = {tau: abs(at / updates - 0.5) for tau, at in times.items() if at is not None}
    best = min(off.values())
    near = [tau for tau in grid if off.get(tau) == best]
    return near[len(near) // 2]


def trainings(options: argparse.Namespace) -> None:
    began = time.perf_counter()
    examples, size = (10_000, options.batch)
    updates = options.updates or options.epochs * (examples // size)
    window = options.window or 2 * (examples // size)
    rows: list[dict[str, Any]] = []
    common = {
        "images": str(options.images), "batch": size, "window": window, "joint": 0.05, "tau": 1.0, "toy": options.toy,
        "evaluations": options.evaluations, "updates": updates, "probe": False,
    }  # fmt: skip
    lrs, tau = {"full": LRS["full"][-1], "LoRA": LRS["LoRA"][0]}, None
    known = {"updates": updates, "window": window, "batch": size, "shape": TWO if options.toy else SIX, "lrs": LRS}
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        waiting: dict[Future[dict[str, Any]], str] = {}

        def go(arm: str, seed: int, **more: Any) -> None:
            if time.perf_counter() - began > options.deadline:
                print(f"{arm}, seed {seed}: not begun, the time was over", flush=True)
                return
            lr = lrs["LoRA" if arm == "LoRA" else "full"]
            job = common | {"arm": arm, "seed": seed, "lr": lr} | ({} if tau is None else {"tau": tau}) | more
            waiting[pool.submit(train, job)] = f"{arm}, seed {seed}"

        def some() -> list[dict[str, Any]]:
            """The next runs that are done; [] when none is left."""
            found = []
            done, _ = wait(waiting, return_when=FIRST_COMPLETED) if waiting else ((), ())
            for future in done:
                name = waiting.pop(future)
                if future.exception() is not None:
                    print(f"{name}: {future.exception()!r}", flush=True)
                    continue
                row = future.result()
                rows.append(row)
                found.append(row)
                stages = ", ".join(
                    f"{s['stage']} from {100 * s['from'] / row['updates']:.0f} % ({s['test']:.2f} before)"
                    for s in row["stages"][1:]
                )
                print(
                    f"{row['arm']:13}{' probe' if row['probe'] else ''} seed {row['seed']} lr {row['lr']:.0e} "
                    f"{row['updates']} updates, test {row['test']:.2f} %, train loss {row['train']:.3f}, cost "
                    f"{row['cost'] / updates:.3f}, {row['seconds']:.0f} s{'; ' + stages if stages else ''}; "
                    f"at {time.perf_counter() - began:.0f} s",
                    flush=True,
                )
                written(options.out, known | {"lr": lrs, "tau": tau, "runs": rows})
            return found

        for arm in LRS:
            for lr in LRS[arm]:
                go(arm, 100, lr=lr, probe=True)
        while waiting:
            some()
        for arm in LRS:
            best = max((r for r in rows if r["arm"] == arm), key=lambda r: r["test"], default=None)
            lrs[arm] = lrs[arm] if best is None else best["lr"]
        for seed in range(options.seeds):
            go("full", seed)
        for seed in range(options.seeds):
            go("LoRA", seed)
        while waiting:
            for row in some():
                if row["arm"] == "full" and row["seed"] == 0:
                    tau = calibrated(row["snapshots"], updates)
                    at = fires(row["snapshots"], tau)
                    print(f"τ = {tau:.4f} %, ζ = {5 * tau:.4f} %: seed 0 would switch at {100 * at / updates:.0f} %")
                    for arm in ("prelora", "uniform rank", "random time"):
                        for other in range(options.seeds):
                            go(arm, other)
                if row["arm"] == "prelora":
                    go("same compute", row["seed"], updates=max(2, round(row["cost"])))
    print(f"\n{'':13} {'test accuracy':>22} {'− full, by seed':>24} {'cost':>6} {'switched at':>18} {'trainable':>10}")
    whole = {r["seed"]: r["test"] for r in rows if r["arm"] == "full" and not r["probe"]}
    for arm in ("full", "prelora", "uniform rank", "random time", "LoRA", "same compute"):
        mine = sorted((r for r in rows if r["arm"] == arm and not r["probe"]), key=lambda r: r["seed"])
        if mine:
            off = [r["test"] - whole[r["seed"]] for r in mine if r["seed"] in whole]
            switched = ", ".join(f"{100 * r['switched']:.0f} %" for r in mine if r["switched"])
            print(
                f"{arm:13} {statistics.mean(r['test'] for r in mine):10.2f} ± {spread(r['test'] for r in mine):.2f} "
                f"(n={len(mine)}) {statistics.mean(off):+8.2f} ± {spread(off):.2f} "
                f"{statistics.mean(r['cost'] for r in mine) / updates:8.3f} "
                f"{switched:>18} {mine[0]['stages'][-1]['trainable']:10,}"
            )


def spread(values: Any) -> float:
    values = list(values)
    return statistics.stdev(values) if len(values) > 1 else float("nan")


def written(out: Path | None, result: dict[str, Any]) -> None:
    if out is None:
        return
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "rankshift": rs.__version__}
    about = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(about | result, indent=1) + "\n")


def plot(options: argparse.Namespace) -> None:
    """Test accuracy over updates, a line a run; a mark where a stage begins."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = json.loads(options.results.read_text())
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for index, arm in enumerate(("full", "prelora", "random time", "LoRA", "same compute")):
        for row in (r for r in found["runs"] if r["arm"] == arm and not r["probe"]):
            label = arm if row["seed"] == 0 else None
            points = [(p["step"], p["test"]) for p in row["curve"]]
            axes.plot(*zip(*points, strict=True), color=f"C{index}", label=label, lw=1, alpha=0.8)
            for stage in row["stages"][1:]:
                marker = "o" if stage["stage"] == "joint" else "s"
                axes.plot(stage["from"], stage["test"], marker, color=f"C{index}", ms=4)
    axes.set(xlabel="updates (circle: adapters come, square: weights freeze)", ylabel="test accuracy, %")
    axes.legend()
    figure.tight_layout()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("step")
    verb.add_argument("--batches", type=int, nargs="+", default=[64])
    verb.add_argument(
        "--then", type=lambda text: text.split(":"), nargs="+",
        default=[["lora", "64"], ["lora", "16"], ["paca", "64"]],
        help="methods to freeze to, as lora:64, paca:64 or lora:16:fp8; the first is a LoRA in 32 bits",
    )  # fmt: skip
    verb.add_argument("--rounds", type=int, default=20)
    verb.add_argument("--compile", choices=("yes", "no", "both"), default="both")
    verb.set_defaults(do=steps)
    verb = verbs.add_parser("kernels")
    verb.add_argument("--batch", type=int, default=128)
    verb.add_argument("--listed", type=int, default=24, help="kernels in the file, an arm")
    verb.set_defaults(do=kernels)
    verb = verbs.add_parser("cifar")
    verb.add_argument("--epochs", type=int, default=80)
    verb.add_argument("--updates", type=int, help="instead of epochs")
    verb.add_argument("--window", type=int, help="updates; two epochs unless told")
    verb.add_argument("--batch", type=int, default=256)
    verb.add_argument("--seeds", type=int, default=3)
    verb.add_argument("--workers", type=int, default=5)
    verb.add_argument("--evaluations", type=int, default=20)
    verb.set_defaults(do=trainings)
    for verb in verbs.choices.values():
        verb.add_argument("--images", type=Path, required=True)
        verb.add_argument("--toy", action="store_true", help="a model that a CPU trains in seconds")
        verb.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which nothing is begun")
        verb.add_argument("--out", type=Path)
    verb = verbs.add_parser("plot")
    verb.add_argument("--results", type=Path, required=True)
    verb.add_argument("--out", type=Path, required=True)
    verb.set_defaults(do=plot)
    options = parser.parse_args()
    options.do(options)


if __name__ == "__main__":
    main()
