"""Reads the machine code of an NVIDIA GPU (SASS, as nvdisasm prints it): basic blocks, loops, and what they are made of.

An *instruction a logit* is an instruction of one thread: the instructions of a loop's shortest way round that makes all
of the loop's wide loads, over the logits that these loads bring. The instructions of a row beside the loops are counted on all
of the kernel, each instruction once; of the kernel of the whole loss, on the part in front of the counter of rows, for
what comes behind it happens once a call.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_FUNCTION = re.compile(r"^\.text\.(\S+):")

VECTOR_BYTES = 16  # a wide load: LDG.E.128


@dataclass
class Instruction:
    name: str  # as in LDG.E.128
    predicated: bool
    operands: str

    @property
    def kind(self) -> str:
        """What the instruction waits for: a unit of the multiprocessor, or "other", which costs its issue alone."""
        base = self.name.split(".")[0]
        if base in ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX") or "64H" in self.name:
            return "FP64"
        if base in ("MUFU", "F2F", "F2I", "I2F"):
            return "FP64" if "F64" in self.name else "MUFU"
        if base in ("FADD", "FMUL", "FFMA", "IMAD"):
            return "FMA"
        return "other" if base[0] == "U" or base in ("BRA", "LDG", "STG", "LDC", "BSSY", "BSYNC") else "ALU"


@dataclass
class Block:
    instructions: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)  # numbers of the blocks that may come after it

    def loads(self) -> int:
        return sum(i.name.startswith("LDG") and ".128" in i.name for i in self.instructions)

    def stores(self) -> int:
        return sum(i.name.startswith("STG") and ".128" in i.name for i in self.instructions)


@dataclass(frozen=True)
class Loop:
    """A loop over logits. `mix`: kind → instructions of one way round."""

    instructions: int
    loads: int  # wide ones
    stores: int
    mix: dict[str, int]


def functions(disassembly: str) -> dict[str, list[str]]:
    """The lines of each function of a cubin."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in disassembly.splitlines():
        if match := _FUNCTION.match(line):
            lines = found[match[1]] = []
        lines.append(line)
    return found


def blocks_of(lines: list[str]) -> list[Block]:
    """The basic blocks of one function, the entry first. A call goes on behind itself: its callee, a slow path of a
    division or a square root, is not followed."""
    starts: dict[str, int] = {}
    blocks = [Block()]
    jumps: list[tuple[int, str]] = []

    def begin() -> None:
        if blocks[-1].instructions:
            blocks.append(Block())

    falls = True  # from the block before into the next one
    for line in lines:
        if match := _LABEL.match(line):
            if blocks[-1].instructions:
                if falls:
                    blocks[-1].next.append(len(blocks))
                blocks.append(Block())
            starts[match[1]] = len(blocks) - 1
            falls = True
        elif match := _INSTRUCTION.match(line):
            if not falls:
                begin()
                falls = True
            guard, name, operands = match[1], match[2], match[3]
            blocks[-1].instructions.append(Instruction(name, guard is not None, operands))
            base = name.split(".")[0]
            conditional = guard is not None or re.match(r"\s*!?U?P\d", operands) is not None
            if base in ("BRA", "EXIT", "RET", "BRX", "JMP", "BREAK"):
                if base in ("BRA", "BREAK") and (target := _TARGET.search(operands)):
                    jumps.append((len(blocks) - 1, target[1]))
                    conditional |= base == "BRA" and ("DIV" in operands or "CONV" in operands)
                if base == "BRX":  # a table of targets, which the disassembler names in no line of the code
                    conditional = True
                if conditional or base == "BREAK":
                    blocks[-1].next.append(len(blocks))
                    blocks.append(Block())
                else:
                    falls = False
    for source, label in jumps:
        if label in starts:
            blocks[source].next.append(starts[label])
    for block in blocks:
        block.next = [i for i in block.next if i < len(blocks)]
    return blocks


def reached(blocks: list[Block]) -> set[int]:
    """The blocks that the entry reaches: not the slow paths that are called."""
    seen: set[int] = set()
    waiting = [0]
    while waiting:
        i = waiting.pop()
        if i not in seen:
            seen.add(i)
            waiting += blocks[i].next
    return seen


def of_a_row(blocks: list[Block], counted: bool) -> set[int]:
    """The blocks that rows run. A kernel that has `counted` its rows by an atomic, its last one, goes on behind it once
    a call: the blocks behind it in memory are left out."""
    atomics = [i for i, block in enumerate(blocks) if any(x.name.startswith("ATOM") for x in block.instructions)]
    return {i for i in reached(blocks) if not counted or not atomics or i <= atomics[-1]}


def loops(blocks: list[Block]) -> list[Loop]:
    """The innermost loops with a wide load, the one with the most of them first, and of those the shortest: a loop over a
    row's last vectors, which the compiler may unroll as far as the loop over tiles, tests each of its vectors."""
    alive = reached(blocks)
    before: dict[int, set[int]] = {i: set() for i in alive}
    for i in alive:
        for j in blocks[i].next:
            before[j].add(i)
    bodies: dict[int, set[int]] = {}  # head → body
    for tail in alive:
        for head in blocks[tail].next:
            if head <= tail:  # backward in memory
                body, waiting = {head}, [tail]
                while waiting:
                    i = waiting.pop()
                    if i not in body:
                        body.add(i)
                        waiting += before[i]
                if 0 not in body or head == 0:
                    bodies[head] = bodies.get(head, set()) | body
    found = []
    for head, body in bodies.items():
        inner = any(other != head and other in body and bodies[other] < body for other in bodies)
        if not inner and any(blocks[i].loads() for i in body):
            found.append(_way_round(blocks, head, body))
    return sorted((loop for loop in found if loop.loads), key=lambda loop: (-loop.loads, loop.instructions))


def _way_round(blocks: list[Block], head: int, body: set[int]) -> Loop:
    """The way from a loop's head back to it with the most wide loads, and of such ways the shortest."""
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {}

    def cost(i: int) -> tuple[int, int]:
        return -blocks[i].loads(), len(blocks[i].instructions)

    done: list[tuple[int, int, tuple[int, ...]]] = []
    waiting = [(*cost(head), (head,))]
    while waiting:
        waiting.sort(reverse=True)
        loads, length, way = waiting.pop()
        for j in blocks[way[-1]].next:
            if j == head:
                done.append((loads, length, way))
            elif j in body and j not in way:
                more = (loads + cost(j)[0], length + cost(j)[1])
                if j not in best or more < best[j][:2]:
                    best[j] = (*more, (*way, j))
                    waiting.append(best[j])
    loads, length, way = min(done)
    path = [blocks[i] for i in way]
    mix = Counter(i.kind for block in path for i in block.instructions)
    return Loop(length, -loads, sum(block.stores() for block in path), dict(mix))


def read(lines: list[str], logit_bytes: int, counted: bool) -> dict:
    """What one kernel is made of: `fold` and `write`, the loops that only read logits and that write them, the one with
    the most loads of each (None where there is none); `row`: kind → instructions that a row runs outside of a loop's
    second round; and `fp64`, those of them that are in double precision."""
    blocks = blocks_of(lines)
    found = loops(blocks)
    row = Counter(i.kind for j in of_a_row(blocks, counted) for i in blocks[j].instructions)

    def first(stores: bool) -> dict | None:
        for loop in found:
            if bool(loop.stores) == stores:
                logits = loop.loads * VECTOR_BYTES // logit_bytes
                return {**vars(loop), "logits": logits, "a logit": loop.instructions / logits}
        return None

    return {"fold": first(False), "write": first(True), "row": dict(row), "fp64": row["FP64"]}


def tool(name: str) -> str:
    """cuobjdump or nvdisasm: Triton's package has them, and so has the CUDA toolkit."""
    try:
        import triton

        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        if bundled.exists():
            return str(bundled)
    except ImportError:
        pass
    if found := shutil.which(name):
        return found
    raise RuntimeError(f"{name} is not there: Triton's package has it, and so has the CUDA toolkit")


def widths(lines: list[str], verb: str) -> dict[str, int]:
    """Bits of one access to global memory → how many such instructions; `verb` is LDG or STG."""
    names = [match[2].split(".") for match in map(_INSTRUCTION.match, lines) if match]
    bits = [
        next((w for w in name if w in ("128", "64", "U16", "S16", "U8", "S8")), "32")
        for name in names
        if name[0] == verb
    ]
    return dict(Counter(b.lstrip("US") for b in bits))


def of_cubin(cubin: Path, logit_bytes: Callable[[str], int]) -> dict[str, dict]:
    """Function → registers, shared memory and spills (bytes), widths of loads and stores, and what `read` counts.
    `logit_bytes` tells the size of a function's logits by the function's name."""

    def run(*command: str) -> str:
        return subprocess.run([*command, str(cubin)], capture_output=True, text=True, check=True).stdout

    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", run(tool("cuobjdump"), "-res-usage")
    )
    code = functions(run(tool("nvdisasm"), "-c"))
    return {
        name: {
            "registers": int(registers),
            "shared": int(shared),
            "spills": int(stack) + int(local),
            "loads": widths(code[name], "LDG"),
            "stores": widths(code[name], "STG"),
            **read(code[name], logit_bytes(name), "forward" in name),
        }
        for name, registers, stack, shared, local in usage
    }
