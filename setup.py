"""Builds the native extensions with ninja.

KTO_KERNELS_CPU=0    build without the C++ CPU kernels; 1: fail where they cannot be compiled (default: built where there
                     are a C++ compiler and Python's headers; a compiler that fails is an error)
KTO_KERNELS_CUDA=0   build without the CUDA kernels; 1: fail without nvcc (default: built where nvcc is found)
KTO_KERNELS_CUDA_EMULATION=1  build the host's emulation of the CUDA kernels, which tests run
KTO_KERNELS_WERROR=1 treat compiler warnings as errors
KTO_KERNELS_SANITIZE=address,undefined  build under these sanitizers (-fsanitize), in folders of its own: build/*-address,
                     and with `build --build-lib FOLDER` a package beside the tree's (tests/native/run.sh)
CXX                  the C++20 compiler, GCC or Clang (default: c++, g++, clang++, the first found)
CPPFLAGS, CXXFLAGS, LDFLAGS  more flags for it (no fast-math: the kernels handle infinities)
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# Package → the oldest version that builds, where there is one: the list of pyproject.toml, which pip brings unless it
# is told --no-build-isolation.
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
REQUIRES = re.search(r"^requires = (.*)", PYPROJECT, re.MULTILINE)[1]
REQUIRES = dict(re.findall(r'"(\w+)(?:>=([\d.]+))?"', REQUIRES))


def check_version(package: str, found: str | None) -> None:
    """SystemExit where `package`, of version `found` (None: missing), does not build this one."""

    def numbers(version: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", version)[:2]]

    needed = REQUIRES[package]
    if found is None or (needed and numbers(found) < numbers(needed)):
        wanted = f"{package} {needed} or later" if needed else package
        raise SystemExit(
            f"kto_kernels: the build needs {wanted}, found {found or 'none'}. `pip install` without "
            f"--no-build-isolation brings what it needs; with that option, first run: "
            f"pip install '{package}{'>=' if needed else ''}{needed}'"
        )


# Now: an older one stops at pyproject.toml, with an error about project.license.
check_version("setuptools", setuptools.__version__)

IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

# Instruction set → (vector width in bytes, flags). The baseline runs anywhere; the others are chosen at run time.
ISAS = {"baseline": (16, [])}
if IS_X86:
    ISAS["avx2"] = (32, ["-mavx2", "-mfma", "-mf16c"])
    ISAS["avx512"] = (64, ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"])

COMPILERS = ("c++", "g++", "clang++")

# The GPUs with machine code of their own, as far as nvcc knows them; later ones compile the PTX of the last.
ARCHITECTURES = (80, 90, 100)


def find_compiler() -> str | None:
    """The first of the usual names that is there. CXX is a request: SystemExit where it names no program."""
    if chosen := os.environ.get("CXX"):
        if shutil.which(shlex.split(chosen)[0]):
            return chosen
        raise SystemExit(f"kto_kernels: CXX={chosen}: no such program. Unset CXX to let the build look for a compiler.")
    return next(filter(shutil.which, COMPILERS), None)


def find_ninja() -> str:
    found = shutil.which("ninja")
    if not found:
        try:
            import ninja
        except ImportError:
            check_version("ninja", None)
        found = str(Path(ninja.BIN_DIR) / "ninja")
    return found


def find_nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [str(Path(home) / "bin") for home in homes]
    return shutil.which("nvcc", path=os.pathsep.join([*places, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


def missing_for_cpp() -> str | None:
    """The tool that a build of C++ lacks on this machine, or None."""
    if sys.platform == "win32":
        return "this build knows the compilers of Linux and macOS only"
    if find_compiler() is None:
        return f"no C++ compiler was found (looked for {', '.join(COMPILERS)}; GCC 12 and Clang 14 are tested)"
    headers = sysconfig.get_path("include")
    if not (Path(headers) / "Python.h").exists():
        return f"Python's headers were not found (looked for Python.h in {headers}; Debian: python3-dev)"
    return None


def missing_for_cuda() -> str | None:
    """The tool that a build of CUDA C++ lacks on this machine, or None."""
    if find_nvcc() is None:
        return "no nvcc was found (looked in $CUDA_HOME/bin, $PATH, /usr/local/cuda/bin; the CUDA toolkit has it)"
    return missing_for_cpp()


def wants(name: str, missing: Callable[[], str | None]) -> bool:
    """Whether an extension is built: as KTO_KERNELS_{name} says, 0 or 1, and where it is not set, if nothing is missing.
    A compiler that is there and fails is an error all the same: it may be the sources that are wrong."""
    wish = os.environ.get(f"KTO_KERNELS_{name}") or None
    if wish not in (None, "0", "1"):
        raise SystemExit(f"kto_kernels: KTO_KERNELS_{name}: expected 0 or 1, got {wish!r}")
    lacks = None if wish == "0" else missing()
    if lacks and wish == "1":
        raise SystemExit(f"kto_kernels: KTO_KERNELS_{name}=1, but {lacks}.")
    if lacks:
        advice = f"KTO_KERNELS_{name}=1 makes this an error, KTO_KERNELS_{name}=0 a choice."
        print(f"kto_kernels: built WITHOUT the {name} kernels: {lacks}. {advice}", file=sys.stderr)
    return not lacks and wish != "0"


WITHOUT_CUDA = "CUDA 13.0 is the version tested; KTO_KERNELS_CUDA=0 builds without the CUDA kernels."


def nvcc_flags(nvcc: str, compiler: str) -> list[str]:
    flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    if os.environ.get("KTO_KERNELS_WERROR") == "1":
        flags += ["-Werror", "all-warnings"]
    if len(shlex.split(compiler)) == 1:  # nvcc takes no launcher such as ccache
        flags += ["-ccbin", compiler]
    listing = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
    architectures = [arch for arch in ARCHITECTURES if f"sm_{arch}" in listing.stdout.split()]
    if listing.returncode or not architectures:
        raise SystemExit(
            f"kto_kernels: {nvcc} --list-gpu-code ended with status {listing.returncode} and named none of "
            f"{', '.join(f'sm_{arch}' for arch in ARCHITECTURES)}: {listing.stdout}{listing.stderr}\n{WITHOUT_CUDA}"
        )
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    return [*flags, f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}"]


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it: parallel, and an unchanged source is not compiled again."""

    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
        except ImportError:
            check_version("pybind11", None)
        check_version("pybind11", pybind11.__version__)

        compiler = find_compiler()
        # Not self.build_temp: an editable install deletes that, and with it what need not be compiled again.
        sanitizers = os.environ.get("KTO_KERNELS_SANITIZE", "")
        folder = "-".join(filter(None, (sys.implementation.cache_tag, sanitizers.split(",")[0])))
        build_dir = ROOT.resolve() / "build" / folder / ext.name
        build_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)

        def environment(*names: str) -> list[str]:
            return [flag for name in names for flag in shlex.split(os.environ.get(name, ""))]

        flags = ["-O3", "-Wall", "-Wextra", *environment("CPPFLAGS", "CXXFLAGS")]
        # After the caller's: without them the kernels are not what is tested.
        flags += ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-pthread"]
        flags += ["-fno-fast-math", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
        if os.environ.get("KTO_KERNELS_WERROR") == "1":
            flags.append("-Werror")
        if IS_X86:
            flags.append("-DKTO_X86")
        includes = [pybind11.get_include(), sysconfig.get_path("include")]
        flags += [f"-isystem{path}" for path in includes]
        link = ["-shared", "-pthread"] + (["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])
        link += environment("LDFLAGS")

        if sanitizers:
            flags += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
            link.append(f"-fsanitize={sanitizers}")

        def escape(text: object) -> str:
            return re.sub(r"([$: \n])", r"$\1", str(text))

        def quote(flags: list[str]) -> str:
            return " ".join(map(shlex.quote, flags)).replace("$", "$$")

        if ext.name.endswith("_cuda_emulation"):
            flags.append("-DKTO_EMULATION")
        nvcc = find_nvcc() if any(source.endswith(".cu") for source in ext.sources) else None

        lines = [
            "ninja_required_version = 1.5",
            f"cxx = {compiler}",
            f"flags = {quote(flags)}",
            "rule compile",
            "  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = $cxx $in -o $out {quote(link)}",
        ]
        if nvcc:
            # The static runtime's functions stay inside: torch may have loaded another version of them.
            hide = "-Xlinker --exclude-libs=ALL"
            lines += [
                f"nvcc = {shlex.quote(nvcc)}",
                f"nvcc_flags = {quote(nvcc_flags(nvcc, compiler))}",
                "rule nvcc_compile",
                "  command = $nvcc $nvcc_flags -MMD -MF $out.d -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
                "rule nvcc_link",
                f"  command = $nvcc $nvcc_flags -shared -cudart static {hide} $in -o $out",
            ]
        objects = []
        for source in ext.sources:
            # kernels.cpp is compiled once per instruction set.
            variants = ISAS if Path(source).name == "kernels.cpp" else {"": None}
            for isa, spec in variants.items():
                obj = build_dir / f"{Path(source).stem}{'_' + isa if isa else ''}.o"
                rule = "nvcc_compile" if source.endswith(".cu") else "compile"
                lines.append(f"build {escape(obj)}: {rule} {escape(ROOT.resolve() / source)}")
                if spec:
                    width, isa_flags = spec
                    extra = [f"-DKTO_ISA={isa}", f"-DKTO_VECTOR_BYTES={width}", *isa_flags]
                    lines.append(f"  extra = {' '.join(extra)}")
                objects.append(obj)
        rule = "nvcc_link" if nvcc else "link"
        lines.append(f"build {escape(target)}: {rule} {' '.join(map(escape, objects))}")
        (build_dir / "build.ninja").write_text("\n".join(lines) + "\n")
        try:
            subprocess.run([find_ninja(), "-C", str(build_dir)], check=True)
        except subprocess.CalledProcessError as error:
            if nvcc:
                raise SystemExit(
                    f"kto_kernels: {nvcc} could not build {ext.name} (its messages are above). {WITHOUT_CUDA}"
                ) from error
            raise SystemExit(
                f"kto_kernels: {compiler} could not build {ext.name} (its messages are above). GCC 12 and Clang 14 "
                "can; KTO_KERNELS_CPU=0 builds without native code."
            ) from error


cpu_sources = ["csrc/cpu/bindings.cpp", "csrc/cpu/engine.cpp", "csrc/cpu/stages.cpp", "csrc/cpu/kernels.cpp"]
extensions = []
if wants("CPU", missing_for_cpp):
    extensions.append(Extension("kto_kernels._cpu", sources=cpu_sources))
if wants("CUDA", missing_for_cuda):
    extensions.append(Extension("kto_kernels._cuda", sources=["csrc/cuda/bindings.cpp", "csrc/cuda/kernels.cu"]))
if os.environ.get("KTO_KERNELS_CUDA_EMULATION", "0") != "0" and wants("CUDA_EMULATION", missing_for_cpp):
    emulation_sources = ["csrc/cuda/bindings.cpp", "csrc/cuda/emulation.cpp"]
    extensions.append(Extension("kto_kernels._cuda_emulation", sources=emulation_sources))

# A package index shows the README by itself: its links to files of the repository become whole addresses.
PAGES = re.search(r'^Repository = "(.*)"', PYPROJECT, re.MULTILINE)[1] + "/blob/main/"
readme = re.sub(r"\]\((?!https?:|#)", f"]({PAGES}", (ROOT / "README.md").read_text(encoding="utf-8"))

setup(
    long_description=readme,
    long_description_content_type="text/markdown",
    ext_modules=extensions,
    cmdclass={"build_ext": NinjaBuild},
)
