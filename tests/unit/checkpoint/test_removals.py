"""Directories that are removed beside everything else."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path

import pytest

from megadpo.checkpoint.removals import BackgroundRemoval


def test_each_directory_is_removed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is asked for again while it is removed, or has been seen before it was gone, is not removed again."""
    remove, go_on, removed = shutil.rmtree, threading.Event(), []

    def slowly(directory: Path) -> None:
        assert go_on.wait(60.0)
        removed.append(directory.name)
        remove(directory)

    monkeypatch.setattr(shutil, "rmtree", slowly)
    removals = BackgroundRemoval()
    for name in ("one", "two"):
        (tmp_path / name / "hf").mkdir(parents=True)
        (tmp_path / name / "file").write_text("content")
    with caplog.at_level(logging.WARNING, "megadpo"):
        for name in ("one", "two", "one"):
            removals.begin(tmp_path / name)
        assert removals.wait(0.01) == 6  # two directories in each, and a file
        go_on.set()
        assert removals.wait(60.0) == 0
        removals.begin(tmp_path / "one")
        assert removals.wait(60.0) == 0
    assert removed == ["one", "two"]
    assert not caplog.records


@pytest.mark.parametrize(
    ("error", "told"),
    [(OSError(16, "Device or resource busy"), "Device or resource busy"), (RecursionError("too deep"), "too deep")],
)
def test_what_can_t_be_removed_is_said_and_does_not_keep_the_others(
    error: Exception, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    remove = shutil.rmtree

    def refuse(directory: Path) -> None:
        if directory.name == "one":
            raise error
        remove(directory)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    removals = BackgroundRemoval()
    with caplog.at_level(logging.WARNING, "megadpo"):
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            removals.begin(tmp_path / name)
        assert removals.wait(60.0) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert f"one can't be removed yet ({told}): the next save tries again" in caplog.text
