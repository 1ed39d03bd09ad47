"""The key of cached log-probs: everything that a reference's log-probs depend on, besides a pair's tokens.

It consists of hashes of the reference's weights and configuration, of the tokenizer and the chat template, of the
precision, and of the version of this program's numerics. The layout, the order and the packing of pairs are not in it:
they only change the last bits of a sum. Hashes of weight files are kept in an index, so that they are read once.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from megadpo.data.prepare import tokenizer_files
from megadpo.errors import CacheError
from megadpo.runtime.files import Appender, writing

# To be raised with every change after which the same weights and tokens give other log-probs, rounding aside;
# tests/distributed/test_numerics_version.py detects such a change.
NUMERICS_VERSION = 1

_KEY, INDEX = "key.json", "hashes.txt"
_CONFIG, _TOKENIZER_CONFIG, _TEMPLATE_FIELD = "config.json", "tokenizer_config.json", "chat_template"
# Fields of config.json that do not change the computation; the precision is a separate part.
_NOT_COMPUTED = frozenset({"dtype", "torch_dtype", "transformers_version", "_name_or_path"})
_BLOCK_BYTES = 2**24
# A file whose hash is known is identified by a sample of pieces, the first and the last among them.
_PIECES, _PIECE_BYTES = 16, 2**16

# The parts of a key, and their names in messages.
PARTS = {
    "weights": "the reference's weights",
    "config": "the reference's config.json",
    "tokenizer": "the tokenizer",
    "template": "the chat template",
    "precision": "the precision",
    "numerics": "the numerics version",
}


@dataclass(frozen=True, slots=True)
class CacheKey:
    """The parts of a key by the names in PARTS: hashes, or values that can be shown."""

    parts: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Hash of all parts."""
        return hashlib.sha256(json.dumps(dict(self.parts), sort_keys=True).encode()).hexdigest()


def cache_key(
    *,
    weight_files: Iterable[Path],
    config_file: Path,
    tokenizer_dir: Path,
    precision: str,
    index_dir: Path | None,
) -> CacheKey:
    """Computes the key of a reference's log-probs; reads weight files that `index_dir` has no hash of. For one process.

    `precision` holds all settings that affect rounding. Without `index_dir` all files are read, and no hash is stored.
    Raises CacheError if a file can't be read.
    """
    hash_of = _hash_of_file if index_dir is None else _FileHashes(index_dir).hash_of
    try:
        weights = {path.name: hash_of(path) for path in sorted(weight_files)}
        fields = json.loads(config_file.read_bytes())
        tokenizer, template = _tokenizer_parts(tokenizer_dir)
    except OSError as error:
        raise CacheError(
            f"{error.filename}: can't be read ({error.strerror}); kept log-probs of a reference depend on it: check it"
        ) from error
    return CacheKey(
        {
            "weights": _hash(weights),
            "config": _hash({name: value for name, value in fields.items() if name not in _NOT_COMPUTED}),
            "tokenizer": _hash(tokenizer),
            "template": _hash(template),
            "precision": precision,
            "numerics": str(NUMERICS_VERSION),
        }
    )


def _tokenizer_parts(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Contents of the tokenizer's files, and its chat template, which may also be in tokenizer_config.json."""
    tokenizer: dict[str, Any] = {}
    template: dict[str, Any] = {}
    for name, content in tokenizer_files(directory).items():
        if name == _CONFIG:
            continue  # of the model
        if name == _TOKENIZER_CONFIG:
            fields = json.loads(content)
            template[name] = fields.pop(_TEMPLATE_FIELD, None)
            tokenizer[name] = fields
        else:
            part = template if "chat_template" in name else tokenizer
            part[name] = hashlib.sha256(content).hexdigest()
    return tokenizer, template


def _hash(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class _FileHashes:
    """An index of the SHA-256 of files, as an append-only file of lines: CHECKSUM HASH FILE.

    FILE identifies a file by its path, size, times of modification and change, and a checksum of a sample of its
    content, since copies and container images may give every file the same date.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / INDEX
        self._known: dict[str, str] = {}
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines() if self._exists() else ():
            checksum, _, entry = line.partition(" ")
            if checksum == _checksum(entry):  # files of incomplete or damaged lines are read again
                digest, _, file = entry.partition(" ")
                self._known[file] = digest

    def _exists(self) -> bool:
        return self._path.is_file()

    def hash_of(self, path: Path) -> str:
        """Returns the file's hash; reads the file if its hash is unknown or it has changed."""
        file = _identity(path)
        if file not in self._known:
            self._known[file] = _hash_of_file(path)
            entry = f"{self._known[file]} {file}"
            with writing(self._path, CacheError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with Appender(self._path) as index:
                    index.append(f"\n{_checksum(entry)} {entry}\n".encode())  # the line before may be incomplete
        return self._known[file]


def _identity(path: Path) -> str:
    about = path.stat()
    return json.dumps(
        [str(path.resolve()), about.st_size, about.st_mtime_ns, about.st_ctime_ns, _sampled_checksum(path)]
    )


def _sampled_checksum(path: Path) -> int:
    """A checksum of a sample of pieces spread over a file."""
    pieces, size = 0, path.stat().st_size
    with path.open("rb") as file:
        for piece in range(_PIECES):
            file.seek(max(0, size - _PIECE_BYTES) * piece // (_PIECES - 1))
            pieces = zlib.crc32(file.read(_PIECE_BYTES), pieces)
    return pieces


def sampled_fingerprint(weight_files: Iterable[Path]) -> str:
    """A fast fingerprint of weight files, independent of their directory: names, sizes, and checksums of samples."""
    return _hash({path.name: [path.stat().st_size, _sampled_checksum(path)] for path in weight_files})


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _hash_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_key(directory: Path, key: CacheKey) -> None:
    """Writes the key's parts to its directory unless they are there; atomically, since others may write them too."""
    if (directory / _KEY).is_file():
        return
    temporary = directory / f".{_KEY}.{uuid4().hex}"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(dict(key.parts), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(directory / _KEY)


def read_key(directory: Path) -> CacheKey | None:
    """Reads the key of a directory; None if it is not the directory of a key."""
    try:
        parts = json.loads((directory / _KEY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return CacheKey({str(name): str(value) for name, value in parts.items()}) if isinstance(parts, dict) else None


def differing_parts(before: CacheKey, now: CacheKey) -> list[str]:
    """Descriptions of the parts in which two keys differ, with their values unless they are hashes."""
    said = []
    for name, words in PARTS.items():
        old, new = before.parts.get(name), now.parts.get(name)
        if old != new:
            said.append(f"{words} ({old} then, {new} now)" if name in ("precision", "numerics") else words)
    return said
