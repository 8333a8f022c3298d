"""Four processes with gloo between them, started once a session: `pool().run(function, *arguments)` calls
`function(rank, *arguments)` on each of the first `ranks` and returns what they returned. With two GPUs or more it is
NCCL between processes with a GPU each, two of them or four.

The functions live in test modules, at the top level; arguments and results go through pickle. Tensors are put on the
rank's `device()`: `shard_harness.run` does so with what it is given.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any, NoReturn
from unittest import mock

import pytest
import torch
import torch.distributed as dist

GPUS = torch.cuda.device_count() if dist.is_nccl_available() else 0
NCCL = GPUS >= 2
RANKS = 2 if GPUS in (2, 3) else 4
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "all_to_all")
# Only a hang should take so long: busy cores do not.
SECONDS = 300  # for one call
TIMEOUT = datetime.timedelta(seconds=120)  # of a collective

# Not beside other tests: ranks that wait for each other on busy cores are slow.
distributed = [pytest.mark.alone, *([pytest.mark.gpu] if NCCL else [])]


class Failed(AssertionError):
    """The error that a rank raised."""


def leave() -> NoReturn:
    """The end of every process that took part in a group: it has succeeded, and Python is not finalised in it.

    A thread of PyTorch's gloo group (`pt_gloo_runloop`) lets go of a collective's tensors after the caller has gone on,
    and takes the GIL to do so. Where Python (before 3.14) is being finalised meanwhile, this ends in `pthread_exit`,
    which unwinds a destructor of C++: "terminate called without an active exception", SIGABRT, in a process that had
    done all its work (https://github.com/pytorch/pytorch/issues/190489). `destroy_process_group` joins the threads only
    where nothing else holds the group. A model under DDP, a mesh and the caches of DTensor hold it to the end.
    """
    dist.barrier()  # no process leaves while another still talks to it
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _work(rank: int, file: str, connection) -> None:
    torch.set_num_threads(1)
    if NCCL:
        torch.cuda.set_device(rank)
    backend = "cuda:nccl,cpu:gloo" if NCCL else "gloo"
    dist.init_process_group(backend, init_method=f"file://{file}", rank=rank, world_size=RANKS, timeout=TIMEOUT)
    dist.barrier()
    while (task := connection.recv()) is not None:
        function, arguments, ranks = task
        try:
            torch.manual_seed(0)
            connection.send((True, function(rank, *arguments) if rank < ranks else None))
        except BaseException:
            connection.send((False, traceback.format_exc()))
    leave()


def forking(*modules: str) -> multiprocessing.context.BaseContext:
    """Starts processes as forks of one that has imported the modules: they are imported once. The first call of a test run
    names them. A process that has looked for a GPU cannot be forked: where there is one, each imports them itself."""
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context


class Pool:
    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        tests = {name: module for name, module in sys.modules.items() if name.startswith("tests.")}
        context = forking(*(name for name, module in tests.items() if getattr(module, "pool", None) is pool))
        self.connections, self.processes = [], []
        for rank in range(RANKS):
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, f"{self.folder.name}/store", theirs), daemon=True)
            process.start()
            self.connections.append(mine)
            self.processes.append(process)

    def run(self, function: Callable, *arguments: Any, ranks: int = 4) -> list:
        if ranks > RANKS:
            pytest.skip(f"needs {ranks} GPUs, there are {GPUS}")
        for connection in self.connections:
            connection.send((function, arguments, ranks))
        results = []
        for rank, connection in enumerate(self.connections):
            if not connection.poll(SECONDS):
                self.close()
                raise Failed(f"rank {rank} of {function.__name__} has not answered in {SECONDS} s")
            try:
                results.append(connection.recv())
            except EOFError:
                results.append((False, "it ended without an answer"))
        failed = [f"rank {rank}:\n{what}" for rank, (good, what) in enumerate(results) if not good]
        if failed:
            self.close()  # the others may be in the middle of a collective
            raise Failed("\n".join(failed))
        return [what for _, what in results[:ranks]]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        pool.cache_clear()


@functools.cache
def pool() -> Pool:
    started = Pool()
    atexit.register(started.close)
    return started


def device() -> torch.device:
    """Inside a rank: where its tensors live."""
    return torch.device("cuda", torch.cuda.current_device()) if NCCL else torch.device("cpu")


@functools.cache
def group(*ranks: int) -> dist.ProcessGroup | None:
    """Inside a rank: the group of these ranks. Every rank of the pool has to ask for it at the same point, also those
    that are not of it (they get no group); asked for again it is there."""
    made = dist.new_group(list(ranks))
    return made if dist.get_rank() in ranks else None


@contextlib.contextmanager
def counted():
    """Inside a rank: [(name, bytes sent), …] of the collectives that are called meanwhile."""
    calls: list[tuple[str, int]] = []

    def spy(name: str) -> Callable:
        real = getattr(dist, name)

        def collective(*args, **kwargs):
            sent = args[1] if name == "all_gather" else args[0]
            calls.append((name, sent.numel() * sent.itemsize if isinstance(sent, torch.Tensor) else 0))
            return real(*args, **kwargs)

        return collective

    names = [name for name in COLLECTIVES if hasattr(dist, name)]
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(dist, name, spy(name)))
        yield calls
