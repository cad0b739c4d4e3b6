"""Decoder blocks of Llama's shape: norm, rotary attention, norm, gated MLP."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankshift.core import shard
from rankshift.core.adapter import Columns, LowRank
from rankshift.core.base import HOOKS, Base, Dense
from rankshift.core.site import Site
from rankshift.lower.graphs import Tape
from rankshift.lower.memory import Memory, Sizes, again, sizes
from rankshift.lower.nodes import Norm, entry, exit_, normed
from rankshift.lower.siblings import Group, base_of, join, part, term_of
from rankshift.lower.stand_in import original, own_class, stand_in
from rankshift.ops.products import compute_dtype

_log = logging.getLogger(__name__)

_LAYERS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def _no_window(attention: Any) -> dict[str, Any]:
    return {}


def _window_of_config(attention: Any) -> dict[str, Any]:
    return {"sliding_window": getattr(attention.config, "sliding_window", None)}


def _window_of_layer(attention: Any) -> dict[str, Any]:
    return {"sliding_window": attention.sliding_window}


_MODELS = "transformers.models"
FAMILIES: dict[str, Callable[[Any], dict[str, Any]]] = {
    f"{_MODELS}.gemma.modeling_gemma.GemmaDecoderLayer": _no_window,
    f"{_MODELS}.llama.modeling_llama.LlamaDecoderLayer": _no_window,
    f"{_MODELS}.mistral.modeling_mistral.MistralDecoderLayer": _window_of_config,
    f"{_MODELS}.qwen2.modeling_qwen2.Qwen2DecoderLayer": _window_of_layer,
    f"{_MODELS}.qwen3.modeling_qwen3.Qwen3DecoderLayer": _window_of_layer,
}
"""The blocks that are known, and what each tells its attention besides query, key, value and mask."""
NORMS = {
    f"{_MODELS}.gemma.modeling_gemma.GemmaRMSNorm",
    f"{_MODELS}.llama.modeling_llama.LlamaRMSNorm",
    f"{_MODELS}.mistral.modeling_mistral.MistralRMSNorm",
    f"{_MODELS}.qwen2.modeling_qwen2.Qwen2RMSNorm",
    f"{_MODELS}.qwen3.modeling_qwen3.Qwen3RMSNorm",
}
"""Their norms."""


@dataclass
class Block:
    """What a lowered block knows of itself."""

    bases: dict[str, tuple[nn.Module, int, Base]]  # layers that stood there last, where their weights were, their bases
    told: Callable[[Any], dict[str, Any]]
    activation: str
    slots: list[int] = field(default_factory=lambda: [0] * 4)  # rows of room below the weights of each group
    tape: Tape | None = None  # of CUDA graphs, where it may run by one
    memory: Memory | None = None  # what it keeps for its backward; None: everything
    index: int = 0  # which block of the model
    looked: dict[str, tuple[Any, str | None]] = field(default_factory=dict)  # at which tensors; what was found
    aside: str | None = None  # why its last forward was the block's own
    launched: str | None = None  # why its last training forward was not a CUDA graph, where it may be one


_GROUPS = (slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 7))  # of the layers: those that read one input


def _layers(layer: Any) -> list[nn.Module]:
    """In the order of ``_LAYERS``."""
    attention, mlp = layer.self_attn, layer.mlp
    one = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*one, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def is_block(module: nn.Module) -> bool:
    """Whether this is a block of a family that is known, lowered or not."""
    return _family(type(module)) is not None


def _family(kind: type) -> str | None:
    return next((name for c in kind.__mro__ if (name := f"{c.__module__}.{c.__qualname__}") in FAMILIES), None)


def lowered(layer: nn.Module) -> nn.Module | str:
    """The block to put in this one's place, or why there is none."""
    kind = type(layer)
    family = _family(kind)
    if any(shard.is_sharded(p) for p in layer.parameters()):
        return "it is sharded already: lower before fully_shard()"
    if family is None or family != f"{kind.__module__}.{kind.__qualname__}" or "forward" in vars(layer):
        return f"{kind.__name__} is not a block as transformers has it"
    if layer._compiled_call_impl is not None:  # type: ignore[truthy-function]
        return "it is compiled already: lower first, or compile only"
    acts: str = layer.self_attn.config.hidden_act  # type: ignore[union-attr, assignment]
    if acts not in _ACTIVATIONS:
        return f"its activation is {acts}"
    for name in ("self_attn", "mlp"):
        if type(inner := getattr(layer, name)).__module__ != kind.__module__:
            return f"{name} is a {type(inner).__name__}, which transformers does not have there"
    block = Block({}, FAMILIES[family], _ACTIVATIONS[acts])
    bases = _bases(block, _layers(layer))
    if isinstance(bases, str):
        return bases
    new = stand_in(layer, _forward)
    new.__dict__["lowered"] = block
    return new


def settle(layer: nn.Module) -> None:
    """Have the weights of a lowered block lie as suits what now stands on them; where they do, nothing moves."""
    block, modules = block_of(layer), _layers(layer)
    bases = _bases(block, modules)
    if isinstance(bases, str) or any(map(_looked_at, modules, bases)) or any(map(shard.is_sharded, layer.parameters())):
        return
    terms = [term_of(module) for module in modules]
    for i, span in enumerate(_GROUPS):
        known = [term for term in terms[span] if not isinstance(term, str)]
        one = Group(bases[span], known, block.slots[i]) if len(known) == len(bases[span]) else None
        if one is None or one.deep is None:
            block.slots[i] = join(bases[span], terms[span])


def _bases(block: Block, modules: list[nn.Module]) -> list[Base] | str:
    """Of the layers as they are now: others may have come to stand where the ones that were lowered stood."""
    found: list[Base] = []
    for name, module in zip(_LAYERS, modules, strict=True):
        seen, at, base = block.bases.get(name, (None, 0, None))
        if base is None or seen is not module or (_looked_at(module, base) and _place(module) != at):
            base = base_of(module)
            if base is None or not base.storage:
                return f"{name} is a {type(module).__name__}"
            block.bases[name] = module, _place(module), base
        found.append(module.base if isinstance(module, Site) else base)
    return found


def _looked_at(module: nn.Module, base: Base) -> bool:
    """Whether a base has tensors beside those of the layer, a library's, which is moved and written without it."""
    return not isinstance(module, Site | Base) and not isinstance(base, Dense)


def _place(module: nn.Module) -> int:
    """Where a layer has its first tensor."""
    return next(module.parameters()).data_ptr()


def block_of(layer: nn.Module) -> Block:
    """Of a lowered one."""
    block: Block = vars(layer)["lowered"]
    return block


def raised(layer: nn.Module) -> nn.Module:
    """The block that was lowered, with the state as it now is."""
    del layer.__dict__["lowered"]
    part([base for module in _layers(layer) if (base := base_of(module)) is not None])
    return original(layer)


def _forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    block: Block | None = vars(self).get("lowered")  # None: it was raised, and what had compiled it goes on to call it
    bases = _open(self, block, hidden_states, position_embeddings, kwargs) if block is not None else None
    if block is not None and bases is not None and position_embeddings is not None:
        batch, length, width = hidden_states.shape
        x = hidden_states.reshape(-1, width).contiguous()
        tables = tuple(table.reshape(-1, table.shape[-1]) for table in position_embeddings)
        words = {"position_ids": position_ids, "use_cache": use_cache, **kwargs}

        def work(groups: Groups, x: Tensor, cos: Tensor, sin: Tensor, keep: bool = True, wanted: bool = True) -> Tensor:
            cache = past_key_values
            return _fused(self, block, groups, batch, x, cos, sin, attention_mask, cache, words, keep, wanted)

        y = None
        if block.tape is not None and self.training and torch.is_grad_enabled():
            block.launched = _ungraphed(self, x, attention_mask, past_key_values, kwargs)
            if block.launched is None:
                y = _replayed(self, block, bases, batch, x, tables)
        groups = _terms(self, bases) if y is None else None
        if isinstance(groups, tuple):
            policy = _policy(self, block, groups, batch, x, attention_mask, past_key_values)
            if policy is not None:
                past_key_values = None  # it would be written to twice
            if block.memory is not None and policy in ("block", "offload"):
                y = again(work, groups, x, tables, block.memory.shelf(x.device) if policy == "offload" else None)
            else:
                y = work(groups, x, tables[0], tables[1], policy != "gate_up")
        if y is not None:
            block.aside = None
            out: Tensor = torch.ops.aten._unsafe_view(y, (batch, length, width))  # no view: of those FSDP2 warns
            return out
        assert isinstance(groups, str)
        _aside(self, block, groups)
    plain: Tensor = own_class(self).forward(
        self, hidden_states, attention_mask, position_ids, past_key_values, use_cache,
        position_embeddings=position_embeddings, **kwargs,
    )  # fmt: skip
    return plain


def _fused(
    layer: Any, block: Block, groups: Groups, batch: int, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None,
    cache: Any, words: dict[str, Any], keep: bool = True, wanted: bool = True,
) -> Tensor:  # fmt: skip
    """The block's output (T, K); see :func:`exit_`."""
    attention, (qkv, after, gate_up, down) = layer.self_attn, groups
    before, between = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
    inner = _inner(attention)
    heads = (_norm(inner[0]), _norm(inner[1])) if inner else None
    q, k, v, x = entry(x, before, qkv, cos, sin, attention.head_dim, batch, heads)
    if cache is not None:
        k, v = cache.update(k, v, attention.layer_idx)
    here = vars(sys.modules[type(attention).__module__])
    attend = here["ALL_ATTENTION_FUNCTIONS"].get_interface(
        attention.config._attn_implementation, here["eager_attention_forward"]
    )
    o, _ = attend(
        attention, q, k, v, mask, dropout=attention.attention_dropout if layer.training else 0.0,
        scaling=attention.scaling, **block.told(attention), **words,
    )  # fmt: skip
    return exit_(o.reshape(x.shape[0], -1), x, after, between, gate_up, down, block.activation, keep, wanted)


def _policy(
    layer: Any, block: Block, groups: Groups, batch: int, x: Tensor, mask: Tensor | None, cache: Any
) -> str | None:
    """What the block keeps of this forward for its backward; None where no budget decides that."""
    attention, memory = layer.self_attn, block.memory
    trains = x.requires_grad or any(factor.requires_grad for group in groups for factor in group.factors)
    if memory is None or not (trains and layer.training and torch.is_grad_enabled()):
        return None
    if attention.attention_dropout or getattr(layer, "gradient_checkpointing", False):
        return None  # it would draw anew; or transformers runs the block again
    if cache is not None and cache.get_seq_length(attention.layer_idx):
        return None  # it attends to what is there
    how = attention.config._attn_implementation

    def needed() -> Sizes:
        inner = bool(_inner(attention))
        return sizes(batch, x, groups, attention.head_dim, mask is not None, how, memory.words, memory.lazy, inner)

    return memory.policy(block.index, layer, needed)


_IDLE = ("num_items_in_batch",)  # words of transformers' Trainer that reach every block, and that none reads
_BLIND = ("sdpa", "eager")  # kinds of attention that look at nothing but q, k, v and the mask


def _ungraphed(layer: Any, x: Tensor, mask: Tensor | None, cache: Any, words: dict[str, Any]) -> str | None:
    """Why a training forward cannot be a CUDA graph, whatever is captured; None if it can."""
    attention = layer.self_attn
    if not x.is_cuda:
        return "the model is not on a GPU"
    if mask is not None:
        return "there is a mask"
    if cache is not None and cache.get_seq_length(attention.layer_idx):
        return "keys and values of an earlier forward are given"
    if told := [name for name, value in words.items() if value is not None and name not in _IDLE]:
        return f"{told[0]} is given"
    if (how := attention.config._attn_implementation) not in _BLIND:
        return f"its attention is {how}, which may read positions"
    if attention.attention_dropout:
        return "its attention has dropout"
    if any(vars(layer)[name] for name in HOOKS):
        return "the block is hooked"
    if getattr(layer, "gradient_checkpointing", False):
        return "transformers' checkpointing is on"
    return None


def _replayed(
    layer: Any, block: Block, bases: list[Base], batch: int, x: Tensor, tables: tuple[Tensor, ...]
) -> Tensor | None:
    """The block's output by its CUDA graph, which fills no cache; None where none is captured for this forward."""
    tape, modules = block.tape, _layers(layer)
    assert tape is not None
    if not tape.captured and isinstance(_terms(layer, bases), str):
        return None
    adapters = [adapter for module in modules if isinstance(module, Site) for adapter in module.acting()]
    for adapter in adapters:
        adapter.refresh()
    how = layer.self_attn.config._attn_implementation
    state = (batch, how, *map(id, modules), *map(id, bases), *map(id, adapters))

    def captured(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        groups = _terms(layer, bases)
        assert isinstance(groups, tuple)
        return _fused(layer, block, groups, batch, x, cos, sin, None, None, {})

    y = tape.run(block.index, layer, x, tables, state, captured)
    block.launched = None if y is not None else "its shape has not come often enough, or the last backward is not over"
    return y


@functools.cache
def _say_once(why: str) -> None:
    _log.warning("Blocks that were lowered run unfused where %s.", why)


def _norm(module: Any) -> Norm:
    if hasattr(module, "variance_epsilon"):
        return Norm(module.weight, module.variance_epsilon)
    return Norm(module.weight, module.eps, 1.0)  # Gemma's


def _inner(attention: Any) -> tuple[Any, ...]:
    """The norms of each head of q and of k, where there are some."""
    return (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else ()


_SMALLEST = 2.0**-8  # of the weights of a norm of heads, to the largest: what is rounded is divided by them
_LARGEST = 8.0  # of the biases of q, k and v under DoRA: the gradients of magnitudes are of what is rounded, less them


def _looked(block: Block, what: str, tensors: list[Tensor], more: Any, look: Callable[[], str | None]) -> str | None:
    """What ``look`` finds in the values of some tensors. It looks when these are others than those it has looked at."""
    key, why = block.looked.get(what, (None, None))
    if any(shard.is_sharded(t) or t.is_meta for t in tensors):
        return why  # nobody computes with them now
    now = [(id(t), t._version, t.device) for t in tensors], more
    if now != key:
        with torch.no_grad():
            why = look()
        block.looked[what] = now, why
    return why


def _lost(block: Block, norms: tuple[Any, ...]) -> str | None:
    """Why the inputs of the norms of heads cannot be had from what they leave."""

    def look() -> str | None:
        if any(bool(norm.weight.abs().min() < _SMALLEST * norm.weight.abs().max()) for norm in norms):
            return "weights of the norms of its heads are next to zero"
        if len({norm.variance_epsilon for norm in norms}) > 1:
            return "the norms of its heads differ in epsilon"
        return None

    weights = [norm.weight for norm in norms]
    return _looked(block, "heads", weights, [norm.variance_epsilon for norm in norms], look)


def _drowned(block: Block, group: Group) -> str | None:
    """Why the gradients of DoRA's magnitudes at q, k and v would lose too many bits."""
    biases = [base.bias for base in group.bases if base.bias is not None]
    if not group.scaled or not biases or biases[0].dtype.itemsize > 2:
        return None

    def look() -> str | None:
        large = any(bool(bias.abs().max() > _LARGEST) for bias in biases)
        return "biases of q, k or v are so large that DoRA's magnitudes would drown in them" if large else None

    return _looked(block, "biases", biases, None, look)


def is_norm(module: nn.Module) -> bool:
    """Whether this is one of ``NORMS``."""
    return f"{type(module).__module__}.{type(module).__qualname__}" in NORMS


def lowered_norm(module: nn.Module) -> nn.Module:
    """What to put in the place of a norm outside the blocks."""
    return stand_in(module, _forward_norm)


def _forward_norm(self: Any, hidden_states: Tensor) -> Tensor:
    if self.weight.requires_grad or self.weight.dtype != hidden_states.dtype:
        plain: Tensor = own_class(self).forward(self, hidden_states)
        return plain
    return normed(hidden_states, _norm(self))


Groups = tuple[Group, Group, Group, Group]


def _open(
    layer: Any, block: Block, x: Tensor, positions: tuple[Tensor, Tensor] | None, asked: dict[str, Any]
) -> list[Base] | None:
    """The bases of the layers as they are now; None where the block's own forward must run, which is noted."""
    if torch.compiler.is_compiling():
        block.aside = "torch.compile makes kernels of its own"
        return None
    found = _checked(layer, block, x, positions, asked)
    if isinstance(found, str):
        _aside(layer, block, found)
        return None
    return found


def _aside(layer: Any, block: Block, why: str) -> None:
    """Note that the block's own forward runs."""
    block.aside = why
    if layer.training and torch.is_grad_enabled():
        _say_once(why)


def _checked(
    layer: Any, block: Block, x: Tensor, positions: tuple[Tensor, Tensor] | None, asked: dict[str, Any]
) -> list[Base] | str:
    attention = layer.self_attn
    if asked.get("output_attentions") or attention.config.output_attentions:
        return "attention weights are asked for"
    if positions is None or positions[0].shape[-1] != attention.head_dim:
        return "positions do not rotate whole heads"
    bases = _standing(layer, block)
    if isinstance(bases, str):
        return bases
    dtype = bases[0].dtype
    if not x.dtype == compute_dtype(x)[0] == dtype:
        return f"it computes in another dtype than its weights' {str(dtype).removeprefix('torch.')}"
    return bases


def look(layer: nn.Module) -> None:
    """Note whether a lowered block can run fused as it stands."""
    block = block_of(layer)
    bases = _standing(layer, block)
    found = bases if isinstance(bases, str) else _terms(layer, bases)
    block.aside = found if isinstance(found, str) else None


def _standing(layer: Any, block: Block) -> list[Base] | str:
    """The bases of the layers, if nothing that stands there hinders the block; else what does."""
    attention, modules = layer.self_attn, _layers(layer)
    bases = _bases(block, modules)
    if isinstance(bases, str):
        return bases
    norms = (layer.input_layernorm, layer.post_attention_layernorm, *_inner(attention))
    if any(weight is not None and weight.requires_grad for weight in [getattr(norm, "weight", None) for norm in norms]):
        return "its norms train"
    if not all(map(is_norm, norms)):
        return f"its norms are {' and '.join(sorted({type(norm).__name__ for norm in norms}))}"
    if len(norms) > 2 and (why := _lost(block, norms[2:])) is not None:
        return why
    acting = [adapter for module in modules if isinstance(module, Site) for adapter in module.acting()]
    if any(map(_hooked, (attention, layer.mlp, layer.mlp.act_fn, *norms, *modules, *acting))):
        return "a module inside it is hooked"
    for base in bases:
        if any(p.requires_grad for p in (*base.stored.values(), *(() if base.bias is None else (base.bias,)))):
            return "weights of the base train in place"
    return bases


def _terms(layer: Any, bases: list[Base]) -> Groups | str:
    """The layers with what stands on them; or why only their own forwards know that."""
    terms: list[LowRank | Columns | None] = []
    block = block_of(layer)
    for module in _layers(layer):
        term = term_of(module)
        if isinstance(term, str):
            return term
        terms.append(term)
    groups = [Group(bases[span], terms[span], slot) for span, slot in zip(_GROUPS, block.slots, strict=True)]
    groups[-1].apart = block.memory is not None  # a block that runs again for its backward leaves out the last product
    if any(group.low and group.channels for group in groups):
        return "its layers have adapters of several kinds"
    if groups[0].scaled and _inner(layer.self_attn):
        return "its heads are normed, and DoRA stands before that"
    if (why := _drowned(block, groups[0])) is not None:
        return why
    return groups[0], groups[1], groups[2], groups[3]


def _hooked(module: nn.Module) -> bool:
    """Whether a call does more than the module's class says. transformers' recorders stay where they once were needed;
    what they record of a block's inside has been asked for by name."""
    own = vars(module)
    hooks = [hook for name in HOOKS if isinstance(own[name], dict) for hook in own[name].values()]
    return "forward" in own or any(getattr(h, "__module__", "") != "transformers.utils.output_capturing" for h in hooks)
