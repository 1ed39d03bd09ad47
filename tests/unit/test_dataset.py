"""Every layout that is read, and every fault of a file with the FILE:LINE it is reported at."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadpo.data.dataset import PairSource, read_pairs, split_validation
from megadpo.errors import ConfigError, DataError

STANDARD = {"prompt": "p", "chosen": "c", "rejected": "r"}
USER, GOOD, BAD = (
    {"role": "user", "content": "p"},
    {"role": "assistant", "content": "c"},
    {"role": "assistant", "content": "r"},
)
CONVERSATIONAL = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
ROLL = {"instruction": "p", "chosen": "c", "rejected": "r"}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "p"}],
    "chosen": {"from": "gpt", "value": "c"},
    "rejected": {"from": "gpt", "value": "r"},
}
LAYOUTS = {
    "TRL standard": STANDARD,
    "TRL conversational": CONVERSATIONAL,
    "ROLL instruction": ROLL,
    "ShareGPT": SHAREGPT,
}


def layouts(source: PairSource) -> list[str]:
    """The layout found in each file."""
    return [file.layout for file in source.files]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def jsonl(path: Path, *rows: Any) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def refused(path: Path, line: int, *words: str) -> None:
    """Checks that reading `path` is a DataError at `line` whose message holds all `words`."""
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}:{line}: ") as caught:
        read_pairs([path])
    for word in words:
        assert word in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- layouts
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_each_layout_from_array_and_lines(tmp_path: Path, name: str, suffix: str) -> None:
    rows = [LAYOUTS[name]] * 2
    path = tmp_path / f"data{suffix}"
    source = read_pairs([jsonl(path, *rows) if suffix == ".jsonl" else write(path, json.dumps(rows, indent=1))])
    assert layouts(source) == [name]
    first, second = source.pairs
    assert (first.index, second.index) == (0, 1)
    expected = ("p", "c", "r") if name == "TRL standard" else ([USER], [GOOD], [BAD])
    assert (first.prompt, first.chosen, first.rejected) == expected


def test_lines_of_an_array_are_where_its_objects_start(tmp_path: Path) -> None:
    row = '{"prompt": "p",\n "chosen": "c", "rejected": "r"}'
    text = f"\n[\n  {row}\n,\n\n{row}]\n"
    path = write(tmp_path / "data.json", text)
    assert [pair.where for pair in read_pairs([path]).pairs] == [f"{path}:3", f"{path}:7"]


def test_json_suffix_with_one_object_on_each_line(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "data.json", STANDARD, STANDARD)
    assert [pair.where for pair in read_pairs(path).pairs] == [f"{path}:1", f"{path}:2"]


def test_files_are_concatenated_and_keep_their_layouts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="megadpo")
    first = jsonl(tmp_path / "a.jsonl", STANDARD, {**STANDARD, "id": 1, "system": "s"}, {**STANDARD, "id": 2})
    second = jsonl(tmp_path / "b.jsonl", SHAREGPT)
    source = read_pairs([first, str(second)])
    assert [pair.index for pair in source.pairs] == [0, 1, 2, 3]
    assert source.pairs[3].where == f"{second}:1"
    assert [(file.layout, file.pairs, file.ignored_columns) for file in source.files] == [
        ("TRL standard", 3, ("id", "system")),
        ("ShareGPT", 1, ()),
    ]
    assert layouts(source) == ["TRL standard", "ShareGPT"]
    messages = [record.getMessage() for record in caplog.records]
    assert f"{first}: 3 pairs, layout TRL standard" in messages
    assert f"{first}: columns ignored: id, system" in messages
    assert f"{first}: not part of the prompt although the name suggests it: system" in messages
    assert f"{second}: 1 pairs, layout ShareGPT" in messages
    assert len(messages) == 4


def test_own_column_names(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "data.jsonl", {"q": "p", "good": "c", "bad": "r"})
    (pair,) = read_pairs([path], prompt_key="q", chosen_key="good", rejected_key="bad").pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == ("p", "c", "r")
    path = jsonl(tmp_path / "roll.jsonl", {"instruction": "p", "good": "c", "bad": "r"})
    assert layouts(read_pairs([path], chosen_key="good", rejected_key="bad")) == ["ROLL instruction"]
    with pytest.raises(ConfigError, match="three different columns"):
        read_pairs([path], chosen_key="good", rejected_key="good")


def test_the_prompt_column_wins_over_other_layouts(tmp_path: Path) -> None:
    source = read_pairs([jsonl(tmp_path / "data.jsonl", {**STANDARD, "instruction": "not read"})])
    assert layouts(source) == ["TRL standard"]
    assert source.pairs[0].prompt == "p"
    assert source.files[0].ignored_columns == ("instruction",)


@pytest.mark.parametrize(("context", "prompt"), [("x", "p\nx"), ("", "p"), (None, "p")])
def test_roll_input_follows_the_instruction(tmp_path: Path, context: str | None, prompt: str) -> None:
    source = read_pairs([jsonl(tmp_path / "data.jsonl", {**ROLL, "input": context})])
    assert source.pairs[0].prompt == [{"role": "user", "content": prompt}]
    assert source.files[0].ignored_columns == ()


def test_conversations_with_system_history_and_tools(tmp_path: Path) -> None:
    turns = [("system", ""), ("user", "a"), ("assistant", "b"), ("tool", "t")]
    prompt = [{"role": role, "content": content} for role, content in turns]
    row = {**CONVERSATIONAL, "prompt": [{**message, "tool_calls": None} for message in prompt]}
    assert read_pairs([jsonl(tmp_path / "data.jsonl", row)]).pairs[0].prompt == prompt


def test_sharegpt_turns_become_roles(tmp_path: Path) -> None:
    turns = [("system", "s"), ("human", "a"), ("gpt", "b"), ("human", "c")]
    row = {**SHAREGPT, "conversations": [{"from": speaker, "value": text} for speaker, text in turns]}
    roles = ["system", "user", "assistant", "user"]
    assert read_pairs([jsonl(tmp_path / "data.jsonl", row)]).pairs[0].prompt == [
        {"role": role, "content": text} for role, (_, text) in zip(roles, turns, strict=True)
    ]


def test_equal_responses_are_kept_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = jsonl(tmp_path / "data.jsonl", {**STANDARD, "rejected": "c"}, STANDARD)
    assert len(read_pairs([path]).pairs) == 2
    assert "equal in 1 pairs" in caplog.text


# --------------------------------------------------------------------------------------------------- accepted encodings
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_byte_order_mark_crlf_blank_lines_and_no_final_newline(tmp_path: Path, name: str) -> None:
    row = json.dumps({**STANDARD, "prompt": "é \u2028 ✓"}, ensure_ascii=False)
    text = f"\r\n{row}\r\n \r\n{row}" if name == "data.jsonl" else f"\r\n[{row},\r\n\r\n{row}]"
    path = write(tmp_path / name, b"\xef\xbb\xbf" + text.encode("utf-8"))
    pairs = read_pairs([path]).pairs
    assert [pair.where for pair in pairs] == [f"{path}:2", f"{path}:4"]
    assert pairs[0].prompt == "é \u2028 ✓"


def test_escaped_surrogate_pairs_are_characters(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", '{"prompt": "\\ud83d\\ude00", "chosen": "c", "rejected": "r"}')
    assert read_pairs([path]).pairs[0].prompt == "😀"


# ------------------------------------------------------------------------------------------------------------- bad JSON
GOOD_LINE = json.dumps(STANDARD).encode()
BAD_LINES = {
    "cut": (b'{"prompt": "p", "chosen": "c", "rej', ["may be truncated"]),
    "not json": (b"prompt: p\n", ["not valid JSON"]),
    "two objects": (GOOD_LINE + GOOD_LINE + b"\n", ["Extra data"]),
    "utf-8": (b'{"prompt": "\xff", "chosen": "c", "rejected": "r"}\n', ["invalid UTF-8", "0xff"]),
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
    "digits": (b'{"prompt": ' + b"9" * 5_000 + b"}\n", ["not valid JSON"]),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named(tmp_path: Path, name: str) -> None:
    line, words = BAD_LINES[name]
    refused(write(tmp_path / "data.jsonl", GOOD_LINE + b"\n\n" + line), 3, *words)


@pytest.mark.parametrize("name", [name for name in BAD_LINES if name not in ("cut", "two objects")])
def test_a_bad_element_of_an_array_is_named(tmp_path: Path, name: str) -> None:
    line, words = BAD_LINES[name]
    refused(write(tmp_path / "data.json", b"[" + GOOD_LINE + b",\n\n" + line + b"]"), 3, *words)


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


def test_an_empty_or_absent_or_unknown_file_is_named(tmp_path: Path) -> None:
    refused(write(tmp_path / "empty.jsonl", b""), 1, "empty")
    refused(write(tmp_path / "bom.jsonl", b"\xef\xbb\xbf"), 1, "empty")
    with pytest.raises(DataError, match=r"absent\.jsonl: cannot be read: No such file"):
        read_pairs([tmp_path / "absent.jsonl"])
    with pytest.raises(DataError, match=r"'\.parquet' is not known"):
        read_pairs([write(tmp_path / "data.parquet", b"PAR1")])
    with pytest.raises(DataError, match=r"data\.train_path"):
        read_pairs([])


# ------------------------------------------------------------------------------------------------------------- bad rows
def message(role: str, content: Any, **further: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **further}


BAD_ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "missing key": (
        STANDARD,
        {"prompt": "p", "chosen": "c"},
        ["lacks 'rejected'", "TRL standard", "chosen (a string)"],
    ),
    "wrong type": (STANDARD, {**STANDARD, "chosen": 3}, ["another type", "chosen (a number)"]),
    "null": (STANDARD, {**STANDARD, "prompt": None}, ["another type", "prompt (null)"]),
    "mixed": (STANDARD, CONVERSATIONAL, ["layout TRL conversational in a file that began as TRL standard"]),
    "mixed with ROLL": (STANDARD, ROLL, ["layout ROLL instruction in a file that began as TRL standard"]),
    "empty prompt": (STANDARD, {**STANDARD, "prompt": ""}, ["prompt is empty"]),
    "empty response": (STANDARD, {**STANDARD, "rejected": ""}, ["rejected is empty"]),
    "ROLL input": (ROLL, {**ROLL, "input": 3}, ["input is a number"]),
    "ROLL empty": (ROLL, {**ROLL, "instruction": ""}, ["instruction is empty"]),
    "no messages": (CONVERSATIONAL, {**CONVERSATIONAL, "prompt": []}, ["prompt is empty"]),
    "no response": (CONVERSATIONAL, {**CONVERSATIONAL, "chosen": []}, ["chosen is empty"]),
    "empty message": (CONVERSATIONAL, {**CONVERSATIONAL, "chosen": [message("assistant", "")]}, ["chosen[0].content"]),
    "empty turn": (CONVERSATIONAL, {**CONVERSATIONAL, "prompt": [message("user", "")]}, ["prompt[0].content is empty"]),
    "response role": (CONVERSATIONAL, {**CONVERSATIONAL, "rejected": [USER]}, ["rejected", "'user'", "assistant's"]),
    "second response": (CONVERSATIONAL, {**CONVERSATIONAL, "rejected": [BAD, USER]}, ["rejected", "'user'"]),
    "prompt end": (CONVERSATIONAL, {**CONVERSATIONAL, "prompt": [USER, GOOD]}, ["prompt ends", "'assistant'"]),
    "role": (CONVERSATIONAL, {**CONVERSATIONAL, "prompt": [message("bot", "p")]}, ["'bot'", "system, developer, user"]),
    "role type": (CONVERSATIONAL, {**CONVERSATIONAL, "prompt": [{"role": [], "content": "p"}]}, ["role is a list"]),
    "no content": (CONVERSATIONAL, {**CONVERSATIONAL, "prompt": [{"role": "user"}]}, ["prompt[0] lacks 'content'"]),
    "text parts": (CONVERSATIONAL, {**CONVERSATIONAL, "prompt": [message("user", ["p"])]}, ["content is a list"]),
    "not a message": (CONVERSATIONAL, {**CONVERSATIONAL, "prompt": ["p"]}, ["prompt[0] is a string"]),
    "tool call": (
        CONVERSATIONAL,
        {**CONVERSATIONAL, "chosen": [message("assistant", "c", tool_calls=[{}])]},
        ["chosen[0]", "not read: 'tool_calls'"],
    ),
    "message NUL": (
        CONVERSATIONAL,
        {**CONVERSATIONAL, "prompt": [message("user", "a\0")]},
        ["prompt[0].content", "NUL"],
    ),
    "speaker": (SHAREGPT, {**SHAREGPT, "conversations": [{"from": "user", "value": "p"}]}, ["'user'", "human, gpt"]),
    "speaker key": (SHAREGPT, {**SHAREGPT, "conversations": [USER]}, ["lacks 'from'", "'role', 'content'"]),
    "last speaker": (SHAREGPT, {**SHAREGPT, "conversations": [SHAREGPT["chosen"]]}, ["ends with a message of 'gpt'"]),
    "chosen speaker": (SHAREGPT, {**SHAREGPT, "chosen": {"from": "human", "value": "c"}}, ["chosen", "'human'"]),
    "two values": (SHAREGPT, {**SHAREGPT, "chosen": {"from": "gpt", "value": None}}, ["value is null"]),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named(tmp_path: Path, name: str) -> None:
    good, bad, words = BAD_ROWS[name]
    refused(jsonl(tmp_path / "data.jsonl", good, good, bad, good), 3, *words)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "p", "chosen": "c", "rejected": "r"},
        {"prompt": "p", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "p", "chosen": "c"},
        {"instruction": "p", "chosen": GOOD, "rejected": BAD},
        {"conversations": [USER], "chosen": "c", "rejected": "r"},
    ],
)
def test_an_unknown_layout_names_the_columns_and_the_layouts(tmp_path: Path, row: dict[str, Any]) -> None:
    refused(jsonl(tmp_path / "data.jsonl", row), 1, "no known layout", *row, *LAYOUTS, "data.prompt_key")


# ----------------------------------------------------------------------------------------------------- validation split
@given(n=st.integers(2, 200), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 2**32))
def test_split_is_a_deterministic_partition_in_file_order(n: int, fraction: float, seed: int) -> None:
    train, validation = split_validation(range(n), fraction, seed)
    assert sorted(train + validation) == list(range(n))
    assert train == sorted(train) and validation == sorted(validation)
    assert len(validation) == min(max(round(fraction * n), 1), n - 1)
    assert (train, validation) == split_validation(range(n), fraction, seed)


def test_split_depends_on_the_seed_and_is_pinned() -> None:
    assert split_validation(range(20), 0.2, 0)[1] != split_validation(range(20), 0.2, 1)[1]
    assert split_validation("abcdefghij", 0.3, 0)[1] == ["c", "e", "g"]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_split_refuses_what_is_not_a_share(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.validation_fraction"):
        split_validation(range(10), fraction, 0)


def test_split_needs_two_pairs() -> None:
    with pytest.raises(DataError, match="at least 2 pairs"):
        split_validation(["one"], 0.5, 0)


def test_real_preferences_are_read() -> None:
    directory = os.environ.get("MEGADPO_TEST_DATA")
    if not directory:
        pytest.skip("MEGADPO_TEST_DATA does not name a directory with dpo_en_demo.json")
    path = Path(directory) / "dpo_en_demo.json"
    source = read_pairs([path])
    assert (len(source.pairs), layouts(source), source.files[0].ignored_columns) == (300, ["ShareGPT"], ())
    rows = json.loads(path.read_text(encoding="utf-8"))
    lines = path.read_text(encoding="utf-8").split("\n")
    for pair, row in zip(source.pairs, rows, strict=True):
        assert isinstance(pair.prompt, list) and isinstance(pair.chosen, list) and isinstance(pair.rejected, list)
        assert [m["content"] for m in pair.prompt] == [m["value"] for m in row["conversations"]]
        assert pair.chosen[0]["content"] == row["chosen"]["value"]
        assert pair.rejected[0]["content"] == row["rejected"]["value"]
        assert lines[int(pair.where.rsplit(":", 1)[1]) - 1].strip() == "{"
