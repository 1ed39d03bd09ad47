"""An attention plan as kernels take it: segment after segment of queries, each with its keys beside it.

Legend: T rows of the stream, L rows of one segment's keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megadpo.attention_plan import AttentionPlan, Range


@dataclass(frozen=True, slots=True)
class Segments:
    """The plan's segments, in order: their queries cover the stream, their keys are what `keys` gives.

    `earlier` has each segment's key ranges before its own rows; these are the last keys of every segment. In each the
    last query sees all keys, and each earlier one sees one key less.
    """

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    earlier: tuple[tuple[Range, ...], ...]

    @classmethod
    def of(cls, plan: AttentionPlan) -> Segments:
        """The plan's segments."""
        earlier = tuple(
            tuple((start, min(stop, segment.start)) for start, stop in segment.key_ranges if start < segment.start)
            for segment in plan.segments
        )
        query_lengths = tuple(segment.stop - segment.start for segment in plan.segments)
        key_lengths = tuple(
            own + sum(stop - start for start, stop in ranges)
            for own, ranges in zip(query_lengths, earlier, strict=True)
        )
        return cls(query_lengths, key_lengths, earlier)

    def keys(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each segment's rows [L, ...] of the keys (or values) [T, ...]; differentiable.

        They are views where a segment sees its own rows only, and copies where it sees earlier ones.
        """
        if not any(self.earlier):
            own: tuple[torch.Tensor, ...] = states.split(self.query_lengths)
            return own
        result: tuple[torch.Tensor, ...] = _Keys.apply(states, self)
        return result

    def gathered_keys(self, states: torch.Tensor) -> torch.Tensor:
        """The rows of all segments' keys (or values) [T, ...] in one tensor, segment after segment; differentiable."""
        return torch.cat(self.keys(states)) if any(self.earlier) else states


class _Keys(torch.autograd.Function):
    """Slices whose gradients are summed in the order of the segments: the same on every run, and on every device."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, ...]:
        ctx.segments = segments
        return tuple(
            torch.cat([*_rows(states, earlier), own]) if earlier else own
            for own, earlier in zip(states.split(segments.query_lengths), segments.earlier, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        segments = ctx.segments
        own = [grad[-length:] for grad, length in zip(grads, segments.query_lengths, strict=True)]
        grad_states = torch.cat(own)
        for grad, earlier in zip(grads, segments.earlier, strict=True):
            lengths = [stop - start for start, stop in earlier]
            for place, more in zip(_rows(grad_states, earlier), grad[: sum(lengths)].split(lengths), strict=True):
                place += more
        return grad_states, None


def _rows(states: torch.Tensor, ranges: Sequence[Range]) -> list[torch.Tensor]:
    return [states[start:stop] for start, stop in ranges]
