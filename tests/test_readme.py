"""What the README says: its examples run, its tables come from the results files, its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_the_equivalent_in_plain_pytorch_is_equivalent():
    """The README's `plain_kto` against ours, loss and gradient."""
    scope: dict = {}
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "def plain_kto" in b)
    exec(compile(block, "README.md", "exec"), scope)
    from kto_kernels import kto_loss

    torch.manual_seed(1)
    logits = torch.randn(4, 7, 50, requires_grad=True)
    ref_logits = logits.detach() + 0.1 * torch.randn(4, 7, 50)
    labels = torch.randint(50, (4, 7))
    labels[:, :2] = -100
    desirable = torch.tensor([True, False, True, True])
    theirs = scope["plain_kto"](logits, ref_logits, labels, desirable, kl=0.1)
    ours = kto_loss(logits, labels, desirable, ref_logits=ref_logits, kl=0.1).loss
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, logits)[0], torch.autograd.grad(theirs, logits)[0])


def test_tables_agree_with_the_results_files():
    subprocess.run([sys.executable, "-m", "benchmarks", "report", "--check"], cwd=ROOT, check=True)


def test_every_make_target_and_file_that_it_names_exists():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for name in re.findall(r"`?make ([a-z-]+)", README):
        assert name in targets, name
    for path in re.findall(r"\]\(([a-z_.][^)#:]*)\)", README):
        assert (ROOT / path).exists(), path
