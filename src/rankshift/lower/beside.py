"""Work beside the work: products that nobody waits for yet, on a second stream.

S = dY B is wanted when the product of dY with the weight is done, a factor's gradient when the backward is. Both read
much, compute little and leave most of a GPU idle by the time they end; beside a large product they fill what its last
tiles leave. So it is while a CUDA graph is captured, whose launches cost the host nothing: elsewhere all runs in turn.

Memory follows the streams. What is made in a ``with`` block belongs to the second stream, and its next block begins
when the first stream has done all that it was given before: so what it made may be let go of at any time. What the
first stream made and a block reads must be held until the first stream has waited for that block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_second: list[torch.cuda.Stream] = []  # of the capture that is under way


@contextmanager
def lent(stream: torch.cuda.Stream) -> Iterator[None]:
    """What is captured meanwhile may use this stream beside the current one."""
    _second.append(stream)
    try:
        yield
    finally:
        _second.pop()


class Beside:
    """In a node's backward: what is launched in a ``with`` block of it runs beside what comes next."""

    def __init__(self) -> None:
        self.second = _second[-1] if _second else None
        self.first: torch.cuda.Stream | None = None
        self._held: tuple[Tensor, ...] = ()

    def __bool__(self) -> bool:
        """Whether there is a second stream, or all runs in turn."""
        return self.second is not None

    def __enter__(self) -> None:
        if self.second is not None:
            self.first = torch.cuda.current_stream(self.second.device)
            self.second.wait_stream(self.first)  # type: ignore[no-untyped-call]
            torch.cuda.set_stream(self.second)

    def __exit__(self, *_: object) -> None:
        if self.first is not None:
            torch.cuda.set_stream(self.first)

    def hold(self, *tensors: Tensor) -> None:
        """Until :meth:`wait`: what a block reads and whoever made it lets go of."""
        if self.second is not None:
            self._held += tensors

    def wait(self) -> None:
        """What comes next waits for all blocks."""
        if self.first is not None and self.second is not None:
            self.first.wait_stream(self.second)  # type: ignore[no-untyped-call]
        self._held = ()
