"""Bad preference data, refused."""

from __future__ import annotations

import json
from pathlib import Path

from tests.faults.cases.case import CHAT_PAIR, PAIR, Base, Case, file_case, row, row_case

_FORMS = r"must be FILE\.jsonl, \.json, \.parquet or \.csv, DIR\[:SPLIT\] of a saved dataset, or hf://OWNER/NAME"
_CSV = "prompt,chosen,rejected\n"
_SKIP = r".*data\.on_error=skip leaves such rows out"


def _chat(**columns: object) -> str:
    return json.dumps({**CHAT_PAIR, **columns}) + "\n"


def _line_of_65_mib(here: Path, _: Base) -> None:
    """Most of the line is a hole in the file."""
    with (here / "pairs.jsonl").open("wb") as file:
        file.write(row().encode() + b'{"prompt": "')
        file.truncate(65 * 2**20)


def _saved_dataset(here: Path, _: Base) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([PAIR])
    DatasetDict({"train": rows, "test": rows}).save_to_disk(str(here / "saved"))


_NOT_JSON = [
    row_case("malformed line", '{"prompt": "a", "chosen": }\n', r"not valid JSON: Expecting value \(column 27\)"),
    row_case("truncated last line", row()[:40], r"not valid JSON: .*ends here without a newline and may be truncated"),
    row_case("two pairs on a line", row().strip() + row(), r"not valid JSON: Extra data \(column \d+\)"),
    row_case("NaN", row()[:-2] + ', "score": NaN}\n', "not valid JSON: NaN is not a JSON value; write null or leave"),
    row_case("key twice", row()[:-2] + ', "chosen": "d"}\n', "not valid JSON: the key 'chosen' appears more than once"),
    row_case("deep nesting", "[" * 100_000 + "\n", "not valid JSON: nested too deeply"),
    file_case(
        "truncated array",
        "[" + row() + "," + row()[:40],
        r"HERE/pairs\.json:2: not valid JSON: .*ends inside this row and may be truncated$",
        "data.on_error=skip",  # where the next row begins is not known: nothing to skip
        file="pairs.json",
    ),
    file_case(
        "text behind an array",
        "[" + row() + "]]",
        r"HERE/pairs\.json:2: not valid JSON: .* is expected, more text after the array found",
        file="pairs.json",
    ),
    file_case(
        "array in a .jsonl",
        json.dumps([PAIR, PAIR]),
        r"HERE/pairs\.jsonl:1: a pair is a JSON object, this is a list; .*must have the suffix \.json",
    ),
    file_case(
        "object around the rows",
        json.dumps({"data": [PAIR]}, indent=1),
        r"HERE/pairs\.json:1: not valid JSON: .*\(a \.json file is an array, or one object on each line\)",
        file="pairs.json",
    ),
]

_NOT_TEXT = [
    row_case("invalid UTF-8", b'{"prompt": "caf\xe9"}\n', r"invalid UTF-8 \(byte 0xe9, .*byte 16\); save .* as UTF-8"),
    row_case("raw NUL", '{"prompt": "a\0"}\n', r"not valid JSON: Invalid control character at \(column 14\)"),
    row_case("escaped NUL", row(chosen=" Gra\0nite."), r"chosen holds a NUL character \(U\+0000\); remove it"),
    row_case("lone surrogate", row(chosen=" \ud83d"), r"chosen holds half a surrogate pair \(U\+D83D\), .* character"),
    file_case("UTF-16", row().encode("utf-16"), r"HERE/pairs\.jsonl:1: invalid UTF-8 \(byte 0xff.*save .* as UTF-8"),
    file_case(
        "UTF-16 table",
        (_CSV + "a,b,c\n").encode("utf-16"),
        r"HERE/pairs\.csv:1: the header is not UTF-8 text .*; save the file as UTF-8",
        file="pairs.csv",
    ),
    Case(
        "line of 65 MB",
        ("data.train_path=HERE/pairs.jsonl",),
        r"HERE/pairs\.jsonl:2: a line is longer than 67108864 bytes; one pair stands on each line",
        _line_of_65_mib,
    ),
]

_NOTHING = [
    file_case("empty file", "", r"HERE/pairs\.jsonl:1: the file is empty; at least one pair is required"),
    file_case("blank lines", "\n \n\r\n", r"HERE/pairs\.jsonl:1: the file is empty; at least one pair is required"),
    file_case("empty array", "[]", r"HERE/pairs\.json:1: there are no pairs; at least one", file="pairs.json"),
    file_case("empty table", "", r"HERE/pairs\.csv:1: the file is empty; a CSV file begins with", file="pairs.csv"),
    file_case("header alone", _CSV, r"HERE/pairs\.csv:1: there are no pairs; at least one", file="pairs.csv"),
]

_NO_PAIR = [
    row_case("missing key", '{"prompt": "a", "chosen": "b"}\n', "the row lacks 'rejected'; the file's layout is TRL"),
    row_case("wrong type", row(chosen=7), r"a column has another type .*layout is TRL standard, .*chosen \(a number\)"),
    row_case("null", row(rejected=None), r"a column has another type .*layout is TRL standard, .*rejected \(null\)"),
    row_case("row that is no object", '"prompt"\n', "a pair is a JSON object, this is a string"),
    row_case(
        "mixed layouts",
        _chat(),
        "layout TRL conversational in a file whose first rows are mostly TRL standard; .*split it",
    ),
    row_case("empty prompt", row(prompt=""), "prompt is empty"),
    row_case("empty response", row(rejected=""), "rejected is empty"),
    row_case(
        "unknown role",
        _chat(prompt=[{"role": "human", "content": "Name a stone."}]),
        r"prompt\[0\]\.role is 'human'; it is one of system, developer, user, assistant, tool",
        good=_chat() * 2,
    ),
    row_case(
        "response of the user",
        _chat(chosen=CHAT_PAIR["prompt"]),
        r"chosen\[0\] is a message of 'system'; responses are the assistant's",
        good=_chat() * 2,
    ),
    row_case(
        "message without content",
        _chat(rejected=[{"role": "assistant", "text": "A river."}]),
        r"rejected\[0\] lacks 'content'; its keys are 'role', 'text'",
        good=_chat() * 2,
    ),
    file_case(
        "other column names",
        json.dumps({"question": "a", "chosen": "b", "rejected": "c"}) + "\n",
        r"HERE/pairs\.jsonl:1: no known layout; columns found: question \(a string\), .*go into data\.prompt_key",
    ),
    file_case(
        "no prompt in common",
        '{"chosen": "Granite.", "rejected": "A river."}\n',
        r"HERE/pairs\.jsonl:1: chosen and rejected have no first word in common.*name it in data\.prompt_key" + _SKIP,
    ),
]

_TABLES_AND_PATHS = [
    row_case(
        "table with a short row",
        "a,b\n",
        r"the row has 2 fields, the header has 3 \(prompt, chosen, rejected\)",
        file="pairs.csv",
        good=_CSV + "a,b,c\n",
    ),
    file_case(
        "table with an open quote",
        _CSV + 'a,"b,c\n',
        r"HERE/pairs\.csv:2: not valid CSV: .*a quote in it is written twice",
        file="pairs.csv",
    ),
    file_case(
        "table with a column twice",
        "prompt,chosen,chosen\na,b,c\n",
        r"HERE/pairs\.csv:1: the header .* must name every column, and each once",
        file="pairs.csv",
    ),
    file_case(
        "Parquet that is none",
        b"PAR1 nothing",
        r"HERE/pairs\.parquet: not a Parquet file that can be read: .*; write it again",
        file="pairs.parquet",
    ),
    Case(
        "dataset without a split",
        ("data.train_path=HERE/saved",),
        r"data\.train_path=HERE/saved: must name a split; the dataset has train, test: write HERE/saved:train",
        _saved_dataset,
    ),
    Case(
        "directory that is no dataset",
        ("data.train_path=HERE",),
        r"data\.train_path=HERE: is a directory, but no dataset saved with save_to_disk: " + _FORMS,
    ),
    Case(
        "dataset of the Hub out of reach",
        ("data.train_path=hf://nobody/nothing:train",),
        r"hf://nobody/nothing:train: the dataset cannot be loaded: .*; check its name.*; without a network, save the",
    ),
    Case("missing file", ("data.train_path=HERE/none.jsonl",), r"data\.train_path=HERE/none\.jsonl: must be an exist"),
    file_case("unknown suffix", row(), r"data\.train_path=HERE/pairs\.txt: the suffix .*" + _FORMS, file="pairs.txt"),
    file_case(
        "compressed file",
        row(),
        r"data\.train_path=HERE/pairs\.jsonl\.gz: the suffix '\.gz' is not read: unpack the file first",
        file="pairs.jsonl.gz",
    ),
    Case(
        "name too long",
        (f"data.train_path=HERE/{'x' * 300}.jsonl",),
        r"HERE/x+\.jsonl: can't be looked up \(File name too long\): check the path and its permissions",
    ),
]

_NOTHING_LEFT = [
    file_case(
        "every prompt over the limit",
        row() * 3,
        r"none of the 3 training pairs is left at data\.max_length=4 \(.*the prompt alone reaches 4 tokens: 3\): raise",
        "data.max_length=4",
    ),
    file_case(
        "too long, and nothing may be cut",
        row(),
        r"HERE/pairs\.jsonl:1: the pair has 17 tokens, data\.max_length=8 and data\.truncation=error .*: raise .*or ch",
        *("data.max_length=8", "data.truncation=error"),
    ),
    file_case(
        "every row skipped",
        '{"prompt": 3}\n' * 3,
        r"none of the 3 training pairs is left .*skipped.*: 3\): look at .*: HERE/pairs\.jsonl:1: no known layout",
        "data.on_error=skip",
    ),
    file_case(
        "bad row in a validation set",
        '{"prompt": 3}\n',
        r"HERE/pairs\.jsonl:1: no known layout" + _SKIP,
        *("data.train_path=PAIRS", "data.validation_path={good: PAIRS, other: HERE/pairs.jsonl}"),
    ),
    file_case(
        "nothing to hold out",
        row(),
        r"data\.validation_fraction=0\.5: needs at least 2 pairs, the data holds 1: give more, or name a file in data",
        "data.validation_fraction=0.5",
    ),
    Case(
        "name of a validation set",
        ("data.validation_path={a b: PAIRS, c/d: PAIRS}",),
        r"2 problems.* 1\. data\.validation_path=\{.*\}: the name 'a b' must be made of letters.*choose .*'c/d' must",
    ),
]

CASES = [*_NOT_JSON, *_NOT_TEXT, *_NOTHING, *_NO_PAIR, *_TABLES_AND_PATHS, *_NOTHING_LEFT]
