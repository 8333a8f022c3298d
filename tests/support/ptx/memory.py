"""The memory of a launch: the tensors' storages at virtual addresses, with a state for each byte."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

ELEMENT, INITIALISED, WRITABLE, WRITTEN = 1, 2, 4, 8
# The use that a kernel makes of a tensor: reads it; writes all of it; writes some of it and reads that; changes what is there.
ROLES = {"none": 0, "in": INITIALISED, "out": WRITABLE, "scratch": WRITABLE, "inout": INITIALISED | WRITABLE}
DISTANCE = 40  # two storages are 2^40 bytes apart, as launch.h knows


class Memory:
    def __init__(self) -> None:
        self.data: list[Tensor] = []  # the storages as bytes
        self.state: list[Tensor] = []
        self.names: list[list[str]] = []
        self.writable: set[int] = set()  # storages of which some bytes are
        self._at: dict[int, int] = {}
        self._outputs: list[tuple[str, Tensor]] = []  # states of bytes that the kernel must write

    def add(self, name: str, tensor: Tensor, role: str) -> int:
        """The tensor's virtual address."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr() or -1 - len(self.data)
        if key not in self._at:
            self._at[key] = len(self.data)
            self.data.append(torch.empty(0, dtype=torch.uint8).set_(storage))
            self.state.append(torch.from_numpy(np.zeros(storage.nbytes(), np.uint8)))  # its pages untouched
            self.names.append([])
        at, size = self._at[key], tensor.element_size()
        if name not in self.names[at]:
            self.names[at].append(name)
        if tensor.numel():
            # Every byte of every element; of expanded dimensions one.
            shape = [1 if stride == 0 else n for n, stride in zip(tensor.shape, tensor.stride())]
            strides = [stride * size for stride in tensor.stride()]
            view = self.state[at].as_strided([*shape, size], [*strides, 1], tensor.storage_offset() * size)
            view |= ELEMENT | ROLES[role]
            if ROLES[role] & WRITABLE:
                self.writable.add(at)
            if role == "out":
                self._outputs.append((name, view))
        return (at + 1 << DISTANCE) + tensor.storage_offset() * size

    def poison(self) -> None:
        """Makes every byte that is written before it is read a byte of NaNs."""
        for at in self.writable:
            self.data[at][(self.state[at] & (WRITABLE | INITIALISED)) == WRITABLE] = 0xFF

    def never_written(self) -> list[str]:
        return [name for name, view in self._outputs if not bool((view & WRITTEN).all())]
