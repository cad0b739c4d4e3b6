"""A weight W + B A that stays in two parts, for modules that multiply a weight which is theirs.

Fused experts index their stack of matrices and call ``linear`` or ``grouped_mm`` on what they get. Handing them the sum
would form a (experts, out, in) tensor in every forward and, in bf16, round most of a small update away. This tensor
answers the same calls with W's product plus the branch's; a call that it does not know gets the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class LowRankSum(Tensor):
    """W (…, k, n) + B (…, k, r) A (…, r, n); to every caller a tensor of W's shape and dtype."""

    W: Tensor
    A: Tensor
    B: Tensor

    def __new__(cls, W: Tensor, A: Tensor, B: Tensor) -> LowRankSum:
        self: LowRankSum = W.detach().as_subclass(cls)
        self.W, self.A, self.B = W, A, B
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        known = _KNOWN.get(func)
        with torch._C.DisableTorchFunctionSubclass():
            answer = known(*args, **kwargs) if known is not None else NotImplemented
            if answer is not NotImplemented:
                return answer
            seen: Callable[[LowRankSum], Tensor] = _weight if func in _ABOUT else _sum
            return func(*_replace(args, seen), **_replace(kwargs, seen))


def _sum(t: LowRankSum) -> Tensor:
    return t.W + (t.B @ t.A).to(t.W.dtype)


def _weight(t: LowRankSum) -> Tensor:
    return t.W


def _replace(value: Any, seen: Callable[[LowRankSum], Tensor]) -> Any:
    if isinstance(value, LowRankSum):
        return seen(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_replace(v, seen) for v in value)
    if isinstance(value, dict):
        return {key: _replace(v, seen) for key, v in value.items()}
    return value


def _getitem(t: Any, index: Any) -> Any:
    """One matrix or several of the stack."""
    if isinstance(t, LowRankSum) and t.W.dim() == 3 and isinstance(index, (int, Tensor)):
        return LowRankSum(t.W[index], t.A[index], t.B[index])
    return NotImplemented


def _turn(t: Any) -> Any:
    """(W + B A)ᵀ = Wᵀ + Aᵀ Bᵀ."""
    return LowRankSum(t.W.mT, t.B.mT, t.A.mT)


def _transpose(t: Any, one: int, other: int) -> Any:
    dims = t.W.dim()
    return _turn(t) if {one % dims, other % dims} == {dims - 2, dims - 1} else NotImplemented


def _linear(x: Any, t: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(t, LowRankSum) or isinstance(x, LowRankSum) or t.W.dim() != 2:
        return NotImplemented
    return F.linear(x, t.W, bias) + F.linear(F.linear(x, t.A.to(x.dtype)), t.B.to(x.dtype))


def _matmul(left: Any, right: Any) -> Any:
    """x (W + B A), or (W + B A) x: for matrices and for stacks of them."""
    if isinstance(left, LowRankSum) and isinstance(right, LowRankSum):
        return NotImplemented
    if isinstance(right, LowRankSum):
        return left @ right.W + (left @ right.B.to(left.dtype)) @ right.A.to(left.dtype)
    return left.W @ right + left.B.to(right.dtype) @ (left.A.to(right.dtype) @ right)


def _grouped_mm(x: Any, t: Any, *, offs: Tensor | None = None, **options: Any) -> Any:
    """Rows of x in groups, group e times matrix e of the stack."""
    if not isinstance(t, LowRankSum) or isinstance(x, LowRankSum) or t.W.dim() != 3 or x.dim() != 2:
        return NotImplemented
    if any(option is not None for option in options.values()):
        return NotImplemented
    fill = -t.A.shape[-2] % (16 // x.element_size())  # the kernel wants rows of 16 bytes
    B, A = F.pad(t.B.to(x.dtype), (0, fill)), F.pad(t.A.to(x.dtype), (0, 0, 0, fill))
    branch = F.grouped_mm(F.grouped_mm(x, B, offs=offs), A, offs=offs)
    return F.grouped_mm(x, t.W, offs=offs) + branch


_KNOWN: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _getitem,
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.mT.__get__: _turn,  # type: ignore[attr-defined]
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: lambda t, x: _matmul(x, t),
    torch.mm: _matmul,
    Tensor.mm: _matmul,
    torch.bmm: _matmul,
    Tensor.bmm: _matmul,
    torch._grouped_mm: _grouped_mm,
}

_ABOUT = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "stride", "is_floating_point", "element_size")),
    *(getattr(Tensor, name) for name in ("data_ptr", "is_contiguous", "__len__", "ndimension")),
}
