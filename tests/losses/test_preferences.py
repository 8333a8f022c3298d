"""`preference_loss` and `linear_preference_loss`: every objective of `kto_kernels.objectives` against a formula in fp64 that
is written here once more, from the papers and TRL."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import logsigmoid, relu

from kto_kernels import (
    LinearPreferenceLoss,
    PreferenceLoss,
    kto_loss,
    linear_kto_loss,
    linear_preference_loss,
    objectives,
    preference_loss,
    reference,
)
from kto_kernels.objectives import (
    BCO,
    CPO,
    DPO,
    IPO,
    KTO,
    NCA,
    ORPO,
    APODown,
    APOZero,
    APOZeroUnpaired,
    BCOPair,
    Hinge,
    Paired,
    RewardShift,
    Scored,
    SimPO,
    SPPOHard,
    Unpaired,
)
from tests.support.harness import places, uninterpreted_places

B, T, V, H = 6, 7, 33, 8
DESIRABLE = torch.tensor([True, False, True, True, False, False])


def sig(x):
    return 1 / (1 + torch.exp(-x))


def odds(mean):
    return torch.log(torch.exp(mean) / (1 - torch.exp(mean)))


# objective → its losses, of log-ratios r, log-ratios per token m (of chosen w and rejected l), and of the KL z0.
PAIRED = {
    DPO(beta=0.3): lambda rw, rl, mw, ml: -torch.log(sig(0.3 * (rw - rl))),
    DPO(beta=0.3, length_normalised=True): lambda rw, rl, mw, ml: -torch.log(sig(0.3 * (mw - ml))),
    DPO(beta=0.3, label_smoothing=0.2): lambda rw, rl, mw, ml: (
        -0.8 * torch.log(sig(0.3 * (rw - rl))) - 0.2 * torch.log(sig(0.3 * (rl - rw)))
    ),
    DPO(beta=0.3, label_smoothing=0.2, robust=True): lambda rw, rl, mw, ml: (
        (-0.8 * torch.log(sig(0.3 * (rw - rl))) + 0.2 * torch.log(sig(0.3 * (rl - rw)))) / 0.6
    ),
    IPO(beta=0.3): lambda rw, rl, mw, ml: (rw - rl - 1 / 0.6) ** 2,
    IPO(beta=0.3, length_normalised=True): lambda rw, rl, mw, ml: (mw - ml - 1 / 0.6) ** 2,
    Hinge(beta=0.3): lambda rw, rl, mw, ml: relu(1 - 0.3 * (rw - rl)),
    APODown(beta=0.3): lambda rw, rl, mw, ml: sig(0.3 * rw) + 1 - sig(0.3 * (rw - rl)),
    APOZero(beta=0.3): lambda rw, rl, mw, ml: 1 - sig(0.3 * rw) + sig(0.3 * rl),
    NCA(beta=0.3): lambda rw, rl, mw, ml: (
        -torch.log(sig(0.3 * rw)) - torch.log(sig(-0.3 * rw)) / 2 - torch.log(sig(-0.3 * rl)) / 2
    ),
    SPPOHard(beta=0.3): lambda rw, rl, mw, ml: (rw - 1 / 0.6) ** 2 + (rl + 1 / 0.6) ** 2,
    BCOPair(beta=0.3): lambda rw, rl, mw, ml: -torch.log(sig(0.3 * rw)) - torch.log(sig(-0.3 * rl)),
    SimPO(beta=1.5, gamma=0.4): lambda rw, rl, mw, ml: -torch.log(sig(1.5 * (mw - ml) - 0.4)),
    SimPO(beta=1.5, gamma=0.4, label_smoothing=0.2): lambda rw, rl, mw, ml: (
        -0.8 * torch.log(sig(1.5 * (mw - ml) - 0.4)) - 0.2 * torch.log(sig(0.4 - 1.5 * (mw - ml)))
    ),
    CPO(beta=0.3, label_smoothing=0.2): lambda rw, rl, mw, ml: (
        -0.8 * torch.log(sig(0.3 * (rw - rl))) - 0.2 * torch.log(sig(0.3 * (rl - rw)))
    ),
    CPO(beta=0.3): lambda rw, rl, mw, ml: -torch.log(sig(0.3 * (rw - rl))),
    ORPO(beta=0.3): lambda rw, rl, mw, ml: -0.3 * torch.log(sig(odds(mw) - odds(ml))),
    DPO(beta=0.3, nll_weight=0.7): lambda rw, rl, mw, ml: -torch.log(sig(0.3 * (rw - rl))),
}
UNPAIRED = {
    KTO(0.3, 1.2, 0.8): lambda r, d, z0: torch.where(
        d, 1.2 * (1 - sig(0.3 * (r - z0))), 0.8 * (1 - sig(0.3 * (z0 - r)))
    ),
    KTO(0.3, nll_weight=0.7): lambda r, d, z0: torch.where(d, 1 - sig(0.3 * (r - z0)), 1 - sig(0.3 * (z0 - r))),
    APOZeroUnpaired(0.3): lambda r, d, z0: torch.where(d, 1 - sig(0.3 * r), sig(0.3 * r)),
    BCO(0.3, reward_shift=-0.2): lambda r, d, z0: -torch.log(sig(torch.where(d, 0.3 * r + 0.2, -0.3 * r - 0.2))),
}
EVERY = [*PAIRED, *UNPAIRED]


def name_of(objective):
    numbers = {name: value for name, value in vars(objective).items() if value != getattr(type(objective), name, None)}
    return ", ".join([type(objective).__name__, *(f"{name}={value}" for name, value in numbers.items())])


every = pytest.mark.parametrize("objective", EVERY, ids=name_of)


@dataclass
class Example:
    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    ref_logps: torch.Tensor

    @classmethod
    def made(cls, device="cpu", dtype=torch.float32):
        labels = torch.randint(V, (B, T))
        for i, prompt in enumerate((2, 1, 3, 2, 4, 1)):
            labels[i, :prompt] = -100
        hidden, weight = torch.randn(B, T, H), torch.randn(V, H) / 3
        example = cls(hidden, weight, labels, -4.0 * (labels != -100).sum(-1) + torch.randn(B))
        return cls(*(x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in vars(example).values()))

    @property
    def logits(self):
        return self.hidden @ self.weight.T


def given(objective, example):
    """The arguments that an objective takes besides."""
    arguments = {} if objective.reference_free else {"ref_logps": example.ref_logps}
    if isinstance(objective, Unpaired):
        arguments["desirable"] = DESIRABLE.to(example.labels.device)
        if objective.reference_point:
            arguments["kl"] = 0.2
    return arguments


def expected(objective, logits, example, first=slice(0, B // 2), second=slice(B // 2, B)):
    """The losses before their reduction, in fp64, differentiable; with the negative log-likelihood."""
    labels, scored = example.labels.clamp(min=0), example.labels != -100
    logps = torch.log(torch.softmax(logits.double(), -1)).gather(-1, labels[..., None])[..., 0] * scored
    sums, lengths = logps.sum(-1), scored.sum(-1)
    ratios = sums if objective.reference_free else sums - example.ref_logps.double()
    means = ratios / lengths
    if isinstance(objective, Paired):
        losses = PAIRED[objective](ratios[first], ratios[second], means[first], means[second])
        liked = torch.zeros(B, dtype=torch.bool, device=labels.device)
        liked[first] = True
    else:
        liked = DESIRABLE.to(labels.device)
        losses = UNPAIRED[objective](ratios, liked, 0.2)
    return losses - objective.nll_weight * sums[liked].sum() / lengths[liked].sum()


@every
@places
def test_every_objective_equals_its_formula(objective, place):
    backend, device = place
    example = Example.made(device)
    logits = example.logits
    x, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    out = preference_loss(x, example.labels, objective, **given(objective, example), backend=backend)
    loss = expected(objective, exact, example).mean()
    loss.backward(), out.loss.backward()
    torch.testing.assert_close(out.loss.double(), loss.detach(), rtol=1e-5, atol=1e-6)
    scale = exact.grad.abs().max().item()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=3e-6 * scale)
    assert x.grad.abs().max() > 0.1 * scale


@every
@uninterpreted_places
@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",)], ids=["trained head", "frozen head"])
def test_from_hidden_states_it_is_the_same(objective, place, trained):
    backend, device = place
    example = Example.made(device)
    leaves = {name: getattr(example, name).clone().requires_grad_(name in trained) for name in ("hidden", "weight")}
    exact = {name: getattr(example, name).double().requires_grad_(name in trained) for name in ("hidden", "weight")}
    more = given(objective, example) | {"max_logits_bytes": 4 * V * 4, "backend": backend}
    out = linear_preference_loss(leaves["hidden"], leaves["weight"], example.labels, objective, **more)
    loss = expected(objective, exact["hidden"] @ exact["weight"].T, example).mean()
    loss.backward(), out.loss.backward()
    torch.testing.assert_close(out.loss.double(), loss.detach(), rtol=1e-5, atol=1e-6)
    for name in trained:
        scale = exact[name].grad.abs().max().item()
        torch.testing.assert_close(leaves[name].grad.double(), exact[name].grad, rtol=1e-4, atol=1e-5 * scale)


@every
def test_slopes_equal_finite_differences(objective):
    """At log-probabilities for which the formulas are smooth."""
    logps = torch.tensor([-9.0, -7.5, -11.0, -8.0, -6.0, -9.5], dtype=torch.float64, requires_grad=True)
    ref_logps = None if objective.reference_free else logps.detach() + torch.tensor([0.5, -1.0, 0.3, 1.5, -0.7, -2.0])
    lengths = torch.tensor([3.0, 2.0, 4.0, 3.0, 2.0, 5.0], dtype=torch.float64)

    def losses(logps):
        scored = Scored(logps, ref_logps, lengths)
        if isinstance(objective, Paired):
            return objective.loss(scored.select(slice(0, 3)), scored.select(slice(3, 6)))
        return objective.loss(scored, DESIRABLE, torch.tensor(0.2, dtype=torch.float64))

    assert torch.autograd.gradcheck(losses, logps)
    assert torch.autograd.grad(losses(logps).sum(), logps)[0].abs().max() > 1e-3


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("apo", [False, True])
def test_ktos_own_functions_are_the_same_to_the_bit(average, apo):
    example = Example.made()
    ref_logps = example.ref_logps / (example.labels != -100).sum(-1) if average else example.ref_logps
    numbers = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.8, "average_log_prob": average}
    more = {"ref_logps": ref_logps} | ({} if apo else {"kl": 0.2})
    objective = (APOZeroUnpaired if apo else KTO)(**numbers)
    loss_type = "apo_zero_unpaired" if apo else "kto"
    heads = [(example.hidden.clone().requires_grad_(), example.weight.clone().requires_grad_()) for _ in range(4)]
    outs = [
        preference_loss(heads[0][0] @ heads[0][1].T, example.labels, objective, desirable=DESIRABLE, **more),
        kto_loss(heads[1][0] @ heads[1][1].T, example.labels, DESIRABLE, loss_type=loss_type, **numbers, **more),
        linear_preference_loss(*heads[2], example.labels, objective, desirable=DESIRABLE, **more),
        linear_kto_loss(*heads[3], example.labels, DESIRABLE, loss_type=loss_type, **numbers, **more),
    ]
    for out in outs:
        out.loss.backward()
    for (mine, mine_head), (theirs, their_head) in (zip(outs[:2], heads[:2]), zip(outs[2:], heads[2:])):
        for name in ("loss", "logps", "ref_logps", "rewards", "kl", "desirable"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(mine_head, their_head))


def test_interleaved_pairs_are_the_same_pairs():
    example, order = Example.made(), torch.tensor([0, 3, 1, 4, 2, 5])
    halves = preference_loss(example.logits, example.labels, DPO(), ref_logps=example.ref_logps, reduction="none")
    mixed = preference_loss(
        example.logits[order], example.labels[order], DPO(), ref_logps=example.ref_logps[order], pairs="interleaved",
        reduction="none"
    )  # fmt: skip
    assert torch.equal(halves.loss, mixed.loss) and torch.equal(mixed.desirable, torch.tensor([True, False] * 3))
    assert halves.loss.shape == (B // 2,)
    assert torch.equal(halves.rewards[order], mixed.rewards)
    assert halves.metrics()["loss"] == pytest.approx(halves.loss.mean().item())


def test_packed_and_shifted_sequences_are_the_same():
    example, objective = Example.made(), ORPO(beta=0.3)
    padded = preference_loss(example.logits, example.labels, objective)
    offsets = torch.arange(0, B * T + 1, T)
    flat = example.logits.flatten(0, 1), example.labels.flatten()
    packed = preference_loss(*flat, objective, cu_seqlens=offsets)
    shifted = example.labels.roll(1, -1)  # a prompt's first label becomes a sequence's last one
    one_on = preference_loss(example.logits, shifted, objective, shift=True)
    torch.testing.assert_close(packed.loss, padded.loss)
    cut = example.labels.clone()
    cut[:, -1] = -100
    torch.testing.assert_close(one_on.loss, preference_loss(example.logits, cut, objective).loss)


def test_reductions():
    example = Example.made()
    none, mean, total = (
        preference_loss(example.logits, example.labels, CPO(), reduction=reduction).loss
        for reduction in ("none", "mean", "sum")
    )
    torch.testing.assert_close(none.mean(), mean)
    torch.testing.assert_close(none.sum(), total)


def test_an_empty_batch_has_the_loss_0():
    logits = torch.zeros(0, T, V, requires_grad=True)
    out = preference_loss(logits, torch.zeros(0, T, dtype=torch.int64), ORPO())
    out.loss.backward()
    assert out.loss == 0 and logits.grad.shape == logits.shape and out.metrics() == {"loss": 0.0, "kl": 0.0}


def test_a_reference_given_as_logits_or_hidden_states():
    example, other = Example.made(), Example.made()
    other.labels = example.labels
    of_logits = preference_loss(example.logits, example.labels, DPO(), ref_logits=other.logits)
    sums = reference.sequence_logps(reference.token_logps(other.logits.double(), example.labels))
    given = preference_loss(example.logits, example.labels, DPO(), ref_logps=sums)
    torch.testing.assert_close(of_logits.loss, given.loss)
    of_hidden = linear_preference_loss(
        example.hidden, example.weight, example.labels, DPO(), ref_hidden=other.hidden, ref_weight=other.weight,
        outputs=("entropy",)
    )  # fmt: skip
    torch.testing.assert_close(of_hidden.loss, given.loss)
    assert of_hidden.entropy.shape == example.labels.shape


@pytest.mark.parametrize("objective", [DPO(), ORPO(), SimPO(), KTO(nll_weight=0.5), BCO()], ids=name_of)
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "hidden states"])
def test_compiles_as_one_graph(objective, linear):
    torch.compiler.reset()
    example = Example.made()

    def loss(hidden, weight):
        if linear:
            return linear_preference_loss(
                hidden * 1, weight, example.labels, objective, **given(objective, example)
            ).loss
        return preference_loss(hidden @ weight.T, example.labels, objective, **given(objective, example)).loss

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (example.hidden, example.weight)]
        value = function(*leaves)
        value.backward()
        results.append([value.detach(), *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results):
        torch.testing.assert_close(eager, compiled)


@dataclass(frozen=True)
class Margin(Paired):
    margin: float = 1.0

    def loss(self, chosen, rejected):
        return relu(self.margin - (chosen.log_ratio - rejected.log_ratio))


def test_a_loss_of_ones_own():
    example = Example.made()
    logits = example.logits.requires_grad_()
    out = preference_loss(logits, example.labels, Margin(40.0), ref_logps=example.ref_logps)
    (grad,) = torch.autograd.grad(out.loss, logits)
    x = example.logits.double().detach().requires_grad_()
    sums = reference.sequence_logps(reference.token_logps(x, example.labels)) - example.ref_logps.double()
    loss = relu(40 - (sums[:3] - sums[3:])).mean()
    torch.testing.assert_close(out.loss.double(), loss.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), torch.autograd.grad(loss, x)[0], rtol=1e-4, atol=1e-6)
    assert torch.equal(out.rewards, (out.logps - out.ref_logps).float())
    with pytest.raises(NotImplementedError, match=r"Paired defines no loss\(chosen, rejected\)"):
        preference_loss(logits, example.labels, Paired())


def test_saturated_losses_keep_their_gradients():
    """At margins whose sigmoid is 1 in fp32."""
    for objective, slope in ((DPO(beta=1.0), -math.exp(-50.0)), (APOZero(beta=1.0), -math.exp(-50.0))):
        logps = torch.tensor([50.0], dtype=torch.float64, requires_grad=True)
        zero = torch.zeros(1, dtype=torch.float64)
        one = torch.ones(1, dtype=torch.float64)
        objective.loss(Scored(logps, zero, one), Scored(zero, zero, one)).sum().backward()
        assert logps.grad.item() == pytest.approx(slope, rel=1e-6)


def test_the_reward_shift_is_the_mean_of_all_rewards_so_far():
    shift = RewardShift()
    assert shift.value == 0
    shift.update(torch.tensor([1.0, 2.0]))
    shift.update(torch.tensor([6.0]))
    assert shift.value == 3
    other = RewardShift()
    other.load_state_dict(shift.state_dict())
    assert other.value == 3
    example = Example.made()
    out = preference_loss(
        example.logits,
        example.labels,
        BCO(0.3, reward_shift=shift.value),
        ref_logps=example.ref_logps,
        desirable=DESIRABLE,
    )
    x = 0.3 * (out.logps - out.ref_logps) - 3
    torch.testing.assert_close(
        out.loss.double(), -logsigmoid(torch.where(DESIRABLE, x, -x)).mean(), rtol=1e-6, atol=1e-6
    )


LOGITS, LABELS, REF = torch.zeros(4, 3, 5), torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4)
WRONG = {
    "no record": ("dpo", {}, TypeError, "objective: expected a record of kto_kernels.objectives, got str"),
    "a class": (DPO, {}, TypeError, "objective: expected a record of kto_kernels.objectives, got type"),
    "pairs": (DPO(), {"pairs": "thirds"}, ValueError, "pairs: expected one of 'halves', 'interleaved'"),
    "desirable with pairs": (DPO(), {"desirable": REF > 0}, ValueError, "desirable: DPO compares pairs"),
    "no desirable": (BCO(), {}, ValueError, "desirable: needed with BCO"),
    "odd": (DPO(), {"labels": LABELS[:3], "logits": LOGITS[:3]}, ValueError, "labels: expected an even number"),
    "reference": (SimPO(), {"ref_logps": REF}, ValueError, "ref_logps: SimPO is reference-free"),
    "reference logits": (ORPO(), {"ref_logits": LOGITS}, ValueError, "ref_logits: ORPO is reference-free"),
    "KL": (DPO(), {"kl": 0.1}, ValueError, "kl: DPO has no reference point"),
    "KL logps": (
        APOZeroUnpaired(),
        {"kl_logps": REF, "desirable": REF > 0},
        ValueError,
        "kl_logps: APOZeroUnpaired has no",
    ),
    "no KL": (KTO(), {"desirable": REF > 0}, ValueError, "kl: loss_type='kto' needs a KL source"),
    "labels": (DPO(), {"labels": [0]}, TypeError, "labels: expected a tensor, got list"),
    "logits": (DPO(), {"logits": None}, TypeError, "logits: expected a tensor, got NoneType"),
    "reduction": (DPO(), {"reduction": "max"}, ValueError, "reduction: expected one of"),
}


@pytest.mark.parametrize(("objective", "arguments", "error", "message"), WRONG.values(), ids=WRONG)
def test_bad_input_is_an_error_that_names_the_argument(objective, arguments, error, message):
    arguments = {"logits": LOGITS, "labels": LABELS} | arguments
    with pytest.raises(error, match=message):
        preference_loss(objective=objective, **arguments)
    if "ref_logits" not in arguments:
        hidden = arguments.pop("logits")
        with pytest.raises(error, match=message.replace("logits", "hidden")):
            linear_preference_loss(hidden, torch.zeros(7, 5), objective=objective, **arguments)


def test_modules_check_their_options_and_equal_their_functions():
    example = Example.made()
    given = {"ref_logps": example.ref_logps}
    module, linear = PreferenceLoss(DPO(0.3)), LinearPreferenceLoss(DPO(0.3), pairs="interleaved")
    assert (
        module(example.logits, example.labels, **given).loss
        == preference_loss(example.logits, example.labels, DPO(0.3), **given).loss
    )
    assert (
        linear(example.hidden, example.weight, example.labels, **given).loss
        == linear_preference_loss(
            example.hidden, example.weight, example.labels, DPO(0.3), pairs="interleaved", **given
        ).loss
    )
    for made, error, message in (
        (lambda: PreferenceLoss("dpo"), TypeError, "objective: expected a record"),
        (lambda: LinearPreferenceLoss(DPO(), pairs="thirds"), ValueError, "pairs: expected one of"),
        (lambda: PreferenceLoss(SimPO(), humanline=(-1.0, 1.5)), ValueError, "humanline: clips log-ratios"),
        (lambda: PreferenceLoss(DPO(), reduction="max"), ValueError, "reduction: expected one of"),
    ):
        with pytest.raises(error, match=message):
            made()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DPO(beta=0.0), ValueError, "beta: expected a finite number > 0, got 0"),
        (lambda: DPO(beta="1"), TypeError, "beta: expected a number, got str"),
        (lambda: DPO(label_smoothing=0.5), ValueError, "label_smoothing: expected a number >= 0 and < 0.5"),
        (lambda: SimPO(label_smoothing=0.5), ValueError, "label_smoothing: expected a number >= 0 and < 0.5"),
        (lambda: CPO(label_smoothing=-0.1), ValueError, "label_smoothing: expected a finite number >= 0"),
        (lambda: DPO(robust=1), TypeError, "robust: expected True or False"),
        (lambda: SimPO(gamma=-1.0), ValueError, "gamma: expected a finite number >= 0"),
        (lambda: CPO(nll_weight=-1.0), ValueError, "nll_weight: expected a finite number >= 0"),
        (lambda: BCO(reward_shift=math.nan), ValueError, "reward_shift: expected a finite number"),
        (lambda: BCO(reward_shift=torch.zeros(2)), ValueError, r"reward_shift: expected shape \(\)"),
    ],
)
def test_bad_numbers_are_errors_when_the_record_is_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_module_has_every_objective():
    records = {x for x in vars(objectives).values() if isinstance(x, type) and issubclass(x, (Paired, Unpaired))}
    assert records - {Paired, Unpaired} == {type(objective) for objective in EVERY}
