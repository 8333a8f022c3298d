"""Vocabulary parallel: each rank has some columns of the logits, or some rows of the head. It computes what one
process would, with one gather of three numbers a row and one all-reduce of a chunk's hidden gradient."""

import contextlib
import functools
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from kto_kernels import (
    KTOLoss,
    LinearKTOLoss,
    LinearPlan,
    kto_loss,
    linear_kto_loss,
    linear_token_logps,
    token_logps,
)
from tests.support.harness import Problem, problem, upstream
from tests.support.linear_harness import HEAD, VOCAB, WIDTH, linear_problem
from tests.support.rank_pool import counted, distributed, group, pool
from tests.support.shard_harness import (
    arguments,
    assert_near,
    assert_same_sequences,
    known_lengths,
    run,
    some_columns,
    some_sequences,
)

pytestmark = distributed

# Columns of four ranks, as fractions: even, uneven, one with none first, in between and last.
SPLITS = {
    "even": (0.25, 0.5, 0.75, 1.0),
    "uneven": (0.1, 0.7, 0.72, 1.0),
    "first is empty": (0.0, 0.3, 0.3, 1.0),
    "one has all but one": (0.0, 0.99, 1.0, 1.0),
}
HEADER = ("all_gather", 40)
LENGTHS = (6, 3, 9, 0, 1)
FOUR_ROWS = 4 * VOCAB * 4


def columns_of(rank, split, vocab):
    edges = [0, *(round(edge * vocab) for edge in SPLITS[split])]
    return slice(edges[rank], edges[rank + 1])


def assert_same(rank, mine, my_grads, whole, grads, columns, ulps=64.0):
    assert_near("loss", mine.loss, whole.loss, ulps)
    assert_near("token_logps", mine.token_logps, whole.token_logps)
    assert_same_sequences(mine, whole)
    assert mine.metrics() == pytest.approx(whole.metrics(), rel=1e-4, abs=1e-6)
    assert my_grads.keys() == grads.keys()
    for leaf, grad in my_grads.items():
        theirs = grads[leaf]
        theirs = theirs[..., columns] if leaf == "logits" else theirs if leaf == "hidden" else theirs[columns]
        assert theirs.numel() == 0 or theirs.abs().max() > 0
        assert_near(f"gradient of {leaf}", grad, theirs, ulps)


# From logits ──────────────────────────────────────────────────────────────────────────────────────────────────────────


LOGITS = {
    "all from logits": {},
    "packed, shift": {"packed": True, "shift": True, "reduction": "sum"},
    "sums": {"reduction": "none", "ref": "logps", "ref_kl": "logps", "temperature": 1.3},
    "means": {"average_log_prob": True, "ref": None, "ref_kl": None, "ignore_index": -7},
}


def logits_like_one_process(rank, options, split, dtype, backend, inplace):
    p = problem(**options).to(dtype)
    given, columns = arguments(p), columns_of(rank, split, p.logits.shape[-1])
    whole, grads = run(given, backend=backend)
    part = some_columns(given, columns)
    with counted() as calls:
        mine, my_grads = run(part, vocab_group=dist.group.WORLD, backend=backend, inplace_backward=inplace)
    numbers = 8 if dtype == torch.float64 else 4
    passes = [given[name].numel() for name in ("kl_labels", "kl_labels", "labels", "labels")]
    asked = [name in given for name in ("kl_logits", "ref_kl_logits", "ref_logits", "logits")]
    assert calls == [HEADER] + [("all_gather", 3 * n * numbers) for n, yes in zip(passes, asked) if yes]
    assert_same(rank, mine, my_grads, whole, grads, columns, 64 if dtype.itemsize > 2 else 2)
    return bits(mine, {})


def bits(out, grads):
    """The results that must not differ by a bit between ranks."""
    values = {"loss": out.loss, "logps": out.logps, "token_logps": out.token_logps, "hidden": grads.get("hidden")}
    return {name: value.tolist() for name, value in values.items() if value is not None}


def assert_the_same_bits(results):
    assert all(rank == results[0] for rank in results)


@pytest.mark.parametrize(
    ("case", "split", "dtype", "backend", "inplace"),
    [
        ("all from logits", "even", torch.float32, "cpu", False),
        ("all from logits", "uneven", torch.bfloat16, "cpu", True),
        ("packed, shift", "first is empty", torch.float16, "cpu", False),
        ("sums", "one has all but one", torch.float32, "cpu", True),
        ("means", "first is empty", torch.float32, "cpu", False),
        ("packed, shift", "uneven", torch.float64, "torch", True),
        ("sums", "first is empty", torch.bfloat16, "torch", False),
        ("sums", "uneven", torch.float32, "triton", True),
        ("packed, shift", "first is empty", torch.bfloat16, "cuda", False),
    ],
)
def test_split_logits_equal_one_process(case, split, dtype, backend, inplace):
    assert_the_same_bits(pool().run(logits_like_one_process, LOGITS[case], split, dtype, backend, inplace))


# From hidden states ───────────────────────────────────────────────────────────────────────────────────────────────────


HIDDEN = {
    "all from hidden states": {},
    "packed": {"packed": True, "ref": "logps", "kl": "number", "softcap": 4.0, "logit_scale": 0.7, "temperature": 1.3},
    "deferred": {"max_logits_bytes": FOUR_ROWS, "long_sequences": "defer", "ref": None, "kl": "number"},
    "recomputed": {
        "max_logits_bytes": FOUR_ROWS,
        "long_sequences": "recompute",
        "ref": None,
        "kl": "number",
        "bias": False,
    },
    "sums": {"reduction": "none", "max_logits_bytes": FOUR_ROWS, "ref": "logps", "kl": "logps"},
    "means": {"average_log_prob": True, "reduction": "sum", "ref": None, "kl": "hidden"},
}


def hidden_like_one_process(rank, options, split, dtype, backend, trained):
    p = linear_problem(LENGTHS, **options).to(dtype)
    given, columns = arguments(p), columns_of(rank, split, VOCAB)
    whole, grads = run(given, trained, backend=backend)
    if "cu_seqlens" in given:
        given |= known_lengths(given)
    mine, my_grads = run(some_columns(given, columns), trained, vocab_group=dist.group.WORLD, backend=backend)
    assert_same(rank, mine, my_grads, whole, grads, columns, 64 if dtype.itemsize > 2 else 3)
    return bits(mine, my_grads)


@pytest.mark.parametrize(
    ("case", "split", "dtype", "backend", "trained"),
    [
        ("all from hidden states", "even", torch.float32, "cpu", HEAD),
        ("all from hidden states", "first is empty", torch.bfloat16, "cpu", HEAD),
        ("packed", "uneven", torch.float32, "cpu", HEAD),
        ("packed", "one has all but one", torch.float32, "cpu", ("hidden",)),
        ("deferred", "uneven", torch.float32, "cpu", HEAD),
        ("deferred", "first is empty", torch.float32, "cpu", ("weight",)),
        ("recomputed", "first is empty", torch.float32, "cpu", HEAD),
        ("sums", "uneven", torch.float32, "cpu", HEAD),
        ("sums", "first is empty", torch.float32, "cpu", ("hidden",)),
        ("means", "one has all but one", torch.float32, "cpu", ("hidden", "bias")),
        ("means", "even", torch.float32, "cpu", ()),
        ("deferred", "uneven", torch.float64, "torch", HEAD),
        ("packed", "first is empty", torch.float32, "triton", HEAD),
        ("packed", "uneven", torch.float32, "cuda", HEAD),
    ],
)
def test_a_split_head_equals_one_process(case, split, dtype, backend, trained):
    assert_the_same_bits(pool().run(hidden_like_one_process, HIDDEN[case], split, dtype, backend, trained))


def half_precision(rank):
    p = linear_problem((6, 3, 9, 4), ref=None, kl="number").to(torch.float16)
    given, columns = arguments(p), columns_of(rank, "uneven", VOCAB)
    whole, grads = run(given)
    mine, my_grads = run(some_columns(given, columns), vocab_group=dist.group.WORLD)
    assert_same(rank, mine, my_grads, whole, grads, columns, 3)


def test_an_fp16_head_equals_one_process():
    pool().run(half_precision)


def one_model_in_mixed_dtypes(rank, autocast):
    """The same numbers as policy and reference; what is exchanged is of one dtype whatever a rank's reference has."""
    hidden, weight = torch.randint(-64, 65, (2, 20, 64)) / 32, torch.randint(-64, 65, (VOCAB, 64)) / 1024
    labels = torch.randint(VOCAB, (2, 20))
    given = {"hidden": hidden.bfloat16(), "weight": weight, "ref_hidden": hidden, "labels": labels}
    given |= {"ref_weight": weight.to(torch.float64 if rank == 2 else torch.bfloat16), "kl_hidden": hidden}
    given |= {"ref_kl_hidden": hidden.double(), "kl_labels": labels.flip(0), "desirable": torch.tensor([True, False])}
    part = some_columns(given, columns_of(rank, "uneven", VOCAB))
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        mine, _ = run(part, vocab_group=dist.group.WORLD)
    assert (mine.rewards == 0).all() and mine.kl == 0


@pytest.mark.parametrize("autocast", [False, True])
def test_every_side_in_one_dtype(autocast):
    pool().run(one_model_in_mixed_dtypes, autocast)


def random_problem(rank, seed):
    """Its shape, options and split are drawn, on every rank alike."""
    draw = torch.Generator().manual_seed(seed)

    def choose(*values):
        return values[int(torch.randint(len(values), (), generator=draw))]

    torch.manual_seed(seed)
    lengths = tuple(torch.randint(0, 12, (choose(1, 3, 6),), generator=draw).tolist())
    options = {
        "packed": choose(False, True),
        "bias": choose(False, True),
        "ref": choose(None, "hidden", "logps"),
        "kl": choose("hidden", "logps", "number"),
        "reduction": choose("mean", "sum", "none"),
        "average_log_prob": choose(False, True),
        "max_logits_bytes": choose(None, FOUR_ROWS, 2 * FOUR_ROWS),
        "long_sequences": choose("auto", "defer", "recompute"),
        "shift": choose(False, True),
        "softcap": choose(None, 5.0),
    }
    trained = choose(HEAD, HEAD, ("hidden",), ("weight", "bias"))
    edges = torch.randint(0, VOCAB + 1, (3,), generator=draw).sort().values.tolist()
    columns = slice([0, *edges][rank], [*edges, VOCAB][rank])
    given = arguments(linear_problem(lengths, **options))
    whole, grads = run(given, trained)
    mine, my_grads = run(some_columns(given, columns), trained, vocab_group=dist.group.WORLD)
    assert_near("loss", mine.loss, whole.loss)
    assert_near("token_logps", mine.token_logps, whole.token_logps)
    for leaf, grad in my_grads.items():
        assert_near(f"gradient of {leaf}", grad, grads[leaf] if leaf == "hidden" else grads[leaf][columns])


def test_random_problems_equal_one_process():
    for seed in range(12):
        pool().run(random_problem, seed)


# Exchanges and computations ───────────────────────────────────────────────────────────────────────────────────────────


def traffic(rank, options, trained, dtype):
    p = linear_problem(LENGTHS, ref=None, kl="number", max_logits_bytes=4 * 30 * dtype.itemsize, **options).to(dtype)
    columns = columns_of(rank, "uneven", VOCAB)
    part = some_columns(arguments(p), columns)
    with counted() as calls, FlopCounterMode(display=False) as flops:
        run(part, trained, vocab_group=dist.group.WORLD)
    return columns.stop - columns.start, calls, flops.get_total_flops()


# Rows of chunks: 40 columns are the most that a rank has, 3 rows of them fit. (trained, options, chunks, of which form
# gradients, GEMM units). "recompute" scores 3 + 3 (of 6 rows) and 6 + 3 (of 9), and those again.
ROWS = sum(LENGTHS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("trained", "options", "units"),
    [
        (HEAD, {"long_sequences": "defer"}, 3),
        (HEAD, {"long_sequences": "recompute"}, 3 + 9 / ROWS),
        (("weight",), {"long_sequences": "defer"}, 2),
        (("hidden",), {}, 2),
        ((), {}, 1),
        (HEAD, {"reduction": "none"}, 4),
    ],
)
def test_collectives_bytes_and_flops(trained, options, units, dtype):
    """A gather of three numbers for each row of each chunk, its hidden gradient in the GEMMs' dtype, and nothing else:
    nothing that the vocabulary's size is in. The FLOPs are those of the rank's own columns."""
    results = pool().run(traffic, options, trained, dtype)
    gathers = {tuple(size for name, size in calls if name == "all_gather") for _, calls, _ in results}
    reduces = {tuple(size for name, size in calls if name == "all_reduce") for _, calls, _ in results}
    assert len(gathers) == len(reduces) == 1
    (gathered,), (reduced,) = gathers, reduces
    assert gathered[0] == HEADER[1]
    again = {"recompute": 9}.get(options.get("long_sequences"), ROWS if "reduction" in options else 0)
    scored = [size // 12 for size in gathered[1:]]
    assert sum(scored) == ROWS + again and max(scored) <= 3
    formed = [size // (WIDTH * dtype.itemsize) for size in reduced]
    assert sum(formed) == (ROWS if "hidden" in trained else 0) and max(formed, default=0) <= 3
    # As many collectives as chunks: 4 bytes of a gather belong to 1 row of one of them.
    assert len(scored) <= -(-(ROWS + again) // 3) + 4 and len(formed) <= len(scored)
    for columns, calls, flops in results:
        assert {name for name, _ in calls} <= {"all_gather", "all_reduce"}
        assert flops == pytest.approx(units * 2 * ROWS * WIDTH * columns)


def test_every_rank_cuts_the_same_chunks():
    """A rank of few columns could take many more rows at once than the widest one: it must not."""
    options = {"hidden": 64, "max_logits_bytes": None, "device": "cpu", "dtype": torch.float32}
    lengths = [700, 30, 5000, 1]
    for needs_weight in (True, False):
        plans = [
            LinearPlan.of(lengths, vocab, widest=4000, needs_weight=needs_weight, **options)
            for vocab in (0, 1, 300, 4000)
        ]
        assert len({(plan.chunks, plan.chunk_rows, plan.weight_gradient_dtype) for plan in plans}) == 1
        assert plans[-1].chunks == LinearPlan.of(lengths, 4000, needs_weight=needs_weight, **options).chunks
        assert plans[1].bytes["logits"] * 300 == plans[2].bytes["logits"]
    wide = LinearPlan.of(lengths, 300, widest=4000, hidden=64, max_logits_bytes=4000 * 4 * 10, dtype=torch.float32)
    assert wide.chunk_rows == 10 and wide.bytes["chunk of hidden gradient"] == 10 * 64 * 4
    with pytest.raises(ValueError, match="max_logits_bytes: expected at least 16000"):
        LinearPlan.of(lengths, 300, widest=4000, hidden=64, max_logits_bytes=4000, dtype=torch.float32)


# The stages on their own, `outputs`, layouts of the group ───────────────────────────────────────────────────────────


def seam(rank, trained):
    """Any loss on top: here one that weighs tokens."""
    p = linear_problem((6, 3, 9, 4), softcap=6.0)
    given, columns = arguments(p), columns_of(rank, "uneven", VOCAB)
    found = []
    for part, vocab_group in ((given, None), (some_columns(given, columns), dist.group.WORLD)):
        leaves = {name: part[name].detach().clone().requires_grad_(name in trained) for name in HEAD}
        logps = linear_token_logps(
            leaves["hidden"], leaves["weight"], p.labels, bias=leaves["bias"], softcap=6.0,
            max_logits_bytes=FOUR_ROWS, vocab_group=vocab_group
        )  # fmt: skip
        weights = torch.linspace(-1, 1, logps.numel()).view_as(logps)
        found.append((logps, torch.autograd.grad((logps * weights).sum(), [leaves[name] for name in trained])))
    (logps, grads), (my_logps, my_grads) = found
    assert_near("logps", my_logps, logps)
    for name, mine, whole in zip(trained, my_grads, grads):
        assert_near(name, mine, whole if name == "hidden" else whole[columns])


@pytest.mark.parametrize("trained", [HEAD, ("hidden",), ("bias",)], ids=str)
def test_any_loss_on_the_token_log_probabilities(trained):
    pool().run(seam, trained)


def seam_of_logits(rank):
    p = problem()
    columns = columns_of(rank, "first is empty", p.logits.shape[-1])
    logits = p.logits[..., columns].clone().requires_grad_()
    whole = p.logits.clone().requires_grad_()
    weights = torch.linspace(-1, 1, p.labels.numel()).view(p.labels.shape)
    mine = token_logps(logits, p.labels, vocab_group=dist.group.WORLD)
    theirs = token_logps(whole, p.labels)
    assert_near("logps", mine, theirs)
    with counted() as calls:
        (mine * weights).sum().backward()
    (theirs * weights).sum().backward()
    assert_near("gradient", logits.grad, whole.grad[..., columns])
    return calls


def test_the_backward_from_logits_is_local():
    assert pool().run(seam_of_logits) == [[]] * 4


def outputs_of_rank(rank, backend):
    outputs = ("entropy", "mean_logits", "is_top1")
    p = linear_problem(LENGTHS, ref=None, kl="number", outputs=outputs)
    p.weight[40] = p.weight[20]  # a tie across ranks
    p.tensors["bias"][40] = p.tensors["bias"][20]
    p.labels[p.labels == 3], p.hidden[0, 2] = 20, 10 * p.weight[20]
    p.labels[0, 2:4] = torch.tensor([20, 40])
    p.hidden[0, 3] = p.hidden[0, 2]
    given, columns = arguments(p), columns_of(rank, "first is empty", VOCAB)
    whole, _ = run(given, ("hidden",), backend=backend)
    with counted() as calls:
        mine, _ = run(some_columns(given, columns), ("hidden",), vocab_group=dist.group.WORLD, backend=backend)
    assert calls[1] == ("all_gather", 6 * ROWS * 4)
    assert_near("entropy", mine.entropy, whole.entropy)
    assert_near("mean_logits", mine.mean_logits, whole.mean_logits)
    assert torch.equal(mine.is_top1, whole.is_top1) and whole.is_top1.any()
    assert mine.metrics() == pytest.approx(whole.metrics(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"])
def test_outputs_equal_one_process(backend):
    pool().run(outputs_of_rank, backend)


def mesh_of_data_and_vocabulary(rank, from_hidden):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    data, half = divmod(rank, 2)
    p = linear_problem((6, 3, 9, 0, 1), kl="hidden") if from_hidden else problem(batch=5, kl_batch=3)
    vocab = VOCAB if from_hidden else p.logits.shape[-1]
    given = arguments(p)
    whole, _ = run(given)
    sequences, mismatched = [(slice(0, 2), slice(0, 1)), (slice(2, 5), slice(1, 3))][data]
    part = some_sequences(given, sequences, mismatched)
    mine_alone = {k: v for k, v in part.items() if not k.startswith(("kl_", "ref_kl_"))} | {"kl": whole.kl}
    alone, grads = run(mine_alone)
    columns = [slice(0, 20), slice(20, vocab)][half]
    mine, my_grads = run(some_columns(part, columns), process_group=mesh["dp"], vocab_group=mesh["tp"])
    everywhere = mine.metrics(mesh["dp"])  # before this rank may fail and leave the others waiting
    assert_same_sequences(mine, whole, sequences)
    assert_near("loss", mine.loss, alone.loss)
    for leaf, grad in my_grads.items():
        theirs = grads[leaf]
        theirs = theirs[..., columns] if leaf == "logits" else theirs if leaf == "hidden" else theirs[columns]
        assert_near(f"gradient of {leaf}", grad, theirs)
    assert everywhere == pytest.approx(whole.metrics(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("from_hidden", [True, False])
def test_a_mesh_of_data_and_vocabulary(from_hidden):
    pool().run(mesh_of_data_and_vocabulary, from_hidden)


def padded_vocabulary(rank):
    """Heads padded to 4·20 rows: the real 67 are passed on, or the padding's bias is −inf; its gradient is 0."""
    p = linear_problem(LENGTHS, ref=None, kl="number")
    given = arguments(p)
    whole, grads = run(given)
    mine = slice(20 * rank, 20 * rank + 20)
    real = max(0, min(20, VOCAB - 20 * rank))
    found = []
    for masked in (False, True):
        weight = torch.cat([p.weight, torch.randn(13, WIDTH)])[mine].requires_grad_()
        bias = torch.cat([p.tensors["bias"], torch.full((13,), -torch.inf)])[mine].requires_grad_()
        end = 20 if masked else real
        out = linear_kto_loss(
            p.hidden, weight[:end], p.labels, p.desirable, bias=bias[:end], kl=0.4, vocab_group=dist.group.WORLD
        )
        upstream(out.loss).backward()
        assert_near("loss", out.loss, whole.loss)
        rows = slice(mine.start, mine.start + real)
        assert_near("weight", weight.grad[:real], grads["weight"][rows])
        assert_near("bias", bias.grad[:real], grads["bias"][rows])
        assert not weight.grad[real:].any() and not bias.grad[real:].any()
        found.append(out.loss.detach())
    return found


def test_a_padded_vocabulary_equals_the_real_one():
    pool().run(padded_vocabulary)


def two_of_four(rank):
    pair = group(0, 1)
    if pair is None:
        return None
    given = arguments(linear_problem(LENGTHS))
    whole, grads = run(given)
    columns = slice(0, 50) if rank == 0 else slice(50, VOCAB)
    mine, my_grads = run(some_columns(given, columns), vocab_group=pair)
    assert_same(rank, mine, my_grads, whole, grads, columns)
    return mine.loss.item()


def test_a_group_of_two_of_four_ranks_equals_one_process():
    first, second, *rest = pool().run(two_of_four)
    assert first == second and rest == [None, None]


# Errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def failing(rank, changes, from_hidden=True):
    """The error that a rank raises where its arguments are changed by `changes[rank]`."""
    p = linear_problem(LENGTHS, kl="hidden") if from_hidden else problem()
    vocab = VOCAB if from_hidden else p.logits.shape[-1]
    part = some_columns(arguments(p), columns_of(rank, "uneven", vocab))
    part |= changes.get(rank, {})
    trained = part.pop("trained", HEAD)
    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        run(part, trained, vocab_group=dist.group.WORLD)
    return type(error.value).__name__, str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({1: {"beta": 0.2}}, "vocab_group: the ranks of the group disagree: beta is 0.1, 0.2, 0.1, 0.1"),
        ({2: {"max_logits_bytes": FOUR_ROWS}}, "max_logits_bytes is None, None, 1072, None"),
        ({0: {"trained": ("weight",)}}, "requires_grad is [False, True, False], [True, True, True]"),
        ({3: {"backend": "torch"}}, "backend is cpu, cpu, cpu, torch"),
        ({1: {"softcap": 3.0}}, "softcap is None, 3.0, None, None"),
        ({1: {"labels": torch.zeros(5, 11, dtype=torch.int64)}}, "expected the same labels on every rank"),
        ({3: {"scored_lengths": LENGTHS}}, "scored_lengths is None, None, None, [6, 3, 9, 0, 1]"),
    ],
    ids=str,
)
def test_ranks_that_disagree_are_an_error_on_each(changes, said):
    for kind, message in pool().run(failing, changes):
        assert kind == "RuntimeError" and said in message


def test_a_label_outside_every_shard():
    labels = torch.full((5, 11), VOCAB)
    for kind, message in pool().run(failing, {key: {"labels": labels} for key in range(4)}):
        assert (kind, message) == (
            "ValueError",
            f"labels: expected 0 <= label < {VOCAB} or ignore_index=-100, got {VOCAB} at (0, 0)",
        )


def test_a_reference_head_with_another_split():
    other = {"ref_weight": torch.randn(30, WIDTH + 8), "ref_bias": torch.zeros(30)}
    results = pool().run(failing, {2: other})
    assert results.pop(2) == ("ValueError", "ref_weight: expected a vocabulary of 1 as weight, got 30")
    for kind, message in results:
        assert kind == "RuntimeError" and "vocab_group: the checks of rank [2] of the group failed" in message


def test_a_vocabulary_of_no_columns_is_an_error():
    nothing = {"logits": torch.zeros(4, 6, 0), "ref_logits": torch.zeros(4, 6, 0)}
    nothing |= {"kl_logits": torch.zeros(3, 4, 0), "ref_kl_logits": torch.zeros(3, 4, 0)}
    for kind, message in pool().run(failing, dict.fromkeys(range(4), nothing), False):
        assert kind == "ValueError" and message.startswith("vocab_group: expected a column of the vocabulary")


# Tensors gathered before ──────────────────────────────────────────────────────────────────────────────────────────────


DEBUG = mock.patch.dict(os.environ, KTO_KERNELS_DEBUG="1")


def scored(rank, columns, debug=False, module=False, uniform=False, vocab=None):
    """Each function that takes a vocabulary group, of `columns(rank)` of the logits or the head: its loss or the sum of
    its log-probabilities, or what it raises. `uniform`: of logits and heads that are 0 everywhere."""
    # A reference that was gathered too would be wrong by as much, and hide it.
    logits, linear = problem(ref="logps", ref_kl="logps"), linear_problem(LENGTHS, ref="logps")
    if uniform:
        logits.logits.zero_(), linear.weight.zero_()
    group = {"vocab_group": dist.group.WORLD, "vocab": vocab}
    calls = {}
    for name, p in (("logits", logits), ("hidden", linear)):
        whole = arguments(p)
        part = some_columns(whole, columns(rank, p.logits.shape[-1] if name == "logits" else VOCAB))
        first = [part.pop(name) for name in (name, *(["weight"] if name == "hidden" else [])) if name in part]
        labels, desirable = part.pop("labels"), part.pop("desirable")
        loss, layer, logps = {
            "logits": (kto_loss, KTOLoss, token_logps),
            "hidden": (linear_kto_loss, LinearKTOLoss, linear_token_logps),
        }[name]
        loss = layer(**group) if module else functools.partial(loss, **group)
        calls[f"loss, {name}"] = lambda f=loss, a=(*first, labels, desirable), k=part: f(*a, **k).loss.item()
        calls[f"logps, {name}"] = lambda f=logps, a=(*first, labels): f(*a, **group).sum().item()
    found = {}
    with DEBUG if debug else contextlib.nullcontext():
        for name, call in calls.items():
            try:
                found[name] = call()
            except (ValueError, RuntimeError) as error:
                found[name] = f"{type(error).__name__}: {error}"
    return found


def all_columns(rank, vocab):
    return slice(0, vocab)


def uneven_columns(rank, vocab):
    return columns_of(rank, "uneven", vocab)


def first_half_twice(rank, vocab):
    return slice(0, vocab // 2) if rank % 2 else slice(vocab // 2 + rank, vocab)


@pytest.mark.fault(12)
@pytest.mark.parametrize("module", [False, True])
def test_whole_logits_or_heads_given_with_a_group(module):
    """Their columns would count once for every rank: log 4 too much in each log-sum-exp."""
    silent, found = (pool().run(scored, all_columns, debug, module) for debug in (False, True))
    right = pool().run(scored, uneven_columns, False, module)
    for rank in range(4):
        for name, number in silent[rank].items():
            assert abs(number - right[rank][name]) > 1e-4
            argument = "logits" if "logits" in name else "weight"
            assert found[rank][name] == (
                f"ValueError: {argument}: expected another part on each rank of vocab_group, got the same on ranks "
                "[0, 1, 2, 3]; tensors that are whole on every rank go without vocab_group"
            )


@pytest.mark.parametrize("name, vocab", [("logits", 131), ("hidden", VOCAB)])
def test_the_size_of_the_vocabulary(name, vocab):
    whole = pool().run(scored, all_columns, False, True, False, vocab)
    right = pool().run(scored, uneven_columns, False, True, False, vocab)
    without = pool().run(scored, uneven_columns, False, True)
    for rank in range(4):
        for call in (f"loss, {name}", f"logps, {name}"):
            assert right[rank][call] == without[rank][call]
            assert whole[rank][call] == (
                f"ValueError: vocab: expected {4 * vocab}, the sum of the columns {[vocab] * 4} of vocab_group's ranks, "
                f"got {vocab}; logits or heads that are whole on every rank go without vocab_group"
            )


def test_two_ranks_with_equal_columns():
    for found in pool().run(scored, first_half_twice, True):
        for name, said in found.items():
            assert said.startswith("ValueError: logits:" if "logits" in name else "ValueError: weight:")
            assert "on ranks [1, 3];" in said


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("uniform", [False, True])
def test_debugging_changes_nothing_else(split, uniform):
    """Ranks without a column, and columns of zeros, as a head may begin with, are alike and right."""
    columns = functools.partial(columns_in, split)
    runs = [pool().run(scored, columns, debug, False, uniform) for debug in (False, True)]
    assert runs[0] == runs[1] and all(isinstance(number, float) for number in runs[0][0].values())


def columns_in(split, rank, vocab):
    return columns_of(rank, split, vocab)


def one_debugs(rank):
    disagree = pytest.raises(RuntimeError, match="disagree: KTO_KERNELS_DEBUG=1 is False, True, False, False")
    with DEBUG if rank == 1 else contextlib.nullcontext(), disagree:
        token_logps(torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64), vocab_group=dist.group.WORLD)


def test_debug_mode_on_one_rank_alone_is_an_error():
    pool().run(one_debugs)


def outside_its_dimension(rank):
    p = problem()
    assert isinstance(p, Problem)
    with pytest.raises(ValueError, match="logits: expected a vocabulary of at least one token"):
        token_logps(p.logits[..., :0], p.labels)


def test_without_a_group_there_must_be_columns():
    outside_its_dimension(0)
