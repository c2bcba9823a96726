"""What all ranks of a training must do alike: one that does otherwise leaves the others waiting in a collective."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def anyone(wants: bool) -> bool:
    """Whether any rank does. Each of them has to ask, at the same step."""
    if dist.get_world_size() == 1:
        return wants
    device = torch.cuda.current_device() if dist.get_backend() == "nccl" else "cpu"
    flag = torch.tensor(int(wants), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def as_first(own: T) -> T:
    """Rank 0's: what lies on a shared file system may look otherwise from another host."""
    told = [own]
    dist.broadcast_object_list(told, src=0)
    return told[0]
