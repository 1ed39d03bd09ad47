"""Builds a run's trainer: loss and settings, checkpoints and log, stop requests and watchdog."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megadpo.checkpoint.directory import Retention
from megadpo.checkpoint.saver import CheckpointSaver
from megadpo.config.choices import Dtype, ResumeChange
from megadpo.config.reference_rules import LIVE
from megadpo.config.schema import Config
from megadpo.config.typed import config_to_dict
from megadpo.data.loader import START, Cursor, TrainingData
from megadpo.errors import ConfigError
from megadpo.health.history import RunFacts
from megadpo.health.log import HealthLog
from megadpo.health.watchdog import HangWatchdog
from megadpo.loss.preference import PreferenceLoss
from megadpo.loss.table import LOSSES
from megadpo.metrics.trackers import open_trackers
from megadpo.models.conversion.side_files import SideFiles
from megadpo.optimizer.build import Policy
from megadpo.optimizer.schedule import LearningRate
from megadpo.reference import Reference
from megadpo.runtime.collectives import own_store
from megadpo.runtime.progress import TrainingProgress
from megadpo.runtime.rank_logging import get_logger, global_rank
from megadpo.setup.backend import torch_dtype
from megadpo.setup.datasets import Datasets
from megadpo.setup.models import refers_to_start
from megadpo.setup.resume import StartingPoint
from megadpo.setup.session import Session
from megadpo.train.first_step import ExpectedFirstLoss
from megadpo.train.metrics_log import MetricsLog
from megadpo.train.skipped_steps import SkippedSteps
from megadpo.train.stop_requests import StopRequests
from megadpo.train.trainer import Trainer, TrainerSettings

logger = get_logger(__name__)

# How far the first loss may be from its value without preference. A live reference runs on the policy's schedule, so
# that only the mean rounds; cached log-probs were computed in another packing, or in another layout.
_LIVE_TOLERANCE, _CACHED_TOLERANCE, _CACHED_AND_ROUNDED_TOLERANCE = 1e-6, 1e-5, 1e-3


@contextmanager
def open_trainer(
    session: Session,
    run_dir: Path,
    *,
    policy: Policy,
    reference: Reference,
    data: TrainingData,
    datasets: Datasets,
    start: StartingPoint,
    total_steps: int,
    side_files: SideFiles,
    launched_at: float,
) -> Iterator[Trainer]:
    """The trainer of a run that starts at `start`, with all that it writes to, for the duration of the context.

    `launched_at` is when the launch began, in seconds since the epoch. Collective over all ranks.
    """
    config, state, device = session.config, session.state, session.device
    loss, step = build_loss(config), start.step
    with ExitStack() as stack:
        watchdog = _build_watchdog(session)
        checkpoints = _build_checkpoints(session, run_dir, policy, start, side_files, watchdog)
        stack.callback(checkpoints.close)
        checkpoints.tidy()
        stack.enter_context(watchdog)
        watchdog.report(step, "opening trackers")
        health = _open_health_log(session, run_dir, loss, datasets, start) if state.is_main else None
        names = [str(tracker) for tracker in config.trackers] if state.is_main else []
        settings = config_to_dict(config)
        trackers = stack.enter_context(open_trackers(names, run_dir, resume_step=step, settings=settings))
        stack.callback(watchdog.report_phase, "closing trackers")
        progress = stack.enter_context(TrainingProgress(step, total_steps, visible=state.is_main))
        yield Trainer(
            policy=policy,
            reference=reference,
            loss=loss,
            data=data,
            validation=datasets.validation,
            start=start.progress,
            settings=trainer_settings(config, loss, total_steps),
            state=state,
            device=device,
            checkpoints=checkpoints,
            log=MetricsLog(
                trackers=trackers,
                progress=progress,
                health=health,
                state=state,
                device=device,
                peak_flops=device.peak_flops(torch_dtype(config)),
            ),
            skipped=SkippedSteps(
                run_dir / "bad_steps",
                limit=config.train.max_bad_steps,
                total=start.progress.skipped,
                pairs=datasets.train,
                state=state,
                torch_device=device.torch_device,
            ),
            stop=StopRequests(max_hours=config.train.max_hours, began=launched_at),
            watchdog=watchdog,
        )


def _build_watchdog(session: Session) -> HangWatchdog:
    """The watchdog of this rank; without a store where it is alone and waits for nobody."""
    state = session.state
    ranks = state.tensor_size * state.pipeline_size * state.data_size
    store = own_store() if ranks > 1 else None
    return HangWatchdog(store, rank=global_rank(), world=ranks, patience_s=session.config.parallel.timeout_s)


def _build_checkpoints(
    session: Session,
    run_dir: Path,
    policy: Policy,
    start: StartingPoint,
    side_files: SideFiles,
    watchdog: HangWatchdog,
) -> CheckpointSaver:
    kept = session.config.checkpoint
    return CheckpointSaver(
        run_dir / "checkpoints",
        policy.chunks,
        policy.optimizer,
        identity=start.identity,
        side_files=side_files,
        dtype=torch_dtype(session.config),
        retention=Retention(kept.keep_last, kept.keep_every, kept.keep_best),
        asynchronous=kept.async_save,
        resumed_from=start.checkpoint,
        watchdog=watchdog,
    )


def _open_health_log(
    session: Session, run_dir: Path, loss: PreferenceLoss, datasets: Datasets, start: StartingPoint
) -> HealthLog:
    # A spike beside other pairs or another loss means nothing; another batch size changes no mean.
    anew = bool({*start.changes} - {ResumeChange.batch_size})
    facts = health_facts(session.config, loss)
    return HealthLog(run_dir, facts, resume_step=start.step, anew=anew, locate_row=datasets.train.where)


def count_steps(config: Config, num_pairs: int, start: Cursor = START) -> int:
    """Updates of a run, with those before `start`; ConfigError for a warm-up that it never ends.

    Logs which intervals it is too short for.
    """
    total_steps = config.train.max_steps or start.steps_of(
        config.train.epochs, num_pairs=num_pairs, global_batch_size=config.train.global_batch_size
    )
    if config.optimizer.warmup_steps >= total_steps:
        raise ConfigError(
            f"optimizer.warmup_steps={config.optimizer.warmup_steps}: must be below the run's {total_steps} steps: "
            "shorten the warm-up or train longer"
        )
    for key, interval in (("eval_every", config.train.eval_every), ("save_every", config.train.save_every)):
        if interval is not None and interval > total_steps:
            logger.warning("train.%s=%d has no effect: the run has %d steps", key, interval, total_steps)
    return total_steps


def build_loss(config: Config) -> PreferenceLoss:
    """The loss of a pair, or the mix of several."""
    loss = config.loss
    return PreferenceLoss(
        *(str(name) for name in loss.name),
        weights=loss.weights,
        beta=loss.beta,
        label_smoothing=loss.label_smoothing,
        ipo_length_normalize=loss.ipo_length_normalize,
        discopop_tau=loss.discopop_tau,
        simpo_gamma=loss.simpo_gamma,
        f_divergence=str(loss.f_divergence),
        f_alpha_divergence_coef=loss.f_alpha_divergence_coef,
        ld_alpha=loss.ld_alpha,
    )


def trainer_settings(config: Config, loss: PreferenceLoss, total_steps: int) -> TrainerSettings:
    """The numbers that the trainer goes by."""
    train, optimizer = config.train, config.optimizer
    return TrainerSettings(
        total_steps=total_steps,
        log_every=train.log_every,
        eval_every=train.eval_every,
        save_every=train.save_every,
        check_ranks_every=train.check_ranks_every,
        fp8_check_every=config.precision.fp8_check_every,
        fp8_check_pairs=config.precision.fp8_check_pairs,
        sync_every=config.reference.sync_every,
        sync_mix=config.reference.sync_mix,
        learning_rate=LearningRate(
            peak=optimizer.lr,
            minimum=optimizer.min_lr,
            schedule=str(optimizer.schedule),
            warmup_steps=optimizer.warmup_steps,
            total_steps=total_steps,
        ),
        weight_decay=optimizer.weight_decay,
        betas=optimizer.betas,
        eps=optimizer.eps,
        expected_first_loss=_expected_first_loss(config, loss),
    )


def health_facts(config: Config, loss: PreferenceLoss) -> RunFacts:
    """The settings that a run's health is judged by."""
    return RunFacts(
        beta=loss.beta,
        has_reference=loss.needs_reference,
        loss_at_start=loss.value_without_preference,
        least_loss=loss.least_value,
        clip_grad=config.optimizer.clip_grad,
        peak_lr=config.optimizer.lr,
        has_preference=any(LOSSES[name].has_preference for name in loss.names),
        raises_chosen=all(LOSSES[name].raises_chosen for name in loss.names),
        aimed_drift=loss.aimed_drift,
    )


def _expected_first_loss(config: Config, loss: PreferenceLoss) -> ExpectedFirstLoss | None:
    """The first loss where the reference is the starting policy; None where it is not, or there is none."""
    if not refers_to_start(config) or not loss.needs_reference:
        return None
    value, precision = loss.value_without_preference, config.precision
    if config.reference.mode in LIVE:
        remedy = "The two models compute different numbers: the gradients would be wrong"
        return ExpectedFirstLoss(value, _LIVE_TOLERANCE, "live reference on the same schedule", remedy)
    exact = precision.dtype == Dtype.fp32 and precision.fp8 is None
    rounding = "fp32" if exact else "bf16" if precision.fp8 is None else "FP8"
    return ExpectedFirstLoss(
        value,
        _CACHED_TOLERANCE if exact else _CACHED_AND_ROUNDED_TOLERANCE,
        f"cached reference in {rounding}",
        f"What {config.reference.cache_dir} has of these pairs is not what this model computes: if another layout has "
        "filled it, fill one in this layout; or else something is wrong with it, and another directory is needed",
    )
