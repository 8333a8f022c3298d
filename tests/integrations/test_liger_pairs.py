"""In place of Liger's DPO, CPO, ORPO and SimPO losses: its results where it is right, and what is refused."""

import inspect
import math
import sys
from dataclasses import fields

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kto_kernels.integrations import liger as ours
from tests.support.harness import assert_as_accurate

chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
functional = pytest.importorskip("liger_kernel.chunked_loss.functional")

LOSSES = ("DPO", "CPO", "SimPO", "ORPO")
# Held here: the patch replaces what modules hold by name.
PEERS = {loss: getattr(chunked_loss, f"LigerFusedLinear{loss}Loss") for loss in LOSSES}
PEER_FUNCTIONS = {loss: getattr(functional, f"liger_fused_linear_{loss.lower()}") for loss in LOSSES}
OURS = {loss: getattr(ours, f"LigerFusedLinear{loss}Loss") for loss in LOSSES}
OUR_FUNCTIONS = {loss: getattr(ours, f"liger_fused_linear_{loss.lower()}") for loss in LOSSES}

B, T, H, V = 6, 7, 12, 23
METRICS = ("chosen_logps", "rejected_logps", "chosen_logits", "rejected_logits", "nll", "chosen_rewards",
           "rejected_rewards", "log_odds_ratio", "log_odds_chosen")  # fmt: skip


def inputs(*, bias=True, ref=False, nll=False, ignore_index=-100, dtype=torch.float32):
    """Arguments by keyword; hidden states as trainers pass them, `h[:, :-1]`, not contiguous."""

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    def targets():
        found = torch.randint(0, V, (B, T + 1))[:, 1:]
        for i, prompt in enumerate((2, 0, 3, 1, 4, 1)):
            found[i, :prompt] = ignore_index
        return found

    hidden = random(B, T + 1, H).requires_grad_()
    # of a size at which the values do not saturate
    arguments = {"lin_weight": (0.3 * random(V, H)).requires_grad_(), "_input": hidden[:, :-1], "target": targets()}
    if bias:
        arguments["bias"] = random(V).requires_grad_()
    if ref:
        arguments |= {"ref_input": random(B, T + 1, H + 4)[:, :-1], "ref_weight": 0.3 * random(V, H + 4)}
    if ref and bias:
        arguments["ref_bias"] = random(V)
    if nll:
        arguments["nll_target"] = targets().flip(0)
    leaves = [hidden, arguments["lin_weight"], *([arguments["bias"]] if bias else [])]
    return arguments, leaves


def run(module, arguments, leaves, upstream=1.0):
    loss, metrics = module(**arguments)
    return loss, *metrics, *torch.autograd.grad(loss, leaves, torch.full_like(loss, upstream))


def named(leaves, results):
    gradients = [f"gradient {k}" for k in range(len(leaves))]
    return zip((["loss", *METRICS][: len(results) - len(leaves)] + gradients), results, strict=True)


def assert_equal(leaves, mine, theirs, without=()):
    """Values, gradients, shapes and dtypes, to fp32 rounding. Nothing may be 0 but what is named."""
    for (name, m), (_, t) in zip(named(leaves, mine), named(leaves, theirs), strict=True):
        assert (m.shape, m.dtype, m.requires_grad) == (t.shape, t.dtype, t.requires_grad), name
        scale = t.abs().max().item()
        assert (scale > 0) == (name not in without), name
        assert (m - t).abs().max().item() <= 2e-5 * scale, name


SMOOTHED = {
    "robust": {"label_smoothing": 0.2},
    "exo_pair": {"label_smoothing": 0.01},
    "discopop": {"discopop_tau": 0.3},
}
TYPES = (
    "sigmoid",
    "hinge",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
)
NLL, NO_NLL = {"compute_nll_loss": True}, {"compute_nll_loss": False}
# Loss, its options, and the arguments.
CASES = [
    *(("DPO", {"loss_type": kind, "beta": 0.3} | SMOOTHED.get(kind, {}), {"ref": True}) for kind in TYPES),
    *(
        ("DPO", {"loss_type": kind, "beta": 0.3, "average_log_prob": True} | SMOOTHED.get(kind, {}), {"ref": True})
        for kind in TYPES
    ),
    ("DPO", {}, {"ref": True, "bias": False}),
    ("DPO", {"use_ref_model": False}, {}),
    ("DPO", {"use_ref_model": False}, {"ref": True}),
    ("DPO", {"use_ref_model": False, "average_log_prob": True, **NLL}, {}),
    ("DPO", {"label_smoothing": 0.2}, {"ref": True}),  # which Liger's sigmoid does not read
    ("DPO", {"alpha": 0.7, **NLL}, {"ref": True}),
    ("DPO", {"alpha": 0.0, "ignore_index": 3, **NLL}, {"ref": True, "ignore_index": 3}),
    *(
        (loss, options, {})
        for loss, extra in (("CPO", {"average_log_prob": True}), ("SimPO", {"gamma": 1.5}))
        for options in ({}, {"label_smoothing": 0.1, "alpha": 0.7}, {"beta": 1.3, **NO_NLL}, extra)
    ),
    ("CPO", {"ignore_index": 5}, {"ignore_index": 5, "bias": False}),
    ("SimPO", {"ignore_index": 5}, {"ignore_index": 5, "bias": False}),
    ("ORPO", {}, {}),
    ("ORPO", {"beta": 0.4, "ignore_index": 5}, {"ignore_index": 5, "bias": False}),
    ("ORPO", NO_NLL, {"nll": True}),
    ("ORPO", {"beta": 0.4}, {"nll": True}),
]


def case_id(value):
    return "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None


@pytest.mark.parametrize(("loss", "options", "problem"), CASES, ids=case_id)
@pytest.mark.parametrize("upstream", [-2.5, 1.0])
def test_results_equal_ligers_to_fp32_rounding(loss, options, problem, upstream):
    arguments, leaves = inputs(**problem)
    theirs = run(PEERS[loss](compiled=False, **options), arguments, leaves, upstream)
    mine = run(OURS[loss](**options), arguments, leaves, upstream)
    no_nll = not options.get("compute_nll_loss", loss != "DPO")
    assert_equal(leaves, mine, theirs, without=("nll",) if no_nll else ())


@pytest.mark.parametrize("loss", LOSSES)
def test_functions_take_their_own_order(loss):
    """Positional, and every option away from its default."""
    arguments, leaves = inputs(ref=loss == "DPO", nll=loss == "ORPO", ignore_index=4)
    tensors = [arguments[name] for name in ("_input", "lin_weight", "target", "bias")]
    positional = {
        "DPO": [
            *(arguments.get(name) for name in ("ref_input", "ref_weight", "ref_bias")),
            *(4, 0.3, True, False, True, True, 2, "robust", 0.2, 0.1, 0.6),
        ],
        "CPO": [4, 0.3, 0.6, 0.2, False, False, True, 2],
        "SimPO": [4, 0.3, 0.6, 0.2, True, False, 0.9, 2],
        "ORPO": [4, 0.3, True, arguments.get("nll_target"), False, 2],
    }[loss]
    results = [
        run(lambda f=function: f(*tensors, *positional), {}, leaves)
        for function in (OUR_FUNCTIONS[loss], PEER_FUNCTIONS[loss])
    ]
    assert_equal(leaves, *results, without=("nll",) if loss == "CPO" else ())


@pytest.mark.parametrize("loss", LOSSES)
def test_functions_have_their_own_defaults(loss, monkeypatch):
    """SimPO's function computes no negative log-likelihood, and SimPO's class does."""
    monkeypatch.setattr(torch, "compile", lambda function: function)  # Liger's default, which takes seconds
    arguments, leaves = inputs(bias=False, ref=loss == "DPO")
    tensors = [arguments[name] for name in ("_input", "lin_weight", "target")]
    ref = {name: value for name, value in arguments.items() if name.startswith("ref_")}
    theirs = run(lambda: PEER_FUNCTIONS[loss](*tensors, None, *ref.values()), {}, leaves)
    mine = run(lambda: OUR_FUNCTIONS[loss](*tensors, **ref), {}, leaves)
    assert_equal(leaves, mine, theirs, without=("nll",) if loss in ("DPO", "SimPO") else ())
    with pytest.raises(TypeError, match="gama"):
        OUR_FUNCTIONS[loss](*tensors, gama=1.0)
    assert OUR_FUNCTIONS[loss].__name__ == f"liger_fused_linear_{loss.lower()}"


@pytest.mark.parametrize("loss", LOSSES)
def test_classes_have_ligers_signatures(loss):
    for mine, theirs in ((OURS[loss], PEERS[loss]), (OURS[loss].forward, PEERS[loss].forward)):
        mine, theirs = (inspect.signature(x).parameters.values() for x in (mine, theirs))
        assert [(p.name, p.default) for p in mine] == [(p.name, p.default) for p in theirs]
    module = OURS[loss](7, beta=0.2, chunk_size=3, compiled=False)
    assert (module.ignore_index, module.chunk_size, module.compiled) == (7, 3, False)
    shown = {each.name for each in fields(module)} - {"chunk_size", "compiled"}
    assert all(f"{name}=" in repr(module) for name in shown) and "beta=0.2" in repr(module)
    assert isinstance(module, torch.nn.Module) and not list(module.parameters()) and hash(module)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_as_accurate_as_liger_in_half_precision(loss, dtype):
    options = {"compute_nll_loss": True, "beta": 0.3}
    arguments, leaves = inputs(ref=loss == "DPO", dtype=dtype)
    theirs = run(PEERS[loss](compiled=False, **options), arguments, leaves)
    mine = run(OURS[loss](**options), arguments, leaves)
    wide = {k: v.detach().float() if v.is_floating_point() else v for k, v in arguments.items()}
    wide_leaves = [leaf.detach().float().requires_grad_() for leaf in leaves]
    wide |= dict(zip(("_input", "lin_weight", "bias"), [wide_leaves[0][:, :-1], *wide_leaves[1:]]))
    exact = run(PEERS[loss](compiled=False, **options), wide, wide_leaves)
    for (name, m), (_, t), (_, e) in zip(*(named(leaves, x) for x in (mine, theirs, exact)), strict=True):
        assert (m.shape, m.dtype) == (t.shape, t.dtype), name
        # Rounded logits, of up to about 4, make log-probabilities that are off by their rounding.
        unit, scale = torch.finfo(dtype).eps, e.abs().max().item()
        assert_as_accurate(name, m.detach(), t.detach(), e.detach(), unit, max(4.0 if scale > 1 else 0.0, scale))
        assert (m - e).abs().max() <= 0.1 * scale  # which zeros do not pass


def test_sppo_is_as_accurate_as_liger():
    """In the shape of a test of Liger's own, whose tolerance is below the rounding of these gradients."""

    def random(*shape):
        return torch.randn(*shape)

    arguments = {"lin_weight": random(123, 31), "_input": random(6, 47, 31), "target": torch.randint(123, (6, 47))}
    arguments |= {"ref_input": random(6, 47, 31), "ref_weight": random(123, 31)}

    def results(module, dtype):
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in arguments.items()}
        leaves = [given[k].requires_grad_() for k in ("_input", "lin_weight")]
        loss, _ = module(**given)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    theirs = results(PEERS["DPO"](loss_type="sppo_hard", compiled=False), torch.float32)
    mine, exact = (results(OURS["DPO"](loss_type="sppo_hard"), dtype) for dtype in (torch.float32, torch.float64))
    for name, m, t, e in zip(("loss", "_input", "lin_weight"), mine, theirs, exact, strict=True):
        assert e.abs().max() > 100
        assert_as_accurate(name, m, t, e, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("loss", LOSSES)
def test_fp64_gives_the_same_in_fp64(loss):
    arguments, leaves = inputs(ref=loss == "DPO", dtype=torch.float64)
    theirs = run(PEERS[loss](compiled=False, compute_nll_loss=True), arguments, leaves)
    mine = run(OURS[loss](compute_nll_loss=True), arguments, leaves)
    assert all(x.dtype == torch.float64 for x in mine)
    for m, t in zip(mine, theirs):
        torch.testing.assert_close(m, t.double(), rtol=2e-5, atol=2e-5 * t.abs().max().item())
    # A gradient is handed over by one backward, so that gradcheck, which asks twice, cannot be used.
    inner, bias = arguments["_input"].detach(), leaves[2].detach()
    directions = torch.randn_like(inner), torch.randn_like(bias)

    def value(step):
        given = [(x + step * d).requires_grad_() for x, d in zip((inner, bias), directions)]
        result = OURS[loss](compute_nll_loss=True)(**(arguments | dict(zip(("_input", "bias"), given))))[0]
        return result, given

    slope = (value(1e-5)[0] - value(-1e-5)[0]).item() / 2e-5
    result, given = value(0.0)
    exact = sum((g * d).sum().item() for g, d in zip(torch.autograd.grad(result, given), directions))
    assert exact == pytest.approx(slope, rel=1e-6) and abs(slope) > 1e-3


@pytest.mark.parametrize("loss", LOSSES)
def test_compiled_and_chunk_size_change_no_bit(loss):
    arguments, leaves = inputs(ref=loss == "DPO")
    one = run(OURS[loss](), arguments, leaves)
    other = run(OURS[loss](compiled=False, chunk_size=3), arguments, leaves)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
def test_torch_compile_gives_the_eager_results(loss):
    torch.compiler.reset()
    arguments, leaves = inputs(ref=loss == "DPO", nll=loss == "ORPO")
    module = OURS[loss]()
    eager = run(module, arguments, leaves)
    graph = run(torch.compile(module, fullgraph=True, backend="aot_eager"), arguments, leaves)
    for a, b in zip(eager, graph, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("trained", "units"), [((0, 1, 2), 3), ((0,), 2), ((), 1)], ids=["head", "hidden", "nothing"])
def test_products_with_the_head(trained, units):
    """A reference costs one product more; metrics cost none."""
    arguments = {name: value.detach() for name, value in inputs(ref=True)[0].items()}
    heads = [arguments[name].requires_grad_(k in trained) for k, name in enumerate(("_input", "lin_weight", "bias"))]
    with FlopCounterMode(display=False) as counter:
        loss, _ = OURS["DPO"]()(**arguments)
        if trained:
            loss.backward()
    scored = (arguments["target"] != -100).sum().item()
    rows = {scored, B * T}  # a backend may leave out prompts
    assert counter.get_total_flops() in {2 * n * V * (units * H + H + 4) for n in rows}
    assert [x.grad is not None for x in heads] == [k in trained for k in range(3)]


# Where Liger is wrong ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("loss", "options"), [("DPO", {"average_log_prob": True}), ("CPO", {"average_log_prob": True}),
                                               ("SimPO", {})])  # fmt: skip
def test_a_sequence_without_a_scored_token(loss, options):
    """Liger's mean over no tokens is NaN, and so is everything; ours is 0."""
    arguments, leaves = inputs(ref=loss == "DPO")
    arguments["target"][4] = -100
    theirs = run(PEERS[loss](compiled=False, **options), arguments, leaves)
    assert theirs[0].isnan() and theirs[-2].isnan().any()
    mine = run(OURS[loss](**options), arguments, leaves)
    assert all(x.isfinite().all() for x in mine)
    assert mine[2][1] == 0 and (mine[-3][4] == 0).all() and mine[-3][3].abs().max() > 0


def test_no_chosen_token_has_no_likelihood():
    """Liger divides by their number, even where no negative log-likelihood is asked for."""
    arguments, leaves = inputs(ref=True)
    arguments["target"][: B // 2] = -100
    assert PEERS["DPO"](compiled=False)(**arguments)[0].isnan()
    mine = run(OURS["DPO"](compute_nll_loss=True), arguments, leaves)
    assert all(x.isfinite().all() for x in mine) and mine[5] == 0 and mine[-2].abs().max() > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_an_empty_batch_has_the_loss_0(loss):
    arguments, leaves = inputs(ref=loss == "DPO")
    empty = {name: value[:0] if value.shape[0] == B else value for name, value in arguments.items()}
    mine = run(OURS[loss](), empty, leaves)
    assert mine[0] == 0 and all(x.isfinite().all() and not x.any() for x in mine)


# Refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("loss", "options", "error", "message"),
    [
        ("DPO", {"loss_type": "ipo"}, ValueError, "loss_type: expected one of 'sigmoid', 'hinge', "),
        ("DPO", {"loss_type": "robust", "label_smoothing": 0.5}, ValueError, "label_smoothing: expected a number"),
        ("DPO", {"loss_type": "exo_pair"}, ValueError, "label_smoothing: expected a finite number > 0"),
        ("DPO", {"loss_type": "discopop", "discopop_tau": -1.0}, ValueError, "discopop_tau: expected"),
        ("DPO", {"beta": 0.0}, ValueError, "beta: expected a finite number > 0"),
        ("DPO", {"alpha": -1.0}, ValueError, "alpha: expected a finite number >= 0"),
        ("DPO", {"average_log_prob": 1}, TypeError, "average_log_prob: expected True or False"),
        ("CPO", {"average_log_prob": None}, TypeError, "average_log_prob: expected True or False"),
        ("CPO", {"label_smoothing": 0.7}, ValueError, "label_smoothing: expected a number"),
        ("CPO", {"alpha": math.nan}, ValueError, "alpha: expected a finite number >= 0"),
        ("SimPO", {"gamma": -0.1}, ValueError, "gamma: expected"),
        ("SimPO", {"ignore_index": 1.5}, TypeError, "ignore_index: expected"),
        ("ORPO", {"compute_nll_loss": 0}, TypeError, "compute_nll_loss: expected True or False"),
        ("ORPO", {"beta": "1"}, TypeError, "beta: expected a number"),
    ],
)
def test_wrong_options_are_errors_that_name_them(loss, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        OURS[loss](**options)
    module = OURS[loss]()
    vars(module).update(options)  # and where they are set later
    with pytest.raises(error, match=f"^{message}"):
        module(**inputs(ref=loss == "DPO")[0])


@pytest.mark.parametrize(
    ("loss", "change", "error", "message"),
    [
        ("CPO", {"_input": torch.randn(B * T, H)}, ValueError, "_input: expected"),
        ("CPO", {"lin_weight": torch.randn(V, H + 1)}, ValueError, "_input: expected"),
        ("SimPO", {"target": torch.zeros(B, T)}, TypeError, "target: expected dtype"),
        ("SimPO", {"target": torch.zeros(B, T + 1, dtype=torch.int64)}, ValueError, "target: expected shape"),
        ("CPO", {"target": torch.full((B, T), V)}, ValueError, "labels: expected 0 <= label"),
        ("CPO", {"bias": torch.zeros(V + 1)}, ValueError, "bias: expected shape"),
        ("ORPO", {"nll_target": torch.zeros(B // 2, T, dtype=torch.int64)}, ValueError, "nll_target: expected shape"),
        ("ORPO", {"nll_target": torch.zeros(B, T)}, TypeError, "nll_target: expected dtype"),
        ("DPO", {"ref_input": None}, ValueError, "ref_input: needed with use_ref_model=True"),
        ("DPO", {"ref_weight": None}, ValueError, "ref_weight: needed with use_ref_model=True"),
        ("DPO", {"ref_weight": torch.zeros(V + 1, H + 4)}, ValueError, "ref_weight: expected a vocabulary"),
        ("DPO", {"ref_input": torch.zeros(B, T + 1, H + 4)}, ValueError, "ref_input: expected shape"),
    ],
)
def test_wrong_tensors_are_errors_that_name_them(loss, change, error, message):
    arguments, _ = inputs(ref=loss == "DPO", bias="bias" in change)
    with pytest.raises(error, match=f"^{message}"):
        OURS[loss]()(**(arguments | change))


@pytest.mark.parametrize("loss", LOSSES)
def test_an_odd_batch_has_no_pairs(loss):
    arguments, _ = inputs(ref=loss == "DPO")
    odd = {name: value[:5] if value.shape[0] == B else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=r"^target: expected an even number of sequences, .* got 5$"):
        OURS[loss]()(**odd)


# The patch ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_patch_replaces_all_losses_and_is_undone():
    def held():
        modules = {loss: f"liger_kernel.chunked_loss.{loss.lower()}_loss" for loss in LOSSES}
        return [
            ({loss: getattr(chunked_loss, f"LigerFusedLinear{loss}Loss") for loss in LOSSES}),
            {loss: getattr(sys.modules[modules[loss]], f"LigerFusedLinear{loss}Loss") for loss in LOSSES},
            {loss: getattr(functional, f"liger_fused_linear_{loss.lower()}") for loss in LOSSES},
        ]

    theirs, mine = [PEERS, PEERS, PEER_FUNCTIONS], [OURS, OURS, OUR_FUNCTIONS]
    assert held() == theirs
    with ours.patch_liger() as patch:
        assert held() == mine
        for loss in LOSSES:
            assert f"liger_kernel.chunked_loss.LigerFusedLinear{loss}Loss" in patch.replaced
    assert held() == theirs
    ours.patch_liger()
    assert held() == mine
    ours.unpatch_liger()
    assert held() == theirs


@pytest.mark.parametrize("loss", LOSSES)
def test_the_patch_refuses_an_unknown_signature(loss, monkeypatch):
    class Later(torch.nn.Module):
        def __init__(self, ignore_index=-100, beta=0.1, temperature=1.0):
            super().__init__()

    monkeypatch.setattr(chunked_loss, f"LigerFusedLinear{loss}Loss", Later)
    with pytest.raises(
        RuntimeError, match=rf"liger-kernel .*LigerFusedLinear{loss}Loss: unknown signature.*temperature"
    ):
        ours.patch_liger()
    assert (
        chunked_loss.LigerFusedLinearKTOLoss is not ours.LigerFusedLinearKTOLoss
    )  # all are checked before one is replaced
