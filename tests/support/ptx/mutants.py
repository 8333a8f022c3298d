"""Kernels with a fault of one word, which the interpreter must find: changed sources, and PTX without one of its
barriers or fences. They show that the checks can fail.

    python -m tests.support.ptx.mutants [--all]      # --all: each barrier, fence and ordering of the PTX in turn too
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

RACE, BETWEEN, OUTSIDE, MISALIGNED, RESULT = "race", "between programs", "outside", "misaligned", "result"
BUDGET = 20_000_000  # of instructions in a launch, as a mutant may never end
SEEDS = 12
PROCESSES = 2


@dataclass(frozen=True)
class Mutant:
    """`old` is replaced by `new` in the source of the Triton function `where`, or in the file `where` of csrc/cuda."""

    what: str
    backend: str
    where: str
    old: str
    new: str
    problem: str  # of problems.PROBLEMS, which shows it
    found_as: str  # part of what a finding says


def _triton(what: str, where: str, old: str, new: str, problem: str, found_as: str) -> Mutant:
    return Mutant(what, "triton", where, old, new, problem, found_as)


def _cuda(what: str, where: str, old: str, new: str, problem: str, found_as: str) -> Mutant:
    return Mutant(what, "cuda", where, old, new, problem, found_as)


_TOKENS, _SHIFTED, _LOSS, _CHUNK = "tokens, float32", "tokens, shift, int32, float32", "loss, float32", "chunk, float32"
_SOFTCAP, _AVERAGE = "tokens, packed, shift, softcap, float32", "loss, softcap, float32"
_BARRIER = "tl.debug_barrier()"
TRITON = (
    _triton("no barrier before the label's entry", "write_gradient", f"{_BARRIER}  # after", "# after", _CHUNK, RACE),
    _triton(
        "no barrier before the gradient", "write_gradient", f"{_BARRIER}  # in place", "# in place", _SOFTCAP, RACE
    ),
    _triton("no barrier between sums", "sum_models", _BARRIER, "pass", _AVERAGE, RACE),
    _triton(
        "no barrier before the loss", "sequences_kernel", f"{_BARRIER}  # other", "# other", "sequences, float32", RACE
    ),
    _triton("a sequence too many", "sequences_kernel", "i < n_seq", "i <= n_seq", "sequences, float32", OUTSIDE),
    _triton("a row's counter relaxed", "score_row", '"acq_rel"', '"relaxed"', _TOKENS, BETWEEN),
    _triton("a row's counter only releases", "score_row", '"acq_rel"', '"release"', _TOKENS, BETWEEN),
    _triton("a row's counter only acquires", "score_row", '"acq_rel"', '"acquire"', _TOKENS, BETWEEN),
    _triton("a row's counter of a block", "score_row", '"acq_rel"', '"acq_rel", scope="cta"', _TOKENS, BETWEEN),
    _triton("the rows' counter relaxed", "forward_kernel", '"acq_rel"', '"relaxed"', _LOSS, BETWEEN),
    _triton("the rows' counter not set back", "forward_kernel", "tl.store(arrivals, 0)", "pass", _LOSS, RESULT),
    _triton("a hint that all rows are aligned", "aligned_head", "minimum(", "minimum(0 * ", _TOKENS, MISALIGNED),
    _triton("a hint that all loads are", "write_gradient", "- 1)) == 0", "- 1)) >= 0", "tokens, bfloat16", MISALIGNED),
    _triton("a vector too many", "softmax_share", "] < (length", "] <= (length", _TOKENS, OUTSIDE),
    _triton("a vector of the gradient too many", "write_gradient", "] < (length", "] <= (length", _TOKENS, OUTSIDE),
    _triton("the edge one too far", "softmax_share", "mask=v < vocab", "mask=v <= vocab", _TOKENS, OUTSIDE),
    _triton("the edge of the gradient one too far", "write_gradient", "v < vocab)", "v <= vocab)", _TOKENS, OUTSIDE),
    _triton("a label behind the last token", "find_row", "t < tokens", "t <= tokens", _SHIFTED, OUTSIDE),
    _triton("a share too many", "merge", "i < splits, other=0.0", "i <= splits, other=0.0", _TOKENS, OUTSIDE),
    _triton("statistics one too far", "token_logps_kernel", "n_rows + n, ", "n_rows + n + 1, ", _TOKENS, OUTSIDE),
    # Races that the kernels had, and that changed no result.
    _triton("all programs load the label's logit", "write_gradient", "mask=mine", "mask=label >= 0", _SOFTCAP, BETWEEN),
    _triton("all threads load the edge", "write_gradient", "length, THREADS)", "length, 2 * VECTOR)", _CHUNK, RACE),
)
_DEVICE, _KERNELS = "device.cuh", "kernels.cuh"
_ARRIVE = "const bool last = atomicAdd(counter, 1u) == count - 1;\n      __threadfence();\n"
CUDA = (
    _cuda(
        "no barrier where blocks arrive", _DEVICE, "__syncthreads();\n    // The fences", "// The fences", _LOSS, RACE
    ),
    _cuda(
        "no fence in front of the counter",
        _DEVICE,
        "__threadfence();\n      const bool",
        "const bool",
        _TOKENS,
        BETWEEN,
    ),
    _cuda(
        "no fence behind the counter",
        _DEVICE,
        _ARRIVE,
        _ARRIVE.replace("      __threadfence();\n", ""),
        _TOKENS,
        BETWEEN,
    ),
    _cuda("fences of a block", _DEVICE, "__threadfence()", "__threadfence_block()", _TOKENS, BETWEEN),
    _cuda("the counter not set back", _DEVICE, "if (last) *counter = 0;", "", _TOKENS, RESULT),
    _cuda("no barrier in broadcast", _DEVICE, "value = f();\n    __syncthreads();", "value = f();", _CHUNK, RACE),
    _cuda("no barrier behind the shares", _DEVICE, "= share;\n    __syncthreads();", "= share;", _TOKENS, RACE),
    _cuda(
        "no barrier behind the sums",
        _DEVICE,
        "store(i, sum);\n    }\n    __syncthreads();",
        "store(i, sum);\n    }",
        _LOSS,
        RACE,
    ),
    _cuda(
        "no barrier before the label's entry",
        _KERNELS,
        "block.barrier();  // the label's",
        "// the label's",
        _CHUNK,
        RACE,
    ),
    _cuda("no barrier before the gradient", _KERNELS, "block.barrier();  // in place", "// in place", _SOFTCAP, RACE),
    _cuda(
        "rows taken for aligned",
        _KERNELS,
        "line.head = to_boundary < count ? to_boundary : count;",
        "line.head = 0 * to_boundary;",
        _TOKENS,
        MISALIGNED,
    ),
    _cuda(
        "a vector too many",
        _KERNELS,
        "v < line.last; v += kThreads) single(v)",
        "v <= line.last; v += kThreads) single(v)",
        _TOKENS,
        OUTSIDE,
    ),
    _cuda("the edge one too far", _KERNELS, "i < line.edge;", "i <= line.edge;", _TOKENS, OUTSIDE),
    _cuda("a share too many", _KERNELS, "i < splits; ++i", "i <= splits; ++i", _TOKENS, OUTSIDE),
)
BARRIER, FENCE, ORDERING = r"bar\.sync\s+0;", r"membar\.gl;", r"atom\.global\.gpu\.acq_rel"
WITHOUT = {BARRIER: "", FENCE: "", ORDERING: "atom.global.gpu.relaxed"}  # and what stands there instead
_PROBED = {
    "triton": (_TOKENS, _AVERAGE, _CHUNK, "loss, long, float32", "loss, many, float32"),
    "cuda": (_TOKENS, _AVERAGE, "chunk, outputs, softcap, float32", "loss, long, float32", "loss, many, float32"),
}


def _functions() -> list:
    """All functions that Triton compiles."""
    import triton

    from kto_kernels.backends.triton import chunk, logits, row, sequences

    modules = (row, sequences, logits, chunk)
    return [value for module in modules for value in vars(module).values() if isinstance(value, triton.JITFunction)]


def stale() -> list[Mutant]:
    """The mutants whose `old` is no longer in the sources."""
    from . import on_cuda

    sources = {function.__name__: function.src for function in _functions()}
    sources |= {file: (on_cuda.SOURCES / "cuda" / file).read_text() for file in (_DEVICE, _KERNELS)}
    return [mutant for mutant in (*TRITON, *CUDA) if mutant.old not in sources[mutant.where]]


@contextlib.contextmanager
def _triton_source(mutant: Mutant) -> Iterator[None]:
    functions = _functions()
    changed = next(function for function in functions if function.__name__ == mutant.where)
    source = changed.src
    assert mutant.old in source, mutant

    def use(text: str) -> None:
        changed._unsafe_update_src(text)
        for function in functions:
            function.hash = None

    use(source.replace(mutant.old, mutant.new))
    try:
        yield
    finally:
        use(source)


@contextlib.contextmanager
def _cuda_source(mutant: Mutant) -> Iterator[None]:
    from . import on_cuda

    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "csrc"
        shutil.copytree(on_cuda.SOURCES, sources)
        file = sources / "cuda" / mutant.where
        assert mutant.old in file.read_text(), mutant
        file.write_text(file.read_text().replace(mutant.old, mutant.new))
        on_cuda.compiled.cache_clear()
        try:
            with mock.patch.object(on_cuda, "SOURCES", sources):
                on_cuda.compiled(90)
                yield
        finally:
            on_cuda.compiled.cache_clear()


def probe(backend: str, problem: str, rewrite=None, until: str | None = None, seeds: int = SEEDS) -> set[str]:
    """What is found when the problem runs on sm_90 with some seeds, or until a finding has the text `until` in it:
    kinds of findings, and "result" for wrong ones."""
    from . import problems

    launches = problems.target(backend, 90, rewrite)
    launches.machine.strict, launches.machine.budget = False, BUDGET
    found: set[str] = set()
    for seed in range(seeds):
        try:
            problems.run(launches, backend, problems.PROBLEMS[problem], seed)
        except AssertionError:
            found.add(RESULT)
        found |= {f.kind + (f" {BETWEEN}" if f.across else "") for f in launches.machine.findings}
        if until is not None and any(until in kind for kind in found):
            break
    return found


def findings(mutant: Mutant) -> set[str]:
    with (_triton_source if mutant.backend == "triton" else _cuda_source)(mutant):
        return probe(mutant.backend, mutant.problem, until=mutant.found_as, seeds=5 * SEEDS)


def caught(mutant: Mutant, found: set[str]) -> bool:
    return any(mutant.found_as in kind for kind in found)


def places(backend: str, problem: str) -> Iterator[tuple[str, str, int]]:
    """(kernel, pattern of WITHOUT, which one) of each barrier, fence and ordering of the kernels that run."""
    texts: dict[str, str] = {}
    assert not probe(backend, problem, lambda name, text: texts.setdefault(name, text)), "findings without any change"
    for kernel, text in texts.items():
        for pattern in WITHOUT:
            for k, _ in enumerate(re.finditer(pattern, _kernel(kernel, text))):
                yield kernel, pattern, k


def without(backend: str, problem: str, kernel: str, pattern: str, number: int, until: str | None = None) -> set[str]:
    """What is found where the PTX of the kernel, whose name contains `kernel`, lacks one barrier, fence or ordering."""

    def rewrite(name: str, text: str) -> str:
        if kernel not in name:
            return text
        body = _kernel(name, text)
        match = list(re.finditer(pattern, body))[number]
        return text.replace(body, body[: match.start()] + WITHOUT[pattern] + body[match.end() :])

    return probe(backend, problem, rewrite, until)


def _kernel(name: str, text: str) -> str:
    begin = text.index(f".entry {name}(")
    return text[begin : text.index("\n}\n", begin)]


def main() -> int:
    from . import build, process

    backends = ["triton", *(["cuda"] if build.nvcc() else [])]
    mutants = [mutant for mutant in (*TRITON, *CUDA) if mutant.backend in backends]
    missed = 0
    with process.started(PROCESSES) as pool:
        for mutant, found in zip(mutants, pool.map(findings, mutants)):
            missed += not caught(mutant, found)
            said, verdict = "; ".join(sorted(found)) or "nothing", "caught" if caught(mutant, found) else "MISSED"
            print(f"{verdict} | {mutant.backend} | {mutant.what} | {said}", flush=True)
    if "--all" in sys.argv:
        for backend in backends:
            needed: dict[tuple, set[str]] = {}
            for problem in _PROBED[backend]:
                for place in places(backend, problem):
                    needed.setdefault(place, set())
                    if not needed[place]:
                        needed[place] |= without(backend, problem, *place, until="")
            for place, found in needed.items():
                print(f"{backend} | {place} | {'; '.join(sorted(found)) or 'nothing found'}", flush=True)
            print(f"{backend}: {sum(map(bool, needed.values()))} of {len(needed)} places in the PTX found")
    print(f"{missed} missed")
    return missed > 0


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    import torch

    torch.set_num_threads(1)
    sys.exit(main())
