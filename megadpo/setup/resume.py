"""The starting point of a run: fresh, or a checkpoint that is proved to belong to the same run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megadpo.checkpoint.description import Progress, RunIdentity, metrics_of, read_training
from megadpo.checkpoint.directory import list_checkpoints, step_directory
from megadpo.checkpoint.resumable import choose_checkpoint
from megadpo.config.choices import ResumeChange
from megadpo.config.schema import Config
from megadpo.config.typed import config_to_dict
from megadpo.data.loader import Cursor
from megadpo.errors import CheckpointError
from megadpo.runtime.collectives import on_main
from megadpo.setup.datasets import Datasets
from megadpo.setup.models import reference_fingerprint
from megadpo.setup.program import package_versions
from megadpo.setup.resume_rules import check_resumable
from megadpo.setup.session import Session


@dataclass(frozen=True, slots=True)
class StartingPoint:
    """The place where a run starts: the checkpoint that it resumes (None: the starting weights), and the run itself.

    `changes` are those of train.resume_changes that the run makes here.
    """

    checkpoint: Path | None
    identity: RunIdentity
    progress: Progress
    changes: tuple[ResumeChange, ...] = ()

    @property
    def step(self) -> int:
        """Updates done before this start."""
        return self.progress.step

    @property
    def cursor(self) -> Cursor:
        """The place in the training pairs to continue at; other pairs than the checkpoint's begin with their first."""
        return Cursor(self.progress.step, self.progress.pairs_consumed)


def find_starting_point(session: Session, run_dir: Path, datasets: Datasets) -> StartingPoint:
    """The checkpoint that train.resume names, checked to be whole and of the same run; or a fresh start.

    Collective over all ranks. CheckpointError on every rank where there is none to resume from, or it is of another
    run.
    """
    config = session.config
    now = RunIdentity(
        num_pairs=len(datasets.train),
        data_digest=datasets.digests["train"],
        vocab_size=session.arch.vocab_size,
        reference=on_main(lambda: reference_fingerprint(session)),
        settings=_flatten(config_to_dict(config)),
        versions=package_versions(),
    )
    checkpoint = choose_checkpoint(run_dir, config.train.resume)
    if checkpoint is None:
        return StartingPoint(None, now, Progress())
    # Rank 0 decides for all: file systems may show other ranks another moment.
    return on_main(lambda: _resume(config, run_dir, checkpoint, now))


def _resume(config: Config, run_dir: Path, checkpoint: Path, now: RunIdentity) -> StartingPoint:
    """The starting point at a checkpoint of the run; on one rank."""
    saved, progress = read_training(checkpoint)
    changes = check_resumable(checkpoint, saved, now, config.train.resume_changes)
    newer = [
        path.name
        for path in list_checkpoints(run_dir / "checkpoints")
        if path > step_directory(path.parent, progress.step)
    ]
    if newer:
        raise CheckpointError(
            f"train.resume={config.train.resume}: {run_dir} also holds {', '.join(newer)}, which would be mixed up "
            f"with the new branch's: remove them, or give another train.run_dir"
        )
    pairs_consumed = progress.pairs_consumed if saved.data_digest == now.data_digest else 0
    progress = replace(progress, pairs_consumed=pairs_consumed, metrics=metrics_of(checkpoint))
    return StartingPoint(checkpoint, now, progress, changes)


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and plain values of a nested mapping."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
