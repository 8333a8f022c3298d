"""The package leaves the machine that it is installed on alone: no network, no foreign code, no files. SECURITY.md
promises it."""

import ast
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "kto_kernels").rglob("*.py"))

# Calls that read data as code, reaches out, starts programs or makes files.
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "codeop", "ctypes", "cffi"}
MODULES |= {
    "socket",
    "ssl",
    "http",
    "urllib",
    "requests",
    "httpx",
    "ftplib",
    "smtplib",
    "xmlrpc",
    "asyncio",
    "webbrowser",
}
MODULES |= {"subprocess", "multiprocessing", "tempfile", "shutil", "fcntl", "mmap", "sqlite3", "dbm", "huggingface_hub"}
CALLS = {"eval", "exec", "compile", "__import__", "open", "input", "breakpoint"}
ATTRIBUTES = {"load", "save", "system", "popen", "write_text", "write_bytes", "mkdir", "makedirs", "from_pretrained"}


def forbidden(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        found += [name for name in names if name.split(".")[0] in MODULES]
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in CALLS:
                found.append(node.func.id)
            # tl.load reads a tensor.
            if isinstance(node.func, ast.Attribute) and node.func.attr in ATTRIBUTES:
                owner = node.func.value
                if not (isinstance(owner, ast.Name) and owner.id == "tl"):
                    found.append(f".{node.func.attr}")
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_reads_code_reaches_out_or_writes(source):
    assert forbidden(ast.parse(source.read_text())) == []


def test_what_is_forbidden_is_found():
    code = "import pickle\nfrom urllib.request import urlopen\neval('1')\ntorch.load(f)\nos.system('ls')\ntl.load(p)\nopen(f)"
    assert forbidden(ast.parse(code)) == ["pickle", "urllib.request", "eval", ".load", ".system", "open"]


AUDITED = """
import sys, torch
x = torch.randn(3, 4, 50, requires_grad=True)
torch.optim.SGD([x]).step()  # PyTorch's own first-call business is not ours
@torch.library.custom_op("audited::identity", mutates_args=())
def identity(x: torch.Tensor) -> torch.Tensor:
    return x.clone()
identity(x)
events = []
KINDS = {"socket", "urllib", "http", "ftplib", "smtplib", "subprocess", "pickle", "shutil", "tempfile", "ctypes"}
EVENTS = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "os.mkdir", "os.remove", "os.rename", "os.link"}
def writes(mode, flags):
    return any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & 3)
def hook(event, arguments):
    if event == "open" and writes(arguments[1], arguments[2]) or event in EVENTS or event.split(".")[0] in KINDS:
        events.append((event, *map(str, arguments)))
sys.addaudithook(hook)
sys.dont_write_bytecode = True  # Python's own
import kto_kernels
labels, desirable = torch.randint(50, (3, 4)), torch.tensor([True, False, True])
hidden, weight = torch.randn(3, 4, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
for backend in ("cpu", "torch", "triton", "cuda"):
    if kto_kernels.available_backends()[backend] is None:
        kto_kernels.kto_loss(x, labels, desirable, kl=0.1, backend=backend).loss.backward()
        kto_kernels.linear_kto_loss(hidden, weight, labels, desirable, kl=0.1, backend=backend).loss.backward()
print(events)
import socket
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
except OSError:
    pass
print(any(event.startswith("socket.connect") for event, *_ in events))
"""


def test_import_and_steps_open_no_socket_and_write_no_file(tmp_path):
    """Python's audit events, which tell of every socket, file, program and pickle; the last line proves them alive."""
    run = subprocess.run([sys.executable, "-c", AUDITED], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "[]\nTrue\n"
    assert not list(tmp_path.iterdir())


def test_the_source_distribution_holds_what_a_build_needs(tmp_path):
    copy = tmp_path / "tree"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a git checkout")
    for name in files.stdout.split("\n"):
        if name and not name.startswith(("benchmarks/", "tests/", "examples/")) and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    code = "from setuptools import build_meta; print(build_meta.build_sdist('..'))"
    environment = os.environ | {"KTO_KERNELS_CUDA": "0"}
    subprocess.run([sys.executable, "-c", code], cwd=copy, env=environment, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    wanted = {name for name in files.stdout.split("\n") if name.startswith(("csrc/", "kto_kernels/"))}
    wanted |= {"setup.py", "pyproject.toml", "constraints.txt", "LICENSE", "README.md"}
    assert wanted - held == set()
    assert not [name for name in held if name.endswith((".so", ".o"))]
