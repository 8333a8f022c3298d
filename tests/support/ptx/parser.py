"""PTX text → programs for the interpreter. Only what the project's kernels need is known; anything else is an error."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from .fusion import fuse
from .translation import BITS, translate

INSTRUCTION = np.dtype(
    [("op", "<u2"), ("count", "u1"), ("size", "u1"), ("sign", "u1"), ("negated", "u1"), ("flags", "u1"),
     ("function", "u1"), ("guard", "<i4"), ("o", "<i4", 6), ("unused", "<i4"), ("immediate", "<i8")], align=True
)  # fmt: skip
GARBAGE = 0xDEADBEEF_BADC0DE5  # in registers that nothing has written


@dataclass
class Program:
    name: str
    code: np.ndarray  # of INSTRUCTIONs
    constants: dict[int, int]  # slot → value
    special: dict[str, int]  # %tid.x, … → slot
    slots: int
    parameters: list[tuple[str, int, int]]  # (type, offset, size)
    parameter_bytes: int
    shared_bytes: int  # of static variables
    threads: int  # in a block; 0 where the kernel does not say
    lines: list[str]  # the source line of each instruction
    texts: list[str]

    def initial_registers(self, blocks: int, threads: int) -> np.ndarray:
        registers = np.full(self.slots + 1, GARBAGE, np.uint64)
        for slot, value in self.constants.items():
            registers[slot] = value
        known = {"%ntid.x": threads, "%nctaid.x": blocks}
        for name, slot in self.special.items():
            if name.startswith(("%ntid", "%nctaid")):
                registers[slot] = known.get(name, 1)
            elif name not in ("%tid.x", "%ctaid.x"):  # which each thread has its own of
                assert name[-1] in "yz", name
                registers[slot] = 0
        return registers


@dataclass
class Entry:
    """A kernel's text."""

    parameters: str
    directives: str
    body: str


def entries(text: str) -> dict[str, Entry]:
    found = {}
    for match in re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*([^{]*)\{", text, re.S):
        depth, at = 1, match.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        found[match.group(1)] = Entry(match.group(2), match.group(3), text[match.end() : at - 1])
    return found


def parse_module(text: str, op_names: list[str], only: str, fused: bool) -> dict[str, Program]:
    shared = {}
    pattern = r"\.shared\s+\.align\s+(\d+)\s+\.[a-z]+(\d+)\s+([\w$]+)(\[\d*\])?;"
    for align, bits, name, count in re.findall(pattern, text):
        length = 1 if not count else int(count[1:-1] or 0)  # name[] is the launch's own
        shared[name] = (int(align), int(bits) // 8 * length)
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text))
    parts = {name: entry for name, entry in entries(text).items() if only in name}
    kernels = {name: Kernel(entry, shared, files, op_names) for name, entry in parts.items()}
    if fused:
        for kernel in kernels.values():
            fuse(kernel)
    return {name: kernel.program(name) for name, kernel in kernels.items()}


class Kernel:
    """Statement after statement of a kernel, made instructions. Registers and constants have slots."""

    def __init__(self, entry: Entry, shared: dict[str, tuple[int, int]], files: dict[str, str], op_names: list[str]):
        self.ops = {op: i for i, op in enumerate(op_names)}
        self.slots: dict[str, int] = {}
        self.constants: dict[int, int] = {}
        self.special: dict[str, int] = {}
        self.local: set[str] = set()  # registers of a scope, without %
        self.shared, self.shared_at, self.shared_bytes = shared, {}, 0
        self.parameters, self.parameter_at, self.parameter_bytes = [], {}, 0
        self.code: list[dict] = []
        self.lines, self.texts = [], []
        self.labels: dict[str, int] = {}
        self.guard: dict[str, int] = {}
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry.directives)
        self.threads = int(threads.group(1)) if threads else 0
        for one in filter(None, (part.strip() for part in entry.parameters.split(","))):
            self._parameter(one)
        self._body(entry.body, files)

    def _parameter(self, text: str) -> None:
        match = re.match(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.global\s+)?(?:\.align\s+\d+\s+)?)?"
            r"([\w$]+)(?:\[(\d+)\])?$", text
        )  # fmt: skip
        assert match, text
        align, kind, symbol, count = match.groups()
        size = BITS[kind] // 8 * int(count or 1)
        align = int(align or BITS[kind] // 8)
        offset = -(-self.parameter_bytes // align) * align
        self.parameters.append((kind, offset, size))
        self.parameter_at[symbol] = offset
        self.parameter_bytes = offset + size

    def _body(self, body: str, files: dict[str, str]) -> None:
        line = "?"
        for raw in body.splitlines():
            if loc := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)\s+(\d+)[^/]*(?://\s*(.*))?", raw):
                file = files.get(loc.group(1), loc.group(1)).rsplit("/", 1)[-1]
                line = loc.group(4) or f"{file}:{loc.group(2)}"
                continue
            statement = raw.split("//")[0].strip()
            for label in re.findall(r"^([\w$]+):", statement):
                self.labels[label] = len(self.code)
                statement = statement[len(label) + 1 :].strip()
            # Braces around the statements of inline assembly are scopes.
            if re.match(r"[{}]", statement):
                statement = statement[1:].strip()
            for part in statement.split(";"):
                part = part.strip()
                if part.endswith("}") and part.count("}") > part.count("{"):
                    part = part[:-1].strip()
                if part.startswith(".reg") and "<" not in part:  # of a scope, which writes them before it reads them
                    self.local.update(name.strip() for name in part.split(None, 2)[2].split(","))
                elif part and not part.startswith((".reg", ".pragma", ".section", ".shared")):
                    self._statement(part)
                    self._said(line, part)
        self.guard = {}
        self.emit("ret")
        self._said("end", "ret")

    def _said(self, line: str, text: str) -> None:
        new = len(self.code) - len(self.lines)
        self.lines += [line] * new
        self.texts += [text] * new

    def _statement(self, text: str) -> None:
        self.guard = {}
        if match := re.match(r"@(!?)(%\w+)\s+", text):
            self.guard = {"guard": self.operand(match.group(2)), "negated": int(bool(match.group(1)))}
            text = text[match.end() :]
        match = re.match(r"([\w.:]+)\s*(.*)$", text, re.S)
        assert match, text
        # Split at commas outside brackets and braces.
        operands = [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", match.group(2).strip())]
        translate(self, match.group(1).split("."), operands, text)

    def program(self, name: str) -> Program:
        code = np.zeros(len(self.code), INSTRUCTION)
        for i, fields in enumerate(self.code):
            for field, value in fields.items():
                if field == "label":
                    code[i]["immediate"] = self.labels[value]
                elif field == "o":
                    code[i]["o"][: len(value)] = value
                else:
                    code[i][field] = value
        return Program(
            name, code, self.constants, self.special, len(self.slots), self.parameters, self.parameter_bytes,
            self.shared_bytes, self.threads, self.lines, self.texts
        )  # fmt: skip

    # For `translate` ──────────────────────────────────────────────────────────────────────────────────────────────────

    def emit(self, op: str, operands=(), **fields) -> None:
        if op not in self.ops:
            raise NotImplementedError(op)
        self.code.append({"op": self.ops[op], "o": list(operands), "guard": -1, **self.guard, **fields})

    def slot(self, name: str) -> int:
        return self.slots.setdefault(name, len(self.slots))

    def constant(self, value: int) -> int:
        value &= (1 << 64) - 1
        slot = self.slot(f"#{value}")
        self.constants[slot] = value
        return slot

    def _symbol(self, name: str) -> int:
        """The address of a parameter or of a variable in shared memory."""
        if name in self.parameter_at:
            return self.parameter_at[name]
        if name not in self.shared_at:
            align, size = self.shared[name]
            self.shared_at[name] = -(-self.shared_bytes // align) * align
            self.shared_bytes = self.shared_at[name] + size
        return self.shared_at[name]

    def operand(self, text: str) -> int:
        """The slot of a register, a number or an address."""
        text = text.strip()
        if text == "_" or text.startswith("%") or text in self.local:
            if re.match(r"%(tid|ctaid|ntid|nctaid|laneid|warpid)\b", text):
                self.special[text] = self.slot(text)
            return self.slot(text)
        if match := re.match(r"0[fF]([0-9a-fA-F]{8})$|0[dD]([0-9a-fA-F]{16})$", text):
            return self.constant(int(match.group(1) or match.group(2), 16))
        if re.match(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$", text):
            return self.constant(int(text.rstrip("U"), 0))
        return self.constant(self._symbol(text))

    def address(self, text: str) -> tuple[int, int]:
        """(slot, offset) of [base + offset]."""
        match = re.match(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+)\s*)?\]$", text)
        assert match, text
        base, offset = match.group(1), int(match.group(2) or "0", 0)
        if base.startswith("%"):
            return self.operand(base), offset
        return self.constant(0), self._symbol(base) + offset
