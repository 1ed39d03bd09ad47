"""Preference rows, from data paths to prompts and responses.

`iter_rows` finds the rows of all sources and is fast; `parse_row` decodes and interprets one row, and is for workers.
UTF-8 with or without a byte order mark, LF or CRLF, blank lines between JSON Lines, equal responses and additional
columns (named in the log) are accepted. Any other deviation from the layout is a DataError that begins with FILE:LINE.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from megadpo.data.json_rows import Row, RowProblem, decode_row
from megadpo.data.layouts import CONTEXT_COLUMNS, Keys, convert, ignored_columns, recognise
from megadpo.data.messages import Message
from megadpo.data.sources import open_source
from megadpo.errors import ConfigError, DataError
from megadpo.runtime.rank_logging import get_logger

logger = get_logger(__name__)

# Several rows decide on the layout, so that one bad row at the start does not make all others look bad.
_ROWS_THAT_SHOW_THE_LAYOUT = 64
_MOST_TEXT_HELD = 4 * 2**20


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row of a source, undecoded if it is JSON; small and plain enough to be sent to a worker."""

    index: int
    """0-based row in the concatenation of the sources; rows that turn out to be bad count too"""
    file: int
    """number of the source"""
    line: int
    """first line in the source, from 1; in tables the number of the row"""
    where: str
    """FILE:LINE, for tables NAME:row N"""
    layout: str | None
    """the source's layout; None before a row has shown one"""
    value: Any
    """undecoded JSON (bytes), the value itself, or the RowProblem in its place"""
    progress: float
    """share of all sources that has been read, each source counting alike"""


@dataclass(frozen=True, slots=True)
class RawPair:
    """One preference as text: all three fields are strings (plain text), or all three are lists of messages."""

    index: int
    where: str
    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    tools: list[Any] | None = None
    """what the chat template gets as tools; with messages only"""
    template_kwargs: dict[str, Any] | None = None
    """further arguments of the chat template; with messages only"""


def iter_rows(paths: Sequence[str], keys: Keys) -> Iterator[RawRow]:
    """Streams the rows of the concatenated sources; logs number, layout and ignored columns of each source.

    The layout of a source is the one that most of its first rows have. Raises DataError for a source that is missing,
    empty, or broken such that the beginning of its next row can't be found.
    """
    if not paths:
        raise DataError("no data file is given; name at least one in data.train_path")
    index = 0
    for file, path in enumerate(paths):
        source, first = open_source(path), index
        rows = source.rows()
        head, broken = _first_rows(rows)
        layout, ignored = _most_common_layout(head, source.location, keys)
        for row in chain((head.popleft() for _ in range(len(head))), rows):
            where = f"{source.location}{row.line}"
            yield RawRow(index, file, row.line, where, layout, row.value, (file + row.progress) / len(paths))
            index += 1
        if broken is not None:
            raise broken
        if index == first:
            raise DataError(f"{source.location}1: there are no pairs; at least one is required")
        _log_source(path, index - first, layout, ignored)


def parse_row(row: RawRow, keys: Keys) -> RawPair:
    """Parses the pair of a row. Raises DataError that begins with FILE:LINE if it holds none."""
    try:
        said = convert(_decoded(row.value, row.where), keys, row.layout)
    except RowProblem as problem:
        raise DataError(f"{row.where}: {problem}") from None
    except RecursionError:  # tools or calls nested almost as deeply as JSON's decoder allows
        raise DataError(f"{row.where}: nested too deeply") from None
    return RawPair(row.index, row.where, said.prompt, said.chosen, said.rejected, said.tools, said.template_kwargs)


def validation_rows(n: int, fraction: float, seed: int) -> npt.NDArray[np.int64]:
    """Sorted numbers of the rows held out of `n`: round(fraction · n) of them, but at least one on each side.

    The choice depends on the arguments only.
    """
    if not 0.0 < fraction < 1.0:
        raise ConfigError(f"data.validation_fraction={fraction}: a split takes a share between 0 and 1, both excluded")
    if n < 2:
        raise DataError(
            f"data.validation_fraction={fraction}: needs at least 2 pairs, the data holds {n}: give more, or name a "
            "file in data.validation_path"
        )
    n_validation = min(max(round(fraction * n), 1), n - 1)
    return np.sort(np.random.Generator(np.random.PCG64(seed)).permutation(n)[:n_validation])


def _decoded(value: Any, where: str) -> Any:
    if isinstance(value, RowProblem):
        raise value
    if isinstance(value, bytes):
        return decode_row(value, is_json_suffix=where.rpartition(":")[0].endswith(".json"))
    return value


def _first_rows(rows: Iterator[Row]) -> tuple[deque[Row], DataError | None]:
    """Takes the first rows, as many as decide the layout; returns them and the error that ended them early, if any."""
    taken: deque[Row] = deque()
    size = 0
    try:
        for row in rows:
            taken.append(row)
            size += text_size(row.value)
            if len(taken) == _ROWS_THAT_SHOW_THE_LAYOUT or size >= _MOST_TEXT_HELD:
                break
    except DataError as error:
        return taken, error
    return taken, None


def text_size(value: Any) -> int:
    """Number of bytes or characters of text in a row's value, roughly its size in memory."""
    if isinstance(value, (bytes, str)):
        return len(value)
    if isinstance(value, dict):
        return sum(map(text_size, value.values()))
    return sum(map(text_size, value)) if isinstance(value, list) else 0


def _most_common_layout(rows: Iterable[Row], location: str, keys: Keys) -> tuple[str | None, list[str]]:
    """Returns the most common layout of the rows (the first of equally common ones), and columns that it ignores.

    The ignored columns are those of the first row with that layout. Bad rows are left out; they are reported when they
    are parsed. (None, []) if there are no others.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        try:
            value = _decoded(row.value, f"{location}{row.line}")
        except RowProblem:
            continue
        layout = recognise(value, keys) if isinstance(value, dict) else None
        if layout is not None:
            found.setdefault(layout, []).append(value)
    if not found:
        return None, []
    layout = max(found, key=lambda name: len(found[name]))
    return layout, ignored_columns(found[layout][0], keys, layout)


def _log_source(path: str, rows: int, layout: str | None, ignored: Sequence[str]) -> None:
    logger.info("%s: %d rows, layout %s", path, rows, layout or "not known")
    if ignored:
        logger.info("%s: columns ignored, going by its first row: %s", path, ", ".join(ignored))
    context = sorted(CONTEXT_COLUMNS.intersection(ignored))
    if context:
        logger.warning("%s: not part of the prompt although the name suggests it: %s", path, ", ".join(context))
