"""`make address REPOSITORY=owner/name`: in every file that git tracks, replaces the repository's address, which
pyproject.toml has, by another one."""

import re
import subprocess
import sys
from pathlib import Path


def replace(old: str, new: str) -> None:
    # The repository, and the pages that GitHub publishes of it.
    pairs = [(old, new), (old.replace("/", ".github.io/"), new.replace("/", ".github.io/"))]
    names = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    for path in map(Path, names.split("\0")[:-1]):
        text = changed = path.read_bytes() if path.is_file() else b""
        for before, after in pairs:
            changed = re.sub(rf"\b{re.escape(before)}(?![\w-])".encode(), after.encode(), changed)
        if changed != text:
            path.write_bytes(changed)
            print(path)


if __name__ == "__main__":
    if not re.fullmatch(r"[\w-]+/[\w.-]+", sys.argv[1]):
        raise SystemExit(f"make address REPOSITORY=owner/name: expected an owner and a name, got {sys.argv[1]!r}")
    replace(
        re.search(r'Repository = "https://github\.com/([^"]+)"', Path("pyproject.toml").read_text())[1], sys.argv[1]
    )
