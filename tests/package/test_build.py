"""Installing where something is missing or too old: what is not needed is left out, with a word, and what was asked for
or is needed is an error that says how to get it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kto_kernels import _requirements
from tests.package.test_environment import STEP, run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(tmp_path):
    """The sources alone, so that a build of theirs touches nothing else."""
    copy = tmp_path / "tree"
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "kto_kernels/**/*.py", "csrc/**/*.*"):
        for file in ROOT.glob(name):
            (copy / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            (copy / file.relative_to(ROOT)).write_bytes(file.read_bytes())
    return copy


@pytest.fixture
def bare(tmp_path):
    """An environment without a compiler, nvcc or ninja."""
    (tmp_path / "empty").mkdir()
    ours = ("CXX", "CUDA_HOME", "CUDA_PATH")
    kept = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith("KTO_KERNELS_")}
    return kept | {"PATH": str(tmp_path / "empty")}


def build(tree: Path, environment: dict, before: str = "") -> subprocess.CompletedProcess:
    """`setup.py build_ext` in `tree`, after Python has run the line `before`."""
    code = f"import runpy, sys; sys.argv = ['setup.py', 'build_ext', '--inplace']\n{before}\nrunpy.run_path('setup.py')"
    return subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True)


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


# An editable install of the tree would lend its extensions to another copy.
NOT_EDITABLE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
"""


# Missing ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(16)
def test_without_a_compiler_the_package_installs_and_says_what_it_lacks(tree, bare, tmp_path):
    site = tmp_path / "site"
    command = ["-m", "pip", "install", "-v", "--no-index", "--no-deps", "--no-build-isolation", "--target"]
    command += [str(site), str(tree)]
    installed = subprocess.run([sys.executable, *command], env=bare, capture_output=True, text=True, cwd=tmp_path)
    output = installed.stdout + installed.stderr
    assert installed.returncode == 0, output
    assert "built WITHOUT the CPU kernels: no C++ compiler was found" in output
    assert not list(site.rglob("*.so"))

    there = {"PYTHONPATH": str(site), "KTO_KERNELS_CUDA_EMULATE": "0"}
    used = subprocess.run(
        [sys.executable, "-P", "-c", NOT_EDITABLE + STEP + "print(kto_kernels.__file__)"],
        env=os.environ | there,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert used.returncode == 0, used.stderr
    assert used.stdout.splitlines()[-1].startswith(str(site))
    warning = "backend='torch' for float32 logits on cpu; not 'cpu': the C++ extension kto_kernels._cpu is not there"
    assert used.stderr.count(warning) == 1
    assert used.stderr.count("KTO_KERNELS_CPU=1") == 1


@pytest.mark.parametrize("name", ["CPU", "CUDA", "CUDA_EMULATION"])
def test_what_is_asked_for_is_built_or_an_error(tree, bare, name):
    done = build(tree, bare | {f"KTO_KERNELS_{name}": "1"})
    assert done.returncode != 0
    missing = "no (C.. compiler|nvcc) was found" if name == "CUDA" else "no C.. compiler was found"
    assert re.search(rf"^kto_kernels: KTO_KERNELS_{name}=1, but {missing}", done.stderr, re.MULTILINE), done.stderr
    done = build(tree, bare | {f"KTO_KERNELS_{name}": "yes"})
    assert done.returncode != 0 and f"KTO_KERNELS_{name}: expected 0 or 1, got 'yes'" in done.stderr


def test_a_compiler_asked_for_by_name_is_there_or_an_error(tree, bare):
    done = build(tree, bare | {"CXX": "ccache no-such-compiler"})
    assert done.returncode != 0 and "CXX=ccache no-such-compiler: no such program" in done.stderr
    assert (
        build(tree, bare | {"CXX": "no-such-compiler", "KTO_KERNELS_CPU": "0", "KTO_KERNELS_CUDA": "0"}).returncode == 0
    )


OTHERWISE = {
    "Windows": ("sys.platform = 'win32'", "this build knows the compilers of Linux and macOS only"),
    "no headers": (
        "import sysconfig; sysconfig.get_path = lambda *_: '/nowhere'",
        "Python's headers were not found (looked for Python.h in /nowhere",
    ),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_other_things_that_a_build_may_lack(tree, bare, tmp_path, case):
    before, message = OTHERWISE[case]
    program(tmp_path / "empty", "c++", "exit 1")
    code = f"""
import runpy, sys, setuptools, setuptools.command.build_ext
setuptools.setup = lambda **_: None
{before}
print(runpy.run_path("setup.py")["missing_for_cpp"]())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert message in done.stdout and f"built WITHOUT the CPU kernels: {message}" in done.stderr


# There, and failing ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_compiler_that_fails_is_an_error(tree, bare, tmp_path):
    """Without the C++ kernels it would install, and nobody would learn that their sources do not compile."""
    program(tmp_path / "empty", "c++", "echo the compiler fails >&2; exit 1")
    done = build(tree, bare | {"KTO_KERNELS_CUDA": "0"})
    assert done.returncode != 0
    assert "c++ could not build kto_kernels._cpu" in done.stderr and "KTO_KERNELS_CPU=0 builds without" in done.stderr
    assert "the compiler fails" in done.stdout + done.stderr


@pytest.mark.parametrize("script", ["echo broken; exit 3", "echo sm_50 sm_60"])
def test_an_nvcc_that_fails_or_is_too_old_is_an_error(tree, bare, tmp_path, script):
    program(tmp_path / "empty", "nvcc", script)
    program(tmp_path / "empty", "c++", "exit 1")
    done = build(tree, bare | {"KTO_KERNELS_CPU": "0"})
    assert done.returncode != 0
    assert "nvcc --list-gpu-code" in done.stderr and "named none of sm_80" in done.stderr
    assert script.split()[1].rstrip(";") in done.stderr and "KTO_KERNELS_CUDA=0 builds without" in done.stderr


# Too old ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

OLD = {
    "setuptools": ("import setuptools; setuptools.__version__ = '65.5.0'", "setuptools 77 or later, found 65.5.0"),
    "pybind11": ("import pybind11; pybind11.__version__ = '2.11.1'", "pybind11 2.12 or later, found 2.11.1"),
    "no pybind11": ("sys.modules['pybind11'] = None", "pybind11 2.12 or later, found none"),
    "no ninja": ("sys.modules['ninja'] = None", "ninja, found none"),
}


@pytest.mark.fault(17)
@pytest.mark.parametrize("case", OLD)
def test_build_requirements_without_isolation(tree, bare, tmp_path, case):
    before, message = OLD[case]
    program(tmp_path / "empty", "c++", "exit 1")
    done = build(tree, bare | {"KTO_KERNELS_CUDA": "0"}, before)
    assert done.returncode != 0
    assert f"kto_kernels: the build needs {message}" in done.stderr
    assert "--no-build-isolation" in done.stderr and f"pip install '{case.split()[-1]}" in done.stderr
    assert "project.license" not in done.stderr


def test_an_older_torch_is_named_at_import():
    old = "import torch; torch.__version__ = torch.torch_version.TorchVersion('2.7.1+cpu')"
    code = f"{old}\ntry:\n import kto_kernels\nexcept ImportError as error: print(error)"
    assert run(code) == "kto_kernels needs PyTorch 2.8 or later, found 2.7.1+cpu\n"
    assert not _requirements.older("2.8.0a0+gitabc", _requirements.TORCH)
    assert not _requirements.older("2.10.0", _requirements.TORCH)


def test_an_older_triton_is_named_in_the_report():
    pytest.importorskip("triton")
    reason = run("import triton; triton.__version__ = '3.3.1'\nimport kto_kernels.__main__ as m; print(m.report())")
    assert "Triton is not there (Triton 3.4 or later is needed, found 3.3.1)" in reason


def test_the_versions_are_those_of_pyproject():
    text = (ROOT / "pyproject.toml").read_text()
    for name in ("torch", "triton"):
        least = ".".join(map(str, getattr(_requirements, name.upper())))
        assert re.findall(rf'"{name}>=([\d.]+)', text) == [least]


# Flags ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_flags_of_the_environment_reach_the_compiler(tree, bare, tmp_path):
    """Before the kernels' own where these decide what is computed."""
    program(tmp_path / "empty", "c++", "exit 0")
    program(tmp_path / "empty", "ninja", "exit 0")
    flags = {"CPPFLAGS": "-DONE='a b'", "CXXFLAGS": "-O1 -std=c++17 -ffast-math", "LDFLAGS": "-Wl,-rpath,'$ORIGIN'"}
    build(tree, bare | flags | {"KTO_KERNELS_CUDA": "0"})
    (ninja,) = tree.glob("build/*/kto_kernels._cpu/build.ninja")
    (compile_flags,) = re.findall(r"^flags = (.*)$", ninja.read_text(), re.MULTILINE)
    assert "'-DONE=a b'" in compile_flags
    for before, after in (("-O3", "-O1"), ("-std=c++17", "-std=c++20"), ("-ffast-math", "-fno-fast-math")):
        assert compile_flags.index(before) < compile_flags.index(after)
    assert "-shared -pthread '-Wl,-rpath,$$ORIGIN'" in ninja.read_text()
