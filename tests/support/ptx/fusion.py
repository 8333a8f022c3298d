"""What ptxas may do to PTX: a product that only one sum of the same basic block uses becomes one fma with it, which
rounds once. Instructions that say .rn stay as they are."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .parser import Kernel


def fuse(kernel: Kernel) -> None:
    code, targets = kernel.code, set(kernel.labels.values())
    # A slot's definition counts as one use.
    uses = Counter(slot for one in code for slot in (*one["o"], *([one["guard"]] if one["guard"] >= 0 else [])))

    def fusible(at: int, op: int) -> bool:
        return code[at]["op"] == op and code[at]["guard"] < 0 and ".rn" not in kernel.texts[at]

    for bits in ("f32", "f64"):
        mul, add, sub = (kernel.ops[f"{name}_{bits}"] for name in ("mul", "add", "sub"))
        for i, one in enumerate(code):
            if not (fusible(i, add) or fusible(i, sub)):
                continue
            for side in (1, 2):
                product = one["o"][side]
                at = _definition(code, targets, product, i)
                if uses[product] != 2 or at is None or not fusible(at, mul):
                    continue
                a, b = code[at]["o"][1:3]
                if {a, b} & {code[k]["o"][0] for k in range(at + 1, i) if code[k]["o"]}:
                    continue
                name = "fma" if one["op"] == add else ("fms" if side == 1 else "fnma")
                one.update(op=kernel.ops[f"{name}_{bits}"], o=[one["o"][0], a, b, one["o"][3 - side]])
                break


def _definition(code: list[dict], targets: set[int], slot: int, before: int) -> int | None:
    """Where the slot's value is made, in the basic block of instruction `before`."""
    for at in range(before - 1, -1, -1):
        if at + 1 in targets:
            return None
        if code[at]["o"][:1] == [slot]:
            return at
    return None
