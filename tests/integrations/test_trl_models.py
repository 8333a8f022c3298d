"""Models that trainers of TRL 1.16 are given in other states than freshly made: copied, pickled, with adapters inside,
under two trainers, in two dtypes. `FusedKTOTrainer` trains them as TRL's own trainer does, and leaves nothing behind that
is bound to one of them."""

import copy
import gc
import io
import math
import weakref

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import trl

from kto_kernels.integrations import trl_scoring
from kto_kernels.integrations.trl import FusedKTOTrainer, patch_trl
from tests.support.trl_harness import MODELS, SIZE, assert_same_training, make_tokenizer, rows, train


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def trainer(tokenizer, tmp_path):
    """A trainer of a model, which has not trained yet."""

    def make(model, cls=FusedKTOTrainer, ref_model=None, count=12, **config):
        settings = {
            "output_dir": str(tmp_path), "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2,
            "logging_steps": 1, "report_to": [], "save_strategy": "no", "use_cpu": True, "max_length": 32,
            "optim": "sgd", "gradient_checkpointing": False, "bf16": False, "lr_scheduler_type": "constant",
        } | config  # fmt: skip
        more = {name: settings.pop(name) for name in ("verify", "peft_config") if name in settings}
        return cls(
            model,
            ref_model=copy.deepcopy(model) if ref_model is None else ref_model,
            args=trl.KTOConfig(**settings),
            train_dataset=rows(count),
            processing_class=tokenizer,
            **more,
        )

    return make


IDS = torch.arange(8, 20).reshape(2, 6)


def fused(model):
    with torch.no_grad():
        return model(IDS, labels=IDS, fused_lm_head=True).log_probs


def zeroed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def llama(**options):
    torch.manual_seed(0)
    return MODELS["llama"](**options)


# Copies ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(2)
@pytest.mark.parametrize("trained", [False, True], ids=["", "trained"])
def test_a_copy_scores_with_its_own_weights(trainer, trained):
    model = llama()
    made = trainer(model)
    if trained:
        made.train()
    before = fused(model)
    copied = zeroed(copy.deepcopy(model))
    uniform = torch.full_like(before, -math.log(SIZE["vocab_size"]))
    torch.testing.assert_close(fused(copied), uniform)
    assert not copied(IDS).logits.any()  # its own forward too
    assert torch.equal(fused(model), before) and not torch.allclose(before, uniform, atol=0.1)


def test_a_pickle_is_a_model_without_a_fused_head(trainer):
    model = llama()
    trainer(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert not zeroed(copy.deepcopy(loaded))(IDS).logits.any()
    trainer(loaded).train()
    assert not torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_a_shallow_copy_and_generation(trainer):
    model = llama()
    trainer(model)
    assert torch.equal(fused(copy.copy(model)), fused(model))
    assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape[1] == IDS.shape[1] + 2


def test_no_patch_or_trainer_keeps_a_model_alive(trainer):
    model = llama()
    with patch_trl():
        trainer(model, cls=trl.KTOTrainer).train()
    trainer(model).train()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# Trainers, one after another ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bf16", [False, True], ids=["", "autocast"])
def test_a_second_trainer_on_one_model(trainer, bf16):
    """Once trained, so that accelerate's autocast wrapper lies over the fused head that is replaced."""
    results = []
    for cls in (trl.KTOTrainer, FusedKTOTrainer):
        model, reference = llama(), llama()
        for first in (cls, cls):
            made = trainer(model, cls=first, ref_model=reference, bf16=bf16)
            made.train()
        results.append((dict(model.named_parameters()), [e for e in made.state.log_history if "loss" in e]))
        depth, forward = 0, vars(model)["forward"]
        while hasattr(forward, "__wrapped__"):
            depth, forward = depth + 1, forward.__wrapped__
        assert cls is trl.KTOTrainer or depth < 8
    if bf16:
        for name, theirs in results[0][0].items():
            difference = (results[1][0][name] - theirs).norm() / theirs.norm()
            assert difference < 5e-3, (name, difference)
    else:
        assert_same_training(*results)


@pytest.mark.parametrize("last", [trl.KTOTrainer, FusedKTOTrainer])
def test_trainers_of_both_kinds_on_one_model(trainer, last):
    """In either order, and either trains: a fused head of TRL's in front of ours hides it, but not the loss."""
    kinds = [FusedKTOTrainer, trl.KTOTrainer] if last is trl.KTOTrainer else [trl.KTOTrainer, FusedKTOTrainer]
    results = []
    for order, which in ((kinds, 0), (kinds, 1), ([trl.KTOTrainer], 0)):
        model, reference = llama(), llama()
        made = [trainer(model, cls=cls, ref_model=reference) for cls in order]
        made[which].train()
        results.append((dict(model.named_parameters()), [e for e in made[which].state.log_history if "loss" in e]))
    assert_same_training(results[2], results[0])
    assert_same_training(results[2], results[1])


def test_a_replaced_forward_is_an_error(trainer):
    """Not a loss without the gradient."""
    model = llama()
    made = trainer(model)
    model.forward = lambda fused_lm_head=False, labels=None, **inputs: trl.trainer.utils.FusedCausalLMOutput(
        log_probs=torch.zeros(labels[:, 1:].shape)
    )
    with pytest.raises(RuntimeError, match="something has replaced the model's forward"):
        made.train()


# Adapters ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def lora(**options):
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "lora_dropout": 0.0}
    return peft.LoraConfig(**(settings | options))


def added():
    model = MODELS["llama"]()
    model.add_adapter(lora())
    return model


def injected():
    return peft.inject_adapter_in_model(lora(), MODELS["llama"]())


def merged():
    """The config of an adapter that is no longer there."""
    model = peft.get_peft_model(MODELS["llama"](), lora()).merge_and_unload().requires_grad_(True)
    model.peft_config = {"default": lora()}  # as versions of PEFT leave it
    return model


@pytest.mark.fault(3)
@pytest.mark.parametrize("make", [added, injected, merged])
def test_adapters_inside_a_model(make, tokenizer, tmp_path):
    runs = [train(cls, make, tokenizer, tmp_path) for cls in (trl.KTOTrainer, FusedKTOTrainer)]
    assert_same_training(*runs)


@pytest.mark.fault(9)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", ""])
def test_some_trained_tokens_train_as_under_trl(tied, tokenizer, tmp_path, monkeypatch):
    """With a tied head TRL's own trainer asks PEFT's wrapper for a bias, which it does not show."""
    options = {"ref": False, "peft": lora(trainable_token_indices=[5, 9, 30], ensure_weight_tying=tied)}
    make = MODELS["tied" if tied else "llama"]
    mine = train(FusedKTOTrainer, make, tokenizer, tmp_path, **copy.deepcopy(options))
    monkeypatch.setattr(peft.utils.other.TrainableTokensWrapper, "bias", None, raising=False)
    assert_same_training(train(trl.KTOTrainer, make, tokenizer, tmp_path, **copy.deepcopy(options)), mine)
    deltas = {name: p for name, p in mine[0].items() if "trainable_tokens_delta" in name}
    assert deltas


def test_the_bias_of_a_head_with_some_trained_tokens(trainer):
    """PEFT leaves it out of the model's own logits, and leaves it in with the adapter off: the reference has it. Rather
    an error than either."""
    model = llama()
    model.lm_head = torch.nn.Linear(SIZE["hidden_size"], SIZE["vocab_size"])
    torch.nn.init.normal_(model.lm_head.bias)
    wrapped = peft.get_peft_model(model, lora(trainable_token_indices={"lm_head": [5, 9]}))
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM: over .* tokens its own logits"):
        trainer(wrapped, ref_model=llama()).train()


# One dtype for all sides ───────────────────────────────────────────────────────────────────────────────────────────────


def history(made):
    made.train()
    return [entry for entry in made.state.log_history if "loss" in entry]


def rewards(entry):
    return [entry[name] for name in ("rewards/chosen", "rewards/rejected", "kl") if name in entry]


@pytest.mark.fault(1)
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("wide", ["head", "backbone"])
def test_a_head_of_another_dtype_than_its_backbone(wide, loss_type, trainer):
    """A reference that is the same model: no reward, no KL."""
    model = llama().to(torch.bfloat16)
    (model.lm_head if wide == "head" else model.model).float()
    made = trainer(model, loss_type=loss_type, learning_rate=0.0)
    for entry in history(made):
        assert rewards(entry) and not any(rewards(entry)), entry


@pytest.mark.parametrize("precomputed", [False, True], ids=["", "precomputed"])
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("policy", [torch.bfloat16, torch.float32], ids=["bf16 policy", "fp32 policy"])
def test_a_reference_of_another_dtype_is_scored_in_the_policys(policy, loss_type, precomputed, trainer, monkeypatch):
    other = torch.float32 if policy == torch.bfloat16 else torch.bfloat16
    seen, function = [], trl_scoring.ChunkedLogProbFunction
    apply = function.apply
    monkeypatch.setattr(
        function, "apply", staticmethod(lambda h, w, *args: seen.append((h.dtype, w.dtype)) or apply(h, w, *args))
    )
    options = {"loss_type": loss_type, "verify": False, "max_steps": 1, "precompute_ref_log_probs": precomputed}
    model, reference = llama().to(policy), llama().to(other)
    count = {"kto": 13, "apo_zero_unpaired": 14}[loss_type]  # of rows: TRL caches what it precomputed of the same
    trainer(model, ref_model=reference, count=count, **options).train()
    scored = [hidden for hidden, weight in seen if weight == other]
    batches = math.ceil(count / 4) if precomputed else 1
    assert scored == [policy] * (batches * (2 if loss_type == "kto" else 1))


def test_log_sum_sq_probs_in_the_dtype_of_the_log_probs():
    """A head of another dtype than the hidden states."""
    from kto_kernels.integrations.trl import ChunkedLogProbFunction

    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 32).bfloat16(), torch.randn(50, 32)
    outputs = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    targets = torch.randint(50, (20,))
    mixed = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 128, None, 1.0, outputs)
    narrow = ChunkedLogProbFunction.apply(hidden, weight.bfloat16(), None, targets, 1.0, 128, None, 1.0, outputs)
    for x, y in zip(mixed, narrow):
        assert torch.equal(x, y)
