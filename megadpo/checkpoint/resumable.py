"""The checkpoint that a run resumes from: the one that is named, or the newest whole one."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from megadpo.checkpoint.description import is_readable, is_trained, read_training
from megadpo.checkpoint.directory import (
    HF_DIRECTORY,
    find_checkpoint,
    list_checkpoints,
    name_latest,
    step_directories,
)
from megadpo.checkpoint.manifest import Damage, DamageKind
from megadpo.checkpoint.state import check_undamaged, damage_of
from megadpo.errors import CheckpointError, listing
from megadpo.runtime.collectives import on_main
from megadpo.runtime.files import writing
from megadpo.runtime.rank_logging import get_logger

logger = get_logger(__name__)


def choose_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint that train.resume means, with every file as it was written; None to start afresh.

    With `auto` that is the newest one of `run_dir` that is whole. Damaged newer ones are renamed, so that they can
    still be looked at. Collective over all ranks; CheckpointError on every rank where there is none to resume from.
    """
    if resume != "auto":
        named = on_main(lambda: resumed_checkpoint(run_dir, resume))
        if named is not None:
            check_undamaged(named, "train.resume=DIR")
        return named
    damaged: dict[Path, list[Damage]] = {}
    for candidate in reversed(on_main(lambda: step_directories(run_dir / "checkpoints"))):
        damage = damage_of(candidate)
        on_main(partial(_check_version, candidate, damage))
        if not damage:
            on_main(partial(_adopt, candidate, damaged))
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


def resumed_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint that train.resume means by its description, without a look at its other files; for one process.

    None where there is none, or `resume` is `never`. CheckpointError for one that is named and can't be resumed.
    """
    if resume == "never":
        return None
    if resume == "auto":
        found = [path for path in list_checkpoints(run_dir / "checkpoints") if is_readable(path)]
        return found[-1] if found else None
    try:
        named = find_checkpoint(Path(resume))
    except CheckpointError as error:
        raise CheckpointError(f"train.resume={resume}: {error}") from None
    if not is_trained(named):
        raise CheckpointError(
            f"train.resume={resume}: an imported checkpoint holds weights and no training to go on with: "
            f"start a run from it with model.checkpoint={named}"
        )
    return named


def _check_not_exported(run_dir: Path) -> None:
    """CheckpointError for a finished run whose checkpoints are all gone."""
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


def _adopt(checkpoint: Path, damaged: Mapping[Path, Sequence[Damage]]) -> None:
    """Makes a checkpoint the run's latest, renames damaged ones that are newer, and logs both."""
    name_latest(checkpoint)
    for bad, damage in damaged.items():
        aside = bad.with_name(f"damaged_{bad.name}")
        with writing(aside, CheckpointError):
            if aside.exists():
                shutil.rmtree(aside)
            bad.rename(aside)
        texts = listing([found.text for found in damage])
        logger.warning("%s IS DAMAGED and is not used; it is now %s:\n%s", bad, aside.name, texts)
    if damaged:
        logger.warning("the run goes on from %s", checkpoint)
