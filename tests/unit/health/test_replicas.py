"""Hashes that see every bit, and who is named where ranks hold different ones."""

from __future__ import annotations

import pytest
import torch

from megadpo.health.replicas import RankHashes, bits_hash, differing_ranks

ODD = torch.arange(1, 128, 2)  # blocks of 64 words


def value(tensor: torch.Tensor) -> int:
    return int(bits_hash(tensor, ODD))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 100), (7,), (64, 5)])
def test_a_flipped_bit_changes_the_hash(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Every bit of every element, beyond a block too: the hashes of all are different, and back again."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    words = tensor.view(-1).view(torch.int32 if dtype is torch.float32 else torch.int16)
    whole = value(tensor)
    missed = 0
    for place in range(0, len(words), 1 + len(words) // 40):
        for bit in range(8 * words.element_size()):
            flipped = torch.tensor(1, dtype=words.dtype) << bit
            words[place] ^= flipped
            missed += value(tensor) == whole
            words[place] ^= flipped
    assert (value(tensor), missed) == (whole, 0)


def test_signs_zeros_nan_and_order_count() -> None:
    zero, nan = torch.zeros(70), torch.full((70,), torch.nan)
    assert value(zero) != value(-zero)
    assert value(nan) == value(nan.clone())
    two = zero.clone()
    two[[3, 66]] = -0.0  # two sign bits, which a sum of bits would lose
    assert len({value(zero), value(two), value(torch.arange(70.0)), value(torch.arange(70.0).flip(0))}) == 4


def test_views_at_odd_places_hash_as_copies() -> None:
    """Parameters are views of a buffer: those of bf16 at an odd element can't be looked at as 32-bit words."""
    buffer = torch.randn(101, generator=torch.Generator().manual_seed(1)).bfloat16()
    even, odd = buffer[2:40], buffer[3:40]
    assert value(even) == value(even.clone())
    before = value(odd)
    odd[5] = -odd[5]
    assert value(odd) != before


def held(tensor: int, pipeline: int, data: int, *, w: int = 1, norm: int = 2, tied: int | None = None) -> RankHashes:
    own = {"w": 10 * tensor + w}
    return RankHashes(tensor, pipeline, data, own, {"norm": norm}, {} if tied is None else {"tied": tied})


def test_ranks_that_agree_are_not_named() -> None:
    assert differing_ranks([held(t, p, d, tied=5) for t in (0, 1) for p in (0, 1) for d in (0, 1)]) == {}


def test_one_of_three_is_named_by_the_other_two() -> None:
    assert differing_ranks([held(0, 0, 0, w=7), held(0, 0, 1), held(0, 0, 2)]) == {0: {"w": 1}}


def test_of_two_the_second_is_named() -> None:
    assert differing_ranks([held(0, 0, 0, w=7), held(0, 0, 1)]) == {1: {"w": 0}}


def test_a_norm_is_compared_over_tensor_and_data_ranks() -> None:
    ranks = [held(t, 0, d, norm=9 if (t, d) == (1, 0) else 2) for d in (0, 1) for t in (0, 1)]
    assert differing_ranks(ranks) == {1: {"norm": 0}}
    drifted = [held(t, 0, d, norm=9 if t == 1 else 2) for d in (0, 1) for t in (0, 1)]  # with all its data peers
    assert differing_ranks(drifted) == {1: {"norm": 0}, 3: {"norm": 0}}


def test_a_tied_embedding_is_compared_between_outer_stages() -> None:
    ranks = [held(0, 0, 0, tied=5), held(0, 1, 0, w=3, norm=4), held(0, 2, 0, w=8, norm=6, tied=7)]
    assert differing_ranks(ranks) == {2: {"tied": 0}}
