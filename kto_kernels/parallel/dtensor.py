"""DTensor arguments become the plain tensors that a rank computes with, and gradients come back with their placements.

    rows    logits, hidden states and labels become the rows of this rank
    heads   weights and biases become whole, or the columns of this rank in the vocabulary group; they may be stored by
            FSDP2, or by DeepSpeed's ZeRO-3, whose parameters are no DTensors

Plain tensors pass through. DTensor and DeepSpeed do the communication.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

from ..checks import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_elsewhere(value: Any) -> bool:
    """Whether this rank must fetch the tensor, or a part of the tensor, before it can compute: a DTensor, or a
    parameter that DeepSpeed's ZeRO-3 has partitioned."""
    return is_dtensor(value) or _partitioned(value)


def _partitioned(value: Any) -> bool:
    return hasattr(value, "ds_shape") and value.shape != value.ds_shape


def rows(vocab_group: dist.ProcessGroup | None, **tensors: Tensor | None) -> list[Tensor | None]:
    """This rank's rows of logits (…, V), hidden states (…, H) or labels (…). In a vocabulary group logits stay this
    rank's columns, and hidden states and labels that are sharded over the group, as under sequence parallelism, are
    gathered. Gradients come back with the placements given.

    Raises:
        ValueError: a tensor is sharded in another way; the message names the argument.
    """
    return [_rows(name, value, vocab_group) if is_dtensor(value) else value for name, value in tensors.items()]


def heads(vocab_group: dist.ProcessGroup | None, **tensors: Tensor | None) -> list[Tensor | None]:
    """Weights (V, H) and biases (V,), gathered over every dimension of their mesh but the vocabulary group's, along
    which a rank keeps its columns. The gradient comes back with the placements given. It is the mean over the gathered
    dimensions, as FSDP2's is, because the ranks along them have losses of their own, or equal losses.

    Raises:
        ValueError: a tensor is not Shard(0) along the vocabulary group, or is a partial sum; the message names the
            argument.
    """
    gathered: dict[int, Tensor] = {}  # policy and reference may share a tensor

    def whole(name: str, value: Any) -> Any:
        if not is_elsewhere(value):
            return value
        if id(value) not in gathered:
            gathered[id(value)] = _of_zero3(value) if _partitioned(value) else _head(name, value, vocab_group)
        return gathered[id(value)]

    return [whole(name, value) for name, value in tensors.items()]


def _rows(name: str, value: DTensor, vocab_group: dist.ProcessGroup | None) -> Tensor:
    from torch.distributed.tensor import Replicate

    mesh, columns = value.device_mesh, value.ndim - value.is_floating_point()  # labels have no such dimension
    placements = list(value.placements)
    for dimension, placement in enumerate(placements):
        where = f"{name}: along {_named(mesh, dimension)}"
        of_vocab = _is_dimension(mesh, dimension, vocab_group)
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


def _head(name: str, value: DTensor, vocab_group: dist.ProcessGroup | None) -> Tensor:
    from torch.distributed.tensor import Partial, Replicate, Shard

    mesh = value.device_mesh
    placements, gradient = [Replicate()] * mesh.ndim, [Partial("avg")] * mesh.ndim
    for dimension, placement in enumerate(value.placements):
        where = f"{name}: along {_named(mesh, dimension)}"
        if placement.is_partial():
            raise ValueError(f"{where} expected Shard or Replicate, got {placement}")
        if _is_dimension(mesh, dimension, vocab_group):
            if not placement.is_shard(0):
                raise ValueError(f"{where}, its vocab_group, expected Shard(0), got {placement}")
            placements[dimension] = gradient[dimension] = Shard(0)
    return value.redistribute(placements=placements).to_local(grad_placements=gradient)


def _of_zero3(value: nn.Parameter) -> Tensor:
    import deepspeed

    with deepspeed.zero.GatheredParameters([value]):
        return value.clone()  # the parameter is partitioned again after this block


def _is_dimension(mesh: dist.DeviceMesh, dimension: int, group: dist.ProcessGroup | None) -> bool:
    """Whether the group is the mesh's group along this dimension."""
    if group is None:
        return False
    ranks = dist.get_process_group_ranks(mesh.get_group(dimension))
    return ranks == dist.get_process_group_ranks(group)


def _named(mesh: dist.DeviceMesh, dimension: int) -> str:
    names = mesh.mesh_dim_names
    return f"mesh dimension {dimension if names is None else repr(names[dimension])}"
