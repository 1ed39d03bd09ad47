"""The schedule of a step: pairs into bins by length alone, bins to ranks so that all of them run equally many."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadpo.data.schedule import assign_to_ranks, pack_pairs, schedule_step

LENGTHS = st.lists(st.integers(1, 60), max_size=40)
BUDGETS = st.integers(1, 100)
RANKS = st.integers(1, 7)
MULTIPLES = st.integers(1, 5)
quick = settings(max_examples=150, deadline=None, derandomize=True)


@quick
@given(LENGTHS, BUDGETS)
def test_every_pair_is_in_one_bin_that_keeps_the_budget(lengths: list[int], budget: int) -> None:
    bins = pack_pairs(lengths, budget)
    assert sorted(position for members in bins for position in members) == list(range(len(lengths)))
    assert bins == sorted(bins)
    for members in bins:
        assert members == tuple(sorted(members))
        tokens = sum(lengths[i] for i in members)
        assert tokens <= budget or len(members) == 1


@quick
@given(LENGTHS, BUDGETS)
def test_bins_are_more_than_half_full(lengths: list[int], budget: int) -> None:
    """First fit opens no bin that an earlier one had room for, so any two of its bins exceed the budget together."""
    bins = [members for members in pack_pairs(lengths, budget) if sum(lengths[i] for i in members) <= budget]
    tokens = sum(lengths[i] for members in bins for i in members)
    assert len(bins) < 2 or len(bins) * budget < 2 * tokens


@pytest.mark.parametrize(
    ("lengths", "budget", "totals"),
    [
        ([1] * 8, 6, [4, 4]),
        ([1] * 8, 7, [4, 4]),
        ([30] * 10, 100, [30, 90, 90, 90]),
        ([50, 30, 20, 20, 10, 10], 120, [70, 70]),
        ([500, 50, 30, 20, 20, 10, 10], 120, [70, 70, 500]),  # the one over the budget changes nothing for the others
        ([70, 10, 10], 100, [90]),
    ],
)
def test_bins_are_evened_out(lengths: list[int], budget: int, totals: list[int]) -> None:
    """Streams of a pipeline's step are padded to the longest."""
    assert sorted(sum(lengths[i] for i in members) for members in pack_pairs(lengths, budget)) == totals


@quick
@given(LENGTHS, BUDGETS, RANKS, MULTIPLES)
def test_the_layout_deals_the_same_bins(lengths: list[int], budget: int, ranks: int, multiple: int) -> None:
    schedule = schedule_step(lengths, lengths, budget=budget, data_parallel=ranks, microbatch_multiple=multiple)
    dealt = sorted(members for bins in schedule.bins_by_rank for members in bins if members)
    assert dealt == pack_pairs(lengths, budget)


@quick
@given(LENGTHS, BUDGETS, RANKS, MULTIPLES)
def test_every_rank_runs_equally_many(lengths: list[int], budget: int, ranks: int, multiple: int) -> None:
    schedule = schedule_step(lengths, lengths, budget=budget, data_parallel=ranks, microbatch_multiple=multiple)
    count = len(schedule.bins_by_rank[0])
    assert [len(bins) for bins in schedule.bins_by_rank] == [count] * ranks
    assert count >= 1
    assert count % multiple == 0
    # No more fillers than the multiple asks for, spread over the ranks, each rank's at its end.
    assert (count - multiple) * ranks < max(1, len(pack_pairs(lengths, budget)))
    real = [sum(map(bool, bins)) for bins in schedule.bins_by_rank]
    assert max(real) - min(real) <= 1
    assert all(not any(bins[n:]) for bins, n in zip(schedule.bins_by_rank, real, strict=True))


@quick
@given(LENGTHS, BUDGETS, RANKS)
def test_longest_stream(lengths: list[int], budget: int, ranks: int) -> None:
    schedule = schedule_step(lengths, lengths, budget=budget, data_parallel=ranks)
    streams = [sum(lengths[i] for i in members) for bins in schedule.bins_by_rank for members in bins]
    assert schedule.stream_tokens == max(streams)


@pytest.mark.parametrize(
    ("lengths", "budget", "bins"),
    [
        ([5, 3, 4, 2], 7, [(0, 3), (1, 2)]),
        ([5, 3, 4, 2], 14, [(0, 1, 2, 3)]),
        ([5, 3, 4, 2], 1, [(0,), (1,), (2,), (3,)]),
        ([4, 4, 4], 8, [(0, 1), (2,)]),  # ties go by position
        ([9, 3, 4], 7, [(0,), (1, 2)]),  # longer than the budget: alone
        ([1, 2, 3, 9], 7, [(0, 1, 2), (3,)]),
        ([2, 6, 6, 2], 8, [(0, 1), (2, 3)]),  # the first bin with room, not the last
        ([], 7, []),
    ],
)
def test_bins_of_a_few_batches(lengths: list[int], budget: int, bins: list[tuple[int, ...]]) -> None:
    assert pack_pairs(lengths, budget) == bins


@quick
@given(st.lists(st.integers(0, 1000), max_size=40), RANKS)
def test_hands_are_equal_in_number_and_alike_in_cost(costs: list[int], ranks: int) -> None:
    hands = assign_to_ranks(costs, ranks)
    assert sorted(position for hand in hands for position in hand) == list(range(len(costs)))
    sizes = [len(hand) for hand in hands]
    assert max(sizes) - min(sizes) <= 1
    totals = [sum(costs[i] for i in hand) for hand in hands]
    assert max(totals) - min(totals) <= max(costs, default=0)  # no more apart than one bin weighs


def test_the_costliest_go_first_to_whoever_has_least() -> None:
    assert assign_to_ranks([1, 7, 5, 6, 2, 3], 2) == [[1, 4, 5], [0, 2, 3]]
    assert assign_to_ranks([3, 3, 3], 2) == [[0, 2], [1]]
    assert assign_to_ranks([9], 3) == [[0], [], []]


def test_bins_are_dealt_by_cost_and_made_by_length() -> None:
    schedule = schedule_step([9, 9, 2, 2], [1, 5, 3, 3], budget=9, data_parallel=2)
    assert schedule.bins_by_rank == (((2, 3), ()), ((0,), (1,)))
    assert schedule.stream_tokens == 9


def test_fillers_make_up_the_multiple() -> None:
    schedule = schedule_step([5, 5, 9], [5, 5, 9], budget=5, data_parallel=2, microbatch_multiple=4)
    assert schedule.bins_by_rank == (((2,), (), (), ()), ((0,), (1,), (), ()))
    assert schedule.stream_tokens == 9


def test_a_batch_smaller_than_the_ranks_leaves_fillers() -> None:
    assert schedule_step([5], [5], budget=5, data_parallel=3).bins_by_rank == (((0,),), ((),), ((),))
