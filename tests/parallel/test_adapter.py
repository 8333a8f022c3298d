"""An adapter on the head over the ranks of a group: B is cut as the head is, A is whole, and the gradients are those of
one process."""

from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from kto_kernels import linear_kto_loss, linear_token_logps
from kto_kernels.ops import linear as linear_ops
from tests.support.harness import upstream
from tests.support.linear_harness import VOCAB, WIDTH, linear_problem
from tests.support.rank_pool import counted, device, distributed, pool
from tests.support.shard_harness import arguments, assert_near, some_columns, some_tokens

pytestmark = distributed

RANK, SCALING = 3, 0.7
HEADER = ("all_gather", 40)
OPTIONS = {
    "one chunk": {},
    "longer than a chunk": {"max_logits_bytes": 4 * VOCAB * 4},
    "each sequence's loss": {"reduction": "none", "max_logits_bytes": 4 * VOCAB * 4},
    "fp16": {"max_logits_bytes": 4 * VOCAB * 2},
}


def given_and_adapter(case):
    dtype = torch.float16 if case == "fp16" else torch.float32
    p = linear_problem((6, 3, 9, 0, 1), packed=case == "one chunk", ref=None, kl="number", **OPTIONS[case])
    p = p.to(dtype, str(device()))
    a, b = (torch.randn(RANK, WIDTH) / 4).to(device(), dtype), (torch.randn(VOCAB, RANK) / 2).to(device(), dtype)
    return arguments(p), a, b, 4 if dtype == torch.float16 else 64


def run(given, a, b, trained=("hidden", "a", "b"), **groups):
    call = dict(given)
    leaves = {"hidden": call.pop("hidden"), "a": a, "b": b}
    x = {name: leaf.detach().clone().requires_grad_(name in trained) for name, leaf in leaves.items()}
    first = x["hidden"], call.pop("weight"), call.pop("labels"), call.pop("desirable")
    out = linear_kto_loss(*first, adapter=(x["a"], x["b"], SCALING), **call, **groups)
    upstream(out.loss).backward()
    return out, {name: x[name].grad for name in trained}


def near(name, mine, whole, ulps):
    assert whole.abs().max() > 0
    assert_near(name, mine, whole, ulps)


def some_columns_each(rank, case):
    given, a, b, ulps = given_and_adapter(case)
    whole, grads = run(given, a, b)
    columns = slice((0, 20, 20, 50)[rank], (20, 20, 50, VOCAB)[rank])
    with mock.patch.object(linear_ops, "walk", side_effect=linear_ops.walk) as walks, counted() as calls:
        out, mine = run(some_columns(given, columns), a, b[columns], vocab_group=dist.group.WORLD, vocab=VOCAB)
    assert_near("loss", out.loss, whole.loss)
    near("hidden", mine["hidden"], grads["hidden"], ulps)
    near("A", mine["a"], grads["a"], ulps)
    if rank != 1:  # which has no column
        near("B", mine["b"], grads["b"][columns], ulps)
    plans = [call.args[2] for call in walks.call_args_list]
    assert Counter(calls) == Counter([HEADER] + [message for plan in plans for message in plan.messages(vocab=True)])
    assert ("all_reduce", 4 * RANK * WIDTH) in calls
    return mine["a"].tolist()


def some_tokens_each(rank, case):
    given, a, b, ulps = given_and_adapter(case)
    whole, grads = run(given, a, b)
    count = given["labels"].shape[-1]
    mine = torch.arange(count) % 4 == rank
    with mock.patch.object(linear_ops, "walk", side_effect=linear_ops.walk) as walks:
        out, found = run(some_tokens(given, lambda _: mine), a, b, context_group=dist.group.WORLD)
    assert_near("loss", out.loss, whole.loss)
    hidden = grads["hidden"][mine] if "cu_seqlens" in given else grads["hidden"][:, mine]
    near("hidden", found["hidden"], hidden, ulps)
    for name in ("a", "b"):
        total = found[name].float()
        dist.all_reduce(total)
        assert found[name].dtype == grads[name].dtype
        near(name, total.to(grads[name].dtype), grads[name], ulps)
    return [len(call.args[2].recomputed) for call in walks.call_args_list]


@pytest.mark.parametrize("case", OPTIONS)
def test_some_columns_on_each_rank(case):
    results = pool().run(some_columns_each, case)
    assert all(found == results[0] for found in results)  # the whole gradient of A, to the bit


@pytest.mark.parametrize("case", OPTIONS)
def test_some_tokens_on_each_rank(case):
    assert all(not any(recomputed) for recomputed in pool().run(some_tokens_each, case))


def long_open_sequences(rank):
    """Every rank's part of two sequences is longer than a chunk: both are deferred."""
    p = linear_problem((40, 48), packed=True, prompt=0, ref=None, kl="number", max_logits_bytes=4 * VOCAB * 4)
    given, a, b = arguments(p.to(torch.float32, str(device()))), torch.randn(RANK, WIDTH) / 4, torch.randn(VOCAB, RANK)
    a, b = a.to(device()), b.to(device())
    _, grads = run(given, a, b, ("a", "b"))
    mine = torch.arange(88) % 4 == rank
    with mock.patch.object(linear_ops, "walk", side_effect=linear_ops.walk) as walks:
        _, found = run(some_tokens(given, lambda _: mine), a, b, ("a", "b"), context_group=dist.group.WORLD)
    (plan,) = (call.args[2] for call in walks.call_args_list)
    assert len(plan.deferred) == 2 and not plan.recomputed
    for name in ("a", "b"):
        dist.all_reduce(found[name])
        near(name, found[name], grads[name], 64)


def test_open_sequences_are_deferred():
    pool().run(long_open_sequences)


def on_the_seam(rank):
    given, a, b, _ = given_and_adapter("longer than a chunk")
    weights = torch.randn(given["labels"].shape).to(device())
    columns = slice((0, 20, 20, 50)[rank], (20, 20, 50, VOCAB)[rank])
    results = []
    for part, group in ((slice(None), None), (columns, dist.group.WORLD)):
        x = [leaf.detach().clone().requires_grad_() for leaf in (given["hidden"], a, b[part])]
        logps = linear_token_logps(
            x[0], given["weight"][part], given["labels"], bias=given["bias"][part], adapter=(x[1], x[2], SCALING),
            vocab_group=group,
        )  # fmt: skip
        (logps * weights).sum().backward()
        results.append([leaf.grad for leaf in x])
    (hidden, of_a, of_b), mine = results
    near("hidden", mine[0], hidden, 64)
    near("A", mine[1], of_a, 64)
    if rank != 1:
        near("B", mine[2], of_b[columns], 64)


def test_token_logps_over_some_columns():
    pool().run(on_the_seam)


# Stored by FSDP2 ──────────────────────────────────────────────────────────────────────────────────────────────────────


def stored(rank, over_vocab):
    """A and B as DTensors: gathered, their gradients sharded again, the mean over the ranks that are no vocabulary group."""
    given, a, b, _ = given_and_adapter("longer than a chunk")
    _, grads = run(given, a, b)
    if over_vocab:  # two ranks with half of the columns each, twice
        mesh = init_device_mesh(device().type, (2, 2), mesh_dim_names=("data", "vocab"))
        placements = {"a": [Shard(0), Replicate()], "b": [Replicate(), Shard(0)]}
        options = {"vocab_group": mesh["vocab"]}
        half = (VOCAB + 1) // 2  # as DTensor cuts
        given = some_columns(given, slice(half) if rank % 2 == 0 else slice(half, VOCAB))
    else:
        mesh, options = init_device_mesh(device().type, (4,)), {}
        placements = {"a": [Shard(0)], "b": [Shard(0)]}
    leaves = {name: distribute_tensor(x, mesh, placements[name]) for name, x in (("a", a), ("b", b))}
    _, mine = run(given, leaves["a"], leaves["b"], **options)
    near("hidden", mine["hidden"], grads["hidden"], 64)
    for name in ("a", "b"):
        assert isinstance(mine[name], DTensor) and mine[name].placements == tuple(placements[name])
        near(name, mine[name].full_tensor(), grads[name], 64)  # the ranks' calls are equal, and so is their mean


@pytest.mark.parametrize("over_vocab", [False, True])
def test_stored_as_dtensors(over_vocab):
    pool().run(stored, over_vocab)


# Errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def one_differs(rank, how):
    given, a, b, _ = given_and_adapter("longer than a chunk")
    scaling = 0.5 if how == "scaling" and rank == 1 else SCALING
    call = {name: value for name, value in given.items() if name not in ("hidden", "weight", "labels", "desirable")}
    adapter = None if how == "none" and rank == 1 else (a, b, scaling)
    first = [given[name] for name in ("hidden", "weight", "labels", "desirable")]
    try:
        linear_kto_loss(*first, adapter=adapter, **call, context_group=dist.group.WORLD)
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("how", ["scaling", "none"])
def test_ranks_with_different_adapters_are_an_error_on_each(how):
    assert all("adapter is " in (message or "") for message in pool().run(one_differs, how))
