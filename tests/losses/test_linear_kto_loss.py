"""`linear_kto_loss` and `linear_token_logps` are the loss of materialised logits: values, gradients, chunks, layouts."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear

from kto_kernels import LinearKTOLoss, kto_loss, linear_kto_loss, linear_token_logps, reference, token_logps
from kto_kernels.ops import linear as operators
from kto_kernels.options import OUTPUTS, Chunking, Scale, Scoring
from tests.support.harness import PLACES, dtypes, lengthy_places, places, uninterpreted_places, upstream
from tests.support.linear_harness import HEAD, VOCAB, WIDTH, check_linear, linear_problem, ours_linear, plain_linear

# Rows of a chunk: one, fewer than, exactly and more than the longest sequence (9), everything.
BUDGETS = {"one row": 1, "four rows": 4, "8": 8, "longest": 9, "10": 10, "everything": 1000}
ON_CPU = [pytest.param(p.values[0], id=p.id, marks=p.marks) for p in PLACES if p.values[0][0] in ("cpu", "torch")]


def budget(rows: int, dtype: torch.dtype = torch.float32) -> int:
    return rows * VOCAB * dtype.itemsize


# Every option away from its default, alone or with those that it meets.
CASES = {
    "default": {"kl": "number"},
    "reference-free": {"ref": None, "kl": "hidden"},
    "ref and kl": {},
    "packed": {"packed": True},
    "packed, shifted, int64": {"packed": True, "shift": True, "offset_dtype": torch.int64},
    "shift": {"shift": True},
    "ref logps, kl hidden": {"ref": "logps"},
    "kl logps": {"kl": "logps"},
    "kl tensor": {"kl": "tensor"},
    "no bias": {"bias": False},
    "one width": {"ref_width": WIDTH},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "average": {"average_log_prob": True},
    "average, packed, none": {"average_log_prob": True, "packed": True, "reduction": "none"},
    "weights and beta": {"desirable_weight": 1.3, "undesirable_weight": 0.4, "beta": 0.25},
    "apo": {"loss_type": "apo_zero_unpaired", "kl": None},
    "temperature": {"temperature": 1.7},
    "logit scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 4.0},
    "all scales": {"logit_scale": 0.5, "softcap": 6.0, "temperature": 0.6},
    "ignore_index": {"ignore_index": -1},
    "recompute": {"long_sequences": "recompute"},
    "defer": {"long_sequences": "defer"},
}


@places
@dtypes
@pytest.mark.parametrize("case", CASES)
def test_equals_the_loss_of_materialised_logits(place, dtype, case):
    check_linear(linear_problem(**CASES[case], max_logits_bytes=budget(4, dtype)), place, dtype)


@pytest.mark.parametrize("place", ON_CPU)
@pytest.mark.parametrize("long_sequences", ["defer", "recompute", "auto"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("rows", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize(
    "trained", [HEAD, ("hidden",), ("weight",), ("bias",), ("hidden", "weight"), ("hidden", "bias")]
)
def test_chunks_and_what_is_trained(place, long_sequences, reduction, rows, trained):
    p = linear_problem((6, 3, 9, 0, 12), reduction=reduction, long_sequences=long_sequences)
    check_linear(p, place, torch.float32, trained, max_logits_bytes=budget(rows))


@pytest.mark.parametrize("place", ON_CPU)
def test_without_a_scored_token_or_a_row_or_a_sequence(place):
    for lengths in ((0, 0), (0,)):
        p = linear_problem(lengths)
        out, grads = ours_linear(p, place[0])
        assert all((grad == 0).all() and grad.shape for grad in grads.values())
        torch.testing.assert_close(out.loss.double(), plain_linear(p)[0]["loss"].double())
    for trained in (HEAD, ("hidden",)):
        p = linear_problem((3,), kl="number", ref=None)
        p.hidden, p.labels, p.desirable = p.hidden[:0], p.labels[:0], p.desirable[:0]
        out, grads = ours_linear(p, place[0], trained)
        assert out.loss == 0 and out.logps.shape == (0,)
        assert all((grad == 0).all() for grad in grads.values())


def test_fp64_equals_the_oracle():
    check_linear(linear_problem(max_logits_bytes=8 * VOCAB * 4), ("torch", "cpu"), torch.float64)


@places
def test_the_same_inputs_give_the_same_bits(place):
    p = linear_problem(max_logits_bytes=budget(4)).to(torch.float32, place[1])
    runs = [ours_linear(p, place[0]) for _ in range(2)]
    assert torch.equal(runs[0][0].loss, runs[1][0].loss)
    for name in HEAD:
        assert torch.equal(runs[0][1][name], runs[1][1][name])


# Layouts ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("trained", [HEAD, ("hidden",)])
def test_strided_hidden_states_give_the_contiguous_result(trained):
    p = linear_problem(max_logits_bytes=budget(4))
    expected, grads = ours_linear(p, "cpu", trained)
    tokens = p.hidden.shape[1]
    wide = torch.randn(len(p.hidden), tokens + 1, WIDTH)
    wide[:, :-1] = p.hidden
    views = {
        "a slice of tokens": wide[:, :-1],
        "transposed": p.hidden.transpose(0, 1).contiguous().transpose(0, 1),
        "a slice of features": torch.cat([p.hidden, p.hidden], -1)[..., :WIDTH],
        "features first": p.hidden.transpose(1, 2).contiguous().transpose(1, 2),
    }
    for name, view in views.items():
        assert not view.is_contiguous(), name
        p.hidden = view
        out, its_grads = ours_linear(p, "cpu", trained)
        assert torch.equal(out.loss, expected.loss), name
        for key, grad in its_grads.items():
            assert torch.equal(grad, grads[key]), (name, key)


def test_padding_and_packing_give_the_same():
    p = linear_problem(kl="number", ref=None, max_logits_bytes=budget(4))
    lengths = torch.tensor([8, 5, 11, 2, 3])  # with the prompts
    kept = torch.arange(p.labels.shape[1]) < lengths.unsqueeze(-1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    packed = replace(p, hidden=p.hidden[kept], labels=p.labels[kept], tensors=p.tensors | {"cu_seqlens": offsets})
    assert (p.labels[~kept] == -100).all()
    (out, grads), (other, other_grads) = (ours_linear(x, "cpu") for x in (p, packed))
    assert torch.equal(out.loss, other.loss) and torch.equal(out.logps, other.logps)
    assert torch.equal(grads["weight"], other_grads["weight"])
    assert torch.equal(grads["hidden"][kept], other_grads["hidden"])


def test_the_reference_may_use_the_policys_own_head():
    p = linear_problem(ref_width=WIDTH, bias=False, kl="number")
    weight = p.weight.clone().requires_grad_()
    p.tensors["ref_weight"] = p.weight
    separate, grads = ours_linear(p, "cpu", ("weight",))
    tied = linear_kto_loss(
        p.hidden, weight, p.labels, p.desirable, ref_hidden=p.tensors["ref_hidden"], ref_weight=weight, kl=0.4
    )
    upstream(tied.loss).backward()
    assert torch.equal(tied.loss, separate.loss)
    assert torch.equal(weight.grad, grads["weight"])  # nothing flows through the reference


def test_a_tied_embedding_gets_both_gradients():
    ids, labels = torch.randint(VOCAB, (3, 5)), torch.randint(VOCAB, (3, 5))
    desirable = torch.tensor([True, False, True])
    grads = []
    for fused in (True, False):
        torch.manual_seed(1)
        embedding = torch.nn.Embedding(VOCAB, WIDTH)
        hidden = embedding(ids).tanh()
        if fused:
            out = linear_kto_loss(hidden, embedding.weight, labels, desirable, kl=0.0, shift=True)
        else:
            out = kto_loss(hidden @ embedding.weight.T, labels, desirable, kl=0.0, shift=True)
        out.loss.backward()
        grads.append(embedding.weight.grad)
    torch.testing.assert_close(*grads)


# Dtypes ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trained", [HEAD, ("hidden",)])
def test_mixed_dtypes_take_that_of_the_hidden_states(hidden_dtype, weight_dtype, trained):
    """As if the head had been rounded to it before; but the head's gradient is summed in fp32 and has the head's dtype."""
    p = linear_problem(kl="number", ref=None, max_logits_bytes=budget(4, hidden_dtype))
    p.hidden, p.weight = p.hidden.to(hidden_dtype), p.weight.to(weight_dtype)
    out, grads = ours_linear(p, "cpu", trained)
    expected, expected_grads = ours_linear(p.to(hidden_dtype), "cpu", trained)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(grads["hidden"], expected_grads["hidden"])
    for name, grad in grads.items():
        given = p.tensors["bias"] if name == "bias" else getattr(p, name)
        assert grad.dtype == given.dtype and grad.any()
        coarser = max(torch.finfo(dtype).eps for dtype in (grad.dtype, hidden_dtype))
        torch.testing.assert_close(grad.float(), expected_grads[name].float(), rtol=coarser, atol=1e-6)
    if "weight" in trained and weight_dtype == torch.float32 != hidden_dtype:
        assert not torch.equal(grads["weight"], grads["weight"].to(hidden_dtype).float())


def one_model(shape: tuple[int, int, int], vocab: int) -> dict[str, torch.Tensor]:
    """A policy and a reference that are the same numbers, which every dtype holds; also of mismatched completions."""
    hidden, kl_hidden = (torch.randint(-64, 65, shape) / 32 for _ in range(2))
    weight, bias = torch.randint(-64, 65, (vocab, shape[-1])) / 2048, torch.randint(-64, 65, (vocab,)) / 64
    heads = {"weight": weight, "bias": bias, "ref_weight": weight, "ref_bias": bias}
    return {"hidden": hidden, "ref_hidden": hidden, "kl_hidden": kl_hidden, "ref_kl_hidden": kl_hidden} | heads


def loss_of_one_model(model: dict[str, torch.Tensor], backend: str, **options):
    draw = torch.Generator().manual_seed(0)
    labels = [torch.randint(len(model["weight"]), model["hidden"].shape[:2], generator=draw) for _ in range(2)]
    device = model["hidden"].device
    return linear_kto_loss(
        **model,
        labels=labels[0].to(device),
        kl_labels=labels[1].to(device),
        desirable=torch.ones(len(labels[0]), dtype=torch.bool, device=device),
        backend=backend,
        **options,
    )


@uninterpreted_places
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_side_of_a_loss_is_scored_in_one_dtype(place, autocast, hidden_dtype):
    """In autocast's, or in that of the policy's hidden states, whatever the heads' and the reference's are: a model is
    0 apart from itself. Scored in two dtypes it would be apart by the rounding of its logits."""
    backend, device = place
    model = {name: tensor.to(device) for name, tensor in one_model((2, 4, 64), 60).items()}
    one = hidden_dtype if autocast is None else autocast
    expected = loss_of_one_model({name: tensor.to(one) for name, tensor in model.items()}, backend)
    half, single = torch.float16 if hidden_dtype == torch.bfloat16 else torch.bfloat16, torch.float32
    mixtures = ((single, half, True), (half, single, False), (single, hidden_dtype, False), (half, half, True))
    for weight_dtype, ref_dtype, trained in mixtures:
        mixed = {name: tensor.to(ref_dtype) for name, tensor in model.items()}
        mixed["hidden"] = model["hidden"].to(hidden_dtype)
        mixed["weight"] = model["weight"].to(weight_dtype).detach().requires_grad_(trained)
        with torch.autocast(device, autocast, enabled=autocast is not None):
            out = loss_of_one_model(mixed, backend)
        assert (out.rewards == 0).all() and out.kl == 0, (weight_dtype, ref_dtype)
        for name in ("logps", "ref_logps", "loss"):
            assert torch.equal(getattr(out, name), getattr(expected, name)), name


@pytest.mark.fault(1)
@pytest.mark.parametrize("place", ON_CPU)
@pytest.mark.parametrize("other", ["ref_weight", "ref_hidden", "weight"])
def test_a_head_raised_to_fp32_is_0_apart_from_its_model(place, other):
    """400 bf16 tokens and a vocabulary of 32,000 under an fp32 head: policy and reference were apart by up to 0.04 nats."""
    model = one_model((1, 400, 128), 32_000)
    wide = {other} if other != "weight" else {"weight", "bias"}
    mixed = {name: tensor if name in wide else tensor.bfloat16() for name, tensor in model.items()}
    out = loss_of_one_model(mixed, place[0])
    assert out.rewards == 0 and out.kl == 0
    assert out.logps == loss_of_one_model({name: tensor.bfloat16() for name, tensor in model.items()}, place[0]).logps


@pytest.mark.parametrize("autocast", [False, True])
def test_one_dtype_with_fp64_beside_it(autocast):
    """Autocast leaves fp64 hidden states alone, as it does in PyTorch; fp64 heads and references follow the policy."""
    model = one_model((2, 20, 64), 300)
    double = {name: tensor.double() for name, tensor in model.items()}
    for hidden_dtype in (torch.float64, torch.float32):
        one = torch.bfloat16 if autocast and hidden_dtype != torch.float64 else hidden_dtype
        expected = loss_of_one_model({name: tensor.to(one) for name, tensor in model.items()}, "torch")
        for others in (model, double):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = loss_of_one_model(others | {"hidden": model["hidden"].to(hidden_dtype)}, "torch")
            assert (out.rewards == 0).all() and out.kl == 0
            assert torch.equal(out.logps, expected.logps) and out.loss.dtype == expected.loss.dtype


@pytest.mark.parametrize("trained", [HEAD, ("hidden",), ("weight",)])
def test_autocast_takes_its_dtype_and_keeps_the_heads_gradient_in_fp32(trained):
    p = linear_problem(kl="number", ref=None, max_logits_bytes=budget(4, torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        out, grads = ours_linear(p, "cpu", trained)
    expected, expected_grads = ours_linear(p.to(torch.bfloat16), "cpu", trained)
    assert torch.equal(out.loss, expected.loss)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, expected_grads[name].float(), rtol=2**-7, atol=1e-5)
    if "weight" in trained:
        assert not torch.equal(grads["weight"], grads["weight"].bfloat16().float())
    # Only the GEMMs and what comes before them: outside, nothing has changed.
    assert torch.get_autocast_dtype("cpu") == torch.bfloat16


def _half_error(p, trained) -> dict[str, float]:
    """Relative errors of the gradients of fp16 leaves under a loss scale, against fp64 on the same numbers."""
    scale, half = 2.0**16, p.to(torch.float16)
    leaves = {"hidden": half.hidden, "weight": half.weight, "bias": half.tensors["bias"]}
    leaves = {name: leaf.clone().requires_grad_(name in trained) for name, leaf in leaves.items()}
    given = half.tensors | {"bias": leaves["bias"]}
    out = linear_kto_loss(leaves["hidden"], leaves["weight"], half.labels, half.desirable, **given, **half.options)
    (out.loss.sum() * scale).backward()
    exact_leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    logits = linear(*(exact_leaves[name] for name in HEAD))
    options = {k: v for k, v in (half.options | half.tensors).items() if k not in ("max_logits_bytes", "bias")}
    kto_loss(logits, half.labels, half.desirable, **options).loss.sum().backward()
    errors = {}
    for name in trained:
        exact = exact_leaves[name].grad * scale
        errors[name] = ((leaves[name].grad.double() - exact).norm() / exact.norm()).item()
    return errors


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", [HEAD, ("hidden",)])
def test_fp16_gradients_survive_a_small_coefficient(trained, reduction):
    """β/4B is 1e-6 here: formed with it in fp16, the gradients would be gone before a loss scale could save them."""
    p = linear_problem(kl="number", ref=None, reduction=reduction, beta=2e-5, max_logits_bytes=2 * VOCAB * 4)
    errors = _half_error(p, trained)
    assert all(error < 2e-3 for error in errors.values()), errors


@pytest.mark.parametrize("first", [True, False])
def test_fp16_gradients_survive_a_class_that_has_no_part(first):
    """The undesirable sequence could have a coefficient 10,000 times as large; it is not scored, or saturated. (With it
    as the unit, the others' hidden states of 0.001 went below what fp16 holds: an error of 0.2.)"""
    for saturated in (True, False):
        p = linear_problem((4, 4, 4, 4), kl="number", ref=None, undesirable_weight=1e4, max_logits_bytes=4 * VOCAB * 2)
        p.hidden *= 1e-3
        p.desirable[:] = True
        p.desirable[0 if first else 3] = False
        if saturated:
            p.tensors["ref_logps"] = torch.where(p.desirable, -10.0, 300.0)
        else:
            p.labels[~p.desirable] = -100
        errors = _half_error(p, HEAD)
        assert all(error < 2e-3 for error in errors.values()), (errors, saturated)


def _weight_error(chunks: int) -> float:
    """Relative error of a bf16 head's gradient from 4096 tokens in so many chunks, against fp64 on the same rounded
    inputs."""
    torch.manual_seed(0)
    rows, sequences = 4096, 1024
    hidden = torch.randn(sequences, rows // sequences, WIDTH).bfloat16() + 0.5  # a mean, so that sums grow
    weight = (0.2 * torch.randn(VOCAB, WIDTH)).bfloat16().requires_grad_()
    labels = torch.randint(VOCAB, hidden.shape[:2]) % 5  # the same few labels: their rows' sums grow with every chunk
    desirable = torch.arange(sequences) % 8 != 0
    options = {"kl": 0.0, "reduction": "sum"}
    out = linear_kto_loss(hidden, weight, labels, desirable, **options, max_logits_bytes=rows // chunks * VOCAB * 2)
    out.loss.backward()
    exact = weight.detach().double().requires_grad_()
    kto_loss(hidden.double() @ exact.T, labels, desirable, **options).loss.backward()
    return ((weight.grad.double() - exact.grad).norm() / exact.grad.norm()).item()


def test_the_heads_gradient_does_not_drift_with_the_number_of_chunks():
    errors = {chunks: _weight_error(chunks) for chunks in (1, 64, 1024)}
    # Rounding dW itself to bf16 costs some 2^-9; a sum kept in bf16 would lose ten times that at 1024 chunks.
    assert max(errors.values()) < 2**-8, errors
    assert errors[1024] < 1.2 * errors[64] + 1e-4, errors


# The seam ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@places
@pytest.mark.parametrize("trained", [HEAD, ("hidden",), ("weight",), ("bias",)])
@pytest.mark.parametrize("packed", [False, True])
def test_linear_token_logps_equals_token_logps_of_the_logits(place, trained, packed):
    p = linear_problem(packed=packed).to(torch.float32, place[1])
    scoring = {"shift": True, "temperature": 1.3}
    upstream = torch.randn(p.labels.shape, device=place[1])
    grads = []
    for fused in (True, False):
        leaves = {"hidden": p.hidden, "weight": p.weight, "bias": p.tensors["bias"]}
        leaves = {name: leaf.clone().requires_grad_(name in trained) for name, leaf in leaves.items()}
        if fused:
            logps = linear_token_logps(
                leaves["hidden"], leaves["weight"], p.labels, bias=leaves["bias"], **scoring,
                max_logits_bytes=budget(4), backend=place[0]
            )  # fmt: skip
        else:
            expected = token_logps(linear(*(leaves[name] for name in HEAD)), p.labels, **scoring, backend="torch")
            torch.testing.assert_close(logps, expected)
            logps = expected
        assert logps.shape == p.labels.shape
        (logps * upstream).sum().backward()
        grads.append([leaves[name].grad for name in trained])
    for mine, theirs in zip(*grads):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_upstream_gradients_at_ignored_tokens_do_not_matter():
    p = linear_problem()
    hidden = p.hidden.clone().requires_grad_()
    logps = linear_token_logps(hidden, p.weight, p.labels)
    upstream = torch.where(p.labels == -100, torch.nan, 1.0)
    logps.backward(upstream)
    assert torch.isfinite(hidden.grad).all() and hidden.grad.abs().sum() > 0


# `outputs` ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@lengthy_places
@pytest.mark.parametrize("trained", [HEAD, ("hidden",), ()])
@pytest.mark.parametrize("packed", [False, True])
def test_outputs_equal_the_definition(place, trained, packed):
    scales = {"logit_scale": 0.5, "softcap": 6.0, "temperature": 0.6}
    p = linear_problem(packed=packed, shift=True, **scales, long_sequences="recompute").to(torch.float32, place[1])
    leaves = {"hidden": p.hidden, "weight": p.weight, "bias": p.tensors.pop("bias")}
    leaves = {name: leaf.requires_grad_(name in trained) for name, leaf in leaves.items()}
    out = linear_kto_loss(
        leaves["hidden"], leaves["weight"], p.labels, p.desirable, bias=leaves["bias"], **p.tensors, **p.options,
        outputs=OUTPUTS, max_logits_bytes=budget(4), backend=place[0]
    )  # fmt: skip
    offsets = p.tensors.get("cu_seqlens")
    target = reference.targets(p.labels, True, -100, offsets)
    scored = target != -100
    logits = linear(*(leaves[name].detach().double() for name in HEAD))
    expected = reference.outputs(logits, target, OUTPUTS, **scales)
    assert torch.equal(out.scored, scored)
    for name in OUTPUTS:
        values = getattr(out, name)
        assert values.shape == p.labels.shape and not values.requires_grad
        if name == "is_top1":
            assert torch.equal(values, expected[name] & scored)
        else:
            torch.testing.assert_close(values, torch.where(scored, expected[name], 0.0).float(), rtol=1e-4, atol=1e-4)
    metrics = out.metrics()
    assert metrics["entropy"] == pytest.approx(expected["entropy"][scored].mean().item(), rel=1e-4)
    assert metrics["mean_token_accuracy"] == pytest.approx(expected["is_top1"][scored].double().mean().item())
    counts = scored.sum(-1) if offsets is None else offsets.diff()
    of = torch.arange(len(p.desirable), device=place[1])
    sequence = of.unsqueeze(-1).expand(p.labels.shape) if offsets is None else of.repeat_interleave(counts)
    for side, mask in (("chosen", p.desirable), ("rejected", ~p.desirable)):
        of_class = scored & mask[sequence]
        assert metrics[f"logits/{side}"] == pytest.approx(expected["mean_logits"][of_class].mean().item(), rel=1e-3)


def test_outputs_not_asked_for_are_absent():
    p = linear_problem()
    out, _ = ours_linear(p, "cpu", outputs=("mean_logits",))
    assert out.entropy is None and out.is_top1 is None and out.mean_logits is not None
    assert "entropy" not in out.metrics() and "logits/chosen" in out.metrics()
    out, _ = ours_linear(p, "cpu")
    assert out.scored is None and "logits/chosen" not in out.metrics()


@pytest.mark.parametrize("trained", [HEAD, ("hidden",), ("weight",)])
@pytest.mark.parametrize("with_logps", [True, False])
def test_the_entropys_gradient_equals_the_definitions(trained, with_logps):
    """The operator behind the seam is differentiable in the entropy too: policy-gradient losses regularise it."""
    p = linear_problem(packed=True)
    scales = (0.5, 6.0, 0.6)
    upstream_logps, upstream_entropy = torch.randn(2, len(p.labels))
    grads = []
    for fused in (True, False):
        leaves = {"hidden": p.hidden, "weight": p.weight, "bias": p.tensors["bias"]}
        dtype = torch.float32 if fused else torch.float64
        leaves = {name: leaf.to(dtype, copy=True).requires_grad_(name in trained) for name, leaf in leaves.items()}
        if fused:
            scoring, chunking = Scoring(Scale(*scales), backend="cpu"), Chunking(budget(4), outputs=("entropy",))
            side = operators.Projected(*leaves.values(), p.labels, None, scoring, chunking, dtype)
            frozen = trained == ("hidden",)
            found = operators.linear_token_logps(operators.LinearTokenLogps(side, frozen, inplace_backward=True))
            logps, entropy = found.logps, found.entropy
        else:
            z = reference.scaled(linear(*leaves.values()), *scales)
            logps = reference.token_logps(linear(*leaves.values()), p.labels, -100, *scales)
            entropy = -(z.log_softmax(-1).exp() * z.log_softmax(-1)).sum(-1) * (p.labels != -100)
        loss = (entropy * upstream_entropy).sum()
        if with_logps:
            loss = loss + (logps * upstream_logps).sum()
        loss.backward()
        grads.append([leaves[name].grad for name in trained])
    for mine, theirs in zip(*grads):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)


# Edges ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("trained", [HEAD, ("hidden",)])
def test_an_impossible_label_saturates_its_sequence_and_no_other(trained):
    p = linear_problem(ref=None, kl="number", max_logits_bytes=budget(4))
    # A bias of −inf masks a token of the vocabulary; sequence 0 has it as a label.
    p.labels[p.labels == 7] = 8
    p.tensors["bias"][7] = -torch.inf
    p.labels[0, 3] = 7
    out, grads = ours_linear(p, "cpu", trained)
    assert out.logps[0] == -torch.inf and torch.isfinite(out.loss)
    assert (grads["hidden"][0] == 0).all()
    for grad in grads.values():
        assert torch.isfinite(grad).all() and grad.abs().sum() > 0


def test_a_nan_in_a_hidden_state_is_seen_and_stays_in_its_sequence():
    p = linear_problem(ref=None, kl="number", reduction="none", max_logits_bytes=budget(4))
    p.hidden[0, 4] = torch.nan
    out, grads = ours_linear(p, "cpu", ("hidden",))
    assert out.loss[0].isnan() and torch.isfinite(out.loss[1:]).all()
    assert grads["hidden"][0].isnan().any() and torch.isfinite(grads["hidden"][1:]).all()


def test_the_module_equals_the_function():
    p = linear_problem(max_logits_bytes=budget(4), beta=0.2, outputs=("entropy",))
    module = LinearKTOLoss(**p.options)
    out = module(p.hidden, p.weight, p.labels, p.desirable, **p.tensors)
    expected = linear_kto_loss(p.hidden, p.weight, p.labels, p.desirable, **p.tensors, **p.options)
    assert torch.equal(out.loss, expected.loss) and torch.equal(out.entropy, expected.entropy)
    assert "beta=0.2" in repr(module)
