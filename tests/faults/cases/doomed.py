"""A training that is killed at a moment of its own choice: from within, by SIGKILL, on one rank.

As a program it is tools/train.py, whose first start under torchrun is doomed by the environment: DOOMED_RANK and DOOM.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch

import megadpo.train.trainer
from megadpo.train.train_step import StepResult, train_step
from tests.helpers.jobs.training import train


def train_and_die(overrides: list[str], doom: str, rank: int = 0) -> str:
    """`train`, on whose rank `rank` something is the end; the run directory, where it does not come to that.

    `doom` is `backward STEP`: when half of the gradients of that step are there; or `EVENT NAME`: before the change of
    a file or a name, as Python tells its audit hooks, where NAME is the end of its path.
    """
    with doomed(doom if os.environ["RANK"] == str(rank) else ""):
        return train(overrides)


def doomed(doom: str) -> AbstractContextManager[Any]:
    """The end of this process, as `train_and_die` describes it, while the context is open; "" for none."""
    event, _, name = doom.partition(" ")
    if not doom:
        return nullcontext()
    if event == "backward":
        return mock.patch.object(megadpo.train.trainer, "train_step", _dying_step(int(name)))
    _die_before(event, name)
    return nullcontext()


def _dying_step(last: int) -> Callable[..., StepResult]:
    steps = 0

    def update(chunks: Any, *args: Any, **options: Any) -> StepResult:
        nonlocal steps
        steps += 1
        if steps == last:
            parameters = list(chunks[0].parameters())
            parameters[len(parameters) // 2].register_hook(lambda gradient: _die())
        return train_step(chunks, *args, **options)

    return update


def _die_before(event: str, name: str) -> None:
    def hear(heard: str, arguments: tuple[Any, ...]) -> None:
        if heard != event or not str(arguments[0]).endswith(name):
            return
        if event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR):
            _die()

    sys.addaudithook(hear)


def _die() -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


if __name__ == "__main__":
    from tools.train import main

    is_doomed = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == os.environ["DOOMED_RANK"]
    with doomed(os.environ["DOOM"] if is_doomed else ""):
        raise SystemExit(main(sys.argv[1:]))
