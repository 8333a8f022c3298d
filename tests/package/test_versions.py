"""The program that runs the tests under other releases of torch (tests/versions/matrix.py), and the page that shows what it found."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.versions import compilers, matrix

NAME = "torch_2_8"


def in_fresh_process(code: str) -> str:
    """What `code` prints where Triton compiles: this process may have its interpreter on."""
    env = os.environ | {"TRITON_INTERPRET": "0"}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Environments are made below `tmp_path`, where this process's Python stands for theirs."""
    monkeypatch.setattr(matrix, "ENVIRONMENTS_FOLDER", tmp_path)
    monkeypatch.setattr(matrix, "python", lambda _folder: [sys.executable])
    matrix.caches(tmp_path).mkdir()
    return tmp_path


# Releases of Triton ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_has_what_the_compilers_found():
    assert compilers.page(check=True) == 0, "python tests/versions/compilers.py page writes it"
    assert {path.stem for path in compilers.RESULTS.glob("*.json")} <= set(compilers.RELEASES)
    of = {"compiled": 3, "registers": 64, "spills": {}, "errors": {}}
    launches = {"wrong": 0, "microseconds": {"Triton's": 40.0, "ours": 9.0}}
    result = {"triton": "9.9", "seconds": 1, "date": "", "commit": "", "targets": {"sm_80": of}, "launches": launches}
    assert "| sm_80 | 3 compiled, no spills |" in compilers.generated([result])
    of |= {"spills": {"chunk: scores": 8}, "errors": {"scale: in place": "ValueError: no"}}
    text = compilers.generated([result])
    assert "| sm_80 | 3 compiled, 1 not, 1 spill |" in text and "| sm_90 | not run |" in text
    assert "sm_80, chunk: scores: 8 bytes" in text and "sm_80, scale: in place: ValueError: no" in text


def test_a_release_comes_before_torchs_own_and_goes_again(folder, monkeypatch):
    """With commands that do not run: what they are told, and what is left."""
    commands = []

    def require(command, env):
        commands.append((command, env))
        if "compile" in command:
            of = {"compiled": 1, "registers": 9, "spills": {"chunk: scores": 8}, "errors": {}}
            result = {"targets": {"sm_80": of}, "launches": {"wrong": 1}}
            Path(command[command.index("compile") + 1]).write_text(json.dumps(result))

    monkeypatch.setattr(matrix, "require", require)
    monkeypatch.setattr(compilers, "RESULTS", folder / "found")
    assert compilers.run(["triton_3_4"]) == 2
    (install, _), (compile_, env) = commands
    site = str(folder / "triton_3_4" / "site")
    assert install[-3:] == ["--target", site, f"triton=={compilers.RELEASES['triton_3_4']}"]
    assert env["PYTHONPATH"].split(":") == [site, str(compilers.ROOT)] and compile_[-1] == "gfx942"
    assert json.loads((folder / "found" / "triton_3_4.json").read_text())["release"] == "triton_3_4"
    assert not (folder / "triton_3_4").exists()


def test_spills_and_errors_of_a_variant_are_told():
    """Of two variants one is given too few registers, and of the other target nothing can be read."""
    code = """
import json, sys
from tests.versions import compilers
from benchmarks import inspect
from kto_kernels.backends.triton import launch
own, options = inspect.variants, launch.options
inspect.variants = lambda: [v for v in own() if v[0] in ("all outputs, gradient, float32", "in place, float32")]
launch.options = lambda hip, warp, threads: options(hip, warp, threads) | {"maxnreg": 32}
inspect._read_amd = None
from tests.support import stub_driver
stub_driver.launches = lambda which: None
print(json.dumps(compilers.compile_here(("sm_90", "gfx942"))["targets"]))
"""
    found = json.loads(in_fresh_process(code))
    assert found["sm_90"]["compiled"] == 2 and found["sm_90"]["spills"]["chunk: all outputs, gradient, float32"] > 0
    assert found["gfx942"]["compiled"] == 0 and len(found["gfx942"]["errors"]) == 2


# Releases of torch ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_is_up_to_date():
    assert matrix.page(check=True) == 0, "python tests/versions/matrix.py page writes it"
    assert {path.stem for path in matrix.RESULTS.glob("*.json")} <= set(matrix.ENVIRONMENTS)


def test_an_outdated_page_is_told(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- versions -->\nnot it\n<!-- end -->\n")
    monkeypatch.setattr(matrix, "PAGE", page)
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    assert matrix.page(check=True) == 1 and "page.md" in capsys.readouterr().out
    assert matrix.page(check=False) == 0 and matrix.page(check=True) == 0


def test_passed_skipped_and_failed_tests_are_told_apart(folder):
    tests = folder / "test_some.py"
    tests.write_text(
        "import os, pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): raise ValueError('first\\nsecond')\n"
        "def test_explained(): assert 1 == 2, ''\n"
        "def test_absent(): pytest.skip('absent')\n"
        "@pytest.mark.xfail\ndef test_known(): assert False\n"
        "@pytest.fixture\ndef broken(): raise OSError('broken')\n"
        "def test_broken(broken): pass\n"
        "def test_crash(): os.abort()\n"
    )
    found = matrix.run_tests(folder, [str(tests)])
    assert (found["passed"], found["skipped"]) == (1, 2)
    failed = {name.split("::")[1]: line for name, line in found["failed"].items()}
    assert failed["test_bad"] == "ValueError: first" and "broken" in failed["test_broken"]
    assert "1 == 2" in failed["test_explained"]
    assert "crashed" in failed["test_crash"] and len(failed) == 4
    assert matrix.cell(found) == "1 passed, 4 failed, 2 skipped"


@pytest.mark.parametrize(("code", "status"), [("import nothing_of_this_name", 1), ("", 5)])
def test_tests_that_do_not_run_have_failed(folder, code, status):
    tests = folder / "test_none.py"
    tests.write_text(code)
    found = matrix.run_tests(folder, [str(tests)])
    assert found["passed"] == 0 and len(found["failed"]) == 1
    assert status == 1 or found["failed"] == {"pytest": f"exit status {status}"}


def test_too_little_space_is_said_before_any_work(folder, monkeypatch):
    monkeypatch.setattr(matrix, "call", None)
    environment = matrix.Environment(pins=(), gib=10**9)
    with (
        pytest.raises(SystemExit, match=r"takes 1000000000 GiB .* and [\d.]+ GiB are free"),
        matrix.made(NAME, environment),
    ):
        pass
    assert not (folder / NAME).exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_environment_goes_whatever_happens(folder, monkeypatch, error):
    made, commands = matrix.made(NAME, matrix.Environment(("torch==2.8.0", "numpy<2.4"), gib=0)), []
    monkeypatch.setattr(matrix, "call", lambda command, env: commands.append(command) or 0)
    with pytest.raises(error), made as place:
        assert place == folder / NAME
        constraints = (place / "constraints.txt").read_text()
        assert not re.search("^(torch|triton|numpy)=", constraints, re.M) and "pytest==" in constraints
        raise error
    assert commands and not (folder / NAME).exists()
    monkeypatch.setattr(matrix, "call", lambda command, env: 1)
    with pytest.raises(SystemExit, match="exit status 1"), matrix.made(NAME, matrix.Environment((), gib=0)):
        pass
    assert not (folder / NAME).exists()


def test_no_process_of_a_command_stays_behind(tmp_path):
    """Not a command that takes too long, nor what a command that ended has left running."""
    assert matrix.call(["sleep", "1000"], {}, 0.1) == matrix.TIMEOUT
    assert matrix.call(["sh", "-c", f"sleep 1000 & echo $! > {tmp_path}/left"], {}) == 0
    left = Path("/proc", (tmp_path / "left").read_text().strip(), "stat")
    deadline = time.monotonic() + 60
    while left.exists() and ") Z " not in left.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_ended_from_outside_deletes_its_environment(folder):
    """SIGTERM, in the middle of a command: the environment is deleted."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(matrix.__file__).parent)!r})\n"
        "import matrix\nfrom pathlib import Path\n"
        f"matrix.ENVIRONMENTS_FOLDER = Path({str(folder)!r})\n"
        "matrix.require = lambda command, env: matrix.call(['sleep', '1000'], env)\n"
        f"sys.argv = ['matrix.py', 'run', {NAME!r}]\n"
        "sys.exit(matrix.main())"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 300
        while not (folder / NAME / "caches").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert not (folder / NAME).exists()
