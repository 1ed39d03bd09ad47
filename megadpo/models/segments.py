"""An attention plan in the form of kernels' inputs: segments of queries, each with its keys.

Legend: T rows of the stream, L rows of one segment's keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megadpo.models.attention_plan import AttentionPlan, Range
from megadpo.runtime.device import to_device


@dataclass(frozen=True, slots=True)
class Segments:
    """The plan's segments in order: their queries cover the stream, `keys` returns their keys.

    `earlier` holds each segment's key ranges before its own rows, which are the last of its keys. In each segment the
    last query sees all keys, and each query before it one key less.
    """

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    earlier: tuple[tuple[Range, ...], ...]

    @classmethod
    def of(cls, plan: AttentionPlan) -> Segments:
        """Takes the segments from a plan."""
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

    def query_starts(self, torch_device: torch.device) -> torch.Tensor:
        """Start of each segment's queries, and end of the last one's, as int32 [segments + 1]."""
        return _starts(self.query_lengths, torch_device)

    def key_starts(self, torch_device: torch.device) -> torch.Tensor:
        """Start of each segment's keys in `gathered_keys`, and end of the last one's, as int32 [segments + 1]."""
        return _starts(self.key_lengths, torch_device)

    def keys(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns each segment's rows [L, ...] of the keys (or values) [T, ...]; differentiable.

        They are views if a segment only sees its own rows, and copies if it also sees earlier ones.
        """
        if not any(self.earlier):
            own: tuple[torch.Tensor, ...] = states.split(self.query_lengths)
            return own
        result: tuple[torch.Tensor, ...] = _Keys.apply(states, self)
        return result

    def gathered_keys(self, states: torch.Tensor) -> torch.Tensor:
        """Returns the rows of all segments' keys (or values) [T, ...] concatenated in one tensor; differentiable."""
        if not any(self.earlier):
            return states
        result: torch.Tensor = _GatheredKeys.apply(states, self)
        return result

    def slices(self, states: torch.Tensor) -> list[list[torch.Tensor]]:
        """Returns, for each segment, the slices of the stream's rows that are its keys, its own rows last."""
        own = states.split(self.query_lengths)
        return [[*_rows(states, earlier), rows] for rows, earlier in zip(own, self.earlier, strict=True)]

    def sum_gradients(self, grads: Sequence[torch.Tensor]) -> torch.Tensor:
        """Sums the gradients of all segments' keys to that of the stream [T, ...].

        The order of summation is that of the segments, so the result is deterministic on every device.
        """
        own = [grad[-length:] for grad, length in zip(grads, self.query_lengths, strict=True)]
        total = torch.cat(own)
        for grad, earlier in zip(grads, self.earlier, strict=True):
            lengths = [stop - start for start, stop in earlier]
            for place, more in zip(_rows(total, earlier), grad[: sum(lengths)].split(lengths), strict=True):
                place += more
        return total


class _Keys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, ...]:
        ctx.segments = segments
        return tuple(torch.cat(slices) if len(slices) > 1 else slices[0] for slices in segments.slices(states))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.segments.sum_gradients(grads), None


class _GatheredKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, segments: Segments) -> torch.Tensor:
        ctx.segments = segments
        return torch.cat([rows for slices in segments.slices(states) for rows in slices])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        return ctx.segments.sum_gradients(grad.split(ctx.segments.key_lengths)), None


def _rows(states: torch.Tensor, ranges: Sequence[Range]) -> list[torch.Tensor]:
    return [states[start:stop] for start, stop in ranges]


def _starts(lengths: Sequence[int], torch_device: torch.device) -> torch.Tensor:
    return to_device(torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32), torch_device)
