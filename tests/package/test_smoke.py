"""The least that works under every torch that the package takes: an import, forward and backward of every public function on
every backend, and torch.compile of the functions before the seam as one graph, with shapes and numbers that change.
`make test-versions-all` runs this file under several releases of torch (tests/versions/matrix.py); `make test` keeps it
alive. How exact the results are is for the other tests."""

import inspect

import pytest
import torch

import kto_kernels
from kto_kernels import (
    KTOLoss,
    LinearKTOLoss,
    LinearPlan,
    LinearPreferenceLoss,
    PreferenceLoss,
    available_backends,
    kl_reference_point,
    kto_loss,
    kto_loss_from_logps,
    linear_kto_loss,
    linear_preference_loss,
    linear_token_logps,
    objectives,
    preference_loss,
    sequence_logps,
    token_logps,
)
from tests.support.harness import places

BATCH, KL_BATCH, VOCAB, WIDTH = 3, 2, 33, 8


def inputs(tokens: int = 5, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Arguments by the names that the functions have for them. The reference stays near the policy, and the mismatched
    completions are likelier under the policy, so that no sigmoid saturates and the KL estimate is positive."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(VOCAB, (BATCH, tokens), generator=generator)
    labels[:, 0] = -100
    kl_labels = torch.randint(VOCAB, (KL_BATCH, tokens), generator=generator)
    found = {
        "logits": normal(BATCH, tokens, VOCAB),
        "kl_logits": normal(KL_BATCH, tokens, VOCAB).scatter(-1, kl_labels.unsqueeze(-1), 1.0),
        "hidden": normal(BATCH, tokens, WIDTH),
        "weight": normal(VOCAB, WIDTH),
        "kl_hidden": normal(KL_BATCH, tokens, WIDTH),
        "logps": -normal(BATCH, tokens).abs(),
    }
    found["ref_logits"] = found["logits"] + 0.1 * normal(BATCH, tokens, VOCAB)
    found["ref_hidden"] = found["hidden"] + 0.1 * normal(BATCH, tokens, WIDTH)
    found = {name: tensor.to(device, dtype) for name, tensor in found.items()}
    # Sequence log-probabilities of the mismatched completions: the policy's are the larger ones.
    sums = {"kl_logps": torch.tensor([-5.0, -7.0]), "ref_kl_logps": torch.tensor([-9.0, -8.0])}
    labelled = {"labels": labels, "kl_labels": kl_labels, "desirable": torch.tensor([True, False, True])}
    return found | {name: tensor.to(device) for name, tensor in (sums | labelled).items()}


def pick(given: dict, *names: str) -> dict:
    return {name: given[name] for name in names}


FROM_LOGITS = ("logits", "labels", "desirable", "ref_logits", "kl_logits", "kl_labels", "ref_kl_logps")
FROM_HIDDEN = ("hidden", "weight", "labels", "desirable", "ref_hidden", "kl_hidden", "kl_labels", "ref_kl_logps")


def from_hidden(given: dict) -> dict:
    return pick(given, *FROM_HIDDEN) | {"ref_weight": given["weight"].detach()}


# Public name → the tensors that get a gradient, and a call that gives what is differentiated (or, without any, a value).
# `backend` is for the functions that have one.
CALLS = {
    "kto_loss": (("logits",), lambda g, **backend: kto_loss(**pick(g, *FROM_LOGITS), **backend).loss),
    "KTOLoss": (("logits",), lambda g, **backend: KTOLoss(beta=0.2, **backend)(**pick(g, *FROM_LOGITS)).loss),
    "linear_kto_loss": (("hidden", "weight"), lambda g, **backend: linear_kto_loss(**from_hidden(g), **backend).loss),
    "LinearKTOLoss": (
        ("hidden", "weight"),
        lambda g, **backend: LinearKTOLoss(beta=0.2, **backend)(**from_hidden(g)).loss,
    ),
    "token_logps": (("logits",), lambda g, **backend: token_logps(**pick(g, "logits", "labels"), **backend)),
    "linear_token_logps": (
        ("hidden", "weight"),
        lambda g, **backend: linear_token_logps(**pick(g, "hidden", "weight", "labels"), **backend),
    ),
    "sequence_logps": (("logps",), lambda g: sequence_logps(**pick(g, "logps", "labels"))),
    "kl_reference_point": ((), lambda g: kl_reference_point(**pick(g, "kl_logps", "ref_kl_logps"))),
    "preference_loss": (
        ("logits",),
        lambda g, **backend: (
            preference_loss(**pick(g, "logits", "labels", "desirable"), objective=objectives.BCO(), **backend).loss
        ),
    ),
    "linear_preference_loss": (
        ("hidden", "weight"),
        lambda g, **backend: (
            linear_preference_loss(
                **pick(g, "hidden", "weight", "labels", "desirable"), objective=objectives.BCO(), **backend
            ).loss
        ),
    ),
    "PreferenceLoss": (
        ("logits",),
        lambda g, **backend: (
            PreferenceLoss(objectives.BCO(), **backend)(**pick(g, "logits", "labels", "desirable")).loss
        ),
    ),
    "LinearPreferenceLoss": (
        ("hidden", "weight"),
        lambda g, **backend: (
            LinearPreferenceLoss(objectives.BCO(), **backend)(**pick(g, "hidden", "weight", "labels", "desirable")).loss
        ),
    ),
    "kto_loss_from_logps": (("logps",), lambda g: kto_loss_from_logps(g["logps"].sum(-1), g["desirable"], kl=0.3).loss),
}
# The public names that are not computed with: types, plans and what is there.
REST = {"KTOOutput", "LinearPlan", "objectives", "__version__", "available_backends"}


def run(name: str, given: dict, **backend) -> list[torch.Tensor]:
    """The value of a call and its gradients: each element of the value has an upstream gradient of its own."""
    leaves, call = CALLS[name]
    mine = given | {leaf: given[leaf].detach().clone().requires_grad_() for leaf in leaves}
    value = call(mine, **backend)
    if not leaves:
        return [value]
    upstream = torch.linspace(0.5, 2.0, value.numel(), dtype=value.dtype, device=value.device).view_as(value)
    return [value.detach(), *torch.autograd.grad(value, [mine[leaf] for leaf in leaves], upstream)]


def test_every_public_name_is_here():
    assert set(CALLS) | REST == set(kto_kernels.__all__)
    assert available_backends()["torch"] is None
    assert LinearPlan.of([7], vocab=VOCAB, hidden=WIDTH, device="cpu").flops > 0


@places
@pytest.mark.parametrize("name", CALLS)
def test_every_function_runs_forward_and_backward(name, place):
    """Every backend in fp32 against plain PyTorch in fp64."""
    backend, device = place
    target = getattr(kto_kernels, name)
    chosen = {"backend": backend} if "backend" in inspect.signature(target).parameters else {}
    expected = run(name, inputs(dtype=torch.float64), **({"backend": "torch"} if chosen else {}))
    found = run(name, inputs(device=device), **chosen)
    assert len(found) == len(expected)
    for mine, exact in zip(found, expected):
        assert exact.any()
        torch.testing.assert_close(mine.double().cpu(), exact.double(), rtol=1e-5, atol=1e-6)


# torch.compile ────────────────────────────────────────────────────────────────────────────────────────────────────────

COMPILED = ("kto_loss", "linear_kto_loss", "token_logps", "linear_token_logps")


@pytest.fixture
def fresh_compiler():
    """Each test compiles from nothing: torch.compile gives up on code that was compiled too often before."""
    torch.compiler.reset()


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", COMPILED)
def test_every_function_compiles_as_one_graph(name, dynamic, fresh_compiler):
    """With torch's own compiler, forward and backward, inside of a step that does more; lengths change."""
    leaves, call = CALLS[name]

    def step(given):
        return 2 * call(given | {leaf: given[leaf] * 1 for leaf in leaves}).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for tokens in (5, 7, 6):
        results = []
        for function in (step, compiled):
            given = inputs(tokens)
            for leaf in leaves:
                given[leaf].requires_grad_()
            value = function(given)
            results.append([value.detach(), *torch.autograd.grad(value, [given[leaf] for leaf in leaves])])
        for eager, mine in zip(*results):
            torch.testing.assert_close(mine, eager)


@pytest.mark.parametrize("option", ["beta", "kl"])
@pytest.mark.parametrize("name", ["kto_loss", "linear_kto_loss"])
def test_numbers_that_change_compile_twice_at_most(name, option, fresh_compiler):
    """As in plain PyTorch: a float is a constant in the first graph and data in the second. A graph for each value would
    be an error after eight (fullgraph=True)."""
    given, function = inputs(), getattr(kto_kernels, name)
    names = ("logits",) if name == "kto_loss" else ("hidden", "weight")
    rest = pick(given, "labels", "desirable")
    graphs = []

    def step(leaves, number):
        return function(*leaves, **rest, **({"kl": 0.3} | {option: number})).loss

    def count(graph, example):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(step, fullgraph=True, backend=count)
    for number in (0.1 + 0.05 * i for i in range(10)):
        leaves = [given[name] for name in names]
        assert torch.equal(compiled(leaves, number), step(leaves, number))
    assert len(graphs) <= 2
