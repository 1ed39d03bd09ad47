"""A plain tree of values to the typed `Config` and back, with every unknown key and wrong type in words."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from megadpo.config.schema import Config, show
from megadpo.errors import ConfigError
from megadpo.loss.table import NOT_OFFERED

_MISSING_IN_YAML = "???"


def config_to_dict(config: Config) -> dict[str, Any]:
    """Converts a configuration to plain dicts, lists, texts and numbers, in the schema's order."""
    plain = _plain(config)
    assert isinstance(plain, dict)
    return plain


@dataclass(kw_only=True, slots=True)
class _Findings:
    """The problems so far, and the keys that have a stand-in because they are missing or of a wrong type."""

    problems: list[str]
    stand_ins: list[str] = field(default_factory=list)


def to_config(
    tree: Mapping[str, Any],
    problems: Sequence[str],
    missing: Callable[[str], str],
    check: Callable[[Config], None],
) -> Config:
    """Converts a plain tree to a configuration; `missing` describes a missing key ("" if it is reported already).

    Rules are checked even if keys are wrong, with stand-ins for their values, so that all mistakes are reported at
    once; violations that mention a stand-in are left out, since they are not the user's.
    """
    found = _Findings(problems=list(problems))
    config = _build(Config, tree, "", found, missing)
    assert isinstance(config, Config)
    try:
        check(config)
    except ConfigError as error:
        found.problems += [text for text in error.violations if not any(f"{key}=" in text for key in found.stand_ins)]
    if found.problems or found.stand_ins:
        raise ConfigError(found.problems)
    return config


def _build(cls: type, tree: Mapping[str, Any], prefix: str, found: _Findings, missing: Callable[[str], str]) -> Any:
    """Builds an instance of the dataclass `cls` from plain values; adds problems to `found`."""
    hints = get_type_hints(cls)
    problems = found.problems
    values: dict[str, Any] = {}
    for name in (name for name in tree if name not in hints):  # names may be numbers: {1: 2}
        problems.extend(_unknown(f"{prefix}{name}", tree[name]))
    for item in fields(cls):
        key, hint = f"{prefix}{item.name}", hints[item.name]
        if isinstance(hint, type) and is_dataclass(hint):
            subtree = tree.get(item.name, {})
            if isinstance(subtree, Mapping):
                values[item.name] = _build(hint, subtree, f"{key}.", found, missing)
            else:
                problems.append(not_a_group(key, subtree))
                values[item.name] = _build(hint, {}, f"{key}.", _Findings(problems=[]), missing)
        elif tree.get(item.name, _MISSING_IN_YAML) == _MISSING_IN_YAML and (item.name in tree or _required(item)):
            found.stand_ins.append(key)
            values[item.name] = _stand_in(item, hint)
            if text := missing(key):
                problems.append(text)
        elif item.name in tree:
            try:
                values[item.name] = _convert(tree[item.name], hint)
            except ValueError:
                must_be = f"{key}={show(tree[item.name])}: must be {_describe(hint)}{_example(key, item)}"
                problems.append(must_be + _why_not_offered(key, tree[item.name]))
                found.stand_ins.append(key)
                values[item.name] = _stand_in(item, hint)
    return cls(**values)


def _stand_in(item: Field[Any], hint: Any) -> Any:
    """A value for a key whose value is missing or wrong: the default, or an empty one of its type."""
    if item.default is not MISSING:
        return item.default
    if item.default_factory is not MISSING:
        return item.default_factory()
    return [] if get_origin(hint) is list else ""


def not_a_group(key: str, value: Any) -> str:
    """The problem of a group that was given a value."""
    keys = [known for known in known_keys() if known.startswith(f"{key}.")]
    return f"{key}={show(value)}: {key} is a group of keys: set one of {', '.join(keys)}"


def _why_not_offered(key: str, value: Any) -> str:
    """A remark on losses of other trainers that are not offered here; "" if there are none."""
    if key != "loss.name":
        return ""
    names = [name for name in _convert(value, list[Any]) if isinstance(name, str) and name in NOT_OFFERED]
    return "".join(f"; {name} is not offered: {NOT_OFFERED[name]}" for name in names)


def _unknown(key: str, value: Any) -> list[str]:
    """Returns a line for each leaf under an unknown key, with the known key that was probably meant."""
    if isinstance(value, Mapping) and value:
        return [line for name, inner in value.items() for line in _unknown(f"{key}.{name}", inner)]
    known = known_keys()
    last = key.rpartition(".")[2]
    if last == "use_weighting":  # TRL's key
        return [f"{key}={show(value)}: unknown key; WPO is not offered: {NOT_OFFERED['wpo']}"]
    close = (
        [name for name in known if name.rpartition(".")[2] == last]
        or difflib.get_close_matches(key, known, n=1, cutoff=0.75)
        or [name for name in known if difflib.get_close_matches(last, [name.rpartition(".")[2]], cutoff=0.75)]
    )
    hint = f"did you mean {' or '.join(close)}?" if close else "the keys are listed in megadpo/config/schema.py"
    return [f"{key}={show(value)}: unknown key; {hint}"]


@cache
def known_keys() -> tuple[str, ...]:
    """Dotted names of all keys, in the schema's order."""

    def walk(cls: type, prefix: str) -> list[str]:
        hints = get_type_hints(cls)
        return [
            key
            for item in fields(cls)
            for key in (
                walk(hints[item.name], f"{prefix}{item.name}.")
                if is_dataclass(hints[item.name])
                else [f"{prefix}{item.name}"]
            )
        ]

    return tuple(walk(Config, ""))


def _required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _convert(value: Any, hint: Any) -> Any:
    """Converts `value` to the type `hint`; a bare value becomes a list of one. Raises ValueError if it does not fit."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        for option in inner:
            try:
                return _convert(value, option)
            except ValueError:
                continue
    elif origin is list:
        return [_convert(item, inner[0]) for item in (value if isinstance(value, list) else [value])]
    elif origin is tuple:
        if isinstance(value, (list, tuple)) and len(value) == len(inner):
            return tuple(_convert(item, part) for item, part in zip(value, inner, strict=True))
    elif origin is dict:
        if isinstance(value, Mapping):
            return {_convert(name, inner[0]): _convert(item, inner[1]) for name, item in value.items()}
    elif issubclass(hint, Enum):
        return hint(value)
    elif hint is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:  # too large for a float
            raise ValueError from None
    elif type(value) is hint and value != "":
        return value
    raise ValueError


def _describe(hint: Any) -> str:
    """Describes the type `hint` in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_describe(option) for option in inner)
    if origin is list:
        return f"{_describe(inner[0])}, or a list of that"
    if origin is tuple:
        return f"a list of {len(inner)}, each {_describe(inner[0])}"
    if origin is dict:
        return f"a mapping of names to {'values' if inner[1] is Any else _describe(inner[1])}"
    if issubclass(hint, Enum):
        return "one of " + ", ".join(str(member.value) for member in hint)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}
    return words[hint]


def _example(key: str, item: Field[Any]) -> str:
    default = item.default_factory() if item.default_factory is not MISSING else item.default
    return "" if default is MISSING or default is None else f", as in {key}={show(_plain(default))}"


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value
