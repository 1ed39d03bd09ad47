"""Runs that go on while something fails on one rank only: a file that can't be read, a death in a load."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any
from unittest import mock

from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

import megadpo.checkpoint.manifest
from megadpo.checkpoint.manifest import FileDigest, digest_of
from megadpo.errors import MegaDPOError
from tests.helpers.jobs.fault import captured_log
from tests.helpers.jobs.training import train


def train_unable_to_read(overrides: list[str], rank: int, name: str) -> tuple[str, list[str]]:
    """What `train` is refused with, and what is logged, where one rank can't read files of this name."""

    def read(path: Path, **options: Any) -> FileDigest:
        if path.name == name and int(os.environ["RANK"]) == rank:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return digest_of(path, **options)

    with captured_log() as lines, mock.patch.object(megadpo.checkpoint.manifest, "digest_of", read):
        return _refusal(overrides), lines


def train_and_hear(overrides: list[str]) -> tuple[str, list[str]]:
    """What `train` is refused with, "" where it is not, and what is logged."""
    with captured_log() as lines:
        return _refusal(overrides), lines


def _refusal(overrides: list[str]) -> str:
    try:
        train(overrides)
    except MegaDPOError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def train_and_die_loading(overrides: list[str], rank: int) -> str:
    """`train`, on whose rank `rank` the first load of a checkpoint's tensors is the end."""
    load = TorchDistLoadShardedStrategy.load

    def dying(*args: Any, **options: Any) -> Any:
        if int(os.environ["RANK"]) == rank:
            os._exit(1)
        return load(*args, **options)

    with mock.patch.object(TorchDistLoadShardedStrategy, "load", dying):
        return train(overrides)
