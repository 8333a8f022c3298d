"""Weights of sequences and tokens, and clipped log-ratios (humanline), against plain PyTorch in fp64."""

import pytest
import torch
import torch.nn.functional as F

from kto_kernels import linear_preference_loss, preference_loss, reference, token_logps
from kto_kernels.objectives import BCO, CPO, DPO, IPO, KTO, ORPO, APOZero, Paired, Scored, SimPO
from tests.losses.test_preferences import name_of

B, T, V, H, K = 4, 9, 29, 8, 3
DESIRABLE = torch.tensor([True, False, False, True])
OBJECTIVES = [
    KTO(0.3, 1.2, 0.8),
    KTO(0.3, average_log_prob=True),
    BCO(0.3, reward_shift=0.1),
    DPO(0.3),
    IPO(0.3, length_normalised=True),
    SimPO(1.5),
    CPO(0.3),
    ORPO(0.3),
    APOZero(0.3, nll_weight=0.5),
]
every = pytest.mark.parametrize("objective", OBJECTIVES, ids=name_of)


class Example:
    def __init__(self):
        self.hidden, self.weight = torch.randn(B, T, H), torch.randn(V, H) / 2
        self.labels = torch.randint(V, (B, T))
        for i, prompt in enumerate((2, 1, 3, 2)):
            self.labels[i, :prompt] = -100
        self.ref_hidden = self.hidden + 0.7 * torch.randn(B, T, H)
        self.kl_hidden, self.kl_labels = torch.randn(K, T, H), torch.randint(V, (K, T))
        self.ref_kl_hidden = self.kl_hidden + torch.randn(K, T, H)
        self.token_weights, self.kl_token_weights = torch.rand(B, T), torch.rand(K, T)
        self.token_weights[:, 4] = 0

    def tokens(self, hidden, labels, weight=None):
        weight = self.weight.double() if weight is None else weight
        logps = F.log_softmax(hidden.double() @ weight.T, -1)
        return logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)


def expected(example, objective, hidden, weight, sequence_weights, weighted, humanline):
    """The loss and z0, written once more."""
    labels, scored = example.labels, example.labels != -100
    w = example.token_weights.double() * scored if weighted else scored.double()
    kw = example.kl_token_weights.double() if weighted else torch.ones(K, T)

    def sums(policy, ref, w):
        ratio = (policy - ref) if humanline is None else (policy - ref).clamp(*humanline)
        return (w * (ref + ratio)).sum(-1), (w * ref).sum(-1)

    lengths = w.sum(-1)
    policy = example.tokens(hidden, labels, weight)
    free = objective.reference_free
    ref = torch.zeros_like(policy) if free else example.tokens(example.ref_hidden, labels)
    logps, ref_logps = sums(policy, ref, w)
    point = torch.zeros((), dtype=torch.float64)
    if isinstance(objective, KTO):
        kl, ref_kl = sums(
            example.tokens(example.kl_hidden, example.kl_labels),
            example.tokens(example.ref_kl_hidden, example.kl_labels), kw
        )  # fmt: skip
        per = kw.sum(-1) if objective.average_log_prob else 1
        point = ((kl - ref_kl) / per).mean().clamp(min=0)
        if objective.average_log_prob:
            logps, ref_logps = logps / lengths, ref_logps / lengths
    everything = Scored(logps, None if free else ref_logps, lengths)
    if isinstance(objective, Paired):
        losses = objective.loss(everything.select(slice(0, 2)), everything.select(slice(2, 4)))
        liked, count = logps[:2] * sequence_weights, lengths[:2].sum()
    else:
        losses = objective.loss(everything, DESIRABLE, point)
        liked, count = (logps * sequence_weights)[DESIRABLE], lengths[DESIRABLE].sum()
    return (losses * sequence_weights).mean() - objective.nll_weight * liked.sum() / count, point


def arguments(example, objective, linear, weighted, humanline):
    made = {"humanline": humanline}
    if not isinstance(objective, Paired):
        made["desirable"] = DESIRABLE
    names = [] if objective.reference_free else ["ref"]
    if isinstance(objective, KTO):
        names += ["kl", "ref_kl"]
        made["kl_labels"] = example.kl_labels
        if weighted:
            made["kl_token_weights"] = example.kl_token_weights
    for name in names:
        hidden = getattr(example, f"{name}_hidden")
        made |= {f"{name}_hidden": hidden} if linear else {f"{name}_logits": hidden @ example.weight.T}
    if linear and not objective.reference_free:
        made["ref_weight"] = example.weight
    if weighted:
        made["token_weights"] = example.token_weights
    return made


def check(objective, head, humanline, weighted=True, rows=40, **options):
    example = Example()
    weights = torch.rand(B // 2 if isinstance(objective, Paired) else B)
    exact = example.hidden.double().requires_grad_(), example.weight.double().requires_grad_()
    loss, point = expected(example, objective, *exact, weights.double(), weighted, humanline)
    loss.backward()
    given = arguments(example, objective, head is not None, weighted, humanline) | {"sequence_weights": weights}
    if head is None:
        logits = (example.hidden @ example.weight.T).requires_grad_()
        out = preference_loss(logits, example.labels, objective, **given)
        out.loss.backward()
        grads = {"hidden": logits.grad @ example.weight}
    else:
        mine = {"hidden": example.hidden.clone().requires_grad_(), "weight": example.weight.clone()}
        mine["weight"].requires_grad_(head == "trained")
        given |= {"max_logits_bytes": rows * V * 4} | options
        out = linear_preference_loss(*mine.values(), example.labels, objective, **given)
        out.loss.backward()
        grads = {name: x.grad for name, x in mine.items() if x.requires_grad}
    torch.testing.assert_close(out.loss.detach().double(), loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.kl.double(), point, rtol=1e-4, atol=1e-5)
    for name, grad in grads.items():
        wanted = exact[name == "weight"].grad
        assert wanted.abs().max() > 1e-4
        torch.testing.assert_close(grad.double(), wanted, rtol=1e-4, atol=2e-5 * wanted.abs().max().item())
    if weighted:
        assert not grads["hidden"][:, 4].any()


@every
@pytest.mark.parametrize("head", [None, "frozen", "trained"])
def test_weights_multiply_losses_and_token_log_probabilities(objective, head):
    check(objective, head, None)


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if not o.reference_free], ids=name_of)
@pytest.mark.parametrize("head", [None, "frozen", "trained"])
@pytest.mark.parametrize("weighted", [False, True])
def test_humanline_clips_the_log_ratio_of_each_token(objective, head, weighted):
    check(objective, head, (-0.5, 0.8), weighted)


@pytest.mark.parametrize(
    "objective", [DPO(0.3), IPO(0.3, length_normalised=True), DPO(0.3, nll_weight=0.5), BCO(0.3)], ids=name_of
)
@pytest.mark.parametrize("long_sequences", ["defer", "recompute"])
@pytest.mark.parametrize("rows", [3, 5, 16])
def test_sequences_longer_than_a_chunk(objective, long_sequences, rows):
    check(objective, "trained", (-0.5, 0.8), rows=rows, long_sequences=long_sequences)


def test_weights_of_one_change_nothing_and_bounds_far_away_neither():
    example = Example()
    given = arguments(example, DPO(0.3), True, False, None)
    plain = linear_preference_loss(example.hidden, example.weight, example.labels, DPO(0.3), **given)
    given |= {"sequence_weights": torch.ones(2), "token_weights": torch.ones(B, T), "humanline": (-1e3, 1e3)}
    other = linear_preference_loss(example.hidden, example.weight, example.labels, DPO(0.3), **given)
    torch.testing.assert_close(plain.loss, other.loss)
    torch.testing.assert_close(plain.rewards, other.rewards)


@pytest.mark.parametrize("packed", [False, True])
def test_with_shift_weights_stay_with_their_labels(packed):
    example = Example()
    logits = example.hidden @ example.weight.T
    now = {"ref_token_logps": token_logps(logits * 0.9, example.labels), "token_weights": example.token_weights}
    given = {"labels": example.labels.roll(1, -1), "token_weights": example.token_weights.roll(1, -1), "shift": True}
    given["labels"][:, 0] = -100
    plain = example.labels.clone()
    plain[:, -1] = -100  # the position whose label shift has none for
    expected = preference_loss(logits, plain, DPO(0.3), **now, humanline=(-0.01, 0.02))
    if packed:
        flat = {k: v.flatten() if k != "shift" else v for k, v in given.items()}
        flat |= {"cu_seqlens": torch.arange(0, B * T + 1, T), "logits": logits.flatten(0, 1)}
        found = preference_loss(
            **flat, objective=DPO(0.3), ref_token_logps=now["ref_token_logps"].flatten(), humanline=(-0.01, 0.02)
        )
    else:
        found = preference_loss(
            logits, **given, objective=DPO(0.3), ref_token_logps=now["ref_token_logps"], humanline=(-0.01, 0.02)
        )
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.rewards, expected.rewards)


def test_token_log_probabilities_of_the_reference_are_summed_here():
    example = Example()
    logits, ref_logits = example.hidden @ example.weight.T, example.ref_hidden @ example.weight.T
    tokens = token_logps(ref_logits, example.labels)
    whole = preference_loss(logits, example.labels, DPO(0.3), ref_logits=ref_logits)
    by_token = preference_loss(logits, example.labels, DPO(0.3), ref_token_logps=tokens)
    by_sum = preference_loss(logits, example.labels, DPO(0.3), ref_logps=reference.sequence_logps(tokens))
    torch.testing.assert_close(by_token.loss, whole.loss)
    torch.testing.assert_close(by_sum.loss, whole.loss)
    noisy = torch.where(example.labels == -100, 7.0, tokens)  # of unscored tokens it does not matter
    assert preference_loss(logits, example.labels, DPO(0.3), ref_token_logps=noisy).loss == by_token.loss


@pytest.mark.parametrize("head", [None, "frozen", "trained"])
def test_weights_are_data_of_a_compiled_graph(head):
    torch.compiler.reset()
    example = Example()

    def loss(hidden, weight, token_weights, sequence_weights):
        given = {"token_weights": token_weights, "sequence_weights": sequence_weights, "humanline": (-0.5, 0.8)}
        given["ref_token_logps"] = example.tokens(example.ref_hidden, example.labels)
        if head is None:
            return preference_loss(hidden @ weight.T, example.labels, DPO(0.3), **given).loss
        return linear_preference_loss(hidden * 1, weight, example.labels, DPO(0.3), **given).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        weights, results = (torch.rand(B, T), torch.rand(2)), []
        for function in (loss, compiled):
            hidden, weight = example.hidden.clone().requires_grad_(), example.weight.clone()
            weight.requires_grad_(head != "frozen")
            value = function(hidden, weight, *weights)
            value.backward()
            results.append((value.detach(), hidden.grad, weight.grad))
        for eager, graph in zip(*results):
            torch.testing.assert_close(eager, graph)


WRONG = {
    "sequence weights of pairs": ({"sequence_weights": torch.ones(4)}, ValueError, r"sequence_weights: expected shape \(2,\)"),
    "negative": ({"sequence_weights": -torch.ones(2)}, ValueError, "sequence_weights: expected finite numbers >= 0"),
    "infinite": ({"token_weights": torch.full((B, T), torch.inf)}, ValueError, "token_weights: expected finite numbers"),
    "integers": ({"token_weights": torch.ones(B, T, dtype=torch.int64)}, TypeError, "token_weights: expected"),
    "shape": ({"token_weights": torch.ones(B)}, ValueError, "token_weights: expected shape"),
    "KL weights": ({"kl_token_weights": torch.ones(K, T)}, ValueError, "kl_token_weights: DPO has no reference point"),
    "two references": (
        {"ref_token_logps": torch.zeros(B, T), "ref_logps": torch.zeros(B)},
        ValueError,
        "ref_logps, ref_token_logps: expected one of them or neither",
    ),
    "one bound": ({"humanline": -1.0}, TypeError, "humanline: expected two numbers"),
    "bounds": ({"humanline": (1.0, -1.0)}, ValueError, "humanline: expected bounds of which the first is smaller"),
    "no tokens": ({"humanline": (-1.0, 1.5), "ref_logps": torch.zeros(B)}, ValueError, "humanline: needs the reference's tokens"),
    "no reference": ({"humanline": (-1.0, 1.5)}, ValueError, "humanline: needs the reference's tokens, in ref_logits"),
    "reference-free": ({"humanline": (-1.0, 1.5), "objective": SimPO()}, ValueError, "humanline: clips log-ratios"),
    "sums of KL": (
        {
            "humanline": (-1.0, 1.5), "objective": KTO(), "desirable": DESIRABLE, "kl_logps": torch.zeros(K),
            "ref_kl_logps": torch.zeros(K), "ref_token_logps": torch.zeros(B, T)
        },
        ValueError,
        "kl_logps: is a sum, and humanline clips tokens",
    ),
    "KL weights without labels": (
        {"objective": KTO(), "desirable": DESIRABLE, "kl": 0.1, "kl_token_weights": torch.ones(K, T)},
        ValueError,
        "kl_token_weights: goes with kl_labels",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("given", "error", "message"), WRONG.values(), ids=WRONG)
def test_bad_input_is_an_error_that_names_the_argument(given, error, message):
    example = Example()
    given = {"logits": example.hidden @ example.weight.T, "labels": example.labels, "objective": DPO()} | given
    with pytest.raises(error, match=message):
        preference_loss(**given)
