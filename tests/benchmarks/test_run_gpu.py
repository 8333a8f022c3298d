"""benchmarks/run_gpu.sh with a `python` that writes down what it is asked for, in the place of one that computes."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks import predictions
from benchmarks.__main__ import parser
from benchmarks.benchmark import settle
from tests.package.pages import address

ROOT = Path(__file__).parents[2]
OPTIONS = ("--device", "cpu")
GATE = ["linear", "logits"]
BENCHMARKS = [*GATE, "linear", "logits", "longcontext", "step", "memory", "ceilings"]
SUITES = ["one-of-each", "triton", "cuda", "others", "alone", "torch"]
TOOLS = ["memcheck", "racecheck", "initcheck"]


class Machine:
    """Programs that note their calls in a file. `trouble` is shell code that every call of `python` runs first."""

    def __init__(self, folder: Path):
        self.folder, self.out, self.tools = folder, folder / "out", folder / "tools"
        self.tools.mkdir()
        self.program("compute-sanitizer", 'while [ "${1##*/}" != python ]; do shift; done; exec "$@"')

        self.program("nvidia-smi", "")

    def program(self, name: str, code: str) -> Path:
        path = self.tools / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> {self.folder}/asked\n{code}\n')
        path.chmod(0o755)
        return path

    def run(self, *arguments: str, trouble: str = "", slower: float = 1) -> subprocess.CompletedProcess:
        python = self.program("python", trouble)
        path = f"{self.tools}:/usr/bin:/bin"
        more = {"PYTHON": str(python), "RUN_GPU_SLOWER": str(slower), "PATH": path, "CUDA_HOME": str(self.folder)}
        command = ["bash", "benchmarks/run_gpu.sh", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **more})

    def asked(self, program: str = "python") -> list[str]:
        lines = (self.folder / "asked").read_text().splitlines()
        return [line.removeprefix(f"{program} ") for line in lines if line.startswith(f"{program} ")]

    def modules(self) -> list[str]:
        return [line.split()[1] for line in self.asked()]

    def benchmarks(self) -> list:
        """The commands of `python -m benchmarks`, as that reads them."""
        found = [parser().parse_args(line.split()[2:]) for line in self.asked() if line.startswith("-m benchmarks ")]
        for args in found:
            if hasattr(args, "benchmark"):
                settle(args)
        return found

    def suites(self) -> list[str]:
        return re.findall(r"--junitxml \S+/tests-(\S+)\.xml", "\n".join(self.asked()))


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_everything_is_run_and_in_order(machine):
    done = machine.run("all", str(machine.out), "--quick", *OPTIONS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert machine.modules() == ["kto_kernels", "pytest", *["benchmarks"] * (len(BENCHMARKS) + 2)]
    *timed, inspect, table = machine.benchmarks()
    assert [args.benchmark.name for args in timed] == BENCHMARKS
    assert all(args.quick and args.device == "cpu" for args in timed)
    files = [args.json for args in timed[2:]]
    assert files == [machine.out / f"{name}-cpu.json" for name in BENCHMARKS[2:]]
    # The table reads what was written.
    assert table.results == machine.out and table.device == "cpu"
    assert inspect.json == machine.out / "inspect-cpu.json"
    assert {*predictions.MEASURED} - {"launches"} <= {path.name.removesuffix("-cpu.json") for path in files}


@pytest.mark.parametrize("part", ["tests", "benchmarks", "table"])
def test_a_part_is_run_alone(machine, part):
    assert machine.run(part, str(machine.out), "--quick", *OPTIONS).returncode == 0
    count = {"tests": ["kto_kernels", "pytest"], "benchmarks": ["benchmarks"] * 8, "table": ["benchmarks"] * 2}
    assert machine.modules() == count[part]
    assert [path.name for path in machine.out.glob("*.log")] == [f"{part}.log"]
    with tarfile.open(machine.out / "first-run.tar.gz") as file:
        assert file.getnames() == [f"{part}.log"]


def test_launches_are_counted_on_a_gpu(machine):
    assert machine.run("benchmarks", str(machine.out)).returncode == 0
    args = parser().parse_args(machine.asked()[-1].split()[2:])
    assert args.run.__name__ == "run_launches" and args.json == machine.out / "launches-cuda.json"


def test_the_tests_of_each_backend_and_the_sanitizers(machine):
    assert machine.run("tests", str(machine.out)).returncode == 0
    assert machine.suites() == SUITES
    assert len(machine.asked("nvidia-smi")) == 1
    tools = [line.split()[1] for line in machine.asked("compute-sanitizer")]
    assert tools == TOOLS and all("--error-exitcode" in line for line in machine.asked("compute-sanitizer"))
    # The files that the sanitizers run exist.
    paths = {word for line in machine.asked() for word in line.split() if word.startswith("tests/")}
    assert paths and all((ROOT / path).exists() for path in paths)


def test_without_the_sanitizer_a_word_says_so(machine):
    (machine.tools / "compute-sanitizer").unlink()
    if shutil.which("compute-sanitizer", path="/usr/bin:/bin"):
        pytest.skip("the sanitizer is here")
    done = machine.run("tests", str(machine.out))
    assert done.returncode == 0 and "sanitizer: skipped" in done.stdout and machine.suites() == SUITES


@pytest.mark.parametrize("suite", ["one-of-each", pytest.param("triton", marks=pytest.mark.wide)])
def test_pytest_knows_the_options(machine, suite):
    """Every GPU test is chosen by a suite, or pytest would end in a usage error."""
    machine.run("tests", str(machine.out))
    (line,) = (line for line in machine.asked() if f"tests-{suite}.xml" in line)
    # The shell's quotes are gone: what follows -m or -k up to the next option is one argument.
    words = re.findall(r"-(?:m|k) [^-]+(?=\s-|$)|\S+", line.removeprefix("-m pytest "))
    options = [part for word in words for part in (word.split(" ", 1) if word[:3] in ("-m ", "-k ") else [word])]
    command = [
        sys.executable,
        "-m",
        "pytest",
        *options,
        "-n0",
        "--collect-only",
        "-p",
        "no:cacheprovider",
        "tests/package/test_releases.py",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 5 and "deselected" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("test", "out"), "test: expected tests, benchmarks, table or all"),
        (("tests", "--quick"), "--quick: options come behind the folder OUT"),
        (("--help",), "The first hour on a GPU"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(machine, arguments, said):
    done = machine.run(*arguments)
    assert done.returncode == 2 and said in done.stderr and not (machine.folder / "asked").exists()


def test_limits_are_multiplied_by_whole_numbers_only(machine):
    done = machine.run("tests", str(machine.out), slower=1.5)
    assert done.returncode == 2 and "RUN_GPU_SLOWER: expected a whole number" in done.stderr


def test_what_is_missing_is_said_before_any_work(machine):
    """Without PyTorch, or with one that finds no CUDA device."""
    python = machine.program("without", 'exec python3 -S -I "$@"')
    for program, said in ((python, "no PyTorch for this Python"), (sys.executable, "PyTorch finds no CUDA device")):
        if "finds" in said and torch.cuda.is_available():
            continue
        done = subprocess.run(
            ["bash", "benchmarks/run_gpu.sh", "tests", str(machine.out)],
            cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHON": str(program)},
        )  # fmt: skip
        assert done.returncode == 2 and said in done.stderr and list(machine.out.iterdir()) == []


def test_nothing_is_measured_behind_a_gate_that_failed(machine):
    done = machine.run("benchmarks", str(machine.out), *OPTIONS, trouble="echo gate: ours differ; exit 1")
    assert done.returncode == 1
    assert [args.benchmark.name for args in machine.benchmarks()] == ["linear"]
    assert "incomplete: linear" in done.stdout


def test_a_failure_of_the_tests_is_said_and_the_rest_goes_on(machine):
    trouble = 'case "$*" in *tests-cuda.xml*) exit 1;; esac'
    done = machine.run("all", str(machine.out), *OPTIONS, trouble=trouble)
    assert done.returncode == 1 and "incomplete: tests-cuda\n" in done.stdout
    assert machine.suites() == SUITES and len(machine.benchmarks()) == len(BENCHMARKS) + 2
    assert "tests-cuda: failed after 0 s" in predictions.steps(machine.out)


def with_limits(machine, trouble: str, *replacements: tuple[str, str]) -> subprocess.CompletedProcess:
    """The benchmarks by a copy of the script with shorter limits."""
    script = (ROOT / "benchmarks" / "run_gpu.sh").read_text()
    for old, new in replacements:
        assert old in script
        script = script.replace(old, new)
    (machine.folder / "benchmarks").mkdir()
    (machine.folder / "benchmarks" / "run_gpu.sh").write_text(script)
    python = machine.program("python", trouble)
    command = ["bash", str(machine.folder / "benchmarks" / "run_gpu.sh"), "benchmarks", str(machine.out), *OPTIONS]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHON": str(python)}, timeout=60
    )


def test_what_is_too_slow_is_cut_off_and_leaves_what_it_had(machine):
    """The step that hangs is interrupted, and the next one runs."""
    trouble = 'case "$*" in *memory*) trap "echo interrupted; exit 2" INT; echo had; while :; do sleep 0.1; done;; esac'
    done = with_limits(machine, trouble, ("measure 60 memory", "measure 1 memory"))
    assert done.returncode == 1 and "incomplete: memory\n" in done.stdout
    log = (machine.out / "benchmarks.log").read_text()
    assert (
        "had\n" in log and "interrupted\n" in log and "== memory: cut off after" in log and "== ceilings: done" in log
    )


def test_what_ignores_the_interrupt_ends_with_its_children(machine):
    """A process that the device holds, and its child, which would keep the log open."""
    trouble = """case "$*" in *memory*) trap "" INT; (sleep 600) & while :; do sleep 0.1; done;; esac"""
    done = with_limits(machine, trouble, ("measure 60 memory", "measure 1 memory"), ("limit + 15", "limit + 1"))
    assert done.returncode == 1 and "incomplete: memory\n" in done.stdout
    log = (machine.out / "benchmarks.log").read_text()
    assert "== memory: cut off after" in log and "== ceilings: done" in log


def test_no_step_begins_when_the_part_has_no_time_left(machine):
    trouble = 'case "$*" in *longcontext*) sleep 3;; esac'
    done = with_limits(machine, trouble, ("540 * slower", "7"))
    assert done.returncode == 1 and "== longcontext: done" in done.stdout
    assert "== memory: not run, no time left" in done.stdout and not any("memory" in line for line in machine.asked())


def test_a_part_ends_within_the_limit_of_a_call():
    """No part may take ten minutes: its deadline, and what a step that ignores the interrupt gets on top."""
    script = (ROOT / "benchmarks" / "run_gpu.sh").read_text()
    (deadline,) = re.findall(r"deadline=\$\(\(SECONDS \+ (\d+) ", script)
    (kill,) = re.findall(r"limit \+ (\d+)", script)
    assert int(deadline) + int(kill) + 30 < 600 and 3 * (int(deadline) + int(kill)) < 1800


def test_the_form_for_results_asks_for_the_files_that_are_written(machine):
    machine.run(
        "table", str(machine.out), trouble=f'[[ "$*" != *predictions* ]] || touch {machine.out}/predictions-cuda.md'
    )
    with tarfile.open(machine.out / "first-run.tar.gz") as file:
        assert file.getnames() == ["table.log", "predictions-cuda.md"]
    page = (ROOT / "docs" / "first-run.md").read_text()
    form = ROOT / ".github" / "ISSUE_TEMPLATE" / "results.yml"
    for text in (page, form.read_text()):
        assert "first-run.tar.gz" in text and "predictions-cuda.md" in text
    assert f"/{address()}/issues/new?template={form.name}" in page
    for line in re.findall(r"^benchmarks/run_gpu\.sh (\w+)", page, re.M):
        assert line in ("all", "tests", "benchmarks", "table")
