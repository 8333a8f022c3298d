"""What runs the tests under other releases of torch (tests/versions/matrix.py), and the page that shows what it found."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "versions"))

import matrix

NAME = "torch_2_8"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Environments are made below `tmp_path`, where this process's Python stands for theirs."""
    monkeypatch.setattr(matrix, "ENVIRONMENTS_FOLDER", tmp_path)
    monkeypatch.setattr(matrix, "python", lambda _folder: [sys.executable])
    matrix.caches(tmp_path).mkdir()
    return tmp_path


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


def test_what_is_told_of_tests(folder):
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


def test_no_process_stays_behind(tmp_path):
    """Not a command that takes too long, nor what a command that ended has left running."""
    assert matrix.call(["sleep", "1000"], {}, 0.1) == matrix.TIMEOUT
    assert matrix.call(["sh", "-c", f"sleep 1000 & echo $! > {tmp_path}/left"], {}) == 0
    left = Path("/proc", (tmp_path / "left").read_text().strip(), "stat")
    deadline = time.monotonic() + 60
    while left.exists() and ") Z " not in left.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ended_from_outside(folder):
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
