"""Which blocks of a model are lowered, and why the others are not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from rankshift.core.errors import ConfigError
from rankshift.lower import llama
from rankshift.lower.graphs import Tape
from rankshift.lower.head import lower_head, raise_head
from rankshift.lower.memory import Memory, budget_of
from rankshift.lower.stand_in import original, stands_in


@dataclass
class Lowered:
    """What :func:`lower` did to a model. Prints as a report."""

    model: nn.Module
    blocks: list[str] = field(default_factory=list)
    """Names of the blocks that were lowered: they run fused where nothing hinders it, see :attr:`aside`."""
    refused: dict[str, str] = field(default_factory=dict)
    """Name → why it runs as it did."""
    head: str | None = None
    """Why the loss is taken from all logits; None where it is taken without."""
    budget: Memory | None = None
    """What decides how much blocks keep for their backward; None where they keep everything."""

    @property
    def memory(self) -> str | None:
        """What the blocks kept in the last training forward; None without a budget, or before the first."""
        return None if self.budget is None or self.budget.now is None else str(self.budget.now)

    @property
    def _standing(self) -> dict[str, llama.Block]:
        layers = {name: self.model.get_submodule(name) for name in self.blocks}
        return {name: llama.block_of(layer) for name, layer in layers.items() if stands_in(layer)}

    @property
    def aside(self) -> dict[str, str]:
        """Lowered blocks that run unfused → why: as they were at lower(), then as of their last forward."""
        return {name: block.aside for name, block in self._standing.items() if block.aside is not None}

    def __str__(self) -> str:
        standing, aside = self._standing, self.aside
        if self.blocks and not standing:
            return "the model's own blocks stand there again"
        lines = [f"{len(standing) - len(aside)} of {len(self.blocks) + len(self.refused)} blocks run fused"]
        lines.append("loss without logits" if self.head is None else f"loss from all logits: {self.head}")
        lines += [] if self.memory is None else [self.memory]
        others = {name: block.launched for name, block in standing.items() if block.launched is not None}
        for title, names in (("not fused", self.refused | aside), ("not by a CUDA graph", others)):
            lines += [f"{title} (×{count}): {why}" for why, count in Counter(names.values()).items()]
        return "\n".join(lines)

    __repr__ = __str__


def lower(model: nn.Module, graphs: bool = False, memory_budget: str | None = None) -> Lowered:
    """Let every block of a model that is known run in its fused form, with the parameters that it has, and its loss be
    taken without full logits.

    The results are those of the model's own forward to rounding. Where a block as it is at some forward cannot be
    computed so (an adapter whose equation is another, a hook inside it), its own forward runs, and the report says why.

    Args:
        graphs: replay blocks as CUDA graphs once batches of one shape come, see :mod:`rankshift.lower.graphs`: for
            training in which the host cannot launch kernels as fast as the GPU computes them. Activations of one shape
            then stay allocated; a second backward through one forward is an error. As under checkpointing, training
            forwards fill no cache of keys and values.
        memory_budget: what a step may take. "40GiB": all tensors of the process together; "auto": 95 % of the GPU's
            memory that is free when a size of batch first comes; on a CPU, no bound. Where that is too little to keep
            all that a backward wants, blocks compute some of it again, or all, or put their input into memory of the
            host, as few as will do: see :mod:`rankshift.lower.memory`. :attr:`Lowered.memory` says what was decided.
            It is an estimate, made before the step: where not even the most frugal plan fits, that is tried all the
            same, with a warning. Nothing is decided anew after an OutOfMemory: lower again with a smaller budget.
            Where transformers' gradient checkpointing is on, that is what happens instead. As with that, training
            forwards fill no cache of keys and values.

    Raises:
        ConfigError: memory_budget is no size; or it is given with graphs, whose activations stay allocated, or for a
            model with dropout in its attention, which draws anew when a block runs again. Nothing was changed.
    """
    if memory_budget is not None:
        _refuse(model, graphs)
        budget_of(memory_budget)
    done = Lowered(model)
    for name, layer in list(model.named_modules()):
        if llama.is_block(layer):
            new = layer if stands_in(layer) else llama.lowered(layer) if name else "it is all of the model"
            if isinstance(new, str):
                done.refused[name] = new
            else:
                _put(model, name, new)
                llama.settle(new)
                done.blocks.append(name)
        elif llama.is_norm(layer) and not stands_in(layer) and not _within(name, [*done.blocks, *done.refused]):
            _put(model, name, llama.lowered_norm(layer))
    loss = lower_head(model)
    done.head = loss if isinstance(loss, str) else None
    tape = Tape(len(done.blocks)) if graphs else None
    if memory_budget is not None:
        has_head = hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None  # type: ignore[operator]
        words = model.config.vocab_size if has_head else 0  # type: ignore[union-attr]
        done.budget = Memory(memory_budget, len(done.blocks), words, done.head is None)  # type: ignore[arg-type]
    for index, name in enumerate(done.blocks):
        block = llama.block_of(model.get_submodule(name))
        block.tape, block.memory, block.index = tape, done.budget, index
        llama.look(model.get_submodule(name))
    return done


def how(model: nn.Module) -> dict[str, Any] | None:
    """The arguments with which a model was lowered; None if no block of it is."""
    for layer in model.modules():
        if llama.is_block(layer) and stands_in(layer):
            block = llama.block_of(layer)
            budget = None if block.memory is None else block.memory.told
            return {"graphs": block.tape is not None, "memory_budget": budget}
    return None


def undo(model: nn.Module) -> None:
    """Put the model's own modules back, with their state as it now is."""
    raise_head(model)
    for name, module in list(model.named_modules()):
        if stands_in(module):
            _put(model, name, llama.raised(module) if llama.is_block(module) else original(module))


def _refuse(model: nn.Module, graphs: bool) -> None:
    """A budget of memory that cannot be."""
    if graphs:
        raise ConfigError("graphs=True keeps activations allocated from step to step: it cannot have a memory_budget.")
    for name, layer in model.named_modules():
        if llama.is_block(layer) and layer.self_attn.attention_dropout:  # type: ignore[union-attr]
            raise ConfigError(
                f"{name} has dropout in its attention, which would draw anew when the block runs again for its "
                "backward: set attention_dropout to 0 for a memory_budget."
            )


def _within(name: str, blocks: list[str]) -> bool:
    return any(name.startswith(f"{block}.") for block in blocks)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
