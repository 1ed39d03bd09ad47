"""The sets of a run: what each `data.*` key does to them, what is said of them, what the run directory keeps."""

from __future__ import annotations

import json
import logging
import re
from datetime import datetime
from pathlib import Path

import pytest

from megadpo.config.compose import compose_config, resolve_defaults
from megadpo.config.schema import Config
from megadpo.errors import DataError
from megadpo.setup.datasets import Datasets, open_datasets, prepare_stores
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import write_jsonl
from tests.helpers.tokenizers import CHATML_TEMPLATE, byte_tokenizer

VOCABULARY = 265
NOON = datetime(2024, 7, 26, 12)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    template = "{{ strftime_now('%d %b %Y') }}" + CHATML_TEMPLATE
    byte_tokenizer(chat_template=template).save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "train.jsonl", make_pairs(40, seed=0))
    write_jsonl(tmp_path / "other.jsonl", make_pairs(6, seed=1, conversational=True))
    return tmp_path


def configure(root: Path, *words: str) -> Config:
    config = compose_config(
        [
            "+model=hf",
            f"model.hf_path={root / 'model'}",
            f"data.train_path={root / 'train.jsonl'}",
            f"train.run_dir={root / 'run'}",
            *(word.format(root=root) for word in words),
        ]
    )
    return resolve_defaults(config, NOON)


def load(root: Path, *words: str) -> Datasets:
    config = configure(root, *words)
    return open_datasets(config, prepare_stores(config, root / "model"), root / "model", VOCABULARY)


def test_defaults_keep_everything_in_order_and_cache_in_the_run_directory(root: Path) -> None:
    sets = load(root)
    assert [pair.index for pair in sets.train] == list(range(40))
    assert sets.validation == {}
    assert sets.pad_token_id == 0
    assert [path.suffix for path in (root / "run" / "tokens").iterdir()] == [""]


def test_several_files_are_concatenated_and_named(root: Path) -> None:
    sets = load(root, "data.train_path=[{root}/train.jsonl,{root}/other.jsonl]")
    assert [pair.index for pair in sets.train] == list(range(46))
    assert sets.train[41].where == f"{root / 'other.jsonl'}:2"


def test_validation_fraction_holds_the_same_pairs_out_for_a_seed(root: Path) -> None:
    sets = load(root, "data.validation_fraction=0.25")
    train, held_out = [p.index for p in sets.train], [p.index for p in sets.validation[""]]
    assert len(held_out) == 10 and sorted(train + held_out) == list(range(40))
    assert train == sorted(train) and held_out == sorted(held_out)
    assert [p.index for p in load(root, "data.validation_fraction=0.25").validation[""]] == held_out
    other = load(root, "data.validation_fraction=0.25", "train.seed=1")
    assert [p.index for p in other.validation[""]] != held_out


def test_validation_files_keep_their_names(root: Path) -> None:
    sets = load(root, "data.validation_path={{a: {root}/other.jsonl, b: {root}/train.jsonl}}")
    assert {name: len(view) for name, view in sets.validation.items()} == {"a": 6, "b": 40}
    assert set(sets.digests) == {"train", "eval/a", "eval/b"}
    assert sets.digests["eval/b"] == sets.digests["train"] != sets.digests["eval/a"]
    assert set(load(root, "data.validation_path={root}/other.jsonl").digests) == {"train", "eval"}


@pytest.mark.parametrize("mode", ["keep_start", "keep_end", "drop"])
def test_truncation_fits_every_pair_and_counts_the_rest(mode: str, root: Path) -> None:
    sets = load(root, "data.max_length=200", f"data.truncation={mode}")
    assert sets.train.longest_sequence <= 200
    counts = sets.train.counts
    cut = {
        "keep_start": (counts.truncated_chosen + counts.truncated_rejected, counts.dropped_long_prompt),
        "keep_end": (counts.truncated_prompt, counts.dropped_long_response),
        "drop": (counts.dropped_too_long, 40 - counts.kept),
    }
    assert min(cut[mode]) > 0, counts


def test_truncation_error_stops(root: Path) -> None:
    with pytest.raises(
        DataError, match=r"train\.jsonl:2: the pair has 234 tokens, data\.max_length=200 and .*keep_start"
    ):
        load(root, "data.max_length=200", "data.truncation=error")


def test_on_error_skip_counts_and_names_bad_rows(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (root / "train.jsonl").open("a") as file:
        file.write('{"prompt": "p", "chosen": 3, "rejected": "r"}\n')
    with pytest.raises(DataError, match=r"train\.jsonl:41: .*chosen \(a number\)"):
        load(root)
    sets = load(root, "data.on_error=skip")
    assert (sets.train.counts.read, sets.train.counts.kept, sets.train.counts.skipped) == (41, 40, 1)
    assert "skipped: " in caplog.text and "train.jsonl:41" in caplog.text
    assert "rows skipped, they can't be used: 1 of 41" in caplog.text
    report = sets.report()
    assert report["sets"]["train"]["skipped"] == 1
    assert len(report["skipped_rows"]) == 1 and "train.jsonl:41" in report["skipped_rows"][0]
    assert json.loads(json.dumps(report)) == report


def test_template_date_is_what_the_template_writes(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="megadpo")
    load(root, "data.train_path={root}/other.jsonl")
    assert "26 Jul 2024<|im_start|>" in caplog.text  # the day of the start
    load(root, "data.train_path={root}/other.jsonl", "data.template_date=1999-12-31")
    assert "31 Dec 1999<|im_start|>" in caplog.text


def test_a_shared_cache_is_used_by_the_next_run(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="megadpo")
    first = load(root, "data.cache_dir={root}/cache")
    assert "tokenized 40 pairs" in caplog.text
    caplog.clear()
    second = load(root, "data.cache_dir={root}/cache", "train.run_dir={root}/second", "data.max_length=200")
    assert "tokenized pairs found" in caplog.text and "tokenized 40" not in caplog.text
    assert len(second.train) < len(first.train)
    assert not (root / "second").exists()


def test_workers_tokenize_large_sets(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="megadpo")
    write_jsonl(root / "train.jsonl", make_pairs(2100, seed=0))
    load(root, "data.workers=1", "data.max_length=4096")
    load(root, "data.workers=2", "data.max_length=4096", "data.cache_dir={root}/cache")
    assert "in 1 process" in caplog.text and "in 2 processes" in caplog.text


def test_pairs_over_the_token_budget_are_warned_about(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once a set, counted, before anything is trained."""
    load(root, "data.tokens_per_microbatch=500", "data.validation_fraction=0.25")
    told = re.findall(r"(\d+) of \d+ (\w+) pairs are longer than data\.tokens_per_microbatch=500", caplog.text)
    assert [name for _, name in told] == ["training", "validation"]
    assert all(int(count) > 0 for count, _ in told)


def test_a_vocabulary_that_is_too_small_names_a_pair(root: Path) -> None:
    config = configure(root)
    with pytest.raises(DataError, match=r"train\.jsonl:\d+: pair \d+ has token id \d+, .* 100 entries"):
        open_datasets(config, prepare_stores(config, root / "model"), root / "model", 100)


def test_resolving_twice_changes_nothing(root: Path) -> None:
    config = configure(root)
    assert resolve_defaults(config, NOON.replace(year=2030)) == config
    assert config.data.template_date == "2024-07-26"
