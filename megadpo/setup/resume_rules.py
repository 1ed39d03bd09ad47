"""The rules of resuming: what must be the same as when the checkpoint was saved, and what may differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megadpo.checkpoint.description import RunIdentity
from megadpo.config.choices import ResumeChange
from megadpo.config.schema import show
from megadpo.errors import CheckpointError, listing
from megadpo.runtime.rank_logging import get_logger

logger = get_logger(__name__)

# Settings that decide which pairs a step sees: with other values the place in the data would mean other pairs.
_DATA_ORDER = ("train.seed", "train.shuffle")
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
    "train.resume",  # and train.resume_changes
    "train.max_hours",
    "train.max_bad_steps",
    "train.check_ranks_every",
    "train.global_batch_size",  # these two are told above
    "loss.",
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


def check_resumable(
    directory: Path, saved: RunIdentity, now: RunIdentity, meant: Sequence[ResumeChange]
) -> tuple[ResumeChange, ...]:
    """The changes among those `meant` that there are; logs other permitted ones. CheckpointError for any further."""
    problems = [
        *(f"{text}; resume with that value" for text in _settings_that_differ(saved, now, _DATA_ORDER)),
        *_check_vocabulary(saved, now),
        *_check_sync(saved, now),
    ]
    changes = _changes(saved, now)
    for change, (differences, remedy) in changes.items():
        if change in meant:
            for text in differences:
                logger.warning("resuming with %s, as train.resume_changes says", text)
        else:
            problems += [
                f"{text}; {remedy}, or say that it is meant with train.resume_changes=[{change}]"
                for text in differences
            ]
    if problems:
        raise CheckpointError(f"{directory} can't be resumed:\n{listing(problems)}")
    _log_other_changes(saved, now)
    return tuple(change for change, (differences, _) in changes.items() if differences)


def _changes(saved: RunIdentity, now: RunIdentity) -> dict[ResumeChange, tuple[list[str], str]]:
    """The differences of each kind that must be meant, with the remedy that avoids them."""
    data = [
        f"the training pairs differ from the checkpoint's ({now.num_pairs} now, {saved.num_pairs} then, by token ids)"
    ]
    reference = ["the reference's weights differ from the run's, by the sizes of their files and pieces of them"]
    follows = now.settings["reference.sync_every"] is not None  # then its weights are in the checkpoint
    losses = [key for key in now.settings if key.startswith("loss.")]
    as_before = "resume with that value"
    return {
        ResumeChange.data: (
            data if saved.data_digest != now.data_digest else [],
            "resume with the same file, tokenizer, data.max_length, data.truncation, data.on_error, data.template_date "
            "and validation split",
        ),
        ResumeChange.batch_size: (_settings_that_differ(saved, now, ["train.global_batch_size"]), as_before),
        ResumeChange.loss: (_settings_that_differ(saved, now, losses), as_before),
        ResumeChange.reference: (
            reference if saved.reference != now.reference and not follows else [],
            "resume with the files that the run was started with",
        ),
    }


def _settings_that_differ(saved: RunIdentity, now: RunIdentity, keys: Sequence[str]) -> list[str]:
    return [
        f"{key}={show(now.settings[key])}: the checkpoint was written with {show(saved.settings.get(key))}"
        for key in keys
        if saved.settings.get(key) != now.settings[key]
    ]


def _check_vocabulary(saved: RunIdentity, now: RunIdentity) -> list[str]:
    if saved.vocab_size == now.vocab_size:
        return []
    return [
        f"its model has a vocabulary of {saved.vocab_size} entries, the model's config.json now says "
        f"vocab_size = {now.vocab_size}: bring back the file that the run was started with"
    ]


def _check_sync(saved: RunIdentity, now: RunIdentity) -> list[str]:
    before, after = (identity.settings.get("reference.sync_every") for identity in (saved, now))
    if (before is None) == (after is None):
        return []
    return [
        f"reference.sync_every={show(after)}: the checkpoint was written with {show(before)}, and holds the "
        "reference's weights only where they follow the policy's: resume with that value"
    ]


def _log_other_changes(saved: RunIdentity, now: RunIdentity) -> None:
    for key, value in now.settings.items():
        # A scale of FP8 belongs to what is packed together, and to a tensor rank's part.
        counts = now.settings["precision.fp8"] is not None and key in _SEEN_BY_FP8
        if saved.settings.get(key) != value and (counts or not key.startswith(_FREE)):
            logger.warning(
                "resuming with %s=%s; the checkpoint was written with %s", key, value, saved.settings.get(key)
            )
    for package in sorted({*saved.versions, *now.versions}):
        before, after = saved.versions.get(package), now.versions.get(package)
        if before != after:
            logger.warning("resuming with %s %s; the checkpoint was written with %s", package, after, before)
