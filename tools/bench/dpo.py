#!/usr/bin/env python3
"""Measures megadpo's training step against its rivals, in turn, on the same model and the same pairs.

    python tools/bench/dpo.py --pairs FILE [--rivals naive,trl] [--ablations] [--sharing] [--layouts] [--references]

A small Llama with random weights is made for the file's text (--hidden … for other sizes, --model DIR for another one).
Every contender is a process of its own that loads the model, then makes one step whenever it is its turn; the others
sleep meanwhile. Seconds are medians, ratios are medians of ratios over the same step. Nothing else may run on the
machine: how much else did is said and held to.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this clone's package, whatever is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for this file's package, `bench`

from bench import measure, report, tables
from bench.job import DTYPES, Job
from bench.workload import (
    Shape,
    Workload,
    prompt_heavy_pairs,
    read_pairs,
    texts_of,
    write_model,
    write_workload,
)
from megadpo.data.dataset import RawPair
from megadpo.errors import MegaDPOError
from megadpo.models.hf_config import read_architecture
from megadpo.runtime.rank_logging import configure_logging, silence_libraries

REFUSED = 2

console = Console(width=None if sys.stdout.isatty() else 160)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pairs", type=Path, required=True, help="preference data in any layout that megadpo reads")
    add("--first", type=int, default=64, metavar="N", help="measure on the file's first N pairs (%(default)s)")
    add("--rivals", type=_rivals, default=["naive", "trl"], help="naive,trl (the default), one of them, or none")
    add("--ablations", action="store_true", help="also the program with parts of it taken back")
    add("--sharing", action="store_true", help="also prompts shared against prompts twice")
    add("--layouts", action="store_true", help="also two ranks with a thread each against one")
    add("--references", action="store_true", help="also every reference.mode against a resident reference")
    add("--turns", type=int, default=14, help="steps that count (%(default)s)")
    add("--warmup", type=int, default=2, help="steps before (%(default)s)")
    add("--trl-every", type=int, default=3, metavar="K", help="TRL plays each K-th turn only (%(default)s)")
    add("--pairs-per-step", type=int, default=8, help="(%(default)s)")
    add("--max-length", type=int, default=1024, help="tokens of a sequence (%(default)s)")
    add("--lr", type=float, default=1e-5, help="(%(default)s)")
    add("--beta", type=float, default=0.1, help="(%(default)s)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="(%(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    add("--threads", type=int, default=2, help="of each process (%(default)s)")
    add("--one-by-one", action="store_true", help="no turns: for models of which the device holds one at a time")
    add("--model", type=Path, metavar="DIR", help="a Hugging Face directory instead of a random Llama")
    for field in fields(Shape):
        add(f"--{field.name.replace('_', '-')}", type=int, default=field.default, help="of the Llama (%(default)s)")
    add("--out", type=Path, metavar="FILE.json", help="write every figure there")
    add("--plot", type=Path, metavar="FILE.png", help="draw the seconds of every step there")
    add("--check", action="store_true", help="exit status 1 unless all that is held to holds")
    add("overrides", nargs="*", metavar="key=value", help="configuration of megadpo")
    return parser.parse_args(arguments)


def _rivals(text: str) -> list[str]:
    names = [] if text == "none" else text.split(",")
    if unknown := sorted(set(names) - set(measure.RIVALS)):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(measure.RIVALS)}, none")
    return names


class Session:
    """The measurements of one command line, with their results so far."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options = options
        self.scratch = scratch
        self.sections: dict[str, Sequence[report.Result]] = {}
        self.gates: list[report.Gate] = []
        self.foreign_cpu: dict[str, float] = {}
        self.pairs = read_pairs(options.pairs)
        self.model = options.model or self._make_model()
        self.workload = self._workload("pairs", self.pairs[: options.first])
        self.bench = measure.Bench(
            template=_job(options),
            scratch=scratch,
            turns=options.turns,
            warmup=options.warmup,
            one_by_one=options.one_by_one,
        )

    def rivals(self) -> None:
        """Measures megadpo, the rivals and the machine's matrix products."""
        own = measure.Entry(name=report.SELF)
        every = {"naive": 1, "trl": self.options.trl_every}
        rivals = [replace(measure.RIVALS[name], every=every[name]) for name in self.options.rivals]
        lineup = self._run("rivals", [own, *rivals, measure.MATMUL], self.workload)
        console.print(tables.loss_table(lineup.results))
        console.print(tables.rival_table("rivals", lineup.results, lineup[report.SELF]))
        rates = (f"{name} {rate / 1e9:.0f}" for name, rate in lineup.matmul_by_layer.items())
        console.print(f"matmul GFLOP/s in the last turn: {', '.join(rates)}; {'; '.join(lineup.said)}")
        self.gates += report.rival_gates(lineup.results)

    def ablations(self) -> None:
        """Measures the program with parts of it switched off."""
        results = self._run("ablations", measure.ABLATION_LADDER, self.workload).results
        console.print(tables.ladder_table("ablations", results))
        self.gates += report.ablation_gates(results)

    def sharing(self) -> None:
        """Measures shared against repeated prompts, on the pairs and on generated ones with long prompts."""
        options = self.options
        generated = prompt_heavy_pairs(self.pairs, options.first, words=options.max_length // 12)
        by_set = {}
        for name, workload in (
            ("the pairs", self.workload),
            (report.PROMPT_HEAVY, self._workload("generated", generated)),
        ):
            title = f"sharing, {name}"
            by_set[name] = self._run(title, measure.SHARING, workload).results
            console.print(tables.first_table(title, by_set[name]))
        self.gates += report.sharing_gates(by_set)

    def layouts(self) -> None:
        """Measures two ranks with a thread each against one."""
        results = self._run("layouts", measure.LAYOUTS, self.workload).results
        console.print(tables.first_table("layouts", results))
        self.gates += report.layout_gates(results)

    def references(self) -> None:
        """Measures all reference modes against a second model beside the policy."""
        options = self.options
        entries = measure.reference_modes(self.scratch / "reference")
        lineup = self._run("references", entries, self.workload)
        console.print(tables.reference_table("references", lineup.results, lineup["resident"]))
        weights = read_architecture(self.model).num_parameters * DTYPES[options.dtype].itemsize
        peaks = self._peaks(entries) if options.device == "cpu" else {r.name: r.peak_bytes for r in lineup.results}
        shown = ", ".join(f"{name} {peak / 2**20:.1f}" for name, peak in peaks.items())
        console.print(f"peak of tensors in MiB: {shown}; the reference's weights: {weights / 2**20:.1f}")
        self.gates += report.reference_gates(lineup.results, peaks, weights)

    def _peaks(self, entries: Sequence[measure.Entry]) -> dict[str, int]:
        """Peak bytes of live tensors in two steps; a process's memory is larger by an amount that varies."""
        template = replace(self.bench.template, count_tensors=True)
        bench = replace(self.bench, template=template, turns=2, warmup=0)
        lineup = bench.run("references, tensors", [replace(entry, rehearsed=False) for entry in entries], self.workload)
        return {result.name: result.peak_bytes for result in lineup.results}

    def conditions(self) -> dict[str, Any]:
        """The conditions that the figures depend on."""
        return {
            "command": {name: str(value) for name, value in vars(self.options).items()},
            "machine": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pairs": len(self.workload.lengths),
            "truncated_pairs": self.workload.truncated,
            "lengths": self.workload.lengths,
            "foreign_cpu": self.foreign_cpu,
        }

    def _run(self, title: str, entries: Sequence[measure.Entry], workload: Workload) -> measure.Lineup:
        lineup = self.bench.run(title, entries, workload)
        self.sections[title] = lineup.results
        self.foreign_cpu[title] = lineup.foreign_cpu
        console.print(f"{title}: other programs took {lineup.foreign_cpu:.0%} of the CPUs' time")
        return lineup

    def _make_model(self) -> Path:
        shape = Shape(**{field.name: getattr(self.options, field.name) for field in fields(Shape)})
        write_model(self.scratch / "model", shape, texts_of(self.pairs))
        console.print(f"random Llama: {asdict(shape)}")
        return self.scratch / "model"

    def _workload(self, name: str, pairs: Sequence[RawPair]) -> Workload:
        options = self.options
        workload = write_workload(
            self.scratch / name,
            self.model,
            pairs,
            pairs_per_step=options.pairs_per_step,
            max_length=options.max_length,
        )
        console.print(
            f"{name}: {workload.read} read, {workload.kept} kept at {options.max_length} tokens, "
            f"{len(workload.lengths)} in whole steps of {workload.pairs_per_step}, {workload.truncated} truncated"
        )
        return workload


def _job(options: argparse.Namespace) -> Job:
    """The job of a contender, as far as it is the same for all."""
    return Job(
        model="",
        pairs="",
        tokens="",
        out="",
        pairs_per_step=options.pairs_per_step,
        max_length=options.max_length,
        lr=options.lr,
        beta=options.beta,
        dtype=options.dtype,
        device=options.device,
        threads=options.threads,
        overrides=tuple(options.overrides),
    )


def main(arguments: Sequence[str]) -> int:
    """Runs the measurements of the command line; returns the exit status."""
    options = parse(arguments)
    configure_logging()
    silence_libraries()
    with tempfile.TemporaryDirectory() as directory:
        try:
            session = Session(options, Path(directory))
            session.rivals()
            for wanted, section in (
                (options.ablations, session.ablations),
                (options.sharing, session.sharing),
                (options.layouts, session.layouts),
                (options.references, session.references),
            ):
                if wanted:
                    section()
        except MegaDPOError as error:
            console.print(str(error), markup=False)
            return REFUSED
    if options.device == "cpu":
        session.gates.append(report.quiet_gate(session.foreign_cpu))
    console.print(tables.gate_table(session.gates))
    if options.out:
        tables.write_json(options.out, session.conditions(), session.sections, session.gates)
    if options.plot:
        tables.draw(options.plot, session.sections)
    return int(options.check and not all(gate.holds for gate in session.gates))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
