"""Prefetched items are the same items; errors come where their item was asked for; no thread is left."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from megadpo.data.prefetch import prefetched


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_the_same_items_in_order_from_a_thread(count: int, depth: int) -> None:
    makers = set()

    def items() -> Iterator[int]:
        for item in range(count):
            makers.add(threading.current_thread())
            yield item

    with prefetched(items(), depth) as found:
        assert list(found) == list(range(count))
        assert list(found) == []
    assert threading.main_thread() not in makers
    assert threads() == []


@pytest.mark.parametrize("depth", [1, 2])
def test_no_more_than_depth_items_wait(depth: int) -> None:
    """Items are made while the caller works, and as many are ahead as was asked for, no more."""
    made: list[int] = []
    changed = threading.Condition()

    def items() -> Iterator[int]:
        for item in range(10):
            with changed:
                made.append(item)
                changed.notify()
            yield item

    with prefetched(items(), depth) as found:
        for taken in range(5):
            with changed:
                assert changed.wait_for(lambda ahead=taken + depth: len(made) >= ahead, timeout=10)
                assert not changed.wait_for(lambda ahead=taken + depth: len(made) > ahead, timeout=0.05)
            assert next(found) == taken


def test_an_error_comes_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("third")

    with prefetched(items()) as found:
        assert [next(found), next(found)] == [1, 2]
        assert threads() != []
        with pytest.raises(KeyError, match="third"):
            next(found)
    assert threads() == []


def test_leaving_early_or_by_an_error_ends_the_thread() -> None:
    made = []

    def items() -> Iterator[int]:
        for item in range(1000):
            made.append(item)
            yield item

    with prefetched(items()) as found:
        next(found)
    with pytest.raises(RuntimeError, match="elsewhere"), prefetched(items()):
        raise RuntimeError("elsewhere")
    assert threads() == []
    assert len(made) <= 3
