"""What checkpoint directories say about themselves, and which one a path means. Plain files; no Megatron, no tensors.

A checkpoint is a directory with Megatron's distributed files, `hf/` (configuration and tokenizer) and a description:
`training.json` when a run wrote it, `imported.json` when it was made from Hugging Face weights.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megadpo.errors import CheckpointError

TRAINED = "training.json"
IMPORTED = "imported.json"
HF_DIRECTORY = "hf"
LATEST = "latest"
_STEP_DIRECTORY = re.compile(r"^step_(\d{8})$")

D = TypeVar("D")


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What a checkpoint says about its run besides weights: everything else follows from the step.

    `data_digest` is a hash of the retained pairs' token ids; `settings` the configuration as a flat mapping.
    """

    step: int
    num_pairs: int
    data_digest: str
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ImportedModel:
    """What an imported checkpoint says: the directory it was made from, and the format of its weights (bf16, fp32)."""

    source: str
    dtype: str
    megadpo_version: str


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` lives under the run's checkpoint directory."""
    return root / f"step_{step:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints of a run under `root`, oldest first."""
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if _STEP_DIRECTORY.match(p.name) and is_trained(p))


def is_trained(directory: Path) -> bool:
    """Whether a run wrote this checkpoint, with the training state to go on from."""
    return (directory / TRAINED).is_file()


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself; or of a run or its checkpoint directory, the one that `latest` names.

    Where there is no `latest`, the newest. One that names what isn't there is a CheckpointError.
    """
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
    name = (root / LATEST).read_text(encoding="utf-8").strip()
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
    """The description that a run saved with a checkpoint."""
    return _read(directory / TRAINED, TrainingState)


def read_imported(directory: Path) -> ImportedModel:
    """The description of an imported checkpoint."""
    return _read(directory / IMPORTED, ImportedModel)


def stored_dtype(directory: Path) -> str:
    """Format of a checkpoint's weights: bf16 or fp32."""
    if is_trained(directory):
        return str(read_training_state(directory).settings["precision.dtype"])
    return read_imported(directory).dtype


def _read(path: Path, description: type[D]) -> D:
    try:
        return description(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
