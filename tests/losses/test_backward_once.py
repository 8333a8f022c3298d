"""Backwards that overwrite what their forward saved run once, and say so, whoever keeps the saved tensors: a flag of the
call tells, because version counters see nothing under saved-tensor hooks."""

import contextlib

import pytest
import torch
from torch._dynamo import compiled_autograd
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from kto_kernels import kto_loss, linear_kto_loss, linear_token_logps, token_logps

VOCAB = 33
LABELS = torch.arange(10).view(2, 5) * 3
DESIRABLE = torch.tensor([True, False])
HOOKS = {
    "none": contextlib.nullcontext,
    "save_on_cpu": save_on_cpu,
    "identity": lambda: saved_tensors_hooks(lambda x: x, lambda x: x),
    "a copy, kept": lambda: saved_tensors_hooks(lambda x: x.clone(), lambda x: x),
    "a copy, made again": lambda: saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()),
}
HANDED_OVER, OVERWRITTEN = (
    "handed over by the first backward",
    "inplace_backward=True: the logits have been overwritten",
)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()


def calls():
    """name → (loss of a leaf, the leaf, what a second backward says; None where it may run again)."""
    hidden, weight, logits = torch.randn(2, 5, 8), torch.randn(VOCAB, 8), torch.randn(2, 5, VOCAB)
    in_place = {"inplace_backward": True}
    # Each times 2, so that scaling twice shows.
    return {
        "linear_kto_loss, frozen head": (
            lambda h: linear_kto_loss(h * 1, weight, LABELS, DESIRABLE, kl=0.3).loss * 2, hidden, HANDED_OVER,
        ),
        "linear_kto_loss, trained head": (
            lambda w: linear_kto_loss(hidden, w * 1, LABELS, DESIRABLE, kl=0.3).loss * 2, weight, HANDED_OVER,
        ),
        "linear_token_logps, frozen head": (
            lambda h: linear_token_logps(h * 1, weight, LABELS).sum() * 2, hidden, HANDED_OVER,
        ),
        "kto_loss in place": (
            lambda x: kto_loss(x * 1, LABELS, DESIRABLE, kl=0.3, **in_place).loss * 2, logits, OVERWRITTEN,
        ),
        "token_logps in place": (lambda x: token_logps(x * 1, LABELS, **in_place).sum() * 2, logits, OVERWRITTEN),
        "kto_loss": (lambda x: kto_loss(x * 1, LABELS, DESIRABLE, kl=0.3).loss * 2, logits, None),
        "token_logps": (lambda x: token_logps(x * 1, LABELS).sum() * 2, logits, None),
        "linear_token_logps, trained head": (
            lambda w: linear_token_logps(hidden, w * 1, LABELS).sum() * 2, weight, None,
        ),
        "linear_kto_loss, reduction none": (
            lambda w: linear_kto_loss(hidden, w * 1, LABELS, DESIRABLE, kl=0.3, reduction="none").loss.sum() * 2,
            weight, None,
        ),
    }  # fmt: skip


ONCE = [name for name, (*_, message) in calls().items() if message is not None]


def gradient(loss, leaf):
    """The gradients of a loss whose graph stays. A copy: the gradient may be what the forward saved."""
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0].clone()


def expected(function, x):
    leaf = x.clone().requires_grad_()
    return gradient(function(leaf), leaf)


@pytest.mark.fault(4)
@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("name", calls())
def test_a_second_backward_is_right_or_an_error(name, hooks):
    function, x, message = calls()[name]
    leaf = x.clone().requires_grad_()
    with HOOKS[hooks]():
        loss = function(leaf)
    right = expected(function, x)
    assert torch.equal(gradient(loss, leaf), right) and right.abs().max() > 0
    if message is None:
        assert torch.equal(gradient(loss, leaf), right)
        return
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            gradient(loss, leaf)


@pytest.mark.parametrize("name", calls())
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(name, use_reentrant):
    """The reentrant kind calls the function again in every backward, so that each is a call's first."""
    function, x, message = calls()[name]
    leaf = x.clone().requires_grad_()
    loss = checkpoint(function, leaf, use_reentrant=use_reentrant)
    right = expected(function, x)
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, right)
    leaf.grad = None
    if message is not None and not use_reentrant:
        with pytest.raises(RuntimeError, match=message):
            loss.backward()
    else:
        loss.backward()
        assert torch.equal(leaf.grad, right)


@pytest.mark.parametrize("name", ONCE)
@pytest.mark.parametrize("hooks", ["none", "identity"])
def test_a_compiled_call_may_run_backward_again(name, hooks, fresh_compiler):
    """Its graph never overwrites what it saved."""
    function, x, _ = calls()[name]
    leaf = x.clone().requires_grad_()
    with HOOKS[hooks]():
        loss = torch.compile(function, fullgraph=True, backend="aot_eager")(leaf)
    right = expected(function, x)
    for _ in range(2):
        torch.testing.assert_close(gradient(loss, leaf), right)


@pytest.mark.parametrize("name", ONCE)
@pytest.mark.parametrize("hooks", ["none", "identity"])
def test_a_compiled_backward_runs_once(name, hooks, fresh_compiler):
    """Compiled autograd traces the backward of a call that was not compiled. Its graph is kept for the next call's."""
    function, x, _ = calls()[name]
    right = expected(function, x)

    def compiler():
        return compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager", fullgraph=True))

    for _ in range(2):
        leaf = x.clone().requires_grad_()
        with HOOKS[hooks]():
            loss = function(leaf)
        with compiler():
            loss.backward(retain_graph=True)
        torch.testing.assert_close(leaf.grad, right)
        with pytest.raises(RuntimeError), compiler():
            loss.backward()


@pytest.mark.parametrize("hooks", ["none", "a copy, kept", "a copy, made again"])
def test_logits_that_other_code_overwrites(hooks):
    """An error where PyTorch sees it. Whoever keeps a copy gets the gradient of the logits as they were."""
    leaf = torch.randn(2, 5, VOCAB, requires_grad=True)
    right = expected(lambda x: token_logps(x * 1, LABELS).sum(), leaf.detach())
    logits = leaf * 1
    with HOOKS[hooks]():
        loss = token_logps(logits, LABELS, inplace_backward=True).sum()
    with torch.no_grad():
        logits.zero_()
    if hooks == "none":
        with pytest.raises(RuntimeError, match=OVERWRITTEN):
            gradient(loss, leaf)
    else:
        assert torch.equal(gradient(loss, leaf), right)


def test_an_entropy_has_its_own_backward():
    """It makes its gradient from the logits, as often as it is asked to, and hands nothing over."""
    from kto_kernels.ops.linear import LinearTokenLogps, Projected, linear_token_logps
    from kto_kernels.options import Chunking, Scale, Scoring

    hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(VOCAB, 8)
    chunking = Chunking(outputs=("entropy",))
    side = Projected(hidden * 1, weight, None, LABELS, None, Scoring(Scale(), backend="cpu"), chunking, torch.float32)
    found = linear_token_logps(LinearTokenLogps(side, gradient=True, inplace_backward=True))
    logps, entropy = found.logps, found.entropy
    first = gradient(entropy.sum(), hidden)
    assert torch.equal(gradient(entropy.sum(), hidden), first) and first.abs().max() > 0
    gradient(logps.sum(), hidden)
    for outputs in (logps, entropy):
        with pytest.raises(RuntimeError, match=HANDED_OVER):
            gradient(outputs.sum(), hidden)


@pytest.mark.parametrize("name", calls())
def test_many_upstream_gradients_at_once_are_right_or_a_clear_error(name):
    function, x, message = calls()[name]
    leaf, upstream = x.clone().requires_grad_(), torch.tensor([1.0, -2.0])
    if message is not None:
        with pytest.raises(NotImplementedError, match=r"many at once .* are not supported"):
            torch.autograd.grad(function(leaf), leaf, upstream, is_grads_batched=True)
        return
    (found,) = torch.autograd.grad(function(leaf), leaf, upstream, is_grads_batched=True)
    torch.testing.assert_close(found, upstream.view(2, *[1] * x.dim()) * expected(function, x))
