"""Saves checkpoints: written beside the training, named when they are complete, removed when they are old.

A run's `step_00000010` holds the weights, the optimizer's state, `training.json`, which describes the run and its
progress, and `manifest.json`, which lists all files with their hashes; an imported checkpoint holds weights and
`imported.json`. A directory appears under its name only when it is complete and on disk; `latest` names the newest one
of a run.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule

from megadpo.checkpoint.description import (
    IMPORTED,
    TRAINED,
    ImportedModel,
    Progress,
    RunIdentity,
    training_json,
    write_evaluation,
)
from megadpo.checkpoint.directory import HF_DIRECTORY, LATEST, Retention, step_directory
from megadpo.checkpoint.manifest import FileDigest, digest_files, write_manifest
from megadpo.checkpoint.removals import BackgroundRemoval
from megadpo.checkpoint.state import model_state, reference_state, renew_main_weights
from megadpo.checkpoint.writer import METADATA, CheckpointWriter, removed_on_error, writable
from megadpo.errors import CheckpointError, MegaDPOError
from megadpo.health.watchdog import HangWatchdog
from megadpo.models.conversion.side_files import SideFiles, write_side_files
from megadpo.optimizer.build import distributed_optimizers
from megadpo.runtime.collectives import on_main
from megadpo.runtime.files import flush_directory, write_durably, writing
from megadpo.runtime.rank_logging import get_logger, global_rank

logger = get_logger(__name__)

# How long the end of a run waits for a write that nobody will name, and for old checkpoints to be removed.
_CLOSE_S = 5.0
_REMOVED_S = 60.0
# Waits for the checkpoint before that are worth a word: so many seconds, and so much of the time between two saves.
_WARN_AFTER_S, _WARN_AFTER_SHARE = 1.0, 0.05


class CheckpointSaver:
    """Saves a run's checkpoints under `root`; every method is collective over all ranks."""

    def __init__(
        self,
        root: Path,
        chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        *,
        identity: RunIdentity,
        side_files: SideFiles,
        dtype: torch.dtype,
        retention: Retention,
        asynchronous: bool,
        resumed_from: Path | None,
        watchdog: HangWatchdog,
    ) -> None:
        """The side files, configuration and tokenizer, go inside each checkpoint as `hf/`, so that it stands alone.

        `resumed_from` is the checkpoint that the run was resumed from, None for a fresh start.
        """
        self._root = root
        self._chunks = chunks
        self._optimizer = optimizer
        self._identity = identity
        self._side_files = side_files
        self._dtype = dtype
        self._retention = retention
        self._resumed_from = resumed_from
        self._watchdog = watchdog
        self._writer = CheckpointWriter(asynchronous=asynchronous)
        self._removals = BackgroundRemoval()
        self._step = 0
        self._began = 0.0
        self.last_save_s = 0.0
        """Seconds from the beginning of a save until it had its name; 0 before the first."""

    @property
    def is_busy(self) -> bool:
        """True while a checkpoint is under way; the same on every rank."""
        return self._writer.is_busy

    @property
    def seconds_to_stop(self) -> float:
        """Seconds that a run needs to save before it ends: as long as the last save took, twice while one is under way.

        That one is completed before the last one begins.
        """
        return self.last_save_s * (2 if self.is_busy else 1)

    def tidy(self) -> None:
        """Continues the removals that a killed start has left; a run that saves nothing more begins no other."""

        def clear() -> None:
            for leftover in self._root.glob(".step_*"):
                self._removals.begin(leftover)
            self._drop_old()

        on_main(clear)

    def save(self, progress: Progress, *, reference: Sequence[MegatronModule] = ()) -> None:
        """Begins the checkpoint of `progress.step`, when the one before is finished; waits for it unless asynchronous.

        The weights must be gathered. `reference` are the chunks of one that changes, as a resumed run can have those
        from nowhere else. CheckpointError on every rank, also for the checkpoint before.
        """
        self._complete_before()
        self._began, self._step = time.monotonic(), progress.step
        final = step_directory(self._root, progress.step)
        unfinished = self._root / f".{final.name}.partial"
        self.tidy()
        self._await_removals()  # their room is needed
        self._watchdog.report(progress.step, "saving")
        renew_main_weights(distributed_optimizers(self._optimizer))
        model = model_state([chunk.module for chunk in self._chunks])
        content = {
            **model,
            **reference_state(reference),
            "optimizer": self._optimizer.sharded_state_dict(model, metadata=dict(METADATA)),
        }
        finish = partial(self._finish, unfinished, final, progress)
        self._writer.start(unfinished, content, finish, report=partial(self._watchdog.report, progress.step))

    @property
    def is_writing(self) -> bool:
        """True while this rank writes its part of a checkpoint; once none does, `complete` does not wait."""
        return not self._writer.is_written

    def complete(self) -> None:
        """Waits for a checkpoint that is under way, and gives it its name. CheckpointError on every rank."""
        if self._writer.is_busy:
            self._writer.complete()
            self.last_save_s = time.monotonic() - self._began

    def keep_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Adds the metrics of the starting weights to their checkpoint, where that is one of this run; on rank 0.

        A file that can't be written is a warning: it is no reason to end a run.
        """
        checkpoint = self._resumed_from
        is_own = checkpoint is not None and checkpoint.parent.resolve() == self._root.resolve()
        if checkpoint is None or not (is_own and metrics and global_rank() == 0):
            return
        try:
            write_evaluation(checkpoint, metrics)
        except MegaDPOError as error:  # as where it is protected
            logger.warning("%s (checkpoint.keep_best can't judge it, another start from it evaluates again)", error)

    def finish(self) -> None:
        """Completes the checkpoint under way at the end of a run, and waits a minute at most for removals."""
        self.complete()
        if left := self._await_removals(_REMOVED_S):
            logger.warning(
                "%s: %d files of old checkpoints are not removed yet; what is left of them when this process ends "
                "(.step_*) takes room until you delete it, or the run goes on",
                self._root,
                left,
            )

    def close(self) -> None:
        """Waits 5 seconds at most until this rank writes no more; no collectives. A checkpoint under way gets no name.

        Not longer, because a run that ends in an error has to report it; the threads end with the process.
        """
        self._writer.close(_CLOSE_S)

    def _complete_before(self) -> None:
        """Completes the checkpoint before the next one; logs it where the training had to wait long."""
        asked, before = time.monotonic(), self._began
        self.complete()
        now = time.monotonic()
        if now - asked > max(_WARN_AFTER_S, _WARN_AFTER_SHARE * (now - before)):
            logger.warning(
                "waited %.0f s for the checkpoint of step %d to be written, which took %.0f s: raise train.save_every, "
                "or choose a faster disk",
                now - asked,
                self._step,
                now - before,
            )

    def _await_removals(self, patience_s: float = math.inf) -> int:
        """Waits until all removals are done, or for about `patience_s` seconds; returns how many files are left.

        A broadcast at once, and one a second, or a few sooner, while rank 0 removes.
        """
        waited_s, pause_s, before = 0.0, 0.05, 0
        while left := on_main(partial(self._removals.wait, pause_s)):
            waited_s += pause_s  # the same on all ranks, as clocks are not
            if waited_s >= patience_s:
                return left
            if left != before:
                self._watchdog.report(self._step, f"waiting for old checkpoints to be removed, {left} files to go")
            pause_s, before = min(2 * pause_s, 1.0), left
        return 0

    def _finish(self, unfinished: Path, final: Path, progress: Progress, known: Mapping[str, FileDigest]) -> None:
        write_side_files(self._side_files, unfinished / HF_DIRECTORY, dtype=self._dtype)
        write_durably(unfinished / TRAINED, training_json(self._identity, progress))
        with writing(final, CheckpointError):
            write_manifest(unfinished, known)
            if final.exists():
                self._removals.begin(_hide(final))
            unfinished.rename(final)
            flush_directory(self._root)
        write_durably(self._root / LATEST, final.name + "\n")
        logger.info("saved %s", final)
        self._drop_old()

    def _drop_old(self) -> None:
        """Hides the checkpoints that are not kept, and begins to remove their files; on one rank."""
        for old in self._retention.dropped(self._root):
            try:
                self._removals.begin(_hide(old))
            except OSError as error:  # no reason to end a run
                logger.warning("%s can't be removed yet (%s): the next save tries again", old, error.strerror or error)


def save_imported(
    directory: Path,
    write: Callable[[Path], None],
    description: ImportedModel,
    *,
    side_files: SideFiles,
    dtype: torch.dtype,
) -> None:
    """Makes a checkpoint that stands alone from the distributed files that `write(DIRECTORY)` writes, and side files.

    Collective over all ranks. `directory` must not exist, or be empty; it appears when every rank is done. Where it
    can't be made, nothing is left.
    """
    unfinished = directory.with_name(f".{directory.name}.partial")
    on_main(lambda: shutil.rmtree(unfinished, ignore_errors=True))  # of an import that was killed

    def make() -> None:
        with writing(unfinished, CheckpointError):
            unfinished.mkdir(parents=True)

    def finish() -> None:
        write_side_files(side_files, unfinished / HF_DIRECTORY, dtype=dtype)
        write_durably(unfinished / IMPORTED, json.dumps(asdict(description), indent=1))
        with writing(directory, CheckpointError):
            write_manifest(unfinished, known)
            unfinished.rename(directory)
            flush_directory(directory.parent)

    with removed_on_error(unfinished):
        on_main(make)
        with writable(unfinished):
            dist_checkpointing.save({}, str(unfinished), _FilesOf(write), content_metadata=dict(METADATA))
        dist.barrier()
        known = _digest_together(unfinished)
        on_main(finish)


def _digest_together(directory: Path) -> dict[str, FileDigest]:
    """Digests of a directory's files, on every rank; each rank reads its share."""
    of_ranks: list[dict[str, FileDigest]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, digest_files(directory, share=global_rank(), shares=len(of_ranks)))
    return {name: digest for own in of_ranks for name, digest in own.items()}


class _FilesOf(SaveShardedStrategy):
    """A save strategy that calls a function for the distributed files, in place of Megatron's writer of tensors."""

    def __init__(self, write: Callable[[Path], None]) -> None:
        super().__init__("torch_dist", 1)
        self._write = write

    @property
    def can_handle_sharded_objects(self) -> bool:
        """They are among the files."""
        return True

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str) -> None:
        """Writes the files; the state dict is empty."""
        self._write(Path(checkpoint_dir))


def _hide(checkpoint: Path) -> Path:
    """Renames a checkpoint, so that it is not taken for a complete one while it is removed; returns its new path."""
    return checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.removed"))
