"""The only file that knows DTensor: what is held here, what the whole is, what all ranks agree on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Shard

T = TypeVar("T")


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
        return tensor, slice(0, tensor.shape[0] if tensor.dim() else 1)
    part = tensor.to_local()
    start = _span(tensor.shape[0], tensor).start
    return part, slice(start, start + part.shape[0])


def _span(total: int, like: DTensor) -> slice:
    """Which of ``total`` indices of axis 0 this rank holds, of a tensor that is split as ``like`` is."""
    start = 0
    for axis, placement in enumerate(like.placements):
        if placement.is_replicate():
            continue
        if not isinstance(placement, Shard) or placement.dim != 0:
            raise NotImplementedError(f"rankshift knows shards along axis 0, as FSDP2 makes them, not {placement}")
        parts, index = like.device_mesh.size(axis), like.device_mesh.get_local_rank(axis)
        width = -(-total // parts)  # torch.chunk: equal parts, the last ones shorter or empty
        begin = min(index * width, total)
        start, total = start + begin, min(width, total - begin)
    return slice(start, start + total)


def share(tensor: Tensor) -> int:
    """How many indices of axis 0 a rank holds that has its full share: all ranks but the last ones."""
    count = tensor.shape[0]
    if isinstance(tensor, DTensor):
        for axis, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard):
                count = -(-count // tensor.device_mesh.size(axis))
    return count


def settle(model: nn.Module) -> None:
    """Bring the parameters of an FSDP2 model back to their shards.

    After a forward without backward the root's stay gathered, and what is written to a gathered parameter is lost.
    """
    for unit in units(model):
        unit.reshard()


def units(model: nn.Module) -> list[FSDPModule]:
    """The modules that FSDP2 gathers and shards one at a time."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def assign_(target: Tensor, value: Tensor) -> None:
    """Copy the full tensor ``value``, equal on all ranks, into ``target``: each rank keeps the part it holds."""
    with torch.no_grad():
        if not is_sharded(target):
            target.copy_(value)
            return
        part, rows = local(target)
        part.copy_(value[rows])


def spread(value: Tensor, like: Tensor) -> Tensor:
    """A new tensor with the layout of ``like`` from the full tensor ``value``, equal on all ranks."""
    if not isinstance(like, DTensor):
        return value.to(like.device).clone()
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def zeros(shape: Sequence[int], like: Tensor, dtype: torch.dtype, split: bool) -> Tensor:
    """Zeros of this whole shape on the device of ``like``, and split along axis 0 over ranks as it is if ``split``."""
    if not split or not isinstance(like, DTensor):
        return torch.zeros(tuple(shape), dtype=dtype, device=like.device)
    rows = _span(shape[0], like)
    part = torch.zeros((rows.stop - rows.start, *shape[1:]), dtype=dtype, device=held(like).device)
    stride = torch.empty(tuple(shape), device="meta").stride()
    placed = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    assert isinstance(placed, DTensor)
    return placed


def _reduced(value: Tensor, like: Tensor, op: Any) -> Tensor:
    if not isinstance(like, DTensor):
        return value
    value = value.contiguous()
    for axis, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            dist.all_reduce(value, op, group=like.device_mesh.get_group(axis))
    return value


def sum_like(value: Tensor, like: Tensor) -> Tensor:
    """The sum of ``value`` over the ranks among which ``like`` is split; every one of them must call this."""
    return _reduced(value, like, dist.ReduceOp.SUM)


def over_data(value: Tensor, like: Tensor) -> Tensor:
    """The sum over the ranks that average the gradient ``like``: all of its mesh if it is sharded, all there are if
    they have the same, else this one alone. In place where ``value`` is contiguous; every rank must call this."""
    value = value.contiguous()
    if isinstance(like, DTensor):
        for axis in range(like.device_mesh.ndim):
            dist.all_reduce(value, group=like.device_mesh.get_group(axis))
    elif world() > 1 and first_apart([like]) is None:
        dist.all_reduce(value)
    return value


def max_like(value: Tensor, like: Tensor) -> Tensor:
    """The largest ``value`` on the ranks among which ``like`` is split; every one of them must call this."""
    return _reduced(value, like, dist.ReduceOp.MAX)


def from_rank_zero(tensor: Tensor, like: Tensor, parts: bool = False) -> Tensor:
    """What the first of the ranks that hold ``like`` has, on all of them; in place where it is contiguous.

    ``parts``: it belongs to the part of ``like`` held here, so that only ranks with the same part are to agree.
    """
    if isinstance(like, DTensor):
        tensor = tensor.contiguous()
        for axis, placement in enumerate(like.placements):
            if not (parts and isinstance(placement, Shard)):
                dist.broadcast(tensor, group=like.device_mesh.get_group(axis), group_src=0)
    elif dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        tensor = tensor.contiguous()
        dist.broadcast(tensor, src=0)
    return tensor


def pick(tensor: Tensor, at: Tensor) -> Tensor:
    """The values of the full tensor at some flat positions, without gathering it. Under sharding every rank calls."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().reshape(-1)[at.to(tensor.device)]
    part, rows = local(tensor)
    width = tensor.shape[1:].numel()
    here = at.to(part.device) - rows.start * width
    mine = (here >= 0) & (here < part.numel())
    found = torch.zeros(2, len(at), dtype=torch.float64, device=part.device)  # values, and how many ranks hold them
    found[0, mine] = part.reshape(-1)[here[mine]].to(torch.float64)
    found[1, mine] = 1
    dist.all_reduce(found)
    return (found[0] / found[1]).to(tensor.dtype)


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank if it is true on one."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return flag
    vote = torch.tensor([float(flag)], device=device if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(vote)
    return bool(vote.item() > 0)


def total(values: Tensor) -> Tensor:
    """The sum over ranks of plain numbers on the CPU, which each rank has its own of. Every rank must call this."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    nccl = dist.get_backend() == "nccl"  # which knows no CPU
    sent = values.to(torch.device("cuda", torch.cuda.current_device()) if nccl else "cpu", copy=True)
    dist.all_reduce(sent)
    return sent.cpu()


def held(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, detached and sharing its storage; of a sparse one the values."""
    if type(tensor) in (Tensor, nn.Parameter) and not tensor.requires_grad and not tensor.is_sparse:
        return tensor  # it is asked of every tensor in every step
    tensor = tensor.detach()
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def any_part(flag: Tensor, of: Tensor) -> bool:
    """Whether ``flag``, said of this rank's part of a tensor, is true of any part (then every rank must call this)."""
    return any_rank(bool(flag), of.device) if isinstance(of, DTensor) else bool(flag)


def first_apart(tensors: Sequence[Tensor]) -> int | None:
    """Index of the first unsharded tensor whose norm differs between ranks, or None. Every rank must call this."""
    shared = [i for i, t in enumerate(tensors) if not isinstance(t, DTensor)]
    if not shared or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    norms = torch.stack([held(tensors[i]).to(torch.float64).abs().sum() for i in shared])
    norms = norms if dist.get_backend() == "nccl" else norms.cpu()
    bounds = torch.cat([norms, -norms])
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    most, least = bounds[: len(shared)], -bounds[len(shared) :]
    apart = (most - least > 1e-6 * most).nonzero()  # equal bits where they were averaged; else equal by chance
    return shared[int(apart[0])] if len(apart) else None


def from_first(value: T) -> T:
    """The first rank's ``value`` (anything that pickles, tensors on the CPU) on every rank."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    shared: T = box[0]
    return shared


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """How many processes there are, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def used_here(tensors: Iterable[Tensor]) -> None:
    """Keep the memory of these, should they be freed, until the current stream is done with them: FSDP2 calls the hooks
    of a parameter on a stream of its own."""
    for part in map(held, tensors):
        if part.is_cuda:
            part.record_stream(torch.cuda.current_stream(part.device))


def barrier() -> None:
    """Wait for all ranks, if there are others."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
