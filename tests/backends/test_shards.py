"""A row whose columns several ranks have, put together without any rank: the kernels' labels that are elsewhere, and the
statistics that come back to their backward. Over processes: `parallel/test_vocabulary.py`."""

import itertools

import pytest
import torch

from kto_kernels import reference
from kto_kernels.backends import BACKENDS
from kto_kernels.options import OUTPUTS, Scale
from kto_kernels.parallel import vocabulary as shards
from kto_kernels.parallel.groups import VocabShard
from kto_kernels.records import ELSEWHERE, Rows, local_labels
from tests.support.harness import assert_as_accurate, dtypes, kernel_places, lengthy_places, places

# Columns of each rank: uneven, none (first, in between, last), one, more than any kernel takes at once.
SPLITS = [(150, 150), (1, 0, 298, 1), (0, 300), (77, 130, 93, 0)]
SCALES = [Scale(), Scale(softcap=5.0), Scale(0.5, 4.0, 0.6), Scale(temperature=1.7)]


class _Sent(Exception):
    pass


class Exchange:
    """Calls `run(shard, begin, end)` for each rank twice: to learn what it sends, and to answer it with all of it."""

    def __init__(self, monkeypatch, sizes):
        self.sizes, self.messages, self.answer = sizes, [], None
        monkeypatch.setattr(shards, "gather", self.gather)
        monkeypatch.setattr(VocabShard, "group", None)

    def gather(self, message, group):
        if self.answer is not None:
            return self.answer
        self.messages.append(message)
        raise _Sent

    def __call__(self, run):
        ends = list(itertools.accumulate(self.sizes))
        parts = [
            (VocabShard("", end - size, ends[-1], max(self.sizes)), end - size, end)
            for size, end in zip(self.sizes, ends)
        ]
        for part in parts:
            with pytest.raises(_Sent):
                run(*part)
        self.answer = torch.stack(self.messages)
        return [run(*part) for part in parts]


def problem(vocab, dtype, device):
    """Labels likely, certain to 1e-5 (where fp32 has few digits of p), tied, impossible; a maximum far from the label's
    columns; masked columns."""
    logits = 3 * torch.randn(9, vocab)
    labels = torch.randint(vocab, (9,))
    labels[0] = logits[0].argmax()
    logits[1, labels[1]] = 24.0
    logits[2, labels[2]] = -60.0
    logits[3] = 1.0
    labels[3] = vocab // 3
    logits[4, : vocab // 2] = -torch.inf
    labels[4] = vocab - 1
    logits[5, labels[5] - 1] = 14.0
    logits[6, vocab // 2 :] = -torch.inf
    labels[6] = vocab - 1  # itself masked
    logits[7] -= 90.0
    return logits.to(device, dtype), labels.to(device)


def sharded_chunk(monkeypatch, place, logits, labels, scale, sizes, outputs=OUTPUTS):
    backend = BACKENDS[place[0]]

    def run(shard, begin, end):
        part = logits[:, begin:end].clone()
        local = local_labels(labels, begin, end - begin)
        return shards.score_chunk(shard, backend, part, local, scale, True, outputs), part

    results = Exchange(monkeypatch, sizes)(run)
    first, _ = results[0]
    for scores, _ in results[1:]:
        for name in ("logps", *outputs):
            mine, theirs = getattr(scores, name), getattr(first, name)
            assert torch.equal(mine, theirs) or (mine.isnan() == theirs.isnan()).all(), name
    return first, torch.cat([part for _, part in results], -1)


@lengthy_places
@dtypes
@pytest.mark.parametrize(("scale", "sizes"), list(zip(SCALES, SPLITS)), ids=str)
def test_a_chunk_in_parts_equals_the_whole(monkeypatch, place, dtype, scale, sizes):
    logits, labels = problem(300, dtype, place[1])
    scores, gradient = sharded_chunk(monkeypatch, place, logits, labels, scale, sizes)

    def definition(x):
        ones = torch.ones(labels.shape, device=x.device, dtype=reference.compute_dtype(x.dtype))
        return (
            reference.token_logps(x, labels, **vars(scale)),
            reference.outputs(x, labels, OUTPUTS, **vars(scale)),
            reference.token_logps_grad(x, labels, ones, **vars(scale)),
        )

    logps, extra, grad = definition(logits)
    exact_logps, exact_extra, exact_grad = definition(logits.double())
    fp32 = torch.finfo(torch.float32).eps
    masked = torch.arange(9, device=labels.device) == 6
    assert (exact_logps[masked] == -torch.inf).all() == (scale.softcap is None)
    finite = torch.isfinite(exact_logps)
    assert torch.equal(scores.logps == -torch.inf, ~finite)
    assert_as_accurate("logps", scores.logps[finite], logps[finite], exact_logps[finite], fp32)
    assert_as_accurate("entropy", scores.entropy, extra["entropy"], exact_extra["entropy"], 4 * fp32, 8.0)
    means = torch.isfinite(exact_extra["mean_logits"])
    assert torch.equal(scores.mean_logits.isneginf(), ~means)
    mean, exact_mean = extra["mean_logits"][means], exact_extra["mean_logits"][means]
    assert_as_accurate("mean", scores.mean_logits[means], mean, exact_mean, fp32)
    assert torch.equal(scores.is_top1, exact_extra["is_top1"])
    assert_as_accurate("gradient", gradient, grad, exact_grad, torch.finfo(dtype).eps)


@kernel_places
def test_near_certain_tokens_stay_exact(monkeypatch, place, sizes=(77, 130, 93, 0)):
    """1 − p from 1e-4 to 1e-30, on whichever rank the label is: relative to itself, log p and its gradient are right to
    some units in the last place. `lse − z` would have no digit left."""
    vocab = sum(sizes)
    logits = torch.randn(12, vocab)
    labels = torch.arange(12) * (vocab - 1) // 11
    logits[torch.arange(12), labels] = torch.linspace(15, 75, 12)
    logits, labels = logits.to(place[1]), labels.to(place[1])
    scores, gradient = sharded_chunk(monkeypatch, place, logits, labels, Scale(), sizes, ())
    beside = logits.double().scatter(1, labels.unsqueeze(1), -torch.inf).logsumexp(1)
    exact = -torch.log1p((beside - logits.double().gather(1, labels.unsqueeze(1)).squeeze(1)).exp())
    torch.testing.assert_close(scores.logps.double(), exact, rtol=1e-6, atol=0)
    of_label = gradient.gather(1, labels.unsqueeze(1)).squeeze(1).double()
    torch.testing.assert_close(of_label, -torch.expm1(exact), rtol=1e-6, atol=0)


@places
def test_a_nan_stays_in_its_row_on_every_rank(monkeypatch, place):
    logits, labels = problem(300, torch.float32, place[1])
    logits[2, 5] = torch.nan
    labels[2] = 200
    scores, gradient = sharded_chunk(monkeypatch, place, logits, labels, Scale(), (150, 150))
    assert scores.logps[2].isnan() and scores.entropy[2].isnan() and scores.mean_logits[2].isnan()
    assert not scores.is_top1[2]
    assert gradient[2].isnan().all()
    others = torch.arange(9) != 2
    assert not scores.logps[others].isnan().any() and torch.isfinite(gradient[others]).all()


@places
def test_a_row_of_minus_infinities(monkeypatch, place):
    logits = torch.full((2, 70), -torch.inf, device=place[1])
    logits[1] = 0.0
    labels = torch.tensor([3, 3], device=place[1])
    scores, gradient = sharded_chunk(monkeypatch, place, logits, labels, Scale(), (1, 39, 30))
    assert scores.logps[0] == -torch.inf and scores.entropy[0] == 0 and not scores.is_top1[0]
    assert torch.isfinite(gradient).all() and torch.isfinite(scores.logps[1])


@places
def test_the_first_of_tied_maxima_is_the_argmax_across_parts(monkeypatch, place):
    """As one rank would say: the label in the later shard is not the first argmax, the one in the earlier is."""
    logits = torch.zeros(3, 40, device=place[1])
    logits[:, [10, 30]] = 2.0
    labels = torch.tensor([10, 30, 11], device=place[1])
    scores, _ = sharded_chunk(monkeypatch, place, logits, labels, Scale(), (5, 20, 15))
    assert scores.is_top1.tolist() == [True, False, False]


# Layouts of the logits operator, with ignored rows among the others.
@places
@pytest.mark.parametrize(
    ("layout", "shift", "dtype"),
    [("padded", False, torch.float32), ("packed", True, torch.bfloat16), ("expanded", True, torch.float32)],
)
def test_rows_in_parts_equal_whole_rows(monkeypatch, place, dtype, layout, shift):
    vocab, sizes, backend = 70, (30, 0, 1, 39), BACKENDS[place[0]]
    # Labels minus the offset of the third shard, 30, may look like ignore_index: they are no such thing.
    ignore_index = -20
    logits = 3 * torch.randn(3, 5, vocab).to(place[1], dtype)
    labels = torch.randint(vocab, (3, 5)).to(place[1])
    labels[0, 1], labels[0, 2], labels[1, 0], labels[2, 3] = 10, 45, ignore_index, ignore_index
    cu_seqlens = None
    if layout == "packed":
        logits, labels = logits.flatten(0, 1), labels.flatten()
        cu_seqlens = torch.tensor([0, 4, 4, 15], device=place[1], dtype=torch.int32)
    elif layout == "expanded":
        logits = logits[:, :1].expand(3, 5, vocab)
    upstream = torch.linspace(-1, 2, labels.numel(), device=place[1]).view(labels.shape)

    def run(shard, begin, end):
        part = logits[..., begin:end]
        rows = Rows(part, labels, cu_seqlens, shift, ignore_index).of_shard(begin, vocab)
        logps, statistics = shards.token_logps(shard, backend, rows, Scale())
        out = torch.full(part.shape, torch.nan, dtype=dtype, device=place[1])
        if out.numel():
            backend.logits_backward(rows, Scale(), upstream, None, logps, statistics, out)
        return logps, out

    results = Exchange(monkeypatch, sizes)(run)
    target = reference.targets(labels, shift, ignore_index, cu_seqlens)
    assert all(torch.equal(logps, results[0][0]) for logps, _ in results)
    assert (results[0][0][target == ignore_index] == 0).all()
    exact = reference.token_logps(logits.double(), target, ignore_index)
    plain = reference.token_logps(logits, target, ignore_index)
    assert_as_accurate("logps", results[0][0], plain, exact, torch.finfo(torch.float32).eps)
    gradient = torch.cat([out for _, out in results], -1)
    exact = reference.token_logps_grad(logits.double(), target, upstream.double(), ignore_index)
    plain = reference.token_logps_grad(logits, target, upstream, ignore_index)
    assert_as_accurate("gradient", gradient, plain, exact, torch.finfo(dtype).eps)


@kernel_places
def test_rows_split_over_programs(monkeypatch, place):
    """Where a row has few rows beside it, several programs score it: an absent label belongs to none of them."""
    name, device = place
    if name not in ("triton", "cuda"):
        pytest.skip("one thread a row")
    from kto_kernels.backends import cuda, gpu
    from kto_kernels.backends.triton import launch as triton

    module = {"triton": triton, "cuda": cuda}[name]
    monkeypatch.setattr(module, "row_splits", lambda *_: 3)
    monkeypatch.setattr(gpu, "processors", lambda _: 64)
    logits = torch.randn(2, 9001).to(device)
    labels = torch.tensor([ELSEWHERE, 8000], device=device)
    rows = Rows(logits, labels, None, shift=False, ignore_index=-1, shard=True)
    logps, (maximum, total) = BACKENDS[name].token_logps(rows, Scale())
    assert logps[0] == -torch.inf
    exact = logits.double().exp().sum(-1)
    torch.testing.assert_close(total.double() * maximum.double().exp(), exact, rtol=1e-5, atol=0)
    out = torch.full_like(logits, torch.nan)
    statistics = torch.stack([maximum, total])
    BACKENDS[name].logits_backward(rows, Scale(), torch.ones(2, device=device), None, logps, statistics, out)
    expected = -logits.double().softmax(-1)
    expected[1, 8000] += 1
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-9)
