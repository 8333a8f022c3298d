"""For `make docs`. The pages link to files of the repository as GitHub shows them, `../SECURITY.md`: on the site a picture
among these is copied, and any other file is a link to the repository. The theme would ask GitHub for the repository's stars
on every page: the site makes no request to another server."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")  # the target of a link, after `../`


def pictures(text: str) -> set[str]:
    return {target for target in OUTSIDE.findall(text) if target.endswith((".svg", ".png"))}


def on_files(files, config):
    found = {target for page in files.documentation_pages() for target in pictures(page.content_string)}
    for target in sorted(found):
        files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown, page, config, files):
    def on_the_site(match: re.Match) -> str:
        target = match[1]
        if target in pictures(match[0]):
            return f"]({target}"
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"]({config.repo_url}/{kind}/main/{target}"

    return OUTSIDE.sub(on_the_site, markdown)


def on_post_page(output, page, config):
    return output.replace(' data-md-component="source"', "")
