"""`backend="cuda"` on CPU tensors by the PTX that nvcc makes of csrc/cuda: `CudaLaunches(machine, arch).install()`.

It takes the place of the extension module. The arguments' structs are laid out by the module's own bindings; what they
would launch is launched here (cuda_launches.cpp), with virtual addresses in the place of pointers.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
import re
import sysconfig
from collections.abc import Callable, Iterator
from ctypes import c_char_p, c_int, c_int64, c_void_p
from pathlib import Path

import pybind11
import torch

import kto_kernels
from kto_kernels.backends import cuda, gpu, native

from . import build
from .machine import Machine, parse
from .memory import Memory
from .parser import Program

SOURCES = Path(kto_kernels.__file__).parents[1] / "csrc"  # those beside the package that runs
OUTPUTS = ("logps", "origin", "sum", "sums", "counts")  # of a set of rows
STAGES = ("loss", "ref_logps_out", "rewards", "kl_out", "coefficients")
CHUNK = ("logps", "entropy", "mean_logits", "is_top1")


class _Kept(ctypes.Structure):
    _fields_ = [("kernel", c_char_p), ("dtype", c_int), ("softcap", c_int), ("outputs", c_int), ("blocks", c_int64),
                ("size", c_int64), ("arguments", c_void_p)]  # fmt: skip


@functools.cache
def compiled(arch: int) -> str:
    """The PTX of all kernels."""
    return build.ptx(SOURCES, arch).read_text()


@functools.cache
def _bindings():
    """The module, and its last_launch()."""
    sources = [SOURCES / "cuda" / "bindings.cpp", Path(__file__).with_name("cuda_launches.cpp")]
    includes = [f"-I{path}" for path in (SOURCES, pybind11.get_include(), sysconfig.get_path("include"))]
    path = build.shared_library("cuda_launches.so", sources, SOURCES.rglob("*.h"), tuple(includes))
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_cuda", loader))
    loader.exec_module(module)
    last_launch = ctypes.CDLL(str(path)).last_launch
    last_launch.restype = ctypes.POINTER(_Kept)
    return module, last_launch


class CudaLaunches:
    def __init__(self, machine: Machine, arch: int, rewrite: Callable[[str, str], str] | None = None):
        self.machine, self.arch, self.rewrite = machine, arch, rewrite
        self.processors = 4  # of the chip: how far rows are split follows from it
        self.fused = False  # products and sums, as ptxas may do it
        self.programs: dict[tuple, Program] = {}
        self.tensors: dict[int, list[torch.Tensor]] = {}  # by address

    def install(self) -> CudaLaunches:
        cuda._emulation, cuda._emulation_error = self, None
        cuda.pointer = native.pointer = self.pointer
        gpu.processors = lambda device: self.processors
        return self

    def pointer(self, tensor: torch.Tensor | None) -> int:
        if tensor is not None and tensor.numel():
            self.tensors.setdefault(tensor.data_ptr(), []).append(tensor)
        return 0 if tensor is None else tensor.data_ptr()

    def _program(self, kernel: str, dtype: int, *flags: int) -> Program:
        key = (self.fused, kernel, dtype, *flags)
        if key not in self.programs:
            text = compiled(self.arch)
            mangled = rf"{kernel}_kernel"
            if kernel != "sequences":  # which has no variants
                mangled += rf"INS_5CodecILNS_5DTypeE{dtype}EEE" + "".join(f"Lb{flag}E" for flag in flags)
            (name,) = (name for name in re.findall(r"\.entry\s+([\w$]+)", text) if mangled in name)
            if self.rewrite is not None:
                text = self.rewrite(name, text)
            self.programs[key] = parse(text, name, self.fused)[name]
            self.programs[key].name = f"{kernel}_kernel of CUDA"
        return self.programs[key]

    def _launch(self, function: str, *arguments: dict, roles: dict[str, str]) -> None:
        """`roles` (memory.ROLES) of tensors by the keys on the way to them; the kernel reads all others."""
        memory = Memory()
        written = {address for path, _, _, address in _addresses(arguments, self.tensors) if path in roles}
        tensors, self.tensors = self.tensors, {}
        for path, owner, key, address in list(_addresses(arguments, tensors)):
            role = roles.get(path, "in")
            if role == "in" and address in written:
                continue  # the last stages read what the first ones write; in place, the role says so
            for tensor in tensors[address]:
                owner[key] = memory.add(path.split(".")[-1], tensor, role)
        for path, owner, key, address in list(_addresses(arguments, tensors)):
            for tensor in tensors[address]:  # those that were left out above
                owner[key] = memory.add(path.split(".")[-1], tensor, "none")
        module, last_launch = _bindings()
        getattr(module, function)(*arguments, {"device": 0, "stream": 0})
        kept = last_launch().contents
        kernel = kept.kernel.decode()
        flags = {"multiply": (), "sequences": (), "chunk": (kept.softcap, kept.outputs)}.get(kernel, (kept.softcap,))
        program = self._program(kernel, kept.dtype, *flags)
        data = ctypes.string_at(kept.arguments, kept.size)
        assert program.parameter_bytes == len(data), (program.name, program.parameter_bytes, len(data))
        self.machine.launch(program, kept.blocks, program.threads, 0, data, memory)

    # The module's functions ───────────────────────────────────────────────────────────────────────────────────────────

    def forward(self, sets: list[dict], stages: dict | None, arguments: dict, target: dict) -> None:
        roles = {"2.shares": "scratch", "2.arrivals": "inout"}
        roles |= {f"0.{k}.{name}": "out" for k in range(len(sets)) for name in OUTPUTS}
        roles |= {f"1.{name}": "out" for name in STAGES}
        arrivals = self.tensors[arguments["arrivals"]][0]
        self._launch("forward", sets, stages, arguments, roles=roles)
        left = bool(arrivals.any())
        arrivals.zero_()
        assert not left, "counters are left above zero"

    def backward(self, arguments: dict, target: dict) -> None:
        in_place = arguments["out"] == arguments["rows"]["logits"]
        self._launch("backward", arguments, roles={"0.out": "inout" if in_place else "out"})

    def score_chunk(self, arguments: dict, target: dict) -> None:
        roles = {f"0.{name}": "out" for name in CHUNK} | {"0.gradient": "inout"}
        self._launch("score_chunk", arguments, roles=roles)

    def multiply(self, arguments: dict, target: dict) -> None:
        self._launch("multiply", arguments, roles={"0.data": "inout"})

    def sequences(self, arguments: dict, target: dict) -> None:
        roles = dict.fromkeys(("0.logps", "0.slopes", "0.losses", "0.rewards", "0.factor"), "out")
        self._launch("sequences", arguments, roles=roles | {"0.divisor": "inout"})


def _addresses(owner, tensors: dict[int, list], path: str = "") -> Iterator[tuple[str, dict, str, int]]:
    """(path, dict, key, address) of every tensor's address in nested dicts and lists."""
    items = owner.items() if isinstance(owner, dict) else enumerate(owner)
    for key, value in items:
        if isinstance(value, (dict, list)):
            yield from _addresses(value, tensors, f"{path}{key}.")
        elif not isinstance(value, bool) and value in tensors and isinstance(value, int):
            yield f"{path}{key}", owner, key, value
