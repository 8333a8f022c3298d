"""The pages of docs/: their examples run, the files, tests and targets that they name exist, and the tables of
environment variables and of error messages are those of the code. `make docs` builds the site and checks its links."""

import ast
import re
from pathlib import Path

import pytest

import kto_kernels
from tests.package.pages import make_targets, targets_that_it_names

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
# These two pages speak of earlier states of the code too.
OF_NOW = [page for page in PAGES if page.name not in ("trust.md", "versions.md")]
named = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def cells(page: str, column: int) -> list[str]:
    """The code spans in one column of all tables of a page."""
    rows = [line.split(" | ") for line in (DOCS / page).read_text().splitlines() if line.startswith("|")]
    return [span for row in rows for span in re.findall(r"`([^`]+)`", row[column])]


# Examples, links and names ────────────────────────────────────────────────────────────────────────────────────────────


@named
def test_the_examples_run(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(compile(block, page.name, "exec"), {})


@named
def test_linked_files_exist(page):
    """Also what lies outside docs/, which the builder of the site does not look at."""
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
        assert (DOCS / target).exists(), target


def test_files_tests_and_targets_that_are_named_exist():
    text = "\n".join(page.read_text() for page in OF_NOW)
    spans = re.findall(r"`([^`\n]+)`", text)
    # As they lie in the repository, in the package, or in tests/; in a list of files also by their last name.
    folders = (ROOT, ROOT / "kto_kernels", ROOT / "tests")
    known = {
        path.name for folder in ("kto_kernels", "csrc", "tests", "examples") for path in (ROOT / folder).rglob("*")
    }
    files = [span for span in spans if re.fullmatch(r"[\w./]+\.(py|h|cpp|cu|cuh|sh)", span)]
    for name in files:
        assert name in known or any((folder / name).exists() for folder in folders), name
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    promised = [span for span in spans if re.fullmatch(r"test_\w+…?", span)]
    for name in promised:
        assert f"def {name.removesuffix('…')}" in tests, name
    made = targets_that_it_names(text)
    assert made <= make_targets()
    assert len(files) > 30 and len(promised) > 10 and len(made) > 5


def test_every_public_name_is_on_the_page_of_the_api():
    entries = re.findall(r"^::: kto_kernels\.(\w+)$", (DOCS / "api.md").read_text(), re.M)
    assert sorted(entries) == sorted(kto_kernels.__all__)


# Environment variables ────────────────────────────────────────────────────────────────────────────────────────────────

READ = (
    r'environ\.(?:get|setdefault)\(\s*"([A-Z]\w+)"',
    r'environ\["([A-Z]\w+)"\](?!\s=\s)',  # and no assignment
    r'getenv\("([A-Z]\w+)"',
    r'"([A-Z]\w+)" in os\.environ',
    r"\$\{([A-Z]\w+):-",  # a shell's ${NAME:-default}
)


def code() -> dict[Path, str]:
    folders = ("kto_kernels", "csrc", "benchmarks", "tests", "examples")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")] + [ROOT / "setup.py"]
    sources = [path for path in paths if path.suffix in (".py", ".sh", ".cpp", ".h", ".cu", ".cuh")]
    return {path: path.read_text() for path in sources if path != Path(__file__)}


def test_the_table_of_environment_variables_is_that_of_the_code():
    sources = code()
    table = cells("environment.md", 0)
    first = [span for span in table if re.fullmatch(r"[A-Z][A-Z0-9_]+", span)]
    assert len(first) == len(set(first)), "a variable has two entries"
    everything = "\n".join(sources.values())
    words = set(re.findall(r"[A-Z][A-Z0-9_]+", everything))
    ours = {word for word in words if word.startswith(("KTO_KERNELS_", "RUN_GPU_")) and not word.endswith("_")}
    read = ours | {name for pattern in READ for name in re.findall(pattern, everything)}
    # setup.py reads these through functions of its own.
    setup = sources[ROOT / "setup.py"]
    read |= {name for call in re.findall(r"\benvironment\((\".*?\")\)", setup) for name in re.findall(r'"(\w+)"', call)}
    read |= {
        name for line in re.findall(r"for name in \((.*?)\) if os\.environ", setup) for name in re.findall(r"\w+", line)
    }
    assert read - set(first) == set(), "read, and not in the table"
    assert set(first) - words == set(), "in the table, and nowhere in the code"


# Error messages ───────────────────────────────────────────────────────────────────────────────────────────────────────


def literal(node: ast.AST | None) -> str | None:
    """The text of a string in the source, with … for every value that is put into it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"\{\}(\.\{\})*|%[rs]", "…", node.value)  # also what `format` and `logging` fill in
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return literal(node.func.value)
    return None


def package() -> dict[Path, str]:
    return {
        path: text for path, text in code().items() if path.parent == ROOT or (ROOT / "kto_kernels") in path.parents
    }


def quotes() -> list[str]:
    return cells("troubleshooting.md", 0)


def test_every_message_that_is_quoted_is_in_the_source():
    said = [text for source in package().values() for node in ast.walk(ast.parse(source)) if (text := literal(node))]
    said += [text for path, text in code().items() if path.suffix in (".cpp", ".h", ".cuh")]
    found = quotes()
    assert len(found) > 80
    whole = "\0".join(said)
    assert [quote for quote in found if quote not in whole] == []


def test_every_error_that_is_raised_is_quoted():
    """Errors whose message is written where they are raised; not assertions."""
    raised = [
        text
        for source in package().values()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and node.exc.args
        and ast.unparse(node.exc.func) != "AssertionError"
        and (text := literal(node.exc.args[0]))
    ]
    assert len(raised) > 60
    assert [text for text in raised if not any(quote in text for quote in quotes())] == []


# The site ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_workflow_publishes_what_make_docs_builds():
    yaml = pytest.importorskip("yaml")  # comes with transformers
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "docs.yml").read_text())["jobs"]
    steps = jobs["build"]["steps"]
    assert {"run": "make docs"} in steps
    (uploaded,) = (step["with"]["path"] for step in steps if "upload-pages-artifact" in step.get("uses", ""))
    assert f"site_dir: {uploaded}\n" in (ROOT / "mkdocs.yml").read_text()
    assert jobs["publish"]["needs"] == "build"


def test_make_docs_fails_on_a_warning():
    """With --quiet as well, mkdocs would count no warnings."""
    assert re.search(r"^docs:.*\n(?:\t.*\n)*\t\$\(BIN\)/mkdocs build --strict$", (ROOT / "Makefile").read_text(), re.M)
    assert "make docs\n" in (ROOT / ".ci" / "run").read_text()
