"""LoRA layers that read one input: Z = x Aᵀ of all of them, and their gradients, in one product each.

Who they are is guessed from names (core/kin.py) when adapters are placed, and seen at every call: the first of a group
to be called computes Z of all, and each of the others takes its own if it is given that very tensor, unchanged. The
last one leaves nothing behind. A layer that is given another tensor computes alone, as does one of a group whose first
was not called before it; so the worst that a wrong guess costs is Z of layers that do not take it, and that only until
the next update, when the group parts for good. (Not before: between a forward and its recomputation in backward nothing
may change. Compiled code cannot see updates, and a group that is wrong stays there.)

Without gradients every layer computes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rankshift.core import shard
from rankshift.ops.lora_linear.order import choose
from rankshift.ops.products import compute_dtype, delivered
from rankshift.ops.sibling_lora import Spent, down, up

if TYPE_CHECKING:
    from rankshift.methods.lora import LoRALayer

SMALL = (("f1", "b1"), ("f1", "b1s"))
"""Orders of multiplication that have a Z and an S to share."""


class Round:
    """One forward of a group, from its first layer to its last."""

    def __init__(self, x: Tensor, inner: Tensor, zs: list[Tensor], spent: Spent | None):
        self.x = x
        self.inner = inner  # (b, in), as the next one multiplies it
        self.zs: list[Tensor | None] = list(zs)  # of those that did not come yet
        self.Bs: Sequence[tuple[Tensor, Tensor]] = ()  # of each, and as it is multiplied
        self.spent = spent
        self.left = len(self.zs)
        self.stamps: list[tuple[int, int]] = []  # of x and the factors of each; not in compiled code


class Siblings:
    """Layers of one adapter that probably read one input."""

    def __init__(self, members: Sequence[LoRALayer]):
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

    def run(self, layer: LoRALayer, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """W x + s·B(A x) + bias of one of them; None if it has to compute alone."""
        place, compiled = layer.place, torch.compiler.is_compiling()
        if self.members[place] is not layer:
            return None  # a copy of it, as nn.DataParallel makes
        now = self.round
        if now is None or now.zs[place] is None or now.x is not x or not (compiled or _holds(now, layer)):
            if now is not None:
                self.round = None
                if now.stamps and self.doubt is None:
                    self.doubt = now.stamps[0][1]
            if place:
                return None
            if self.doubt is not None and not compiled and self.doubt != _stamp(layer):
                self.part()
                return None
            now = self._begin(x)
            if now is None:
                return None
        z = now.zs[place]
        assert z is not None
        now.zs[place] = None
        now.left -= 1
        self.round = now if now.left else None
        base = layer.base
        B, cast = now.Bs[place]
        y, now.inner = up(now.inner, z, B, cast, layer.scale, bias, base.format, base.packed, not now.left)
        return delivered(y.view(*x.shape[:-1], y.shape[1]), x)

    def _begin(self, x: Tensor) -> Round | None:
        """Z of all; None if one of them could not take it now."""
        tokens, dtype = x.shape[:-1].numel(), compute_dtype(x, self.members[0].base.format)[0]
        As, Bs = [], []
        for member in self.members:
            A, B = member.factors()
            if not member.fused or shard.is_sharded(A) or A.device != x.device:
                return None
            if compute_dtype(x, member.base.format)[0] != dtype:
                return None
            needs = x.requires_grad, A.requires_grad, B.requires_grad
            sizes = tokens, member.in_features, member.out_features, A.shape[0]
            if choose(*sizes, dtype, *needs, adds=member.base.format.adds) not in SMALL:
                return None
            As.append(A)
            Bs.append(B)
        compiled = torch.compiler.is_compiling()
        spent = None if compiled else Spent()
        inner, zs, cast = down(x, dtype, As, Bs, [member.scale for member in self.members], spent)
        begun = Round(x, inner, zs, spent)
        begun.Bs = list(zip(Bs, cast, strict=True))
        if not compiled:
            begun.stamps = [(x._version, _stamp(member)) for member in self.members]
        return begun


def _holds(now: Round, layer: LoRALayer) -> bool:
    """Whether a layer's Z is still what it would compute."""
    spent = now.spent is not None and now.spent.yes
    return not spent and now.stamps[layer.place] == (now.x._version, _stamp(layer))


def _stamp(layer: LoRALayer) -> int:
    """A number that grows when a factor of a layer is written to."""
    return sum(p._version for p in layer._parameters.values() if p is not None)
