"""Tensors whose memory does not hold their values (wrappers, lazy negations, lazy zeros) are told from plain ones, in
every argument and as upstream gradients: such a call goes through the operators, where PyTorch makes them plain."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from kto_kernels import kto_loss, linear_kto_loss, linear_token_logps, token_logps

torch.manual_seed(0)
LOGITS, HIDDEN, WEIGHT = torch.randn(3, 3, 5, 11), torch.randn(3, 3, 5, 7), torch.randn(11, 7)
LABELS, DESIRABLE = torch.randint(11, (3, 5)), torch.tensor([True, False, True])
LOGPS, OFFSETS = torch.randn(3, 3) - 5, torch.tensor([0, 2, 9, 15])
JUDGED = {"labels": LABELS, "desirable": DESIRABLE}
KL = {"kl": torch.tensor(0.3)}
FLAT = {"logits": LOGITS[0].flatten(0, 1), "labels": LABELS.flatten(), "cu_seqlens": OFFSETS}
KL_LOGITS = {"kl_logits": LOGITS[1], "ref_kl_logits": LOGITS[2], "kl_labels": LABELS}
KL_HIDDEN = {"kl_hidden": HIDDEN[1], "ref_kl_hidden": HIDDEN[2], "kl_labels": LABELS}
HEAD = {"weight": WEIGHT, "bias": torch.randn(11)}
REFERENCE = {"ref_hidden": HIDDEN[2], "ref_weight": WEIGHT * 0.9, "ref_bias": torch.randn(11)}

# name → (function, its tensors)
CALLS = {
    "kto_loss": (kto_loss, {"logits": LOGITS[0], "ref_logits": LOGITS[1], **JUDGED, **KL_LOGITS}),
    "kto_loss, packed": (
        kto_loss,
        {**FLAT, "desirable": DESIRABLE}
        | {"ref_logps": LOGPS[0], "kl_logits": LOGITS[1].flatten(0, 1), "ref_kl_logps": LOGPS[2]}
        | {"kl_labels": LABELS.flatten(), "kl_cu_seqlens": OFFSETS},
    ),
    "kto_loss, kl": (kto_loss, {"logits": LOGITS[0], "ref_logps": LOGPS[0], **JUDGED, **KL}),
    "kto_loss, kl_logps": (
        kto_loss,
        {"logits": LOGITS[0], "ref_logps": LOGPS[0], **JUDGED, "kl_logps": LOGPS[1], "ref_kl_logps": LOGPS[2]},
    ),
    "token_logps": (token_logps, {"logits": LOGITS[0], "labels": LABELS}),
    "linear_kto_loss": (linear_kto_loss, {"hidden": HIDDEN[0], **HEAD, **REFERENCE, **JUDGED, **KL_HIDDEN}),
    "linear_kto_loss, kl": (linear_kto_loss, {"hidden": HIDDEN[0], **HEAD, "ref_logps": LOGPS[0], **JUDGED, **KL}),
    "linear_token_logps": (linear_token_logps, {"hidden": HIDDEN[0], **HEAD, "labels": LABELS}),
}
TRAINED = ("logits", "hidden", "weight")


def lazily_negative(x):
    """The same values; the memory holds their negatives."""
    return x.logical_not().logical_not() if x.dtype == torch.bool else torch._neg_view(-x)


def lazily_zero(x):
    return torch._efficientzerotensor(x.shape, dtype=x.dtype)


def result(function, tensors, trained=()):
    """The loss, or the sum of the log-probabilities, and the gradients of the tensors named."""
    leaves = {name: tensors[name].detach().requires_grad_() for name in trained}
    found = function(**(tensors | leaves))
    loss = found.sum() if isinstance(found, torch.Tensor) else found.loss
    gradients = torch.autograd.grad(loss, list(leaves.values())) if leaves else ()
    return [x.a if isinstance(x, TwoTensor) else x for x in (loss.detach(), *gradients)]


@pytest.mark.parametrize("kind", [lambda x: TwoTensor(x, x), lazily_negative], ids=["TwoTensor", "lazily negative"])
@pytest.mark.parametrize("name", CALLS)
def test_every_argument_may_be_of_another_kind(name, kind):
    function, tensors = CALLS[name]
    trained = [each for each in TRAINED if each in tensors]
    for gradients_of in ((), trained):
        expected = result(function, tensors, gradients_of)
        for argument, tensor in tensors.items():
            found = result(function, tensors | {argument: kind(tensor)}, gradients_of)
            for mine, plain in zip(found, expected, strict=True):
                assert torch.equal(mine, plain), argument


@pytest.mark.parametrize("name", CALLS)
def test_every_argument_may_be_lazily_zero(name):
    function, tensors = CALLS[name]
    for argument, tensor in tensors.items():
        if tensor.is_floating_point():
            expected = result(function, tensors | {argument: torch.zeros_like(tensor)})
            assert torch.equal(*result(function, tensors | {argument: lazily_zero(tensor)}), *expected), argument


@pytest.mark.parametrize("kind", [lazily_negative, lazily_zero])
@pytest.mark.parametrize("name", CALLS)
def test_upstream_gradients_may_be_lazy(name, kind):
    function, tensors = CALLS[name]
    for trained in (name for name in TRAINED if name in tensors):
        gradients = []
        for of_kind in (lambda x: x, kind):
            leaf = tensors[trained].detach().requires_grad_()
            found = function(**(tensors | {trained: leaf}))
            found = found if isinstance(found, torch.Tensor) else found.loss
            upstream = torch.linspace(-1, 2, found.numel()).view(found.shape) * (kind is not lazily_zero)
            gradients += torch.autograd.grad(found, leaf, of_kind(upstream))
        assert torch.equal(*gradients), trained


@pytest.mark.parametrize("name", CALLS)
def test_every_argument_may_be_mapped_over(name):
    """By `vmap`, whose tensors have no memory."""
    function, tensors = CALLS[name]
    (expected,) = result(function, tensors)
    for argument, tensor in tensors.items():
        mapped = torch.vmap(lambda x, name=argument: result(function, tensors | {name: x})[0])(
            torch.stack([tensor, tensor])
        )
        torch.testing.assert_close(mapped, torch.stack([expected, expected]), msg=argument)


def test_labels_of_another_kind_may_come_with_their_lengths():
    function, tensors = CALLS["linear_kto_loss, kl"]
    labels = TwoTensor(LABELS, LABELS)
    (expected,) = result(function, tensors)
    assert torch.equal(*result(function, tensors | {"labels": labels, "scored_lengths": [5, 5, 5]}), expected)
    with pytest.raises(ValueError, match=r"^scored_lengths: expected"):
        result(function, tensors | {"labels": labels, "scored_lengths": [5, 5, 4]})
    lengths = torch.tensor([5, 5, 5])
    with pytest.raises(TypeError, match=r"^scored_lengths: expected ints, or a plain tensor"):
        result(function, tensors | {"scored_lengths": TwoTensor(lengths, lengths)})


def test_fake_tensors_need_no_mode_around_the_call():
    with FakeTensorMode():
        hidden, weight = torch.randn(3, 5, 7), torch.randn(11, 7, requires_grad=True)
        labels, desirable = torch.zeros(3, 5, dtype=torch.long), torch.ones(3, dtype=torch.bool)
    assert linear_kto_loss(hidden, weight, labels, desirable, kl=0.1).loss.shape == ()
    assert kto_loss(hidden, labels, desirable, kl=0.1).loss.shape == ()


@pytest.mark.parametrize("name", ["ref_logps", "kl", "kl_logps", "ref_kl_logps"])
def test_functional_gradients_of_given_numbers_are_a_clear_error(name):
    function, tensors = CALLS["kto_loss, kl" if name == "kl" else "kto_loss, kl_logps"]
    with pytest.raises(NotImplementedError, match=f"^{name}: torch.func.grad"):
        torch.func.grad(lambda x: function(**(tensors | {name: x})).loss)(tensors[name])
