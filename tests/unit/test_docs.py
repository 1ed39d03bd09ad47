"""The documentation is true to the repository: links, paths, names beside files, the key reference, README's length.

What counts as a mention, in README.md, CONTRIBUTING.md, CHANGELOG.md and docs/:

- a link is `[text](target)` outside fenced code; its target is relative to the file, its anchor a heading's slug;
- a path is a word in backticks or in fenced code that begins with a directory of the repository (`tools/train.py`), or
  a word in backticks that ends in .py; it may also be relative to megadpo/ or to tests/. Words with a part in
  capitals (`conf/GROUP/NAME.yaml`) or a placeholder are none;
- a name beside a file is an identifier in backticks in one of these forms: "`a`, `b` and `c` in `file.py`" (or "of",
  "from"), "`name` (`file.py`)", "`file.py`: `name`", "`file.py`: an entry in `name`", "(`file.py`, `name`)"; the file
  may be a link. A name exists in a file whose code, comments and texts left out, has every part of it.
"""

from __future__ import annotations

import functools
import io
import os
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from megadpo.config import validation

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))  # as the tools have it

from docs import configuration, site  # noqa: E402

PAGES = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / name for name in site.ROOT_PAGES)])
DIRECTORIES = "conf|docker|docs|megadpo|tests|tools"
README_LINES = 150

FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`\n]+)`")
IN_A_DIRECTORY = re.compile(rf"(?<![\w./-])(?:{DIRECTORIES})/[\w./*-]*")
PLACEHOLDER = re.compile(r"[*…]|(?:^|[/.])[A-Z]{2,}[A-Z_]*(?:[/.]|$)")

NAME = r"`(?:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\(\))?`"
NAMES = rf"{NAME}(?:(?:, and |, | and ){NAME})*"
FILE = r"\[?`[\w/.-]+\.py`(?:\]\([^)]*\))?"
BESIDE = (
    re.compile(rf"(?P<names>{NAMES}) (?:in|of|from) (?P<file>{FILE})"),
    re.compile(rf"(?P<names>{NAMES}) \((?P<file>{FILE})\)"),
    re.compile(rf"(?P<file>{FILE}): (?P<names>{NAMES})(?! of| in)"),
    re.compile(rf"(?P<file>{FILE}): (?:an?|the) \w+ in (?P<names>{NAMES})"),
    re.compile(rf"\((?P<file>{FILE}), (?P<names>{NAMES})\)"),
)


def prose(text: str) -> str:
    """The text without fenced code, each paragraph, list item and table row on one line."""
    return re.sub(r"\n(?! *(?:[-*|#]|\d+\. |$))\s*", " ", FENCE.sub("", text))


def slugs(text: str) -> set[str]:
    """Anchors of a page's headings, as forges make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path, text: str) -> Iterator[str]:
    for target in LINK.findall(FENCE.sub("", text)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path
        if (path and not file.exists()) or (
            anchor and anchor not in slugs(file.read_text(encoding="utf-8") if path else text)
        ):
            yield target


def resolve(path: str) -> list[Path]:
    """The files that a mentioned path may mean; a bare file name means every file of that name."""
    bases = [ROOT, ROOT / "megadpo", ROOT / "tests"]
    found = [base / path for base in bases if (base / path).exists()]
    if not found and "/" not in path:
        found = [file for directory in DIRECTORIES.split("|") for file in (ROOT / directory).rglob(path)]
    return found


def missing_paths(text: str) -> Iterator[str]:
    spans = SPAN.findall(prose(text))
    mentioned = {
        match.rstrip("./-") for part in [*spans, *FENCE.findall(text)] for match in IN_A_DIRECTORY.findall(part)
    }
    mentioned |= {span for span in spans if re.fullmatch(r"[\w/.-]+\.py", span)}
    for path in sorted(mentioned):
        if not PLACEHOLDER.search(path) and not resolve(path):
            yield path


@functools.cache
def identifiers(file: Path) -> frozenset[str]:
    """Names in a module's code, those in comments and texts left out."""
    words = tokenize.generate_tokens(io.StringIO(file.read_text(encoding="utf-8")).readline)
    return frozenset(word.string for word in words if word.type == tokenize.NAME)


def missing_names(text: str) -> Iterator[str]:
    for names, path in beside(text):
        known = [identifiers(file) for file in resolve(path)]
        for name in names:
            if known and not any(set(name.split(".")) <= words for words in known):
                yield f"{name} in {path}"


def beside(text: str) -> Iterator[tuple[list[str], str]]:
    """(names, path) of every mention of names beside a file."""
    for form in BESIDE:
        for match in form.finditer(prose(text)):
            path = re.sub(r"\[?`([^`]+)`.*", r"\1", match["file"])
            yield [name.removesuffix("()") for name in SPAN.findall(match["names"]) if not name.endswith(".py")], path


def built(directory: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """mkdocs' strict build of the site of a checkout."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]  # --quiet hides warnings
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


# The pages as they are


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_paths_and_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [*dead_links(page, text)] == []
    assert [*missing_paths(text)] == []
    assert [*missing_names(text)] == []


def test_names_beside_files_are_found_in_the_pages() -> None:
    found = [mention for page in PAGES for mention in beside(page.read_text(encoding="utf-8"))]
    assert len(found) > 40


def test_readme_is_a_front_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


def test_the_key_reference_is_made_from_the_docstrings() -> None:
    page = configuration.PAGE.read_text(encoding="utf-8")
    assert configuration.render(page) == page, "run `make docs`"


def test_docstrings_state_the_ranges_that_are_checked() -> None:
    rows = {row.split("`")[1]: row.split(" | ")[1] for row in configuration.reference().splitlines() if "| `" in row}
    for key, limits in validation._RANGES.items():
        stated = str(limits).removeprefix("a finite number ").replace("4294967296", "2**32")
        own = "in [0, lr]" if key == "optimizer.min_lr" else stated  # whose upper end is another key
        assert rows[key].endswith(f", {own}"), f"{key}: its docstring must state {own!r}"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    result = built(ROOT, tmp_path)
    assert result.returncode == 0, result.stderr
    start = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert 'href="configuration.html"' in start and "demo.png" in start
    assert "fonts.googleapis" not in start
    assert "megadpo/config/schema.py" in (tmp_path / "configuration.html").read_text(encoding="utf-8")
    for page in PAGES:  # the site's Markdown is stricter about tables and lists than a forge's
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        html = (tmp_path / site.ROOT_PAGES.get(page.name, page.name)).with_suffix(".html").read_text(encoding="utf-8")
        article = html[html.index("<article") : html.index("</article")]
        assert article.count("<table>") == len(re.findall(r"^ *\|[-|: ]+\|$", text, re.MULTILINE)), page.name
        assert article.count("<li>") == len(re.findall(r"^ *(?:[-*]|\d+\.) ", text, re.MULTILINE)), page.name


# The checks themselves


@pytest.mark.parametrize(
    ("text", "dead"),
    [
        ("See [x](nowhere.md).", ["nowhere.md"]),
        ("See [x](data.md#no-such-heading).", ["data.md#no-such-heading"]),
        ("# Here\n[x](#there), [y](#here), [z](data.md#layouts), [w](../megadpo/errors.py)", ["#there"]),
        ("```\n[x](nowhere.md)\n```\n[web](https://example.com/x)", []),
    ],
)
def test_a_dead_link_is_found(text: str, dead: list[str]) -> None:
    assert list(dead_links(ROOT / "docs" / "page.md", text)) == dead


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("`tools/trian.py` and `tools/train.py`", ["tools/trian.py"]),
        ("`python tools/trian.py +model=hf`", ["tools/trian.py"]),
        ("```\ntorchrun tools/trian.py\n```", ["tools/trian.py"]),
        ("`data/batches.py`, `data/batch.py`, `batch.py`", ["data/batches.py"]),
        ("`batches.py`", ["batches.py"]),
        ("`tests/unitt/`, `tests/unit/`", ["tests/unitt"]),
        ("`conf/GROUP/NAME.yaml`, `conf/model/hf.yaml`, `tests/unit/*`, `/x/tools/y`, `metrics.jsonl`", []),
    ],
)
def test_a_missing_path_is_found(text: str, missing: list[str]) -> None:
    assert list(missing_paths(text)) == missing


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("`compose_confg` in `config/compose.py`", ["compose_confg in config/compose.py"]),
        ("`nothing` (`megadpo/errors.py`)", ["nothing in megadpo/errors.py"]),
        ("`megadpo/errors.py`: `nothing`", ["nothing in megadpo/errors.py"]),
        ("(`errors.py`, `nothing`)", ["nothing in errors.py"]),
        ("`errors.py`: an entry in `nothing`", ["nothing in errors.py"]),
        ("`ConfigError`, `nothing` and `DataError`\nof [`errors.py`](../megadpo/errors.py)", ["nothing in errors.py"]),
        ("`Config.nothing` in `config/schema.py`", ["Config.nothing in config/schema.py"]),
        ("`ConfigError` in `errors.py`; `show()` in `config/schema.py`", []),
        ("`traceback` in `errors.py`", ["traceback in errors.py"]),  # in a docstring at most, not in code
    ],
)
def test_a_missing_name_is_found(text: str, missing: list[str]) -> None:
    assert list(missing_names(text)) == missing


def test_another_docstring_changes_the_reference() -> None:
    page = configuration.PAGE.read_text(encoding="utf-8")
    assert configuration.render(page.replace("Peak learning rate", "Some learning rate")) == page
    with pytest.raises(ValueError, match="lacks the line"):
        configuration.render("# Configuration\n")


def test_a_broken_site_is_found(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "docs", copy / "docs")
    shutil.copytree(ROOT / "tools" / "docs", copy / "tools" / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", *site.ROOT_PAGES):
        shutil.copy(ROOT / name, copy)
    (copy / "docs" / "data.md").write_text("[x](nowhere.md) [y](models.md#no-such-heading) [z](/absolute.md)\n")
    (copy / "docs" / "orphan.md").write_text("# In no menu\n")
    result = built(copy, tmp_path / "out")
    assert result.returncode != 0
    for complaint in ("nowhere.md", "no-such-heading", "/absolute.md", "orphan.md"):
        assert complaint in result.stderr


def test_links_of_the_site() -> None:
    text = "[a](docs/data.md#x) ![b](docs/demo.png) [c](CONTRIBUTING.md) [`d`](megadpo/errors.py) [e](gone.py)"
    expected = "[a](data.md#x) ![b](demo.png) [c](contributing.md) `d` [e](gone.py)"
    assert site.site_links(text, "README.md") == expected
    assert site.site_links("[r](../README.md#state)\n```\n[d](../README.md)\n```", "docs/data.md") == (
        "[r](index.md#state)\n```\n[d](../README.md)\n```"
    )
