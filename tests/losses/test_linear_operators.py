"""The operators from hidden states as PyTorch sees them: which GEMMs run, what upstream gradients cost, autograd's
rules, torch.compile, opcheck."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kto_kernels import LinearPlan, linear_kto_loss, linear_token_logps
from kto_kernels.linear.head import Needs
from kto_kernels.objectives import BCO, KTO
from kto_kernels.ops import linear as linear_ops
from kto_kernels.options import Chunking, Objective, Scale, Scoring
from kto_kernels.pairs import Judged, Preference
from tests.support.linear_harness import HEAD, VOCAB, WIDTH, gemm_flops, linear_problem, ours_linear
from tests.support.operator_cases import both

# The padded problem: 5 sequences of 11 rows, of which these are scored.
LENGTHS = (6, 3, 9, 0, 1)
SCORED = sum(LENGTHS)
UNIT = 2 * SCORED * WIDTH * VOCAB
FOUR_ROWS = 4 * VOCAB * 4


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def problem(**options):
    return linear_problem(LENGTHS, ref=None, kl="number", max_logits_bytes=FOUR_ROWS, **options)


def step(p, trained, **extra):
    tensors = dict(p.tensors)
    leaves = {"hidden": p.hidden, "weight": p.weight, "bias": tensors.pop("bias")}
    leaves = {name: leaf.detach().requires_grad_(name in trained) for name, leaf in leaves.items()}
    out = linear_kto_loss(
        leaves["hidden"], leaves["weight"], p.labels, p.desirable, bias=leaves["bias"], **tensors, **p.options, **extra
    )
    if trained:
        out.loss.sum().backward()
    return out, leaves


# (what is trained, options) → GEMM units. 7 rows of sequences longer than a chunk lie before its last four: 2 of the
# first and 5 of the third.
EARLY = 7 / SCORED
COUNTS = [
    (HEAD, {"long_sequences": "defer"}, 3),
    (HEAD, {"long_sequences": "recompute"}, 3 + EARLY),
    (("hidden", "weight"), {"long_sequences": "defer"}, 3),
    (("weight",), {"long_sequences": "defer"}, 2),
    (("bias",), {}, 1),
    (("hidden", "bias"), {}, 2),
    (("hidden",), {}, 2),
    ((), {}, 1),
    (HEAD, {"reduction": "none"}, 4),
    (("weight",), {"reduction": "none"}, 3),
    (("hidden",), {"reduction": "none"}, 2),
    (HEAD, {"max_logits_bytes": None}, 3),
]


@pytest.mark.parametrize(("trained", "options", "units"), COUNTS, ids=str)
@pytest.mark.parametrize("count", [gemm_flops, counted])
def test_a_step_runs_the_gemms_that_are_promised(count, trained, options, units):
    p = problem(**{name: value for name, value in options.items() if name != "max_logits_bytes"})
    p.options |= options
    assert count(lambda: step(p, trained)) == pytest.approx(units * UNIT)


@pytest.mark.parametrize("count", [gemm_flops, counted])
def test_reference_and_kl_cost_one_unit_each_of_their_scored_rows(count):
    p = linear_problem(LENGTHS, long_sequences="defer", max_logits_bytes=FOUR_ROWS)
    ref_width, kl_rows = p.tensors["ref_weight"].shape[1], 11
    expected = 3 * UNIT + 2 * VOCAB * (SCORED * ref_width + kl_rows * (WIDTH + ref_width))
    assert count(lambda: step(p, HEAD)) == expected


@pytest.mark.parametrize("count", [gemm_flops, counted])
def test_without_gradients_one_unit(count):
    p = problem()
    hidden, weight = p.hidden.requires_grad_(), p.weight.requires_grad_()

    def run(context):
        with context:
            out = linear_kto_loss(hidden, weight, p.labels, p.desirable, kl=0.0)
        assert not out.loss.requires_grad

    assert count(lambda: run(torch.no_grad())) == UNIT
    assert count(lambda: run(torch.inference_mode())) == UNIT


@pytest.mark.parametrize("count", [gemm_flops, counted])
@pytest.mark.parametrize(("trained", "units"), [(("hidden",), 2), (HEAD, 4), (("weight",), 3), ((), 1)])
def test_a_dpo_like_loss_on_the_seam(count, trained, units):
    """Pairs of sequences with any loss on top: 2G with a frozen head, 4G with a trained one."""
    p = linear_problem((6, 3, 9, 4))
    leaves = {"hidden": p.hidden, "weight": p.weight, "bias": p.tensors["bias"]}
    grads = {}

    def dpo(fused):
        mine = {name: leaf.detach().clone().requires_grad_(name in trained) for name, leaf in leaves.items()}
        if fused:
            logps = linear_token_logps(
                mine["hidden"], mine["weight"], p.labels, bias=mine["bias"], max_logits_bytes=FOUR_ROWS
            )
        else:
            logits = torch.nn.functional.linear(*mine.values()).log_softmax(-1)
            logps = logits.gather(-1, p.labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(p.labels == -100, 0)
        sums = logps.sum(-1)
        loss = -torch.nn.functional.logsigmoid(0.1 * (sums[::2] - sums[1::2])).mean()
        if trained:
            loss.backward()
        grads[fused] = [mine[name].grad for name in trained]

    assert count(lambda: dpo(fused=True)) == units * 2 * 22 * WIDTH * VOCAB
    dpo(fused=False)
    for mine, theirs in zip(grads[True], grads[False]):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_the_plan_says_what_runs():
    p = problem(long_sequences="recompute")
    plan = LinearPlan.of(
        LENGTHS, VOCAB, WIDTH, torch.float32, max_logits_bytes=FOUR_ROWS, long_sequences="recompute", device="cpu"
    )
    assert plan.flops == gemm_flops(lambda: step(p, HEAD))
    assert [i for i, _ in plan.recomputed] == [0, 2]


# Upstream gradients ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("trained", [HEAD, ("hidden",), ("weight",)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_upstream_gradient_scales_everything(trained, reduction):
    p = problem(reduction=reduction)
    grads = []
    for factor in (1.0, -3.0):
        out, leaves = ours_linear(p, "cpu", trained)
        del leaves
        tensors = dict(p.tensors)
        mine = {"hidden": p.hidden, "weight": p.weight, "bias": tensors.pop("bias")}
        mine = {name: leaf.detach().clone().requires_grad_(name in trained) for name, leaf in mine.items()}
        out = linear_kto_loss(
            mine["hidden"], mine["weight"], p.labels, p.desirable, bias=mine["bias"], **tensors, **p.options
        )
        weights = torch.arange(1.0, 1 + out.loss.numel()).view_as(out.loss)
        (factor * weights * out.loss).sum().backward()
        grads.append({name: mine[name].grad for name in trained})
    for name in trained:
        torch.testing.assert_close(grads[1][name], -3.0 * grads[0][name])


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_gradients_are_handed_over_without_a_copy(factor):
    p = problem()
    mine = {"hidden": p.hidden.requires_grad_(), "weight": p.weight.requires_grad_()}
    mine["bias"] = p.tensors["bias"].requires_grad_()
    mine["adapter_a"], mine["adapter_b"] = (
        torch.randn(shape, requires_grad=True) for shape in ((2, WIDTH), (VOCAB, 2))
    )
    adapter = (mine["adapter_a"], mine["adapter_b"], 0.5)
    out = linear_kto_loss(
        mine["hidden"], mine["weight"], p.labels, p.desirable, bias=mine["bias"], adapter=adapter, kl=0.0
    )
    node = out.loss.grad_fn
    formed = {name: tensor.data_ptr() for name, tensor in zip(node.names, node.saved_tensors)}
    (factor * out.loss).backward()
    for name, leaf in mine.items():
        assert leaf.grad.data_ptr() == formed[name], name


def test_a_frozen_heads_gradient_is_handed_over_without_a_copy():
    p = problem()
    hidden = p.hidden.requires_grad_()
    logps = linear_token_logps(hidden, p.weight, p.labels)
    formed = logps.grad_fn.saved_tensors[0].data_ptr()
    logps.sum().backward()
    assert hidden.grad.data_ptr() == formed


@pytest.mark.parametrize("trained", [HEAD, ("hidden",)])
def test_a_second_backward_says_why_not(trained):
    p = problem()
    tensors = dict(p.tensors)
    leaves = {"hidden": p.hidden, "weight": p.weight, "bias": tensors.pop("bias")}
    leaves = {name: leaf.detach().requires_grad_(name in trained) for name, leaf in leaves.items()}
    out = linear_kto_loss(
        leaves["hidden"], leaves["weight"], p.labels, p.desirable, bias=leaves["bias"], **tensors, **p.options
    )
    out.loss.backward(retain_graph=True)
    first = leaves["hidden"].grad.clone()
    with pytest.raises(RuntimeError, match="handed over by the first backward"):
        out.loss.backward()
    assert torch.equal(leaves["hidden"].grad, first)


def test_a_trained_head_on_the_seam_may_run_backward_twice():
    p = problem()
    weight = p.weight.requires_grad_()
    logps = linear_token_logps(p.hidden, weight, p.labels)
    logps.sum().backward(retain_graph=True)
    first = weight.grad.clone()
    logps.sum().backward()
    torch.testing.assert_close(weight.grad, 2 * first)


@pytest.mark.parametrize("trained", [HEAD, ("hidden",)])
def test_differentiating_twice_raises(trained):
    p = problem()
    leaves = [leaf.detach().requires_grad_() for leaf in (p.hidden, p.weight)]
    for run in (
        lambda: linear_kto_loss(*leaves, p.labels, p.desirable, kl=0.0).loss,
        lambda: linear_token_logps(leaves[0], p.weight, p.labels).sum(),
        lambda: linear_token_logps(*leaves, p.labels).sum(),
    ):
        (grad,) = torch.autograd.grad(run(), leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="twice"):
            grad.sum().backward()


def test_unused_outputs_get_no_gradient():
    p = problem()
    hidden = p.hidden.requires_grad_()
    out = linear_kto_loss(hidden, p.weight.requires_grad_(), p.labels, p.desirable, kl=0.0, outputs=("entropy",))
    for values in (out.logps, out.rewards, out.kl, out.entropy):
        assert not values.requires_grad


# torch.library and torch.compile ──────────────────────────────────────────────────────────────────────────────────────


SCORING = Scoring(Scale(0.5, 6.0, 1.3), shift=True, backend="cpu")


def opcheck(operator, call):
    """`torch.library.opcheck` of both kinds of an operator."""
    for each, arguments in both(operator, call):
        torch.library.opcheck(each._opoverload, arguments)


def projected(p, leaves, **chunking):
    offsets = p.tensors.get("cu_seqlens")
    return linear_ops.Projected(*leaves, p.labels, offsets, SCORING, Chunking(4 * VOCAB * 4, **chunking), torch.float32)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck_passes_for_token_logps(packed, gradient):
    p = linear_problem(packed=packed)
    leaves = (p.hidden.requires_grad_(gradient), p.weight, p.tensors["bias"])
    side = projected(p, leaves, outputs=("entropy", "is_top1"))
    opcheck(linear_ops.linear_token_logps, linear_ops.LinearTokenLogps(side, gradient, False))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("trained", "objective"),
    [
        ((True, True, True), None),
        ((False, True, False), KTO(nll_weight=0.5)),
        ((True, False, True), None),
        ((True, True, True), BCO(0.2, reward_shift=0.1)),
    ],
)
def test_opcheck_passes_for_the_loss_and_its_backward(packed, trained, objective):
    p = linear_problem(packed=packed, ref="logps")
    head = [
        leaf.detach().requires_grad_(needed) for leaf, needed in zip((p.hidden, p.weight, p.tensors["bias"]), trained)
    ]
    z0 = torch.tensor(0.3, dtype=torch.float64)
    lengths = torch.full((len(p.desirable),), 3.0, dtype=torch.float64)
    call = linear_ops.LinearKTO(
        projected(p, head, long_sequences="defer", outputs=("mean_logits",)),
        Judged(p.desirable, z0, p.tensors["ref_logps"], lengths, nll_tokens=z0),
        Objective(0.1, 1.0, 1.2),
        Needs(*trained),
        None if objective is None else Preference(objective, "halves"),
        [i % 2 == 0 for i in range(len(p.desirable))] if packed else None,
        inplace_backward=False,
    )
    opcheck(linear_ops.linear_kto, call)
    side = projected(p, [leaf.detach() for leaf in head])
    call = linear_ops.LinearBackward(torch.randn(p.labels.shape), None, side, Needs(*trained))
    opcheck(linear_ops.linear_backward, call)


def test_opcheck_passes_for_scaling():
    opcheck(linear_ops.scale_, linear_ops.Scaling(torch.randn(5, 3), torch.tensor(2.0), "cpu"))
    opcheck(linear_ops.scale_rows_, linear_ops.ScaleRows(torch.randn(5, 3), torch.randn(5)))


# Inductor takes much longer to compile.
INDUCTOR = [("inductor", "mean", HEAD), ("inductor", "none", ("hidden",))]


@pytest.mark.parametrize(
    ("compiler", "reduction", "trained"),
    [
        *itertools.product(["aot_eager"], ["mean", "none"], [HEAD, ("hidden",), ("weight",)]),
        *(pytest.param(*case, marks=pytest.mark.wide) for case in INDUCTOR),
    ],
)
def test_compiles_as_one_graph_with_the_eager_result(fresh_compiler, compiler, reduction, trained):
    p = linear_problem(reduction=reduction, max_logits_bytes=FOUR_ROWS, outputs=("entropy",))
    tensors = dict(p.tensors)
    leaves = {"hidden": p.hidden, "weight": p.weight, "bias": tensors.pop("bias")}

    def loss(hidden, weight, bias):
        out = linear_kto_loss(
            hidden * 1, weight, p.labels, p.desirable, bias=bias, **tensors, **p.options, backend="cpu"
        )
        return out.loss.sum() * 3, out.entropy

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=compiler)):
        mine = {name: leaf.detach().clone().requires_grad_(name in trained) for name, leaf in leaves.items()}
        value, entropy = function(**mine)
        value.backward()
        results.append([value.detach(), entropy, *(mine[name].grad for name in trained)])
    for plain, compiled in zip(*results):
        torch.testing.assert_close(plain, compiled)


@pytest.mark.fault(6)
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_whole_where_the_compiler_cannot_ask_for_autocast(fresh_compiler, monkeypatch, autocast):
    """As `torch.compile` before PyTorch 2.13, which traces `is_autocast_enabled` of a device type, and breaks the graph at
    the question whether the device type has autocast."""
    monkeypatch.setattr(torch.amp, "is_autocast_available", torch.compiler.disable(torch.amp.is_autocast_available))
    p = linear_problem(LENGTHS, ref=None, kl="number")

    def step(hidden, weight):
        logps = linear_token_logps(hidden, weight, p.labels)
        return linear_kto_loss(hidden * 1, weight, p.labels, p.desirable, kl=0.4).loss, logps

    weight = p.weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for mine, eager in zip(
            torch.compile(step, fullgraph=True, backend="aot_eager")(p.hidden, weight), step(p.hidden, weight)
        ):
            assert torch.equal(mine, eager)


def test_a_device_type_without_autocast():
    """Shapes are tried on the device "meta", for which PyTorch's own question raises; an `autocast` of another device
    type may be on meanwhile."""
    hidden, weight = torch.empty(5, 11, WIDTH, device="meta"), torch.empty(VOCAB, WIDTH, device="meta")
    labels = torch.empty(5, 11, dtype=torch.int64, device="meta")
    with torch.autocast("cpu", torch.bfloat16):
        logps = linear_token_logps(hidden.half(), weight, labels, backend="torch")
    assert (logps.shape, logps.dtype, logps.device.type) == (labels.shape, torch.float32, "meta")


@pytest.mark.parametrize("name", ["token_logps", "kto_forward", "linear_token_logps", "linear_backward", "linear_kto"])
def test_schemas_name_tensors_and_pack_the_rest(name):
    """Saved graphs (torch.export) name these operators."""
    arguments = getattr(torch.ops.kto_kernels, name).default._schema.arguments
    tensors = [argument for argument in arguments if str(argument.type) in ("Tensor", "Optional[Tensor]")]
    packed = [argument.name for argument in arguments[len(tensors) :]]
    assert packed == [name for name in ("floats", "ints", "names") if name in packed]
