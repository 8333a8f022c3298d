"""`python -m benchmarks overhead`: the cost of a call beside plain PyTorch's."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import (
    logits,
    overhead,
    report,
)
from benchmarks.__main__ import parser
from benchmarks.benchmark import settle

ROOT = Path(__file__).parents[2]


@pytest.mark.alone
def test_overhead_is_measured_written_and_shown(tmp_path, capsys):
    threads = torch.get_num_threads()
    args = parser().parse_args(["overhead", "--quick", "--json", str(tmp_path / "found.json")])
    settle(args)
    args.run(args)
    assert torch.get_num_threads() == threads and overhead.PLAIN in capsys.readouterr().out
    result = json.loads((tmp_path / "found.json").read_text())
    assert {"device", "versions", "commit", "date"} <= result.keys() and result["threads"] == 1
    assert [case["at most"] for case in result["cases"]] == [2.5, 2.0, None, 4.0]
    ((_, (_, *rows)),), _ = report.on_screen(result)
    shown = {(name, mode): row for name, mode, *row in rows if name != overhead.PLAIN}
    for case in result["cases"]:
        seconds = {name: took["median"] for name, took in case["seconds"].items()}
        assert overhead.EMPTY in seconds or case["loss"] == overhead.FROM_HIDDEN
        ratio = seconds[case["loss"]] / seconds[overhead.PLAIN]
        met = "" if case["at most"] is None else "yes" if ratio <= case["at most"] else "no"
        row = shown[case["loss"], case["mode"]]
        assert row[1] == f"{ratio:.2f}×" and row[3] == met, row


@pytest.mark.parametrize("ratio, met", [(2.5, "yes"), (2.51, "no")])
def test_overhead_says_whether_the_aim_is_met(ratio, met):
    seconds = {overhead.FROM_LOGITS: ratio, overhead.PLAIN: 1.0, overhead.EMPTY: 0.5}
    seconds = {name: dict.fromkeys(("low", "median", "high"), took) for name, took in seconds.items()}
    case = {"N": 8, "V": 64, "dtype": "fp32", "mode": logits.FORWARD, "at most": 2.5, "seconds": seconds}
    ((_, (_, mine, *others)),) = report.overhead_tables({"cases": [case]})
    assert mine[-2:] == ["2.50×", met] and [row[-2:] for row in others] == [["", ""]] * 2


def test_overhead_is_held_against_the_plain_function_of_the_readme():
    scope: dict = {}
    blocks = (ROOT / "README.md").read_text().split("```python\n")
    exec(next(block for block in blocks if "def plain_kto" in block).split("```")[0], scope)
    logits, ref_logits = torch.randn(2, 3, 5, 11, dtype=torch.float64)
    labels = torch.randint(11, (3, 5)).index_fill(1, torch.tensor([0, 1]), -100)
    desirable = torch.tensor([True, False, True])
    scores = ref_logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    ref_logps = (scores * (labels != -100)).sum(-1)
    theirs = scope["plain_kto"](logits, ref_logits, labels, desirable, kl=0.3, beta=0.2)
    assert overhead.plain_kto(logits, ref_logps, labels, desirable, kl=0.3, beta=0.2) == theirs


@pytest.mark.parametrize("make", [overhead.from_logits, overhead.from_hidden])
@pytest.mark.parametrize("wrong", ["loss", "gradient", "NaN"])
def test_overhead_of_another_loss_is_not_timed(make, wrong, monkeypatch):
    """Both have the same loss and gradients, and one of these wrong, nothing is timed."""

    def broken(batch):
        subject = make(batch)
        overhead.gate(subject)
        last, right = subject.leaves[-1], subject.ours
        change = {"loss": 1e-3, "NaN": float("nan")}.get(wrong, 0.0)
        subject.ours = lambda: right() + change + 1e-3 * (last - last.detach()).sum() * (wrong == "gradient")
        return subject

    monkeypatch.setattr(overhead, "interleaved", lambda *_: pytest.fail("timed in spite of the gate"))
    with pytest.raises(SystemExit, match=r"gate: .*kto_loss, cpu: differs from plain PyTorch"):
        overhead.run(broken, logits.FORWARD, 1, lambda: None)


def test_overhead_drops_the_gradients_of_the_call_before():
    subject = overhead.from_hidden(logits.make_batch(8, 64, torch.float32))
    for loss_of in (subject.ours, subject.plain):
        once, again = (
            [
                leaf.grad.clone()
                for leaf in subject.leaves
                if overhead.with_backward(loss_of, subject.leaves) is not None
            ]
            for _ in range(2)
        )
        assert all(map(torch.equal, once, again))
