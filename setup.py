"""Builds the native extensions with ninja.

KTO_KERNELS_CPU=0    build without the C++ CPU kernels
KTO_KERNELS_CUDA=0   build without the CUDA kernels; 1: fail without nvcc (default: built where nvcc is found)
KTO_KERNELS_CUDA_EMULATION=1  build the host's emulation of the CUDA kernels, which tests run
KTO_KERNELS_WERROR=1 treat compiler warnings as errors
KTO_KERNELS_SANITIZE=address,undefined  build under these sanitizers (-fsanitize), in folders of its own: build/*-address,
                     and with `build --build-lib FOLDER` a package beside the tree's (tests/native/run.sh)
CXX                  the C++20 compiler, GCC or Clang (default: c++, g++, clang++, the first found)
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

# Instruction set → (vector width in bytes, flags). The baseline runs anywhere; the others are chosen at run time.
ISAS = {"baseline": (16, [])}
if IS_X86:
    ISAS["avx2"] = (32, ["-mavx2", "-mfma", "-mf16c"])
    ISAS["avx512"] = (64, ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"])

# The GPUs with machine code of their own, as far as nvcc knows them; later ones compile the PTX of the last.
ARCHITECTURES = (80, 90, 100)


def find_compiler() -> str:
    for candidate in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if shutil.which(shlex.split(candidate)[0]):
            return candidate
    raise SystemExit(
        "kto_kernels: no C++ compiler found (looked for $CXX, c++, g++, clang++). Install one (tested: GCC 12, Clang "
        "14), or set KTO_KERNELS_CPU=0 to build without native code."
    )


def find_ninja() -> str:
    found = shutil.which("ninja")
    if not found:
        import ninja

        found = str(Path(ninja.BIN_DIR) / "ninja")
    return found


def find_nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [str(Path(home) / "bin") for home in homes]
    return shutil.which("nvcc", path=os.pathsep.join([*places, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


def wants_cuda() -> bool:
    wish = os.environ.get("KTO_KERNELS_CUDA")
    if wish not in (None, "", "0", "1"):
        raise SystemExit(f"kto_kernels: KTO_KERNELS_CUDA: expected 0 or 1, got {wish!r}")
    if wish == "1" and find_nvcc() is None:
        raise SystemExit(
            "kto_kernels: KTO_KERNELS_CUDA=1, but no nvcc (looked in $CUDA_HOME/bin, $PATH, /usr/local/cuda/bin). "
            "Install the CUDA toolkit, or leave KTO_KERNELS_CUDA unset to build without the CUDA kernels."
        )
    return wish != "0" and find_nvcc() is not None


def nvcc_flags(nvcc: str, compiler: str) -> list[str]:
    flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    if os.environ.get("KTO_KERNELS_WERROR") == "1":
        flags += ["-Werror", "all-warnings"]
    if len(shlex.split(compiler)) == 1:  # nvcc takes no launcher such as ccache
        flags += ["-ccbin", compiler]
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    architectures = [arch for arch in ARCHITECTURES if f"sm_{arch}" in known]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    return [*flags, f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}"]


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it: parallel, and an unchanged source is not compiled again."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        compiler = find_compiler()
        # Not self.build_temp: an editable install deletes that, and with it what need not be compiled again.
        sanitizers = os.environ.get("KTO_KERNELS_SANITIZE", "")
        folder = "-".join(filter(None, (sys.implementation.cache_tag, sanitizers.split(",")[0])))
        build_dir = ROOT.resolve() / "build" / folder / ext.name
        build_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)

        flags = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"]
        flags += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
        if os.environ.get("KTO_KERNELS_WERROR") == "1":
            flags.append("-Werror")
        if IS_X86:
            flags.append("-DKTO_X86")
        includes = [pybind11.get_include(), sysconfig.get_path("include")]
        flags += [f"-isystem{path}" for path in includes]
        link = ["-shared", "-pthread"] + (["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])

        if sanitizers:
            flags += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
            link.append(f"-fsanitize={sanitizers}")

        def escape(text: object) -> str:
            return re.sub(r"([$: \n])", r"$\1", str(text))

        if ext.name.endswith("_cuda_emulation"):
            flags.append("-DKTO_EMULATION")
        nvcc = find_nvcc() if any(source.endswith(".cu") for source in ext.sources) else None

        lines = [
            "ninja_required_version = 1.5",
            f"cxx = {compiler}",
            f"flags = {' '.join(map(shlex.quote, flags))}",
            "rule compile",
            "  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = $cxx $in -o $out {' '.join(link)}",
        ]
        if nvcc:
            # The static runtime's functions stay inside: torch may have loaded another version of them.
            hide = "-Xlinker --exclude-libs=ALL"
            lines += [
                f"nvcc = {shlex.quote(nvcc)}",
                f"nvcc_flags = {' '.join(map(shlex.quote, nvcc_flags(nvcc, compiler)))}",
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
                    f"kto_kernels: {nvcc} could not build {ext.name} (its messages are above). CUDA 12.0 and later can; "
                    "KTO_KERNELS_CUDA=0 builds without the CUDA kernels."
                ) from error
            raise SystemExit(
                f"kto_kernels: {compiler} could not build {ext.name} (its messages are above). GCC 12 and Clang 14 "
                "can; KTO_KERNELS_CPU=0 builds without native code."
            ) from error


cpu_sources = ["csrc/cpu/bindings.cpp", "csrc/cpu/engine.cpp", "csrc/cpu/stages.cpp", "csrc/cpu/kernels.cpp"]
extensions = []
if os.environ.get("KTO_KERNELS_CPU", "1") != "0":
    extensions.append(Extension("kto_kernels._cpu", sources=cpu_sources))
if wants_cuda():
    extensions.append(Extension("kto_kernels._cuda", sources=["csrc/cuda/bindings.cpp", "csrc/cuda/kernels.cu"]))
if os.environ.get("KTO_KERNELS_CUDA_EMULATION") == "1":
    emulation_sources = ["csrc/cuda/bindings.cpp", "csrc/cuda/emulation.cpp"]
    extensions.append(Extension("kto_kernels._cuda_emulation", sources=emulation_sources))

setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
