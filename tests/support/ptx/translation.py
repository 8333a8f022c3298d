"""One PTX instruction → the interpreter's: `translate`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .parser import Kernel

BITS = {
    "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16, "b32": 32, "u32": 32, "s32": 32,
    "f32": 32, "f16x2": 32, "bf16x2": 32, "b64": 64, "u64": 64, "s64": 64, "f64": 64,
}  # fmt: skip
WIDER_THAN_BLOCK, ACQUIRE, RELEASE = 4, 1, 2  # flags
DIRECTED = {"rz", "rm", "rp", "sat"}  # roundings that no kernel uses


def translate(kernel: Kernel, mnemonic: list[str], operands: list[str], text: str) -> None:
    head, *mods = mnemonic
    kinds = [mod for mod in mods if mod in BITS or mod == "pred"]
    kind = kinds[-1] if kinds else ""
    if head in _SPECIAL:
        return _SPECIAL[head](kernel, head, mods, kind, operands)
    slots = [kernel.operand(operand) for operand in operands]
    assert not DIRECTED & set(mods), text
    kernel.emit(_register_op(head, mods, kind, kinds), slots)


def _register_op(head: str, mods: list[str], kind: str, kinds: list[str]) -> str:
    """The name of an instruction that touches only registers."""
    bits = BITS.get(kind)
    if head == "cvt":
        return _conversion(*kinds)
    if head == "setp":
        assert len(kinds) == 1 and len(mods) - ("ftz" in mods) == 2, mods
        compared = "u" + kind[1:] if kind[0] == "b" and kind != "bf16" else kind
        return f"setp_{mods[0]}_{compared}"
    if head == "selp":
        return {16: "selp_16", 32: "selp_32", 64: "selp"}[bits]
    if head in ("and", "or", "xor", "prmt"):
        return head
    if head == "not":
        return "not_pred" if kind == "pred" else f"not_{bits}"
    if head == "shl":
        return f"shl_{bits}"
    if head == "shr":
        return f"shr_{kind.replace('b', 'u')}"
    if head in ("ex2", "rsqrt"):
        assert mods == ["approx", "ftz", "f32"], mods
        return f"{head}_f32"
    if head == "rcp":
        return {"approx": "rcp_approx_f64", "rn": "rcp_rn_f64"}[mods[0]]
    if head == "div" and kind[0] == "f":
        return f"div_{mods[0]}_{kind}"
    if head in ("div", "rem", "bfe", "copysign"):
        return f"{head}_{kind}"
    if head in ("min", "max"):
        assert "NaN" not in mods, mods
        return f"{head}_{kind}"
    if head in ("add", "sub", "mul", "fma", "abs", "neg") and kind[0] == "f":
        return f"{head}_ftz_{kind}" if "ftz" in mods else f"{head}_{kind}"
    if head in ("mul", "mad"):
        return f"{head}_lo_{bits}" if mods[0] == "lo" else f"{head}_{mods[0]}_{kind}"
    if head in ("add", "sub", "neg"):
        return f"{head}_{bits}"
    if head == "abs":
        return f"abs_{kind}"
    raise NotImplementedError(f"{head}.{'.'.join(mods)}")


def _conversion(to: str, source: str) -> str:
    if to[0] == "f" or to.startswith("bf") or source[0] == "f" or source == "bf16":
        return f"cvt_{to}_{source}"
    if BITS[to] > BITS[source] and source[0] == "s":
        return f"cvt_s{BITS[to]}_{source}"
    bits = min(BITS[to], BITS[source])  # to fewer bits, or unsigned: the low ones
    return {8: "cvt_u8", 16: "cvt_u16", 32: "cvt_u32", 64: "mov"}[bits]


# Instructions with operands of their own: f(kernel, head, mods, kind, operands) ─────────────────────────────────────────────


def _memory(kernel: Kernel, head: str, mods: list[str], kind: str, operands: list[str]) -> None:
    lanes = next((int(mod[1:]) for mod in mods if re.match(r"v\d$", mod)), 1)
    # After address and data stands a cache policy: a hint.
    address, data = (operands[1], operands[0]) if head == "ld" else (operands[0], operands[1])
    base, offset = kernel.address(address)
    slots = [kernel.operand(name) for name in data.strip("{} ").split(",")]
    assert len(slots) == lanes, operands
    sign = int(kind[0] == "s" and head == "ld")  # loads into wider registers are extended
    fields = {"count": lanes, "size": BITS[kind] // 8, "sign": sign, "immediate": offset}
    kernel.emit(f"{head}_{mods[0]}", [*slots, *[0] * (4 - lanes), base], **fields)


def _atomic(kernel: Kernel, head: str, mods: list[str], kind: str, operands: list[str]) -> None:
    assert "global" in mods, mods
    function = next(i for i, name in enumerate(("add", "exch", "max")) if name in mods)
    orders = {"acquire": ACQUIRE, "release": RELEASE, "acq_rel": ACQUIRE | RELEASE}
    flags = next((flag for name, flag in orders.items() if name in mods), 0)
    flags |= 0 if "cta" in mods else WIDER_THAN_BLOCK
    *to, address, value = operands
    base, offset = kernel.address(address)
    slots = [kernel.operand(to[0]) if to else -1, kernel.operand(value), 0, 0, base]
    fields = {"size": BITS[kind] // 8, "immediate": offset, "sign": int(kind[0] == "s")}
    kernel.emit("atom", slots, flags=flags, function=function, **fields)


def _fence(kernel: Kernel, head: str, mods: list[str], kind: str, operands: list[str]) -> None:
    kernel.emit("fence", flags=0 if "cta" in mods else WIDER_THAN_BLOCK)


def _barrier(kernel: Kernel, head: str, mods: list[str], kind: str, operands: list[str]) -> None:
    assert mods[0] == "sync" and operands == ["0"], (mods, operands)
    kernel.emit("bar")


def _shuffle(kernel: Kernel, head: str, mods: list[str], kind: str, operands: list[str]) -> None:
    to, *others = operands
    to, _, predicate = to.partition("|")
    slots = [kernel.operand(to), *(kernel.operand(other) for other in others)]
    slots.append(kernel.operand(predicate) if predicate else -1)
    kernel.emit("shfl", slots, flags=("bfly", "up", "down", "idx").index(mods[1]))


def _reduce(kernel: Kernel, head: str, mods: list[str], kind: str, operands: list[str]) -> None:
    function = ("add", "max", "min", "and", "or", "xor").index(mods[1])
    to, value, mask = (kernel.operand(operand) for operand in operands)
    kernel.emit("redux", [to, value, value, value, mask], function=function, sign=int(kind[0] == "s"))


def _move(kernel: Kernel, head: str, mods: list[str], kind: str, operands: list[str]) -> None:
    to, source = operands
    if to.startswith("{"):
        low, high = (kernel.operand(part) for part in to.strip("{}").split(","))
        kernel.emit({32: "unpack_16", 64: "unpack_32"}[BITS[kind]], [low, kernel.operand(source), high])
    elif source.startswith("{"):
        low, high = (kernel.operand(part) for part in source.strip("{}").split(","))
        kernel.emit({32: "pack_16", 64: "pack_32"}[BITS[kind]], [kernel.operand(to), low, high])
    elif kind == "pred":
        number = re.match(r"-?\d", source)
        kernel.emit(
            "mov", [kernel.operand(to), kernel.constant(int(source != "0")) if number else kernel.operand(source)]
        )
    else:
        kernel.emit({16: "mov_16", 32: "mov_32", 64: "mov"}[BITS[kind]], [kernel.operand(to), kernel.operand(source)])


def _branch(kernel: Kernel, head: str, mods: list[str], kind: str, operands: list[str]) -> None:
    kernel.emit("bra", label=operands[0])


def _return(kernel: Kernel, head: str, mods: list[str], kind: str, operands: list[str]) -> None:
    kernel.emit("ret")


def _address_of(kernel: Kernel, head: str, mods: list[str], kind: str, operands: list[str]) -> None:
    kernel.emit("mov", [kernel.operand(operand) for operand in operands])


def _policy(kernel: Kernel, head: str, mods: list[str], kind: str, operands: list[str]) -> None:
    kernel.emit("mov", [kernel.operand(operands[0]), kernel.constant(0)])  # of the cache: a hint


_SPECIAL = {
    "ld": _memory, "st": _memory, "atom": _atomic, "red": _atomic, "membar": _fence, "fence": _fence, "bar": _barrier,
    "barrier": _barrier, "shfl": _shuffle, "redux": _reduce, "mov": _move, "bra": _branch, "ret": _return,
    "exit": _return, "cvta": _address_of, "createpolicy": _policy,
}  # fmt: skip
