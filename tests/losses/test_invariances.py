"""Nothing of this changes a result, on random problems: the order of sequences, padding, packing, the split of a batch, a
constant added to all logits, a wider dtype, the size of a chunk, the number of threads. Exactly on the CPU backends; the
GPU backends group sums by the rows' alignment, so that there another layout is equal to rounding (`assert_same`).

And what must change it exactly: scales of β, of the weights and of the temperature by powers of two.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st

from kto_kernels import kto_loss, kto_loss_from_logps, token_logps
from tests.support.cases import explore
from tests.support.harness import assert_same, lengthy_places, ours, problem
from tests.support.linear_harness import VOCAB, linear_problem, ours_linear

SEEDS = st.integers(0, 1 << 16)
SHAPES = {
    "batch": st.integers(1, 6),
    "tokens": st.integers(1, 7),
    "vocab": st.one_of(st.integers(1, 40), st.sampled_from([64, 257, 1003])),
    "shift": st.booleans(),
    "average_log_prob": st.booleans(),
    "beta": st.sampled_from([0.1, 1.0]),
    "reduction": st.just("none"),
}


def problems(**options):
    """Problems with a number for an estimate: sequences do not meet but in it."""
    drawn = st.fixed_dictionaries(SHAPES | {"seed": SEEDS, "ref": st.sampled_from(["logits", "logps", None])})

    def make(arguments):
        torch.manual_seed(arguments.pop("seed"))
        return problem(kl="number", ref_kl=None, **(arguments | options))

    return drawn.map(make)


def chosen(p, rows):
    """The problem of these sequences alone, in this order."""
    per_sequence = {name: t[rows] for name, t in p.tensors.items()}
    return replace(p, logits=p.logits[rows], labels=p.labels[rows], desirable=p.desirable[rows], tensors=per_sequence)


def results(p, place):
    """Loss, log-probability and gradient of each sequence, as if it were alone. Not its reward: a difference, which has
    more rounding than digits where the sums are near each other."""
    _, grad = ours(replace(p, options=p.options | {"reduction": "sum"}), place[0])
    each, _ = ours(p, place[0])
    return each.loss, each.logps, grad


def slack(p, place):
    """How much one unit in the last place of every log-probability changes a loss and its gradient, relative to them: of
    λσ(−x) and its derivative a factor of e^δ at most, where x = β(r − z0) is off by δ."""
    out, _ = ours(p, place[0])
    sums = out.logps.abs() + out.ref_logps.abs()
    return math.expm1(p.options["beta"] * torch.finfo(torch.float32).eps * sums.max().item())


@lengthy_places
def test_order_and_split_of_a_batch_change_nothing(place):
    def check(p):
        p = p.to(torch.float32, place[1])
        whole, allowed = results(p, place), slack(p, place)
        order = torch.randperm(len(p.labels), device=place[1])
        for mine, expected in zip(results(chosen(p, order), place), whole):
            assert_same(place, mine, expected[order], allowed)
        half = len(p.labels) // 2
        parts = [
            results(chosen(p, torch.arange(*ends, device=place[1])), place)
            for ends in ((0, half), (half, len(p.labels)))
        ]
        for first, second, expected in zip(*parts, whole):
            assert_same(place, torch.cat([first, second]), expected, allowed)

    explore(place, problems(), check, part=0.25)


@lengthy_places
def test_padding_and_packing_change_nothing(place):
    pad = torch.nn.functional.pad

    def check(p):
        p = p.to(torch.float32, place[1])
        if p.options["shift"]:
            p.labels[:, 0] = -100  # scored by nobody, padded or not
        (*values, grad), allowed = results(p, place), slack(p, place)
        logits = {name: t for name, t in p.tensors.items() if t.dim() == 3}
        wider = replace(
            p,
            logits=pad(p.logits, (0, 0, 0, 3), value=7.0),
            labels=pad(p.labels, (0, 3), value=-100),
            tensors=p.tensors | {name: pad(t, (0, 0, 0, 3)) for name, t in logits.items()},
        )
        batch, tokens = p.labels.shape
        packed = replace(
            p,
            logits=p.logits.flatten(0, 1),
            labels=p.labels.flatten(),
            tensors=p.tensors
            | {name: t.flatten(0, 1) for name, t in logits.items()}
            | {"cu_seqlens": torch.arange(batch + 1, device=place[1]) * tokens},
        )
        for mine, expected in zip(results(wider, place), [*values, pad(grad, (0, 0, 0, 3))]):
            assert_same(place, mine, expected, allowed)
        for mine, expected in zip(results(packed, place), [*values, grad.flatten(0, 1)]):
            assert_same(place, mine, expected, allowed)

    explore(place, problems(), check, part=0.25)


@lengthy_places
def test_a_constant_added_to_all_logits_changes_nothing(place):
    """Exact where the sums are: logits in steps of 1/64, and a whole number. The GPU kernels' exponents d of 2 are rounded
    once, after the constant was added, by 2^-24·|d|; |d| is at most 10 where a gradient is above the absolute tolerance
    of `assert_same`, which is 1/1000 of the relative one. So two gradients differ by log(1000)·eps."""
    exponents = math.log(1000) * torch.finfo(torch.float32).eps

    def check(drawn):
        seed, rows, vocab, constant, temperature = drawn
        torch.manual_seed(seed)
        logits = torch.randint(-500, 500, (rows, vocab), device=place[1]) / 64
        labels = torch.randint(vocab, (rows,), device=place[1])
        x, y = logits.requires_grad_(), (logits.detach() + constant).requires_grad_()
        mine, moved = (token_logps(z, labels, temperature=temperature, backend=place[0]) for z in (x, y))
        assert_same(place, moved, mine)
        (gx,), (gy,) = (torch.autograd.grad(out.sum(), z) for out, z in ((mine, x), (moved, y)))
        assert_same(place, gy, gx, exponents)

    shapes = (SEEDS, st.integers(1, 5), st.integers(1, 300), st.integers(-10_000, 10_000))
    explore(place, st.tuples(*shapes, st.sampled_from([0.5, 1.0, 2.0])), check)


@lengthy_places
def test_powers_of_two_scale_the_result_exactly(place):
    """β and log-probabilities; temperature and logits; the weights and the loss. And a wider dtype of the same numbers."""

    def check(p):
        p = replace(p.to(torch.bfloat16, place[1]), options=p.options | {"reduction": "sum"}).to(
            torch.float32, place[1]
        )
        out, grad = ours(p, place[0])
        hot = {name: 4 * t if t.dim() == 3 else t for name, t in p.tensors.items()}
        scaled = replace(p, logits=4 * p.logits, tensors=hot, options=p.options | {"temperature": 4.0})
        hotter, hotter_grad = ours(scaled, place[0])
        assert_same(place, hotter.loss, out.loss)
        # Subnormal numbers have fewer digits: a quarter of one, or eight times one, is not exact.
        subnormal = grad.abs() < 16 * torch.finfo(torch.float32).tiny
        grad, hotter_grad = (g.masked_fill(subnormal, 0.0) for g in (grad, hotter_grad))
        assert_same(place, 4 * hotter_grad, grad)
        weights = {"desirable_weight": 8.0, "undesirable_weight": 8.0}
        heavy, heavy_grad = ours(replace(p, options=p.options | weights), place[0])
        assert torch.equal(heavy.loss, 8 * out.loss)
        assert torch.equal(heavy_grad.masked_fill(subnormal, 0.0), 8 * grad)
        narrow, _ = ours(p.to(torch.bfloat16, place[1]), place[0])
        # Exactly the same numbers, but the kernels' vectors take more of the narrow ones at once: other sums.
        rounding = 4 * torch.finfo(torch.float32).eps + slack(p, place)
        torch.testing.assert_close(narrow.loss, out.loss, rtol=rounding, atol=0)
        logps = {"ref_logps": out.ref_logps, "kl": 0.5}
        once = kto_loss_from_logps(out.logps, p.desirable, beta=0.25, **logps).loss
        twice = {name: 2 * value for name, value in logps.items()}
        assert torch.equal(kto_loss_from_logps(2 * out.logps, p.desirable, beta=0.125, **twice).loss, once)

    explore(place, problems(), check, part=0.25)


@pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("hidden",)])
def test_the_size_of_a_chunk_changes_nothing(trained):
    """To the rounding of PyTorch's GEMMs, which group their sums by shape."""

    def check(drawn):
        seed, lengths, packed, chunks, long_sequences, reduction = drawn
        torch.manual_seed(seed)
        p = linear_problem(tuple(lengths), packed=packed, reduction=reduction, long_sequences=long_sequences)
        whole, grads = ours_linear(p, "cpu", trained)
        for rows in chunks:
            out, parts = ours_linear(p, "cpu", trained, max_logits_bytes=rows * VOCAB * 4)
            torch.testing.assert_close(out.logps, whole.logps, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(out.loss, whole.loss, rtol=1e-5, atol=0)
            for name in trained:
                scale = grads[name].abs().max().item()
                torch.testing.assert_close(parts[name], grads[name], rtol=0, atol=1e-5 * scale)

    lengths = st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(any)
    ways = st.sampled_from(["auto", "defer", "recompute"])
    budgets = st.lists(st.integers(1, 40), min_size=1, max_size=3)
    explore(
        ("cpu", "cpu"),
        st.tuples(SEEDS, lengths, st.booleans(), budgets, ways, st.sampled_from(["mean", "none"])),
        check,
    )


def test_the_number_of_threads_changes_no_bit():
    """Every bit, from logits; from hidden states the GEMMs are PyTorch's."""

    def check(drawn):
        p, *threads = drawn
        before = torch.get_num_threads()
        try:
            runs = []
            for count in threads:
                torch.set_num_threads(count)
                runs.append(results(p, ("cpu", "cpu")))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(mine, other) for mine, other in zip(*runs))

    explore(("cpu", "cpu"), st.tuples(problems(vocab=5003), st.just(1), st.integers(2, 9)), check)


# Ends of β ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@lengthy_places
def test_beta_near_0_and_saturated_gives_the_limits(place):
    """β → 0: half of the weight, and a gradient of β/4. Saturated: λ or what is left of it, as long as fp32 can hold it,
    and a gradient that is not zero before that."""
    smallest = torch.finfo(torch.float32).tiny

    def check(drawn):
        seed, exponent, margin, good = drawn
        torch.manual_seed(seed)
        beta = 10.0**exponent
        logits = torch.randn(1, 3, 20, device=place[1], requires_grad=True)
        labels = torch.randint(20, (1, 3), device=place[1])
        logps = token_logps(logits, labels, backend="torch").double().sum().detach()
        ref = (logps - margin / beta).reshape(1)
        desirable = torch.tensor([good], device=place[1])
        out = kto_loss(logits, labels, desirable, ref_logps=ref, kl=0.0, beta=beta, backend=place[0])
        (grad,) = torch.autograd.grad(out.loss, logits)
        # r is what the sums say, to the rounding of a token: of no effect on β·r while β is small.
        x = (1 if good else -1) * beta * (out.logps - ref)[0].item()
        x = torch.tensor(x, dtype=torch.float64)
        loss, slope = torch.sigmoid(-x).item(), beta * (torch.sigmoid(x) * torch.sigmoid(-x)).item()
        assert out.loss.item() == pytest.approx(loss, rel=3e-7, abs=2e-45)
        p = logits.detach().double().softmax(-1)
        expected = -slope * (torch.nn.functional.one_hot(labels, 20) - p) * (1 if good else -1)
        torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=smallest)
        assert grad.any() or slope < smallest

    drawn = st.tuples(SEEDS, st.floats(-30, 2), st.floats(-120, 120).map(lambda m: round(m, 1)), st.booleans())
    explore(place, drawn, check)
