"""A microbatch's stream against one written out by hand, and the invariants that tie rows to tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megadpo.data.batch import PreferenceBatch, build_batch, stream_length
from megadpo.data.tokenization import TokenizedPair
from megadpo.models.attention_plan import AttentionPlan, Segment
from tests.helpers.plans import packed_plan


def pair(index: int, prompt: list[int], chosen: list[int], rejected: list[int]) -> TokenizedPair:
    return TokenizedPair(index, *(np.array(ids, dtype=np.int32) for ids in (prompt, chosen, rejected)))


PAIRS = [pair(31, [10, 11], [12], [13, 14]), pair(4, [20], [21, 22], [23])]
# stream:  10 11 12 | 10 11 13 14 | 20 21 22 | 20 23   (pair 31: chosen, rejected; pair 4: chosen, rejected)
# row:      0  1  2    3  4  5  6    7  8  9   10 11


def test_stream_of_two_pairs() -> None:
    batch = build_batch(PAIRS, num_tokens=12, pad_token_id=0, share_prompt=False)
    assert batch.tokens_1T.tolist() == [[10, 11, 12, 10, 11, 13, 14, 20, 21, 22, 20, 23]]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 0, 1]
    assert batch.plan == packed_plan([3, 4, 3, 2])
    assert batch.response_rows_N.tolist() == [1, 4, 5, 7, 8, 10]
    assert batch.targets_N.tolist() == [12, 13, 14, 21, 22, 23]
    assert batch.sequence_index_N.tolist() == [0, 2, 2, 1, 1, 3]  # chosen of pair i is i, rejected is 2 + i
    assert batch.response_tokens_S.tolist() == [1, 2, 2, 1]
    assert batch.pair_indices == (31, 4)
    assert batch.num_pairs == 2


# shared:  10 11 12 13 14 | 20 21 22 23   (pair 31: prompt chosen · rejected; pair 4: prompt chosen · rejected)
# row:      0  1  2  3  4    5  6  7  8


def test_stream_of_two_pairs_with_shared_prompts() -> None:
    batch = build_batch(PAIRS, num_tokens=9, pad_token_id=0, share_prompt=True)
    assert batch.tokens_1T.tolist() == [[10, 11, 12, 13, 14, 20, 21, 22, 23]]
    assert batch.positions_T.tolist() == [0, 1, 2, 2, 3, 0, 1, 2, 1]
    assert batch.plan == AttentionPlan(
        9,
        (
            Segment(0, 3, ((0, 3),)),
            Segment(3, 5, ((0, 2), (3, 5))),
            Segment(5, 8, ((5, 8),)),
            Segment(8, 9, ((5, 6), (8, 9))),
        ),
    )
    assert batch.response_rows_N.tolist() == [1, 1, 3, 5, 6, 5]  # the prompt's last row predicts both first tokens
    assert batch.targets_N.tolist() == [12, 13, 14, 21, 22, 23]
    assert batch.sequence_index_N.tolist() == [0, 2, 2, 1, 1, 3]
    assert batch.response_tokens_S.tolist() == [1, 2, 2, 1]
    assert batch.pair_indices == (31, 4)


@pytest.mark.parametrize("share_prompt", [False, True])
def test_indices_are_long(share_prompt: bool) -> None:
    batch = build_batch(PAIRS, num_tokens=12, pad_token_id=0, share_prompt=share_prompt)
    for name in ("tokens_1T", "positions_T", "response_rows_N", "targets_N", "sequence_index_N", "response_tokens_S"):
        assert getattr(batch, name).dtype is torch.int64, name


def test_padding_is_a_tail_of_its_own() -> None:
    """The tail sees itself alone, is seen by nobody, and is never scored."""
    exact = build_batch(PAIRS, num_tokens=12, pad_token_id=99, share_prompt=False)
    batch = build_batch(PAIRS, num_tokens=15, pad_token_id=99, share_prompt=False)
    assert batch.tokens_1T.tolist() == [[*exact.tokens_1T[0].tolist(), 99, 99, 99]]
    assert batch.positions_T.tolist() == [*exact.positions_T.tolist(), 0, 1, 2]
    assert batch.plan == packed_plan([3, 4, 3, 2, 3])
    for name in ("response_rows_N", "targets_N", "sequence_index_N", "response_tokens_S"):
        assert torch.equal(getattr(batch, name), getattr(exact, name)), name


def test_a_long_tail_attends_in_short_segments() -> None:
    """Each sees itself alone: nobody reads what padding attends to, and over 200 rows at once it costs the square."""
    batch = build_batch(PAIRS, num_tokens=12 + 200, pad_token_id=99, share_prompt=False)
    assert batch.plan == packed_plan([3, 4, 3, 2, 64, 64, 64, 8])
    assert batch.tokens_1T[0, 12:].tolist() == [99] * 200


def test_a_filler_is_all_padding() -> None:
    batch = build_batch([], num_tokens=4, pad_token_id=7, share_prompt=True)
    assert batch.tokens_1T.tolist() == [[7, 7, 7, 7]]
    assert batch.plan == packed_plan([4])
    assert batch.num_pairs == 0
    for tensor in (batch.response_rows_N, batch.targets_N, batch.sequence_index_N, batch.response_tokens_S):
        assert tensor.shape == (0,)
        assert tensor.dtype is torch.int64


def test_more_tokens_than_the_stream_holds_are_refused() -> None:
    with pytest.raises(ValueError, match="12 tokens do not fit a stream of 11"):
        build_batch(PAIRS, num_tokens=11, pad_token_id=0, share_prompt=False)
    with pytest.raises(ValueError, match="9 tokens do not fit a stream of 8"):
        build_batch(PAIRS, num_tokens=8, pad_token_id=0, share_prompt=True)


def test_a_pair_takes_its_prompt_once_or_twice() -> None:
    assert [stream_length(p, share_prompt=False) for p in PAIRS] == [7, 5]
    assert [stream_length(p, share_prompt=True) for p in PAIRS] == [5, 4]


def test_moving_keeps_everything() -> None:
    batch = build_batch(PAIRS, num_tokens=15, pad_token_id=0, share_prompt=False)
    moved = batch.to(torch.device("meta"))
    assert (moved.plan, moved.pair_indices) == (batch.plan, batch.pair_indices)
    for name in PreferenceBatch.__dataclass_fields__:
        if isinstance(getattr(batch, name), torch.Tensor):
            assert getattr(moved, name).device.type == "meta", name
            assert getattr(moved, name).shape == getattr(batch, name).shape, name
            assert torch.equal(getattr(batch.to(torch.device("cpu")), name), getattr(batch, name)), name


ids = st.lists(st.integers(1, 500), min_size=1, max_size=6)


def visible_history(batch: PreferenceBatch, row: int) -> list[tuple[int, int]]:
    """(token, position) of every key that a row sees, itself last."""
    (segment,) = (s for s in batch.plan.segments if s.start <= row < s.stop)
    *before, (start, _) = segment.key_ranges
    keys = [key for span in before for key in range(*span)] + list(range(start, row + 1))
    return [(int(batch.tokens_1T[0, key]), int(batch.positions_T[key])) for key in keys]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(ids, ids, ids), max_size=5), st.integers(0, 3), st.booleans())
def test_each_row_predicts_its_target_from_all_that_stands_before_it(
    contents: list[tuple[list[int], ...]], padding: int, share_prompt: bool
) -> None:
    """Every response token comes once, predicted by a row that sees the prompt and the response so far, in place."""
    pairs = [pair(i, *content) for i, content in enumerate(contents)]
    length = sum(stream_length(p, share_prompt=share_prompt) for p in pairs)
    batch = build_batch(pairs, num_tokens=length + padding, pad_token_id=0, share_prompt=share_prompt)
    prompts = [p.prompt.tolist() for p in pairs] * 2
    responses = [p.chosen.tolist() for p in pairs] + [p.rejected.tolist() for p in pairs]
    pair_by_pair = [sequence for i in range(len(pairs)) for sequence in (i, len(pairs) + i)]
    assert batch.sequence_index_N.unique_consecutive().tolist() == pair_by_pair
    for sequence, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        own = batch.sequence_index_N == sequence
        assert batch.targets_N[own].tolist() == response
        for done, row in enumerate(batch.response_rows_N[own].tolist()):
            before = [*prompt, *response[:done]]
            assert visible_history(batch, row) == list(zip(before, range(len(before)), strict=True))
    assert batch.response_tokens_S.tolist() == [len(response) for response in responses]
    assert len(batch.targets_N) == sum(map(len, responses))
