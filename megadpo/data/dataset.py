"""Readers of preference files: JSON and JSON Lines in four layouts, every error at FILE:LINE.

What is accepted: UTF-8 with or without a byte order mark, LF or CRLF, blank lines between JSON Lines, equal chosen and
rejected responses, further columns (named in the log). Everything else that is not the layout is a DataError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from megadpo.errors import ConfigError, DataError
from megadpo.rank_logging import get_logger

logger = get_logger(__name__)

Message = dict[str, str]
T = TypeVar("T")

TRL_STANDARD = "TRL standard"
TRL_CONVERSATIONAL = "TRL conversational"
ROLL = "ROLL instruction"
SHAREGPT = "ShareGPT"

# Columns that change what the model sees in other trainers; where they are not read, the log says so as a warning.
_CONTEXT_COLUMNS = {"conversations", "history", "images", "input", "instruction", "messages", "system", "tools"}
_CONTEXT_COLUMNS |= {"audios", "chat_template_kwargs", "image", "prompt", "videos"}

_WHITESPACE = re.compile(r"[ \t\r\n]*")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class RawPair:
    """One preference as text: all three fields are strings (plain text), or all three are lists of messages."""

    index: int
    """0-based row in the concatenation of the sources"""
    where: str
    """FILE:LINE: the line in JSON Lines, the line where the object starts in a JSON array"""
    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]


@dataclass(frozen=True, slots=True)
class SourceFile:
    """What was found in one file."""

    path: str
    layout: str
    pairs: int
    ignored_columns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PairSource:
    """The pairs of all files in order, and what was found in each file."""

    pairs: list[RawPair]
    files: tuple[SourceFile, ...]


def read_pairs(
    paths: str | Path | Sequence[str | Path],
    *,
    prompt_key: str = "prompt",
    chosen_key: str = "chosen",
    rejected_key: str = "rejected",
) -> PairSource:
    """Reads the concatenation of `paths` (.json, .jsonl) and logs layout, count and ignored columns of each file.

    Layouts, by their columns: TRL standard (three strings), TRL conversational (three lists of role/content messages),
    ROLL (`instruction` [+ `input`] and two response strings), ShareGPT (`conversations` of from/value messages and two
    from/value responses). `prompt_key` wins where a file has several prompt columns. The last two become conversations.
    Raises DataError at FILE:LINE of the first row that cannot be used.
    """
    keys = _Keys(prompt_key, chosen_key, rejected_key)
    if len({prompt_key, chosen_key, rejected_key}) < 3:
        raise ConfigError(
            f"data.prompt_key={prompt_key!r}, data.chosen_key={chosen_key!r}, data.rejected_key={rejected_key!r}: "
            "three different columns are required"
        )
    pairs: list[RawPair] = []
    files: list[SourceFile] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        file, file_pairs = _read_file(Path(path), keys, first_index=len(pairs))
        files.append(file)
        pairs.extend(file_pairs)
        _log_file(file, file_pairs)
    if not files:
        raise DataError("no data file is given; name at least one in data.train_path")
    return PairSource(pairs, tuple(files))


def split_validation(pairs: Sequence[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """Splits into (train, validation), round(fraction · n) pairs but at least one on each side, in file order.

    The choice is a function of (len(pairs), fraction, seed) alone.
    """
    if not 0.0 < fraction < 1.0:
        raise ConfigError(f"data.validation_fraction={fraction}: a split takes a share between 0 and 1, both excluded")
    n = len(pairs)
    if n < 2:
        raise DataError(f"data.validation_fraction={fraction} needs at least 2 pairs, the data holds {n}")
    n_validation = min(max(round(fraction * n), 1), n - 1)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(n)
    held_out = set(order[:n_validation].tolist())
    train = [pair for i, pair in enumerate(pairs) if i not in held_out]
    return train, [pairs[i] for i in sorted(held_out)]


# -------------------------------------------------------------------------------------------------------------- files
@dataclass(frozen=True, slots=True)
class _Keys:
    prompt: str
    chosen: str
    rejected: str


class _RowProblem(Exception):
    """Why a row cannot be used, before FILE:LINE is put in front of it."""


def _read_file(path: Path, keys: _Keys, *, first_index: int) -> tuple[SourceFile, list[RawPair]]:
    layout: str | None = None
    ignored: dict[str, None] = {}
    pairs: list[RawPair] = []
    for line, row in _rows(path):
        where = f"{path}:{line}"
        try:
            if not isinstance(row, dict):
                raise _RowProblem(f"a pair is a JSON object, this is {_kind(row)}")
            layout = _same_layout(row, keys, layout)
            prompt, chosen, rejected = _convert(row, keys, layout)
        except _RowProblem as problem:
            raise DataError(f"{where}: {problem}") from None
        read = _required(keys, layout) | ({"input"} if layout == ROLL else set())
        ignored.update(dict.fromkeys(column for column in row if column not in read))
        pairs.append(RawPair(first_index + len(pairs), where, prompt, chosen, rejected))
    if layout is None:
        raise DataError(f"{path}:1: the file holds no pairs")
    return SourceFile(str(path), layout, len(pairs), tuple(ignored)), pairs


def _log_file(file: SourceFile, pairs: Sequence[RawPair]) -> None:
    logger.info("%s: %d pairs, layout %s", file.path, file.pairs, file.layout)
    if file.ignored_columns:
        logger.info("%s: columns ignored: %s", file.path, ", ".join(file.ignored_columns))
    context = sorted(_CONTEXT_COLUMNS.intersection(file.ignored_columns))
    if context:
        logger.warning("%s: not part of the prompt although the name suggests it: %s", file.path, ", ".join(context))
    equal = sum(pair.chosen == pair.rejected for pair in pairs)
    if equal:
        logger.warning("%s: chosen and rejected are equal in %d pairs; they are kept", file.path, equal)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields (line, value) of every row; the suffix and, in .json, the first character tell the format."""
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(f"{path}: the suffix {path.suffix!r} is not known; preference files are .json or .jsonl")
    text = _read_text(path)
    if not text.strip():
        raise DataError(f"{path}:1: the file is empty")
    if path.suffix == ".json" and text.lstrip().startswith("["):
        return _array_rows(path, text)
    return _line_rows(path, text)


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise DataError(f"{path}:{line}: invalid UTF-8 (byte 0x{byte:02x}); save the file as UTF-8") from None


def _line_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, _DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            cut = "; the file ends here without a newline and may be truncated" if number == len(lines) else ""
            shape = "" if path.suffix == ".jsonl" else " (a .json file is an array, or one object on each line)"
            raise DataError(f"{path}:{number}: not valid JSON: {_reason(error)}{shape}{cut}") from None


def _array_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    position = _skip(text, text.index("[") + 1)
    line, counted = 1, 0
    if text[position : position + 1] == "]":
        return
    while True:
        line += text.count("\n", counted, position)
        counted = position
        try:
            row, position = _DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: not valid JSON: {_reason(error)}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: not valid JSON: {_reason(error)}") from None
        yield line, row
        position = _skip(text, position)
        separator = text[position : position + 1]
        position = _skip(text, position + 1)
        if separator == "]" and position >= len(text):
            return
        if separator != ",":
            line += text.count("\n", counted, position)
            found = "more text after the array" if separator == "]" else repr(separator) if separator else "its end"
            raise DataError(f"{path}:{line}: not valid JSON: ',' or the final ']' is expected, {found} found")


def _skip(text: str, position: int) -> int:
    match = _WHITESPACE.match(text, position)
    return match.end() if match else position


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


# ------------------------------------------------------------------------------------------------------------ layouts
def _kind(value: object) -> str:
    names = {str: "a string", list: "a list", dict: "an object", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _required(keys: _Keys, layout: str) -> set[str]:
    prompt = {ROLL: "instruction", SHAREGPT: "conversations"}.get(layout, keys.prompt)
    return {prompt, keys.chosen, keys.rejected}


def _recognise(row: Mapping[str, Any], keys: _Keys) -> str | None:
    """The layout that the row's columns and their types say, or None."""
    if keys.prompt in row:
        types = {type(row.get(key)) for key in (keys.prompt, keys.chosen, keys.rejected)}
        return TRL_STANDARD if types == {str} else TRL_CONVERSATIONAL if types == {list} else None
    responses = (type(row.get(keys.chosen)), type(row.get(keys.rejected)))
    if isinstance(row.get("conversations"), list) and responses == (dict, dict):
        return SHAREGPT
    if isinstance(row.get("instruction"), str) and responses == (str, str):
        return ROLL
    return None


def _same_layout(row: Mapping[str, Any], keys: _Keys, layout: str | None) -> str:
    """The row's layout; raises _RowProblem where there is none, or another than `layout`, the file's."""
    found = _recognise(row, keys)
    if found is not None and layout in (None, found):
        return found
    columns = ", ".join(f"{name} ({_kind(value)})" for name, value in row.items()) or "none"
    if found is not None:
        raise _RowProblem(f"layout {found} in a file that began as {layout}; one file holds one layout: split it")
    if layout is not None:
        missing = ", ".join(repr(key) for key in sorted(_required(keys, layout) - row.keys()))
        fault = f"the row lacks {missing}" if missing else "a column has another type than in the rows before"
        raise _RowProblem(f"{fault}; the file's layout is {layout}, the row's columns are {columns}")
    raise _RowProblem(
        f"no known layout; columns found: {columns}. Layouts: {TRL_STANDARD} ({keys.prompt}, {keys.chosen}, "
        f"{keys.rejected}: strings); {TRL_CONVERSATIONAL} (the same three: lists of role/content messages); "
        f"{ROLL} (instruction, {keys.chosen}, {keys.rejected}: strings, input: optional); {SHAREGPT} (conversations: "
        f"list of from/value messages, {keys.chosen} and {keys.rejected}: one such message each). "
        "Other column names go into data.prompt_key, data.chosen_key, data.rejected_key"
    )


@dataclass(frozen=True, slots=True)
class _Dialect:
    """How a layout spells a message: the two keys, and the roles with what they become."""

    role_key: str
    text_key: str
    roles: Mapping[str, str]


_OPENAI = _Dialect("role", "content", {r: r for r in ("system", "developer", "user", "assistant", "tool")})
_SHAREGPT = _Dialect("from", "value", {"system": "system", "human": "user", "gpt": "assistant"})


def _convert(
    row: Mapping[str, Any], keys: _Keys, layout: str
) -> tuple[str, str, str] | tuple[list[Message], list[Message], list[Message]]:
    """The row's (prompt, chosen, rejected) in the layout it was recognised as; raises _RowProblem."""
    chosen, rejected = row[keys.chosen], row[keys.rejected]
    if layout == TRL_STANDARD:
        return _text(row[keys.prompt], keys.prompt), _text(chosen, keys.chosen), _text(rejected, keys.rejected)
    if layout == TRL_CONVERSATIONAL:
        prompt = _prompt_messages(row[keys.prompt], keys.prompt, _OPENAI)
        return prompt, _responses(chosen, keys.chosen, _OPENAI), _responses(rejected, keys.rejected, _OPENAI)
    if layout == SHAREGPT:
        prompt = _prompt_messages(row["conversations"], "conversations", _SHAREGPT)
        return prompt, _responses([chosen], keys.chosen, _SHAREGPT), _responses([rejected], keys.rejected, _SHAREGPT)
    instruction = _text(row["instruction"], "instruction")
    context = row.get("input")
    if context not in (None, ""):
        instruction = f"{instruction}\n{_text(context, 'input')}"
    return (
        [{"role": "user", "content": instruction}],
        [{"role": "assistant", "content": _text(chosen, keys.chosen)}],
        [{"role": "assistant", "content": _text(rejected, keys.rejected)}],
    )


def _text(value: object, name: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise _RowProblem(f"{name} is {_kind(value)}, a string is required")
    if not value and not may_be_empty:
        raise _RowProblem(f"{name} is empty")
    if "\0" in value:
        raise _RowProblem(f"{name} holds a NUL character (U+0000); remove it")
    surrogate = _SURROGATE.search(value)
    if surrogate:
        raise _RowProblem(f"{name} holds half a surrogate pair (U+{ord(surrogate[0]):04X}), which is not a character")
    return value


def _message(value: object, name: str, dialect: _Dialect, *, may_be_empty: bool) -> Message:
    if not isinstance(value, dict):
        raise _RowProblem(f"{name} is {_kind(value)}, not an object of {dialect.role_key!r}, {dialect.text_key!r}")
    for key in (dialect.role_key, dialect.text_key):
        if key not in value:
            raise _RowProblem(f"{name} lacks {key!r}; its keys are {', '.join(map(repr, value)) or 'none'}")
    extra = [key for key in value if key not in (dialect.role_key, dialect.text_key) and value[key] is not None]
    if extra:
        raise _RowProblem(f"{name} has keys that are not read: {', '.join(map(repr, extra))}; remove them or set null")
    role = _text(value[dialect.role_key], f"{name}.{dialect.role_key}")
    if role not in dialect.roles:
        raise _RowProblem(f"{name}.{dialect.role_key} is {role!r}; it is one of {', '.join(dialect.roles)}")
    content = _text(value[dialect.text_key], f"{name}.{dialect.text_key}", may_be_empty=may_be_empty)
    return {"role": dialect.roles[role], "content": content}


def _prompt_messages(value: Sequence[Any], name: str, dialect: _Dialect) -> list[Message]:
    """The messages before the response; only the last one, a user's or a tool's, must have text."""
    if not value:
        raise _RowProblem(f"{name} is empty, at least one message is required")
    last = len(value) - 1
    messages = [_message(item, f"{name}[{i}]", dialect, may_be_empty=i < last) for i, item in enumerate(value)]
    if messages[-1]["role"] not in ("user", "tool"):
        role = value[-1][dialect.role_key]
        raise _RowProblem(f"{name} ends with a message of {role!r}; the response follows a user or tool message")
    return messages


def _responses(value: Sequence[Any], name: str, dialect: _Dialect) -> list[Message]:
    if not value:
        raise _RowProblem(f"{name} is empty, one assistant message is required")
    messages = [_message(item, f"{name}[{i}]", dialect, may_be_empty=False) for i, item in enumerate(value)]
    for message, item in zip(messages, value, strict=True):
        if message["role"] != "assistant":
            raise _RowProblem(f"{name} holds a message of {item[dialect.role_key]!r}; responses are the assistant's")
    return messages
