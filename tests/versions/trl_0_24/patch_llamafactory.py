"""`patch_llamafactory()` and `patch_trl_kto()` under LLaMA-Factory 0.9.5: ten optimizer steps of its KTO trainer, with
and without."""

import contextlib
import importlib.machinery
import sys
import types

import pytest
import torch
import transformers
from datasets import Dataset

from kto_kernels.integrations import logps
from kto_kernels.integrations.logps import patch_llamafactory, patch_trl_kto
from tests.support.trl_harness import MODELS, WORDS, assert_same_training, make_tokenizer

torch.set_num_threads(1)  # tiny models

# LLaMA-Factory imports it to read audio; its wheel needs CUDA's libraries.
torchaudio = sys.modules["torchaudio"] = types.ModuleType("torchaudio")
torchaudio.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)

from llamafactory.data import KTODataCollatorWithPadding, get_template_and_fix_tokenizer  # noqa: E402
from llamafactory.hparams import DataArguments, FinetuningArguments  # noqa: E402
from llamafactory.train.kto.trainer import CustomKTOTrainer  # noqa: E402


def tokenized(count: int, labels=None) -> Dataset:
    """Rows as LLaMA-Factory's processor leaves them: a mismatched completion to each prompt."""
    generator = torch.Generator().manual_seed(5)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return (4 + torch.randint(len(WORDS), (length,), generator=generator)).tolist()

    prompts, completions = ([tokens(*sizes) for _ in range(count)] for sizes in ((2, 6), (1, 9)))
    found = []
    for i, prompt in enumerate(prompts):
        row = {"kto_tags": labels[i] if labels else i % 3 != 1, "images": None, "videos": None, "audios": None}
        for prefix, completion in (("", completions[i]), ("kl_", completions[i - 1])):
            ids = prompt + completion
            row[f"{prefix}input_ids"], row[f"{prefix}attention_mask"] = ids, [1] * len(ids)
            row[f"{prefix}labels"] = [-100] * len(prompt) + completion
        found.append(row)
    return Dataset.from_list(found)


def train(path, labels=None, accumulation=1, **finetuning):
    torch.manual_seed(0)
    model, reference = MODELS["llama"](), MODELS["llama"]()
    reference.load_state_dict({name: 1.02 * p for name, p in model.state_dict().items()})
    tokenizer = make_tokenizer()
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template="empty"))
    trainer = CustomKTOTrainer(
        model=model,
        ref_model=reference,
        finetuning_args=FinetuningArguments(stage="kto", finetuning_type="full", **finetuning),
        processor=None,
        tokenizer=tokenizer,
        data_collator=KTODataCollatorWithPadding(template=template, model=model, tokenizer=tokenizer),
        train_dataset=tokenized(40, labels),
        eval_dataset=tokenized(8),
        args=transformers.TrainingArguments(
            str(path),
            max_steps=10 // accumulation,
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            learning_rate=1e-2,
            optim="sgd",
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            remove_unused_columns=False,
        ),
    )
    trainer.train()
    evaluation = trainer.evaluate()
    history = [entry for entry in trainer.state.log_history if "loss" in entry] + [evaluation]
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}, history


OPTIONS = {
    "plain": {},
    "weights and beta": {"pref_beta": 0.4, "kto_chosen_weight": 1.3, "kto_rejected_weight": 0.6},
    "with the SFT loss": {"pref_ftx": 0.3},
    "accumulation": {"accumulation": 2},
    "one-sided batches": {"labels": [True] * 20 + [False] * 20, "disable_shuffling": True},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_ten_steps(case, tmp_path, monkeypatch):
    theirs = train(tmp_path, **OPTIONS[case])
    assert any(entry["kl"] > 0 for entry in theirs[1] if "kl" in entry)
    calls = []
    for name in ("token_logps", "kto_loss_from_logps"):
        ours = getattr(logps, name)
        monkeypatch.setattr(
            logps, name, lambda *args, name=name, ours=ours, **kw: calls.append(name) or ours(*args, **kw)
        )
    with contextlib.ExitStack() as patches:
        patches.enter_context(patch_llamafactory())
        patches.enter_context(patch_trl_kto())
        mine = train(tmp_path, **OPTIONS[case])
    # Ten of training and two of evaluation; each scores completions and mismatched ones, by policy and reference.
    assert calls.count("kto_loss_from_logps") == 12 and calls.count("token_logps") == 4 * 12
    assert_same_training(theirs, mine, metrics_rtol=1e-4)
    assert {"kl", "rewards/chosen", "logps/rejected"} <= set().union(*mine[1])
