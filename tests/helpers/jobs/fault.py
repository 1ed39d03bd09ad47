"""What the ranks do with a table of inputs: one start after the other, each refusal recorded and cleaned up behind."""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megadpo.commands.command_line import check
from megadpo.commands.convert import export_checkpoint
from megadpo.commands.train import run_training
from megadpo.config.compose import compose_config
from megadpo.errors import MegaDPOError
from megadpo.models.conversion.safetensors_io import SafetensorsReader


@dataclass(frozen=True)
class Start:
    """One command line: its words, in which `RANK` stands for the rank."""

    name: str
    words: list[str]
    run_dir: Path


@dataclass(frozen=True)
class Outcome:
    """How a start ended on one rank."""

    refused: bool
    """by a MegaDPOError"""
    text: str
    """the error's message, with the traceback where it is none of ours; empty where the run went to its end"""
    weight_reads: int
    written: set[str]
    """names that were not in the run directory before"""
    log: str


class MeetingPlaces:
    """Servers at which the ranks of a launch meet, a new one for each process group, as under torchrun.

    At one place for all, a rank that is ahead would still find the server of the group before.
    """

    def __init__(self) -> None:
        self._is_main = os.environ["RANK"] == "0"
        port = int(os.environ["MASTER_PORT"])
        self._desk = dist.TCPStore("localhost", port, is_master=self._is_main, wait_for_workers=False)
        self._servers: list[dist.TCPStore] = []
        # The server runs already: waiting for one costs half a second.
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"

    def move(self, name: str) -> None:
        """Has the next process group meet at a new place, which all ranks know by this name."""
        if self._is_main:
            self._servers.append(dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False))
            self._desk.set(name, str(self._servers[-1].port))
        os.environ["MASTER_PORT"] = self._desk.get(name).decode()


def start_each(starts: Sequence[Start], places: MeetingPlaces | None = None) -> dict[str, Outcome]:
    """Runs every start through the front door, in this order; the outcomes by name."""
    places = places or MeetingPlaces()
    outcomes = {}
    for start in starts:
        places.move(start.name)
        outcomes[start.name] = _start(start)
    return outcomes


def export_each(checkpoints: Mapping[str, Path], out: Path, places: MeetingPlaces) -> dict[str, Outcome]:
    """Has the conversion tool write every checkpoint to a directory under `out`; the outcomes as `export: NAME`."""
    outcomes = {}
    for name, checkpoint in checkpoints.items():
        places.move(f"export: {name}")

        def export(checkpoint: Path = checkpoint, name: str = name) -> None:
            export_checkpoint(checkpoint, out / name.replace(" ", "_"), dtype=None, device_kind="cpu")

        outcomes[f"export: {name}"] = _outcome(export, out)
    return outcomes


def _start(start: Start) -> Outcome:
    words = [word.replace("RANK", os.environ["RANK"]) for word in start.words]
    return _outcome(lambda: run_training(compose_config(words, check=check)), start.run_dir)


def _outcome(action: Callable[[], object], directory: Path) -> Outcome:
    """How an action ended that makes its own process group and writes into `directory`."""
    refused, text, before = False, "", _names(directory)
    with _counted_reads() as reads, captured_log() as log:
        try:
            action()
        except MegaDPOError as error:
            refused, text = True, str(error)
        except BaseException:
            text = traceback.format_exc()
        finally:
            parallel_state.destroy_model_parallel()
            if dist.is_initialized():
                dist.destroy_process_group()
    return Outcome(refused, text, len(reads), _names(directory) - before, "\n".join(log))


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} if directory.is_dir() else set()


@contextmanager
def _counted_reads() -> Iterator[list[str]]:
    """Names of the tensors whose values are read while the context is open."""
    reads: list[str] = []
    original = SafetensorsReader.read

    def read(self: SafetensorsReader, name: str, *rest: Any) -> torch.Tensor:
        reads.append(name)
        return original(self, name, *rest)

    with mock.patch.object(SafetensorsReader, "read", read):
        yield reads


@contextmanager
def captured_log() -> Iterator[list[str]]:
    """What is logged while the context is open."""
    lines: list[str] = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, recorder = logging.getLogger("megadpo"), Recorder()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(recorder)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield lines
    finally:
        logger.removeHandler(recorder)
        logger.setLevel(level)
        logger.propagate = propagate
