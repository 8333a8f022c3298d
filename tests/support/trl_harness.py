"""Tiny models, a tokenizer and data that trainers train on, and when two trainings are the same. Imported under other
versions of TRL too (tests/versions)."""

import math
from itertools import pairwise

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = [f"w{i}" for i in range(60)]
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
SIZE = {
    "vocab_size": len(WORDS) + len(SPECIAL),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "initializer_range": 0.3,  # logits that differ
}
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE)),
    "tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE, tie_word_embeddings=True)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZE)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SIZE, head_dim=8, final_logit_softcapping=5.0, attn_logit_softcapping=20.0)
    ),
    "cohere": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**SIZE, logit_scale=0.3)),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **SIZE, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.1
        )
    ),
}


def make_tokenizer():
    tokens = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    fast = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def rows(count: int, labels=None) -> Dataset:
    generator = torch.Generator().manual_seed(5)

    def text(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator))

    return Dataset.from_list(
        [
            {"prompt": text(2, 6), "completion": " " + text(1, 9), "label": bool(labels[i]) if labels else i % 3 != 1}
            for i in range(count)
        ]
    )


def pairs(count: int, labels=None, unprompted=False) -> Dataset:
    """Each row's completion as the chosen one, and the next row's as the rejected one. Every third pair has no prompt if
    `unprompted`."""
    texts = list(rows(count + 1))
    return Dataset.from_list(
        [
            {
                "prompt": "" if unprompted and i % 3 == 0 else own["prompt"],
                "chosen": own["completion"],
                "rejected": other["completion"],
            }
            for i, (own, other) in enumerate(pairwise(texts))
        ]
    )


def train(
    cls,
    make,
    tokenizer,
    tmp_path,
    *,
    steps=10,
    labels=None,
    rows=rows,
    make_args=trl.KTOConfig,
    ref=True,
    peft=None,
    head=None,
    compute_metrics=None,
    **config,
):
    """The parameters after the training, and what it logged."""
    torch.manual_seed(0)
    model = make()
    if head is not None:
        head(model)
    ref_model = None
    if ref:
        torch.manual_seed(1)
        ref_model = make()
        ref_model.load_state_dict(model.state_dict())
        with torch.no_grad():
            for parameter in ref_model.parameters():
                parameter.mul_(1.02)
    settings = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": steps,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "seed": 3,
        "max_length": 32,
        "disable_dropout": True,
        "optim": "sgd",  # no division by a second moment, which would blow rounding up
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "bf16": False,
    } | config
    trainer = cls(
        model,
        ref_model=ref_model,
        args=make_args(output_dir=str(tmp_path), **settings),
        train_dataset=rows(40, labels),
        eval_dataset=rows(8),
        processing_class=tokenizer,
        peft_config=peft,
        compute_metrics=compute_metrics,
    )
    trainer.train()
    evaluation = trainer.evaluate()
    history = [entry for entry in trainer.state.log_history if "loss" in entry] + [evaluation]
    return whole_parameters(trainer.model), history


def whole_parameters(model):
    """The parameters that FSDP2 shards are gathered."""

    def whole(parameter):
        return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter

    return {name: whole(parameter.detach()).clone() for name, parameter in model.named_parameters()}


def timeless(entry: dict) -> dict:
    return {k: v for k, v in entry.items() if not any(word in k for word in ("runtime", "per_second", "flos", "time"))}


def assert_same_training(theirs, mine, rtol=1e-5, atol=1e-6, metrics_rtol=1e-5, beta=1.0):
    """Args:
    metrics_rtol: More where a metric is a sum over whole logits, as older versions log it.
    beta: The trainer's, where it exceeds 1: a reward is beta times a difference of log-probabilities, rounding included.
    """
    (their_parameters, their_history), (my_parameters, my_history) = theirs, mine
    assert len(their_history) == len(my_history)
    for entry, own in zip(map(timeless, their_history), map(timeless, my_history)):
        assert set(entry) == set(own)
        for name, value in entry.items():
            # A row's sum of log-probabilities, some 50 nats, is taken in fp32: either trainer's is some 1e-5 away from
            # the sum in fp64 (test_rows_sums_are_as_near_to_fp64_as_trls), and so they differ by this.
            bound = 2e-5 * (beta if "rewards/" in name else 1.0)
            assert own[name] == pytest.approx(value, rel=metrics_rtol, abs=bound, nan_ok=True), name
    assert set(their_parameters) == set(my_parameters)
    moved = 0.0
    for name, parameter in their_parameters.items():
        torch.testing.assert_close(
            my_parameters[name], parameter, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
        moved += parameter.abs().sum().item()
    assert math.isfinite(moved)
