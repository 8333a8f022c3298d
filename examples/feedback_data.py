"""Binary feedback: from a JSONL file to batches of token ids, each with the mismatched pairs of its KL estimate."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

IGNORE = -100  # the label of a token that is not scored
SHIPPED = Path(__file__).parent / "feedback.jsonl"  # 168 rows that like answers which come to the point


class FeedbackError(ValueError):
    """The feedback cannot be used; the message is one line that names the file and, where there is one, the row."""


@dataclass(frozen=True)
class Feedback:
    prompt: str
    completion: str
    desirable: bool  # thumbs up
    source: str  # "file, row n"


@dataclass(frozen=True)
class Completions:
    """B prompts with one completion each, padded on the right to T tokens."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T), 0 on padding
    labels: Tensor  # (B, T), the token where it is scored, -100 on prompt and padding


@dataclass(frozen=True)
class Batch:
    own: Completions  # B rows of feedback
    mismatched: Completions  # K of their prompts, each with the completion of another row
    desirable: Tensor  # (B,) bool


# Rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def load_feedback(path: str | Path) -> list[Feedback]:
    """Reads rows of `{"prompt": str, "completion": str, "label": true or false}`, one a line; blank lines are skipped.

    Raises:
        FeedbackError: no such file, a row that is not as above, or a class without a row.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise FeedbackError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})") from None
    rows = [parse_row(line, f"{path}, row {number}") for number, line in enumerate(lines, 1) if line.strip()]
    for desirable, name in ((True, "desirable"), (False, "undesirable")):
        if all(row.desirable != desirable for row in rows):
            raise FeedbackError(f'{path}: no {name} row ("label": {json.dumps(desirable)}); KTO needs both classes')
    return rows


def parse_row(line: str, source: str) -> Feedback:
    """One line of the file; `source` names it in the error."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise FeedbackError(f"{source}: not JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(row, dict):
        raise FeedbackError(f"{source}: expected a JSON object, got {type(row).__name__}")
    for key in ("prompt", "completion", "label"):
        if key not in row:
            raise FeedbackError(f'{source}: "{key}" is missing')
    for key in ("prompt", "completion"):
        if not isinstance(row[key], str) or not row[key].strip():
            raise FeedbackError(f'{source}: "{key}" must be a string with text, got {json.dumps(row[key])[:60]}')
    if not isinstance(row["label"], bool):
        raise FeedbackError(f'{source}: "label" must be true or false, got {json.dumps(row["label"])[:60]}')
    return Feedback(row["prompt"], row["completion"], row["label"], source)


def class_weights(desirable: Sequence[bool], ratio: float = 4 / 3) -> tuple[float, float]:
    """(λ_D, λ_U): the paper wants `λ_D·n_D / (λ_U·n_U)` in [1, 3/2]; the rarer class is raised, no weight is below 1."""
    count_d = sum(desirable)
    balance = ratio * (len(desirable) - count_d) / count_d  # λ_D / λ_U
    return (balance, 1.0) if balance > 1 else (1.0, 1 / balance)


# Batches ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def stratified(rows: Sequence[Feedback], batch_size: int) -> list[list[Feedback]]:
    """Splits the rows into batches of nearly equal size, at least 2 rows each.

    Both classes are spread evenly over the order, so that a batch holds its share of each; within a class the rows go
    by length, so that little of a batch is padding.
    """
    order = []
    for desirable in (True, False):
        group = sorted((row for row in rows if row.desirable == desirable), key=lambda row: len(row.completion))
        order += [((i + 0.5) / len(group), row) for i, row in enumerate(group)]
    ordered = [row for _, row in sorted(order, key=lambda item: item[0])]
    count = max(1, min(math.ceil(len(rows) / batch_size), len(rows) // 2))
    edges = [len(rows) * i // count for i in range(count + 1)]
    return [ordered[start:end] for start, end in pairwise(edges)]


def mismatched_pairs(rows: Sequence[Feedback]) -> list[tuple[Feedback, Feedback]]:
    """Pairs each row's prompt with the completion of the row before it (the first row's with the last's completion).

    A pair of rows with the same prompt would be no mismatch, and is left out.

    Raises:
        FeedbackError: no pair is left, as in a batch of one row.
    """
    pairs = [(row, rows[i - 1]) for i, row in enumerate(rows) if row.prompt != rows[i - 1].prompt]
    if not pairs:
        raise FeedbackError(f"{rows[0].source}: its batch has no other prompt, which the KL estimate needs")
    return pairs


def encode(prompt: Feedback, completion: Feedback, tokenizer, max_length: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels, (T,) each: the prompt in the chat template, the completion, the end-of-turn token.

    The completion and its end are scored. Tokens beyond `max_length` are cut off.
    """
    chat = [{"role": "user", "content": prompt.prompt}]
    start = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = [*tokenizer(completion.completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    if len(start) >= max_length:
        raise FeedbackError(f"{prompt.source}: the prompt alone has {len(start)} tokens, the limit is {max_length}")
    labels = [IGNORE] * len(start) + answer
    return torch.tensor((start + answer)[:max_length]), torch.tensor(labels[:max_length])


def pad(encoded: Sequence[tuple[Tensor, Tensor]], pad_id: int, device: str | torch.device) -> Completions:
    """Stacks (T_i,) ids and labels, padded on the right to the longest."""
    ids, labels = zip(*encoded)
    stack = torch.nn.utils.rnn.pad_sequence
    return Completions(
        input_ids=stack(ids, batch_first=True, padding_value=pad_id).to(device),
        attention_mask=stack([torch.ones_like(x) for x in ids], batch_first=True).to(device),
        labels=stack(labels, batch_first=True, padding_value=IGNORE).to(device),
    )


def collate(rows: Sequence[Feedback], tokenizer, max_length: int = 512, device: str | torch.device = "cpu") -> Batch:
    """The rows as one batch."""
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    own = [encode(row, row, tokenizer, max_length) for row in rows]
    mismatched = [encode(*pair, tokenizer, max_length) for pair in mismatched_pairs(rows)]
    desirable = torch.tensor([row.desirable for row in rows], device=device)
    return Batch(pad(own, pad_id, device), pad(mismatched, pad_id, device), desirable)


def make_batches(
    rows: Sequence[Feedback], tokenizer, batch_size: int = 8, max_length: int = 512, device: str | torch.device = "cpu"
) -> list[Batch]:
    """The rows as batches, the same whenever they are made: what the reference says of them is computed once."""
    return [collate(group, tokenizer, max_length, device) for group in stratified(rows, batch_size)]


def conversations(rows: Sequence[Feedback]) -> list[dict]:
    """The rows as TRL takes them; it applies the chat template and makes the mismatched pairs itself."""
    return [
        {
            "prompt": [{"role": "user", "content": row.prompt}],
            "completion": [{"role": "assistant", "content": row.completion}],
            "label": row.desirable,
        }
        for row in rows
    ]
