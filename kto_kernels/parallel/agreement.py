"""Losses over more than one device, on torch.distributed. One call may have three groups of ranks:

    process_group   data parallel: each rank has sequences of its own; z0 is the mean over all of them
    vocab_group     vocabulary (tensor) parallel: each rank has some columns of the logits, and all have the same rows
    context_group   context parallel: each rank has some tokens of every sequence

Every rank of a group calls with the same options. A rank whose checks fail tells the others before it raises, so that
they raise too instead of waiting for this rank.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks, reference
from ..options import Group
from ..records import Completions
from .groups import VocabShard, devices, gather, resolve

_BITS = 62  # bits of a number in the header that say of which sequences a rank has tokens
_DEBUG = "KTO_KERNELS_DEBUG=1"  # compared like an option: all ranks make the exchanges of this setting, or none does
_DIGEST = (1 << 20) - 1  # squares of digests, summed over thousands of ranks, are exact in fp64


@dataclass(frozen=True)
class Agreed:
    """The results of comparing a call over its ranks."""

    shard: VocabShard | None = None  # this rank's columns, in a vocabulary group
    # (B,) in a context group: which sequences have tokens on this rank and on other ranks.
    open_sequences: list[bool] | None = None


@dataclass(frozen=True)
class Ranks:
    """The groups of one call, each None where there is nothing to exchange, and the options that their ranks share."""

    vocab: dist.ProcessGroup | None = None
    context: dist.ProcessGroup | None = None
    process: dist.ProcessGroup | None = None
    options: dict[str, Any] = field(default_factory=dict)  # the call's options, which all ranks must share

    @classmethod
    def of(
        cls,
        process_group: Group | None = None,
        vocab_group: Group | None = None,
        context_group: Group | None = None,
    ) -> Ranks:
        if process_group is None and vocab_group is None and context_group is None:
            return ALONE
        return cls(
            resolve("vocab_group", vocab_group),
            resolve("context_group", context_group),
            resolve("process_group", process_group),
        )

    def __bool__(self) -> bool:
        return self.vocab is not None or self.context is not None or self.process is not None

    def _named(self) -> dict[str, dist.ProcessGroup | None]:
        return {"vocab_group": self.vocab, "context_group": self.context, "process_group": self.process}

    # Agreement: no rank waits for one that failed ─────────────────────────────────────────────────────────────────────

    def failing_together(self, like: object) -> contextlib.AbstractContextManager[None]:
        """A context for the checks of a call: where they raise on this rank, the other ranks raise too. `like` is an
        argument, whose device is the call's if it is a tensor."""
        return self._checked(like) if self else _ALONE

    @contextlib.contextmanager
    def _checked(self, like: object) -> Iterator[None]:
        device = like.device if isinstance(like, Tensor) else None
        with self._telling(device):
            for name, group in self._named().items():
                if group is not None and device is not None and device.type not in devices(group):
                    raise ValueError(
                        f"{name}: its backends {devices(group)} have none for tensors on {device}; "
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
        """Takes part, as failed, in the first exchange of each group, where the other ranks are or will be."""
        for name, group in self._named().items():
            if group is None:
                continue
            kinds = devices(group)
            kind = device.type if device is not None and device.type in kinds else next(iter(kinds))
            # If this exchange fails too (no such device, a peer is gone), the first failure is the one to raise.
            with contextlib.suppress(Exception):
                if name == "process_group":
                    dist.all_reduce(_kl_message(torch.zeros((), device=kind), 0, {}, failed=True), group=group)
                else:
                    gather(_header(kind, failed=True), group)

    def sharing(self, options: dict[str, Any]) -> Ranks:
        """These ranks with the options of the call."""
        return replace(self, options=options) if self else self

    def agree(
        self,
        completions: list[Completions],
        columns: int,
        ignore_index: int,
        steps: dict[str, Any],
        *,
        shards: dict[str, Tensor | None],
        tokens: dict[str, Tensor | None],
        **layout: Any,
    ) -> Agreed:
        """Compares options and layout within the vocabulary group and the context group. Checks the whole vocabulary's
        size against the option `vocab`, labels and offsets. In a call with such a group this waits for the device.

        Args:
            completions: the judged completions, and the mismatched ones if any.
            columns: the number of columns of the vocabulary on this rank.
            ignore_index: the label of positions that are not scored.
            steps: further values that a vocabulary group must share, so that its ranks take the same steps.
            shards: by name, the arguments of which each rank of the vocabulary group has its own columns.
            tokens: by name, the arguments of which each rank of the context group has its own tokens.
            **layout: dtypes and shapes that must be equal on all ranks, by name.

        Raises:
            ValueError: a label is outside the vocabulary, or offsets do not rise from 0 to N (noticed on the CPU only).
                Every rank raises it where the size of the vocabulary is not `vocab`, or, under KTO_KERNELS_DEBUG=1,
                where two ranks hold the same part.
            RuntimeError: every rank raises it where the checks of another rank failed, or where ranks differ in
                options, layout, or (in a vocabulary group) labels.
        """
        if not self:
            return Agreed()
        device = completions[0].labels.device
        shapes = [tuple(each.labels.shape) for each in completions]
        shard, debug = None, {_DEBUG: checks.debugging()}
        tokens = {name: part for name, part in tokens.items() if part is not None}
        parts = {} if self.context is None else fingerprints(**tokens)
        if self.vocab is not None:
            same = self._same(layout | {"shapes of labels and kl_labels": shapes} | steps | debug)
            header = _header(device, same, columns, torch.cat([each.labels.flatten() for each in completions]))
            with Ranks(context=self.context, process=self.process)._telling(device):
                sizes, _ = _compare("vocab_group", self.vocab, header, same)
                if sum(sizes) == 0:
                    raise ValueError("vocab_group: expected a column of the vocabulary on one rank at least, got none")
                if self.options.get("vocab") not in (None, sum(sizes)):
                    raise ValueError(
                        f"vocab: expected {sum(sizes)}, the sum of the columns {sizes} of vocab_group's ranks, got "
                        f"{self.options['vocab']}; logits or heads that are whole on every rank go without vocab_group"
                    )
                _refuse_copies("vocab_group", self.vocab, fingerprints(**shards))
            # The ranks of this group, one of which may have no column, must reach one verdict on the context group.
            parts = {name: gather(part, self.vocab).sum(0) for name, part in parts.items()}
            mine = dist.get_rank(self.vocab)
            shard = VocabShard(self.vocab.group_name, sum(sizes[:mine]), sum(sizes), max(sizes))
            columns = shard.vocab
        with Ranks(context=self.context, process=self.process)._telling(device):
            for each in completions:
                checks.row_values(each.labels, each.cu_seqlens, columns, ignore_index, each.prefix)
        if self.context is None:
            return Agreed(shard)
        first = completions[0]
        here = reference.per_sequence(first.labels != ignore_index, first.cu_seqlens) > 0
        return Agreed(shard, self.agree_on(device, here, parts, given=list(tokens), **layout))

    def agree_on(
        self,
        device: torch.device,
        here: Tensor | None = None,
        parts: dict[str, Tensor] | None = None,
        **layout: Any,
    ) -> list[bool] | None:
        """The context group's part of `agree`. `here` (B,) says which sequences have tokens on this rank; the result
        says which of them have tokens on other ranks too. `parts` holds fingerprints of this rank's tokens."""
        if self.context is None:
            return None
        same = self._same(layout | {_DEBUG: checks.debugging()})
        header = _header(device, same)
        if here is not None:
            # The header has 62 bits. With more sequences, neighbours share a bit, and are all open if one of them is.
            bit = torch.arange(len(here), device=device) * _BITS // max(_BITS, len(here))
            bits = header.new_zeros(_BITS).scatter_reduce_(0, bit, here.long(), "amax")
            header[4] = (bits << torch.arange(_BITS, device=device)).sum()
        with Ranks(process=self.process)._telling(device):
            _, held = _compare("context_group", self.context, header, same)
            _refuse_copies("context_group", self.context, parts or {})
        if here is None:
            return None
        mine = held.pop(dist.get_rank(self.context))
        common = mine & functools.reduce(operator.or_, held)
        return [bool(common >> k & 1) for k in bit.tolist()]

    def _same(self, layout: dict[str, Any]) -> dict[str, str]:
        return {name: _said(value) for name, value in self.options.items()} | {
            name: str(value) for name, value in layout.items()
        }

    # The reference point ──────────────────────────────────────────────────────────────────────────────────────────────

    def start_reference_point(
        self, kl_logps: Tensor | None, ref_kl_logps: Tensor | None, like: Tensor
    ) -> Callable[[], Tensor]:
        """Starts stage 3 over the ranks of the data-parallel group: one all-reduce of the sum and the count of
        mismatched completions, which runs while the caller goes on. Returns a function that waits for the sum and
        gives z0 () fp64.

        Without a group nothing is exchanged. Without `kl_logps` the ranks only compare their options.
        """
        count = 0 if kl_logps is None else kl_logps.numel()
        if kl_logps is None:
            total = like.new_zeros((), dtype=torch.float64)
        else:
            total = reference.kl_sum(kl_logps, ref_kl_logps)
        group = self.process
        if group is None:
            return lambda: total if kl_logps is None else reference.kl_mean(total, count)
        options = self._same({})
        message = _kl_message(total, count, options)
        work = dist.all_reduce(message, group=group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            _check_kl_message(message, group, options)
            return reference.kl_mean(message[0], message[1])

        return finish


ALONE = Ranks()  # the ranks of every call without groups
_ALONE = contextlib.nullcontext()


# Messages between ranks ───────────────────────────────────────────────────────────────────────────────────────────────


def _said(value: Any) -> str:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(float(value) if number else value)  # so that 1 and 1.0 are the same option


def _digest(same: dict[str, str]) -> int:
    return zlib.crc32(repr(sorted(same.items())).encode()) & _DIGEST


def _header(
    device: torch.device | str, same: dict | None = None, columns: int = 0, labels: Tensor | None = None, failed=False
) -> Tensor:  # (5,)
    header = torch.tensor([failed, _digest(same or {}), columns, 0, 0], dtype=torch.int64, device=device)
    if labels is not None:
        places = torch.arange(1, labels.numel() + 1, device=device)
        header[3] = (labels.flatten() * places).sum()  # a checksum, which tells apart labels of different batches
    return header


def _compare(name: str, group: dist.ProcessGroup, header: Tensor, same: dict[str, str]) -> tuple[list[int], list[int]]:
    """Each rank's number of columns, and the bits of the sequences of which it has tokens.

    Raises:
        RuntimeError: a rank's checks failed, or options, layout or labels differ.
    """
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
    """Checksums () of the bits of each part, by name. They read whole tensors, and are made under KTO_KERNELS_DEBUG=1
    only. A part that is empty or one number throughout has fingerprint 0, because such parts may be equal."""
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
    """Raises a ValueError on every rank where two ranks have equal fingerprints. A tensor that is whole on every rank,
    and is given with a group, would count once for every rank, and the tensor's shape does not tell."""
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
    """The message that says which options differ. A collective: every rank of the group calls it."""
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
    """A message (5,) in fp64, to be summed over the ranks: sum, count, digest d, d², and whether this rank failed. All
    of n ranks have the digest d where the sum of d is n·d and the sum of d² is n·d²."""
    digest = _digest(options)
    message = torch.tensor([0, count, digest, digest**2, failed], dtype=torch.float64, device=total.device)
    message[0] = total
    return message


def _check_kl_message(message: Tensor, group: dist.ProcessGroup, options: dict[str, str]) -> None:
    ranks, digest = dist.get_world_size(group), _digest(options)
    if message.device.type != "cpu":  # an assertion on the device, for which the host does not wait
        right = (message[4] == 0) & (message[2] == ranks * digest) & (message[3] == ranks * digest**2)
        torch._assert_async(right, "process_group: the ranks disagree on options, or the checks of one failed")
        return
    _, _, digests, squares, failed = message.tolist()
    if failed:
        raise RuntimeError("process_group: the checks of another rank failed; its own error says why")
    if (digests, squares) != (ranks * digest, ranks * digest**2):
        raise RuntimeError(_difference("process_group", group, options))
