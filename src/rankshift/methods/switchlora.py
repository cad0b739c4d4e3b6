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
- exchanges by loops over layers, with transfers that are waited for: here all layers go together, on a GPU in three
  launches that read and write the pools by themselves (ops/vector_exchange);
- skips layers with min(m, n) ≤ r: here they are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from rankshift.core import shard
from rankshift.core.adapter import Adapter
from rankshift.core.base import Base, Dense, add_products_
from rankshift.core.errors import ConfigError, RankTooLarge, UnsupportedLayer
from rankshift.core.event import Event, Moment, Tick
from rankshift.core.form import EmbeddingForm
from rankshift.core.method import Method, Shared
from rankshift.core.random import Key
from rankshift.core.site import Spec
from rankshift.methods import switchlora_pool as pool
from rankshift.methods.lora import LoRA, LoRALayer
from rankshift.ops.vector_exchange import described, fits, hold_, plain, sent, swap_
from rankshift.optim import Optimizer
from rankshift.optim.rounding import narrow
from rankshift.optim.vectors import Vectors

_GAIN = 3**-0.5  # g: torch's Linear draws from ±√3·g/√n
_TOGETHER = 1 << 25  # numbers of A and B that are copied at once
_STATE = ("exp_avg", "exp_avg_sq", "step")


class SwitchLayer(LoRALayer):
    """y = W x + s·B(A x), with the candidates for A and B.

    Row i of A and column (i + r//2) mod r of B are the next to go at exchange i mod r. Before the first one the last r
    candidates are out.
    """

    def __init__(self, base: Base, spec: Spec, rank: int, scale: float, config: LoRA, freeze: int):
        super().__init__(base, spec, rank, scale, config)
        self.silent = frozenset()
        self.ring_A, self.ring_B = (pool.Ring(spec.max_rank, length, spec.master) for length in (spec.into, spec.out))
        self.counts = np.zeros(freeze, np.int64)
        self._seen: tuple[tuple[int, ...], pool.Ints | None] = (), None

    @property
    def pool_A(self) -> Tensor:  # noqa: N802
        """Candidates for rows of A, (c, n), on the CPU."""
        return torch.from_numpy(self.ring_A.values)

    @property
    def pool_B(self) -> Tensor:  # noqa: N802
        """Candidates for columns of B, (c, m), on the CPU."""
        return torch.from_numpy(self.ring_B.values)

    @property
    def clock(self) -> Tensor:
        """(N,), on the CPU: exchanges of A so far, which are those of B; then those in each of the last N − 1
        updates."""
        return torch.from_numpy(self.counts)

    def known(self, A: Tensor, B: Tensor) -> pool.Ints | None:
        """What kernels know of this layer, to which these belong; None if they cannot do everything for it."""
        weight = self.base._parameters.get("weight")
        gradients = A.grad, B.grad
        if not type(weight) is type(A) is type(B) is nn.Parameter or not all(g is None or plain(g) for g in gradients):
            return None
        now = id(weight), id(A), id(B), weight.data_ptr(), A.data_ptr(), B.data_ptr()
        if self._seen[0] != now:  # to look at all of it takes longer than to exchange it
            self._seen = now, self._described(weight, A, B)
        return self._seen[1]

    def _described(self, weight: Tensor, A: Tensor, B: Tensor) -> pool.Ints | None:
        if not (isinstance(self.base, Dense) and self.base.takes(A) and fits(weight, A, B)):
            return None
        pools = self.ring_A.address(A.device), self.ring_B.address(A.device)
        return described(weight, A, B, *pools) if all(pools) else None

    def aside(self) -> dict[str, Tensor]:
        return {"pool_A": self.pool_A, "pool_B": self.pool_B, "clock": self.clock}


@dataclass(frozen=True)
class Moves:
    """What some layers do in one update; those that exchange are first."""

    layers: list[SwitchLayer]
    A: list[Tensor]
    B: list[Tensor]
    before: pool.Ints  # (L,), exchanges so far
    count: pool.Ints  # (L,), of A now, and as many of B
    frozen: pool.Ints  # (L,), vectors of each that are frozen in this update: those of the last N updates
    clock: pool.Ints  # (L, N), after it

    @property
    def going(self) -> int:
        """How many layers exchange."""
        return int(np.count_nonzero(self.count))

    def of(self, some: Sequence[int]) -> Moves:
        """Those of some of the layers."""
        at = list(some)
        layers, A, B = [self.layers[i] for i in at], [self.A[i] for i in at], [self.B[i] for i in at]
        return Moves(layers, A, B, self.before[at], self.count[at], self.frozen[at], self.clock[at])

    def split(self) -> tuple[list[tuple[Moves, pool.Ints]], Moves]:
        """Those of layers for which kernels do everything, by GPU, with what they know of them; and the others'."""
        quick: dict[torch.device, list[int]] = {}
        known = [layer.known(A, B) for layer, A, B in zip(self.layers, self.A, self.B, strict=True)]
        for i, (one, A) in enumerate(zip(known, self.A, strict=True)):
            if one is not None:
                quick.setdefault(A.device, []).append(i)
        others = self.of([i for i, one in enumerate(known) if one is None])
        return [(self.of(some), np.array([known[i] for i in some]).T) for some in quick.values()], others

    def batches(self) -> list[list[Moves]]:
        """For each type, dtype and device of A: layers of one shape, so many that they stay below a bound."""
        kinds: dict[Any, dict[Any, list[int]]] = {}
        for i, (layer, A) in enumerate(zip(self.layers, self.A, strict=True)):
            shape = layer.out_features, layer.in_features
            kinds.setdefault((type(A), A.dtype, A.device), {}).setdefault(shape, []).append(i)
        found: list[list[Moves]] = [[] for _ in kinds]
        for batches, shapes in zip(found, kinds.values(), strict=True):
            for some in shapes.values():
                size = max(1, _TOGETHER // (self.A[some[0]].numel() + self.B[some[0]].numel()))
                batches += [self.of(some[i : i + size]) for i in range(0, len(some), size)]
        return found


@dataclass(frozen=True)
class Switch:
    """Exchange vectors, reset and freeze their counterparts, in all layers together."""

    rank: int
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
        late = []
        quick, others = moves.split()
        for some, known in quick:
            exchange_and_hold(some, known, self.rank, tick, void)
        for batches in others.batches():
            if going := [batch.of(range(batch.going)) for batch in batches if batch.going]:
                late.append(exchange(going, self.rank, void))
            hold(batches, self.rank, tick, void)

        def keep() -> None:
            for put_back in late:
                put_back()
            for layer, after in zip(moves.layers, moves.clock, strict=True):
                layer.counts[:] = after

        return keep

    def rate(self, tick: Tick) -> float:
        """q(t): exchanges of A, and of B, that an update has on average; t and T are those of the phase."""
        assert tick.total is not None
        t, total = tick.step - tick.began, tick.total - tick.began
        return self.rank / self.interval * math.pow(self.rho, (t + 1) / (self.ratio * total))

    def moves(self, adapters: Sequence[Adapter], tick: Tick) -> Moves:
        """What layers do in this update; those that do nothing are left out."""
        layers = [adapter for adapter in adapters if isinstance(adapter, SwitchLayer)]
        clocks = np.stack([layer.counts for layer in layers])
        before, still = clocks[:, 0], clocks[:, 1:].sum(1)
        q, words = self.rate(tick), tick.key("switch").words((layer.label, layer.site) for layer in layers)
        u = np.array([word >> 11 for word in words]) * 2.0**-53  # uniform in [0, 1)
        wish = math.floor(q) + (u < q % 1)
        # B's pointer is r//2 ahead: A must not reach it, nor what is frozen behind it
        spare = np.array([layer.ring_A.count for layer in layers]) - self.rank
        count = np.minimum(np.minimum(wish, self.rank // 2 - still), spare)
        after = np.column_stack([before + count, count, clocks[:, 1:]])[:, : clocks.shape[1]]
        A, B = ([layer._parameters[name] for layer in layers] for name in "AB")  # a tenth of the time of layer.A
        moves = Moves(layers, A, B, before, count, still + count, after)  # type: ignore[arg-type]
        return moves.of([*np.flatnonzero(count).tolist(), *np.flatnonzero((count == 0) & (still > 0)).tolist()])


def exchange_and_hold(moves: Moves, known: pool.Ints, rank: int, tick: Tick, void: Tensor | None) -> None:
    """What :func:`exchange` and :func:`hold` do, by kernels, which read and write the pools by themselves."""
    device, going = moves.A[0].device, moves.going
    if going:
        some = moves.layers[:going]
        swap_(known[:, :going], moves.before[:going], moves.count[:going], rank, some[0].scale, device, void)
        bases = [layer.base for layer in some]
        weights: list[Any] = [base._parameters["weight"] for base in bases]  # a tenth of the time of base.weight
        increment_version([*moves.A[:going], *moves.B[:going], *weights])  # the kernels write past autograd
        for base in bases:
            if not base.changed:
                base.changed = True
    addresses = [
        0 if tensor is None else tensor.data_ptr()
        for factors in zip(moves.A, moves.B, strict=True)
        for p in factors
        for tensor in (p.grad, *map(tick.state(p).get, _STATE))
    ]
    told = np.array([moves.before + moves.count, moves.frozen, moves.count])
    hold_(known, np.array(addresses).reshape(-1, 8).T, told, rank, device, void)


def exchange(batches: Sequence[Moves], rank: int, void: Tensor | None) -> Callable[[], None]:
    """Rows of A and columns of B against candidates, in batches of layers of one shape; W takes the difference. What
    travels does so for all batches together.

    Under sharding every rank must call this. Where ``void`` is 1 vectors are exchanged against themselves.

    Returns:
        What puts the old vectors into the pools, to where they were taken from, r exchanges ago.
    """
    device = batches[0].A[0].device
    before, count = (np.concatenate(x) for x in zip(*((b.before, b.count) for b in batches), strict=True))
    most, sizes = int(count.max()), [len(batch.layers) for batch in batches]
    turns = np.arange(most)[:, None] + before
    turns = np.concatenate([turns, turns + rank // 2]) % rank  # (2K, L), rows of A that go, then columns of B
    numbers = _sent([count[None], turns], device, void)
    each = torch.arange(max(sizes), device=device)[:, None]
    # layers with fewer exchanges than the most go along with vectors that are exchanged against themselves
    real = (torch.arange(most, device=device) < numbers[0, :, None])[:, :, None]
    rings = [
        rings for b in batches for rings in ([x.ring_A.values for x in b.layers], [x.ring_B.values for x in b.layers])
    ]
    candidates = pool.taken(rings, [b.before for b in batches for _ in "AB"], most, device)
    removed = torch.empty_like(candidates)
    new, old = (iter(pool.parts(vectors, rings, most)) for vectors in (candidates, removed))
    for batch, at, mine in zip(
        batches, numbers[1:].t().split_with_sizes(sizes), real.split_with_sizes(sizes), strict=True
    ):
        layers, those = batch.layers, each[: len(at)]
        A, B = _stacked(batch.A), _stacked(batch.B).mT  # (L, r, n), (L, r, m)
        right, left = A[those, at], B[those, at]  # (L, 2K, n), (L, 2K, m)
        for stack, vectors, places in ((A, right[:, :most], at[:, :most]), (B, left[:, most:], at[:, most:])):
            next(old).copy_(vectors)
            fresh = torch.where(mine, next(new), vectors)
            stack[those, places] = fresh
            vectors -= fresh
        # W += s·b (a − a')ᵀ + s·(b − b') aᵀ as one product: no row goes whose column does, so the order is all the same
        add_products_([layer.base for layer in layers], left.mul_(layers[0].scale).mT, right)
        torch._foreach_copy_(*_here([*batch.A, *batch.B], [*A.unbind(), *B.mT.unbind()]))

    arrived = pool.given(removed)

    def put_back() -> None:
        places = [(b.before - rank, b.count) for b in batches for _ in "AB"]
        for some, (starts, counts), vectors in zip(rings, places, pool.parts(arrived(), rings, most), strict=True):
            pool.put_back(some, starts, counts, vectors)

    return put_back


def hold(batches: Sequence[Moves], rank: int, tick: Tick, void: Tensor | None) -> None:
    """Columns of B whose rows of A were exchanged in one of the last N updates get no gradient; for those of this
    update Adam's moments and count begin anew, those of the others are zero since. Likewise rows of A and columns of B.

    Batches of layers of one shape; the optimizer has no state before the first update. Where ``void`` is 1 nothing
    changes.
    """
    device = batches[0].A[0].device
    told = [np.stack([b.frozen, b.count, b.before + b.count - 1]) for b in batches]
    numbers = _sent([np.concatenate(told, 1)], device, void)[:, :, None]
    age = (numbers[2] - torch.arange(rank, device=device)) % rank  # (L, r), 0: row of A that was exchanged last
    free_B = (age >= numbers[:2]).float()  # (2, L, r), of columns of B: 0 where one is held, where one begins anew
    free_A, sizes = free_B.roll(rank // 2, 2), [len(batch.layers) for batch in batches]
    for batch, of_A, of_B in zip(
        batches, free_A.split_with_sizes(sizes, 1), free_B.split_with_sizes(sizes, 1), strict=True
    ):
        pairs: list[tuple[Tensor | None, Tensor]] = []
        counts: list[tuple[Tensor | None, Tensor]] = []
        for parameters, (free, older) in ((batch.A, of_A[..., None]), (batch.B, of_B[:, :, None])):
            # as large as they are, and in their order: only then are all tensors multiplied in a few launches
            kept = free.to(parameters[0].dtype).expand(-1, *parameters[0].shape).contiguous()
            factors = kept.unbind()
            pairs += zip([p.grad for p in parameters], factors, strict=True)
            states = [tick.state(p) for p in parameters[: batch.going]]
            pairs += zip([state.get("exp_avg") for state in states], factors, strict=False)
            pairs += zip([state.get("exp_avg_sq") for state in states], factors, strict=False)
            counts += zip([state.get("step") for state in states], older.contiguous().unbind(), strict=False)
        for some in (pairs, counts):
            if there := [(t, factor) for t, factor in some if t is not None]:
                torch._foreach_mul_(*_here(*zip(*there, strict=True)))


def _sent(numbers: Sequence[pool.Ints], device: torch.device, void: Tensor | None) -> Tensor:
    """Numbers of each layer on the device, which nobody waits for; zero where ``void`` is 1."""
    there = sent(np.concatenate(numbers), device)
    return there if void is None else there.masked_fill_(void.bool(), 0)


def _stacked(parameters: Sequence[Tensor]) -> Tensor:
    """Whole parameters, (L, …), a new tensor. Under sharding every rank must call this."""
    return torch.stack([shard.whole(p) for p in parameters] if shard.is_sharded(parameters[0]) else list(parameters))


def _here(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What of each tensor is held here, and of its values."""
    if not shard.is_sharded(tensors[0]):
        return list(tensors), list(values)
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

    def learning_rate(self, name: str, leaf: str) -> float:
        return 1.0 if leaf else self.rest_lr_ratio

    def transform(self, name: str, tensor: Tensor, spec: Spec | None, leaf: str) -> Any:
        if narrow(tensor.dtype):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ConfigError(
                f"{name} is in {kind}, where small steps are lost. Load the model in fp32 and train under autocast."
            )
        return {"A": Vectors(0), "B": Vectors(1)}.get(leaf)

    def events(self) -> tuple[Event, ...]:
        return (Switch(self.rank, self.interval, self.ratio, self.rho),) if self.interval < math.inf else ()

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
