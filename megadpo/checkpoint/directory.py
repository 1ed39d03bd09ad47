"""The checkpoint that a path means, and those of a run that are kept. Plain files; no Megatron, no tensors.

A checkpoint is a directory with Megatron's distributed files, `hf/` (configuration and tokenizer) and a description.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from megadpo.checkpoint.description import IMPORTED, TRAINED, is_readable, is_trained, metrics_of
from megadpo.errors import CheckpointError
from megadpo.runtime.files import write_durably

HF_DIRECTORY = "hf"
LATEST = "latest"
_STEP_DIRECTORY = re.compile(r"^step_(\d{8})$")


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
