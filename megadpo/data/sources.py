"""Sources of preference rows: JSON, Parquet and CSV files, saved datasets, datasets of the Hugging Face Hub.

Every source streams its rows, in memory that does not grow with their number. Rows are not interpreted here.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadpo.data.json_rows import LONGEST_ROW, Row, RowProblem, json_rows
from megadpo.data.source_spec import SourceKind, SourceSpec, check_source, parse_source
from megadpo.errors import DataError

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

_ROWS_AT_ONCE = 256
_UNDECODED_BYTE = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True, slots=True)
class Source:
    """One data path: its rows, which can be read repeatedly, and the hash of its content; both are read on demand."""

    name: str
    location: str
    """what stands before a row's line in messages: `FILE:`, for tables `NAME:row `"""
    _read: Callable[[], Iterator[Row]]
    _hash: Callable[[], str]

    def rows(self) -> Iterator[Row]:
        """Streams the rows. Raises DataError at a fault after which the next row can't be found."""
        try:
            yield from self._read()
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read: {error.strerror or error}") from error
        except SystemError as error:  # Arrow's errors for files that have been changed in place
            raise DataError(f"{self.name}: the file is damaged ({error}): write it again") from error

    def digest(self) -> str:
        """Hash (sha256) of the content: of its files' bytes and their kind, or of the rows if it has no files."""
        try:
            return self._hash()
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read: {error.strerror or error}") from error


def open_source(text: str) -> Source:
    """Opens the source that a data path names. Raises DataError if there is none; uses no network."""
    problem = check_source(text)
    if problem is not None:
        raise DataError(f"{text}: {problem}")
    spec = parse_source(text)
    if spec.kind in (SourceKind.saved, SourceKind.hub):
        load = cache(partial(_load_saved if spec.kind == SourceKind.saved else _load_hub, text, spec))
        return Source(text, f"{text}:row ", lambda: _table_rows(load()), lambda: _table_digest(load(), spec.split))
    path = Path(spec.path)
    place = f"{path}:row " if spec.kind == SourceKind.parquet else f"{path}:"
    readers = {SourceKind.parquet: _parquet_rows, SourceKind.csv: _csv_rows}
    return Source(
        text, place, partial(readers.get(spec.kind, json_rows), path), partial(_hash_files, [path], spec.kind)
    )


# ----------------------------------------------------------------------------------------------------- CSV and Parquet
def _csv_rows(path: Path) -> Iterator[Row]:
    """Rows of a CSV file with a header, as objects of strings; invalid bytes or a wrong count only spoil their row."""
    size = path.stat().st_size
    with (
        path.open("rb") as file,
        io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines,
    ):
        records = _csv_records(path, lines)
        line, header = next(records, (1, []))
        if not header:
            raise DataError(f"{path}:1: the file is empty; a CSV file begins with a line of column names")
        if any("\0" in name or _UNDECODED_BYTE.search(name) for name in header):
            raise DataError(f"{path}:{line}: the header is not UTF-8 text (UTF-16?); save the file as UTF-8")
        if len(set(header)) < len(header) or "" in header:
            raise DataError(f"{path}:{line}: the header {header} must name every column, and each once")
        for line, fields in records:
            yield Row(line, _csv_row(header, fields), file.tell() / size)


def _csv_records(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Yields (first line, fields) of every record that is not a blank line."""
    reader = csv.reader(lines, strict=True)
    while True:
        line = reader.line_num + 1
        shared_limit = csv.field_size_limit(LONGEST_ROW)  # a limit of the process, raised while this file is read
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{path}:{line}: not valid CSV: {error}; a field with quotes, commas or line breaks stands between "
                'quotes, and a quote in it is written twice ("")'
            ) from None
        finally:
            csv.field_size_limit(shared_limit)
        if fields is None:
            return
        if fields:
            yield line, fields


def _csv_row(header: list[str], fields: list[str]) -> dict[str, str] | RowProblem:
    if len(fields) != len(header):
        return RowProblem(f"the row has {len(fields)} fields, the header has {len(header)} ({', '.join(header)})")
    for name, field in zip(header, fields, strict=True):
        undecoded = _UNDECODED_BYTE.search(field)
        if undecoded:
            byte = ord(undecoded[0]) - 0xDC00
            return RowProblem(f"{name} holds invalid UTF-8 (byte 0x{byte:02x}); save the file as UTF-8")
    return dict(zip(header, fields, strict=True))


def _parquet_rows(path: Path) -> Iterator[Row]:
    """Rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            total = file.metadata.num_rows
            yield from _arrow_rows(file.iter_batches(batch_size=_ROWS_AT_ONCE), total)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file that can be read: {error}; write it again") from error


def _arrow_rows(batches: Iterable[pyarrow.RecordBatch | pyarrow.Table], total: int) -> Iterator[Row]:
    values = (value for batch in batches for value in _arrow_values(batch))
    for number, value in enumerate(values, 1):
        yield Row(number, value, number / total)


def _arrow_values(batch: pyarrow.RecordBatch | pyarrow.Table) -> Iterator[dict[str, Any] | RowProblem]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # in one of the columns
        for i in range(len(batch)):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield RowProblem(f"invalid UTF-8 (byte 0x{error.object[error.start]:02x}); write the table again")


# ------------------------------------------------------------------------------------------------------------ datasets
def _load_saved(text: str, spec: SourceSpec) -> Dataset:
    from datasets import load_from_disk

    directory = Path(spec.path) / spec.split if spec.split else Path(spec.path)
    try:
        return load_from_disk(str(directory))
    except Exception as error:  # a damaged directory may raise any error of Arrow, JSON or the file system
        raise DataError(f"{text}: the saved dataset cannot be loaded: {error}; save it again") from error


def _load_hub(text: str, spec: SourceSpec) -> Dataset:
    """Loads the named split through the Hub client's own cache."""
    from datasets import get_dataset_split_names, load_dataset

    try:
        if spec.split is not None:
            return load_dataset(spec.path, spec.subset, split=spec.split)
        splits = get_dataset_split_names(spec.path, spec.subset)
    except Exception as error:  # the client raises many types of errors, for names, rights, networks and formats
        raise DataError(
            f"{text}: the dataset cannot be loaded: {error}; check its name, configuration and split, and that the Hub "
            "can be reached; without a network, save the dataset elsewhere with save_to_disk and give its directory"
        ) from error
    raise DataError(f"{text}: must name a split; the dataset has {', '.join(splits)}: write {text}:{splits[0]}")


def _table_rows(table: Dataset) -> Iterator[Row]:
    if not len(table):
        return iter(())
    # In Arrow format, so that media columns, which are not read, stay undecoded.
    return _arrow_rows(table.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE), len(table))


def _table_digest(table: Dataset, split: str | None) -> str:
    files = [Path(file["filename"]) for file in table.cache_files]
    sha = hashlib.sha256(f"{split} {len(table)}".encode())  # splits such as train[:100] have the same files
    if files:
        sha.update(_hash_files(files, SourceKind.saved).encode())
    else:
        for row in _table_rows(table):
            sha.update(json.dumps(row.value, default=repr).encode())
    return sha.hexdigest()


def _hash_files(paths: Iterable[Path], kind: SourceKind) -> str:
    """Hash of the files' content and of their kind, since the same bytes are other rows in a file of another kind."""
    sha = hashlib.sha256(kind.value.encode())
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**20):
                sha.update(block)
    return sha.hexdigest()
