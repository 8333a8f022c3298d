"""Context parallel: each rank has some tokens of every sequence. It gets the whole loss, and the gradient of its own
tokens: those of hidden states side by side, those of the head added up, are the whole ones."""

import contextlib
import os
import random
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from kto_kernels import LinearPlan, linear_kto_loss, sequence_logps
from kto_kernels.linear.head import HeadGradient
from tests.support.harness import problem
from tests.support.linear_harness import HEAD, VOCAB, WIDTH, gemm_flops, linear_problem, plain_linear
from tests.support.rank_pool import counted, distributed, group, pool
from tests.support.shard_harness import (
    LEAVES,
    arguments,
    assert_near,
    assert_same_sequences,
    known_lengths,
    run,
    some_columns,
    some_sequences,
    some_tokens,
)

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
    part = some_tokens(given, mine)
    if part["labels"].numel() % 2:  # on some ranks the caller knows how many of the rank's positions are scored
        part |= known_lengths(part)
    out, grads = run(part, trained, context_group=context, **options)
    assert_same_sequences(out, whole)
    assert_near("loss", out.loss, whole.loss)
    packed = "cu_seqlens" in given

    def of_mine(values):
        rows = mine(values.shape[0 if packed else 1])
        return values[rows] if packed else values[:, rows]

    assert_near("token_logps", out.token_logps, of_mine(whole.token_logps))
    for name, grad in grads.items():
        if name in ("logits", "hidden"):
            assert_near(f"gradient of {name}", grad, of_mine(whole_grads[name]), ulps)
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
def test_random_problems_equal_one_process(first, ranks):
    pool().run(random_problems, list(range(first, first + 20)), ranks)


# Each way that a sequence open on other ranks takes ───────────────────────────────────────────────────────────────────

# name → (scored tokens that each of two ranks has of each sequence, rows of a chunk, long_sequences, rank 0's tasks)
WAYS = {
    "kept": (((8, 4), (8, 4)), 12, "auto", "keep exchange"),
    "deferred": (((20,), (20,)), 10, "defer", "defer defer exchange"),
    "one deferred, one kept": (((10, 8), (10, 8)), 8, "defer", "defer defer keep exchange"),
    "each deferred": (((10, 8), (1, 1)), 5, "defer", "defer defer defer defer exchange"),
    "recomputed": (((10, 8), (30, 1)), 12, "recompute", "score keep exchange recompute"),
    "ends here, open": (((9, 12, 0), (0, 8, 3)), 9, "recompute", "close score keep exchange recompute"),
    "ends here late, deferred": (((9, 12), (0, 8)), 8, "defer", "defer close defer defer exchange"),
    "open on either side": (((0, 5, 3, 9, 4), (2, 1, 0, 0, 3)), 10, "auto", "close close keep keep exchange"),
    "one rank has all": (((0, 0), (5, 9)), 4, "recompute", "exchange"),
}


def shares(parts):
    """A cut of packed sequences: of each, rank 0's share, then rank 1's, and so on."""

    def of(rank, ranks):
        owner = torch.tensor([r for its in zip(*parts) for r, count in enumerate(its) for _ in range(count)])
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
def test_every_way_of_an_open_sequence_equals_one_process(name):
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


# Half precision ───────────────────────────────────────────────────────────────────────────────────────────────────────


def half_precision(rank, dtype, long_sequences):
    """Saturated sequences, their mean: coefficients are a small part of what the rows on this rank would allow."""
    parts = ((200, 200), (200, 0), (200, 0), (200, 0))
    problem = linear_problem(
        tuple(map(sum, zip(*parts))), packed=True, prompt=0, ref=None, kl=None, average_log_prob=True,
        long_sequences=long_sequences, max_logits_bytes=64 * 2 * VOCAB
    ).to(dtype)  # fmt: skip
    problem.options["kl"] = 90.0  # far above any log-probability: σ' is below 1/10,000
    given = arguments(problem)
    scale = 2.0**24
    leaves = {name: given.pop(name).clone().requires_grad_() for name in HEAD}
    part = some_tokens(given | {"hidden": leaves["hidden"]}, shares(parts)(rank, 4))
    hidden, labels, desirable = (part.pop(name) for name in ("hidden", "labels", "desirable"))
    out = linear_kto_loss(
        hidden, leaves["weight"], labels, desirable, bias=leaves["bias"], **part, context_group=dist.group.WORLD
    )
    (out.loss * scale).backward()
    exact, exact_grads, _ = plain_linear(problem.to(torch.float64))
    assert out.logps.tolist() == pytest.approx(exact["logps"].tolist(), rel=4 * torch.finfo(dtype).eps)
    for name, leaf in leaves.items():
        total = leaf.grad.double()
        dist.all_reduce(total)
        wanted = exact_grads[name] * scale / 0.5  # of half the loss
        unit = torch.finfo(dtype).eps * wanted.abs().max()
        assert unit > 0 and (total - wanted).abs().max() <= 8 * unit, (name, (total - wanted).abs().max() / unit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_equals_one_process(dtype):
    for long_sequences in ("auto", "defer"):
        pool().run(half_precision, dtype, long_sequences)


# Exchanges ────────────────────────────────────────────────────────────────────────────────────────────────────────────


AGREE = ("all_gather", 5 * 8)
FIVE, THREE = ("all_reduce", 5 * 8), ("all_reduce", 3 * 8)  # sums of sequences, and of mismatched ones
CALLS = {
    "logits": (lambda: problem(batch=5), LEAVES, [AGREE, THREE, THREE, FIVE, FIVE]),
    "hidden": (lambda: linear_problem(), LEAVES, [AGREE, THREE, THREE, FIVE, FIVE]),
    "frozen head": (lambda: linear_problem(ref="logps"), ("hidden",), [AGREE, THREE, FIVE]),
    "forward only": (lambda: linear_problem(ref="logps", kl="number"), (), [AGREE, FIVE]),
    "each sequence's loss": (lambda: linear_problem(ref=None, kl="logps", reduction="none"), LEAVES, [AGREE, FIVE]),
    "means": (
        lambda: linear_problem(ref="logps", kl="number", average_log_prob=True, max_logits_bytes=2 * FP32),
        LEAVES,
        [AGREE, ("all_reduce", 2 * 5 * 8)],
    ),
}


def exchanged(rank, name):
    make, trained, expected = CALLS[name]
    part = some_tokens(arguments(make()), CUTS["uneven"](rank, 4))
    with counted() as calls:
        run(part, trained, context_group=dist.group.WORLD)
    assert calls == expected, calls


@pytest.mark.parametrize("name", CALLS)
def test_one_all_reduce_of_sums(name):
    """One for each set of sequences, whatever is trained and however many chunks there are."""
    pool().run(exchanged, name)


# The stage on its own, and with other groups ──────────────────────────────────────────────────────────────────────────


def sums(rank, packed, average):
    logps, labels = torch.randn(3, 40, dtype=torch.float64), torch.randint(2, (3, 40)) - 100
    labels[1] = -100  # nothing scored
    logps[labels == -100] = 0
    options = {"average_log_prob": average}
    mine = scattered(rank, 4)
    if packed:
        offsets = torch.tensor([0, 50, 50, 120])
        logps, labels = logps.flatten(), labels.flatten()
        rows = mine(120)
        before = torch.cat([torch.zeros(1, dtype=torch.int64), rows.cumsum(0)])
        layouts = ({"cu_seqlens": offsets}, {"cu_seqlens": before[offsets]})
        pieces = logps[rows], labels[rows]
    else:
        rows = mine(40)
        layouts = {}, {}
        pieces = logps[:, rows], labels[:, rows]
    weights = torch.tensor([1.0, -2.0, 3.0])
    logps.requires_grad_()
    whole = sequence_logps(logps, labels=labels, **layouts[0], **options)
    (whole * weights).sum().backward()
    leaf = pieces[0].clone().requires_grad_()
    with counted() as calls:
        out = sequence_logps(leaf, labels=pieces[1], context_group=dist.group.WORLD, **layouts[1], **options)
        (out * weights).sum().backward()
    assert calls == [AGREE, ("all_reduce", 8 * 3 * (2 if average else 1))]
    torch.testing.assert_close(out, whole.detach())
    torch.testing.assert_close(leaf.grad, logps.grad[rows] if packed else logps.grad[:, rows])
    return out.tolist()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_sequence_logps_are_the_same_on_every_rank(packed, average):
    results = pool().run(sums, packed, average)
    assert results == results[:1] * 4  # the same bits on every rank


def on_a_mesh(rank, packed, trained):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    dp, cp = mesh.get_coordinate()
    lengths = (6, 3, 9, 0, 1, 12, 5)
    given = arguments(
        linear_problem(lengths, packed=packed, ref="logps", kl="hidden", outputs=OUTPUTS, max_logits_bytes=5 * FP32)
    )
    given["ref_kl_logps"] -= 20
    whole, _ = run(given)
    assert whole.kl > 1
    sequences, mismatched = [(slice(0, 4), slice(0, 1)), (slice(4, 7), slice(1, 3))][dp]
    batch = some_sequences(given, sequences, mismatched)
    alone, alone_grads = run(
        {name: value for name, value in batch.items() if "kl_" not in name} | {"kl": whole.kl}, trained
    )
    mine = zigzag(cp, 2)
    groups = {"process_group": mesh["dp"], "context_group": mesh["cp"]}
    out, grads = run(some_tokens(batch, mine), trained, **groups)
    assert_same_sequences(out, whole, sequences)
    assert_near("loss", out.loss, alone.loss)
    for name, grad in grads.items():
        if name == "hidden":
            rows = mine(batch["labels"].shape[-1])
            assert_near(name, grad, alone_grads[name][rows] if packed else alone_grads[name][:, rows])
        else:
            total = grad.clone()
            dist.all_reduce(total, group=mesh["cp"].get_group())
            assert_near(name, total, alone_grads[name])
    return out.metrics(**groups), whole.metrics()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("trained", [LEAVES, ("hidden",)], ids=["trained head", "frozen head"])
def test_data_and_context_parallel_equal_one_process(packed, trained):
    """Means over sequences are over the data-parallel ranks, means over tokens over both kinds."""
    for everywhere, one_process in pool().run(on_a_mesh, packed, trained):
        assert everywhere == pytest.approx(one_process, rel=1e-5, abs=1e-7)
        assert {"entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"} <= everywhere.keys()


def tokens_and_columns(rank, packed, trained, long_sequences):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    cp, tp = mesh.get_coordinate()
    given = arguments(
        linear_problem(
            (6, 3, 9, 0, 1, 12, 5), packed=packed, outputs=OUTPUTS, max_logits_bytes=5 * FP32,
            long_sequences=long_sequences
        )
    )  # fmt: skip
    whole, whole_grads = run(given, trained)
    mine, columns = zigzag(cp, 2), [slice(0, 20), slice(20, VOCAB)][tp]
    groups = {"context_group": mesh["cp"], "vocab_group": mesh["tp"]}
    out, grads = run(some_columns(some_tokens(given, mine), columns), trained, **groups)
    totals = {name: grad.clone() for name, grad in grads.items()}
    for name in sorted(totals.keys() - {"hidden"}):  # in one order on all ranks
        dist.all_reduce(totals[name], group=mesh["cp"].get_group())
    everywhere = out.metrics(context_group=mesh["cp"])  # before this rank may fail and leave the others waiting
    assert_same_sequences(out, whole)
    assert_near("loss", out.loss, whole.loss)
    assert totals.keys() == set(trained)
    for name, total in totals.items():
        if name == "hidden":
            rows = mine(given["labels"].shape[-1])
            assert_near(name, total, whole_grads[name][rows] if packed else whole_grads[name][:, rows])
        else:
            assert_near(name, total, whole_grads[name][columns])
    return everywhere, whole.metrics()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "trained, long_sequences",
    [(("hidden", "weight", "bias"), "auto"), (("hidden", "weight", "bias"), "defer"), (("hidden",), "auto")],
    ids=["trained head", "trained head, deferred", "frozen head"],
)
def test_vocabulary_and_context_parallel_equal_one_process(packed, trained, long_sequences):
    for everywhere, one_process in pool().run(tokens_and_columns, packed, trained, long_sequences):
        assert everywhere == pytest.approx(one_process, rel=1e-5, abs=1e-7)


# Errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def one_differs(rank, change, who):
    given = some_tokens(arguments(linear_problem(packed=True, ref="logps", kl="number")), CUTS["equal"](rank, 4))
    if rank in who:
        given |= change
    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        run(given, context_group=dist.group.WORLD)
    return f"{type(error.value).__name__}: {error.value}"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"beta": 0.3}, "beta is 0.1, 0.1, 0.3, 0.1"),
        ({"reduction": "sum"}, "reduction is mean, mean, sum, mean"),
        ({"temperature": 2.0}, "temperature is 1.0, 1.0, 2.0, 1.0"),
    ],
)
def test_ranks_that_disagree_are_an_error_on_each(change, said):
    for message in pool().run(one_differs, change, (2,)):
        assert message.startswith("RuntimeError: context_group: the ranks of the group disagree") and said in message


@pytest.mark.parametrize(
    "change, said",
    [
        (
            {"shift": True},
            "ValueError: shift: with a context_group the label of a rank's last token is on another rank",
        ),
        ({"cu_seqlens": torch.tensor([0, 1, 2, 3, 4, 5000])}, "ValueError: cu_seqlens: expected offsets that rise"),
        ({"desirable": torch.ones(2, dtype=torch.bool)}, "ValueError: desirable: expected shape"),
    ],
)
def test_a_rank_with_bad_input_is_an_error_on_each(change, said):
    """It says what is wrong; the others say that a rank failed."""
    messages = pool().run(one_differs, change, (2,))
    assert messages.pop(2).startswith(said)
    assert all("context_group: the checks of rank [2] of the group failed" in message for message in messages)


def test_shift_is_refused_on_every_rank():
    for message in pool().run(one_differs, {"shift": True}, range(4)):
        assert message.startswith("ValueError: shift: with a context_group") and "pass shift=False" in message


def whole_sequences(rank, vocabulary):
    """The whole batch on every rank of the context group: from logits, from hidden states, and from log-probabilities."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    groups = {"context_group": mesh["cp"]} if vocabulary else {"context_group": dist.group.WORLD}
    found = []
    for p in (problem(), linear_problem((6, 3, 9, 4))):
        given = arguments(p)
        if vocabulary:  # one of its ranks has no column, and cannot see by itself what the other does
            columns = slice(0, 0) if mesh["tp"].get_local_rank() else slice(None)
            given, groups = some_columns(given, columns), groups | {"vocab_group": mesh["tp"]}
        with mock.patch.dict(os.environ, KTO_KERNELS_DEBUG="1"), pytest.raises(ValueError) as error:
            run(given, **groups)
        found.append(str(error.value))
        with mock.patch.dict(os.environ, KTO_KERNELS_DEBUG="1"):  # the right parts raise nothing
            run(some_tokens(given, zigzag(mesh["cp"].get_local_rank(), 2)), **groups | {"context_group": mesh["cp"]})
    with mock.patch.dict(os.environ, KTO_KERNELS_DEBUG="1"), pytest.raises(ValueError) as error:
        sequence_logps(torch.randn(3, 4), context_group=dist.group.WORLD)
    return [*found, str(error.value)]


@pytest.mark.fault(12)
@pytest.mark.parametrize("vocabulary", [False, True])
def test_whole_sequences_given_with_a_group(vocabulary):
    """Each token would count once for every rank."""
    for messages in pool().run(whole_sequences, vocabulary):
        for argument, message in zip(("logits", "hidden", "logps"), messages, strict=True):
            assert message.startswith(f"{argument}: expected another part on each rank of context_group, got the same")


def one_without_a_reference(rank):
    given = some_tokens(arguments(linear_problem(kl="number")), CUTS["equal"](rank, 4))
    if rank == 1:
        given |= {"ref_logps": torch.zeros(5), "ref_hidden": None, "ref_weight": None, "ref_bias": None}
    with pytest.raises(RuntimeError, match=r"disagree: given is .*'ref_hidden'\], \['hidden'\], .* order of ranks"):
        run(given, context_group=dist.group.WORLD)


def test_a_rank_that_is_given_another_reference():
    """The others would wait for its part of the reference's sums."""
    pool().run(one_without_a_reference)


def number_of_sequences(rank):
    given = arguments(linear_problem((4, 2, 3), ref=None, kl="number"))
    if rank == 1:
        given = some_sequences(given, slice(0, 2), slice(0, 0))
    with pytest.raises(RuntimeError, match="context_group: the ranks of the group disagree: sequences is 3, 2, 3, 3"):
        run(given, context_group=dist.group.WORLD)


def test_another_number_of_sequences():
    pool().run(number_of_sequences)
