#!/usr/bin/env python3
"""Holds the planner to what launches take: python tools/bench/planner.py [--dtype bf16]

A Llama of 125 million parameters trains for two steps on CPU in several layouts. In every rank the bytes of living
tensors are counted; their peak must be within 15 % of the planned one in every stage. The peak of the resident set,
less what it was before the model, stands beside it: it has all that a process needs. Takes minutes, and
5 GiB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this clone's package, whatever is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for this file's package, `bench`

from bench import tables
from bench.peak_child import PeakCase
from bench.report import Gate
from megadpo.errors import MegaDPOError
from megadpo.planner import Plan, make_plan
from megadpo.runtime.progress import ProgressBar

_TOOLS = Path(__file__).resolve().parents[1]
_MIB = 2**20
_TOLERANCE = 0.15

console = Console(width=None if sys.stdout.isatty() else 120)


def cases(dtype: str) -> list[PeakCase]:
    """The cases that are measured, one per layout."""

    def case(name: str, *, tensor: int = 1, pipeline: int = 1, virtual_pipeline: int = 1, data: int = 1) -> PeakCase:
        return PeakCase(
            name=name,
            hidden=768,
            layers=12,
            ffn=2048,
            heads=12,
            kv_heads=4,
            vocab=32_000,
            tensor=tensor,
            pipeline=pipeline,
            virtual_pipeline=virtual_pipeline,
            data=data,
            dtype=dtype,
            pairs=8,
            budget=512,
            longest=256,
        )

    return [
        case("one rank"),
        case("tp2", tensor=2),
        case("pp2", pipeline=2),
        case("pp2 x vpp2", pipeline=2, virtual_pipeline=2),
        case("dp2", data=2),
        case("tp2 x pp2", tensor=2, pipeline=2),
    ]


def measure(case: PeakCase) -> list[dict[str, int]]:
    """Launches a case; returns the measurements of each rank."""
    path = os.pathsep.join([str(_TOOLS), str(_TOOLS.parent)])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.layout.world_size)]
    with TemporaryDirectory(prefix="megadpo-peaks-") as directory:
        subprocess.run(
            [sys.executable, "-W", "ignore", *launcher, "-m", "bench.peak_child", json.dumps(asdict(case)), directory],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        written = sorted(Path(directory).iterdir())
        if len(written) < case.layout.world_size:
            raise MegaDPOError(f"{case.name}: the launch ended by itself; what it said stands above")
        return [json.loads(file.read_text(encoding="utf-8")) for file in written]


def main(arguments: Sequence[str]) -> int:
    """Measures all cases; returns 1 if a prediction is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args(arguments)
    wanted = cases(options.dtype)
    table = Table(title=f"MiB of a rank, {options.dtype}, 12 layers, {wanted[0].arch.num_parameters:,} parameters")
    for name in ("layout", "stage", "planned", "measured", "planned / measured", "resident set"):
        table.add_column(name, justify="left" if name == "layout" else "right")
    gates = []
    with ProgressBar("measuring layouts", total=len(wanted), visible=True) as bar:
        for done, case in enumerate(wanted, 1):
            gates += _compare(case, make_plan(case.job()), measure(case), table)
            bar.update(done, case.name)
    console.print(table)
    console.print(tables.gate_table(gates))
    return int(not all(gate.holds for gate in gates))


def _compare(case: PeakCase, plan: Plan, measured: Sequence[dict[str, int]], table: Table) -> list[Gate]:
    """Adds a row for each stage, of its largest rank, to the table; returns the gates."""
    gates = []
    for stage in plan.stages:
        ranks = [rank for rank in measured if rank["stage"] == stage.stage]
        tensors, resident = (max(rank[key] for rank in ranks) for key in ("tensor_bytes", "resident_bytes"))
        ratio = stage.peak / tensors
        row = (f"{stage.peak / _MIB:.0f}", f"{tensors / _MIB:.0f}", f"{ratio:.3f}", f"{resident / _MIB:.0f}")
        table.add_row(case.name, str(stage.stage), *row)
        gates.append(Gate(f"{case.name}, stage {stage.stage}: off by", abs(ratio - 1), _TOLERANCE, at_most=True))
    return gates


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
