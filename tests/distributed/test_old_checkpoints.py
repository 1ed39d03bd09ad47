"""A checkpoint that an earlier commit wrote is resumed, scored and exported as by that commit itself.

The archive's content is described in tests/fixtures/make_old_checkpoint.sh, which made it with that commit's code.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import run_tool
from tests.helpers.launch import launch
from tests.helpers.runs import assert_same_evaluations, assert_same_trajectory, metrics

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "checkpoint_of_39c3962.tar.gz"
CHECKPOINT = Path("run", "checkpoints", "step_00000002")
LINES_BEFORE = 4  # of metrics.jsonl: an evaluation, steps 1 and 2, an evaluation
# The layout that wrote it, and others.
LAYOUTS = {
    "pp2": (2, ["parallel.pipeline=2"]),
    "tp2": (2, ["parallel.tensor=2"]),
    "one_rank": (1, []),
}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The archive's files, in a directory of the test's own."""
    with tarfile.open(ARCHIVE) as files:
        files.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_is_resumed(name: str, old: Path) -> None:
    """Weights, moments, the reference that follows the policy, schedule and place in the data are all taken up."""
    ranks, layout = LAYOUTS[name]
    before = metrics(old / "run")[:LINES_BEFORE]
    settings = json.loads((old / CHECKPOINT / "training.json").read_text())["settings"]
    log, *_ = launch(ranks, run_tool, "train", [*(old / "words").read_text().split(), *layout], old)
    assert f"resumed from {CHECKPOINT}" in log
    assert complaints(log, settings) == []

    assert metrics(old / "run")[:LINES_BEFORE] == before
    assert_same_trajectory(old / "expected", old / "run", lr=settings["optimizer.lr"])
    assert_same_evaluations(old / "expected", old / "run")
    assert (old / "run" / "checkpoints" / "latest").read_text() == "step_00000004\n"


def complaints(log: str, settings: dict[str, Any]) -> list[str]:
    """The warnings, but for other versions of packages and for keys that the stored settings did not have yet."""
    warnings = [line for line in log.splitlines() if re.match(r"\S+ W ", line)]
    subjects = {line: re.search(r" resuming with ([^ =]+)", line) for line in warnings}
    return [line for line, subject in subjects.items() if subject is None or subject[1] in settings]


def test_it_is_scored(old: Path) -> None:
    words = ["+model=hf", "model.checkpoint=run", "data.train_path=pairs.jsonl", "output=scores.jsonl"]
    settings = ["device.kind=cpu", "data.workers=1", "precision.dtype=fp32", "parallel.tensor=2"]
    launch(2, run_tool, "score", [*words, *settings], old)
    lines = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (old / "expected" / "scores.jsonl", old / "scores.jsonl")
    ]
    for expected, found in zip(*lines, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_it_is_exported(old: Path) -> None:
    """The very bytes that the commit's own tool exported."""
    launch(1, run_tool, "convert", ["export", "--checkpoint", "run", "--out", "exported", "--device", "cpu"], old)
    digest = hashlib.sha256((old / "exported" / "model.safetensors").read_bytes()).hexdigest()
    assert f"{digest}  model.safetensors\n" == (old / "expected" / "exported.sha256").read_text()
    assert "Trained for 2 steps" in (old / "exported" / "README.md").read_text()
