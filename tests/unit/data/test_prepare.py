"""From files to token stores: in processes or without, found again by content, with bad rows counted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from megadpo.data.prepare import PreparedStore, Recipe, open_store, prepare_store
from megadpo.data.store import PairView, select_pairs
from megadpo.errors import DataError
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import write_jsonl
from tests.helpers.tokenized import KEYS, recipe
from tests.helpers.tokenizers import BOS_TEMPLATE, CHATML_TEMPLATE, SPECIAL_TOKENS, byte_tokenizer


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    byte_tokenizer(chat_template=CHATML_TEMPLATE).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def prepare(
    specs: list[Path], how: Recipe, cache: Path, *, workers: int = 1
) -> tuple[PreparedStore, list[tuple[float, int]]]:
    told: list[tuple[float, int]] = []
    prepared = prepare_store(
        [str(spec) for spec in specs],
        how,
        cache_dir=cache,
        workers=workers,
        report=lambda share, rows: told.append((share, rows)),
    )
    return prepared, told


def kept(prepared: PreparedStore) -> PairView:
    store = open_store(prepared)
    return select_pairs(store, np.arange(len(store)), max_length=4096, truncation="keep_start", title="test pairs")


def test_worker_processes_change_nothing(tmp_path: Path, tokenizer_dir: Path) -> None:
    files = [
        write_jsonl(tmp_path / "a.jsonl", make_pairs(1500, seed=0)),
        write_jsonl(tmp_path / "b.jsonl", make_pairs(1000, seed=1, conversational=True)),
    ]
    alone, _ = prepare(files, recipe(tokenizer_dir), tmp_path / "alone")
    together, told = prepare(files, recipe(tokenizer_dir), tmp_path / "together", workers=2)
    assert alone.directory.name == together.directory.name
    for name in ("tokens.bin", "rows.npy", "store.json"):
        assert (alone.directory / name).read_bytes() == (together.directory / name).read_bytes(), name
    assert told[-1] == (1.0, 2500)
    assert told == sorted(told)
    pairs = kept(together)
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
    prepared, _ = prepare([path], recipe(tokenizer_dir, skip_bad_rows=True), tmp_path / "cache")
    pairs = kept(prepared)
    assert (pairs.counts.read, pairs.counts.kept, pairs.counts.skipped) == (9, 6, 3)
    assert [pair.index for pair in pairs] == [0, 4, 5, 6, 7, 8]
    problems = open_store(prepared).report.problems
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
    moved, told = prepare([copy], how, cache)
    assert (moved.directory, told) == (first.directory, [])
    assert kept(moved)[0].where.endswith("moved.jsonl:1")
    assert prepare([path], Recipe(KEYS, tokenizer_dir, date(1999, 1, 1), False), cache)[0] == first
    others = [
        prepare([write_jsonl(tmp_path / "other.jsonl", make_pairs(4, seed=1))], how, cache)[0],
        prepare([path, path], how, cache)[0],
        prepare([path], recipe(tokenizer_dir, skip_bad_rows=True), cache)[0],
    ]
    byte_tokenizer(chat_template=CHATML_TEMPLATE + " ").save_pretrained(tokenizer_dir)
    others.append(prepare([path], how, cache)[0])
    assert len({store.directory for store in (first, *others)}) == 5


def test_the_date_matters_where_the_template_asks_for_it(tmp_path: Path) -> None:
    directory = tmp_path / "dated"
    byte_tokenizer(chat_template="{{ strftime_now('%Y') }}" + CHATML_TEMPLATE).save_pretrained(directory)
    path = write_jsonl(tmp_path / "pairs.jsonl", make_pairs(2, seed=0, conversational=True))
    stores = [prepare([path], Recipe(KEYS, directory, date(y, 1, 1), False), tmp_path / "c")[0] for y in (1999, 2000)]
    assert stores[0] != stores[1]
    firsts = [kept(store)[0].prompt[:4].tolist() for store in stores]
    assert firsts[0] != firsts[1]


def test_a_cache_that_cannot_be_written_names_the_key(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", make_pairs(2, seed=0))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir=.*/file/cache: can't be written \(Not a directory\)"):
        prepare([path], recipe(tokenizer_dir), tmp_path / "file" / "cache")


def test_a_tokenizer_that_changes_under_a_running_process_is_loaded_again(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", make_pairs(2, seed=0, conversational=True))
    firsts = []
    for template in (CHATML_TEMPLATE, BOS_TEMPLATE):
        byte_tokenizer(chat_template=template).save_pretrained(tokenizer_dir)
        firsts.append(kept(prepare([path], recipe(tokenizer_dir), tmp_path / "cache")[0])[0].prompt[0])
    assert firsts == [SPECIAL_TOKENS.index("<|im_start|>"), SPECIAL_TOKENS.index("<s>")]


def test_what_killed_runs_left_goes_after_a_day_and_does_not_stand_in_the_way(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    path, cache = write_jsonl(tmp_path / "pairs.jsonl", make_pairs(2, seed=0)), tmp_path / "cache"
    directory = prepare([path], recipe(tokenizer_dir), cache)[0].directory
    shutil.rmtree(directory)
    old, young = (cache / f".{directory.name}.{name}.partial" for name in ("old", "young"))
    for left in (old, young):
        left.mkdir()
        (left / "tokens.bin").write_bytes(b"torn")
    for part in (old / "tokens.bin", old):
        os.utime(part, (0, 0))
    assert prepare([path], recipe(tokenizer_dir), cache)[0].directory == directory
    assert {path.name for path in cache.iterdir()} == {directory.name, young.name}


def test_workers_end_with_a_process_that_is_killed() -> None:
    script = (
        "import os, time; from concurrent.futures import ProcessPoolExecutor; from multiprocessing import get_context\n"
        "from megadpo.data.prepare import _end_with_parent\n"
        "pool = ProcessPoolExecutor(1, mp_context=get_context('spawn'), initializer=_end_with_parent)\n"
        "print(pool.submit(os.getpid).result(), flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = Path(f"/proc/{int(process.stdout.readline())}/stat")
        assert worker.read_text().rpartition(")")[2].split()[0] != "Z"
        process.kill()
    deadline = time.monotonic() + 30
    while worker.exists() and worker.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "the worker outlives the process that started it"
        time.sleep(0.05)
