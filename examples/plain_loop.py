"""KTO in a plain PyTorch loop: `kto_loss` on the model's logits, its gradient written over them.

python examples/plain_loop.py
"""

from itertools import cycle, islice

import torch
from feedback_data import SHIPPED, class_weights, load_feedback, make_batches
from smollm2 import arguments, completion_logits, completion_logps, load_model, print_metrics

from kto_kernels import kto_loss


def main(steps: int = 20, tiny: bool = False):
    model, tokenizer = load_model(tiny=tiny)
    rows = load_feedback(SHIPPED)
    desirable_weight, undesirable_weight = class_weights([row.desirable for row in rows])
    batches = list(islice(cycle(make_batches(rows, tokenizer)), steps))

    # The frozen reference is the model before training: its log-probabilities are computed once.
    reference = [(completion_logps(model, b.own), completion_logps(model, b.mismatched)) for b in batches]

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5, weight_decay=0.0)
    for step, (batch, (ref_logps, ref_kl_logps)) in enumerate(zip(batches, reference), 1):
        kl_logps = completion_logps(model, batch.mismatched)  # no gradient goes through the KL estimate
        logits, labels = completion_logits(model, batch.own)
        out = kto_loss(
            logits,
            labels,
            batch.desirable,
            ref_logps=ref_logps,
            kl_logps=kl_logps,
            ref_kl_logps=ref_kl_logps,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
            shift=True,
            inplace_backward=True,  # the logits are not needed again: no second buffer of their size
        )
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print_metrics(step, out.metrics())
    return model


if __name__ == "__main__":
    main(**arguments(__doc__))
