"""Writes safetensors files in Hugging Face's layout: block by block, in any order, from any process."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from megadpo.errors import ConversionError
from megadpo.models.conversion.safetensors_io import FLOAT_DTYPES, INDEX_FILE, METADATA, SINGLE_FILE, as_bytes
from megadpo.runtime.files import writing

_PARTIAL_DIR = ".export.partial"


@dataclass(frozen=True, slots=True)
class FileSpan:
    """The position of a tensor in the files: number of the file and offset in it, shape and dtype."""

    file: int
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the tensor in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class FileLayout:
    """Header and size of each file to be written, and the position of each tensor in them."""

    headers: tuple[bytes, ...]
    sizes: tuple[int, ...]
    spans: Mapping[str, FileSpan]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(span.nbytes for span in self.spans.values())


def lay_out(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], *, max_shard_bytes: int = 5 * 10**9
) -> FileLayout:
    """Lays out tensors in their order in files of at most `max_shard_bytes`; a larger tensor gets a file of its own.

    `tensors` is {name: (shape, dtype)}. The files are byte for byte those that safetensors would write.
    """
    files: list[dict[str, FileSpan]] = []
    room = 0
    for name, (shape, dtype) in tensors.items():
        span = FileSpan(len(files) - 1, 0, shape, dtype)
        if not files or span.nbytes > room:
            files.append({})
            room = max_shard_bytes
        files[-1][name] = replace(span, file=len(files) - 1)
        room -= span.nbytes
    made = [_lay_out_file(spans) for spans in files]
    return FileLayout(
        headers=tuple(header for header, _, _ in made),
        sizes=tuple(size for _, size, _ in made),
        spans={name: span for _, _, spans in made for name, span in spans.items()},
    )


def _lay_out_file(spans: Mapping[str, FileSpan]) -> tuple[bytes, int, dict[str, FileSpan]]:
    """Returns header, size, and spans with offsets of one file. Its tensors are ordered by dtype, then by name."""
    dtypes = list(FLOAT_DTYPES.values())
    order = sorted(spans, key=lambda name: (dtypes.index(spans[name].dtype), name))
    names = {dtype: name for name, dtype in FLOAT_DTYPES.items()}
    entries: dict[str, Any] = {METADATA: {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for name in order:
        span, starts[name] = spans[name], end
        end += span.nbytes
        entries[name] = {
            "dtype": names[span.dtype],
            "shape": list(span.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, len(header) + end, {n: replace(spans[n], offset=len(header) + starts[n]) for n in order}


@contextmanager
def new_files(directory: Path | str, layout: FileLayout) -> Iterator[None]:
    """Creates the files of `layout` with their headers, for `BlockWriter`s of any process; to be called by one of them.

    They lie in a hidden folder inside `directory`, which must hold no weights yet, until `finish_files` moves them into
    place; leaving the context removes what is left. So an export that was killed never looks complete. Raises
    ConversionError if they can't be created.
    """
    partial = Path(directory) / _PARTIAL_DIR
    existing = sorted(path.name for path in Path(directory).glob("*.safetensors*"))
    if existing:
        raise ConversionError(f"{directory} already holds {existing[0]}; remove it or name another directory")
    shutil.rmtree(partial, ignore_errors=True)  # left by an export that was killed
    try:
        with writing(partial, ConversionError):
            partial.mkdir(parents=True)
            for number, (header, size) in enumerate(zip(layout.headers, layout.sizes, strict=True)):
                with _partial_file(directory, number).open("wb") as file, writing(Path(file.name), ConversionError):
                    file.write(header)
                    file.truncate(size)
        yield
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class BlockWriter:
    """Writes blocks of tensors, in any order and from any thread, to the files that `new_files` has created.

    A context manager. Raises ConversionError if a block can't be written.
    """

    def __init__(self, directory: Path | str, layout: FileLayout) -> None:
        self._spans = layout.spans
        self._paths = [_partial_file(directory, number) for number in range(len(layout.sizes))]
        self._stack = ExitStack()
        self._files: list[int] = []
        for path in self._paths:
            with writing(path, ConversionError):
                self._files.append(os.open(path, os.O_WRONLY))
            self._stack.callback(os.close, self._files[-1])

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def write(self, name: str, values: torch.Tensor, *, row: int = 0, column: int = 0) -> None:
        """Writes `values`, of any dtype and device, to the tensor, starting at `row` and `column`."""
        span = self._spans[name]
        values = values.detach().to("cpu", span.dtype).contiguous()
        width = math.prod(span.shape[1:]) * span.dtype.itemsize
        start = span.offset + row * width + column * span.dtype.itemsize
        memory = as_bytes(values)
        run = len(memory) if values.shape[1:] == span.shape[1:] else len(memory) // len(values)
        with writing(self._paths[span.file], ConversionError):
            for number, first in enumerate(range(0, len(memory), run)):
                _write_at(self._files[span.file], memory[first : first + run], start + number * width)

    def flush(self) -> None:
        """Flushes all written blocks to disk."""
        for path, file in zip(self._paths, self._files, strict=True):
            with writing(path, ConversionError):
                os.fsync(file)


def finish_files(directory: Path | str, layout: FileLayout) -> None:
    """Moves the files into place under Hugging Face's names, the index last; for the process that created them."""
    directory = Path(directory)
    count = len(layout.sizes)
    files = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    with writing(directory, ConversionError):
        for number, file in enumerate(files if count > 1 else [SINGLE_FILE]):
            os.replace(_partial_file(directory, number), directory / file)
        if count > 1:
            weight_map = {name: files[span.file] for name, span in sorted(layout.spans.items())}
            index = directory / _PARTIAL_DIR / INDEX_FILE
            content = {"metadata": {"total_size": layout.nbytes}, "weight_map": weight_map}
            index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            _fsync(index)
            os.replace(index, directory / INDEX_FILE)
        _fsync(directory)


def _partial_file(directory: Path | str, number: int) -> Path:
    return Path(directory) / _PARTIAL_DIR / f"{number}.safetensors"


def _write_at(file: int, memory: memoryview, position: int) -> None:
    while memory:
        count = os.pwrite(file, memory, position)
        memory, position = memory[count:], position + count


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
