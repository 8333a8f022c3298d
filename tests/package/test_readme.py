"""The README: it is short, its examples run, its figures come from the results files, what it names exists."""

import os
import re
import subprocess
import sys

import pytest
import torch

from tests.package.pages import ROOT, address, files_that_it_links, make_targets, targets_that_it_names

README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
HEADINGS = [
    "Thirty seconds",
    "Equivalent plain PyTorch",
    "Which function do I want?",
    "Results",
    "Promises",
    "Status",
    "Install",
    "Map of the code",
    "Citation and license",
]


def part(heading: str) -> str:
    return README.split(f"\n## {heading}\n")[1].split("\n## ")[0]


# Short ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_is_short():
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1100
    for line in README.splitlines():
        assert len(line) <= 120 or not line.startswith("|"), f"a table wider than a screen: {line}"


def test_its_sections_are_in_order():
    assert re.findall(r"^## (.*)$", README, re.M) == HEADINGS
    start = README.split("\n## ")[0]
    picture, figures = start.index("step-cpu.svg"), start.index("<!-- results: headlines-cpu -->")
    assert picture < figures and len(re.findall(r"^- \*\*", start[figures:], re.M)) == 3
    assert len(re.findall(r"^\| (?!---|You have)", part("Which function do I want?"), re.M)) >= 5
    assert len(re.findall(r"^\|", part("Results"), re.M)) == 2 + 6
    assert len(re.findall(r"^- \*\*.*?\]\((?:tests|docs)/", part("Promises"), re.M | re.S)) == 6
    assert len(part("Status").split("\n\n")) == 1
    assert part("Install").startswith("\n```sh\nmake test ") and "\nmake demo " in part("Install")
    assert len(part("Map of the code").split("```")[1].strip().splitlines()) == 8


# Right ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_its_examples_run_in_an_empty_file(block):
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


def test_the_loss_from_hidden_states_takes_six_lines():
    (block,) = (block for block in PYTHON if "import LinearKTOLoss" in block)
    assert len([line for line in block.splitlines() if line]) == 6


@pytest.mark.parametrize("kl", [0.1, -0.3])
def test_the_equivalent_in_plain_pytorch_is_equivalent(kl):
    """The README's `plain_kto` against ours, loss and gradient."""
    scope: dict = {}
    block = next(b for b in PYTHON if "def plain_kto" in b)
    exec(compile(block, "README.md", "exec"), scope)
    from kto_kernels import kto_loss

    torch.manual_seed(1)
    logits = torch.randn(4, 7, 50, requires_grad=True)
    ref_logits = logits.detach() + 0.1 * torch.randn(4, 7, 50)
    labels = torch.randint(50, (4, 7))
    labels[:, :2] = -100
    desirable = torch.tensor([True, False, True, True])
    theirs = scope["plain_kto"](logits, ref_logits, labels, desirable, kl=kl)
    ours = kto_loss(logits, labels, desirable, ref_logits=ref_logits, kl=kl).loss
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, logits)[0], torch.autograd.grad(theirs, logits)[0])


def test_the_tables_agree_with_the_results_files():
    subprocess.run([sys.executable, "-m", "benchmarks", "report", "--check"], cwd=ROOT, check=True)


def test_no_figure_is_typed_by_hand():
    """Times, memory and ratios stand between the marks of the report, and nowhere else."""
    by_hand = re.sub(r"<!-- results: .*?<!-- end -->", "", README, flags=re.S)
    assert re.findall(r"\d(?:\.\d+)?(?:×| ?(?:ms|s|MiB|GiB|MB|GB|%)\b)", by_hand) == []


# There ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_make_target_and_file_that_it_names_exists():
    assert targets_that_it_names(README) >= {"test", "demo"}
    assert targets_that_it_names(README) - make_targets() == set()
    paths = files_that_it_links(README)
    assert len(paths) >= 20
    assert [path for path in paths if not (ROOT / path).exists()] == []
    for line in part("Map of the code").split("```")[1].strip().splitlines():
        for path in re.findall(r"[\w/]+(?:/|\.py)(?=[ ,]|$)", line.split("  ")[0]):
            assert (ROOT / path).exists(), path


def test_its_pictures_are_in_the_repository():
    """A page of PyPI has no files beside it: pictures have whole addresses."""
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]*)\)", README)
    start = f"https://raw.githubusercontent.com/{address()}/main/"
    assert len(pictures) == 2
    for picture in pictures:
        assert picture.startswith(start) and (ROOT / picture.removeprefix(start)).is_file(), picture


def test_its_links_work_on_a_page_that_has_no_files_beside_it(tmp_path):
    """The long description of the built package, as a package index shows it."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"KTO_KERNELS_CPU": "0", "KTO_KERNELS_CUDA": "0"})
    (description,) = (path.read_text() for path in tmp_path.glob("*/PKG-INFO"))
    assert "Description-Content-Type: text/markdown" in description
    linked = re.findall(rf"\]\(https://github\.com/{address()}/blob/main/([^)#]*)", description)
    assert sorted(linked) == sorted(files_that_it_links(README))
    assert files_that_it_links(description) == []
