"""Which blocks of a model are lowered, and why the others are not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from rankshift.lower import llama
from rankshift.lower.graphs import Tape
from rankshift.lower.head import lower_head, raise_head
from rankshift.lower.stand_in import original, stands_in


@dataclass
class Lowered:
    """What :func:`lower` did to a model. Prints as a report."""

    model: nn.Module
    blocks: list[str] = field(default_factory=list)
    """Names of the blocks that run fused."""
    refused: dict[str, str] = field(default_factory=dict)
    """Name → why it runs as it did."""
    head: str | None = None
    """Why the loss is taken from all logits; None where it is taken without."""

    @property
    def aside(self) -> dict[str, str]:
        """Blocks whose last forward ran unfused → why."""
        layers = {name: self.model.get_submodule(name) for name in self.blocks}
        found = {name: llama.block_of(layer).aside for name, layer in layers.items() if stands_in(layer)}
        return {name: why for name, why in found.items() if why is not None}

    def __str__(self) -> str:
        lines = [f"{len(self.blocks)} of {len(self.blocks) + len(self.refused)} blocks run fused"]
        lines.append("loss without logits" if self.head is None else f"loss from all logits: {self.head}")
        for title, names in (("not fused", self.refused), ("unfused in the last forward", self.aside)):
            lines += [f"{title} (×{count}): {why}" for why, count in Counter(names.values()).items()]
        return "\n".join(lines)

    __repr__ = __str__


def lower(model: nn.Module, graphs: bool = False) -> Lowered:
    """Let every block of a model that is known run in its fused form, with the parameters that it has, and its loss be
    taken without full logits.

    The results are those of the model's own forward to rounding. Where a block as it is at some forward cannot be
    computed so (an adapter whose equation is another, a hook inside it), its own forward runs, and the report says why.

    Args:
        graphs: replay blocks as CUDA graphs once batches of one shape come, see :mod:`rankshift.lower.graphs`: for
            training in which the host cannot launch kernels as fast as the GPU computes them. Activations of one shape
            then stay allocated; a second backward through one forward is an error.
    """
    done = Lowered(model)
    for name, layer in list(model.named_modules()):
        if llama.is_block(layer):
            new = layer if stands_in(layer) else llama.lowered(layer) if name else "it is all of the model"
            if isinstance(new, str):
                done.refused[name] = new
            else:
                _put(model, name, new)
                done.blocks.append(name)
        elif llama.is_norm(layer) and not stands_in(layer) and not _within(name, [*done.blocks, *done.refused]):
            _put(model, name, llama.lowered_norm(layer))
    loss = lower_head(model)
    done.head = loss if isinstance(loss, str) else None
    tape = Tape(len(done.blocks)) if graphs else None
    for index, name in enumerate(done.blocks):
        block = llama.block_of(model.get_submodule(name))
        block.tape, block.index = tape, index
    return done


def undo(model: nn.Module) -> None:
    """Put the model's own modules back, with their state as it now is."""
    raise_head(model)
    for name, module in list(model.named_modules()):
        if stands_in(module):
            _put(model, name, llama.raised(module) if llama.is_block(module) else original(module))


def _within(name: str, blocks: list[str]) -> bool:
    return any(name.startswith(f"{block}.") for block in blocks)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
