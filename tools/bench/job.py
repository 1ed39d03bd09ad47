"""What a contender is told, and its end of the pipe: one line in, one step done, one line of JSON out."""

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
    """What every contender trains on, and how; `tokens` holds the same pairs as `pairs`, tokenized and truncated."""

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
    """whether megadpo's peak memory is that of living tensors, counted as they are made, which takes time"""

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job that `to_json` wrote."""
        values = json.loads(text)
        return cls(**{**values, "overrides": tuple(values["overrides"])})


class Finished(Exception):
    """The parent has closed the pipe: no more steps are wanted."""


class Link:
    """A contender's end of the pipe: stdin for the parent's words, what was stdout for the answers."""

    def __init__(self) -> None:
        # Libraries print; what they print must not get between the answers.
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def answer(self, **values: Any) -> None:
        """Sends one object."""
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()

    def wait(self) -> None:
        """Sleeps until the parent asks for a step. Raises Finished when it wants no more."""
        if not sys.stdin.readline():
            raise Finished


def play(run: Callable[[Job, Link], None]) -> None:
    """Runs a contender's program on the job of its command line, until the parent wants no more steps."""
    job, link = Job.from_json(sys.argv[1]), Link()
    try:
        run(job, link)
    except Finished:
        leave()


def play_on_device(run: Callable[[Job, Link, Device], None]) -> None:
    """`play` for programs that choose neither device nor threads themselves."""

    def start(job: Job, link: Link) -> None:
        device = select_device(job.device)
        torch.set_num_threads(job.threads)
        run(job, link, device)

    play(start)


def leave() -> NoReturn:
    """Ends the process as it stands: half-way through a run, with worker threads and peers still waiting."""
    sys.stderr.flush()
    os._exit(0)
