"""Every public function on random inputs, on every backend, against fp64: the error is at most 1.5 times what plain
PyTorch makes in that dtype and one unit in the last place (of a token, a sequence, or the largest gradient of a row).

The draws, and how the bound is read, are in `cases`. `make fuzz` draws thousands of cases where `make test` draws
hundreds.
"""

import itertools
import math

import pytest
import torch
from hypothesis import strategies as st
from torch.nn.functional import linear

from kto_kernels import (
    kl_reference_point,
    kto_loss,
    kto_loss_from_logps,
    linear_token_logps,
    reference,
    sequence_logps,
    token_logps,
)
from tests.support.cases import (
    as_promised,
    explore,
    gradient_errors,
    in_units,
    linear_cases,
    loss_cases,
    magnitudes,
    token_cases,
    unit_of,
)
from tests.support.harness import (
    DEFAULTS,
    assert_as_accurate,
    exact_token_logps,
    lengthy_places,
    plain,
    sequence_sums,
    upstream,
)
from tests.support.linear_harness import check_linear, largest_terms, linear_in_chunks


@lengthy_places
def test_token_logps_are_accurate_on_random_inputs(place, poisoned_memory):
    backend, device = place

    def measure(case):
        logits, labels, upstream = case.make(device)
        x, around = case.layout.place(logits, requires_grad=True)
        mine = token_logps(
            x, case.layout.place_labels(labels), inplace_backward=case.inplace, backend=backend, **case.options
        )
        upstream = upstream.to(mine.dtype)
        (grad,) = torch.autograd.grad(mine, x, upstream)
        assert (around() == 99).all()
        target = reference.targets(labels, case.shift, case.ignore_index)
        options = {"ignore_index": case.ignore_index, "temperature": case.temperature}
        z = logits.double().requires_grad_()
        exact = exact_token_logps(z, target, **options)
        (exact_grad,) = torch.autograd.grad(exact, z, upstream.double())
        plain = reference.token_logps(logits, target, **options)
        plain_grad = reference.token_logps_grad(logits, target, upstream, **options)
        exact = exact.detach()
        return {
            "logps": in_units(mine.detach(), plain, exact, unit_of(mine.dtype) * exact.abs()),
            "gradient": gradient_errors(grad, plain_grad, exact_grad),
        }

    explore(place, token_cases(place), as_promised(measure))


def units_of_loss(p, exact, dtype):
    """One unit of each output, and what it makes of the gradient, relative to that: token log-probabilities are rounded
    to `dtype`, so that a sequence's is off by a unit of itself, `x = β(r − z0)` by a δ that follows, and the loss
    λ·σ(−x) and its derivative by a factor of e^δ at most."""
    eps, smallest = unit_of(dtype), torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps

    def size(sums):
        return 0.0 if sums is None else sums.double().abs().nan_to_num(0.0, 0.0, 0.0)

    sums = eps * (size(exact["logps"]) + size(exact["ref_logps"]))
    kl = eps * exact["kl"].nan_to_num(0.0, 0.0, 0.0)
    kl_sides = [
        sequence_sums(p, side, p.tensors.get(f"{side}logits"), exact_token_logps) for side in ("kl_", "ref_kl_")
    ]
    if kl_sides[0] is not None and kl_sides[0].numel():
        kl = kl + eps * sum(size(side) for side in kl_sides).mean()
    options = DEFAULTS | p.options
    slack = torch.expm1(options["beta"] * (sums + kl))
    losses = reference.loss(
        reference.log_ratio(exact["logps"], exact["ref_logps"]),
        exact["kl"],
        p.desirable,
        options["beta"],
        (options["desirable_weight"], options["undesirable_weight"]),
    )
    units = {
        "loss": reference.reduce(losses * (eps + slack), options["reduction"]) + smallest,
        "logps": eps * size(exact["logps"]),
        "ref_logps": eps * size(exact["ref_logps"]),
        "rewards": options["beta"] * sums + smallest,
        "kl": kl,
    }
    return units, slack


@lengthy_places
def test_kto_loss_is_accurate_on_random_inputs(place, poisoned_memory):
    backend, device = place

    def measure(case):
        p = case.make(device)
        placed = {name: case.layout.place(t)[0] if name.endswith("logits") else t for name, t in p.tensors.items()}
        x, around = case.layout.place(p.logits, requires_grad=True)
        out = kto_loss(x, p.labels, p.desirable, **placed, **p.options, inplace_backward=case.inplace, backend=backend)
        (grad,) = torch.autograd.grad(upstream(out.loss), x)
        assert (around() == 99).all()
        assert all(torch.isfinite(torch.tensor(v)) for k, v in out.metrics().items() if k == "loss")
        wide = p.to(torch.float64, device)
        exact, exact_grad = plain(wide, exact_token_logps)
        rounded, rounded_grad = plain(p)
        unit, slack = units_of_loss(wide, exact, out.loss.dtype)
        errors = {name: in_units(getattr(out, name).detach(), rounded[name], exact[name], unit[name]) for name in exact}
        if "cu_seqlens" in p.tensors:
            slack = slack.repeat_interleave(p.tensors["cu_seqlens"].diff(), output_size=len(p.logits))
        errors["gradient"] = gradient_errors(grad, rounded_grad, exact_grad, slack)
        return errors

    explore(place, loss_cases(place), as_promised(measure))


@lengthy_places
def test_linear_kto_loss_is_accurate_on_random_inputs(place, poisoned_memory):
    def check(case):
        check_linear(case.make(), place, case.dtype, case.trained, cancelling=True, chunk_rows=case.chunk_rows)

    explore(place, linear_cases(place), check, part=0.5)


@lengthy_places
def test_linear_token_logps_are_accurate_on_random_inputs(place, poisoned_memory):
    """Both round the logits, not by the same sums: half a unit of the largest one, at random, is allowed besides."""
    backend, device = place

    def check(case):
        p = case.make().to(case.dtype, device)
        scale = {name: p.options[name] for name in ("logit_scale", "softcap", "temperature") if name in p.options}
        options = {name: p.options[name] for name in ("shift", "ignore_index") if name in p.options}
        target = reference.targets(p.labels, options.get("shift", False), options.get("ignore_index", -100))
        leaves = [p.hidden, p.weight] + ([p.tensors["bias"]] if case.arguments["bias"] else [])
        names = ["hidden", "weight", "bias"][: len(leaves)]

        def results(dtype, score):
            """Log-probabilities and gradients; the upstream one is the same for all."""
            given = [x.detach().to(dtype).requires_grad_(name in case.trained) for name, x in zip(names, leaves)]
            logps = score(given)
            upstream = torch.linspace(-1, 1, logps.numel(), dtype=torch.float64).view(logps.shape).to(logps)
            return [logps.detach(), *torch.autograd.grad(logps, [x for x in given if x.requires_grad], upstream)]

        def ours(given):
            bias = given[2] if len(given) == 3 else None
            return linear_token_logps(
                *given[:2], p.labels, bias=bias, **options, **scale, backend=backend,
                max_logits_bytes=p.options["max_logits_bytes"],
            )  # fmt: skip

        def through_logits(given):
            hidden, weight, *bias = given
            logits = linear_in_chunks(hidden, weight, *(bias or [None]), case.chunk_rows)
            return reference.token_logps(logits, target, options.get("ignore_index", -100), **scale)

        mine, rounded = results(case.dtype, ours), results(case.dtype, through_logits)
        exact = results(torch.float64, through_logits)
        eps = torch.finfo(case.dtype).eps
        logits = linear(*(x.double() for x in leaves)).requires_grad_()
        largest = logits.detach().abs().max().item() if logits.numel() else 0.0
        largest = max(1.0, largest * scale.get("logit_scale", 1.0) / scale.get("temperature", 1.0))
        assert_as_accurate("logps", mine[0], rounded[0], exact[0], eps, largest)
        logps = reference.token_logps(logits, target, options.get("ignore_index", -100), **scale)
        (logits_grad,) = torch.autograd.grad(logps.sum(), logits)
        terms = largest_terms(p.hidden, p.weight, logits_grad, 1 + largest)
        for name, *gradients in zip((n for n in names if n in case.trained), mine[1:], rounded[1:], exact[1:]):
            assert gradients[0].dtype == case.dtype
            assert_as_accurate(f"gradient of {name}", *gradients, eps, terms[name])

    explore(place, linear_cases(place), check, part=0.5)


def test_the_stages_after_the_seam_are_accurate_on_random_inputs():
    """Plain PyTorch in fp64, against sums that Python rounds once and the textbook's formula."""
    logps = st.one_of(st.just(-math.inf), st.floats(-1e4, 0, width=32), magnitudes(1e-30, 1e4).map(lambda x: -x))
    pairs = st.lists(st.tuples(logps.filter(math.isfinite), st.floats(-1e4, 0, width=32)), max_size=6)
    options = st.fixed_dictionaries(
        {"beta": magnitudes(1e-30, 1e2), "desirable_weight": st.sampled_from([0.0, 1.0, 1.7])},
        optional={"reduction": st.sampled_from(["mean", "sum", "none"])},
    )

    def check(drawn):
        tokens, average, ref, good, kl_pairs, options = drawn
        lengths = [len(sequence) for sequence in tokens]
        flat = torch.tensor([x for sequence in tokens for x in sequence], dtype=torch.float32)
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        labels = torch.zeros(len(flat), dtype=torch.int64)
        sums = sequence_logps(flat, labels=labels, cu_seqlens=offsets, average_log_prob=average)
        rounded = flat.tolist()
        expected = [
            math.fsum(rounded[a:b]) / (max(1, b - a) if average else 1) for a, b in itertools.pairwise(offsets.tolist())
        ]
        assert sums.tolist() == pytest.approx(expected, rel=1e-14)
        kl = [torch.tensor(side, dtype=torch.float64) for side in zip(*kl_pairs)]
        z0 = max(0.0, math.fsum(a - b for a, b in kl_pairs) / len(kl_pairs)) if kl_pairs else 0.0
        if kl:
            assert kl_reference_point(*kl).item() == pytest.approx(z0, rel=1e-12, abs=1e-11)
            z0 = kl_reference_point(*kl).item()
        count = len(lengths)
        ref, good = torch.tensor(ref[:count], dtype=torch.float64), torch.tensor(good[:count], dtype=torch.bool)
        out = kto_loss_from_logps(sums, good, ref_logps=ref, kl=z0, **options)
        losses = []
        for s, r, desirable in zip(sums.tolist(), ref.tolist(), good.tolist()):
            x = options["beta"] * (s - r - z0) * (1 if desirable else -1)
            weight = options["desirable_weight"] if desirable else 1.0
            losses.append(weight / (1 + math.exp(x)) if x < 700 else 0.0)
        if options.get("reduction") != "none":
            losses = math.fsum(losses) / (max(1, count) if options.get("reduction", "mean") == "mean" else 1)
        assert out.loss.tolist() == pytest.approx(losses, rel=1e-10, abs=1e-300)

    sequences = st.lists(st.lists(logps, max_size=8), max_size=5)
    side = (st.lists(st.floats(-1e4, 0), min_size=5, max_size=5), st.lists(st.booleans(), min_size=5, max_size=5))
    explore(("torch", "cpu"), st.tuples(sequences, st.booleans(), *side, pairs, options), check)
