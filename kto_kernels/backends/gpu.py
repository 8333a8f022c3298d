"""Shared by both GPU backends: the number of multiprocessors, and counters for the programs of a launch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Programs (blocks) wanted per multiprocessor: 8 run at a time, and a second round of 8 evens out their work.
PROGRAMS_PER_PROCESSOR = 16


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def cache_bytes(device: torch.device) -> int:
    """The size of the L2 cache, which all multiprocessors share."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


@functools.cache
def _default_stream_arrivals(device: torch.device, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


def arrivals(device: torch.device) -> Tensor:
    """Zeroed counters for one launch: one counts the finished rows, and where rows are split into shares, one for each
    row counts the row's finished shares.

    Calls on the device's default stream share one buffer: they run one after another, and each leaves zeros behind.
    Calls on other streams may run at the same time, and a captured graph may be replayed on any stream at any time:
    each such call and each replay zeroes counters of its own. Graphs are captured on other streams, so the shared
    buffer never lies in the private memory pool of a graph.
    """
    # Rows are split only where there are at most half as many of them as programs wanted.
    count = 1 + PROGRAMS_PER_PROCESSOR * processors(device) // 2
    if device.type != "cuda" or torch.cuda.current_stream(device) == torch.cuda.default_stream(device):
        return _default_stream_arrivals(device, count)
    return torch.zeros(count, dtype=torch.int32, device=device)
