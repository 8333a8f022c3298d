"""No gradient of a gradient is ever silently wrong: it is an error, by whichever way it is asked for. Gradients that
could be differentiated again, but are not, are right."""

import contextlib

import pytest
import torch
from torch.autograd import functional
from torch.utils._python_dispatch import TorchDispatchMode

from tests.losses.test_backward_once import calls

MESSAGE = "differentiating twice is not supported"


class Observer(TorchDispatchMode):
    """Lets every operator through. Under it, calls go through the operators."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


PATHS = {"direct": contextlib.nullcontext, "operators": Observer}


def gradient(function, leaf, **options):
    """Of a leaf that a nonlinear function stands before."""
    return torch.autograd.grad(function(leaf.tanh()), leaf, create_graph=True, **options)[0]


def penalty(function, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(gradient(function, leaf).pow(2).sum(), leaf)


def penalty_of_the_input(function, x):
    """`allow_unused` would make None of a gradient that leads nowhere."""
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(leaf), leaf, create_graph=True, retain_graph=True)
    return torch.autograd.grad(found.sum(), leaf, allow_unused=True)


def backward_twice(function, x):
    leaf = x.clone().requires_grad_()
    gradient(function, leaf).sum().backward()


def of_the_upstream_gradient(function, x):
    leaf, upstream = x.clone().requires_grad_(), torch.tensor(1.0, requires_grad=True)
    found = gradient(function, leaf, grad_outputs=upstream)
    return torch.autograd.grad(found.sum(), upstream, allow_unused=True)


WAYS = {
    "a penalty": penalty,
    "a penalty of the input": penalty_of_the_input,
    "backward": backward_twice,
    "the upstream gradient": of_the_upstream_gradient,
    "hessian": functional.hessian,
    "hvp": lambda function, x: functional.hvp(function, x, x),
    "vhp": lambda function, x: functional.vhp(function, x, x),
    "jvp": lambda function, x: functional.jvp(function, x, x),  # by differentiating twice
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", calls())
def test_differentiating_twice_is_an_error(name, path):
    function, x, _ = calls()[name]
    for way in WAYS.values():
        with PATHS[path](), pytest.raises(RuntimeError, match=MESSAGE):
            way(function, x)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", calls())
def test_first_order_gradients_may_keep_their_graph(name, path):
    """As a trainer asks for with `backward(create_graph=True)`. Such a gradient can be scaled and clipped in place."""
    function, x, _ = calls()[name]
    plain, kept = x.clone().requires_grad_(), x.clone().requires_grad_()
    with PATHS[path]():
        (expected,) = torch.autograd.grad(function(plain.tanh()), plain)
        found = gradient(function, kept)
        assert torch.equal(found, expected)
        found.mul_(0.5)
        assert torch.equal(found, expected * 0.5)
        (again,) = torch.autograd.grad(function(kept), kept, create_graph=True)
        again.mul_(0.5)
        function(kept.tanh()).backward(create_graph=True)
        plain.grad = expected
        for leaf in (plain, kept):
            torch.nn.utils.clip_grad_norm_([leaf], 1e-3)
        assert torch.equal(kept.grad, plain.grad) and kept.grad.abs().max() > 0
    kept.grad = None  # breaks the cycle of gradient and leaf
