"""Compiles the CUDA C++ kernels with nvcc, without a GPU, and reads their machine code (`sass`)."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import sass
from .environment import ROOT

FLAGS = ("-std=c++17", "-O3")  # as in setup.py
_DTYPES = {"0": ("float32", 4), "1": ("float16", 2), "2": ("bfloat16", 2)}  # DType of csrc/rows.h
_NAME = re.compile(r"([a-z]+)_kernel(?:INS_5CodecILNS_5DTypeE(\d)EEE((?:Lb[01]E)*))?")
# Kernel → the flags behind its type, in order.
_CHOICES = {"forward": ("softcap",), "backward": ("softcap",), "chunk": ("softcap", "outputs"), "multiply": ()}
_DTYPES[None] = ("float32", 4)  # of token log-probabilities, where the kernel reads no logits


def find() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def inspect(architectures, root: Path = ROOT) -> list[dict]:
    """One dict a kernel, variant and target, as `inspect.inspect` returns them; nothing where there is no nvcc."""
    nvcc = find()
    if nvcc is None:
        return []

    def compiled(target: str) -> list[dict]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            command = [nvcc, *FLAGS, f"-arch={target}", "-cubin", str(root / "csrc/cuda/kernels.cu"), "-o", file.name]
            subprocess.run(command, check=True, capture_output=True)
            found = sass.of_cubin(Path(file.name), lambda name: _DTYPES[_NAME.search(name)[2]][1])
            return [_case(*item, target) for item in found.items()]

    with ThreadPoolExecutor(2) as pool:
        return sorted(
            (case for cases in pool.map(compiled, architectures) for case in cases),
            key=lambda case: (case["kernel"], case["variant"], case["target"]),
        )


def _case(name: str, found: dict, target: str) -> dict:
    kernel, dtype, flags = _NAME.search(name).groups()
    chosen = [
        choice for choice, flag in zip(_CHOICES.get(kernel, ()), re.findall(r"Lb([01])E", flags or "")) if flag == "1"
    ]
    variant = ", ".join([*chosen, _DTYPES[dtype][0]])
    return {"kernel": f"{kernel} (CUDA C++)", "variant": variant, "target": target, **found}
