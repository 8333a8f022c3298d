"""A LoRA adapter on the head under the fused trainers, which TRL refuses: loss and gradients are those of the model's own
logits."""

from unittest import mock

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import trl

from kto_kernels import kto_loss, preference_loss
from kto_kernels.integrations import trl_head
from kto_kernels.integrations._trl_trainer import labels_of
from kto_kernels.integrations.trl import FusedDPOTrainer, FusedKTOTrainer, patch_trl
from kto_kernels.objectives import DPO
from kto_kernels.ops import linear as operators
from tests.support.trl_harness import MODELS, SIZE, make_tokenizer, pairs, rows, train


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def lora(**options):
    settings = {"r": 4, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False, "lora_dropout": 0.0}
    return peft.LoraConfig(**(settings | options))


@pytest.fixture
def trainer(tokenizer, tmp_path):
    """A trainer of a model, which has not trained yet."""

    def make(model, config=None, cls=FusedKTOTrainer, ref_model=None, **options):
        more = {"verify": options.pop("verify")} if "verify" in options else {}
        settings = {
            "output_dir": str(tmp_path), "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2,
            "logging_steps": 1, "report_to": [], "save_strategy": "no", "use_cpu": True, "max_length": 32,
            "optim": "sgd", "gradient_checkpointing": False, "bf16": False, "lr_scheduler_type": "constant",
        } | options  # fmt: skip
        return cls(
            model, ref_model=ref_model, args=trl.KTOConfig(**settings), train_dataset=rows(12),
            processing_class=tokenizer, peft_config=config, **more,
        )  # fmt: skip

    return make


def llama(name="llama", bias=False):
    torch.manual_seed(0)
    model = MODELS[name]()
    if bias:
        model.lm_head = torch.nn.Linear(SIZE["hidden_size"], SIZE["vocab_size"])
    return model


def own_loss(made, batch):
    """The loss from the logits of PEFT's own forward; the reference has its adapters off."""
    policy = made.accelerator.unwrap_model(made.model)
    sides = {}
    for prefix in ("", "KL_"):
        ids, scored = batch[f"{prefix}input_ids"], batch[f"{prefix}completion_mask"]
        inputs = {"input_ids": ids, "attention_mask": batch[f"{prefix}attention_mask"]}
        with torch.set_grad_enabled(prefix == ""):
            sides[prefix] = policy(**inputs).logits
        with torch.no_grad(), policy.disable_adapter():
            sides[f"ref_{prefix}"] = policy(**inputs).logits
        sides[f"{prefix}labels"] = ids.masked_fill(scored == 0, -100)
    return kto_loss(
        sides[""], sides["labels"], torch.as_tensor(batch["label"]), ref_logits=sides["ref_"], kl_logits=sides["KL_"],
        ref_kl_logits=sides["ref_KL_"], kl_labels=sides["KL_labels"], beta=made.beta, shift=True,
    ).loss  # fmt: skip


def gradients(made, loss):
    loss.backward()
    found = {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}
    made.model.zero_grad()
    return found


@pytest.mark.parametrize(("name", "bias"), [("llama", False), ("llama", True), ("gemma2", False), ("cohere", False)])
def test_loss_and_gradients_are_those_of_the_models_own_logits(name, bias, trainer):
    model = llama(name, bias)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    made = trainer(model, lora())
    batch = next(iter(made.get_train_dataloader()))
    mine, theirs = made.compute_loss(made.model, batch), own_loss(made, batch)
    torch.testing.assert_close(mine.float(), theirs.float(), rtol=1e-5, atol=1e-6)
    found, expected = gradients(made, mine), gradients(made, theirs)
    assert found.keys() == expected.keys() == {n for n, p in made.model.named_parameters() if p.requires_grad}
    of_head = [name for name in found if "lm_head" in name]
    assert len(of_head) == 2 and all("lora_" in name for name in found)
    for name, grad in found.items():
        assert expected[name].abs().max() > 1e-4  # which zeros do not pass
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_loss_and_gradients_of_pairs_are_those_of_the_models_own_logits(tokenizer, tmp_path):
    args = trl.DPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, use_cpu=True, report_to=[], bf16=False,
        gradient_checkpointing=False, max_length=32
    )  # fmt: skip
    made = FusedDPOTrainer(llama(), args=args, train_dataset=pairs(8), processing_class=tokenizer, peft_config=lora())
    batch = next(iter(made.get_train_dataloader()))
    policy, labels = made.accelerator.unwrap_model(made.model), labels_of(batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    mine, logits = made.compute_loss(made.model, batch), policy(**inputs).logits
    with torch.no_grad(), policy.disable_adapter():
        ref_logits = policy(**inputs).logits
    theirs = preference_loss(logits, labels, DPO(made.beta), ref_logits=ref_logits, shift=True).loss
    torch.testing.assert_close(mine.float(), theirs.float(), rtol=1e-5, atol=1e-6)
    found, expected = gradients(made, mine), gradients(made, theirs)
    assert found.keys() == expected.keys() and sum("lm_head" in name for name in found) == 2
    for name, grad in found.items():
        assert expected[name].abs().max() > 1e-4  # which zeros do not pass
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_training_from_peft_s_own_start(tokenizer, tmp_path):
    """Where B is 0. The frozen head's weight stays, both matrices move, and the first batch is verified."""
    options = {"ref": False, "peft": lora(init_lora_weights=True), "steps": 4, "learning_rate": 0.5}
    parameters, history = train(FusedKTOTrainer, MODELS["llama"], tokenizer, tmp_path, **options)
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in history if "loss" in entry)
    torch.manual_seed(0)
    start = dict(MODELS["llama"]().named_parameters())
    (weight,) = (p for name, p in parameters.items() if "lm_head" in name and "base_layer" in name)
    assert torch.equal(weight, start["lm_head.weight"])
    (b,) = (p for name, p in parameters.items() if "lm_head.lora_B" in name)
    assert b.abs().max() > 1e-4
    rewards = [entry["rewards/margins"] for entry in history if "rewards/margins" in entry]
    assert rewards[0] == 0 and rewards[1] != 0


def test_the_reference_in_an_adapter_of_its_own(trainer):
    """TRL keeps the adapter that a PEFT model comes with as one called ref: on the head too."""
    model = peft.get_peft_model(llama(), lora())
    made = trainer(model)
    made.train()
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    assert logged[0]["rewards/margins"] == 0 and logged[1]["rewards/margins"] != 0


def test_no_gradient_of_the_head_and_two_units(trainer):
    """Through `linear_kto` with an adapter trained and the weight frozen."""
    made = trainer(llama(), lora(), verify=False)
    batch = next(iter(made.get_train_dataloader()))
    with mock.patch.object(operators, "walk", side_effect=operators.walk) as walks:
        made.compute_loss(made.model, batch).backward()
    needs = [call.args[4] for call in walks.call_args_list]
    (formed,) = (need for need in needs if need.hidden)
    assert formed.adapter and not formed.weight
    assert len(needs) == 4  # mismatched completions and completions, of policy and reference


def test_trainers_under_the_patch_apply_an_adapter_inside_of_a_model(tokenizer, tmp_path):
    """TRL refuses it in a PeftModel; one that transformers has put inside is applied and verified."""
    model = llama()
    model.add_adapter(lora())
    ids = torch.arange(8, 20).reshape(2, 6)
    with patch_trl():
        trl.trainer.utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "log_sum_sq_probs"))
        found = model(ids, labels=ids, fused_lm_head=True)
        logits = model(ids).logits[:, :-1].log_softmax(-1)
        expected = logits.gather(-1, ids[:, 1:, None]).squeeze(-1)
        torch.testing.assert_close(found.log_probs, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.log_sum_sq_probs, (2 * logits).logsumexp(-1), rtol=1e-4, atol=1e-5)
        weights = [
            module.weight
            for name, module in model.named_modules()
            if "lm_head.lora_" in name and hasattr(module, "weight")
        ]
        mine = torch.autograd.grad(found.log_probs.sum(), weights)
        theirs = torch.autograd.grad(expected.sum(), weights)
    for x, y in zip(mine, theirs):
        assert y.abs().max() > 1e-2  # which zeros do not pass
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_a_wrong_adapter_is_found_by_the_first_batch(trainer, monkeypatch):
    made = trainer(llama(), lora())
    right = trl_head._adapter
    monkeypatch.setattr(trl_head, "_adapter", lambda model: (a := right(model)) and (*a[:2], 1.1 * a[2]))
    with pytest.raises(RuntimeError, match="its own logits"):
        made.train()


# Refused ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

REFUSED = {
    "dropout": ({"lora_dropout": 0.1}, r"expected lora_dropout=0, got 0\.1"),
    "DoRA": ({"use_dora": True}, "expected LoRA without DoRA"),
    "a bias in B": ({"lora_bias": True}, "lora_bias=False"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_a_fused_head_cannot_apply(case, trainer):
    options, said = REFUSED[case]
    with pytest.raises(ValueError, match=f"LlamaForCausalLM: an adapter on the head, .*{said}"):
        trainer(llama(bias="lora_bias" in options), lora(**options), disable_dropout=False)


def test_another_kind_of_adapter(trainer):
    config = peft.LoHaConfig(r=2, target_modules=["lm_head"])
    with pytest.raises(ValueError, match=r"an adapter on the head, .*expected LoRA on nn\.Linear"):
        trainer(llama(), config)


def test_a_head_that_is_tied_to_the_embeddings(trainer):
    with pytest.raises(ValueError, match=r"an adapter on the head.*tie_word_embeddings=True.*embeddings too"):
        trainer(llama("tied"), lora())


def test_a_comparison_with_trls_loss(trainer):
    made = trainer(llama(), lora(), verify="full")
    with pytest.raises(ValueError, match=r"would leave out the adapter.*verify='full'"):
        made.train()


def test_trls_own_trainer_still_refuses(trainer):
    trainer(llama(), lora())
    with pytest.raises(ValueError, match=r"adapter to `lm_head` is not supported"):
        trainer(llama(), lora(), cls=trl.KTOTrainer)
