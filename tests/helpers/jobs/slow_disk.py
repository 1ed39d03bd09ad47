"""Saves on disks that are slow, or do not answer: in trainings that watch for ranks that stand still, and alone."""

from __future__ import annotations

import errno
import gc
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

from megatron.core.dist_checkpointing.strategies import filesystem_async

from megadpo.checkpoint import saver as checkpoint_saver
from megadpo.checkpoint import writer as checkpoint_writer
from megadpo.checkpoint.directory import list_checkpoints, step_of
from megadpo.errors import CheckpointError
from megadpo.health.watchdog import HangWatchdog
from tests.helpers.jobs.fault import captured_log
from tests.helpers.jobs.saving import begin_save, tiny_saver
from tests.helpers.jobs.training import train


@contextmanager
def slow_writing(seconds: float) -> Iterator[None]:
    """Every file of a checkpoint is written in `seconds`, evenly: it grows all the while."""
    write_item, write_file, pause = filesystem_async._write_item, checkpoint_writer._write_file, 0.0

    @wraps(write_item)  # Megatron looks at its parameters
    def item(transforms: Any, stream: Any, *args: Any, **options: Any) -> Any:
        written = write_item(transforms, stream, *args, **options)
        stream.flush()
        time.sleep(pause)
        return written

    def file(transforms: Any, bucket: Any) -> Any:
        nonlocal pause
        pause = seconds / sum(len(items) for items in bucket[2])
        return write_file(transforms, bucket)

    with (
        mock.patch.object(filesystem_async, "_write_item", item),
        mock.patch.object(checkpoint_writer, "_write_file", file),
    ):
        yield


def train_while_rank_1_writes_slowly(overrides: list[str], seconds: float) -> tuple[list[str], list[str]]:
    """`train`, in which rank 1 takes `seconds` for its part of each checkpoint; what it was at, and what is logged."""
    places, tell = [], HangWatchdog.report

    def report(self: HangWatchdog, step: int, doing: str) -> None:
        places.append(f"{step} {doing}")
        tell(self, step, doing)

    with (
        captured_log() as log,
        mock.patch.object(HangWatchdog, "report", report),
        slow_writing(seconds if os.environ["RANK"] == "1" else 0.0),
    ):
        train(overrides)
    return places, log


def train_while_rank_1_does_not_write(overrides: list[str], log: Path) -> None:
    """`train`, in which rank 1's part of a checkpoint is never written; rank 0 logs to a file."""
    if os.environ["RANK"] == "0":
        logging.getLogger("megadpo").addHandler(logging.FileHandler(log))
        train(overrides)
    with never_written():
        train(overrides)


@contextmanager
def never_written() -> Iterator[None]:
    """No file of a checkpoint is ever written."""
    with mock.patch.object(checkpoint_writer, "_write_file", _wait_for_ever):
        yield


def _wait_for_ever(*args: Any) -> None:
    threading.Event().wait()


def save_beside_a_slow_removal(root: Path) -> tuple[list[str], list[int], list[str]]:
    """Saves five times while old checkpoints can't be removed until somebody waits for it.

    What is there after the third save; the number of hidden directories whenever a save is begun; what was waited for.
    """
    remove, go_on, waited, begun = shutil.rmtree, threading.Event(), [], []

    def slowly(directory: Path) -> None:
        go_on.wait()
        remove(directory)

    def at(step: int, doing: str) -> None:
        if doing.startswith("waiting for old checkpoints"):
            waited.append(f"{step} {doing}")
            go_on.set()

    check_room = checkpoint_writer.CheckpointWriter._check_room

    def note(self: Any, directory: Path, request: Any) -> None:
        begun.append(len(list(root.glob(".*.removed"))))
        check_room(self, directory, request)

    with (
        mock.patch.object(shutil, "rmtree", slowly),
        mock.patch.object(checkpoint_writer.CheckpointWriter, "_check_room", note),
        tiny_saver(root, asynchronous=False, at=at) as (saver, policy, _),
    ):
        for step in (1, 2, 3):
            begin_save(saver, policy, step)
        names = sorted(path.name for path in root.iterdir())
        for step in (4, 5):
            begin_save(saver, policy, step)
        saver.finish()
        assert not list(root.glob(".*"))
    return names, begun, waited


def end_beside_a_removal_without_end(root: Path) -> list[str]:
    """What is logged where an old checkpoint can't be hidden at first, and is not removed until the run ends."""
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if Path(target).name == ".step_00000001.removed":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(self, target)

    with (
        captured_log() as log,
        mock.patch.object(checkpoint_saver, "_REMOVED_S", 0.3),
        mock.patch.object(shutil, "rmtree", _wait_for_ever),
        tiny_saver(root, asynchronous=False) as (saver, policy, _),
    ):
        with mock.patch.object(Path, "rename", refuse):
            for step in (1, 2, 3):
                begin_save(saver, policy, step)
            assert [step_of(path) for path in list_checkpoints(root)] == [1, 2, 3]
        saver.tidy()
        assert [step_of(path) for path in list_checkpoints(root)] == [2, 3]
        saver.finish()
    return log


def seconds_to_close(root: Path) -> float:
    """Seconds that `close` takes while a write does not end."""
    with never_written(), tiny_saver(root, asynchronous=True) as (saver, policy, _):
        begin_save(saver, policy, 1)
        asked = time.monotonic()
        saver.close()
        assert saver.is_writing
        return time.monotonic() - asked


def collects_garbage_while_writing(root: Path) -> set[bool]:
    """Whether garbage is collected while files of a checkpoint are written."""
    write, found = filesystem_async._write_item, set()

    @wraps(write)
    def item(*args: Any, **options: Any) -> Any:
        found.add(gc.isenabled())
        return write(*args, **options)

    with (
        mock.patch.object(filesystem_async, "_write_item", item),
        tiny_saver(root, asynchronous=False) as (saver, policy, _),
    ):
        begin_save(saver, policy, 1)
    return found


def save_without_memory(root: Path) -> str:
    """What a save is refused with where rank 1 has no memory for its copies."""
    copy: Callable[..., Any] = checkpoint_writer.host_copy

    def refuse(*args: Any) -> Any:
        if os.environ["RANK"] == "1":
            raise MemoryError("CUDA error: out of memory")
        return copy(*args)

    with (
        mock.patch.object(checkpoint_writer, "host_copy", refuse),
        tiny_saver(root, asynchronous=True) as (saver, policy, _),
    ):
        try:
            begin_save(saver, policy, 1)
        except CheckpointError as error:
            return str(error)
        return "saved"
