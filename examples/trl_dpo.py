"""TRL's DPO trainer with its loss computed from hidden states: one changed line.

python examples/trl_dpo.py
"""

import copy
import tempfile
from itertools import cycle

from datasets import Dataset
from feedback_data import SHIPPED, load_feedback
from smollm2 import arguments, load_model, print_metrics
from trl import DPOConfig

from kto_kernels.integrations.trl import FusedDPOTrainer


def preferences() -> list[dict]:
    """The feedback as pairs. It is on single answers, so each answer that got thumbs up is preferred to one that got
    thumbs down, mostly for another prompt."""
    rows = load_feedback(SHIPPED)
    liked, disliked = ([row for row in rows if row.desirable == wanted] for wanted in (True, False))
    return [
        {
            "prompt": [{"role": "user", "content": chosen.prompt}],
            "chosen": [{"role": "assistant", "content": chosen.completion}],
            "rejected": [{"role": "assistant", "content": rejected.completion}],
        }
        for chosen, rejected in zip(liked, cycle(disliked))
    ]


def main(steps: int = 20, tiny: bool = False):
    model, tokenizer = load_model(tiny=tiny)
    args = DPOConfig(
        output_dir=tempfile.gettempdir(),  # nothing is saved
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=3e-5,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 0.1],
        logging_steps=1,
    )
    trainer = FusedDPOTrainer(  # ← the changed line: was trl.DPOTrainer
        model,
        ref_model=copy.deepcopy(model),
        args=args,
        train_dataset=Dataset.from_list(preferences()),
        processing_class=tokenizer,
    )
    trainer.train()
    *_, last, _summary = trainer.state.log_history
    print_metrics(steps, last)
    return trainer.model


if __name__ == "__main__":
    main(**arguments(__doc__))
