"""Compiles every variant of the Triton kernels to machine code, without a GPU, and reads what became of it: registers,
shared memory, spills, how wide the loads are, and how many instructions a logit and a row take (`sass`).

    python -m benchmarks inspect [--json FILE] [--arch sm_90 ...] [--no-amd] [--no-cuda] [--old CHECKOUT]

The launchers themselves say what to compile: they are called with a few rows on the CPU and stopped short of the
launch, so that block sizes, flags and compiler options are those of a real call. `nvcc` has the CUDA C++ kernels;
`roofline` makes times of the counts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch

from kto_kernels.backends.triton import launch as launchers
from kto_kernels.options import OUTPUTS, Objective, Scale
from kto_kernels.records import Closing, Rows, Side

from . import nvcc, sass
from .measure import Failed, in_fresh_process

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
AMD = "gfx942"
DTYPES = (torch.bfloat16, torch.float32, torch.float16)

# Each compile-time choice of the kernels at least once, alone or in the company that needs the most registers.
# Layout: (packed, shift, label dtype); sides: where reference and KL come from, see _forward.
_PADDED, _SHIFTED = (False, False, torch.int64), (False, True, torch.int32)
_PACKED, _PACKED_SHIFTED = (True, False, torch.int64), (True, True, torch.int64)
_TOKEN_LOGPS = {
    "padded": (_PADDED, None),
    "packed, shift, softcap": (_PACKED_SHIFTED, 30.0),
}
_FORWARD = {
    "reference-free, KL number": (_PADDED, "none", False, "mean", None),
    "log-probs": (_SHIFTED, "logps", False, "none", None),
    "logits": (_PADDED, "logits", False, "mean", None),
    "logits, packed, shift, average": (_PACKED_SHIFTED, "logits", True, "sum", None),
    "logits, shift, average, softcap": (_SHIFTED, "logits", True, "mean", 30.0),
}
_BACKWARD = {
    "loss": (_PADDED, True, None),
    "loss, packed, shift": (_PACKED_SHIFTED, True, None),
    "tokens, packed, softcap": (_PACKED, False, 30.0),
}
_CHUNK = {  # (gradient, outputs, softcap, programs on a multiprocessor)
    "scores": (False, (), None, 1),
    "scores, gradient": (True, (), None, 1),
    "scores, gradient, short rows": (True, (), None, 4),
    "all outputs, gradient": (True, OUTPUTS, None, 1),
    "all outputs, gradient, softcap": (True, OUTPUTS, 30.0, 1),
}
_SCALE = {"in place": ()}
_SEQUENCES = {  # (sums given, average, divisor)
    "sums": (False, False, False),
    "average, divisor": (False, True, True),
    "given, average, divisor": (True, True, True),
}


def _rows(layout, dtype: torch.dtype) -> Rows:
    packed, shift, label_dtype = layout
    lead = (4,) if packed else (2, 2)
    offsets = torch.tensor([0, 2, 4], dtype=torch.int32) if packed else None
    return Rows(torch.zeros(*lead, 8, dtype=dtype), torch.zeros(lead, dtype=label_dtype), offsets, shift, -100)


def _token_logps(dtype, layout, softcap):
    launchers.TritonBackend().token_logps(_rows(layout, dtype), Scale(1.0, softcap, 1.0))


def _forward(dtype, layout, sides, average, reduction, softcap):
    rows, desirable = _rows(layout, dtype), torch.ones(2, dtype=torch.bool)
    side = {"none": Side(), "logps": Side(None, torch.zeros(2)), "logits": Side(rows)}[sides]
    options = Objective(0.1, 1.0, 1.0, average, reduction)
    backend = launchers.TritonBackend()
    backend.kto_forward(rows, Scale(1.0, softcap, 1.0), desirable, side, 0.0, side, side, options)


def _backward(dtype, layout, of_loss, softcap):
    rows = _rows(layout, dtype)
    grad, coefficients = (torch.ones(()), torch.ones(2)) if of_loss else (torch.ones(rows.labels.shape), None)
    statistics = torch.zeros(2, *rows.labels.shape)
    backend = launchers.TritonBackend()
    backend.logits_backward(
        rows, Scale(1.0, softcap, 1.0), grad, coefficients, statistics[0], statistics, torch.zeros_like(rows.logits)
    )


def _chunk(dtype, gradient, outputs, softcap, programs):
    logits, labels = torch.zeros(2, 8, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    with mock.patch.object(launchers, "chunk_threads", lambda *_: launchers.CHUNK_THREADS // programs, create=True):
        launchers.TritonBackend().score_chunk(logits, labels, Scale(1.0, softcap, 1.0), gradient, outputs)


def _scale(dtype):
    launchers.TritonBackend().scale_(torch.ones(8, dtype=dtype), torch.ones(()))


def _sequences(dtype, given, average, divisor):
    numbers, lengths = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.int64)
    closing = Closing(
        token_logps=torch.zeros(2),
        rows=(0, 2),
        offsets=torch.arange(3),
        sums=numbers if given else None,
        lengths=lengths,
        counts=lengths.double() if given else None,
        ref_logps=numbers.to(dtype),
        z0=numbers[0],
        desirable=lengths > 0,
        batch=2,
        logps=numbers,
        slopes=numbers,
        divisor=numbers[0] if divisor else None,
    )
    launchers.TritonBackend().close_sequences(closing, Objective(0.1, 1.0, 1.0, average, "mean"))


TABLES = (
    (_token_logps, _TOKEN_LOGPS),
    (_forward, _FORWARD),
    (_backward, _BACKWARD),
    (_chunk, _CHUNK),
    (_scale, _SCALE),
    (_sequences, _SEQUENCES),
)


def variants() -> Iterator[tuple[str, object, dict]]:
    """(name, kernel, arguments) of each, as a launcher would launch them."""
    for dtype in DTYPES:
        for call, table in TABLES:
            for name, choices in table.items():
                if dtype == torch.float16 and name not in ("padded", "logits", "loss", "scores, gradient", "in place"):
                    continue  # differs from bf16 by one conversion: once a kernel is enough
                with mock.patch.object(launchers, "_launch") as launch:
                    call(dtype, *choices)
                kernel, _, _, arguments = launch.call_args.args
                yield f"{name}, {str(dtype).removeprefix('torch.')}", kernel, arguments


def inspect(architectures=ARCHITECTURES, amd: bool = True) -> list[dict]:
    """Compiles all variants for `architectures` (NVIDIA) and, with `amd`, for gfx942.

    Returns:
        One dict a variant and target: kernel, variant, target, threads of a program, registers, shared (bytes), spills
        (bytes), loads and (bits of one access → how many such instructions); on NVIDIA also what `sass.read` counts.

    Raises:
        RuntimeError: Triton is missing, or its interpreter is on, under which nothing can be compiled.
    """
    if launchers.kernels is None:
        raise RuntimeError(launchers.TritonBackend().unavailable(torch.device("cuda")))
    if launchers.INTERPRETED:
        raise RuntimeError("the kernels were imported under TRITON_INTERPRET=1 and cannot be compiled: unset it")
    targets = [*architectures, *([AMD] if amd else [])]
    jobs = [(i, target) for i in range(len(list(variants()))) for target in targets]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        return list(pool.map(_compile, *zip(*jobs)))


def _compile(index: int, target: str) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    name, kernel, arguments = list(variants())[index]
    signature, constants = {}, {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        else:
            signature[parameter.name] = parameter.annotation_type or mangle_type(value)
    hip = not target.startswith("sm_")
    gpu = GPUTarget("hip", target, 64) if hip else GPUTarget("cuda", int(target[3:]), 32)
    options = launchers.options(hip, gpu.warp_size, arguments["THREADS"])
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=gpu, options=options)
    itemsize = next(dtype.itemsize for dtype in DTYPES if name.endswith(str(dtype).removeprefix("torch.")))
    return {
        "kernel": kernel.__name__.removesuffix("_kernel"),
        "variant": name,
        "target": target,
        "threads": arguments["THREADS"],
        **(_read_amd(compiled.asm) if hip else _read_nvidia(compiled.asm, itemsize)),
        "shared": compiled.metadata.shared,
    }


def _read_nvidia(asm, itemsize: int) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        (found,) = sass.of_cubin(Path(file.name), lambda _: itemsize).values()
    return {
        **found,
        "loads": _widths(r"\bld\.global\S*?(?:\.v(\d))?\.[bfus](\d+)\b", asm["ptx"]),
        "stores": _widths(r"\bst\.global\S*?(?:\.v(\d))?\.[bfus](\d+)\b", asm["ptx"]),
    }


def _widths(pattern: str, ptx: str) -> dict[str, int]:
    return dict(Counter(str(int(lanes or 1) * int(bits)) for lanes, bits in re.findall(pattern, ptx)))


_AMD_BITS = {"dwordx4": "128", "dwordx3": "96", "dwordx2": "64", "dword": "32", "short": "16", "byte": "8"}


def _read_amd(asm) -> dict:
    code = asm["amdgcn"]

    def count(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", code).group(1))

    def widths(verb: str) -> dict[str, int]:
        found = re.findall(rf"\b(?:global|buffer|flat)_{verb}_[us]?(dwordx\d|dword|short|byte)", code)
        return dict(Counter(_AMD_BITS[kind] for kind in found))

    return {
        "registers": count("vgpr_count"),
        "spills": count("private_segment_fixed_size"),
        "loads": widths("load"),
        "stores": widths("store"),
    }


def of_checkout(checkout: Path, architectures, cuda: bool) -> list[dict]:
    """What `inspect` finds, and nvcc with `cuda`, of the package and the CUDA sources in another checkout.

    Raises:
        SystemExit: they are not there, or their launchers are not those that this file calls.
    """
    with tempfile.TemporaryDirectory() as folder:
        for path in (Path(__file__).parent, checkout.resolve() / "kto_kernels", checkout.resolve() / "csrc"):
            if not path.is_dir():
                raise SystemExit(f"--old: {path} is not there")
            (Path(folder) / path.name).symlink_to(path, target_is_directory=True)
        try:
            return in_fresh_process("benchmarks.inspect", [*architectures, *(["cuda"] * cuda)], root=Path(folder))
        except Failed as error:
            raise SystemExit(f"--old {checkout}: its launchers are not those that this file calls ({error})") from error


def _a_logit(case: dict, loop: str) -> str:
    return "" if case.get(loop) is None else f"{case[loop]['a logit']:.2f}"


def table(results: list[dict], old: list[dict] | None = None) -> tuple[str, list[list[str]]]:
    """(title, rows, the first of them the head), of every variant and target; with `old`, "before → now" in each cell
    that differs."""

    def widths(counts: dict[str, int]) -> str:
        return " ".join(f"{bits}×{counts[bits]}" for bits in sorted(counts, key=int, reverse=True))

    def cells(case: dict) -> list[str]:
        numbers = [str(case[name]) for name in ("registers", "shared", "spills")]
        fp64 = "" if "fp64" not in case else str(case["fp64"])
        loops = (_a_logit(case, "fold"), _a_logit(case, "write"))
        return [*loops, fp64, *numbers, widths(case["loads"]), widths(case["stores"])]

    head = ["kernel", "variant", "target", "a logit: fold", "write", "FP64 a row"]
    rows = [[*head, "registers", "shared, bytes", "spills, bytes", "loads, bits×count", "stores"]]
    before = {tuple(case[name] for name in ("kernel", "variant", "target")): cells(case) for case in old or ()}
    for case in results:
        names = (case["kernel"], case["variant"], case["target"])
        found = cells(case)
        was = before.get(names, found)
        rows.append([*names, *(a if a == b else f"{a} → {b}" for a, b in zip(was, found))])
    return "The GPU kernels as machine code: instructions a logit, FP64 instructions a row", rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, help="NVIDIA architectures (default: %(default)s)")
    parser.add_argument("--no-amd", action="store_true", help=f"leave out {AMD}")
    parser.add_argument("--no-cuda", action="store_true", help="leave out the CUDA C++ kernels, which nvcc compiles")
    parser.add_argument("--old", type=Path, metavar="CHECKOUT", help="show another checkout's kernels beside these")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="results file (default: benchmarks/results/inspect.json)"
    )


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    targets = [name for name in asked if name != "cuda"]
    print(json.dumps(inspect(targets, amd=False) + (nvcc.inspect(targets, Path.cwd()) if "cuda" in asked else [])))
