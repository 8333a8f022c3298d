"""`python -m benchmarks step`: a whole optimizer step of a real model under TRL's KTOTrainer and under ours, and the part
of it behind the hidden states alone.

Both trainers see the same model, reference and batch of feedback. The loss part is the same training step with the
backbone replaced by fixed hidden states: what is left is scoring policy, reference and KL, the metrics, and the backward
to hidden states and head. `parts` says where the time of the whole step goes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator

import torch

from .environment import ROOT
from .measure import Timed, clock_of, in_fresh_process, interleaved, peak_extra_bytes, quartiles

TRL, OURS = "trl.KTOTrainer", "FusedKTOTrainer"
TRAINED, LORA = "trained", "LoRA"
sys.path.insert(0, str(ROOT / "examples"))  # the model and its data

STEP, LOSS = "step", "loss part"
BATCH = 4
REPEATS = 5
DEVICES = ("cpu", "cuda")


SCORES, POLICY, OTHERS = "loss part, forward", "policy, backbone forward", "reference and KL, backbone forward"
HEAD_BACKWARD, BACKWARD, OPTIMIZER = "loss part, backward", "policy, backbone backward", "optimizer"


class Parts:
    """Where the time of a step goes: at any moment to one part, the innermost that has begun. On a GPU events say it,
    which nothing waits for."""

    def __init__(self, device: str):
        self.device = device
        self.begun: list[str] = []
        self.marks: list[tuple[str | None, object]] = []

    def _mark(self) -> None:
        if self.device == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((self.begun[-1] if self.begun else None, now))

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self.begun.append(part)
        self._mark()
        try:
            yield
        finally:
            self.begun.pop()
            self._mark()

    def go_on_with(self, part: str) -> None:
        """What has begun last is over; `part` takes its place."""
        self.begun[-1] = part
        self._mark()

    def wrap(self, part: Callable[[], str], function: Callable) -> Callable:
        @functools.wraps(function)
        def timed(*args, **kwargs):
            with self(part()):
                return function(*args, **kwargs)

        return timed

    def seconds(self) -> dict[str, float]:
        """Part → seconds since the last call of this."""
        found: Counter[str] = Counter()
        if self.device == "cuda":
            torch.cuda.synchronize()
        for (part, start), (_, end) in itertools.pairwise(self.marks):
            if part is not None:
                found[part] += start.elapsed_time(end) / 1e3 if self.device == "cuda" else end - start
        self.marks.clear()
        return dict(found)


def watch(trainer, parts: Parts) -> None:
    """Tells `parts` when the backbone's forward begins, when the backward does, and when it reaches the backbone."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    policy = policy.get_base_model() if hasattr(policy, "peft_config") else policy

    def tell(states: torch.Tensor) -> None:
        states.register_hook(lambda _: parts.go_on_with(BACKWARD))

    for scored in filter(None, (policy, trainer.ref_model)):
        backbone = scored.model
        theirs = parts.wrap(lambda: POLICY if torch.is_grad_enabled() else OTHERS, backbone.forward)

        def forward(*args, theirs=theirs, **kwargs):
            outputs = theirs(*args, **kwargs)
            if outputs.last_hidden_state.requires_grad:
                tell(outputs.last_hidden_state)
            return outputs

        backbone.forward = forward
    trainer.compute_loss = parts.wrap(lambda: SCORES, trainer.compute_loss)
    trainer.accelerator.backward = parts.wrap(lambda: HEAD_BACKWARD, trainer.accelerator.backward)


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


def make_step(
    variant: str, head: str, part: str, quick: bool, device: str = "cpu", parts: Parts | None = None
) -> Callable[[], torch.Tensor]:
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
    if parts is not None:
        watch(trainer, parts)
    optimizer = torch.optim.SGD([p for p in trainer.model.parameters() if p.requires_grad] or [torch.zeros(())], 1e-6)

    def step() -> torch.Tensor:
        loss = trainer.training_step(trainer.model, dict(batch))
        with contextlib.nullcontext() if parts is None else parts(OPTIMIZER):
            if part == STEP:
                optimizer.step()
            optimizer.zero_grad()
        trainer._metrics["train"].clear()
        return loss

    return step


def run(head: str, repeats: int, quick: bool, tick: Callable, device: str = "cpu") -> dict:
    seconds, losses = {}, {}
    parts = {variant: Parts(device) for variant in (TRL, OURS)}
    taken: dict[str, list[dict]] = {variant: [] for variant in parts}
    for part in (STEP, LOSS):
        steps = {
            variant: make_step(variant, head, part, quick, device, parts[variant] if part == STEP else None)
            for variant in parts
        }
        losses = {variant: step().item() for variant, step in steps.items()}
        if not abs(losses[OURS] - losses[TRL]) <= 1e-5 * abs(losses[TRL]):
            raise SystemExit(f"gate: {head}, {part}: losses {losses}; nothing was timed")

        def before(variant: str, part=part) -> None:
            if part == STEP:  # what the last round left behind
                taken[variant].append(parts[variant].seconds())

        runs = {
            variant: Timed(lambda variant=variant: before(variant), lambda _, step=step: step())
            for variant, step in steps.items()
        }
        seconds[part] = interleaved(runs, repeats, clock_of(device), tick)
        if part == STEP:
            for variant in parts:
                before(variant)
    of_parts = {}
    for variant, rounds in taken.items():
        rounds = rounds[-repeats:]  # without the gate's and the warm-up
        names = list(dict.fromkeys(name for one in rounds for name in one))
        of_parts[variant] = {name: quartiles([one.get(name, 0.0) for one in rounds]) for name in names}
    case = {"head": head, "repeats": repeats, "loss": losses[OURS], "seconds": seconds, "parts": of_parts}
    return case | {"peak extra bytes": {}}


def memory(variant: str, head: str, part: str, quick: bool, device: str = "cpu") -> int:
    """Peak bytes of one step above model, reference and optimizer; on the CPU in a fresh process."""
    call = {"variant": variant, "head": head, "part": part, "quick": quick, "device": device}
    return in_fresh_process("benchmarks.step", call) if device == "cpu" else _memory(**call)


def _memory(variant: str, head: str, part: str, quick: bool, device: str) -> int:
    step = make_step(variant, head, part, quick, device)
    step()  # gradients of the parameters are there, as in every step but the first
    return peak_extra_bytes(step, device)


if __name__ == "__main__":
    print(json.dumps(_memory(**json.loads(sys.argv[1]))))
