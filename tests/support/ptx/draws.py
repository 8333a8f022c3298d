"""Random tensors where callers may have them: any offset, any distance between rows, extreme values."""

from __future__ import annotations

import itertools
import math
import random

import torch
from torch import Tensor

from kto_kernels.options import Scale
from kto_kernels.records import Rows

from .exact import INF

IGNORE_INDEX = -100
LONG = 256  # tokens a sequence, on average: as many are summed in another way than few
SPECIAL = ("", "", "", "holes", "sure", "sure", "nothing", "nan", "inf", "impossible")  # kinds of rows


class Draw(random.Random):
    def __init__(self, seed: int):
        super().__init__(seed)
        self.torch = torch.Generator().manual_seed(seed)

    def vocab(self) -> int:
        low, high = self.choice([(1, 40), (41, 1100), (1101, 5000), (5001, 9000)])
        return self.randint(low, high)

    def scale(self, softcap: bool) -> Scale:
        cap = self.choice([1.0, 5.0, 30.0]) if softcap else None
        return Scale(self.choice([1.0, 0.5, 2.5]), cap, self.choice([1.0, 0.7, 1.5]))

    def logits(self, lead: tuple[int, ...], vocab: int, dtype: torch.dtype) -> Tensor:
        n, spread = math.prod(lead), self.choice([0.5, 3.0, 3.0, 12.0])
        offset, pitch = self.randint(0, 9), vocab + self.choice([0, 0, 1, 3, 8, 13])
        storage = torch.zeros(offset + n * pitch + 16, dtype=dtype)
        x = storage[offset : offset + n * pitch].view(n, pitch)[:, :vocab]
        x.copy_((spread * torch.randn(n, vocab, generator=self.torch)).to(dtype))
        if len(lead) == 1:
            return x
        if self.random() < 0.3:  # tokens first
            return x.unflatten(0, (lead[1], lead[0])).transpose(0, 1)
        return x.unflatten(0, lead)

    def labels(self, lead: tuple[int, ...], vocab: int, ignore_index: int, dtype: torch.dtype) -> Tensor:
        strided = self.random() < 0.3
        labels = torch.randint(vocab, (*lead, 2), generator=self.torch, dtype=dtype)
        labels = labels[..., 1] if strided else labels[..., 1].contiguous()
        ignored = torch.rand(lead, generator=self.torch) < self.choice([0.0, 0.3, 0.6])
        labels[ignored] = ignore_index
        if labels.numel() and self.random() < 0.5:
            at = tuple(self.randrange(n) for n in lead)
            labels[at] = self.choice([0, vocab - 1, ignore_index])
        return labels

    def rows(self, config, count: int, tokens: int, vocab: int) -> Rows:
        """`count` sequences of `tokens` tokens, or packed ones of at most as many."""
        lead, offsets = (count, tokens), None
        if config.packed:
            least = LONG if tokens >= LONG else 0
            ends = itertools.accumulate((self.randint(least, tokens) for _ in range(count)), initial=0)
            offsets = torch.tensor(list(ends), dtype=config.index_dtype)
            lead = (int(offsets[-1]),)
        logits = self.logits(lead, vocab, config.dtype)
        labels = self.labels(lead, vocab, IGNORE_INDEX, config.index_dtype)
        return Rows(logits, labels, offsets, config.shift, IGNORE_INDEX)

    def make_special(self, logits: Tensor, labels: Tensor) -> None:
        """−inf here and there, rows that are certain of their label, now and then a NaN or +inf."""
        vocab = logits.shape[-1]
        for at in itertools.product(*map(range, labels.shape)):
            row, label, kind = logits[at], int(labels[at]), self.choice(SPECIAL)
            is_label = 0 <= label < vocab
            if kind == "holes":
                row[:: self.randint(2, 5)] = -INF
            elif kind == "sure" and is_label:
                row[label] = row.float().nan_to_num(0, 0, 0).max() + self.choice([8.0, 20.0, 60.0])
            elif kind == "nothing":
                row[:] = -INF
            elif kind == "nan":
                row[self.randrange(vocab)] = torch.nan
            elif kind == "inf":
                row[self.randrange(vocab)] = INF
            elif kind == "impossible" and is_label:
                row[label] = -INF

    def upstream(self, shape: torch.Size) -> Tensor:
        """Gradients of token log-probabilities, some of them 0, or one for all."""
        if self.random() < 0.2:
            return torch.ones(()).expand(shape)
        values = torch.randn(shape, generator=self.torch)
        return values.masked_fill(torch.rand(shape, generator=self.torch) < 0.2, 0.0)
