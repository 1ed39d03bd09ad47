"""Trainings in a place that makes trouble: a disk that is full or slow, a clock that goes back, a step without end."""

from __future__ import annotations

import errno
import os
import shutil
import time
from contextlib import ExitStack
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from unittest import mock

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

import megadpo.checkpoint.writer
import megadpo.setup.run_directory
import megadpo.train.trainer
from megadpo.errors import MegaDPOError
from megadpo.train.train_step import StepResult, train_step
from tests.helpers.jobs.training import train
from tests.helpers.no_room import largest_file

_DAY_S = 86_400.0


class Usage(NamedTuple):
    """What shutil.disk_usage tells."""

    total: int
    used: int
    free: int


def train_with_room(overrides: list[str], free: int | None = None, largest: int | None = None) -> str:
    """`train` on a disk that says it has `free` bytes left, on which no file can grow beyond `largest` bytes.

    The second is so from the first update on.
    """

    usage = Usage(2**40, 0, 2**40 if free is None else free)
    with (
        ExitStack() as full,
        mock.patch.object(shutil, "disk_usage", return_value=usage),
        mock.patch.object(megadpo.train.trainer, "train_step") as update,
    ):

        def fill_up(*args: Any, **options: Any) -> StepResult:
            if largest is not None:
                full.enter_context(largest_file(largest))
            return train_step(*args, **options)

        update.side_effect = fill_up
        return train(overrides)


def train_on_a_slow_disk(overrides: list[str], seconds: float) -> str:
    """`train`, where every file of a checkpoint takes `seconds` longer to write than an update."""
    write = megadpo.checkpoint.writer._write_file

    def slowly(*args: Any) -> Any:
        time.sleep(seconds)
        return write(*args)

    with mock.patch.object(megadpo.checkpoint.writer, "_write_file", slowly):
        return train(overrides)


def train_without_end(overrides: list[str]) -> str:
    """`train`, whose second update never ends."""
    steps = 0

    def update(*args: Any, **options: Any) -> StepResult:
        nonlocal steps
        steps += 1
        if steps == 2:
            time.sleep(600)
        return train_step(*args, **options)

    with mock.patch.object(megadpo.train.trainer, "train_step", update):
        return train(overrides)


def train_while_the_clock_goes_back(overrides: list[str]) -> str:
    """`train`, begun at a clock that is a day behind, and which goes back by another one in each update."""
    now, back = time.time, _DAY_S

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) - timedelta(seconds=back)

    def update(*args: Any, **options: Any) -> StepResult:
        nonlocal back
        back += _DAY_S
        return train_step(*args, **options)

    with (
        mock.patch.object(time, "time", side_effect=lambda: now() - back),
        mock.patch.object(time, "time_ns", side_effect=lambda: int(1e9 * (now() - back))),
        mock.patch.object(megadpo.setup.run_directory, "datetime", Clock),
        mock.patch.object(megadpo.train.trainer, "train_step", update),
    ):
        return train(overrides)


ALONE = {
    "common.pt": (TorchCommonSaveStrategy, "save_common"),
    ".metadata": (FileSystemWriterAsync, "finish"),
    "metadata.json": (serialization, "save_config"),
}


def train_on_a_disk_that_rank_0_finds_full(overrides: list[str], file: str) -> str:
    """What `train` says where a file of ALONE, which rank 0 writes between collectives, can't be written."""
    owner, name = ALONE[file]

    def full(*args: Any, **options: Any) -> None:
        if os.environ["RANK"] == "0":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with mock.patch.object(owner, name, full):
        try:
            return train(overrides)
        except MegaDPOError as error:
            return str(error)
