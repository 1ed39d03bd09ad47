"""Work on many tensors shared out to threads, with a bound on what they hold at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Condition, Event
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def shares(items: Sequence[T], count: int, size: Callable[[T], int]) -> list[list[T]]:
    """The items in their order, in `count` runs of about the same size together; some may be empty."""
    total = sum(map(size, items))
    runs: list[list[T]] = [[] for _ in range(count)]
    before = 0
    for item in items:
        middle = before + size(item) / 2
        runs[min(count - 1, int(middle * count / total))].append(item)
        before += size(item)
    return runs


def in_threads(work: Callable[[int, Iterator[T]], R], runs: Sequence[Sequence[T]]) -> list[R]:
    """What `work(number, items)` returns for each of the runs, in their order, each in a thread of its own.

    An error in one is raised here; the items of the others then end early.
    """
    stop = Event()

    def items(run: Sequence[T]) -> Iterator[T]:
        for item in run:
            if stop.is_set():
                return
            yield item

    def guarded(number: int, run: Sequence[T]) -> R:
        try:
            return work(number, items(run))
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(max(1, len(runs))) as pool:
        try:
            return [future.result() for future in [pool.submit(guarded, *run) for run in enumerate(runs)]]
        finally:
            stop.set()  # an interrupt of the waiting thread ends the others too


class ByteBudget:
    """So many bytes that threads may hold together; what is larger is held alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._changed = Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Waits for room; it is free again after the context."""
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + size <= self._limit)
            self._held += size
        try:
            yield
        finally:
            with self._changed:
                self._held -= size
                self._changed.notify_all()
