"""The head of a causal language model: its loss without all its logits.

A model of transformers multiplies its last hidden states by the head, calls ``self.loss_function`` with the logits and
returns both; for every token that takes 14 bytes a word of the vocabulary. Here the layer at the head hands on
:class:`LazyLogits`, which know what they are the product of, and the model's loss function, which transformers lets
anyone set, takes the loss from that (:mod:`rankshift.ops.linear_cross_entropy`). Whoever does anything else with them
finds the logits, differentiable, computed then.

Logits are lazy in a training forward that is asked for its loss (``labels``), with gradients. All others are the
layer's own: in evaluation, under ``no_grad``, without labels, inside ``torch.compile``, where the weight or the bias of
the head trains, and where an adapter on it is more than a low-rank term.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from rankshift.core import shard
from rankshift.core.adapter import LowRank
from rankshift.core.base import Dense
from rankshift.core.form import Form
from rankshift.core.site import Site
from rankshift.lower.siblings import term_of
from rankshift.lower.stand_in import original, own_class, stand_in, stands_in
from rankshift.ops.linear_cross_entropy import linear_cross_entropy

_LOSS = "ForCausalLMLoss"  # of transformers; other losses do not say what they compute


def lower_head(model: nn.Module) -> Callable[[], None] | str:
    """Let a model's training forwards take their loss without full logits. What undoes it, or why it is not done."""
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if layer is None:
        return "the model has no output embeddings"
    if _is_lowered(layer):
        return partial(raise_head, model)
    if not isinstance(getattr(type(model), "loss_function", None), property):
        return f"a {type(model).__name__} has no loss function that can be set"
    loss: Any = model.loss_function
    if getattr(loss, "__name__", None) != _LOSS:
        return f"its loss is {getattr(loss, '__name__', type(loss).__name__)}"
    why = _why_not(layer)
    if why is not None:
        return why
    head = stand_in(layer, _forward)
    head.__dict__["asked"] = None  # a Count, in a forward that is asked for its loss
    model.set_output_embeddings(head)  # type: ignore[operator]
    hooks = (
        model.register_forward_pre_hook(_asked, with_kwargs=True),
        model.register_forward_hook(_answered, always_call=True),
    )
    model.loss_function = Loss(loss, hooks)  # type: ignore[assignment]
    return partial(raise_head, model)


def raise_head(model: nn.Module) -> None:
    """Put the model's own head and loss function back, with their state as it now is; nothing if it is not lowered."""
    loss: Any = getattr(model, "loss_function", None)
    if not isinstance(loss, Loss):
        return
    for hook in loss.hooks:
        hook.remove()
    model.loss_function = loss.own  # type: ignore[assignment]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if _is_lowered(head):  # else it was put back with the layers of a run
        model.set_output_embeddings(original(head))  # type: ignore[operator]
    vars(head).pop("asked", None)


def _is_lowered(head: nn.Module) -> bool:
    return stands_in(head) and "asked" in vars(head)


def _why_not(layer: nn.Module) -> str | None:
    if type(layer) not in (nn.Linear, Site) or "forward" in vars(layer):
        return f"the head is a {type(layer).__name__}"
    if isinstance(layer, Site) and not (isinstance(layer.base, Dense) and type(layer.spec.form) is Form):
        return f"the head is held in {layer.base.kind}"
    if layer._compiled_call_impl is not None:  # type: ignore[truthy-function]
        return "the head is compiled already: lower first"
    if any(shard.is_sharded(p) for p in layer.parameters()):
        return "the head is sharded already: lower before fully_shard()"
    if layer.weight.requires_grad:  # type: ignore[union-attr]
        return "the head's weight trains"
    return None


# ---- what a forward is asked


class Count:
    """How many labels of a forward count, for the rows of logits that need not be computed.

    A GPU is asked before the forward, so that the CPU, which reads the answer at its end, waits for what the GPU had to
    do before, and not for the forward: there is work for it in the meantime.
    """

    def __init__(self, labels: Tensor, shift_labels: Tensor | None = None, ignore_index: int = -100):
        self.of = (labels, shift_labels, ignore_index)
        self.answer: Tensor | None = None
        here = labels.device
        if here.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            counts = (labels[..., 1:] if shift_labels is None else shift_labels) != ignore_index
            self.answer = torch.empty((), dtype=torch.long, pin_memory=True)
            with torch.cuda.device(here):
                self.answer.copy_(counts.sum(), non_blocking=True)
                self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self.event.record()

    def __call__(self, labels: Tensor, shift_labels: Tensor | None, ignore_index: int) -> int | None:
        """None if that is not known of these."""
        known = self.of[0] is labels and self.of[1] is shift_labels and self.of[2] == ignore_index
        if self.answer is None or not known:
            return None
        self.event.synchronize()
        return int(self.answer)


def _asked(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling() or kwargs.get("labels") is None:
        return
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if _is_lowered(head):
        told = {name: kwargs[name] for name in ("labels", "shift_labels", "ignore_index") if name in kwargs}
        head.asked = Count(**told)


def _answered(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if _is_lowered(head):
        head.asked = None


# ---- the layer


def _forward(self: Any, x: Tensor) -> Tensor:
    lazy = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling() and not x.is_meta
    source = _source(self, x) if lazy and self.asked is not None else None
    if source is None:
        plain: Tensor = own_class(self).forward(self, x)
        return plain
    return _lazy(source, source.dtype)


def _source(head: Any, x: Tensor) -> Source | None:
    """What logits are the product of, where they are the product of just that."""
    base, low = head, None
    if isinstance(head, Site):
        base, term = head.base, term_of(head)
        if isinstance(term, LowRank) and term.magnitude is None:
            low = term.scale * term.A, term.B
        elif term is not None:
            return None
    if type(base.weight) is not nn.Parameter or base.weight.requires_grad or shard.units(head):  # or in fewer bits
        return None
    if base.bias is not None and base.bias.requires_grad:
        return None
    return Source(x, base.weight, base.bias, low, head)


# ---- logits that are not there yet


class Source:
    """The product that logits are, and how it is computed where they are asked for."""

    def __init__(
        self,
        x: Tensor,  # (…, K)
        weight: Tensor,  # (V, K)
        bias: Tensor | None,
        low: tuple[Tensor, Tensor] | None,
        head: Any,
    ):
        self.x, self.weight, self.bias, self.low, self.head = x, weight, bias, low, head
        self.count: Count = head.asked
        self.trained = [p for p in head.parameters() if p.requires_grad]
        self.held = self.now()
        kind = x.device.type
        cast, into = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self.autocast = partial(torch.autocast, kind, into, cast)
        self.dtype = into if cast else x.dtype

    def now(self) -> list[tuple[int, int]]:
        """Which parameters the head has, and how often they were written."""
        return [(id(p), p._version) for p in self.head.parameters()]

    def logits(self, x: Tensor) -> Tensor:
        """By the layer itself, (…, V)."""
        if self.now() != self.held:
            raise RuntimeError(
                "The logits of a training forward of a lowered model are computed when they are used, and the head's "
                "parameters have changed since. Use them before the update, or run the forward without labels."
            )
        with self.autocast():
            plain: Tensor = own_class(self.head).forward(self.head, x)
            return plain


class LazyLogits(Tensor):
    """(…, V) logits that are computed when anything is done with them but to ask for their shape, dtype and the like.

    What models do with logits before the loss stays lazy: another dtype, a number as a factor, a cap by tanh, a copy.
    These steps are kept and taken again, so that the logits, when they are there, are those of the model to the bit.
    """

    source: Source
    steps: tuple[Callable[[Tensor], Tensor], ...]
    multiplier: float  # multiplier · product, or after · tanh(multiplier · product) where that is a number
    after: float | None
    there: Tensor | None  # the logits

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        lazy = args[0] if args else None
        if isinstance(lazy, LazyLogits) and lazy.there is None:
            with torch._C.DisableTorchFunctionSubclass():
                if func in _NATIVE:
                    return func(*args, **kwargs)
                hooked = lazy._backward_hooks is not None  # what waits longer comes from the source, past the hooks
            later = None if hooked else lazy._later(func, args[1:], kwargs)
            if later is not None:
                return later
        return func(*tree_map(_real, args), **tree_map(_real, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """What comes from elsewhere than Python, autograd above it."""
        args, kwargs = tree_map(lambda t: _real(t).detach() if isinstance(t, LazyLogits) else t, (args, kwargs or {}))
        return func(*args, **kwargs)

    def logits(self) -> Tensor:
        """The logits; the same tensor each time."""
        if self.there is None:
            with torch.inference_mode(False), torch.enable_grad():
                self.there = _Real.apply(self)  # type: ignore[no-untyped-call]
        assert self.there is not None
        return self.there

    def _later(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """These logits after one more step, if it is one that can wait."""
        name, dtype, multiplier, after = func.__name__, self.dtype, self.multiplier, self.after
        number = args[0] if len(args) == 1 and type(args[0]) in (int, float) and not kwargs and args[0] != 0 else None
        if name in _DTYPES and not args and not kwargs:
            dtype = _DTYPES[name]
        elif name == "to" and len(args) + len(kwargs) == 1 and isinstance((*args, *kwargs.values())[0], torch.dtype):
            dtype = (*args, *kwargs.values())[0]
        elif name in _PRODUCTS | _QUOTIENTS and number is not None:
            factor = number if name in _PRODUCTS else 1 / number
            multiplier, after = (multiplier * factor, None) if after is None else (multiplier, after * factor)
        elif name == "tanh" and after is None and not args and not kwargs:
            after = 1.0
        elif name != "clone" or args or kwargs:  # DDP may copy all that a model returns
            return None
        if not dtype.is_floating_point:
            return None
        steps = (*self.steps, lambda logits: func(logits, *args, **kwargs))
        return _lazy(self.source, dtype, steps, multiplier, after)


_DTYPES = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}
_PRODUCTS = {"mul", "multiply", "__mul__", "__rmul__"}
_QUOTIENTS = {"div", "divide", "true_divide", "__truediv__"}
_ASKED = (
    "size",
    "dim",
    "numel",
    "stride",
    "is_contiguous",
    "element_size",
    "__len__",
    "is_floating_point",
    "is_complex",
)
_SEEN = ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_sparse", "requires_grad", "grad_fn", "_base")
_NATIVE: set[Any] = {
    *(getattr(Tensor, name) for name in (*_ASKED, "get_device", "register_hook")),
    *(getattr(Tensor, name).__get__ for name in _SEEN),
    *(torch.is_floating_point, torch.is_complex),
}
"""What needs no logits."""


def _lazy(
    source: Source,
    dtype: torch.dtype,
    steps: tuple[Callable[[Tensor], Tensor], ...] = (),
    multiplier: float = 1.0,
    after: float | None = None,
) -> Tensor:
    stand: Any = _Stand.apply
    lazy: LazyLogits = stand(source, dtype, steps, source.x, *source.trained)
    lazy.source, lazy.steps, lazy.multiplier, lazy.after, lazy.there = source, steps, multiplier, after, None
    return lazy


def _real(t: Any) -> Any:
    return t.logits() if isinstance(t, LazyLogits) else t


def _through(source: Source, steps: tuple[Callable[[Tensor], Tensor], ...], x: Tensor) -> Tensor:
    logits = source.logits(x)
    for step in steps:
        logits = step(logits)
    return logits


class _Stand(torch.autograd.Function):
    """What makes lazy logits a part of the graph, for whom the loss does not come from their source."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        source: Source,
        dtype: torch.dtype,
        steps: tuple[Callable[[Tensor], Tensor], ...],
        x: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        ctx.source, ctx.steps = source, steps
        shape = (*x.shape[:-1], len(source.weight))
        return Tensor._make_wrapper_subclass(LazyLogits, shape, dtype=dtype, device=x.device)  # type: ignore[attr-defined]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with torch.enable_grad():
            x = ctx.source.x.detach().requires_grad_()
            logits = _through(ctx.source, ctx.steps, x)
        grads = torch.autograd.grad(logits, (x, *ctx.source.trained), dlogits, allow_unused=True)
        return (None, None, None, *grads)


class _Real(torch.autograd.Function):
    """The logits of lazy ones."""

    @staticmethod
    def forward(ctx: Any, lazy: LazyLogits) -> Tensor:  # type: ignore[override]
        return _through(lazy.source, lazy.steps, lazy.source.x)

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> Tensor:  # type: ignore[override]
        return dlogits


# ---- the loss


@dataclass
class Loss:
    """transformers' ForCausalLMLoss, of lazy logits from what they are the product of."""

    own: Callable[..., Tensor]  # the model's
    hooks: tuple[RemovableHandle, ...]  # on the model, which say what a forward is asked

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not isinstance(logits, LazyLogits) or logits.there is not None or vocab_size != logits.shape[-1]:
            return self.own(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
        source, cap, multiplier = logits.source, logits.after, logits.multiplier
        kept = source.count(labels, shift_labels, ignore_index)
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        with source.autocast():
            return linear_cross_entropy(
                source.x.reshape(-1, source.x.shape[-1]), source.weight, shift_labels.reshape(-1), source.bias,
                ignore_index, divide_by=num_items_in_batch, softcap=cap, low=source.low, kept=kept,
                multiplier=multiplier if cap is None else multiplier * cap,
            )  # fmt: skip
