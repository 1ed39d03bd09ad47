"""Token stores: what was written comes back, cut at any limit, with counts that add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from megadpo.data.store import (
    BAD,
    DOUBLE_BOS,
    EQUAL,
    ROW,
    PairStore,
    PairView,
    PreparationReport,
    StoreWriter,
    select_pairs,
)
from megadpo.errors import DataError

# (prompt, chosen, rejected tokens, flags) of the rows that most tests use.
ROWS = [(5, 4, 9, 0), (3, 2, 2, EQUAL), (0, 0, 0, BAD), (12, 1, 1, DOUBLE_BOS), (4, 0, 3, 0), (3, 2, 2, EQUAL)]


def write(directory: Path, rows: Sequence[tuple[int, int, int, int]], *, chunk: int = 4) -> PairStore:
    """A store in which token t of row r is 100 · r + t, and rows of equal lengths count as repetitions."""
    with StoreWriter(directory) as writer:
        for first in range(0, len(rows), chunk):
            part = rows[first : first + chunk]
            records = np.zeros(len(part), ROW)
            start = 0
            for record, row, lengths in zip(records, range(first, first + chunk), part, strict=False):
                *sizes, flags = lengths
                record["start"], record["line"], record["flags"] = start, row + 1, flags
                record["prompt"], record["chosen"], record["rejected"] = sizes
                record["largest"] = 100 * row + sum(sizes) - 1
                record["digest"] = str(sizes).encode().rjust(16)
                start += sum(sizes)
            tokens = [100 * row + np.arange(sum(sizes[:3])) for row, sizes in enumerate(part, first)]
            writer.append(records, np.concatenate(tokens).astype(np.int32))
        writer.finish(PreparationReport(problems=["data.jsonl:3: no"], moved_boundary=""))
    return PairStore(directory, ["data.jsonl:"])


def view(store: PairStore, max_length: int, truncation: str = "keep_start") -> PairView:
    return select_pairs(store, np.arange(len(store)), max_length=max_length, truncation=truncation, title="test pairs")


def test_pairs_come_back_in_order_with_their_place(tmp_path: Path) -> None:
    pairs = view(write(tmp_path / "store", ROWS), 64)
    assert [pair.index for pair in pairs] == [0, 1, 3, 5]
    assert [pair.where for pair in pairs] == ["data.jsonl:1", "data.jsonl:2", "data.jsonl:4", "data.jsonl:6"]
    assert pairs[2].prompt.tolist() == list(range(300, 312))
    assert (pairs[2].chosen.tolist(), pairs[2].rejected.tolist()) == ([312], [313])
    assert pairs[1].prompt.dtype == np.int32
    assert [pairs.where(pair.index) for pair in pairs] == [pair.where for pair in pairs]
    assert [pair.index for pair in pairs[1:3]] == [1, 3]
    assert pairs[-1].index == 5
    assert pairs.stream_lengths(share_prompt=False).tolist() == [23, 10, 26, 10]
    assert pairs.stream_lengths(share_prompt=True).tolist() == [18, 7, 14, 7]
    assert pairs.longest_sequence == 14


def test_a_limit_cuts_responses_or_the_prompt(tmp_path: Path) -> None:
    store = write(tmp_path / "store", ROWS)
    start = view(store, 8)
    assert [pair.index for pair in start] == [0, 1, 5]
    assert start[0].prompt.tolist() == [0, 1, 2, 3, 4]
    assert (start[0].chosen.tolist(), start[0].rejected.tolist()) == ([5, 6, 7], [9, 10, 11])
    end = view(store, 11, "keep_end")
    assert end[0].prompt.tolist() == [3, 4]
    assert (end[0].chosen.tolist(), end[0].rejected.tolist()) == ([5, 6, 7, 8], list(range(9, 18)))
    assert end.full_prompt_lengths.tolist() == [5, 3, 12, 3] and end.prompt_lengths.tolist() == [2, 3, 10, 3]


@pytest.mark.parametrize(
    ("max_length", "truncation", "expected"),
    [
        (64, "keep_start", {"kept": 4, "dropped_empty_response": 1, "double_bos": 1}),
        (
            8,
            "keep_start",
            {"kept": 3, "dropped_long_prompt": 1, "truncated_chosen": 1, "truncated_rejected": 1}
            | {"dropped_empty_response": 1},
        ),
        (11, "keep_end", {"kept": 4, "truncated_prompt": 2, "dropped_empty_response": 1, "double_bos": 1}),
        (
            9,
            "keep_end",
            {"kept": 3, "truncated_prompt": 1, "dropped_long_response": 1, "double_bos": 1}
            | {"dropped_empty_response": 1},
        ),
        (12, "drop", {"kept": 2, "dropped_too_long": 2, "dropped_empty_response": 1}),
    ],
)
def test_counts_add_up(tmp_path: Path, max_length: int, truncation: str, expected: dict[str, int]) -> None:
    counts = asdict(view(write(tmp_path / "store", ROWS), max_length, truncation).counts)
    always = {"read": 6, "skipped": 1, "equal_responses": 2, "duplicate": 1}
    assert {name: number for name, number in counts.items() if number} == always | expected
    dropped = sum(number for name, number in counts.items() if name.startswith("dropped"))
    assert counts["read"] == counts["kept"] + counts["skipped"] + dropped


def test_error_mode_names_the_first_pair_that_is_too_long(tmp_path: Path) -> None:
    store = write(tmp_path / "store", ROWS)
    with pytest.raises(DataError, match=r"^data\.jsonl:1: the pair has 14 tokens, data.max_length=12 .*\(2 such test"):
        view(store, 12, "error")
    assert len(view(store, 14, "error")) == 4


def test_nothing_left_says_why(tmp_path: Path) -> None:
    store = write(tmp_path / "store", [(5, 4, 9, 0), (0, 0, 0, BAD), (6, 0, 1, 0)])
    with pytest.raises(DataError, match=r"none of the 3 test pairs .*used: 1; .*tokens: 2\): raise .*first"):
        view(store, 5)


def test_the_digest_is_of_the_kept_tokens(tmp_path: Path) -> None:
    store = write(tmp_path / "a", ROWS)
    assert view(store, 14).digest == view(store, 64).digest  # nothing is cut at either
    assert view(store, 13).digest != view(store, 14).digest
    assert view(store, 13, "keep_end").digest != view(store, 13).digest
    assert view(write(tmp_path / "b", ROWS, chunk=2), 64).digest == view(store, 64).digest
    assert view(write(tmp_path / "c", ROWS[:-1]), 64).digest != view(store, 64).digest


def test_token_ids_beyond_the_vocabulary_name_the_pair(tmp_path: Path) -> None:
    pairs = view(write(tmp_path / "store", ROWS), 64)
    pairs.check_vocabulary(507)
    with pytest.raises(DataError, match=r"^data\.jsonl:6: pair 5 has token id 506, .* 506 entries.*\(1 such pairs\)"):
        pairs.check_vocabulary(506)


def test_a_store_appears_only_when_it_is_finished(tmp_path: Path) -> None:
    def killed() -> None:
        with StoreWriter(tmp_path / "store") as writer:
            writer.append(np.zeros(1, ROW), np.arange(3, dtype=np.int32))
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        killed()
    assert list(tmp_path.iterdir()) == []
    first = write(tmp_path / "store", ROWS)
    second = write(tmp_path / "store", ROWS)  # another run was faster: its store stays
    assert view(first, 64).digest == view(second, 64).digest
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_store_that_cannot_be_read_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.cache_dir must be on a file system that all ranks share"):
        PairStore(tmp_path / "absent", ["data.jsonl:"])
    write(tmp_path / "store", ROWS)
    with (tmp_path / "store" / "tokens.bin").open("r+b") as file:
        file.truncate(8)
    with pytest.raises(DataError, match=r"tokens\.bin has 8 bytes, rows\.npy describes \d+ tokens\); data\.cache_dir"):
        PairStore(tmp_path / "store", ["data.jsonl:"])
    (tmp_path / "store" / "rows.npy").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"Remove the directory if it is damaged"):
        PairStore(tmp_path / "store", ["data.jsonl:"])


def test_a_store_of_bad_rows_only_has_no_tokens(tmp_path: Path) -> None:
    store = write(tmp_path / "store", [(0, 0, 0, BAD)])
    assert (len(store), len(store.tokens)) == (1, 0)
