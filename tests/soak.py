"""Kills a training again and again, has it resume by itself, and compares every run that gets to its end.

    make soak            (python -m tests.soak [--cycles 200] [--seed 0] [--ranks 2] [--scratch DIR])

A cycle starts tools/train.py's `main` with train.resume=auto on ranks from the tests' fork server, and kills one of
them by SIGKILL at a random moment, from its first import to the end of its export. When a run is finished the next one
begins. Exit status 1, and the scratch directory kept, where any resume failed, a finished run differs from the
uninterrupted one in a bit, or anything is left over.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import tests.conftest  # noqa: F401 - one thread a process and no network, as in all tests
from megadpo.checkpoint.directory import step_directories
from megadpo.checkpoint.manifest import find_damage
from tests.helpers.launch import Rank, launch, start_ranks
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import assert_bit_equal, write_jsonl
from tests.helpers.tiny_models import write_tiny_model

ENDS_BY_ITSELF_S = 10.0
PATIENCE_S = 120.0


@dataclass
class Tally:
    """What has happened so far."""

    kills: int = 0
    finished: int = 0
    steps_kept: int = 0
    largest_bytes: int = 0
    longest_end_s: float = 0.0
    problems: list[str] = field(default_factory=list)


def main(arguments: Sequence[str]) -> int:
    """Runs the cycles of the command line; 1 where anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("cycles", 200), ("seed", 0), ("ranks", 2)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where runs are written for the while")
    options = parser.parse_args(arguments)
    root = Path(tempfile.mkdtemp(prefix="soak_", dir=options.scratch))
    tally = soak(root, cycles=options.cycles, seed=options.seed, ranks=options.ranks)
    console = Console()
    table = Table("", "", title=f"{tally.kills} kills, seed {options.seed}, {options.ranks} ranks")
    table.add_row("runs finished, bit-equal to the uninterrupted one", str(tally.finished))
    table.add_row("checkpoints that were whole after a kill", str(tally.steps_kept))
    table.add_row("seconds until the other ranks had ended, at most", f"{tally.longest_end_s:.1f}")
    table.add_row("MB of a run directory, at most", f"{tally.largest_bytes / 1e6:.1f}")
    table.add_row("failed resumes, differences, left-overs", str(len(tally.problems)))
    console.print(table)
    for problem in tally.problems:
        console.print(problem, markup=False, highlight=False)
    if tally.problems:
        console.print(f"the runs are in {root}", markup=False)
        return 1
    shutil.rmtree(root)
    return 0


def train_command(words: Sequence[str]) -> None:
    """tools/train.py on this rank, with its exit status as this process's unless that is 0."""
    from tools.train import main as train

    if status := train(list(words)):
        raise SystemExit(status)


def soak(root: Path, *, cycles: int, seed: int, ranks: int) -> Tally:
    """Runs so many cycles with their runs under `root`."""
    rng, tally = random.Random(seed), Tally()
    words = _words(root, ranks)
    whole = root / "whole"
    launch(ranks, train_command, [*words, f"train.run_dir={whole}"])  # the first one pays for the fork server
    shutil.rmtree(whole)
    started = time.monotonic()
    launch(ranks, train_command, [*words, f"train.run_dir={whole}"])
    seconds, number = time.monotonic() - started, 0
    bar = Progress(
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}")),
        *(TimeElapsedColumn(), TimeRemainingColumn()),
    )
    with bar:
        task = bar.add_task("kills", total=cycles, note="")
        while not tally.problems:
            run_dir = root / f"run_{number:04d}"
            own = [*words, f"train.run_dir={run_dir}"]
            after_s = rng.uniform(0, seconds) if tally.kills < cycles else PATIENCE_S
            if _killed(start_ranks(ranks, train_command, own), after_s, rng, tally):
                _look_at(run_dir, whole, tally)
            elif not tally.problems:
                _compare(run_dir, whole, tally)
                number += 1
                if tally.kills >= cycles:
                    break
            bar.update(task, completed=tally.kills, note=f"{tally.finished} runs finished")
    return tally


def _words(root: Path, ranks: int) -> list[str]:
    """The words of all runs but for their directory."""
    model = write_tiny_model(root / "model", "llama", num_layers=2)
    data = write_jsonl(root / "pairs.jsonl", make_pairs(12, seed=1))
    words = ["+model=hf", f"model.hf_path={model}", f"data.train_path={data}", "device.kind=cpu", "data.workers=1"]
    words += ["precision.dtype=fp32", "trackers=[jsonl]", "optimizer.lr=1e-3", "train.max_steps=8"]
    words += ["train.global_batch_size=4", "train.save_every=1", "checkpoint.keep_last=2", "train.resume=auto"]
    return [*words, f"parallel.tensor={ranks}"]


def _killed(ranks: list[Rank], after_s: float, rng: random.Random, tally: Tally) -> bool:
    """Whether a rank was killed after so many seconds; False where all had ended before, which must be well."""
    ends = time.monotonic() + after_s
    while time.monotonic() < ends and any(rank.process.is_alive() for rank in ranks):
        time.sleep(0.005)
    victim = rng.choice(ranks).process
    if not victim.is_alive():
        for rank in ranks:
            rank.process.join(PATIENCE_S)
        for rank in ranks:
            if rank.process.exitcode != 0:
                said = rank.outcome.recv()[1] if rank.outcome.poll() else ""
                tally.problems.append(f"a start ended with {rank.process.exitcode} by itself:\n{said}")
        return False
    children = [child for rank in ranks if rank.process.is_alive() for child in _children(rank.process.pid)]
    victim.kill()
    tally.kills += 1
    _wait_for_others(ranks, tally)
    if left := [child for child in children if child.is_running()]:
        tally.problems.append(f"processes go on after their rank: {left}")
    return True


def _children(pid: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _wait_for_others(ranks: list[Rank], tally: Tally) -> None:
    """Waits until all have ended. One whose peer was killed before they had met waits for it: a launcher ends it."""
    killed = time.monotonic()
    for rank in ranks:
        rank.process.join(max(0.0, killed + ENDS_BY_ITSELF_S - time.monotonic()))
    if all(not rank.process.is_alive() for rank in ranks):
        tally.longest_end_s = max(tally.longest_end_s, time.monotonic() - killed)
    for rank in ranks:
        if rank.process.is_alive():
            rank.process.terminate()
            rank.process.join(ENDS_BY_ITSELF_S)
            if rank.process.is_alive():
                tally.problems.append(f"a rank did not end when its peer was killed, nor when told to: {rank.process}")
                rank.process.kill()


def _look_at(run_dir: Path, whole: Path, tally: Tally) -> None:
    """Checks what a kill has left."""
    for checkpoint in step_directories(run_dir / "checkpoints"):
        if damage := find_damage(checkpoint):
            tally.problems.append(f"{checkpoint} is damaged: {[found.text for found in damage]}")
        tally.steps_kept += 1
    size = _bytes(run_dir)
    tally.largest_bytes = max(tally.largest_bytes, size)
    # Besides what a run ends with: checkpoints under way and being removed, and a half export.
    if size > 2.5 * _bytes(whole):
        tally.problems.append(f"{run_dir} has grown to {size} bytes, a whole run has {_bytes(whole)}")


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _compare(run_dir: Path, whole: Path, tally: Tally) -> None:
    """Checks a finished run against the uninterrupted one, and removes it where they are equal."""
    try:
        assert_bit_equal(whole, run_dir)
    except AssertionError as error:
        tally.problems.append(f"{run_dir} differs from the uninterrupted run: {error}")
        return
    names, expected = ({str(path.relative_to(root)) for path in _lasting(root)} for root in (run_dir, whole))
    if names != expected:
        tally.problems.append(f"{run_dir}: names that one of the two runs lacks: {sorted(names ^ expected)}")
        return
    tally.finished += 1
    shutil.rmtree(run_dir)


def _lasting(run_dir: Path) -> list[Path]:
    """Files and directories of a run, but what killed tokenizations leave: the next one clears them away in a day."""
    return [path for path in run_dir.rglob("*") if not path.relative_to(run_dir).as_posix().startswith("tokens/.")]


if __name__ == "__main__":
    os.environ["PYTHONWARNINGS"] = "ignore"
    sys.exit(main(sys.argv[1:]))
