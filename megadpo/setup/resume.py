"""Where a run begins: fresh, or at a checkpoint that is proved to belong to the same run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megadpo.checkpoint.description import (
    Progress,
    RunIdentity,
    is_readable,
    is_trained,
    metrics_of,
    read_training,
)
from megadpo.checkpoint.directory import (
    HF_DIRECTORY,
    find_checkpoint,
    list_checkpoints,
    name_latest,
    step_directories,
    step_directory,
)
from megadpo.checkpoint.manifest import Damage, DamageKind
from megadpo.checkpoint.state import check_undamaged, damage_of
from megadpo.config.choices import ResumeChange
from megadpo.config.compose import config_to_dict
from megadpo.config.schema import Config
from megadpo.data.loader import Cursor
from megadpo.errors import CheckpointError, listing
from megadpo.runtime.collectives import on_main
from megadpo.runtime.files import writing
from megadpo.runtime.rank_logging import get_logger
from megadpo.setup.program import package_versions
from megadpo.setup.resume_rules import check_resumable

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class StartingPoint:
    """Where a run begins: the checkpoint that it continues (None: the starting weights), and what a save says.

    `changes` are those of train.resume_changes that the run makes here.
    """

    checkpoint: Path | None
    identity: RunIdentity
    progress: Progress
    changes: tuple[ResumeChange, ...] = ()

    @property
    def step(self) -> int:
        """Updates done before this run."""
        return self.progress.step

    @property
    def cursor(self) -> Cursor:
        """The place in the training pairs to go on from; other pairs than the checkpoint's begin with their first."""
        return Cursor(self.progress.step, self.progress.pairs_consumed)


def find_starting_point(
    config: Config, run_dir: Path, *, num_pairs: int, data_digest: str, vocab_size: int, reference: str
) -> StartingPoint:
    """The checkpoint that train.resume names, checked to be whole and of the same run; or a fresh start.

    Collective over all ranks. CheckpointError on every rank where there is none to go on from, or it is of another run.
    """
    now = RunIdentity(
        num_pairs=num_pairs,
        data_digest=data_digest,
        vocab_size=vocab_size,
        reference=reference,
        settings=_flatten(config_to_dict(config)),
        versions=package_versions(),
    )
    checkpoint = _choose(config, run_dir)
    if checkpoint is None:
        return StartingPoint(None, now, Progress())
    # Rank 0 decides for all: file systems may show other ranks another moment.
    return on_main(lambda: _go_on(config, run_dir, checkpoint, now))


def _choose(config: Config, run_dir: Path) -> Path | None:
    """The newest checkpoint that is whole, or the one that is named; collective over all ranks.

    Damaged ones are set aside under another name, so that what they were can still be looked at.
    """
    if config.train.resume != "auto":
        named = on_main(lambda: _checkpoint_to_resume(config, run_dir))
        if named is not None:
            check_undamaged(named, "train.resume=DIR")
        return named
    damaged: dict[Path, list[Damage]] = {}
    for candidate in reversed(on_main(lambda: step_directories(run_dir / "checkpoints"))):
        damage = damage_of(candidate)
        on_main(partial(_check_version, candidate, damage))
        if not damage:
            on_main(partial(_settle_on, candidate, damaged))
            return candidate
        damaged[candidate] = damage
    if damaged:
        wrong = [f"{path.name}: {found.text}" for path, damage in damaged.items() for found in damage]
        raise CheckpointError(
            f"train.resume=auto: no checkpoint of {run_dir} is whole; bring one back, or give another train.run_dir to "
            f"start anew:\n{listing(wrong)}"
        )
    on_main(partial(_check_not_exported, run_dir))
    return None


def _check_not_exported(run_dir: Path) -> None:
    """CheckpointError for a run that has come to its end, and has no checkpoint any more to show it."""
    exported = run_dir / HF_DIRECTORY
    if exported.is_dir():
        raise CheckpointError(
            f"train.resume=auto: {exported} is there, the model of a run that has ended, and no checkpoint of it: "
            f"begun anew, the run would take its place. Give another train.run_dir, or take {exported} away"
        )


def _check_version(checkpoint: Path, damage: Sequence[Damage]) -> None:
    """CheckpointError for one that another version wrote: it is whole, and its steps must not be trained again."""
    foreign = [found.text for found in damage if found.kind is DamageKind.other_format]
    if not damage:
        try:
            read_training(checkpoint)
        except CheckpointError as error:
            foreign = [str(error)]
    if foreign:
        raise CheckpointError(
            f"train.resume=auto: {checkpoint} is of another version of megadpo: {foreign[0]}. Go on with that version, "
            "or take the checkpoint out of its directory to go on from the one before"
        )


def _settle_on(checkpoint: Path, damaged: Mapping[Path, Sequence[Damage]]) -> None:
    """Makes a checkpoint the run's latest: takes away the names of damaged ones that are newer, and says so."""
    name_latest(checkpoint)
    for bad, damage in damaged.items():
        aside = bad.with_name(f"damaged_{bad.name}")
        with writing(aside, CheckpointError):
            if aside.exists():
                shutil.rmtree(aside)
            bad.rename(aside)
        logger.warning(
            "%s IS DAMAGED and is not used; it is now %s:\n%s",
            bad,
            aside.name,
            listing([found.text for found in damage]),
        )
    if damaged:
        logger.warning("the run goes on from %s", checkpoint)


def _go_on(config: Config, run_dir: Path, checkpoint: Path, now: RunIdentity) -> StartingPoint:
    """The run at a checkpoint of it; on one rank."""
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


def keep_beginning(config: Config) -> Config:
    """A copy that goes on from what the continued run began with, in the two things that time changes.

    The date that chat templates were told, unless one is given; and the checkpoint that `model.checkpoint` meant then,
    where the given one still names it or a directory that it lies in: its weights are the reference.
    """
    checkpoint = _checkpoint_to_resume(config, Path(str(config.train.run_dir)))
    if checkpoint is None:
        return config
    try:
        settings = read_training(checkpoint)[0].settings
    except CheckpointError:  # said when the checkpoint is chosen, or another one is
        return config
    data, model = config.data, config.model
    if data.template_date is None:
        data = replace(data, template_date=settings.get("data.template_date"))
    started_from = settings.get("model.checkpoint")
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


def _checkpoint_to_resume(config: Config, run_dir: Path) -> Path | None:
    if config.train.resume == "never":
        return None
    if config.train.resume == "auto":
        found = [path for path in list_checkpoints(run_dir / "checkpoints") if is_readable(path)]
        return found[-1] if found else None
    try:
        named = find_checkpoint(Path(config.train.resume))
    except CheckpointError as error:
        raise CheckpointError(f"train.resume={config.train.resume}: {error}") from None
    if not is_trained(named):
        raise CheckpointError(
            f"train.resume={config.train.resume}: an imported checkpoint holds weights and no training to go on with: "
            f"start a run from it with model.checkpoint={named}"
        )
    return named


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and plain values of a nested mapping."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
