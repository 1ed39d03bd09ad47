"""From files to token stores: in processes or without, found again by content, with bad rows counted."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from megadpo.data.prepare import Recipe, open_store, prepare_store
from megadpo.data.store import PairView, select_pairs
from megadpo.errors import DataError
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import write_jsonl
from tests.helpers.tokenized import KEYS, recipe
from tests.helpers.tokenizers import CHATML_TEMPLATE, byte_tokenizer


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    byte_tokenizer(chat_template=CHATML_TEMPLATE).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def prepare(specs: list[Path], how: Recipe, cache: Path, *, workers: int = 1) -> tuple[Path, list[tuple[float, int]]]:
    told: list[tuple[float, int]] = []
    directory = prepare_store(
        [str(spec) for spec in specs],
        how,
        cache_dir=cache,
        workers=workers,
        report=lambda share, rows: told.append((share, rows)),
    )
    return directory, told


def kept(directory: Path, specs: list[Path]) -> PairView:
    store = open_store(directory, [str(spec) for spec in specs])
    return select_pairs(store, np.arange(len(store)), max_length=4096, truncation="keep_start", name="test")


def test_worker_processes_change_nothing(tmp_path: Path, tokenizer_dir: Path) -> None:
    files = [
        write_jsonl(tmp_path / "a.jsonl", make_pairs(1500, seed=0)),
        write_jsonl(tmp_path / "b.jsonl", make_pairs(1000, seed=1, conversational=True)),
    ]
    alone, _ = prepare(files, recipe(tokenizer_dir), tmp_path / "alone")
    together, told = prepare(files, recipe(tokenizer_dir), tmp_path / "together", workers=2)
    assert alone.name == together.name
    for name in ("tokens.bin", "rows.npy", "store.json"):
        assert (alone / name).read_bytes() == (together / name).read_bytes(), name
    assert told[-1] == (1.0, 2500)
    assert told == sorted(told)
    pairs = kept(together, files)
    assert pairs[1499].where.endswith("a.jsonl:1500") and pairs[1500].where.endswith("b.jsonl:1")


def test_the_first_bad_row_is_the_error_in_processes_too(tmp_path: Path, tokenizer_dir: Path) -> None:
    rows = [json.dumps(row) for row in make_pairs(2500, seed=0)]
    rows[2200] = '{"prompt": "p", "chosen": "c"}'
    rows[2300] = "not JSON"
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(rows) + "\n")
    with pytest.raises(DataError, match=r"pairs\.jsonl:2201: .*lacks 'rejected'"):
        prepare([path], recipe(tokenizer_dir), tmp_path / "cache", workers=2)
    assert list((tmp_path / "cache").iterdir()) == []


def test_bad_rows_are_skipped_counted_and_told(tmp_path: Path, tokenizer_dir: Path) -> None:
    rows = [json.dumps(row) for row in make_pairs(6, seed=0)]
    rows[1:1] = ['{"prompt": "p"}', '{"prompt": "p", "chosen": "", "rejected": "r"}', "not JSON"]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(rows) + "\n")
    directory, _ = prepare([path], recipe(tokenizer_dir, skip_bad_rows=True), tmp_path / "cache")
    pairs = kept(directory, [path])
    assert (pairs.counts.read, pairs.counts.kept, pairs.counts.skipped) == (9, 6, 3)
    assert [pair.index for pair in pairs] == [0, 4, 5, 6, 7, 8]
    problems = open_store(directory, [str(path)]).about.problems
    assert [problem.partition(": ")[0][-7:] for problem in problems] == ["jsonl:2", "jsonl:3", "jsonl:4"]
    assert "chosen is empty" in problems[1]


def test_the_same_content_is_found_again_and_other_content_is_not(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", make_pairs(4, seed=0))
    how, cache = recipe(tokenizer_dir), tmp_path / "cache"
    first, told = prepare([path], how, cache)
    assert told
    again, told = prepare([path], how, cache)
    assert (again, told) == (first, [])
    copy = tmp_path / "moved.jsonl"
    copy.write_bytes(path.read_bytes())
    assert prepare([copy], how, cache)[0] == first
    assert kept(first, [copy])[0].where.endswith("moved.jsonl:1")
    assert prepare([path], Recipe(KEYS, tokenizer_dir, date(1999, 1, 1), False), cache)[0] == first
    others = [
        prepare([write_jsonl(tmp_path / "other.jsonl", make_pairs(4, seed=1))], how, cache)[0],
        prepare([path, path], how, cache)[0],
        prepare([path], recipe(tokenizer_dir, skip_bad_rows=True), cache)[0],
    ]
    byte_tokenizer(chat_template=CHATML_TEMPLATE + " ").save_pretrained(tokenizer_dir)
    others.append(prepare([path], how, cache)[0])
    assert len({first, *others}) == 5


def test_the_date_matters_where_the_template_asks_for_it(tmp_path: Path) -> None:
    directory = tmp_path / "dated"
    byte_tokenizer(chat_template="{{ strftime_now('%Y') }}" + CHATML_TEMPLATE).save_pretrained(directory)
    path = write_jsonl(tmp_path / "pairs.jsonl", make_pairs(2, seed=0, conversational=True))
    stores = [prepare([path], Recipe(KEYS, directory, date(y, 1, 1), False), tmp_path / "c")[0] for y in (1999, 2000)]
    assert stores[0] != stores[1]
    firsts = [kept(store, [path])[0].prompt[:4].tolist() for store in stores]
    assert firsts[0] != firsts[1]


def test_a_cache_that_cannot_be_written_names_the_key(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", make_pairs(2, seed=0))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir=.*/file/cache: can't be written \(Not a directory\)"):
        prepare([path], recipe(tokenizer_dir), tmp_path / "file" / "cache")
