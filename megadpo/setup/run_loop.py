"""What a training run's loop calls: updates, checks, checkpoints and signals, tied to one configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megadpo.checkpoint.description import Progress, write_evaluation
from megadpo.checkpoint.directory import Retention
from megadpo.checkpoint.saver import CheckpointSaver
from megadpo.config.choices import ResumeChange
from megadpo.config.compose import config_to_dict
from megadpo.data.loader import GlobalBatch, TrainingData
from megadpo.errors import MegaDPOError, TrainingError
from megadpo.health.log import HealthLog
from megadpo.health.replicas import check_finite, check_replicas
from megadpo.health.watchdog import HangWatchdog
from megadpo.metrics.trackers import open_trackers
from megadpo.models.conversion.side_files import SideFiles
from megadpo.optimizer.build import Policy, gather_weights, set_hyperparameters
from megadpo.reference import Reference, ResidentReference
from megadpo.runtime.collectives import own_store
from megadpo.runtime.progress import TrainingProgress
from megadpo.runtime.rank_logging import get_logger, global_rank
from megadpo.setup.datasets import Datasets
from megadpo.setup.options import torch_dtype
from megadpo.setup.resume import StartingPoint
from megadpo.setup.session import Session
from megadpo.setup.trainer import build_loss, health_facts, loop_settings
from megadpo.train.evaluation import evaluate
from megadpo.train.fp8_check import margin_errors
from megadpo.train.skipped_steps import BadSteps
from megadpo.train.stop_requests import StopRequests
from megadpo.train.train_step import StepResult, train_step
from megadpo.train.trainer import Trainer

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LoopEnd:
    """What a loop leaves: each metric's last value, on rank 0 the run's health, and what stopped it before its end."""

    metrics: dict[str, float]
    health: str
    stopped: str | None


class RunLoop:
    """A run from its starting point to its last step. `synced` is the reference where it follows the policy.

    `began` is when the launch began, in seconds since the epoch. The methods are collective over all ranks.
    """

    def __init__(
        self,
        session: Session,
        run_dir: Path,
        *,
        policy: Policy,
        reference: Reference,
        synced: ResidentReference | None,
        data: TrainingData,
        datasets: Datasets,
        start: StartingPoint,
        total_steps: int,
        side_files: SideFiles,
        began: float,
    ) -> None:
        self.config, self.state, self.device = session.config, session.state, session.device
        self.run_dir = run_dir
        self.policy = policy
        self.reference = reference
        self.synced = synced
        self.data = data
        self.datasets = datasets
        self.start = start
        self.total_steps = total_steps
        self.loss = build_loss(self.config)
        self.watchdog = self._build_watchdog()
        self.bad_steps = BadSteps(
            run_dir / "bad_steps",
            most_in_a_row=self.config.train.max_bad_steps,
            total=start.progress.skipped,
            place=datasets.train.where,
            state=self.state,
            torch_device=self.device.torch_device,
        )
        kept = self.config.checkpoint
        self.saver = CheckpointSaver(
            run_dir / "checkpoints",
            policy.chunks,
            policy.optimizer,
            identity=start.identity,
            side_files=side_files,
            dtype=torch_dtype(self.config),
            retention=Retention(kept.keep_last, kept.keep_every, kept.keep_best),
            asynchronous=kept.async_save,
            check=self.check_ranks,
            at=self.at,
        )
        self.stops = StopRequests(max_hours=self.config.train.max_hours, began=began)

    def run(self) -> LoopEnd:
        """Trains to the last step, or until the run is told to stop; all checkpoints are complete then."""
        config, step = self.config, self.start.step
        with ExitStack() as stack:
            stack.callback(self.saver.close)
            self.saver.tidy()
            stack.enter_context(self.watchdog)
            self.at(step, "opening trackers")
            health = None
            if self.state.is_main:
                facts, place = health_facts(config, self.loss), self.datasets.train.where
                # A spike beside other pairs or another loss means nothing; another batch size changes no mean.
                anew = bool({*self.start.changes} - {ResumeChange.batch_size})
                health = HealthLog(self.run_dir, facts, resume_step=step, anew=anew, locate_row=place)
            names = [str(tracker) for tracker in config.trackers] if self.state.is_main else []
            trackers = stack.enter_context(
                open_trackers(names, self.run_dir, resume_step=step, settings=config_to_dict(config))
            )
            stack.callback(self.watchdog.report_phase, "closing trackers")
            progress = stack.enter_context(TrainingProgress(step, self.total_steps, visible=self.state.is_main))

            def on_step(step: int, metrics: Mapping[str, float], rows: Sequence[int]) -> None:
                progress.report(step, metrics)
                if health is not None:
                    health.observe(step, metrics, rows)

            trainer = Trainer(
                update=self.update,
                evaluate=partial(
                    evaluate, self.policy.chunks, self.reference, self.loss, torch_device=self.device.torch_device
                ),
                sync_reference=self.sync_reference,
                check_margins=self.check_margins,
                check_ranks=self.check_ranks,
                save=self.save,
                keep_evaluation=self.keep_evaluation,
                heed=self.heed,
                at=self.at,
                on_step=on_step,
                reference=self.reference,
                data=self.data,
                validation=self.datasets.validation,
                state=self.state,
                device=self.device,
                settings=loop_settings(config, self.loss, self.total_steps, self.device),
                trackers=trackers,
                bad_steps=self.bad_steps,
            )
            self.at(step, "comparing weights")
            self.check_ranks(step)
            stack.enter_context(self.stops)
            try:
                metrics = trainer.run(step, evaluated=bool(self.start.progress.metrics))
            except TrainingError:  # which every rank raises: what is being written was in order
                self.saver.finish()
                raise
            self.saver.finish()
            return LoopEnd(metrics, "" if health is None else health.finish(), trainer.stopped)

    def _build_watchdog(self) -> HangWatchdog:
        """Watches for hung ranks; a rank alone waits for nobody."""
        ranks = self.state.tensor_size * self.state.pipeline_size * self.state.data_size
        store = None if ranks == 1 else own_store()
        return HangWatchdog(store, rank=global_rank(), world=ranks, patience_s=self.config.parallel.timeout_s)

    def at(self, step: int, doing: str) -> None:
        """Hears what this rank does in which step."""
        self.watchdog.report(step, doing)

    def update(self, batch: GlobalBatch, *, lr: float, check_at: int | None) -> StepResult:
        """Makes one update; ranks compare their weights before it where `check_at` is the step's number."""
        optimizer = self.config.optimizer
        set_hyperparameters(
            self.policy.optimizer,
            lr=lr,
            weight_decay=optimizer.weight_decay,
            betas=optimizer.betas,
            eps=optimizer.eps,
        )
        # By then every rank has gathered the weights, also where that is overlapped.
        check = None if check_at is None else partial(check_replicas, self.policy.modules, self.state, step=check_at)
        return train_step(
            self.policy.chunks,
            self.policy.optimizer,
            self.reference,
            self.loss,
            batch,
            device=self.device,
            votes=self.votes,
            before_update=check,
        )

    def sync_reference(self) -> None:
        """Mixes the policy into the reference."""
        assert self.synced is not None
        gather_weights(self.policy.chunks)
        self.synced.mix_in(self.policy.modules, self.config.reference.sync_mix)

    def check_margins(self) -> dict[str, float]:
        """What FP8 does to the margins of the first pairs."""
        batch = self.data.builder.build(self.data.pairs[: self.config.precision.fp8_check_pairs])
        return margin_errors(
            self.policy.chunks,
            self.reference,
            self.loss,
            batch,
            state=self.state,
            torch_device=self.device.torch_device,
        )

    def check_ranks(self, step: int) -> None:
        """TrainingError on every rank where weights are not finite, or differ between ranks that share them."""
        check_finite(self.policy.modules, step=step)
        if self.config.train.check_ranks_every is not None:
            check_replicas(self.policy.modules, self.state, step=step)

    def save(self, step: int, metrics: Mapping[str, float]) -> None:
        """Begins the checkpoint of a step that has been evaluated with `metrics`."""
        now = Progress(
            step=step,
            pairs_consumed=self.data.pairs_after(step),
            metrics=dict(metrics),
            skipped=self.bad_steps.total,
        )
        with nullcontext() if self.synced is None else self.synced.weights():
            self.saver.save(now, reference=[] if self.synced is None else self.synced.chunks)

    def keep_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Keeps what an evaluation of the starting weights has found with their checkpoint, where that is of this run.

        Rank 0 does. What can't be written is a warning.
        """
        checkpoint, own = self.start.checkpoint, self.run_dir / "checkpoints"
        if not (self.state.is_main and metrics and checkpoint and checkpoint.parent.resolve() == own.resolve()):
            return
        try:
            write_evaluation(checkpoint, metrics)
        except MegaDPOError as error:  # as where it is protected: no reason to end a run
            logger.warning("%s (checkpoint.keep_best can't judge it, another start from it evaluates again)", error)

    def votes(self) -> tuple[float, float]:
        """What this rank has to say: why it is to stop, and whether it still writes a checkpoint.

        A run that stops finishes the checkpoint that is under way before it makes its last one.
        """
        saves = 2 if self.saver.is_busy else 1
        return self.stops.vote(saves * self.saver.last_save_s), float(self.saver.is_writing)

    def heed(self, heard: Sequence[float]) -> str | None:
        """Gives a checkpoint that all ranks have written its name; why the run must stop, None to go on."""
        stop, writing = heard
        if not writing:
            self.saver.complete()
        return self.stops.reason(stop)
