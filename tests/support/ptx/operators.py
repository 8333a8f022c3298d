"""Problems for the operators of a backend: log-probabilities of tokens and their gradient, chunks, shards, a factor."""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from kto_kernels.backends.base import Backend
from kto_kernels.options import OUTPUTS, Scale
from kto_kernels.parallel import vocabulary
from kto_kernels.parallel.groups import VocabShard
from kto_kernels.records import ELSEWHERE, ChunkScores, Rows, local_labels

from . import exact
from .draws import Draw
from .exact import INF, assert_close, assert_gradient

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int64, torch.int32)


@dataclass(frozen=True)
class Tokens:
    """`token_logps`, then `logits_backward` into the logits or another buffer of any alignment."""

    dtype: torch.dtype
    packed: bool = False
    shift: bool = False
    softcap: bool = False
    index_dtype: torch.dtype = torch.int64

    @classmethod
    def drawn(cls, draw: Draw) -> Tokens:
        flags = (draw.random() < 0.5 for _ in range(3))
        return cls(draw.choice(DTYPES), *flags, draw.choice(INDEX_DTYPES))

    def run(self, draw: Draw, backend: Backend) -> None:
        vocab = draw.vocab()
        rows = draw.rows(self, draw.choice([1, 2, 3]), draw.choice([1, 2, 5]), vocab)
        logits, labels, scale = rows.logits, rows.labels, draw.scale(self.softcap)
        if labels.numel() == 0:
            return
        if draw.random() < 0.3:
            draw.make_special(logits, labels)
        elif labels.dtype == torch.int64 and draw.random() < 0.3:
            labels[torch.rand(labels.shape, generator=draw.torch) < 0.4] = ELSEWHERE
        target = exact.targets(rows)
        logp, _, _ = exact.token_logps(logits, target, scale)
        found, statistics = backend.token_logps(rows, scale)
        assert_close("token_logps", found, logp, exact.LOGP, exact.logp_error(scale))
        upstream = draw.upstream(labels.shape)
        gradient = exact.logits_gradient(logits, target, upstream, scale)
        out = logits if draw.random() < 0.5 else draw.logits(tuple(labels.shape), vocab, self.dtype)
        backend.logits_backward(rows, scale, upstream, None, found, statistics, out)
        assert_gradient(out, gradient, upstream.abs().max().item(), scale)


@dataclass(frozen=True)
class Far:
    """Rows more than 2^31 elements apart, in a buffer of which nothing but the rows is touched."""

    dtype: torch.dtype

    def run(self, draw: Draw, backend: Backend) -> None:
        vocab, far, scale = draw.vocab(), 2**31 + draw.randint(0, 9), Scale()
        storage = torch.empty(far + vocab, dtype=self.dtype)
        shape, strides = draw.choice([((2, 1, vocab), (far, vocab, 1)), ((1, 2, vocab), (2 * far, far, 1))])
        logits = storage.as_strided(shape, strides)
        logits.copy_(torch.randn(shape, generator=draw.torch))
        target = torch.randint(vocab, shape[:2], generator=draw.torch)
        rows = Rows(logits, target, None, False, -100)
        found, statistics = backend.token_logps(rows, scale)
        logp, _, _ = exact.token_logps(logits, target, scale)
        assert_close("token_logps", found, logp, exact.LOGP, exact.logp_error(scale))
        upstream, out = draw.upstream(target.shape), torch.empty(shape, dtype=self.dtype)
        backend.logits_backward(rows, scale, upstream, None, found, statistics, out)
        largest = upstream.abs().max().item()
        assert_gradient(out, exact.logits_gradient(logits, target, upstream, scale), largest, scale)


def check_chunk(scores: ChunkScores, before: Tensor, labels: Tensor, scale: Scale, outputs: tuple[str, ...]) -> None:
    logp, p, _ = exact.token_logps(before, labels, scale)
    z, _ = exact.scaled(before, scale)
    absolute = exact.logp_error(scale)
    assert_close("logps", scores.logps, logp, exact.LOGP, absolute)
    if "entropy" in outputs:
        entropy = -torch.where(p == 0, 0.0, p * torch.log(p)).sum(-1)
        entropy = torch.where(p.isnan().any(-1), torch.nan, entropy)
        assert_close("entropy", scores.entropy, entropy, 1e-5, 3e-6 + absolute)
    if "mean_logits" in outputs:
        finite = z[z.isfinite()]
        largest = finite.abs().max().item() if finite.numel() else 0.0
        assert_close("mean_logits", scores.mean_logits, z.mean(-1), 1e-5, 2e-6 * largest)
    if "is_top1" in outputs:
        known = ~(before.isnan() | (before == INF)).any(-1)
        first = exact.is_first_argmax(before.double(), labels)
        assert torch.equal(scores.is_top1[known], first[known]), "is_top1"


@dataclass(frozen=True)
class Chunk:
    """`score_chunk`, which with `gradient` overwrites the logits by it."""

    dtype: torch.dtype
    gradient: bool = True
    outputs: tuple[str, ...] = ()
    softcap: bool = False

    @classmethod
    def drawn(cls, draw: Draw) -> Chunk:
        outputs = tuple(name for name in OUTPUTS if draw.random() < 0.6)
        return cls(draw.choice(DTYPES), draw.random() < 0.7, outputs, draw.random() < 0.4)

    def run(self, draw: Draw, backend: Backend) -> None:
        vocab, n, scale = draw.vocab(), draw.choice([1, 2, 4]), draw.scale(self.softcap)
        logits = draw.logits((n,), vocab, self.dtype)
        labels = draw.labels((n,), vocab, 0, torch.int64)
        if draw.random() < 0.3:
            draw.make_special(logits, labels)
        before = logits.clone()
        scores = backend.score_chunk(logits, labels, scale, self.gradient, self.outputs)
        check_chunk(scores, before, labels, scale, self.outputs)
        if self.gradient:
            assert_gradient(logits, exact.logits_gradient(before, labels, torch.ones(n), scale), 1.0, scale)
        else:
            assert torch.equal(logits.nan_to_num(7, 8, 9), before.nan_to_num(7, 8, 9)), "the logits changed"


class _Sent(Exception):
    pass


@dataclass(frozen=True)
class Shards:
    """A chunk whose columns several ranks have: each rank's kernels, on what all of them send to each other."""

    dtype: torch.dtype
    outputs: tuple[str, ...] = ()
    softcap: bool = False

    @classmethod
    def drawn(cls, draw: Draw) -> Shards:
        return cls(draw.choice(DTYPES), draw.choice([(), OUTPUTS]), draw.random() < 0.4)

    def run(self, draw: Draw, backend: Backend) -> None:
        vocab, n, scale = draw.vocab() + 2, draw.choice([1, 3]), draw.scale(self.softcap)
        cuts = sorted(draw.sample(range(1, vocab), 1 + (vocab > 3)))
        ends = list(zip([0, *cuts], [*cuts, vocab]))
        logits = draw.logits((n,), vocab, self.dtype)
        labels = draw.labels((n,), vocab, 0, torch.int64)
        largest, messages = max(end - begin for begin, end in ends), []

        def score(begin: int, end: int) -> tuple[ChunkScores, Tensor]:
            part, shard = logits[:, begin:end].clone(), VocabShard("", begin, vocab, largest)
            local = local_labels(labels, begin, end - begin)
            return vocabulary.score_chunk(shard, backend, part, local, scale, True, self.outputs), part

        def send(message: Tensor, group: object) -> Tensor:
            messages.append(message)
            raise _Sent

        with mock.patch.object(VocabShard, "group", None), mock.patch.object(vocabulary, "gather", send):
            for begin, end in ends:
                try:
                    score(begin, end)
                except _Sent:
                    continue
        everything = torch.stack(messages)
        answer = mock.patch.object(vocabulary, "gather", lambda message, group: everything)
        with mock.patch.object(VocabShard, "group", None), answer:
            results = [score(begin, end) for begin, end in ends]
        for scores, _ in results:
            check_chunk(scores, logits, labels, scale, self.outputs)
        gradient = torch.cat([part for _, part in results], -1)
        assert_gradient(gradient, exact.logits_gradient(logits, labels, torch.ones(n), scale), 1.0, scale)


@dataclass(frozen=True)
class Factor:
    """`scale_` of a part of a tensor."""

    dtype: torch.dtype
    factor_dtype: torch.dtype = torch.float32

    @classmethod
    def drawn(cls, draw: Draw) -> Factor:
        return cls(draw.choice(DTYPES), draw.choice([torch.float32, torch.float64]))

    def run(self, draw: Draw, backend: Backend) -> None:
        n, offset = draw.choice([draw.randint(1, 70), draw.randint(71, 30000)]), draw.randint(0, 9)
        x = torch.randn(n + offset + 3, generator=draw.torch).to(self.dtype)
        factor = torch.tensor(draw.choice([1.0, 0.0, -1.7, 3e-5, INF, 1 + 1e-9]), dtype=self.factor_dtype)
        expected, part = x.clone(), slice(offset, offset + n)
        if factor.float() != 1:
            expected[part] = (x[part].float() * factor.float()).to(self.dtype)
        backend.scale_(x[part], factor)
        assert torch.equal(x.nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9)), "scale_"
