"""Rows from sources to pairs: order and places, the layout of a file, what the log says, and the validation split."""

from __future__ import annotations

import json
import logging
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadpo.data.dataset import RawPair, RawRow, iter_rows, parse_row, validation_rows
from megadpo.data.layouts import Keys
from megadpo.errors import ConfigError, DataError
from tests.helpers.pairs import read_pairs
from tests.helpers.runs import write_jsonl

KEYS = Keys()
STANDARD = {"prompt": "p", "chosen": "c", "rejected": "r"}
USER, ANSWER = {"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}
CONVERSATIONAL = {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The messages, warnings marked."""
    return [("! " if r.levelno >= logging.WARNING else "") + r.getMessage() for r in caplog.records]


# ---------------------------------------------------------------------------------------------------------------- rows
def test_sources_are_concatenated_and_keep_their_layouts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="megadpo")
    first = write_jsonl(tmp_path / "a.jsonl", [{**STANDARD, "id": 1, "system": "s"}, {**STANDARD, "late": 2}])
    second = write_jsonl(tmp_path / "b.jsonl", [{**CONVERSATIONAL, "system": "s"}])
    rows = list(iter_rows([str(first), str(second)], KEYS))
    assert [(row.index, row.file, row.line) for row in rows] == [(0, 0, 1), (1, 0, 2), (2, 1, 1)]
    assert [row.where for row in rows] == [f"{first}:1", f"{first}:2", f"{second}:1"]
    assert [row.layout for row in rows] == ["TRL standard", "TRL standard", "TRL conversational"]
    shares = [row.progress for row in rows]
    assert shares == sorted(shares) and shares[1:] == [0.5, 1.0]
    assert logged(caplog) == [
        f"{first}: 2 rows, layout TRL standard",
        f"{first}: columns ignored, going by its first row: id, system",
        f"! {first}: not part of the prompt although the name suggests it: system",
        f"{second}: 1 rows, layout TRL conversational",
    ]


def test_a_row_goes_to_a_worker_undecoded(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [STANDARD])
    (row,) = iter_rows([str(path)], KEYS)
    assert isinstance(row.value, bytes)
    assert parse_row(pickle.loads(pickle.dumps(row)), KEYS) == RawPair(0, f"{path}:1", "p", "c", "r")


def test_the_layout_of_most_of_the_first_rows_is_the_sources(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="megadpo")
    path = tmp_path / "d.jsonl"
    lines = ["{", "3", json.dumps({"chosen": 1}), *map(json.dumps, (STANDARD, CONVERSATIONAL, STANDARD))]
    path.write_text("\n".join(lines), encoding="utf-8")
    rows = list(iter_rows([str(path)], KEYS))
    assert [row.layout for row in rows] == ["TRL standard"] * 6
    problems = {
        0: "not valid JSON",
        1: "a pair is a JSON object",
        2: "lacks 'prompt'",
        4: "first rows are mostly TRL standard",
    }
    for row in rows:
        if row.index in problems:
            with pytest.raises(DataError, match=rf"d\.jsonl:{row.line}: .*{problems[row.index]}"):
                parse_row(row, KEYS)
        else:
            assert parse_row(row, KEYS).index == row.index  # bad rows keep their numbers
    assert logged(caplog) == [f"{path}: 6 rows, layout TRL standard"]


def test_one_bad_row_at_the_start_does_not_spoil_the_others(tmp_path: Path) -> None:
    """Without its prompt it looks like a row of another layout."""
    path = write_jsonl(tmp_path / "d.jsonl", [{"chosen": "a b", "rejected": "a c"}, *[STANDARD] * 9])
    first, *others = iter_rows([str(path)], KEYS)
    assert all(parse_row(row, KEYS).prompt == "p" for row in others)
    with pytest.raises(DataError, match=r"d\.jsonl:1: the row lacks 'prompt'; the file's layout is TRL standard"):
        parse_row(first, KEYS)


def test_rows_before_the_place_where_a_source_breaks_come_first(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(f"[{json.dumps(STANDARD)}, {json.dumps(STANDARD)}, oops]", encoding="utf-8")
    rows = iter_rows([str(path)], KEYS)
    assert [next(rows).line, next(rows).line] == [1, 1]
    with pytest.raises(DataError, match=r"d\.json:1: not valid JSON"):
        next(rows)


def test_a_file_without_a_layout_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="megadpo")
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": "x"}])
    assert [row.layout for row in iter_rows([str(path)], KEYS)] == [None]
    assert logged(caplog) == [f"{path}: 1 rows, layout not known"]


def test_what_nests_deeper_than_it_can_be_checked_is_named() -> None:
    deep: list[Any] = []
    for _ in range(2000):
        deep = [deep]
    row = RawRow(0, 0, 3, "d.jsonl:3", None, {**CONVERSATIONAL, "tools": [{"x": deep}]}, 1.0)
    with pytest.raises(DataError, match=r"^d\.jsonl:3: nested too deeply"):
        parse_row(row, KEYS)


def test_no_source_is_an_error() -> None:
    with pytest.raises(DataError, match=r"data\.train_path"):
        read_pairs([])


# Text that JSON can hold and a tokenizer takes.
TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=20)


@st.composite
def generated_rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows of one layout, with what they say under `said` as a further column."""
    layout = draw(st.sampled_from(["standard", "conversational", "instruction", "sharegpt", "implicit"]))
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        prompt, chosen, rejected = draw(TEXT), draw(TEXT), draw(TEXT)
        user = {"role": "user", "content": prompt}
        answers = [{"role": "assistant", "content": text} for text in (chosen, rejected)]
        row: dict[str, Any] = {
            "standard": {"prompt": prompt, "chosen": chosen, "rejected": rejected},
            "conversational": {"prompt": [user], "chosen": answers[:1], "rejected": answers[1:]},
            "instruction": {"instruction": prompt, "chosen": chosen, "rejected": rejected},
            "sharegpt": {
                "conversations": [{"from": "human", "value": prompt}],
                "chosen": {"from": "gpt", "value": chosen},
                "rejected": {"from": "gpt", "value": rejected},
            },
            "implicit": {"chosen": [user, answers[0]], "rejected": [user, answers[1]]},
        }[layout]
        rows.append({**row, "said": [prompt, chosen, rejected]})
    return rows


@settings(max_examples=60, deadline=None)
@given(
    rows=generated_rows(),
    suffix=st.sampled_from([".jsonl", ".json"]),
    array=st.booleans(),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 0, 2]),
)
def test_generated_rows_come_through_a_file_complete_and_in_order(
    rows: list[dict[str, Any]], suffix: str, array: bool, ascii_only: bool, indent: int | None
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"d{suffix}"
        if array and suffix == ".json":
            text = json.dumps(rows, ensure_ascii=ascii_only, indent=indent)
        else:
            text = "\r\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
        path.write_bytes(text.encode())
        pairs = read_pairs(path)
    assert [pair.index for pair in pairs] == list(range(len(rows)))
    for pair, row in zip(pairs, rows, strict=True):
        texts = [
            side if isinstance(side, str) else side[-1]["content"] for side in (pair.prompt, pair.chosen, pair.rejected)
        ]
        assert texts == row["said"]


# ----------------------------------------------------------------------------------------------------- validation split
@given(n=st.integers(2, 200), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 2**32))
def test_split_is_a_deterministic_choice_of_row_numbers(n: int, fraction: float, seed: int) -> None:
    held_out = validation_rows(n, fraction, seed)
    assert held_out.tolist() == sorted({*held_out.tolist()} & {*range(n)})
    assert len(held_out) == min(max(round(fraction * n), 1), n - 1)
    assert np.array_equal(held_out, validation_rows(n, fraction, seed))


def test_split_depends_on_the_seed_and_is_pinned() -> None:
    assert validation_rows(20, 0.2, 0).tolist() != validation_rows(20, 0.2, 1).tolist()
    assert validation_rows(10, 0.3, 0).tolist() == [2, 4, 6]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_split_refuses_what_is_not_a_share(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.validation_fraction"):
        validation_rows(10, fraction, 0)


def test_split_needs_two_pairs() -> None:
    with pytest.raises(DataError, match="at least 2 pairs"):
        validation_rows(1, 0.5, 0)


def test_real_preferences_are_read() -> None:
    directory = os.environ.get("MEGADPO_TEST_DATA")
    if not directory:
        pytest.skip("MEGADPO_TEST_DATA does not name a directory with dpo_en_demo.json")
    path = Path(directory) / "dpo_en_demo.json"
    pairs = read_pairs(path)
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert len(pairs) == 300
    for pair, row in zip(pairs, rows, strict=True):
        assert isinstance(pair.prompt, list) and isinstance(pair.chosen, list) and isinstance(pair.rejected, list)
        assert [m["content"] for m in pair.prompt] == [m["value"] for m in row["conversations"]]
        assert pair.chosen[0]["content"] == row["chosen"]["value"]
        assert pair.rejected[0]["content"] == row["rejected"]["value"]
