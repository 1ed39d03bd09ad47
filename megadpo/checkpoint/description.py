"""The description inside a checkpoint: `training.json` where a run wrote it, `imported.json` for converted weights.

`evaluation.json` may be added later, where a run was stopped before it could evaluate what it saved; no manifest lists
it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from megadpo.errors import CheckpointError
from megadpo.runtime.files import write_durably

TRAINED = "training.json"
EVALUATED = "evaluation.json"
IMPORTED = "imported.json"
# Formats that a checkpoint's weights can have.
WEIGHT_FORMATS = ("bf16", "fp32")

_ANOTHER = "name another checkpoint, or copy this one again"


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """The run that a checkpoint belongs to; the same in all checkpoints of one launch.

    `data_digest` is a hash of the retained training pairs' token ids, of which there are `num_pairs`; `vocab_size` is
    the model's, without padding; `reference` a fingerprint of the reference's files, "" without one; `settings` the
    configuration as a flat mapping; `versions` those of Python and the packages that compute.
    """

    num_pairs: int
    data_digest: str
    vocab_size: int
    reference: str
    settings: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class Progress:
    """The place that a run has reached; all else follows from it and the run's identity.

    `step` counts updates, made or skipped; `pairs_consumed` the pairs that they have taken, those of every epoch;
    `skipped` the updates that changed nothing, because a number was not finite. `metrics` are those of an evaluation of
    these weights, {} without one.
    """

    step: int = 0
    pairs_consumed: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    skipped: int = 0


# The fields of training.json in their order there: those of both dataclasses, as one object.
_TRAINING_FIELDS = tuple(
    "step pairs_consumed num_pairs data_digest vocab_size reference settings metrics skipped versions".split()
)


@dataclass(frozen=True, slots=True)
class ImportedModel:
    """The directory that an imported checkpoint was made from, and format and vocabulary of its weights."""

    source: str
    dtype: str
    vocab_size: int
    megadpo_version: str


def is_trained(directory: Path) -> bool:
    """True if a run wrote this checkpoint, so that it holds the training state to resume from."""
    return (directory / TRAINED).is_file()


def training_json(identity: RunIdentity, progress: Progress) -> str:
    """The content of training.json."""
    fields = asdict(identity) | asdict(progress)
    return json.dumps({name: fields[name] for name in _TRAINING_FIELDS}, indent=1)


def read_training(directory: Path) -> tuple[RunIdentity, Progress]:
    """The run that wrote a checkpoint, and the place it had reached. CheckpointError where training.json is damaged."""
    hints = get_type_hints(RunIdentity) | get_type_hints(Progress)
    fields = _read(directory / TRAINED, {name: hints[name] for name in _TRAINING_FIELDS})
    return (
        RunIdentity(**{name: fields[name] for name in get_type_hints(RunIdentity)}),
        Progress(**{name: fields[name] for name in get_type_hints(Progress)}),
    )


def is_readable(directory: Path) -> bool:
    """True if a checkpoint's description of its run can be read."""
    try:
        read_training(directory)
    except CheckpointError:
        return False
    return True


def metrics_of(checkpoint: Path) -> dict[str, float]:
    """Metrics of an evaluation of a trained checkpoint's weights, made before it was saved or after; {} without one.

    One that came later and can't be read counts as none: it is made again, or decides nothing.
    """
    _, progress = read_training(checkpoint)
    if progress.metrics:
        return progress.metrics
    try:
        later = json.loads((checkpoint / EVALUATED).read_text(encoding="utf-8"))
        return {str(name): float(value) for name, value in later.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def write_evaluation(checkpoint: Path, metrics: Mapping[str, float]) -> None:
    """Adds the metrics of an evaluation to a trained checkpoint that was saved without one."""
    write_durably(checkpoint / EVALUATED, json.dumps(metrics, indent=1) + "\n")


def read_imported(directory: Path) -> ImportedModel:
    """The description of an imported checkpoint."""
    return ImportedModel(**_read(directory / IMPORTED, get_type_hints(ImportedModel)))


def stored_dtype(directory: Path) -> str:
    """Format of a checkpoint's weights, one of WEIGHT_FORMATS."""
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
    """Entries of the vocabulary of a checkpoint's weights, without padding."""
    return (read_training(directory)[0] if is_trained(directory) else read_imported(directory)).vocab_size


def trained_setting(directory: Path, key: str) -> Any:
    """The value that a configuration key had in the run that wrote this checkpoint."""
    identity, _ = read_training(directory)
    if key not in identity.settings:
        raise CheckpointError(f"{directory / TRAINED}: its settings lack {key}: {_ANOTHER}")
    return identity.settings[key]


def _read(path: Path, hints: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a JSON object, which must be those of `hints`, of these types."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read ({error}): {_ANOTHER}") from error
    kinds = {name: get_origin(hint) or hint for name, hint in hints.items()}
    if not isinstance(fields, dict) or {name: type(value) for name, value in fields.items()} != kinds:
        expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items())
        raise CheckpointError(
            f"{path} must hold {expected}: it is damaged, or was written by another version of megadpo: {_ANOTHER}"
        )
    return fields
