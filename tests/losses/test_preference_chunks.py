"""Preference losses with a trained head: gradients are formed in the forward, whatever the chunks are, at 3G."""

import dataclasses

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from kto_kernels import LinearPlan, linear_preference_loss, preference_loss
from kto_kernels.objectives import BCO, DPO, IPO, ORPO, APOZero, Paired, SimPO
from tests.losses.test_preferences import DESIRABLE, EVERY, B, Example, H, V, expected, given, name_of

every = pytest.mark.parametrize("objective", EVERY, ids=name_of)
MEMBERS = {
    "halves": (slice(0, B // 2), slice(B // 2, B)),
    "interleaved": (slice(0, B, 2), slice(1, B, 2)),
}


def leaves(example, dtype=None, trained=("hidden", "weight")):
    tensors = {name: getattr(example, name).clone() for name in ("hidden", "weight")}
    return {name: x.to(dtype or x.dtype).requires_grad_(name in trained) for name, x in tensors.items()}


@every
@pytest.mark.parametrize("rows", [2, 7, 40])
@pytest.mark.parametrize("long_sequences", ["defer", "recompute"])
def test_chunks_do_not_change_the_loss(objective, rows, long_sequences):
    for pairs, members in MEMBERS.items() if isinstance(objective, Paired) else [("halves", MEMBERS["halves"])]:
        example = Example.made()
        mine, exact = leaves(example), leaves(example, torch.float64)
        out = linear_preference_loss(
            *mine.values(), example.labels, objective, **given(objective, example), pairs=pairs,
            max_logits_bytes=rows * V * 4, long_sequences=long_sequences
        )  # fmt: skip
        loss = expected(objective, exact["hidden"] @ exact["weight"].T, example, *members).mean()
        loss.backward(), out.loss.backward()
        torch.testing.assert_close(out.loss.double(), loss.detach(), rtol=1e-5, atol=1e-6)
        for name in mine:
            scale = exact[name].grad.abs().max().item()
            assert scale > 1e-3
            torch.testing.assert_close(mine[name].grad.double(), exact[name].grad, rtol=1e-4, atol=1e-5 * scale)


@every
def test_with_gradients_from_the_forward_all_results_are_those_of_later_gradients(objective):
    """Rewards, log-probabilities and outputs are in the order given, whatever order the chunks have."""
    example = Example.made()
    more = given(objective, example) | {"max_logits_bytes": 5 * V * 4, "outputs": ("entropy", "is_top1")}
    now = linear_preference_loss(*leaves(example).values(), example.labels, objective, **more)
    later = linear_preference_loss(*leaves(example, trained=()).values(), example.labels, objective, **more)
    for field in dataclasses.fields(now):
        one, other = getattr(now, field.name), getattr(later, field.name)
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("objective", [DPO(beta=1e-4), SimPO(beta=1e-4), ORPO(beta=1e-4, nll_weight=1e-4)], ids=name_of)
def test_fp16_gradients_survive_small_coefficients(objective):
    """In fp16 products with coefficients of 1e-5, the gradients would be gone before a loss scale could save them."""
    example, scale = Example.made(dtype=torch.float16), 2.0**16
    mine, exact = leaves(example), leaves(example, torch.float64)
    more = given(objective, example) | {"max_logits_bytes": 5 * V * 2, "long_sequences": "defer"}
    out = linear_preference_loss(*mine.values(), example.labels, objective, **more)
    (out.loss * scale).backward()
    logits = exact["hidden"] @ exact["weight"].T
    (preference_loss(logits, example.labels, objective, **given(objective, example)).loss * scale).backward()
    for name in mine:
        error = (mine[name].grad.double() - exact[name].grad).norm() / exact[name].grad.norm()
        assert error < 2e-3, name


@pytest.mark.parametrize("objective", [ORPO(), SimPO(), IPO(length_normalised=True), DPO(nll_weight=1.0)], ids=name_of)
@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",)], ids=["trained head", "frozen head"])
def test_a_completion_without_a_scored_token_leaves_all_numbers_finite(objective, trained):
    for empty in ([0], [B // 2], [0, B // 2], list(range(B))):
        example = Example.made()
        example.labels[empty] = -100
        mine = leaves(example, trained=trained)
        more = given(objective, example) | {"max_logits_bytes": 4 * V * 4, "long_sequences": "defer"}
        out = linear_preference_loss(*mine.values(), example.labels, objective, **more)
        out.loss.backward()
        assert out.loss.isfinite() and all(mine[name].grad.isfinite().all() for name in trained)
        assert not mine["hidden"].grad[empty].any()
        assert len(empty) == B or mine["hidden"].grad.any()


@dataclasses.dataclass(frozen=True)
class PerToken(Paired):
    """Its slopes are not finite where no token is scored."""

    def loss(self, chosen, rejected):
        return (rejected.log_ratio / rejected.lengths - chosen.log_ratio / chosen.lengths).nan_to_num(0.0)


def test_a_slope_of_nothing_reaches_no_gradient():
    example = Example.made()
    example.labels[0] = -100
    mine = leaves(example)
    linear_preference_loss(*mine.values(), example.labels, PerToken(), ref_logps=example.ref_logps).loss.backward()
    assert mine["hidden"].grad.isfinite().all() and mine["hidden"].grad.any()


def test_compiles_with_dynamic_shapes_and_numbers():
    """In a trace numbers that are data have stand-ins, which a record would refuse as its own."""
    torch.compiler.reset()

    def loss(hidden, weight, labels, beta, smoothing):
        return linear_preference_loss(hidden * 1, weight, labels, DPO(beta, smoothing), max_logits_bytes=700).loss

    weight, compiled = torch.randn(V, H), torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for pairs, beta, smoothing in ((2, 0.1, 0.1), (3, 0.2, 0.2), (4, 0.3, 0.3)):
        hidden, labels, results = torch.randn(2 * pairs, 5, H), torch.randint(V, (2 * pairs, 5)), []
        for function in (loss, compiled):
            mine = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            value = function(*mine, labels, beta, smoothing)
            value.backward()
            results.append([value.detach(), *(x.grad for x in mine)])
        for eager, graph in zip(*results):
            torch.testing.assert_close(eager, graph)


def gemm_units(run, rows):
    """The FLOPs of all matrix products that the profiler sees, in units of one product with the head."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as profiler:
        run()
    products = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
    return sum(event.flops for event in profiler.key_averages() if event.key in products) / (2 * rows * H * V)


# (objective, rows of a chunk, long sequences) → GEMM units; two pairs of 10 + 30 and 20 + 20 scored rows
UNITS = {
    "one chunk": (DPO(), 80, "auto", 3),
    "a pair in each chunk": (DPO(), 40, "auto", 3),
    "a pair deferred": (DPO(), 25, "defer", 3),
    "a pair recomputed": (DPO(), 25, "recompute", 3 + 30 / 80),
    "two numbers, deferred": (DPO(nll_weight=1.0), 25, "defer", 3),
    "two numbers, recomputed": (ORPO(), 25, "recompute", 3 + 30 / 80),
    "means, deferred": (SimPO(), 7, "defer", 3),
    "members apart": (APOZero(), 30, "recompute", 3),
}


@pytest.mark.parametrize(("objective", "rows", "long_sequences", "units"), UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("pairs", MEMBERS)
def test_a_trained_head_costs_three_gemms(objective, rows, long_sequences, units, pairs):
    lengths = [10, 30, 20, 20] if pairs == "interleaved" else [10, 20, 30, 20]
    labels = torch.full((4, 30), -100)
    for i, length in enumerate(lengths):
        labels[i, :length] = torch.randint(V, (length,))
    hidden, weight = torch.randn(4, 30, H, requires_grad=True), torch.randn(V, H, requires_grad=True)

    def step():
        options = {"max_logits_bytes": rows * V * 4, "long_sequences": long_sequences, "pairs": pairs}
        linear_preference_loss(hidden, weight, labels, objective, **options).loss.backward()

    assert gemm_units(step, 80) == pytest.approx(units, rel=1e-6)
    hidden.requires_grad_(False), weight.requires_grad_(False)

    def without_gradients():
        return linear_preference_loss(hidden, weight, labels, objective, max_logits_bytes=rows * V * 4)

    assert gemm_units(without_gradients, 80) == pytest.approx(1, rel=1e-6)
    hidden.requires_grad_()
    assert gemm_units(lambda: without_gradients().loss.backward(), 80) == pytest.approx(2, rel=1e-6)


def plan(lengths, **options):
    return LinearPlan.of(lengths, 1000, 64, torch.float32, max_logits_bytes=100 * 1000 * 4, device="cpu", **options)


def test_the_plan_keeps_pairs_together():
    cut = plan([40, 60, 30, 50, 20, 10], pairs="margin")
    assert [(chunk.rows, chunk.sequences) for chunk in cut.chunks] == [(100, (0, 1)), (80, (1, 2)), (30, (2, 3))]
    with pytest.raises(ValueError, match="lengths: expected an even number of sequences with pairs='margin', got 3"):
        plan([1, 2, 3], pairs="margin")


def test_a_deferred_pair_takes_as_many_buffers_as_there_are_numbers_to_wait_for():
    def heads(lengths, pairs):
        deferred = plan(lengths, pairs=pairs, long_sequences="defer")
        assert deferred.gemm_units == 3
        return 1 + deferred.bytes.get("deferred weight gradient", 0) / deferred.bytes["weight gradient"]

    assert heads([300, 200], "margin") == 1  # the one that waits becomes the sum
    assert heads([300, 200], "both") == 2
    assert heads([450, 50], "both") == 1  # all rows before the last chunk are of one member
    assert heads([300, 200] * 2, "margin") == 2
    assert heads([300, 200] * 2, "both") == 3


def test_a_pair_is_deferred_where_its_buffers_cost_less_than_a_product():
    """A pass over one dW is worth 6 · balance rows, over two dW twice as many."""
    margin = plan([70, 100], pairs="margin", balance=10)
    assert margin.deferred == (
        (0, "170 rows, 70 of them before the last chunk; a pass over a second dW costs only as much as 60 rows"),
    )
    both = plan([30, 140], pairs="both", balance=10)
    assert both.recomputed == (
        (
            0,
            "170 rows, 70 of them before the last chunk; passes over two further dW, one for each member, would cost as much as 120 rows",
        ),
    )
    assert both.gemm_units == pytest.approx(3 + 70 / 170) and "  pair 0 recomputed: 170 rows" in str(both)


@dataclasses.dataclass(frozen=True)
class Mixture(Paired):
    """A weighted sum of other losses, with a field of every kind that travels."""

    parts: tuple[Paired, ...] = (DPO(0.3), APOZero(0.3))
    weights: tuple[float, ...] = (0.5, 2.0)
    cut: float | None = None
    power: int = 1
    label: str = "mixture"
    negated: bool = False

    def loss(self, chosen, rejected):
        assert self.label == "mixture" and self.cut is None and self.negated is False and type(self.power) is int
        losses = [part.loss(chosen, rejected) for part in self.parts]
        return sum(weight * loss**self.power for weight, loss in zip(self.weights, losses, strict=True))


@pytest.mark.parametrize("objective", [Mixture(), BCO(0.3, reward_shift=torch.tensor(0.4))], ids=["own", "tensor"])
def test_a_record_travels_through_a_compiled_graph_and_a_profiler(objective):
    torch.compiler.reset()
    example, results = Example.made(), []

    def loss(hidden, weight):
        more = {"desirable": DESIRABLE} if isinstance(objective, BCO) else {}
        return linear_preference_loss(
            hidden * 1, weight, example.labels, objective, ref_logps=example.ref_logps, **more, max_logits_bytes=700
        ).loss

    def profiled(hidden, weight):
        with profile(activities=[ProfilerActivity.CPU]):
            return loss(hidden, weight)

    for function in (loss, profiled, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        mine = leaves(example)
        value = function(*mine.values())
        value.backward()
        results.append([value.detach(), *(leaf.grad for leaf in mine.values())])
    for direct, *others in zip(*results):
        assert all(torch.equal(direct, other) for other in others) and direct.abs().max() > 0


def test_a_field_that_cannot_travel_is_an_error_that_names_the_record():
    @dataclasses.dataclass(frozen=True)
    class Odd(Paired):
        table: list = dataclasses.field(default_factory=lambda: [1.0])

        def loss(self, chosen, rejected):
            return self.table[0] * (rejected.log_ratio - chosen.log_ratio)

    example = Example.made()

    def loss(*head):
        return linear_preference_loss(*head, example.labels, Odd(), ref_logps=example.ref_logps).loss

    loss(*leaves(example).values()).backward()  # nothing looks at operators
    with profile(activities=[ProfilerActivity.CPU]), pytest.raises(TypeError, match=r"objective: .*, got \[1\.0\]"):
        loss(*leaves(example).values())
