"""Collectives on Python values, so that all ranks make the same decisions. Call them on all ranks, at the same
step."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def any_rank(flag: bool) -> bool:
    """Return whether `flag` is True on any rank."""
    if _is_single_process():
        return flag
    result = torch.tensor(int(flag), device=_device())
    dist.all_reduce(result, op=dist.ReduceOp.MAX)
    return bool(result)


def mean_over_ranks(value: float) -> float:
    """Return the mean over all ranks; not finite if the value of any rank is not."""
    if _is_single_process():
        return value
    total = torch.tensor(value, dtype=torch.float64, device=_device())
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def broadcast_rank0(value: T) -> T:
    """Return the value of rank 0. Use it for the state of a shared file system, which hosts may see differently."""
    if _is_single_process():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def barrier() -> None:
    """Wait for all ranks."""
    if not _is_single_process():
        dist.barrier()


def _is_single_process() -> bool:
    """Whether there is one rank, or no process group, as in a pack."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def _device() -> int | str:
    """Return the device of tensors that the backend communicates."""
    return torch.cuda.current_device() if dist.get_backend() == "nccl" else "cpu"
