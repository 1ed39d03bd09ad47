"""The run directory at the start of a run: made, given the choices of an earlier start, and first written to."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from megadpo.checkpoint.description import read_training
from megadpo.checkpoint.resumable import resumed_checkpoint
from megadpo.config.compose import config_to_yaml, resolve_defaults
from megadpo.config.schema import Config
from megadpo.config.validation import check_run_dir_is_fresh
from megadpo.errors import CheckpointError, ConfigError
from megadpo.runtime.files import write_durably, writing
from megadpo.setup.datasets import Datasets
from megadpo.setup.launch import Launch, note_launch
from megadpo.setup.model_source import resolve_model


def begin(config: Config) -> Config:
    """The configuration with everything filled in, and its run directory made: on one rank."""
    resolved = resolve_defaults(resolve_model(restore_starting_choices(config)), datetime.now())
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


def restore_starting_choices(config: Config) -> Config:
    """A copy with the two choices of a resumed run's first start that time would change.

    The date that chat templates were told, unless one is given; and the checkpoint that `model.checkpoint` meant then,
    where the given one still names it or a directory that it lies in: its weights are the reference.
    """
    checkpoint = resumed_checkpoint(Path(str(config.train.run_dir)), config.train.resume)
    if checkpoint is None:
        return config
    try:
        identity, _ = read_training(checkpoint)
    except CheckpointError:  # reported when the checkpoint is chosen, or another one is
        return config
    data, model = config.data, config.model
    if data.template_date is None:
        data = replace(data, template_date=identity.settings.get("data.template_date"))
    started_from = identity.settings.get("model.checkpoint")
    if (
        model.checkpoint is not None
        and started_from is not None
        and _within(Path(started_from), Path(model.checkpoint))
    ):
        model = replace(model, checkpoint=started_from)
    return replace(config, data=data, model=model)


def _within(inner: Path, outer: Path) -> bool:
    inner, outer = inner.resolve(), outer.resolve()
    return outer in (inner, *inner.parents)


def write_beginning(config: Config, run_dir: Path, datasets: Datasets, launch: Launch, *, trains: bool) -> None:
    """Writes the configuration and the counts of the data, and notes the launch; on one rank.

    Where the run `trains` further, the exported model of an earlier, shorter run is removed.
    """
    write_durably(run_dir / "config.yaml", config_to_yaml(config))
    write_durably(run_dir / "data.json", json.dumps(datasets.report(), indent=1) + "\n")
    note_launch(run_dir, launch)
    exported = run_dir / "hf"
    if trains and exported.is_dir():
        with writing(exported):
            shutil.rmtree(exported)
