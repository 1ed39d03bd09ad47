"""Manifests of finished directories: size and SHA-256 of every file, so that damage is found before anything is used.

Megatron's and torch's distributed format silently loads a flipped bit, a torn write or a file of another save.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from stat import S_ISREG
from typing import Any

from megadpo.runtime.files import write_durably
from megadpo.runtime.rank_logging import get_logger

logger = get_logger(__name__)

MANIFEST = "manifest.json"
# To be raised with every change of a checkpoint's content that an older program would misread.
FORMAT = 1
_BLOCK_BYTES = 2**22


class DamageKind(Enum):
    """Kinds of findings in a directory's files, of which only `content` makes a checkpoint unusable for good."""

    content = "a file is missing, or does not hold what was written"
    side_file = "the same of a file that people may change"
    other_format = "another version of megadpo wrote the manifest, which says nothing about its files"


@dataclass(frozen=True, slots=True)
class Damage:
    """One finding about a file of a checkpoint. `text` is for people only: no decision reads it."""

    file: str
    kind: DamageKind
    text: str


@dataclass(frozen=True, slots=True)
class FileDigest:
    """Size and SHA-256 of a file's content."""

    bytes: int
    sha256: str


def digest_of(path: Path, *, durably: bool = False, on_bytes: Callable[[int], None] | None = None) -> FileDigest:
    """Reads a file; with `durably` it is on disk when this returns. `on_bytes` gets the size of each block."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
            if on_bytes is not None:
                on_bytes(len(block))
        if durably:
            os.fsync(file.fileno())
    return FileDigest(size, digest.hexdigest())


def digest_files(directory: Path, *, share: int, shares: int) -> dict[str, FileDigest]:
    """Digests of this `share` of a directory's files, by relative path; the `shares` together are all files."""
    names = sorted(_files_under(directory), key=lambda name: (-(directory / name).stat().st_size, name))
    return {name: digest_of(directory / name, durably=True) for name in names[share::shares]}


def write_manifest(directory: Path, known: Mapping[str, FileDigest]) -> None:
    """Writes the manifest of `directory`; files that are not `known` by relative path are read, and flushed to disk.

    Raises MegaDPOError if it can't be written, OSError if a file can't be read.
    """
    others = {name for name in _files_under(directory) if name not in known}
    # Known files may not be listed here yet: network file systems show another machine's files later.
    files = {**known, **{name: digest_of(directory / name, durably=True) for name in others}}
    content = {"format": FORMAT, "files": {name: asdict(digest) for name, digest in sorted(files.items())}}
    write_durably(directory / MANIFEST, json.dumps(content, indent=1) + "\n")


def find_damage(directory: Path, *, share: int = 0, shares: int = 1, free: str = "") -> list[Damage]:
    """The damage of a directory, by file; [] if all files are those that were written.

    Sizes are checked first; contents are read only if these are right, of this `share` of `shares`, which have about
    equal numbers of bytes. Files under `free` may have been changed on purpose: they are found as side files, and do
    not keep contents from being read. Raises OSError if something can't be read, which says nothing about its content.
    """
    try:
        expected = _read_manifest(directory)
    except _Unreadable as error:
        return [error.damage]
    wrong = {name: problem for name in expected if (problem := _size_problem(directory, name, expected[name]))}
    if all(free and name.startswith(f"{free}/") for name in wrong):
        there = sorted(expected.keys() - wrong.keys(), key=lambda name: (-expected[name].bytes, name))
        size = sum(expected[name].bytes for name in there)
        logger.info("checking %s, %d files of %.2f GiB", directory, len(there), size / 2**30)
        for name in there[share::shares]:
            if problem := _content_problem(directory, name, expected[name]):
                wrong[name] = problem
    return [
        Damage(name, DamageKind.side_file if free and name.startswith(f"{free}/") else DamageKind.content, wrong[name])
        for name in sorted(wrong)
    ]


class _Unreadable(Exception):
    """A manifest that says nothing about its files."""

    def __init__(self, text: str, kind: DamageKind = DamageKind.content) -> None:
        super().__init__(text)
        self.damage = Damage(MANIFEST, kind, text)


def _read_manifest(directory: Path) -> dict[str, FileDigest]:
    path = directory / MANIFEST
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise _Unreadable(
                f"it is of format {content['format']}, this version of megadpo reads format {FORMAT}: use the version "
                "that wrote it",
                DamageKind.other_format,
            )
        return {str(name): FileDigest(**digest) for name, digest in content["files"].items()}
    except FileNotFoundError:
        raise _Unreadable(f"{MANIFEST} is missing, so that nothing says what was written: bring it back") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _Unreadable(f"{MANIFEST} can't be read ({type(error).__name__}: {error})") from None


def _size_problem(directory: Path, name: str, expected: FileDigest) -> str | None:
    try:
        found = (directory / name).stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a name that no file can have
        return f"{name} is missing"
    if not S_ISREG(found.st_mode):
        return f"{name} is not a file"
    if found.st_size != expected.bytes:
        return f"{name} has {found.st_size} bytes, {expected.bytes} were written"
    return None


def _content_problem(directory: Path, name: str, expected: FileDigest) -> str | None:
    try:
        found = digest_of(directory / name)
    except FileNotFoundError:  # since its size was looked at
        return f"{name} is missing"
    return None if found == expected else f"{name} holds other bytes than were written"


def _files_under(directory: Path) -> Iterable[str]:
    """Relative paths of a directory's files, except the manifest."""
    paths = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return (name for name in paths if name != MANIFEST)
