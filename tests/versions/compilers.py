"""The second half of `make test-versions-all`: every variant of the Triton kernels (`benchmarks.inspect`) is compiled by
every release of `RELEASES` for every target of `TARGETS`, without a GPU. A release is installed beside the torch that is
here, below .venv-versions/, and deleted again. Results go to tests/versions/results/compilers/ and docs/versions.md.

python tests/versions/compilers.py run [NAME...]    compile by these releases (all by default)
python tests/versions/compilers.py page [--check]   write docs/versions.md; with --check only fail if it is out of date
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.report import markdown  # noqa: E402
from tests.versions import matrix  # noqa: E402

RELEASES = {"triton_3_4": "3.4.0", "triton_3_5": "3.5.1", "triton_3_6": "3.6.0", "triton_3_7": "3.7.1",
            "triton_3_8": "3.8.0", "triton_3_9": "3.9.0"}  # fmt: skip
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
RESULTS = matrix.RESULTS / "compilers"
MARKERS = re.compile(r"(<!-- compilers -->\n).*?(\n<!-- end -->)", re.S)
# Triton 3.4 ends with ROCm's linker. Without ROCm this stands for it, and copies: what is read here is the
# assembly before, and no machine code is run.
LINKER = """#!/bin/sh
[ "$1" = --version ] && { echo copies; exit; }
while [ $# -gt 0 ]; do
    case "$1" in
        -o) out="$2"; shift ;;
        -flavor) shift ;;
        -*) ;;
        *) in="$1" ;;
    esac
    shift
done
cp "$in" "$out"
"""
GIB = 2  # of disk space that a release takes, as measured: its wheel and what is in it


def run(names: list[str], targets: tuple[str, ...] = TARGETS) -> int:
    """The number of variants that spill or do not compile, and of launches that are not Triton's."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    bad = 0
    for name in names:
        print(f"== {name}: triton=={RELEASES[name]} for {', '.join(targets)}", flush=True)
        folder = matrix.ENVIRONMENTS_FOLDER / name
        shutil.rmtree(folder, ignore_errors=True)
        matrix.require_space(name, matrix.Environment((), GIB))
        found = RESULTS / f"{name}.json"
        try:
            matrix.caches(folder).mkdir(parents=True)
            paths = (folder / "site", ROOT)
            env = matrix.variables(folder) | {"TMPDIR": str(matrix.caches(folder))}
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--no-deps"]
            matrix.require([*pip, "--target", str(paths[0]), f"triton=={RELEASES[name]}"], env)
            # The release in the folder comes before the one that torch has brought along.
            env |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "TRITON_INTERPRET": "0"}
            linker = folder / "ld.lld"
            linker.write_text(LINKER)
            linker.chmod(0o755)
            env.setdefault("TRITON_HIP_LLD_PATH", str(linker))
            matrix.require([sys.executable, __file__, "compile", str(found), *targets], env)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        result = {"release": name} | matrix.provenance() | json.loads(found.read_text())
        found.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        bad += sum(len(of["spills"]) + len(of["errors"]) for of in result["targets"].values())
        bad += result["launches"]["wrong"]
    return bad


def compile_here(targets: tuple[str, ...]) -> dict:
    """What the Triton that this process imports makes of every variant."""
    import triton

    from benchmarks import inspect
    from tests.support import stub_driver

    names = [f"{kernel.__name__.removesuffix('_kernel')}: {name}" for name, kernel, _ in inspect.variants()]
    jobs = [(i, target) for target in targets for i in range(len(names))]
    start = time.monotonic()
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        found = list(pool.map(compiled, *zip(*jobs)))
    result = {target: {"compiled": 0, "registers": 0, "spills": {}, "errors": {}} for target in targets}
    for (i, target), case in zip(jobs, found):
        of = result[target]
        if isinstance(case, str):
            of["errors"][names[i]] = case
            continue
        of["compiled"] += 1
        of["registers"] = max(of["registers"], case["registers"])
        if case["spills"]:
            of["spills"][names[i]] = case["spills"]
    seconds = round(time.monotonic() - start)
    launches = stub_driver.launches("log-probs, float32")
    return {"triton": triton.__version__, "seconds": seconds, "targets": result, "launches": launches}


def compiled(index: int, target: str) -> dict | str:
    """What `inspect` reads of the machine code, or the error."""
    from benchmarks import inspect

    try:
        return inspect._compile(index, target)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]


# The page ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def cell(of: dict | None) -> str:
    if of is None:
        return "not run"
    said = [f"{of['compiled']} compiled"]
    said += [f"{len(of['errors'])} not"] if of["errors"] else []
    return ", ".join([*said, f"{len(of['spills'])} spill" if of["spills"] else "no spills"])


def generated(results: list[dict]) -> str:
    """A column for each release, and below the table what spills or does not compile."""
    if not results:
        return "Not run yet."
    rows = [["triton", *(result["triton"] for result in results)]]
    rows += [[target, *(cell(result["targets"].get(target)) for result in results)] for target in TARGETS]
    for way in ("Triton's", "ours"):
        found = [str(result["launches"]["microseconds"][way]) for result in results]
        rows.append([f"host µs of a launch of 66 arguments, {way} way", *found])
    rows += [[word, *(str(result[word]) for result in results)] for word in ("seconds", "date", "commit")]
    bad = [
        f"- triton {result['triton']}, {target}, {variant}: {f'{what} bytes' if isinstance(what, int) else what}"
        for result in results
        for target, of in result["targets"].items()
        for variant, what in (of["spills"] | of["errors"]).items()
    ]
    return "\n\n".join([markdown(rows), "\n".join(bad) if bad else "Every variant compiles, and none spills."])


def page(check: bool) -> int:
    paths = [RESULTS / f"{name}.json" for name in RELEASES]
    results = [json.loads(path.read_text()) for path in paths if path.exists()]
    return matrix.write(MARKERS, generated(results), Path(__file__), check)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run").add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RELEASES)}")
    commands.add_parser("page").add_argument("--check", action="store_true")
    here = commands.add_parser("compile")  # what `run` calls under each release
    here.add_argument("file", type=Path)
    here.add_argument("targets", nargs="+")
    args = parser.parse_args()
    if args.command == "page":
        return page(args.check)
    if args.command == "compile":
        args.file.write_text(json.dumps(compile_here(tuple(args.targets))))
        return 0
    if unknown := [name for name in args.names if name not in RELEASES]:
        parser.error(f"no such release: {', '.join(unknown)}; there are {', '.join(RELEASES)}")
    for number in (signal.SIGTERM, signal.SIGHUP):  # ended from outside, the release goes too
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    bad = run(args.names or list(RELEASES))
    page(check=False)
    print(f"spill or do not compile: {bad}; docs/versions.md has them" if bad else "all compile, none spills")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
