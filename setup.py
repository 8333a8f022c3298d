"""Builds the native extension with ninja.

KTO_KERNELS_CPU=0    build without the C++ CPU kernels
KTO_KERNELS_WERROR=1 treat compiler warnings as errors
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


def find_compiler() -> str:
    for candidate in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if shutil.which(shlex.split(candidate)[0]):
            return candidate
    raise SystemExit(
        "kto_kernels: no C++ compiler found (looked for $CXX, c++, g++, clang++). Install one (GCC 11 or Clang 14 and "
        "later), or set KTO_KERNELS_CPU=0 to build without native code."
    )


def find_ninja() -> str:
    found = shutil.which("ninja")
    if not found:
        import ninja

        found = str(Path(ninja.BIN_DIR) / "ninja")
    return found


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it: parallel, and an unchanged source is not compiled again."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        compiler = find_compiler()
        build_dir = Path(self.build_temp).resolve() / ext.name
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

        def escape(text: object) -> str:
            return re.sub(r"([$: \n])", r"$\1", str(text))

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
        objects = []
        for source in ext.sources:
            # kernels.cpp is compiled once per instruction set.
            variants = ISAS if Path(source).name == "kernels.cpp" else {"": None}
            for isa, spec in variants.items():
                obj = build_dir / f"{Path(source).stem}{'_' + isa if isa else ''}.o"
                lines.append(f"build {escape(obj)}: compile {escape(ROOT.resolve() / source)}")
                if spec:
                    width, isa_flags = spec
                    extra = [f"-DKTO_ISA={isa}", f"-DKTO_VECTOR_BYTES={width}", *isa_flags]
                    lines.append(f"  extra = {' '.join(extra)}")
                objects.append(obj)
        lines.append(f"build {escape(target)}: link {' '.join(map(escape, objects))}")
        (build_dir / "build.ninja").write_text("\n".join(lines) + "\n")
        try:
            subprocess.run([find_ninja(), "-C", str(build_dir)], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"kto_kernels: {compiler} could not build {ext.name} (its messages are above). GCC 11 or Clang 14 and "
                "later can; KTO_KERNELS_CPU=0 builds without native code."
            ) from error


cpu_sources = ["csrc/cpu/bindings.cpp", "csrc/cpu/engine.cpp", "csrc/cpu/stages.cpp", "csrc/cpu/kernels.cpp"]
extensions = []
if os.environ.get("KTO_KERNELS_CPU", "1") != "0":
    extensions.append(Extension("kto_kernels._cpu", sources=cpu_sources))

setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
