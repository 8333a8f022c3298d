"""DTensor arguments, FSDP2's parameters among them: a rank computes with plain tensors, and gradients come back with
the placements and the division that FSDP2 gives its own."""

import contextlib
import functools
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from kto_kernels import kto_loss, linear_kto_loss, linear_token_logps, token_logps
from tests.support.harness import problem, upstream
from tests.support.linear_harness import linear_problem
from tests.support.rank_pool import counted, device, distributed, pool
from tests.support.shard_harness import arguments, assert_near, run, some_sequences

pytestmark = distributed

HEAD = ("weight", "bias", "ref_weight", "ref_bias")


@functools.cache
def mesh(*shape, names=None):
    return init_device_mesh(device().type, shape, mesh_dim_names=names)


def sharded(tensor, placements, *shape, names=None):
    return distribute_tensor(tensor.to(device()), mesh(*shape, names=names), placements)


def whole_problem(**options):
    """Eight sequences, two for each rank, with a row for every one of their tokens."""
    return arguments(linear_problem((6, 3, 9, 0, 1, 2, 4, 5), kl=None, loss_type="apo_zero_unpaired", **options))


def mine(given, rank):
    return some_sequences(given, slice(2 * rank, 2 * rank + 2), slice(0))


# Heads ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

STORED = {
    "FSDP2": ((4,), [Shard(0)]),  # 67 rows: 17, 17, 17, 16
    "HSDP": ((2, 2), [Replicate(), Shard(0)]),
    "replicated": ((4,), [Replicate()]),
    "by features": ((4,), [Shard(1)]),
}
OPTIONS = {
    "trained": {},
    "recomputed in the backward": {"reduction": "none"},
    "frozen": {"trained": ("hidden",)},
    "bias alone": {"trained": ("hidden", "bias")},
}


def stored_head(rank, how, options):
    shape, placements = STORED[how]
    trained = options.pop("trained", ("hidden", "weight", "bias"))
    part = mine(whole_problem(**options), rank)
    plain, expected = run(part, trained)
    by_rows = [p if p != Shard(1) else Replicate() for p in placements]
    stored = {name: sharded(part[name], placements if "weight" in name else by_rows, *shape) for name in HEAD}
    with counted() as calls:
        out, grads = run(part | stored, trained)
    assert not calls, calls  # DTensor's alone
    assert torch.equal(out.loss, plain.loss) and torch.equal(out.ref_logps, plain.ref_logps)
    assert torch.equal(grads["hidden"], expected["hidden"])
    for name in trained[trained[0] == "hidden" :]:
        assert isinstance(grads[name], DTensor) and grads[name].placements == stored[name].placements
        mean = expected[name] / 4
        dist.all_reduce(mean)
        assert mean.abs().max() > 0
        assert_near(name, grads[name].full_tensor(), mean)


@pytest.mark.parametrize("how, options", [(how, "trained") for how in STORED] + [("FSDP2", o) for o in OPTIONS])
def test_a_stored_heads_gradient_is_the_mean_over_the_ranks(how, options):
    """However it is stored, its gradient is the mean over the ranks, each of which has its own rows."""
    pool().run(stored_head, how, OPTIONS[options])


class Model(torch.nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.body, self.head = torch.nn.Linear(5, 8), torch.nn.Linear(8, 11, bias=bias)

    def forward(self, inputs, labels, desirable):
        hidden = torch.tanh(self.body(inputs))  # not a view, which FSDP2 warns of
        return linear_kto_loss(hidden, self.head.weight, labels, desirable, bias=self.head.bias, kl=0.0)


def fsdp(rank, separate):
    torch.manual_seed(0)
    model, single = Model(bias=not separate).to(device()), Model(bias=not separate).to(device())
    single.load_state_dict(model.state_dict())
    inputs, labels = torch.randn(8, 3, 5), torch.randint(11, (8, 3))
    batch = [x.to(device()) for x in (inputs, labels, torch.arange(8) % 3 != 1)]
    single(*batch).loss.backward()
    for module in [model.body, model.head] if separate else []:
        fully_shard(module, mesh=mesh(4))
    fully_shard(model, mesh=mesh(4))
    seen = []
    handle = model.body.register_forward_hook(lambda *_: seen.append(isinstance(model.head.weight, DTensor)))
    model(*(x[2 * rank : 2 * rank + 2] for x in batch)).loss.backward()
    handle.remove()
    assert seen == [separate]
    for (name, parameter), theirs in zip(model.named_parameters(), single.parameters()):
        assert theirs.grad.abs().max() > 0
        assert_near(name, parameter.grad.full_tensor(), theirs.grad)


@pytest.mark.parametrize("separate", [False, True], ids=["whole in the forward", "still sharded in the forward"])
def test_gradients_are_divided_as_fsdp2_divides(separate):
    """FSDP2 reduces the body's gradient, and the head's where it is part of the root; a head in a group of its own,
    whose forward nobody calls, comes as a DTensor, and ends with the same division. The expected gradient is that of one
    process with the whole batch."""
    pool().run(fsdp, separate)


class GatheredParameters(contextlib.AbstractContextManager):
    """DeepSpeed's, of parameters that this process has the whole of."""

    def __init__(self, parameters):
        self.parameters = parameters

    def __enter__(self):
        for parameter in self.parameters:
            parameter.data = parameter.whole.clone()

    def __exit__(self, *_):
        for parameter in self.parameters:
            parameter.data.zero_()
            parameter.data = parameter.data.new_empty(0)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}], ids=["", "recomputed in the backward"])
def test_a_head_of_zero3_is_gathered_when_it_is_needed(monkeypatch, options):
    """Empty when it comes, and again when the backward computes the logits once more. With DeepSpeed itself:
    tests/versions/deepspeed_0_19."""
    monkeypatch.setitem(
        sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=GatheredParameters))
    )
    given = whole_problem(**options)
    plain, expected = run(given)
    call = {name: x.to(device()) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    for name in HEAD:
        parameter = torch.nn.Parameter(torch.empty(0, device=device()), requires_grad=name in ("weight", "bias"))
        parameter.whole, parameter.ds_shape = call[name], call[name].shape
        call[name] = parameter
    call["hidden"].requires_grad_()
    out = linear_kto_loss(**call)
    assert torch.equal(out.loss, plain.loss) and torch.equal(out.ref_logps, plain.ref_logps)
    leaves = [call[name] for name in expected]
    for (name, theirs), grad in zip(expected.items(), torch.autograd.grad(upstream(out.loss), leaves), strict=True):
        assert torch.equal(grad, theirs) and theirs.abs().max() > 0, name


# Rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def rows_of_hidden(rank, labels_too):
    given = whole_problem()
    plain, expected = run(mine(given, rank), ("hidden",))
    part = mine(given, rank) | {name: sharded(given[name], [Shard(0)], 4) for name in ("hidden", "ref_hidden")}
    if labels_too:
        part["labels"] = sharded(given["labels"], [Shard(0)], 4)
    out, grads = run(part, ("hidden",))
    assert torch.equal(out.loss, plain.loss)
    assert isinstance(grads["hidden"], DTensor) and grads["hidden"].placements == (Shard(0),)
    assert grads["hidden"].shape == given["hidden"].shape
    assert torch.equal(grads["hidden"].to_local(), expected["hidden"]) and expected["hidden"].abs().max() > 0


@pytest.mark.parametrize("labels_too", [False, True])
def test_hidden_states_split_by_rows_are_computed_where_they_are(labels_too):
    pool().run(rows_of_hidden, labels_too)


def placed_tokens(rank):
    """Stage 1 knows no sequences: tokens may be sharded along any dimension of theirs."""
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(4, 8, 6), torch.randn(9, 6), torch.randint(9, (4, 8))
    hidden, weight, labels = (x.to(device()) for x in (hidden, weight, labels))
    logits = hidden @ weight.T
    expected = token_logps(logits, labels)
    for placement in (Shard(0), Shard(1), Replicate()):
        placed = {name: sharded(x, [placement], 4) for name, x in (("hidden", hidden), ("labels", labels))}
        got = linear_token_logps(placed["hidden"].requires_grad_(), weight, placed["labels"])
        placed["logits"] = sharded(logits, [placement], 4)
        from_logits = token_logps(placed["logits"].requires_grad_(), placed["labels"])
        for values, leaf in ((got, placed["hidden"]), (from_logits, placed["logits"])):
            assert_near("logps", DTensor.from_local(values.detach(), mesh(4), [placement]).full_tensor(), expected)
            (grad,) = torch.autograd.grad(values.sum(), leaf)
            assert grad.placements == leaf.placements
            assert grad.full_tensor().abs().max() > 0
            plain = (hidden if leaf.shape[-1] == 6 else logits).clone().requires_grad_()
            score = linear_token_logps(plain, weight, labels) if leaf.shape[-1] == 6 else token_logps(plain, labels)
            assert_near("gradient", grad.full_tensor(), *torch.autograd.grad(score.sum(), plain))


def test_tokens_with_placements_get_gradients_with_theirs():
    pool().run(placed_tokens)


def logits_in_place(rank):
    given = arguments(problem(batch=8, kl_batch=3))
    names = ("logits", "ref_logits", "labels")
    part = some_sequences(given, slice(2 * rank, 2 * rank + 2), slice(None))
    plain, expected = run(part)
    out, grads = run(part | {name: sharded(given[name], [Shard(0)], 4) for name in names}, inplace_backward=True)
    assert torch.equal(out.loss, plain.loss)
    assert torch.equal(grads["logits"].to_local(), expected["logits"]) and expected["logits"].abs().max() > 0
    leaf = sharded(given["logits"], [Shard(0)], 4).requires_grad_()
    with pytest.raises(ValueError, match="inplace_backward: the logits are a leaf"):
        token_logps(leaf, part["labels"], inplace_backward=True)


def test_logits_and_their_gradient_in_place():
    pool().run(logits_in_place)


# With a vocabulary group ──────────────────────────────────────────────────────────────────────────────────────────────


def columns_of_a_mesh(rank, placement):
    given = whole_problem()
    plain, expected = run(given)
    tp = mesh(4, names=("tp",))
    placed = {name: sharded(given[name], [Shard(0)], 4, names=("tp",)) for name in HEAD}
    placed |= {name: sharded(given[name], [placement], 4, names=("tp",)) for name in ("hidden", "ref_hidden", "labels")}
    out, grads = run(given | placed, vocab_group=tp)
    assert_near("loss", out.loss, plain.loss)
    for name, grad in grads.items():
        assert grad.placements == placed[name].placements and expected[name].abs().max() > 0
        assert_near(name, grad.full_tensor(), expected[name])
    given = arguments(problem(batch=4, kl_batch=3))
    plain, expected = run(given)
    placed = {name: sharded(x, [Shard(2)], 4, names=("tp",)) for name, x in given.items() if name.endswith("logits")}
    out, grads = run(given | placed, vocab_group=tp, inplace_backward=True)
    assert_near("loss", out.loss, plain.loss)
    assert grads["logits"].placements == (Shard(2),) and expected["logits"].abs().max() > 0
    assert_near("logits", grads["logits"].full_tensor(), expected["logits"])
    for name, wrong in (("weight", Replicate()), ("logits", Shard(0))):
        first = whole_problem() if name == "weight" else given
        with pytest.raises(
            ValueError, match=rf"{name}: along mesh dimension 'tp', its vocab_group, expected Shard\([02]\)"
        ):
            run(first | {name: sharded(first[name], [wrong], 4, names=("tp",))}, vocab_group=tp)


@pytest.mark.parametrize("placement", [Replicate(), Shard(1)], ids=["", "sequence parallel"])
def test_a_heads_rows_stay_where_they_are(placement):
    """The head's rows stay where they are; hidden states are gathered, and their gradient goes back to the tokens."""
    pool().run(columns_of_a_mesh, placement)


class HeadAlone(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)


def two_dimensions(rank):
    """Tensor parallel, and what each of its ranks has sharded by FSDP2 over the data-parallel ones."""
    grid = mesh(2, 2, names=("dp", "tp"))
    given = whole_problem(bias=False, ref=None)
    row = slice(4 * grid.get_local_rank("dp"), 4 * grid.get_local_rank("dp") + 4)
    part = some_sequences(given, row, slice(0))
    plain, expected = run(part)
    mean = expected["weight"] / 2
    dist.all_reduce(mean, group=grid.get_group("dp"))
    head = HeadAlone(distribute_tensor(given["weight"].to(device()), grid["tp"], [Shard(0)]))
    fully_shard(head, mesh=grid["dp"])
    out, grads = run(part | {"weight": head.weight}, vocab_group=grid["tp"], process_group=grid["dp"])
    assert_near("loss", out.loss, plain.loss)
    assert_near("hidden", grads["hidden"], expected["hidden"])
    assert grads["weight"].placements == head.weight.placements and grads["weight"].device_mesh.ndim == 2
    assert grads["weight"].to_local().numel() < mean.numel() / 3 and mean.abs().max() > 0
    assert_near("weight", grads["weight"].full_tensor(), mean)


def test_fsdp2_over_tensor_parallel_equals_one_process():
    pool().run(two_dimensions)


# Errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def refused(rank):
    given = {name: x.to(device()) if isinstance(x, torch.Tensor) else x for name, x in whole_problem().items()}
    part = mine(given, rank)

    def partial(tensor):
        return DTensor.from_local(tensor, mesh(4, names=("dp",)), [Partial()])

    def along(name, placement):
        return sharded(given[name], [placement], 4, names=("dp",))

    changes = {
        "hidden: along mesh dimension 'dp' expected whole rows, got S(2); redistribute": {
            "hidden": along("hidden", Shard(2))
        },
        "hidden: along mesh dimension 'dp' expected Shard or Replicate, got P(sum)": {
            "hidden": partial(part["hidden"])
        },
        "weight: along mesh dimension 'dp' expected Shard or Replicate, got P(sum)": {
            "weight": partial(part["weight"])
        },
        "desirable: expected a plain tensor, got a DTensor": {"desirable": along("desirable", Shard(0))},
        "labels: expected shape": {"hidden": along("hidden", Shard(0))} | {"labels": given["labels"]},
    }
    messages = {}
    for said, change in changes.items():
        with pytest.raises((ValueError, TypeError)) as error:
            linear_kto_loss(**part | change)
        messages[said] = str(error.value)
    logits = arguments(problem(batch=4, kl=None, ref_kl=None, ref=None, loss_type="apo_zero_unpaired"))
    logits["logits"] = sharded(logits["logits"], [Shard(2)], 4, names=("tp",))
    with pytest.raises(ValueError) as error:
        kto_loss(**logits)
    messages["logits: along mesh dimension 'tp' expected whole rows, got S(2); pass it as vocab"] = str(error.value)
    return messages


def test_other_placements_are_refused():
    for messages in pool().run(refused):
        for said, message in messages.items():
            assert message.startswith(said), message
