"""Checkpoint directories: their descriptions, and finding the one that a path means. Plain files, no tensors.

A checkpoint is a directory with Megatron's distributed files, `hf/` (configuration and tokenizer) and a description:
`training.json` when a run wrote it, `imported.json` when it was made from Hugging Face weights. `evaluation.json` may
be added later, if a run was stopped before it could evaluate what it saved; it is not in the manifest.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from megadpo.errors import CheckpointError
from megadpo.runtime.files import write_durably

TRAINED = "training.json"
EVALUATED = "evaluation.json"
IMPORTED = "imported.json"
HF_DIRECTORY = "hf"
LATEST = "latest"
# Formats that a checkpoint's weights can have.
WEIGHT_FORMATS = ("bf16", "fp32")
_STEP_DIRECTORY = re.compile(r"^step_(\d{8})$")

_ANOTHER = "name another checkpoint, or copy this one again"

D = TypeVar("D")


@dataclass(frozen=True, slots=True)
class TrainingState:
    """The state of a run in a checkpoint, besides the weights; everything else follows from step and pairs.

    `pairs_consumed` counts the pairs that its updates have taken, those of every epoch. `data_digest` is a hash of the
    retained pairs' token ids; `vocab_size` is the model's, without padding; `reference` a fingerprint of the
    reference's files, "" without one; `settings` the configuration as a flat mapping; `metrics` what an evaluation of
    these weights had found by then, {} without one; `skipped` the steps among `step` that changed nothing, because a
    number was not finite; `versions` are those of the packages that wrote it.
    """

    step: int
    pairs_consumed: int
    num_pairs: int
    data_digest: str
    vocab_size: int
    reference: str
    settings: dict[str, Any]
    metrics: dict[str, float]
    skipped: int
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class Retention:
    """Rules of the checkpoints to keep: the `last` newest, those of every `every`th step, the one with the best metric.

    `best` is a key of `metrics_of`; of a loss the lowest value is best, of other metrics the highest.
    """

    last: int
    every: int | None = None
    best: str | None = None

    def dropped(self, root: Path) -> list[Path]:
        """The checkpoints under `root` that are not kept, oldest first."""
        found = list_checkpoints(root)
        kept = {*found[-self.last :], *self._best(found)}
        if self.every is not None:
            kept |= {path for path in found if step_of(path) % self.every == 0}
        return [path for path in found if path not in kept]

    def _best(self, found: list[Path]) -> list[Path]:
        if self.best is None:
            return []
        # A description that can't be read is an error for a resuming run, but not for one that is in progress.
        values = {path: metrics_of(path).get(self.best) for path in found if is_readable(path)}
        known = {path: value for path, value in values.items() if value is not None and math.isfinite(value)}
        choose = min if self.best.endswith("loss") else max
        return [choose(known, key=lambda path: known[path])] if known else []


@dataclass(frozen=True, slots=True)
class ImportedModel:
    """The description of an imported checkpoint: the directory of its source, format and vocabulary of its weights."""

    source: str
    dtype: str
    vocab_size: int
    megadpo_version: str


def step_directory(root: Path, step: int) -> Path:
    """Path of the checkpoint of `step` under the run's checkpoint directory."""
    return root / f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint directory's name."""
    return int(checkpoint.name.removeprefix("step_"))


def step_directories(root: Path) -> list[Path]:
    """Directories under `root` that are named like checkpoints, oldest first."""
    return sorted(p for p in root.iterdir() if _STEP_DIRECTORY.match(p.name)) if root.is_dir() else []


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints of a run under `root`, oldest first."""
    return [path for path in step_directories(root) if is_trained(path)]


def is_trained(directory: Path) -> bool:
    """True if a run wrote this checkpoint, with a training state to resume from."""
    return (directory / TRAINED).is_file()


def name_latest(checkpoint: Path) -> None:
    """Makes the run's `latest` name this checkpoint, unless it already does."""
    latest = checkpoint.with_name(LATEST)
    try:
        named = latest.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        named = ""
    if named != checkpoint.name:
        write_durably(latest, checkpoint.name + "\n")


def find_checkpoint(path: Path) -> Path:
    """Finds the checkpoint that `path` means: itself, or, for a run or its checkpoint directory, the one in `latest`.

    Without a `latest` it is the newest. Raises CheckpointError if `latest` names one that does not exist.
    """
    try:
        return _find(path)
    except OSError as error:  # the path is too long, or in a directory without permission
        raise CheckpointError(
            f"{error.filename}: can't be looked up ({error.strerror}): check the path and its permissions"
        ) from error


def _find(path: Path) -> Path:
    if _is_checkpoint(path):
        return path
    for root in (path, path / "checkpoints"):
        found = list_checkpoints(root)
        if (root / LATEST).is_file():
            return _follow_latest(root, found)
        if found:
            return found[-1]
    raise CheckpointError(
        f"{path} holds no complete checkpoint (a directory with {TRAINED} or {IMPORTED} inside): give the directory of "
        "a run or of one of its steps, or what tools/convert.py import has made"
    )


def _follow_latest(root: Path, found: list[Path]) -> Path:
    name = (root / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    if not name or not _is_checkpoint(root / name):
        there = ", ".join(directory.name for directory in found) or "none is there"
        raise CheckpointError(
            f"{root / LATEST} names {name!r}, which is no complete checkpoint in {root}: give the directory of one "
            f"itself ({there})"
        )
    return root / name


def _is_checkpoint(directory: Path) -> bool:
    return is_trained(directory) or (directory / IMPORTED).is_file()


def read_training_state(directory: Path) -> TrainingState:
    """Reads the description that a run saved with a checkpoint."""
    return _read(directory / TRAINED, TrainingState)


def is_readable(directory: Path) -> bool:
    """True if a checkpoint's description of its run can be read."""
    try:
        read_training_state(directory)
    except CheckpointError:
        return False
    return True


def metrics_of(checkpoint: Path) -> dict[str, float]:
    """Metrics of an evaluation of a trained checkpoint's weights, before it was saved or after; {} without one.

    A later one that can't be read counts as none: it is made again, or has no influence.
    """
    before = read_training_state(checkpoint).metrics
    if before:
        return before
    try:
        later = json.loads((checkpoint / EVALUATED).read_text(encoding="utf-8"))
        return {str(name): float(value) for name, value in later.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def keep_evaluation(checkpoint: Path, metrics: Mapping[str, float]) -> None:
    """Adds the metrics of a later evaluation to a trained checkpoint."""
    write_durably(checkpoint / EVALUATED, json.dumps(metrics, indent=1) + "\n")


def read_imported(directory: Path) -> ImportedModel:
    """Reads the description of an imported checkpoint."""
    return _read(directory / IMPORTED, ImportedModel)


def stored_dtype(directory: Path) -> str:
    """The format of a checkpoint's weights, one of WEIGHT_FORMATS."""
    if is_trained(directory):
        path, said = directory / TRAINED, trained_setting(directory, "precision.dtype")
    else:
        path, said = directory / IMPORTED, read_imported(directory).dtype
    if said not in WEIGHT_FORMATS:
        raise CheckpointError(
            f"{path}: the weights' format is {said!r}, it must be {' or '.join(WEIGHT_FORMATS)}: {_ANOTHER}"
        )
    return str(said)


def stored_vocab_size(directory: Path) -> int:
    """Vocabulary size of a checkpoint's weights, without padding."""
    return (read_training_state(directory) if is_trained(directory) else read_imported(directory)).vocab_size


def trained_setting(directory: Path, key: str) -> Any:
    """The value that a configuration key had in the run that wrote this checkpoint."""
    settings = read_training_state(directory).settings
    if key not in settings:
        raise CheckpointError(f"{directory / TRAINED}: its settings lack {key}: {_ANOTHER}")
    return settings[key]


def _read(path: Path, description: type[D]) -> D:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read ({error}): {_ANOTHER}") from error
    kinds = {name: get_origin(hint) or hint for name, hint in get_type_hints(description).items()}
    if not isinstance(fields, dict) or {name: type(value) for name, value in fields.items()} != kinds:
        expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items())
        raise CheckpointError(
            f"{path} must hold {expected}: it is damaged, or was written by another version of megadpo: {_ANOTHER}"
        )
    return description(**fields)
