"""Context parallel: each rank has some tokens of every sequence. It gets the whole loss, and the gradient of its own
tokens: those of hidden states side by side, those of the head added up, are the whole ones."""

import contextlib
import random
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import problem
from linear_harness import VOCAB, WIDTH, gemm_flops, linear_problem
from rank_pool import distributed, group, pool
from shard_harness import LEAVES, arguments, assert_near, assert_same_sequences, run, some_tokens
from torch.utils.flop_counter import FlopCounterMode

from kto_kernels import LinearPlan
from kto_kernels.linear import HeadGradient

pytestmark = distributed

FP32 = 4 * VOCAB  # bytes of a row of logits
OUTPUTS = ("entropy", "mean_logits", "is_top1")


# Which tokens a rank has ──────────────────────────────────────────────────────────────────────────────────────────────


def contiguous(*edges):
    """Tokens between two fractions of the whole; of two ranks each has what two of the four have."""

    def of(rank, ranks):
        begin, end = edges[:: 4 // ranks][rank : rank + 2]

        def mine(length):
            places = torch.arange(length)
            return (places >= round(begin * length)) & (places < round(end * length))

        return mine

    return of


def zigzag(rank, ranks):
    """Pieces from both ends, so that causal attention is as much work on every rank: rank 0 of two has 0 and 3."""

    def mine(length):
        piece = torch.arange(length) * 2 * ranks // max(1, length)
        return (piece == rank) | (piece == 2 * ranks - 1 - rank)

    return mine


def scattered(rank, ranks):
    """Every token anywhere: sums do not know an order."""

    def mine(length):
        return torch.randint(ranks, (length,), generator=torch.Generator().manual_seed(length)) == rank

    return mine


CUTS = {
    "equal": contiguous(0, 0.25, 0.5, 0.75, 1),
    "uneven": contiguous(0, 0.13, 0.71, 0.8, 1),
    "two ranks without a token": contiguous(0, 0, 0.4, 1, 1),
    "one rank with all": contiguous(0, 0, 0, 1, 1),
    "zigzag": zigzag,
    "scattered": scattered,
}


# Sharded equals unsharded ─────────────────────────────────────────────────────────────────────────────────────────────


def compare(given, cut, context, trained=LEAVES, ulps=64, **options):
    """One call on this rank's part, against the call on everything."""
    whole, whole_grads = run(given, trained, **options)
    ranks = dist.get_world_size(context)
    mine = cut(dist.get_rank(context), ranks)
    out, grads = run(some_tokens(given, mine), trained, context_group=context, **options)
    assert_same_sequences(out, whole)
    assert_near("loss", out.loss, whole.loss)
    packed = "cu_seqlens" in given

    def part(values):
        rows = mine(values.shape[0 if packed else 1])
        return values[rows] if packed else values[:, rows]

    assert_near("token_logps", out.token_logps, part(whole.token_logps))
    for name, grad in grads.items():
        if name in ("logits", "hidden"):
            assert_near(f"gradient of {name}", grad, part(whole_grads[name]), ulps)
        else:
            total = grad.clone()
            dist.all_reduce(total, group=context)
            assert_near(f"sum of the gradients of {name}", total, whole_grads[name], ulps)
    assert out.metrics(context_group=context) == pytest.approx(whole.metrics(), rel=1e-5, abs=1e-6)
    return out, grads


SIDES = [("hidden", "hidden"), ("hidden", "logps"), ("logps", "hidden"), ("logps", "number"), (None, "hidden")]
TRAINED = [LEAVES, LEAVES, LEAVES, ("hidden", "weight"), ("weight",), ("bias",), ("hidden", "bias"), ("hidden",)]


def random_problem(seed):
    """(call, what is trained, cut)"""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    options = {"packed": draw.random() < 0.6, "reduction": draw.choice(["mean", "mean", "sum", "none"])}
    options["average_log_prob"] = draw.random() < 0.3
    if draw.random() < 0.25:
        logits = {"batch": draw.randint(1, 6), "tokens": draw.randint(1, 30), "kl_tokens": draw.randint(1, 12)}
        ref = draw.choice(["logits", "logps", None])
        kl = draw.choice(["logits", "logps", "number"]) if ref != "logps" else draw.choice(["logps", "number"])
        call = arguments(problem(**logits, ref=ref, kl=kl, ref_kl=kl if ref and kl != "number" else None, **options))
    else:
        lengths = tuple(draw.choice([0, 1, 4, 15, 40]) for _ in range(draw.randint(1, 6)))
        ref, kl = draw.choice(SIDES)
        call = arguments(
            linear_problem(
                lengths,
                ref=ref,
                kl=kl,
                prompt=draw.choice([0, 1, 9]),
                max_logits_bytes=draw.choice([1, 3, 10, 25, 1000]) * FP32,
                long_sequences=draw.choice(["auto", "defer", "recompute"]),
                outputs=draw.choice([(), OUTPUTS, ("entropy",)]),
                softcap=draw.choice([None, 5.0]),
                **options,
            )
        )
    return call, draw.choice(TRAINED), draw.choice(list(CUTS))


def random_problems(rank, seeds, ranks):
    context = group(*range(4)) if ranks == 4 else [group(0, 1), group(2, 3)][rank // 2]
    for seed in seeds if ranks == 4 else seeds[rank // 2 :: 2]:
        given, trained, cut = random_problem(seed)
        try:
            compare(given, CUTS[cut], context, tuple(name for name in trained if name in given) or ("logits",))
        except Exception as error:
            error.add_note(f"seed {seed}, {cut}, {trained}")
            raise


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("first", range(0, 80, 20))
def test_random_problems(first, ranks):
    pool().run(random_problems, list(range(first, first + 20)), ranks)


# Each way that a sequence open on other ranks takes ───────────────────────────────────────────────────────────────────

# name → (scored tokens that each of two ranks has of each sequence, rows of a chunk, long_sequences, rank 0's tasks)
WAYS = {
    "kept": (((8, 4), (8, 4)), 12, "auto", "keep exchange"),
    "deferred": (((20,), (20,)), 10, "defer", "defer defer exchange"),
    "one deferred, one kept": (((10, 8), (10, 8)), 8, "defer", "defer defer keep exchange"),
    "each deferred": (((10, 8), (1, 1)), 5, "defer", "defer defer defer defer exchange"),
    "recomputed": (((10, 8), (30, 1)), 12, "recompute", "score keep exchange again"),
    "ends here, open": (((9, 12, 0), (0, 8, 3)), 9, "recompute", "close score keep exchange again"),
    "ends here late, deferred": (((9, 12), (0, 8)), 8, "defer", "defer close defer defer exchange"),
    "open on either side": (((0, 5, 3, 9, 4), (2, 1, 0, 0, 3)), 10, "auto", "close close keep keep exchange"),
    "one rank has all": (((0, 0), (5, 9)), 4, "recompute", "exchange"),
}


def shares(parts):
    """A cut of packed sequences: of each, rank 0's share and then rank 1's."""

    def of(rank, ranks):
        owner = torch.cat([torch.tensor([0] * first + [1] * second) for first, second in zip(*parts)])
        return lambda length: owner[:length] == rank

    return of


@contextlib.contextmanager
def live_heads():
    """[the most gradients of the head's weight at once]"""
    seen, most = {}, [0]
    real = HeadGradient.add

    def add(self, *args):
        real(self, *args)
        seen[id(self)] = self
        most[0] = max(most[0], sum(one.weight is not None for one in seen.values()))

    with mock.patch.object(HeadGradient, "add", add):
        yield most


def each_way(rank, name):
    context = [group(0, 1), group(2, 3)][rank // 2]
    me = rank % 2
    parts, rows, long_sequences, tasks = WAYS[name]
    lengths = tuple(map(sum, zip(*parts)))
    options = {"max_logits_bytes": rows * FP32, "long_sequences": long_sequences}
    plan = LinearPlan.of(
        parts[me],
        VOCAB,
        WIDTH,
        torch.float32,
        needs_bias=True,
        open_sequences=[all(its) for its in zip(*parts)],
        device="cpu",
        **options,
    )
    if me == 0:
        assert " ".join(chunk.task.value for chunk in plan.chunks) == tasks
    problem = linear_problem(
        lengths, packed=True, prompt=0, ref="logps", kl="number", average_log_prob=rank >= 2, outputs=OUTPUTS, **options
    )
    given = arguments(problem)
    compare(given, shares(parts), context)
    part = some_tokens(given, shares(parts)(me, 2))

    def step():
        with live_heads() as most:
            run(part, context_group=context)
        heads = 1 + plan.bytes.get("deferred weight gradient", 0) // plan.bytes["weight gradient"]
        assert most[0] == (heads if parts[me] != (0,) * len(lengths) else 0)

    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == gemm_flops(step) == plan.flops


@pytest.mark.parametrize("name", WAYS)
def test_ways_of_open_sequences(name):
    """The plan says which GEMMs run and how many gradients of the head there are at once."""
    pool().run(each_way, name)


def many_sequences(rank):
    """More than the bits that say which sequences a rank has: neighbours share them."""
    lengths = tuple(torch.randint(0, 5, (150,)).tolist())
    given = arguments(
        linear_problem(lengths, packed=True, prompt=0, ref="logps", kl="number", max_logits_bytes=40 * FP32)
    )
    compare(given, CUTS["uneven"], dist.group.WORLD)
    with FlopCounterMode(display=False) as counter:
        run(some_tokens(given, CUTS["equal"](rank, 4)), context_group=dist.group.WORLD)
    return counter.get_total_flops() / (2 * VOCAB * WIDTH), sum(lengths)


def test_many_packed_sequences_are_not_recomputed():
    units, total = zip(*pool().run(many_sequences))
    assert sum(units) == 3 * total[0]
