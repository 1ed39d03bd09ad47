"""Watches for hung ranks: reports what every rank is doing, and ends a run that does not progress.

A collective waits until all ranks have called it. A rank that was stopped, or hangs, leaves the others waiting, and the
timeout of their process group names the collective that did not end, not the missing rank. So each rank regularly
publishes its status in a store; one that has not moved for too long reads and logs all ranks' statuses, and ends.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn, Protocol

from megadpo.errors import listing
from megadpo.runtime.rank_logging import get_logger

logger = get_logger(__name__)

# Exit status of a rank that has waited too long (EX_SOFTWARE of sysexits.h).
STUCK = 70
_PUBLISH_S = 5.0
_ANSWER_S = 10.0
_UNREADABLE = "their places can't be read ({}): the machine that keeps them, rank 0's, may be gone"


class Store(Protocol):
    """A key-value store shared by all ranks, such as torch.distributed's."""

    def set(self, key: str, value: str, /) -> None:
        """Stores a value."""

    def get(self, key: str, /) -> bytes:
        """Returns a value; waits until it exists."""

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        """Returns the values of several keys by one request; waits until they exist."""

    def check(self, keys: list[str], /) -> bool:
        """Returns True if all keys have a value."""

    def set_timeout(self, timeout: timedelta, /) -> None:
        """Sets the timeout of requests."""


@dataclass(frozen=True, slots=True)
class RankStatus:
    """A rank's step and activity, its current line of the program, and the seconds since it last moved.

    `turn` counts the rank's publications, so that clocks of different machines need not be compared.
    """

    step: int
    doing: str
    line: str
    stood_s: float
    turn: int


class HangWatchdog:
    """Publishes what this rank does, and ends it when no rank has moved for `patience_s` seconds; a context manager.

    Silent ranks, which publish nothing any more, count as not moving. `store` must be used by nobody else in this
    process; None, for a rank that is alone, watches nothing. `report` costs a few microseconds: threads do the rest.
    """

    def __init__(self, store: Store | None, *, rank: int, world: int, patience_s: float) -> None:
        self._rank = rank
        self._world = world
        self._patience_s = patience_s
        self._publish_s = min(_PUBLISH_S, patience_s / 4)
        self._current = (0, "beginning", time.monotonic())
        self._turn = 0
        self._over = threading.Event()
        # Two, because a store whose machine is gone may never let go of the one that publishes.
        work = () if store is None else (self._publish, self._watch)
        self._threads = [
            threading.Thread(target=target, args=(store,), name="hang watchdog", daemon=True) for target in work
        ]
        self._main = threading.main_thread().ident

    def __enter__(self) -> HangWatchdog:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(_ANSWER_S)

    def report(self, step: int, doing: str) -> None:
        """Records the step and activity of this rank, which counts as moving."""
        self._current = (step, doing, time.monotonic())

    def report_phase(self, doing: str) -> None:
        """Records a new activity of this rank in the same step."""
        self.report(self._current[0], doing)

    def _publish(self, store: Store) -> None:
        store.set_timeout(timedelta(seconds=_ANSWER_S))
        while not self._over.is_set():
            try:
                self._publish_once(store)
            except Exception as error:  # any error of a store that is gone; the run itself does not need it
                logger.debug("where this rank is can't be told: %s", error)
            self._over.wait(self._publish_s)

    def _watch(self, store: Store) -> None:
        pause_s = self._publish_s
        while not self._over.wait(pause_s):
            pause_s, current = self._publish_s, self._current
            if time.monotonic() - current[2] <= self._patience_s:
                continue
            answer = self._ask_all(store)
            if self._current is not current or self._over.is_set():
                continue
            if isinstance(answer, Exception):
                self._end(f"  {_UNREADABLE.format(answer)}", speaks=True)
            before, after = answer
            responding = responding_ranks(before, after)
            others = [other.stood_s for rank, other in responding.items() if rank != self._rank]
            left_s = self._patience_s - min(others, default=self._patience_s)
            if (
                left_s > 0
            ):  # a rank that moves will let this one continue, or stop too; no need to ask again before that
                pause_s = max(left_s, self._publish_s)
            else:
                self._end(
                    listing(describe_ranks(before, after)), speaks=self._rank == min(responding, default=self._rank)
                )

    def _publish_once(self, store: Store) -> None:
        step, doing, since = self._current
        self._turn += 1
        line = _line(sys._current_frames().get(self._main or 0))
        status = RankStatus(step, doing, line, time.monotonic() - since, self._turn)
        store.set(_key(self._rank), json.dumps(asdict(status)))

    def _ask_all(self, store: Store) -> tuple[list[RankStatus | None], list[RankStatus | None]] | Exception:
        """Reads all ranks' statuses twice, to detect silent ones; returns the error if they can't be read."""
        answers: queue.Queue[tuple[list[RankStatus | None], list[RankStatus | None]] | Exception] = queue.Queue()

        def read_twice() -> None:
            try:
                before = self._read_all(store)
                time.sleep(3 * self._publish_s)  # three turns, of which a live rank publishes at least one
                answers.put((before, self._read_all(store)))
            except Exception as error:  # any error of a store that is gone
                answers.put(error)

        threading.Thread(target=read_twice, daemon=True).start()
        try:
            return answers.get(timeout=3 * self._publish_s + 2 * _ANSWER_S)
        except queue.Empty:
            return TimeoutError("no answer")

    def _end(self, statuses: str, *, speaks: bool) -> NoReturn:
        """Logs all ranks' statuses and ends the process, since the main thread may never return from its call."""
        if speaks:
            logger.error(
                "no rank has moved for %.0f s (parallel.timeout_s): a rank is missing, or hangs; if one is only slow, "
                "raise parallel.timeout_s. Where they are:\n%s\n"
                "The run ends here and goes on from its last checkpoint (train.resume=auto)",
                self._patience_s,
                statuses,
            )
        else:
            # If this rank left first, the launcher would end the one that logs, which may have asked that much later.
            time.sleep(_ANSWER_S / 2 + 4 * self._publish_s)
        os._exit(STUCK)

    def _read_all(self, store: Store) -> list[RankStatus | None]:
        keys = [_key(rank) for rank in range(self._world)]
        if store.check(keys):
            return [_parsed(status) for status in store.multi_get(keys)]
        return [_parsed(store.get(key)) if store.check([key]) else None for key in keys]


def describe_ranks(before: Sequence[RankStatus | None], after: Sequence[RankStatus | None]) -> list[str]:
    """Describes all ranks from two readings: silent ones first, each on a line; others grouped by status."""
    silent = silent_ranks(before, after)
    lines = []
    for rank in silent:
        status = after[rank]
        lines.append(
            f"rank {rank} IS SILENT and has never told where it is"
            if status is None
            else f"rank {rank} IS SILENT; it was at {_described(status)}"
        )
    together: dict[tuple[int, str, str], list[int]] = {}
    for rank, status in enumerate(after):
        if status is not None and rank not in silent:
            together.setdefault((status.step, status.doing, status.line), []).append(rank)
    for ranks in sorted(together.values()):
        status = after[ranks[0]]
        assert status is not None
        lines.append(f"{_ranks(ranks)} at {_described(status)}, for {status.stood_s:.0f} s")
    return lines


def silent_ranks(before: Sequence[RankStatus | None], after: Sequence[RankStatus | None]) -> list[int]:
    """Ranks that have published nothing between two readings."""
    responding = responding_ranks(before, after)
    return [rank for rank in range(len(after)) if rank not in responding]


def responding_ranks(before: Sequence[RankStatus | None], after: Sequence[RankStatus | None]) -> dict[int, RankStatus]:
    """Statuses, from the second reading, of the ranks that have published something between two readings."""
    return {
        rank: second
        for rank, (first, second) in enumerate(zip(before, after, strict=True))
        if second is not None and (first is None or first.turn != second.turn)
    }


def _parsed(status: bytes) -> RankStatus:
    return RankStatus(**json.loads(status))


def _described(status: RankStatus) -> str:
    return f"step {status.step}, {status.doing} ({status.line})"


def _ranks(ranks: Sequence[int]) -> str:
    """Formats ranks as `rank 3` or `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank {words}" if len(ranks) == 1 else f"ranks {words}"


def _line(frame: FrameType | None) -> str:
    """The innermost function of a stack, and the innermost line of it outside of torch."""
    if frame is None:
        return "no main thread"
    innermost = frame.f_code.co_name
    while "torch" in Path(frame.f_code.co_filename).parts and frame.f_back is not None:
        frame = frame.f_back
    file = "/".join(Path(frame.f_code.co_filename).parts[-2:])
    return f"{innermost}, {file}:{frame.f_lineno}"


def _key(rank: int) -> str:
    return f"megadpo/place/{rank}"
