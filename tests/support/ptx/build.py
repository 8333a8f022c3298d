"""What is compiled at first use, kept by the content of its sources in build/ptx: the interpreter and the CUDA part."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "build" / "ptx"
HERE = Path(__file__).parent


def kept(name: str, sources: Iterable[Path], options: object, make: Callable[[Path], None]) -> Path:
    """The file or folder build/ptx/NAME of these sources and options, which `make(path)` writes where it is not there yet."""
    digest = hashlib.sha256(repr(options).encode())
    for source in sorted(sources):
        digest.update(source.read_bytes())
    stem, dot, suffix = name.partition(".")
    path = FOLDER / f"{stem}-{digest.hexdigest()[:16]}{dot}{suffix}"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:  # other processes may build the same
            made = Path(folder) / name
            make(made)
            if not path.exists():
                os.replace(made, path)
    return path


def shared_library(name: str, sources: list[Path], headers: Iterable[Path] = (), flags: tuple[str, ...] = ()) -> Path:
    """C++ sources, compiled by g++ (or $CXX) under ninja, as the package's extensions are."""
    compiler = os.environ.get("CXX", "g++")
    options = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=default", "-ffp-contract=off", "-Wall", "-Wextra", *flags]

    def make(path: Path) -> None:
        rules = [f"rule compile\n command = {compiler} {' '.join(options)} -c $in -o $out"]
        rules += [f"rule link\n command = {compiler} -shared $in -o $out"]
        objects = [f"{source.stem}.o" for source in sources]
        rules += [f"build {o}: compile {source}" for o, source in zip(objects, sources)]
        rules += [f"build {name}: link {' '.join(objects)}", ""]
        (path.parent / "build.ninja").write_text("\n".join(rules))
        subprocess.run([ninja(), "-C", str(path.parent)], check=True, capture_output=True, text=True)

    return kept(name, [*sources, *headers], (compiler, options), make)


def ninja() -> str:
    """The one of this environment, which need not be on the path."""
    beside = Path(sysconfig.get_path("scripts")) / "ninja"
    return str(beside) if beside.exists() else shutil.which("ninja") or "ninja"


def nvcc() -> str | None:
    return shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


def ptx(csrc: Path, arch: int) -> Path:
    """The PTX of the CUDA kernels in the folder `csrc`."""
    sources = [path for path in csrc.rglob("*") if path.suffix in (".h", ".cu", ".cuh")]
    options = ["-ptx", f"-arch=sm_{arch}", "-std=c++17", "-O3", "-lineinfo", "-Werror", "all-warnings"]

    def make(path: Path) -> None:
        subprocess.run([nvcc(), *options, csrc / "cuda" / "kernels.cu", "-o", path], check=True)

    return kept("kernels.ptx", sources, options, make)


def cubin(csrc: Path, arch: int) -> tuple[Path, str]:
    """The machine code of these kernels, and what ptxas says of it."""
    source, ptxas = ptx(csrc, arch), Path(nvcc()).resolve().with_name("ptxas")
    options = ["-v", "-O3", f"-arch=sm_{arch}"]
    version = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True).stdout

    def make(folder: Path) -> None:
        folder.mkdir()
        run = subprocess.run([ptxas, *options, source, "-o", folder / "cubin"], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        (folder / "report").write_text(run.stdout + run.stderr)

    folder = kept("machine_code", [source], (version, options), make)
    return folder / "cubin", (folder / "report").read_text()


def interpreter() -> Path:
    sources = [HERE / f"{name}.cpp" for name in ("launch", "memory", "order", "meetings")]
    return shared_library("interpreter.so", sources, HERE.glob("*.h"))
