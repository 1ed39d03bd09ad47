"""Where ranks are: what is told of them, and the end of one that does not move."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest

from megadpo.health.watchdog import STUCK, HangWatchdog, RankStatus, describe_ranks, silent_ranks

PROGRAM = """
import sys, threading, time
from megadpo.runtime.rank_logging import configure_logging
from megadpo.health.watchdog import HangWatchdog
from tests.unit.health.test_watchdog import Shelf, tell_as

configure_logging()
shelf = Shelf()
tell_as(shelf, 1, sys.argv[1])
with HangWatchdog(shelf, rank=0, world=2, patience_s=0.4) as watchdog:
    for step in range(1, 8):  # longer than the patience, in steps that are not
        watchdog.report(step, "update")
        time.sleep(0.1)
    watchdog.report(8, "exchange")
    threading.Event().wait(20.0)
"""


IN_TIME = """
import time
from megadpo.health.watchdog import HangWatchdog
from tests.unit.health.test_watchdog import Shelf

with HangWatchdog(Shelf(), rank=0, world=1, patience_s=4.0) as watchdog:
    for step in range(10):
        watchdog.report(step, "update")
        time.sleep(0.5)
print("ended in time")
"""

OTHERS_MOVE_S = 3.0


class Shelf:
    """A store of this process, which counts what it is asked."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.asked: list[str] = []

    def set(self, key: str, value: str, /) -> None:
        self.kept[key] = value.encode()

    def get(self, key: str, /) -> bytes:
        self.asked.append("get")
        return self.kept[key]

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        self.asked.append("multi_get")
        return [self.kept[key] for key in keys]

    def check(self, keys: list[str], /) -> bool:
        self.asked.append("check")
        return all(key in self.kept for key in keys)

    def set_timeout(self, timeout: timedelta, /) -> None:
        pass


def tell_as(shelf: Shelf, rank: int, does: str) -> None:
    """Has another rank tell its place: once and never more, again and again, or for a while always a new one."""
    other = HangWatchdog(shelf, rank=rank, world=2, patience_s=0.4)
    other.report(8, "reference pass")
    other._publish_once(shelf)

    def go_on() -> None:
        for turn in range(1000):
            if does == "moves" and 0.02 * turn < OTHERS_MOVE_S:
                other.report(8, f"evaluation {turn}")
            other._publish_once(shelf)
            time.sleep(0.02)

    if does != "stopped":
        threading.Thread(target=go_on, daemon=True).start()


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ("hangs", "rank 1 at step 8, reference pass ("),
        ("stopped", "rank 1 IS SILENT; it was at step 8, reference pass ("),
    ],
)
def test_a_rank_that_does_not_move_says_where_all_are_and_ends(other: str, told: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, other], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == STUCK
    assert "no rank has moved for 0 s (parallel.timeout_s): a rank is missing, or hangs; if one is only " in done.stderr
    assert "slow, raise parallel.timeout_s. Where they are:" in done.stderr
    assert "rank 0 at step 8, exchange (wait, " in done.stderr
    assert told in done.stderr


def test_the_first_that_is_not_silent_speaks() -> None:
    """Rank 1, when rank 0 is stopped."""
    program = PROGRAM.replace("tell_as(shelf, 1, ", "tell_as(shelf, 0, ").replace("rank=0", "rank=1")
    done = subprocess.run(
        [sys.executable, "-c", program, "stopped"], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == STUCK
    assert "rank 0 IS SILENT" in done.stderr


def test_a_store_that_does_not_answer_keeps_nobody() -> None:
    """It is in rank 0's process, which was stopped."""
    frozen = "Shelf.check = lambda self, keys: threading.Event().wait()\nimport megadpo.health.watchdog\n"
    frozen += "megadpo.health.watchdog._ANSWER_S = 0.5\nconfigure_logging()"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("configure_logging()", frozen), "stopped"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == STUCK
    assert "their places can't be read (no answer): the machine that keeps them, rank 0's, may be gone" in done.stderr


def test_a_rank_whose_others_move_waits_until_they_do_not_either() -> None:
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "moves"], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == STUCK
    assert time.monotonic() - begun > OTHERS_MOVE_S
    last = round(OTHERS_MOVE_S / 0.02) - 1
    assert f"rank 1 at step 8, evaluation {last} (" in done.stderr


def test_a_run_that_ends_in_time_is_left_alone() -> None:
    """It takes longer than the patience, in steps that do not; in a process of its own, which it would end."""
    done = subprocess.run([sys.executable, "-c", IN_TIME], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "ended in time\n"), done.stderr


def test_all_places_are_read_by_two_questions() -> None:
    """512 ranks that ask for each other's one by one ask a million."""
    shelf, world = Shelf(), 512
    places = [HangWatchdog(shelf, rank=rank, world=world, patience_s=60.0) for rank in range(world)]
    for rank, own in enumerate(places[:-1]):
        own.report(rank, "update")
        own._publish_once(shelf)
    silent = places[0]._read_all(shelf)
    assert silent[-1] is None and [place.step for place in silent if place is not None] == [*range(world - 1)]
    places[-1].report(7, "update")
    places[-1]._publish_once(shelf)
    shelf.asked.clear()
    last = places[0]._read_all(shelf)[-1]
    assert last is not None and last.step == 7
    assert shelf.asked == ["check", "multi_get"]


def test_many_ranks_are_told_together() -> None:
    def at(step: int, doing: str, turn: int) -> RankStatus:
        return RankStatus(step, doing, "forward, model/layer.py:3", 61.0, turn)

    before = [at(12, "update", 5), at(12, "update", 5), None, at(12, "reference pass", 5), at(12, "update", 7)]
    after = [at(12, "update", 6), at(12, "update", 6), None, at(12, "reference pass", 5), at(12, "update", 8)]
    assert silent_ranks(before, after) == [2, 3]
    assert describe_ranks(before, after) == [
        "rank 2 IS SILENT and has never told where it is",
        "rank 3 IS SILENT; it was at step 12, reference pass (forward, model/layer.py:3)",
        "ranks 0-1, 4 at step 12, update (forward, model/layer.py:3), for 61 s",
    ]


def test_a_rank_alone_watches_nothing() -> None:
    with HangWatchdog(None, rank=0, world=1, patience_s=0.01) as watchdog:
        watchdog.report(1, "update")
        time.sleep(0.2)  # with a store it would end the process
        watchdog.report_phase("saving")
