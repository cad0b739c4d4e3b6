"""SwitchLoRA: in every update a few rows of A and columns of B are exchanged. Zhou et al. 2024, arXiv 2406.06564.

    y = W x + s·B(A x),   s = alpha/r;   A (r, n) and B (m, r) train, W is rewritten by exchanges alone
    aᵢ → a'   W ← W + s·bᵢ (aᵢ − a')ᵀ        bⱼ → b'   W ← W + s·(bⱼ − b') aⱼᵀ        so that W + s·BA stays
    per update  q(t) = (r / interval)·ρ^((t+1) / (ratio·T)) of each, as an integer ⌊q⌋ + Bernoulli(q − ⌊q⌋)

The gradient of bᵢ is s·G aᵢ: where aᵢ is exchanged, what Adam knows of bᵢ means nothing any more. So an exchange of aᵢ
resets bᵢ (m, v and a step count of its own) and freezes it for N updates, this one included, and the other way round;
the exchanged vector itself keeps its state and trains on.

Candidates come from a pool of c = min(m, n) vectors for A and one for B, on the CPU, in order; what is taken out goes
back as it was trained to (methods/switchlora_pool.py). Rows of A are exchanged in order too, columns of B half a round
ahead, and never so many that the two meet, frozen ones included. So everything follows from one integer, exchanges so
far, and for what is frozen from those of the last N − 1 updates.

A and B start uniform, with std_A = (r √m / n^1.5)^¼ √g and std_B = (r / √(mn))^¼ √g, g = 1/√3, where std(s·BA) is
1/√(3n), that of torch's own linear layers; W gives up s·BA for it, so the function is that of the model as it came.

What differs from the released code, which
- adds corrections to W in bf16: with no learning at all W + s·BA drifts by 16 % in 8000 updates. Here W is fp32;
- clips gradients before it zeroes the frozen ones, as is done here, because it is the trainer that clips;
- draws counts from numpy's global generator: here from a key of the layer and the update, equal on all ranks;
- exchanges by loops over layers, with transfers that are waited for: here all layers of a shape go together;
- skips layers with min(m, n) ≤ r: here they are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rankshift.core import shard
from rankshift.core.adapter import Adapter
from rankshift.core.base import Base, add_products_
from rankshift.core.errors import ConfigError, RankTooLarge, UnsupportedLayer
from rankshift.core.event import Event, Moment, Tick
from rankshift.core.form import EmbeddingForm
from rankshift.core.method import Method, Shared
from rankshift.core.random import Key
from rankshift.core.site import Spec
from rankshift.methods import switchlora_pool as pool
from rankshift.methods.lora import LoRA, LoRALayer
from rankshift.optim import Optimizer
from rankshift.optim.rounding import narrow
from rankshift.optim.vectors import Vectors

_GAIN = 3**-0.5  # g: torch's Linear draws from ±√3·g/√n
_TOGETHER = 1 << 25  # numbers of A and B that are copied at once


class SwitchLayer(LoRALayer):
    """y = W x + s·B(A x), with the candidates for A and B.

    Row i of A and column (i + r//2) mod r of B are the next to go at exchange i mod r. Before the first one the last r
    candidates are out.
    """

    def __init__(self, base: Base, spec: Spec, rank: int, scale: float, config: LoRA, freeze: int):
        super().__init__(base, spec, rank, scale, config)
        self.silent = frozenset()
        # plain tensors on the CPU: nobody moves, shards or broadcasts them
        self.pool_A = torch.empty(spec.max_rank, spec.into, dtype=spec.master, device="cpu")  # (c, n)
        self.pool_B = torch.empty(spec.max_rank, spec.out, dtype=spec.master, device="cpu")  # (c, m)
        self.clock = torch.zeros(freeze, dtype=torch.int64, device="cpu")
        """(N,): exchanges of A so far, which are those of B; then those in each of the last N − 1 updates."""

    def aside(self) -> dict[str, Tensor]:
        return {"pool_A": self.pool_A, "pool_B": self.pool_B, "clock": self.clock}


@dataclass(frozen=True)
class Move:
    """What one layer does in one update."""

    layer: SwitchLayer
    A: Tensor
    B: Tensor
    before: int  # exchanges so far
    count: int  # of A now, and as many of B
    frozen: int  # vectors of each that are frozen in this update: those of the last N updates
    clock: list[int]  # after it


@dataclass(frozen=True)
class Switch:
    """Exchange vectors, reset and freeze their counterparts, in all layers of a shape at once."""

    interval: float
    ratio: float
    rho: float
    moment: ClassVar[Moment] = Moment.GRADS

    def due(self, tick: Tick) -> bool:
        return True

    def apply(self, adapter: Adapter, tick: Tick) -> None:
        self.apply_all([adapter], tick)

    def apply_all(self, adapters: Sequence[Adapter], tick: Tick) -> None:
        self.launch(adapters, tick)()

    def launch(self, adapters: Sequence[Adapter], tick: Tick, void: Tensor | None = None) -> Callable[[], None]:
        moves = self.moves(adapters, tick)
        alike: dict[Any, list[Move]] = {}
        for move in moves:
            A, B = move.A, move.B
            alike.setdefault((A.shape, B.shape, A.dtype, A.device, shard.is_sharded(A)), []).append(move)
        exchanges: list[Exchange] = []
        for found in alike.values():
            count = max(1, _TOGETHER // (found[0].A.numel() + found[0].B.numel()))
            for together in (found[i : i + count] for i in range(0, len(found), count)):
                if some := [move for move in together if move.count]:
                    exchanges.append(exchange(some, void))
                hold(together, tick, void)

        def keep() -> None:
            for done in exchanges:
                done.put_back_()
            if moves:
                after = torch.tensor([move.clock for move in moves]).unbind()
                torch._foreach_copy_([move.layer.clock for move in moves], list(after))

        return keep

    def rate(self, rank: int, tick: Tick) -> float:
        """q(t): exchanges of A, and of B, that an update has on average; t and T are those of the phase."""
        assert tick.total is not None
        t, total = tick.step - tick.began, tick.total - tick.began
        return rank / self.interval * math.pow(self.rho, (t + 1) / (self.ratio * total))

    def moves(self, adapters: Sequence[Adapter], tick: Tick) -> list[Move]:
        """What layers do in this update; those that do nothing are left out."""
        found: list[Move] = []
        key = tick.key("switch")
        for adapter in adapters:
            assert isinstance(adapter, SwitchLayer)
            A, B = adapter.A, adapter.B
            rank, (before, *recent) = A.shape[0], adapter.clock.tolist()
            q, still = self.rate(rank, tick), sum(recent)
            u = ((key / adapter.label / adapter.site).word >> 11) * 2.0**-53  # uniform in [0, 1)
            wish = math.floor(q) + (u < q % 1)
            # B's pointer is r//2 ahead: A must not reach it, nor what is frozen behind it
            count = min(wish, rank // 2 - still, adapter.pool_A.shape[0] - rank)
            if count or still:
                clock = [before + count, count, *recent][: len(recent) + 1]
                found.append(Move(adapter, A, B, before, count, still + count, clock))
        return found


@dataclass(frozen=True)
class Exchange:
    """What was taken out of layers of one shape, on its way back to their pools."""

    moves: Sequence[Move]
    old: tuple[Callable[[], Tensor], Callable[[], Tensor]]  # (L, K, n), (L, K, m), on the host once they are asked for

    def put_back_(self) -> None:
        """The old vectors to where they were taken from, r exchanges ago."""
        where = [move.before - move.A.shape[0] for move in self.moves]
        counts = [move.count for move in self.moves]
        pool.put_back([move.layer.pool_A for move in self.moves], where, counts, self.old[0]())
        pool.put_back([move.layer.pool_B for move in self.moves], where, counts, self.old[1]())


def exchange(moves: Sequence[Move], void: Tensor | None) -> Exchange:
    """Rows of A and columns of B against candidates, in layers of one shape; W takes the difference.

    Under sharding every rank must call this. Where ``void`` is 1 all are exchanged against themselves.
    """
    layers, rank, device = [move.layer for move in moves], moves[0].A.shape[0], moves[0].A.device
    starts, counts = [move.before for move in moves], [move.count for move in moves]
    most = max(counts)
    # layers with fewer exchanges than the most go along with vectors that are exchanged against themselves
    first, number = _sent([starts, counts], device)
    if void is not None:
        number = number * (1 - void)
    each, places = torch.arange(len(moves), device=device)[:, None], torch.arange(most, device=device)
    real = (places < number[:, None])[:, :, None]
    rows = (first[:, None] + places) % rank  # (L, K)
    columns = (rows + rank // 2) % rank

    A, B = _stacked([move.A for move in moves]), _stacked([move.B for move in moves]).mT  # (L, r, n), (L, r, m)
    old_A, old_B = A[each, rows], B[each, columns]  # (L, K, n), (L, K, m)
    old = pool.given(old_A), pool.given(old_B)
    new_A = torch.where(real, pool.taken([layer.pool_A for layer in layers], starts, most, device), old_A)
    new_B = torch.where(real, pool.taken([layer.pool_B for layer in layers], starts, most, device), old_B)
    # W += s·b (a − a')ᵀ with the B of now, then s·(b − b') aᵀ with the new A: as one product
    A[each, rows] = new_A
    left = torch.cat([B[each, rows], old_B - new_B], 1).mul_(layers[0].scale)  # (L, 2K, m)
    right = torch.cat([old_A - new_A, A[each, columns]], 1)  # (L, 2K, n)
    B[each, columns] = new_B
    add_products_([layer.base for layer in layers], left.mT, right)
    torch._foreach_copy_(*_here([move.A for move in moves], A))
    torch._foreach_copy_(*_here([move.B for move in moves], B.mT))
    return Exchange(moves, old)


def hold(moves: Sequence[Move], tick: Tick, void: Tensor | None) -> None:
    """Columns of B whose rows of A were exchanged in one of the last N updates get no gradient, and Adam knows nothing
    of them; its count begins anew for those of this update. Likewise rows of A and columns of B.

    Layers of one shape; the optimizer has no state before the first update. Where ``void`` is 1 nothing changes.
    """
    A, B = moves[0].A, moves[0].B
    rank, device = A.shape[0], A.device
    ends, counts = [move.before + move.count for move in moves], [move.count for move in moves]
    end, number, still = _sent([ends, counts, [move.frozen for move in moves]], device)
    age = (end[:, None] - 1 - torch.arange(rank, device=device)) % rank  # (L, r), 0: row of A that was exchanged last
    free, older = (age >= still[:, None]).to(A.dtype), (age >= number[:, None]).float()  # 0: is held, begins anew
    if void is not None:
        free, older = torch.maximum(free, void.to(free.dtype)), torch.maximum(older, void)
    ahead = rank // 2  # columns of B
    free_A, older_A = (x.roll(ahead, 1)[:, :, None] for x in (free, older))
    free_B, older_B = (x[:, None, :] for x in (free, older))
    for parameters, kept, counted in (
        ([move.A for move in moves], free_A.expand(-1, *A.shape).contiguous(), older_A),
        ([move.B for move in moves], free_B.expand(-1, *B.shape).contiguous(), older_B),
    ):
        states = [tick.state(p) for p in parameters]
        _scale_([p.grad for p in parameters], kept)
        for name, factors in (("exp_avg", kept), ("exp_avg_sq", kept), ("step", counted)):
            _scale_([state.get(name) for state in states], factors)


def _scale_(tensors: Sequence[Tensor | None], factors: Tensor) -> None:
    """Each tensor times its factors, (L, …); None is left out."""
    there = [t for t in tensors if t is not None]
    if len(there) < len(tensors):
        factors = factors[[i for i, t in enumerate(tensors) if t is not None]]
    if there:
        torch._foreach_mul_(*_here(there, factors))


def _sent(numbers: list[list[int]], device: torch.device) -> tuple[Tensor, ...]:
    """Numbers of each layer on the device, which nobody waits for."""
    return torch.tensor(numbers, pin_memory=device.type == "cuda").to(device, non_blocking=True).unbind()


def _stacked(parameters: Sequence[Tensor]) -> Tensor:
    """Whole parameters, (L, …), a new tensor. Under sharding every rank must call this."""
    return torch.stack([shard.whole(p) for p in parameters] if shard.is_sharded(parameters[0]) else list(parameters))


def _here(tensors: Sequence[Tensor], values: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What of each tensor is held here, and of its values, (L, …)."""
    if not shard.is_sharded(tensors[0]):
        return list(tensors), list(values.unbind())
    parts = [shard.local(t) for t in tensors]
    return [part for part, _ in parts], [v[held] for v, (_, held) in zip(values, parts, strict=True)]


@dataclass(frozen=True, kw_only=True)
class SwitchLoRA(Method):
    """Training of full weights through factors whose vectors are exchanged, a few in every update."""

    name: ClassVar[str] = "switchlora"
    paper: ClassVar[str] = "Zhou et al. 2024, arXiv 2406.06564"
    summary: ClassVar[str] = "full weights through low-rank factors, whose vectors are exchanged a few at a time"
    formula: ClassVar[str] = "r·(out + in)"
    reversible: ClassVar[bool] = False
    trains_base: ClassVar[bool] = True
    default_lr: ClassVar[float] = 2e-2

    rank: int = 128
    """r, below min(out, in) of every layer. The paper's headline results have a quarter of the model's width; 128 is
    the released code's default."""
    alpha: float = 1.0
    """Numerator of the scale s = alpha / rank. 1 in the released code, and what the start of A and B is made for."""
    interval: float = 40.0
    """Updates that a vector lives on average at the start: r / interval are exchanged in one. 40 in the released code;
    inf never exchanges."""
    ratio: float = 0.1
    """Share of the run after which exchanges have fallen to ρ of their first rate. 0.1 in the released code, so that
    they are over after four tenths of the run."""
    rho: float = 0.3
    """ρ, in (0, 1]. 0.3 in the released code."""
    freeze: int = 5
    """N: updates for which the counterpart of an exchanged vector stands still, this one included. At most half of
    interval. 5 in the released code."""
    rest: Literal["train", "freeze"] = "train"
    """What is not adapted (embeddings, norms, biases, the head): trained where it is, as in the paper, or left as it
    is."""
    rest_lr_ratio: float = 1.0
    """The learning rate of that is this many times lr. 1 in the released code, where it is 20 times what embeddings and
    norms have in full training."""

    def check(self) -> None:
        if self.rank < 2:
            raise ConfigError(f"SwitchLoRA.rank = {self.rank}: it needs at least 2, one vector to stay while one goes.")
        for name in ("alpha", "ratio", "rest_lr_ratio"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"SwitchLoRA.{name} = {getattr(self, name)} is not a positive number.")
        if not 0 < self.rho <= 1:
            raise ConfigError(f"SwitchLoRA.rho = {self.rho} is not in (0, 1].")
        if self.freeze < 1:
            raise ConfigError(f"SwitchLoRA.freeze = {self.freeze}: a number of updates, at least 1.")
        if not self.interval >= 2 * self.freeze:
            raise ConfigError(
                f"SwitchLoRA(interval={self.interval:g}, freeze={self.freeze}): a vector lives {self.interval:g} "
                "updates on average, and is frozen for so many of them that exchanges of A and B would meet. Set "
                f"interval to at least {2 * self.freeze}, or lower freeze."
            )
        if self.modules_to_save and self.rest == "train":
            raise ConfigError(
                'SwitchLoRA(rest="train") trains what is not adapted where it is, without copies: leave '
                'modules_to_save out, or set rest="freeze".'
            )

    # ---- one site

    def fit(self, spec: Spec) -> None:
        leaf = spec.name.rpartition(".")[2]
        if isinstance(spec.form, EmbeddingForm):
            raise UnsupportedLayer(
                f"{spec.name} is an Embedding: its columns are tokens, each of which is seen now and then, and a "
                'vector of A has one entry for each. Exclude it in targets: rest="train" trains it where it is.'
            )
        if spec.form.stacked:
            raise UnsupportedLayer(
                f"{spec.name} is a stack of expert weights: every expert would want candidates of its own. Exclude it "
                "in targets."
            )
        if narrow(spec.dtype):
            kind = str(spec.dtype).removeprefix("torch.")
            raise UnsupportedLayer(
                f"{spec.name} has weights in {kind}, and SwitchLoRA rewrites them in every update: what is rounded "
                "away adds up to a tenth of the function and more. Load the model in fp32 and train under autocast."
            )
        if self.rank >= spec.max_rank:
            raise RankTooLarge(
                f"rank {self.rank} at {spec.name} leaves nothing to exchange: it must be below min(out, in) = "
                f'{spec.max_rank}. Lower rank, or exclude "{leaf}" in targets.'
            )

    def rank_at(self, name: str, found: Any = None) -> int:
        return self.rank

    def share(
        self, specs: Sequence[Spec], ranks: Mapping[str, int], saved: Mapping[str, Any] | None = None
    ) -> Shared | None:
        pool.check_memory(specs)
        return None

    def adapt(self, base: Base, spec: Spec, rank: int, shared: Any = None) -> Adapter:
        if not base.exact:
            raise UnsupportedLayer(
                f"{spec.name} is held in a storage that rounds anew at every exchange, so the function would drift. "
                "Attach with base=None."
            )
        config = LoRA(rank=rank, alpha=self.alpha)
        return SwitchLayer(base, spec, rank, self.alpha / rank, config, self.freeze)

    @torch.no_grad()
    def start(self, adapter: Adapter, key: Key, found: Any = None) -> None:
        assert isinstance(adapter, SwitchLayer)
        m, n, r = adapter.out_features, adapter.in_features, adapter.rank
        std_A, std_B = ((r * x) ** 0.25 * _GAIN**0.5 for x in (m**0.5 / n**1.5, (m * n) ** -0.5))
        adapter.pool_A.copy_(pool.candidates(key / "A", (min(m, n), n), std_A, adapter.pool_A.dtype))
        adapter.pool_B.copy_(pool.candidates(key / "B", (min(m, n), m), std_B, adapter.pool_B.dtype))
        adapter.clock.zero_()
        adapter.A.copy_(adapter.pool_A[-r:])
        adapter.B.copy_(adapter.pool_B[-r:].roll(r // 2, 0).t())
        adapter.base.add_(lambda rows: -adapter.delta(rows))

    # ---- the model

    @property
    def needs_total(self) -> bool:
        return self.interval < math.inf

    def in_place(self, name: str, adapted: bool) -> bool:
        return self.rest == "train" and (not adapted or name.rpartition(".")[2] == "bias")

    def must_learn(self, name: str) -> bool:
        return False  # models own parameters that a task never reaches, such as BERT's pooler

    def learning_rates(self, names: Sequence[str]) -> dict[str, float]:
        if self.rest_lr_ratio == 1:
            return {}
        return {name: self.rest_lr_ratio for name in names if name.rpartition(".")[2] not in ("A", "B")}

    def transform(self, name: str, tensor: Tensor, spec: Spec | None = None) -> Any:
        if narrow(tensor.dtype):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ConfigError(
                f"{name} is in {kind}, where small steps are lost. Load the model in fp32 and train under autocast."
            )
        return {"A": Vectors(0), "B": Vectors(1)}.get(name.rpartition(".")[2])

    def events(self) -> tuple[Event, ...]:
        return (Switch(self.interval, self.ratio, self.rho),) if self.interval < math.inf else ()

    def cannot_ride(self, optimizer: torch.optim.Optimizer) -> str:
        if isinstance(optimizer, Optimizer):
            return ""
        return (
            f"resets Adam's state of single vectors, and {type(optimizer).__name__} counts the steps of whole tensors. "
            "Use run.optimizer()."
        )

    def metrics(self, adapters: Mapping[str, Adapter]) -> dict[str, float]:
        layers = [adapter for adapter in adapters.values() if isinstance(adapter, SwitchLayer)]
        return {"exchanged": float(2 * sum(int(layer.clock[0]) for layer in layers))}

    def phase_end(self, start: int, total: int | None) -> int | None:
        if self.needs_total and total is not None and start >= total:
            raise ConfigError(
                f"This phase of SwitchLoRA begins at update {start} of {total}: there is no rest of the run for its "
                "rate to fall over. Set run.total_steps higher."
            )
        return None

    @property
    def adjustable(self) -> frozenset[str]:
        return frozenset({"interval", "ratio", "rho", "rest_lr_ratio"})

    @property
    def solitary(self) -> str:
        return "rewrites the base, which all adapters would share"
