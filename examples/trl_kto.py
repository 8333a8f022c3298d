"""TRL's KTO trainer with its loss computed from hidden states: one changed line.

python examples/trl_kto.py
"""

import copy
import tempfile
from itertools import chain

from datasets import Dataset
from feedback_data import SHIPPED, class_weights, conversations, load_feedback, stratified
from smollm2 import arguments, load_model, print_metrics
from trl import KTOConfig

from kto_kernels.integrations.trl import FusedKTOTrainer

BATCH = 8


def train(model, tokenizer, steps: int, learning_rate: float = 3e-5, **more):
    """Trains the model with TRL; `more` are further arguments of the trainer."""
    rows = load_feedback(SHIPPED)
    desirable_weight, undesirable_weight = class_weights([row.desirable for row in rows])
    args = KTOConfig(
        output_dir=tempfile.gettempdir(),  # nothing is saved
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=learning_rate,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        logging_steps=1,
    )
    trainer = FusedKTOTrainer(  # ← the changed line: was trl.KTOTrainer
        model,
        args=args,
        # Both classes in every batch, so that every step has a margin.
        train_dataset=Dataset.from_list(conversations(list(chain.from_iterable(stratified(rows, BATCH))))),
        processing_class=tokenizer,
        **more,
    )
    trainer.train()
    *_, last, _summary = trainer.state.log_history
    print_metrics(steps, last)
    return trainer.model


def main(steps: int = 20, tiny: bool = False):
    model, tokenizer = load_model(tiny=tiny)
    return train(model, tokenizer, steps, ref_model=copy.deepcopy(model))


if __name__ == "__main__":
    main(**arguments(__doc__))
