"""The shapes that are measured: heads of real models, sweeps, and batches as KTO runs have them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .objective import KTO

SEQUENCES = 4


@dataclass(frozen=True)
class Shape:
    """A batch in front of a head. A third of the batch's tokens are prompts, which no label scores."""

    scored: int  # N, the tokens that a label scores
    hidden: int  # H; 0 where only logits matter
    vocab: int  # V
    model: str | None = None
    softcap: float | None = None
    sequences: int = SEQUENCES
    budget: int | None = None  # max_logits_bytes of ours
    sweep: str | None = None  # what is varied
    objective: str = KTO  # the loss, a name of OBJECTIVES

    @property
    def completion(self) -> int:
        """Scored tokens of each sequence."""
        return max(1, self.scored // self.sequences)

    @property
    def prompt(self) -> int:
        return self.completion // 2

    @property
    def tokens(self) -> int:
        """With the prompts."""
        return self.sequences * (self.prompt + self.completion)

    @property
    def key(self) -> dict:
        """How a results file names it."""
        found = {"N": self.sequences * self.completion, "H": self.hidden, "V": self.vocab, "tokens": self.tokens}
        return found | {"model": self.model, "softcap": self.softcap, "sweep": self.sweep}

    def __str__(self) -> str:
        sizes = f"N={self.scored}, " + (f"H={self.hidden}, " if self.hidden else "") + f"V={self.vocab}"
        return f"{self.model}: {sizes}" if self.model else sizes


# Name → (the models that have this head, H, V, the softcap of the logits), from their configurations.
MODELS = {
    "smollm2": ("SmolLM2-135M", 576, 49152, None),
    "qwen2.5-0.5b": ("Qwen2.5-0.5B", 896, 151936, None),
    "qwen2.5-7b": ("Qwen2.5-7B", 3584, 152064, None),
    "llama-3-8b": ("Llama-3-8B", 4096, 128256, None),
    "gemma-2-9b": ("Gemma-2-9B", 3584, 256000, 30.0),
    "mistral-7b": ("Mistral-7B, Mixtral-8x7B, GritLM", 4096, 32000, None),
}
ALIASES = {"mixtral-8x7b": "mistral-7b", "gritlm-8x7b": "mistral-7b"}
SWEEPS = {
    "sweep-n": ("N", "scored", (8, 32, 128, 256, 512, 1024, 2048, 4096, 8192)),
    "sweep-v": ("V", "vocab", (16384, 32768, 49152, 131072, 256000)),
    "sweep-h": ("H", "hidden", (256, 576, 1024, 2048, 4096)),
    "sweep-budget": ("budget", "budget", tuple(2**i * 2**20 for i in (4, 6, 8, 10))),
}
NAMES = (*MODELS, *ALIASES, *SWEEPS)


def of_model(name: str, scored: int) -> Shape:
    title, hidden, vocab, softcap = MODELS[ALIASES.get(name, name)]
    return Shape(scored, hidden, vocab, title, softcap)


def sweep(name: str, base: Shape, values: Iterable[int] | None = None) -> list[Shape]:
    """`base` with one of its sizes varied."""
    label, field, default = SWEEPS[name]
    return [replace(base, **{field: value}, sweep=label) for value in values or default]


def parse(text: str, base: Shape, scored: int) -> list[Shape]:
    """The shapes of a name, or of `N,H,V` (`N,V` where only logits matter). Models get `scored` tokens, sweeps vary
    `base`.

    Raises:
        ValueError: neither; the message names what is known.
    """
    if text in SWEEPS:
        return sweep(text, base)
    if text in NAMES:
        return [of_model(text, scored)]
    sizes = text.split(",")
    if len(sizes) in (2, 3) and all(size.isdecimal() and int(size) > 0 for size in sizes):
        n, *hidden, vocab = map(int, sizes)
        return [Shape(n, hidden[0] if hidden else 0, vocab)]
    raise ValueError(f"{text!r}: expected N,H,V, or one of: {', '.join(NAMES)}")


@dataclass(frozen=True)
class Job:
    """A shape and how thoroughly it is measured by default."""

    shape: Shape
    dtypes: tuple[str, ...]
    peers: tuple[str, ...] | None = None  # None: all of them
    repeats: int | None = None  # None: the benchmark's
    memory: bool = True
