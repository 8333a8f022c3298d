"""Data parallel: z0 is that of all ranks' mismatched completions, whatever each rank has of them."""

import pytest
import torch
import torch.distributed as dist

from kto_kernels import kl_reference_point, kto_loss_from_logps
from tests.support.harness import problem
from tests.support.linear_harness import linear_problem
from tests.support.rank_pool import counted, distributed, pool
from tests.support.shard_harness import arguments, assert_near, assert_same_sequences, run, some_sequences

pytestmark = distributed

# Sequences and mismatched completions of each of four ranks: unequal, and one rank without any of the latter.
PARTS = [(slice(0, 1), slice(0, 2)), (slice(1, 4), slice(2, 2)), (slice(4, 5), slice(2, 3)), (slice(5, 7), slice(3, 5))]
PROBLEMS = {
    "logits": lambda: problem(batch=7, kl_batch=5),
    "logits, packed": lambda: problem(batch=7, kl_batch=5, packed=True, reduction="sum"),
    "log-probabilities of mismatched completions": lambda: problem(batch=7, kl_batch=5, kl="logps", ref_kl="logps"),
    "reference-free": lambda: problem(batch=7, kl_batch=5, ref=None, kl="logps", ref_kl=None, average_log_prob=True),
    "apo": lambda: problem(batch=7, kl=None, ref_kl=None, loss_type="apo_zero_unpaired"),
    "hidden": lambda: linear_problem((6, 3, 9, 0, 1, 2, 4), kl="logps"),
    "hidden, sums": lambda: linear_problem((6, 3, 9, 0, 1, 2, 4), kl="logps", reduction="none"),
}


def positive_kl(given):
    """The estimate of all ranks is positive, that of some rank alone is not: clamping before the sum would show."""
    if "kl_logps" in given:
        given["kl_logps"] = torch.tensor([-3.0, -20.0, -4.0, -1.0, -9.0], dtype=torch.float64)
        if given.get("ref_kl_logps") is not None:
            given["ref_kl_logps"] = torch.tensor([-8.0, -9.0, -20.0, -7.0, -8.0], dtype=torch.float64)
        else:
            given["kl_logps"] += 9
    return given


def same_as_one_process(rank, name):
    given = positive_kl(arguments(PROBLEMS[name]()))
    whole, _ = run(given)
    part = some_sequences(given, *PARTS[rank])
    with counted() as calls:
        mine, my_grads = run(part, process_group=dist.group.WORLD)
    assert calls == [("all_reduce", 40)], calls
    assert name == "apo" or mine.kl > 0.1
    sequences = PARTS[rank][0]
    assert_same_sequences(mine, whole, sequences)
    # The mean is over this rank's own sequences, as under any data-parallel wrapper.
    alone, alone_grads = run(
        {k: v for k, v in part.items() if not k.startswith(("kl_", "ref_kl_"))}
        | ({} if name == "apo" else {"kl": whole.kl})
    )
    assert_near("loss", mine.loss, alone.loss)
    for leaf, grad in my_grads.items():
        assert grad.numel() == 0 or grad.abs().max() > 0
        assert_near(f"gradient of {leaf}", grad, alone_grads[leaf])
    return mine.metrics(dist.group.WORLD), whole.metrics()


@pytest.mark.parametrize("name", PROBLEMS)
def test_unequal_ranks_equal_one_process(name):
    for everywhere, one_process in pool().run(same_as_one_process, name):
        assert everywhere == pytest.approx(one_process, rel=1e-5, abs=1e-7)
        assert {"rewards/margins", "logps/chosen", "kl", "loss"} <= everywhere.keys()


def one_sided(rank):
    given = positive_kl(arguments(PROBLEMS["log-probabilities of mismatched completions"]()))
    given["desirable"] = torch.tensor([True, False, False, False, True, True, True])
    whole, _ = run(given)
    mine, _ = run(some_sequences(given, *PARTS[rank]), process_group=dist.group.WORLD)
    assert len({"rewards/chosen", "rewards/rejected"} & mine.metrics().keys()) == 1
    return mine.metrics(dist.group.WORLD), whole.metrics()


def test_metrics_of_one_sided_batches_are_those_of_all():
    """A rank's class may be missing: sums and counts are added, not means."""
    for everywhere, one_process in pool().run(one_sided):
        assert everywhere == pytest.approx(one_process, rel=1e-5, abs=1e-7)


def nothing_at_all(rank):
    empty = torch.zeros(0)
    z0 = kl_reference_point(empty, empty, process_group=dist.group.WORLD)
    out = kto_loss_from_logps(empty, empty.bool(), kl_logps=empty, process_group=dist.group.WORLD)
    return z0.item(), out.loss.item(), out.metrics(dist.group.WORLD)


def test_without_a_sequence_on_any_rank_the_loss_is_0():
    assert pool().run(nothing_at_all) == [(0.0, 0.0, {"loss": 0.0, "kl": 0.0})] * 4


def a_group_of_one_and_none(rank):
    given = positive_kl(arguments(PROBLEMS["log-probabilities of mismatched completions"]()))
    groups = [dist.new_group([r]) for r in range(4)]
    with counted() as calls:
        run(given)
        run(given, process_group=groups[rank])
    return calls


def test_without_other_ranks_nothing_is_exchanged():
    assert pool().run(a_group_of_one_and_none) == [[]] * 4


def a_mesh(rank):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    kl = torch.tensor([float(1 + rank)])
    pairs = (
        kl_reference_point(kl, process_group=mesh["dp"]).item(),
        kl_reference_point(kl, process_group=mesh["tp"]).item(),
    )
    with pytest.raises(ValueError, match=r"process_group: expected a DeviceMesh of one dimension, got 2 .*'dp', 'tp'"):
        kl_reference_point(kl, process_group=mesh)
    return pairs


def test_a_dimension_of_a_mesh_is_a_group():
    assert pool().run(a_mesh) == [(2.0, 1.5), (3.0, 1.5), (2.0, 3.5), (3.0, 3.5)]


# Errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def disagreement(rank, option, values):
    given = positive_kl(arguments(PROBLEMS["log-probabilities of mismatched completions"]()))
    if "apo" in values:
        values = ["kto", "kto", "apo_zero_unpaired", "kto"]
    if values[rank] == "apo_zero_unpaired":
        given = {k: v for k, v in given.items() if "kl_" not in k}
    with pytest.raises(RuntimeError) as error:
        run(given | {option: values[rank]}, process_group=dist.group.WORLD)
    return str(error.value)


@pytest.mark.parametrize(
    "option, values, said",
    [
        ("beta", [0.1, 0.1, 0.2, 0.1], "beta is 0.1, 0.1, 0.2, 0.1"),
        ("desirable_weight", [1.0, 2.0, 1.0, 1.0], "desirable_weight is 1.0, 2.0, 1.0, 1.0"),
        ("loss_type", "apo", "loss_type is kto, kto, apo_zero_unpaired, kto"),
        ("average_log_prob", [True, False, True, True], "average_log_prob is True, False, True, True"),
    ],
)
def test_ranks_that_disagree_are_an_error_on_each(option, values, said):
    """On every rank, and nobody hangs."""
    for message in pool().run(disagreement, option, values):
        assert message.startswith("process_group: the ranks of the group disagree") and said in message


def alike(rank):
    values = torch.tensor([1.0 + rank]), torch.zeros(1)
    out = kto_loss_from_logps(
        torch.zeros(1), torch.ones(1).bool(), ref_logps=torch.zeros(1), kl_logps=values[0], ref_kl_logps=values[1],
        beta=1 if rank else 1.0, process_group=dist.group.WORLD
    )  # fmt: skip
    return out.kl.item()


def test_equal_numbers_of_another_type_agree():
    assert pool().run(alike) == [2.5] * 4


def one_fails(rank, change):
    given = positive_kl(arguments(PROBLEMS["log-probabilities of mismatched completions"]()))
    if rank == 2:
        given |= change
    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        run(given, process_group=dist.group.WORLD)
    return str(error.value)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"beta": -1.0}, "beta: expected"),
        ({"desirable": torch.ones(3, dtype=torch.bool)}, "desirable: expected shape"),
        ({"labels": torch.full((7, 6), 1000)}, "labels: expected 0 <= label < 131"),
        ({"kl_logps": torch.zeros(2)}, "ref_kl_logps: expected shape"),
    ],
)
def test_a_rank_with_bad_input_is_an_error_on_each(change, said):
    """It says what is wrong; the others say that a rank failed."""
    messages = pool().run(one_fails, change)
    assert said in messages.pop(2)
    assert all("process_group: the checks of another rank failed" in message for message in messages)


def not_a_member(rank):
    half = dist.new_group([0, 1])
    kl = torch.ones(1)
    if rank < 2:
        return kl_reference_point(kl, process_group=half).item()
    with pytest.raises(ValueError, match=rf"process_group: this rank \({rank}\) is not of the group"):
        kl_reference_point(kl, process_group=half)
    return None


def test_a_rank_outside_the_group():
    assert pool().run(not_a_member) == [1.0, 1.0, None, None]


def test_not_initialised_and_not_a_group():
    with pytest.raises(
        TypeError, match=r"process_group: expected a torch\.distributed ProcessGroup or DeviceMesh, got str"
    ):
        kl_reference_point(torch.ones(1), process_group="world")
