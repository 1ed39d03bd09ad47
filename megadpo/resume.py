"""Where a run begins: fresh, or at a checkpoint that is proved to belong to the same run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megadpo.checkpoint_files import (
    TrainingState,
    find_checkpoint,
    is_trained,
    list_checkpoints,
    read_training_state,
    step_directory,
)
from megadpo.config.compose import config_to_dict
from megadpo.config.schema import Config, show
from megadpo.errors import CheckpointError
from megadpo.rank_logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class StartingPoint:
    """Where a run begins: the checkpoint that it continues (None: the starting weights), and what a save says."""

    checkpoint: Path | None
    state: TrainingState

    @property
    def step(self) -> int:
        """Updates done before this run."""
        return self.state.step


def find_starting_point(
    config: Config, run_dir: Path, *, num_pairs: int, data_digest: str, vocab_size: int
) -> StartingPoint:
    """The checkpoint that train.resume names, checked to be of the same run; or a fresh start."""
    now = TrainingState(
        step=0,
        num_pairs=num_pairs,
        data_digest=data_digest,
        vocab_size=vocab_size,
        settings=_flatten(config_to_dict(config)),
    )
    checkpoint = _checkpoint_to_resume(config, run_dir)
    if checkpoint is None:
        return StartingPoint(None, now)
    saved = read_training_state(checkpoint)
    _check_same_run(checkpoint, saved, now)
    newer = [
        path.name
        for path in list_checkpoints(run_dir / "checkpoints")
        if path > step_directory(path.parent, saved.step)
    ]
    if newer:
        raise CheckpointError(
            f"train.resume={config.train.resume}: {run_dir} also holds {', '.join(newer)}, which would be mixed up "
            f"with the new branch's: remove them, or give another train.run_dir"
        )
    return StartingPoint(checkpoint, replace(now, step=saved.step))


def keep_beginning(config: Config) -> Config:
    """A copy that goes on from what the continued run began with, in the two things that time changes.

    The date that chat templates were told, unless one is given; and the checkpoint that `model.checkpoint` meant then,
    where the given one still names it or a directory that it lies in: its weights are the reference.
    """
    checkpoint = _checkpoint_to_resume(config, Path(str(config.train.run_dir)))
    if checkpoint is None:
        return config
    settings = read_training_state(checkpoint).settings
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
        found = list_checkpoints(run_dir / "checkpoints")
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


# Settings that decide which pairs a step sees: with other values the step number would mean another place in the data.
_DATA_ORDER = ("train.seed", "train.shuffle", "train.global_batch_size")
# Settings that may change freely between a run and its continuation.
_FREE = (
    "model.recompute_",
    "parallel.",
    "precision.fp8_check_",
    "optimizer.cpu_offload",
    "optimizer.offload_fraction",
    "optimizer.overlap_cpu_optimizer_d2h_h2d",
    "device.",
    "checkpoint.",
    "reference.cache_dir",
    "trackers",
    "train.resume",
    "train.run_dir",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "data.tokens_per_microbatch",
    "data.share_prompt",
    "data.train_path",
    "data.validation_path",
    "data.cache_dir",
    "data.workers",
)
# Those of them that change the rounding under FP8.
_SEEN_BY_FP8 = ("parallel.tensor", "parallel.pipeline", "data.tokens_per_microbatch", "data.share_prompt")


def _check_same_run(directory: Path, saved: TrainingState, now: TrainingState) -> None:
    """Refuses a checkpoint of other data or another data order; says which other settings have changed."""
    problems = [
        f"{key}={now.settings[key]}: the checkpoint was written with {saved.settings.get(key)}; resume with that value"
        for key in _DATA_ORDER
        if saved.settings.get(key) != now.settings[key]
    ]
    if saved.data_digest != now.data_digest:
        problems.append(
            f"the training pairs differ from the checkpoint's ({now.num_pairs} now, {saved.num_pairs} then, by token "
            "ids): resume with the same file, tokenizer, data.max_length, data.truncation, data.on_error, "
            "data.template_date and validation split"
        )
    if saved.vocab_size != now.vocab_size:
        problems.append(
            f"its model has a vocabulary of {saved.vocab_size} entries, the model's config.json now says "
            f"vocab_size = {now.vocab_size}: bring back the file that the run was started with"
        )
    before, after = (state.settings.get("reference.sync_every") for state in (saved, now))
    if (before is None) != (after is None):
        problems.append(
            f"reference.sync_every={show(after)}: the checkpoint was written with {show(before)}, and holds the "
            "reference's weights only where they follow the policy's: resume with that value"
        )
    if problems:
        raise CheckpointError(f"{directory} can't be resumed:\n" + "\n".join(f"  {p}" for p in problems))
    for key, value in now.settings.items():
        # A scale of FP8 belongs to what is packed together, and to a tensor rank's part.
        counts = now.settings["precision.fp8"] is not None and key in _SEEN_BY_FP8
        if saved.settings.get(key) != value and (counts or not key.startswith(_FREE)):
            logger.warning(
                "resuming with %s=%s; the checkpoint was written with %s", key, value, saved.settings.get(key)
            )


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and plain values of a nested mapping."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
