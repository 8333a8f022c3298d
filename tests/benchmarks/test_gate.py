"""The gate before each timing: every peer, on a batch with prompts and one without, computes the loss; a softcap is known or
refused; a wrong result times nothing."""

from dataclasses import replace

import pytest
import torch

from benchmarks import (
    gate,
    linear,
    linear_peers,
    logits,
    objective,
    peers,
    selection,
)
from benchmarks.shapes import Shape

PAIRS = replace(Shape(16, 12, 40), **linear.PAIRS)


@pytest.mark.parametrize(
    "key, softcap, loss",
    [(key, softcap, objective.KTO) for key in linear_peers.PEERS for softcap in (None, 2.0) if key != "compile"]
    + [(key, None, objective.DPO) for key in ("naive", "scored", "trl", "liger", "torch")],
)
def test_peers_compute_the_same_or_say_why_not(key, softcap, loss):
    shape = replace(Shape(16, 12, 40, softcap=softcap), objective=loss)
    name = linear.peers_of(loss)[key].name
    setting = linear.Setting("cpu", torch.float32, shape)
    variants, absent = linear.variants_of(setting, (key,), ())
    if softcap and key in ("liger", "torch"):
        assert "softcap" in absent[name]
    elif key in ("liger-scaled", "cce", "quack", "quack-chunked"):
        assert name in absent
    else:
        batch = linear.make_batch(shape, linear.TRAINED, torch.float32)
        assert (batch.labels == linear_peers.IGNORED).sum() == 8
        _, refused, _ = linear.gated(batch, variants, "fp32")
        assert not refused and not absent


def test_the_gate_sees_a_softcap_forgotten():
    batch = linear.make_batch(Shape(16, 12, 40, softcap=2.0), linear.TRAINED, torch.float32)

    def forgets(batch):
        batch = linear_peers.LinearBatch(**{**vars(batch), "softcap": None})
        return linear_peers.naive(batch)

    _, refused, _ = linear.gated(batch, {"forgets": forgets}, "fp32")
    assert "differs" in refused["forgets"]


def test_the_gate_sees_a_gradient_of_prompts():
    batch = linear.make_batch(Shape(16, 12, 40), linear.TRAINED, torch.float32)

    def scores_prompts(batch):
        loss, token_logps = linear_peers.naive(batch)
        return linear_peers.Scored(loss + 1e-3 * (batch.hidden - batch.hidden.detach()).sum(), token_logps)

    _, refused, _ = linear.gated(batch, {"scores prompts": scores_prompts}, "fp32")
    assert "hidden gradient" in refused["scores prompts"]


def test_the_gate_sees_pairs_taken_wrong_and_a_reference_forgotten():
    """Chosen and rejected in turn, the halves exchanged, no reference, and the loss of single sequences."""
    batch = linear.make_batch(PAIRS, linear.TRAINED, torch.float32)
    of_pairs = objective.OBJECTIVES[objective.DPO]

    def written(formula):
        record = replace(of_pairs, as_written=formula)
        return lambda batch: linear_peers.naive(replace(batch, objective=record))

    def reordered(order):
        def formula(token_logps, ref_logps, desirable):
            return objective.dpo_from_token_logps(token_logps[order], ref_logps[order], desirable)

        return formula

    wrong = {
        "in turn": reordered([0, 2, 4, 6, 1, 3, 5, 7]),
        "exchanged": reordered([4, 5, 6, 7, 0, 1, 2, 3]),
        "no reference": lambda x, ref, liked: objective.dpo_from_token_logps(x, torch.zeros_like(ref), liked),
        "single": objective.kto_from_token_logps,
    }
    _, refused, _ = linear.gated(batch, {name: written(formula) for name, formula in wrong.items()}, "fp32")
    assert refused.keys() == wrong.keys() and all("differs" in why for why in refused.values())


@pytest.mark.parametrize("loss", objective.OBJECTIVES)
def test_the_truth_by_slices_is_that_of_autograd(loss, monkeypatch):
    """fp64 autograd over everything at once against the sliced truth, with slices that do not divide the sizes."""
    monkeypatch.setattr(linear, "FP64_ROWS", 7)
    monkeypatch.setattr(linear, "FP64_WORDS", 11)
    batch = linear.make_batch(Shape(16, 12, 40, softcap=3.0, objective=loss), linear.TRAINED, torch.float64)
    truth = linear.Truth(batch)
    errors = truth.errors_of(linear.with_gradients(in_fp64, batch))
    assert set(errors) == {"loss", "token log-probs", "hidden gradient", "weight gradient"}
    assert all(error < 1e-12 for error in errors.values()) and all(scale > 1e-6 for scale in truth.scale.values())


def in_fp64(batch):
    def token_logps(hidden, weight):
        z = batch.softcap * torch.tanh(hidden @ weight.T / batch.softcap)
        logps = z.log_softmax(-1).gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]
        return logps * (batch.labels != linear_peers.IGNORED)

    logps = token_logps(batch.hidden, batch.weight)
    ratios = (logps - token_logps(batch.ref_hidden, batch.ref_weight)).sum(-1)
    if batch.objective.paired:
        first, second = ratios[:2], ratios[2:]
        loss = torch.log1p(torch.exp(-peers.BETA * (first - second))).mean()
    else:
        margin = peers.BETA * (ratios - peers.KL)
        loss = (1 - torch.sigmoid(torch.where(batch.desirable, margin, -margin))).mean()
    return linear_peers.Scored(loss, logps.detach())


def test_a_frozen_head_takes_no_gradient():
    case = linear.run(linear.QUICK, "fp32", linear.FROZEN, 2, lambda: None, peers=("naive",))
    assert "bare GEMMs, 3G" in case["seconds"]
    assert all(
        errors.keys() == {"loss", "token log-probs", "hidden gradient"}
        for errors in case["errors against fp64"].values()
    )


def test_the_gate_knows_luck_from_error():
    """Naive PyTorch hits the loss by luck: ours may miss it by what its own token log-probabilities let one expect, and
    by no more; those themselves, and gradients, may not be worse."""
    naive = {"loss": 1e-6, "token log-probs": 1e-2, "weight gradient": 1e-3}

    def hold(what, error):
        gate.hold({"ours": naive | {what: error}}, naive, ["ours"], slack=1.2, spread=0.1)

    hold("loss", 1.9e-3)
    hold("weight gradient", 1.19e-3)
    for what, error in {"loss": 2.1e-3, "token log-probs": 1.11e-2, "weight gradient": 1.21e-3}.items():
        for wrong in (error, float("nan")):
            with pytest.raises(SystemExit, match=f"gate: ours, {what}"):
                hold(what, wrong)


@pytest.mark.parametrize("loss_name", objective.OBJECTIVES)
def test_the_spread_of_the_loss_is_what_chance_makes_of_it(loss_name):
    """Errors of either sign in every token's log-probability, drawn again and again, and the losses that they make."""
    batch = linear.make_batch(Shape(16, 12, 40, softcap=3.0, objective=loss_name), linear.TRAINED, torch.float64)
    truth = linear.Truth(batch)
    scored, size = batch.labels != linear_peers.IGNORED, 1e-4
    loss = truth.values["loss"]

    def drawn(seed):
        g = torch.Generator().manual_seed(seed)

        def sums():
            signs = 1 - 2 * torch.randint(2, scored.shape, generator=g)
            return (size * signs * scored).sum(-1)

        r = truth.log_ratios + sums() - sums()
        return batch.objective.loss(r, batch.desirable) - loss

    losses = torch.stack([drawn(seed) for seed in range(2000)])
    assert gate.rms(losses) == pytest.approx(size * truth.spread, rel=0.05)


def test_a_failed_gate_times_nothing(monkeypatch):
    monkeypatch.setattr(logits, "ours", lambda *_, **__: lambda batch, x: peers.naive(batch, x) * 1.01)
    monkeypatch.setattr(logits, "interleaved", lambda *_: pytest.fail("timed in spite of the gate"))
    with pytest.raises(SystemExit, match="gate: kto_loss"):
        logits.run(Shape(16, 0, 128), "fp32", 2, lambda: None, peers=("naive",))


def test_a_peer_that_differs_from_logits_is_left_out(monkeypatch):
    broken = selection.Peer("broken", lambda _: lambda batch, x: peers.naive(batch, x) * 1.05)
    monkeypatch.setitem(logits.PEERS, "broken", broken)
    case = logits.run(Shape(16, 0, 128), "fp32", 2, lambda: None, peers=("naive", "broken"))
    assert "differs" in case["absent"]["broken"] and not any("broken" in name for name in case["seconds"])


def test_a_failed_gate_from_hidden_states(monkeypatch):
    """Ours wrong: nothing is timed. A peer wrong, failing or too slow: it is left out, with the reason. The gate's clock
    moves in the slow peer alone, so that the others are below the cap on a busy machine too."""
    now = [0.0]
    monkeypatch.setattr(gate.time, "perf_counter", lambda: now[0])

    def slow(batch):
        now[0] += 0.6
        return linear_peers.naive(batch)

    offered = PEERS | {"slow": selection.Peer("slow", lambda _: slow)}
    monkeypatch.setattr(linear, "PEERS", offered)
    case = linear.run(linear.QUICK, "fp32", linear.TRAINED, 2, lambda: None, peers=tuple(offered), cap=0.5)
    assert "differs" in case["absent"]["wrong"] and "over the cap of 0 s" in case["absent"]["slow"]
    others = {name: why for name, why in case["absent"].items() if name not in ("wrong", "slow")}
    assert others == {
        "gone": "absent: needs a GPU",
        "broken": "fails: RuntimeError: no compiler",
        "full": "fails: out of memory",
    }
    assert case["seconds"].keys() == {"bare GEMMs, 4G", "linear_kto_loss, cpu", peers.NAIVE}
    monkeypatch.setattr(linear, "ours", lambda *_: wrong)
    monkeypatch.setattr(linear, "interleaved", lambda *_: pytest.fail("timed in spite of the gate"))
    with pytest.raises(SystemExit, match="gate: linear_kto_loss"):
        linear.run(linear.QUICK, "fp32", linear.TRAINED, 2, lambda: None, peers=())


def wrong(batch: linear_peers.LinearBatch) -> linear_peers.Scored:
    loss, token_logps = linear_peers.naive(batch)
    return linear_peers.Scored(1.03 * loss, token_logps)


def broken(batch: linear_peers.LinearBatch) -> linear_peers.Scored:
    raise RuntimeError("no compiler\nand more")


def full(batch: linear_peers.LinearBatch) -> linear_peers.Scored:
    raise torch.OutOfMemoryError("tried to allocate 1 TiB")


PEERS = {
    "naive": linear_peers.PEERS["naive"],
    "gone": selection.Peer("gone", lambda setting: setting.need_gpu()),
    **{f.__name__: selection.Peer(f.__name__, lambda _, f=f: f) for f in (wrong, broken, full)},
}
