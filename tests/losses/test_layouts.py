"""Any layout gives the result of the contiguous one: strides, views, shift, packing, unaligned labels."""

import itertools

import pytest
import torch

from kto_kernels import kto_loss, token_logps
from tests.support.harness import DTYPES, assert_same, dtypes, lengthy_places, ours, places, problem, upstream


def strided(tensor):
    """The same values in a wider buffer: padded vocabulary, every other token, batch and token axes swapped."""
    b, t, v = tensor.shape
    buffer = torch.full((2 * t, b, v + 5), 99.0, dtype=tensor.dtype, device=tensor.device)
    view = buffer[::2, :, :v].transpose(0, 1)
    view.copy_(tensor)
    return view


@lengthy_places
@dtypes
def test_any_leading_strides_give_the_contiguous_result(dtype, place):
    backend, device = place
    p = problem(shift=True).to(dtype, device)
    expected, expected_grad = ours(p, backend)
    p.tensors |= {name: strided(t) for name, t in p.tensors.items() if t.dim() == 3}
    p.labels = p.labels.t().contiguous().t()
    p.tensors["kl_labels"] = p.tensors["kl_labels"].repeat_interleave(2, dim=1)[:, ::2]
    x = strided(p.logits).requires_grad_()
    assert not x.is_contiguous()
    out = kto_loss(x, p.labels, p.desirable, **p.tensors, **p.options, backend=backend)
    (grad,) = torch.autograd.grad(upstream(out.loss), x)
    assert_same(place, out.loss, expected.loss)
    assert_same(place, grad, expected_grad)


@places
def test_in_place_into_a_view_leaves_the_rest_of_the_buffer_alone(place):
    backend, device = place
    p = problem().to(torch.float32, device)
    _, expected = ours(p, backend)
    base = torch.zeros(4, 7, 131 + 3, device=device).requires_grad_() * 1
    with torch.no_grad():
        base[:, :6, :131] = p.logits
    view = base[:, :6, :131]
    out = kto_loss(view, p.labels, p.desirable, **p.tensors, **p.options, inplace_backward=True, backend=backend)
    (grad,) = torch.autograd.grad(upstream(out.loss), view)
    assert grad.data_ptr() == view.data_ptr()
    assert_same(place, grad, expected)
    assert not base[:, 6:].any() and not base[:, :, 131:].any()


@places
@pytest.mark.parametrize("packed", [False, True])
def test_shift_is_slicing(packed, place):
    """`shift=True` equals `logits[:, :-1]` with `labels[:, 1:]`, and costs no copy of either."""
    backend, device = place
    p = problem(kl="number", ref_kl=None, packed=packed, shift=True).to(torch.float32, device)
    out, grad = ours(p, backend)
    logits, labels = p.logits, p.labels
    if packed:
        offsets = p.tensors["cu_seqlens"].tolist()
        for i, (begin, end) in enumerate(itertools.pairwise(offsets)):
            if end > begin:
                alone = token_logps(logits[begin : end - 1], labels[begin + 1 : end], backend=backend)
                torch.testing.assert_close(out.logps[i].item(), alone.double().sum().item())
                assert not grad[end - 1].any()
        return
    alone = token_logps(logits[:, :-1], labels[:, 1:], backend=backend)
    assert torch.equal(token_logps(logits, labels, shift=True, backend=backend)[:, :-1], alone)
    torch.testing.assert_close(out.logps, alone.double().sum(-1))
    assert not grad[:, -1].any()


@places
def test_packed_equals_padded(place):
    """The same sequences, one after the other instead of padded: the same sums and the same gradient rows."""
    backend, device = place
    lengths = [6, 0, 1, 5]
    p = problem(kl="number", ref_kl=None, shift=True).to(torch.float32, device)
    for i, length in enumerate(lengths):
        p.labels[i, length:] = -100
        p.labels[i, :length] = torch.randint(131, (length,))
    padded, padded_grad = ours(p, backend)
    keep = torch.cat([torch.arange(length) + 6 * i for i, length in enumerate(lengths)]).to(device)
    p.logits, p.labels = p.logits.flatten(0, 1)[keep], p.labels.flatten()[keep]
    p.tensors["ref_logits"] = p.tensors["ref_logits"].flatten(0, 1)[keep]
    p.tensors["cu_seqlens"] = torch.tensor([0, *lengths], device=device).cumsum(0)
    packed, packed_grad = ours(p, backend)
    assert_same(place, packed.logps, padded.logps)
    assert_same(place, packed.loss, padded.loss)
    assert_same(place, packed_grad, padded_grad.flatten(0, 1)[keep])


@places
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_unaligned_labels_give_the_contiguous_result(dtype, place):
    """`labels[..., 1:]` starts 4 or 8 bytes into its buffer."""
    backend, device = place
    logits = torch.randn(3, 6, 40, device=device)
    buffer = torch.randint(40, (3, 7), dtype=dtype, device=device)
    assert torch.equal(
        token_logps(logits, buffer[:, 1:], backend=backend), token_logps(logits, buffer[:, 1:].clone(), backend=backend)
    )


@places
@pytest.mark.parametrize("offset", [1, 3, 8])
def test_unaligned_logits_give_the_contiguous_result(offset, place):
    backend, device = place
    for dtype in DTYPES:
        buffer = torch.randn(5 * 100 + offset, device=device).to(dtype)
        logits = buffer[offset:].view(5, 100)
        labels = torch.arange(5, device=device)
        x, y = logits.requires_grad_(), logits.detach().clone().requires_grad_()
        mine, aligned = token_logps(x, labels, backend=backend), token_logps(y, labels, backend=backend)
        assert_same(place, mine, aligned)
        (gx,), (gy,) = torch.autograd.grad(mine.sum(), x), torch.autograd.grad(aligned.sum(), y)
        assert_same(place, gx, gy)
