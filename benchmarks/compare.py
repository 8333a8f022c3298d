"""`python -m benchmarks compare --old CHECKOUT logits linear step`: is this checkout slower than another one?

Both run in turn, old, new, old, new, …, each time in a fresh process, on the small shapes of `--quick`, on the CPU. This
checkout's benchmarks drive both: they differ in the package `kto_kernels` alone, whose extensions must be built in both. The
ratio new/old of the medians over all rounds stands beside the smallest and the largest ratio of two rounds of old, which is
what chance makes of the same code. Peers, which are the same code in both, are a control. Times are processor time of one
thread, which other programs hardly lengthen.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .environment import ROOT
from .measure import CpuClock, in_fresh_process

OLD, NEW = "old", "new"
ROUNDS = 5
REPEATS = 15  # in each process


def of_logits(repeats: int) -> dict[str, float]:
    from . import logits

    found = {}
    for dtype in logits.DTYPES_BY_DEFAULT["cpu"]:
        case = logits.run(logits.QUICK, dtype, repeats, lambda: None, peers=("naive",), backends=("cpu",))
        found |= {f"{name}, {dtype}": took["median"] for name, took in case["seconds"].items()}
    return found


def of_linear(repeats: int) -> dict[str, float]:
    from . import linear

    found = {}
    for head, dtype in itertools.product((linear.TRAINED, linear.FROZEN), linear.DTYPES_BY_DEFAULT["cpu"]):
        case = linear.run(linear.QUICK, dtype, head, repeats, lambda: None, peers=("naive",), backends=("cpu",))
        found |= {f"{name}, {head} head, {dtype}": took["median"] for name, took in case["seconds"].items()}
    return found


def of_step(repeats: int) -> dict[str, float]:
    from . import step

    found = {}
    for dtype in step.DTYPES:
        case = step.run(step.Setup(step.LORA, dtype, quick=True), repeats, lambda: None)
        for part, seconds in case["seconds"].items():
            found |= {f"{name}, {part}, {dtype}": took["median"] for name, took in seconds.items()}
    return found


BENCHMARKS: dict[str, Callable[[int], dict[str, float]]] = {"logits": of_logits, "linear": of_linear, "step": of_step}


def tree(folder: Path, package: Path) -> Path:
    """A folder that is a checkout to Python: this one's benchmarks and examples, and the package of `package`.

    Raises:
        SystemExit: the package is not there, or its C++ extension is not built.
    """
    folder.mkdir()
    for path in (ROOT / "benchmarks", ROOT / "examples", package.resolve() / "kto_kernels"):
        (folder / path.name).symlink_to(path, target_is_directory=True)
    why = "import kto_kernels as k; print(k.__file__, k.available_backends('cpu')['cpu'])"
    run = subprocess.run([sys.executable, "-c", why], cwd=folder, capture_output=True, text=True)
    if run.returncode != 0 or run.stdout.split(maxsplit=1) != [str(folder / "kto_kernels" / "__init__.py"), "None\n"]:
        raise SystemExit(f"--old: the package in {package} has no working CPU backend: {run.stdout}{run.stderr[-200:]}")
    return folder


def compare(old: Path, names: list[str], rounds: int, repeats: int, tick: Callable) -> list[list[str]]:
    """Runs both in turn; the rows of a table, the first of them the head."""
    seconds: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        trees = {side: tree(Path(folder) / side, package) for side, package in ((OLD, old), (NEW, ROOT))}
        for _, name, side in itertools.product(range(rounds), names, trees):
            call = {"name": name, "repeats": repeats}
            for case, took in in_fresh_process("benchmarks.compare", call, root=trees[side]).items():
                seconds.setdefault(case, {OLD: [], NEW: []})[side].append(took)
            tick()
    return [["", "old, ms", "new, ms", "new / old", "old / old", ""], *itertools.starmap(row, seconds.items())]


def row(case: str, seconds: dict[str, list[float]]) -> list[str]:
    old, new = (statistics.median(seconds[side]) for side in (OLD, NEW))
    chance = [a / b for a, b in itertools.permutations(seconds[OLD], 2)]
    verdict = "slower" if new / old > max(chance) else "faster" if new / old < min(chance) else "alike"
    times = [f"{1e3 * old:.2f}", f"{1e3 * new:.2f}"]
    return [case, *times, f"{new / old:.2f}×", f"{min(chance):.2f}–{max(chance):.2f}×", verdict]


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], default=[*BENCHMARKS], help="default: all")
    command.add_argument("--old", type=Path, required=True, metavar="CHECKOUT", help="with its extensions built")
    command.add_argument("--rounds", type=int, default=ROUNDS, help="processes of each side (default: %(default)s)")
    command.add_argument("--repeats", type=int, default=REPEATS, help="calls in a process (default: %(default)s)")


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    CpuClock.now = staticmethod(time.process_time)
    print(json.dumps(BENCHMARKS[asked["name"]](asked["repeats"])))
