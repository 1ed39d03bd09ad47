"""The hook of the documentation site (mkdocs.yml): pages of the root join it, and links to source files become code.

The same Markdown is read on a forge, where links are relative to the file and may lead anywhere in the repository.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
# File of the root -> page of the site.
ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the root."""
    for name, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page's text with its links as the site has them."""
    source = {page: name for name, page in ROOT_PAGES.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return site_links(markdown, source)


def site_links(markdown: str, source: str) -> str:
    """The text of a repository's file `source` with links relative to docs/, and without those to other places.

    A link to a file outside the site leaves its text, usually the file's name. One that leads nowhere stays as it is,
    for mkdocs to complain about.
    """

    def renewed(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups()
        if ":" in target or target.startswith("/"):
            return match[0]
        path = os.path.normpath(PurePosixPath(source).parent / target)
        if path in ROOT_PAGES:
            return f"[{text}]({ROOT_PAGES[path]}{anchor or ''})"
        if path.startswith("docs/"):
            return f"{image}[{text}]({path.removeprefix('docs/')}{anchor or ''})"
        return text if (ROOT / path).exists() else match[0]

    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(renewed, part) for part in parts)
