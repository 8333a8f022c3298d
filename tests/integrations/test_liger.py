"""In place of Liger's KTO loss: its results where it is right, the definition's where it is not, and the patch."""

import inspect
import subprocess
import sys
import types

import pytest
import torch
from torch.nn.functional import linear

from kto_kernels import linear_kto_loss
from kto_kernels.integrations.liger import (
    LigerFusedLinearKTOLoss,
    liger_fused_linear_kto,
    patch_liger,
    unpatch_liger,
)
from tests.support.harness import assert_as_accurate

chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
functional = pytest.importorskip("liger_kernel.chunked_loss.functional")
# Held here in a tuple: the patch replaces what modules hold by name.
PEERS = (chunked_loss.LigerFusedLinearKTOLoss, functional.liger_fused_linear_kto)

B, T, H, V = 5, 7, 12, 23
SUMS = ("chosen_logps", "rejected_logps", "chosen_logits", "rejected_logits", "chosen_rewards", "rejected_rewards")
LABELS = torch.tensor([True, False, False, True, True])


def inputs(*, bias=False, ref=False, ignored=False, ignore_index=-100, dtype=torch.float32):
    """Arguments of the class by keyword; hidden states as trainers pass them, `h[:, :-1]`, not contiguous."""

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    hidden = random(B, T + 1, H).requires_grad_()
    arguments = {
        "_input": hidden[:, :-1],
        # of a size at which the values do not saturate
        "lin_weight": (0.3 * random(V, H)).requires_grad_(),
        "target": torch.randint(0, V, (B, T + 1))[:, 1:],
        "preference_labels": LABELS,
    }
    if bias:
        arguments["bias"] = random(V).requires_grad_()
    if ref:
        arguments |= {"ref_input": random(B, T + 1, H + 4)[:, :-1], "ref_weight": 0.3 * random(V, H + 4)}
    if ref and bias:
        arguments["ref_bias"] = random(V)
    if ignored:
        arguments["target"] = arguments["target"].clone()
        arguments["target"][:, :2] = ignore_index
        arguments["target"][1, 3:] = ignore_index
    leaves = [hidden, arguments["lin_weight"], *([arguments["bias"]] if bias else [])]
    return arguments, leaves


def run(module, arguments, leaves, upstream=1.0, **extra):
    loss, sums = module(**arguments, **extra)
    return loss, sums, torch.autograd.grad(loss, leaves, torch.full_like(loss, upstream))


def definition(arguments, options, kl=0.0):
    """The same in fp64 through materialised logits: loss, sums over each class, gradients are autograd's."""
    ignore_index = options.get("ignore_index", -100)
    target = arguments["target"]
    scored = target != ignore_index

    def sequences(hidden, weight, bias):
        logits = hidden @ weight.T + (0 if bias is None else bias)
        tokens = torch.where(scored, logits.log_softmax(-1).gather(-1, target.where(scored, 0)[..., None])[..., 0], 0.0)
        counts = scored.sum(-1).clamp(min=1) if options.get("average_log_prob") else 1
        counted = scored | options.get("count_ignored", True)
        return tokens.sum(-1) / counts, torch.where(counted, logits.sum(-1), 0.0).sum(-1)

    beta = options.get("beta", 0.1)
    logps, logits = sequences(arguments["_input"], arguments["lin_weight"], arguments.get("bias"))
    ref = 0.0
    if options.get("use_ref_model"):
        ref, _ = sequences(arguments["ref_input"], arguments["ref_weight"], arguments.get("ref_bias"))
    chosen = arguments["preference_labels"]
    sign = torch.where(chosen, 1.0, -1.0).double()
    loss = torch.sigmoid(-beta * sign * (logps - ref - kl)).mean()
    rewards = beta * (logps - ref)
    sums = [values[side].sum() for values in (logps, logits, rewards) for side in (chosen, ~chosen)]
    return loss, sums


def check_definition(arguments, leaves, options, kl=None):
    """Ours, from fp32, against the definition in fp64."""
    loss, sums, grads = run(LigerFusedLinearKTOLoss(**options), arguments, leaves, kl=kl)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact_arguments = {k: v.double() if v.is_floating_point() else v for k, v in arguments.items()}
    exact_arguments["_input"], exact_arguments["lin_weight"] = doubles[0][:, :-1], doubles[1]
    if "bias" in arguments:
        exact_arguments["bias"] = doubles[2]
    exact, exact_sums = definition(exact_arguments, options, 0.0 if kl is None else kl.double())
    exact_grads = torch.autograd.grad(exact, doubles)
    for mine, true in zip((loss, *sums, *grads), (exact, *exact_sums, *exact_grads), strict=True):
        assert torch.isfinite(mine).all()
        torch.testing.assert_close(mine.double(), true, rtol=2e-5, atol=2e-6 * max(1.0, true.abs().max().item()))
    return loss, sums, grads


# Liger's results ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "problem", "kl"),
    [
        ({}, {}, None),
        ({"beta": 0.7, "use_ref_model": True}, {"ref": True}, torch.tensor(1.5)),
        ({}, {"bias": True, "ignored": True}, torch.tensor([2.0])),
        ({"use_ref_model": True}, {"ref": True}, torch.tensor([0.5])),
        ({"use_ref_model": True, "beta": 0.3}, {"ref": True, "bias": True}, torch.tensor(-1.0)),
        ({"average_log_prob": True, "use_ref_model": True}, {"ref": True, "ignored": True}, torch.tensor(0.2)),
        ({"ignore_index": 3}, {"ignored": True, "ignore_index": 3}, None),
        ({"use_ref_model": False}, {"ref": True}, None),
    ],
)
@pytest.mark.parametrize("upstream", [1.0, -2.5])
def test_results_equal_ligers_to_fp32_rounding(options, problem, kl, upstream):
    """Values, gradients, shapes and dtypes, to fp32 rounding."""
    arguments, leaves = inputs(**problem)
    theirs = run(PEERS[0](compiled=False, chunk_size=1, **options), arguments, leaves, upstream, kl=kl)
    ours = run(LigerFusedLinearKTOLoss(**options), arguments, leaves, upstream, kl=kl)
    names = ("loss", *SUMS, *(f"gradient {k}" for k in range(len(leaves))))
    for name, mine, peer in zip(names, (ours[0], *ours[1], *ours[2]), (theirs[0], *theirs[1], *theirs[2]), strict=True):
        assert (mine.shape, mine.dtype, mine.requires_grad) == (peer.shape, peer.dtype, peer.requires_grad), name
        scale = peer.abs().max().item()
        assert scale > 0 and (mine - peer).abs().max().item() <= 1e-5 * scale, name


# The grid of Liger's own test of this loss, which draws ignored tokens and classes at random; but the large shape, whose
# sequences are cut to a quarter, once for each dtype.
GRID = [
    (shape, dtype, bias, ref_bias, ignore_index, beta)
    for shape in [(3, 47, 31, 123), (2, 2, 8, 8)]
    for dtype in (torch.bfloat16, torch.float32)
    for bias in (True, False)
    for ref_bias in (True, False)
    for ignore_index, beta in [(-100, 0.1), (42, 0.2)]
] + [((8, 32, 1024, 4096), dtype, True, True, 42, 0.2) for dtype in (torch.bfloat16, torch.float32)]


HEADS = [("_", "lin_weight"), ("ref_", "ref_weight")]


@pytest.mark.fault(19)
@pytest.mark.parametrize(("shape", "dtype", "bias", "ref_bias", "ignore_index", "beta"), GRID)
def test_as_accurate_as_liger(shape, dtype, bias, ref_bias, ignore_index, beta):
    batch, tokens, width, vocab = shape

    def random(*shape):
        return torch.randn(*shape, dtype=dtype)

    arguments = {
        "_input": random(batch, tokens, width),
        "lin_weight": random(vocab, width),
        "target": torch.randint(vocab, (batch, tokens)),
        "preference_labels": torch.randint(2, (batch,)).bool(),
        "ref_input": random(batch, tokens, width),
        "ref_weight": random(vocab, width),
    }
    arguments |= {"bias": random(vocab)} if bias else {}
    arguments |= {"ref_bias": random(vocab)} if ref_bias else {}
    arguments["target"].view(-1)[torch.randperm(batch * tokens)[: batch * tokens // 3]] = ignore_index
    kl = torch.randn(1, dtype=dtype)
    options = {"ignore_index": ignore_index, "beta": beta, "use_ref_model": True, "average_log_prob": True}

    def results(loss, arguments):
        arguments = {k: v.detach().clone() for k, v in arguments.items()}
        leaves = [arguments[k].requires_grad_() for k in ("_input", "lin_weight", "bias") if k in arguments]
        value, sums = loss(arguments)
        return value, sums, torch.autograd.grad(value, leaves)

    peer = PEERS[0](compiled=False, **options)
    theirs = results(lambda given: peer(**given, kl=kl), arguments)
    mine = results(lambda given: LigerFusedLinearKTOLoss(**options)(**given, kl=kl), arguments)
    doubles = {k: v.double() if v.is_floating_point() else v for k, v in arguments.items()}
    exact = results(lambda given: definition(given, options, kl.double()), doubles)

    # The logits are rounded to their dtype, the largest by `unit * largest`, and the log-probabilities with them, which is
    # the relative error of a probability; the sums of logits are of T·V numbers in fp32. Beside that our error may be 1.5
    # times Liger's. In bf16 a gradient of zeros would be within the rounding: there it may be Liger's error alone.
    unit, fp32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    largest = max(linear(doubles[f"{x}input"], doubles[w]).abs().max().item() for x, w in HEADS) + 4 * bias
    scales = {
        "loss": beta * largest / 2,
        "logps": batch * largest,
        "rewards": 2 * beta * batch * largest,
        "logits": (tokens * vocab) ** 0.5 * largest * fp32 / unit,
    }
    names = ("loss", *SUMS, *(f"gradient {k}" for k in range(len(exact[2]))))
    for name, m, p, e in zip(names, *((out[0], *out[1], *out[2]) for out in (mine, theirs, exact)), strict=True):
        assert (m.shape, m.dtype, m.requires_grad) == (p.shape, p.dtype, p.requires_grad), name
        scale = scales.get(name.split("_")[-1], e.abs().max().item() * (largest if dtype == torch.float32 else 1))
        assert_as_accurate(name, m.detach(), p.detach(), e.detach(), unit, scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equals_liger_in_half_precision(dtype):
    options = {"use_ref_model": True}
    arguments, leaves = inputs(bias=True, ref=True, dtype=dtype)
    theirs = run(PEERS[0](compiled=False, **options), arguments, leaves)
    ours = run(LigerFusedLinearKTOLoss(**options), arguments, leaves)
    for mine, peer in zip((ours[0], *ours[1], *ours[2]), (theirs[0], *theirs[1], *theirs[2]), strict=True):
        assert (mine.shape, mine.dtype) == (peer.shape, peer.dtype)
        torch.testing.assert_close(mine, peer, rtol=0.05, atol=0.05 * peer.abs().max().item())


@pytest.mark.fault(1)
@pytest.mark.parametrize("other", ["_input", "lin_weight", "ref_input", "ref_weight"])
@pytest.mark.parametrize("autocast", [False, True])
def test_both_sides_are_scored_in_one_dtype(other, autocast):
    """A model as its own reference, with one tensor of another dtype that holds the same numbers: Liger multiplies what
    it is given, which PyTorch refuses outside of autocast; under it both sides take autocast's dtype, and so do ours."""
    hidden, weight = torch.randint(-64, 65, (B, T, 256)) / 32, torch.randint(-64, 65, (V, 256)) / 1024
    given = {"_input": hidden, "lin_weight": weight, "ref_input": hidden, "ref_weight": weight}
    given = {name: tensor if name == other else tensor.bfloat16() for name, tensor in given.items()}
    arguments = given | {"target": torch.randint(V, (B, T)), "preference_labels": LABELS}
    with torch.autocast("cpu", torch.float16 if autocast else None, enabled=autocast):
        loss, sums = LigerFusedLinearKTOLoss(use_ref_model=True)(**arguments)
        if autocast:
            theirs, their_sums = PEERS[0](use_ref_model=True, compiled=False)(**arguments)
            torch.testing.assert_close(torch.stack(sums[:2]), torch.stack(their_sums[:2]), rtol=1e-3, atol=1e-3)
            assert theirs == 0.5 and all(total == 0 for total in their_sums[-2:])
        else:
            with pytest.raises(RuntimeError, match="same dtype"):
                PEERS[0](use_ref_model=True, compiled=False)(**arguments)
    assert loss == 0.5 and all(total == 0 for total in sums[-2:])


def test_function_takes_its_own_order():
    """Positional, every option away from the class's default."""
    arguments, leaves = inputs(bias=True, ref=True, ignored=True, ignore_index=4)
    order = ("_input", "lin_weight", "target", "preference_labels", "bias", "ref_input", "ref_weight", "ref_bias")
    positional = [arguments[name] for name in order]
    options = (torch.tensor([0.4]), 4, 0.3, False, True, True, 1)
    theirs, their_sums = PEERS[1](*positional, *options)
    ours, our_sums = liger_fused_linear_kto(*positional, *options)
    for mine, peer in zip((ours, *our_sums), (theirs, *their_sums), strict=True):
        torch.testing.assert_close(mine, peer, rtol=1e-5, atol=1e-6)
    for mine, peer in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(mine, peer, rtol=1e-5, atol=1e-7)


def test_class_takes_its_own_order():
    arguments, _ = inputs(bias=True, ref=True)
    order = ("_input", "lin_weight", "target", "bias", "preference_labels", "ref_input", "ref_weight", "ref_bias")
    module = LigerFusedLinearKTOLoss(-100, 0.2, False, True, False, 3)
    positional, _ = module(*(arguments[name] for name in order), torch.tensor(0.3))
    by_keyword, _ = module(**arguments, kl=torch.tensor(0.3))
    assert torch.equal(positional, by_keyword)
    assert "beta=0.2" in repr(module) and module.chunk_size == 3 and module.compiled is False


def test_compiled_and_chunk_size_change_no_bit():
    arguments, leaves = inputs(ignored=True)
    one = run(LigerFusedLinearKTOLoss(), arguments, leaves)
    other = run(LigerFusedLinearKTOLoss(compiled=False, chunk_size=3), arguments, leaves)
    for a, b in zip((one[0], *one[1], *one[2]), (other[0], *other[1], *other[2]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bias", [False, True])
def test_a_frozen_head_gets_no_gradient_and_changes_nothing_else(bias):
    """The same loss and hidden gradient as with a trained head, and none for the head."""
    arguments, leaves = inputs(bias=bias, ignored=True)
    loss, sums, grads = run(LigerFusedLinearKTOLoss(), arguments, leaves)
    frozen = {name: value.detach() if name in ("lin_weight", "bias") else value for name, value in arguments.items()}
    again, their_sums, (grad,) = run(LigerFusedLinearKTOLoss(), frozen, leaves[:1])
    for a, b in zip((loss, *sums, grads[0]), (again, *their_sums, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("count_ignored", [False, True])
def test_torch_compile_gives_the_eager_results(count_ignored):
    arguments, leaves = inputs(bias=True, ref=True, ignored=True)
    module = LigerFusedLinearKTOLoss(use_ref_model=True, count_ignored=count_ignored)
    eager = run(module, arguments, leaves, kl=torch.tensor([0.3]))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    graph = run(compiled, arguments, leaves, kl=torch.tensor([0.3]))
    for a, b in zip((eager[0], *eager[1], *eager[2]), (graph[0], *graph[1], *graph[2]), strict=True):
        assert torch.equal(a, b)


def test_same_as_linear_kto_loss():
    """No formula of its own."""
    arguments, _ = inputs(bias=True, ignored=True)
    loss, _ = LigerFusedLinearKTOLoss()(**arguments)
    hidden, weight, target, desirable, bias = (
        arguments[name] for name in ("_input", "lin_weight", "target", "preference_labels", "bias")
    )
    assert torch.equal(loss, linear_kto_loss(hidden, weight, target, desirable, bias=bias, kl=0.0).loss)


# Where Liger is wrong ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ref", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_one_reference_point_for_each_sequence(ref, average):
    """Liger's chunks of one sequence meet all B reference points and add up B losses each."""
    options = {"use_ref_model": ref, "average_log_prob": average, "beta": 0.4}
    arguments, leaves = inputs(bias=True, ref=ref, ignored=True)
    kl = torch.tensor([3.0, 0.0, 1.0, 2.0, -0.5])
    loss, sums, _ = check_definition(arguments, leaves, options, kl)
    theirs, _ = PEERS[0](compiled=False, **options)(**arguments, kl=kl)
    assert theirs > 3 * loss  # what this test is about
    without, sums_without = LigerFusedLinearKTOLoss(**options)(**arguments)
    assert not torch.equal(loss, without)
    for a, b in zip(sums, sums_without, strict=True):  # the rewards are of the log-ratios alone
        assert torch.equal(a, b)


def test_reference_point_of_one_sequence():
    arguments, _ = inputs()
    first = {name: value if name == "lin_weight" else value[:1] for name, value in arguments.items()}
    values = [LigerFusedLinearKTOLoss()(**first, kl=kl)[0] for kl in (0.7, torch.tensor(0.7), torch.tensor([0.7]))]
    assert all(torch.equal(v.detach(), values[2].detach()) for v in values[1:])
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=0)


def test_sequence_without_a_scored_token():
    """Liger's mean over no tokens is NaN, and so is everything."""
    options = {"average_log_prob": True, "use_ref_model": True}
    arguments, leaves = inputs(bias=True, ref=True, ignored=True)
    arguments["target"][2] = -100
    theirs, their_sums, their_grads = run(PEERS[0](compiled=False, **options), arguments, leaves)
    assert theirs.isnan() and their_sums[1].isnan() and their_grads[1].isnan().any()
    _, _, grads = check_definition(arguments, leaves, options, torch.tensor(0.3))
    assert (grads[0][2] == 0).all() and grads[1].abs().max() > 0


def test_logits_sums_without_ignored_tokens():
    """On request: Liger's own take in prompts and padding."""
    arguments, leaves = inputs(bias=True, ignored=True)
    _, sums, _ = check_definition(arguments, leaves, {"count_ignored": False})
    _, theirs = PEERS[0](compiled=False)(**arguments)
    assert abs(sums[2] - theirs[2]) > 1e-2
    # Whatever lies in the ignored tokens.
    hidden = arguments["_input"].detach().masked_fill((arguments["target"] == -100).unsqueeze(-1), torch.nan)
    _, again = LigerFusedLinearKTOLoss(count_ignored=False)(**(arguments | {"_input": hidden}))
    for a, b in zip(sums, again, strict=True):
        assert torch.equal(a, b)


def test_logits_sums_of_a_masked_vocabulary():
    arguments, _ = inputs(bias=True, ignored=True)
    arguments["target"] = torch.full((B, T), -100)
    arguments["bias"] = arguments["bias"].detach().clone()
    arguments["bias"][3] = -torch.inf
    assert LigerFusedLinearKTOLoss()(**arguments)[1][2:4] == (-torch.inf, -torch.inf)
    assert LigerFusedLinearKTOLoss(count_ignored=False)(**arguments)[1][2:4] == (0, 0)  # no token is counted


def test_logits_sums_cost_no_product_with_the_vocabulary():
    from torch.utils.flop_counter import FlopCounterMode

    arguments, _ = inputs(bias=True)
    arguments["target"] = torch.full((B, T), -100)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _, sums = LigerFusedLinearKTOLoss()(**arguments)
    assert counter.get_total_flops() == 0 and sums[2] != 0


def test_saturated_losses_keep_their_digits():
    """1 − σ(x) is 0 in fp32 from x ≈ 17."""
    arguments, _ = inputs()
    arguments["preference_labels"] = torch.ones(B, dtype=torch.bool)
    kl = torch.tensor(-300.0)
    assert PEERS[0](compiled=False)(**arguments, kl=kl)[0] == 0
    assert 0 < LigerFusedLinearKTOLoss()(**arguments, kl=kl)[0] < 1e-9


def test_no_gradient_work_without_gradients():
    from torch.utils.flop_counter import FlopCounterMode

    arguments, _ = inputs()
    work = 2 * B * T * H * V
    for module, expected in ((LigerFusedLinearKTOLoss(), work), (PEERS[0](compiled=False), 3 * work)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(**arguments)
        assert counter.get_total_flops() == expected


def test_no_gradient_work_for_the_reference():
    from torch.utils.flop_counter import FlopCounterMode

    arguments, leaves = inputs(ref=True)
    arguments["ref_input"] = arguments["ref_input"].clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        loss, _ = LigerFusedLinearKTOLoss(use_ref_model=True)(**arguments)
        grads = torch.autograd.grad(loss, [*leaves, arguments["ref_input"]], allow_unused=True)
    assert counter.get_total_flops() == 2 * B * T * V * (3 * H + (H + 4)) and grads[-1] is None


def test_one_sided_and_empty_batches():
    arguments, leaves = inputs()
    arguments["preference_labels"] = torch.ones(B, dtype=torch.bool)
    loss, sums, grads = run(LigerFusedLinearKTOLoss(), arguments, leaves)
    assert loss > 0 and all(torch.isfinite(g).all() for g in grads)
    assert sums[1] == sums[3] == sums[5] == 0
    empty = {name: value if name == "lin_weight" else value[:0] for name, value in arguments.items()}
    assert LigerFusedLinearKTOLoss()(**empty)[0] == 0


def test_fp64_gives_the_definition():
    arguments, leaves = inputs(bias=True, ref=True, ignored=True, dtype=torch.float64)
    options = {"use_ref_model": True}
    loss, _, grads = run(LigerFusedLinearKTOLoss(**options), arguments, leaves)
    exact, _ = definition(arguments, options)
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=0)
    for mine, true in zip(grads, torch.autograd.grad(exact, leaves), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"_input": torch.randn(B * T, H)}, ValueError, "_input: expected"),
        ({"_input": [1]}, TypeError, "_input: expected a tensor"),
        ({"target": torch.zeros(B, T + 1, dtype=torch.int64)}, ValueError, "target: expected shape"),
        ({"target": torch.zeros(B, T)}, TypeError, "target: expected dtype"),
        ({"target": torch.full((B, T), V)}, ValueError, "labels: expected 0 <= label"),
        ({"preference_labels": None}, TypeError, "preference_labels: expected a tensor"),
        ({"preference_labels": torch.ones(B)}, TypeError, "preference_labels: expected dtype bool"),
        ({"preference_labels": torch.ones(1, dtype=torch.bool)}, ValueError, "preference_labels: expected shape"),
        ({"bias": torch.zeros(V + 1)}, ValueError, "bias: expected shape"),
        ({"kl": torch.zeros(2)}, ValueError, "kl: expected shape"),
        ({"kl": torch.zeros(B, 1)}, ValueError, "kl: expected shape"),
        ({"kl": torch.tensor(1)}, TypeError, "kl: expected dtype"),
        ({"kl": "0.1"}, TypeError, "kl: expected a tensor"),
        ({"ref_input": None}, ValueError, "ref_input: needed"),
        ({"ref_weight": None}, ValueError, "ref_weight: needed"),
        ({"ref_weight": torch.zeros(V + 1, H + 4)}, ValueError, "ref_weight: expected a vocabulary"),
        ({"ref_input": torch.zeros(B, T + 1, H + 4)}, ValueError, "ref_input: expected shape"),
    ],
)
def test_bad_arguments_are_errors_that_name_them(change, error, message):
    arguments, _ = inputs(ref=True)
    with pytest.raises(error, match=f"^{message}"):
        LigerFusedLinearKTOLoss(use_ref_model=True)(**(arguments | change))


def test_a_negative_beta_is_an_error():
    arguments, _ = inputs()
    with pytest.raises(ValueError, match=r"^beta: "):
        LigerFusedLinearKTOLoss(beta=-0.1)(**arguments)


# The patch ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def trainer(monkeypatch):
    """A module that imported Liger's names before the patch, one of them under another name."""
    module = types.ModuleType("a_trainer")
    module.LigerFusedLinearKTOLoss, module.fused = PEERS
    monkeypatch.setitem(sys.modules, "a_trainer", module)
    yield module
    unpatch_liger()


def places(trainer):
    return [
        (chunked_loss.LigerFusedLinearKTOLoss, functional.liger_fused_linear_kto),
        (sys.modules["liger_kernel.chunked_loss.kto_loss"].LigerFusedLinearKTOLoss, functional.liger_fused_linear_kto),
        (trainer.LigerFusedLinearKTOLoss, trainer.fused),
    ]


OURS = (LigerFusedLinearKTOLoss, liger_fused_linear_kto)


def test_the_patch_replaces_ligers_loss_and_is_undone(trainer):
    patch_liger()
    assert places(trainer) == [OURS] * 3
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss as imported

    assert imported is LigerFusedLinearKTOLoss
    patch_liger()
    unpatch_liger()
    assert places(trainer) == [PEERS] * 3
    unpatch_liger()
    assert places(trainer) == [PEERS] * 3


def test_patch_as_context_manager(trainer):
    with pytest.raises(KeyError), patch_liger():
        assert places(trainer) == [OURS] * 3
        raise KeyError
    assert places(trainer) == [PEERS] * 3
    patch_liger()
    with patch_liger():
        assert places(trainer) == [OURS] * 3
    assert places(trainer) == [OURS] * 3  # as it found it
    with patch_liger():
        unpatch_liger()
    assert places(trainer) == [PEERS] * 3
    with patch_liger():
        unpatch_liger()
        assert places(trainer) == [PEERS] * 3
    assert places(trainer) == [PEERS] * 3


def test_second_patch_finds_new_modules(trainer, monkeypatch):
    patch_liger()
    late = types.ModuleType("a_late_trainer")
    late.LigerFusedLinearKTOLoss = PEERS[0]
    monkeypatch.setitem(sys.modules, "a_late_trainer", late)
    with patch_liger():
        assert late.LigerFusedLinearKTOLoss is LigerFusedLinearKTOLoss
    assert late.LigerFusedLinearKTOLoss is PEERS[0] and places(trainer) == [OURS] * 3


def test_patch_refuses_an_unknown_signature(trainer, monkeypatch):
    class Later(torch.nn.Module):
        def __init__(self, ignore_index=-100, beta=0.1, label_smoothing=0.0):
            super().__init__()

    monkeypatch.setattr(chunked_loss, "LigerFusedLinearKTOLoss", Later)
    with pytest.raises(RuntimeError, match=r"liger-kernel .*LigerFusedLinearKTOLoss: unknown signature.*smoothing"):
        patch_liger()
    monkeypatch.undo()
    monkeypatch.delattr(functional, "liger_fused_linear_kto")
    with pytest.raises(RuntimeError, match="has no liger_fused_linear_kto"):
        patch_liger()


def test_patch_takes_an_earlier_signature(trainer, monkeypatch):
    """Before `chunk_size`: what calls it can call ours."""

    class Earlier(torch.nn.Module):
        def __init__(self, ignore_index=-100, beta=0.1, compiled=True, use_ref_model=False, average_log_prob=False):
            super().__init__()

        forward = PEERS[0].forward

    monkeypatch.setattr(chunked_loss, "LigerFusedLinearKTOLoss", Earlier)
    with patch_liger():
        assert chunked_loss.LigerFusedLinearKTOLoss is LigerFusedLinearKTOLoss
    assert chunked_loss.LigerFusedLinearKTOLoss is Earlier


def test_patch_says_what_it_replaced(trainer, caplog):
    with caplog.at_level("INFO", "kto_kernels"):
        patch = patch_liger()
    assert {"a_trainer.LigerFusedLinearKTOLoss", "a_trainer.fused"} < set(patch.replaced)
    assert "liger_kernel.chunked_loss.functional.liger_fused_linear_kto" in repr(patch)
    assert all(f"{name} is ours now" in caplog.messages for name in patch.replaced)
    assert patch_liger().replaced == () and "nothing" in repr(patch_liger())


# In a process of its own: this one has a module that holds our loss, and may have imported TRL.
TRL = """
import sys, types, warnings
from kto_kernels.integrations.liger import patch_liger, unpatch_liger
import liger_kernel.chunked_loss

def warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if str(w.message).startswith("patch_liger: without effect on TRL's ")]

def trl():
    from trl import KTOTrainer
"""


def in_a_process(code):
    subprocess.run([sys.executable, "-c", TRL + code], check=True)


@pytest.mark.fault(14)
@pytest.mark.parametrize("first", ["trl", pytest.param("patch_liger", marks=pytest.mark.wide)])
def test_patch_without_effect_on_trl(first):
    """TRL 1.16's trainer does not call Liger's loss: it is imported before the call, or behind it."""
    pytest.importorskip("trl")
    second = {"trl": "patch_liger", "patch_liger": "trl"}[first]
    in_a_process(f"""
assert not warned({first})
assert len(warned({second})) == 1
unpatch_liger()
patch = []
assert len(warned(lambda: patch.append(patch_liger()))) == 1
assert "liger_kernel.chunked_loss.LigerFusedLinearKTOLoss" in patch[0].replaced
""")


def test_patch_with_effect_beside_trl():
    """A trainer of one's own that holds Liger's loss; a patch that is over; TRL without its KTO trainer; none."""
    pytest.importorskip("trl")
    in_a_process("""
with patch_liger():
    pass
import trl as package
assert not warned(patch_liger) and "trl.trainer.kto_trainer" not in sys.modules
unpatch_liger()
assert not warned(trl) and "trl.trainer.kto_trainer" in sys.modules
mine = sys.modules["mine"] = types.ModuleType("mine")
mine.loss = liger_kernel.chunked_loss.LigerFusedLinearKTOLoss
assert not warned(patch_liger)
""")


@pytest.mark.parametrize("loss", ["KTO", pytest.param("DPO", marks=pytest.mark.wide)])
def test_patch_reads_what_trl_calls(loss, tmp_path):
    """Stand-ins for other releases of TRL: no trainer that calls Liger's loss; TRL 0.17 (DPO: 0.19) to 1.12, here where
    it is called; another loss of Liger's alone; and 0.27 to 1.5, where another module defines the KTO trainer."""
    sources = {
        "": 1,
        f"from liger_kernel.chunked_loss import LigerFusedLinear{loss}Loss": 0,
        "from liger_kernel.chunked_loss import LigerFusedLinearCPOLoss": 1,
        f"from ..experimental.{loss.lower()} import KTOTrainer as _KTOTrainer": 0,
    }
    for k, source in enumerate(sources):
        trainer = tmp_path / f"{k}/trl/trainer/{loss.lower()}_trainer.py"
        trainer.parent.mkdir(parents=True)
        for folder in (trainer.parent, trainer.parent.parent):
            (folder / "__init__.py").touch()
        trainer.write_text(f"def later():\n    {source or 'pass'}\n")
    in_a_process(f"""
def trl():
    import trl.trainer.{loss.lower()}_trainer

for k, expected in enumerate({[*sources.values()]}):
    sys.path.insert(0, {str(tmp_path)!r} + "/" + str(k))
    for first, second in [(trl, patch_liger), (patch_liger, trl)]:
        for name in [name for name in sys.modules if name.split(".")[0] == "trl"]:
            del sys.modules[name]
        assert (len(warned(first)), len(warned(second))) == (0, expected), (k, first)
        unpatch_liger()
""")


def test_the_patch_without_liger_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.chunked_loss", None)
    with pytest.raises(ImportError, match=r"^patch_liger: needs liger_kernel\.chunked_loss"):
        patch_liger()


def test_signatures_are_ligers_with_ours_behind_by_keyword():
    """And behind them, by keyword only, what Liger has not."""
    ours = inspect.signature(LigerFusedLinearKTOLoss).parameters
    assert [*ours] == [*inspect.signature(PEERS[0]).parameters, "count_ignored"]
    assert ours["count_ignored"].kind is inspect.Parameter.KEYWORD_ONLY


def test_importing_the_integration_imports_no_peer():
    code = """
import sys
for name in ("trl", "liger_kernel", "llamafactory", "transformers"):
    sys.modules[name] = None
import kto_kernels
assert not [name for name in sys.modules if name.startswith("kto_kernels.integrations")]
import kto_kernels.integrations.liger, kto_kernels.integrations.logps
"""
    subprocess.run([sys.executable, "-c", code], check=True)
