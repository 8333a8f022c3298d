"""docs/scale.md: what a head takes on each rank when its vocabulary, its tokens, or both are spread over ranks. Nothing is
measured: every figure comes from the `LinearPlan` that the code runs on.

python -m benchmarks.scale [--check]
"""

from __future__ import annotations

import argparse
import re
import sys

from kto_kernels import LinearPlan

from .environment import ROOT
from .report import markdown
from .shapes import MODELS

PAGE = ROOT / "docs" / "scale.md"
MARKERS = re.compile(r"(<!-- scale -->\n).*?(\n<!-- end -->)", re.S)

# Name → (H, V), from their configurations.
HEADS = {MODELS["llama-3-8b"][0]: MODELS["llama-3-8b"][1:3], "Mixtral-8x22B-Instruct": (6144, 32768)}
TOKENS = [2**13, 2**15, 2**17, 2**20]
RANKS = [1, 2, 4, 8]


def plan_of(tokens: int, hidden: int, vocab: int, trained: bool, vocab_ranks: int, context_ranks: int) -> LinearPlan:
    """A rank's plan of one bf16 sequence on H100s. Both sizes are divisible here: every rank has the same."""
    columns, rows = vocab // vocab_ranks, tokens // context_ranks
    return LinearPlan.of(
        [rows],
        columns,
        hidden,
        needs_weight=trained,
        open_sequences=[True] if context_ranks > 1 else None,
        widest=columns if vocab_ranks > 1 else None,
    )


def ring_bytes(name: str, size: int, ranks: int) -> int:
    """The bytes that a rank sends in a ring, which is the least that there is: an all-gather passes on every part but one, an
    all-reduce does so twice with parts of 1/ranks."""
    return (ranks - 1) * size if name == "all_gather" else 2 * (ranks - 1) * size // ranks


def wire_bytes(plan: LinearPlan, vocab_ranks: int, context_ranks: int) -> int:
    over_vocab = plan.messages(vocab=True) if vocab_ranks > 1 else []
    over_context = plan.messages(context=1) if context_ranks > 1 else []
    return sum(ring_bytes(*message, vocab_ranks) for message in over_vocab) + sum(
        ring_bytes(*message, context_ranks) for message in over_context
    )


def size(count: float, units: tuple[str, ...] = ("B", "KiB", "MiB", "GiB"), base: int = 1024) -> str:
    for unit in units[:-1]:
        if count < base:
            return f"{count:.3g} {unit}"
        count /= base
    return f"{count:.3g} {units[-1]}"


def table(hidden: int, vocab: int, trained: bool) -> list[list[str]]:
    rows = [["tokens", "CP", *(f"TP {ranks}" for ranks in RANKS)]]
    for tokens in TOKENS:
        for context_ranks in RANKS:
            cells = []
            for vocab_ranks in RANKS:
                plan = plan_of(tokens, hidden, vocab, trained, vocab_ranks, context_ranks)
                sent = wire_bytes(plan, vocab_ranks, context_ranks)
                flops = size(plan.flops, ("", "", "", "GFLOP", "TFLOP", "PFLOP"), 1000)
                cells.append(f"{size(plan.peak_bytes)}, {flops}, {size(sent) if sent else '–'}")
            rows.append([f"{tokens:,}", str(context_ranks), *cells])
    return rows


def generated() -> str:
    parts = []
    for name, (hidden, vocab) in HEADS.items():
        for trained in (True, False):
            head = "trained" if trained else "frozen"
            parts.append(f"## {name}: V = {vocab:,}, H = {hidden:,}, {head} head")
            parts.append(markdown(table(hidden, vocab, trained)))
    return "\n\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the page is out of date")
    check = parser.parse_args().check
    old = PAGE.read_text()
    new = MARKERS.sub(lambda found: found[1] + "\n" + generated() + "\n" + found[2], old)
    if check:
        print(
            f"{PAGE.relative_to(ROOT)}: {'as it should be' if new == old else 'out of date: python -m benchmarks.scale'}"
        )
        return int(new != old)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
