"""`python -m benchmarks compare`: two checkouts take turns."""

from pathlib import Path

import pytest

from benchmarks import (
    compare,
    logits,
    measure,
)

ROOT = Path(__file__).parents[2]


def test_two_checkouts_take_turns(monkeypatch):
    """Each side has this checkout's benchmarks and a package of its own, and both are told the same."""
    ran, took = [], {"old": iter([1.0, 1.2, 1.1]), "new": iter([1.1, 1.0, 1.3])}

    def in_fresh_process(module, call, root):
        assert (root / "benchmarks").resolve() == ROOT / "benchmarks" and call == {"name": "logits", "repeats": 2}
        ran.append((module, root.name))
        return {"a case": next(took[root.name])}

    monkeypatch.setattr(compare, "in_fresh_process", in_fresh_process)
    head, row = compare.compare(ROOT, ["logits"], 3, 2, lambda: None)
    assert ran == [("benchmarks.compare", "old"), ("benchmarks.compare", "new")] * 3
    assert len(head) == len(row) and row == ["a case", "1100.00", "1100.00", "1.00×", "0.83–1.20×", "alike"]


@pytest.mark.parametrize("factor, verdict", [(1.0, "alike"), (1.19, "alike"), (1.21, "slower"), (0.82, "faster")])
def test_slower_is_what_chance_does_not_explain(factor, verdict):
    assert compare.row("", {"old": [1.0, 1.2, 1.0], "new": [factor] * 3})[-1] == verdict


def test_a_checkout_whose_extension_is_not_built_is_refused(tmp_path):
    (tmp_path / "old" / "kto_kernels").mkdir(parents=True)
    (tmp_path / "old" / "kto_kernels" / "__init__.py").write_text("available_backends = lambda _: {'cpu': 'not built'}")
    with pytest.raises(SystemExit, match=r"has no working CPU backend: .* not built"):
        compare.tree(tmp_path / "tree", tmp_path / "old")


def test_a_side_is_timed_in_a_process_of_its_own(tmp_path):
    root = compare.tree(tmp_path / "tree", ROOT)
    seconds = measure.in_fresh_process("benchmarks.compare", {"name": "logits", "repeats": 1}, root=root)
    assert f"kto_loss, cpu, {logits.FRESH}, bf16" in seconds and all(took > 0 for took in seconds.values())
