"""`make test-versions-all`: the tests of `SELECTIONS` under every release of `ENVIRONMENTS`, each in an environment of its
own, .venv-versions/NAME, which takes gigabytes and is deleted when its tests have run. The findings are written to
tests/versions/results/NAME.json, and from there to docs/versions.md.

python tests/versions/matrix.py run [NAME...]    make the environments (all by default) and run the tests in them
python tests/versions/matrix.py page [--check]   write docs/versions.md; with --check only fail where it is out of date

A further release is a line of `ENVIRONMENTS`, further tests are a line of `SELECTIONS`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.environment import commit, describe  # noqa: E402
from benchmarks.report import markdown  # noqa: E402

ENVIRONMENTS_FOLDER = ROOT / ".venv-versions"
RESULTS = ROOT / "tests" / "versions" / "results"
PAGE = ROOT / "docs" / "versions.md"
MARKERS = re.compile(r"(<!-- versions -->\n).*?(\n<!-- end -->)", re.S)


@dataclass(frozen=True)
class Environment:
    """`pins` are installed first and replace what constraints.txt says of the same packages. `gib` is the disk space
    that making the environment takes at its peak, as measured: what was downloaded and what was installed."""

    pins: tuple[str, ...]
    gib: int


# The interpreters of Triton 3.4 to 3.6, which these releases of torch bring along, fail under numpy 2.4.
OLD_TRITON = "numpy<2.4"
# torch 2.11 refuses a later one, our pyproject.toml an earlier one.
OLD_SETUPTOOLS = "setuptools>=77,<82"
ENVIRONMENTS = {
    "torch_2_8": Environment(("torch==2.8.0", OLD_TRITON), gib=12),
    "torch_2_11": Environment(("torch==2.11.0", OLD_TRITON, OLD_SETUPTOOLS), gib=8),
    "torch_2_14": Environment(("torch==2.14.1",), gib=8),
}

# The tests that run in every environment: title → pytest's arguments. Triton's interpreter is slow, and the smoke tests run every
# kernel in it: whole grids leave it out.
SELECTIONS = {
    "every public function, every backend; torch.compile": ["tests/package/test_smoke.py"],
    "operators from logits: opcheck, torch.compile, autograd": ["tests/losses/test_operators.py"],
    "operators from hidden states: the same": ["tests/losses/test_linear_operators.py"],
    "operators: fakes and tags of every dtype": ["tests/losses/test_operators_fake.py"],
    "operators: numbers that change under torch.compile": ["tests/losses/test_operators_numbers.py"],
    "operators: several copies of the package": ["tests/losses/test_operators_copies.py"],
    "operators: one backward, also compiled": ["tests/losses/test_backward_once.py"],
    "`kto_loss`, every option": ["tests/losses/test_kto_loss.py", "-k", "not triton-cpu"],
    "`linear_kto_loss`, every option": ["tests/losses/test_linear_kto_loss.py", "-k", "not triton-cpu"],
    "the package, surroundings": ["tests/package/test_package.py", "tests/package/test_environment.py"],
}
SECONDS = 3600  # after which a selection counts as hung
TIMEOUT = 124  # the exit status then, as of the command `timeout`


# Environments ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def call(command: list[str], env: dict[str, str], seconds: float | None = None) -> int:
    """The command's exit status, or `TIMEOUT`. However this function is left, no process
    that the command started stays behind."""
    process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return TIMEOUT
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def require(command: list[str], env: dict[str, str]) -> None:
    if status := call(command, env):
        raise SystemExit(f"exit status {status}: {' '.join(command)}")


def require_space(name: str, environment: Environment) -> None:
    free = shutil.disk_usage(ROOT).free / 2**30
    if free < environment.gib:
        raise SystemExit(
            f"{name} takes {environment.gib} GiB of disk space while it is made, and {free:.1f} GiB are free at {ROOT}"
        )


@contextlib.contextmanager
def made(name: str, environment: Environment):
    """The folder of the environment, which goes again whatever happens."""
    folder = ENVIRONMENTS_FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    require_space(name, environment)
    try:
        caches(folder).mkdir(parents=True)
        # pip unpacks gigabytes: not in a /tmp that may be small. Our extensions are those in the tree, as `make` has built
        # them: they use no torch headers, and one build serves every torch.
        env = variables(folder) | {"TMPDIR": str(caches(folder)), "KTO_KERNELS_CPU": "0", "KTO_KERNELS_CUDA": "0"}
        env.pop("KTO_KERNELS_CUDA_EMULATION", None)
        require([sys.executable, "-m", "venv", str(folder)], env)
        # Versions pinned here replace those pinned there, and torch itself says which Triton it takes.
        replaced = {re.split(r"[<>=!~]", pin)[0] for pin in environment.pins} | {"triton"}
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(line for line in lines if line.split("==")[0] not in replaced) + "\n")
        pip = [*python(folder), "-m", "pip", "install", "--quiet", "--no-cache-dir", "-c", str(constraints)]
        # torch comes first: what depends on it must find it there.
        require([*pip, *environment.pins], env)
        require([*pip, "setuptools", "wheel"], env)  # torch's compiler wants the first of them too
        require([*pip, "--no-build-isolation", "-e", ".[test]"], env)
        yield folder
    finally:
        shutil.rmtree(folder)


def caches(folder: Path) -> Path:
    return folder / "caches"


def python(folder: Path) -> list[str]:
    return [str(folder / "bin" / "python")]


def variables(folder: Path) -> dict[str, str]:
    """Everything compiled in an environment stays there, and this tree is the only place to import our package from."""
    own = dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"), str(caches(folder)))
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | own


def versions(folder: Path) -> dict[str, str]:
    command = [*python(folder), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    installed = {package["name"].lower(): package["version"] for package in listed}
    own = subprocess.run([*python(folder), "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    return {"python": own} | {name: installed.get(name) for name in ("torch", "triton", "numpy")}


# Tests ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def run_tests(folder: Path, arguments: list[str]) -> dict:
    """How many tests passed and were skipped, and the first line of the error of each that failed."""
    report = caches(folder) / "report.xml"
    report.unlink(missing_ok=True)
    command = [*python(folder), "-m", "pytest", "-q", "-n", "2", "-m", "not alone", f"--junitxml={report}"]
    command += ["--tb=short", "--show-capture=no", "--disable-warnings", "-p", "no:cacheprovider", *arguments]
    start = time.monotonic()
    status = call(command, variables(folder), SECONDS)
    found = counts(report.read_text()) if report.exists() else {"passed": 0, "skipped": 0, "failed": {}}
    # 1 is pytest's for failed tests, which the report names. Any other, and a crash, is a failure of the whole.
    if status != bool(found["failed"]):
        found["failed"]["pytest"] = f"over {SECONDS} s" if status == TIMEOUT else f"exit status {status}"
    return {"arguments": arguments} | found | {"seconds": round(time.monotonic() - start)}


def counts(report: str) -> dict:
    """The numbers of a JUnit report."""
    passed, skipped, failed = 0, 0, {}
    for case in ElementTree.fromstring(report).iter("testcase"):
        error = next((found for tag in ("failure", "error") if (found := case.find(tag)) is not None), None)
        if error is not None:
            name = f"{case.get('classname').replace('.', '/')}.py::{case.get('name')}"
            lines = [line for line in (error.get("message") or error.text or "").splitlines() if line.strip()]
            # A name alone, as of an assertion with a message of its own, says nothing without the next line.
            said = " ".join(lines[: 2 if lines and lines[0].rstrip().endswith("Error:") else 1])
            failed[name] = said.replace(f"{ROOT}/", "")[:200]
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return {"passed": passed, "skipped": skipped, "failed": failed}


def provenance() -> dict:
    where = describe("cuda" if torch.cuda.is_available() else "cpu")
    # The tests are part of what is said to work.
    tested = commit("kto_kernels", "csrc", "setup.py", "tests/*.py")
    return {"date": where["date"], "device": where["device"], "driver": where["driver"], "commit": tested}


def run(names: list[str]) -> int:
    """The number of tests that failed."""
    failed = 0
    for name in names:
        environment = ENVIRONMENTS[name]
        print(f"== {name}: {' '.join(environment.pins)}", flush=True)
        start = time.monotonic()
        with made(name, environment) as folder:
            result = {"environment": name} | provenance() | {"versions": versions(folder)}
            result |= {"making, s": round(time.monotonic() - start), "selections": {}}
            for title, arguments in SELECTIONS.items():
                print(f"-- {name}: {' '.join(arguments)}", flush=True)
                result["selections"][title] = run_tests(folder, arguments)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        failed += sum(len(found["failed"]) for found in result["selections"].values())
    return failed


# The page ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def cell(found: dict | None) -> str:
    if found is None:
        return "not run"
    numbers = {"passed": found["passed"], "failed": len(found["failed"]), "skipped": found["skipped"]}
    return ", ".join(f"{number} {word}" for word, number in numbers.items() if number or word == "passed")


def generated(results: list[dict]) -> str:
    """A column for each environment, and what failed below the table."""
    if not results:
        return "Not run yet."
    rows = [["torch", *(result["versions"]["torch"] for result in results)]]
    for package in ("triton", "numpy", "python"):
        rows.append([package, *(result["versions"][package] or "–" for result in results)])
    for title in SELECTIONS:
        rows.append([title, *(cell(result["selections"].get(title)) for result in results)])
    seconds = [sum(found["seconds"] for found in result["selections"].values()) for result in results]
    rows.append(["minutes", *(f"{total / 60:.0f}" for total in seconds)])
    rows += [[word, *(result[word] for result in results)] for word in ("date", "commit", "device")]
    failures = [
        f"- torch {result['versions']['torch']}, `{name}`: {line}"
        for result in results
        for found in result["selections"].values()
        for name, line in found["failed"].items()
    ]
    return "\n\n".join([markdown(rows), "\n".join(failures) if failures else "Nothing failed."])


def page(check: bool) -> int:
    paths = [RESULTS / f"{name}.json" for name in ENVIRONMENTS]
    results = [json.loads(path.read_text()) for path in paths if path.exists()]
    return write(MARKERS, generated(results), Path(__file__), check)


def write(markers: re.Pattern, text: str, program: Path, check: bool) -> int:
    """Puts the text between its markers on the page; with `check`, only tells where it is not there."""
    old = PAGE.read_text()
    new = markers.sub(lambda found: found[1] + text + found[2], old)
    if not check:
        PAGE.write_text(new)
    elif new != old:
        print(f"{PAGE.relative_to(ROOT)} is not as its results files say; python {program.name} page writes it")
    return int(check and new != old)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run").add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ENVIRONMENTS)}")
    commands.add_parser("page").add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.command == "page":
        return page(args.check)
    if unknown := [name for name in args.names if name not in ENVIRONMENTS]:
        parser.error(f"no such environment: {', '.join(unknown)}; there are {', '.join(ENVIRONMENTS)}")
    # Ended from outside, the environment goes too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    failed = run(args.names or list(ENVIRONMENTS))
    page(check=False)
    print(f"failed tests: {failed}; docs/versions.md has them" if failed else "nothing failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
