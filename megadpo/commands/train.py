"""The training command: trains as configured and exports the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from megadpo.config.choices import ReferenceMode
from megadpo.config.compose import config_to_yaml
from megadpo.config.schema import Config
from megadpo.data.loader import BatchBuilder
from megadpo.errors import Stopped, TrainingError
from megadpo.models.conversion.export import export_model, model_card
from megadpo.models.conversion.side_files import SideFiles, read_side_files
from megadpo.optimizer.build import Policy, gather_weights
from megadpo.reference import Reference
from megadpo.runtime.collectives import on_main
from megadpo.runtime.rank_logging import get_logger
from megadpo.setup.backend import torch_dtype
from megadpo.setup.datasets import Datasets, build_training_data, load_datasets
from megadpo.setup.launch import Launch, find_launch, forget_launch, note_launch
from megadpo.setup.models import build_policy, build_reference, check_weight_files, refers_to_start
from megadpo.setup.options import check_and_log_options
from megadpo.setup.reference_cache import build_cached_reference, check_starting_policy
from megadpo.setup.resume import StartingPoint, find_starting_point
from megadpo.setup.run_directory import begin, write_beginning
from megadpo.setup.run_lock import run_lock
from megadpo.setup.session import Session, open_session
from megadpo.setup.trainer import build_loss, count_steps, open_trainer
from megadpo.train.trainer import TrainResult

logger = get_logger(__name__)


def run_training(config: Config) -> Path:
    """Trains as configured on all ranks of the launch; returns the run directory. `config` has been validated.

    Raises the same MegaDPOError on every rank where its cause is the same for all of them: Stopped where the run was
    told to stop, and has saved.
    """
    with open_session(config, begin) as session, ExitStack() as stack:
        run_dir = Path(str(session.config.train.run_dir))
        on_main(lambda: stack.enter_context(run_lock(run_dir)))
        launch = on_main(lambda: find_launch(run_dir))
        check_and_log_options(session, trains=True)
        on_main(lambda: check_weight_files(session))
        side_files = on_main(lambda: read_side_files(session.source.hf_dir))
        datasets = load_datasets(session)
        start = find_starting_point(session, run_dir, datasets)
        total_steps = count_steps(session.config, len(datasets.train), start.cursor)
        if on_main(lambda: start.step >= total_steps and (run_dir / "hf").is_dir()):
            logger.info("%s is finished: step %d of %d. Nothing to do.", run_dir, start.step, total_steps)
            return run_dir
        data = build_training_data(session, datasets, start.cursor)
        policy, reference = _build_models(session, datasets, data.builder, start.checkpoint)
        trains = start.step < total_steps
        on_main(lambda: write_beginning(session.config, run_dir, datasets, launch, trains=trains))
        with (
            _error_noted(run_dir, launch),
            open_trainer(
                session,
                run_dir,
                policy=policy,
                reference=reference,
                data=data,
                datasets=datasets,
                start=start,
                total_steps=total_steps,
                side_files=side_files,
                launched_at=launch.began,
            ) as trainer,
        ):
            result = trainer.train()
        if result.stopped is not None:
            on_main(lambda: note_launch(run_dir, replace(launch, stopped=result.stopped)))
            raise Stopped(f"stopped by {result.stopped}: {run_dir} goes on with train.resume=auto")
        _export(session, run_dir, policy, side_files, start, total_steps, result)
        on_main(lambda: forget_launch(run_dir))
        logger.info("exported the model to %s", run_dir / "hf")
    return run_dir


def _build_models(
    session: Session, datasets: Datasets, builder: BatchBuilder, checkpoint: Path | None
) -> tuple[Policy, Reference]:
    """The policy, from `checkpoint` where one is given, and its reference."""
    if session.config.reference.mode != ReferenceMode.cached:
        reference = build_reference(session, checkpoint)
        return build_policy(session, checkpoint), reference
    # A model that completes the cache is freed before the policy is built.
    cached = build_cached_reference(session, datasets, builder)
    policy = build_policy(session, checkpoint)
    if checkpoint is None and refers_to_start(session.config):
        check_starting_policy(session, policy, cached, datasets, builder)
    return policy, cached


@contextmanager
def _error_noted(run_dir: Path, launch: Launch) -> Iterator[None]:
    """Notes a TrainingError in the run directory: torchrun's next attempt would only come to the same."""
    try:
        yield
    except TrainingError:  # on every rank
        on_main(lambda: note_launch(run_dir, replace(launch, stopped="a check of its numbers", wrong=True)))
        raise


def _export(
    session: Session,
    run_dir: Path,
    policy: Policy,
    side_files: SideFiles,
    start: StartingPoint,
    total_steps: int,
    result: TrainResult,
) -> None:
    """Writes the trained model with its model card as the run's `hf/`; collective over all ranks."""
    config = session.config
    gather_weights(policy.chunks)
    export_model(
        policy.modules,
        session.arch,
        side_files,
        run_dir / "hf",
        state=session.state,
        dtype=torch_dtype(config),
        card=model_card(
            name=config.model.name,
            loss=" + ".join(f"{weight:g} {name}" if weight != 1 else name for weight, name in build_loss(config).terms),
            steps=max(start.step, total_steps),
            settings_yaml=config_to_yaml(config),
            # A run that was killed before its export logs nothing when it is resumed.
            metrics=result.metrics or start.progress.metrics,
            health=result.health,
        ),
    )
