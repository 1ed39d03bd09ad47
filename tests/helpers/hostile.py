"""Checkpoints whose pickles run a program when they are loaded as pickles are: it makes a file, which must not be."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata


class Program:
    """Unpickled, it makes a directory at `mark`."""

    def __init__(self, mark: Path) -> None:
        self._mark = str(mark)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self._mark,)


def edit_metadata(checkpoint: Path, edit: Callable[[Metadata], Any]) -> None:
    """Replaces the metadata of a checkpoint that is known to be good by what `edit` returns for it."""
    path = checkpoint / ".metadata"
    content = edit(pickle.loads(path.read_bytes()))
    path.write_bytes(pickle.dumps(content))


def in_metadata(checkpoint: Path, mark: Path) -> None:
    """Puts the program among what the metadata say about tensors."""

    def edit(metadata: Metadata) -> Metadata:
        metadata.planner_data = Program(mark)
        return metadata

    edit_metadata(checkpoint, edit)


def in_common(checkpoint: Path, mark: Path) -> None:
    """Puts the program into Megatron's file of what is no tensor."""
    torch.save({"more": Program(mark)}, checkpoint / "common.pt")


def in_place_of_a_tensor(checkpoint: Path, mark: Path) -> None:
    """Has the metadata call the first tensor an object, and puts the program where it lies."""

    def edit(metadata: Metadata) -> Metadata:
        index, place = next(item for item in metadata.storage_data.items() if "layers" in item[0].fqn)
        metadata.state_dict_metadata[index.fqn] = BytesStorageMetadata()
        buffer = io.BytesIO()
        torch.save(Program(mark), buffer)
        path = checkpoint / place.relative_path
        start = path.stat().st_size
        with path.open("ab") as file:
            file.write(buffer.getvalue())
        at_end = type(place)(place.relative_path, start, len(buffer.getvalue()))
        without_offset = type(index)(index.fqn)
        metadata.storage_data |= {without_offset: at_end, index: at_end}
        return metadata

    edit_metadata(checkpoint, edit)


HOSTILE = {"metadata": in_metadata, "common": in_common, "tensor": in_place_of_a_tensor}
