"""Writes sharded state as Megatron's distributed files in the background: planned by all ranks, written by a thread.

Megatron instead forks a process for every file, and passes results through a spawned one (seconds in a small run's
save); if a rank is killed, they continue writing into the next attempt's files. A thread ends with its rank.
"""

from __future__ import annotations

import inspect
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint import CheckpointException

from megadpo.checkpoint.manifest import FileDigest, digest_of
from megadpo.errors import CheckpointError, MegaDPOError
from megadpo.runtime.collectives import on_every, on_main
from megadpo.runtime.device import host_copy
from megadpo.runtime.files import writing

# A file of the plan: its path, its name, and its content (bytes, then tensors).
Bucket: TypeAlias = tuple[str, str, tuple[list[Any], list[Any]]]
Finish: TypeAlias = Callable[[Mapping[str, FileDigest]], None]

# Pauses between checks of which ranks are still writing: at first short, for small saves, later a second.
_FIRST_PAUSE_S, _PAUSE_S = 0.05, 1.0

METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


class CheckpointWriter:
    """Writes one directory at a time. The host memory that tensors are staged in is reused for the next one.

    `start` and `complete` are collective over all ranks.
    """

    def __init__(self, *, asynchronous: bool) -> None:
        self._asynchronous = asynchronous
        self._staged: dict[tuple[str, int], torch.Tensor] = {}
        self._pending: _Pending | None = None

    @property
    def is_busy(self) -> bool:
        """True while a directory is not finished; the same on every rank."""
        return self._pending is not None

    @property
    def is_written(self) -> bool:
        """True once this rank's part of it is on disk, or has failed."""
        return self._pending is None or not self._pending.thread.is_alive()

    def start(self, directory: Path, content: dict[str, Any], finish: Finish, *, report: Callable[[str], None]) -> None:
        """Finishes the directory before, creates `directory` and starts writing all ranks' state to it.

        When all is written, `complete` calls `finish` on rank 0 with the digests of all ranks' files; while it waits,
        `report` receives the progress. If asynchronous, tensors may be changed when this returns. Raises
        CheckpointError on every rank if writing can't be started.
        """
        self.complete()

        def make() -> None:
            with writing(directory, CheckpointError):
                directory.mkdir(parents=True)

        on_main(make)
        in_use = _storages(content)
        with removed_on_error(directory):
            with writable(directory), mock.patch.object(filesystem_async, "_get_write_results_queue", queue.Queue):
                request = dist_checkpointing.save(
                    content,
                    str(directory),
                    TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1),
                    async_sharded_save=True,
                    content_metadata=dict(METADATA),
                )
            self._check_room(directory, request)
            # In place, so that nothing else keeps references to the copied tensors, which may be large.
            _buckets(request)[:] = on_every(lambda: self._stage(request, in_use))
        self._pending = _Pending(directory, request, finish, report)
        self._pending.thread.start()
        if not self._asynchronous:
            self.complete()

    def complete(self) -> None:
        """Waits until the directory is written, and finishes it. CheckpointError on every rank if any could not write.

        In that case it is removed, so that it takes no room from the next one. Ranks wait for each other one second at
        a time, so that neither a collective's timeout nor the hang watchdog ends a save that is slow but progresses.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        with removed_on_error(pending.directory):
            _finish_on_all_ranks(pending, _wait_for_all_ranks(pending))

    def close(self, patience_s: float) -> None:
        """Waits until this rank stops writing, at most `patience_s` seconds, and not collectively.

        The directory stays unfinished. A thread that is still writing ends with the process.
        """
        if self._pending is not None:
            self._pending.thread.join(patience_s)

    def _check_room(self, directory: Path, request: AsyncRequest) -> None:
        """Raises CheckpointError on every rank if the disk has less room than all ranks' tensors take."""
        of_ranks = [0] * dist.get_world_size()
        dist.all_gather_object(of_ranks, _bytes_of(request))

        def check() -> None:
            needed, free = sum(of_ranks), shutil.disk_usage(directory).free
            if needed > free:
                raise CheckpointError(
                    f"checkpoint {directory} takes {needed / 2**30:.2f} GiB, its disk has {free / 2**30:.2f} GiB left: "
                    "make room, or choose another directory; older checkpoints are as they were"
                )

        on_main(check)

    def _stage(self, request: AsyncRequest, in_use: set[int]) -> list[Bucket]:
        """The request's files with tensors in host memory; copies of them if the training continues meanwhile.

        Parts of larger host tensors have already been copied by Megatron: they do not share the storage `in_use`.
        """

        def staged(name: str, index: int, tensor: torch.Tensor) -> torch.Tensor:
            is_copy = tensor.is_cpu and tensor.untyped_storage().data_ptr() not in in_use
            return tensor if is_copy else self._in_host(name, index, tensor)

        return [
            (path, name, (raw, [(item, staged(name, i, tensor)) for i, (item, tensor) in enumerate(tensors)]))
            for path, name, (raw, tensors) in _buckets(request)
        ]

    def _in_host(self, name: str, index: int, tensor: torch.Tensor) -> torch.Tensor:
        if not self._asynchronous:
            return tensor.cpu()
        try:
            copy = host_copy(tensor, self._staged.get((name, index)))
        except MemoryError as error:
            raise CheckpointError(
                f"checkpoint.async_save=true: needs a copy of all that is saved in the host's memory, rank "
                f"{dist.get_rank()} can't have {tensor.nbytes / 2**30:.2f} GiB more for {name} ({error}): set "
                "checkpoint.async_save=false, which keeps none, or give the machine more memory"
            ) from error
        self._staged[name, index] = copy
        return copy


class _Pending:
    """A directory that is being written; a thread writes this rank's files, and then hashes them."""

    def __init__(self, directory: Path, request: AsyncRequest, finish: Finish, report: Callable[[str], None]) -> None:
        self.directory = directory
        self.request = request
        self.finish = finish
        self.report = report
        self.thread = threading.Thread(target=self._write, name="checkpoint writer", daemon=True)
        self._digests: dict[str, FileDigest] = {}
        self._error: str | None = None
        self._hashed = 0
        self._bytes = _bytes_of(request)

    def progress(self) -> _RankProgress:
        """The progress of this rank."""
        if not self.thread.is_alive():
            return _RankProgress(True, self._bytes, self._bytes, self._digests, self._error)
        written = sum(_file_size(path) for path, _, _ in _buckets(self.request))
        return _RankProgress(False, (written + self._hashed) / 2, self._bytes, {}, None)

    def _write(self) -> None:
        if not _buckets(self.request):
            return
        transforms, _ = self.request.async_fn.args
        try:
            results = {i: _write_file(transforms, bucket) for i, bucket in enumerate(_buckets(self.request))}
            self._digests = {
                name: digest_of(Path(path), on_bytes=self._add_hashed) for path, name, _ in _buckets(self.request)
            }
            self.request.async_fn_args[2].put(results)
        except Exception as error:  # in a thread: `complete` raises it on every rank
            self._error = _reason(error)

    def _add_hashed(self, size: int) -> None:
        self._hashed += size


@dataclass(frozen=True, slots=True)
class _RankProgress:
    """A rank's progress: `done` of about `bytes` bytes; at the end the digests of its files, or its error."""

    is_written: bool
    done: float
    bytes: int
    digests: dict[str, FileDigest]
    error: str | None


def _wait_for_all_ranks(pending: _Pending) -> list[_RankProgress]:
    """Waits until all ranks have written; returns their results, and reports progress of any of them meanwhile.

    One all-gather over the world when this rank is done, and one per second (at first more) while any is not.
    """
    pause_s, before = _FIRST_PAUSE_S, None
    while True:
        pending.thread.join(pause_s)
        own = pending.progress()
        parts = [own] * dist.get_world_size()
        dist.all_gather_object(parts, own)
        if all(part.is_written for part in parts):
            pending.report("naming the checkpoint")
            return parts
        now = [(part.is_written, part.done) for part in parts]
        if now != before:
            pending.report(_describe_progress(parts, own))
        pause_s, before = min(2 * pause_s, _PAUSE_S), now


def _describe_progress(parts: Sequence[_RankProgress], own: _RankProgress) -> str:
    done, size = sum(part.done for part in parts), sum(part.bytes for part in parts)
    doing = "waiting for others to write their parts of the checkpoint" if own.is_written else "writing its checkpoint"
    return f"{doing}, {min(done, size) / 2**30:.1f} of {size / 2**30:.1f} GiB"


def _file_size(path: str) -> int:
    """Current size of a file in bytes; 0 if it does not exist."""
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0


def _finish_on_all_ranks(pending: _Pending, parts: Sequence[_RankProgress]) -> None:
    """Finishes a directory that all ranks have written. Collective over all ranks, which raise the same error."""
    errors = [f"rank {rank}: {part.error}" for rank, part in enumerate(parts) if part.error is not None]
    if errors:
        raise CheckpointError(_not_written(pending.directory, "; ".join(errors)))
    with writable(pending.directory):
        for finalize in pending.request.finalize_fns:
            finalize()
    known = {name: digest for part in parts for name, digest in part.digests.items()}
    on_main(lambda: pending.finish(known))


def _reason(error: BaseException) -> str:
    """The system's reason for a failed write, which torch hides behind an error about positions in the file."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return str(cause.strerror or cause)
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {error}"


def _storages(content: dict[str, Any]) -> set[int]:
    """Addresses of the storages of a state's tensors."""
    sharded = (value for value in nested_values(content) if isinstance(value, (ShardedTensor, ShardedTensorFactory)))
    return {value.data.untyped_storage().data_ptr() for value in sharded}


def _buckets(request: AsyncRequest) -> list[Bucket]:
    """This rank's files of a planned save."""
    return request.async_fn_args[1] if request.async_fn is not None else []


def _bytes_of(request: AsyncRequest) -> int:
    """Number of bytes of this rank's tensors in a planned save."""
    return sum(tensor.nbytes for _, _, (_, tensors) in _buckets(request) for _, tensor in tensors)


def _write_file(transforms: Sequence[Any], bucket: Bucket) -> Any:
    """Writes one file of the plan durably; returns the results that Megatron needs afterwards."""
    results: queue.Queue[tuple[int, Any]] = queue.Queue()
    count: queue.Queue[int] = queue.Queue()
    count.put(0)
    # Without its decorator, which is for a forked process: it would disable garbage collection in the whole process.
    write = inspect.unwrap(FileSystemWriterAsync.write_preloaded_data)
    write(transforms, 0, bucket, results, count, use_fsync=True)
    _, written = results.get_nowait()
    if isinstance(written, Exception):
        raise written
    return written


@contextmanager
def writable(directory: Path) -> Iterator[None]:
    """Turns errors while Megatron writes `directory` into a CheckpointError with cause and remedy, on every rank.

    Rank 0 writes some files alone, between collectives: its errors are held back until all ranks have passed these.
    One broadcast.
    """
    failures: list[Exception] = []

    def kept(write: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **options: Any) -> None:
            try:
                write(*args, **options)
            except Exception as error:
                failures.append(error)

        return call

    def check() -> None:
        if failures:
            raise CheckpointError(_not_written(directory, _reason(failures[0]))) from failures[0]

    with ExitStack() as stack:
        for owner, name in (
            (TorchCommonSaveStrategy, "save_common"),
            (FileSystemWriterAsync, "finish"),
            (serialization, "save_config"),
        ):
            stack.enter_context(mock.patch.object(owner, name, kept(vars(owner)[name])))
        try:
            yield
        except CheckpointException as error:
            raise_own(error)
            raise CheckpointError(_not_written(directory, causes_of(error))) from error
    on_main(check)


@contextmanager
def removed_on_error(directory: Path) -> Iterator[None]:
    """Removes `directory` if the context raises a MegaDPOError, which every rank must then do, and none may write."""
    try:
        yield
    except MegaDPOError:
        if dist.get_rank() == 0:
            shutil.rmtree(directory, ignore_errors=True)
        raise


def _not_written(directory: Path, why: str) -> str:
    return (
        f"checkpoint {directory} can't be written: {why}: make room, or choose another directory; older checkpoints "
        "are as they were"
    )


def raise_own(error: CheckpointException) -> None:
    """Raises the MegaDPOError that a rank has met, if any."""
    for cause, _ in error.failures.values():
        if isinstance(cause, MegaDPOError):
            raise cause from error


def causes_of(error: CheckpointException) -> str:
    """The ranks' errors in words, without repetition."""
    return "; ".join(dict.fromkeys(f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values()))
