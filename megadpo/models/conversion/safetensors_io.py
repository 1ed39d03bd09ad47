"""Reads safetensors directories in Hugging Face's layout: headers, and slices of the tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open

from megadpo.errors import ConversionError, listing
from megadpo.runtime.files import is_file_name

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
METADATA = "__metadata__"


# Formats of weights under safetensors' names, in the order in which its files hold them.
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# More than any model has; a million axes would take minutes, and fill the screen in a message.
_MOST_AXES = 8
# Size of the blocks that are read if columns are picked from rows.
_BLOCK_BYTES = 2**25


@dataclass(frozen=True)
class TensorHeader:
    """A tensor's file, its offset there, its shape, and its dtype in safetensors' spelling (F32, …)."""

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: str


class SafetensorsReader:
    """Reads tensors of a Hugging Face directory: all headers at once, data only in the requested slices.

    A context manager that keeps the files open; threads may share it. Files are read, not mapped, since mapped pages
    would count as memory of this process. Raises ConversionError for a missing or damaged file, an index that
    contradicts the files or leads out of the directory, and a directory without safetensors.
    """

    def __init__(self, directory: Path | str) -> None:
        self._directory = Path(directory)
        self._stack = ExitStack()
        self._files: dict[str, int] = {}
        try:
            weight_map = _read_weight_map(self._directory)
            headers: dict[str, TensorHeader] = {}
            for file in sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_FILE]:
                self._open(file, headers)
            if weight_map is not None:
                _check_index(self._directory / INDEX_FILE, weight_map, headers)
        except BaseException:
            self._stack.close()
            raise
        self.headers: Mapping[str, TensorHeader] = headers

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, name: str, slices: tuple[slice, ...] = ()) -> torch.Tensor:
        """Reads the tensor's `slices` (rows, or rows and columns; by default all) in the file's dtype, on the CPU.

        `name` must be a tensor of floats. Raises ConversionError if the file can't be read.
        """
        header = self.headers[name]
        bounds = [piece.indices(size)[:2] for piece, size in zip(slices, header.shape, strict=False)]
        (start, stop), *columns = bounds or [(0, header.shape[0])]
        if not columns or columns == [(0, header.shape[1])]:
            return self._rows(header, start, stop)
        ((left, right),) = columns
        picked = torch.empty((stop - start, right - left), dtype=FLOAT_DTYPES[header.dtype])
        step = max(1, _BLOCK_BYTES // (header.shape[1] * picked.itemsize))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            picked[first - start : last - start] = self._rows(header, first, last)[:, left:right]
        return picked

    def _rows(self, header: TensorHeader, start: int, stop: int) -> torch.Tensor:
        rows = torch.empty((stop - start, *header.shape[1:]), dtype=FLOAT_DTYPES[header.dtype])
        left = as_bytes(rows)
        position = header.offset + start * (rows.nbytes // max(1, stop - start))
        while left:
            try:
                count = os.preadv(self._files[header.file], [left], position)
            except OSError as error:
                raise ConversionError(
                    f"{self._directory / header.file} cannot be read ({error.strerror}): check the disk, or download "
                    "it again"
                ) from error
            if count == 0:
                raise ConversionError(f"{self._directory / header.file} became shorter while it was read: start again")
            left, position = left[count:], position + count
        return rows

    def _open(self, file: str, headers: dict[str, TensorHeader]) -> None:
        """Opens a file and adds its tensors to `headers`."""
        path = self._directory / file
        if path.exists() and not path.is_file():  # reading a pipe would wait forever
            raise ConversionError(f"{path} is not a file; download it again")
        try:
            with safe_open(path, framework="pt"):
                pass  # all properties in the header have been checked
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise ConversionError(f"{path} does not exist, but {INDEX_FILE} names it; complete the download") from None
        except (SafetensorError, OSError) as error:
            reason = _damage(path) or f"{error}; download or export it again"
            raise ConversionError(f"{path} cannot be read: {reason}") from error
        self._files[file] = descriptor
        self._stack.callback(os.close, descriptor)
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        for name, entry in json.loads(os.pread(descriptor, length, 8)).items():
            if name in headers:
                raise ConversionError(f"{name} lies in both {headers[name].file} and {file}; one of them is stale")
            if name != METADATA:
                if len(entry["shape"]) > _MOST_AXES:
                    raise ConversionError(
                        f"{path}: {name} has {len(entry['shape'])} axes, at most {_MOST_AXES} are read: download it "
                        "again"
                    )
                offset = 8 + length + entry["data_offsets"][0]
                headers[name] = TensorHeader(file, offset, tuple(entry["shape"]), entry["dtype"])


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, as bytes."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def hf_weight_files(directory: Path) -> list[Path]:
    """Files with the weights of a Hugging Face directory, and their index.

    Raises ConversionError if the directory has no safetensors files, or an index that can't be read.
    """
    weight_map = _read_weight_map(directory)
    if weight_map is None:
        return [directory / SINGLE_FILE]
    return [directory / INDEX_FILE, *(directory / file for file in sorted(set(weight_map.values())))]


def _read_weight_map(directory: Path) -> dict[str, str] | None:
    """File of every tensor according to the index; None if one file holds all."""
    has_single, index = (directory / SINGLE_FILE).is_file(), directory / INDEX_FILE
    if has_single and index.is_file():
        raise ConversionError(f"{directory} holds both {SINGLE_FILE} and {INDEX_FILE}; remove the one that is stale")
    if has_single:
        return None
    if not index.is_file():
        raise ConversionError(_nothing_to_read(directory))
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConversionError(f"{index}:{error.lineno}: not JSON ({error.msg}); download it again") from None
    except (ValueError, RecursionError, OSError) as error:
        raise ConversionError(f"{index} cannot be read ({error}); download it again") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index} has no weight_map from tensor names to files; download it again")
    outside = [f"{name}: {file!r}" for name, file in weight_map.items() if not is_file_name(file, ".safetensors")]
    if outside:
        raise ConversionError(
            f"{index} names files that don't lie beside it; each must be the bare name of a .safetensors file in the "
            f"same directory. Don't trust this download:\n{listing(outside)}"
        )
    return weight_map


def _damage(path: Path) -> str | None:
    """The damage of a file that safetensors refuses, and the remedy; None if its header is intact."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            return "it is the pointer of Git LFS, not the weights; fetch them with git lfs pull"
        length = int.from_bytes(start, "little")
        header = file.read(length) if 8 + length <= size else b""
    try:
        tensors = [entry for name, entry in json.loads(header).items() if name != METADATA]
        expected = 8 + length + max(entry["data_offsets"][1] for entry in tensors)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return f"none of its {size} bytes make a safetensors header; download or export it again"
    if size == expected:
        return None
    what = "the download was cut off" if size < expected else "something was added to it"
    return f"it has {size} bytes and its header describes {expected}, so {what}; download or export it again"


def _nothing_to_read(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory} is not a directory"
    if any(directory.glob("*.bin")):
        return (
            f'{directory} holds .bin weights only; convert them with\n  python -c "from transformers import '
            f"AutoModelForCausalLM as M; M.from_pretrained('{directory}', dtype='auto').save_pretrained('NEW_DIR')\"\n"
            "and copy the tokenizer files beside them"
        )
    return f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}; name a directory with Hugging Face weights"


def _check_index(index: Path, weight_map: Mapping[str, str], headers: Mapping[str, TensorHeader]) -> None:
    problems = []
    for name, file in weight_map.items():
        if name not in headers:
            problems.append(f"{name} is not in {file}, where the index says it is")
        elif headers[name].file != file:
            problems.append(f"{name} is in {headers[name].file}, the index says {file}")
    problems += [f"{name} in {headers[name].file} is not in the index" for name in headers if name not in weight_map]
    if problems:
        raise ConversionError(f"{index} contradicts the files beside it; download both again:\n{listing(problems)}")
