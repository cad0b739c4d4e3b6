"""A Llama block as two autograd nodes with the model's own attention between them.

    entry   n = norm(x)                       q, k, v = rotated(n W + Z B)
            attention, as the model does it: its own node
    exit    x₂ = x + o Wₒ + Zₒ Bₒ             n₂ = norm(x₂)
            g, u = n₂ W + Z B                 h = act(g) · u
            x₃ = x₂ + h W + Z B

What backward wants is kept once: x, q, k, v and o (attention keeps them too), x₂, g, u and two numbers a token, as a
frozen block must; and Z, T · r a layer. The normed inputs are not kept: with n = x ρ w, the gradient of A is
((S ρ)ᵀ x) w. h is rebuilt where g and u are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankshift.lower.siblings import WIDEST, Group
from rankshift.ops.products import into
from rankshift.ops.rms_norm import add, norm, norm_back
from rankshift.ops.rotary import rotate_, rotate_back
from rankshift.ops.swiglu import swiglu, swiglu_back

SUMMED = 64  # rank up to which swiglu_back sums over tokens in its own pass


@dataclass(frozen=True)
class Norm:
    """An RMSNorm that does not train."""

    weight: Tensor  # (K,)
    eps: float
    offset: float = 0.0

    def gain(self) -> Tensor:
        """(K,) in fp32 or wider."""
        return self.offset + self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))

    def gradient(self, S: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
        """Sᵀ n, (R, K) in fp32, for the norm n of x."""
        scaled = torch.mul(S, rstd[:, None], out=torch.empty_like(S))
        return into(scaled.t(), x, rstd.dtype) * self.gain()

    def pick(self, x: Tensor, rstd: Tensor, channels: Tensor) -> Tensor:
        """Some channels of the norm n of x, (T, k)."""
        n = x.index_select(1, channels) * rstd[:, None] * self.gain()[channels]
        return n.to(x.dtype)


class _Kept:
    """Tensors of several kinds in what autograd keeps."""

    def __init__(self, ctx: Any, **kinds: Sequence[Tensor]):
        ctx.counts = {name: len(tensors) for name, tensors in kinds.items()}
        ctx.save_for_backward(*(tensor for tensors in kinds.values() for tensor in tensors))

    @staticmethod
    def of(ctx: Any) -> Iterator[tuple[Tensor, ...]]:
        """The kinds, in the order in which they were kept."""
        tensors = iter(ctx.saved_tensors)
        for count in ctx.counts.values():
            yield tuple(next(tensors) for _ in range(count))


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
    x: Tensor, before: Norm, qkv: Group, cos: Tensor, sin: Tensor, head: int, batch: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (batch, Hq, S, D), k and v (batch, Hk, S, D) of a block, and x (T, K) as it goes on past them."""
    return _Entry.apply(x, before, qkv, cos, sin, head, batch, *qkv.factors)  # type: ignore[no-any-return, no-untyped-call]


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
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        _, n, rstd = norm(x, before.weight, before.eps, before.offset)
        (q, k, v), lows, terms = qkv.forward(n)
        rotate_(q, k, v, cos, sin, (lows[0], lows[1], lows[2]), head=head)
        _Kept(ctx, own=(x, rstd, cos, sin), weights=qkv.weights, terms=terms)
        ctx.before, ctx.qkv = before, qkv
        heads = (y.view(batch, -1, y.shape[1] // head, head).transpose(1, 2) for y in (q, k, v))
        return *heads, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, residual: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        before, qkv = ctx.before, ctx.qkv
        (x, rstd, cos, sin), weights, terms = _Kept.of(ctx)
        need_x, need = ctx.needs_input_grad[0], ctx.needs_input_grad[7:]
        dY = x.new_empty(x.shape[0], sum(qkv.widths))
        out = dY.split_with_sizes(qkv.widths, 1)
        rotate_back(dq, dk, dv, cos, sin, (out[0], out[1], out[2]))
        found: list[Tensor | None] = []
        low = None
        if terms:
            A, B, Z = terms
            S, dB = qkv.down(dY, B, Z if any(need[1::2]) else None)
            found = qkv.gradients(before.gradient(S, x, rstd) if any(need[::2]) else None, dB)
            low = (S, A)
        elif qkv.channels is not None:
            found = qkv.column_gradients(dY, before.pick(x, rstd, qkv.channels))
        dx = None
        if need_x:
            dn = qkv.back(dY, weights)
            if low is not None and low[0].shape[1] > 3 * WIDEST:
                dn.addmm_(*low)
                low = None
            dx = norm_back(dn, x, rstd, before.weight, before.offset, low, residual.contiguous())
        return (dx, *(None,) * 6, *found)


def exit_(o: Tensor, x: Tensor, after: Group, before: Norm, gate_up: Group, down: Group, activation: str) -> Tensor:
    """A block's output (T, K), from what attention gave, o (T, H·D), and its input x (T, K)."""
    factors = (*after.factors, *gate_up.factors, *down.factors)
    return _Exit.apply(o, x, after, before, gate_up, down, activation, *factors)  # type: ignore[no-any-return, no-untyped-call]


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
        *factors: Tensor,
    ) -> Tensor:
        (y,), (low,), of_o = after.forward(o)
        x2, n, rstd = norm(x, before.weight, before.eps, before.offset, y, low)
        del y
        (g, u), (low_g, low_u), of_gu = gate_up.forward(n)
        del n
        h = swiglu(g, u, low_g, low_u, activation)
        (y,), (low,), of_h = down.forward(h)
        picked = () if down.channels is None else (h.index_select(1, down.channels),)
        del h
        x3 = add(x2, y, low)
        weights = (*after.weights, *gate_up.weights, *down.weights)
        _Kept(ctx, own=(o, x2, rstd, g, u), of_o=of_o, of_gu=of_gu, of_h=of_h, picked=picked, weights=weights)
        ctx.groups, ctx.before, ctx.activation = (after, gate_up, down), before, activation
        return x3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx3: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        after, gate_up, down = ctx.groups
        before, activation = ctx.before, ctx.activation
        (o, x2, rstd, g, u), of_o, of_gu, of_h, picked, weights = _Kept.of(ctx)
        of_after, of_gate_up, of_down = _shares(weights, (after, gate_up, down))
        need_o, need = ctx.needs_input_grad[0], iter(ctx.needs_input_grad[7:])
        needs = [[next(need) for _ in group.factors] for group in ctx.groups]
        dx3 = dx3.contiguous()

        # h W + Z B, and act(g) · u
        dh = down.back(dx3, of_down)
        dB_h = low_h = None
        if of_h:
            A_h, B_h, Z_h = of_h
            S_h, dB_h = down.down(dx3, B_h, Z_h if any(needs[2][1::2]) else None)
            low_h = (S_h, A_h)
            if down.rank > WIDEST:
                dh.addmm_(*low_h)
                low_h = None
        low_g, low_u = gate_up.lows(of_gu[2], of_gu[1]) if of_gu and gate_up.rank <= WIDEST else (None, None)
        summed = low_g is not None and low_u is not None and gate_up.rank <= SUMMED and all(needs[1][1::2])
        need_A = bool(of_h) and any(needs[2][::2])
        within = down.rank <= SUMMED
        wanted = ("g", "u") * summed + ("h",) * (need_A and within)
        dY = x2.new_empty(x2.shape[0], sum(gate_up.widths))
        dg, du = torch.split_with_sizes(dY, gate_up.widths, 1)
        passed = swiglu_back(
            dh, g, u, low_g, low_u, low_h, activation, out=(dg, du), want_h=need_A and not within, grads=wanted,
            scale=gate_up.scale() if of_gu else 1.0,
        )  # fmt: skip
        del dh
        found_h: list[Tensor | None] = []
        if of_h:
            dA = passed.da_h if passed.h is None else into(S_h.t(), passed.h, rstd.dtype)
            found_h = down.gradients(dA, dB_h)
        elif picked:
            found_h = down.column_gradients(dx3, picked[0])

        # n₂ W + Z B, and the norm
        found_gu: list[Tensor | None] = []
        low = None
        if of_gu:
            A, B, Z = of_gu
            S, dB = gate_up.down(dY, B, Z if any(needs[1][1::2]) and not summed else None)
            dA = before.gradient(S, x2, rstd) if any(needs[1][::2]) else None
            found_gu = gate_up.gradients(dA, (passed.db_g, passed.db_u) if summed else dB)
            low = (S, A)
        elif gate_up.channels is not None:
            found_gu = gate_up.column_gradients(dY, before.pick(x2, rstd, gate_up.channels))
        dn = gate_up.back(dY, of_gate_up)
        del dY, dg, du, passed
        if low is not None and low[0].shape[1] > 3 * WIDEST:
            dn.addmm_(*low)
            low = None
        dx = norm_back(dn, x2, rstd, before.weight, before.offset, low, dx3)
        del dn

        # o Wₒ + Zₒ Bₒ
        found_o: list[Tensor | None] = []
        low = None
        if of_o:
            A, B, Z = of_o
            S, dB = after.down(dx, B, Z if any(needs[0][1::2]) else None)
            found_o = after.gradients(into(S.t(), o, rstd.dtype) if any(needs[0][::2]) else None, dB)
            low = (S, A)
        elif after.channels is not None:
            found_o = after.column_gradients(dx, o.index_select(1, after.channels))
        do = None
        if need_o:
            do = after.back(dx, of_after)
            if low is not None:
                do.addmm_(*low)
        return (do, dx, *(None,) * 5, *found_o, *found_gu, *found_h)


def _shares(tensors: Sequence[Tensor], groups: Sequence[Group]) -> Iterator[list[Tensor]]:
    """The tensors of each group's weights."""
    rest = iter(tensors)
    for group in groups:
        yield [next(rest) for _ in group.weights]
