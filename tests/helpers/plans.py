"""Attention plans that tests compare with."""

from __future__ import annotations

from collections.abc import Sequence

from megadpo.attention_plan import AttentionPlan, Segment


def packed_plan(lengths: Sequence[int]) -> AttentionPlan:
    """The plan of independent causal sequences of the given lengths, laid one after the other."""
    segments, position = [], 0
    for length in lengths:
        span = (position, position + length)
        segments.append(Segment(*span, key_ranges=(span,)))
        position += length
    return AttentionPlan(num_tokens=position, segments=tuple(segments))
