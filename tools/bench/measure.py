"""Line-ups: contenders that take turns on a workload, and their results."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.ablations import ABLATIONS
from bench.contenders import Contender, take_turns
from bench.job import Job
from bench.proc import busy_cpu_seconds
from bench.report import Result
from bench.workload import Workload
from megadpo.config.choices import ReferenceMode
from megadpo.models.hf_config import read_architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A contender of a line-up; it takes each `every`-th turn, and its FLOPs count prompts once if it shares them."""

    name: str
    module: str = "megadpo_child"
    world_size: int = 1
    threads: int | None = None
    ablation: str | None = None
    overrides: tuple[str, ...] = ()
    share_prompt: bool = True
    every: int = 1
    rehearsed: bool = False
    """another process has made every step of an epoch before, and left what it keeps on disk"""


MATMUL = Entry(name="matmul", module="matmul_child")
RIVALS = {
    "naive": Entry(name="naive", module="naive_child", share_prompt=False),
    "trl": Entry(name="trl", module="trl_child", share_prompt=False),
}
ABLATION_LADDER = [
    Entry(name=name, ablation=name, share_prompt=ablation.share_prompt) for name, ablation in ABLATIONS.items()
]
SHARING = [
    Entry(name="prompts twice", overrides=("data.share_prompt=false",), share_prompt=False),
    Entry(name="prompts shared"),
]
LAYOUTS = [
    Entry(name="one rank", threads=1),
    Entry(name="dp2", threads=1, world_size=2),
    Entry(name="tp2", threads=1, world_size=2, overrides=("parallel.tensor=2",)),
]


def reference_modes(cache: Path) -> list[Entry]:
    """Entries for all reference modes; `cache` is the directory of cached log-probs."""
    further = {"cached": (f"reference.cache_dir={cache}",), "none": ("loss.name=simpo",)}
    return [
        Entry(
            name=str(mode),
            overrides=(f"reference.mode={mode}", *further.get(str(mode), ())),
            rehearsed=str(mode) == "cached",
        )
        for mode in ReferenceMode
    ]


@dataclass(frozen=True, slots=True)
class Lineup:
    """The results of a line-up's contenders, and the share of the machine's CPU time that other programs took."""

    results: tuple[Result, ...]
    foreign_cpu: float
    matmul_by_layer: dict[str, float]
    """FLOP/s of the matrix products of each kind of layer in the last turn; empty where they were not measured"""
    said: tuple[str, ...]
    """megadpo's log lines about its attention kernel"""

    def __getitem__(self, name: str) -> Result:
        return next(result for result in self.results if result.name == name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Runs line-ups. `template` is every contender's job, apart from its entry's settings."""

    template: Job
    scratch: Path
    turns: int
    warmup: int
    one_by_one: bool
    """for models of which the device holds one at a time: no turns are taken"""

    def run(self, title: str, entries: Sequence[Entry], workload: Workload) -> Lineup:
        """Has the entries take turns on the workload."""
        for entry in entries:
            if entry.rehearsed:
                self._rehearse(title, entry, workload)
        groups = [[entry] for entry in entries] if self.one_by_one else [list(entries)]
        clock = _CpuClock()
        played = [played for group in groups for played in self._play(title, group, workload, clock)]
        rates, by_layer = _matmul_rates(played)
        flop_rates = read_architecture(workload.model).flop_rates
        results = []
        for entry, contender, peak in played:
            if entry.module == MATMUL.module:
                continue
            steps = range(len(contender.turns))
            results.append(
                Result(
                    name=entry.name,
                    seconds=[turn.seconds for turn in contender.turns],
                    losses=[float(turn.values["loss"]) for turn in contender.turns],
                    grad_norms=[float(turn.values["grad_norm"]) for turn in contender.turns],
                    flops=[workload.step_flops(flop_rates, step, share_prompt=entry.share_prompt) for step in steps],
                    tokens=[workload.step_tokens(step) for step in steps],
                    mfu=contender.turns[-1].values.get("throughput/mfu"),
                    matmul_rates=[rates[step * entry.every] for step in steps] if rates else [],
                    reference_logps=_logps(contender.turns[-1].values.get("reference_logps", {})),
                    pairs_per_step=workload.pairs_per_step,
                    peak_bytes=peak,
                    warmup=-(-self.warmup // entry.every),
                    reference_seconds=[
                        float(turn.values["time/reference_s"])
                        for turn in contender.turns
                        if "time/reference_s" in turn.values
                    ],
                )
            )
        said = {line for _, contender, _ in played for line in contender.logged("attention: ")}
        return Lineup(tuple(results), clock.foreign_share(), by_layer, tuple(sorted(said)))

    def _rehearse(self, title: str, entry: Entry, workload: Workload) -> None:
        job = self._job(entry, f"{title}, rehearsed", workload)
        with Contender(entry.name, entry.module, job, world_size=entry.world_size) as contender:
            contender.wait_until_ready()
            for _ in range(workload.steps_per_epoch):
                contender.step()

    def _play(
        self, title: str, entries: Sequence[Entry], workload: Workload, clock: _CpuClock
    ) -> list[tuple[Entry, Contender, int]]:
        """Runs the entries' contenders; returns them, with their turns and peak memory, when their processes ended."""
        with ExitStack() as stack:
            contenders = [
                stack.enter_context(Contender(e.name, e.module, self._job(e, title, workload), world_size=e.world_size))
                for e in entries
            ]
            for contender in contenders:
                contender.wait_until_ready()
            turns = self.warmup + self.turns
            with clock.running(contenders):
                take_turns(contenders, turns=turns, every={e.name: e.every for e in entries}, title=title)
            return [(e, c, c.peak_bytes()) for e, c in zip(entries, contenders, strict=True)]

    def _job(self, entry: Entry, title: str, workload: Workload) -> Job:
        # The path is part of overrides on a command line, so it may only have plain characters.
        out = self.scratch.joinpath(*(re.sub(r"\W+", "_", part) for part in (title, entry.name)))
        out.parent.mkdir(parents=True, exist_ok=True)
        return replace(
            self.template,
            model=str(workload.model),
            pairs=str(workload.pairs),
            tokens=str(workload.tokens),
            out=str(out),
            threads=entry.threads or self.template.threads,
            ablation=entry.ablation,
            overrides=(*self.template.overrides, *entry.overrides),
        )


def _matmul_rates(played: Sequence[tuple[Entry, Contender, int]]) -> tuple[list[float], dict[str, float]]:
    """FLOP/s of the matrix products per turn, and of each kind of layer in the last turn; empty if not measured."""
    for entry, contender, _ in played:
        if entry.module == MATMUL.module:
            last = contender.turns[-1].values
            return [float(turn.values["flops_per_s"]) for turn in contender.turns], dict(last["by_layer"])
    return [], {}


def _logps(found: Any) -> dict[int, tuple[float, float]]:
    return {int(index): (float(chosen), float(rejected)) for index, (chosen, rejected) in found.items()}


class _CpuClock:
    """Measures the share of the machine's CPU time that other programs took while it ran."""

    def __init__(self) -> None:
        self._capacity = 0.0
        self._foreign = 0.0

    @contextmanager
    def running(self, contenders: Sequence[Contender]) -> Iterator[None]:
        """Runs for the duration of the context; CPU time of these contenders is not foreign."""
        started, busy, own = time.monotonic(), busy_cpu_seconds(), sum(c.cpu_seconds() for c in contenders)
        yield
        own = sum(c.cpu_seconds() for c in contenders) - own
        self._foreign += max(0.0, busy_cpu_seconds() - busy - own)
        self._capacity += (time.monotonic() - started) * (os.cpu_count() or 1)

    def foreign_share(self) -> float:
        """Share of the CPUs' time, 0 to 1."""
        return self._foreign / self._capacity
