"""The candidates of SwitchLoRA: drawn, held on the CPU as rings, and how some of them travel.

A pool of c vectors is a ring that is gone through in order. Exchange t (counted from 0) takes candidate t mod c and
gives back the vector that was taken r exchanges ago, into the place that it came from; so at any time the last r places
behind the pointer are out, and what they hold is what their vectors were when they were taken.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rankshift.core.errors import ConfigError
from rankshift.core.random import Key
from rankshift.core.site import Spec


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


def arcs(start: int, count: int, size: int) -> list[slice]:
    """``count`` places of a ring from ``start`` on, as one slice or two."""
    start %= size
    over = start + count - size
    return [slice(start, start + count)] if over <= 0 else [slice(start, size), slice(0, over)]


def taken(pools: Sequence[Tensor], starts: Sequence[int], count: int, device: torch.device) -> Tensor:
    """``count`` candidates of each pool, all of one size, from a place on, (L, count, length), on the device: in one
    transfer, that the host does not wait for."""
    c, length = pools[0].shape
    host = torch.empty(len(pools), count, length, dtype=pools[0].dtype, device="cpu", pin_memory=device.type == "cuda")
    parts = [pool[arc] for pool, start in zip(pools, starts, strict=True) for arc in arcs(start, count, c)]
    torch.cat(parts, out=host.view(-1, length))
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


def put_back(pools: Sequence[Tensor], starts: Sequence[int], counts: Sequence[int], vectors: Tensor) -> None:
    """The first ``counts`` of each pool's ``vectors``, (L, K, length), into places from ``starts`` on."""
    into, what, c = [], [], pools[0].shape[0]
    for pool, start, count, rows in zip(pools, starts, counts, vectors.unbind(), strict=True):
        done = 0
        for arc in arcs(start, count, c):
            into.append(pool[arc])
            what.append(rows[done : done + arc.stop - arc.start])
            done += arc.stop - arc.start
    torch._foreach_copy_(into, what)
