"""131,072 tokens of a 32,000-word vocabulary, whose logits would take 16.8 GB: within 1 GB. And an eighth of them."""

import pytest
import torch

from benchmarks.measure import peak_extra_bytes
from kto_kernels import LinearPlan, linear_kto_loss, reference

TOKENS, VOCAB, WIDTH = 131_072, 32_000, 64
# One inside a chunk, the others longer; a prompt of 50 in front of each is not scored.
LENGTHS = (90_000, 200, 1_000, 39_000, 872)


def _two_passes(hidden, weight, labels, rows):
    """Token log-probabilities by the definition, some rows at a time: the logits' logsumexp, then the label's logit."""
    out = []
    for h, y in zip(hidden.split(rows), labels.split(rows)):
        lse = torch.logsumexp(h @ weight.T, -1)
        out.append((h * weight[y]).sum(-1) - lse)
    return torch.cat(out)


@pytest.mark.alone
@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.wide), 8], ids=["131072 tokens", "an eighth"])
def test_131072_tokens_within_a_gigabyte(trained, parts):
    assert sum(LENGTHS) == TOKENS
    lengths = [length // parts for length in LENGTHS]
    tokens = sum(lengths)
    offsets = torch.tensor((0, *lengths)).cumsum(0)
    hidden = (0.5 * torch.randn(tokens, WIDTH)).requires_grad_()
    weight = (0.5 * torch.randn(VOCAB, WIDTH)).requires_grad_(trained)
    labels = torch.randint(VOCAB, (tokens,))
    starts = offsets[:-1]
    for start in starts.tolist():
        labels[start : start + 50] = -100
    desirable = torch.tensor([True, False, True, False, True])
    with torch.no_grad():
        scored = labels != -100
        token_logps = torch.zeros(tokens)
        token_logps[scored] = _two_passes(hidden[scored], weight, labels[scored], 1024)
        sums = reference.sequence_logps(token_logps, None, offsets)
    ref_logps = sums + torch.tensor([3.0, -2.0, 1.0, 4.0, -5.0])
    options = {"ref_logps": ref_logps, "kl": 0.5, "cu_seqlens": offsets}

    linear_kto_loss(hidden[:1024], weight, labels[:1024], desirable[:1], kl=0.5, cu_seqlens=torch.tensor([0, 1024]))
    result = {}

    def step():
        result["out"] = linear_kto_loss(hidden, weight, labels, desirable, **options)
        result["out"].loss.backward()

    peak = peak_extra_bytes(step)
    assert peak < 1e9 / parts, peak
    lengths = reference.per_sequence(scored, offsets).long().tolist()
    plan = LinearPlan.of(lengths, VOCAB, WIDTH, torch.float32, needs_weight=trained, hidden_rows=tokens, device="cpu")
    assert len(plan.deferred) == ({1: 4, 8: 2}[parts] if trained else 0)
    assert peak < 1.5 * plan.peak_bytes + 64e6  # the libraries' own buffers are small change

    out = result["out"]
    torch.testing.assert_close(out.logps, sums, rtol=1e-6, atol=0)
    z0 = torch.tensor(0.5, dtype=torch.float64)
    r = reference.log_ratio(sums, ref_logps)
    expected = reference.loss(r, z0, desirable, 0.1, (1.0, 1.0)).mean()
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-3, atol=1e-5)
    # The gradient of some rows of every sequence, and of prompts.
    slopes = reference.loss_slope(reference.log_ratio(out.logps, ref_logps), z0, desirable, 0.1, (1.0, 1.0)) / 5
    rows = torch.cat([starts, starts + 49, starts + 50, offsets[1:] - 1])
    of = torch.arange(5).repeat(4)
    logits = hidden.detach()[rows].double() @ weight.detach().double().T
    slope = torch.where(labels[rows] == -100, 0.0, slopes[of])
    exact = reference.token_logps_grad(logits, labels[rows], slope) @ weight.detach().double()
    torch.testing.assert_close(hidden.grad[rows].double(), exact, rtol=1e-3, atol=1e-9)
    assert (hidden.grad[starts] == 0).all()
    if trained:
        # The gradient of one word, over all rows.
        word = int(labels[-1])
        total = torch.zeros(WIDTH, dtype=torch.float64)
        row_slope = torch.where(scored, slopes.repeat_interleave(offsets.diff()), 0.0)
        with torch.no_grad():
            for h, y, s in zip(hidden.split(1024), labels.split(1024), row_slope.split(1024)):
                z = h @ weight.T
                p = (z[:, word] - z.logsumexp(-1)).exp().double()
                total += ((y == word).double() - p).mul(s) @ h.double()
        torch.testing.assert_close(weight.grad[word].double(), total, rtol=1e-3, atol=1e-7)
