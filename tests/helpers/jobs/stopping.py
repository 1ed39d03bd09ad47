"""Runs that are told to stop, or break off, at a place of one's choice, again and again in one launch; slow ranks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch.distributed as dist
from megatron.core import parallel_state

import megadpo.train.train_step
from megadpo.checkpoint.saver import CheckpointSaver
from megadpo.errors import Stopped
from megadpo.forward_step import run_schedule
from megadpo.reference import ResidentReference
from megadpo.train.trainer import Trainer
from tests.helpers.jobs.fault import MeetingPlaces, captured_log
from tests.helpers.jobs.training import train

# What a run does when it is told.
PLACES = {
    "reference pass": (ResidentReference, "log_probs"),
    "save": (CheckpointSaver, "save"),
    "evaluation": (Trainer, "evaluate_all"),
}


@dataclass(frozen=True)
class Told:
    """`ranks` get a signal when they come to a place for the `time`th time; without a number they raise BrokenOff."""

    place: str
    time: int
    ranks: tuple[int, ...]
    number: signal.Signals | None


class BrokenOff(Exception):
    """What no run expects: like a kill it leaves what is on disk by then."""


def train_and_stop(overrides: list[str], told: list[Told]) -> list[str]:
    """`train`, once for each entry and then to its end; what each start ended with."""
    places, ends = MeetingPlaces(), []
    for index, one in enumerate([*told, None]):
        places.move(f"start {index}")
        try:
            with mock.MagicMock() if one is None else _signalled(one):
                ends.append(train(overrides))
        except (Stopped, BrokenOff) as end:
            ends.append(str(end))
        finally:
            parallel_state.destroy_model_parallel()
            if dist.is_initialized():
                dist.destroy_process_group()
    return ends


def _signalled(told: Told) -> Any:
    owner, name = PLACES[told.place]
    original: Callable[..., Any] = vars(owner)[name]
    count = 0

    def call(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == told.time and int(os.environ["RANK"]) in told.ranks:
            if told.number is None:
                raise BrokenOff(f"broken off in {told.place} {told.time}")
            os.kill(os.getpid(), told.number)
            time.sleep(0.2)  # a thread hears the signal, before the next update on any machine
        return original(*args, **options)

    return mock.patch.object(owner, name, call)


def train_beside_a_slow_rank(overrides: list[str], rank: int, seconds: float) -> list[str]:
    """`train`, in which one rank takes so much longer for every step; what is logged."""

    def slow(*args: Any, **options: Any) -> Any:
        if int(os.environ["RANK"]) == rank:
            time.sleep(seconds)
        return run_schedule(*args, **options)

    with captured_log() as lines, mock.patch.object(megadpo.train.train_step, "run_schedule", slow):
        train(overrides)
    return lines
