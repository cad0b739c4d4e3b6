"""Blocks replayed as CUDA graphs: a step of fixed shapes costs the host a few launches a block instead of dozens.

A block's fused forward is captured when the same shape has come several times in a row, and once the last block of the
model is, so are all backwards, in the order in which autograd will ask for them. All share one pool of memory, as with
torch.cuda.make_graphed_callables: what is free in a step is used again in that step. So the order is fixed, and a block
runs by its graph only where nothing could tell the difference:

- blocks come one after the other, from the first on, and the backward of the step before has been taken, or dropped;
- every tensor that the graph reads is where it was, and stands for what it did;
- nobody looks: no hooks, no mask, no cache, no checkpointing, training, gradients.

Anywhere else it runs as it would without graphs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rankshift.ops import arrivals

SEEN = 3  # forwards of one shape, one after the other, before it is captured


class Graph(Protocol):
    """What was captured: done again by :meth:`replay`, on the same memory."""

    def replay(self) -> None: ...


class Recorder(Protocol):
    """How work is captured."""

    def record(self, work: Callable[[], Any]) -> tuple[Graph, Any]:
        """The work as a graph, and what it returned; nothing has been computed yet."""
        ...


class CudaRecorder:
    """CUDA graphs that share a pool of memory and a stream."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # else what steps have used so far stays beside the pool
        self.pool = torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.counters = arrivals.new(torch.device("cuda", torch.cuda.current_device()))  # of graphs that run by turns

    def record(self, work: Callable[[], Any]) -> tuple[Graph, Any]:
        """See :class:`Recorder`. Other threads (loaders that pin memory) may go on meanwhile."""
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self.stream.wait_stream(here)
        graph.counters = self.counters  # type: ignore[attr-defined]  # they live as long as it does
        with torch.cuda.stream(self.stream), arrivals.lent(self.counters):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                result = work()
            finally:
                graph.capture_end()
        here.wait_stream(self.stream)
        return graph, result


Place = tuple[Any, str, Tensor, int, bool]
"""A module's dictionary and a name in it; the tensor there, its address, and whether it trains."""


@dataclass
class _Captured:
    """One block's graphs, and the memory they read and write."""

    state: Any
    forward: Graph
    x: Tensor  # (T, K), read by the forward
    y: Tensor  # (T, K), written by it
    factors: list[nn.Parameter]  # what trains in the block
    leaves: list[Tensor]  # the same memory, as autograd saw it in the capture
    places: list[Place]  # where it found its tensors, and what they were
    backward: Graph | None = None
    dy: Tensor | None = None  # read by the backward
    dx: Tensor | None = None  # written by it; None where x needs no gradient
    flat: Tensor | None = None  # the gradients of the factors behind one another, likewise

    def holds(self, state: Any) -> bool:
        """Whether all is as it was captured, at the same addresses."""
        return bool(state == self.state) and all(
            owner.get(name) is tensor and tensor.data_ptr() == at and tensor.requires_grad == trains
            for owner, name, tensor, at, trains in self.places
        )


@dataclass
class Tape:
    """The graphs of a model's blocks. One for each model, since they share memory and follow each other."""

    count: int  # blocks
    recorder: Callable[[], Recorder] = CudaRecorder
    _blocks: list[_Captured] = field(default_factory=list)
    _shape: Any = None  # that they were captured for
    _last: tuple[Any, int] = (None, 0)  # the shape that came last, and how often
    _never: Any = None  # a shape with which not all blocks could be captured
    _next: int = 0  # the block that is to come
    _replays: bool = False  # whether blocks of this forward run by their graphs
    _pending: Any = None  # a weak reference to the step whose backward was not taken yet
    _positions: tuple[Tensor, ...] = ()  # cos and sin, read by all graphs
    _source: tuple[Tensor, ...] = ()  # what was copied there
    _made: Recorder | None = None

    def __deepcopy__(self, memo: Any) -> Tape:
        return Tape(self.count, self.recorder)

    def __reduce__(self) -> Any:
        return Tape, (self.count, self.recorder)

    @property
    def captured(self) -> bool:
        """Whether all blocks are."""
        return len(self._blocks) == self.count

    def forget(self) -> None:
        """Let go of all graphs and their memory."""
        self._blocks, self._positions, self._source, self._made = [], (), (), None
        self._shape, self._last, self._replays = None, (None, 0), False

    def run(
        self,
        index: int,
        layer: nn.Module,
        x: Tensor,
        positions: tuple[Tensor, ...],
        state: Any,
        work: Callable[..., Tensor],
    ) -> Tensor | None:
        """y (T, K) of a block by its graph; None where it must run by itself.

        Args:
            index: which block, from 0.
            x: (T, K).
            positions: cos and sin.
            state: what y depends on besides these and the values of the layer's tensors.
            work: y of (x, cos, sin).
        """
        if index == 0:
            self._begin((x.shape, x.dtype, x.requires_grad, *(p.shape for p in positions)), positions)
        in_turn, self._next = index == self._next, index + 1
        self._replays = self._replays and in_turn
        if not self._replays:
            return None
        if index == len(self._blocks) and not self.captured:
            self._capture(layer, x, state, work)
        one = self._blocks[index]
        if not one.holds(state):
            self.forget()  # blocks that ran by their graphs in this step keep what theirs hold
            return None
        y: Tensor = _Replay.apply(self, one, x, *one.factors)  # type: ignore[no-untyped-call]
        return y

    def _begin(self, shape: Any, positions: tuple[Tensor, ...]) -> None:
        """A forward begins: whether it goes by graphs."""
        self._next, self._replays = 0, False
        step = None if self._pending is None else self._pending()
        if step is not None and not step.taken:
            return  # its activations are still wanted
        self._pending = None
        if self._blocks and not self.captured:
            self._never = self._shape
            self.forget()
        self._last = (shape, self._last[1] + 1 if shape == self._last[0] else 1)
        if shape != self._shape:
            if shape == self._never or self._last[1] <= SEEN:
                return
            if self._blocks:
                self.forget()
            self._shape = shape
        self._replays = True
        if not self._positions:
            self._positions = tuple(p.clone() for p in positions)
        elif any(a is not b for a, b in zip(positions, self._source, strict=True)):
            for static, p in zip(self._positions, positions, strict=True):
                static.data.copy_(p)  # past the counter of versions: captured backwards have kept it
        self._source = positions

    def _capture(self, layer: nn.Module, x: Tensor, state: Any, work: Callable[..., Tensor]) -> None:
        if self._made is None:
            self._made = self.recorder()
        chained = bool(self._blocks) and self._blocks[-1].y.data_ptr() == x.data_ptr()
        static = (x.detach() if chained else x.detach().clone()).requires_grad_(x.requires_grad)
        places: list[Place] = [
            (owner, name, tensor, tensor.data_ptr(), tensor.requires_grad)
            for module in layer.modules()
            for owner in (module._parameters, module._buffers)
            for name, tensor in owner.items()
            if tensor is not None
        ]
        factors = [p for p in layer.parameters() if p.requires_grad]
        stand_ins = {id(p): p.detach().requires_grad_() for p in factors}
        # Autograd remembers on which stream it has last given a parameter its gradient, and would wait for that one.
        try:
            for owner, name, tensor, _, trains in places:
                if trains:
                    owner[name] = stand_ins[id(tensor)]
            forward, y = self._made.record(lambda: work(static, *self._positions))
        finally:
            for owner, name, tensor, _, _ in places:
                owner[name] = tensor
        self._blocks.append(_Captured(state, forward, static, y, factors, list(stand_ins.values()), places))
        if self.captured:
            self._capture_backwards()

    def _capture_backwards(self) -> None:
        assert self._made is not None
        after: Tensor | None = None
        for one in reversed(self._blocks):
            one.dy = torch.zeros_like(one.y) if after is None else after
            one.backward, (one.dx, one.flat) = self._made.record(partial(_gradients, one.y, one, one.dy))
            one.y = one.y.detach()  # the captured autograd graph has served
            after = one.dx


def _gradients(y: Tensor, one: _Captured, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Of x, if it needs one, and of all factors behind one another, by the autograd graph that y has."""
    wanted = ([one.x] if one.x.requires_grad else []) + one.leaves
    found = list(torch.autograd.grad(y, wanted, dy, materialize_grads=True))
    dx = found.pop(0) if one.x.requires_grad else None
    return dx, torch.cat([g.reshape(-1) for g in found]) if found else None


class _Step:
    """A forward by graphs; its backward may be taken once."""

    taken = False


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tape: Tape, one: _Captured, x: Tensor, *factors: Tensor) -> Tensor:  # type: ignore[override]
        if x.data_ptr() != one.x.data_ptr():
            one.x.data.copy_(x)  # past the counter of versions, as above
        one.forward.replay()
        ctx.one = one
        step = None if tape._pending is None else tape._pending()
        ctx.step = _Step() if step is None else step
        tape._pending = weakref.ref(ctx.step)
        ctx.done = False
        return one.y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        one: _Captured = ctx.one
        if ctx.done:
            raise RuntimeError(
                "A second backward through blocks that run by CUDA graphs: what the first one needed is overwritten. "
                "Lower the model with graphs=False to call backward(retain_graph=True)."
            )
        ctx.done = ctx.step.taken = True
        if one.backward is None or one.dy is None:  # a later block of this forward could not be captured
            dx, flat = _gradients(one.y, one, dy)
            return None, None, dx, *_parts(flat, one.factors)
        if dy.data_ptr() != one.dy.data_ptr() or not dy.is_contiguous():
            one.dy.copy_(dy)
        one.backward.replay()
        return None, None, one.dx, *_parts(one.flat, one.factors)


def _parts(flat: Tensor | None, factors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the factors, out of a copy: the graph will write into its own again."""
    if flat is None:
        return []
    parts = flat.clone().split_with_sizes([p.numel() for p in factors])
    return [part.view(p.shape) for part, p in zip(parts, factors, strict=True)]
