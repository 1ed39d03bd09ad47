"""A hundred thousand odd rows through the readers: the pair that was dressed, or an error at the row's own line."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megadpo.data.dataset import RawPair, RawRow, iter_rows, parse_row
from megadpo.data.layouts import Keys
from megadpo.errors import DataError
from tests.helpers.odd_rows import LAYOUTS, Said, anything, dressed, spoiled_line, spoiled_value, text

KEYS = Keys()
ROWS = 7_500  # of each of seven layouts in two forms: 105 000


def said(pair: RawPair) -> Said:
    return Said(pair.prompt, pair.chosen, pair.rejected, pair.tools)


def read(rows: Iterator[RawRow]) -> Iterator[tuple[RawRow, Said | DataError]]:
    """Every row with what it says; nothing but a DataError comes out of the readers."""
    for row in rows:
        try:
            yield row, said(parse_row(row, KEYS))
        except DataError as error:
            yield row, error


def collect(path: Path, found: list[tuple[RawRow, Said | DataError]]) -> None:
    """Adds what the file holds, up to the error that ends it."""
    for item in read(iter_rows([str(path)], KEYS)):
        found.append(item)


def check(path: Path, expected: Sequence[tuple[int, Said | None]], place: str = "") -> None:
    """Reads the file: rows are on the expected lines; None stands for an error that begins with the row's place."""
    found: list[tuple[RawRow, Said | DataError]] = []
    collect(path, found)
    assert [row.line for row, _ in found] == [line for line, _ in expected]
    for (row, result), (line, right) in zip(found, expected, strict=True):
        if right is None:
            assert isinstance(result, DataError), (line, row.value, result)
            assert str(result).startswith(f"{path}:{place}{line}: "), str(result)
        else:
            assert result == right, (line, row.value)


def made(name: str, rng: random.Random, *, lines: bool) -> Iterator[tuple[bytes, Said | None]]:
    """Rows of a layout, most of them good, as they stand in a file of lines or in an array."""
    for number in range(ROWS):
        row, right = LAYOUTS[name](rng)
        if number < 8 or rng.random() < 0.6:
            yield dressed(row, rng), right
        else:
            yield (spoiled_line if lines else spoiled_value)(row, rng), None


@pytest.mark.parametrize("name", LAYOUTS)
def test_lines_are_pairs_or_errors_at_their_place(tmp_path: Path, name: str) -> None:
    rng, path = random.Random(f"lines {name}"), tmp_path / "rows.jsonl"
    expected, content, line = [], bytearray(b"\xef\xbb\xbf"), 1
    for row, right in made(name, rng, lines=True):
        blanks = rng.choice([0] * 20 + [1, 2])
        ends = rng.choices([b"\n", b"\r\n"], k=blanks + 1)
        content += row + b"".join(ends)
        expected.append((line, right))
        line += 1 + blanks
    path.write_bytes(content)
    check(path, expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_elements_are_pairs_or_errors_at_their_place(tmp_path: Path, name: str) -> None:
    rng, path = random.Random(f"array {name}"), tmp_path / "rows.json"
    expected, content, line = [], bytearray(b"["), 1
    for row, right in made(name, rng, lines=False):
        before, after = (rng.choice([b"", b" ", b"\n", b"\r\n", b"\n\n\t"]) for _ in range(2))
        line += before.count(b"\n")
        expected.append((line, right))
        content += before + row + after + b","
        line += after.count(b"\n")
    path.write_bytes(bytes(content[:-1]) + b"]\n")
    check(path, expected)
    for cut in (rng.randrange(2, len(content)) for _ in range(3)):  # good up to there, and then an error with a line
        path.write_bytes(content[:cut])
        found: list[tuple[RawRow, Said | DataError]] = []
        with pytest.raises(DataError, match=rf"^{re.escape(str(path))}:\d+: not valid JSON: "):
            collect(path, found)
        assert len(found) < len(expected)
        for (row, result), (line, right) in zip(found, expected, strict=False):
            assert (row.line, right) == (line, None if isinstance(result, DataError) else result)


def _record(fields: Sequence[str]) -> str:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, quoting=csv.QUOTE_ALL).writerow(fields)
    return buffer.getvalue()


def test_tables_are_pairs_or_errors_at_their_place(tmp_path: Path) -> None:
    rng, rows = random.Random("tables"), []
    for _ in range(4_000):
        row, right = LAYOUTS["TRL standard"](rng)
        if rng.random() < 0.3:
            row, right = {**row, rng.choice(list(row)): rng.choice(["", "a\0b"])}, None
        rows.append((row, right))
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row for row, _ in rows]), path, row_group_size=300)
    check(path, [(number, right) for number, (_, right) in enumerate(rows, 1)], "row ")

    records, expected, line = [_record(["prompt", "chosen", "rejected"])], [], 2
    for row, right in rows:
        fields = list(row.values())
        if rng.random() < 0.1:
            fields, right = fields[: rng.randint(1, 2)], None
        records.append(_record(fields))
        expected.append((line, right))
        line += len(re.findall("\r\n|\r|\n", records[-1]))
    path = tmp_path / "rows.csv"
    path.write_text("".join(records), encoding="utf-8", newline="")
    check(path, expected)


def _random_row(rng: random.Random) -> dict[str, Any]:
    """Columns that layouts have, with values that any of them, or none, may have."""
    names = ["prompt", "chosen", "rejected", "conversations", "instruction", "input", "history", "system", "tools"]
    names += ["chat_template_kwargs", "messages", "x", "", "\ud800"]
    roles = ["system", "user", "user", "assistant", "assistant", "assistant", "tool", "human", "", None, 3]

    odd, texts = rng.choice([(0, 1), (0.1, 0.6), (0.5, 0.5)])

    def value() -> Any:
        if rng.random() < odd:
            return anything(rng)
        return text(rng) if rng.random() < texts else [{"role": rng.choice(roles), "content": text(rng)}]

    chosen = [*names[1:3], *rng.sample(names, rng.randint(0, 3))]
    return {name: value() for name in chosen if rng.random() < 0.9}


def test_any_row_is_a_whole_pair_or_an_error_at_its_place(tmp_path: Path) -> None:
    """Files of one row, whose layout nothing else shows, and of several."""
    rng, path, accepted = random.Random("any"), tmp_path / "rows.jsonl", 0
    for number in range(1_500):
        rows = [_random_row(rng) for _ in range(1 if number % 2 else 12)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for row, result in read(iter_rows([str(path)], KEYS)):
            if isinstance(result, DataError):
                assert str(result).startswith(f"{path}:{row.line}: ")
                continue
            accepted += 1
            parts = (result.prompt, result.chosen, result.rejected)
            assert {type(part) for part in parts} in ({str}, {list}) and all(parts)
            json.dumps(parts, ensure_ascii=False).encode("utf-8")  # no half of a character
            given = rows[row.line - 1]
            if row.layout == "TRL standard":
                assert parts == (given["prompt"], given["chosen"], given["rejected"])
    assert accepted > 100
