"""The last program to arrive sums: partial results put together by the launch that makes them.

Each program of a launch writes its part, then adds 1 to a counter of the output that the part belongs to. The one that
finds that all others have been there sums the parts, in an order that does not depend on who came when, and sets the
counter to zero again. triton.py has the programs' half of it, this file the counters.

They are zero when a launch begins and zero when it has ended, and launches on one stream run one after the other: so
all on a stream share the same counters, and nobody has to set them to zero in between. Launches on two streams may run
at once and have counters of their own. What a CUDA graph captures runs later, on any stream: it gets those that were
:func:`lent` to the capture, or else new ones, which the graph itself sets to zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_LEAST = 1 << 14

_kept: dict[tuple[int, int], Tensor] = {}  # by device and stream
_lent: dict[tuple[int, int], Tensor] = {}  # likewise, of streams that are being captured


def counters(count: int, device: torch.device) -> Tensor:
    """``count`` zeros or more, int32, for the next launch on the current stream of ``device``."""
    if device.type != "cuda":
        return _of((-1, 0), count, device)
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return counters(count, device)
    stream = _here()
    if not torch.cuda.is_current_stream_capturing():
        return _of(stream, count, device)
    lent = _lent.get(stream)
    return new(device, count) if lent is None or len(lent) < count else lent


def new(device: torch.device, count: int = _LEAST) -> Tensor:
    """Counters that nobody else has."""
    return torch.zeros(count, dtype=torch.int32, device=device)


@contextmanager
def lent(own: Tensor) -> Iterator[None]:
    """What the current stream captures counts in ``own``, which must live as long as the graph does.

    Graphs that were captured with the same counters must not run at once.
    """
    stream = _here()
    _lent[stream] = own
    try:
        yield
    finally:
        del _lent[stream]


def _here() -> tuple[int, int]:
    return torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream


def _of(stream: tuple[int, int], count: int, device: torch.device) -> Tensor:
    found = _kept.get(stream)
    if found is None or len(found) < count:
        found = _kept[stream] = new(device, max(_LEAST, 2 * count))
    return found
