"""Files that are written whole or not at all, and write errors that say what to do."""

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
    """Turns an OSError of the context, which writes `path`, into an `error_type` that names file and remedy."""
    try:
        yield
    except OSError as error:
        raise error_type(
            f"{error.filename or path}: can't be written ({error.strerror or error}): make room, or choose another "
            "directory"
        ) from error


def is_file_name(name: object, suffix: str) -> bool:
    """True if a value read from a file is the bare name of a file with this suffix, in no other directory."""
    return isinstance(name, str) and Path(name).name == name and "\\" not in name and name.endswith(suffix)


class Appender:
    """A file that is appended to; all of it is on disk when `append` returns. A context manager."""

    def __init__(self, path: Path) -> None:
        # Unbuffered: after a failed write a buffer would fail again on closing, and replace the first error.
        self._file = path.open("ab", buffering=0)

    def __enter__(self) -> Appender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, content: bytes) -> None:
        """Adds the content at the end. After an OSError a part of it may have been written."""
        rest = memoryview(content)
        while rest:
            rest = rest[self._file.write(rest) :]
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def write_durably(path: Path, text: str) -> None:
    """Replaces a text file by rename once the new one is on disk: a reader sees the old text or the new one.

    Raises MegaDPOError if it can't be written.
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
    """Flushes a directory's names to disk, where the file system can, so that renames survive a crash."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems keep names on disk by themselves
            raise
    finally:
        os.close(handle)
