"""What all ranks of a training must do alike: one that does otherwise leaves the others waiting in a collective."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def any_rank(wants: bool) -> bool:
    """Whether any rank does. Each of them has to ask, at the same step."""
    if _alone():
        return wants
    flag = torch.tensor(int(wants), device=_device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def mean_over_ranks(own: float) -> float:
    """The same on every rank; not finite where any rank's is not. Each of them has to ask, at the same step."""
    if _alone():
        return own
    total = torch.tensor(own, dtype=torch.float64, device=_device())
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def broadcast_rank0(own: T) -> T:
    """Rank 0's: what lies on a shared file system may look otherwise from another host."""
    if _alone():
        return own
    told = [own]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def _alone() -> bool:
    """A pack has no ranks at all."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def _device() -> int | str:
    """Of tensors that travel."""
    return torch.cuda.current_device() if dist.get_backend() == "nccl" else "cpu"
