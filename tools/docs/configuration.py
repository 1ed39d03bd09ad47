#!/usr/bin/env python3
"""Writes the reference of all keys into docs/configuration.md, from the docstrings of megadpo/config/.

    python tools/docs/configuration.py

Replaces what stands below the marker of the page; the text above it is written by hand.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this clone's package, whatever is installed

from megadpo.config import choices, schema
from megadpo.config.choices import Choice

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
MARKER = "<!-- Generated from megadpo/config/schema.py and choices.py by `make docs`. Change the docstrings there. -->"

_RANGE = re.compile(r", (?:each )?(>=? \d+(?:\.\d+)?|in [\[(][^\])]+[\])])(?:,(?= after))?")
_NAMES = {str: "text", int: "int", float: "float", bool: "bool", typing.Any: "any"}
# Pages that say more of a choice than its comment.
_MORE = {choices.LossName: "[numerics.md](numerics.md#losses)"}


def reference() -> str:
    """The tables of all keys, a section for each group, as Markdown that ends with a line break."""
    hints = typing.get_type_hints(schema.Config)
    sections = []
    for group in fields(schema.Config):
        kind = hints[group.name]
        if is_dataclass(kind) and isinstance(kind, type):
            heading, rows = inspect.getdoc(kind) or "", list(_rows(kind, f"{group.name}."))
        else:
            heading, rows = "", [_row(group, group.name, kind, field_docs(schema.Config)[group.name])]
        table = ["| key | type | default | meaning |", "|---|---|---|---|", *rows]
        sections.append("\n".join([f"## {group.name}\n", *([f"{_linked(heading)}\n"] if heading else []), *table]))
    return "\n\n".join(sections) + "\n"


def field_docs(kind: type) -> dict[str, str]:
    """The docstring of every field of a dataclass: the text that stands below it."""
    (definition,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for statement, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(statement.target, ast.Name)
            found[statement.target.id] = inspect.cleandoc(ast.literal_eval(below.value))
    return found


def choice_comments(kind: type[Choice]) -> dict[str, str]:
    """The comment behind every member of an enum by its value, "" where there is none."""
    source = inspect.getsource(kind)
    return {
        str(member): match[1].strip()
        if (match := re.search(rf'^ +{member.name} = "{member}" +# (.+)$', source, re.MULTILINE))
        else ""
        for member in kind
    }


def stated_range(text: str) -> str:
    """The range that a docstring states first, such as ">= 1" or "in [0, 1)"; "" where it states none."""
    match = _RANGE.search(text)
    return match[1] if match else ""


def render(page: str) -> str:
    """A page with what stands below its marker made anew."""
    head, marker, _ = page.partition(MARKER)
    if not marker:
        raise ValueError(f"docs/configuration.md lacks the line {MARKER!r}: bring it back, below the text by hand")
    return f"{head}{marker}\n\n{reference()}"


def _rows(kind: type, prefix: str) -> Iterator[str]:
    hints, docs = typing.get_type_hints(kind), field_docs(kind)
    for item in fields(kind):
        yield _row(item, f"{prefix}{item.name}", hints[item.name], docs[item.name])


def _row(item: Field[typing.Any], key: str, kind: object, doc: str) -> str:
    limits = stated_range(doc)
    typed = f"{_type_name(kind)}, {limits}" if limits else _type_name(kind)
    meaning = _linked(_RANGE.sub("", doc, count=1)).replace("\n\n", "<br>").replace("\n", " ")
    cells = f"`{key}`", typed, _default(item), meaning + _choices(kind)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _type_name(kind: object) -> str:
    if kind is type(None):
        return "null"
    if isinstance(kind, types.UnionType):
        return " or ".join(_type_name(part) for part in typing.get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Choice):
        return "choice"
    parts = typing.get_args(kind)
    match typing.get_origin(kind):
        case None:
            return _NAMES[typing.cast(type, kind)]
        case origin if origin is dict:
            return f"{{name: {_type_name(parts[1])}}}"
        case origin if origin is list:
            return f"list of {_type_name(parts[0])}s"
        case _:
            return f"[{', '.join(_type_name(part) for part in parts)}]"


def _default(item: Field[typing.Any]) -> str:
    if item.default is not MISSING:
        return f"`{schema.show(item.default)}`"
    if item.default_factory is not MISSING:
        return f"`{schema.show(item.default_factory())}`"
    return "required"


def _choices(kind: object) -> str:
    """The names that a key takes, each with its comment on a line of its own where there are comments."""
    enums = [part for part in (kind, *typing.get_args(kind)) if isinstance(part, type) and issubclass(part, Choice)]
    if not enums:
        return ""
    comments = choice_comments(enums[0])
    if enums[0] in _MORE:
        return f"<br>{', '.join(f'`{name}`' for name in comments)}: see {_MORE[enums[0]]}"
    if not any(comments.values()):
        return f"<br>{', '.join(f'`{name}`' for name in comments)}"
    return "".join(f"<br>`{name}`" + (f": {comment}" if comment else "") for name, comment in comments.items())


def _linked(text: str) -> str:
    """Mentions of pages in docs/ as links from one of them."""
    return re.sub(r"\bdocs/(\w+\.md)", r"[\1](\1)", text)


def main() -> int:
    """Rewrites the page and says whether that changed it; the exit status."""
    old = PAGE.read_text(encoding="utf-8")
    new = render(old)
    PAGE.write_text(new, encoding="utf-8")
    print(f"{PAGE.relative_to(Path.cwd()) if PAGE.is_relative_to(Path.cwd()) else PAGE}:", end=" ")
    print("unchanged" if new == old else "written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
