"""The site's start page is README.md, and its links are those of the repository: mkdocs asks for both here.

Files outside docs/ have no page of their own. A link to one becomes an address in the repository where pyproject.toml's
`project.urls` names one, and plain text until then.
"""

from __future__ import annotations

import os.path
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from flashnorm_cli.report.project import address

ROOT = Path(__file__).parents[2]
# Of the repository's own files, those that are pages; every other page lies in docs/.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
REPOSITORY_PATH = {page: path for path, page in PAGES.items()}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")
FENCED = re.compile(r"(^(?:```|~~~).*?^(?:```|~~~)\s*$|^(?: {4}|\t).*?$)", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The repository's address, where the project has one."""
    config.repo_url = config.repo_url or address()
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/."""
    for path, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of the repository as links of the site. Without headings, a page needs no room for its contents."""
    if "\n## " not in markdown:
        page.meta["hide"] = ["toc"]
    here = REPOSITORY_PATH.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    parts = FENCED.split(markdown)  # every second part is code
    return "".join(
        part if i % 2 else LINK.sub(lambda m: _link(m, here, page.file.src_uri, config.repo_url), part)
        for i, part in enumerate(parts)
    )


def _link(match: re.Match[str], here: str, page: str, repository: str | None) -> str:
    """One link of the repository's file `here`, whose page is `page`."""
    image, text, target, anchor = match.groups()
    path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
    if not (ROOT / path).exists():
        return match[0]  # mkdocs says so, and stops
    if path in PAGES:
        there = PAGES[path]
    elif path.startswith("docs/"):
        there = path.removeprefix("docs/")
    elif repository:
        return f"{image}[{text}]({repository.rstrip('/')}/blob/HEAD/{path}{anchor or ''})"
    else:
        return text
    return f"{image}[{text}]({os.path.relpath(there, posixpath.dirname(page) or '.')}{anchor or ''})"
