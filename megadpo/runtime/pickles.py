"""Restricts the pickles in a checkpoint to data, so that a stranger's checkpoint can't run code when it is loaded.

torch unpickles `.metadata`, and objects between the tensors, by calling whatever functions they name.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import IO, Any
from unittest import mock

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import Metadata

from megadpo.errors import CheckpointError
from megadpo.runtime.files import is_file_name

# Flag of classes that were created at run time and can be changed (Py_TPFLAGS_HEAPTYPE).
_HEAP_TYPE = 1 << 9
_NAME_SHOWN = 100
_DISTRUST = "Don't trust this checkpoint; get it again from those who made it"

# The classes that torch's and Megatron's metadata consist of, besides plain Python values. Those of the planner are for
# `all_local_plans`, which Megatron adds.
_MODULES = {
    metadata: (
        *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "TensorStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    ),
    planner: ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    filesystem: ("_StorageInfo", "_StoragePrefix"),
}
_NAMES: dict[tuple[str, str], Any] = {
    **{(module.__name__, name): getattr(module, name) for module, names in _MODULES.items() for name in names},
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    ("torch", "Size"): torch.Size,
    # A lookup in place of torch's function, whose defaults a pickle could change.
    ("torch.serialization", "_get_layout"): MappingProxyType(
        {str(layout): layout for layout in vars(torch).values() if isinstance(layout, torch.layout)}
    ).__getitem__,
    # Path of the saved checkpoint; Python 3.13 has the class in a module that other versions lack.
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
}


@contextmanager
def data_only_unpickling(directory: Path) -> Iterator[None]:
    """Has torch accept only data from a checkpoint for the duration of the context; CheckpointError for anything else.

    A patch of torch 2.13: `FileSystemReader.read_metadata` calls `pickle.load`, and `DefaultLoadPlanner.load_bytes`
    calls torch.load with weights_only=False for every tensor that the metadata calls an object. It can go when torch
    reads both with a list of admitted classes. It applies to the whole process, so also to other threads that read
    meanwhile.
    """
    load = torch.load

    def load_data(file: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return load(file, *arguments, **{**options, "weights_only": True})
        except pickle.UnpicklingError as error:
            # torch's own text advises to switch the check off; the error before it names what was found.
            name = file if isinstance(file, (str, Path)) else f"an object in {directory}"
            raise CheckpointError(
                f"{name}: holds more than tensors and plain values: {error.__context__ or error}. {_DISTRUST}"
            ) from None

    with (
        mock.patch.object(filesystem, "pickle", _MetadataPickle),
        mock.patch.object(torch, "load", load_data),
    ):
        yield


class _MetadataPickle:
    """Replaces the module `pickle` where torch reads a checkpoint's metadata."""

    dump = staticmethod(pickle.dump)

    @staticmethod
    def load(file: IO[bytes]) -> Metadata:
        """Returns the metadata; CheckpointError if the pickle names anything that metadata do not consist of."""
        path = getattr(file, "name", "its metadata")
        data = file.read()
        _check_opcodes(data, str(path))
        with _restored_classes(str(path)):
            content = _Unpickler(io.BytesIO(data), str(path)).load()
        if not isinstance(content, Metadata) or not isinstance(content.storage_data, dict):
            raise CheckpointError(f"{path}: holds no metadata of a checkpoint but a {type(content).__name__}")
        for info in content.storage_data.values():
            if not isinstance(info, filesystem._StorageInfo) or not is_file_name(
                info.relative_path, filesystem.DEFAULT_SUFFIX
            ):
                raise CheckpointError(
                    f"{path}: names a file that doesn't lie beside it: {_shown_name(info)}. {_DISTRUST}"
                )
        return content


def _shown_name(entry: Any) -> str:
    """The file name in an entry, shortened, or the entry's type: other objects in a pickle may print without end."""
    name = entry.relative_path if isinstance(entry, filesystem._StorageInfo) else entry
    return repr(name[:_NAME_SHOWN]) if isinstance(name, str) else f"a {type(name).__name__}"


class _Unpickler(pickle.Unpickler):
    """Unpickler that finds the classes metadata consist of, by full name, and no others."""

    def __init__(self, file: IO[bytes], path: str) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """Returns the class if it is admitted; otherwise raises CheckpointError before anything is called."""
        try:
            return _NAMES[module, name]
        except KeyError:
            raise CheckpointError(
                f"{self._path}: would run or make {module}.{name}, which no metadata of a checkpoint consist of. "
                f"{_DISTRUST}"
            ) from None


def _opcode_sizes() -> tuple[re.Pattern[bytes], dict[int, int]]:
    """Returns a pattern for a run of fixed-size opcodes, and for the others the width of their length field in bytes.

    LONG_BINPUT is in neither, since unpickling allocates a memo of the size its argument names; nor are opcodes whose
    argument ends with a line. Pickles of protocol 4, the default since Python 3.8, have none of these.
    """
    sizes = {
        pickletools.TAKEN_FROM_ARGUMENT1: 1,
        pickletools.TAKEN_FROM_ARGUMENT4: 4,
        pickletools.TAKEN_FROM_ARGUMENT4U: 4,
        pickletools.TAKEN_FROM_ARGUMENT8U: 8,
    }
    fixed: dict[int, bytes] = {}
    sized = {}
    for operation in pickletools.opcodes:
        code, width = operation.code.encode("latin-1"), 0 if operation.arg is None else operation.arg.n
        if width >= 0 and operation.name != "LONG_BINPUT":
            fixed[width] = fixed.get(width, b"") + re.escape(code)
        elif width in sizes:
            sized[code[0]] = sizes[width]
    runs = b"|".join(b"[%b].{%d}" % (codes, width) for width, codes in sorted(fixed.items()))
    return re.compile(b"(?:%b)*+" % runs, re.DOTALL), sized


_FIXED_SIZE_RUN, _LENGTH_BYTES = _opcode_sizes()


def _check_opcodes(data: bytes, path: str) -> None:
    """Raises CheckpointError for a pickle with opcodes that metadata never need and that could exhaust memory."""
    position = 0
    while (match := _FIXED_SIZE_RUN.match(data, position)) and (position := match.end()) < len(data):
        if data[position] not in _LENGTH_BYTES:
            raise CheckpointError(
                f"{path}: is no pickle of metadata: it has operation {data[position]:#04x} at byte {position}, they "
                f"need none like it. {_DISTRUST}"
            )
        start = position + 1 + _LENGTH_BYTES[data[position]]
        position = start + int.from_bytes(data[position + 1 : start], "little")


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """A class or enum member, which the whole process shares, with the attributes that a pickle could change."""

    thing: Any
    kind: type
    bases: tuple[type, ...]
    values: dict[str, Any]

    @classmethod
    def of(cls, thing: Any) -> _Snapshot:
        """Takes the snapshot."""
        return cls(thing, type(thing), thing.__bases__ if isinstance(thing, type) else (), dict(vars(thing)))

    def restore(self) -> bool:
        """Undoes all changes since the snapshot; returns True if there were any."""
        now = _Snapshot.of(self.thing)
        names = now.values.keys() | self.values.keys()
        changed = [name for name in names if now.values.get(name) is not self.values.get(name)]
        if not changed and (now.kind, now.bases) == (self.kind, self.bases):
            return False
        if isinstance(self.thing, type):
            self.thing.__bases__ = self.bases
            for name in changed:
                if name in self.values:
                    type.__setattr__(self.thing, name, self.values[name])
                else:
                    type.__delattr__(self.thing, name)
        else:
            object.__setattr__(self.thing, "__class__", self.kind)
            vars(self.thing).clear()
            vars(self.thing).update(self.values)
        return True


@contextmanager
def _restored_classes(path: str) -> Iterator[None]:
    """Undoes changes that unpickling makes to the admitted classes themselves, and raises CheckpointError if it did."""
    classes = [thing for thing in _NAMES.values() if isinstance(thing, type) and thing.__flags__ & _HEAP_TYPE]
    members = [member for enum in classes if issubclass(enum, Enum) for member in enum]
    before = [_Snapshot.of(thing) for thing in (*classes, *members)]
    try:
        yield
    finally:
        changed = [snapshot.thing for snapshot in before if snapshot.restore()]
        if changed:
            raise CheckpointError(f"{path}: would change {changed[0]!r}, which the whole program uses. {_DISTRUST}")
