"""Launches PTX programs on tensors of the CPU, through the interpreter in C++, and keeps what it finds."""

from __future__ import annotations

import ctypes
import functools
import random
import struct
from collections import Counter
from collections.abc import Callable
from ctypes import POINTER, c_double, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass

from . import build
from .memory import DISTANCE, Memory
from .parser import Program, parse_module

# As the enum Kind of launch.h.
SAME_VALUE = "race: two writes of the same value"
KINDS = (
    "",
    "outside every tensor",
    "misaligned",
    "read of memory that nothing has written",
    "write to an input",
    "race: a write, unordered after a read",
    "race: a read, unordered after a write",
    "race: two writes",
    SAME_VALUE,
    "barrier: threads meet at different places",
    "barrier: threads have exited",
    "exchange of a warp: lanes at different places",
    "deadlock",
    "division by zero",
    "too long",
    "exchange of a warp: the value of an inactive lane",
)
NOT_WRITTEN = "output that the kernel has not written"
MOST = 1000  # findings of a launch


def _struct(name: str, **fields):
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_Region = _struct("Region", address=c_uint64, size=c_uint64, data=c_void_p, state=c_void_p, writable=c_uint64)
_Finding = _struct(
    "Finding", kind=c_uint32, pc=c_int32, other_pc=c_int32, region=c_int32, offset=c_uint64, block=c_uint32,
    thread=c_uint32, other_block=c_uint32, other_thread=c_uint32, count=c_uint64, across=c_uint32
)  # fmt: skip
_Settings = _struct(
    "Settings", code=c_void_p, length=c_int64, initial=c_void_p, slots=c_uint32, tid=c_int32, ctaid=c_int32,
    blocks=c_uint32, threads=c_uint32, shared_bytes=c_uint32, parameters=ctypes.c_char_p, regions=POINTER(_Region),
    n_regions=c_int32, random=c_uint64, yield_=c_double, strategy=c_int32, in_flight=c_uint32, approximate=c_uint64,
    budget=c_uint64
)  # fmt: skip


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build.interpreter()))
    library.op_names.restype = POINTER(ctypes.c_char_p)
    library.launch.argtypes = [POINTER(_Settings), POINTER(_Finding), ctypes.c_int, POINTER(c_uint64)]
    return library


@functools.cache
def _op_names() -> list[str]:
    names, found = _library().op_names(), []
    while name := names[len(found)]:
        found.append(name.decode())
    return found


def parse(text: str, only: str = "", fused: bool = False) -> dict[str, Program]:
    """The kernels of a PTX module whose names contain `only`, by name; with products `fused` as ptxas may do it."""
    return parse_module(text, _op_names(), only, fused)


@dataclass
class Finding:
    kind: str
    kernel: str
    tensor: str
    offset: int = 0
    where: str = ""  # the source line
    text: str = ""  # the instruction
    other_where: str = ""  # of the access that it conflicts with
    other_text: str = ""
    threads: str = ""  # block:thread
    across: bool = False  # between blocks
    count: int = 1

    def __str__(self) -> str:
        line = f"{self.kernel}: {self.kind}, {self.tensor}+{self.offset}, {self.threads}, ×{self.count}"
        line += f"\n    at {self.where}: {self.text}"
        return line + (f"\n  and at {self.other_where}: {self.other_text}" if self.other_text else "")


class Machine:
    """Runs launches. Each is scheduled by a seed of its own, which follows from `seed`.

    `allowed(finding)` says which findings are a known exception; any other raises AssertionError where `strict` is
    set, and is kept in `findings` in any case."""

    BUDGET = 2_000_000_000  # of instructions in a launch

    def __init__(self, allowed: Callable[[Finding], bool] = lambda finding: False, strict: bool = True):
        self.allowed, self.strict, self.seed = allowed, strict, 0
        self.approximate = 1  # the seed of the errors of approximate instructions; 0: none
        self.budget = self.BUDGET
        self.findings: list[Finding] = []
        self.exceptions = 0
        self.launches, self.instructions, self.switches = Counter(), 0, 0

    def launch(
        self, program: Program, blocks: int, threads: int, shared: int, parameters: bytes, memory: Memory
    ) -> None:
        """Runs a kernel; `shared` bytes of shared memory are the launch's own."""
        assert program.threads in (0, threads), (program.threads, threads)
        self.seed += 1
        draw = random.Random(self.seed)
        regions = (_Region * max(1, len(memory.data)))()
        for i, (data, state) in enumerate(zip(memory.data, memory.state)):
            regions[i] = _Region(
                i + 1 << DISTANCE, data.numel(), data.data_ptr(), state.data_ptr(), i in memory.writable
            )
        initial = program.initial_registers(blocks, threads)
        settings = _Settings(
            code=program.code.ctypes.data,
            length=len(program.code),
            initial=initial.ctypes.data,
            slots=len(initial),
            tid=program.special.get("%tid.x", -1),
            ctaid=program.special.get("%ctaid.x", -1),
            blocks=blocks,
            threads=threads,
            shared_bytes=max(shared, program.shared_bytes),
            parameters=parameters + bytes(64),
            regions=regions,
            n_regions=len(memory.data),
            random=self.seed,
            yield_=draw.choice([0.0, 0.02, 0.3, 1.0]),
            strategy=draw.choice([0, 0, 1]),
            in_flight=draw.choice([1, 2, 3, 8]),
            approximate=self.approximate,
            budget=self.budget,
        )
        memory.poison()
        found, statistics = (_Finding * MOST)(), (c_uint64 * 2)()
        n = _library().launch(settings, found, MOST, statistics)
        self.launches[program.name] += 1
        self.instructions += statistics[0]
        self.switches += statistics[1]
        new = [self._finding(program, memory, finding) for finding in found[: min(n, MOST)]]
        new += [Finding(NOT_WRITTEN, program.name, name) for name in memory.never_written()]
        bad = [finding for finding in new if not self.allowed(finding)]
        self.exceptions += len(new) - len(bad)
        self.findings += bad
        if bad and self.strict:
            raise AssertionError(f"{len(bad)} findings (seed {self.seed}):\n" + "\n".join(map(str, bad[:8])))

    def counts(self) -> dict[str, int]:
        launches = sum(self.launches.values())
        names = ("instructions", "switches", "exceptions")
        return {"launches": launches, "findings": len(self.findings), **{name: getattr(self, name) for name in names}}

    @staticmethod
    def _finding(program: Program, memory: Memory, f) -> Finding:
        tensor, threads = "shared memory", f"thread {f.block}:{f.thread}"
        if f.region >= 0:
            tensor = "/".join(memory.names[f.region])
        finding = Finding(
            KINDS[f.kind], program.name, tensor, f.offset, program.lines[f.pc], program.texts[f.pc],
            threads=threads, across=bool(f.across), count=f.count
        )  # fmt: skip
        if f.other_pc >= 0:
            finding.other_where, finding.other_text = program.lines[f.other_pc], program.texts[f.other_pc]
            finding.threads += f" and {f.other_block}:{f.other_thread}"
        return finding


def packed(program: Program, values: list) -> bytes:
    """A kernel's parameters, given one by one. Parameters that the compiler added are null."""
    buffer = bytearray(program.parameter_bytes)
    values = [*values, *[0] * (len(program.parameters) - len(values))]
    for (kind, offset, size), value in zip(program.parameters, values):
        if kind[0] == "f":
            buffer[offset : offset + size] = struct.pack({4: "<f", 8: "<d"}[size], value)
        else:
            buffer[offset : offset + size] = (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    return bytes(buffer)
