"""Megatron's pipeline schedules as orders of forwards and backwards: what is in flight on a stage, and the bubble."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain


@dataclass(frozen=True, slots=True)
class Work:
    """One microbatch's forward or backward through one of a stage's model chunks."""

    chunk: int
    is_forward: bool


def stage_work(stage: int, *, stages: int, chunks: int, microbatches: int) -> Iterator[Work]:
    """What a stage does in a step, in order: one forward, one backward after a warm-up of forwards.

    With several chunks on a stage (the interleaved schedule) the microbatches are a multiple of the stages.
    """
    if chunks == 1:
        forwards = [0] * microbatches
        warmup = stages - stage - 1
    else:
        forwards = [chunk for _ in range(0, microbatches, stages) for chunk in range(chunks) for _ in range(stages)]
        warmup = 2 * (stages - stage - 1) + (chunks - 1) * stages
    warmup = min(warmup, len(forwards))
    backwards = [chunks - 1 - chunk for chunk in forwards]
    steady = len(forwards) - warmup
    yield from (Work(chunk, True) for chunk in forwards[:warmup])
    pairs = zip(forwards[warmup:], backwards[:steady], strict=True)
    yield from chain.from_iterable((Work(ahead, True), Work(back, False)) for ahead, back in pairs)
    yield from (Work(chunk, False) for chunk in backwards[steady:])


def peak_in_flight(
    work: Iterator[Work], saved: Sequence[int], forward_peaks: Sequence[int], backward_peaks: Sequence[int]
) -> int:
    """The most bytes that a stage's microbatches take at once, from what one of them takes in each chunk.

    A peak includes what its own microbatch has saved.
    """
    live = most = 0
    for item in work:
        own = saved[item.chunk]
        if item.is_forward:
            most = max(most, live + forward_peaks[item.chunk])
            live += own
        else:
            live -= own
            most = max(most, live + backward_peaks[item.chunk])
    return most


def bubble_share(*, stages: int, chunks: int, microbatches: int) -> float:
    """Time that a stage waits at a step's ends, over the time that it works: (stages - 1) / (microbatches x chunks)."""
    return (stages - 1) / (microbatches * chunks)
