"""Files that are written whole or not at all, and errors of writing that say what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from megadpo.errors import MegaDPOError


@contextmanager
def writing(path: Path, error_type: type[MegaDPOError] = MegaDPOError) -> Iterator[None]:
    """Turns an OSError of the context, which writes `path`, into an `error_type` that names the file and the remedy."""
    try:
        yield
    except OSError as error:
        raise error_type(
            f"{error.filename or path}: can't be written ({error.strerror or error}): make room, or choose another "
            "directory"
        ) from error


def is_file_name(name: object, suffix: str) -> bool:
    """Whether something that was read is the bare name of a file with this suffix, and leads to no other directory."""
    return isinstance(name, str) and Path(name).name == name and "\\" not in name and name.endswith(suffix)


class Appender:
    """A file that grows, and has everything on disk when `append` returns; a context manager."""

    def __init__(self, path: Path) -> None:
        # Without a buffer, which would fail once more on closing, in another error's place.
        self._file = path.open("ab", buffering=0)

    def __enter__(self) -> Appender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, content: bytes) -> None:
        """Adds the content at the end. After an OSError a part of it may stand there."""
        rest = memoryview(content)
        while rest:
            rest = rest[self._file.write(rest) :]
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()


def write_durably(path: Path, text: str) -> None:
    """Replaces a text file by rename, on disk before it has its name: a reader sees the old text or the new one.

    MegaDPOError where it can't be written.
    """
    temporary = path.with_name(f".{path.name}")
    with writing(path):
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        flush_directory(path.parent)


def flush_directory(directory: Path) -> None:
    """Has the names in a directory on disk when it returns, where the file system can: renames outlive a crash then."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems keep names on disk by themselves
            raise
    finally:
        os.close(handle)
