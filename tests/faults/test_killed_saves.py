"""kill -9 in the middle of saving: at random moments, and before each single change of files that a save makes.

After every kill the next process finds a newest checkpoint that is whole and holds bit for bit what belongs to its
step: `tests.helpers.jobs.saving` checks it, and every start here is one that follows a kill.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from megadpo.checkpoint.directory import find_checkpoint, list_checkpoints, step_directories, step_directory, step_of
from megadpo.checkpoint.manifest import find_damage
from tests.helpers.jobs.saving import KEPT, save_until_killed
from tests.helpers.launch import CONTEXT, Rank, start_ranks

# A process that may be saving; longer than any save here, with other processes on the machine.
PATIENCE_S = 60.0
ENDS_BY_ITSELF_S = 30.0
PHASES = "preparing planning writing gathered describing hashing complete named removing done".split()


@dataclass(frozen=True)
class Kill:
    """When a process was killed: the step it was saving, how far the save had come, the newest whole step then."""

    step: int
    phase: str
    newest: int
    hidden: set[str]
    """names that no reader takes for a checkpoint's"""


@contextmanager
def saving(root: Path, *, world: int = 1, asynchronous: bool = False, dies_at: int | None = None) -> Iterator[Saving]:
    """Ranks that save until they are killed, at the end of the context at the latest."""
    mine, theirs = CONTEXT.Pipe(duplex=False)
    ranks = start_ranks(world, save_until_killed, root, asynchronous, dies_at, theirs)
    theirs.close()
    try:
        yield Saving(ranks, mine)
    finally:
        for rank in ranks:
            rank.process.kill()
            assert rank.exit_code(PATIENCE_S) is not None


@dataclass(frozen=True)
class Saving:
    """Ranks that save, and what rank 0 says."""

    ranks: list[Rank]
    word: Connection

    def next_step(self) -> int | None:
        """The step that the ranks say next; None where they have been killed before. What they raise is raised."""
        try:
            assert self.word.poll(PATIENCE_S), "no save is begun"
            return int(self.word.recv())
        except EOFError:
            if -9 not in (codes := [rank.exit_code(PATIENCE_S) for rank in self.ranks]):
                raise AssertionError(f"{codes}: {self.ranks[0].outcome.recv()[1]}") from None
            return None

    def kill(self, rank: int) -> None:
        """Kills a rank, which has no child process that could go on, and waits until the others have ended, too."""
        assert psutil.Process(self.ranks[rank].process.pid).children(recursive=True) == []
        self.ranks[rank].process.kill()
        for other in self.ranks:
            assert other.exit_code(ENDS_BY_ITSELF_S) not in (None, 0)


def look_at(root: Path, step: int, left: set[str]) -> Kill:
    """How far the save of `step` had come; AssertionError unless what is there is in order, and stands still.

    `left` are the hidden names that the kill before this one had left.
    """
    before = _snapshot(root)
    for checkpoint in step_directories(root):
        assert find_damage(checkpoint) == []
    assert list_checkpoints(root) == step_directories(root)
    newest = [step_of(path) for path in list_checkpoints(root)][-1:] or [0]
    if (root / "latest").exists():
        assert find_checkpoint(root) in list_checkpoints(root)
    names = {path.name for path in root.iterdir()}
    hidden = {name for name in names if name.startswith(".")}
    phase = _phase(root, step)
    # What the kill before this one has left is gone once a save has begun.
    again = {f".step_{step:08d}.partial", ".latest"}
    assert phase == "preparing" or hidden.isdisjoint(left - again)
    assert phase == "preparing" or {name for name in hidden if name.endswith(".partial")} <= again
    time.sleep(0.03)
    assert _snapshot(root) == before, "somebody goes on writing"
    return Kill(step, phase, newest[0], hidden)


def _snapshot(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in root.rglob("*")}


def _phase(root: Path, step: int) -> str:
    """How far a save has come, from the names that are there."""
    final, partial = step_directory(root, step), root / f".step_{step:08d}.partial"
    if final.exists():
        if (root / "latest").read_text().strip() != final.name:
            return "named"
        return "removing" if list(root.glob(".*.removed")) or len(step_directories(root)) > KEPT else "done"
    if not partial.exists():
        return "preparing"
    names = {path.name for path in partial.iterdir()}
    for name, phase in (
        ("manifest.json", "complete"),
        (".manifest.json", "hashing"),
        ("hf", "describing"),
        (".metadata", "gathered"),
        ("__0_0.distcp", "writing"),
    ):
        if name in names:
            return phase
    return "planning"


def seconds_of_a_save(root: Path, *, world: int, asynchronous: bool) -> float:
    """How long a process's first one takes, the longer of two; KEPT checkpoints are there afterwards."""
    longest = 0.0
    for _ in range(2):
        with saving(root, world=world, asynchronous=asynchronous) as ranks:
            ranks.next_step()
            ranks.next_step()
            begun = time.monotonic()
            ranks.next_step()
            longest = max(longest, time.monotonic() - begun)
            ranks.next_step()
    return longest


def kill_often(root: Path, number: int, seed: int, *, world: int = 1, asynchronous: bool = False) -> list[Kill]:
    """Kills a process `number` times in a save, at moments spread evenly over it, and starts the next one."""
    root.mkdir()
    rng, kills, newest = random.Random(seed), [], 0
    seconds = seconds_of_a_save(root, world=world, asynchronous=asynchronous)
    last = list_checkpoints(root)[-1]
    size = sum(path.stat().st_size for path in last.rglob("*"))
    moments = [seconds * (index + rng.random()) / number for index in range(number)]
    rng.shuffle(moments)
    for moment in moments:
        there = step_of(list_checkpoints(root)[-1])  # looked at before anybody saves again
        with saving(root, world=world, asynchronous=asynchronous) as ranks:
            assert ranks.next_step() == max(newest, there)
            step = ranks.next_step()
            assert step is not None
            time.sleep(moment)
            ranks.kill(rng.randrange(world))
            while (following := ranks.next_step()) is not None:
                step = following  # the save was quicker than the moment is late
        kills.append(look_at(root, step, kills[-1].hidden if kills else set()))
        newest = kills[-1].newest
        assert len(list_checkpoints(root)) <= KEPT + 2
        assert sum(path.stat().st_size for path in root.rglob("*")) < 1.5 * (KEPT + 2) * size
    with saving(root, world=world, asynchronous=asynchronous) as ranks:
        assert [ranks.next_step() for _ in range(3)] == [newest, newest + 1, newest + 2]
        ranks.kill(0)
    assert len(list_checkpoints(root)) <= KEPT + 1
    return kills


def kill_at_every_change(root: Path, *, asynchronous: bool) -> list[Kill]:
    """Kills a process before each change of files that a save makes, once."""
    root.mkdir()
    seconds_of_a_save(root, world=1, asynchronous=asynchronous)
    kills: list[Kill] = []
    while True:
        with saving(root, asynchronous=asynchronous, dies_at=len(kills)) as ranks:
            done = ranks.next_step()
            assert done is not None
            begun = ranks.next_step()
            if ranks.next_step() is not None:
                return kills
            assert begun == done + 1
            kills.append(look_at(root, begun, kills[-1].hidden if kills else set()))


def test_killed_at_random_moments_and_at_every_change(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        random_ones = [
            pool.submit(kill_often, tmp_path / str(asynchronous), 26, 7, asynchronous=asynchronous)
            for asynchronous in (False, True)
        ]
        single_ones = [
            pool.submit(kill_at_every_change, tmp_path / f"every_{asynchronous}", asynchronous=asynchronous)
            for asynchronous in (False, True)
        ]
    found = Counter(kill.phase for series in random_ones for kill in series.result())
    # Where moments fall depends on what else the machine does: that all phases are hit is the other series' to show.
    assert len(found) >= 2, found
    for series in single_ones:
        kills = series.result()
        assert len(kills) >= 20
        assert {kill.phase for kill in kills} == {*PHASES} - {"done"}
        assert {kill.step - kill.newest for kill in kills} == {0, 1}


def test_one_of_two_ranks_is_killed(tmp_path: Path) -> None:
    kills = kill_often(tmp_path / "two", 6, 3, world=2, asynchronous=True)
    assert {kill.phase for kill in kills} != {"preparing"}, "a save has been begun at least"
