"""Prefetches items in a thread while the caller works on earlier ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


@contextmanager
def prefetched(items: Iterable[Item], depth: int = 1) -> Iterator[Iterator[Item]]:
    """Yields an iterator over the same items, of which the next `depth` are computed in a thread; a context manager.

    The thread starts at once. An error of `items` is raised when its item is asked for. The thread has ended when the
    context is left in any way; an item that is being computed then is waited for.
    """
    source = iter(items)
    end = object()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:

        def make_next() -> Future[Item | object]:
            return pool.submit(next, source, end)

        waiting = deque(make_next() for _ in range(depth))

        def in_order() -> Iterator[Item]:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(make_next())
                yield item  # type: ignore[misc]

        try:
            yield in_order()
        finally:
            pool.shutdown(cancel_futures=True)
