"""A saver without a model: the time it needs, and evaluations that come late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megadpo.checkpoint.description import (
    metrics_of,
)
from megadpo.checkpoint.directory import Retention, step_directory
from megadpo.checkpoint.saver import CheckpointSaver
from megadpo.checkpoint.writer import CheckpointWriter
from megadpo.health.watchdog import HangWatchdog
from tests.helpers.training_states import run_identity, trained


def saver_in(root: Path, resumed_from: Path | None = None) -> CheckpointSaver:
    """A saver without a model, for what it does besides saving."""
    unused: Any = None
    return CheckpointSaver(
        root,
        *(unused, unused),
        identity=run_identity(),
        side_files={},
        dtype=torch.float32,
        retention=Retention(last=1),
        asynchronous=False,
        resumed_from=resumed_from,
        watchdog=HangWatchdog(None, rank=0, world=1, patience_s=60.0),
    )


def test_a_run_that_stops_needs_time_for_a_save_under_way_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = saver_in(tmp_path)
    saver.last_save_s = 40.0
    for busy, needed in ((False, 40.0), (True, 80.0)):
        monkeypatch.setattr(CheckpointWriter, "is_busy", busy)
        assert saver.seconds_to_stop == needed


def test_a_later_evaluation_is_kept_by_rank_0_of_the_run_and_ends_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it can't be written, as in a directory that is gone, that is a warning."""
    there, elsewhere = (trained(step_directory(tmp_path / name / "checkpoints", 1)) for name in ("run", "other"))
    gone = step_directory(there.parent, 2)

    def keep(checkpoint: Path | None) -> None:
        saver = saver_in(tmp_path / "run" / "checkpoints", checkpoint)
        saver.keep_evaluation({"eval/loss": 0.5})

    with pytest.MonkeyPatch.context() as elsewhere_than_rank_0:
        elsewhere_than_rank_0.setenv("RANK", "1")
        keep(there)
    keep(elsewhere)
    keep(None)
    assert metrics_of(there) == metrics_of(elsewhere) == {}
    keep(there)
    assert metrics_of(there) == {"eval/loss": 0.5}
    assert not caplog.records
    keep(gone)
    assert f"{gone}" in caplog.text and "checkpoint.keep_best can't judge it" in caplog.text
