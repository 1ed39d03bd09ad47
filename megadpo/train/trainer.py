"""The training loop: batches, steps, evaluations, checkpoints, and when to stop. No tensor maths."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from megadpo.checkpoint.description import Progress
from megadpo.checkpoint.saver import CheckpointSaver
from megadpo.data.loader import GlobalBatch, TrainingData, evaluation_batches
from megadpo.data.prefetch import prefetched
from megadpo.data.store import PairView
from megadpo.errors import TrainingError
from megadpo.health.replicas import check_finite, check_replicas
from megadpo.health.watchdog import HangWatchdog
from megadpo.loss.preference import PreferenceLoss
from megadpo.optimizer.build import Policy, gather_weights, set_hyperparameters
from megadpo.optimizer.schedule import LearningRate
from megadpo.reference import Reference
from megadpo.runtime.device import Device
from megadpo.runtime.parallel_state import ParallelState
from megadpo.runtime.rank_logging import get_logger
from megadpo.train.evaluation import evaluate
from megadpo.train.first_step import ExpectedFirstLoss, check_first_loss
from megadpo.train.fp8_check import margin_errors
from megadpo.train.metrics_log import MetricsLog
from megadpo.train.skipped_steps import SkippedSteps
from megadpo.train.stop_requests import StopRequests
from megadpo.train.train_step import RankVotes, train_step

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerSettings:
    """The numbers that a trainer goes by; intervals are in updates, None means never.

    `check_ranks_every` is of the weights that ranks hold in common; `fp8_check_every` of what FP8 does to the margins
    of the first `fp8_check_pairs` pairs. The reference moves by the share `sync_mix` of its way to the policy every
    `sync_every` updates. `expected_first_loss` is None where the reference is not the starting policy.
    """

    total_steps: int
    log_every: int
    eval_every: int | None
    save_every: int | None
    check_ranks_every: int | None
    fp8_check_every: int | None
    fp8_check_pairs: int
    sync_every: int | None
    sync_mix: float
    learning_rate: LearningRate
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    expected_first_loss: ExpectedFirstLoss | None


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Each metric's last value, the verdict on the run's health (on rank 0), and what stopped the run before its end.

    `stopped` is None for a run that has made its last step.
    """

    metrics: dict[str, float]
    health: str
    stopped: str | None


class Trainer:
    """Trains a policy from `start` to the last step; the same calls happen on every rank.

    `validation` holds the validation sets by name. `stop` is entered for the training: it hears signals.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        reference: Reference,
        loss: PreferenceLoss,
        data: TrainingData,
        validation: Mapping[str, PairView],
        start: Progress,
        settings: TrainerSettings,
        state: ParallelState,
        device: Device,
        checkpoints: CheckpointSaver,
        log: MetricsLog,
        skipped: SkippedSteps,
        stop: StopRequests,
        watchdog: HangWatchdog,
    ) -> None:
        self.policy, self.reference, self.loss = policy, reference, loss
        self.data, self.validation = data, validation
        self.start, self.settings = start, settings
        self.state, self.device = state, device
        self.checkpoints, self.log, self.skipped = checkpoints, log, skipped
        self.stop, self.watchdog = stop, watchdog

    def train(self) -> TrainResult:
        """Trains to the last step, or until all ranks agree to stop; all checkpoints are complete then.

        TrainingError on every rank where weights are wrong, or too many updates in a row were skipped.
        """
        self.watchdog.report(self.start.step, "comparing weights")
        self.check_weights(self.start.step)
        with self.stop:  # also while the last checkpoint is completed
            try:
                stopped = self._make_steps()
            except TrainingError:  # which every rank raises: what is being written was in order
                self.checkpoints.finish()
                raise
            self.checkpoints.finish()
            return TrainResult(self.log.last_metrics, self.log.finish(), stopped)

    def _make_steps(self) -> str | None:
        """Makes the steps, evaluating and saving on the way; returns what stopped the run, None at its end.

        A stopped run skips the evaluation of its last step: the resumed run makes it, and stores it.
        """
        settings, done = self.settings, self.start.step
        if done == 0:
            self.evaluate_all(0)
            if settings.fp8_check_every:
                self._check_fp8(0)
        elif not self.start.metrics and self._evaluates_after(done):
            self.checkpoints.keep_evaluation(self.evaluate_all(done))
        batches_ahead = prefetched(self.data.batches(steps_done=done, total_steps=settings.total_steps))
        with startup_objects_frozen(), batches_ahead as batches:
            for step in range(done + 1, settings.total_steps + 1):
                is_last = step == settings.total_steps
                reason = self._act_on(self._step(step, batches))
                never_updated = is_last and not self._updates(step)
                if self.skipped.limit_reached or never_updated:
                    self._give_up(step)
                stops = reason is not None and not is_last
                if is_last or stops or step % settings.log_every == 0:
                    self._log_steps(step)
                metrics = self.evaluate_all(step) if self._evaluates_after(step) and not stops else {}
                if settings.fp8_check_every and (is_last or step % settings.fp8_check_every == 0):
                    self._check_fp8(step)
                if is_last or stops or (settings.save_every and step % settings.save_every == 0):
                    self._save(step, metrics)
                if stops:
                    unsaved = "" if self._updates(step) else ", and nothing was saved, as no update has been made"
                    return f"{reason} after step {step}{unsaved}"
        return None

    def _step(self, step: int, batches: Iterator[GlobalBatch]) -> RankVotes:
        """Makes a step on the next batch, whose update may be skipped on all ranks; returns their largest votes."""
        self.watchdog.report(step, "waiting for its batch")
        started, asked = self.device.mark(), time.perf_counter()
        self.reference.prepare()
        batch = next(batches)
        data_s = time.perf_counter() - asked
        self.watchdog.report(step, "update")
        settings = self.settings
        set_hyperparameters(
            self.policy.optimizer,
            lr=settings.learning_rate.after(step - 1),
            weight_decay=settings.weight_decay,
            betas=settings.betas,
            eps=settings.eps,
        )
        every = settings.check_ranks_every
        # Before an update every rank has gathered the weights, also where that is overlapped.
        check = partial(check_replicas, self.policy.modules, self.state, step=step)
        result = train_step(
            self.policy.chunks,
            self.policy.optimizer,
            self.reference,
            self.loss,
            batch,
            device=self.device,
            votes=self._votes,
            before_update=check if every and step % every == 0 else None,
        )
        if result.update.skipped:
            self.skipped.record(step, batch, result)
            self.check_weights(step)  # weights that have changed on one rank are a likely cause
        else:
            self.skipped.reset_streak()
            if self._updates(step) == 1 and settings.expected_first_loss is not None:
                check_first_loss(step, self.log.reduce(result.sums), settings.expected_first_loss)
        if settings.sync_every and step % settings.sync_every == 0:
            gather_weights(self.policy.chunks)
            self.reference.follow(self.policy.modules, settings.sync_mix)
        self.log.add(result, batch, (started, self.device.mark()), data_s)
        return result.votes

    def _votes(self) -> RankVotes:
        """This rank's votes, asked at the end of each step."""
        return RankVotes(self.stop.vote(self.checkpoints.seconds_to_stop), float(self.checkpoints.is_writing))

    def _act_on(self, votes: RankVotes) -> str | None:
        """Completes a checkpoint that all ranks have written; returns why the run must stop, None to train on."""
        if not votes.still_writing:
            self.checkpoints.complete()
        return self.stop.reason(votes.stop)

    def check_weights(self, step: int) -> None:
        """TrainingError on every rank where weights are not finite, or differ between ranks that share them."""
        check_finite(self.policy.modules, step=step)
        if self.settings.check_ranks_every is not None:
            check_replicas(self.policy.modules, self.state, step=step)

    def _evaluates_after(self, step: int) -> bool:
        every = self.settings.eval_every
        return step == self.settings.total_steps or (every is not None and step % every == 0)

    def _updates(self, step: int) -> int:
        """Updates that the run has made in `step` steps."""
        return step - self.skipped.total

    def _save(self, step: int, metrics: Mapping[str, float]) -> None:
        """Begins the checkpoint of a step, unless no update was ever made: a fresh start would be the same."""
        self.watchdog.report(step, "saving")
        if not self._updates(step):
            logger.warning("step %d: nothing is saved, as all updates so far were skipped", step)
            return
        gather_weights(self.policy.chunks)
        self.check_weights(step)
        progress = Progress(step, self.data.pairs_after(step), dict(metrics), self.skipped.total)
        with self.reference.saved() as reference:
            self.checkpoints.save(progress, reference=reference)

    def _give_up(self, step: int) -> None:
        """Logs what there is, saves the weights, which skipped updates have not changed, and raises TrainingError."""
        self._log_steps(step)
        self._save(step, {})
        saved = (
            f"The checkpoint of step {step} holds the weights of the last update that was made; resumed, the run goes "
            f"on behind these batches"
            if self._updates(step)
            else "No update has been made, and nothing was saved"
        )
        limit = f"train.max_bad_steps={self.skipped.limit}: " if self.skipped.limit_reached else ""
        raise TrainingError(
            f"{limit}the last {self.skipped.streak} steps up to {step} were skipped, as their loss or gradient was "
            f"not finite. {saved}. Look at their pairs, in bad_steps of the run directory; lower optimizer.lr, or "
            f"resume from an earlier checkpoint"
        )

    def _log_steps(self, step: int) -> None:
        self.watchdog.report(step, "logging")
        self.log.write_steps(
            step,
            lr=self.settings.learning_rate.after(step - 1),
            epoch=self.data.epochs_after(step),
            skipped=self.skipped.total,
            reference_bytes=self.reference.device_bytes(),
        )

    def evaluate_all(self, step: int) -> dict[str, float]:
        """The metrics of every validation set under `eval/` (`eval/NAME/` for named ones), logged as one line."""
        if not self.validation:
            return {}
        started = time.perf_counter()
        metrics: dict[str, float] = {}
        for name, pairs in self.validation.items():
            with prefetched(self._evaluation_batches(pairs)) as batches:
                sums = evaluate(
                    self.policy.chunks,
                    self.reference,
                    self.loss,
                    self._reported(step, batches),
                    torch_device=self.device.torch_device,
                )
            prefix = f"eval/{name}/" if name else "eval/"
            metrics.update({f"{prefix}{key}": value for key, value in self.log.reduce(sums).items()})
        metrics["eval/time_s"] = time.perf_counter() - started
        self.log.write(step, metrics)
        return metrics

    def _check_fp8(self, step: int) -> None:
        """Logs what FP8 does to the margins of the first pairs under `fp8/`, as one line."""
        self.watchdog.report(step, "checking FP8")
        started = time.perf_counter()
        errors = margin_errors(
            self.policy.chunks,
            self.reference,
            self.loss,
            self.data.builder.build(self.data.pairs[: self.settings.fp8_check_pairs]),
            state=self.state,
            torch_device=self.device.torch_device,
        )
        metrics = {f"fp8/{name}": value for name, value in errors.items()}
        metrics["fp8/time_s"] = time.perf_counter() - started
        self.log.write(step, metrics)

    def _reported(self, step: int, batches: Iterator[GlobalBatch]) -> Iterator[GlobalBatch]:
        """The batches of an evaluation; the watchdog sees each as progress."""
        for batch in batches:
            self.watchdog.report(step, "evaluation")
            yield batch

    def _evaluation_batches(self, pairs: PairView) -> Iterable[GlobalBatch]:
        return evaluation_batches(
            pairs,
            group_size=self.data.global_batch_size,
            builder=self.data.builder,
            mean_chosen_tokens=float(pairs.chosen_lengths.mean()),
        )


@contextmanager
def startup_objects_frozen() -> Iterator[None]:
    """Keeps the objects of start-up out of garbage collections, each of which they would make 0.3 s longer."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
