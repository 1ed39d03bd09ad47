"""Threads that work on many tensors, with a bound on the memory that they hold together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Condition, Event
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def split_evenly(items: Sequence[T], count: int, size: Callable[[T], int]) -> list[list[T]]:
    """Splits the items, in their order, into `count` runs of about the same total size; some may be empty."""
    total = sum(map(size, items))
    runs: list[list[T]] = [[] for _ in range(count)]
    before = 0
    for item in items:
        middle = before + size(item) / 2
        runs[min(count - 1, int(middle * count / total))].append(item)
        before += size(item)
    return runs


def in_threads(work: Callable[[int, Iterator[T]], R], runs: Sequence[Sequence[T]]) -> list[R]:
    """Calls `work(number, items)` for each of the runs, each in its own thread; returns the results in order.

    An error in one thread is raised here; the items of the others then end early.
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
            stop.set()  # an interrupt of the waiting thread also ends the others


class ByteBudget:
    """A limit on the bytes that threads hold together; an item above the limit is held alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._changed = Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Waits until `size` bytes are free, and holds them for the duration of the context."""
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + size <= self._limit)
            self._held += size
        try:
            yield
        finally:
            with self._changed:
                self._held -= size
                self._changed.notify_all()
