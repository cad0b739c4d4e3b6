"""LoRA layers that read one input: Z = x Aᵀ of all of them, and their gradients, in one product each.

Who they are is guessed from names (core/kin.py) when adapters are placed, and seen at every call: the first of a group
to be called computes Z of all, and each of the others takes its own if it is given that very tensor, unchanged. The
last one leaves nothing behind. A layer that is given another tensor computes alone, as does one of a group whose first
was not called before it; so the worst that a wrong guess costs is Z of layers that do not take it, and that only until
the next update, when the group parts for good. (Not before: between a forward and its recomputation in backward nothing
may change. Compiled code sees neither updates, so a group that is wrong stays there, nor an input that is changed in
place between siblings; what trains A cannot be changed so anyhow.)

Without gradients every layer computes alone, and so it does where the host cannot keep up anyhow. With them siblings
have one graph, whose backward runs once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankshift.core import shard
from rankshift.core.adapter import Adapter
from rankshift.ops.lora_linear.order import choose
from rankshift.ops.products import compute_dtype, delivered
from rankshift.ops.sibling_lora import Spent, down, up

SMALL = (("f1", "b1"), ("f1", "b1s"))
"""Orders of multiplication that have a Z and an S to share."""
LEAST = 1 << 25
"""Numbers in x from which siblings share without a compiler: below, a step waits for the host, which has more to do."""


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
        return self.siblings.run(self, x, bias)


class Round:
    """One forward of a group, from its first layer to its last."""

    inner: Tensor  # x as the next one multiplies it, (b, in)
    cast: Sequence[Tensor]  # the B's likewise
    spent: Spent | None = None
    version: int = 0  # of x
    stamps: Sequence[int] = ()  # of the factors of each; not in compiled code, whose rounds are whole

    def __init__(self, x: Tensor, Bs: Sequence[Tensor]):
        self.x, self.Bs, self.left = x, Bs, len(Bs)
        self.zs: list[Tensor | None] = []  # of those that did not come yet

    def serves(self, layer: Sibling, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether there is a Z for a layer, and it is what the layer would compute."""
        if self.x is not x or self.zs[layer.place] is None or self.inner.dtype != dtype:
            return False
        if self.spent is None or torch.compiler.is_compiling():
            return True
        return not self.spent.yes and self.version == x._version and self.stamps[layer.place] == _stamp(layer)

    def taken(self, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """Z, B and B as it is multiplied, of one that will not come again."""
        z = self.zs[place]
        assert z is not None
        self.zs[place] = None
        self.left -= 1
        return z, self.Bs[place], self.cast[place]


class Siblings:
    """Layers of one adapter that probably read one input."""

    def __init__(self, members: Sequence[Sibling]):
        self.members = list(members)
        self.round: Round | None = None
        self.doubt: int | None = None  # the stamp of the first one in a round in which somebody did not take its Z
        for place, member in enumerate(self.members):
            member.siblings, member.place = self, place

    def __getstate__(self) -> dict[str, object]:  # copied and pickled between forwards
        return {"members": self.members, "round": None, "doubt": None}

    def part(self) -> None:
        """From now on every layer computes alone."""
        for member in self.members:
            member.siblings = None

    def run(self, layer: Sibling, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """W x + s·B(A x) + bias of one of them; None if it has to compute alone."""
        place, base, compiled = layer.place, layer.base, torch.compiler.is_compiling()
        if self.members[place] is not layer or (_enclosed() if compiled else x.numel() < LEAST):
            return None  # a copy of it, as nn.DataParallel makes; or a scope out of which no round may be written
        dtype, uncast = compute_dtype(x, base.format)
        now = self.round
        if now is None or not now.serves(layer, x, dtype):
            if now is not None:
                self.round = None
                if now.stamps and self.doubt is None:
                    self.doubt = now.stamps[0]
            if place:
                return None
            if self.doubt is not None and not compiled and self.doubt != _stamp(layer):
                self.part()
                return None
            with uncast:
                now = self._begin(x, dtype)
            if now is None:
                return None
        z, B, cast = now.taken(place)
        self.round = now if now.left else None
        with uncast:
            y, now.inner = up(now.inner, z, B, cast, layer.scale, bias, base.format, base.packed, not now.left)
        return delivered(y.view(*x.shape[:-1], y.shape[1]), x)

    def _begin(self, x: Tensor, dtype: torch.dtype) -> Round | None:
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
        now = Round(x, Bs)
        if not torch.compiler.is_compiling():
            now.spent, now.version, now.stamps = Spent(), x._version, [_stamp(member) for member in self.members]
        now.inner, zs, now.cast = down(x, dtype, As, Bs, [member.scale for member in self.members], now.spent)
        now.zs += zs
        return now


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _enclosed() -> bool:
    """Whether the compiler is inside a part that is a graph of its own, as what checkpoint() recomputes is in one; or a
    torch whose compiler does not say so."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        return InstructionTranslator.current_tx().output.current_tracer.parent is not None
    except (ImportError, AttributeError):
        return True


def _stamp(layer: Sibling) -> int:
    """A number that grows when a factor of a layer is written to."""
    stamp = 0
    for parameter in layer._parameters.values():
        if parameter is not None:
            stamp += parameter._version
    return stamp
