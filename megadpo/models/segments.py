"""An attention plan as kernels take it: segment after segment of queries, each with its keys beside it.

Legend: T rows of the stream, K rows of all segments' keys (K >= T: a shared prompt's keys come twice), G heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megadpo.attention_plan import AttentionPlan
from megadpo.device import to_device


@dataclass(frozen=True, slots=True)
class KeyRows:
    """Which rows of the stream are the keys of all segments, and how their gradients come back without collisions.

    `rows_K` are the rows in segment order. `copies[n]` holds (places in `rows_K`, rows) of every row's n-th use: all T
    rows have a first one, and no row comes twice in one entry, so that sums are deterministic.
    """

    rows_K: torch.Tensor
    copies: tuple[tuple[torch.Tensor, torch.Tensor], ...]


@dataclass(frozen=True, slots=True)
class Segments:
    """Lengths of the plan's segments, in order: queries cover the stream, keys are what `gather_keys` gives.

    `key_rows` is None where every segment sees exactly itself, so that the stream is its own key order. In each segment
    the last query sees all keys, and each earlier one sees one key less.
    """

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    key_rows: KeyRows | None

    @classmethod
    def of(cls, plan: AttentionPlan, device: torch.device) -> Segments:
        """The plan's segments, with index tensors on `device`."""
        query_lengths = tuple(segment.stop - segment.start for segment in plan.segments)
        key_lengths = tuple(sum(stop - start for start, stop in segment.key_ranges) for segment in plan.segments)
        if query_lengths == key_lengths:
            return cls(query_lengths, key_lengths, None)
        ranges = [key_range for segment in plan.segments for key_range in segment.key_ranges]
        return cls(query_lengths, key_lengths, _key_rows(ranges, device))

    def gather_keys(self, states: torch.Tensor) -> torch.Tensor:
        """Rows [K, ...] of the keys (or values) [T, ...], segment after segment; differentiable."""
        if self.key_rows is None:
            return states
        result: torch.Tensor = _Gather.apply(states, self.key_rows)
        return result


def _key_rows(ranges: list[tuple[int, int]], device: torch.device) -> KeyRows:
    rows = np.concatenate([np.arange(start, stop) for start, stop in ranges])
    by_row = np.argsort(rows, kind="stable")
    sorted_rows = rows[by_row]
    # A row's uses lie side by side now, in order: a use's number is its distance from the row's first one.
    number = np.arange(len(rows)) - np.searchsorted(sorted_rows, sorted_rows)
    copies = [(by_row[number == n], sorted_rows[number == n]) for n in range(int(number.max()) + 1)]
    return KeyRows(
        rows_K=to_device(torch.from_numpy(rows), device),
        copies=tuple(
            (to_device(torch.from_numpy(p), device), to_device(torch.from_numpy(r), device)) for p, r in copies
        ),
    )


class _Gather(torch.autograd.Function):
    """index_select whose gradient needs no atomic additions: one gather of first uses, one addition a further use."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, key_rows: KeyRows) -> torch.Tensor:
        ctx.key_rows = key_rows
        return states.index_select(0, key_rows.rows_K)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad_K,) = grads
        (first, _), *further = ctx.key_rows.copies
        grad_T = grad_K.index_select(0, first)
        for places, rows in further:
            grad_T.index_add_(0, rows, grad_K.index_select(0, places))
        return grad_T, None
