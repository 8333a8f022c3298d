"""TRL's KTO trainer with a PEFT adapter: only the adapter trains, and the frozen head's gradient is never computed.

python examples/trl_lora.py
"""

from peft import LoraConfig
from smollm2 import arguments, load_model
from trl_kto import train


def main(steps: int = 20, tiny: bool = False):
    model, tokenizer = load_model(tiny=tiny)
    # Any target but the head itself: TRL refuses that one, whose log-probabilities are computed from `lm_head.weight`.
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    # No ref_model: the reference is the model with its adapter off.
    model = train(model, tokenizer, steps, learning_rate=3e-4, peft_config=adapter)
    model.print_trainable_parameters()
    return model


if __name__ == "__main__":
    main(**arguments(__doc__))
