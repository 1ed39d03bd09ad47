"""Rows of JSON Lines files and JSON arrays: found by streaming, and decoded separately, so that workers can do that.

A row is the undecoded bytes of one JSON value. A fault of a single row is a `RowProblem` when it is decoded; a fault
that makes it impossible to find the beginning of the next row is a DataError here.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from megadpo.errors import DataError

BOM = codecs.BOM_UTF8
LONGEST_ROW = 64 * 2**20
"""Bytes of the longest row that is read; the bound of what reading keeps in memory"""
_CHUNK = 2**18
_IN_NUMBERS = "0123456789+-.eE"  # at the window's end, one of these may continue in the next window
_WHITESPACE = re.compile(r"[ \t\r\n]*")


class RowProblem(Exception):
    """The reason why one row can't be used, without FILE:LINE, which callers prepend."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source, as read."""

    line: int
    """where it begins, counted from 1; in tables the number of the row"""
    value: Any
    """undecoded JSON (bytes), the value itself, or the RowProblem that takes its place"""
    progress: float
    """share of the source that has been read, from 0 to 1"""


def json_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a .json or .jsonl file; the first character of a .json file tells an array from JSON Lines.

    Raises DataError for an empty file, a row over LONGEST_ROW, and an array that is not valid JSON.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_CHUNK).removeprefix(BOM)
        while start and not start.strip():
            start = file.read(_CHUNK)
        if not start:
            raise DataError(f"{path}:1: the file is empty; at least one pair is required")
        file.seek(0)
        if path.suffix == ".json" and start.lstrip().startswith(b"["):
            yield from _ArrayReader(path, file, size).rows()
        else:
            yield from _line_rows(path, file, size)


def decode_row(data: bytes, *, is_json_suffix: bool) -> Any:
    """Decodes one row; with `is_json_suffix`, error messages say what a .json file may hold.

    Raises RowProblem for invalid UTF-8 or JSON, a repeated key, NaN or Infinity, and values nested too deeply.
    """
    cut = "" if data.endswith(b"\n") else "; the file ends here without a newline and may be truncated"
    try:
        return _DECODER.decode(data.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        byte, end = data[error.start], cut if error.end >= len(data) else ""
        raise RowProblem(
            f"invalid UTF-8 (byte 0x{byte:02x}, the row's byte {error.start + 1}); save the file as UTF-8{end}"
        ) from None
    except json.JSONDecodeError as error:
        shape = " (a .json file is an array, or one object on each line)" if is_json_suffix else ""
        raise RowProblem(f"not valid JSON: {_reason(error)}{shape}{cut}") from None
    except (ValueError, RecursionError) as error:
        raise RowProblem(f"not valid JSON: {_reason(error)}") from None


def _line_rows(path: Path, file: BinaryIO, size: int) -> Iterator[Row]:
    number = done = 0
    while line := file.readline(LONGEST_ROW + 1):
        number += 1
        done += len(line)
        if len(line) > LONGEST_ROW:
            raise DataError(f"{path}:{number}: a line is longer than {LONGEST_ROW} bytes; one pair stands on each line")
        line = line.removeprefix(BOM) if number == 1 else line
        if line.strip():
            yield Row(number, line, done / size)


class _ArrayReader:
    """Finds the elements of a JSON array in a window that moves over the file."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size = path, file, size
        # Invalid bytes pass unchanged: they only spoil their own row, and decoding it reports them.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text = ""
        self._position = 0  # in the window, after the part that has been read
        self._line, self._counted = 1, 0  # the line of the window's character `counted`
        self._done = 0  # bytes of the file in or before the window
        self._at_end = False

    def rows(self) -> Iterator[Row]:
        """Yields every element; raises DataError if the file is no array, and at a row over LONGEST_ROW."""
        self._skip_whitespace()
        self._position += 1  # the opening bracket, which the caller has seen
        if self._skip_whitespace() == "]":
            self._position += 1
            self._expect_end()
            return
        while True:
            self._line, self._counted = self._line_of(self._position), self._position
            line, end = self._line, self._end_of_element()  # this may move the window, and the position with it
            value = self._text[self._position : end].encode("utf-8", "surrogateescape")
            self._position = end
            yield Row(line, value, self._done / self._size)
            separator = self._skip_whitespace()
            if separator not in (",", "]"):
                found = repr(separator) if separator else "its end"
                self._refuse(f"',' or the final ']' is expected, {found} found")
            self._position += 1
            if separator == "]":
                self._expect_end()
                return
            self._skip_whitespace()

    def _end_of_element(self) -> int:
        """End of the element that begins at the position, in the window, which grows until it holds the element."""
        while True:
            # Reason and position only: keeping the exception would keep the window in memory.
            reason, at = "its end is not found", self._position
            try:
                _, end = _SCANNER.raw_decode(self._text, self._position)
                following = self._text[end : end + 1]
                if self._at_end or (following and following not in _IN_NUMBERS):
                    return end
            except json.JSONDecodeError as error:
                reason, at = error.msg, error.pos
            except RecursionError as error:
                self._refuse(_reason(error))
            length = len(self._text) - self._position
            if self._at_end or length > LONGEST_ROW:
                limit = f"; a row has at most {LONGEST_ROW} bytes" if length > LONGEST_ROW else ""
                ends = self._at_end and (reason.startswith("Unterminated") or at >= len(self._text.rstrip()))
                cut = "; the file ends inside this row and may be truncated" if ends else ""
                self._refuse(reason + limit + cut, at)
            self._grow(max(length, _CHUNK))

    def _grow(self, size: int) -> None:
        """Drops what has been read from the window and adds `size` bytes of the file."""
        self._line, self._counted = self._line_of(self._position), 0
        data = self._file.read(size)
        self._at_end = len(data) < size
        text = self._utf8.decode(data.removeprefix(BOM) if self._done == 0 else data, final=self._at_end)
        self._done += len(data)
        self._text, self._position = self._text[self._position :] + text, 0

    def _skip_whitespace(self) -> str:
        """Moves to the next character that is no whitespace and returns it; "" at the end of the file."""
        while True:
            match = _WHITESPACE.match(self._text, self._position)
            self._position = match.end() if match else self._position
            if self._position < len(self._text) or self._at_end:
                return self._text[self._position : self._position + 1]
            self._grow(_CHUNK)

    def _expect_end(self) -> None:
        if self._skip_whitespace():
            self._refuse("',' or the final ']' is expected, more text after the array found")

    def _line_of(self, position: int) -> int:
        return self._line + self._text.count("\n", self._counted, position)

    def _refuse(self, reason: str, at: int | None = None) -> NoReturn:
        line = self._line_of(self._position if at is None else at)
        raise DataError(f"{self._path}:{line}: not valid JSON: {reason}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(items)
    if len(row) < len(items):
        names = [name for name, _ in items]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} appears more than once in an object")
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value; write null or leave the column out")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
# Finds the end of a value, and accepts faults for which the decoder has a better message.
_SCANNER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)
