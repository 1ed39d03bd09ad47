"""What trackers leave on disk, and that a resumed run's files read as if it had never been interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megadpo.trackers import JsonlTracker, TensorBoardTracker, build_trackers


def write_steps(path: Path, steps: list[int], *, resume_step: int = 0) -> None:
    tracker = JsonlTracker(path, resume_step=resume_step)
    for step in steps:
        tracker.log(step, {"loss": step / 10})
    tracker.close()


def read(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_one_object_a_line_step_first(path: Path) -> None:
    tracker = JsonlTracker(path, resume_step=0)
    tracker.log(1, {"loss": 0.6931471805599453, "rewards/margins": -0.25})
    tracker.log(2, {"loss": 0.5})
    tracker.close()
    assert path.read_text() == (
        '{"step": 1, "loss": 0.6931471805599453, "rewards/margins": -0.25}\n{"step": 2, "loss": 0.5}\n'
    )


def test_a_line_is_on_disk_as_soon_as_it_is_logged(path: Path) -> None:
    tracker = JsonlTracker(path, resume_step=0)
    tracker.log(1, {"loss": 0.5})
    assert [line["step"] for line in read(path)] == [1]
    tracker.close()


def test_resuming_drops_what_lies_behind_the_step(path: Path) -> None:
    write_steps(path, [1, 2, 3, 4, 5])
    write_steps(path, [4, 5, 6], resume_step=3)
    assert [line["step"] for line in read(path)] == [1, 2, 3, 4, 5, 6]


def test_an_evaluation_at_the_checkpoint_is_kept(path: Path) -> None:
    """A step's evaluation is logged before its checkpoint is saved, so it is not made again."""
    tracker = JsonlTracker(path, resume_step=0)
    tracker.log(2, {"loss": 0.5})
    tracker.log(2, {"eval/loss": 0.6})
    tracker.log(3, {"loss": 0.4})
    tracker.close()
    JsonlTracker(path, resume_step=2).close()
    assert read(path) == [{"step": 2, "loss": 0.5}, {"step": 2, "eval/loss": 0.6}]


def test_a_fresh_start_over_a_killed_run_begins_with_an_empty_file(path: Path) -> None:
    """Killed before its first checkpoint, a run begins again and evaluates before its first step again."""
    write_steps(path, [0, 1, 2])
    write_steps(path, [0, 1], resume_step=0)
    assert [line["step"] for line in read(path)] == [0, 1]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step"', "{", '"', "3"])
def test_a_torn_last_line_is_dropped(path: Path, torn: str) -> None:
    write_steps(path, [1, 2])
    with path.open("a") as file:
        file.write(torn)
    write_steps(path, [3], resume_step=2)
    assert read(path) == [{"step": step, "loss": step / 10} for step in (1, 2, 3)]


def test_a_whole_last_line_without_its_newline_is_kept(path: Path) -> None:
    write_steps(path, [1, 2])
    path.write_text(path.read_text().rstrip("\n"))
    write_steps(path, [3], resume_step=2)
    assert [line["step"] for line in read(path)] == [1, 2, 3]


def test_opening_leaves_no_other_file(path: Path) -> None:
    write_steps(path, [1])
    write_steps(path, [2], resume_step=1)
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


def events(directory: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of a scalar as TensorBoard shows it."""
    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    return [(event.step, pytest.approx(event.value)) for event in accumulator.Scalars(name)]


def test_tensorboard_reads_the_scalars(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path, resume_step=0)
    tracker.log(1, {"loss": 0.5, "rewards/margins": -1.0})
    tracker.log(2, {"loss": 0.25})
    assert events(tmp_path, "loss") == [(1, 0.5), (2, 0.25)]  # flushed, not only closed
    tracker.close()
    assert events(tmp_path, "rewards/margins") == [(1, -1.0)]


def test_tensorboard_hides_what_lies_behind_the_resumed_step(tmp_path: Path) -> None:
    first = TensorBoardTracker(tmp_path, resume_step=0)
    for step in (1, 2, 3):
        first.log(step, {"loss": 1.0 * step})
    first.close()
    second = TensorBoardTracker(tmp_path, resume_step=2)
    second.log(3, {"loss": 30.0})
    second.close()
    assert events(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_tensorboard_hides_all_of_a_run_that_was_killed_before_its_first_checkpoint(tmp_path: Path) -> None:
    for value in (1.0, 10.0):
        tracker = TensorBoardTracker(tmp_path, resume_step=0)
        tracker.log(1, {"loss": value})
        tracker.close()
    assert events(tmp_path, "loss") == [(1, 10.0)]


def test_a_number_that_json_lacks_becomes_null(path: Path) -> None:
    tracker = JsonlTracker(path, resume_step=0)
    tracker.log(1, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
    tracker.close()
    assert path.read_text() == '{"step": 1, "loss": null, "grad_norm": null, "lr": 0.5}\n'


def test_trackers_by_name(tmp_path: Path) -> None:
    trackers = build_trackers(["tensorboard", "jsonl"], tmp_path, resume_step=0)
    assert [type(tracker) for tracker in trackers] == [TensorBoardTracker, JsonlTracker]
    for tracker in trackers:
        tracker.log(7, {"loss": 0.5})
        tracker.close()
    assert read(tmp_path / "metrics.jsonl") == [{"step": 7, "loss": 0.5}]
    assert events(tmp_path / "tensorboard", "loss") == [(7, 0.5)]
