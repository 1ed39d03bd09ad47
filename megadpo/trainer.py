"""The training loop: batches, steps, metrics, evaluation, checkpoints. No tensor maths."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from megadpo.data.loader import GlobalBatch, TrainingData, evaluation_batches
from megadpo.data.prefetch import prefetched
from megadpo.data.store import PairView
from megadpo.device import Device, Mark
from megadpo.errors import TrainingError
from megadpo.flops import achieved_flops, step_flops
from megadpo.losses import SUMS
from megadpo.metrics import Metric, Reduction, add_sums, preference_means, reduce_metrics
from megadpo.optimizer import LearningRate
from megadpo.parallel.collectives import gather_rows
from megadpo.parallel.state import ParallelState
from megadpo.rank_logging import get_logger
from megadpo.reference import Reference
from megadpo.trackers import Tracker
from megadpo.train_step import StepResult

logger = get_logger(__name__)

Span: TypeAlias = tuple[Mark, Mark]


@dataclass(frozen=True, slots=True)
class NoPreference:
    """The loss that a policy shows beside itself, how far from it the first one may be, why so far, what else to do.

    `value` is None where a part of the loss has no reference, so that only rewards are known: they are 0.
    """

    value: float | None
    tolerance: float
    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """When the loop stops, logs, evaluates, checks margins and saves (in updates), and every update's learning rate.

    `no_preference` is what the first update must show because the reference is the starting policy; None where it is
    not. `sync_every` is the number of updates after which the reference follows the policy. `peak_flops` is the FLOP/s
    that a rank's card can do at most; None where that is not known.
    """

    total_steps: int
    log_every: int
    eval_every: int | None
    save_every: int | None
    check_every: int | None
    learning_rate: LearningRate
    no_preference: NoPreference | None
    sync_every: int | None
    peak_flops: float | None


@dataclass(slots=True)
class Interval:
    """What has been summed up since the last logged line; the sums stay on the device until they are reduced."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    steps: int = 0
    step_spans: list[Span] = field(default_factory=list)
    reference_spans: list[Span] = field(default_factory=list)
    data_s: float = 0.0
    grad_norm: float = 0.0
    logical_tokens: int = 0
    computed_tokens: int = 0
    padding_tokens: int = 0
    flops: int = 0

    def add(self, result: StepResult, batch: GlobalBatch, span: Span, data_s: float) -> None:
        """Adds one step, `data_s` seconds of which were spent waiting for its batch."""
        add_sums(self.sums, result.sums)
        self.steps += 1
        self.step_spans.append(span)
        self.reference_spans.append(result.reference_span)
        self.data_s += data_s
        self.grad_norm += result.grad_norm
        self.logical_tokens += batch.logical_tokens
        self.computed_tokens += batch.computed_tokens
        self.padding_tokens += batch.padding_tokens
        self.flops += step_flops(batch.flops, batch.reference_flops)


@contextmanager
def _startup_kept() -> Iterator[None]:
    """Spares garbage collections what start-up has left: it lives as long as the run, and walking it takes 0.3 s."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Trainer:
    """Moves a run through its steps; the same calls happen on every rank.

    `update` makes one optimizer step on a global batch at a learning rate; `evaluate` gives this rank's sums over the
    pairs of some batches; `sync_reference` has the reference follow the policy; `check_margins` tells what FP8 does to
    margins; `save` writes the checkpoint of a step; `on_step` hears every logged line.
    """

    def __init__(
        self,
        *,
        update: Callable[[GlobalBatch, float], StepResult],
        evaluate: Callable[[Iterable[GlobalBatch]], dict[str, torch.Tensor]],
        sync_reference: Callable[[], None],
        check_margins: Callable[[], Mapping[str, float]],
        save: Callable[[int], None],
        on_step: Callable[[int, Mapping[str, float]], None],
        reference: Reference,
        data: TrainingData,
        validation: Mapping[str, PairView],
        state: ParallelState,
        device: Device,
        settings: LoopSettings,
        trackers: Sequence[Tracker],
    ) -> None:
        self.update = update
        self.evaluate = evaluate
        self.sync_reference = sync_reference
        self.check_margins = check_margins
        self.save = save
        self.on_step = on_step
        self.reference = reference
        self.data = data
        self.validation = validation
        self.state = state
        self.device = device
        self.settings = settings
        self.trackers = trackers
        self.last_metrics: dict[str, float] = {}

    def run(self, steps_done: int) -> dict[str, float]:
        """Trains from `steps_done` to the last step, evaluating and saving on the way; each metric's last value."""
        settings = self.settings
        if steps_done == 0:
            self.evaluate_all(0)
            if settings.check_every:
                self._check_fp8(0)
        interval = Interval()
        batches_ahead = prefetched(self.data.batches(steps_done=steps_done, total_steps=settings.total_steps))
        with _startup_kept(), batches_ahead as batches:
            for step in range(steps_done + 1, settings.total_steps + 1):
                is_last = step == settings.total_steps
                self._one_step(step, batches, interval)
                if step % settings.log_every == 0 or is_last:
                    self._log_interval(step, interval)
                    interval = Interval()
                if is_last or (settings.eval_every and step % settings.eval_every == 0):
                    self.evaluate_all(step)
                if settings.check_every and (is_last or step % settings.check_every == 0):
                    self._check_fp8(step)
                if is_last or (settings.save_every and step % settings.save_every == 0):
                    self.save(step)
        return self.last_metrics

    def _one_step(self, step: int, batches: Iterator[GlobalBatch], interval: Interval) -> None:
        started, asked = self.device.mark(), time.perf_counter()
        self.reference.prepare()
        batch = next(batches)
        data_s = time.perf_counter() - asked
        result = self.update(batch, self.settings.learning_rate.after(step - 1))
        if not math.isfinite(result.grad_norm):
            raise TrainingError(
                f"step {step}: the gradient norm is {result.grad_norm}, so the weights are lost from here on. "
                f"The pairs of this batch are rows {_shorten(batch.pair_indices)} of the data. Lower "
                f"optimizer.lr, look at those pairs, or resume from the last checkpoint."
            )
        if step == 1 and self.settings.no_preference is not None:
            _check_no_preference(self._reduced(result.sums), self.settings.no_preference)
        if self.settings.sync_every and step % self.settings.sync_every == 0:
            self.sync_reference()
        interval.add(result, batch, (started, self.device.mark()), data_s)

    def _reduced(
        self, sums: Mapping[str, torch.Tensor], further: Mapping[str, Metric] | None = None
    ) -> dict[str, float]:
        """Means over all pairs of all ranks from this rank's sums, and further metrics, in one exchange.

        Zeros stand in where this rank has no sums. Tensor-parallel peers hold the same sums: one of them speaks.
        """
        counted = self.state.is_last_stage and self.state.tensor_rank == 0
        metrics = {name: Metric(sums[name] if counted and name in sums else 0.0, Reduction.SUM) for name in SUMS}
        reduced = reduce_metrics({**metrics, **(further or {})}, gather=gather_rows, device=self.device.torch_device)
        return preference_means({name: reduced.pop(name) for name in SUMS}) | reduced

    def _log_interval(self, step: int, interval: Interval) -> None:
        steps = interval.steps
        reduced = self._reduced(
            interval.sums,
            {
                "time/step_s": Metric(self._seconds(interval.step_spans), Reduction.MAX),
                "time/reference_s": Metric(self._seconds(interval.reference_spans), Reduction.MAX),
                "time/data_s": Metric(interval.data_s, Reduction.MAX),
                "memory/peak_gib": Metric(self.device.peak_memory_bytes() / 2**30, Reduction.MAX),
                "memory/reference_gib": Metric(self.reference.device_bytes() / 2**30, Reduction.MAX),
            },
        )
        seconds, pairs = reduced["time/step_s"], reduced["pairs"]
        ranks = self.state.tensor_size * self.state.pipeline_size * self.state.data_size
        metrics = {
            **reduced,
            "grad_norm": interval.grad_norm / steps,
            "lr": self.settings.learning_rate.after(step - 1),
            "epoch": self.data.epochs_after(step),
            "pairs": pairs / steps,
            "tokens": interval.logical_tokens / steps,
            "tokens/computed": interval.computed_tokens / steps,
            "tokens/padding": interval.padding_tokens / interval.computed_tokens,
            **{name: reduced[name] / steps for name in ("time/step_s", "time/reference_s", "time/data_s")},
            "throughput/pairs_per_s": pairs / seconds,
            "throughput/tokens_per_s": interval.logical_tokens / seconds,
            **achieved_flops(interval.flops / seconds, ranks=ranks, peak=self.settings.peak_flops),
        }
        self._track(step, metrics)
        self.on_step(step, metrics)

    def _seconds(self, spans: Sequence[Span]) -> float:
        return sum(self.device.seconds_between(start, end) for start, end in spans)

    def evaluate_all(self, steps_done: int) -> None:
        """Logs the metrics of every validation set under `eval/` (`eval/NAME/` for named ones), as one line."""
        if not self.validation:
            return
        started = time.perf_counter()
        metrics: dict[str, float] = {}
        for name, pairs in self.validation.items():
            with prefetched(self._evaluation(pairs)) as batches:
                sums = self.evaluate(batches)
            prefix = f"eval/{name}/" if name else "eval/"
            metrics.update({f"{prefix}{key}": value for key, value in self._reduced(sums).items()})
        metrics["eval/time_s"] = time.perf_counter() - started
        self._track(steps_done, metrics)
        self.on_step(steps_done, metrics)

    def _check_fp8(self, steps_done: int) -> None:
        """Logs what FP8 does to some pairs' margins under `fp8/`, as one line."""
        started = time.perf_counter()
        metrics = {f"fp8/{name}": value for name, value in self.check_margins().items()}
        metrics["fp8/time_s"] = time.perf_counter() - started
        self._track(steps_done, metrics)
        self.on_step(steps_done, metrics)

    def _evaluation(self, pairs: PairView) -> Iterable[GlobalBatch]:
        return evaluation_batches(
            pairs,
            group_size=self.data.global_batch_size,
            builder=self.data.builder,
            mean_chosen_tokens=float(pairs.chosen_lengths.mean()),
        )

    def _track(self, step: int, metrics: dict[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(step, metrics)
        self.last_metrics.update(metrics)


def _check_no_preference(means: Mapping[str, float], expected: NoPreference) -> None:
    chosen, rejected = means["rewards/chosen"], means["rewards/rejected"]
    if expected.value is None:
        error, allowed = max(abs(chosen), abs(rejected)), expected.tolerance
        found, due, beside = f"rewards are {chosen:.3e} and {rejected:.3e}", "they must be 0", ""
    else:
        error, allowed = abs(means["loss"] - expected.value), expected.tolerance * max(1.0, expected.value)
        found, due = f"the loss is {means['loss']:.9f}", f"it must be {expected.value:.9f}"
        beside = f"; rewards {chosen:.3e} and {rejected:.3e} must be 0"
    if not error <= allowed:
        raise TrainingError(
            f"step 1: {found}; policy and reference are the same weights, so {due} (tolerance {expected.tolerance:g}, "
            f"{expected.reason}{beside}). {expected.remedy}. Nothing was saved."
        )


def _shorten(indices: Sequence[int], most: int = 20) -> str:
    """The first few numbers of a sequence, and how many more there are."""
    shown = ", ".join(map(str, indices[:most]))
    return shown if len(indices) <= most else f"{shown} and {len(indices) - most} more"
