"""A Llama block as two autograd nodes with the model's own attention between them.

    entry   n = norm(x)                       q, k, v = rotated(n W + Z B)
            attention, as the model does it: its own node
    exit    x₂ = x + o Wₒ + Zₒ Bₒ             n₂ = norm(x₂)
            g, u = n₂ W + Z B                 h = act(g) · u
            x₃ = x₂ + h W + Z B

What backward wants is kept once: x, q, k, v and o (attention keeps them too), x₂, g, u and two numbers a token, as a
frozen block must; and Z, T · r a layer. The normed inputs are not kept: with n = x ρ w, the gradient of A is
((S ρ)ᵀ x) w. h is rebuilt where g and u are read.

Under DoRA y = c (n W + Z B) for each product: c comes in where the product is read, so all below is that of LoRA with
dY' = c dY. Its magnitudes' gradient is a sum of dY y over the tokens, for which o Wₒ and h W are kept too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankshift.lower.siblings import WIDEST, Group, gain_of, packed
from rankshift.ops.head_norm import norm_rotate_, norm_rotate_back
from rankshift.ops.rms_norm import add, add_back, norm, norm_back, pick
from rankshift.ops.rotary import rotate_, rotate_back
from rankshift.ops.skinny import weight_gradient
from rankshift.ops.swiglu import swiglu, swiglu_back

ACROSS = 64  # columns of S up to which norm_back adds S A; a GEMM is faster from there on
SUMMED = 64  # rank up to which swiglu_back sums over tokens in its own pass


@dataclass(frozen=True)
class Norm:
    """An RMSNorm that does not train."""

    weight: Tensor  # (K,)
    eps: float
    offset: float = 0.0

    def gradient(self, S: Tensor, x: Tensor) -> Tensor:
        """Sᵀ n, (R, K), for the norm n of x, where S has been multiplied by ρ."""
        return weight_gradient(S, x, self.weight, self.offset)


Inner = tuple[Norm, Norm] | None


def _keep(ctx: Any, *kinds: Sequence[Tensor]) -> None:
    """Tensors of several kinds in what autograd keeps."""
    ctx.counts = [len(tensors) for tensors in kinds]
    ctx.save_for_backward(*chain.from_iterable(kinds))


def _kept(ctx: Any) -> list[tuple[Tensor, ...]]:
    """The kinds, in the order in which they were kept."""
    return _in_order(ctx.saved_tensors, ctx.counts)


def _in_order(items: tuple[Any, ...], counts: Sequence[int]) -> list[tuple[Any, ...]]:
    """As many of the items as each count says."""
    return [items[end - count : end] for count, end in zip(counts, accumulate(counts), strict=True)]


def normed(x: Tensor, how: Norm) -> Tensor:
    """The norm of x (…, K)."""
    return _Normed.apply(x.reshape(-1, x.shape[-1]), how).view(x.shape)  # type: ignore[no-any-return, no-untyped-call]


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, how: Norm) -> Tensor:  # type: ignore[override]
        _, n, rstd = norm(x, how.weight, how.eps, how.offset)
        ctx.save_for_backward(x, rstd)
        ctx.how = how
        return n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dn: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        x, rstd = ctx.saved_tensors
        return norm_back(dn.contiguous(), x, rstd, ctx.how.weight, ctx.how.offset), None


def entry(
    x: Tensor, before: Norm, qkv: Group, cos: Tensor, sin: Tensor, head: int, batch: int, inner: Inner = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (batch, Hq, S, D), k and v (batch, Hk, S, D) of a block, and x (T, K) as it goes on past them.

    Args:
        inner: norms of each head of q and of k, of which no weight is zero; not with DoRA on q, k or v.
    """
    return _Entry.apply(x, before, qkv, cos, sin, head, batch, inner, *qkv.factors)  # type: ignore[no-any-return, no-untyped-call]


class _Entry(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        before: Norm,
        qkv: Group,
        cos: Tensor,
        sin: Tensor,
        head: int,
        batch: int,
        inner: Inner,
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        _, n, rstd = norm(x, before.weight, before.eps, before.offset)
        (factors,) = packed((qkv,), x)
        (q, k, v), lows, terms = qkv.forward(n, factors)
        low = lows[0], lows[1], lows[2]
        turned: tuple[Tensor, ...] = (q, k, v) if qkv.scaled else ()
        if inner is None:
            rotate_(q, k, v, cos, sin, low, head=head, gain=gain_of(terms))
        else:
            weights = inner[0].weight, inner[1].weight
            turned = q, k, norm_rotate_(q, k, v, cos, sin, weights, inner[0].eps, low)
        _keep(ctx, (x, rstd, cos, sin), qkv.weights, terms, turned)
        ctx.before, ctx.qkv, ctx.inner = before, qkv, inner
        heads = (y.view(batch, -1, y.shape[1] // head, head).transpose(1, 2) for y in (q, k, v))
        return *heads, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, residual: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        before, qkv, inner = ctx.before, ctx.qkv, ctx.inner
        (x, rstd, cos, sin), weights, terms, turned = _kept(ctx)
        need_x, need = ctx.needs_input_grad[0], ctx.needs_input_grad[8:]
        dY = x.new_empty(x.shape[0], sum(qkv.widths))
        dq_, dk_, dv_ = dY.split_with_sizes(qkv.widths, 1)
        dm = None
        if inner is None:
            of = (turned[0], turned[1], turned[2]) if turned else None
            dm = rotate_back(dq, dk, dv, cos, sin, (dq_, dk_, dv_), of, gain_of(terms))
        else:
            q, k, rho = turned
            norm_rotate_back(dq, dk, dv, (q, k), rho, cos, sin, (inner[0].weight, inner[1].weight), (dq_, dk_, dv_))
        found: list[Tensor | None] = []
        low = Z = None
        if terms:
            A, B, Z = terms[:3]
            need_A, need_B = qkv.asked(need)
            normed = (rstd, torch.empty_like(Z)) if need_A else None
            S, dB = qkv.down(dY, B, Z if need_B else None, normed)
            found = qkv.gradients(None if normed is None else before.gradient(normed[1], x), dB, dm)
            low = (S, A)
        elif need:
            picked = pick(x, qkv.channels, rstd, before.weight, before.offset, qkv.scale)
            found = qkv.column_gradients(dY, picked)
        dx = None
        if need_x:
            wide = None
            if low is not None and low[0].shape[1] > ACROSS:
                wide, low = low, None
            dn, *more = qkv.back(dY, weights, wide)
            dx = norm_back(dn, x, rstd, before.weight, before.offset, low, residual.contiguous(), Z, more)
        return (dx, *(None,) * 7, *found)


def exit_(
    o: Tensor, x: Tensor, after: Group, before: Norm, gate_up: Group, down: Group, activation: str, keep: bool = True,
    wanted: bool = True,
) -> Tensor:  # fmt: skip
    """A block's output (T, K), from what attention gave, o (T, H·D), and its input x (T, K).

    Args:
        keep: g and u for the backward; else it multiplies again.
        wanted: False if only the backward is: what is returned has the output's shape, and no values.
    """
    factors = (*after.factors, *gate_up.factors, *down.factors)
    return _Exit.apply(o, x, after, before, gate_up, down, activation, keep, wanted, *factors)  # type: ignore[no-any-return, no-untyped-call]


class _Exit(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        o: Tensor,
        x: Tensor,
        after: Group,
        before: Norm,
        gate_up: Group,
        down: Group,
        activation: str,
        keep: bool,
        wanted: bool,
        *factors: Tensor,
    ) -> Tensor:
        for_o, for_gu, for_h = packed((after, gate_up, down), x)
        (y,), (low,), of_o = after.forward(o, for_o)
        x2, n, rstd = norm(x, before.weight, before.eps, before.offset, y, low, gain_of(of_o))
        given = [y] if after.scaled else []
        del y
        (g, u), (low_g, low_u), of_gu = gate_up.forward(n, for_gu)
        del n
        h = swiglu(g, u, low_g, low_u, activation, gain_of(of_gu))
        if wanted or down.scaled:
            (y,), (low,), of_h = down.forward(h, for_h)
            given += [y] if down.scaled else []
        else:
            of_h = (*for_h, h @ for_h[0].t()) if for_h else ()
        x3 = add(x2, y, low, gain_of(of_h)) if wanted else x2.new_empty(()).expand_as(x2)
        channels = down.channels
        picked = (pick(h, channels, scale=down.scale),) if channels else ()
        del h
        gu, of_gu = ((g, u), of_gu) if keep else ((), (*for_gu, *of_gu[3:]))
        _keep(
            ctx, (o, x2, rstd), gu, of_o, of_gu, of_h, picked, given, after.weights, gate_up.weights, down.weights
        )  # fmt: skip
        ctx.groups, ctx.before, ctx.activation = (after, gate_up, down), before, activation
        ctx.kept = keep and wanted
        return x3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx3: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        after, gate_up, down = ctx.groups
        before, activation = ctx.before, ctx.activation
        (o, x2, rstd), gu, of_o, of_gu, of_h, picked, given, of_after, of_gate_up, of_down = _kept(ctx)
        if not gu:
            _, n, _ = norm(x2, before.weight, before.eps, before.offset)
            gu, _, of_gu = gate_up.forward(n, of_gu, again=True)
            del n
        g, u = gu
        need_o = ctx.needs_input_grad[0]
        needs = _in_order(ctx.needs_input_grad[9:], [len(group.factors) for group in ctx.groups])
        dx3 = dx3.contiguous()

        # h W + Z B, and act(g) · u
        dB_h = low_h = wide = None
        dy, dm_h = _scaled_back(dx3, down, of_h, given[-1:])
        need_A, need_B = down.asked(needs[2])
        if of_h:
            A_h, B_h, Z_h = of_h[:3]
            S_h, dB_h = down.down(dy, B_h, Z_h if need_B else None)
            low_h = (S_h, A_h)
            if down.rank > WIDEST:
                wide, low_h = low_h, None
        (dh,) = down.back(dy, of_down, wide)
        del dy
        low_g, low_u = gate_up.lows(of_gu[2], of_gu[1]) if of_gu and gate_up.rank <= WIDEST else (None, None)
        all_B = all(needs[1][1 : 2 * len(gate_up.low) : 2])
        summed = low_g is not None and low_u is not None and gate_up.rank <= SUMMED and all_B
        within = down.rank <= SUMMED
        wanted = ("g", "u") * summed + ("h",) * (need_A and within)
        dY = None if ctx.kept else _side_by_side(g, u)  # nobody else reads them then
        if dY is None:
            dY = x2.new_empty(x2.shape[0], sum(gate_up.widths))
        dg, du = torch.split_with_sizes(dY, gate_up.widths, 1)
        passed = swiglu_back(
            dh, g, u, low_g, low_u, low_h, activation, out=(dg, du), want_h=need_A and not within, grads=wanted,
            scale=gate_up.scale, gain=gain_of(of_gu),
        )  # fmt: skip
        del dh
        found_h: list[Tensor | None] = []
        if of_h:
            dA = passed.da_h if passed.h is None else weight_gradient(S_h, passed.h)
            found_h = down.gradients(dA, dB_h, dm_h)
        elif picked:
            found_h = down.column_gradients(dx3, picked[0])

        # n₂ W + Z B, and the norm
        found_gu: list[Tensor | None] = []
        low = Z = None
        if of_gu:
            A, B, Z = of_gu[:3]
            need_A, need_B = gate_up.asked(needs[1])
            normed = (rstd, torch.empty_like(Z)) if need_A else None
            S, dB = gate_up.down(dY, B, Z if need_B and not summed else None, normed)
            dA = None if normed is None else before.gradient(normed[1], x2)
            found_gu = gate_up.gradients(dA, (passed.db_g, passed.db_u) if summed else dB, passed.dm)
            low = (S, A)
        elif needs[1]:
            picked_n = pick(x2, gate_up.channels, rstd, before.weight, before.offset, gate_up.scale)
            found_gu = gate_up.column_gradients(dY, picked_n)
        wide = None
        if low is not None and low[0].shape[1] > ACROSS:
            wide, low = low, None
        dn, *more = gate_up.back(dY, of_gate_up, wide)
        del dY, dg, du, passed, gu, g, u
        dx = norm_back(dn, x2, rstd, before.weight, before.offset, low, dx3, Z, more)
        del dn, more

        # o Wₒ + Zₒ Bₒ
        found_o: list[Tensor | None] = []
        low = None
        dy, dm = _scaled_back(dx, after, of_o, given[:1])
        if of_o:
            A, B, Z = of_o[:3]
            need_A, need_B = after.asked(needs[0])
            S, dB = after.down(dy, B, Z if need_B else None)
            found_o = after.gradients(weight_gradient(S, o) if need_A else None, dB, dm)
            low = (S, A)
        elif needs[0]:
            found_o = after.column_gradients(dx, pick(o, after.channels, scale=after.scale))
        do = None
        if need_o:
            (do,) = after.back(dy, of_after, low)
        return (do, dx, *(None,) * 7, *found_o, *found_gu, *found_h)


def _scaled_back(
    dx: Tensor, group: Group, terms: Sequence[Tensor], given: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """The gradient of what a layer's magnitude multiplies, and that of the magnitude; of a layer without, dx itself."""
    if not group.scaled:
        return dx, None
    _, B, Z, gain = terms
    return add_back(dx, given[0], (Z, B) if group.rank <= WIDEST else None, gain)


def _side_by_side(g: Tensor, u: Tensor) -> Tensor | None:
    """The matrix (T, 2F) that g and u are halves of, in their memory; None where they are no such halves."""
    width = g.shape[1] + u.shape[1]
    halves = g.stride() == u.stride() and u.data_ptr() == g.data_ptr() + g.shape[1] * g.element_size()
    return g.as_strided((len(g), width), g.stride()) if halves and g.stride(0) >= width else None
