"""`backend="triton"` on CPU tensors by the PTX that Triton compiles: `TritonLaunches(machine, arch).install()`. For a
process where TRITON_INTERPRET is 0 (process.py)."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from kto_kernels.backends import gpu
from kto_kernels.backends.triton import launch as launchers

from .machine import SAME_VALUE, Finding, Machine, packed, parse
from .memory import Memory

assert os.environ.get("TRITON_INTERPRET") == "0", "Triton's interpreter is on"

# The use that a kernel makes of its tensors (memory.ROLES); it reads all others.
_WRITTEN = (
    "loss", "logps", "ref_logps", "rewards", "z0", "coefficients", "token_logps", "statistics", "other_logps", "scored",
    "counts", "kl_counts",
)  # fmt: skip
_SPLIT = {"shares": "scratch", "arrivals": "inout"}
_ROLES = {
    "token_logps_kernel": {"logps": "out", "statistics": "out", **_SPLIT},
    "forward_kernel": {**dict.fromkeys(_WRITTEN, "out"), **_SPLIT},
    "logits_backward_kernel": {"out": "out"},
    "chunk_kernel": dict.fromkeys(("logps", "entropy", "mean_logits", "is_top1"), "out"),
    "scale_kernel": {"tensor": "inout"},
    "sequences_kernel": {
        **dict.fromkeys(("logps", "slopes", "losses", "rewards", "factor"), "out"),
        "divisor": "inout",
    },
}
_SUMS_OF = {"ref_sums": "ref_logits", "kl_sums": "kl_logits", "ref_kl_sums": "ref_kl_logits"}


def _role(kernel: str, name: str, arguments: dict) -> str:
    if kernel == "forward_kernel" and name in _SUMS_OF:
        return "in" if arguments[_SUMS_OF[name]] is None else "out"
    if kernel == "chunk_kernel" and name == "logits":
        return "inout" if arguments["GRADIENT"] else "in"
    return _ROLES[kernel].get(name, "in")


def exception(finding: Finding) -> bool:
    """The one race that is allowed, as it is not the kernels' own: where Triton changes the layout of a tensor, every
    thread that holds an element writes it to shared memory. All of them write the same value, and a barrier follows
    before any thread reads."""
    return finding.kind == SAME_VALUE and finding.tensor == "shared memory"


class TritonLaunches:
    """`rewrite(kernel's name, PTX)` gives the text that is run, for mutants."""

    def __init__(self, machine: Machine, arch: int, rewrite: Callable[[str, str], str] | None = None):
        self.machine, self.arch, self.rewrite = machine, arch, rewrite
        self.processors = 4  # of the chip: how far rows are split follows from it
        self.fused = False  # products and sums, as ptxas may do it
        self.compiled: dict[tuple, tuple] = {}
        machine.allowed = exception

    def install(self) -> TritonLaunches:
        launchers._launch = self.launch
        launchers.INTERPRETED = False
        launchers.TritonBackend.unavailable = lambda backend, device: None
        gpu.processors = lambda device: self.processors
        return self

    def _compile(self, kernel, arguments: dict) -> tuple:
        signature, constants = {}, {}
        for parameter in kernel.params:
            value = arguments[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            else:
                signature[parameter.name] = parameter.annotation_type or mangle_type(value)
        options = launchers.options(False, 32, arguments["THREADS"])
        fused = self.fused and options.get("enable_fp_fusion", True)  # or ptxas is told not to
        key = (fused, kernel.__name__, str(signature), str(constants))
        if key not in self.compiled:
            source = ASTSource(kernel, signature, constants)
            made = triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=options)
            text = made.asm["ptx"]
            if self.rewrite is not None:
                text = self.rewrite(kernel.__name__, text)
            (program,) = parse(text, fused=fused).values()
            self.compiled[key] = program, made.metadata.shared, 32 * made.metadata.num_warps
        return self.compiled[key]

    def launch(self, kernel, device: torch.device, programs: int, arguments: dict) -> None:
        program, shared, threads = self._compile(kernel, arguments)
        memory, values = Memory(), []
        for parameter in kernel.params:
            value = arguments[parameter.name]
            if parameter.is_constexpr or value is None:
                continue
            if isinstance(value, torch.Tensor):
                value = memory.add(parameter.name, value, _role(kernel.__name__, parameter.name, arguments))
            values.append(value)
        self.machine.launch(program, programs, threads, shared, packed(program, values), memory)
        if "arrivals" in arguments:
            left = bool(arguments["arrivals"].any())
            arguments["arrivals"].zero_()
            assert not left, "counters are left above zero"
