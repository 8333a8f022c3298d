"""A disagreement between ranks is an error on each of them, soon, and the error says what it was. The disagreements of each kind
of group are beside its other tests."""

import datetime
import os
import tempfile

import pytest
import torch
import torch.distributed as dist

from kto_kernels import kl_reference_point, kto_loss, linear_kto_loss, linear_token_logps, sequence_logps, token_logps
from tests.support.linear_harness import VOCAB, linear_problem
from tests.support.rank_pool import distributed, forking, pool
from tests.support.shard_harness import arguments, run

pytestmark = distributed

HIDDEN, WEIGHT = torch.zeros(2, 3, 4), torch.zeros(5, 4)
LOGITS, LABELS, DESIRABLE = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64), torch.tensor([True, False])

# Every function with every group that it takes; apart from the group the call is right.
CALLS = {
    "kl_reference_point, process_group": lambda g: kl_reference_point(torch.ones(2), process_group=g),
    "sequence_logps, context_group": lambda g: sequence_logps(torch.zeros(2, 3), context_group=g),
    "token_logps, vocab_group": lambda g: token_logps(LOGITS, LABELS, vocab_group=g),
    "linear_token_logps, vocab_group": lambda g: linear_token_logps(HIDDEN, WEIGHT, LABELS, vocab_group=g),
}
for _group in ("process_group", "vocab_group", "context_group"):
    CALLS |= {
        f"kto_loss, {_group}": lambda g, name=_group: kto_loss(LOGITS, LABELS, DESIRABLE, kl=0.0, **{name: g}),
        f"linear_kto_loss, {_group}": lambda g, name=_group: linear_kto_loss(
            HIDDEN, WEIGHT, LABELS, DESIRABLE, kl=0.0, **{name: g}
        ),
    }


# A group of the wrong kind ────────────────────────────────────────────────────────────────────────────────────────────


def other_device(rank):
    elsewhere = dist.new_group(backend="cuda:gloo")
    messages = {}
    for name, call in CALLS.items():
        with pytest.raises(ValueError) as error:
            call(elsewhere)
        messages[name] = str(error.value)
    return messages


@pytest.mark.skipif(torch.cuda.is_available(), reason="the pool's ranks have a GPU")
def test_a_group_without_a_backend_for_the_tensors_device():
    for messages in pool().run(other_device):
        for name, message in messages.items():
            assert message == (
                f"{name.split(', ')[1]}: its backends {{'cuda': 'gloo'}} have none for tensors on cpu; "
                "torch.distributed.new_group(backend=...) makes one that has"
            )


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_group_is_an_error(name):
    argument = name.split(", ")[1]
    with pytest.raises(TypeError, match=rf"^{argument}: expected a torch\.distributed ProcessGroup or DeviceMesh, got"):
        CALLS[name](3)


# One rank's input is refused ──────────────────────────────────────────────────────────────────────────────────────────


def one_refuses(rank, argument, change):
    given = arguments(linear_problem(packed=True, ref="logps", kl="hidden"))
    given |= change if rank == 1 else {}
    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        run(given, **{argument: dist.group.WORLD})
    return str(error.value)


REFUSED = {
    "max_logits_bytes: expected at least": {"max_logits_bytes": 4 * VOCAB - 1},
    "hidden, weight: backend='cpu' takes": {"backend": "cpu", "hidden": torch.zeros(29, 24, dtype=torch.float64)},
    "cu_seqlens: expected offsets that rise": {"cu_seqlens": torch.tensor([0, 3, 2, 9, 9, 10_000])},
    "kl_cu_seqlens: expected offsets that rise": {"kl_cu_seqlens": torch.tensor([0, 3, 2, 9])},
    "kl_labels: expected 0 <= label": {"kl_labels": torch.full((17,), VOCAB)},
}


@pytest.mark.parametrize("argument", ["process_group", "context_group"])
@pytest.mark.parametrize("said", REFUSED)
def test_what_an_operator_would_refuse_later(argument, said):
    """Found while the others can still be told: they do not wait for this rank's part of a sum."""
    messages = pool().run(one_refuses, argument, REFUSED[said])
    assert said in messages.pop(1)
    assert all(m.startswith(f"{argument}: the checks of") and "failed" in m for m in messages), messages


# A rank that does not come ────────────────────────────────────────────────────────────────────────────────────────────


def _process(rank, file, results):
    """Rank 1 is late for the first group's collectives, and dies before the second's."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    calls = [name for name in CALLS if "vocab_group" not in name]
    late = {name: dist.new_group(timeout=datetime.timedelta(milliseconds=300)) for name in calls}
    dead = {name: dist.new_group() for name in calls}  # their time-out is half an hour
    dist.barrier()
    if rank == 1:
        results.recv()
        os._exit(0)

    def what(group, name):
        try:
            return "returned", str(CALLS[name](group))
        except Exception as error:
            return type(error).__name__, str(error)

    results.send({name: what(group, name) for name, group in late.items()})
    results.recv()
    results.send({name: what(group, name) for name, group in dead.items()})
    os._exit(0)  # the group cannot be taken down without its other rank


def test_a_peer_that_is_late_or_dead():
    """The collective's own error, at its time-out or when the connection closes, not a hang."""
    context = forking(__name__)
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe() for _ in range(2)]
        processes = [
            context.Process(target=_process, args=(rank, f"{folder}/store", pipes[rank][1]), daemon=True)
            for rank in range(2)
        ]
        try:
            for process in processes:
                process.start()
            living, dying = (mine for mine, _ in pipes)
            assert living.poll(100), "the late rank's peer waits for ever"
            for name, (kind, message) in living.recv().items():
                assert (kind, "Timed out waiting 300ms" in message) == ("RuntimeError", True), (name, kind, message)
            dying.send(None)
            processes[1].join(30)
            assert processes[1].exitcode == 0
            living.send(None)
            assert living.poll(60), "the dead rank's peer waits for ever"
            for name, (kind, message) in living.recv().items():
                assert (kind, "Connection closed by peer" in message) == ("RuntimeError", True), (name, kind, message)
        finally:
            for process in processes:
                process.kill()
