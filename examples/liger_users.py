"""A loop written for Liger-Kernel's KTO loss: one changed import.

python examples/liger_users.py
"""

import copy
from itertools import cycle, islice

import torch
from feedback_data import SHIPPED, Completions, load_feedback, make_batches
from smollm2 import arguments, completion_logps, load_model, print_metrics
from torch import Tensor

from kto_kernels.integrations.liger import LigerFusedLinearKTOLoss  # ← was: from liger_kernel.chunked_loss


def hidden_states(model, completions: Completions) -> Tensor:
    """(B, T - 1, H): what the head turns into logits, each for the token after it."""
    inputs = {"input_ids": completions.input_ids, "attention_mask": completions.attention_mask}
    return model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]


def main(steps: int = 20, tiny: bool = False):
    model, tokenizer = load_model(tiny=tiny)
    reference = copy.deepcopy(model).requires_grad_(False)
    loss_fn = LigerFusedLinearKTOLoss(beta=0.1, use_ref_model=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5, weight_decay=0.0)
    batches = make_batches(load_feedback(SHIPPED), tokenizer)
    for step, batch in enumerate(islice(cycle(batches), steps), 1):
        kl = completion_logps(model, batch.mismatched) - completion_logps(reference, batch.mismatched)
        kl = kl.mean().clamp(min=0)
        loss, (*_, chosen_rewards, rejected_rewards) = loss_fn(
            hidden_states(model, batch.own),
            model.lm_head.weight,
            batch.own.labels[:, 1:],
            preference_labels=batch.desirable,
            ref_input=hidden_states(reference, batch.own),
            ref_weight=reference.lm_head.weight,
            kl=kl,
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        # Liger returns sums over each class.
        chosen = (chosen_rewards / batch.desirable.sum()).item()
        rejected = (rejected_rewards / (~batch.desirable).sum()).item()
        rewards = {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}
        print_metrics(step, {"loss": loss.item(), "kl": kl.item(), **rewards})
    return model


if __name__ == "__main__":
    main(**arguments(__doc__))
