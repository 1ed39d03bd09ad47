"""The parent's side of a comparison: contenders are processes that load their model, then run single steps on request.

Between its turns a contender sleeps in a read from its pipe and takes no CPU time, so that contenders can take turns
every few seconds: anything that slows the machine down for a minute slows all of them alike.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.job import Job
from bench.proc import cpu_seconds, high_water_bytes
from megadpo.errors import MegaDPOError
from megadpo.runtime.progress import ProgressBar

_TOOLS = Path(__file__).resolve().parents[1]
_SAID_LAST = 2000


@dataclass(frozen=True, slots=True)
class Turn:
    """One step of one contender: the answer of its rank 0, and the seconds of its slowest rank."""

    seconds: float
    values: Mapping[str, Any]


class Contender(AbstractContextManager["Contender"]):
    """The processes of one contender, one per rank; they load on construction, and end with the context."""

    def __init__(self, name: str, module: str, job: Job, *, world_size: int = 1) -> None:
        self.name = name
        self.job = job
        self.turns: list[Turn] = []
        self._log = Path(f"{job.out}.log")
        environments = _environments(job.threads, world_size)
        with self._log.open("w") as log:
            self._ranks = [
                subprocess.Popen(
                    [sys.executable, "-m", f"bench.{module}", job.to_json()],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    cwd=_TOOLS.parent,
                    env=environment,
                )
                for environment in environments
            ]

    def wait_until_ready(self) -> None:
        """Waits until every rank has loaded its model and is ready for the first step."""
        for rank in self._ranks:
            self._answer(rank)

    def step(self) -> Turn:
        """Runs the next step and records it."""
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write("step\n")
            rank.stdin.flush()
        answers = [self._answer(rank) for rank in self._ranks]
        turn = Turn(max(float(answer["seconds"]) for answer in answers), answers[0])
        self.turns.append(turn)
        return turn

    def peak_bytes(self) -> int:
        """Peak memory of the largest rank: the kernel's resident set, or torch's allocations on CUDA.

        If the job counts tensors, it is their peak on rank 0.
        """
        if self.job.device == "cuda" or self.job.count_tensors:
            return max(int(turn.values["peak_bytes"]) for turn in self.turns)
        return max(high_water_bytes(rank.pid) for rank in self._ranks)

    def logged(self, start: str) -> list[str]:
        """The rest of the lines in its log that begin with `start`."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line[line.index(start) :] for line in lines if start in line]

    def cpu_seconds(self) -> float:
        """CPU time of all its ranks so far."""
        return sum(cpu_seconds(rank.pid) for rank in self._ranks)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.close()
        for rank in self._ranks:
            try:
                rank.wait(timeout=10 if error is None else 0)
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()

    def _answer(self, rank: subprocess.Popen[str]) -> Any:
        assert rank.stdout is not None
        line = rank.stdout.readline()
        if not line:
            said = self._log.read_text(encoding="utf-8", errors="replace")[-_SAID_LAST:]
            raise MegaDPOError(f"{self.name} ended by itself; the last it said ({self._log}):\n{said}")
        return json.loads(line)


def _environments(threads: int, world_size: int) -> list[dict[str, str]]:
    """Environments of all ranks, with the launcher's variables if there is more than one."""
    path = os.pathsep.join([str(_TOOLS), str(_TOOLS.parent)])
    common = {
        **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        **dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1"),
    }
    if world_size == 1:
        return [common]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    size = str(world_size)
    launch = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**common, **launch, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def take_turns(contenders: Sequence[Contender], *, turns: int, every: Mapping[str, int], title: str) -> None:
    """Has all contenders run a step one after the other, `turns` times; one named in `every` only in each k-th turn.

    The order is reversed from turn to turn, so that no contender is always first.
    """
    with ProgressBar(title, total=turns, visible=True) as bar:
        for turn in range(turns):
            playing = [c for c in contenders if turn % every.get(c.name, 1) == 0]
            for contender in playing if turn % 2 == 0 else reversed(playing):
                contender.step()
            bar.update(turn + 1, "  ".join(f"{c.name} {c.turns[-1].seconds:.2f} s" for c in playing))
