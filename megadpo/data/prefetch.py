"""Items made in a thread while the caller works on the ones before."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


@contextmanager
def prefetched(items: Iterable[Item], depth: int = 1) -> Iterator[Iterator[Item]]:
    """An iterator over the same items, the next `depth` of which are made in a thread; for use in a `with`.

    Making begins at once. What `items` raises is raised where its item was asked for. The thread is gone when the
    context is left, however it is left; an item that is being made then is waited for.
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
