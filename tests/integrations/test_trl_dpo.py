"""`FusedDPOTrainer` against TRL's own DPOTrainer: ten optimizer steps of tiny models, parameters and every logged metric
equal, for every loss type that it has. All else is refused by name."""

import copy
import functools

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")
pytest.importorskip("transformers")

import transformers
import trl
from datasets import Dataset

from kto_kernels.integrations import _trl_dpo, trl_scoring
from kto_kernels.integrations.trl import FusedDPOTrainer
from tests.support.trl_harness import MODELS, assert_same_training, make_tokenizer, pairs, train

FULL = functools.partial(FusedDPOTrainer, verify="full")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def run(cls, make, tokenizer, tmp_path, **options):
    return train(cls, make, tokenizer, tmp_path, **({"rows": pairs, "make_args": trl.DPOConfig} | options))


def both(make, tokenizer, tmp_path, mine=FusedDPOTrainer, **options):
    runs = [run(cls, make, tokenizer, tmp_path, **copy.deepcopy(options)) for cls in (trl.DPOTrainer, mine)]
    assert_same_training(*runs)
    torch.manual_seed(0)
    start = dict(make().named_parameters())
    if not options.get("peft"):  # the training did something
        assert any(not torch.allclose(p, start[name], atol=1e-4) for name, p in runs[1][0].items() if name in start)
    return runs


# `label_smoothing` stands beside losses that TRL reads it for, and beside one that TRL does not.
LOSSES = {
    "sigmoid": {"label_smoothing": 0.2},
    "sigmoid_norm": {"beta": 2.0},
    "hinge": {},
    "ipo": {},
    "robust": {"label_smoothing": 0.2},
    "bco_pair": {},
    "nca_pair": {"beta": 0.3},
    "sppo_hard": {},
    "apo_zero": {"beta": 0.3},
    "apo_down": {"beta": 0.3},
    "sft": {},
}
SUMS = {
    "sigmoid with sft": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.5]},
    "twice": {"loss_type": ["hinge", "sft", "robust", "sft"], "label_smoothing": 0.1},
    "signs": {"loss_type": ["ipo", "apo_zero"], "loss_weights": [0.5, -0.3], "beta": 0.4},
    "one, weighted": {"loss_type": ["sigmoid"], "loss_weights": [0.4]},
}


def test_every_loss_of_the_trainer_is_here():
    assert LOSSES.keys() == _trl_dpo._LOSSES.keys() | {"sft"}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_train_as_under_trl(name, tokenizer, tmp_path):
    _, (_, history) = both(MODELS["llama"], tokenizer, tmp_path, mine=FULL, loss_type=name, **LOSSES[name])
    logged = set().union(*history)
    assert {"entropy", "logits/chosen", "logps/rejected", "rewards/margins", "mean_token_accuracy"} <= logged


@pytest.mark.parametrize("case", SUMS)
def test_weighted_sums_of_losses_train_as_under_trl(case, tokenizer, tmp_path):
    both(MODELS["llama"], tokenizer, tmp_path, mine=FULL, **SUMS[case])


@pytest.mark.wide("test_losses_train_as_under_trl")
@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama"])
def test_models_train_as_under_trl(name, tokenizer, tmp_path):
    _, (_, history) = both(MODELS[name], tokenizer, tmp_path)
    assert ("aux_loss" in set().union(*history)) == (name == "mixtral")


def lora(**options):
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "lora_dropout": 0.0}
    return peft.LoraConfig(**(settings | options))


def prompt_tuning():
    peft = pytest.importorskip("peft")
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


OPTIONS = {
    "precomputed reference": {"precompute_ref_log_probs": True},
    "the start as a precomputed reference": {"precompute_ref_log_probs": True, "ref": False},
    "moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 3},
    "accumulation": {"gradient_accumulation_steps": 2, "steps": 5},
    "checkpointing": {"gradient_checkpointing": True},
    "adam, clipped": {"optim": "adamw_torch", "max_grad_norm": 0.1, "learning_rate": 1e-3},
    "frozen head": {"head": lambda model: model.lm_head.requires_grad_(False)},
    "LoRA": {"ref": False, "peft": lora},
    "LoRA and precomputed": {"ref": False, "peft": lora, "precompute_ref_log_probs": True},
    "LoRA with a trained head": {"ref": False, "peft": lambda: lora(modules_to_save=["lm_head"]), "loss_type": "ipo"},
    "virtual tokens": {"ref": False, "peft": prompt_tuning, "learning_rate": 1.0},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_train_as_under_trl(case, tokenizer, tmp_path):
    options = dict(OPTIONS[case])
    if "peft" in options:
        options["peft"] = options["peft"]()
    both(MODELS["llama"], tokenizer, tmp_path, **options)


def test_the_reference_in_an_adapter_of_its_own(tokenizer, tmp_path):
    """TRL keeps the adapter that a PEFT model comes with as one called ref."""
    peft = pytest.importorskip("peft")
    (parameters, _), _ = both(lambda: peft.get_peft_model(MODELS["llama"](), lora()), tokenizer, tmp_path, ref=False)
    assert any(".ref." in name for name in parameters)


@pytest.mark.parametrize("loss_type", ["ipo", "sigmoid_norm", "sigmoid"])
def test_completions_without_a_prompt_train_as_under_trl(loss_type, tokenizer, tmp_path):
    """Nothing predicts the first token, which counts in TRL's length."""
    options = {"beta": 2.0, "rows": functools.partial(pairs, unprompted=True)}
    both(MODELS["llama"], tokenizer, tmp_path, mine=FULL, loss_type=loss_type, **options)


def test_a_beta_that_changes_while_training(tokenizer, tmp_path):
    """As TRL's trainer, ours reads its attributes in every step."""

    class Scheduled(transformers.TrainerCallback):
        def __init__(self, trainer):
            self.trainer = trainer

        def on_step_end(self, *args, **kwargs):
            self.trainer.beta *= 1.5

    def scheduled(cls):
        def make(*args, **kwargs):
            made = cls(*args, **kwargs)
            made.add_callback(Scheduled(made))
            return made

        return make

    runs = [
        run(scheduled(cls), MODELS["llama"], tokenizer, tmp_path, steps=4) for cls in (trl.DPOTrainer, FusedDPOTrainer)
    ]
    assert_same_training(*runs)


def test_compute_metrics_gets_trls_logits(tokenizer, tmp_path):
    def compute_metrics(prediction):
        logits, ids = prediction.predictions, prediction.label_ids
        return {"agree": float((logits[:, :-1].argmax(-1) == ids[:, 1:]).mean()), "spread": float(logits.std())}

    _, (_, history) = both(MODELS["llama"], tokenizer, tmp_path, steps=2, compute_metrics=compute_metrics)
    assert {"eval_agree", "eval_spread"} <= set(history[-1])


def test_a_loss_of_ours_that_is_not_trls_is_an_error(tokenizer, tmp_path, monkeypatch):
    """TRL's formula makes the value that is logged, and ours the gradient: the first batch compares the two. Without the
    check the value of the first step is right all the same, and the parameters are wrong."""
    arguments = (MODELS["llama"], tokenizer, tmp_path)
    plain = run(FusedDPOTrainer, *arguments, steps=1)
    monkeypatch.setitem(_trl_dpo._LOSSES, "sigmoid", _trl_dpo._LOSSES["hinge"])
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM: the loss of the first batch is"):
        run(FusedDPOTrainer, *arguments, steps=1)
    other = run(functools.partial(FusedDPOTrainer, verify=False), *arguments, steps=1)
    assert other[1][0]["loss"] == plain[1][0]["loss"]
    with pytest.raises(AssertionError):
        assert_same_training(plain, other)


def test_full_compares_with_the_loss_that_trl_computes_by_itself(tokenizer, tmp_path, monkeypatch):
    """A reference of ours that is wrong: both formulas are given it."""
    monkeypatch.setattr(FusedDPOTrainer, "_sequence_logps", lambda self, model, batch, labels: torch.zeros(len(labels)))
    arguments = (MODELS["gemma2"], tokenizer, tmp_path)
    run(FusedDPOTrainer, *arguments, steps=1)
    with pytest.raises(RuntimeError, match=r"the loss of the first batch is .* and .* as the trainer that it replaces"):
        run(FULL, *arguments, steps=1)


@pytest.mark.parametrize("precomputed", [False, True], ids=["", "precomputed"])
def test_nothing_is_scored_by_trls_function(precomputed, tokenizer, tmp_path, monkeypatch):
    """Neither policy nor reference, also where TRL's formula is differentiated."""
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", None)
    options = {"rows": functools.partial(pairs, unprompted=True), "precompute_ref_log_probs": precomputed, "steps": 2}
    run(FusedDPOTrainer, MODELS["qwen2"], tokenizer, tmp_path, loss_type="ipo", **options)


@pytest.mark.parametrize("precomputed", [False, True], ids=["", "precomputed"])
@pytest.mark.parametrize("policy", [torch.bfloat16, torch.float32], ids=["bf16 policy", "fp32 policy"])
def test_a_reference_of_another_dtype_is_scored_in_the_policys(policy, precomputed, tokenizer, tmp_path, monkeypatch):
    other = torch.float32 if policy == torch.bfloat16 else torch.bfloat16
    seen, function = [], trl_scoring.ChunkedLogProbFunction
    apply = function.apply
    monkeypatch.setattr(
        function, "apply", staticmethod(lambda h, w, *args: seen.append((h.dtype, w.dtype)) or apply(h, w, *args))
    )
    dtypes = iter((policy, other))  # of the model, then of the reference
    options = {"precompute_ref_log_probs": precomputed, "steps": 1}
    # Other rows for either: TRL caches what it has precomputed for the same rows and reference.
    few = functools.partial(pairs, unprompted=policy == torch.bfloat16)
    unverified = functools.partial(FusedDPOTrainer, verify=False)
    run(unverified, lambda: MODELS["llama"]().to(next(dtypes)), tokenizer, tmp_path, rows=few, **options)
    scored = [hidden for hidden, weight in seen if weight == other]
    # 40 rows and 8 of evaluation; or one step and two of evaluation.
    assert scored == [policy] * (12 if precomputed else 3)


# Refused ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


REFUSED = {
    "exo_pair": ({"loss_type": "exo_pair", "label_smoothing": 0.1}, "loss_type: expected one of .* got 'exo_pair'"),
    "discopop": ({"loss_type": "discopop"}, "loss_type: .* got 'discopop'"),
    "aot": ({"loss_type": ["sigmoid", "aot"]}, "loss_type: .* got 'aot'"),
    "aot_unpaired": ({"loss_type": ["aot_unpaired"]}, "loss_type: .* got 'aot_unpaired'"),
    "no loss": ({"loss_type": "dpo"}, "loss_type: .* got 'dpo'"),
    "f-divergence": ({"f_divergence_type": "js_divergence"}, "f_divergence_type: expected 'reverse_kl', got 'js_div"),
    "LD-DPO": ({"ld_alpha": 0.5}, "ld_alpha: expected None, got 0.5"),
    "LD-DPO, 0": ({"ld_alpha": 0.0}, "ld_alpha: expected None, got 0.0"),
    "WPO": ({"use_weighting": True}, "use_weighting: expected False, got True"),
    "smoothing": ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing: expected a number >= 0 and < 0.5"),
    "beta": ({"beta": 0.0}, "beta: expected a finite number > 0"),
    "weight": ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, -1.0]}, "loss_weights: of 'sft'.* >= 0, got -1"),
    "infinite weight": ({"loss_weights": [float("inf")]}, "loss_weights: expected a finite number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_change_the_loss_are_refused_by_name(case, tmp_path):
    """Before a model is loaded: there is no model of this name."""
    options, message = REFUSED[case]
    args = trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)
    with pytest.raises(ValueError, match=message):
        FusedDPOTrainer("no such model", args=args, train_dataset=pairs(2))


@pytest.mark.parametrize("column", ["image", "images"])
@pytest.mark.parametrize("streamed", [False, True], ids=["", "streamed"])
def test_images_are_refused(streamed, column, tmp_path):
    dataset = pairs(2).add_column(column, [0, 0])
    assert isinstance(dataset, Dataset)
    dataset = dataset.to_iterable_dataset() if streamed else dataset
    with pytest.raises(ValueError, match=f"train_dataset: expected texts, got a column '{column}'"):
        FusedDPOTrainer("no such model", train_dataset=dataset)


def test_a_replaced_forward_is_an_error(tokenizer, tmp_path):
    def replaced(model, *args, **kwargs):
        made = FusedDPOTrainer(model, *args, **kwargs)
        model.forward = lambda fused_lm_head=False, labels=None, **inputs: trl.trainer.utils.FusedCausalLMOutput(
            log_probs=torch.zeros(labels[:, 1:].shape)
        )
        return made

    with pytest.raises(RuntimeError, match="something has replaced the model's forward"):
        run(replaced, MODELS["llama"], tokenizer, tmp_path)
