"""KTO with sharded parameters (FSDP2): every process has rows of its own, and the loss is part of the wrapped forward.

torchrun --nproc-per-node 2 examples/fsdp2_loop.py
"""

import os
from itertools import cycle, islice

import torch
import torch.distributed as dist
from feedback_data import SHIPPED, Completions, class_weights, load_feedback, make_batches
from smollm2 import arguments, completion_logps, load_model, print_metrics
from torch.distributed.fsdp import fully_shard

from kto_kernels import KTOOutput, linear_kto_loss


class WithLoss(torch.nn.Module):
    """Model and loss as one module, for FSDP2 or DDP to wrap: in its forward the head is whole, and its output is what
    their hooks wait for. With the loss outside, on `ddp.module`, gradients stay in each process, and no error says so."""

    def __init__(self, model, process_group, **options):
        super().__init__()
        self.model, self.process_group, self.options = model, process_group, options

    def hidden(self, completions: Completions) -> torch.Tensor:  # (B, T, H)
        inputs = {"input_ids": completions.input_ids, "attention_mask": completions.attention_mask}
        return self.model.base_model(**inputs, use_cache=False).last_hidden_state

    def forward(self, own, mismatched, desirable, ref_logps, ref_kl_logps) -> tuple[torch.Tensor, KTOOutput]:
        with torch.no_grad():
            kl_hidden = self.hidden(mismatched)
        hidden, weight = self.hidden(own), self.model.lm_head.weight
        out = linear_kto_loss(
            *(hidden, weight, own.labels, desirable),
            ref_logps=ref_logps,
            kl_hidden=kl_hidden,
            kl_labels=mismatched.labels,
            ref_kl_logps=ref_kl_logps,
            shift=True,
            process_group=self.process_group,  # the KL estimate is that of all processes
            **self.options,
        )
        return out.loss, out


def main(steps: int = 20, tiny: bool = False):
    alone = {"rank": 0, "world_size": 1, "store": dist.HashStore()}
    dist.init_process_group(**({} if "RANK" in os.environ else alone))  # torchrun sets it
    rank, count = dist.get_rank(), dist.get_world_size()
    device = f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    mesh = dist.init_device_mesh(torch.device(device).type, (count,))

    model, tokenizer = load_model(device=device, tiny=tiny)
    rows = load_feedback(SHIPPED)
    weights = dict(zip(("desirable_weight", "undesirable_weight"), class_weights([row.desirable for row in rows])))
    batches = list(islice(cycle(make_batches(rows[rank::count], tokenizer, device=device)), steps))
    # The frozen reference is the model before training: its log-probabilities are computed once.
    reference = [(completion_logps(model, b.own), completion_logps(model, b.mismatched)) for b in batches]

    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    step_module = fully_shard(WithLoss(model, mesh, **weights), mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5, weight_decay=0.0)
    for step, (batch, logps) in enumerate(zip(batches, reference), 1):
        loss, out = step_module(batch.own, batch.mismatched, batch.desirable, *logps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        metrics = out.metrics(mesh)  # of all processes
        if rank == 0:
            print_metrics(step, metrics)
    return model


if __name__ == "__main__":
    main(**arguments(__doc__))
    dist.destroy_process_group()
