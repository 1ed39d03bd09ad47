"""torch's distributed checkpoints box by box: values are produced only when written, and read one box at a time."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megadpo.errors import CheckpointError
from megadpo.models.conversion.stored import Box
from megadpo.models.conversion.threads import in_threads, split_evenly
from megadpo.runtime.files import writing
from megadpo.runtime.pickles import data_only_unpickling


@dataclass(frozen=True, kw_only=True, slots=True)
class LazyBox:
    """A box of the tensor `key`, which has the given `shape`; `make` returns its values when they are written."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    box: Box
    make: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Size of the box's values in memory."""
        return self.box.values * self.dtype.itemsize


def save_lazily(
    directory: Path,
    boxes: Sequence[LazyBox],
    *,
    threads: int,
    advance: Callable[[int], None],
) -> None:
    """Writes this rank's boxes in their order, one file per thread; the metadata covers all ranks.

    A thread holds one box's values at a time, twice, and then calls `advance` with their size in bytes. Collective over
    all ranks; CheckpointException on all of them if any fails.
    """
    writer = _ThreadedWriter(directory, threads=threads, advance=advance)
    checkpoint.save({}, storage_writer=writer, planner=_LazyPlanner(boxes))


class _LazyPlanner(DefaultSavePlanner):
    """Save planner that plans boxes by their shapes, and produces their values when the writer asks for them."""

    def __init__(self, boxes: Sequence[LazyBox]) -> None:
        super().__init__(flatten_state_dict=False)
        self._boxes = {MetadataIndex(lazy.key, lazy.box.offsets): lazy for lazy in boxes}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(index, lazy) for index, lazy in self._boxes.items()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._boxes[MetadataIndex(write_item.index.fqn, write_item.index.offset)].make()


def _write_item(index: MetadataIndex, lazy: LazyBox) -> WriteItem:
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(torch.Size(lazy.box.offsets), torch.Size(lazy.box.sizes)),
        properties=TensorProperties(dtype=lazy.dtype),
        size=torch.Size(lazy.shape),
    )
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)


class _ThreadedWriter(FileSystemWriter):
    """torch's file writer with threads that keep the order of the boxes, hold one box each, and report their errors.

    torch's own threads keep the last box of every tensor in memory, and an error in one of them is lost with its boxes.
    """

    def __init__(self, directory: Path, *, threads: int, advance: Callable[[int], None]) -> None:
        super().__init__(directory)
        self._threads = threads
        self._advance = advance

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        def write(number: int, items: Iterator[WriteItem]) -> list[WriteResult]:
            return self._write_file(f"{plan.storage_data.prefix}{number}.distcp", items, planner)

        runs = [run for run in split_evenly(plan.items, self._threads, _item_bytes) if run]
        done: Future[list[WriteResult]] = Future()
        done.set_result([result for results in in_threads(write, runs) for result in results])
        return done

    def _write_file(self, name: str, items: Iterator[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        results = []
        path = Path(self.path) / name
        with writing(path, CheckpointError), path.open("wb") as file:
            for item in items:
                start = file.tell()
                data = planner.resolve_data(item)
                assert isinstance(data, torch.Tensor)
                file.write(_serialized(data).getbuffer())
                self._advance(data.nbytes)
                length = file.tell() - start
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
            file.flush()
            os.fsync(file.fileno())
        return results


def _serialized(values: torch.Tensor) -> io.BytesIO:
    """Serializes values with torch.save, in memory: if a file can't be written, torch's error only names a position."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer


def _item_bytes(item: WriteItem) -> int:
    """Size of an item in a file, without the kilobyte of its description."""
    data = item.tensor_data
    assert data is not None
    return data.chunk.sizes.numel() * data.properties.dtype.itemsize


class BoxReader:
    """Reads a checkpoint directory's tensors: shapes and boxes at once, values one box at a time, from any thread."""

    def __init__(self, directory: Path) -> None:
        self._files = FileSystemReader(directory)
        with data_only_unpickling(directory):
            metadata = self._files.read_metadata()
        self._files.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def tensors(self) -> dict[str, tuple[tuple[int, ...], list[Box]]]:
        """Shape and boxes of all tensors by name, including the optimizer's."""
        return {
            key: (tuple(entry.size), [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks])
            for key, entry in self._tensors.items()
        }

    def nbytes(self, key: str, box: Box) -> int:
        """Size of a box's values in memory."""
        return box.values * self._tensors[key].properties.dtype.itemsize

    def read(self, key: str, box: Box) -> torch.Tensor:
        """Reads the values of one of the tensor's boxes; it takes twice their memory, since torch copies what it reads.

        Damaged files may raise any exception.
        """
        entry = self._tensors[key]
        target = torch.empty(box.sizes, dtype=entry.properties.dtype)
        chunk = ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
        plan = LoadPlan(create_read_items_for_chunk_list(key, entry, [chunk]))
        self._files.read_data(plan, _TensorLoadPlanner(target)).wait()
        return target


class _TensorLoadPlanner(DefaultLoadPlanner):
    """Load planner that reads into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        target = self._target
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(axis, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Does nothing: `tensor` is a view of the target."""
