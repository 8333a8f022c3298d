"""The operators as PyTorch sees them: opcheck, torch.compile, autograd's rules, in-place semantics."""

from dataclasses import fields

import pytest
import torch

import kto_kernels
from kto_kernels import KTOLoss, kto_loss, token_logps
from kto_kernels.ops import logits as ops
from kto_kernels.options import Objective, Scale, Scoring
from tests.support.harness import ours, places, problem, uninterpreted_places
from tests.support.operator_cases import both


@pytest.fixture
def fresh_compiler():
    """Each test compiles from nothing: torch.compile gives up on code that was compiled too often before."""
    torch.compiler.reset()


def opcheck(operator, call):
    """`torch.library.opcheck` of both kinds of an operator."""
    for each, arguments in both(operator, call):
        torch.library.opcheck(each._opoverload, arguments)


@uninterpreted_places
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck_passes_for_kto_forward(packed, reduction, place):
    p = problem(batch=3, tokens=4, vocab=17, packed=packed, reduction=reduction).to(torch.float32, place[1])
    names = [field.name for field in fields(ops.KTO)][4:13]
    opcheck(
        ops.kto_forward,
        ops.KTO(
            p.logits.clone().requires_grad_(),
            p.labels,
            p.tensors.get("cu_seqlens"),
            p.desirable,
            **{name: p.tensors.get(name) for name in names},
            scoring=Scoring(Scale(temperature=1.3), shift=True, backend=place[0]),
            objective=Objective(0.1, 1.0, 1.2, False, reduction),
            kl_value=p.options.get("kl", 0.0),
        ),
    )


@places
def test_opcheck_passes_for_token_logps_and_its_backward(place):
    backend, device = place
    logits = torch.randn(3, 4, 17, device=device, requires_grad=True)
    labels, scoring = torch.randint(17, (3, 4), device=device), Scoring(Scale(), backend=backend)
    opcheck(ops.token_logps, ops.TokenLogps(logits, labels, None, scoring))
    found = ops.token_logps(ops.TokenLogps(logits.detach(), labels, None, scoring))
    grad = torch.randn(3, 4, device=device)
    call = ops.LogitsBackward(grad, None, logits.detach(), labels, None, found.logps, found.statistics, scoring)
    opcheck(ops.logits_backward, call)
    opcheck(ops.logits_backward_, call)


@places
@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_as_one_graph(inplace, place, fresh_compiler):
    backend, device = place
    p = problem(batch=3, tokens=4, vocab=33, shift=True).to(torch.float32, device)

    def step(x, beta):
        out = kto_loss(
            x * 2, p.labels, p.desirable, **p.tensors, shift=True, beta=beta, inplace_backward=inplace, backend=backend
        )
        return out.loss, out.rewards, out.kl

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for beta in (0.1, 0.2):
        x, y = p.logits.clone().requires_grad_(), p.logits.clone().requires_grad_()
        mine, eager = compiled(x, beta), step(y, beta)
        mine[0].backward()
        eager[0].backward()
        for a, b in zip(mine, eager):
            assert torch.equal(a, b)
        assert torch.equal(x.grad, y.grad)


def test_compiles_with_inductor_and_as_a_module(fresh_compiler):
    p = problem(batch=3, tokens=4, vocab=33, kl="number", ref_kl=None).to(torch.float32)
    module = KTOLoss(shift=True, desirable_weight=1.2)
    head = torch.nn.Linear(8, 33)
    hidden = torch.randn(3, 4, 8)

    def step(h):
        return module(head(h), p.labels, p.desirable, ref_logits=p.tensors["ref_logits"], kl=0.2).loss

    eager = torch.autograd.grad(step(hidden), head.weight)[0]
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True)(hidden), head.weight)[0]
    torch.testing.assert_close(compiled, eager)


def test_dynamic_shapes_do_not_break_the_graph(fresh_compiler):
    step = torch.compile(
        lambda x, y: token_logps(x, y, shift=True).sum(), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for batch, tokens in ((2, 5), (3, 7), (4, 6)):
        x, y = torch.randn(batch, tokens, 19), torch.randint(19, (batch, tokens))
        assert torch.equal(step(x, y), token_logps(x, y, shift=True).sum())


@places
def test_differentiating_twice_is_a_clear_error(place):
    backend, device = place
    x = torch.randn(2, 3, 9, device=device, requires_grad=True)
    y = torch.randint(9, (2, 3), device=device)
    (grad,) = torch.autograd.grad(token_logps(x, y, backend=backend).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiating twice is not supported"):
        grad.sum().backward()


@places
def test_a_second_backward_works_or_is_a_clear_error(place):
    """Over the same logits it works when nothing was overwritten, and is a clear error when the gradient was."""
    backend, device = place
    p = problem().to(torch.float32, device)
    x = p.logits.clone().requires_grad_()
    out = kto_loss(x, p.labels, p.desirable, **p.tensors, backend=backend)
    first = torch.autograd.grad(out.loss, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(out.loss, x)[0], first)
    x = p.logits.clone().requires_grad_() * 1
    out = kto_loss(x, p.labels, p.desirable, **p.tensors, inplace_backward=True, backend=backend)
    torch.autograd.grad(out.loss, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace_backward=True: the logits have been overwritten"):
        torch.autograd.grad(out.loss, x)


@places
def test_in_place_allocates_nothing_of_the_vocabulary(place):
    backend, device = place
    p = problem(kl="number", ref_kl=None, ref=None).to(torch.float32, device)
    x = p.logits.clone().requires_grad_() * 1
    out = kto_loss(x, p.labels, p.desirable, **p.options, inplace_backward=True, backend=backend)
    (grad,) = torch.autograd.grad(out.loss, x)
    assert grad.data_ptr() == x.data_ptr() and grad.stride() == x.stride()


def test_another_user_of_the_logits_is_told_that_they_changed():
    """Code that saved the logits for its own backward gets PyTorch's version error, never a wrong gradient."""
    p = problem(kl="number", ref_kl=None, ref=None)
    x = p.logits.clone().requires_grad_() * 1
    other = (x**2).sum()
    out = kto_loss(x, p.labels, p.desirable, **p.options, inplace_backward=True)
    torch.autograd.grad(out.loss, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@places
def test_upstream_gradient_scales(place):
    backend, device = place
    p = problem().to(torch.float32, device)
    x = p.logits.clone().requires_grad_()
    out = kto_loss(x, p.labels, p.desirable, **p.tensors, backend=backend)
    (grad,) = torch.autograd.grad(out.loss, x, retain_graph=True)
    (scaled,) = torch.autograd.grad(out.loss, x, grad_outputs=torch.tensor(-4.0, device=device))
    assert torch.equal(scaled, -4 * grad)  # a power of two: no rounding of its own


@places
def test_no_grad_and_inference_mode(place):
    backend, device = place
    p = problem().to(torch.float32, device)
    expected, _ = ours(p, backend)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = kto_loss(p.logits, p.labels, p.desirable, **p.tensors, backend=backend)
        assert torch.equal(out.loss, expected.loss) and not out.loss.requires_grad


@places
def test_autocast_changes_nothing(place):
    backend, device = place
    p = problem().to(torch.float32, device)
    expected, _ = ours(p, backend)
    with torch.autocast(device, torch.bfloat16):
        out, _ = ours(p, backend)
    assert torch.equal(out.loss, expected.loss)


@places
def test_token_logps_feed_any_loss(place):
    """A gradient of its own for every token, through arithmetic of the user's own."""
    backend, device = place
    x = torch.randn(2, 5, 23, device=device, requires_grad=True)
    y = torch.randint(23, (2, 5), device=device)
    logps = token_logps(x, y, temperature=0.8, backend=backend)
    (grad,) = torch.autograd.grad((logps**2).sum(), x)
    z = x.detach().double().requires_grad_()
    naive = (z / 0.8).log_softmax(-1).gather(-1, y[..., None]).squeeze(-1)
    (expected,) = torch.autograd.grad((naive**2).sum(), z)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_module_equals_function():
    p = problem(packed=True, shift=True)
    options = {"beta": 0.3, "undesirable_weight": 1.4, "reduction": "sum", "temperature": 1.1, "shift": True}
    module = KTOLoss(**options)
    out = module(p.logits, p.labels, p.desirable, **p.tensors)
    assert torch.equal(out.loss, kto_loss(p.logits, p.labels, p.desirable, **p.tensors, **options).loss)
    assert "beta=0.3" in repr(module)
    assert KTOLoss.__init__.__kwdefaults__.items() <= kto_loss.__kwdefaults__.items()


def test_every_public_name_is_there():
    for name in kto_kernels.__all__:
        assert getattr(kto_kernels, name) is not None
