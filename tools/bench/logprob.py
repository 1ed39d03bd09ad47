#!/usr/bin/env python3
"""Measures ways from hidden states to response log-probs: time, and memory beside inputs and results.

    python tools/bench/logprob.py [--tokens 4096] [--vocab 128256] [--hidden 512] [--prompt-share 0.5] [--dtype fp32]

All variants take turns in one process against the clock, forward and backward, then without gradient. Memory is the
kernel's peak of the resident set, one process a variant, less what the inputs and the results take. The default needs
7 GiB, for log_softmax.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import IO, Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this clone's package, whatever is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for this file's package, `bench`

from bench import tables
from bench.head_child import NAIVE, SELF, VARIANTS, HeadJob
from bench.proc import high_water_bytes, resident_bytes
from bench.report import Gate
from megadpo.errors import MegaDPOError
from megadpo.runtime.progress import ProgressBar

_TOOLS = Path(__file__).resolve().parents[1]
_MIB = 2**20
_SHORT_AND_LONG = (1024, 8192)

console = Console(width=None if sys.stdout.isatty() else 160)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a variant takes beside inputs and results, and beside inputs, selected rows and their gradient.

    The second is for the fused head, whose only large result is in a buffer that existed before: at its peak, the
    gradient of the whole stream does not exist yet.
    """

    beside_results: int
    beside_rows: int


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of every turn by variant: CPU time and wall time."""

    cpu: Mapping[str, Sequence[float]]
    wall: Mapping[str, Sequence[float]]

    def cpu_ratio(self, variant: str) -> float:
        """Median over the turns of a variant's CPU time relative to log_softmax's in the same turn."""
        return median(a / b for a, b in zip(self.cpu[variant], self.cpu[NAIVE], strict=True))


@contextmanager
def child(job: HeadJob, *, threads: int) -> Iterator[subprocess.Popen[str]]:
    """Starts the process that does the job; it ends with the context."""
    path = os.pathsep.join([str(_TOOLS), str(_TOOLS.parent)])
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "bench.head_child", job.to_json()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**environment, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)},
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def _answer(process: subprocess.Popen[str]) -> Any:
    line = _pipe(process.stdout).readline()
    if not line:
        raise MegaDPOError("the measured process ended by itself; what it said stands above")
    return json.loads(line)


def _go_on(process: subprocess.Popen[str]) -> None:
    _pipe(process.stdin).write("\n")
    _pipe(process.stdin).flush()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def measure_memory(job: HeadJob, *, threads: int) -> list[Memory]:
    """Measures the memory of each run of a job's variant, in one process."""
    measured = []
    with child(job, threads=threads) as process:
        for tokens, _ in job.runs:
            told = _answer(process)
            inputs, before = resident_bytes(process.pid), high_water_bytes(process.pid)
            _go_on(process)
            _answer(process)
            peak = high_water_bytes(process.pid)
            if peak == before:
                raise MegaDPOError(
                    f"{job.variants[0]} on {tokens} tokens: takes less than what came before; ask for more"
                )
            _go_on(process)
            measured.append(Memory(peak - inputs - told["result_bytes"], peak - inputs - told["row_bytes"]))
    return measured


def measure_time(job: HeadJob, *, threads: int) -> tuple[Times, dict[str, float]]:
    """Measures the times of the job's run, and the fused head's differences to log_softmax ({} if forward only)."""
    title = "forward and backward" if job.runs[0][1] else "without gradient"
    turns = []
    with child(job, threads=threads) as process, ProgressBar(title, total=job.turns, visible=True) as bar:
        for turn in range(job.turns):
            turns.append(_answer(process)["seconds"])
            bar.update(turn + 1, "turns")
        distances = _answer(process)
    cpu, wall = ({name: [turn[name][clock] for turn in turns] for name in job.variants} for clock in (0, 1))
    return Times(cpu, wall), distances


def time_table(title: str, times: Times, memory: Mapping[str, Memory]) -> Table:
    """Table with a row per variant."""
    table = Table(title=title, title_justify="left")
    for name in ("", "CPU s", "s", "CPU time / log_softmax", "MiB beside inputs and results", "log_softmax's / this"):
        table.add_column(name, justify="right" if name else "left")
    for name in times.cpu:
        table.add_row(
            name,
            f"{median(times.cpu[name]):.2f}",
            f"{median(times.wall[name]):.2f}",
            f"{times.cpu_ratio(name):.2f}",
            f"{memory[name].beside_results / _MIB:.0f}",
            f"{memory[NAIVE].beside_results / memory[name].beside_results:.1f}",
        )
    return table


def gates(
    job: HeadJob,
    trained: Times,
    scored: Times,
    memory: Mapping[str, Memory],
    by_length: Sequence[Memory],
    distances: Mapping[str, float],
) -> list[Gate]:
    """The bounds that the fused head on response rows must meet."""
    short, long = (length.beside_rows for length in by_length)
    gradient_bound = 1e-6 if job.dtype == "fp32" else 5e-3
    return [
        Gate("CPU time over log_softmax's", trained.cpu_ratio(SELF), 0.65, at_most=True),
        Gate("CPU time over log_softmax's, without gradient", scored.cpu_ratio(SELF), 1.1, at_most=True),
        Gate(
            "memory over log_softmax's",
            memory[SELF].beside_results / memory[NAIVE].beside_results,
            1 / 30,
            at_most=True,
        ),
        Gate("memory over a chunk's fp32 logits", memory[SELF].beside_rows / job.chunk_bytes, 2.5, at_most=True),
        Gate("memory over model.logits_mib", memory[SELF].beside_rows / (job.logits_mib * _MIB), 1.05, at_most=True),
        Gate(f"memory at {' and '.join(map(str, _SHORT_AND_LONG))} tokens apart", abs(long / short - 1), 0.05, True),
        Gate("log-probs apart from log_softmax's", distances["logps"], 1e-5, at_most=True),
        Gate("hidden gradient apart", distances["grad_hidden"], gradient_bound, at_most=True),
        Gate("weight gradient apart", distances["grad_weight"], gradient_bound, at_most=True),
    ]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tokens", type=int, default=4096, help="rows of the stream (%(default)s)")
    add("--vocab", type=int, default=128256, help="rows of the head (%(default)s)")
    add("--hidden", type=int, default=512, help="hidden size (%(default)s)")
    add("--prompt-share", type=float, default=0.5, help="share of the rows that are prompt (%(default)s)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32")
    add("--logits-mib", type=int, default=128, help="model.logits_mib (%(default)s)")
    add("--turns", type=int, default=5, help="of each variant against the clock (%(default)s)")
    add("--threads", type=int, default=1, help="of the measured process (%(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Runs the measurements of the command line; returns 1 if a gate fails."""
    options = parse(arguments)
    job = HeadJob(
        runs=((options.tokens, True),),
        vocab=options.vocab,
        hidden=options.hidden,
        prompt_share=options.prompt_share,
        dtype=options.dtype,
        logits_mib=options.logits_mib,
        variants=tuple(VARIANTS),
        turns=options.turns,
    )
    measured: dict[bool, tuple[Times, dict[str, float], dict[str, Memory]]] = {}
    for backward in (True, False):
        timed = replace(job, runs=((options.tokens, backward),))
        memory = {}
        for name in VARIANTS:
            (memory[name],) = measure_memory(replace(timed, variants=(name,), turns=0), threads=options.threads)
        measured[backward] = (*measure_time(timed, threads=options.threads), memory)
    lengths = [replace(job, runs=((length, True),), variants=(SELF,), turns=0) for length in _SHORT_AND_LONG]
    by_length = [measure_memory(length, threads=options.threads)[0] for length in lengths]
    shape = f"{options.tokens} rows, vocabulary {options.vocab}, hidden {options.hidden}, {options.dtype}"
    for backward, title in ((True, "forward and backward"), (False, "without gradient")):
        times, _, memory = measured[backward]
        console.print(time_table(f"{title}: {shape}, {options.prompt_share:.0%} of the rows prompt", times, memory))
    trained, distances, memory = measured[True]
    held = gates(job, trained, measured[False][0], memory, by_length, distances)
    console.print(tables.gate_table(held))
    return int(not all(gate.holds for gate in held))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
