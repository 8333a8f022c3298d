"""The first batch is verified: what a model's own forward makes of some tokens is what the fused head makes of them, or
there is an error before the first optimizer step. And which heads that do more than multiply are scored right."""

import copy
import gc
import math
import random
import weakref

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")
pytest.importorskip("transformers")

import transformers
import trl
from torch import nn

from kto_kernels import token_logps
from kto_kernels.integrations import verify as verification
from kto_kernels.integrations.trl import ChunkedLogProbFunction, FusedKTOTrainer, patch_trl, unpatch_trl
from kto_kernels.integrations.trl_head import add_fused_lm_head
from kto_kernels.integrations.trl_scoring import scored_by
from tests.support.rank_pool import pool
from tests.support.trl_harness import MODELS, SIZE, make_tokenizer, train

VOCAB, HIDDEN = SIZE["vocab_size"], SIZE["hidden_size"]
BATCH, TOKENS = 3, 20


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def small(cls, config, *left_out, **more):
    size = {name: value for name, value in SIZE.items() if name not in left_out}

    def make():
        torch.manual_seed(0)
        return getattr(transformers, cls)(getattr(transformers, config)(**(size | more)))

    return make


# Each head does something that TRL's fused head does not know, or asks for by another name.
RIGHT = {
    "RecurrentGemma": small(
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        logits_soft_cap=3.0,
        head_dim=8,
        attention_window_size=16,
        lru_width=HIDDEN,
    ),
    "xLSTM": small(
        "xLSTMForCausalLM",
        "xLSTMConfig",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "initializer_range",
        num_heads=2,
        qk_dim_factor=1.0,
        output_logit_soft_cap=3.0,
    ),
    "ModernBERT-decoder": small(
        "ModernBertDecoderForCausalLM", "ModernBertDecoderConfig", "num_key_value_heads", cls_token_id=2, sep_token_id=1
    ),
    "BERT": small("BertLMHeadModel", "BertConfig", is_decoder=True),
    "ELECTRA": small("ElectraForCausalLM", "ElectraConfig", is_decoder=True, embedding_size=HIDDEN),
    "Inkling": small("InklingForCausalLM", "InklingTextConfig", num_key_value_heads=4, unpadded_vocab_size=60),
    "Llama 4": small("Llama4ForCausalLM", "Llama4TextConfig", head_dim=8, num_local_experts=2),
    "tuples": small("LlamaForCausalLM", "LlamaConfig", return_dict=False),
}
# A deviation that TRL knows: a false alarm would be a fault.
KNOWN = {
    "Granite": small("GraniteForCausalLM", "GraniteConfig", logits_scaling=3.0),
    "Falcon-H1": small(
        "FalconH1ForCausalLM",
        "FalconH1Config",
        lm_head_multiplier=0.3,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=8,
    ),
    "Mamba": small(
        "MambaForCausalLM",
        "MambaConfig",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        state_size=4,
    ),
    "gpt-oss": small("GptOssForCausalLM", "GptOssConfig", head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "NanoChat": small("NanoChatForCausalLM", "NanoChatConfig", final_logit_softcapping=3.0),
    "GPT-2": small(
        "GPT2LMHeadModel",
        "GPT2Config",
        "intermediate_size",
        "num_key_value_heads",
        "max_position_embeddings",
        n_positions=64,
    ),
    **{name: MODELS[name] for name in ("tied", "gemma2", "cohere", "mixtral")},
}


def batch():
    ids = torch.randint(4, 60, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    scored = torch.arange(TOKENS) >= torch.tensor([[12], [5], [TOKENS]])
    return ids, torch.where(scored, ids, -100)


def own_logits(model, ids):
    config = getattr(model, "config", None)
    tuples, config.return_dict = config.return_dict, True
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    config.return_dict = tuples
    return logits


def expected(model):
    """The log-probability of each sequence, from the model's own logits."""
    ids, labels = batch()
    logps = own_logits(model, ids)[:, :-1].double().log_softmax(-1)
    return logps.gather(-1, ids[:, 1:, None]).squeeze(-1).where(labels[:, 1:] != -100, 0.0).sum(-1)


def verified(model, **options):
    """The log-probability of each sequence, from the fused head, whose first batch is verified."""
    ids, labels = batch()
    add_fused_lm_head(model, **({"verify": True} | options))
    with scored_by(ChunkedLogProbFunction), torch.no_grad():
        return model(ids, attention_mask=torch.ones_like(ids), labels=labels, fused_lm_head=True).log_probs.sum(-1)


# Right ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(10)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", [*RIGHT, *KNOWN])
def test_log_probs_are_those_of_the_models_own_logits(name, dtype):
    model = (RIGHT | KNOWN)[name]().to(dtype).eval()
    right = expected(model)
    assert right[:2].max() < -5 and right[2] == 0
    allowed = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-3, "atol": 0.2}
    torch.testing.assert_close(verified(model).double(), right, **allowed)


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"cast_lm_head_to_fp32": True}])
@pytest.mark.parametrize("name", ["llama", "gemma2", "ModernBERT-decoder"])
def test_options_of_other_trainers_raise_no_alarm(name, options):
    """As GRPO has them: a temperature, and a head in fp32 beside a model in bf16."""
    model = (RIGHT | MODELS)[name]().to(torch.bfloat16).eval()
    right = expected(model) if "temperature" not in options else None
    found = verified(model, **options)
    assert right is None or torch.allclose(found.double(), right, rtol=1e-3, atol=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        verified(copy.deepcopy(model).float(), **options)


@pytest.mark.parametrize("name", ["ModernBERT-decoder", "RecurrentGemma"])
def test_every_parameter_trains_as_with_the_models_own_logits(name):
    """The layer in front of the head too."""
    model, ids, labels = RIGHT[name]().eval(), *batch()
    parameters = dict(model.named_parameters())
    logps = model(ids, use_cache=False).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    right = torch.autograd.grad(logps.where(labels[:, 1:] != -100, 0.0).sum(), parameters.values())
    add_fused_lm_head(model, verify=True)
    with scored_by(ChunkedLogProbFunction):
        mine = torch.autograd.grad(model(ids, labels=labels, fused_lm_head=True).log_probs.sum(), parameters.values())
    assert name == "RecurrentGemma" or any(name.startswith("lm_head.dense") for name in parameters)
    for name, x, y in zip(parameters, mine, right, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * y.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.fault(11)
@pytest.mark.parametrize("name", ["Llama 4", "tuples"])
def test_backbones_that_trls_head_does_not_find(name, tokenizer, tmp_path):
    _, history = train(FusedKTOTrainer, RIGHT[name], tokenizer, tmp_path, steps=1)
    assert all(math.isfinite(entry.get("loss", 0.0)) for entry in history)


# Errors ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Doubled(nn.Linear):
    """A head with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def own_forward(model):
    model.lm_head.__class__ = Doubled


def hook(factor):
    return lambda model: model.lm_head.register_forward_hook(lambda module, args, out: factor * out)


def masked(model):
    model.lm_head.register_forward_hook(
        lambda module, args, out: out.masked_fill(torch.arange(VOCAB) % 4 == 0, torch.finfo(out.dtype).min)
    )


def scaled(model):
    model.lm_head.register_forward_pre_hook(lambda module, args: (1.02 * args[0],))


def broken(model):
    model.lm_head.register_forward_hook(lambda module, args, out: 1 / 0)


WRONG = {
    "a forward of its own": own_forward,
    "a hook": hook(1.01),
    "a mask": masked,
    "scaled hidden states": scaled,
}


@pytest.mark.fault(10)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("change", WRONG)
def test_a_head_that_does_more_than_multiply_is_an_error(change, dtype):
    model = MODELS["llama"]().to(dtype).eval()
    WRONG[change](model)
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM: over 15 tokens its own logits give .* Likely causes"):
        verified(model)


def test_a_hook_that_changes_a_loss_by_a_percent_is_an_error_before_the_first_step(tokenizer, tmp_path):
    def hooked():
        model = MODELS["llama"]()
        hook(1.005)(model)
        return model

    start = {}

    class Watched(FusedKTOTrainer):
        def train(self):
            start.update({name: p.detach().clone() for name, p in self.model.named_parameters()})
            try:
                super().train()
            finally:
                assert all(torch.equal(p, start[name]) for name, p in self.model.named_parameters())

    with pytest.raises(RuntimeError, match=r"its own logits.*FusedKTOTrainer with verify=False leaves this check out"):
        train(Watched, hooked, tokenizer, tmp_path, steps=1)
    assert start


@pytest.mark.parametrize("make", [
    small("RobertaForCausalLM", "RobertaConfig", is_decoder=True, max_position_embeddings=80),
    small("ChameleonForConditionalGeneration", "ChameleonConfig",
          vocabulary_map={"<image>": 5} | {f"IMGIMG{letter}Z": 10 + i for i, letter in enumerate("ABCDEFG")},
          vq_config={"embed_dim": 8, "num_embeddings": 7, "base_channels": 32, "channel_multiplier": [1],
                     "num_res_blocks": 1, "latent_channels": 8}),
], ids=["RoBERTa", "Chameleon"])  # fmt: skip
def test_architectures_that_are_not_known_are_errors(make):
    with pytest.raises(RuntimeError, match="its own logits give"):
        verified(make().eval())


def test_a_model_that_cannot_run_is_an_error():
    model = MODELS["llama"]().eval()
    broken(model)
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM: its own forward failed.*division by zero"):
        verified(model)


def test_an_error_is_not_forgotten():
    model = MODELS["llama"]().eval()
    handle = hook(1.1)(model)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            verified(model, verify=None)
    del handle
    model.lm_head._forward_hooks.clear()
    torch.testing.assert_close(verified(model, verify=None).double(), expected(model))


class Packed(nn.Module):
    """A head as quantization leaves it."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)


def quantized(dtype):
    return lambda model: setattr(model, "lm_head", Packed(torch.zeros(VOCAB, HIDDEN).to(dtype)))


class Several(transformers.LlamaForCausalLM):
    """A head of several layers."""

    def get_output_embeddings(self):
        return nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, VOCAB))


def several(model):
    model.__class__ = Several


@pytest.mark.fault(11)
@pytest.mark.parametrize(
    "change, message",
    [
        (quantized(torch.uint8), r"got Packed with a Parameter torch\.uint8.*looks quantized.*modules_to_not_convert"),
        (quantized(torch.int8), r"got Packed with a Parameter torch\.int8.*looks quantized"),
        (quantized(torch.float8_e4m3fn), r"float8_e4m3fn of shape \(64, 32\), which looks quantized"),
        (several, r"Several: expected a head with a weight \(V, H\) of floats, .* got Sequential without a weight"),
    ],
)
def test_heads_without_a_matrix_of_floats_are_errors_at_construction(change, message, tokenizer, tmp_path):
    def made():
        model = MODELS["llama"]()
        change(model)
        return model

    with pytest.raises(ValueError, match=message):
        train(FusedKTOTrainer, made, tokenizer, tmp_path, ref=False, precompute_ref_log_probs=True)


# The check leaves things as they were; its cost ───────────────────────────────────────────────────────────────────────


def test_modes_and_random_state_are_put_back():
    model = MODELS["llama"]().train()
    model.model.layers[0].eval()
    model.model.layers[1].mlp.register_forward_hook(lambda *_: (torch.rand(1), None)[1])
    modes = [module.training for module in model.modules()]
    seen = []
    model.model.layers[1].register_forward_hook(lambda module, *_: seen.append(module.training))
    results = []
    for verify in (False, True):
        torch.manual_seed(5)
        random.seed(5)
        verified(copy.deepcopy(model), verify=verify)
        results.append((torch.rand(3), random.random()))
        assert [module.training for module in model.modules()] == modes
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    assert seen == [True, False, False, True]  # without the check; in its two forwards; and after it


def test_training_is_the_same_with_and_without_it(tokenizer, tmp_path):
    """Bit for bit, dropout included."""
    runs = []
    for verify in (False, True):

        def verified_or_not(*args, verify=verify, **kwargs):
            return FusedKTOTrainer(*args, verify=verify, **kwargs)

        dropout = small("LlamaForCausalLM", "LlamaConfig", attention_dropout=0.3)
        runs.append(train(verified_or_not, dropout, tokenizer, tmp_path, steps=2, disable_dropout=False))
    for name, parameter in runs[0][0].items():
        assert torch.equal(runs[1][0][name], parameter), name


def test_a_long_row_costs_a_short_forward():
    ids = torch.arange(200).remainder(50).add(4).expand(2, 200)
    labels = torch.stack([ids[0].masked_fill(torch.arange(200) < 190, -100), ids[0].masked_fill(ids[0] < 6, -100)])
    labels[1, :100] = -100
    images, places = torch.randn(7, 200), torch.arange(200).expand(2, 200)
    mask = torch.arange(200).expand(2, 200) > 3
    row, piece = verification.window(
        labels, {"input_ids": ids, "pixel_values": images, "position_ids": places, "attention_mask": mask, "a": 1}
    )
    assert set(piece) == {"input_ids", "position_ids", "attention_mask"} and piece["attention_mask"].all()
    assert row.shape == (1, verification.TOKENS + 1) == piece["input_ids"].shape
    assert torch.equal(row, labels[1:, 101:166]) and torch.equal(piece["position_ids"], places[1:, 101:166])
    short, piece = verification.window(labels[:1], {"input_ids": ids[:1]})
    assert torch.equal(short, labels[:1, 189:]) and torch.equal(piece["input_ids"], ids[:1, 189:])
    none, piece = verification.window(torch.full((2, 9), -100), {"input_ids": ids[:, :9]})
    assert not none.any() and torch.equal(piece["input_ids"], ids[:1, :9])


def test_the_check_is_made_once(tokenizer, tmp_path, monkeypatch):
    calls = []
    first_batch = verification.first_batch
    monkeypatch.setattr(
        verification, "first_batch", lambda model, *a, **k: calls.append(type(model).__name__) or first_batch(model, *a, **k)
    )  # fmt: skip
    train(FusedKTOTrainer, MODELS["llama"], tokenizer, tmp_path, steps=2)
    assert calls == ["LlamaForCausalLM"] * 2  # policy and reference
    calls.clear()
    with patch_trl():
        train(trl.KTOTrainer, MODELS["llama"], tokenizer, tmp_path, steps=2)
    assert len(calls) == 2
    calls.clear()
    with patch_trl(verify=False):
        train(trl.KTOTrainer, MODELS["llama"], tokenizer, tmp_path, steps=1)
    assert not calls


def test_patch_trl_verifies_each_model_once_and_keeps_none(monkeypatch):
    calls = []
    monkeypatch.setattr(verification, "first_batch", lambda *args, **kwargs: calls.append(1) or 0.0)
    model = MODELS["llama"]().eval()
    try:
        patch_trl()
        for _ in range(2):  # as two trainers would
            trl.trainer.utils.add_fused_lm_head(model)
            ids, labels = batch()
            model(ids, labels=labels, fused_lm_head=True)
        assert calls == [1]
        patch_trl(verify=False)
        other = MODELS["llama"]().eval()
        trl.trainer.utils.add_fused_lm_head(other)
        other(ids, labels=labels, fused_lm_head=True)
        assert calls == [1]
    finally:
        unpatch_trl()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("verify", ["always", None, 2])
def test_verify_is_one_of_three(verify, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="verify: expected True, False or 'full', got"):
        FusedKTOTrainer(MODELS["llama"](), verify=verify)
    with pytest.raises(TypeError, match="verify: expected True or False"):
        patch_trl(verify=verify)


def test_full_compares_the_losses(tokenizer, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        return FusedKTOTrainer(*args, verify="full", **kwargs)

    plain = train(FusedKTOTrainer, MODELS["gemma2"], tokenizer, tmp_path, steps=2)
    checked = train(full, MODELS["gemma2"], tokenizer, tmp_path, steps=2)
    for name, parameter in plain[0].items():
        assert torch.equal(checked[0][name], parameter), name
    assert [{k: v for k, v in e.items() if "kl" in k or "tokens" in k} for e in plain[1]] == [
        {k: v for k, v in e.items() if "kl" in k or "tokens" in k} for e in checked[1]
    ]
    monkeypatch.setattr(FusedKTOTrainer, "_reference", lambda self, batch, labels: (torch.zeros(4), torch.zeros(4)))
    with pytest.raises(RuntimeError, match=r"the loss of the first batch is .* and .* as the trainer that it replaces"):
        train(full, MODELS["gemma2"], tokenizer, tmp_path, steps=1)


# The bound ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("magnitude", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("scale", [(1.0, None, 1.0), (0.7, None, 0.5), (1.3, 20.0, 1.0)], ids=["", "scale", "cap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_allowed_and_a_scale_of_a_percent_is_not(dtype, scale, magnitude):
    """Logits as a model makes them, in its dtype step by step, lie within the bound."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(63, 128, generator=generator).to(dtype)
    weight = (magnitude / 128**0.5 * torch.randn(2000, 128, generator=generator)).to(dtype)
    bias = (0.1 * torch.randn(2000, generator=generator)).to(dtype)
    labels = torch.randint(2000, (63,), generator=generator)
    logit_scale, softcap, temperature = scale
    logps = ChunkedLogProbFunction.apply(hidden, weight, bias, labels, temperature, 0, softcap, logit_scale, ())[0]
    scored = verification.Scored.of(hidden, weight, bias, labels, scale, dtype, logps)

    own = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        own = softcap * torch.tanh(own / softcap)
    assert verification.compare(own, scored).excess < 1
    factor = 1.02 if logit_scale != 1 and dtype == torch.bfloat16 else 1.01  # five roundings more
    found = verification.compare(own * factor, scored)
    assert found.excess > 1 and found.scale == pytest.approx(factor, abs=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens, vocab", [(1, 8), (1, 64), (4, 64), (8, 256), (63, 33)])
def test_a_confident_model_with_few_tokens_raises_no_alarm(dtype, tokens, vocab):
    """One logit of each row outweighs the others, so that its rounding alone decides what the slope is."""
    alarms = 0
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(tokens, 64, generator=generator)
        weight = torch.randn(vocab, 64, generator=generator) / 8
        labels = torch.arange(tokens) % vocab
        weight[labels] += 20 * hidden / hidden.square().sum(-1, keepdim=True)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        logps = ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 0)[0]
        scored = verification.Scored.of(hidden, weight, None, labels, (1.0, None, 1.0), dtype, logps)
        own = hidden @ weight.T
        alarms += verification.compare(own, scored).excess > 1
        assert verification.compare(own * 1.05, scored).excess > 1
    assert alarms == 0


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_the_rounding_of_a_log_softmax_is_allowed(backend):
    """Equal logits, so small that nothing but the log-softmax over them is rounded."""
    generator = torch.Generator().manual_seed(0)
    hidden = 1e-3 * torch.randn(verification.TOKENS, 4, generator=generator)
    weight = torch.randn(50_000, 4, generator=generator)
    labels = torch.randint(50_000, (verification.TOKENS,), generator=generator)
    own = hidden @ weight.T
    logps = token_logps(own, labels, backend=backend)
    scored = verification.Scored.of(hidden, weight, None, labels, (1.0, None, 1.0), torch.float32, logps)
    assert verification.compare(own, scored).excess < 1
    assert verification.compare(own * 1.001, scored).excess > 1
    scored.logps = logps + 1e-4
    assert verification.compare(own, scored).excess > 1


# Ranks ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def on_one_rank(rank, tampered):
    torch.manual_seed(0)
    model = MODELS["llama"]().eval()
    if rank == tampered:
        hook(1.1)(model)
    try:
        verified(model)
    except RuntimeError as error:
        return str(error)
    return None


@pytest.mark.alone
def test_one_rank_that_fails_the_check_stops_every_rank():
    found = pool().run(on_one_rank, 1)
    assert "over 15 tokens its own logits give" in found[1]
    assert all("on another rank its own logits do not give" in x for rank, x in enumerate(found) if rank != 1)
    assert not any(pool().run(on_one_rank, None))
