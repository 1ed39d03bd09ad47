"""Which checkpoint a path means, and what it says about itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadpo.checkpoint.description import (
    metrics_of,
    write_evaluation,
)
from megadpo.checkpoint.directory import Retention, find_checkpoint, list_checkpoints, name_latest, step_directory
from megadpo.checkpoint.manifest import find_damage, write_manifest
from megadpo.config.compose import config_from_yaml
from megadpo.errors import CheckpointError
from megadpo.setup.model_source import model_source, resolve_model
from tests.helpers.training_states import imported, trained


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with two checkpoints and one that was never finished; `latest` names the older one."""
    for step in (1, 2):
        trained(tmp_path / "checkpoints" / f"step_0000000{step}")
    (tmp_path / "checkpoints" / "step_00000003").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_00000001\n")
    return tmp_path


def test_a_path_means_itself_or_what_latest_names(run_dir: Path) -> None:
    root = run_dir / "checkpoints"
    assert [path.name for path in list_checkpoints(root)] == ["step_00000001", "step_00000002"]
    for path in (run_dir, root, root / "step_00000001"):
        assert find_checkpoint(path) == root / "step_00000001"
    assert find_checkpoint(root / "step_00000002") == root / "step_00000002"
    (root / "latest").unlink()
    assert find_checkpoint(run_dir) == root / "step_00000002"


def test_latest_may_name_an_imported_checkpoint(tmp_path: Path) -> None:
    checkpoint = imported(tmp_path / "mine")
    assert find_checkpoint(checkpoint) == checkpoint
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        find_checkpoint(tmp_path)
    (tmp_path / "latest").write_text("mine")
    assert find_checkpoint(tmp_path) == checkpoint


@pytest.mark.parametrize("name", ["step_00000007", "step_00000003", ""])
def test_latest_that_names_no_checkpoint_is_an_error(name: str, run_dir: Path) -> None:
    (run_dir / "checkpoints" / "latest").write_text(name)
    with pytest.raises(CheckpointError, match=rf"latest names '{name}', .*\(step_00000001, step_00000002\)"):
        find_checkpoint(run_dir)


def test_a_path_that_cannot_be_followed_is_named(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "latest").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"latest names '.*', .*: give the directory of one itself"):
        find_checkpoint(run_dir)
    with pytest.raises(CheckpointError, match=r"can't be looked up \(File name too long\): check"):
        find_checkpoint(run_dir / ("x" * 300))


def test_the_source_of_a_configuration(run_dir: Path) -> None:
    yaml = "{{model: {{name: hf, {}}}, data: {{train_path: x}}}}"
    source = model_source(resolve_model(config_from_yaml(yaml.format("hf_path: some/dir"))).model)
    assert (source.hf_dir, source.checkpoint) == (Path("some/dir"), None)
    source = model_source(resolve_model(config_from_yaml(yaml.format(f"checkpoint: {run_dir}"))).model)
    step = run_dir / "checkpoints" / "step_00000001"
    assert (source.hf_dir, source.checkpoint) == (step / "hf", step)


def test_a_model_given_by_its_directory_has_that_name(run_dir: Path, tmp_path: Path) -> None:
    def named(where: str, name: str = "hf") -> str:
        return resolve_model(
            config_from_yaml(f"{{model: {{name: {name}, {where}}}, data: {{train_path: x}}}}")
        ).model.name

    assert named(f"hf_path: {tmp_path}/tiny-llama/") == "tiny-llama"
    assert named(f"hf_path: {tmp_path}/models--Org--Tiny-1B/snapshots/0a1b2c") == "Tiny-1B"
    assert named(f"hf_path: {tmp_path}/tiny-llama", name="llama3_8b") == "llama3_8b"
    assert named(f"checkpoint: {run_dir}") == "hf"  # what the run that trained it was told
    imported(tmp_path / "theirs")
    assert named(f"checkpoint: {tmp_path}/theirs") == "theirs"


def test_a_run_keeps_the_full_path_of_its_checkpoint(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_dir)
    yaml = "{model: {name: hf, checkpoint: checkpoints}, data: {train_path: x}}"
    resolved = resolve_model(config_from_yaml(yaml))
    assert resolved.model.checkpoint == str(run_dir / "checkpoints" / "step_00000001")


def test_a_description_that_cannot_be_read_stops_no_retention(tmp_path: Path) -> None:
    for step, loss in ((1, 0.5), (2, 0.1), (3, 0.4)):
        trained(step_directory(tmp_path, step), metrics={"eval/loss": loss})
    retention = Retention(last=1, best="eval/loss")
    assert retention.dropped(tmp_path) == [step_directory(tmp_path, 1)]
    (step_directory(tmp_path, 2) / "training.json").write_bytes(b"{")
    assert retention.dropped(tmp_path) == [step_directory(tmp_path, 1), step_directory(tmp_path, 2)]


NAN = float("nan")
LOSSES = {2: 0.7, 3: 0.3, 4: NAN, 5: 0.4, 6: None, 7: 0.5}


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(last=1), {7}),
        (Retention(last=2), {6, 7}),
        (Retention(last=9), {2, 3, 4, 5, 6, 7}),
        (Retention(last=1, every=2), {2, 4, 6, 7}),
        (Retention(last=1, every=5), {5, 7}),
        (Retention(last=1, every=100), {7}),
        (Retention(last=1, best="eval/loss"), {3, 7}),
        (Retention(last=1, best="eval/rewards/accuracies"), {2, 7}),
        (Retention(last=1, best="eval/rewards/margins"), {7}),  # which no evaluation has
        (Retention(last=1, every=5, best="eval/loss"), {3, 5, 7}),
        (Retention(last=5, every=4, best="eval/loss"), {3, 4, 5, 6, 7}),
    ],
    ids=str,
)
def test_which_checkpoints_stay(retention: Retention, kept: set[int], tmp_path: Path) -> None:
    """A loss that is not a number, or was never looked at, is not the best one."""
    for step, loss in LOSSES.items():
        metrics = {} if loss is None else {"eval/loss": loss, "eval/rewards/accuracies": loss}
        trained(step_directory(tmp_path, step), metrics=metrics)
    assert retention.dropped(tmp_path) == [step_directory(tmp_path, step) for step in LOSSES if step not in kept]


def test_an_evaluation_that_came_later_judges_a_checkpoint_and_is_no_damage(tmp_path: Path) -> None:
    for step, metrics in ((1, {"eval/loss": 0.5}), (2, {}), (3, {"eval/loss": 0.4})):
        trained(step_directory(tmp_path, step), metrics=metrics)
        write_manifest(step_directory(tmp_path, step), {})
    first, late, _ = list_checkpoints(tmp_path)
    retention = Retention(last=1, best="eval/loss")
    assert metrics_of(late) == {}
    assert retention.dropped(tmp_path) == [first, late]
    write_evaluation(late, {"eval/loss": 0.1})
    assert metrics_of(late) == {"eval/loss": 0.1}
    assert retention.dropped(tmp_path) == [first]
    assert find_damage(late) == []
    write_evaluation(first, {"eval/loss": 0.0})
    assert metrics_of(first) == {"eval/loss": 0.5}, "what the manifest holds counts first"


def test_latest_is_written_where_it_names_another(run_dir: Path) -> None:
    latest, newest = run_dir / "checkpoints" / "latest", run_dir / "checkpoints" / "step_00000002"
    name_latest(newest)
    assert find_checkpoint(run_dir) == newest
    written = latest.stat().st_mtime_ns
    name_latest(newest)
    assert latest.stat().st_mtime_ns == written
    latest.unlink()
    name_latest(newest)
    assert latest.read_text() == "step_00000002\n"
