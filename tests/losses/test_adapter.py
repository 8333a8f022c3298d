"""An adapter (LoRA) on the head: equal to the head that it is merged into, at the GEMMs of a frozen head."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import peak_extra_bytes
from kto_kernels import (
    LinearKTOLoss,
    LinearPlan,
    kto_loss,
    linear_kto_loss,
    linear_preference_loss,
    linear_token_logps,
    preference_loss,
    token_logps,
)
from kto_kernels.linear.head import Needs
from kto_kernels.objectives import DPO
from kto_kernels.ops import linear as linear_ops
from kto_kernels.options import OUTPUTS, Chunking, Objective, Scale, Scoring
from kto_kernels.pairs import Judged
from tests.support.harness import upstream
from tests.support.linear_harness import VOCAB, WIDTH, LinearProblem, gemm_flops, linear_problem
from tests.support.operator_cases import both

RANK, SCALING = 3, 0.7
LENGTHS = (6, 3, 9, 0, 1)
LEAVES = ("hidden", "weight", "bias", "a", "b")
ADAPTED = ("hidden", "a", "b")
FLOATS = ("hidden", "weight", "bias", "ref_weight", "ref_bias")


def adapter(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(7)
    a, b = torch.randn(RANK, WIDTH, generator=draw), torch.randn(VOCAB, RANK, generator=draw)
    return (a / 4).to(dtype), (b / 2).to(dtype)


def budget(rows: int, dtype: torch.dtype = torch.float64) -> int:
    return rows * VOCAB * dtype.itemsize


def leaves_of(p: LinearProblem, trained: tuple[str, ...], dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
    a, b = adapter()
    given = {"hidden": p.hidden, "weight": p.weight, "bias": p.tensors.get("bias"), "a": a, "b": b}
    return {
        name: x.to(dtypes[name]).detach().clone().requires_grad_(name in trained)
        for name, x in given.items()
        if x is not None
    }


def everywhere(dtype: torch.dtype) -> dict[str, torch.dtype]:
    return dict.fromkeys(LEAVES, dtype)


def step(
    p: LinearProblem,
    trained: tuple[str, ...],
    dtypes: dict[str, torch.dtype],
    function=linear_kto_loss,
    factor=1.0,
    **extra,
):
    """The loss with an adapter on the head, and the gradients of what is trained."""
    x = leaves_of(p, trained, dtypes)
    tensors = {name: value for name, value in p.tensors.items() if name != "bias"}
    of_head = {"bias": x.get("bias"), "adapter": (x["a"], x["b"], SCALING)}
    out = function(x["hidden"], x["weight"], p.labels, p.desirable, **of_head, **tensors, **p.options, **extra)
    if trained:
        (factor * upstream(out.loss)).backward()
    return out, {name: x[name].grad for name in trained}


def merged(p: LinearProblem, trained: tuple[str, ...], dtypes: dict[str, torch.dtype], factor: float = 1.0):
    """The same in fp64 by way of the logits of the merged head `W + s B A`; A and B have their gradients from autograd."""
    x = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves_of(p, (), dtypes).items()}
    given, options = dict(p.tensors), dict(p.options)
    given.pop("bias", None)
    for name in ("max_logits_bytes", "long_sequences", "outputs"):
        options.pop(name, None)
    logit_scale, softcap = options.pop("logit_scale", 1.0), options.pop("softcap", None)

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found = logit_scale * linear(hidden.double(), weight.double(), None if bias is None else bias.double())
        return found if softcap is None else softcap * torch.tanh(found / softcap)

    head = (x["weight"] + SCALING * x["b"] @ x["a"], x.get("bias"))
    ref_head = (given.pop("ref_weight", None), given.pop("ref_bias", None))
    for side, its_head in (("kl_", head), ("ref_", ref_head), ("ref_kl_", ref_head)):
        if f"{side}hidden" in given:
            given[f"{side}logits"] = logits(given.pop(f"{side}hidden"), *its_head).detach()
    out = kto_loss(logits(x["hidden"], *head), p.labels, p.desirable, **given, **options, backend="torch")
    if trained:
        (factor * upstream(out.loss)).backward()
    return out, {name: x[name].grad for name in trained}


def compare(p: LinearProblem, trained: tuple[str, ...], dtypes: dict[str, torch.dtype], unit: float, **extra):
    """Errors relative to the largest number of each tensor. Each such number is not 0."""
    out, grads = step(p, trained, dtypes, **extra)
    exact, exact_grads = merged(p, trained, dtypes)
    results = {name: (getattr(out, name), getattr(exact, name)) for name in ("loss", "logps", "ref_logps", "rewards")}
    results |= {name: (grads[name], exact_grads[name]) for name in trained}
    for name, (mine, theirs) in results.items():
        assert mine.shape == theirs.shape
        assert name not in trained or (mine.dtype == dtypes[name] and theirs.abs().max() > 0)
        worst = (mine.double() - theirs).abs().max().item()
        assert worst <= unit * theirs.abs().max().item(), (name, worst, theirs.abs().max().item())
    return out


# Equal to the merged head ─────────────────────────────────────────────────────────────────────────────────────────────

# Rows of a chunk: fewer than, exactly and more than the longest sequence (9), everything.
BUDGETS = {"longer than a chunk": 4, "longest": 9, "across chunks": 10, "everything": 1000}
CASES = {
    "default": {},
    "packed": {"packed": True},
    "packed, shifted": {"packed": True, "shift": True},
    "no bias": {"bias": False},
    "reference-free, sum": {"ref": None, "kl": "number", "reduction": "sum"},
    "none": {"reduction": "none"},
    "average": {"average_log_prob": True},
    "all scales": {"logit_scale": 0.5, "softcap": 6.0, "temperature": 0.6},
}


@pytest.mark.parametrize("rows", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_merged_head_in_fp64(case, rows):
    p = linear_problem(LENGTHS, **CASES[case], max_logits_bytes=budget(rows)).to(torch.float64)
    compare(p, ADAPTED, everywhere(torch.float64), 1e-12, backend="torch")


@pytest.mark.parametrize("long_sequences", ["auto", "defer", "recompute"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "trained", [("a",), ("b",), ("a", "b"), ("hidden",), ("bias", "a", "b"), ("weight",), LEAVES, ()]
)
def test_whatever_is_trained(trained, reduction, long_sequences):
    p = linear_problem(LENGTHS, reduction=reduction, long_sequences=long_sequences, max_logits_bytes=budget(4))
    compare(p.to(torch.float64), trained, everywhere(torch.float64), 1e-12, backend="torch")


def test_without_a_scored_token():
    p = linear_problem((0, 0), ref=None, kl="number")
    _, grads = step(p, ADAPTED, everywhere(torch.float32))
    assert [tuple(grads[name].shape) for name in ("a", "b")] == [(RANK, WIDTH), (VOCAB, RANK)]
    assert all((grad == 0).all() for grad in grads.values())


def test_no_adapter_is_an_adapter_of_zeros():
    """As an adapter starts: B is 0, and so is the gradient of A; that of B is not."""
    p = linear_problem(LENGTHS, ref=None, kl="number", max_logits_bytes=budget(4))
    x = leaves_of(p, ADAPTED, everywhere(torch.float32))
    first, given = (x["weight"], p.labels, p.desirable), {"bias": x["bias"]} | p.options
    zeros = torch.zeros_like(x["b"]).requires_grad_()
    linear_kto_loss(x["hidden"], *first, **given, adapter=(x["a"], zeros, SCALING)).loss.backward()
    bare = x["hidden"].detach().clone().requires_grad_()
    linear_kto_loss(bare, *first, **given).loss.backward()
    assert (x["a"].grad == 0).all() and zeros.grad.abs().max() > 0
    torch.testing.assert_close(x["hidden"].grad, bare.grad)


def test_the_reference_is_the_policy_without_the_adapter():
    p = linear_problem(LENGTHS, ref=None, kl="number", bias=False).to(torch.float64)
    p.tensors |= {"ref_hidden": p.hidden, "ref_weight": p.weight}
    out = compare(p, ADAPTED, everywhere(torch.float64), 1e-12, backend="torch")
    assert out.rewards.abs().max() > 0
    off = linear_kto_loss(
        p.hidden, p.weight, p.labels, p.desirable, adapter=(*adapter(), 0.0), **p.tensors, **p.options, backend="torch"
    )
    assert (off.rewards == 0).all()


@pytest.mark.parametrize("trained", [ADAPTED, ("a", "b"), LEAVES])
@pytest.mark.parametrize("packed", [False, True])
def test_token_logps_equal_those_of_the_merged_head(packed, trained):
    p = linear_problem(LENGTHS, packed=packed).to(torch.float64)
    scoring, weights = {"shift": True, "temperature": 1.3, "backend": "torch"}, torch.randn(p.labels.shape).double()
    grads = []
    for fused in (True, False):
        x = leaves_of(p, trained, everywhere(torch.float64))
        if fused:
            of_head = {"bias": x["bias"], "adapter": (x["a"], x["b"], SCALING), "max_logits_bytes": budget(4)}
            logps = linear_token_logps(x["hidden"], x["weight"], p.labels, **of_head, **scoring)
        else:
            logits = linear(x["hidden"], x["weight"] + SCALING * x["b"] @ x["a"], x["bias"])
            expected = token_logps(logits, p.labels, **scoring)
            torch.testing.assert_close(logps, expected)
            logps = expected
        (logps * weights).sum().backward()
        grads.append([x[name].grad for name in trained])
    for mine, theirs in zip(*grads):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("trained", [ADAPTED, LEAVES])
@pytest.mark.parametrize("objective", [DPO(), DPO(nll_weight=0.5)], ids=["one number", "two"])
def test_a_paired_loss_equals_that_of_the_merged_head(trained, objective):
    p = linear_problem((6, 3, 9, 4)).to(torch.float64)
    reference = {"ref_logps": torch.tensor([-9.0, -5.0, -14.0, -6.0], dtype=torch.float64), "backend": "torch"}
    results = []
    for fused in (True, False):
        x = leaves_of(p, trained, everywhere(torch.float64))
        if fused:
            of_head = {"bias": x["bias"], "adapter": (x["a"], x["b"], SCALING), "max_logits_bytes": budget(4)}
            out = linear_preference_loss(x["hidden"], x["weight"], p.labels, objective, **of_head, **reference)
        else:
            logits = linear(x["hidden"], x["weight"] + SCALING * x["b"] @ x["a"], x["bias"])
            out = preference_loss(logits, p.labels, objective, **reference)
        out.loss.backward()
        results.append([out.loss.detach(), *(x[name].grad for name in trained)])
    for mine, theirs in zip(*results):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs)


def test_the_entropys_gradient_reaches_the_adapter():
    p = linear_problem(LENGTHS, kl="number").to(torch.float64)
    scoring, weights = Scoring(Scale(), backend="torch"), torch.randn(p.labels.shape).double()
    x, y = (leaves_of(p, ADAPTED, everywhere(torch.float64)) for _ in range(2))
    chunking = Chunking(budget(4), outputs=("entropy",))
    side = linear_ops.Projected(
        x["hidden"], x["weight"], None, p.labels, None, scoring, chunking, torch.float64,
        adapter_a=x["a"], adapter_b=x["b"], adapter_scaling=SCALING,
    )  # fmt: skip
    found = linear_ops.linear_token_logps(linear_ops.LinearTokenLogps(side, False, False)).entropy
    logs = linear(y["hidden"], y["weight"] + SCALING * y["b"] @ y["a"]).log_softmax(-1)
    expected = -(logs.exp() * logs).sum(-1).masked_fill(p.labels == -100, 0.0)
    for entropy in (found, expected):
        (entropy * weights).sum().backward()
    torch.testing.assert_close(found, expected)
    for name in ADAPTED:
        torch.testing.assert_close(x[name].grad, y[name].grad)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_outputs_are_those_of_the_merged_head(backend):
    p = linear_problem(LENGTHS, ref=None, kl="number", outputs=OUTPUTS)
    out, _ = step(p, ADAPTED, everywhere(torch.float32), backend=backend)
    a, b = adapter(torch.float32)
    expected = linear_kto_loss(
        p.hidden, p.weight + SCALING * b @ a, p.labels, p.desirable, **p.tensors, **p.options, backend=backend
    )
    assert torch.equal(out.is_top1, expected.is_top1)
    for name in ("entropy", "mean_logits"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=1e-4, atol=1e-5)


def test_the_module_takes_an_adapter():
    p = linear_problem(LENGTHS, ref=None, kl="number")
    out, grads = step(p, ADAPTED, everywhere(torch.float32))
    module = LinearKTOLoss()
    other, other_grads = step(p, ADAPTED, everywhere(torch.float32), function=module)
    assert torch.equal(out.loss, other.loss)
    assert all(torch.equal(grads[name], other_grads[name]) for name in ADAPTED)


# Dtypes ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rows", [4, 1000])
@pytest.mark.parametrize("others", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_of_model_and_adapter(dtype, others, rows):
    """`others` is the dtype of A and B, fp32 with PEFT. They have gradients of their own dtype."""
    p = linear_problem(LENGTHS, ref=None, kl="number", bias=False, max_logits_bytes=budget(rows, dtype)).to(dtype)
    kinds = everywhere(dtype) | ({} if others is None else {"a": others, "b": others})
    rounded = max(torch.finfo(kind).eps for kind in kinds.values())
    compare(p, ADAPTED, kinds, 16 * rounded)


def test_fp16_gradients_survive_a_small_coefficient():
    """β/4B is 1e-6 here: formed with it in fp16, the gradients would be gone before a loss scale could save them."""
    p = linear_problem(kl="number", ref=None, bias=False, beta=2e-5, max_logits_bytes=budget(4, torch.float16))
    kinds = everywhere(torch.float16)
    _, grads = step(p.to(torch.float16), ADAPTED, kinds, factor=2.0**16)
    _, exact = merged(p.to(torch.float16), ADAPTED, kinds, factor=2.0**16)
    for name in ADAPTED:
        assert ((grads[name].double() - exact[name]).norm() / exact[name].norm()).item() < 4e-3, name


def test_autocast_takes_its_dtype_for_the_adapter_too():
    p = linear_problem(LENGTHS, kl="number", ref=None, max_logits_bytes=budget(4, torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        out, grads = step(p, ADAPTED, everywhere(torch.float32))
    low, low_grads = step(p, ADAPTED, everywhere(torch.bfloat16))
    assert torch.equal(out.loss, low.loss)
    for name in ADAPTED:
        assert grads[name].dtype == torch.float32 and grads[name].abs().max() > 0
        torch.testing.assert_close(grads[name], low_grads[name].float(), rtol=2**-7, atol=1e-5)


# The cost ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

SCORED = sum(LENGTHS)
EARLY = 7 / SCORED  # 2 rows of the first sequence and 5 of the third lie before the last four


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def products(run) -> int:
    return gemm_flops(run, RANK)


def units(scored: float, with_a: float, with_b: float) -> float:
    """FLOPs of so many products with W, with A and with B, over the scored rows."""
    return 2 * SCORED * (scored * WIDTH * VOCAB + RANK * (with_a * WIDTH + with_b * VOCAB))


# (what is trained, options) → products over the scored rows with W, A and B, by hand: the logits take one of each. The
# hidden states' gradient takes one of each. The gradients of A and B take another two with A, one with B, and `g B` if
# the hidden states' gradient has not made it.
COUNTS = [
    (ADAPTED, {}, (2, 4, 3)),
    (ADAPTED, {"max_logits_bytes": None}, (2, 4, 3)),
    (ADAPTED, {"long_sequences": "recompute"}, (2 + EARLY, 4 + EARLY, 3 + EARLY)),
    (ADAPTED, {"reduction": "none"}, (3, 5, 4)),
    (("a", "b"), {}, (1, 3, 3)),
    (("b",), {}, (1, 3, 3)),
    (("hidden",), {}, (2, 2, 2)),
    (("hidden", "weight", "a", "b"), {"long_sequences": "defer"}, (3, 4, 3)),
    ((), {}, (1, 1, 1)),
]


@pytest.mark.parametrize(("trained", "options", "expected"), COUNTS, ids=str)
@pytest.mark.parametrize("count", [products, counted])
def test_a_step_runs_the_gemms_that_are_promised(count, trained, options, expected):
    p = linear_problem(LENGTHS, ref=None, kl="number", bias=False, max_logits_bytes=budget(4, torch.float32))
    p.options |= options
    assert count(lambda: step(p, trained, everywhere(torch.float32))) == pytest.approx(units(*expected))


@pytest.mark.parametrize("objective", [DPO(), DPO(nll_weight=0.5)], ids=["one number", "two"])
def test_a_pair_longer_than_a_chunk_is_deferred_at_the_same_cost(objective):
    p = linear_problem(LENGTHS + (3,) * (len(LENGTHS) % 2), ref=None, kl="number", bias=False)

    def run():
        x = leaves_of(p, ADAPTED, everywhere(torch.float32))
        more = {"adapter": (x["a"], x["b"], SCALING), "max_logits_bytes": budget(4, torch.float32)}
        linear_preference_loss(x["hidden"], x["weight"], p.labels, objective, **more).loss.backward()

    scored = int((p.labels != -100).sum())
    assert counted(run) == pytest.approx(units(2, 4, 3) * scored / SCORED)


@pytest.mark.parametrize("count", [products, counted])
def test_token_logps_compute_the_logits_once_more(count):
    p = linear_problem(LENGTHS)

    def run():
        x = leaves_of(p, ADAPTED, everywhere(torch.float32))
        linear_token_logps(x["hidden"], x["weight"], p.labels, adapter=(x["a"], x["b"], SCALING)).sum().backward()

    assert count(run) == pytest.approx(units(3, 5, 4))


def test_a_long_sequence_is_deferred_however_many_there_are():
    options = {"dtype": torch.float32, "max_logits_bytes": budget(4, torch.float32), "device": "cpu"}
    adapted = LinearPlan.of(LENGTHS, VOCAB, WIDTH, needs_weight=False, adapter_rank=RANK, **options)
    assert [i for i, _ in adapted.deferred] == [0, 2] and not adapted.recomputed
    assert adapted.bytes["adapter gradient"] == adapted.bytes["deferred adapter gradient"] == 4 * RANK * (WIDTH + VOCAB)
    frozen = LinearPlan.of(LENGTHS, VOCAB, WIDTH, needs_weight=False, adapter_rank=RANK, needs_adapter=False, **options)
    assert not frozen.deferred and "adapter gradient" not in frozen.bytes
    open_sequences = [True] * len(LENGTHS)
    spread = LinearPlan.of(
        LENGTHS, VOCAB, WIDTH, needs_weight=False, adapter_rank=RANK, open_sequences=open_sequences, **options
    )
    assert not spread.recomputed and len(spread.deferred) == 2


@pytest.mark.alone
def test_no_gradient_of_the_heads_shape_is_formed():
    """A head of 64 MB beside logits of 2 MB at a time."""
    vocab, width, rows = 16_000, 1_000, 32
    hidden, weight = torch.randn(4, 64, width, requires_grad=True), torch.randn(vocab, width) / 32
    a, b = torch.randn(8, width, requires_grad=True), torch.randn(vocab, 8, requires_grad=True)
    labels, desirable = torch.randint(vocab, (4, 64)), torch.tensor([True, False, True, False])

    def run(weight):  # with a β so small that no sequence is saturated
        options = {"kl": 0.0, "beta": 1e-4, "max_logits_bytes": rows * vocab * 4}
        linear_kto_loss(hidden, weight, labels, desirable, adapter=(a, b, 0.1), **options).loss.backward()
        for leaf in (hidden, a, b):
            assert leaf.grad.abs().max() > 0
            leaf.grad = None

    run(weight)
    peak = peak_extra_bytes(lambda: run(weight))
    plan = LinearPlan.of(
        [64] * 4, vocab, width, torch.float32, needs_weight=False, adapter_rank=8, max_logits_bytes=rows * vocab * 4,
        device="cpu",
    )  # fmt: skip
    assert plan.peak_bytes < 0.3 * weight.nbytes
    assert peak < 1.5 * plan.peak_bytes + 16e6 < weight.nbytes, (peak, plan)
    trained = weight.clone().requires_grad_()
    assert peak_extra_bytes(lambda: run(trained)) > weight.nbytes  # the measure sees such a gradient


# torch.library and torch.compile ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("packed", "trained"), [(False, ADAPTED), (True, LEAVES)])
def test_opcheck(packed, trained):
    p = linear_problem(packed=packed, ref="logps")
    x = leaves_of(p, trained, everywhere(torch.float32))
    side = linear_ops.Projected(
        x["hidden"], x["weight"], x["bias"], p.labels, p.tensors.get("cu_seqlens"), Scoring(Scale(0.5, 6.0), backend="cpu"),
        Chunking(budget(4, torch.float32)), torch.float32, adapter_a=x["a"], adapter_b=x["b"], adapter_scaling=SCALING,
    )  # fmt: skip
    needs = Needs(**{f"adapter_{name}" if name in "ab" else name: True for name in trained})
    z0 = torch.tensor(0.3, dtype=torch.float64)
    loss = linear_ops.LinearKTO(
        side, Judged(p.desirable, z0, p.tensors["ref_logps"]), Objective(0.1), needs, inplace_backward=False
    )
    with torch.no_grad():
        plain = replace(
            side,
            **{name: getattr(side, name).detach() for name in ("hidden", "weight", "bias", "adapter_a", "adapter_b")},
        )
    backward = linear_ops.LinearBackward(torch.randn(p.labels.shape), None, plain, needs)
    tokens = linear_ops.LinearTokenLogps(side, False, False)
    operators = (linear_ops.linear_kto, linear_ops.linear_backward, linear_ops.linear_token_logps)
    for operator, call in zip(operators, (loss, backward, tokens)):
        for each, arguments in both(operator, call):
            torch.library.opcheck(each._opoverload, arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_as_one_graph_with_the_eager_result(reduction):
    """For every value of the scaling, which becomes data when it changes."""
    torch.compiler.reset()
    p = linear_problem(LENGTHS, reduction=reduction, max_logits_bytes=budget(4, torch.float32))

    def loss(hidden, weight, bias, a, b, scaling):
        given = {name: value for name, value in p.tensors.items() if name != "bias"}
        options = given | p.options | {"bias": bias, "adapter": (a, b, scaling), "backend": "cpu"}
        return linear_kto_loss(hidden * 1, weight, p.labels, p.desirable, **options).loss.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for scaling in (SCALING, 0.3, 0.2):
        results = []
        for function in (loss, compiled):
            x = leaves_of(p, ADAPTED, everywhere(torch.float32))
            value = function(**x, scaling=scaling)
            value.backward()
            results.append([value.detach(), *(x[name].grad for name in ADAPTED)])
        for eager, graph in zip(*results):
            torch.testing.assert_close(eager, graph)


# Bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────────

A, B = adapter(torch.float32)
BAD = {
    "no tuple": (torch.ones(2), TypeError, r"adapter: expected \(A, B, scaling\), got Tensor"),
    "no scaling": ((A, B), TypeError, r"adapter: expected \(A, B, scaling\), got 2 values"),
    "scaling no number": ((A, B, "1"), TypeError, "adapter: scaling: expected a number, got str"),
    "scaling a tensor": ((A, B, torch.ones(())), TypeError, "adapter: scaling: expected a number, got Tensor"),
    "scaling negative": ((A, B, -1.0), ValueError, "adapter: scaling: expected a finite number >= 0"),
    "scaling NaN": ((A, B, float("nan")), ValueError, "adapter: scaling: expected a finite number"),
    "A missing": ((None, B, 1.0), TypeError, "adapter: A: expected a tensor, got NoneType"),
    "B missing": ((A, None, 1.0), TypeError, "adapter: B: expected a tensor, got NoneType"),
    "A integer": ((A.long(), B, 1.0), TypeError, "adapter: A: expected dtype"),
    "B sparse": ((A, B.to_sparse(), 1.0), TypeError, "adapter: B: expected a dense tensor"),
    "A elsewhere": ((A.to("meta"), B, 1.0), ValueError, "adapter: A: expected device cpu"),
    "B elsewhere": ((A, B.to("meta"), 1.0), ValueError, "adapter: B: expected device cpu"),
    "A narrow": ((A[:, 1:], B, 1.0), ValueError, rf"adapter: A: expected \(r, {WIDTH}\)"),
    "A a row": ((A[0], B, 1.0), ValueError, rf"adapter: A: expected \(r, {WIDTH}\)"),
    "no rank": ((A[:0], B[:, :0], 1.0), ValueError, rf"adapter: A: expected \(r, {WIDTH}\) with r >= 1"),
    "B of another vocabulary": ((A, B[1:], 1.0), ValueError, rf"adapter: B: expected shape \({VOCAB}, {RANK}\)"),
    "B of another rank": ((A, B[:, 1:], 1.0), ValueError, rf"adapter: B: expected shape \({VOCAB}, {RANK}\)"),
    "swapped": ((B.T, A.T, 1.0), ValueError, "adapter: A: expected"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", ["kto", "preference", "token_logps"])
def test_bad_input_is_an_error_that_names_the_adapter(name, case):
    given, error, said = BAD[case]
    p = linear_problem(LENGTHS, ref=None, kl="number", bias=False)
    calls = {
        "kto": lambda: linear_kto_loss(p.hidden, p.weight, p.labels, p.desirable, kl=0.0, adapter=given),
        "preference": lambda: linear_preference_loss(p.hidden[:4], p.weight, p.labels[:4], DPO(), adapter=given),
        "token_logps": lambda: linear_token_logps(p.hidden, p.weight, p.labels, adapter=given),
    }
    with pytest.raises(error, match=f"^{said}"), FlopCounterMode(display=False) as counter:
        calls[name]()
    assert counter.get_total_flops() == 0
