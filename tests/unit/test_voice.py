"""Docstrings state what is returned or done: none opens with a question word, as a noun clause would."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOUN_CLAUSE = re.compile(r"\s*(What|Whether|Where|How|Which|Who|When)\b")


def noun_clauses(source: str) -> Iterator[str]:
    """Yields line and first words of every docstring in `source` that opens with a question word."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text is not None and NOUN_CLAUSE.match(text):
                yield f"{node.body[0].lineno}: {text.strip()[:60]}"


def sources() -> list[Path]:
    return [path for room in ("megadpo", "tools") for path in sorted((ROOT / room).rglob("*.py"))]


def test_no_docstring_opens_with_a_question_word() -> None:
    files = sources()
    assert len(files) > 100
    found = [f"{path.relative_to(ROOT)}:{line}" for path in files for line in noun_clauses(path.read_text("utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        '"""What a run leaves."""',
        'class Gpu:\n    """\n    Which cards there are."""',
        'def fits() -> bool:\n    """Whether it fits."""',
        'class Plan:\n    async def step(self) -> int:\n        """How long it takes."""',
    ],
)
def test_a_noun_clause_is_found(source: str) -> None:
    assert len(list(noun_clauses(source))) == 1


def test_other_openings_are_accepted() -> None:
    plain = '"""Whatever."""\ndef fits() -> bool:\n    """Returns True where it fits."""\n    return "Whether it fits"'
    assert not list(noun_clauses(plain))
