"""A microbatch's stream against one written out by hand, and the invariants that tie rows to tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megadpo.attention_plan import packed_plan
from megadpo.data.batch import PreferenceBatch, build_batch, stream_length
from megadpo.data.tokenization import TokenizedPair


def pair(index: int, prompt: list[int], chosen: list[int], rejected: list[int]) -> TokenizedPair:
    return TokenizedPair(index, *(np.array(ids, dtype=np.int32) for ids in (prompt, chosen, rejected)))


PAIRS = [pair(31, [10, 11], [12], [13, 14]), pair(4, [20], [21, 22], [23])]
# stream:  10 11 12 | 10 11 13 14 | 20 21 22 | 20 23   (pair 31: chosen, rejected; pair 4: chosen, rejected)
# row:      0  1  2    3  4  5  6    7  8  9   10 11


def test_stream_of_two_pairs() -> None:
    batch = build_batch(PAIRS, num_tokens=12, pad_token_id=0)
    assert batch.tokens_1T.tolist() == [[10, 11, 12, 10, 11, 13, 14, 20, 21, 22, 20, 23]]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 0, 1]
    assert batch.plan == packed_plan([3, 4, 3, 2])
    assert batch.response_rows_N.tolist() == [1, 4, 5, 7, 8, 10]
    assert batch.targets_N.tolist() == [12, 13, 14, 21, 22, 23]
    assert batch.sequence_index_N.tolist() == [0, 2, 2, 1, 1, 3]  # chosen of pair i is i, rejected is 2 + i
    assert batch.response_tokens_S.tolist() == [1, 2, 2, 1]
    assert batch.pair_indices == (31, 4)
    assert batch.num_pairs == 2


def test_indices_are_long() -> None:
    batch = build_batch(PAIRS, num_tokens=12, pad_token_id=0)
    for name in ("tokens_1T", "positions_T", "response_rows_N", "targets_N", "sequence_index_N", "response_tokens_S"):
        assert getattr(batch, name).dtype is torch.int64, name


def test_padding_is_a_tail_of_its_own() -> None:
    """The tail sees itself alone, is seen by nobody, and is never scored."""
    exact = build_batch(PAIRS, num_tokens=12, pad_token_id=99)
    batch = build_batch(PAIRS, num_tokens=15, pad_token_id=99)
    assert batch.tokens_1T.tolist() == [[*exact.tokens_1T[0].tolist(), 99, 99, 99]]
    assert batch.positions_T.tolist() == [*exact.positions_T.tolist(), 0, 1, 2]
    assert batch.plan == packed_plan([3, 4, 3, 2, 3])
    for name in ("response_rows_N", "targets_N", "sequence_index_N", "response_tokens_S"):
        assert torch.equal(getattr(batch, name), getattr(exact, name)), name


def test_a_filler_is_all_padding() -> None:
    batch = build_batch([], num_tokens=4, pad_token_id=7)
    assert batch.tokens_1T.tolist() == [[7, 7, 7, 7]]
    assert batch.plan == packed_plan([4])
    assert batch.num_pairs == 0
    for tensor in (batch.response_rows_N, batch.targets_N, batch.sequence_index_N, batch.response_tokens_S):
        assert tensor.shape == (0,)
        assert tensor.dtype is torch.int64


def test_more_tokens_than_the_stream_holds_are_refused() -> None:
    with pytest.raises(ValueError, match="12 tokens do not fit a stream of 11"):
        build_batch(PAIRS, num_tokens=11, pad_token_id=0)


def test_a_pair_takes_its_prompt_twice() -> None:
    assert [stream_length(p) for p in PAIRS] == [7, 5]


def test_moving_keeps_everything() -> None:
    batch = build_batch(PAIRS, num_tokens=15, pad_token_id=0)
    moved = batch.to(torch.device("meta"))
    assert (moved.plan, moved.pair_indices) == (batch.plan, batch.pair_indices)
    for name in PreferenceBatch.__dataclass_fields__:
        if isinstance(getattr(batch, name), torch.Tensor):
            assert getattr(moved, name).device.type == "meta", name
            assert getattr(moved, name).shape == getattr(batch, name).shape, name
            assert torch.equal(getattr(batch.to(torch.device("cpu")), name), getattr(batch, name)), name


ids = st.lists(st.integers(1, 500), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(ids, ids, ids), max_size=5), st.integers(0, 3))
def test_each_row_predicts_its_target(contents: list[tuple[list[int], ...]], padding: int) -> None:
    """The row after a response row holds the row's target, in the same sequence; every response token comes once."""
    pairs = [pair(i, *content) for i, content in enumerate(contents)]
    length = sum(map(stream_length, pairs))
    batch = build_batch(pairs, num_tokens=length + padding, pad_token_id=0)
    assert torch.equal(batch.tokens_1T[0, batch.response_rows_N + 1], batch.targets_N)
    assert torch.equal(batch.positions_T[batch.response_rows_N] + 1, batch.positions_T[batch.response_rows_N + 1])
    responses = [p.chosen.tolist() for p in pairs] + [p.rejected.tolist() for p in pairs]
    for sequence, response in enumerate(responses):
        assert batch.targets_N[batch.sequence_index_N == sequence].tolist() == response
    assert batch.response_tokens_S.tolist() == [len(response) for response in responses]
    assert len(batch.targets_N) == sum(map(len, responses))
    for segment in batch.plan.segments:
        assert batch.positions_T[segment.start : segment.stop].tolist() == list(range(segment.stop - segment.start))
