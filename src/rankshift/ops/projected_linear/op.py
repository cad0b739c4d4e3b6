"""One autograd node for a linear layer whose weight's gradient is formed in a subspace only.

    y = x Wᵀ + bias        dx = dy W
    dX = dyᵀ (x Q)         Q (in, r): a basis of the input side; of x only z = x Q is kept
    dX = xᵀ (dy Q)         Q (out, r): of the output side; x is kept, as in the plain layer

G = dyᵀ x, (out, in), is formed only while somebody listens: when a new basis is due. Then x is kept on either side.

Whether somebody listens changes from update to update and from layer to layer. A compiled graph that knew would be
another one for each set of layers that listen, so there are two. That of most updates, in which nobody listens at all,
is plain. In that of the others two opaque operations ask a listener, which they find by a number that is a tensor on
the CPU. One keeps x in forward and hands out a ticket; the other forms dX in backward, and G if the ticket is good for
an x.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankshift.ops.products import compute_dtype, into

_LISTENERS: weakref.WeakValueDictionary[int, Listener] = weakref.WeakValueDictionary()
_OPEN: weakref.WeakSet[Listener] = weakref.WeakSet()
_numbers = itertools.count(1)


class _Ears:
    """What compiled graphs are guarded by."""

    anybody: bool = False  # listens, in this process


_EARS = _Ears()


class Listener:
    """Sums up G of one layer over the backward passes of an update, while it is ``open``."""

    def __init__(self) -> None:
        number = next(_numbers)
        _LISTENERS[number] = self
        self.number = torch.tensor(number, device="cpu")
        self.open = False
        self.gradient: Tensor | None = None  # (out, in), of this rank's batches, in fp32 or wider
        self._inputs: dict[int, Tensor] = {}  # by ticket: what compiled forwards have kept

    def __reduce__(self) -> tuple[Any, ...]:
        return Listener, ()  # a copied layer has one of its own

    def start(self, listens: bool) -> None:
        """Forget what was heard; listen from now on, or not."""
        self.open, self.gradient = listens, None
        (_OPEN.add if listens else _OPEN.discard)(self)
        _EARS.anybody = len(_OPEN) > 0
        self._inputs.clear()

    def hear(self, dy: Tensor, x: Tensor) -> None:
        """G += dyᵀ x."""
        wide = torch.promote_types(dy.dtype, torch.float32)
        if self.gradient is None:
            self.gradient = into(dy.t(), x, wide)
        elif dy.dtype == wide:
            self.gradient.addmm_(dy.t(), x)
        else:
            self.gradient += into(dy.t(), x, wide)

    def keep(self, x: Tensor) -> int:
        """A ticket for x, a copy: compiled code writes other things where it stood. 0 where nobody listens."""
        if not self.open:
            return 0
        ticket = next(_numbers)
        self._inputs[ticket] = x.clone()
        return ticket

    def kept(self, ticket: int) -> Tensor | None:
        """The x of a ticket, once."""
        return self._inputs.pop(ticket, None)


def projected_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, X: Tensor, Q: Tensor, on_input: bool, listener: Listener
) -> Tensor:
    """x (…, in), weight (out, in), bias (out,) → (…, out), the bits of F.linear.

    Args:
        X: zeros that receive the projected gradient, (out, r) on the input side, (in, r) on the output side.
        Q: the basis, (in, r) or (out, r).
        listener: hears G while it is open.
    """
    m, n = weight.shape
    dtype, uncast = compute_dtype(x)
    learns = torch.is_grad_enabled() and X.requires_grad
    with uncast:
        y: Tensor = _ProjectedLinear.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, n).to(dtype), weight, bias, X, Q, on_input, learns, dtype != weight.dtype, listener
        )
    # the node knows (tokens, …) only: a view that it returned could not be changed in place, and models do
    return y.view(*x.shape[:-1], m)


class _ProjectedLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,  # (tokens, in)
        weight: Tensor,
        bias: Tensor | None,
        X: Tensor,
        Q: Tensor,
        on_input: bool,
        learns: bool,
        cast: bool,
        listener: Listener,
    ) -> Tensor:
        ctx.on_input, ctx.cast, ctx.wide, ctx.listener = on_input, cast, X.dtype, listener
        compiling = torch.compiler.is_compiling()
        ctx.opaque = compiling and _EARS.anybody
        kept = other = ticket = number = None
        if learns:
            number = listener.number if ctx.opaque else None
            kept = x @ Q.to(x.dtype) if on_input else x  # (tokens, r), or all of x
            if not on_input:
                other = Q
            elif ctx.opaque:
                ticket = _keep(x, listener.number)
            elif not compiling and listener.open:
                other = x
        ctx.save_for_backward(weight, kept, other, ticket, number)
        if cast:  # autocast: the layer computes in another dtype than it is stored in
            weight = weight.to(x.dtype)
            bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, kept, other, ticket, number = ctx.saved_tensors
        need_x, _, need_bias, need_X = ctx.needs_input_grad[:4]
        dX = None
        if need_X and ctx.opaque:
            dX = _gradient(dy, kept, None if ctx.on_input else other, ticket, number, ctx.wide)
        elif need_X and ctx.on_input:
            dX = into(dy.t(), kept, ctx.wide)
            if other is not None:
                ctx.listener.hear(dy, other)
        elif need_X:
            dX = into(kept.t(), dy @ other.to(dy.dtype), ctx.wide)
            if not torch.compiler.is_compiling() and ctx.listener.open:
                ctx.listener.hear(dy, kept)
        dx = dy @ (weight.to(dy.dtype) if ctx.cast else weight) if need_x else None
        return dx, None, dy.sum(0) if need_bias else None, dX, *(None,) * 5


# ---- inside compiled graphs


@torch.library.custom_op("rankshift::projected_keep", mutates_args=())
def _keep(x: Tensor, number: Tensor) -> Tensor:
    """A ticket for x, () int64 on the CPU."""
    listener = _LISTENERS.get(int(number))
    return torch.tensor(0 if listener is None else listener.keep(x), device="cpu")


@_keep.register_fake
def _(x: Tensor, number: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("rankshift::projected_gradient", mutates_args=())
def _gradient(
    dy: Tensor, kept: Tensor, Q: Tensor | None, ticket: Tensor | None, number: Tensor, dtype: torch.dtype
) -> Tensor:
    """dX in ``dtype``. Input side: ``kept`` is z, and a ticket may stand for x; output side: ``kept`` is x."""
    listener = _LISTENERS.get(int(number))
    if Q is None:
        x = None if listener is None or ticket is None else listener.kept(int(ticket))
        dX = into(dy.t(), kept, dtype)
    else:
        x = kept if listener is not None and listener.open else None
        dX = into(kept.t(), dy @ Q.to(dy.dtype), dtype)
    if listener is not None and x is not None:
        listener.hear(dy, x)
    return dX


@_gradient.register_fake
def _(dy: Tensor, kept: Tensor, Q: Tensor | None, ticket: Tensor | None, number: Tensor, dtype: torch.dtype) -> Tensor:
    rows = dy.shape[1] if Q is None else kept.shape[1]
    return dy.new_empty((rows, kept.shape[1] if Q is None else Q.shape[1]), dtype=dtype)
