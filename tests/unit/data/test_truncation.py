"""What is kept of pairs over the length limit, counted by hand and against a rule applied pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadpo.data.truncation import Cut, Outcome, cut_to_length


def cut(lengths: list[tuple[int, int, int]], max_length: int, mode: str) -> Cut:
    prompt, chosen, rejected = (np.array(column, dtype=np.int32) for column in zip(*lengths, strict=True))
    return cut_to_length(prompt, chosen, rejected, max_length=max_length, mode=mode)


def kept(lengths: tuple[int, int, int], max_length: int, mode: str) -> tuple[int, int, int] | Outcome:
    """(prompt, chosen, rejected) tokens that are left of a pair, or why it is dropped."""
    result = cut([lengths], max_length, mode)
    if result.outcome_n[0] != Outcome.KEPT:
        return Outcome(int(result.outcome_n[0]))
    return lengths[0] - int(result.prompt_skip_n[0]), int(result.chosen_n[0]), int(result.rejected_n[0])


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [
        (20, (5, 4, 9)),
        (14, (5, 4, 9)),
        (13, (5, 4, 8)),
        (8, (5, 3, 3)),
        (6, (5, 1, 1)),
        (5, Outcome.LONG_PROMPT),
        (4, Outcome.LONG_PROMPT),
    ],
)
def test_keep_start_cuts_responses_and_drops_a_prompt_that_reaches_the_limit(max_length: int, expected: object) -> None:
    assert kept((5, 4, 9), max_length, "keep_start") == expected


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [
        (14, (5, 4, 9)),
        (13, (4, 4, 9)),  # what the longer response needs, once for both
        (10, (1, 4, 9)),
        (9, Outcome.LONG_RESPONSE),  # no prompt token would be left to predict the first response token
    ],
)
def test_keep_end_takes_from_the_prompt_what_the_longer_response_needs(max_length: int, expected: object) -> None:
    assert kept((5, 4, 9), max_length, "keep_end") == expected


@pytest.mark.parametrize("mode", ["drop", "error"])
def test_other_modes_cut_nothing(mode: str) -> None:
    assert kept((5, 4, 9), 14, mode) == (5, 4, 9)
    assert kept((5, 4, 9), 13, mode) == Outcome.TOO_LONG


@pytest.mark.parametrize("mode", ["keep_start", "keep_end", "drop"])
def test_a_response_without_tokens_drops_the_pair(mode: str) -> None:
    assert kept((5, 0, 9), 20, mode) == Outcome.EMPTY_RESPONSE
    assert kept((5, 3, 0), 20, mode) == Outcome.EMPTY_RESPONSE


@given(
    lengths=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12), st.integers(0, 12)), min_size=1),
    max_length=st.integers(2, 20),
    mode=st.sampled_from(["keep_start", "keep_end", "drop"]),
)
def test_what_is_kept_fits_and_a_pair_does_not_depend_on_its_neighbours(
    lengths: list[tuple[int, int, int]], max_length: int, mode: str
) -> None:
    together = cut(lengths, max_length, mode)
    for i, own in enumerate(lengths):
        alone = kept(own, max_length, mode)
        if isinstance(alone, Outcome):
            assert together.outcome_n[i] == alone
            continue
        prompt, chosen, rejected = alone
        assert prompt >= 1 and min(chosen, rejected) >= 1 and prompt + max(chosen, rejected) <= max_length
        assert (own[0] - together.prompt_skip_n[i], together.chosen_n[i], together.rejected_n[i]) == alone
        if own[0] + max(own[1:]) <= max_length:
            assert alone == own
