"""A whole training run: turns a Config into the pieces of a Trainer, runs it, and hands back the exported model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import torch.distributed as dist

from megadpo.assembly import (
    Datasets,
    batch_shape,
    build_loss,
    build_policy,
    build_reference,
    load_datasets,
    loop_settings,
    torch_dtype,
)
from megadpo.checkpoint import save_checkpoint, write_durably
from megadpo.config.compose import config_from_yaml, config_to_yaml, resolve_defaults
from megadpo.config.schema import Config
from megadpo.config.validation import check_run_dir_is_fresh
from megadpo.data.loader import BatchBuilder, GlobalBatch, TrainingData
from megadpo.device import Device, megatron_device, select_device
from megadpo.errors import ConfigError, MegaDPOError
from megadpo.evaluation import evaluate
from megadpo.export import export_model, model_card
from megadpo.models.hf_config import read_architecture
from megadpo.optimizer import Policy, set_hyperparameters
from megadpo.parallel.collectives import broadcast_from_main, check_all_agree
from megadpo.parallel.state import ParallelState, build_parallel_state, distributed
from megadpo.progress import TrainingProgress
from megadpo.rank_logging import get_logger
from megadpo.reference import Reference
from megadpo.resume import StartingPoint, find_starting_point
from megadpo.trackers import Tracker, build_trackers
from megadpo.train_step import StepResult, train_step
from megadpo.trainer import Trainer

logger = get_logger(__name__)

T = TypeVar("T")

# How long a rank waits in a collective for peers that may be tokenizing, loading or writing.
_TIMEOUT_S = 1800.0


def run_training(config: Config) -> Path:
    """Trains as configured on all ranks of the launch; the run directory. The configuration has been validated.

    Raises the same MegaDPOError on every rank where its cause is the same for all of them.
    """
    device = select_device(str(config.device.kind))
    with megatron_device(device), distributed(device, timeout_s=_TIMEOUT_S):
        config = _agree_on_config(config)
        run_dir = Path(str(config.train.run_dir))
        state = build_parallel_state(
            tensor=config.parallel.tensor,
            pipeline=config.parallel.pipeline,
            virtual_pipeline=config.parallel.virtual_pipeline,
            seed=config.train.seed,
            timeout_s=_TIMEOUT_S,
        )
        _log_layout(state, device)
        _train(config, run_dir, state, device)
        return run_dir


def _agree_on_config(config: Config) -> Config:
    """Rank 0's resolved configuration on every rank; ConfigError where a rank was started with another one."""
    check_all_agree("configuration", config_to_yaml(config))

    def resolve() -> str:
        resolved = resolve_defaults(config, datetime.now())
        check_run_dir_is_fresh(resolved)
        # A directory named by the clock is this run's alone: one that starts in the same second must not share it.
        Path(str(resolved.train.run_dir)).mkdir(parents=True, exist_ok=config.train.run_dir is not None)
        return config_to_yaml(resolved)

    return config_from_yaml(_on_main(resolve))


def _on_main(action: Callable[[], T]) -> T:
    """The result of `action` on rank 0, on every rank; its MegaDPOError or OSError is raised on every rank too."""
    outcome: T | MegaDPOError | None = None
    if dist.get_rank() == 0:
        try:
            outcome = action()
        except MegaDPOError as error:
            outcome = error
        except OSError as error:
            outcome = MegaDPOError(f"{error.filename}: {error.strerror}")
    outcome = broadcast_from_main(outcome)
    if isinstance(outcome, MegaDPOError):
        raise outcome
    return cast(T, outcome)


def _log_layout(state: ParallelState, device: Device) -> None:
    virtual = f" x {state.virtual_pipeline_size} chunks" if state.virtual_pipeline_size > 1 else ""
    logger.info(
        "%d ranks on %s: tensor %d, pipeline %d%s, data %d",
        state.tensor_size * state.pipeline_size * state.data_size,
        device.kind,
        state.tensor_size,
        state.pipeline_size,
        virtual,
        state.data_size,
    )


def _train(config: Config, run_dir: Path, state: ParallelState, device: Device) -> None:
    arch = read_architecture(str(config.model.hf_path))
    datasets = load_datasets(config, arch)
    digests = datasets.digests
    check_all_agree("data or model configuration", f"{digests} {arch}")
    data = TrainingData(
        datasets.train,
        global_batch_size=config.train.global_batch_size,
        seed=config.train.seed,
        shuffle=config.train.shuffle,
        builder=BatchBuilder(
            shape=batch_shape(state, sequence_parallel=bool(config.parallel.sequence_parallel)),
            tokens_per_microbatch=config.data.tokens_per_microbatch,
            pad_token_id=datasets.pad_token_id,
        ),
    )
    total_steps = config.train.max_steps or config.train.epochs * data.steps_per_epoch
    _check_steps(config, total_steps)
    # Rank 0 decides for all: file systems may show other ranks another moment.
    start, exported = _on_main(
        lambda: (
            find_starting_point(config, run_dir, num_pairs=len(datasets.train), data_digest=digests["train"]),
            (run_dir / "hf").is_dir(),
        )
    )
    if start.step >= total_steps and exported:
        logger.info("%s is finished: step %d of %d. Nothing to do.", run_dir, start.step, total_steps)
        return
    reference = build_reference(config, arch, state, device)
    policy = build_policy(config, arch, state, device, start.checkpoint)
    metrics = _run_loop(config, run_dir, state, device, policy, reference, data, datasets, start, total_steps)
    export_model(
        policy.modules,
        arch,
        Path(str(config.model.hf_path)),
        run_dir / "hf",
        state=state,
        dtype=torch_dtype(config),
        card=model_card(
            name=config.model.name,
            loss=str(config.loss.name[0]),
            steps=max(start.step, total_steps),
            settings_yaml=config_to_yaml(config),
            metrics=metrics,
        ),
    )
    logger.info("exported the model to %s", run_dir / "hf")


def _check_steps(config: Config, total_steps: int) -> None:
    """Raises ConfigError for a warm-up that the run never ends; says which intervals it is too short for."""
    if config.optimizer.warmup_steps >= total_steps:
        raise ConfigError(
            f"optimizer.warmup_steps={config.optimizer.warmup_steps}: must be below the run's {total_steps} steps: "
            "shorten the warm-up or train longer"
        )
    for key, interval in (("eval_every", config.train.eval_every), ("save_every", config.train.save_every)):
        if interval is not None and interval > total_steps:
            logger.warning("train.%s=%d has no effect: the run has %d steps", key, interval, total_steps)


def _run_loop(
    config: Config,
    run_dir: Path,
    state: ParallelState,
    device: Device,
    policy: Policy,
    reference: Reference,
    data: TrainingData,
    datasets: Datasets,
    start: StartingPoint,
    total_steps: int,
) -> dict[str, float]:
    """Trains from the starting point to the last step; the last metrics of each kind."""
    loss = build_loss(config)

    def update(batch: GlobalBatch, lr: float) -> StepResult:
        set_hyperparameters(
            policy.optimizer,
            lr=lr,
            weight_decay=config.optimizer.weight_decay,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
        )
        return train_step(policy.chunks, policy.optimizer, reference, loss, batch, device=device)

    def save(step: int) -> None:
        path = save_checkpoint(
            run_dir / "checkpoints",
            policy.chunks,
            policy.optimizer,
            replace(start.state, step=step),
            source=Path(str(config.model.hf_path)),
            dtype=torch_dtype(config),
            keep_last=config.checkpoint.keep_last,
        )
        logger.info("saved %s", path)

    with ExitStack() as stack:
        trackers: list[Tracker] = []
        if state.is_main:
            write_durably(run_dir / "config.yaml", config_to_yaml(config))
            if start.step < total_steps:
                # Of an earlier, shorter run: once training goes on it is no longer the run's result.
                shutil.rmtree(run_dir / "hf", ignore_errors=True)
            trackers = build_trackers([str(t) for t in config.trackers], run_dir, resume_step=start.step)
            for tracker in trackers:
                stack.callback(tracker.close)
        progress = stack.enter_context(TrainingProgress(start.step, total_steps, visible=state.is_main))
        trainer = Trainer(
            update=update,
            evaluate=partial(evaluate, policy.chunks, reference, loss, device=device.torch_device),
            save=save,
            on_step=progress.report,
            data=data,
            validation=datasets.validation,
            state=state,
            device=device,
            settings=loop_settings(config, loss, total_steps),
            trackers=trackers,
        )
        return trainer.run(start.step)
