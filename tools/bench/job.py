"""A contender's job, and its end of the pipe: for each line read it does one step, and writes one line of JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import torch

from megadpo.runtime.device import Device, select_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The data and settings of a contender; `tokens` holds the same pairs as `pairs`, tokenized and truncated."""

    model: str
    """a Hugging Face directory"""
    pairs: str
    """JSON Lines, one preference a line"""
    tokens: str
    """JSON: a list of [prompt ids, chosen ids, rejected ids]"""
    out: str
    """a directory for this contender alone; not there yet"""
    pairs_per_step: int
    max_length: int
    lr: float
    beta: float
    dtype: str
    """fp32 | bf16"""
    device: str
    """cpu | cuda"""
    threads: int
    """of one process"""
    ablation: str | None = None
    """name of a row of `ablations.ABLATIONS`, for megadpo; None: the program as it is"""
    overrides: tuple[str, ...] = ()
    """key=value words for megadpo"""
    count_tensors: bool = False
    """count live tensors for megadpo's peak memory, which takes time"""

    def to_json(self) -> str:
        """Serializes the job as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Parses the output of `to_json`."""
        values = json.loads(text)
        return cls(**{**values, "overrides": tuple(values["overrides"])})


class Finished(Exception):
    """Raised when the parent has closed the pipe, since no more steps are needed."""


class Link:
    """A contender's end of the pipe: stdin for the parent's requests, the former stdout for the answers."""

    def __init__(self) -> None:
        # Output of libraries must not get between the answers.
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def answer(self, **values: Any) -> None:
        """Sends one object."""
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()

    def wait(self) -> None:
        """Sleeps until the parent requests a step. Raises Finished when it has closed the pipe."""
        if not sys.stdin.readline():
            raise Finished


def play(run: Callable[[Job, Link], None]) -> None:
    """Runs a contender's program on the job of its command line, until the parent requests no more steps."""
    job, link = Job.from_json(sys.argv[1]), Link()
    try:
        run(job, link)
    except Finished:
        leave()


def play_on_device(run: Callable[[Job, Link, Device], None]) -> None:
    """Like `play`, for programs that do not set the device and the threads themselves."""

    def start(job: Job, link: Link) -> None:
        device = select_device(job.device)
        torch.set_num_threads(job.threads)
        run(job, link, device)

    play(start)


def leave() -> NoReturn:
    """Ends the process at once, in the middle of a run, with worker threads and peers still waiting."""
    sys.stderr.flush()
    os._exit(0)
