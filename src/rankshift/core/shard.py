"""The only file that knows DTensor: what is held here, what the whole is, what all ranks agree on."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Shard


def is_sharded(tensor: Tensor) -> bool:
    """True for a tensor of which this rank may hold a part only."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, gathered from all ranks if it is sharded (then every rank must call this). Detached."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> tuple[Tensor, slice]:
    """The part held by this rank, sharing its storage, and which indices of axis 0 it is."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor, slice(0, tensor.shape[0])
    part = tensor.to_local()
    start, total = 0, tensor.shape[0]
    for axis, placement in enumerate(tensor.placements):
        if not isinstance(placement, Shard):
            continue
        if placement.dim != 0:
            raise NotImplementedError("rankshift shards weights along axis 0 only, as FSDP2 does")
        parts, index = tensor.device_mesh.size(axis), tensor.device_mesh.get_local_rank(axis)
        width = -(-total // parts)  # torch.chunk: equal parts, the last ones shorter or empty
        begin = min(index * width, total)
        start, total = start + begin, min(width, total - begin)
    return part, slice(start, start + part.shape[0])


def assign_(target: Tensor, value: Tensor) -> None:
    """Copy the full tensor ``value``, equal on all ranks, into ``target``: each rank keeps the part it holds."""
    with torch.no_grad():
        part, rows = local(target)
        part.copy_(value[rows])


def spread(value: Tensor, like: Tensor) -> Tensor:
    """A new tensor with the layout of ``like`` from the full tensor ``value``, equal on all ranks."""
    if not isinstance(like, DTensor):
        return value.to(like.device).clone()
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank if it is true on one."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return flag
    vote = torch.tensor([float(flag)], device=device if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(vote)
    return bool(vote.item() > 0)


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def barrier() -> None:
    """Wait for all ranks, if there are others."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
