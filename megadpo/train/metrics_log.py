"""What happens between two logged lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from megadpo.data.loader import GlobalBatch
from megadpo.metrics.flops import step_flops
from megadpo.metrics.reduction import add_sums
from megadpo.runtime.device import Span
from megadpo.train.train_step import StepResult


@dataclass(slots=True)
class Interval:
    """What has been summed up since the last logged line; the sums stay on the device until they are reduced.

    `steps` and what is counted in seconds and tokens are of all steps, `updates` and the rest of those not skipped.
    """

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    steps: int = 0
    updates: int = 0
    step_spans: list[Span] = field(default_factory=list)
    reference_spans: list[Span] = field(default_factory=list)
    busy_spans: list[Span] = field(default_factory=list)
    data_s: float = 0.0
    grad_norm: float = 0.0
    largest_grad_norm: float = -1.0
    steepest_rows: Sequence[int] = ()
    logical_tokens: int = 0
    computed_tokens: int = 0
    padding_tokens: int = 0
    flops: int = 0
    own_flops: int = 0

    def add(self, result: StepResult, batch: GlobalBatch, span: Span, data_s: float) -> None:
        """Adds one step, `data_s` seconds of which were spent waiting for its batch."""
        self.steps += 1
        self.step_spans.append(span)
        self.reference_spans.append(result.reference_span)
        self.busy_spans.append(result.busy_span)
        self.data_s += data_s
        self.logical_tokens += batch.logical_tokens
        self.computed_tokens += batch.computed_tokens
        self.padding_tokens += batch.padding_tokens
        self.flops += step_flops(batch.flops, batch.reference_flops)
        self.own_flops += batch.own_flops
        if result.skipped:
            return
        self.updates += 1
        add_sums(self.sums, result.sums)
        self.grad_norm += result.grad_norm
        if result.grad_norm > self.largest_grad_norm:
            self.largest_grad_norm, self.steepest_rows = result.grad_norm, batch.pair_indices
