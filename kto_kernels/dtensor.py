"""DTensor arguments: the plain tensors that a rank computes with, and gradients that come back as they were sharded.

    rows    logits, hidden states, labels: a rank takes its own
    heads   weights and biases: whole, however they are stored (FSDP2, or DeepSpeed's ZeRO-3, whose parameters are no
            DTensors), or this rank's columns of the vocabulary group

Plain tensors pass through. DTensor and DeepSpeed do the communication.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from .distributed import Ranks


def is_dtensor(value: object) -> bool:
    if type(value) in (Tensor, nn.Parameter, type(None)):
        return False
    module = sys.modules.get("torch.distributed.tensor")  # slow to import, and without it nobody has one
    return module is not None and isinstance(value, module.DTensor)


def rows(ranks: Ranks, **tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors (…, V), (…, H) or, labels, (…): this rank's rows of them. Logits are this rank's columns too; hidden states
    and labels that are sharded over the vocabulary group, as under sequence parallelism, are gathered over it. Gradients
    come back with the placements given.

    Raises:
        ValueError: they are sharded in another way; the message names the argument.
    """
    return [_rows(name, value, ranks) if is_dtensor(value) else value for name, value in tensors.items()]


def heads(ranks: Ranks, **tensors: Tensor | None) -> list[Tensor | None]:
    """Weights (V, H) and biases (V,): this rank's columns of the vocabulary group, else all of them, gathered over every
    other dimension of their mesh. The gradient comes back with the placements given, and is the mean over those
    dimensions, as FSDP2's is: there each rank has a loss of its own, or the same.

    Raises:
        ValueError: not Shard(0) along the vocabulary group, or a partial sum; the message names the argument.
    """
    gathered: dict[int, Tensor] = {}  # reference and policy may share one

    def whole(name: str, value: Any) -> Any:
        partitioned = hasattr(value, "ds_shape") and value.shape != value.ds_shape
        if not partitioned and not is_dtensor(value):
            return value
        if id(value) not in gathered:
            gathered[id(value)] = _of_zero3(value) if partitioned else _head(name, value, ranks)
        return gathered[id(value)]

    return [whole(name, value) for name, value in tensors.items()]


def _rows(name: str, value: DTensor, ranks: Ranks) -> Tensor:
    from torch.distributed.tensor import Replicate

    mesh, columns = value.device_mesh, value.ndim - value.is_floating_point()  # labels have none
    placements = list(value.placements)
    for dimension, placement in enumerate(placements):
        where = f"{name}: along {_named(mesh, dimension)}"
        of_vocab = _is_dimension(mesh, dimension, ranks.vocab)
        if mesh.size(dimension) == 1:
            placements[dimension] = Replicate()
        elif name.endswith("logits") and of_vocab:
            if not placement.is_shard(columns):
                raise ValueError(f"{where}, its vocab_group, expected Shard({columns}), got {placement}")
        elif of_vocab:
            placements[dimension] = Replicate()
        elif placement.is_shard(columns):
            how = "pass it as vocab_group" if name.endswith("logits") else "redistribute them first"
            raise ValueError(f"{where} expected whole rows, got {placement}; {how}")
        elif not (placement.is_replicate() or placement.is_shard()):
            raise ValueError(f"{where} expected Shard or Replicate, got {placement}")
    return value.redistribute(placements=placements).to_local()


def _head(name: str, value: DTensor, ranks: Ranks) -> Tensor:
    from torch.distributed.tensor import Partial, Replicate, Shard

    mesh = value.device_mesh
    placements, gradient = [Replicate()] * mesh.ndim, [Partial("avg")] * mesh.ndim
    for dimension, placement in enumerate(value.placements):
        where = f"{name}: along {_named(mesh, dimension)}"
        if placement.is_partial():
            raise ValueError(f"{where} expected Shard or Replicate, got {placement}")
        if _is_dimension(mesh, dimension, ranks.vocab):
            if not placement.is_shard(0):
                raise ValueError(f"{where}, its vocab_group, expected Shard(0), got {placement}")
            placements[dimension] = gradient[dimension] = Shard(0)
    return value.redistribute(placements=placements).to_local(grad_placements=gradient)


def _of_zero3(value: nn.Parameter) -> Tensor:
    import deepspeed

    with deepspeed.zero.GatheredParameters([value]):
        return value.clone()  # the parameter is empty again behind this block


def _is_dimension(mesh: dist.DeviceMesh, dimension: int, group: dist.ProcessGroup | None) -> bool:
    """Whether the group runs along this dimension of the mesh."""
    if group is None:
        return False
    ranks = dist.get_process_group_ranks(mesh.get_group(dimension))
    return ranks == dist.get_process_group_ranks(group)


def _named(mesh: dist.DeviceMesh, dimension: int) -> str:
    names = mesh.mesh_dim_names
    return f"mesh dimension {dimension if names is None else repr(names[dimension])}"
