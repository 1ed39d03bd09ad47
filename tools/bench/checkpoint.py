#!/usr/bin/env python3
"""Measures how long a save stalls the training: asynchronous, and waited for.

    python tools/bench/checkpoint.py [--layers 12] [--hidden 768] [--vocab 32000] [--saves 4] [--check]

A rank trains a Llama of random weights (162 million parameters by default) in fp32 and saves after each step, the two
kinds in turn, on the same disk. "Stall" is the time until training may go on; for a save that is written beside it,
the steps until it is complete are timed too, beside steps without one. The first save of each kind is left out: it
makes the memory that later ones use again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this clone's package, whatever is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for this file's package, `bench`

from bench.peak_child import PeakCase, Training, case_of_sizes, seconds_of
from megadpo.checkpoint.description import Progress, RunIdentity
from megadpo.checkpoint.directory import Retention
from megadpo.checkpoint.saver import CheckpointSaver
from megadpo.health.watchdog import HangWatchdog
from megadpo.runtime.device import megatron_device, select_device
from megadpo.runtime.parallel_state import build_parallel_state, distributed
from megadpo.runtime.rank_logging import configure_logging, silence_libraries
from megadpo.train.trainer import startup_objects_frozen

_TIMEOUT_S = 600.0
# Bound on the stall by an asynchronous save, as a share of the stall by one that is waited for.
_BOUND = 0.1


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds: of saves that are waited for, of stalls by asynchronous ones, of steps during these and without."""

    waited: list[float] = field(default_factory=list)
    stalls: list[float] = field(default_factory=list)
    steps_beside: list[float] = field(default_factory=list)
    steps_alone: list[float] = field(default_factory=list)


def main(arguments: Sequence[str]) -> int:
    """Runs the measurement of the command line; returns 1 if `--check` finds the bound exceeded."""
    options = _parse(arguments)
    configure_logging()
    silence_libraries()
    case = case_of_sizes("checkpoint", hidden=options.hidden, layers=options.layers, vocab=options.vocab)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        costs = _measure(case, Path(scratch), options.saves)
    share = median(costs.stalls) / median(costs.waited)
    table = Table(
        "", "s (median)", title=f"{case.arch.num_parameters / 1e6:.0f} million parameters, fp32, with moments"
    )
    table.add_row("a save that is waited for", f"{median(costs.waited):.2f}")
    table.add_row("stall of one written beside the training", f"{median(costs.stalls):.3f}")
    table.add_row("that over the first", f"{share:.1%}")
    table.add_row("a step", f"{median(costs.steps_alone):.2f}")
    table.add_row("a step while one is written", f"{median(costs.steps_beside):.2f}" if costs.steps_beside else "-")
    Console().print(table)
    return int(options.check and share > _BOUND)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 12), ("hidden", 768), ("vocab", 32_000), ("saves", 4)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where checkpoints are written for the while")
    parser.add_argument("--check", action="store_true", help="exit status 1 unless the bound holds")
    return parser.parse_args(arguments)


def _measure(case: PeakCase, scratch: Path, saves: int) -> Costs:
    device = select_device("cpu")
    with megatron_device(device), distributed(device, timeout_s=_TIMEOUT_S):
        state = build_parallel_state(tensor=1, pipeline=1, virtual_pipeline=None, seed=0, timeout_s=_TIMEOUT_S)
        training = Training(case, state, device)
        savers = {
            kind: CheckpointSaver(
                scratch / kind,
                training.chunks,
                training.optimizer,
                identity=RunIdentity(0, "", 0, "", {}, {}),
                side_files={"config.json": b"{}"},
                dtype=torch.float32,
                retention=Retention(last=1),
                asynchronous=kind == "beside",
                resumed_from=None,
                watchdog=HangWatchdog(None, rank=0, world=1, patience_s=_TIMEOUT_S),
            )
            for kind in ("waited", "beside")
        }
        costs = Costs()
        with startup_objects_frozen():  # as in a run
            _take_turns(training, savers, saves, costs)
        return costs


def _take_turns(training: Training, savers: Mapping[str, CheckpointSaver], saves: int, costs: Costs) -> None:
    for turn in range(saves + 1):
        alone, waited = seconds_of(training.step), _save(savers["waited"], turn)
        stall, beside = _save(savers["beside"], turn), []
        while savers["beside"].is_busy:
            beside.append(seconds_of(training.step))
            if not savers["beside"].is_writing:
                savers["beside"].complete()
        if turn:
            costs.waited.append(waited)
            costs.stalls.append(stall)
            costs.steps_beside.extend(beside)
            costs.steps_alone.append(alone)


def _save(saver: CheckpointSaver, turn: int) -> float:
    return seconds_of(lambda: saver.save(Progress(step=turn)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
