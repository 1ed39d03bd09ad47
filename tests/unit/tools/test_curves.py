"""The picture of a run: which points it draws, and that it is one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tools"))  # as the tools have it

from inspection.curves import PANELS, draw_curves, read_curves  # noqa: E402

LINES = [
    {"step": 0, "eval/loss": 0.69, "eval/rewards/margins": 0.0, "eval/rewards/accuracies": 0.0, "eval/time_s": 1.0},
    {"step": 1, "loss": 0.69, "rewards/margins": 0.0, "rewards/accuracies": 0.0, "time/step_s": 0.5},
    {"step": 2, "lr": 1e-6, "steps/skipped": 1},
    {"step": 3, "loss": 0.5, "rewards/margins": 0.4, "rewards/accuracies": 0.75},
    {"step": 3, "eval/chat/loss": 0.6, "eval/code/loss": 0.7},
]


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def test_points_are_those_of_the_lines(metrics: Path) -> None:
    curves = read_curves(metrics)
    assert curves["loss"] == {
        "evaluation": [(0, 0.69)],
        "training": [(1, 0.69), (3, 0.5)],
        "evaluation chat": [(3, 0.6)],
        "evaluation code": [(3, 0.7)],
    }
    assert curves["rewards/accuracies"] == {"evaluation": [(0, 0.0)], "training": [(1, 0.0), (3, 0.75)]}
    assert curves.keys() == PANELS.keys()


def test_the_picture_has_every_series_and_is_the_same_every_time(metrics: Path, tmp_path: Path) -> None:
    pictures = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for picture in pictures:
        draw_curves(metrics, picture, title="a run")
    first, second = (picture.read_text() for picture in pictures)
    assert first == second
    for text in ("a run", *PANELS, "evaluation chat", "evaluation code"):
        assert f"<!-- {text} -->" in first  # how matplotlib names a text whose letters it draws


def test_a_run_without_lines_is_an_empty_picture(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "empty.png", title="nothing yet")
    assert (tmp_path / "empty.png").stat().st_size > 1000
