"""Megatron's pipeline schedules as sequences of forwards and backwards; microbatches in flight, and the bubble."""

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
    """The work of a stage in a step, in order: after a warm-up of forwards, one forward and one backward in turn.

    With several chunks on a stage (the interleaved schedule) the number of microbatches is a multiple of the stages.
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
    """Peak of the bytes of a stage's microbatches, from the bytes of one microbatch in each chunk.

    The given peaks include what their own microbatch has saved.
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
    """Ratio of a stage's waiting time in a step to its working time: (stages - 1) / (microbatches x chunks)."""
    return (stages - 1) / (microbatches * chunks)
