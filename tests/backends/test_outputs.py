"""The outputs of a backend beside the loss: entropy, mean logit, whether the label is the argmax, and the statistics of a
row. One definition in fp64 for every backend, where caps saturate, logits tie and labels are impossible."""

import pytest
import torch

from kto_kernels import linear_kto_loss, reference
from kto_kernels.backends import BACKENDS, cpu
from kto_kernels.options import OUTPUTS, Scale
from kto_kernels.records import Rows
from tests.backends.test_shards import sharded_chunk
from tests.support.harness import dtypes, places

INF, NAN = torch.inf, torch.nan
# None; a cap that saturates; one whose tanh is in the range of every formula; a scale.
SCALES = [Scale(), Scale(softcap=5.0), Scale(0.5, 200.0, 0.6), Scale(2.0, None, 1.7)]

# The label's logit, one other logit, and all the rest.
ROWS = {
    "tied by a cap of 5": (60.0, 61.0, 1.0),
    "tied by a cap of 5 in fp32": (40.0, 41.0, 1.0),
    "on top of those that the cap ties": (61.0, 60.0, 59.0),
    "negative, and tied by the cap": (-60.0, -59.0, -80.0),
    "neighbours": (1.0, 1.0078125, -2.0),
    "neighbours, the label higher": (1.0078125, 1.0, 1.0),
    "neighbours where tanh changes its formula": (3.125, 3.140625, 0.0),
    "neighbours there, the label higher": (3.140625, 3.125, 3.109375),
    "tied with another": (2.0, 2.0, -1.0),
    "tied with all": (0.5, 0.5, 0.5),
    "tied zeros of both signs": (0.0, -0.0, -0.0),
    "huge": (1e4, -1e4, 9984.0),
    "hugely negative": (-1e4, -1e4, -9984.0),
    "impossible": (-INF, 1.0, 0.0),
    "impossible, as all but one are": (-INF, 1.0, -INF),
    "the only possible one": (1.0, -INF, -INF),
    "in a row without a possible label": (-INF, -INF, -INF),
    "beside a masked one": (1.0, -INF, 0.0),
    "infinite": (INF, 1.0, 0.0),
    "beside an infinite one": (1.0, INF, 0.0),
    "infinite like another": (INF, INF, 0.0),
    "beside a NaN": (1.0, NAN, 0.0),
    "a NaN": (NAN, 1.0, 0.0),
}


def places_in_row(vocab: int) -> list[tuple[int, int]]:
    """(of the label, of the other logit): at the ends, where kernels read one by one; and in neighbouring vectors, in
    either order."""
    middle = vocab // 2
    pairs = [(0, vocab - 1), (vocab - 1, 0), (middle, middle - 1), (middle - 1, middle)]
    return pairs[: 2 if vocab == 2 else 4]


def table(vocab: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Every one of ROWS at every place, in a buffer with NaN behind each row: rows begin at every alignment."""
    rows, labels = [], []
    for of_label, of_other, rest in ROWS.values():
        for y, other in places_in_row(vocab):
            row = torch.full((vocab,), rest)
            row[y], row[other] = of_label, of_other
            rows.append(row)
            labels.append(y)
    buffer = torch.full((len(rows), vocab + 3), NAN)
    buffer[:, :vocab] = torch.stack(rows)
    return buffer.to(device, dtype)[:, :vocab], torch.tensor(labels, device=device)


def definition(logits, labels, scale) -> dict[str, torch.Tensor]:
    values = reference.outputs(logits, labels, OUTPUTS, **vars(scale))
    return {"logps": reference.token_logps(logits, labels, **vars(scale)), **values}


def some(place, logits, labels, one_in: int):
    """Triton's interpreter takes milliseconds a row: there one row in so many, a different place of each in turn."""
    kept = slice(None, None, one_in if place[0] == "triton" else 1)
    return logits[kept], labels[kept]


def compare(found, logits, labels, scale):
    """Equal where the definition is not finite; elsewhere to a few units in the last place of the row's largest finite
    logit, which is what the sums are made of."""
    z = reference.scaled(logits.double(), **vars(scale))
    allowed = 4 * torch.finfo(torch.float32).eps * z.where(z.isfinite(), 0.0).abs().amax(-1).clamp(min=8.0)
    for name, expected in definition(logits.double(), labels, scale).items():
        mine = getattr(found, name).to(expected.dtype)
        right = (mine == expected) | (mine.isnan() & expected.isnan())
        if name != "is_top1":
            right |= (mine - expected).abs() <= allowed
        assert right.all(), (name, shown(~right, logits, labels), mine[~right], expected[~right])


def shown(differs, logits, labels) -> list[tuple]:
    """(label's logit, its place, the others) of the rows."""
    return [(x[y].item(), y.item(), sorted(set(x.tolist()), key=str)) for x, y in zip(logits[differs], labels[differs])]


# The definition ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_definition_of_the_argmax(dtype):
    """By hand: the first argmax of the logits before the cap."""
    expected = {  # (label in front, label behind)
        "tied by a cap of 5": (False, False),
        "tied by a cap of 5 in fp32": (False, False),
        "on top of those that the cap ties": (True, True),
        "negative, and tied by the cap": (False, False),
        "tied with another": (True, False),
        "tied with all": (True, False),
        "tied zeros of both signs": (True, False),
        "hugely negative": (False, False),
        "impossible": (False, False),
        "the only possible one": (True, True),
        "in a row without a possible label": (True, False),
        "a NaN": (False, False),
        "beside a NaN": (False, False),
    }
    for softcap in (None, 5.0):
        for name, answers in expected.items():
            of_label, of_other, rest = ROWS[name]
            for row, y, answer in [
                ([of_label, of_other, rest], 0, answers[0]),
                ([rest, of_other, of_label], 2, answers[1]),
            ]:
                logits, label = torch.tensor([row], dtype=dtype), torch.tensor([y])
                found = reference.outputs(logits, label, ("is_top1",), softcap=softcap)["is_top1"]
                assert found.tolist() == [answer], (name, softcap, y)
    infinite, first = torch.tensor([[INF, 1.0, INF]], dtype=dtype), torch.tensor([0])
    assert not reference.outputs(infinite, first, ("is_top1",))["is_top1"]  # its probability is NaN
    assert reference.outputs(infinite, first, ("is_top1",), softcap=5.0)["is_top1"]


def test_the_entropys_gradient_of_impossible_labels():
    logits = torch.tensor([[-INF, 1.0, 0.5], [-INF, -INF, 2.0], [-INF, -INF, -INF]], dtype=torch.float64)
    grad = reference.entropy_grad(logits, torch.ones(3, dtype=torch.float64))
    assert (grad[1:] == 0).all() and grad[0, 0] == 0 and grad[0, 1] != 0 and grad.isfinite().all()


# The backends ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(20)
@places
@pytest.mark.parametrize(("label", "other"), [(60.0, 61.0), (40.0, 41.0)])
@pytest.mark.parametrize("first", [False, True])
def test_the_argmax_of_logits_that_a_cap_ties(place, label, other, first):
    logits = torch.zeros(1, 40, device=place[1])
    y = 7 if first else 30
    logits[0, 7], logits[0, 30] = (label, other) if first else (other, label)
    scores = BACKENDS[place[0]].score_chunk(
        logits, torch.tensor([y], device=place[1]), Scale(softcap=5.0), False, OUTPUTS
    )
    assert scores.is_top1.tolist() == [False]


@places
@dtypes
@pytest.mark.parametrize(
    ("scale", "vocab"), [(SCALES[0], 7), (SCALES[1], 2), *((scale, 75) for scale in SCALES[1:])], ids=str
)
def test_equal_the_definition_at_every_scale(place, dtype, scale, vocab):
    logits, labels = some(place, *table(vocab, dtype, place[1]), 3)
    compare(BACKENDS[place[0]].score_chunk(logits, labels, scale, False, OUTPUTS), logits, labels, scale)


@places
@dtypes
@pytest.mark.parametrize("scale", SCALES[:2], ids=str)
def test_equal_the_definition_in_long_rows(place, dtype, scale):
    """More than any kernel takes at once."""
    logits, labels = some(place, *table(5003, dtype, place[1]), 5)
    found = BACKENDS[place[0]].score_chunk(logits, labels, scale, False, OUTPUTS)
    exact = definition(logits.double(), labels, scale)
    assert torch.equal(found.is_top1, exact["is_top1"])
    for name in ("logps", "entropy", "mean_logits"):
        mine, expected = getattr(found, name).double(), exact[name]
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("isa", cpu.instruction_sets())
@dtypes
@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("vocab", [7, 75])
def test_equal_the_definition_in_every_instruction_set(monkeypatch, isa, dtype, scale, vocab):
    monkeypatch.setenv("KTO_KERNELS_CPU_ISA", isa)
    logits, labels = table(vocab, dtype, "cpu")
    compare(BACKENDS["cpu"].score_chunk(logits, labels, scale, False, OUTPUTS), logits, labels, scale)


@places
@pytest.mark.parametrize("outputs", [(name,) for name in OUTPUTS] + [("mean_logits", "is_top1")], ids=str)
@pytest.mark.parametrize("gradient", [False, True])
def test_each_alone_is_what_it_is_beside_the_others(place, outputs, gradient):
    logits, labels = some(place, *table(75, torch.float32, place[1]), 7)
    all_of_them = BACKENDS[place[0]].score_chunk(logits.clone(), labels, SCALES[1], False, OUTPUTS)
    alone = BACKENDS[place[0]].score_chunk(logits.clone(), labels, SCALES[1], gradient, outputs)
    for name in ("logps", *outputs):
        assert torch.allclose(getattr(alone, name), getattr(all_of_them, name), rtol=0, atol=0, equal_nan=True)


@places
@pytest.mark.parametrize(
    ("scale", "sizes"),
    [(SCALES[0], (37, 38)), (SCALES[0], (0, 1, 73, 1)), (SCALES[1], (1, 0, 73, 1)), (SCALES[2], (40, 35))],
    ids=str,
)
def test_equal_the_definition_in_parts(monkeypatch, place, scale, sizes):
    """A vocabulary that ranks share: the label's and the other's places are on one rank or on two."""
    logits, labels = some(place, *table(75, torch.bfloat16, place[1]), 7)
    scores, _ = sharded_chunk(monkeypatch, place, logits.contiguous(), labels, scale, sizes)
    compare(scores, logits, labels, scale)


@places
@dtypes
@pytest.mark.parametrize(("scale", "layout"), list(zip(SCALES, ["padded", "packed"] * 2)), ids=str)
def test_the_origin_and_the_sum_give_the_logarithm_of_the_sum(place, dtype, scale, layout):
    """A score near the row's maximum, and the sum at it: together the logarithm of `Σ_v exp z_v`."""
    logits, labels = some(place, *table(75, dtype, place[1]), 5)
    count = len(labels) // 6 * 6
    logits, labels = logits[:count], labels[:count].clone()
    labels[::7] = -100
    offsets = None
    if layout == "padded":
        x, y = logits.unflatten(0, (6, -1)), labels.unflatten(0, (6, -1))
    else:
        x, y, offsets = logits, labels, torch.tensor([0, 5, 5, count], device=place[1])
    rows = Rows(x, y, offsets, shift=False, ignore_index=-100, shard=True)
    logps, (score, total) = BACKENDS[place[0]].token_logps(rows, scale)
    exact = reference.token_logps(logits.double(), labels, **vars(scale))
    z = reference.scaled(logits.double(), **vars(scale))
    lse = z.logsumexp(-1)
    scored = labels != -100
    assert (logps.flatten()[~scored] == 0).all() and (score.flatten()[~scored] == 0).all()
    possible = scored & lse.isfinite()
    found = score.flatten().double() * scale.outer + total.flatten().double().log()
    torch.testing.assert_close(found[possible], lse[possible], rtol=1e-6, atol=1e-5)
    impossible = scored & (lse == -INF)
    assert (total.flatten()[impossible] == 0).all()
    assert total.flatten()[scored & (lse.isnan() | (lse == INF))].isnan().all()
    assert torch.equal(logps.flatten()[scored & ~exact.isnan()].isfinite(), exact[scored & ~exact.isnan()].isfinite())


# From hidden states ───────────────────────────────────────────────────────────────────────────────────────────────────


@places
@dtypes
@pytest.mark.parametrize(
    ("layout", "softcap", "rows"), [("padded", None, None), ("packed", 5.0, 7), ("padded", 5.0, 1), ("packed", None, 7)]
)
def test_equal_the_definition_from_hidden_states(place, dtype, softcap, rows, layout):
    """The head is the identity, so that the hidden states are the logits; its bias masks two labels of the vocabulary."""
    vocab = 40
    logits, labels = table(vocab, dtype, place[1])
    kept = logits.isfinite().all(-1)
    hidden, labels = some(place, logits[kept].contiguous(), labels[kept], 3)
    count = len(labels) // 4 * 4
    hidden, labels = hidden[:count], labels[:count].clone()
    bias = torch.zeros(vocab, dtype=dtype, device=place[1])
    bias[[3, vocab - 1]] = -INF
    logits = hidden + bias
    ignored = torch.arange(count, device=place[1]) % 5 == 0
    target = labels.masked_fill(ignored, -100)
    offsets = {}
    if layout == "padded":
        x, y = hidden.unflatten(0, (4, -1)), target.unflatten(0, (4, -1))
    else:
        offsets = {"cu_seqlens": torch.tensor([0, 3, 3, count // 2, count], device=place[1])}
        x, y = hidden, target
    out = linear_kto_loss(
        x,
        torch.eye(vocab, dtype=dtype, device=place[1]),
        y,
        torch.tensor([True, False, True, True], device=place[1]),
        bias=bias,
        kl=0.0,
        softcap=softcap,
        outputs=OUTPUTS,
        max_logits_bytes=None if rows is None else rows * vocab * dtype.itemsize,
        backend=place[0],
        **offsets,
    )
    scores = {name: getattr(out, name).flatten() for name in OUTPUTS}
    exact = definition(logits.double(), labels, Scale(softcap=softcap))
    for name in OUTPUTS:
        expected = exact[name].masked_fill(ignored, 0)
        if name == "is_top1":
            assert torch.equal(scores[name], expected)
        else:
            torch.testing.assert_close(scores[name].double(), expected, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(
        out.token_logps.flatten().double(), exact["logps"].masked_fill(ignored, 0), rtol=2e-6, atol=1e-5
    )
