"""The time that a GPU must take for the kernels, by arithmetic on their machine code (`inspect`) and on public figures of
chips. Nothing is measured here; `benchmarks/run_gpu.sh` is what measures.

Kernels from logits. A row of V logits occupies four things of its multiprocessor, and the largest of them *binds*:

- memory: its bytes over the multiprocessor's part of the achievable bandwidth;
- issue: its instructions, 4 × 32 of which a multiprocessor begins in a clock;
- MUFU: its exponentials (and conversions), 16 a clock;
- FP64: its instructions in double precision, which every thread of the program executes.

And it takes time by itself, in which a multiprocessor works on no more rows than it has programs: each tile's load (its
latency, then its instructions), and what a row costs beside its tiles, one instruction after the other. If the rows
under way do not fill that time, *latency* binds.

The loss from hidden states. See `linear`.
"""

from __future__ import annotations

from dataclasses import dataclass

from kto_kernels import LinearPlan
from kto_kernels.backends.triton.launch import chunk_threads

from . import launches

ACHIEVABLE = 0.9  # of the public bandwidth
GEMM = 0.69  # of the public FLOP/s, in large bf16 products with fp32 sums
L2_HITS = 0.7  # of what `chunk` reads a second time
LATENCY = 600e-9  # seconds from a load of a busy memory to its use: a guess
DEPENDENT = 6  # clocks from an instruction to one that uses its result
DEPENDENT_FP64 = 16
SMALL_KERNEL = 2e-6  # seconds that a kernel of a few thousand elements takes: a guess
VOCABS = (128256, 32000, 8192)
ROWS = 8192


@dataclass(frozen=True)
class Chip:
    """Public figures; `code` is the target whose machine code stands for the chip's. Rates are threads a clock on one
    multiprocessor."""

    name: str
    bandwidth: float  # bytes/s
    processors: int
    clock: float  # Hz, the boost clock
    fp32: int
    fp64: int
    mufu: int
    l2: int  # bytes
    bf16: float  # dense FLOP/s
    threads: int  # that a multiprocessor holds
    code: str


# Sources: NVIDIA's data sheets and architecture papers of A100, H100, H200, L40S (Ada), GeForce RTX 40 and 50, and
# Blackwell; rates by compute capability from the CUDA C++ Programming Guide, "Throughput of Native Arithmetic
# Instructions"; AMD's data sheet of MI300X and the CDNA 3 white paper (its processors are compute units; its L2 is that
# of its 8 dies). MI300X's instructions are taken for sm_90's, which says little.
CHIPS = (
    Chip("A100-80", 2.039e12, 108, 1.41e9, 64, 32, 16, 40 << 20, 312e12, 2048, "sm_80"),
    Chip("H100", 3.35e12, 132, 1.83e9, 128, 64, 16, 50 << 20, 989e12, 2048, "sm_90"),
    Chip("H200", 4.8e12, 132, 1.83e9, 128, 64, 16, 50 << 20, 989e12, 2048, "sm_90"),
    Chip("L40S", 0.864e12, 142, 2.52e9, 128, 2, 16, 96 << 20, 362e12, 1536, "sm_80"),
    Chip("RTX 4090", 1.008e12, 128, 2.52e9, 128, 2, 16, 72 << 20, 165e12, 1536, "sm_80"),
    Chip("RTX 5090", 1.792e12, 170, 2.41e9, 128, 2, 16, 96 << 20, 210e12, 1536, "sm_100"),
    Chip("B200", 8.0e12, 148, 1.85e9, 128, 64, 16, 126 << 20, 2250e12, 2048, "sm_100"),
    Chip("MI300X", 5.3e12, 304, 2.1e9, 128, 64, 16, 32 << 20, 1307e12, 2048, "sm_90"),
)
H100 = next(chip for chip in CHIPS if chip.name == "H100")


@dataclass(frozen=True)
class Work:
    """A kernel's row, of `vocab` bf16 logits: `case` is what `inspect` says of the kernel."""

    case: dict
    threads: int  # of a program
    programs: int  # that a multiprocessor holds
    vocab: int
    reads: float  # bytes a logit that come from memory
    writes: float


def seconds_a_row(work: Work, chip: Chip) -> dict[str, float]:
    """What binds → the seconds that a multiprocessor takes for a row if only that did."""
    case = work.case
    loops = [loop for loop in (case["fold"], case["write"]) if loop]
    warps = work.threads / 32

    def count(kind: str) -> float:
        each = sum(loop["mix"].get(kind, 0) / loop["logits"] for loop in loops)
        return work.vocab * each + work.threads * case["row"].get(kind, 0)

    instructions = sum(map(count, ("ALU", "FMA", "MUFU", "FP64", "other")))
    fma = count("FMA") / chip.fp32
    clocks = {
        "issue": max(instructions / 128, fma),
        "MUFU": count("MUFU") / chip.mufu,
        "FP64": count("FP64") / chip.fp64,
    }
    # Alone: a program's tiles one after the other, then what a row costs beside them.
    alone = 0.0
    for loop in loops:
        tiles = work.vocab / (loop["logits"] * work.threads)
        alone += tiles * (
            LATENCY * chip.clock
            + max(loop["instructions"] * warps / 4, 32 * warps * loop["mix"].get("MUFU", 0) / chip.mufu)
        )
    fp64 = case["row"].get("FP64", 0)
    beside = sum(case["row"].values()) - fp64
    alone += beside * DEPENDENT + fp64 * max(DEPENDENT_FP64, work.threads / chip.fp64)
    clocks["latency"] = alone / work.programs
    found = {name: value / chip.clock for name, value in clocks.items()}
    found["memory"] = work.vocab * (work.reads + work.writes) * chip.processors / (chip.bandwidth * ACHIEVABLE)
    return found


def chunk_reads(vocab: int, chip: Chip, programs: int) -> float:
    """Bytes that `chunk` reads from memory a logit: once, and again what its second pass does not find in the L2. The
    rows under way are at most all of the L2; what is above is read again."""
    under_way = chip.processors * programs * vocab * 2
    return 2 + 2 * (1 - L2_HITS * min(1.0, chip.l2 / under_way))


# Kernel → (its name in `inspect`, the variant that stands for it, bytes a logit that it writes).
KERNELS = {
    "forward": ("forward", "reference-free, KL number, bfloat16", 0),
    "logits_backward": ("logits_backward", "loss, bfloat16", 2),
    "chunk": ("chunk", "scores, gradient, bfloat16", 2),
}
SCORES = ("chunk", "scores, bfloat16", 0)  # `chunk` of a side without a gradient


def work_of(cases: list[dict], chip: Chip, named: tuple[str, str, int], vocab: int) -> Work | None:
    """A kernel of Triton on a chip; None where its machine code is not there."""
    kernel, variant, writes = named
    case = next((c for c in cases if (c["kernel"], c["variant"], c["target"]) == (kernel, variant, chip.code)), None)
    if case is None or "fold" not in case:
        return None
    threads = chunk_threads(2 * vocab, chip.processors, chip.l2) if kernel == "chunk" else case["threads"]
    programs = min(chip.threads // threads, 65536 // (threads * case["registers"]))
    reads = chunk_reads(vocab, chip, programs) if kernel == "chunk" and writes else 2
    return Work(case, threads, programs, vocab, reads, writes)


def of_kernels(cases: list[dict]) -> list[tuple[Chip, str, int, Work]]:
    """(chip, kernel, V, work) of each kernel of Triton on each chip that its machine code is there for."""
    found = (
        (chip, kernel, vocab, work_of(cases, chip, named, vocab))
        for chip in CHIPS
        for kernel, named in KERNELS.items()
        for vocab in VOCABS
    )
    return [row for row in found if row[-1]]


def table(cases: list[dict]) -> tuple[str, list[list[str]]]:
    """(title, rows): predicted time, what binds, and per cent of the achievable bandwidth on the least bytes that the
    kernel could move."""
    rows = [["chip", "kernel", "V", "µs", "binds", "of the bandwidth", "memory", "issue", "MUFU", "FP64", "latency"]]
    for chip, kernel, vocab, work in of_kernels(cases):
        took = seconds_a_row(work, chip)
        binds = max(took, key=took.get)
        least = vocab * (2 + work.writes) * chip.processors / (chip.bandwidth * ACHIEVABLE)
        shares = [f"{took[name] / took[binds]:.0%}" for name in ("memory", "issue", "MUFU", "FP64", "latency")]
        time = f"{took[binds] * ROWS / chip.processors * 1e6:,.0f}"
        rows.append([chip.name, kernel, str(vocab), time, binds, f"{least / took[binds]:.0%}", *shares])
    return f"Predicted for N = {ROWS:,} rows of bf16 logits, nothing measured", rows


# From hidden states ───────────────────────────────────────────────────────────────────────────────────────────────────


def linear(plan: LinearPlan, chip: Chip, trained: bool, chunk_row: float, small_kernels: int) -> dict[str, float]:
    """Name → seconds of a loss from hidden states with its gradients.

    Args:
        plan: the chunks.
        chip: where.
        trained: whether the head's gradient is formed.
        chunk_row: seconds that a multiprocessor takes for a row of `chunk`.
        small_kernels: kernels of a chunk beside its GEMMs and its scores (`launches.of_a_chunk`).

    The GEMMs write their results once, which counts as their own work. On top come `chunk`, the small kernels, and for
    a trained head the sum of dW: each chunk but the first reads it, each writes it, in fp32 if there are several, and
    it is rounded at the end.
    """
    gemm = plan.flops / (chip.bf16 * GEMM)
    found = {"GEMMs": gemm, "chunk": plan.rows * chunk_row / chip.processors}
    bandwidth = chip.bandwidth * ACHIEVABLE
    chunks = sum(chunk.rows > 0 for chunk in plan.chunks)
    if trained and chunks > 1:
        elements = plan.vocab * plan.hidden
        summed = elements * 4 * (2 * chunks - 1)
        found["sums of dW"] = (summed - elements * 2) / bandwidth  # a single product would write it in bf16
        found["rounding of dW"] = elements * (4 + 2) / bandwidth
    found["small kernels"] = chunks * small_kernels * SMALL_KERNEL
    return found


def plan(trained: bool) -> LinearPlan:
    """The example of the tables: four sequences of 2048 scored tokens through the head of Llama-3-8B."""
    return LinearPlan.of([ROWS // 4] * 4, VOCABS[0], 4096, needs_weight=trained)


def linear_table(cases: list[dict], launched: list[list[str]]) -> tuple[str, list[list[str]]]:
    """(title, rows): the parts of a loss from hidden states on an H100, in milliseconds and as multiples of the bare
    GEMMs."""
    rows = [["head", "chunks", "part", "ms", "× the GEMMs"]]
    works = [
        work
        for chip, kernel, vocab, work in of_kernels(cases)
        if kernel == "chunk" and vocab == VOCABS[0] and chip is H100
    ]
    for work in works:
        for trained in (True, False):
            planned = plan(trained)
            row = max(seconds_a_row(work, H100).values())
            head = launches.TRAINED if trained else launches.FROZEN
            parts = linear(planned, H100, trained, row, launches.of_a_chunk(launched, head))
            parts["all"] = sum(parts.values())
            for name, took in parts.items():
                first = [head, str(len(planned.chunks))] if name == "GEMMs" else ["", ""]
                rows.append([*first, name, f"{1e3 * took:.2f}", f"{took / parts['GEMMs']:.3f}"])
    return f"Predicted for linear_kto_loss on an H100, N = {ROWS:,}, V = {VOCABS[0]:,}, H = 4096", rows


def tables(cases: list[dict], launched: list[list[str]]) -> list[tuple[str, list[list[str]]]]:
    """The tables of the kernels of `inspect` and of the launches that `launches.table` counts."""
    return [table(cases), linear_table(cases, launched)]
