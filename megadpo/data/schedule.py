"""Assigns pairs to microbatches and data-parallel ranks: a pure function of their lengths.

The bins depend on the lengths and the token budget only, never on the layout, so every layout computes the same
microbatches and only their order of summation differs. Every rank computes the whole schedule, so the longest stream of
a step is known everywhere and pipeline messages have one shape per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Bin = tuple[int, ...]

# Bins are evened out to within 1/this of the budget; every doubling costs one more packing.
_EVENNESS = 64


@dataclass(frozen=True, slots=True)
class StepSchedule:
    """Microbatches of one step: `bins_by_rank[rank]` holds a data-parallel rank's bins of pair positions.

    All ranks have the same number of bins; empty ones are fillers that keep the collectives in step. `stream_tokens` is
    the length of the step's longest microbatch, before any rounding.
    """

    bins_by_rank: tuple[tuple[Bin, ...], ...]
    stream_tokens: int


def pack_pairs(lengths: Sequence[int], budget: int) -> list[Bin]:
    """Packs positions 0…n−1 into bins of at most `budget` tokens: as few as by first fit, and of about equal length.

    Under a pipeline every stream of a step is padded to the longest, so a full bin beside a nearly empty one costs as
    much as two full ones. A pair longer than the budget gets a bin of its own. Bins are sorted by their first position,
    and the positions in each bin are sorted too.
    """
    bins = _first_fit(lengths, budget)
    fitting = [length for length in lengths if length <= budget]
    if not fitting:
        return bins
    shared = len(bins) - (len(lengths) - len(fitting))
    least, most = max(max(fitting), -(-sum(fitting) // shared)), budget
    while most - least > budget // _EVENNESS:
        limit = (least + most) // 2
        evener = _first_fit(lengths, limit)
        if len(evener) <= len(bins):
            bins, most = evener, limit
        else:
            least = limit + 1
    return bins


def _first_fit(lengths: Sequence[int], limit: int) -> list[Bin]:
    """Packs bins of at most `limit` tokens, or of one longer pair: longest first, each into the first bin with room."""
    bins: list[list[int]] = []
    room: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[position]
        fit = next((b for b, free in enumerate(room) if length <= free), None)
        if fit is None:
            bins.append([position])
            room.append(max(0, limit - length))
        else:
            bins[fit].append(position)
            room[fit] -= length
    return sorted(tuple(sorted(members)) for members in bins)


def assign_to_ranks(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Assigns positions 0…n−1 to `ranks`, n // ranks or one more to each, so that the total costs are about equal.

    The costliest come first, each to the rank with the lowest total so far (ties: the first rank) that may take another
    one. A rank's positions are sorted.
    """
    least, larger_hands = divmod(len(costs), ranks)
    hands: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for position in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        room = least + (larger_hands > 0)
        rank = min((r for r in range(ranks) if len(hands[r]) < room), key=lambda r: (totals[r], r))
        larger_hands -= len(hands[rank]) == least
        hands[rank].append(position)
        totals[rank] += costs[position]
    return [sorted(hand) for hand in hands]


def schedule_step(
    lengths: Sequence[int],
    costs: Sequence[int],
    *,
    budget: int,
    data_parallel: int,
    microbatch_multiple: int = 1,
) -> StepSchedule:
    """Schedules one global batch: assigns bins to `data_parallel` ranks by cost, and adds empty ones.

    `costs` are the pairs' FLOPs, in any unit. The number of a rank's microbatches is a multiple of
    `microbatch_multiple` (the interleaved pipeline schedule needs a multiple of the pipeline size), and at least one.
    """
    bins = pack_pairs(lengths, budget)
    per_rank = max(1, -(-len(bins) // data_parallel))
    per_rank = -(-per_rank // microbatch_multiple) * microbatch_multiple
    hands = assign_to_ranks([sum(costs[i] for i in members) for members in bins], data_parallel)
    dealt = [[bins[position] for position in hand] for hand in hands]
    return StepSchedule(
        bins_by_rank=tuple(tuple(own) + ((),) * (per_rank - len(own)) for own in dealt),
        stream_tokens=max((sum(lengths[i] for i in members) for members in bins), default=0),
    )
