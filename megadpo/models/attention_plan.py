"""The attention pattern of a packed stream of tokens: plain data and its checks.

A stream of T tokens is cut into query segments. Each segment lists the key ranges it sees; the last range is causally
aligned with the queries at the bottom right (the segment's last query sees the range's last key), the earlier ranges
are seen in full. Packing is a plan in which every segment sees itself; a prompt shared by two responses is a plan in
which the second response's segment also sees the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Segment:
    """Queries [start, stop) and the half-open key ranges they attend to; the last range ends where the queries end."""

    start: int
    stop: int
    key_ranges: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Segments that cover the stream's `num_tokens` rows, padding included, without gap or overlap.

    A gap is not allowed, since a kernel would leave its output uninitialised there.
    """

    num_tokens: int
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        position = 0
        for segment in self.segments:
            if segment.start != position or segment.stop <= segment.start:
                raise ValueError(f"{segment} does not continue the plan at row {position}")
            _check_key_ranges(segment)
            position = segment.stop
        if position != self.num_tokens:
            raise ValueError(f"the plan covers {position} of {self.num_tokens} rows")


def _check_key_ranges(segment: Segment) -> None:
    """Raises ValueError unless key ranges ascend without overlap before the queries, and the last ends with them."""
    seen = 0
    for start, stop in segment.key_ranges:
        if not seen <= start < stop:
            raise ValueError(f"the key ranges of {segment} are empty, overlap or descend at [{start}, {stop})")
        seen = stop
    if any(stop > segment.start for _, stop in segment.key_ranges[:-1]):
        raise ValueError(f"an early key range of {segment} reaches into its queries: they would see their future")
    if not segment.key_ranges or seen != segment.stop or segment.key_ranges[-1][0] > segment.start:
        raise ValueError(f"the last key range of {segment} is not aligned with its queries")
