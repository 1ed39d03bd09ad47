"""The log of a training: sums over steps, reduced over ranks once a line, then written to trackers and health log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from megadpo.data.loader import GlobalBatch
from megadpo.health.log import HealthLog
from megadpo.health.stragglers import BusyTime, StragglerWatch
from megadpo.loss.preference import SUMS
from megadpo.metrics.flops import achieved_flops, step_flops
from megadpo.metrics.reduction import Metric, Reduction, add_sums, preference_means, reduce_metrics
from megadpo.metrics.trackers import Tracker
from megadpo.runtime.collectives import gather_rows
from megadpo.runtime.device import Device, Span
from megadpo.runtime.parallel_state import ParallelState
from megadpo.runtime.progress import TrainingProgress
from megadpo.runtime.rank_logging import get_logger
from megadpo.train.train_step import StepResult

logger = get_logger(__name__)


@dataclass(slots=True)
class Interval:
    """Sums over the steps since the last logged line; they stay on the device until they are reduced.

    `steps`, seconds, tokens and FLOPs count all steps; `updates` and the rest only those that were not skipped.
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
    largest_grad_norm_rows: Sequence[int] = ()
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
        if result.update.skipped:
            return
        self.updates += 1
        add_sums(self.sums, result.sums)
        grad_norm = result.update.grad_norm
        self.grad_norm += grad_norm
        if grad_norm > self.largest_grad_norm:
            self.largest_grad_norm, self.largest_grad_norm_rows = grad_norm, batch.pair_indices


class MetricsLog:
    """Sums up steps, and writes a line of metrics to the trackers, the progress bar and the health log.

    The trackers and the health log are rank 0's, which has None and [] elsewhere. `last_metrics` are each metric's last
    value.
    """

    def __init__(
        self,
        *,
        trackers: Sequence[Tracker],
        progress: TrainingProgress,
        health: HealthLog | None,
        state: ParallelState,
        device: Device,
        peak_flops: float | None,
    ) -> None:
        """`peak_flops` are the FLOP/s that a rank's GPU can do at most; None where that is not known."""
        self._trackers = trackers
        self._progress = progress
        self._health = health
        self._state = state
        self._device = device
        self._peak_flops = peak_flops
        self._stragglers = StragglerWatch()
        self._interval = Interval()
        self.last_metrics: dict[str, float] = {}

    def add(self, result: StepResult, batch: GlobalBatch, span: Span, data_s: float) -> None:
        """Adds one step to the next line; `data_s` seconds of it were spent waiting for its batch."""
        self._interval.add(result, batch, span, data_s)

    def reduce(self, sums: Mapping[str, torch.Tensor], further: Mapping[str, Metric] | None = None) -> dict[str, float]:
        """Means over all pairs of all ranks from this rank's sums, and further metrics, in one all-gather.

        Zeros stand in where this rank has no sums. Tensor-parallel peers hold the same sums, which count once.
        """
        counted = self._state.is_last_stage and self._state.tensor_rank == 0
        metrics = {name: Metric(sums[name] if counted and name in sums else 0.0, Reduction.SUM) for name in SUMS}
        torch_device = self._device.torch_device
        reduced = reduce_metrics({**metrics, **(further or {})}, gather=gather_rows, torch_device=torch_device)
        return preference_means({name: reduced.pop(name) for name in SUMS}) | reduced

    def write_steps(self, step: int, *, lr: float, epoch: float, skipped: int, reference_bytes: int) -> None:
        """Writes the line of the steps since the last one, up to `step`; collective over all ranks.

        `lr` and `epoch` are the last step's, `skipped` the run's skipped updates so far, `reference_bytes` those of the
        reference's weights on this rank's device.
        """
        interval, self._interval = self._interval, Interval()
        steps = interval.steps
        reduced = self.reduce(
            interval.sums,
            {
                "time/step_s": Metric(self._seconds(interval.step_spans), Reduction.MAX),
                "time/reference_s": Metric(self._seconds(interval.reference_spans), Reduction.MAX),
                "time/data_s": Metric(interval.data_s, Reduction.MAX),
                "memory/peak_gib": Metric(self._device.peak_memory_bytes() / 2**30, Reduction.MAX),
                "memory/reference_gib": Metric(reference_bytes / 2**30, Reduction.MAX),
            },
        )
        seconds, pairs = reduced["time/step_s"], reduced["pairs"]
        if interval.updates:
            reduced["grad_norm"] = interval.grad_norm / interval.updates
        ranks = self._state.tensor_size * self._state.pipeline_size * self._state.data_size
        metrics = {
            **reduced,
            "steps/skipped": skipped,
            "lr": lr,
            "epoch": epoch,
            "pairs": pairs / steps,
            "tokens": interval.logical_tokens / steps,
            "tokens/computed": interval.computed_tokens / steps,
            "tokens/padding": interval.padding_tokens / interval.computed_tokens,
            **{name: reduced[name] / steps for name in ("time/step_s", "time/reference_s", "time/data_s")},
            "throughput/pairs_per_s": pairs / seconds,
            "throughput/tokens_per_s": interval.logical_tokens / seconds,
            **achieved_flops(interval.flops / seconds, ranks=ranks, peak=self._peak_flops),
        }
        self.write(step, metrics, interval.largest_grad_norm_rows)
        self._warn_of_stragglers(step, interval)

    def write(self, step: int, metrics: Mapping[str, float], rows: Sequence[int] = ()) -> None:
        """Writes a line; `rows` are the data's rows of the update with the largest gradient norm."""
        for tracker in self._trackers:
            tracker.log(step, metrics)
        self.last_metrics.update(metrics)
        self._progress.report(step, metrics)
        if self._health is not None:
            self._health.observe(step, metrics, rows)

    def finish(self) -> str:
        """Logs the verdict on the run's health and returns it; "" on all ranks but 0."""
        return "" if self._health is None else self._health.finish()

    def _warn_of_stragglers(self, step: int, interval: Interval) -> None:
        """Logs which replica the others wait for; one all-gather where there are several."""
        if self._state.data_size == 1:
            return
        seconds = self._seconds(interval.busy_spans) + interval.data_s
        own = [self._state.data_rank, seconds, interval.data_s, interval.own_flops]
        rows = gather_rows(torch.tensor(own, dtype=torch.float64).to(self._device.torch_device)).tolist()
        if self._state.is_main:
            busy = [BusyTime(int(replica), *numbers) for replica, *numbers in rows]
            for line in self._stragglers.observe(step, interval.steps, busy):
                logger.warning("%s", line)

    def _seconds(self, spans: Sequence[Span]) -> float:
        return sum(self._device.seconds_between(start, end) for start, end in spans)
