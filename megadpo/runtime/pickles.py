"""Pickles of a checkpoint that are data: whoever made it can't have a program run by whoever loads it.

torch unpickles `.metadata`, and objects between the tensors, by calling whatever they name.
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

# Of a class that is made at run time, and can be changed (Py_TPFLAGS_HEAPTYPE).
_HEAP_TYPE = 1 << 9
_NAME_SHOWN = 100
_DISTRUST = "Don't trust this checkpoint; get it again from those who made it"

# What torch's and Megatron's writers make metadata of, besides plain Python values. `all_local_plans`, which Megatron
# adds, are the classes of the planner.
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
    # In place of a function, whose defaults a pickle could change.
    ("torch.serialization", "_get_layout"): MappingProxyType(
        {str(layout): layout for layout in vars(torch).values() if isinstance(layout, torch.layout)}
    ).__getitem__,
    # Where it was saved; by Python 3.13 in a module that others don't have.
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
}


@contextmanager
def data_only_unpickling(directory: Path) -> Iterator[None]:
    """While it is open, torch takes nothing but data from a checkpoint; CheckpointError where there is more.

    A patch of torch 2.13: `FileSystemReader.read_metadata` calls `pickle.load`, and `DefaultLoadPlanner.load_bytes`
    asks torch.load for objects with weights_only=False, for every tensor that the metadata calls an object. It can go
    when torch reads both with a list of what it admits. For the whole process; threads that read meanwhile are held to
    it too.
    """
    load = torch.load

    def load_data(file: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return load(file, *arguments, **{**options, "weights_only": True})
        except pickle.UnpicklingError as error:
            # torch's own text advises to switch the check off; what it found is in the error before.
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
    """Stands in for the module `pickle` where torch reads a checkpoint's metadata."""

    dump = staticmethod(pickle.dump)

    @staticmethod
    def load(file: IO[bytes]) -> Metadata:
        """The metadata; CheckpointError where it names anything that metadata don't consist of."""
        path = getattr(file, "name", "its metadata")
        data = file.read()
        _check_opcodes(data, str(path))
        with _classes_as_they_were(str(path)):
            content = _Unpickler(io.BytesIO(data), str(path)).load()
        if not isinstance(content, Metadata) or not isinstance(content.storage_data, dict):
            raise CheckpointError(f"{path}: holds no metadata of a checkpoint but a {type(content).__name__}")
        for place in content.storage_data.values():
            if not isinstance(place, filesystem._StorageInfo) or not is_file_name(
                place.relative_path, filesystem.DEFAULT_SUFFIX
            ):
                raise CheckpointError(f"{path}: names a file that doesn't lie beside it: {_shown(place)}. {_DISTRUST}")
        return content


def _shown(place: Any) -> str:
    """The file that an entry names, cut short: the text of whatever else a pickle makes may have no end."""
    name = place.relative_path if isinstance(place, filesystem._StorageInfo) else place
    return repr(name[:_NAME_SHOWN]) if isinstance(name, str) else f"a {type(name).__name__}"


class _Unpickler(pickle.Unpickler):
    """Finds what metadata consist of, by full name, and nothing else."""

    def __init__(self, file: IO[bytes], path: str) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """What the pickle may call or make; CheckpointError for anything else, which has not been called."""
        try:
            return _NAMES[module, name]
        except KeyError:
            raise CheckpointError(
                f"{self._path}: would run or make {module}.{name}, which no metadata of a checkpoint consist of. "
                f"{_DISTRUST}"
            ) from None


def _plain_and_sized() -> tuple[re.Pattern[bytes], dict[int, int]]:
    """A run of operations of fixed size; and how many bytes say the size of what follows each of the others.

    LONG_BINPUT is in neither: unpickling makes room for as many objects as the number that it puts one at. Nor are
    operations that end with a line. Pickles have neither since Python 3.8 (protocol 4).
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


_PLAIN, _SIZED = _plain_and_sized()


def _check_opcodes(data: bytes, path: str) -> None:
    """CheckpointError where a pickle has an operation that none needs, and that could take memory without end."""
    position = 0
    while (match := _PLAIN.match(data, position)) and (position := match.end()) < len(data):
        if data[position] not in _SIZED:
            raise CheckpointError(
                f"{path}: is no pickle of metadata: it has operation {data[position]:#04x} at byte {position}, they "
                f"need none like it. {_DISTRUST}"
            )
        start = position + 1 + _SIZED[data[position]]
        position = start + int.from_bytes(data[position + 1 : start], "little")


@dataclass(frozen=True, slots=True)
class _Remembered:
    """A class, or a member of an enum, with what a pickle could set of it: the process has no other."""

    thing: Any
    kind: type
    bases: tuple[type, ...]
    values: dict[str, Any]

    @classmethod
    def of(cls, thing: Any) -> _Remembered:
        """As it is now."""
        return cls(thing, type(thing), thing.__bases__ if isinstance(thing, type) else (), dict(vars(thing)))

    def restore(self) -> bool:
        """Undoes what has changed since; whether anything had."""
        now = _Remembered.of(self.thing)
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
def _classes_as_they_were(path: str) -> Iterator[None]:
    """Undoes what unpickling sets of the listed classes themselves, which it can; CheckpointError where it did."""
    classes = [thing for thing in _NAMES.values() if isinstance(thing, type) and thing.__flags__ & _HEAP_TYPE]
    members = [member for enum in classes if issubclass(enum, Enum) for member in enum]
    before = [_Remembered.of(thing) for thing in (*classes, *members)]
    try:
        yield
    finally:
        changed = [remembered.thing for remembered in before if remembered.restore()]
        if changed:
            raise CheckpointError(f"{path}: would change {changed[0]!r}, which the whole program uses. {_DISTRUST}")
