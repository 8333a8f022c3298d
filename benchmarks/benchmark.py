"""The contract of a benchmark: a record that says what it measures, on what, and by which options. `python -m benchmarks`
makes a command of each record, runs it, and writes and shows its results."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from .selection import Peer, chosen_backends, chosen_peers
from .session import Session
from .shapes import Job, Shape, parse

DEVICES = ("cpu", "cuda")
NOT_CHOSEN = "not run: not among the default peers of this shape (--peers all)"


@dataclass(frozen=True)
class Shapes:
    """On what a benchmark runs that measures one shape after the other."""

    jobs: Callable[[str], list[Job]]  # device → as published
    quick: Shape
    dtypes: Mapping[str, tuple[str, ...]]  # device → those of a shape that is asked for
    base: Mapping[str, Shape]  # device → what a sweep that is asked for varies
    scored: Mapping[str, int]  # device → tokens of a shape that is named by its model
    repeats: int
    hidden: bool = True  # whether a shape needs a hidden size


@dataclass(frozen=True)
class Benchmark:
    name: str
    about: str  # in a sentence, with its rough duration
    measure: Callable[[Session], None]  # adds its cases to the session
    dtypes: tuple[str, ...] = ()  # that may be asked for
    default_dtypes: str = "fp32 and bf16 where both are published"  # in words
    peers: Mapping[str, Peer] = field(default_factory=dict)
    cap: Mapping[str, float | None] = field(default_factory=dict)  # device → seconds that a call of a peer may take
    shapes: Shapes | None = None
    options: Callable[[argparse.ArgumentParser], None] = lambda command: None  # adds those that it has alone
    devices: tuple[str, ...] = DEVICES
    threads: int | None = None  # of a CPU; None: as many as torch has
    ceilings: bool = True  # whether figures are held against the ceilings of the device


def jobs(args: argparse.Namespace) -> list[Job]:
    """The shapes to measure: those asked for, or the benchmark's own."""
    shapes: Shapes = args.benchmark.shapes
    if args.quick:
        return [Job(shapes.quick, shapes.dtypes[args.device][-1:])]
    if args.shapes:
        base, scored = shapes.base[args.device], shapes.scored[args.device]
        found = [shape for text in args.shapes for shape in parse(text, base, scored)]
        found = [replace(shape, objective=base.objective, sequences=base.sequences) for shape in found]
        return [Job(shape, shapes.dtypes[args.device]) for shape in dict.fromkeys(found)]
    return shapes.jobs(args.device)


def plan(args: argparse.Namespace) -> Iterator[tuple[Job, str, dict, int, dict[str, str]]]:
    """Each shape and dtype with what its run takes: (job, dtype, options, repeats, reasons why peers are left out)."""
    benchmark: Benchmark = args.benchmark
    known = tuple(benchmark.peers)
    for job in jobs(args):
        chosen = (known if job.peers is None else job.peers) if args.peers is None else args.peers
        absent = {benchmark.peers[key].name: NOT_CHOSEN for key in known if args.peers is None and key not in chosen}
        cap = args.cap or benchmark.cap[args.device]
        options = {"device": args.device, "peers": chosen, "backends": args.backend, "cap": cap}
        repeats = args.repeats or job.repeats or benchmark.shapes.repeats
        for dtype in args.dtype or job.dtypes:
            yield job, dtype, options, min(repeats, 3) if args.quick else repeats, absent


def settle(args: argparse.Namespace) -> None:
    """Checks what was asked for before any work, and puts it in place of the text.

    Raises:
        ValueError: a shape, peer, backend or dtype that is not known.
    """
    benchmark: Benchmark = args.benchmark
    if args.dtype is not None:
        args.dtype = tuple(args.dtype.split(","))
        for dtype in args.dtype:
            if dtype not in benchmark.dtypes:
                raise ValueError(f"--dtype: {dtype!r} is not known; expected some of: {', '.join(benchmark.dtypes)}")
    for name in ("batch", "size", "repeats"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: expected at least 1, got {value}")
    if benchmark.peers:
        args.peers = None if args.peers is None else chosen_peers(args.peers, benchmark.peers)
        args.backend = chosen_backends(args.backend, args.device)
    if benchmark.shapes and benchmark.shapes.hidden:
        for job in jobs(args):
            if job.shape.hidden == 0:
                raise ValueError(f"'{job.shape.scored},{job.shape.vocab}': expected N,H,V")
