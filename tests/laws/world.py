"""What the laws train: a small transformer, its batches, the three engines and one loop for all of them."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import rankshift as rs
from rankshift.core import shard
from rankshift.core.method import Method

Engine = Literal["one", "ddp", "fsdp2", "hsdp"]  # the last: FSDP2 on a mesh of copies × parts, for four ranks
VOCAB, WIDTH, HIDDEN, BATCH, LENGTH = 13, 12, 18, 4, 5
TOTAL = 4  # updates that every run says it will take, for methods with a schedule; laws take so many or fewer


class Block(nn.Module):
    """Attention and a gated MLP, both before a norm. Widths are such that no axis splits evenly over 4 ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (m(h).unflatten(-1, (2, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        weights = (q @ k.mT / WIDTH**0.5).softmax(-1)
        x = x + self.o((weights @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Tiny(nn.Module):
    """A language model of 13 words."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def tiny(dtype: torch.dtype = torch.float32, seed: int = 0, blocks: int = 1) -> Tiny:
    """The same model on every call, whatever the global random state, which is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Tiny(blocks).to(dtype)


def batch(step: int, size: int = BATCH) -> Tensor:
    """Ids of update ``step``, (size, LENGTH + 1)."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(VOCAB, (size, LENGTH + 1), generator=generator)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross entropy of the next word."""
    logits = model(ids[:, :-1]).flatten(0, 1)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), ids[:, 1:].flatten())


def objective(run: rs.Run, model: nn.Module, ids: Tensor) -> Tensor:
    """What a batch is trained on: the loss of the task, and what the method adds to it."""
    return run.loss(loss_of(model, ids), ids[:, :-1])


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def scramble() -> None:
    """Another global random state on every rank: nothing that is shared may depend on it."""
    for seeded in (torch.manual_seed, np.random.seed, random.seed):
        seeded(77 + 13 * rank())


def wrap(engine: Engine, model: nn.Module, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    """The model as an engine runs it."""
    if engine == "ddp":
        return DistributedDataParallel(model, broadcast_buffers=False)
    if engine in ("fsdp2", "hsdp"):
        if engine == "fsdp2":
            mesh = init_device_mesh("cpu", (world(),))
        else:
            mesh = init_device_mesh("cpu", (2, world() // 2), mesh_dim_names=("copies", "parts"))
        options: dict[str, Any] = {"mesh": mesh} | ({"mp_policy": policy} if policy else {})
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, **options)
        fully_shard(model, **options)
    return model


@dataclass
class Session:
    """A run under an engine, with optimizer and scheduler: what a training script holds."""

    engine: Engine
    run: rs.Run
    accumulate: int = 1
    lr: float = 1e-2
    policy: MixedPrecisionPolicy | None = None
    noisy: bool = False  # forwards draw from the global generator: make what they draw a function of the step
    check: bool = True  # look at the first gradients
    objective: Callable[[rs.Run, nn.Module, Tensor], Tensor] = objective
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = self.run.model.train()
        self.wrapped = wrap(self.engine, self.model, self.policy)
        self.optimizer = self.run.optimizer(lr=self.lr, weight_decay=0.1, eps=1e-6, check_gradients=self.check)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: 1 / (1 + 0.3 * n))

    def step(self) -> None:
        """One update on this rank's part of the global batch of the run's step."""
        ids = batch(self.run.step)
        if self.engine != "one":
            ids = ids.chunk(world())[rank()]
        if self.noisy:
            torch.manual_seed(100 * self.run.step + rank())
        parts = ids.chunk(self.accumulate)
        total = 0.0
        for i, part in enumerate(parts):
            with self._sync(i == len(parts) - 1):
                loss = self.objective(self.run, self.wrapped, part) / len(parts)
                loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_([p for _, p in self.run.trainable()], 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.losses.append(total)

    @contextlib.contextmanager
    def _sync(self, last: bool) -> Iterator[None]:
        if isinstance(self.wrapped, DistributedDataParallel) and not last:
            with self.wrapped.no_sync():
                yield
            return
        if isinstance(self.wrapped, FSDPModule):
            self.wrapped.set_requires_gradient_sync(last)
        yield

    def steps(self, n: int) -> Session:
        for _ in range(n):
            self.step()
        return self

    # ---- through files

    def save(self) -> bytes:
        """What a script saves: run, optimizer, scheduler; whole tensors under FSDP2."""
        whole = dcp.StateDictOptions(full_state_dict=True)
        if self.engine in ("fsdp2", "hsdp"):
            optimizer = dcp.get_optimizer_state_dict(self.model, self.optimizer, options=whole)
        else:
            optimizer = self.optimizer.state_dict()
        buffer = io.BytesIO()
        state = {"run": self.run.state_dict(), "optimizer": optimizer, "scheduler": self.scheduler.state_dict()}
        torch.save(state, buffer)
        return buffer.getvalue()

    @classmethod
    def load(
        cls, saved: bytes, engine: Engine, model: nn.Module, method: Method | None = None, **options: Any
    ) -> Session:
        """A new session on fresh objects: restored, or with ``method`` attached first and then loaded."""
        state = torch.load(io.BytesIO(saved), weights_only=True)
        if method is None:
            run = rs.restore(model, state["run"])
        else:
            run = rs.attach(model, method, seed=99)  # another seed: loading brings the right one
            run.load_state_dict(state["run"])
        session = cls(engine, run, **options)
        if engine in ("fsdp2", "hsdp"):
            whole = dcp.StateDictOptions(full_state_dict=True)
            dcp.set_optimizer_state_dict(session.model, session.optimizer, state["optimizer"], options=whole)
        else:
            session.optimizer.load_state_dict(state["optimizer"])
        session.scheduler.load_state_dict(state["scheduler"])
        return session

    # ---- looked at from outside

    def state(self, whole: bool = False) -> dict[str, Tensor]:
        """Everything that training has made: adapters, base, buffers, moments, clock; this rank's part, or whole."""
        shard.settle(self.model)
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name, parameter in self.run.trainable():
            tensors |= {f"{name}/{key}": value for key, value in self.optimizer.state.get(parameter, {}).items()}
        for name in self.run.adapters:
            for site, adapter in self.run.adapter(name).items():
                tensors |= {f"{name}/{site}.{leaf}": tensor for leaf, tensor in adapter.aside().items()}
        found = {name: shard.whole(t) if whole else shard.local(t)[0] for name, t in tensors.items()}
        group = self.optimizer.param_groups[0]
        found["clock"] = torch.tensor([group["updates"], group["skipped"], self.run.step])
        found["lr"] = torch.tensor([g["lr"] for g in self.optimizer.param_groups], dtype=torch.float64)
        return {name: tensor.detach().clone() for name, tensor in found.items()}


def begin(
    engine: Engine,
    method: Method,
    dtype: torch.dtype = torch.float32,
    base_seed: int = 0,
    blocks: int = 1,
    total: int = TOTAL,
    **options: Any,
) -> Session:
    """A new session: model, attach, wrap, optimizer."""
    scramble()
    return Session(engine, rs.attach(tiny(dtype, base_seed, blocks), method, total_steps=total), **options)


def evaluate(model: nn.Module) -> Tensor:
    """Logits on a fixed batch, in eval mode."""
    was = model.training
    model.eval()
    with torch.no_grad():
        out: Tensor = model(batch(-1)[:, :-1])
    model.train(was)
    return out.clone()


def same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0, what: str = "") -> None:
    """Raise AssertionError, naming a tensor, unless two states are equal: bit for bit, or to ``tolerance``."""
    assert a.keys() == b.keys(), f"{what}: only in one: {sorted(a.keys() ^ b.keys())[:4]}"
    for name in a:
        x, y = a[name], b[name]
        assert (x.shape, x.dtype) == (y.shape, y.dtype), f"{what}: {name}: {x.shape} {x.dtype}, {y.shape} {y.dtype}"
        if tolerance == 0:
            assert torch.equal(x, y), f"{what}: {name} differs in its bits, by at most {gap(x, y):.3g}"
        else:
            assert gap(x, y) <= tolerance, f"{what}: {name} differs by {gap(x, y):.3g} > {tolerance}"


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference."""
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


def fails(law: Callable[[], Any]) -> str:
    """The text of the AssertionError that a law raises; "" if it holds."""
    try:
        law()
    except AssertionError as error:
        return str(error) or "AssertionError"
    return ""
