#!/usr/bin/env python3
"""Measures what it takes to see that ranks hold the same weights, beside a training step.

    python tools/bench/rank_check.py [--layers 12] [--hidden 768] [--vocab 32000] [--turns 5] [--every 100] [--check]

A rank trains a Llama of random weights (162 million parameters by default) in fp32 on two pairs of up to 64 tokens a
step, next to nothing: with more of them a step takes longer, the comparison does not. Hashing its weights and a step
take turns. What several ranks add is an all-gather of six numbers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this clone's package, whatever is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for this file's package, `bench`

from bench.peak_child import PeakCase, Training, case_of_sizes, seconds_of
from megadpo.health.replicas import bits_hashes, check_finite
from megadpo.runtime.device import megatron_device, select_device
from megadpo.runtime.parallel_state import build_parallel_state, distributed
from megadpo.runtime.rank_logging import configure_logging, silence_libraries

_TIMEOUT_S = 600.0
# Bound on the share of a run's time that comparisons take.
_BOUND = 0.01


def main(arguments: Sequence[str]) -> int:
    """Runs the measurement of the command line; returns 1 if `--check` finds the bound exceeded."""
    options = _parse(arguments)
    configure_logging()
    silence_libraries()
    case = case_of_sizes("rank_check", hidden=options.hidden, layers=options.layers, vocab=options.vocab)
    steps, compared, looked_at = _measure(case, options.turns)
    share = median(compared) / options.every / median(steps)
    table = Table("", "", title=f"{case.arch.num_parameters / 1e6:.0f} million parameters, fp32")
    table.add_row("a step", f"{median(steps):.2f} s")
    table.add_row("comparing all weights", f"{median(compared):.3f} s")
    table.add_row("seeing that they are finite, before a save", f"{median(looked_at):.3f} s")
    table.add_row(f"comparing every {options.every} steps, of a run's time", f"{share:.3%}")
    Console().print(table)
    return int(options.check and share > _BOUND)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 12), ("hidden", 768), ("vocab", 32_000), ("turns", 5), ("every", 100)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    parser.add_argument("--check", action="store_true", help="exit status 1 unless the bound holds")
    return parser.parse_args(arguments)


def _measure(case: PeakCase, turns: int) -> tuple[list[float], list[float], list[float]]:
    """Measures the seconds of steps, comparisons and finiteness checks; the first turn is left out."""
    device = select_device("cpu")
    with megatron_device(device), distributed(device, timeout_s=_TIMEOUT_S):
        state = build_parallel_state(tensor=1, pipeline=1, virtual_pipeline=None, seed=0, timeout_s=_TIMEOUT_S)
        training = Training(case, state, device)
        modules = [chunk.module for chunk in training.chunks]
        actions = (
            training.step,
            partial(bits_hashes, list(modules[0].parameters())),
            partial(check_finite, modules, step=0),
        )
        rows = [[seconds_of(action) for action in actions] for _ in range(turns + 1)][1:]
        steps, compared, looked_at = (list(column) for column in zip(*rows, strict=True))
        return steps, compared, looked_at


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
