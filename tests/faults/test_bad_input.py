"""Bad input through the front door: a message that says where, what and how, on every rank, before weights are read.

The whole table, and two runs with what is accepted or skipped, are one launch of two ranks.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.cases import data, hostile, model, settings
from tests.faults.cases.accepted import ACCEPTED, OTHER_ROWS, SAME_ROWS, skipping
from tests.faults.cases.case import Base, Case, row
from tests.helpers.jobs.fault import Outcome, Start, start_each
from tests.helpers.launch import launch
from tests.helpers.tiny_models import write_tiny_model

_ALL = [*data.CASES, *model.CASES, *hostile.CASES, *settings.CASES]
CASES = {case.name: case for case in _ALL}
SKIPPABLE = [case for case in CASES.values() if case.skippable]
TOOL = Path(__file__).resolve().parents[2] / "tools" / "train.py"


def _slug(case: Case) -> str:
    return re.sub(r"\W", "_", case.name)


def _data_of(case: Case) -> str:
    """The case's data file, for the words of another."""
    return case.words[0].partition("=")[2].replace("HERE", f"CASES/{_slug(case)}")


SKIPPING = skipping([_data_of(case) for case in SKIPPABLE], "RUNS/malformed_line")


@dataclass(frozen=True)
class Table:
    """Where the inputs of the cases are, and how each start ended on both ranks."""

    root: Path
    base: Base
    outcomes: list[dict[str, Outcome]]

    def report(self, case: Case) -> dict[str, Any]:
        """data.json of a run that was not refused."""
        run_dir = _run_dir(_words(case, self.root, self.base))
        return json.loads((run_dir / "data.json").read_text(encoding="utf-8"))


def _fill_in(text: str, case: Case, root: Path, base: Base) -> str:
    places = {"HERE": root / "cases" / _slug(case), "CASES": root / "cases", "RUNS": root / "runs"}
    places |= {"MODEL": base.model, "PAIRS": base.pairs}
    for word, path in places.items():
        text = text.replace(word, str(path))
    return text


def _words(case: Case, root: Path, base: Base, *more: str) -> list[str]:
    model = [] if any(word.startswith("+model=") for word in case.words) else ["+model=hf"]
    common = ["model.hf_path=MODEL", "data.train_path=PAIRS", f"train.run_dir=RUNS/{_slug(case)}", "device.kind=cpu"]
    common += ["precision.dtype=fp32", "trackers=[jsonl]", "train.max_steps=1", "train.global_batch_size=2"]
    return [_fill_in(word, case, root, base) for word in [*model, *common, *case.words, *more]]


def _run_dir(words: list[str]) -> Path:
    key = "train.run_dir="
    return Path([word.removeprefix(key) for word in words if word.startswith(key)][-1])


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    root = tmp_path_factory.mktemp("faults")
    base = Base(
        write_tiny_model(root / "good" / "model", "llama", num_layers=2),
        write_tiny_model(root / "good" / "sharded", "llama", num_layers=2, max_shard_size="150KB"),
        root / "good" / "pairs.jsonl",
    )
    base.pairs.write_text(row() * 4, encoding="utf-8")
    cases = [*CASES.values(), ACCEPTED, SKIPPING]
    for case in cases:
        here = root / "cases" / _slug(case)
        here.mkdir(parents=True)
        case.make(here, base)
    words = {case.name: _words(case, root, base) for case in cases}
    starts = [Start(name, own, _run_dir(own)) for name, own in words.items()]
    return Table(root, base, launch(2, start_each, starts))


def test_the_names_of_the_table_are_its_own() -> None:
    names = Counter(case.name for case in _ALL)
    assert set(names.values()) == {1}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_with_one_message(table: Table, name: str) -> None:
    case = CASES[name]
    first, second = (outcomes[name] for outcomes in table.outcomes)
    assert first.refused and second.refused, first.text or "accepted"
    assert first.text == second.text
    places = {"HERE": table.root / "cases" / _slug(case), "MODEL": table.base.model}
    message = case.message
    for word, path in places.items():
        message = message.replace(word, re.escape(str(path)))
    assert re.match(message, first.text, re.DOTALL), first.text
    assert (first.weight_reads > 0) == case.reads_weights
    assert first.written <= {"tokens"}  # which the next start takes over


def test_the_same_rows_in_another_dress_are_the_same_pairs(table: Table) -> None:
    sets = table.report(ACCEPTED)["sets"]
    assert {sets[f"eval/{name}"]["kept"] for name in SAME_ROWS} == {2}
    assert {sets[f"eval/{name}"]["digest"] for name in SAME_ROWS} == {sets["eval/plain"]["digest"]}


@pytest.mark.parametrize("name", OTHER_ROWS)
def test_odd_pairs_are_counted(table: Table, name: str) -> None:
    counts = table.report(ACCEPTED)["sets"][f"eval/{name}"]
    ignored = ("tokens", "longest_sequence", "digest")
    assert {key: value for key, value in counts.items() if value and key not in ignored} == OTHER_ROWS[name][1]


def test_a_pad_token_that_the_model_does_not_have_is_told(table: Table) -> None:
    outcome = table.outcomes[0][ACCEPTED.name]
    assert outcome.text == ""
    assert "pad token has id 401, the model's vocabulary has 401 entries: token 0 pads instead" in outcome.log


def test_bad_rows_are_skipped_and_the_counts_add_up(table: Table) -> None:
    """In the directory of a start that was refused."""
    outcome = table.outcomes[0][SKIPPING.name]
    assert outcome.text == ""
    report = table.report(SKIPPING)
    counts = report["sets"]["train"]
    good = counts["read"] - len(SKIPPABLE)
    assert counts["skipped"] == len(SKIPPABLE) == len(report["skipped_rows"])
    assert counts["kept"] == good > len(SKIPPABLE)
    assert f"rows skipped, they can't be used: {len(SKIPPABLE)} of {counts['read']}" in outcome.log
    for case in SKIPPABLE:
        place = _fill_in(_data_of(case), case, table.root, table.base)
        assert any(line.startswith(f"{place}:3: ") for line in report["skipped_rows"])
    assert outcome.written > {"config.yaml", "checkpoints", "hf"}


def test_a_tokenizer_without_a_pad_token_is_told(table: Table) -> None:
    assert "no pad token; the end token '<eos>' serves as one" in table.outcomes[0][SKIPPING.name].log


@pytest.mark.parametrize("name", ["all at once", "malformed line", "missing weight"])
def test_the_command_says_it_without_a_traceback(table: Table, name: str) -> None:
    words = _words(CASES[name], table.root, table.base, "train.run_dir=RUNS/command")
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    result = subprocess.run(
        [sys.executable, str(TOOL), *words], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    told = table.outcomes[0][name].text.replace("world size 2", "world size 1")
    assert told in result.stderr
