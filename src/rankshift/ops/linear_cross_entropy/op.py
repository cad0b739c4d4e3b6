"""One autograd node for the cross entropy of a frozen linear layer's outputs: the head of a language model.

    loss = Σ_t [ log Σ_v exp l_tv − l_t,label ] / n,   l = cap(multiplier · (h Wᵀ + (h Aᵀ) Bᵀ + bias))

with cap(x) = softcap · tanh(x / softcap), or nothing. W is frozen, so that a row's gradient needs nothing but that row:
it is taken in the forward, and logits exist for one chunk of rows at a time (Liger's idea, Hsu et al. 2024).
They are in the compute dtype; sums over the vocabulary and over rows are in fp32.

Memory beyond h: one chunk of logits (2048 rows if not said otherwise), and kept for backward the gradients of h, of the
rows whose label counts, and of A and B in fp32. They are kept unscaled: the backward applies 1/n, and what the loss is
multiplied by later, at once and in fp32, so that no gradient is lost to the narrow range of fp16.

Rows whose label is ignored are left out of the products where their number is known without asking the device for it:
labels on the CPU, or ``kept`` from the caller. Otherwise they are multiplied as the others and masked: the CPU chooses
the shapes of products, and would have to wait for what the device counted.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankshift.ops.linear_cross_entropy.reference import rows_
from rankshift.ops.products import compute_dtype, into
from rankshift.ops.stochastic_rounding.op import runs_on

_CHUNK = 2048  # rows of logits at a time: enough for products at full rate
_ALIGN = 64  # a row of logits is a multiple of this many numbers long in memory, however odd V is


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["sum", "mean"] = "mean",
    divide_by: float | Tensor | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
    *,
    multiplier: float = 1.0,
    low: tuple[Tensor, Tensor] | None = None,
    kept: int | None = None,
) -> Tensor:
    """h (T, K), weight (V, K), labels (T,), bias (V,) → the loss, () in fp32 (float64 of float64).

    Gradients go to h, A and B. A mean over no label at all is NaN, and its gradients are zero, as of F.cross_entropy.

    Args:
        divide_by: what the sum is divided by, in place of what ``reduction`` says.
        softcap: logits are capped to (−softcap, softcap).
        chunk: rows of logits at a time.
        multiplier: of the logits, before they are capped.
        low: (A (r, K), B (V, r)) beside the weight, in any dtype.
        kept: how many labels are not ignored, for a caller who knows; must be right.

    Raises:
        ValueError: weight or bias requires a gradient, or there is not one label for each row.
    """
    if labels.shape != h.shape[:1]:
        raise ValueError(f"labels have the shape {tuple(labels.shape)}, but there are {len(h)} rows of hidden states.")
    graph = torch.is_grad_enabled()
    if graph and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError(
            "weight and bias are frozen here. Train them through ordinary logits, or low=(A, B) beside them."
        )
    counts = labels != ignore_index
    if kept is None and _near(labels):
        kept = int(counts.sum())
    index = None
    if kept is not None and kept < len(labels):
        index = torch.nonzero_static(counts, size=kept)[:, 0].to(h.device, non_blocking=True)
    divisor: float | Tensor | None = divide_by
    if divide_by is None and reduction == "mean":
        divisor = counts.sum() if kept is None else kept
    if isinstance(divisor, Tensor):
        divisor = divisor.item() if _near(divisor) else divisor.to(h.device)
    labels = labels.to(h.device, non_blocking=True).contiguous()
    A, B = (None, None) if low is None else low
    grads = tuple(graph and t is not None and t.requires_grad for t in (h, A, B))
    dtype, uncast = compute_dtype(h)
    with uncast:
        loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            h.to(dtype), A, B, weight.to(dtype), None if bias is None else bias.to(dtype), labels, index, divisor,
            ignore_index, multiplier, softcap, chunk or _CHUNK, grads,
        )  # fmt: skip
    return loss


def _near(tensor: Tensor) -> bool:
    """Whether it can be read without waiting for a device."""
    return tensor.device.type == "cpu"


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        h: Tensor,  # (T, K)
        A: Tensor | None,
        B: Tensor | None,
        W: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        index: Tensor | None,  # the rows that count; None: all
        divisor: float | Tensor | None,  # ()
        ignore_index: int,
        multiplier: float,
        softcap: float | None,
        chunk: int,
        grads: tuple[bool, bool, bool],
    ) -> Tensor:
        need_h, need_A, need_B = grads
        dtypes = [None if t is None else t.dtype for t in (A, B)]
        count = len(h) if index is None else len(index)
        rows = even(count, chunk)
        buffer = h.new_empty(rows, -(-len(W) // _ALIGN) * _ALIGN)
        wide = torch.promote_types(h.dtype, torch.float32)
        losses = torch.empty(count, dtype=wide, device=h.device)
        dh = torch.empty(count, h.shape[1], dtype=h.dtype, device=h.device) if need_h else None
        dA = torch.zeros_like(A, dtype=wide) if A is not None and need_A else None
        dB = torch.zeros_like(B, dtype=wide) if B is not None and need_B else None
        low = None if A is None or B is None else (A.to(h.dtype), B.to(h.dtype))
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            x, label = (
                (h[part], labels[part]) if index is None else (h.index_select(0, index[part]), labels[index[part]])
            )
            whole = buffer[: len(x)]
            logits = whole[:, : len(W)]
            if bias is None:
                torch.mm(x, W.t(), out=logits)
            else:
                torch.addmm(bias, x, W.t(), out=logits)
            if low is not None:
                z = x @ low[0].t()  # (rows, r)
                torch.addmm(logits, z, low[1].t(), out=logits)
            losses[part] = _rows_(whole, len(W), label, ignore_index, multiplier, softcap, any(grads))
            if dh is not None:
                torch.mm(logits, W, out=dh[part])
            if low is not None and any(grads):
                S = logits @ low[1]  # (rows, r)
                if dh is not None:
                    torch.addmm(dh[part], S, low[0], out=dh[part])
                if dA is not None:
                    dA += into(S.t(), x, wide)
                if dB is not None:
                    dB += into(logits.t(), z, wide)
        ctx.save_for_backward(dh, dA, dB, index)
        ctx.divisor, ctx.tokens, ctx.rows, ctx.dtypes = divisor, len(h), rows, dtypes
        loss = losses.sum()
        return loss if divisor is None else loss / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dh, dA, dB, index = ctx.saved_tensors
        factor = dloss
        if isinstance(ctx.divisor, Tensor):  # over no label the loss is 0/0, but no row has a gradient
            factor = (dloss / ctx.divisor).masked_fill_(ctx.divisor == 0, 0)
        elif ctx.divisor is not None:
            factor = dloss / ctx.divisor if ctx.divisor else dloss * 0
        small = [None if d is None else (d * factor).to(t) for d, t in zip((dA, dB), ctx.dtypes, strict=True)]
        return (None if dh is None else _spread(dh, factor, index, ctx.tokens, ctx.rows), *small, *(None,) * 10)


def _spread(dh: Tensor, factor: Tensor, index: Tensor | None, tokens: int, rows: int) -> Tensor:
    """factor · dh (n, K) where it belongs in (tokens, K), in fp32, which a product of bf16 with () would not be."""
    out = dh.new_empty(tokens, dh.shape[1]) if index is None else dh.new_zeros(tokens, dh.shape[1])
    for start in range(0, len(dh), rows):
        part = slice(start, start + rows)
        value = dh[part].to(factor.dtype) * factor
        if index is None:
            out[part] = value
        else:
            out.index_copy_(0, index[part], value.to(dh.dtype))
    return out


def even(count: int, chunk: int) -> int:
    """Rows at a time, ``chunk`` at most: as many for each time, and a multiple of 128 where that fits."""
    each = -(-count // max(1, -(-count // chunk)))
    return min(chunk, max(1, -(-each // 128) * 128))


def _rows_(
    whole: Tensor, V: int, labels: Tensor, ignore_index: int, multiplier: float, softcap: float | None, grad: bool
) -> Tensor:
    """The rows' losses, by the kernel where it runs; the first V columns become the gradient as in reference.py."""
    if runs_on(whole.device) and whole.dtype in (torch.bfloat16, torch.float16, torch.float32):
        from rankshift.ops.linear_cross_entropy.triton import launch

        return launch(whole, V, labels, ignore_index, multiplier, softcap, grad)
    return rows_(whole[:, :V], labels, ignore_index, multiplier, softcap, grad)
