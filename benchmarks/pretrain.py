"""A Llama of 60 M or 130 M parameters from scratch, one token budget, by every method that is made for that.

    python benchmarks/pretrain.py prepare --data DIR_WITH_books_train_*.jsonl.xz --tokens .lm   # once, on a CPU
    PYTHONPATH=src python benchmarks/pretrain.py run --tokens .lm --steps 600 --out benchmarks/results/pretrain.json
    … run --tokens .lm --shape 130M --steps 400 --rates benchmarks/results/pretrain.json \
        --methods AdamW LoRA "LoRA, warm start" "ReLoRA, warm start" SwitchLoRA --out …/pretrain_130m.json
    … run --tokens .lm --steps 600 --methods GaLore "GaLore aligned, power 1" --out …/pretrain_galore.json
    python benchmarks/pretrain.py plot --results benchmarks/results/pretrain.json …/pretrain_galore.json \
        --out docs/img/pretrain.png

Models: hidden 512, ffn 1376, 8 heads, 8 layers (58 M parameters); hidden 768, ffn 2048, 12 heads, 12 layers (134 M);
vocabulary 32,000, untied. The rank is a quarter of hidden: 128 and 192. Text: English novels, a
byte-level BPE of 32,000 trained on them, sequences of 256 tokens, every token seen once. All arms: fp32 weights, bf16
autocast, 64 sequences an update, 10 % warm-up, cosine to 10 % of the peak, no decay, clipping at 1, betas 0.9, 0.999,
embeddings, norms and head trained by AdamW. Each arm's rate is the best of its grid after a quarter of the budget (with
a schedule of that length, seed 0), or what another file found best (--rates); then the full budget, several seeds. Loss
is that of held-out books.

Arms with a warm start train a quarter of the budget in full, at AdamW's rate and on its schedule, then with low rank:
ReLoRA restarts three times, its control is LoRA on the same schedule without restarts.

"GaLore aligned" turns each new basis along the one that it replaces: what Gram and Schmidt make of the old directions,
projected into the new subspace, where GaLore has the gradient's own, by falling energy. "power 1": found with one power
iteration. No setting of the library has them; their rate is GaLore's.

What is in --out already is not measured again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import lzma
import math
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

VOCAB, LENGTH, BATCH, HELD_OUT = 32000, 256, 64, 512  # the last: sequences of the validation books

GRID = {
    "AdamW": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
    "GaLore": (5e-3, 1e-2, 2e-2),
    "AdaRankGrad": (5e-3, 1e-2, 2e-2),
    "LoRA": (2.5e-4, 5e-4, 1e-3, 3e-3, 1e-2),
    "LoRA, warm start": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    "ReLoRA, warm start": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    "SwitchLoRA": (2.5e-3, 5e-3, 1e-2, 2e-2),
}
VARIANTS = {"GaLore aligned": 1e-2, "GaLore aligned, power 1": 1e-2}  # their rates
SHAPES = {"60M": (512, 1376, 8), "130M": (768, 2048, 12)}  # hidden, ffn, heads and layers
WARM_RATE = 1e-3  # AdamW's


def books(directory: Path, part: str) -> list[str]:
    texts = []
    for path in sorted(directory.glob(f"books_{part}*.jsonl.xz")):
        with lzma.open(path, "rt", encoding="utf-8") as file:
            texts += [json.loads(line)["text"] for line in file]
    return texts


def prepare(data: Path, tokens: Path, most: int) -> None:
    """Train the tokenizer, write train.npy and val.npy (uint16), books in a fixed random order."""
    from tokenizers import ByteLevelBPETokenizer

    tokens.mkdir(parents=True, exist_ok=True)
    train, val = books(data, "train"), books(data, "val")
    order = np.random.default_rng(0).permutation(len(train))
    train = [train[i] for i in order]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator((t[:400_000] for t in train), VOCAB, min_frequency=2, show_progress=False)
    for name, texts in (("train", train), ("val", val)):
        ids: list[int] = []
        for text in texts:
            for start in range(0, len(text), 1 << 20):
                ids += tokenizer.encode(text[start : start + (1 << 20)]).ids
            if len(ids) > most:
                break
        array = np.array(ids[:most], dtype=np.uint16)
        np.save(tokens / f"{name}.npy", array)
        print(f"{name}: {len(array):,} tokens, {array.max() + 1:,} in use")


def aligned(power: int, **settings: Any) -> Any:
    """GaLore whose bases are turned along those that they replace."""
    import torch

    import rankshift as rs
    from rankshift.optim.project import Project

    class Aligned(Project):
        def seek(self, A: Any, olds: Sequence[Any], words: Sequence[int], most: int, *others: Any) -> Any:
            found = super().seek(A, olds, words, most, *others)
            if not olds:
                return found
            span = found.vectors[..., :most]
            turn, R = torch.linalg.qr(span.mT @ torch.stack(list(olds)))
            return replace(found, vectors=span @ (turn * R.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]))

    class Variant(rs.GaLore):
        def project(self, form: Any) -> Project:
            usual = super().project(form)
            return Aligned(**{f.name: getattr(usual, f.name) for f in fields(usual)} | {"power": power})

    return Variant(**settings)


def method_of(name: str, steps: int, rank: int) -> Any:
    import rankshift as rs

    every = min(200, max(1, steps // 5))
    if name == "AdamW":
        return rs.Full()
    if name == "GaLore":
        return rs.GaLore(rank=rank, every=every)
    if name in VARIANTS:
        return aligned(int("power 1" in name), rank=rank, every=every)
    if name == "AdaRankGrad":
        return rs.AdaRankGrad(rank=rank, every=every, earliest=max(1, every // 4))
    if name == "SwitchLoRA":
        return rs.SwitchLoRA(rank=rank, interval=40, rest_lr_ratio=0.1)
    if name.endswith("warm start"):
        cycle = (steps - steps // 4) // 4 + 1  # the last is the shortest
        every = cycle if name.startswith("ReLoRA") else None
        return rs.ReLoRA(rank=rank, alpha=rank, every=every, cycle=cycle, rewarm=max(1, cycle // 10))
    assert name == "LoRA"
    whole = ("embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm")
    return rs.LoRA(rank=rank, alpha=rank, modules_to_save=whole)


def train(
    name: str, lr: float, seed: int, steps: int, shape: tuple[int, int, int], blocks: bool, tokens: str
) -> dict[str, Any]:
    """One run; ``blocks``: with compiled blocks."""
    import torch
    import transformers

    import rankshift as rs

    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.perf_counter()
    data, held = (np.load(Path(tokens) / f"{part}.npy") for part in ("train", "val"))
    rows = torch.from_numpy(data[: len(data) // LENGTH * LENGTH].astype(np.int64)).view(-1, LENGTH)
    held_rows = torch.from_numpy(held[: HELD_OUT * LENGTH].astype(np.int64)).view(-1, LENGTH).to(device)
    assert steps * BATCH <= len(rows), f"{steps * BATCH} sequences wanted, {len(rows)} there"
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    hidden, ffn, layers = shape
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=layers,
        vocab_size=VOCAB, max_position_embeddings=LENGTH, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    model.to(device).train()
    method, warm_start = method_of(name, steps, hidden // 4), name.endswith("warm start")
    then = [rs.Then(method, steps=steps // 4, lr=lr)] if warm_start else []
    run = rs.attach(model, rs.Full() if warm_start else method, seed=seed, total_steps=steps, then=then)
    if blocks:
        torch.compiler.reset()  # a worker's other runs have layers of other kinds
        for layer in model.model.layers:
            layer.compile()
    optimizer = run.optimizer(lr=WARM_RATE if warm_start else lr)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda n: min((n + 1) / warm, 0.1 + 0.45 * (1 + math.cos(math.pi * max(0, n - warm) / max(1, steps - warm)))),
    )

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            return model(input_ids=ids, labels=ids).loss

    def evaluate() -> float:
        model.eval()
        with torch.no_grad():
            parts = [loss_of(part).item() for part in held_rows.split(BATCH)]
        model.train()
        return statistics.mean(parts)

    curve, seen = [], []
    start = time.perf_counter()
    for step in range(steps):
        ids = rows[order[step * BATCH : (step + 1) * BATCH]].to(device, non_blocking=True)
        loss = loss_of(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in run.trainable()], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (following := run.due()) is not None:
            run = run.shift(following)
            optimizer = run.optimizer()
            schedule = run.scheduler(optimizer, warmup=max(1, warm // 4))
        seen.append(loss.detach())
        if (step + 1) % max(1, steps // 12) == 0:
            row = {"step": step + 1, "train": torch.stack(seen).mean().item(), "val": evaluate()}
            states = [s for s in optimizer.state.values() if "basis" in s]
            if states:
                row["rank"] = statistics.mean(s["basis"].shape[-1] for s in states)
                row["energy"] = torch.stack([s["energy"] for s in states]).mean().item()
                row["renewals"] = sum(int(s["renewals"]) for s in states)
            curve.append(row)
            seen = []
            if not math.isfinite(row["train"]):
                break
    seconds = time.perf_counter() - start
    state = sum(t.untyped_storage().nbytes() for s in optimizer.state.values() for t in s.values())
    changed = run.metrics()
    return {
        "method": name, "lr": lr, "seed": seed, "steps": steps, "tokens": steps * BATCH * LENGTH,
        "val": curve[-1]["val"], "train": curve[-1]["train"], "state_mib": state / 2**20, "curve": curve,
        "skipped": run.skipped, "metrics": changed, "train_seconds": seconds, "seconds": time.perf_counter() - began,
    }  # fmt: skip


def run_all(options: argparse.Namespace) -> None:
    began = time.perf_counter()
    probe = max(20, options.steps // 4)
    known = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    if known and known.get("shape", "60M") != options.shape:
        raise SystemExit(f"{options.out} holds runs of another model than {options.shape}: name another file.")
    tuning: list[dict[str, Any]] = known.get("tuning", [])
    finals: list[dict[str, Any]] = known.get("runs", [])
    methods = options.methods or list(GRID)
    best: dict[str, float] = known.get("best_lr", {})
    fixed = (json.loads(options.rates.read_text())["best_lr"] if options.rates else {}) | VARIANTS
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:

        def work(jobs: list[tuple[Any, ...]], into: list[dict[str, Any]]) -> None:
            there = {(row["method"], row["lr"], row["seed"], row["steps"]) for row in into}
            jobs = [job for job in jobs if job not in there]
            if time.perf_counter() - began > options.deadline:
                return
            how = SHAPES[options.shape], options.compile, str(options.tokens)
            waiting = {pool.submit(train, *job, *how): job for job in jobs}
            for done in as_completed(waiting):
                if done.cancelled():
                    continue
                if done.exception() is not None:
                    print(f"{waiting[done]}: {done.exception()!r}", flush=True)
                    continue
                row = done.result()
                into.append(row)
                if options.out:  # what is measured stays, whatever ends this
                    written(options, tuning, finals, best)
                print(
                    f"{row['method']:18} lr {row['lr']:.0e} seed {row['seed']} {row['steps']:5} steps "
                    f"val {row['val']:.3f} train {row['train']:.3f} state {row['state_mib']:.0f} MiB "
                    f"{row['train_seconds']:.0f} s, at {time.perf_counter() - began:.0f} s",
                    flush=True,
                )
                if time.perf_counter() - began > options.deadline:
                    for other in waiting:
                        other.cancel()

        work([(name, lr, 0, probe) for name in methods if name not in fixed for lr in GRID[name]], tuning)
        for name in methods:
            if name in fixed:
                best[name] = fixed[name]
                continue
            rows = [
                row for row in tuning if (row["method"], row["steps"]) == (name, probe) and math.isfinite(row["val"])
            ]
            best[name] = min(rows, key=lambda row: row["val"])["lr"] if rows else GRID[name][1]
        work([(name, best[name], seed, options.steps) for seed in range(options.seeds) for name in methods], finals)
    for name in methods:
        rows = [row["val"] for row in finals if (row["method"], row["lr"]) == (name, best[name])]
        if rows:
            print(f"| {name} | {best[name]:.0e} | {statistics.mean(rows):.3f} ± {statistics.pstdev(rows):.3f} |")
    if options.out:
        written(options, tuning, finals, best)


def written(
    options: argparse.Namespace, tuning: list[dict[str, Any]], finals: list[dict[str, Any]], best: dict[str, float]
) -> None:
    import torch
    import transformers

    import rankshift as rs

    result = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "rankshift": rs.__version__},
        "shape": options.shape, "compiled": options.compile, "rates_of": options.rates and options.rates.name,
        "grid": GRID, "best_lr": best, "tuning": tuning, "runs": finals,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def plot(results: Sequence[Path], out: Path) -> None:
    """Held-out loss and mean rank over tokens, a line a run, of all that these files hold."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    files = [json.loads(path.read_text()) for path in results]
    runs = [row for found in files for row in found["runs"] if row["lr"] == found["best_lr"][row["method"]]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for index, name in enumerate(GRID):
        for row in (r for r in runs if r["method"] == name):
            x = [point["step"] * BATCH * LENGTH / 1e6 for point in row["curve"]]
            style = {"color": f"C{index}", "ls": "-" if row["seed"] == 0 else "--"}
            label = name if row["seed"] == 0 else None
            left.plot(x, [point["val"] for point in row["curve"]], label=label, **style)
            if "rank" in row["curve"][0]:
                right.plot(x, [point["rank"] for point in row["curve"]], label=label, **style)
    left.set(xlabel="tokens, millions", ylabel="held-out loss, nats a token")
    right.set(xlabel="tokens, millions", ylabel="mean rank of 56 layers", ylim=(0, None))
    left.legend()
    right.legend()
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("prepare")
    verb.add_argument("--data", type=Path, required=True)
    verb.add_argument("--tokens", type=Path, required=True)
    verb.add_argument("--most", type=int, default=22_000_000)
    verb = verbs.add_parser("run")
    verb.add_argument("--tokens", type=Path, required=True)
    verb.add_argument("--out", type=Path)
    verb.add_argument("--steps", type=int, default=1200)
    verb.add_argument("--seeds", type=int, default=2)
    verb.add_argument("--workers", type=int, default=3)
    verb.add_argument("--methods", nargs="*")
    verb.add_argument("--shape", choices=SHAPES, default="60M")
    verb.add_argument("--rates", type=Path, help="results whose best rates to take, without a grid")
    verb.add_argument("--compile", action="store_true", help="compile the blocks")
    verb.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which no new run begins")
    verb = verbs.add_parser("plot")
    verb.add_argument("--results", type=Path, nargs="+", required=True)
    verb.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.verb == "prepare":
        prepare(options.data, options.tokens, options.most)
    elif options.verb == "run":
        run_all(options)
    else:
        plot(options.results, options.out)


if __name__ == "__main__":
    main()
