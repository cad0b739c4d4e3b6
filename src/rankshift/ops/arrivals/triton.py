"""The programs' half of it: see the folder's __init__.py."""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_last(counter, count):
    """Whether the ``count - 1`` others have been here; what they wrote before can then be read, past L1.

    The barrier: all threads of this program have written before one of them counts.
    """
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1


@triton.jit
def total(parts, count, apart, at, inside, AT_ONCE: tl.constexpr):
    """The numbers ``at`` of ``count`` parts that stand ``apart``, summed in fp32, in one order always."""
    found = tl.zeros(at.shape, dtype=tl.float32)
    for first in range(0, count, AT_ONCE):
        which = first + tl.arange(0, AT_ONCE)
        where = parts + which.to(tl.int64)[:, None] * apart + at[None, :]
        some = tl.load(where, mask=(which < count)[:, None] & inside[None, :], other=0.0, cache_modifier=".cg")
        found += tl.sum(some, 0)
    return found
