"""docs/scale.md: the plan's messages are what processes send, and the page is the plan's."""

from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from benchmarks import scale
from kto_kernels.ops import linear as linear_ops
from tests.support.linear_harness import VOCAB, linear_problem
from tests.support.rank_pool import counted, distributed, pool
from tests.support.shard_harness import arguments, run, some_columns, some_tokens

pytestmark = distributed

LENGTHS, MISMATCHED = (6, 3, 9, 0, 1), 3
HEADER = ("all_gather", 40)
BUDGET = 4 * VOCAB // 4 * 3  # three rows of a quarter of the vocabulary
CASES = {
    "trained": {},
    "recomputed": {"long_sequences": "recompute"},
    "frozen": {"trained": ("hidden",)},
    "without gradients": {"trained": ()},
    "known coefficients": {"reduction": "none"},
}


def messages(rank, case, over):
    """The calls that were made, and what the plans that were walked say."""
    options = dict(CASES[case])
    trained = options.pop("trained", ("hidden", "weight", "bias"))
    budget = BUDGET if over == "vocab_group" else 4 * BUDGET
    given = arguments(linear_problem(LENGTHS, max_logits_bytes=budget, **options))
    if over == "vocab_group":
        part = some_columns(given, slice(rank * VOCAB // 4, (rank + 1) * VOCAB // 4))
    else:
        part = some_tokens(given, lambda tokens: torch.arange(tokens) * 4 // tokens == rank)
    with mock.patch.object(linear_ops, "walk", side_effect=linear_ops.walk) as walks, counted() as calls:
        run(part, trained, **{over: dist.group.WORLD})
    plans = [call.args[2] for call in walks.call_args_list]
    assert len(plans) == (5 if case == "known coefficients" else 4)
    assert over != "vocab_group" or max(len(plan.chunks) for plan in plans) > 3
    expected = [HEADER]
    # In this order: the mismatched completions, policy and reference; the reference; the policy, again in its backward.
    for plan, sequences in zip(plans, (MISMATCHED, MISMATCHED, len(LENGTHS), len(LENGTHS), None), strict=False):
        expected += plan.messages(**{"vocab": True} if over == "vocab_group" else {"context": sequences})
    return Counter(calls), Counter(expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("over", ["vocab_group", "context_group"])
def test_messages_are_what_is_sent(case, over):
    for calls, expected in pool().run(messages, case, over):
        assert calls == expected
        assert sum(size for _, size in calls) > 8 * len(LENGTHS)


def test_the_page_is_up_to_date():
    assert scale.generated() in scale.PAGE.read_text(), "python -m benchmarks.scale writes it"


def test_a_ring_sends_the_bytes_that_the_page_counts():
    """Two ranks: each sends its part to the other; or half of its sum, and half of the result."""
    assert scale.ring_bytes("all_gather", 12, 2) == 12 and scale.ring_bytes("all_reduce", 12, 2) == 12
    assert scale.ring_bytes("all_gather", 12, 4) == 36 and scale.ring_bytes("all_reduce", 12, 4) == 18


def test_the_parts_of_the_ranks_add_up_to_the_whole():
    """The FLOPs of all ranks are those of one, and no rank holds more than it does."""
    whole = scale.plan_of(2**17, 4096, 128256, True, 1, 1)
    for vocab_ranks, context_ranks in ((8, 1), (1, 8), (4, 2)):
        part = scale.plan_of(2**17, 4096, 128256, True, vocab_ranks, context_ranks)
        assert part.flops * vocab_ranks * context_ranks >= whole.flops
        assert part.peak_bytes < whole.peak_bytes
    assert whole.flops == pytest.approx(3 * 2 * 2**17 * 4096 * 128256)
    assert whole.messages() == [] and torch.bfloat16 == whole.dtype
