"""`patch_trl_kto()` and `selective_log_softmax` under ms-swift 3: ten optimizer steps of its KTO trainer, with and
without."""

import pytest
import torch
from datasets import Dataset
from swift.llm import get_model_tokenizer, get_template
from swift.trainers import KTOConfig, KTOTrainer
from swift.trainers.rlhf_trainer import rlhf_mixin

from kto_kernels.integrations import logps
from kto_kernels.integrations.logps import patch_trl_kto
from tests.support.trl_harness import MODELS, WORDS, assert_same_training, make_tokenizer

torch.set_num_threads(1)  # tiny models


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    MODELS["llama"]().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


def tokenized(count: int) -> Dataset:
    """Rows as ms-swift's template encodes them: `rejected_*` is the mismatched completion."""
    generator = torch.Generator().manual_seed(5)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return (4 + torch.randint(len(WORDS), (length,), generator=generator)).tolist()

    prompts, completions = ([tokens(*sizes) for _ in range(count)] for sizes in ((2, 6), (1, 9)))
    found = []
    for i, prompt in enumerate(prompts):
        row = {"label": i % 3 != 1}
        for prefix, completion in (("chosen_", completions[i]), ("rejected_", completions[i - 1])):
            row[f"{prefix}input_ids"] = prompt + completion
            row[f"{prefix}labels"] = [-100] * len(prompt) + completion
        found.append(row)
    return Dataset.from_list(found)


def train(saved, path, **config):
    options = {"torch_dtype": torch.float32, "device_map": "cpu", "model_type": "llama", "attn_impl": "sdpa"}
    (model, tokenizer), (reference, _) = (get_model_tokenizer(saved, **options) for _ in range(2))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.02)
    template = get_template("dummy", tokenizer, padding_free=config.pop("padding_free", False))
    template.set_mode("kto")
    settings = {
        "loss_type": "kto",
        "max_steps": 10,
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "remove_unused_columns": False,
        "check_model": False,
        "gradient_checkpointing": False,
    } | config
    trainer = KTOTrainer(
        model=model,
        ref_model=reference,
        args=KTOConfig(output_dir=str(path), **settings),
        template=template,
        data_collator=template.data_collator,
        train_dataset=tokenized(40),
        eval_dataset=tokenized(8),
    )
    trainer.train()
    evaluation = trainer.evaluate()
    history = [entry for entry in trainer.state.log_history if "loss" in entry] + [evaluation]
    progress = ("step", "percentage", "time", "memory", "speed")  # what ms-swift logs of it, in words and numbers
    history = [{k: v for k, v in entry.items() if not any(word in k for word in progress)} for entry in history]
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}, history


OPTIONS = {
    "plain": {},
    "apo": {"loss_type": "apo_zero_unpaired"},
    "weights and beta": {"desirable_weight": 1.3, "undesirable_weight": 0.6, "beta": 0.4},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_ten_steps(case, saved, tmp_path, monkeypatch):
    theirs = train(saved, tmp_path, **OPTIONS[case])
    calls = []
    for name in ("token_logps", "kto_loss_from_logps"):
        ours = getattr(logps, name)
        monkeypatch.setattr(
            logps, name, lambda *args, name=name, ours=ours, **kw: calls.append(name) or ours(*args, **kw)
        )
    monkeypatch.setattr(rlhf_mixin, "selective_log_softmax", logps.selective_log_softmax)
    with patch_trl_kto():
        mine = train(saved, tmp_path, **OPTIONS[case])
    # Ten of training and two of evaluation; policy and reference score completions, and mismatched ones for the KL.
    assert calls.count("kto_loss_from_logps") == 12
    assert calls.count("token_logps") == (2 if case == "apo" else 4) * 12
    assert_same_training(theirs, mine, metrics_rtol=1e-4)
    assert {"kl", "rewards/chosen", "logps/rejected"} <= set().union(*mine[1])
