"""LoRA layers that read one input, compiled: Z = x Aᵀ of all of them, and their gradients, in one product each.

Who they are is guessed from names (core/kin.py) when adapters are placed, and seen by the compiler as it traces: the
first of a group to be called computes Z of all, and each of the others takes its own if it is called in the same graph
and given that very tensor. One that is not computes alone, as does one of a group whose first was not called before it;
so the worst that a wrong guess costs is Z of layers that do not take it. (Nor is an input seen that is changed in place
between siblings; what trains A cannot be changed so.)

In eager mode, and without gradients, every layer computes alone: nothing of one call is left for another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankshift.core import shard
from rankshift.core.adapter import Adapter
from rankshift.ops.lora_linear.order import choose
from rankshift.ops.products import compute_dtype, delivered
from rankshift.ops.sibling_lora import down, up

SMALL = (("f1", "b1"), ("f1", "b1s"))
"""Orders of multiplication that have a Z and an S to share."""


class Sibling(Adapter):
    """y = W x + s·B(A x), that may compute with others."""

    siblings: Siblings | None = None
    """Layers that read the same input, this one among them at ``place``."""
    place: int = 0
    scale: float

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r)."""
        raise NotImplementedError

    @property
    def joins(self) -> bool:
        """Whether the layer is of a kind that can."""
        raise NotImplementedError

    @property
    def fused(self) -> bool:
        """Whether one autograd node serves the layer now."""
        raise NotImplementedError

    def meet(self, kin: Sequence[Adapter]) -> None:
        able = [a for a in kin if isinstance(a, Sibling) and a.joins and a.in_features == self.in_features]
        if len(able) > 1:
            Siblings(able)

    def together(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """W x + s·B(A x) + bias with what the siblings share; None if the layer has to compute alone."""
        if self.siblings is None or not torch.is_grad_enabled():
            return None
        graph = _traced()
        return self.siblings.run(self, x, bias, graph) if graph else None


class Round:
    """One forward of a group in one graph, from its first layer to its last."""

    def __init__(self, graph: str, x: Tensor, inner: Tensor, zs: list[Tensor], Bs: list[Tensor], casts: list[Tensor]):
        self.graph, self.x = graph, x
        self.inner = inner  # x as the next one multiplies it, (b, in)
        self.zs: list[Tensor | None] = [*zs]  # of those that did not come yet
        self.Bs, self.casts = Bs, casts  # the B's, and as they are multiplied

    def serves(self, graph: str, place: int, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether there is a Z for a layer, and it is what the layer would compute."""
        same = self.graph == graph and self.x is x
        return same and self.zs[place] is not None and self.inner.dtype == dtype


class Siblings:
    """Layers of one adapter that probably read one input."""

    def __init__(self, members: Sequence[Sibling]):
        self.members = list(members)
        self.round: Round | None = None
        for place, member in enumerate(self.members):
            member.siblings, member.place = self, place

    def __getstate__(self) -> dict[str, object]:
        return {"members": self.members, "round": None}

    def run(self, layer: Sibling, x: Tensor, bias: Tensor | None, graph: str) -> Tensor | None:
        """W x + s·B(A x) + bias of one of them in the graph of that name; None if it has to compute alone."""
        place, base = layer.place, layer.base
        if self.members[place] is not layer:
            return None  # a copy of it, as nn.DataParallel makes
        dtype, uncast = compute_dtype(x, base.format)
        if place == 0:
            with uncast:
                now = self._begin(graph, x, dtype)
        else:
            now = self.round
            if now is not None and not now.serves(graph, place, x, dtype):
                now = None
        self.round = now
        if now is None:
            return None
        z = now.zs[place]
        assert z is not None
        now.zs[place] = None
        last = all(left is None for left in now.zs)
        if last:
            self.round = None
        with uncast:
            y, now.inner = up(
                now.inner, z, now.Bs[place], now.casts[place], layer.scale, bias, base.format, base.packed, last
            )
        return delivered(y.view(*x.shape[:-1], y.shape[1]), x)

    def _begin(self, graph: str, x: Tensor, dtype: torch.dtype) -> Round | None:
        """Z of all; None if one of them could not take it now."""
        tokens, computes = x.shape[:-1].numel(), self.members[0].base.format.computes
        As, Bs = [], []
        for member in self.members:
            A, B = member.factors()
            format = member.base.format
            if not member.fused or shard.is_sharded(A) or A.device != x.device or format.computes != computes:
                return None
            needs = x.requires_grad, A.requires_grad, B.requires_grad
            sizes = tokens, member.in_features, member.out_features, A.shape[0]
            if choose(*sizes, dtype, *needs, adds=format.adds) not in SMALL:
                return None
            As.append(A)
            Bs.append(B)
        inner, zs, casts = down(x, dtype, As, Bs, [member.scale for member in self.members])
        return Round(graph, x, inner, zs, Bs, casts)


def _traced() -> str:
    """The name of the graph that torch.compile writes now; none in eager mode."""
    return _graph() if torch.compiler.is_compiling() else ""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _graph() -> str:
    """The same, from inside the compiler. None where it is in a part that is a graph of its own, as what checkpoint()
    recomputes is in one, out of which no round may be written; or with a torch whose compiler does not say so."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator
        from torch._guards import CompileContext

        enclosed = InstructionTranslator.current_tx().output.current_tracer.parent is not None
        return "" if enclosed else str(CompileContext.current_compile_id())
    except (ImportError, AttributeError):
        return ""
