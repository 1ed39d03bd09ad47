"""An append-only store of pairs' log-probs on disk, which may be interrupted, and shared by several jobs.

A cache directory has one directory per key (`key.py`), named by its hash. In it `key.json` holds the key's parts, and
every writer has its own segment, a file that only grows: `TIME-RANDOM.logps`, with records of one size. A record is a
pair's digest, its log-probs in fp64, and a checksum that also covers the key.

A killed writer leaves at most an incomplete record at a segment's end, which readers skip. A record with a wrong
checksum is an error, since an interruption can't damage a complete record.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from megadpo.errors import CacheError
from megadpo.reference.key import CacheKey, differing_parts, read_key, write_key
from megadpo.runtime.files import Appender, writing
from megadpo.runtime.rank_logging import get_logger

logger = get_logger(__name__)

# The log-probs are SequenceLogProbs' fields in their order.
_RECORD = np.dtype([("digest", "V16"), ("logps", "<f8", 4), ("checksum", "<u4")])
_CHECKED_BYTES = _RECORD.itemsize - 4
_SUFFIX = ".logps"

LogProbs = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class OtherKey:
    """Another key in a cache directory, and descriptions of the parts in which it differs."""

    directory: Path
    differences: list[str]


class LogProbStore:
    """The records of one key; for one process. Records of other jobs are seen after `refresh`.

    Known records do not change: if two jobs write a pair at the same moment, each continues with the record that it saw
    first, and later readers take the one in the segment whose name sorts first. A context manager, which closes the
    segment that `append` opens.
    """

    def __init__(self, directory: Path, key: CacheKey) -> None:
        self.directory = directory
        self.key = key
        self._seed = zlib.crc32(key.digest.encode())
        self._values: dict[bytes, list[float]] = {}
        self._segment: Appender | None = None
        self._bytes_read: dict[Path, int] = {}
        self.refresh()
        for path, known in self._bytes_read.items():
            if unfinished := path.stat().st_size - known:
                logger.info("%s ends in %d bytes of a record that was not finished", path, unfinished)

    def __enter__(self) -> LogProbStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_segment()

    def __len__(self) -> int:
        return len(self._values)

    def refresh(self) -> None:
        """Reads records that have been added on disk. Raises CacheError for a damaged record."""
        for path in self.segments():
            for digest, logps in self._read_on(path):
                self._values.setdefault(digest, logps)

    def segments(self) -> list[Path]:
        """The segment files in the order of their precedence."""
        return sorted(self.directory.glob(f"*{_SUFFIX}"))

    def known(self, digests: Sequence[bytes]) -> npt.NDArray[np.bool_]:
        """A mask of the pairs that have a record."""
        return np.fromiter((digest in self._values for digest in digests), np.bool_, len(digests))

    def lookup(self, digests: Sequence[bytes]) -> LogProbs:
        """Log-probs of pairs, all of which must be known, fp64 [n, 4]."""
        return np.array([self._values[digest] for digest in digests], np.float64).reshape(-1, 4)

    def append(self, digests: Sequence[bytes], logps_n4: LogProbs) -> None:
        """Adds a record for each pair without one, and flushes it to disk. Raises CacheError if that fails."""
        self.refresh()  # other jobs may fill the same key
        fresh = {
            digest: logps
            for digest, logps in zip(digests, logps_n4.tolist(), strict=True)
            if digest not in self._values
        }
        if not fresh:
            return
        records = np.zeros(len(fresh), _RECORD)
        records["digest"] = np.array(list(fresh), dtype="V16")
        records["logps"] = np.array(list(fresh.values()), np.float64).reshape(-1, 4)
        records["checksum"] = list(self._checksums(records.tobytes()))
        try:
            with writing(self.directory, CacheError):
                self._own_segment().append(records.tobytes())
        except CacheError:
            self._close_segment()  # it may end with an incomplete record, which nothing must follow
            raise
        self._values |= fresh

    def _own_segment(self) -> Appender:
        if self._segment is None:
            # Named by the clock, so that the first record counts if runs fill the directory one after the other.
            self._segment = Appender(self.directory / f"{time.time_ns():020d}-{uuid4().hex}{_SUFFIX}")
        return self._segment

    def _close_segment(self) -> None:
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    def _read_on(self, path: Path) -> Iterator[tuple[bytes, list[float]]]:
        """Reads the complete records of a segment beyond those that were read before."""
        start = self._bytes_read.get(path, 0)
        try:
            with path.open("rb") as segment:
                segment.seek(start)
                content = segment.read()
        except OSError as error:
            raise CacheError(f"{path}: can't be read ({error.strerror}): check it, or remove it; {_REMOVED}") from error
        whole = len(content) // _RECORD.itemsize * _RECORD.itemsize
        self._bytes_read[path] = start + whole
        records = np.frombuffer(content[:whole], _RECORD)
        right = records["checksum"] == np.fromiter(self._checksums(content[:whole]), np.uint32, len(records))
        if not right.all():
            first = int(np.flatnonzero(~right)[0])
            raise CacheError(
                f"{path}: the record at byte {start + first * _RECORD.itemsize} is damaged ({int((~right).sum())} of "
                f"{len(records)} are): its checksum is wrong. Remove the file: {_REMOVED}"
            )
        yield from zip(records["digest"].tolist(), records["logps"].tolist(), strict=True)

    def _checksums(self, content: bytes) -> Iterator[int]:
        """Checksums of all records in `content`."""
        view = memoryview(content)
        for start in range(0, len(content), _RECORD.itemsize):
            yield zlib.crc32(view[start : start + _CHECKED_BYTES], self._seed)


_REMOVED = "its pairs are computed again"


def open_store(cache_dir: Path, key: CacheKey) -> LogProbStore:
    """Opens the store of a key under `cache_dir`, or creates it; for one process.

    Raises CacheError if it can't be created, or if its content is not that of a store.
    """
    directory = cache_dir / key.digest[:32]
    with writing(cache_dir, CacheError):
        directory.mkdir(parents=True, exist_ok=True)
        write_key(directory, key)
    if read_key(directory) != key:
        raise CacheError(f"{directory}: its key.json is not what was written: remove that file, and it's written again")
    return LogProbStore(directory, key)


def other_keys(cache_dir: Path, key: CacheKey) -> list[OtherKey]:
    """The other keys in `cache_dir`, those with the fewest differences first."""
    found = []
    for directory in sorted(cache_dir.glob("*/")):
        known = read_key(directory)
        if known is not None and known.digest != key.digest and any(directory.glob(f"*{_SUFFIX}")):
            found.append(OtherKey(directory, differing_parts(known, key)))
    return sorted(found, key=lambda other: len(other.differences))
