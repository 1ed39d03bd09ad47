"""An attention plan holds what a kernel relies on: every row in one segment, every segment's keys in its past."""

from __future__ import annotations

import pytest

from megadpo.models.attention_plan import AttentionPlan, Segment


def num_keys(segment: Segment) -> int:
    """Keys that the segment's last query sees."""
    return sum(stop - start for start, stop in segment.key_ranges)


def causal(start: int, stop: int) -> Segment:
    """A segment that sees itself alone."""
    return Segment(start, stop, key_ranges=((start, stop),))


def test_shared_prompt() -> None:
    """prompt [0, 4) · chosen [4, 7) in one segment; rejected [7, 9) over the prompt and itself."""
    plan = AttentionPlan(9, (causal(0, 7), Segment(7, 9, key_ranges=((0, 4), (7, 9)))))
    assert [num_keys(segment) for segment in plan.segments] == [7, 6]


def test_the_last_range_may_begin_before_the_queries() -> None:
    """A response cut in two: its second half sees the first half as part of its own causal range."""
    plan = AttentionPlan(9, (causal(0, 7), Segment(7, 8, ((0, 4), (7, 8))), Segment(8, 9, ((0, 4), (7, 9)))))
    assert num_keys(plan.segments[-1]) == 6


@pytest.mark.parametrize(
    ("num_tokens", "segments", "message"),
    [
        pytest.param(4, (causal(1, 4),), "does not continue the plan at row 0", id="does not begin at row 0"),
        pytest.param(4, (causal(0, 2), causal(3, 4)), "does not continue the plan at row 2", id="gap"),
        pytest.param(4, (causal(0, 3), causal(2, 4)), "does not continue the plan at row 3", id="overlap"),
        pytest.param(4, (causal(2, 4), causal(0, 2)), "does not continue the plan at row 0", id="order"),
        pytest.param(2, (causal(0, 2), Segment(2, 2, ((0, 2),))), "does not continue", id="segment without rows"),
        pytest.param(5, (causal(0, 4),), "covers 4 of 5 rows", id="rows without a segment"),
        pytest.param(3, (causal(0, 4),), "covers 4 of 3 rows", id="more rows than tokens"),
        pytest.param(1, (), "covers 0 of 1 rows", id="no segment"),
        pytest.param(4, (causal(0, 2), Segment(2, 4, ((0, 5),))), "not aligned", id="keys of the future"),
        pytest.param(4, (Segment(0, 4, ((-1, 4),)),), "empty, overlap or descend", id="keys before the stream"),
        pytest.param(4, (causal(0, 2), Segment(2, 4, ((1, 1), (2, 4)))), "empty, overlap or descend", id="empty range"),
        pytest.param(4, (causal(0, 2), Segment(2, 4, ((0, 3),))), "not aligned", id="last row can't see itself"),
        pytest.param(4, (causal(0, 2), Segment(2, 4, ((3, 4),))), "not aligned", id="first row sees nothing"),
        pytest.param(4, (causal(0, 2), Segment(2, 4, ((2, 4), (0, 2)))), "descend", id="own range not last"),
        pytest.param(5, (causal(0, 2), Segment(2, 5, ((0, 2), (0, 5)))), "overlap", id="keys counted twice"),
        pytest.param(5, (causal(0, 2), Segment(2, 5, ((0, 3), (3, 5)))), "see their future", id="early range too long"),
        pytest.param(2, (Segment(0, 2, ()),), "not aligned", id="no keys"),
    ],
)
def test_a_broken_plan_is_refused(num_tokens: int, segments: tuple[Segment, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionPlan(num_tokens, segments)
