"""A whole training run: turns a Config into the pieces of a Trainer, runs it, and hands back the exported model."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from megadpo.checkpoint.state import load_reference
from megadpo.config.choices import ReferenceMode
from megadpo.config.compose import config_to_yaml, resolve_defaults
from megadpo.config.schema import Config
from megadpo.config.validation import check_run_dir_is_fresh
from megadpo.data.loader import START, BatchBuilder, Cursor, TrainingData
from megadpo.errors import ConfigError, Stopped, TrainingError
from megadpo.models.conversion.export import export_model, model_card
from megadpo.models.conversion.side_files import read_side_files
from megadpo.models.hf_config import Architecture, read_architecture
from megadpo.optimizer.build import Policy, gather_weights
from megadpo.reference import Reference, ResidentReference
from megadpo.runtime.collectives import check_all_agree, on_main
from megadpo.runtime.device import Device
from megadpo.runtime.files import write_durably, writing
from megadpo.runtime.parallel_state import ParallelState
from megadpo.runtime.rank_logging import get_logger
from megadpo.setup.datasets import Datasets, build_batches, load_datasets, warn_long_sequences
from megadpo.setup.launch import Launch, find_launch, forget_launch, note_launch
from megadpo.setup.model_source import ModelSource, model_source, resolve_model
from megadpo.setup.models import (
    build_policy,
    build_reference,
    check_weight_files,
    reference_fingerprint,
    refers_to_start,
)
from megadpo.setup.options import announce, torch_dtype
from megadpo.setup.reference_cache import build_cached_reference, check_starting_policy
from megadpo.setup.resume import find_starting_point, keep_beginning
from megadpo.setup.run_lock import run_lock
from megadpo.setup.run_loop import RunLoop
from megadpo.setup.session import Session, open_session
from megadpo.setup.trainer import build_loss

logger = get_logger(__name__)


def run_training(config: Config) -> Path:
    """Trains as configured on all ranks of the launch; the run directory. The configuration has been validated.

    Raises the same MegaDPOError on every rank where its cause is the same for all of them: Stopped where the run was
    told to stop, and has saved.
    """
    with open_session(config, begin) as session:
        run_dir = Path(str(session.config.train.run_dir))
        with ExitStack() as stack:
            on_main(lambda: stack.enter_context(run_lock(run_dir)))
            _train(session, run_dir, on_main(lambda: find_launch(run_dir)))
        return run_dir


def begin(config: Config) -> Config:
    """The configuration with everything filled in, and its run directory made: on one rank."""
    resolved = resolve_defaults(resolve_model(keep_beginning(config)), datetime.now())
    check_run_dir_is_fresh(resolved)
    run_dir = str(resolved.train.run_dir)
    try:
        # A directory named by the clock is this run's alone: one that starts in the same second must not share it.
        Path(run_dir).mkdir(parents=True, exist_ok=config.train.run_dir is not None)
    except OSError as error:
        raise ConfigError(
            f"train.run_dir={run_dir}: must be a directory that can be made and written to, it can't "
            f"({error.strerror}): choose another path"
        ) from error
    return resolved


def _train(session: Session, run_dir: Path, launch: Launch) -> None:
    config, state, device = session.config, session.state, session.device
    source = model_source(config.model)
    arch = read_architecture(source.hf_dir)
    announce(config, arch, device, trains=True)
    on_main(lambda: check_weight_files(config, source, arch))
    side_files = on_main(lambda: read_side_files(source.hf_dir))
    datasets = load_datasets(config, source.hf_dir, arch.vocab_size)
    warn_long_sequences(datasets, arch.max_position_embeddings)
    digests = datasets.digests
    check_all_agree("data or model configuration", f"{digests} {arch}")
    start = find_starting_point(
        config,
        run_dir,
        num_pairs=len(datasets.train),
        data_digest=digests["train"],
        vocab_size=arch.vocab_size,
        reference=on_main(lambda: reference_fingerprint(config, source)),
    )
    data = TrainingData(
        datasets.train,
        global_batch_size=config.train.global_batch_size,
        seed=config.train.seed,
        shuffle=config.train.shuffle,
        builder=build_batches(config, arch, state, datasets.pad_token_id),
        start=start.cursor,
    )
    total_steps = count_steps(config, len(datasets.train), start.cursor)
    exported = on_main(lambda: (run_dir / "hf").is_dir())
    if start.step >= total_steps and exported:
        logger.info("%s is finished: step %d of %d. Nothing to do.", run_dir, start.step, total_steps)
        return
    policy, reference = _build_models(config, source, arch, state, device, datasets, data.builder, start.checkpoint)
    on_main(lambda: _write_beginning(config, run_dir, datasets, launch, goes_on=start.step < total_steps))
    loop = RunLoop(
        session,
        run_dir,
        policy=policy,
        reference=reference,
        synced=_synced(config, reference),
        data=data,
        datasets=datasets,
        start=start,
        total_steps=total_steps,
        side_files=side_files,
        began=launch.began,
    )
    try:
        end = loop.run()
    except TrainingError:  # on every rank; torchrun's next attempt would only come to the same
        on_main(lambda: note_launch(run_dir, replace(launch, stopped="a check of its numbers", wrong=True)))
        raise
    if end.stopped is not None:
        on_main(lambda: note_launch(run_dir, replace(launch, stopped=end.stopped)))
        raise Stopped(f"stopped by {end.stopped}: {run_dir} goes on with train.resume=auto")
    gather_weights(policy.chunks)
    export_model(
        policy.modules,
        arch,
        side_files,
        run_dir / "hf",
        state=state,
        dtype=torch_dtype(config),
        card=model_card(
            name=config.model.name,
            loss=" + ".join(f"{weight:g} {name}" if weight != 1 else name for weight, name in build_loss(config).terms),
            steps=max(start.step, total_steps),
            settings_yaml=config_to_yaml(config),
            # Of a run that was killed before its export, what is left to do finds none.
            metrics=end.metrics or start.progress.metrics,
            health=end.health,
        ),
    )
    on_main(lambda: forget_launch(run_dir))
    logger.info("exported the model to %s", run_dir / "hf")


def _build_models(
    config: Config,
    source: ModelSource,
    arch: Architecture,
    state: ParallelState,
    device: Device,
    datasets: Datasets,
    builder: BatchBuilder,
    checkpoint: Path | None,
) -> tuple[Policy, Reference]:
    """The policy, from `checkpoint` where one is given, and its reference."""
    if config.reference.mode == ReferenceMode.cached:
        # Whatever model completes the cache is gone before the policy comes.
        cached = build_cached_reference(config, source, arch, state, device, datasets, builder)
        policy = build_policy(config, source, arch, state, device, checkpoint)
        if checkpoint is None and refers_to_start(config):
            check_starting_policy(config, source, policy.chunks, cached, datasets, builder, state, device)
        return policy, cached
    reference = build_reference(config, source, arch, state, device)
    policy = build_policy(config, source, arch, state, device, checkpoint)
    synced = _synced(config, reference)
    if checkpoint is not None and synced is not None:
        with synced.weights(change=True):
            load_reference(checkpoint, synced.chunks)
    return policy, reference


def _synced(config: Config, reference: Reference) -> ResidentReference | None:
    """The reference where it is to follow the policy."""
    if config.reference.sync_every is None:
        return None
    assert isinstance(reference, ResidentReference)  # the configuration was checked
    return reference


def count_steps(config: Config, num_pairs: int, start: Cursor = START) -> int:
    """Updates of a run, with those before `start`; ConfigError for a warm-up that it never ends.

    Says which intervals it is too short for.
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


def _write_beginning(config: Config, run_dir: Path, datasets: Datasets, launch: Launch, *, goes_on: bool) -> None:
    """Writes down what is trained on what, and takes away the result of an earlier, shorter run; on one rank."""
    write_durably(run_dir / "config.yaml", config_to_yaml(config))
    write_durably(run_dir / "data.json", json.dumps(datasets.report(), indent=1) + "\n")
    note_launch(run_dir, launch)
    exported = run_dir / "hf"
    if goes_on and exported.is_dir():
        with writing(exported):
            shutil.rmtree(exported)
