"""Losses over more than one device, on torch.distributed. One call may know three groups of ranks:

    process_group   data parallel: each rank has sequences of its own; z0 is that of all of them
    vocab_group     vocabulary (tensor) parallel: each rank has some columns of the logits, all have the same rows
    context_group   context parallel: each rank has some tokens of every sequence

Every rank of a group calls with the same options. A rank that fails its checks tells the others before it raises, so
that they raise too instead of waiting for it.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks, reference

_BITS = 62  # of a header's number that say which sequences a rank has tokens of
_DEBUG = "KTO_KERNELS_DEBUG=1"  # what it compares is exchanged by all ranks or by none
_DIGEST = (1 << 20) - 1  # squares of digests, summed over thousands of ranks, are exact in fp64


# Groups ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def resolve(name: str, group: Any) -> dist.ProcessGroup | None:
    """The ProcessGroup behind a group or a one-dimensional DeviceMesh; None for None, and for a group of one rank, which
    has nothing to exchange.

    Raises:
        TypeError, ValueError, RuntimeError: it is neither, the mesh has several dimensions, this rank is not of the
            group, or torch.distributed is not initialised.
    """
    if group is None:
        return None
    # An int, as new_group returns it.
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


def by_name(name: str | None) -> dist.ProcessGroup | None:
    """The group behind its `group_name`, which operators are given instead: their schemas know no groups."""
    return None if name is None else dist.distributed_c10d._resolve_process_group(name)


def group_size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def _devices(group: dist.ProcessGroup) -> dict[str, str]:
    """Device type → backend."""
    return dist.BackendConfig(dist.Backend(dist.get_backend_config(group))).get_device_backend_map()


@dataclass(frozen=True)
class VocabShard:
    """Which columns of the logits this rank has: [offset, offset + its own) of `vocab`; the most that a rank has is
    `widest`."""

    group: dist.ProcessGroup
    offset: int
    vocab: int
    widest: int

    @classmethod
    def of(cls, group: str | None, offset: int, vocab: int, widest: int) -> VocabShard | None:
        """Of an operator's arguments, which know the group by its name; None without one."""
        return None if group is None else cls(by_name(group), offset, vocab, widest)

    @property
    def arguments(self) -> tuple[str, int, int, int]:
        return self.group.group_name, self.offset, self.vocab, self.widest


@dataclass
class Ranks:
    """The groups of one call, each None where there is nothing to exchange, and what their ranks agree on."""

    vocab: dist.ProcessGroup | None = None
    context: dist.ProcessGroup | None = None
    process: dist.ProcessGroup | None = None
    options: dict[str, Any] = field(default_factory=dict)
    # With a context group, after `agree`: (B,) which sequences have tokens on this rank and on others.
    open_sequences: list[bool] | None = None

    @classmethod
    def of(
        cls, *, process_group: Any = None, vocab_group: Any = None, context_group: Any = None, **options: Any
    ) -> Ranks:
        """`options` are those of the call that every rank of any group must share."""
        return cls(
            resolve("vocab_group", vocab_group),
            resolve("context_group", context_group),
            resolve("process_group", process_group),
            options,
        )

    def __bool__(self) -> bool:
        return any(group is not None for group in self._named().values())

    def _named(self) -> dict[str, dist.ProcessGroup | None]:
        return {"vocab_group": self.vocab, "context_group": self.context, "process_group": self.process}

    # Agreement: no rank waits for one that failed ─────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def checks(self, like: object) -> Iterator[None]:
        """Around the checks of a call: when they raise on this rank, the others raise too. `like` has the call's
        device, if it is a tensor at all."""
        device = like.device if isinstance(like, Tensor) else None
        with self._telling(device):
            for name, group in self._named().items():
                if group is not None and device is not None and device.type not in _devices(group):
                    raise ValueError(
                        f"{name}: its backends {_devices(group)} have none for tensors on {device}; "
                        "torch.distributed.new_group(backend=...) makes one that has"
                    )
            yield

    @contextlib.contextmanager
    def _telling(self, device: torch.device | None) -> Iterator[None]:
        try:
            yield
        except Exception:
            self._tell_failure(device)
            raise

    def _tell_failure(self, device: torch.device | None) -> None:
        """Takes part, as failed, in the exchange that each group's other ranks begin with."""
        for name, group in self._named().items():
            if group is None:
                continue
            kinds = _devices(group)
            kind = device.type if device is not None and device.type in kinds else next(iter(kinds))
            # Where nobody can be told (no such device, no such peer any more), the failure itself is what to raise.
            with contextlib.suppress(Exception):
                if name == "process_group":
                    dist.all_reduce(_kl_message(torch.zeros((), device=kind), 0, {}, failed=True), group=group)
                else:
                    gather(_header(kind, failed=True), group)

    def agree(
        self,
        labels: Tensor,
        kl_labels: Tensor | None,
        columns: int,
        ignore_index: int,
        cu_seqlens: Tensor | None = None,
        kl_cu_seqlens: Tensor | None = None,
        steps: dict[str, Any] | None = None,
        *,
        shards: dict[str, Tensor | None],
        tokens: dict[str, Tensor | None] | None = None,
        **layout: Any,
    ) -> VocabShard | None:
        """Compares options and layout within the vocabulary and the context group, and checks the size of the vocabulary
        of all ranks where the option `vocab` says it, that the labels are in this vocabulary, and the offsets. With such
        a group it waits for the device.

        Args:
            columns: of the logits that this rank has.
            steps: what else a vocabulary group must share, so that its ranks take the same steps.
            shards, tokens: by name the arguments of which each rank of the vocabulary and of the context group has a part
                of its own.

        Returns:
            With a vocabulary group, where this rank's `columns` of the logits are.

        Raises:
            ValueError: a label is outside the vocabulary, or offsets do not rise from 0 to N (seen on the CPU only). On
                every rank, where the vocabulary has another size than `vocab`; or, under KTO_KERNELS_DEBUG=1, two ranks
                hold the same part.
            RuntimeError: on every rank, where another one's checks failed or what it was given is not what the others
                were: options, layout, and in a vocabulary group the labels.
        """
        if not self:
            return None
        everything = [labels.flatten(), *([] if kl_labels is None else [kl_labels.flatten()])]
        shapes = [tuple(labels.shape), None if kl_labels is None else tuple(kl_labels.shape)]
        shard, debug = None, {_DEBUG: checks.debugging()}
        tokens = {name: part for name, part in (tokens or {}).items() if part is not None}
        parts = {} if self.context is None else fingerprints(**tokens)
        if self.vocab is not None:
            same = self._same(layout | {"shapes of labels and kl_labels": shapes} | (steps or {}) | debug)
            header = _header(labels.device, same, columns, torch.cat(everything))
            with Ranks(context=self.context, process=self.process)._telling(labels.device):
                sizes, _ = _compare("vocab_group", self.vocab, header, same)
                if sum(sizes) == 0:
                    raise ValueError("vocab_group: expected a column of the vocabulary on one rank at least, got none")
                if self.options.get("vocab") not in (None, sum(sizes)):
                    raise ValueError(
                        f"vocab: expected {sum(sizes)}, the sum of the columns {sizes} of vocab_group's ranks, got "
                        f"{self.options['vocab']}; logits or heads that are whole on every rank go without vocab_group"
                    )
                _refuse_copies("vocab_group", self.vocab, fingerprints(**shards))
            # One verdict of the context group for all ranks of this one, of which one may have no column.
            parts = {name: gather(part, self.vocab).sum(0) for name, part in parts.items()}
            mine = dist.get_rank(self.vocab)
            shard = VocabShard(self.vocab, sum(sizes[:mine]), sum(sizes), max(sizes))
            columns = shard.vocab
        with Ranks(context=self.context, process=self.process)._telling(labels.device):
            checks.label_values(labels, columns, ignore_index)
            if kl_labels is not None:
                checks.label_values(kl_labels, columns, ignore_index, "kl_")
            for prefix, offsets, its_labels in (("", cu_seqlens, labels), ("kl_", kl_cu_seqlens, kl_labels)):
                if offsets is not None:
                    checks.offset_values(f"{prefix}cu_seqlens", offsets, its_labels.numel())
        if self.context is not None:
            here = reference.per_sequence(labels != ignore_index, cu_seqlens) > 0
            self.agree_on(labels.device, here, parts, given=list(tokens), **layout)
        return shard

    def agree_on(
        self,
        device: torch.device,
        here: Tensor | None = None,
        parts: dict[str, Tensor] | None = None,
        **layout: Any,
    ) -> None:
        """The context group's part of `agree`: `here` (B,) says which sequences have tokens on this rank, `parts` are
        fingerprints of them."""
        if self.context is None:
            return
        same = self._same(layout | {_DEBUG: checks.debugging()})
        header = _header(device, same)
        if here is not None:
            # A header holds few bits: many sequences share them, with neighbours, and are open where one of these is.
            bit = torch.arange(len(here), device=device) * _BITS // max(_BITS, len(here))
            bits = header.new_zeros(_BITS).scatter_reduce_(0, bit, here.long(), "amax")
            header[4] = (bits << torch.arange(_BITS, device=device)).sum()
        with Ranks(process=self.process)._telling(device):
            _, held = _compare("context_group", self.context, header, same)
            _refuse_copies("context_group", self.context, parts or {})
        if here is not None:
            mine = held.pop(dist.get_rank(self.context))
            common = mine & functools.reduce(operator.or_, held)
            self.open_sequences = [bool(common >> k & 1) for k in bit.tolist()]

    def _same(self, layout: dict[str, Any]) -> dict[str, str]:
        return {name: _said(value) for name, value in self.options.items()} | {
            name: str(value) for name, value in layout.items()
        }

    # The reference point ──────────────────────────────────────────────────────────────────────────────────────────────

    def start_kl(self, kl_logps: Tensor | None, ref_kl_logps: Tensor | None, like: Tensor) -> Callable[[], Tensor]:
        """Stage 3 over the ranks of the data-parallel group: one all-reduce of the sum and the count of mismatched
        completions, under way while the caller goes on. What is returned waits for it and gives z0 () fp64.

        Without a group nothing is exchanged. Without `kl_logps` the ranks only compare their options.
        """
        count = 0 if kl_logps is None else kl_logps.numel()
        if kl_logps is None:
            total = torch.zeros((), dtype=torch.float64, device=like.device)
        else:
            total = reference.kl_sum(kl_logps, ref_kl_logps)
        group = self.process
        if group is None:
            return lambda: reference.kl_mean(total, count)
        options = self._same({})
        message = _kl_message(total, count, options)
        work = dist.all_reduce(message, group=group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            _check_kl_message(message, group, options)
            return reference.kl_mean(message[0], message[1])

        return finish


# What they exchange ───────────────────────────────────────────────────────────────────────────────────────────────────


def _said(value: Any) -> str:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(float(value) if number else value)  # 1 is no other option than 1.0


def _digest(same: dict[str, str]) -> int:
    return zlib.crc32(repr(sorted(same.items())).encode()) & _DIGEST


def _header(
    device: torch.device | str, same: dict | None = None, columns: int = 0, labels: Tensor | None = None, failed=False
) -> Tensor:  # (5,)
    header = torch.tensor([failed, _digest(same or {}), columns, 0, 0], dtype=torch.int64, device=device)
    if labels is not None:
        places = torch.arange(1, labels.numel() + 1, device=device)
        header[3] = (labels.flatten() * places).sum()  # a checksum: labels of another batch would pass unseen
    return header


def gather(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's (...) values as (ranks, ...)."""
    out = values.new_empty(dist.get_world_size(group), *values.shape)
    dist.all_gather(list(out.unbind()), values, group=group)
    return out


def _compare(name: str, group: dist.ProcessGroup, header: Tensor, same: dict[str, str]) -> tuple[list[int], list[int]]:
    """Each rank's columns, and bits of its sequences, if all agree."""
    headers = gather(header, group).tolist()
    failed = [rank for rank, (bad, *_) in enumerate(headers) if bad]
    if failed:
        raise RuntimeError(f"{name}: the checks of rank {failed} of the group failed; their own errors say why")
    if len({digest for _, digest, *_ in headers}) > 1:
        raise RuntimeError(_difference(name, group, same))
    if len({checksum for *_, checksum, _ in headers}) > 1:
        raise RuntimeError(f"{name}: expected the same labels on every rank of the group, got different ones")
    return [columns for _, _, columns, *_ in headers], [bits for *_, bits in headers]


def fingerprints(**parts: Tensor | None) -> dict[str, Tensor]:
    """Under KTO_KERNELS_DEBUG=1, which reads all of each part: checksums () of the bits, else nothing. 0 stands for a part
    that is empty, or one number throughout: such parts may be equal."""
    if not checks.debugging():
        return {}
    return {name: _fingerprint(part.detach()) for name, part in parts.items() if part is not None}


def _fingerprint(part: Tensor) -> Tensor:
    if part.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=part.device)
    bits = part.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[part.itemsize])
    rows = bits.sum(-1, dtype=torch.int64).flatten()
    places = torch.arange(1, len(rows) + 1, device=part.device)
    return torch.where(part.amin() == part.amax(), 0, (rows * places).sum())


def _refuse_copies(name: str, group: dist.ProcessGroup, parts: dict[str, Tensor]) -> None:
    """Raises, on every rank, where two of them have one fingerprint. A tensor that was gathered before, and is given with
    a group all the same, would count once for every rank, and the shape of the tensor does not tell."""
    if not parts:
        return
    for argument, prints in zip(parts, gather(torch.stack(list(parts.values())), group).t().tolist()):
        same = [rank for rank, its in enumerate(prints) if its != 0 and prints.count(its) > 1]
        if same:
            raise ValueError(
                f"{argument}: expected another part on each rank of {name}, got the same on ranks {same}; tensors that "
                f"are whole on every rank go without {name}"
            )


def _difference(name: str, group: dist.ProcessGroup, same: dict[str, str]) -> str:
    """Which options differ; every rank of the group asks."""
    everyone: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, same, group=group)
    different = {
        option: [theirs.get(option) for theirs in everyone]
        for option in sorted({option for theirs in everyone for option in theirs})
        if len({theirs.get(option) for theirs in everyone}) > 1
    }
    said = "; ".join(f"{option} is {', '.join(map(str, values))}" for option, values in different.items())
    return (
        f"{name}: the ranks of the group disagree: {said or 'one of them is in another call'} (in the order of ranks)"
    )


def _kl_message(total: Tensor, count: int, options: dict[str, str], failed: bool = False) -> Tensor:
    """(5,) fp64 to be summed over the ranks. Digests d are equal where the sum of d² is as small as that of d allows."""
    digest = _digest(options)
    message = torch.tensor([0, count, digest, digest**2, failed], dtype=torch.float64, device=total.device)
    message[0] = total
    return message


def _check_kl_message(message: Tensor, group: dist.ProcessGroup, options: dict[str, str]) -> None:
    ranks, digest = dist.get_world_size(group), _digest(options)
    if message.device.type != "cpu":  # without waiting for the device, which raises by itself
        right = (message[4] == 0) & (message[2] == ranks * digest) & (message[3] == ranks * digest**2)
        torch._assert_async(right, "process_group: the ranks disagree on options, or the checks of one failed")
        return
    _, _, digests, squares, failed = message.tolist()
    if failed:
        raise RuntimeError("process_group: the checks of another rank failed; its own error says why")
    if (digests, squares) != (ranks * digest, ranks * digest**2):
        raise RuntimeError(_difference("process_group", group, options))


class _SumOverRanks(torch.autograd.Function):
    """Every rank forms the same loss of the sum: its own part's gradient is the sum's."""

    @staticmethod
    def forward(ctx, values, group):
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def sum_over_ranks(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The all-reduced sum, through which each rank's gradient reaches its own values; without a group, the values."""
    return values if group is None else _SumOverRanks.apply(values, group)


def sums_over_ranks(
    total: Tensor, count: Tensor | None, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor | None]:
    """Stage 2 over the ranks of a context group: (B,) sums, and the numbers of scored tokens where they are wanted, by
    one all-reduce of fp64."""
    if group is None:
        return total, count
    summed = sum_over_ranks(torch.stack([total] if count is None else [total, count.to(total.dtype)]), group)
    return summed[0], None if count is None else summed[1]
