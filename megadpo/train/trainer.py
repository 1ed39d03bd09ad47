"""The training loop: batches, steps, metrics, evaluation, checkpoints. No tensor maths."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from megadpo.data.loader import GlobalBatch, TrainingData, evaluation_batches
from megadpo.data.prefetch import prefetched
from megadpo.data.store import PairView
from megadpo.errors import TrainingError
from megadpo.health.stragglers import BusyTime, StragglerWatch
from megadpo.loss.preference import SUMS
from megadpo.metrics.flops import achieved_flops
from megadpo.metrics.reduction import Metric, Reduction, preference_means, reduce_metrics
from megadpo.metrics.trackers import Tracker
from megadpo.optimizer.schedule import LearningRate
from megadpo.reference import Reference
from megadpo.runtime.collectives import gather_rows
from megadpo.runtime.device import Device, Span
from megadpo.runtime.parallel_state import ParallelState
from megadpo.runtime.rank_logging import get_logger
from megadpo.train.first_step import NoPreference, check_no_preference
from megadpo.train.metrics_log import Interval
from megadpo.train.skipped_steps import BadSteps
from megadpo.train.train_step import StepResult

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """When the loop stops, logs, evaluates, checks and saves (in updates), and every update's learning rate.

    `check_every` is of FP8's margins, `check_ranks_every` of the weights that ranks hold in common. `no_preference` is
    what the first update must show because the reference is the starting policy; None where it is not. `sync_every` is
    the number of updates after which the reference follows the policy. `peak_flops` is the FLOP/s that a rank's card
    can do at most; None where that is not known.
    """

    total_steps: int
    log_every: int
    eval_every: int | None
    save_every: int | None
    check_every: int | None
    check_ranks_every: int | None
    learning_rate: LearningRate
    no_preference: NoPreference | None
    sync_every: int | None
    peak_flops: float | None


@contextmanager
def startup_kept() -> Iterator[None]:
    """Spares garbage collections what start-up has left: it lives as long as the run, and walking it takes 0.3 s."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class MakeUpdate(Protocol):
    """Makes one optimizer step on a global batch at a learning rate, or skips it on every rank."""

    def __call__(self, batch: GlobalBatch, *, lr: float, check_at: int | None) -> StepResult:
        """`check_at` is the step's number where ranks are to compare weights before it."""
        ...


class Trainer:
    """Moves a run through its steps; the same calls happen on every rank.

    `update` makes one optimizer step on a global batch at a learning rate; `votes` gives numbers that this rank has
    to say before a step, and `heed` acts on the largest of all ranks' after it, and says why the run must stop, if
    it must; `bad_steps` takes the steps that were skipped; `at` hears what the run is at. `evaluate` gives this
    rank's sums over the pairs of some batches; `sync_reference` has the reference follow the policy;
    `check_margins` tells what FP8 does to margins; `check_ranks` raises after a step's number where ranks hold
    different weights; `save` begins the checkpoint of a step; `keep_evaluation` keeps what an evaluation has found of a
    step that was saved without one; `on_step` hears every logged line, with a training line the rows of its update with
    the largest gradient norm.
    """

    def __init__(
        self,
        *,
        update: MakeUpdate,
        evaluate: Callable[[Iterable[GlobalBatch]], dict[str, torch.Tensor]],
        sync_reference: Callable[[], None],
        check_margins: Callable[[], Mapping[str, float]],
        check_ranks: Callable[[int], None],
        save: Callable[[int, Mapping[str, float]], None],
        keep_evaluation: Callable[[Mapping[str, float]], None],
        heed: Callable[[Sequence[float]], str | None],
        at: Callable[[int, str], None],
        on_step: Callable[[int, Mapping[str, float], Sequence[int]], None],
        reference: Reference,
        data: TrainingData,
        validation: Mapping[str, PairView],
        state: ParallelState,
        device: Device,
        settings: LoopSettings,
        trackers: Sequence[Tracker],
        bad_steps: BadSteps,
    ) -> None:
        self.update = update
        self.evaluate = evaluate
        self.sync_reference = sync_reference
        self.check_margins = check_margins
        self.check_ranks = check_ranks
        self.save = save
        self.keep_evaluation = keep_evaluation
        self.heed = heed
        self.at = at
        self.on_step = on_step
        self.reference = reference
        self.data = data
        self.validation = validation
        self.state = state
        self.device = device
        self.settings = settings
        self.trackers = trackers
        self.bad_steps = bad_steps
        self.stragglers = StragglerWatch()
        self.stopped: str | None = None
        self.last_metrics: dict[str, float] = {}

    def run(self, steps_done: int, *, evaluated: bool = True) -> dict[str, float]:
        """Trains from `steps_done` to the last step, evaluating and saving on the way; each metric's last value.

        Ends sooner, with a checkpoint, where `heed` says so: `stopped` then says why. The evaluation of that step is
        left to the run that goes on, which `evaluated` tells whether it was made, and which keeps it for the next.
        """
        settings = self.settings
        if steps_done == 0:
            self.evaluate_all(0)
            if settings.check_every:
                self._check_fp8(0)
        elif not evaluated and self._evaluates_after(steps_done):
            self.keep_evaluation(self.evaluate_all(steps_done))
        interval = Interval()
        batches_ahead = prefetched(self.data.batches(steps_done=steps_done, total_steps=settings.total_steps))
        with startup_kept(), batches_ahead as batches:
            for step in range(steps_done + 1, settings.total_steps + 1):
                is_last = step == settings.total_steps
                heard = self._one_step(step, batches, interval)
                reason = self.heed(heard)
                if self.bad_steps.too_many or (is_last and not self._updates(step)):
                    self._give_up(step, interval)
                stops = reason is not None and not is_last
                if step % settings.log_every == 0 or is_last or stops:
                    self._log_interval(step, interval)
                    interval = Interval()
                found = self.evaluate_all(step) if self._evaluates_after(step) and not stops else {}
                if settings.check_every and (is_last or step % settings.check_every == 0):
                    self._check_fp8(step)
                if stops:
                    unsaved = "" if self._updates(step) else ", and nothing was saved, as no update has been made"
                    self.stopped = f"{reason} after step {step}{unsaved}"
                    self._save(step, found)
                    break
                if is_last or (settings.save_every and step % settings.save_every == 0):
                    self._save(step, found)
        return self.last_metrics

    def _evaluates_after(self, step: int) -> bool:
        every = self.settings.eval_every
        return step == self.settings.total_steps or (every is not None and step % every == 0)

    def _one_step(self, step: int, batches: Iterator[GlobalBatch], interval: Interval) -> tuple[float, ...]:
        """Makes a step; the largest of all ranks' votes."""
        self.at(step, "waiting for its batch")
        started, asked = self.device.mark(), time.perf_counter()
        self.reference.prepare()
        batch = next(batches)
        data_s = time.perf_counter() - asked
        every = self.settings.check_ranks_every
        self.at(step, "update")
        result = self.update(
            batch,
            lr=self.settings.learning_rate.after(step - 1),
            check_at=step if every and step % every == 0 else None,
        )
        if result.skipped:
            self.bad_steps.take(step, batch, result)
            self.check_ranks(step)  # weights that have changed on one rank are a likely cause
        else:
            self.bad_steps.end_row()
            if self._updates(step) == 1 and self.settings.no_preference is not None:
                check_no_preference(step, self._reduced(result.sums), self.settings.no_preference)
        if self.settings.sync_every and step % self.settings.sync_every == 0:
            self.sync_reference()
        interval.add(result, batch, (started, self.device.mark()), data_s)
        return result.votes

    def _updates(self, step: int) -> int:
        """Updates that the run has made in `step` steps."""
        return step - self.bad_steps.total

    def _save(self, step: int, found: Mapping[str, float]) -> None:
        """Begins the checkpoint of a step, unless no update was ever made: a run that starts anew is the same."""
        self.at(step, "saving")
        if self._updates(step):
            self.save(step, found)
        else:
            logger.warning("step %d: nothing is saved, as all updates so far were skipped", step)

    def _give_up(self, step: int, interval: Interval) -> None:
        """Logs what there is, saves the weights, which skipped updates have not changed, and raises TrainingError."""
        self._log_interval(step, interval)
        self._save(step, {})
        saved = (
            f"The checkpoint of step {step} holds the weights of the last update that was made; resumed, the run goes "
            f"on behind these batches"
            if self._updates(step)
            else "No update has been made, and nothing was saved"
        )
        limit = f"train.max_bad_steps={self.bad_steps.most_in_a_row}: " if self.bad_steps.too_many else ""
        raise TrainingError(
            f"{limit}the last {self.bad_steps.in_a_row} steps up to {step} were skipped, as their loss or gradient was "
            f"not finite. {saved}. Look at their pairs, in bad_steps of the run directory; lower optimizer.lr, or "
            f"resume from an earlier checkpoint"
        )

    def _reduced(
        self, sums: Mapping[str, torch.Tensor], further: Mapping[str, Metric] | None = None
    ) -> dict[str, float]:
        """Means over all pairs of all ranks from this rank's sums, and further metrics, in one exchange.

        Zeros stand in where this rank has no sums. Tensor-parallel peers hold the same sums: one of them speaks.
        """
        counted = self.state.is_last_stage and self.state.tensor_rank == 0
        metrics = {name: Metric(sums[name] if counted and name in sums else 0.0, Reduction.SUM) for name in SUMS}
        reduced = reduce_metrics(
            {**metrics, **(further or {})}, gather=gather_rows, torch_device=self.device.torch_device
        )
        return preference_means({name: reduced.pop(name) for name in SUMS}) | reduced

    def _log_interval(self, step: int, interval: Interval) -> None:
        self.at(step, "logging")
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
        if interval.updates:
            reduced["grad_norm"] = interval.grad_norm / interval.updates
        ranks = self.state.tensor_size * self.state.pipeline_size * self.state.data_size
        metrics = {
            **reduced,
            "steps/skipped": self.bad_steps.total,
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
        self.on_step(step, metrics, interval.steepest_rows)
        self._name_stragglers(step, interval)

    def _name_stragglers(self, step: int, interval: Interval) -> None:
        """Says which replica the others wait for; one all-gather where there are several."""
        if self.state.data_size == 1:
            return
        seconds = self._seconds(interval.busy_spans) + interval.data_s
        own = [self.state.data_rank, seconds, interval.data_s, interval.own_flops]
        rows = gather_rows(torch.tensor(own, dtype=torch.float64).to(self.device.torch_device)).tolist()
        if self.state.is_main:
            busy = [BusyTime(int(replica), *numbers) for replica, *numbers in rows]
            for line in self.stragglers.observe(step, interval.steps, busy):
                logger.warning("%s", line)

    def _seconds(self, spans: Sequence[Span]) -> float:
        return sum(self.device.seconds_between(start, end) for start, end in spans)

    def evaluate_all(self, steps_done: int) -> dict[str, float]:
        """The metrics of every validation set under `eval/` (`eval/NAME/` for named ones), logged as one line."""
        if not self.validation:
            return {}
        started = time.perf_counter()
        metrics: dict[str, float] = {}
        for name, pairs in self.validation.items():
            with prefetched(self._evaluation(pairs)) as batches:
                sums = self.evaluate(self._told(steps_done, batches))
            prefix = f"eval/{name}/" if name else "eval/"
            metrics.update({f"{prefix}{key}": value for key, value in self._reduced(sums).items()})
        metrics["eval/time_s"] = time.perf_counter() - started
        self._track(steps_done, metrics)
        self.on_step(steps_done, metrics, ())
        return metrics

    def _check_fp8(self, steps_done: int) -> None:
        """Logs what FP8 does to some pairs' margins under `fp8/`, as one line."""
        self.at(steps_done, "checking FP8")
        started = time.perf_counter()
        metrics = {f"fp8/{name}": value for name, value in self.check_margins().items()}
        metrics["fp8/time_s"] = time.perf_counter() - started
        self._track(steps_done, metrics)
        self.on_step(steps_done, metrics, ())

    def _told(self, step: int, batches: Iterator[GlobalBatch]) -> Iterator[GlobalBatch]:
        """The batches of an evaluation; each is progress."""
        for batch in batches:
            self.at(step, "evaluation")
            yield batch

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
