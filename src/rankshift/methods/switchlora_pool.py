"""The candidates of SwitchLoRA: drawn, held on the CPU as rings, and how some of them travel.

A pool of c vectors is a ring that is gone through in order. Exchange t (counted from 0) takes candidate t mod c and
gives back the vector that was taken r exchanges ago, into the place that it came from; so at any time the last r places
behind the pointer are out, and what they hold is what their vectors were when they were taken.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rankshift.core.errors import ConfigError
from rankshift.core.random import Key
from rankshift.core.site import Spec
from rankshift.ops.vector_exchange import lend, take_back

Ints = NDArray[np.int64]
Rings = Sequence[NDArray[np.floating]]  # pools of one size, (c, length) each


class Ring:
    """c vectors of one length on the CPU, in pages of their own: it is pages that GPUs are lent."""

    def __init__(self, count: int, length: int, dtype: torch.dtype):
        page, size = mmap.PAGESIZE, count * length * dtype.itemsize
        room = np.empty((-(-size // page) + 1) * page, np.uint8)
        start = -room.ctypes.data % page
        self.count = count
        self._pages = room[start : start + room.size - page]
        # by numpy: to read and write a few numbers of each layer takes it a tenth of the time
        self._values = torch.from_numpy(self._pages[:size]).view(dtype).view(count, length).numpy()
        self._lent: tuple[int, torch.device] | None = None  # where GPUs find it, or 0; which one was there last

    @classmethod
    def of(cls, values: NDArray[np.floating]) -> Ring:
        """With these vectors."""
        ring = cls(len(values), values.shape[1], torch.from_numpy(values[:0]).dtype)
        ring._values[:] = values
        return ring

    def __reduce__(self) -> tuple[object, ...]:
        return Ring.of, (self.values,)  # of a copy no GPU knows

    @property
    def values(self) -> NDArray[np.floating]:
        """(c, length), once no GPU writes there any more."""
        if self._lent is not None and self._lent[0]:
            torch.cuda.synchronize(self._lent[1])
        return self._values

    def address(self, device: torch.device) -> int:
        """Where a GPU's kernels find it, which read and write it by themselves: it is lent to them from then on. 0 if
        that is refused."""
        if self._lent is None:
            at = self._pages.ctypes.data
            found = lend(at, self._pages.size)
            if found:
                weakref.finalize(self._pages.base, _taken_back, at, device).atexit = False
            self._lent = found, device
        if self._lent[1] != device:
            self._lent = self._lent[0], device
        return self._lent[0]


def _taken_back(address: int, device: torch.device) -> None:
    """Before memory that was lent is freed."""
    torch.cuda.synchronize(device)
    take_back(address)


def candidates(key: Key, shape: tuple[int, int], std: float, dtype: torch.dtype) -> Tensor:
    """Uniform with this standard deviation, (c, length), on the CPU: the same on every machine."""
    generator = torch.Generator(device="cpu").manual_seed(key.word)  # Philox takes a hundred times as long
    unit = torch.empty(shape, dtype=dtype, device="cpu").uniform_(0, 1, generator=generator)
    return unit.sub_(0.5).mul_(2 * 3**0.5 * std)


def size(spec: Spec) -> int:
    """Bytes of both pools of a layer: min(out, in) vectors of each length."""
    return spec.max_rank * (spec.out + spec.into) * spec.master.itemsize


def check_memory(specs: Sequence[Spec]) -> None:
    """Raise ConfigError if the candidates of all layers do not fit into the memory of this machine."""
    copies = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # every process of the machine holds them
    wanted, there = copies * sum(size(spec) for spec in specs if spec.device.type != "meta"), available()
    if wanted > there:
        each = f"{copies} processes × {wanted / copies / 2**30:.1f} GiB" if copies > 1 else f"{wanted / 2**30:.1f} GiB"
        raise ConfigError(
            f"SwitchLoRA holds min(out, in)·(out + in) candidates of {len(specs)} layers in the CPU's memory: {each}, "
            f"and {there / 2**30:.1f} GiB are free. Exclude the widest layers in targets, or use a machine with more."
        )


def available() -> int:
    """Bytes of memory that this process may still take."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: all there is
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        limit = "max"
    return free if limit == "max" else min(free, int(limit))


def parts(vectors: Tensor, groups: Sequence[Rings], count: int) -> list[Tensor]:
    """What of one tensor with ``count`` vectors of each ring belongs to each group of rings, (L, count, length)."""
    lengths = [rings[0].shape[1] for rings in groups]
    pieces = vectors.split_with_sizes(
        [len(rings) * count * length for rings, length in zip(groups, lengths, strict=True)]
    )
    return [piece.view(-1, count, length) for piece, length in zip(pieces, lengths, strict=True)]


def taken(groups: Sequence[Rings], starts: Sequence[Ints], count: int, device: torch.device) -> Tensor:
    """``count`` candidates of each ring from a place on, as :func:`parts` finds them, on the device: in one transfer,
    that the host does not wait for."""
    total = sum(len(rings) * count * rings[0].shape[1] for rings in groups)
    dtype = torch.from_numpy(groups[0][0]).dtype
    host = torch.empty(total, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
    for rings, begins, part in zip(groups, starts, parts(host, groups, count), strict=True):
        places = (begins[:, None] + np.arange(count)) % len(rings[0])
        for ring, at, out in zip(rings, places, part.numpy(), strict=True):
            ring.take(at, 0, out, "wrap")  # any mode but the first, with which it buffers
    return host.to(device, non_blocking=True)


def given(vectors: Tensor) -> Callable[[], Tensor]:
    """Send vectors to the host; what comes back waits until they are there."""
    if vectors.device.type != "cuda":
        return lambda: vectors
    host = torch.empty(vectors.shape, dtype=vectors.dtype, device="cpu", pin_memory=True)
    host.copy_(vectors, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record(torch.cuda.current_stream(vectors.device))

    def here() -> Tensor:
        arrived.synchronize()
        return host

    return here


def put_back(rings: Rings, starts: Ints, counts: Ints, vectors: Tensor) -> None:
    """The first ``counts`` of each ring's ``vectors``, (L, K, length), into places from ``starts`` on."""
    c = len(rings[0])
    for ring, start, count, rows in zip(rings, (starts % c).tolist(), counts.tolist(), vectors.numpy(), strict=True):
        fit = min(count, c - start)  # up to the end of the ring, then on from its beginning
        ring[start : start + fit] = rows[:fit]
        ring[: count - fit] = rows[fit:count]
