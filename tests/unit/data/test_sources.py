"""Every kind of source gives the same rows with their lines; every fault of a file is told with its place."""

from __future__ import annotations

import csv
import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from megadpo.data import json_rows
from megadpo.data.json_rows import RowProblem
from megadpo.data.source_spec import SourceKind, SourceSpec, check_source, parse_source
from megadpo.data.sources import open_source
from megadpo.errors import DataError
from tests.helpers.pairs import read_pairs

ROW = {"prompt": "p", "chosen": "c", "rejected": "r"}
ROWS = [{**ROW, "prompt": f"é \u2028 {i}", "note": None if i % 2 else "n"} for i in range(5)]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


def save_split(path: Path, rows: list[dict[str, Any]]) -> None:
    datasets.DatasetDict({"a": datasets.Dataset.from_list(rows)}).save_to_disk(path)


WRITERS: dict[str, tuple[str, Callable[[Path, list[dict[str, Any]]], object]]] = {
    "lines": ("d.jsonl", lambda path, rows: write(path, "".join(json.dumps(row) + "\n" for row in rows))),
    "lines in .json": ("d.json", lambda path, rows: write(path, "\n".join(map(json.dumps, rows)))),
    "array": ("d.json", lambda path, rows: write(path, json.dumps(rows, indent=1, ensure_ascii=False))),
    "parquet": ("d.parquet", write_table),
    "csv": ("d.csv", write_csv),
    "saved dataset": ("d", lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(path)),
    "saved split": ("d:a", lambda path, rows: save_split(path.with_name("d"), rows)),
}
FILES = {name: writer for name, writer in WRITERS.items() if "saved" not in name}


def refused(path: Path | str, line: int | None, *words: str) -> None:
    """Checks that reading `path` is a DataError at `line` whose message holds all `words`."""
    place = f"{path}: " if line is None else f"{path}:{line}: "
    with pytest.raises(DataError, match=f"^{re.escape(place)}") as caught:
        read_pairs(path)
    for word in words:
        assert word in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- every kind
@pytest.mark.parametrize("kind", WRITERS)
def test_each_kind_gives_the_same_pairs(tmp_path: Path, kind: str) -> None:
    name, writer = WRITERS[kind]
    writer(tmp_path / name, ROWS)
    spec = f"{tmp_path / name}"
    pairs = read_pairs(spec)
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [(r["prompt"], "c", "r") for r in ROWS]
    assert [pair.index for pair in pairs] == [0, 1, 2, 3, 4]
    lines = {"array": range(2, 32, 6), "csv": range(2, 7)}.get(kind, range(1, 6))
    row = "row " if kind in ("parquet", "saved dataset", "saved split") else ""
    assert [pair.where for pair in pairs] == [f"{spec}:{row}{line}" for line in lines]
    shares = [row.progress for row in open_source(spec).rows()]
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] == 1


@pytest.mark.parametrize("kind", WRITERS)
def test_the_digest_is_of_the_content(tmp_path: Path, kind: str) -> None:
    name, writer = WRITERS[kind]
    digests = []
    for folder, rows in (("1", ROWS), ("2", ROWS), ("3", [*ROWS[:4], {**ROWS[4], "chosen": "d"}])):
        (tmp_path / folder).mkdir()
        writer(tmp_path / folder / name, rows)
        source = open_source(str(tmp_path / folder / name))
        digests.append(source.digest())
        assert source.digest() == digests[-1]
    assert len(digests[0]) == 64
    assert digests[0] == digests[1] != digests[2]


def test_the_same_bytes_read_in_another_way_have_another_digest(tmp_path: Path) -> None:
    files = [write(tmp_path / name, "[]") for name in ("d.json", "d.jsonl")]
    assert len({open_source(str(file)).digest() for file in files}) == 2


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "csv"])
def test_conversations_and_missing_columns_come_through_tables(tmp_path: Path, kind: str) -> None:
    name, writer = WRITERS[kind]
    user, call = {"role": "user", "content": "p"}, {"name": "f", "arguments": '{"x": 1}'}
    answers = [{"role": "assistant", "content": "c"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    tools = json.dumps([{"name": "f"}])
    rows = [
        {"prompt": [user], "chosen": answers[:1], "rejected": answers[1:], "system": "s", "tools": tools},
        {"prompt": [user], "chosen": answers[1:], "rejected": answers[:1], "system": None, "tools": None},
    ]
    writer(tmp_path / name, rows)
    first, second = read_pairs(str(tmp_path / name))
    with_call = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert (first.prompt, first.tools) == ([{"role": "system", "content": "s"}, user], [{"name": "f"}])
    assert (first.chosen, first.rejected) == (answers[:1], [with_call])
    assert (second.prompt, second.tools, second.chosen) == ([user], None, [with_call])


# -------------------------------------------------------------------------------------------------------------- specs
def test_data_paths_are_taken_apart(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    assert parse_source("a:b/c.jsonl") == SourceSpec(SourceKind.jsonl, "a:b/c.jsonl")
    assert parse_source(str(saved)) == SourceSpec(SourceKind.saved, str(saved))
    assert parse_source(f"{saved}:train") == SourceSpec(SourceKind.saved, str(saved), "train")
    assert parse_source("hf://me/set:train[:10]") == SourceSpec(SourceKind.hub, "me/set", "train[:10]")
    assert parse_source("hf://me/set/small:test") == SourceSpec(SourceKind.hub, "me/set", "test", "small")
    assert check_source("hf://me/set") is None  # its splits are asked for when it is read


def test_a_path_that_is_no_source_is_told_the_remedy(tmp_path: Path) -> None:
    assert "must be an existing file: check the path" in str(check_source("no/such.jsonl"))
    assert "FILE.jsonl, .json, .parquet or .csv" in str(check_source("no/such"))
    for name, word in (("d.txt", "'.txt' is not known: must be FILE.jsonl"), ("d.jsonl.gz", "unpack the file first")):
        assert word in str(check_source(str(write(tmp_path / name, "x"))))
    for spec in ("hf://set:train", "hf://a/b/c/d:train", "hf:///b:train"):
        assert "must be hf://OWNER/NAME:SPLIT" in str(check_source(spec))
    assert "saved with save_to_disk" in str(check_source(str(tmp_path)))
    with pytest.raises(DataError, match=r"^no/such\.jsonl: must be an existing file"):
        open_source("no/such.jsonl")
    file = write(tmp_path / "d.jsonl", "")
    source = open_source(str(file))
    file.unlink()
    for use in (source.digest, lambda: list(source.rows())):
        with pytest.raises(DataError, match=r"d\.jsonl: cannot be read: No such file"):
            use()


def test_a_saved_dataset_must_be_asked_for_a_split_that_it_has(tmp_path: Path) -> None:
    single, several = tmp_path / "single", tmp_path / "several"
    table = datasets.Dataset.from_list([ROW])
    table.save_to_disk(single)
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(several)
    assert check_source(f"{several}:test") is None
    assert check_source(str(several)) == f"must name a split; the dataset has train, test: write {several}:train"
    assert "has no split 'dev'; the dataset has train, test" in str(check_source(f"{several}:dev"))
    assert check_source(f"{single}:train") == f"names the split 'train' of a dataset that has none: write {single}"
    assert open_source(f"{several}:test").digest() != open_source(f"{several}:train").digest()
    write(several / "dataset_dict.json", "{")
    assert "dataset_dict.json that cannot be read" in str(check_source(f"{several}:test"))
    for arrow in single.glob("*.arrow"):
        write(arrow, b"x")
    with pytest.raises(DataError, match=r"single: the saved dataset cannot be loaded: .*save it again"):
        list(open_source(str(single)).rows())


def test_a_dataset_of_the_hub_is_loaded_by_name_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    table = datasets.Dataset.from_list([ROW, {**ROW, "prompt": "q"}])
    asked: list[Any] = []

    def load(*name: str | None, split: str) -> datasets.Dataset:
        asked.append((*name, split))
        return table.select(range(1)) if split.endswith("]") else table

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [pair.where for pair in read_pairs("hf://me/set:train")] == [f"hf://me/set:train:row {i}" for i in (1, 2)]
    assert len(read_pairs("hf://me/set/small:train[:1]")) == 1
    assert asked == [("me/set", None, "train"), ("me/set", "small", "train[:1]")]
    digests = {open_source(f"hf://me/set:{split}").digest() for split in ("train", "train", "test", "train[:1]")}
    assert len(digests) == 3
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *name: ["train", "test"])
    refused("hf://me/set", None, "must name a split; the dataset has train, test: write hf://me/set:train")


def test_a_dataset_that_the_hub_does_not_give_names_the_remedy() -> None:
    for spec in ("hf://no-one/nothing:train", "hf://no-one/nothing"):
        refused(spec, None, "cannot be loaded", "without a network", "save_to_disk")


# ------------------------------------------------------------------------------------------------------------ JSON read
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_byte_order_mark_crlf_blank_lines_and_no_final_newline(tmp_path: Path, name: str) -> None:
    row = json.dumps(ROWS[0], ensure_ascii=False)
    text = f"\r\n{row}\r\n \r\n{row}" if name == "data.jsonl" else f"\r\n[{row},\r\n\r\n{row}]"
    path = write(tmp_path / name, b"\xef\xbb\xbf" + text.encode("utf-8"))
    pairs = read_pairs(path)
    assert [pair.where for pair in pairs] == [f"{path}:2", f"{path}:4"]
    assert pairs[0].prompt == ROWS[0]["prompt"]


def test_escaped_surrogate_pairs_are_characters(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", '{"prompt": "\\ud83d\\ude00", "chosen": "c", "rejected": "r"}')
    assert read_pairs(path)[0].prompt == "😀"


def test_lines_of_an_array_are_where_its_objects_start(tmp_path: Path) -> None:
    row = '{"prompt": "p",\n "chosen": "c", "rejected": "r"}'
    path = write(tmp_path / "data.json", f"\n[\n  {row}\n,\n\n{row}]\n")
    assert [pair.where for pair in read_pairs(path)] == [f"{path}:3", f"{path}:7"]


@pytest.mark.parametrize("chunk", [4, 5, 7])
def test_an_array_is_read_through_a_window_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(json_rows, "_CHUNK", chunk)
    path = write(tmp_path / "data.json", b"\xef\xbb\xbf" + json.dumps(ROWS, ensure_ascii=False, indent=1).encode())
    assert [row.line for row in open_source(str(path)).rows()] == [2, 8, 14, 20, 26]
    assert [pair.prompt for pair in read_pairs(path)] == [row["prompt"] for row in ROWS]
    path = write(tmp_path / "numbers.json", "[12345, 6.78e+9]")
    assert [row.value for row in open_source(str(path)).rows()] == [b"12345", b"6.78e+9"]


def test_a_megabyte_in_one_line_is_read_and_a_row_over_the_limit_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = json.dumps({**ROW, "prompt": "x" * 2**20})
    lines, array = write(tmp_path / "d.jsonl", f"{text}\n{text}\n"), write(tmp_path / "d.json", f"[\n{text}]")
    for path in (lines, array):
        assert len(read_pairs(path)[0].prompt) == 2**20
    monkeypatch.setattr(json_rows, "LONGEST_ROW", 2**19)
    refused(lines, 1, "longer than 524288 bytes")
    refused(array, 2, "at most 524288 bytes")


# ------------------------------------------------------------------------------------------------------------ bad JSON
GOOD_LINE = json.dumps(ROW).encode()
BAD_LINES = {
    "cut": (b'{"prompt": "p", "chosen": "c", "rej', ["may be truncated"]),
    "cut in a character": (b'{"prompt": "\xc3', ["invalid UTF-8", "may be truncated"]),
    "not json": (b"prompt: p\n", ["not valid JSON", "Expecting value"]),
    "two objects": (GOOD_LINE + GOOD_LINE + b"\n", ["Extra data"]),
    "utf-8": (b'{"prompt": "\xff", "chosen": "c", "rejected": "r"}\n', ["invalid UTF-8", "0xff", "byte 13"]),
    "raw NUL": (b'{"prompt": "\x00", "chosen": "c", "rejected": "r"}\n', ["Invalid control character"]),
    "NUL": (b'{"prompt": "\\u0000", "chosen": "c", "rejected": "r"}\n', ["prompt", "NUL"]),
    "surrogate": (b'{"prompt": "p", "chosen": "\\ud83d", "rejected": "r"}\n', ["chosen", "U+D83D"]),
    "duplicate key": (
        b'{"prompt": "p", "chosen": "c", "rejected": "r", "chosen": "d"}\n',
        ["'chosen'", "more than once"],
    ),
    "NaN": (b'{"prompt": "p", "chosen": "c", "rejected": "r", "score": NaN}\n', ["NaN"]),
    "infinite": (b'{"prompt": "p", "chosen": "c", "rejected": "r", "score": -Infinity}\n', ["-Infinity"]),
    "array": (b'["p", "c", "r"]\n', ["a JSON object", "a list"]),
    "number": (b"3\n", ["a JSON object", "a number"]),
    "nested": (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", ["nested too deeply"]),
    "digits": (b'{"prompt": ' + b"9" * 5_000 + b"}\n", ["not valid JSON", "digits"]),
}
# In an array these hide where the next row begins; the others spoil one row.
BREAKS_AN_ARRAY = ("not json", "raw NUL", "nested")


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named(tmp_path: Path, name: str) -> None:
    line, words = BAD_LINES[name]
    path = write(tmp_path / "data.jsonl", GOOD_LINE + b"\n\n" + line)
    refused(path, 3, *words)
    assert [row.line for row in open_source(str(path)).rows()] == [1, 3]  # it spoils nothing but itself


@pytest.mark.parametrize("name", [name for name in BAD_LINES if "cut" not in name and name != "two objects"])
def test_a_bad_element_of_an_array_is_named(tmp_path: Path, name: str) -> None:
    line, words = BAD_LINES[name]
    path = write(tmp_path / "data.json", b"[" + GOOD_LINE + b",\n\n" + line + b",\n" + GOOD_LINE + b"]")
    refused(path, 3, *words)
    if name not in BREAKS_AN_ARRAY:
        assert len(list(open_source(str(path)).rows())) == 3


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("[\n{}\n", 2, "columns found: none"),
        ("[ROW\n", 2, "its end"),
        ("[ROW,\n]", 2, "Expecting value"),
        ("[ROW\nROW]", 2, "'{'"),
        ("[ROW]\n[]", 2, "more text after the array"),
        ('[ROW,\n{"prompt": "p",\n "chosen" "c"}]', 3, "Expecting ':' delimiter"),
        ('[ROW,\n{"prompt": "p",\n "chosen": "c', 3, "Unterminated string"),
        ("[]", 1, "no pairs"),
        (" [ \n ] ", 1, "no pairs"),
        ("", 1, "empty"),
        (" \r\n\n", 1, "empty"),
        ("{\n", 1, "an array, or one object on each line"),
    ],
)
def test_a_bad_array_is_named(tmp_path: Path, text: str, line: int, word: str) -> None:
    refused(write(tmp_path / "data.json", text.replace("ROW", GOOD_LINE.decode())), line, word)


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\n \n"])
@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv"])
def test_an_empty_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    refused(
        write(tmp_path / name, content), 1, "the file is empty" if name != "d.csv" or len(content) != 3 else "empty"
    )


# -------------------------------------------------------------------------------------------------------------- tables
HEADER = "prompt,chosen,rejected\n"
BAD_TABLES = {
    "too few fields": ("p,c\n", "the row has 2 fields, the header has 3 (prompt, chosen, rejected)"),
    "too many fields": ("p,c,r,x\n", "the row has 4 fields"),
    "empty field": ("p,,r\n", "chosen is empty"),
    "open quote": ('p,c,"r\n', "not valid CSV: unexpected end of data"),
    "text after a quote": ('p,"c"c,r\n', "not valid CSV: ',' expected after '\"'"),
    "utf-8": (b"p,c,\xff\n", "rejected holds invalid UTF-8 (byte 0xff)"),
    "NUL": ("p,c\0,r\n", "chosen holds a NUL character"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_bad_row_of_a_csv_file_is_named(tmp_path: Path, name: str) -> None:
    bad, word = BAD_TABLES[name]
    bad = bad if isinstance(bad, bytes) else bad.encode()
    path = write(tmp_path / "d.csv", HEADER.encode() + b'"p\n\nq",c,r\n' + bad)
    refused(path, 5, word)
    if not word.startswith("not valid"):
        assert [row.line for row in open_source(str(path)).rows()] == [2, 5]


@pytest.mark.parametrize("header", ["prompt,chosen,chosen\n", "prompt,,chosen\n"])
def test_a_csv_header_names_each_column_once(tmp_path: Path, header: str) -> None:
    refused(write(tmp_path / "d.csv", f"{header}p,c,r\n"), 1, "must name every column, and each once")


def test_a_csv_file_without_rows_holds_no_pairs(tmp_path: Path) -> None:
    refused(write(tmp_path / "d.csv", HEADER), 1, "no pairs")


def test_long_csv_fields_are_read_and_the_limit_of_the_process_stays(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    path = tmp_path / "d.csv"
    write_csv(path, [{**ROW, "prompt": "x" * (limit + 1)}] * 2)
    rows = open_source(str(path)).rows()
    next(rows)
    assert csv.field_size_limit() == limit
    assert len(next(rows).value["prompt"]) == limit + 1


def test_parquet_that_is_none_or_empty_is_named(tmp_path: Path) -> None:
    refused(write(tmp_path / "d.parquet", b"PAR1"), None, "not a Parquet file that can be read")
    write_table(tmp_path / "cut.parquet", ROWS)
    content = (tmp_path / "cut.parquet").read_bytes()
    refused(write(tmp_path / "cut.parquet", content[:-20]), None, "not a Parquet file that can be read")
    table = pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "none.parquet")
    with pytest.raises(DataError, match=r"none\.parquet:row 1: there are no pairs"):
        read_pairs(tmp_path / "none.parquet")


def test_invalid_utf8_in_a_table_spoils_its_row_alone(tmp_path: Path) -> None:
    texts = pyarrow.Array.from_buffers(
        pyarrow.string(),
        3,
        [
            None,
            pyarrow.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0])),
            pyarrow.py_buffer(b"p\xffq"),
        ],
    )
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": texts, "chosen": ["c"] * 3, "rejected": ["r"] * 3}), tmp_path / "d.parquet"
    )
    good, bad, last = (row.value for row in open_source(str(tmp_path / "d.parquet")).rows())
    assert (good["prompt"], last["prompt"]) == ("p", "q")
    assert isinstance(bad, RowProblem) and "invalid UTF-8 (byte 0xff)" in str(bad)


@pytest.mark.parametrize("kind", FILES)
def test_what_is_in_memory_does_not_grow_with_the_file(tmp_path: Path, kind: str) -> None:
    name, writer = FILES[kind]
    writer(tmp_path / name, [{**ROW, "prompt": "x" * 2**12}] * 2**11)  # 8 MiB
    tracemalloc.start()
    try:
        assert sum(1 for _ in open_source(str(tmp_path / name)).rows()) == 2**11
        assert tracemalloc.get_traced_memory()[1] < 3 * 2**20
    finally:
        tracemalloc.stop()
