"""The comparison of two commits finds every difference that it is made for, and no other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.compare_commits import SCENARIOS, Command, differing_statuses
from tests.helpers.comparison import compare_directories, differing_values, is_stable

LINES: list[dict[str, Any]] = [
    {"step": 0, "eval/loss": 0.5, "eval/time_s": 1.0},
    {"step": 1, "loss": 0.25, "time/step_s": 2.0, "memory/peak_gib": 1.0, "memory/reference_gib": 1.0},
]
TRAINING = {"step": 1, "settings": {"optimizer.betas": [0.9, 0.999]}, "metrics": {"eval/loss": 0.5, "eval/time_s": 1.0}}
MANIFEST = {"format": 1, "files": {"training.json": {"bytes": 5}, "common.pt": {"bytes": 7, "sha256": "ab"}}}
SAVE_ID = b"33776c92-63ed-4245-8082-310d522f10e6"


def write_run(root: Path) -> Path:
    (root / "hf").mkdir(parents=True)
    (root / "hf" / "model.safetensors").write_bytes(b"weights")
    (root / ".metadata").write_bytes(b"shapes" + SAVE_ID + b"places")
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    (root / "training.json").write_text(json.dumps(TRAINING))
    (root / "manifest.json").write_text(json.dumps(MANIFEST))
    return root


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    base = write_run(tmp_path / "base")
    return base, Path(shutil.copytree(base, tmp_path / "head"))


def replace_in(name: str, old: str, new: str) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        text = (root / name).read_text()
        assert text.count(old) == 1
        (root / name).write_text(text.replace(old, new))

    return change


def test_equal_directories_are_equal(sides: tuple[Path, Path]) -> None:
    found = compare_directories(*sides)
    assert found.differences == []
    assert found.files == 5
    assert found.numbers == (2 + 3) + 4 + 2  # metrics.jsonl, training.json, manifest.json


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (replace_in("metrics.jsonl", "0.25", "0.25000000000000006"), "metrics.jsonl: step 1: loss: 0.25 in BASE, 0.25"),
        (replace_in("metrics.jsonl", '"memory/reference_gib": 1.0', '"x": 1'), "memory/reference_gib: 1.0 in BASE, no"),
        (lambda root: (root / "metrics.jsonl").open("a").write('{"step": 2}\n'), "2 lines in BASE, 3 in HEAD"),
        (replace_in("training.json", "0.999", "0.99"), "training.json: step 1: settings/optimizer.betas/1: 0.999 in"),
        (replace_in("manifest.json", "7", "8"), "manifest.json: files/common.pt/bytes: 7 in BASE, 8 in HEAD"),
        (lambda root: (root / "hf" / "model.safetensors").write_bytes(b"Weights"), "hf/model.safetensors: SHA-256 "),
        (lambda root: (root / ".metadata").write_bytes(b"shapes" + SAVE_ID), ".metadata: SHA-256 "),
        (lambda root: (root / "hf" / "more").touch(), "hf/more: only HEAD has this file"),
        (lambda root: (root / "hf" / "model.safetensors").unlink(), "hf/model.safetensors: only BASE has this file"),
    ],
)
def test_a_difference_is_found(change: Callable[[Path], object], said: str, sides: tuple[Path, Path]) -> None:
    change(sides[1])
    assert any(said in text for text in compare_directories(*sides).differences)


@pytest.mark.parametrize(
    "change",
    [
        replace_in("metrics.jsonl", '"eval/time_s": 1.0', '"eval/time_s": 3.0'),
        replace_in("metrics.jsonl", '"time/step_s": 2.0', '"time/step_s": 3.0'),
        replace_in("metrics.jsonl", '"memory/peak_gib": 1.0', '"memory/peak_gib": 3.0'),
        replace_in("training.json", '"eval/time_s": 1.0', '"eval/time_s": 3.0'),
        replace_in("manifest.json", '"bytes": 5', '"bytes": 6'),
        replace_in("manifest.json", "ab", "cd"),
        lambda root: (root / ".metadata").write_bytes(b"shapes" + SAVE_ID.replace(b"3", b"4") + b"places"),
    ],
)
def test_what_no_two_runs_have_in_common_may_differ(change: Callable[[Path], object], sides: tuple[Path, Path]) -> None:
    change(sides[1])
    assert compare_directories(*sides).differences == []


def test_lines_of_numbers_come_first(sides: tuple[Path, Path]) -> None:
    (sides[1] / "hf" / "model.safetensors").write_bytes(b"Weights")
    replace_in("metrics.jsonl", "0.25", "0.26")(sides[1])
    said = compare_directories(*sides).differences
    assert [text.split(":")[0] for text in said] == ["metrics.jsonl", "hf/model.safetensors"]


@pytest.mark.parametrize(("a", "b"), [(0.0, -0.0), (1, 1.0), (1, True), (None, 0), ([], {}), (1e-300, 0.0)])
def test_values_that_python_or_a_tolerance_takes_for_equal_differ(a: object, b: object) -> None:
    assert differing_values([{"x": a}], [{"x": b}]) == [f"x: {a!r} in BASE, {b!r} in HEAD"]
    assert differing_values([{"x": a}], [{"x": a}]) == []


def test_a_number_that_is_none_is_equal_to_itself() -> None:
    assert differing_values([{"x": float("nan")}], [{"x": float("nan")}]) == []


def test_segments_of_a_cache_are_compared_in_their_order(sides: tuple[Path, Path]) -> None:
    for root, names in zip(sides, (["017-ab", "018-cd"], ["019-cd", "020-ab"]), strict=True):
        for name, content in zip(names, ("first", "second"), strict=True):
            (root / f"{name}.logps").write_text(content)
    assert compare_directories(*sides).differences == []
    (sides[1] / "021-ef.logps").write_text("third")
    (sides[1] / "020-ab.logps").write_text("another")
    said = compare_directories(*sides).differences
    assert [text.split(" ")[0] for text in said] == ["2.logps:", "1.logps:"]


def test_only_what_is_listed_is_left_out() -> None:
    kept = "loss eval/loss eval/time step fp8/margin_error memory/reference_gib metrics/eval/loss files/common.pt/bytes"
    assert all(is_stable(name) for name in kept.split())
    assert not any(is_stable(name) for name in "time/data_s throughput/mfu fp8/time_s pairs_per_s".split())


def test_exit_statuses_must_be_those_expected() -> None:
    commands = [Command("train", 2, ""), Command("train", 0, "", status=2)]
    assert differing_statuses(commands, [0, 2], [0, 2]) == []
    assert differing_statuses(commands, [1, 2], [1, 2]) == [
        "train (command 1): exit status 1 in BASE, 1 in HEAD, expected 0"
    ]
    assert differing_statuses(commands, [0, 2], [0, 0]) == [
        "train (command 2): exit status 2 in BASE, 0 in HEAD, expected 2"
    ]


def test_no_scenario_names_an_absolute_path() -> None:
    words = [word for commands in SCENARIOS.values() for command in commands for word in command.words.split()]
    assert not [word for word in words if "=/" in word or word.startswith("/")]
