"""`python -m benchmarks step`: a whole optimizer step of a real model under TRL's KTOTrainer and under ours, and the part
of it behind the hidden states alone.

Both trainers see the same model, reference and batch of feedback. The loss part is the same training step with the
backbone replaced by fixed hidden states: what is left is scoring policy, reference and KL, the metrics, and the backward
to hidden states and head. `parts` says where the time of the whole step goes.

bf16 is mixed precision, as trainers know it: parameters in fp32 under autocast. The gate: both losses agree in fp32 with a
reference that is not the policy, and in the dtype of the run.
"""

from __future__ import annotations

import argparse
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
from dataclasses import asdict, dataclass, replace

import torch

from .benchmark import Benchmark
from .environment import ROOT
from .gate import DIFFERS
from .measure import Timed, clock_of, in_fresh_process, interleaved, peak_extra_bytes, quartiles
from .session import Session

TRL, OURS = "trl.KTOTrainer", "FusedKTOTrainer"
TRAINED, LORA = "trained", "LoRA"
sys.path.insert(0, str(ROOT / "examples"))  # the model and its data

STEP, LOSS = "step", "loss part"
BATCH = 4
REPEATS = 5
DTYPES = ("fp32", "bf16")
DTYPES_BY_DEFAULT = {"cpu": DTYPES, "cuda": ("bf16",)}
MODEL = "SmolLM2-135M-Instruct"
AGREE = 1e-5  # relative, of the losses in fp32


@dataclass(frozen=True)
class Setup:
    """The model that is trained, and how."""

    head: str  # TRAINED or LORA
    dtype: str = "fp32"
    device: str = "cpu"
    model: str | None = None  # a folder, a GGUF file or a hub name; None: the one of the examples
    batch: int = BATCH  # rows of feedback
    quick: bool = False  # a tiny model of random weights in its place
    apart: bool = False  # the reference's head is another than the policy's, so that the loss is not 1/2


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
        """The part that has begun last is over; `part` takes its place."""
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
def model_and_tokenizer(name: str | None, quick: bool):
    from smollm2 import load_model

    return load_model(name, tiny=quick)


def make_step(variant: str, part: str, setup: Setup, parts: Parts | None = None) -> Callable[[], torch.Tensor]:
    """One training step on the same batch every time."""
    import trl
    from datasets import Dataset, disable_progress_bars
    from feedback_data import SHIPPED, conversations, load_feedback

    from kto_kernels.integrations.trl import FusedKTOTrainer

    disable_progress_bars()
    model, tokenizer = model_and_tokenizer(setup.model, setup.quick)
    rows = list(itertools.islice(itertools.cycle(load_feedback(SHIPPED)), 2 * setup.batch))
    peft_config = None
    if setup.head == LORA:
        from peft import LoraConfig

        peft_config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = copy.deepcopy(model).to(setup.device)
    ref_model = None if setup.head == LORA else copy.deepcopy(model)
    if setup.apart and ref_model is not None:
        head = ref_model.get_output_embeddings().weight.data
        torch.manual_seed(0)
        head.add_(torch.randn_like(head), alpha=0.1 * head.std().item())
    with tempfile.TemporaryDirectory() as folder:
        trainer = (FusedKTOTrainer if variant == OURS else trl.KTOTrainer)(
            model,
            ref_model=ref_model,
            args=trl.KTOConfig(
                output_dir=folder,
                per_device_train_batch_size=setup.batch,
                learning_rate=1e-6,
                report_to=[],
                bf16=setup.dtype == "bf16",
                gradient_checkpointing=False,
                use_cpu=setup.device == "cpu",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(conversations(rows)),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
    # train(), whose loop is not used here, does this first.
    trainer.model = trainer.accelerator.prepare_model(trainer.model)
    trainer.current_gradient_accumulation_steps = 1
    batch = next(iter(trainer.get_train_dataloader()))
    if part == LOSS:
        policy = trainer.model.get_base_model() if setup.head == LORA else trainer.model
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


def gated(losses: dict[str, float], exact: dict[str, float], setup: Setup) -> None:
    """Stops the run where the trainers' losses are not alike: in fp32 (`exact`), or in the dtype of the run."""
    for found, differs in ((exact, AGREE), (losses, AGREE if setup.dtype == "fp32" else DIFFERS)):
        if not abs(found[OURS] - found[TRL]) <= differs * abs(found[TRL]):
            raise SystemExit(f"gate: {setup.head}, {setup.dtype}: losses {losses}, in fp32 {exact}; nothing was timed")


def run(setup: Setup, repeats: int, tick: Callable) -> dict:
    seconds, losses = {}, {}
    parts = {variant: Parts(setup.device) for variant in (TRL, OURS)}
    taken: dict[str, list[dict]] = {variant: [] for variant in parts}
    for part in (STEP, LOSS):
        steps = {
            variant: make_step(variant, part, setup, parts[variant] if part == STEP else None) for variant in parts
        }
        losses = {variant: step().item() for variant, step in steps.items()}
        of_gate = replace(setup, dtype="fp32", apart=True)
        exact = {variant: make_step(variant, part, of_gate)().item() for variant in parts}
        gated(losses, exact, setup)

        def before(variant: str, part=part) -> None:
            if part == STEP:  # what the last round left behind
                taken[variant].append(parts[variant].seconds())

        runs = {
            variant: Timed(lambda variant=variant: before(variant), lambda _, step=step: step())
            for variant, step in steps.items()
        }
        seconds[part] = interleaved(runs, repeats, clock_of(setup.device), tick)
        if part == STEP:
            for variant in parts:
                before(variant)
    of_parts = {}
    for variant, rounds in taken.items():
        rounds = rounds[-repeats:]  # without the gate's and the warm-up
        names = list(dict.fromkeys(name for one in rounds for name in one))
        of_parts[variant] = {name: quartiles([one.get(name, 0.0) for one in rounds]) for name in names}
    model = setup.model or ("a tiny model" if setup.quick else MODEL)
    what = {"model": model, "B": setup.batch, "dtype": setup.dtype, "head": setup.head}
    case = what | {"repeats": repeats, "loss": losses[OURS], "seconds": seconds, "parts": of_parts}
    return case | {"peak extra bytes": {}}


def memory(variant: str, part: str, setup: Setup) -> int:
    """Peak bytes of one step above model, reference and optimizer; on the CPU in a fresh process."""
    call = {"variant": variant, "part": part, "setup": asdict(setup)}
    return in_fresh_process("benchmarks.step", call) if setup.device == "cpu" else _memory(**call)


def _memory(variant: str, part: str, setup: dict) -> int:
    step = make_step(variant, part, Setup(**setup))
    step()  # gradients of the parameters are there, as in every step but the first
    return peak_extra_bytes(step, setup["device"])


# The command ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", help=f"a transformers folder, a GGUF file or a hub name (default: {MODEL})")
    command.add_argument("--batch", type=int, default=BATCH, help="rows of feedback (default: %(default)s)")
    command.add_argument("--repeats", type=int, default=REPEATS, help="default: %(default)s")


def measure(session: Session) -> None:
    args = session.args
    repeats = min(args.repeats, 2) if args.quick else args.repeats
    dtypes = args.dtype or DTYPES_BY_DEFAULT[args.device]
    for dtype, head in itertools.product(dtypes, (LORA,) if args.quick else (TRAINED, LORA)):
        setup = Setup(head, dtype, args.device, args.model, args.batch, args.quick)
        tick = session.task(f"{head} head, {dtype}", 2 * (repeats + 1) + 4)
        case = run(setup, repeats, tick)
        for part in (STEP, LOSS):
            case["peak extra bytes"][part] = {}
            for variant in (TRL, OURS):
                case["peak extra bytes"][part][variant] = memory(variant, part, setup)
                tick()
        session.add(case)


BENCHMARK = Benchmark(
    "step",
    "an optimizer step of a real model under TRL's KTOTrainer and under ours (CPU 8 min, GPU 1 min)",
    measure,
    dtypes=DTYPES,
    default_dtypes="both on a CPU, bf16, which is autocast, on a GPU",
    options=options,
)


if __name__ == "__main__":
    print(json.dumps(_memory(**json.loads(sys.argv[1]))))
