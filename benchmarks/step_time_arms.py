# mypy: ignore-errors
"""The arms of step_time.py: what each of them builds and what a step of it is. One process imports this for one arm."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Step = Callable[[], Tensor]  # one training step; the loss
BLOCKS = {"LlamaDecoderLayer", "ViTLayer", "RobertaLayer"}
REFERENCE = "frozen, blocks compiled"
GRAPHS = "lowered, CUDA graphs"


@dataclass(frozen=True)
class Shape:
    family: str
    config: dict[str, Any]
    batch: int
    length: int  # tokens of a sequence; of an image
    guess: float = 0.0  # GiB that an ordinary arm may need

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])


def _llama(hidden: int, ffn: int, layers: int, heads: int, kv: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocabulary,
    }  # fmt: skip


def _encoder(hidden: int, ffn: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
    }  # fmt: skip


SHAPES = {
    "1.1B": Shape("llama", _llama(2048, 8192, 16, 32, 8, 32000), 8, 1024, 21),
    "1.1B-2k": Shape("llama", _llama(2048, 8192, 16, 32, 8, 32000), 2, 1024, 8),
    "8B": Shape("llama", _llama(4096, 14336, 32, 32, 8, 128256), 4, 1024, 44),
    "vit-l": Shape("vit", _encoder(1024, 4096, 24, 16), 64, 197, 16),
    "roberta-base": Shape("roberta", _encoder(768, 3072, 12, 12), 32, 512, 10),
    "tiny": Shape("llama", _llama(128, 256, 2, 4, 2, 256), 2, 32),
    "tiny-vit": Shape("vit", _encoder(64, 128, 2, 2), 2, 197),
    "tiny-roberta": Shape("roberta", _encoder(64, 128, 2, 2), 2, 32),
}


@dataclass
class Job:
    """One arm on one shape and device."""

    shape: Shape
    device: str
    layers: int | None = None
    tokens: int | None = None  # instead of the shape's batch: one sequence of so many
    lowered: str = ""  # what lower() said

    def model(self) -> nn.Module:
        import transformers

        torch.manual_seed(0)
        values = self.shape.config | ({"num_hidden_layers": self.layers} if self.layers else {})
        length = max(self.tokens or 0, self.shape.length)
        if self.shape.family == "llama":
            config: Any = transformers.LlamaConfig(
                **values, max_position_embeddings=max(2048, length), tie_word_embeddings=False, use_cache=False
            )  # a cache in training recompiles every block
            kind: Any = transformers.AutoModelForCausalLM
        elif self.shape.family == "vit":
            config = transformers.ViTConfig(**values, num_labels=1000)
            kind = transformers.AutoModelForImageClassification
        else:
            config = transformers.RobertaConfig(
                **values, vocab_size=50265, max_position_embeddings=length + 2, type_vocab_size=1, num_labels=2,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )  # fmt: skip
            kind = transformers.AutoModelForSequenceClassification
        with torch.device(self.device):
            model: nn.Module = kind.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        return model.train()

    def batch(self) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(1)
        count, length = (1, self.tokens) if self.tokens else (self.shape.batch, self.shape.length)
        if self.shape.family == "vit":
            images = torch.randn(count, 3, 224, 224, generator=draw).to(self.device, torch.bfloat16)
            return {"pixel_values": images, "labels": torch.arange(count, device=self.device)}
        vocabulary = self.shape.config.get("vocab_size", 50265)
        ids = torch.randint(3, vocabulary, (count, length), generator=draw).to(self.device)
        return {"input_ids": ids, "labels": ids if self.shape.family == "llama" else ids[:, 0] % 2}

    def autocast(self, enabled: bool) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.partition(":")[0], torch.bfloat16, enabled=enabled)


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if type(module).__name__ in BLOCKS]


def targets(model: nn.Module) -> list[str]:
    """Every linear layer of every block."""
    found = [
        f"{at}.{name}"
        for at, block in blocks(model)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    assert found, "no block was recognised"
    return found


def compile_blocks(model: nn.Module) -> None:
    for _, block in blocks(model):
        block.compile()


def stepper(job: Job, model: nn.Module, optimizer: torch.optim.Optimizer | None, amp: bool = False) -> Step:
    batch = job.batch()

    def step() -> Tensor:
        with job.autocast(amp):
            loss: Tensor = model(**batch).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    step.model = model
    step.batch = batch
    step.optimizer = optimizer
    return step


def adamw(model: nn.Module, lr: float = 1e-4) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)


# ---- frozen and full


def frozen(job: Job, mode: str) -> Step:
    if mode == "Liger":
        liger()
    model = job.model().requires_grad_(False)
    inputs = model.get_input_embeddings()
    inputs.register_forward_hook(lambda module, given, output: output.requires_grad_())
    if mode.startswith("lowered"):
        from rankshift.lower import lower

        job.lowered = str(lower(model, graphs=mode == GRAPHS))
    elif mode == "compiled":
        compile_blocks(model)
    return stepper(job, model, None)


def liger() -> None:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()


def full(job: Job) -> Step:
    model = job.model()
    compile_blocks(model)
    return stepper(job, model, adamw(model, 1e-6))


def galore_torch(job: Job) -> Step:
    from galore_torch import GaLoreAdamW

    model = job.model()
    chosen = set(targets(model))
    weights = {id(m.weight) for n, m in model.named_modules() if n in chosen}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if id(p) not in weights]},
        {
            "params": [p for p in model.parameters() if id(p) in weights], "rank": 128, "update_proj_gap": 10**9,
            "scale": 0.25, "proj_type": "std",
        },
    ]  # fmt: skip
    return stepper(job, model, GaLoreAdamW(groups, lr=1e-6, no_deprecation_warning=True))


# ---- adapters


@torch.no_grad()
def fill(factors: dict[str, tuple[Tensor, Tensor]], std: float) -> None:
    """A as PEFT draws it, B of N(0, std²), by the name of the layer: the same in every arm."""
    for name, (A, B) in factors.items():
        draw = torch.Generator(A.device).manual_seed(zlib.crc32(name.encode()))
        A.copy_((2 * torch.rand(A.shape, generator=draw, device=A.device) - 1) / math.sqrt(A.shape[1]))
        B.copy_(std * torch.randn(B.shape, generator=draw, device=A.device))


@torch.no_grad()
def shake(vectors: dict[str, Tensor]) -> None:
    """VeRA's b, which starts at zero."""
    for name, b in vectors.items():
        draw = torch.Generator(b.device).manual_seed(zlib.crc32(name.encode()))
        b.copy_(0.02 * torch.randn(b.shape, generator=draw, device=b.device))


def peft(job: Job, kind: str, rank: int, mode: str = "", std: float = 0.01, lr: float = 1e-4) -> Step:
    """PEFT: as shipped (fp32 adapters, bf16 autocast) or with bf16 adapters."""
    import peft as library

    if "Liger" in mode:
        liger()
    model = job.model()
    names = targets(model)
    if "4 bits" in mode:
        four_bits(job, model, names)
    if kind == "VeRA":
        config: Any = library.VeraConfig(r=rank, target_modules=names, vera_dropout=0.0)
    else:
        config = library.LoraConfig(r=rank, lora_alpha=32, target_modules=names, use_dora=kind == "DoRA")
    bf16 = "bf16" in mode
    wrapped = library.get_peft_model(model, config, autocast_adapter_dtype=not bf16)
    factors, vectors = {}, {}
    for name, module in wrapped.named_modules():
        site = name.removeprefix("base_model.model.")
        if len(getattr(module, "lora_A", ())) > 0:
            factors[site] = (module.lora_A["default"].weight, module.lora_B["default"].weight)
        elif len(getattr(module, "vera_lambda_b", ())) > 0:
            vectors[site] = module.vera_lambda_b["default"]
            if bf16:
                for parameter in (*module.vera_lambda_b.values(), *module.vera_lambda_d.values()):
                    parameter.data = parameter.data.to(torch.bfloat16)
                for pair in (module.vera_A, module.vera_B):  # one pair, which all layers share
                    pair["default"].data = pair["default"].data.to(torch.bfloat16)
    assert len(factors) + len(vectors) == len(names)
    fill(factors, std)
    shake(vectors)
    if "compiled" in mode:
        compile_blocks(wrapped)
    return stepper(job, wrapped, adamw(wrapped, lr), amp=not bf16)


def four_bits(job: Job, model: Any, names: list[str]) -> None:
    """bitsandbytes' layers, as transformers would put them."""
    import bitsandbytes

    for name in names:
        module = model.get_submodule(name)
        layer = bitsandbytes.nn.Linear4bit(
            module.in_features, module.out_features, bias=module.bias is not None, compute_dtype=torch.bfloat16,
            quant_type="nf4", device="meta",
        )  # fmt: skip
        layer.weight = bitsandbytes.nn.Params4bit(module.weight.data.cpu(), quant_type="nf4")
        layer.bias = module.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.to(job.device))
    model.is_loaded_in_4bit = True


def unsloth(job: Job, four: bool, checkpointing: Any) -> Step:
    import unsloth as library

    path = saved_model(job)
    model, _ = library.FastLanguageModel.from_pretrained(
        str(path), max_seq_length=job.shape.length, dtype=torch.bfloat16, load_in_4bit=four, offload_embedding=False
    )
    leaves = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = library.FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, lora_dropout=0.0, bias="none", target_modules=leaves, random_state=0,
        use_gradient_checkpointing=checkpointing,
    )  # fmt: skip
    model.train()
    factors = {
        name.removeprefix("base_model.model."): (m.lora_A["default"].weight, m.lora_B["default"].weight)
        for name, m in model.named_modules()
        if len(getattr(m, "lora_A", ())) > 0
    }
    assert len(factors) == 7 * (job.layers or job.shape.layers)
    fill(factors, 0.01)
    return stepper(job, model, adamw(model), amp=True)


def saved_model(job: Job) -> Path:
    """A directory with the random weights and any tokenizer, which Unsloth wants to load."""
    import transformers

    from rankshift.train import bundled

    key = zlib.crc32(repr((job.shape.config, job.layers)).encode())
    path = Path(tempfile.gettempdir()) / f"step_time_model_{key:08x}"
    with Lock("model").held():
        if not (path / "done").exists():
            transformers.AutoTokenizer.from_pretrained(bundled.model_path("babyllama")).save_pretrained(path)
            job.model().save_pretrained(path)
            (path / "done").touch()
    gc.collect()
    torch.cuda.empty_cache()
    return path


def ours(
    job: Job, method: str, mode: str, base: Any = None, std: float = 0.01, lr: float = 1e-4, **options: Any
) -> Step:
    import rankshift as rs

    model = job.model()
    run = rs.attach(model, getattr(rs, method)(targets=tuple(targets(model)), **options), base=base)
    sites: Any = run.adapter()
    if method == "LoRA":
        fill({name: (adapter.A, adapter.B) for name, adapter in sites.items()}, std)
    elif method == "VeRA":
        shake({name: adapter.lambda_b for name, adapter in sites.items()})
    if mode.startswith("lowered"):
        job.lowered = str(run.lower(graphs=mode == GRAPHS))
    elif mode == "compiled":
        compile_blocks(model)
    return stepper(job, model, run.optimizer(lr=lr))


# ---- the list


@dataclass(frozen=True)
class Arm:
    name: str
    build: Callable[[Job], Step]
    owner: str = ""  # floor, peer or ours
    compiles: bool = False  # its first steps compile, for long and without the GPU
    first: str = ""  # a module to import before all others
    outside: bool = False  # its packages may be in a folder of their own, which the other arms do not see
    size: float = 1.0  # memory against the shape's guess
    llama: bool = False  # only for Llama's blocks
    arithmetic: str = "bf16"
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


def _arms() -> Iterator[Arm]:
    def floor(mode: str) -> Callable[[Job], Step]:
        return lambda job: frozen(job, mode)

    yield Arm(REFERENCE, floor("compiled"), "floor", compiles=True)
    yield Arm("frozen, eager", floor(""), "floor")
    yield Arm("frozen, Liger", floor("Liger"), "floor", compiles=True, llama=True, outside=True)
    for mode in ("lowered", GRAPHS):
        yield Arm(f"frozen, {mode}", floor(mode), "floor", compiles=True, size=0.7)

    kinds: list[tuple[str, str, float, dict[str, Any]]] = [
        ("LoRA r16", "LoRA", 1.0, {"rank": 16}),
        ("LoRA r64", "LoRA", 1.0, {"rank": 64}),
        ("PaCA r64", "PaCA", 1.0, {"rank": 64}),
        ("PaCA r64 in blocks of 16", "PaCA", 1.0, {"rank": 64, "select": "blocks"}),
        ("VeRA r256", "VeRA", 1.1, {"rank": 256}),
        ("DoRA r16", "LoRA", 1.4, {"rank": 16, "dora": True}),
    ]
    modes = (("lowered", "lowered"), (GRAPHS, GRAPHS), ("compiled", "blocks compiled"), ("", "eager"))
    for mode, label in modes:
        for name, method, size, options in kinds:
            yield Arm(
                f"{name}, {label}", lambda job, m=method, how=mode, o=options: ours(job, m, how, **o), "ours",
                compiles=mode != "", size=size * (0.75 if mode.startswith("lowered") else 1.0),
            )  # fmt: skip

    yield Arm("full, blocks compiled", full, "peer", compiles=True, size=1.9)
    yield Arm("PEFT LoRA r16", lambda job: peft(job, "LoRA", 16), "peer", size=1.1)
    yield Arm("PEFT LoRA r16, bf16", lambda job: peft(job, "LoRA", 16, "bf16"), "peer")
    yield Arm(
        "PEFT LoRA r16, bf16, blocks compiled", lambda job: peft(job, "LoRA", 16, "bf16 compiled"), "peer",
        compiles=True,
    )  # fmt: skip
    yield Arm(
        "PEFT LoRA r16, bf16, Liger", lambda job: peft(job, "LoRA", 16, "bf16 Liger"), "peer", compiles=True, llama=True
    )
    offline = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "WANDB_DISABLED": "true"}
    for name, four, checkpointing in (
        ("Unsloth LoRA r16", False, False),
        ("Unsloth LoRA r16, its checkpointing", False, "unsloth"),
        ("Unsloth QLoRA r16", True, False),
    ):
        yield Arm(
            name, lambda job, f=four, c=checkpointing: unsloth(job, f, c), "peer", compiles=True, first="unsloth",
            llama=True, outside=True, arithmetic="nf4" if four else "bf16", environment=offline,
        )  # fmt: skip
    yield Arm("PEFT VeRA r256", lambda job: peft(job, "VeRA", 256), "peer", size=1.2)
    yield Arm("PEFT VeRA r256, bf16", lambda job: peft(job, "VeRA", 256, "bf16"), "peer", size=1.1)
    yield Arm("PEFT DoRA r16", lambda job: peft(job, "DoRA", 16), "peer", size=1.6)
    yield Arm("PEFT DoRA r16, bf16", lambda job: peft(job, "DoRA", 16, "bf16"), "peer", size=1.5)
    yield Arm("galore-torch r128", galore_torch, "peer", compiles=True, size=1.4)

    for mode, label in modes[:3]:
        for name, base in (("QLoRA r16", "nf4"), ("fp8 LoRA r16", "fp8")):
            yield Arm(
                f"{name}, {label}", lambda job, how=mode, b=base: ours(job, "LoRA", how, b, rank=16), "ours",
                compiles=mode != "", arithmetic=base,
            )  # fmt: skip
    yield Arm("PEFT QLoRA r16", lambda job: peft(job, "LoRA", 16, "bf16 4 bits"), "peer", arithmetic="nf4")


ARMS = {arm.name: arm for arm in _arms()}


# ---- what a process does with its arm


class Lock:
    """Among the processes of a run."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.file: Any = None
        self.depth = 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        import fcntl

        if self.file is None:
            folder = os.environ.get("STEP_TIME_LOCKS", tempfile.gettempdir())
            self.file = open(f"{folder}/{self.name}.lock", "w")  # noqa: SIM115 - kept for the life of the process
        if self.depth == 0:
            fcntl.flock(self.file, fcntl.LOCK_EX)
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if self.depth == 0:
                fcntl.flock(self.file, fcntl.LOCK_UN)


lock = Lock("gpu")  # held while steps are warmed up or kernels tuned


def tune_alone() -> None:
    """Inductor times the configurations of a kernel when it first runs; have that done under the lock."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    inner = CachingAutotuner.benchmark_all_configs

    def benchmark(self: Any, *args: Any, **kwargs: Any) -> Any:
        with lock.held():
            return inner(self, *args, **kwargs)

    CachingAutotuner.benchmark_all_configs = benchmark


class Served:
    """An arm that has been built and warmed up."""

    def __init__(self, arm: Arm, job: Job, warmup: int):
        self.arm, self.job, self.cuda = arm, job, job.device.startswith("cuda")
        torch._dynamo.config.recompile_limit = 64
        began = time.perf_counter()
        if arm.compiles and self.cuda:
            tune_alone()
            self.step = arm.build(job)
            for _ in range(3):
                self.step()
            self.synchronize()
        else:
            self.step = arm.build(job)
        self.loss = float("nan")
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        with lock.held():
            for _ in range(warmup):
                self.loss = float(self.step())
        # memory that a CUDA graph reuses within itself is not seen when it is replayed, but when it was captured
        self.most = torch.cuda.max_memory_allocated() if self.cuda and GRAPHS in arm.name else 0
        self.seconds = time.perf_counter() - began
        self.nudge = torch.zeros(1, device=job.device)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def ready(self) -> dict[str, Any]:
        said: dict[str, Any] = {"loss": self.loss, "built_s": self.seconds}
        if self.job.lowered:
            said["lowered"] = self.job.lowered[:3000]
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()
            with lock.held():
                self.step()
                self.synchronize()
                said["resident_gib"] = torch.cuda.memory_allocated() / 2**30
                torch.cuda.reset_peak_memory_stats()
                self.step()
                self.synchronize()
            said["gib"] = max(self.most, torch.cuda.max_memory_allocated()) / 2**30
            said["reserved_gib"] = torch.cuda.memory_reserved() / 2**30
        return said

    def time(self, steps: int) -> dict[str, float]:
        """Milliseconds a step: between events on the GPU; of the host until it had launched all; until all was done."""
        self.nudge.add_(1)  # another process had the GPU before
        self.synchronize()
        if self.cuda:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        host = time.perf_counter() - began
        if self.cuda:
            stop.record()
            self.synchronize()
        wall = time.perf_counter() - began
        spent = start.elapsed_time(stop) if self.cuda else 1e3 * wall
        return {"ms": spent / steps, "host_ms": 1e3 * host / steps, "wall_ms": 1e3 * wall / steps}

    def kernels(self, listed: int = 45) -> dict[str, Any]:
        """Launches of a step and what they take, from torch's profiler."""
        return profile(self.step, listed, self.job.layers or self.job.shape.layers)


def profile(step: Step, listed: int, layers: int = 1) -> dict[str, Any]:
    """Launches and times of a step; kernels that come for every block are counted by block, copies and memsets not."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=kinds) as seen:
        for _ in range(2):
            step()
        torch.cuda.synchronize()
    rows = [e for e in seen.key_averages() if e.device_type.name == "CUDA" and e.self_device_time_total > 0]
    rows = [e for e in rows if not is_range(e.key)]
    rows.sort(key=lambda e: -e.self_device_time_total)
    lines = [f"{e.self_device_time_total / 2e3:9.3f} ms {e.count / 2:7.1f} × {e.key[:150]}" for e in rows[:listed]]
    idle, widest = gaps(seen.events())
    return {
        "launches": sum(e.count for e in rows) / 2,
        "kernel_ms": sum(e.self_device_time_total for e in rows) / 2e3,
        "idle_ms": idle / 2e3,
        "kernels_a_block": sum(e.count // 2 // layers for e in rows if not e.key.lower().startswith("mem")),
        "text": "\n".join([*lines, *widest]),
    }


def is_range(name: str) -> bool:
    """Of code, which holds kernels that are listed themselves; kernels have a # where they count lambdas."""
    return "#" in name and "lambda" not in name


def gaps(events: Any) -> tuple[float, list[str]]:
    """Microseconds in which nothing ran between the first and the last kernel, and the widest gaps in words."""
    seen = [e for e in events if e.device_type.name == "CUDA" and not is_range(e.name)]
    seen.sort(key=lambda e: e.time_range.start)
    found, until, before = [], seen[0].time_range.end if seen else 0.0, ""
    for e in seen:
        if e.time_range.start > until:
            found.append((e.time_range.start - until, before[:60], e.name[:60]))
        if e.time_range.end >= until:
            until, before = e.time_range.end, e.name
    found.sort(reverse=True)
    return sum(gap for gap, _, _ in found), [f"{gap:9.1f} µs idle: {a} → {b}" for gap, a, b in found[:15]]


def saved_bytes(step: Step) -> int:
    """Bytes that autograd keeps when backward begins, without what the model holds anyhow."""
    model: nn.Module = step.model
    own = {
        t.untyped_storage().data_ptr()
        for module in model.modules()
        for t in (*module.parameters(recurse=False), *module.buffers(recurse=False), *vars(module).values())
        if isinstance(t, Tensor)
    }
    own |= {t.untyped_storage().data_ptr() for t in step.batch.values()}
    found: dict[int, int] = {}
    forward = True

    def pack(tensor: Tensor) -> Tensor:
        if forward:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        nonlocal forward
        forward = False
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        step()
    return sum(found.values())


def block(arm: Arm, job: Job) -> dict[str, float]:
    """What one more block costs: the difference between models of three blocks and of two.

    Bytes kept are those that grow with the tokens, from a batch and half of it, and those that do not.
    """
    seen: list[dict[str, float]] = []
    for layers in (2, 3):
        served = Served(arm, dataclasses.replace(job, layers=layers), 2)
        row: dict[str, float] = {}
        if served.cuda:
            row["launches"] = profile(served.step, 0)["launches"]
        row["whole"] = saved_bytes(served.step)
        batch = served.step.batch
        count = next(iter(batch.values())).shape[0]
        tokens = job.tokens or count * job.shape.length
        for name, values in batch.items():
            if count > 1:
                batch[name] = values[: count // 2]
            elif values.dim() > 1:
                batch[name] = values[:, : tokens // 2]
        row["half"] = saved_bytes(served.step)
        seen.append(row)
        del served, batch
        gc.collect()
    more = {key: seen[1][key] - seen[0][key] for key in seen[0]}
    grows = more["whole"] - more.pop("half")
    out = {"saved_bytes_per_token": grows / (tokens - tokens // 2), "saved_bytes": more.pop("whole") - 2 * grows}
    return out | more


# ---- loss curves


LOSS_ARMS: dict[str, Callable[[Job, float], Step]] = {
    "PEFT LoRA r16": lambda job, lr: peft(job, "LoRA", 16, std=0.0, lr=lr),
    "LoRA r16, eager": lambda job, lr: ours(job, "LoRA", "", std=0.0, lr=lr, rank=16),
    "LoRA r16, lowered": lambda job, lr: ours(job, "LoRA", "lowered", std=0.0, lr=lr, rank=16),
}


@dataclass
class Pretrained(Job):
    """The package's small pretrained Llama."""

    def model(self) -> nn.Module:
        import transformers

        from rankshift.train import bundled

        path = bundled.model_path("babyllama")
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, use_cache=False)
        return model.to(self.device).train()


def curve(name: str, shape: str, device: str, steps: int, lr: float, seed: int) -> dict[str, Any]:
    """Losses of LoRA on Shakespeare by characters; every arm has the same start of A and B and the same batches."""
    import transformers

    from rankshift.train import bundled

    if shape == "babyllama":
        job: Job = Pretrained(Shape("llama", {"vocab_size": 105}, 16, 128), device)
    else:
        job = Job(SHAPES[shape], device)
    step = LOSS_ARMS[name](job, lr)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled.model_path("babyllama"))
    ids = torch.tensor(tokenizer(bundled.text("tinyshakespeare"), add_special_tokens=False)["input_ids"])
    count, length = job.shape.batch, job.shape.length
    rows = ids[: len(ids) // length * length].view(-1, length)
    draw = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(rows), generator=draw) for _ in range(1 + steps * count // len(rows))])
    batch: dict[str, Tensor] = step.batch
    assert batch["input_ids"] is batch["labels"]
    losses = []
    began = time.perf_counter()
    for at in range(steps):
        for group in step.optimizer.param_groups:
            group["lr"] = lr * min(1.0, (at + 1) / 20)
        batch["input_ids"].copy_(rows[order[at * count : (at + 1) * count]])
        losses.append(step())
    curve = torch.stack(losses).float().cpu().tolist()
    return {"losses": curve, "seconds": time.perf_counter() - began, "lowered": job.lowered[:3000]}
