"""What fused blocks keep for their backward, under a budget of memory: all of it, some, or the block's input alone.

    keep       x, q, k, v, o, x₂, g, u and a few numbers a token; under DoRA what o and down give too
    gate_up    all but g and u: the backward multiplies n₂ by their weights again
    block      x: the backward runs the block again, up to the product that would give its output
    offload    nothing: x is copied to pinned memory of the host beside the forward, and back beside the backward

A plan says how many blocks do which, in this order from the first: offload, block, gate_up, keep. Blocks that keep
most are the last, whose backward comes first: what they keep is gone when the others need room to run again. Of all
plans that fit, the one with the fewest products done twice is taken; if everything can be kept, it is.

Gradients are those of a model that keeps everything, to the bit where its kernels are deterministic.
"""

from __future__ import annotations

import contextlib
import logging
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankshift.core.adapter import LowRank
from rankshift.core.base import Plain
from rankshift.core.errors import ConfigError
from rankshift.lower.siblings import Group, joined
from rankshift.ops.linear_cross_entropy.op import _CHUNK, even

_log = logging.getLogger(__name__)

POLICIES = ("offload", "block", "gate_up", "keep")
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SAFE = 0.95  # of what is free, for "auto": the rest is lost between pieces of memory
_PIECE = 2**26  # bytes of pinned memory at a time: torch rounds each up to a power of two
Groups = tuple[Group, Group, Group, Group]
Work = Callable[..., Tensor]  # (groups, x, cos, sin, keep=True, wanted=True) → a block's output (T, K)


def budget_of(text: str) -> int | None:
    """Bytes of "40GiB"; None for "auto".

    Raises:
        ConfigError: it is neither.
    """
    if text == "auto":
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB)", text) if isinstance(text, str) else None
    if found is None:
        raise ConfigError(f'memory_budget is {text!r}. Give "auto", a size such as "40GiB", or None.')
    return int(float(found[1]) * _UNITS[found[2]])


# ---- what things take


@dataclass(frozen=True)
class Sizes:
    """What a forward of a model's blocks depends on in memory. Bytes a token unless it says otherwise."""

    tokens: int
    length: int  # of a sequence
    element: int  # bytes of a number
    width: int  # K
    queries: int  # width of q and o
    keys: int  # width of k, and of v
    hidden: int  # F
    heads: int  # that ask
    repeated: bool  # k and v are repeated for the heads that share them
    weighed: bool  # attention keeps all its weights
    low: tuple[int, int, int, int]  # width of Z at qkv, o, gate and up, down
    picked: int  # channels of h that are kept
    unpacked: int  # bytes of the largest weight that is unpacked, of all tokens
    scaled: tuple[bool, bool] = (False, False)  # whether o and down have magnitudes: their products are kept then
    normed: int = 0  # heads of q and k that are normed
    apart: bool = False  # gate and up are two products
    head: int = 0  # words of the vocabulary
    lazy: bool = True  # the loss is taken without all logits

    @property
    def attended(self) -> int:
        """What attention keeps besides q, k, v and o."""
        e, wide = self.element, max(4, self.element)
        weights = self.length * (wide + e if wide > e else e)  # after softmax, and rounded
        repeats = 2 * e * self.queries if self.repeated else 0
        return self.heads * (weights if self.weighed else wide) + repeats

    def kept(self, policy: str) -> int:
        """By a block from its forward to its backward."""
        e, wide = self.element, max(4, self.element)
        if policy == "offload":
            return 0
        if policy == "block":
            return e * self.width
        found = e * (2 * self.width + 2 * self.queries + 2 * self.keys) + self.attended + (2 + self.normed) * wide
        found += e * (sum(self.low) + self.picked + sum(self.scaled) * self.width)
        return found + (2 * e * self.hidden if policy == "keep" else -e * self.low[2])

    def rebuilt(self, policy: str) -> int:
        """That a block's backward has once more beside what the block kept: of the input, the one that comes next."""
        if policy == "keep":
            return 0
        again = self.kept("keep") - self.kept(policy)
        return again + (self.element * self.width if policy == "offload" else 0)

    def passing(self, policy: str) -> int:
        """Gradients of one block's backward at their most: of h, g and u; or of attention, once those are gone."""
        e, K, Q, F = self.element, self.width, self.queries, self.hidden
        # of g and u where these are, if the backward has made them
        mlp = e * ((2 + self.scaled[1]) * K + (3 if policy == "keep" or self.apart else 1) * F)
        # dy, do, dx, dq, dk, dv; what attention sums in fp32, and repeats; less x₂, g and u
        attention = e * ((3 + self.scaled[0]) * K + 6 * Q + 2 * self.keys) - e * (K + 2 * F)
        return max(mlp, attention)

    def at_the_head(self) -> int:
        """From the blocks' output to its gradient, of all tokens."""
        if not self.head:
            return 2 * self.element * self.width * self.tokens
        if not self.lazy:
            return self.tokens * (self.head * (3 * self.element + 8) + 3 * self.element * self.width)
        chunk = even(self.tokens, _CHUNK) * self.element * self.head
        return self.element * self.width * self.tokens * 3 + max(chunk, self.element * self.width * self.tokens)

    def cost(self, policy: str) -> float:
        """Operations done twice. A copy is no operation, but among equals none is better."""
        if policy == "keep":
            return 0.0
        mlp = 2.0 * self.tokens * self.width * 2 * self.hidden
        if policy == "gate_up":
            return mlp
        layers = 2.0 * self.tokens * self.width * (2 * self.queries + 2 * self.keys + self.scaled[1] * self.hidden)
        attention = 2.0 * self.tokens * self.length * self.queries  # half of all pairs
        return (mlp + layers + attention) * (1.01 if policy == "offload" else 1.0)

    def need(self, counts: Sequence[int]) -> int:
        """Bytes of activations at their most, with so many blocks of each policy."""
        alive = most = 0
        each, at_the_head = self._of_policies
        for count, (kept, beside) in zip(counts, each, strict=True):
            if count:
                alive += count * kept
                most = max(most, alive + beside)
        return max(most, alive + at_the_head)

    @cached_property
    def _of_policies(self) -> tuple[list[tuple[int, int]], int]:
        """Bytes that a block keeps, and that its backward needs beside, by each policy; bytes at the head."""
        beside = [(self.rebuilt(policy) + self.passing(policy)) * self.tokens + self.unpacked for policy in POLICIES]
        kept = [self.kept(policy) * self.tokens for policy in POLICIES]
        return list(zip(kept, beside, strict=True)), self.at_the_head()


def sizes(
    batch: int, x: Tensor, groups: Groups, head: int, masked: bool, attention: str, words: int = 0, lazy: bool = True,
    normed: bool = False,
) -> Sizes:  # fmt: skip
    """Those of a block.

    Args:
        batch: sequences.
        x: (T, K), its input.
        groups: its layers.
        head: width of one.
        masked: attention is given a mask.
        attention: which implementation of transformers.
        words: of the vocabulary; 0 without a head.
        lazy: the loss is taken without all logits.
        normed: each head of q and k is.
    """
    qkv, after, gate_up, down = groups
    queries, keys, _ = qkv.widths
    low = [group.rank * len(group.steps) if group.low else 0 for group in groups]
    packed = [sum(g.widths) * g.bases[0].in_features for g in groups if not isinstance(g.bases[0].format, Plain)]
    return Sizes(
        tokens=len(x), length=len(x) // batch, element=x.element_size(), width=x.shape[1], queries=queries, keys=keys,
        hidden=gate_up.widths[0], heads=queries // head,
        repeated=keys < queries and (attention == "eager" or (attention == "sdpa" and masked)),
        weighed=attention == "eager", low=(low[0], low[1], low[2], low[3]),
        normed=(queries + keys) // head * normed, apart=isinstance(gate_up.bases[0].format, Plain)
        and joined([base.format for base in gate_up.bases], gate_up.packed) is None,
        picked=sum(map(len, down.channels)), scaled=(after.scaled, down.scaled),
        unpacked=max(packed, default=0) * x.element_size(), head=words, lazy=lazy,
    )  # fmt: skip


# ---- a plan


@dataclass(frozen=True)
class Plan:
    """How many blocks do what, and what that takes."""

    sizes: Sizes
    counts: tuple[int, ...]  # of each of POLICIES
    need: int  # bytes
    free: float

    def policy(self, index: int) -> str:
        """Of a block."""
        for policy, count in zip(POLICIES, self.counts, strict=True):
            if index < count:
                return policy
            index -= count
        return "keep"

    def __str__(self) -> str:
        said = ("recomputed, inputs on the host", "recomputed", "recompute gate and up", "kept")
        parts = [f"{n} {what}" for n, what in zip(self.counts, said, strict=True) if n]
        room = f" of {self.free / 2**30:.1f}" if self.free < float("inf") else ""
        more = "" if self.need <= self.free else ", more than there is"
        return f"at {self.sizes.tokens:,} tokens: {', '.join(parts)}, needs {self.need / 2**30:.1f}{room} GiB{more}"


def planned(sizes: Sizes, count: int, free: float, beside: int = 0, host: float = float("inf")) -> Plan:
    """The cheapest plan for ``count`` blocks that fits; where none does, that which needs least.

    Args:
        free: bytes.
        beside: bytes that are needed for other things.
        host: bytes that inputs of blocks may take there.
    """
    everything = (0, 0, 0, count)
    if sizes.need(everything) + beside <= free:
        return Plan(sizes, everything, sizes.need(everything) + beside, free)
    costs = [sizes.cost(policy) for policy in POLICIES]
    best, least = None, float("inf")
    most = int(min(count, host // (sizes.element * sizes.width * sizes.tokens)))
    for counts in _splits(count, most):
        cost = sum(n * each for n, each in zip(counts, costs, strict=True))
        if cost < least and sizes.need(counts) + beside <= free:
            best, least = counts, cost
    if best is None:
        best = min(_splits(count, most), key=sizes.need)
    return Plan(sizes, best, sizes.need(best) + beside, free)


def _splits(count: int, most: int) -> Iterator[tuple[int, ...]]:
    """Every way to share ``count`` blocks among the policies, ``most`` for the first."""
    for offload in range(most + 1):
        for block in range(count + 1 - offload):
            for gate_up in range(count + 1 - offload - block):
                yield offload, block, gate_up, count - offload - block - gate_up


class Memory:
    """The policy of a model's blocks: makes a plan for each size of batch when it first comes, and goes by it.

    A plan stays for its size, whatever else becomes of memory. After an OutOfMemory, lower again with a smaller budget.

    Args:
        budget: see :func:`rankshift.lower.lower`.
        count: blocks.
        words: of the vocabulary; 0 without a head.
        lazy: the loss is taken without all logits.
    """

    def __init__(self, budget: str, count: int, words: int, lazy: bool):
        self.told, self.budget, self.count, self.words, self.lazy = budget, budget_of(budget), count, words, lazy
        self.plans: dict[Sizes, Plan] = {}
        self.now: Plan | None = None  # of the last training forward
        self._last = -1  # block that came last
        self._shelf: Shelf | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_shelf": None}

    def policy(self, index: int, layer: Any, sizes: Callable[[], Sizes]) -> str:
        """Of a block in a forward that will have a backward; ``sizes`` are asked for in the first one."""
        if self.now is None or index <= self._last:
            key = sizes()
            if key not in self.plans:
                self.plans[key] = self._planned(key, layer)
            self.now = self.plans[key]
        self._last = index
        if self._shelf is not None:
            self._shelf.settle()
        return self.now.policy(index)

    def shelf(self, device: torch.device) -> Shelf:
        """Where inputs of blocks are put."""
        if self._shelf is None or self._shelf.device != device:
            self._shelf = Shelf(device)
        return self._shelf

    def _planned(self, sizes: Sizes, layer: Any) -> Plan:
        trained = [p for p in layer.parameters() if p.requires_grad]
        # gradients, and Adam's moments in fp32: they come when the activations are gone, but stay
        beside = self.count * sum(p.nbytes + 8 * p.numel() for p in trained)
        plan = planned(sizes, self.count, self._free(layer), beside, _SAFE * _left_on_the_host())
        if plan.need > plan.free:
            _log.warning("Activations may not fit: %s.", plan)
        return plan

    def _free(self, layer: Any) -> float:
        """Bytes that the rest of a step may take."""
        device = next(layer.parameters()).device
        if device.type == "cuda":
            held: int = torch.cuda.memory_allocated(device)
            if self.budget is not None:
                return self.budget - held
            empty, total = torch.cuda.mem_get_info(device)
            allowed: float = torch.cuda.get_per_process_memory_fraction(device) * total
            return _SAFE * (min(empty + torch.cuda.memory_reserved(device), allowed) - held)
        if self.budget is None:
            return float("inf")
        weights: int = sum(p.nbytes for p in layer.parameters())
        return self.budget - self.count * weights


def _left_on_the_host() -> float:
    """Bytes of memory that are left to the process, where Linux says so."""
    try:
        kilobytes = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return float("inf")
    left = 1024 * int(kilobytes[1]) if kilobytes else float("inf")
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no group, or one without a limit: "max"
        used = re.search(r"^anon (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
        left = min(left, int((group / "memory.max").read_text()) - (int(used[1]) if used else 0))
    return left


# ---- a block that runs again in its backward


def again(work: Work, groups: Groups, x: Tensor, tables: tuple[Tensor, ...], shelf: Shelf | None) -> Tensor:
    """A block's output (T, K); for its backward only x (T, K) is kept, or with a shelf nothing."""
    factors = [factor for group in groups for factor in group.factors]
    return _Again.apply(work, groups, shelf, x, *tables, *factors)  # type: ignore[no-any-return, no-untyped-call]


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, work: Work, groups: Groups, shelf: Shelf | None, x: Tensor, cos: Tensor, sin: Tensor, *factors: Tensor
    ) -> Tensor:
        ctx.work, ctx.autocast = work, _autocast(x.device.type)
        ctx.layers = [(group.bases, group.terms, group.slot, group.apart) for group in groups]
        ctx.parked = None if shelf is None else shelf.park(x)
        ctx.save_for_backward(cos, sin, *factors, *(() if shelf else (x,)))
        return work(groups, x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cos, sin, *saved = ctx.saved_tensors
        x = saved.pop() if ctx.parked is None else ctx.parked.fetch()
        need_x, needs = ctx.needs_input_grad[3], ctx.needs_input_grad[6:]
        x = x.detach().requires_grad_(need_x)
        factors = [f.detach().requires_grad_(need) for f, need in zip(saved, needs, strict=True)]
        with torch.enable_grad(), ctx.autocast():
            y = ctx.work(_with(ctx.layers, factors), x, cos, sin, wanted=False)
        wanted = [t for t in (x, *factors) if t.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, dy, allow_unused=True))
        dx, *grads = (next(found) if t.requires_grad else None for t in (x, *factors))
        return None, None, None, dx, None, None, *grads


def _with(layers: Any, factors: Sequence[Tensor]) -> Groups:
    """The groups, with these factors."""
    left = iter(factors)

    def filled(term: Any) -> Any:
        if term is None:
            return None
        return term._replace(A=next(left), B=next(left)) if isinstance(term, LowRank) else term._replace(D=next(left))

    def scaled(term: Any) -> Any:
        some = isinstance(term, LowRank) and term.magnitude is not None
        return term._replace(magnitude=next(left)) if some else term

    found = [
        Group(bases, [scaled(term) for term in [filled(term) for term in terms]], *rest)
        for bases, terms, *rest in layers
    ]
    return found[0], found[1], found[2], found[3]


def _autocast(kind: str) -> Callable[[], AbstractContextManager[Any]]:
    """That which is on now."""
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype, enabled)


# ---- inputs on the host


class Shelf:
    """Keeps tensors of a GPU in pinned memory of the host; copies go beside the computation, on streams of their own.

    Of a CPU's tensors it keeps copies.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.streams = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._last: Callable[[], Parked | None] = lambda: None  # that which came last, while its backward may come

    def park(self, x: Tensor) -> Parked:
        """Begin to copy x (T, K), which must not be written to before :meth:`settle`."""
        parked = Parked(self, x.detach(), self._last)
        self._last = weakref.ref(parked)
        return parked

    def settle(self) -> None:
        """Let go of what was copied: whatever is computed from now on waits for the copy."""
        if (last := self._last()) is not None:
            last.settle()


class Parked:
    """A tensor on a shelf."""

    def __init__(self, shelf: Shelf, x: Tensor, before: Callable[[], Parked | None]):
        self.shelf, self.before, self.shape = shelf, before, x.shape
        self.source: Tensor | None = x  # until it has been copied
        self.there: Tensor | None = None  # once it is on its way back
        parts = torch.split(x, max(1, _PIECE // x[0].nbytes))
        pinned = shelf.streams is not None
        self.pieces = [torch.empty_like(part, device="cpu", pin_memory=pinned) for part in parts]
        self.event = self._copied(0, self.pieces, parts)

    def _copied(self, way: int, into: Sequence[Tensor], source: Sequence[Tensor]) -> Any:
        """An event of the copies, which come after all that has been computed so far."""
        if self.shelf.streams is None:
            for a, b in zip(into, source, strict=True):
                a.copy_(b)
            return None
        stream = self.shelf.streams[way]
        stream.wait_stream(torch.cuda.current_stream(self.shelf.device))
        with torch.cuda.stream(stream):
            for a, b in zip(into, source, strict=True):
                a.copy_(b, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        return event

    def settle(self) -> None:
        """Its memory on the GPU is free for what is computed from now on."""
        if self.source is not None:
            self._wait()
            self.source = None

    def _wait(self) -> None:
        if self.event is not None:
            torch.cuda.current_stream(self.shelf.device).wait_event(self.event)

    def fetch(self) -> Tensor:
        """x again; that which was parked before it sets out."""
        self._set_out()
        self._wait()
        x, self.there = self.there, None
        assert x is not None
        if (before := self.before()) is not None:
            before._set_out()
        return x

    def __del__(self) -> None:
        if self.there is not None:  # no backward has come for it: none may write where its copy still arrives
            self._wait()

    def _set_out(self) -> None:
        if self.there is None:
            self.settle()
            first = self.pieces[0]
            self.there = torch.empty(self.shape, dtype=first.dtype, device=self.shelf.device)
            self.event = self._copied(1, torch.split(self.there, len(first)), self.pieces)
