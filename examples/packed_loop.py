"""KTO on packed sequences: no padding anywhere, `cu_seqlens` says where each sequence begins.

python examples/packed_loop.py
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from feedback_data import SHIPPED, Feedback, encode, load_feedback, mismatched_pairs, stratified
from smollm2 import arguments, load_model, print_metrics
from torch import Tensor

from kto_kernels import KTOOutput, linear_kto_loss


@dataclass(frozen=True)
class Packed:
    """Sequences of N tokens altogether, one after the other."""

    input_ids: Tensor  # (N,)
    position_ids: Tensor  # (N,), from 0 in each sequence
    labels: Tensor  # (N,)
    cu_seqlens: Tensor  # (B + 1,)


def pack(pairs: Sequence[tuple[Feedback, Feedback]], tokenizer) -> Packed:
    """Each pair's prompt with the other's completion."""
    ids, labels = zip(*(encode(*pair, tokenizer, max_length=512) for pair in pairs))
    lengths = torch.tensor([0, *map(len, ids)])
    return Packed(torch.cat(ids), torch.cat([torch.arange(len(x)) for x in ids]), torch.cat(labels), lengths.cumsum(0))


def hidden_states(model, packed: Packed) -> Tensor:
    """(N, H). Positions that start again and no attention mask: transformers then keeps every sequence to itself (a
    block-diagonal mask for sdpa, the kernel for variable lengths where flash attention is installed)."""
    inputs = {"input_ids": packed.input_ids[None], "position_ids": packed.position_ids[None]}
    return model.model(**inputs, use_cache=False).last_hidden_state[0]


def packed_loss(model, reference, rows: Sequence[Feedback], tokenizer) -> KTOOutput:
    own, mismatched = pack([(row, row) for row in rows], tokenizer), pack(mismatched_pairs(rows), tokenizer)
    with torch.no_grad():
        kl_hidden = hidden_states(model, mismatched)
        ref_hidden, ref_kl_hidden = (hidden_states(reference, x) for x in (own, mismatched))
    return linear_kto_loss(
        hidden_states(model, own),
        model.lm_head.weight,
        own.labels,
        torch.tensor([row.desirable for row in rows]),
        cu_seqlens=own.cu_seqlens,
        ref_hidden=ref_hidden,
        ref_weight=reference.lm_head.weight,
        kl_hidden=kl_hidden,
        ref_kl_hidden=ref_kl_hidden,
        kl_labels=mismatched.labels,
        kl_cu_seqlens=mismatched.cu_seqlens,
        shift=True,
    )


def main(steps: int = 20, tiny: bool = False):
    model, tokenizer = load_model(tiny=tiny)
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5, weight_decay=0.0)
    batches = stratified(load_feedback(SHIPPED), batch_size=8)
    for step, rows in enumerate(islice(cycle(batches), steps), 1):
        out = packed_loss(model, reference, rows, tokenizer)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print_metrics(step, out.metrics())
    return model


if __name__ == "__main__":
    main(**arguments(__doc__))
