"""Groups of ranks, and exchanges between the ranks of a group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def resolve(name: str, group: Any) -> dist.ProcessGroup | None:
    """The ProcessGroup behind the argument called `name`, which is a group, a one-dimensional DeviceMesh or None; None
    also for a group of one rank, which has nothing to exchange.

    Raises:
        TypeError: the argument is neither a group nor a mesh.
        ValueError: the mesh has several dimensions, or this rank is not in the group.
        RuntimeError: torch.distributed is not initialised.
    """
    if group is None:
        return None
    # `new_group` returns this int to ranks outside the group.
    outsider = dist.is_available() and type(group) is int and group == dist.GroupMember.NON_GROUP_MEMBER
    if not dist.is_available() or not (outsider or isinstance(group, (dist.ProcessGroup, dist.DeviceMesh))):
        raise TypeError(f"{name}: expected a torch.distributed ProcessGroup or DeviceMesh, got {type(group).__name__}")
    if not dist.is_initialized():
        raise RuntimeError(f"{name}: torch.distributed is not initialised; call torch.distributed.init_process_group")
    if isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"{name}: expected a DeviceMesh of one dimension, got {group.ndim} {group.mesh_dim_names}; pass one of "
                "them, as mesh['tp']"
            )
        group = group.get_group()
    if outsider or dist.get_rank(group) < 0:
        raise ValueError(f"{name}: this rank ({dist.get_rank()}) is not of the group")
    return group if dist.get_world_size(group) > 1 else None


def by_name(name: str) -> dist.ProcessGroup:
    """The group whose `group_name` is `name`."""
    return dist.distributed_c10d._resolve_process_group(name)


def group_size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def devices(group: dist.ProcessGroup) -> dict[str, str]:
    """The group's backends, as device type → backend."""
    return dist.BackendConfig(dist.Backend(dist.get_backend_config(group))).get_device_backend_map()


@dataclass(frozen=True)
class VocabShard:
    """The columns of the vocabulary that this rank of a vocabulary group has."""

    group_name: str  # the group travels by name, because an operator's schema cannot hold a group
    offset: int  # the number of this rank's first column
    vocab: int  # the columns of all ranks
    widest: int  # the most columns that one rank has

    @property
    def group(self) -> dist.ProcessGroup:
        return by_name(self.group_name)


def gather(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The (...) values of every rank, stacked to (ranks, ...)."""
    out = values.new_empty(dist.get_world_size(group), *values.shape)
    dist.all_gather(list(out.unbind()), values, group=group)
    return out


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks. Every rank makes the same loss of the sum, so a rank's own values get the sum's gradient."""

    @staticmethod
    def forward(ctx, values, group):
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def sum_over_ranks(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The all-reduced sum, differentiable in this rank's own values; without a group, the values."""
    return values if group is None else _SumOverRanks.apply(values, group)


def sums_over_ranks(
    total: Tensor, count: Tensor | None, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor | None]:
    """Stage 2 over the ranks of a context group: the (B,) sums, and the counts of scored tokens where these are given,
    in one fp64 all-reduce."""
    if group is None:
        return total, count
    summed = sum_over_ranks(torch.stack([total] if count is None else [total, count.to(total.dtype)]), group)
    return summed[0], None if count is None else summed[1]
