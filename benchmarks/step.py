"""`python -m benchmarks step`: a whole optimizer step of a real model under TRL's KTOTrainer and under ours, and the part
of it behind the hidden states alone.

Both trainers see the same model, reference and batch of feedback. The loss part is the same training step with the
backbone replaced by fixed hidden states: what is left is scoring policy, reference and KL, the metrics, and the backward
to hidden states and head.
"""

from __future__ import annotations

import copy
import functools
import sys
import tempfile
from collections.abc import Callable

import torch

from .environment import ROOT
from .measure import Timed, clock_of, interleaved, peak_extra_bytes

TRL, OURS = "trl.KTOTrainer", "FusedKTOTrainer"
TRAINED, LORA = "trained", "LoRA"
sys.path.insert(0, str(ROOT / "examples"))  # the model and its data

STEP, LOSS = "step", "loss part"
BATCH = 4
REPEATS = 5
DEVICES = ("cpu", "cuda")


class FixedStates:
    """In the place of the backbone's forward: hidden states that depend on the shape of the input alone, with a
    gradient."""

    def __init__(self, width: int):
        self.width = width
        self.states: dict[tuple, torch.Tensor] = {}

    def __call__(self, input_ids, **_):
        from transformers.modeling_outputs import BaseModelOutputWithPast

        shape = (*input_ids.shape, self.width)
        if shape not in self.states:
            torch.manual_seed(0)
            self.states[shape] = torch.randn(shape, device=input_ids.device).requires_grad_()
        return BaseModelOutputWithPast(last_hidden_state=self.states[shape])


@functools.cache
def model_and_tokenizer(quick: bool):
    from smollm2 import load_model

    return load_model(tiny=quick)


def make_step(variant: str, head: str, part: str, quick: bool, device: str = "cpu") -> Callable[[], torch.Tensor]:
    """One training step on the same batch every time."""
    import trl
    from datasets import Dataset
    from feedback_data import SHIPPED, conversations, load_feedback

    from kto_kernels.integrations.trl import FusedKTOTrainer

    model, tokenizer = model_and_tokenizer(quick)
    peft_config = None
    if head == LORA:
        from peft import LoraConfig

        peft_config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = copy.deepcopy(model).to(device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = (FusedKTOTrainer if variant == OURS else trl.KTOTrainer)(
            model,
            ref_model=None if head == LORA else copy.deepcopy(model),
            args=trl.KTOConfig(
                output_dir=folder,
                per_device_train_batch_size=BATCH,
                learning_rate=1e-6,
                report_to=[],
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=device == "cpu",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(conversations(load_feedback(SHIPPED)[: 2 * BATCH])),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
    trainer.current_gradient_accumulation_steps = 1  # set by train(), whose loop this does without
    batch = next(iter(trainer.get_train_dataloader()))
    if part == LOSS:
        policy = trainer.model.get_base_model() if head == LORA else trainer.model
        for scored in filter(None, (policy, trainer.ref_model)):
            scored.model.forward = FixedStates(scored.config.hidden_size)
    optimizer = torch.optim.SGD([p for p in trainer.model.parameters() if p.requires_grad] or [torch.zeros(())], 1e-6)

    def step() -> torch.Tensor:
        loss = trainer.training_step(trainer.model, dict(batch))
        if part == STEP:
            optimizer.step()
        optimizer.zero_grad()
        trainer._metrics["train"].clear()
        return loss

    return step


def run(head: str, repeats: int, quick: bool, tick: Callable, device: str = "cpu") -> dict:
    seconds, losses = {}, {}
    for part in (STEP, LOSS):
        steps = {variant: make_step(variant, head, part, quick, device) for variant in (TRL, OURS)}
        losses = {variant: step().item() for variant, step in steps.items()}
        if not abs(losses[OURS] - losses[TRL]) <= 1e-5 * abs(losses[TRL]):
            raise SystemExit(f"gate: {head}, {part}: losses {losses}; nothing was timed")
        runs = {variant: Timed(lambda: None, lambda _, step=step: step()) for variant, step in steps.items()}
        seconds[part] = interleaved(runs, repeats, clock_of(device), tick)
    return {"head": head, "repeats": repeats, "loss": losses[OURS], "seconds": seconds, "peak extra bytes": {}}


def memory(variant: str, head: str, part: str, quick: bool, device: str = "cpu") -> int:
    """Peak bytes of one step above model, reference and optimizer; on the CPU, to be run in a fresh process."""
    step = make_step(variant, head, part, quick, device)
    step()  # gradients of the parameters are there, as in every step but the first
    return peak_extra_bytes(step, device)


if __name__ == "__main__":
    variant, head, part, quick, device = sys.argv[1:]
    print(memory(variant, head, part, quick == "True", device))
