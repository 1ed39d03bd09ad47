"""What trackers leave on disk, that a resumed run's files read as if it had never been interrupted, and that no tracker
stops a run."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megadpo.metrics.trackers import GuardedTracker, JsonlTracker, TensorBoardTracker, WandbTracker, open_trackers
from tests.helpers.no_room import largest_file
from tests.helpers.wandb_files import wandb_runs


def write_steps(path: Path, steps: list[int], *, resume_step: int = 0) -> None:
    tracker = JsonlTracker(path, resume_step=resume_step)
    for step in steps:
        tracker.log(step, {"loss": step / 10})
    tracker.close(failed=False)


def read(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_one_object_a_line_step_first(path: Path) -> None:
    tracker = JsonlTracker(path, resume_step=0)
    tracker.log(1, {"loss": 0.6931471805599453, "rewards/margins": -0.25})
    tracker.log(2, {"loss": 0.5})
    tracker.close(failed=False)
    assert path.read_text() == (
        '{"step": 1, "loss": 0.6931471805599453, "rewards/margins": -0.25}\n{"step": 2, "loss": 0.5}\n'
    )


def test_a_line_is_on_disk_as_soon_as_it_is_logged(path: Path) -> None:
    tracker = JsonlTracker(path, resume_step=0)
    tracker.log(1, {"loss": 0.5})
    assert [line["step"] for line in read(path)] == [1]
    tracker.close(failed=False)


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
    tracker.close(failed=False)
    JsonlTracker(path, resume_step=2).close(failed=False)
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
    tracker.close(failed=False)
    assert events(tmp_path, "rewards/margins") == [(1, -1.0)]


def test_tensorboard_hides_what_lies_behind_the_resumed_step(tmp_path: Path) -> None:
    first = TensorBoardTracker(tmp_path, resume_step=0)
    for step in (1, 2, 3):
        first.log(step, {"loss": 1.0 * step})
    first.close(failed=False)
    second = TensorBoardTracker(tmp_path, resume_step=2)
    second.log(3, {"loss": 30.0})
    second.close(failed=False)
    assert events(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_tensorboard_hides_all_of_a_run_that_was_killed_before_its_first_checkpoint(tmp_path: Path) -> None:
    for value in (1.0, 10.0):
        tracker = TensorBoardTracker(tmp_path, resume_step=0)
        tracker.log(1, {"loss": value})
        tracker.close(failed=False)
    assert events(tmp_path, "loss") == [(1, 10.0)]


def test_a_number_that_json_lacks_becomes_null(path: Path) -> None:
    tracker = JsonlTracker(path, resume_step=0)
    tracker.log(1, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
    tracker.close(failed=False)
    assert path.read_text() == '{"step": 1, "loss": null, "grad_norm": null, "lr": 0.5}\n'


def test_trackers_by_name(tmp_path: Path) -> None:
    with open_trackers(["tensorboard", "jsonl"], tmp_path, resume_step=0, settings={}) as trackers:
        for tracker in trackers:
            tracker.log(7, {"loss": 0.5})
    assert read(tmp_path / "metrics.jsonl") == [{"step": 7, "loss": 0.5}]
    assert events(tmp_path / "tensorboard", "loss") == [(7, 0.5)]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


# A tracker that fails


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The warnings of the trackers so far."""
    monkeypatch.setattr(logging.getLogger("megadpo"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


class Failing:
    """Raises what it is told to at given steps, or when it is closed."""

    def __init__(self, errors: Mapping[int, BaseException], at_close: BaseException | None = None) -> None:
        self.errors, self.at_close = errors, at_close
        self.outcomes: list[bool] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step in self.errors:
            raise self.errors[step]

    def close(self, *, failed: bool) -> None:
        self.outcomes.append(failed)
        if self.at_close:
            raise self.at_close


def test_each_distinct_failure_is_told_once_and_lost_lines_are_counted(warnings: Callable[[], list[str]]) -> None:
    failing = Failing({2: OSError(28, "no space"), 3: OSError(28, "no space"), 5: RuntimeError("odd")})
    with GuardedTracker("mine", lambda: failing) as tracker:
        for step in range(1, 7):
            tracker.log(step, {"loss": 0.5})
    assert warnings() == [
        "tracker mine failed: OSError: [Errno 28] no space (the metrics of step 2 are lost there; the run goes on)",
        "tracker mine failed: RuntimeError: odd (the metrics of step 5 are lost there; the run goes on)",
        "tracker mine: 3 of 6 lines of metrics are lost",
    ]
    assert failing.outcomes == [False]


def test_a_tracker_that_cannot_be_opened_or_closed(warnings: Callable[[], list[str]]) -> None:
    def refuse() -> Failing:
        raise PermissionError(13, "Permission denied", "metrics")

    with GuardedTracker("shut", refuse) as tracker, GuardedTracker("last", lambda: Failing({}, OSError("gone"))):
        tracker.log(1, {})
    assert warnings() == [
        "tracker shut failed: PermissionError: [Errno 13] Permission denied: 'metrics' (the run goes on without it)",
        "tracker last failed: OSError: gone (the last metrics may be missing there)",
        "tracker shut: 1 of 1 lines of metrics are lost",
    ]


def test_interrupts_pass_and_all_trackers_hear_that_the_run_failed() -> None:
    first, second = Failing({}, ValueError("close")), Failing({1: KeyboardInterrupt()})
    with (
        pytest.raises(KeyboardInterrupt),
        GuardedTracker("first", lambda: first),
        GuardedTracker("second", lambda: second) as tracker,
    ):
        tracker.log(1, {})
    assert first.outcomes == second.outcomes == [True]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writer thread
def test_a_full_disk_costs_lines_and_tears_none(tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    with open_trackers(["jsonl", "tensorboard"], tmp_path, resume_step=0, settings={}) as trackers:
        jsonl, tensorboard = trackers
        jsonl.log(1, {"loss": 0.5})
        with largest_file(40):
            jsonl.log(2, {"loss": 0.25})
            tensorboard.log(2, {"loss": 0.25})
            jsonl.log(3, {"loss": 0.125})
        jsonl.log(4, {"loss": 1.0})
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}, {"step": 4, "loss": 1.0}]
    told = "\n".join(warnings())
    assert "tracker jsonl failed: OSError: [Errno 27] File too large (the metrics of step 2 are lost" in told
    assert "tracker jsonl: 2 of 4 lines of metrics are lost" in told
    assert "tracker tensorboard: 1 of 1 lines of metrics are lost" in told


# Weights & Biases, offline: what it would upload


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run directory; W&B is offline and keeps its own files beside it."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "home" / name))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    (tmp_path / "my-run").mkdir()
    yield tmp_path / "my-run"
    wandb.teardown()


def track(run_dir: Path, lines: list[tuple[int, dict[str, float]]], *, resume_step: int = 0) -> None:
    tracker = WandbTracker(run_dir, resume_step=resume_step, settings={"loss": {"beta": 0.1}, "trackers": ["wandb"]})
    for step, metrics in lines:
        tracker.log(step, metrics)
    tracker.close(failed=False)


def test_wandb_keeps_every_metric_of_a_step(offline: Path) -> None:
    track(offline, [(0, {"eval/loss": 0.7}), (1, {"loss": 0.6}), (2, {"loss": 0.5}), (2, {"eval/loss": 0.4})])
    (run,) = wandb_runs(offline)
    assert run["rows"] == {0: {"eval/loss": 0.7}, 1: {"loss": 0.6}, 2: {"loss": 0.5, "eval/loss": 0.4}}
    assert (run["project"], run["name"], run["exit_code"]) == ("megadpo", "my-run", 0)
    assert run["config"] == {"_wandb": {}, "loss": {"beta": 0.1}, "trackers": ["wandb"]}


def test_wandb_goes_on_with_the_same_run_and_repeats_no_step(offline: Path) -> None:
    first = WandbTracker(offline, resume_step=0, settings={})
    for step in range(1, 6):
        first.log(step, {"loss": 1.0 * step})
    wandb.teardown()  # killed: only W&B's own process could tidy up, and row 5 may not have been whole
    track(offline, [(step, {"loss": 10.0 * step}) for step in range(4, 8)], resume_step=3)
    before, after = wandb_runs(offline)
    assert before["id"] == after["id"]
    assert list(before["rows"]) == [1, 2, 3, 4, 5]
    assert after["rows"] == {5: {"loss": 50.0}, 6: {"loss": 60.0}, 7: {"loss": 70.0}}
    track(offline, [(8, {"loss": 1.0})], resume_step=7)
    assert list(wandb_runs(offline)[-1]["rows"]) == [8]


def test_wandb_has_an_evaluation_that_came_too_late_for_its_row_in_the_next(offline: Path) -> None:
    """Of step 2, where the run was stopped; the start that makes it is killed, and the next one does not repeat it."""
    track(offline, [(1, {"loss": 1.0}), (2, {"loss": 2.0})])
    killed = WandbTracker(offline, resume_step=2, settings={})
    killed.log(2, {"eval/loss": 0.5})
    wandb.teardown()
    track(offline, [(3, {"loss": 3.0}), (4, {"loss": 4.0}), (4, {"eval/loss": 0.25})], resume_step=2)
    assert wandb_runs(offline)[-1]["rows"] == {3: {"loss": 3.0, "eval/loss": 0.5}, 4: {"loss": 4.0, "eval/loss": 0.25}}
    track(offline, [(5, {"loss": 5.0})], resume_step=4)
    assert wandb_runs(offline)[-1]["rows"] == {5: {"loss": 5.0}}
    own = [(6, {"loss": 6.0}), (6, {"eval/loss": 0.125}), (6, {"fp8/time_s": 1.0})]
    track(offline, [(5, {"eval/loss": 0.9}), *own], resume_step=5)
    assert wandb_runs(offline)[-1]["rows"] == {6: {"loss": 6.0, "eval/loss": 0.125, "fp8/time_s": 1.0}}


def test_wandb_honours_its_environment(offline: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"PROJECT": "theirs", "NAME": "called", "RUN_ID": "given", "DIR": str(tmp_path / "dir")}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    (tmp_path / "dir").mkdir()
    track(offline, [(1, {"loss": 0.5})])
    (run,) = wandb_runs(tmp_path / "dir")
    assert (run["project"], run["name"], run["id"]) == ("theirs", "called", "given")


def test_wandb_says_that_a_known_run_beats_the_environment(
    offline: Path, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    track(offline, [(1, {"loss": 0.5})])
    (known,) = {run["id"] for run in wandb_runs(offline)}
    monkeypatch.setenv("WANDB_RUN_ID", "given")
    wandb.teardown()
    track(offline, [(2, {"loss": 0.5})], resume_step=1)
    assert {run["id"] for run in wandb_runs(offline)} == {known}
    state = offline / "wandb" / "resume.json"
    (told,) = warnings()
    assert told == (
        f"WANDB_RUN_ID=given has no effect: this run goes on in its own W&B run {known}; "
        f"remove {state} to leave that one"
    )


def test_wandb_names_the_state_it_cannot_read(offline: Path, warnings: Callable[[], list[str]]) -> None:
    state = offline / "wandb" / "resume.json"
    state.parent.mkdir()
    state.write_text("[")
    with open_trackers(["wandb"], offline, resume_step=0, settings={}):
        pass
    (told,) = warnings()
    assert told.startswith(f"tracker wandb failed: {state} can't be read (JSONDecodeError")
    assert "remove it, and a new W&B run begins" in told


def test_wandb_hears_that_the_run_failed(offline: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        open_trackers(["wandb"], offline, resume_step=0, settings={}) as (tracker,),
    ):
        tracker.log(1 // 0, {})
    (run,) = wandb_runs(offline)
    assert run["exit_code"] == 1


def test_wandb_without_a_login_neither_asks_nor_stops(
    offline: Path, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    # A terminal on both ends, which W&B would ask on.
    monkeypatch.setattr("wandb.errors.term._sys_stdin_isatty", lambda: True)
    monkeypatch.setattr("wandb.errors.term._sys_stderr_isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    with open_trackers(["jsonl", "wandb"], offline, resume_step=0, settings={}) as trackers:
        for tracker in trackers:
            tracker.log(1, {"loss": 0.5})
    assert read(offline / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
    first, last = warnings()
    assert first.startswith("tracker wandb failed: trackers=wandb: No API key configured")
    assert "log in once with `wandb login` (or set WANDB_API_KEY), or set WANDB_MODE=offline" in first
    assert last == "tracker wandb: 1 of 1 lines of metrics are lost"


def test_no_secret_lands_in_a_file(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {name: f"SENTINEL{name.replace('_', '')}{'0' * 40}" for name in SECRET_VARIABLES}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["train.py", "--password=SENTINELARGUMENT"])
    with open_trackers(["jsonl", "tensorboard", "wandb"], offline, resume_step=0, settings={"a": "FOUND"}) as trackers:
        print("SENTINELPRINTED")
        for tracker in trackers:
            tracker.log(1, {"loss": 0.5})
    contents = {path: path.read_bytes() for path in offline.rglob("*") if path.is_file()}
    assert any(b"FOUND" in content for content in contents.values())  # files are not compressed
    assert [path for path, content in contents.items() if b"SENTINEL" in content] == []
    assert {path.name for path in contents} & {"wandb-metadata.json", "requirements.txt", "output.log"} == set()


SECRET_VARIABLES = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")
