"""KTO in a plain `transformers.Trainer`: its loss is `linear_kto_loss` on the model's last hidden states.

python examples/transformers_trainer.py
"""

import copy
import tempfile
from dataclasses import asdict
from itertools import chain

import torch
from feedback_data import SHIPPED, collate, load_feedback, stratified
from smollm2 import arguments, load_model, print_metrics
from torch import Tensor
from transformers import Trainer, TrainingArguments

from kto_kernels import linear_kto_loss

BATCH = 8


def hidden_states(model, completions: dict[str, Tensor]) -> Tensor:
    """(B, T, H): what the head turns into logits."""
    inputs = {name: completions[name] for name in ("input_ids", "attention_mask")}
    return model.model(**inputs, use_cache=False).last_hidden_state


class KTOTrainer(Trainer):
    def __init__(self, model, **more):
        super().__init__(model, **more)
        self.reference = copy.deepcopy(model).requires_grad_(False).eval().to(self.args.device)
        self.model_accepts_loss_kwargs = False  # the loss is a mean: the trainer divides it where gradients accumulate

    # On one device. Under DDP or FSDP `model` is a wrapper, and only its own forward starts the synchronisation of the
    # gradients: there, put these lines into the forward of the model (a subclass of LlamaForCausalLM, say) and have it
    # return the loss, as `FusedKTOTrainer` does.
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        own, mismatched = inputs["own"], inputs["mismatched"]
        with torch.no_grad():
            kl_hidden = hidden_states(model, mismatched)
            ref_hidden, ref_kl_hidden = (hidden_states(self.reference, x) for x in (own, mismatched))
        out = linear_kto_loss(
            hidden_states(model, own),
            model.lm_head.weight,
            own["labels"],
            inputs["desirable"],
            ref_hidden=ref_hidden,
            ref_weight=self.reference.lm_head.weight,
            kl_hidden=kl_hidden,
            ref_kl_hidden=ref_kl_hidden,
            kl_labels=mismatched["labels"],
            shift=True,
        )
        print_metrics(self.state.global_step + 1, out.metrics())
        return (out.loss, out) if return_outputs else out.loss


def main(steps: int = 20, tiny: bool = False):
    model, tokenizer = load_model(tiny=tiny)
    args = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is saved
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=3e-5,
        train_sampling_strategy="sequential",  # both classes in every batch, so that every step has a margin
        remove_unused_columns=False,
    )
    rows = list(chain.from_iterable(stratified(load_feedback(SHIPPED), BATCH)))
    trainer = KTOTrainer(
        model, args=args, train_dataset=rows, data_collator=lambda batch: asdict(collate(batch, tokenizer))
    )
    trainer.train()
    return model


if __name__ == "__main__":
    main(**arguments(__doc__))
