"""Safetensors directories as Hugging Face lays them out: reads slices, and writes shard by shard."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megadpo.errors import ConversionError, listing
from megadpo.files import writing

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PARTIAL_DIR = ".export.partial"


@dataclass(frozen=True)
class TensorHeader:
    """Where a tensor lies, its shape and its dtype as safetensors spells it (F32, BF16, …)."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class SafetensorsReader:
    """Tensors of a Hugging Face directory: headers at once, data only in the slices that are asked for.

    A context manager that keeps the files mapped. A missing or damaged file, an index that contradicts the files or
    leads out of the directory, and a directory without safetensors are ConversionErrors.
    """

    def __init__(self, directory: Path | str) -> None:
        self._directory = Path(directory)
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        try:
            weight_map = _read_weight_map(self._directory)
            for file in sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_FILE]:
                self._files[file] = self._open(file)
            self.headers: Mapping[str, TensorHeader] = _read_headers(self._files)
            if weight_map is not None:
                _check_index(self._directory / INDEX_FILE, weight_map, self.headers)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, name: str, slices: tuple[slice, ...] = ()) -> torch.Tensor:
        """The tensor's `slices` (leading axes, all of it by default) in the file's dtype, on the CPU."""
        lazy = self._files[self.headers[name].file].get_slice(name)
        tensor: torch.Tensor = lazy[slices] if slices else lazy[:]
        return tensor

    def _open(self, file: str) -> Any:
        path = self._directory / file
        try:
            return self._stack.enter_context(safe_open(path, framework="pt"))
        except FileNotFoundError:
            raise ConversionError(f"{path} does not exist, but {INDEX_FILE} names it; complete the download") from None
        except (SafetensorError, OSError) as error:
            reason = _damage(path) or f"{error}; download or export it again"
            raise ConversionError(f"{path} cannot be read: {reason}") from error


def _read_weight_map(directory: Path) -> dict[str, str] | None:
    """File of every tensor by the index, None where one file holds all."""
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
    outside = [f"{name}: {file!r}" for name, file in weight_map.items() if not _is_file_name(file)]
    if outside:
        raise ConversionError(
            f"{index} names files that don't lie beside it; each must be the bare name of a .safetensors file in the "
            f"same directory. Don't trust this download:\n{listing(outside)}"
        )
    return weight_map


def _is_file_name(file: object) -> bool:
    return isinstance(file, str) and Path(file).name == file and "\\" not in file and file.endswith(".safetensors")


def _damage(path: Path) -> str | None:
    """What is wrong with a file that safetensors refuses, and the remedy; None where its header is whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            return "it is the pointer of Git LFS, not the weights; fetch them with git lfs pull"
        length = int.from_bytes(start, "little")
        header = file.read(length) if 8 + length <= size else b""
    try:
        tensors = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
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


def _read_headers(files: Mapping[str, Any]) -> dict[str, TensorHeader]:
    headers: dict[str, TensorHeader] = {}
    for file, handle in files.items():
        for name in handle.keys():  # noqa: SIM118 - the handle is not a mapping
            if name in headers:
                raise ConversionError(f"{name} lies in both {headers[name].file} and {file}; one of them is stale")
            lazy = handle.get_slice(name)
            headers[name] = TensorHeader(file, tuple(lazy.get_shape()), lazy.get_dtype())
    return headers


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


class ShardedWriter:
    """Writes tensors in the order they are added, in files of at most `max_shard_bytes` (a larger tensor has its own).

    A context manager. Files grow in a hidden folder inside `directory`, and move into place when `finish` is called,
    the index last: an export that was killed never looks complete. At most one file's tensors are held in memory. What
    can't be written is a ConversionError.
    """

    def __init__(self, directory: Path | str, *, max_shard_bytes: int = 5 * 10**9) -> None:
        self._directory = Path(directory)
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._shard_of: dict[str, int] = {}
        self._flushed = 0
        self._partial = self._directory / _PARTIAL_DIR
        existing = sorted(path.name for path in self._directory.glob("*.safetensors*"))
        if existing:
            raise ConversionError(f"{self._directory} already holds {existing[0]}; remove it or name another directory")
        # What a killed export left behind.
        shutil.rmtree(self._partial, ignore_errors=True)
        with writing(self._partial, ConversionError):
            self._partial.mkdir(parents=True)

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)  # gone already when all is finished

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Takes `tensor` over: it must not be changed before the writer is closed."""
        tensor = tensor.detach().cpu().contiguous()
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_shard_bytes:
            self._flush()
        if name in self._shard_of:
            raise ConversionError(f"{name} was written twice")
        self._shard_of[name] = self._flushed
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def _flush(self) -> None:
        path = self._partial / f"{self._flushed}.safetensors"
        try:
            save_file(self._pending, path, metadata={"format": "pt"})
            _fsync(path)
        except (SafetensorError, OSError) as error:
            raise ConversionError(
                f"{path}: can't be written ({error}): make room, or choose another directory"
            ) from error
        self._flushed += 1
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> None:
        """Writes what is left and moves all files into place."""
        self._flush()
        with writing(self._directory, ConversionError):
            self._move_into_place()
            self._partial.rmdir()
            _fsync(self._directory)

    def _move_into_place(self) -> None:
        count = self._flushed
        files = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        for number, file in enumerate(files if count > 1 else [SINGLE_FILE]):
            os.replace(self._partial / f"{number}.safetensors", self._directory / file)
        if count > 1:
            weight_map = {name: files[number] for name, number in sorted(self._shard_of.items())}
            index = self._partial / INDEX_FILE
            content = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            _fsync(index)
            os.replace(index, self._directory / INDEX_FILE)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
