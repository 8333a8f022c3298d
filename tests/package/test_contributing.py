"""The files for contributors and for citations: their commands and files exist, and they say what the package says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import kto_kernels
from tests.package.pages import ROOT, address, files_that_it_links, make_targets, targets_that_it_names

tomllib = pytest.importorskip("tomllib")  # Python 3.11
yaml = pytest.importorskip("yaml")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def test_every_make_target_is_explained_and_every_one_that_is_explained_exists():
    assert targets_that_it_names(CONTRIBUTING) == make_targets() - {"clean"}


@pytest.mark.parametrize("page", [CONTRIBUTING, CHANGELOG], ids=["contributing", "changelog"])
def test_every_file_that_it_links_exists(page):
    assert files_that_it_links(page)
    assert [path for path in files_that_it_links(page) if not (ROOT / path).exists()] == []


def test_every_folder_of_tests_and_every_marker_is_explained():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert set(re.findall(r"`tests/(\w+)/`", CONTRIBUTING)) == folders
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    assert set(re.findall(r"@pytest\.mark\.(\w+)", CONTRIBUTING)) == {re.match(r"\w+", marker)[0] for marker in markers}


def test_the_changelog_has_the_form_and_this_version():
    versions = re.findall(r"^## \[([^]]+)\](.*)$", CHANGELOG, re.M)
    assert versions[0] == ("Unreleased", "")
    assert all(re.fullmatch(r" - \d{4}-\d\d-\d\d", date) for _, date in versions[1:])
    assert kto_kernels.__version__ in dict(versions)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", CHANGELOG, re.M)) <= kinds
    assert set(re.findall(r"^\[([^]]+)\]: https://", CHANGELOG, re.M)) == set(dict(versions))


def test_the_citation_is_of_this_version_and_of_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what the format asks for
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0" and str(citation["version"]) == kto_kernels.__version__
    assert citation["license"] == project["license"] and citation["authors"] == project["authors"]
    assert citation["repository-code"] == project["urls"]["Repository"]
    (paper,) = citation["references"]
    assert paper["url"].endswith("/2402.01306") and paper["title"] in (ROOT / "README.md").read_text().replace(
        "\n", " "
    )
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["Ethayarajh", "Xu", "Muennighoff", "Jurafsky", "Kiela"]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_templates_are_forms(path):
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert fields and len({field["id"] for field in fields}) == len(fields)
    for field in form["body"]:
        assert field["type"] in {"markdown", "textarea", "input", "dropdown", "checkboxes"}
        assert field["attributes"]["value" if field["type"] == "markdown" else "label"]


def test_a_report_of_a_fault_has_what_the_package_says_of_itself():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    (field,) = (field for field in form["body"] if "`python -m kto_kernels`" in field["attributes"].get("label", ""))
    assert field["validations"]["required"]


# The repository's address ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def copy(tmp_path) -> Path:
    """The files that git tracks, in a repository of their own."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if names.returncode:
        pytest.skip("not a git checkout")
    for name in names.stdout.split("\0")[:-1]:
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def make_address(folder: Path, repository: str) -> subprocess.CompletedProcess:
    command = ["make", "address", f"REPOSITORY={repository}", f"PYTHON={sys.executable}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and ".git" not in path.relative_to(folder).parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_one_command_replaces_the_address_everywhere(copy):
    before, old = contents(copy), address()
    new = "/".join(["some-one", "kto.fork"])  # this file is in the copy too
    done = make_address(copy, new)
    assert done.returncode == 0, done.stderr
    after = contents(copy)
    changed = {name for name in after if after[name] != before[name]}
    assert {"pyproject.toml", "README.md", "CITATION.cff", "CHANGELOG.md", "CONTRIBUTING.md"} <= changed
    for placeholder in (old, old.replace("/", ".github.io/")):
        assert [name for name in after if placeholder.encode() in after[name]] == []
    assert f'"https://github.com/{new}"'.encode() in after["pyproject.toml"]
    assert f'"https://{new.replace("/", ".github.io/")}/"'.encode() in after["pyproject.toml"]
    assert f"https://raw.githubusercontent.com/{new}/main/".encode() in after["README.md"]
    # Once more, back: nothing else was touched.
    assert make_address(copy, old).returncode == 0
    assert contents(copy) == before


def test_an_address_that_is_none_changes_nothing(copy):
    before = contents(copy)
    for wrong in ("", "name", "https://github.com/owner/name"):
        done = make_address(copy, wrong)
        assert done.returncode != 0 and "REPOSITORY=owner/name" in done.stderr
    assert contents(copy) == before
