"""`FusedKTOTrainer` against TRL's own KTOTrainer: ten optimizer steps of tiny models, parameters and every logged
metric equal, with every option away from its default. And our token log-probabilities under TRL's other trainers."""

import copy
import functools

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")
pytest.importorskip("transformers")

import trl
from datasets import Dataset

from kto_kernels import linear_kto_loss, linear_token_logps
from kto_kernels.integrations import _trl_trainer
from kto_kernels.integrations import trl as ours
from kto_kernels.integrations.trl import FusedDPOTrainer, FusedKTOTrainer, patch_trl, unpatch_trl
from tests.support.trl_harness import MODELS, SIZE, assert_same_training, make_tokenizer, rows, train


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def both(make, tokenizer, tmp_path, **options):
    runs = [
        train(cls, make, tokenizer, tmp_path, **copy.deepcopy(options)) for cls in (trl.KTOTrainer, FusedKTOTrainer)
    ]
    assert_same_training(*runs)
    # The training did something: its parameters are not those of the start.
    torch.manual_seed(0)
    start = dict(make().named_parameters())
    assert any(not torch.allclose(p, start[n], atol=1e-4) for n, p in runs[1][0].items() if n in start) or options.get(
        "peft"
    )
    return runs


@pytest.mark.parametrize("name", MODELS)
def test_models_train_as_under_trl(name, tokenizer, tmp_path):
    _, (_, history) = both(MODELS[name], tokenizer, tmp_path)
    logged = set().union(*history)
    assert {"kl", "entropy", "logits/chosen", "logps/rejected", "rewards/margins"} <= logged
    assert ("aux_loss" in logged) == (name == "mixtral")


OPTIONS = {
    "apo": {"loss_type": "apo_zero_unpaired"},
    "weights and beta": {"desirable_weight": 1.3, "undesirable_weight": 0.6, "beta": 0.4},
    "precomputed reference": {"precompute_ref_log_probs": True},
    "accumulation": {"gradient_accumulation_steps": 2, "steps": 5},
    "checkpointing": {"gradient_checkpointing": True},
    "one-sided batches": {"labels": [True] * 20 + [False] * 20},
    "batch of two": {"per_device_train_batch_size": 2},
    "adam, clipped": {"optim": "adamw_torch", "max_grad_norm": 0.1, "learning_rate": 1e-3},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_train_as_under_trl(case, tokenizer, tmp_path):
    both(MODELS["llama"], tokenizer, tmp_path, **OPTIONS[case])


def test_no_reference_model_is_the_model_at_the_start(tokenizer, tmp_path):
    both(MODELS["llama"], tokenizer, tmp_path, ref=False, precompute_ref_log_probs=True)


def test_the_precomputed_reference_is_scored_by_ours(tokenizer, tmp_path, monkeypatch):
    calls = []
    apply = ours.ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        ours.ChunkedLogProbFunction, "apply", staticmethod(lambda *args: calls.append(len(args[0])) or apply(*args))
    )
    options = {"precompute_ref_log_probs": True, "steps": 1, "ref": False}
    # Other rows than elsewhere: TRL caches what it has computed for the same model and data.
    train(
        functools.partial(FusedKTOTrainer, verify=False),
        MODELS["qwen2"],
        tokenizer,
        tmp_path,
        rows=lambda n, labels=None: rows(n + 4, labels),
        **options,
    )
    # Completions and mismatched ones of 44 rows and of 12, four at a time; then KL passes of a step and of evaluation.
    assert len(calls) == 2 * (11 + 3) + 1 + 3


def test_a_frozen_head_trains_as_under_trl(tokenizer, tmp_path):
    both(MODELS["llama"], tokenizer, tmp_path, head=lambda model: model.lm_head.requires_grad_(False))


def test_a_head_with_a_bias_trains_as_under_trl(tokenizer, tmp_path):
    def biased():
        model = MODELS["llama"]()
        model.lm_head = torch.nn.Linear(SIZE["hidden_size"], SIZE["vocab_size"])
        return model

    both(biased, tokenizer, tmp_path)


@pytest.mark.parametrize("bf16_model", [False, True])
def test_bf16_training_ends_near_trls(bf16_model, tokenizer, tmp_path):
    """Rounding differs: the losses are near, not equal; the fp32 master weights end up near each other."""

    def make():
        return MODELS["llama"]().to(torch.bfloat16 if bf16_model else torch.float32)

    runs = [
        train(cls, make, tokenizer, tmp_path, steps=3, bf16=not bf16_model) for cls in (trl.KTOTrainer, FusedKTOTrainer)
    ]
    for name, theirs in runs[0][0].items():
        difference = (runs[1][0][name].float() - theirs.float()).norm() / theirs.float().norm()
        assert difference < 5e-3, (name, difference)
    for theirs, mine in zip(runs[0][1], runs[1][1]):
        for name in set(theirs) & {"loss", "kl", "rewards/chosen", "logps/chosen", "entropy"}:
            assert mine[name] == pytest.approx(theirs[name], rel=0.05, abs=0.05), name


@pytest.mark.parametrize("grad", [True, False])
def test_log_probs_under_autocast(grad):
    """In autocast's dtype, as TRL's and as the policy's loss: else the reference would be rounded otherwise."""
    hidden, weight = torch.randn(40, 32), torch.randn(300, 32)
    targets = torch.randint(300, (40,))

    def scored(function, dtype=torch.float32):
        leaves = [x.to(dtype).requires_grad_(grad) for x in (hidden, weight)]
        logps = function.apply(*leaves, None, targets, 1.0, 128, None, 1.0, ())[0]
        return [logps, *(torch.autograd.grad(logps.sum(), leaves) if grad else ())]

    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = scored(ours.ChunkedLogProbFunction), scored(trl.kernels.ChunkedLogProbFunction)
    narrow, wide = (scored(ours.ChunkedLogProbFunction, dtype) for dtype in (torch.bfloat16, torch.float32))
    for x, y, z in zip(mine, narrow, wide):
        torch.testing.assert_close(x.to(y.dtype), y, rtol=1e-2, atol=1e-2 * y.abs().max().item())
        assert x.dtype == torch.float32 and not torch.equal(x, z)
    assert torch.equal(mine[0], narrow[0])
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-5, atol=1e-5)


def lora(**options):
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "lora_dropout": 0.0}
    return peft.LoraConfig(**(settings | options))


def test_lora_trains_as_under_trl(tokenizer, tmp_path):
    """The reference is the model with its adapter off; only the adapter trains."""
    both(MODELS["llama"], tokenizer, tmp_path, ref=False, peft=lora())


def test_lora_with_a_trained_head_trains_as_under_trl(tokenizer, tmp_path):
    both(MODELS["llama"], tokenizer, tmp_path, ref=False, peft=lora(modules_to_save=["lm_head"]))


def test_the_reference_in_an_adapter_of_its_own(tokenizer, tmp_path):
    """TRL keeps the adapter that a PEFT model comes with as one called ref."""
    peft = pytest.importorskip("peft")
    (parameters, _), _ = both(lambda: peft.get_peft_model(MODELS["llama"](), lora()), tokenizer, tmp_path, ref=False)
    assert any(".ref." in name for name in parameters)


def test_virtual_tokens_in_front_train_as_under_trl(tokenizer, tmp_path):
    """A prompt-learning adapter lengthens what the model returns; they are not scored."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    both(MODELS["llama"], tokenizer, tmp_path, ref=False, peft=config, learning_rate=1.0)


def test_compute_metrics_gets_trls_logits(tokenizer, tmp_path):
    def compute_metrics(prediction):
        logits, ids = prediction.predictions, prediction.label_ids
        return {"agree": float((logits[:, :-1].argmax(-1) == ids[:, 1:]).mean()), "spread": float(logits.std())}

    _, (_, history) = both(MODELS["llama"], tokenizer, tmp_path, steps=3, compute_metrics=compute_metrics)
    assert {"eval_agree", "eval_spread"} <= set(history[-1])


def test_a_loss_of_ours_that_is_not_trls_is_an_error(tokenizer, tmp_path, monkeypatch):
    """TRL's formula makes the value that is logged, and ours the gradient: the first batch compares the two."""
    monkeypatch.setattr(
        ours, "linear_kto_loss", lambda *args, beta, **kw: linear_kto_loss(*args, beta=1.01 * beta, **kw)
    )
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM: the loss of the first batch is"):
        train(FusedKTOTrainer, MODELS["llama"], tokenizer, tmp_path, steps=1)


def test_the_head_costs_three_units_and_the_others_one(tokenizer, tmp_path, monkeypatch):
    """Through our operators alone, and never with rows that nothing scores."""
    from torch.utils import flop_counter

    seen = []
    counts = {}
    for name in ("linear_kto", "linear_token_logps", "linear_backward"):
        op = getattr(torch.ops.kto_kernels, name)
        formula = flop_counter.flop_registry[op]

        def counted(*args, formula=formula, name=name, **kwargs):
            seen.append(name)
            counts[name] = counts.get(name, 0) + formula(*args, **kwargs)
            return counts[name]

        monkeypatch.setitem(flop_counter.flop_registry, op, counted)
    with flop_counter.FlopCounterMode(display=False):
        train(FusedKTOTrainer, MODELS["llama"], tokenizer, tmp_path, steps=1)
    # One training step (policy, its KL, the reference's two), and two batches of evaluation without gradients. And a few
    # tokens of policy and reference each, which verify the first batch.
    assert seen.count("linear_kto") == 1 and "linear_backward" not in seen
    assert seen.count("linear_token_logps") == 3 + 2 * 4 + 2


# Every other trainer ───────────────────────────────────────────────────────────────────────────────────────────────────


HIDDEN, VOCAB, COUNT = 16, 50, 23


def function_arguments(dtype, frozen=False):
    torch.manual_seed(0)
    hidden = torch.randn(COUNT, HIDDEN, dtype=dtype, requires_grad=True)
    weight = (0.5 * torch.randn(VOCAB, HIDDEN)).to(dtype).requires_grad_(not frozen)
    bias = torch.randn(VOCAB, dtype=dtype, requires_grad=not frozen)
    return hidden, weight, bias, torch.randint(VOCAB, (COUNT,))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("scaling", [(1.0, None, 1.0), (0.7, 5.0, 0.5)])
@pytest.mark.parametrize("outputs", [(), ("entropy",), ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")])
def test_the_chunked_function_gives_trls_results(frozen, scaling, outputs):
    theirs = trl.kernels.ChunkedLogProbFunction
    results, gradients = [], []
    for function in (theirs, ours.ChunkedLogProbFunction):
        leaves = function_arguments(torch.float32, frozen)
        temperature, softcap, logit_scale = scaling
        found = function.apply(*leaves, temperature, 16, softcap, logit_scale, outputs)
        loss = (found[0] * torch.linspace(-1, 1, COUNT)).sum()
        if "entropy" in outputs:
            loss = loss + (found[1] * torch.linspace(0.5, 2, COUNT)).sum()
        loss.backward()
        results.append(found)
        gradients.append([leaf.grad for leaf in leaves[:3]])
    for mine, theirs_ in zip(results[1], results[0]):
        assert (mine is None) == (theirs_ is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs_, rtol=1e-5, atol=1e-5)
    for mine, theirs_ in zip(gradients[1], gradients[0]):
        assert (mine is None) == (theirs_ is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs_, rtol=1e-4, atol=1e-5)


def test_patch_trl_is_undone_and_may_be_repeated():
    theirs = trl.trainer.utils._ChunkedLogProbFunction
    with patch_trl():
        assert trl.trainer.utils._ChunkedLogProbFunction is ours.ChunkedLogProbFunction
        with patch_trl():
            assert trl.kernels.ChunkedLogProbFunction is ours.ChunkedLogProbFunction
        assert trl.trainer.utils._ChunkedLogProbFunction is ours.ChunkedLogProbFunction
    assert trl.trainer.utils._ChunkedLogProbFunction is theirs
    patch_trl()
    unpatch_trl()
    assert trl.trainer.utils._ChunkedLogProbFunction is theirs and trl.kernels.ChunkedLogProbFunction is theirs


def test_an_unknown_trl_is_an_error(monkeypatch):
    monkeypatch.setattr(_trl_trainer, "version", lambda _: "trl 2.0.0")
    with pytest.raises(RuntimeError, match=r"patch_trl: written for TRL 1\.16, found trl 2\.0\.0"):
        patch_trl()
    for trainer in (FusedKTOTrainer, FusedDPOTrainer):
        with pytest.raises(RuntimeError, match=rf"{trainer.__name__}: written for TRL 1\.16, found trl 2\.0\.0"):
            trainer(args=object())


def test_rows_sums_are_as_near_to_fp64_as_trls():
    """The difference that `assert_same_training` allows is the rounding of sums in fp32, TRL's and ours."""
    torch.manual_seed(0)
    model = MODELS["llama"]().eval()
    ids = torch.randint(SIZE["vocab_size"], (512, 10))

    def errors(token_logps):
        return (token_logps.double().sum(-1) - exact).abs()

    with torch.no_grad():
        hidden, weight = model.model(ids).last_hidden_state[:, :-1], model.lm_head.weight
        labels = ids[:, 1:, None]
        theirs = (hidden @ weight.T).log_softmax(-1).gather(-1, labels).squeeze(-1)
        mine = linear_token_logps(hidden, weight, labels.squeeze(-1))
        double = copy.deepcopy(model).double()
        exact = double(ids).logits[:, :-1].log_softmax(-1).gather(-1, labels).squeeze(-1).sum(-1)
    assert 40 < -exact.mean() < 60  # nats, as the trainings here have
    assert max(errors(theirs).max(), errors(mine).max()) < 2e-5
    assert errors(mine).square().mean() < 1.1 * errors(theirs).square().mean()


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_trls_kto_trainer_on_ours(name, tokenizer, tmp_path):
    plain = train(trl.KTOTrainer, MODELS[name], tokenizer, tmp_path)
    with patch_trl():
        patched = train(trl.KTOTrainer, MODELS[name], tokenizer, tmp_path)
    assert_same_training(plain, patched)


def test_sft_and_dpo_on_our_function_train_as_on_trls(tokenizer, tmp_path):
    def run(cls, config, dataset):
        torch.manual_seed(0)
        args = config(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, optim="sgd",
            report_to=[], save_strategy="no", use_cpu=True, logging_steps=1, bf16=False, gradient_checkpointing=False
        )  # fmt: skip
        model = MODELS["llama"]()
        more = {"ref_model": copy.deepcopy(model)} if cls is trl.DPOTrainer else {}
        trainer = cls(model, args=args, train_dataset=dataset, processing_class=tokenizer, **more)
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        return dict(trainer.model.named_parameters()), history

    texts = rows(12)
    pairs = Dataset.from_list(
        [
            {"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]}
            for a, b in zip(texts, list(texts)[1:])
        ]
    )
    completions = texts.remove_columns("label")
    for cls, config, dataset in ((trl.SFTTrainer, trl.SFTConfig, completions), (trl.DPOTrainer, trl.DPOConfig, pairs)):
        plain = run(cls, config, dataset)
        with patch_trl():
            patched = run(cls, config, dataset)
        assert_same_training(plain, patched)
