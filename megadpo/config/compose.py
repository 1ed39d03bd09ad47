"""Composes the typed `Config` from Hydra's YAML files and `key=value` overrides, and converts it to and from YAML.

The only library file that names hydra or omegaconf. Hydra finds and merges the files of conf/; overrides of single keys
are applied here and checked against the schema, so that one ConfigError reports all mistakes instead of the first.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from datetime import datetime
from enum import Enum
from functools import cache
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megadpo.config.choices import RecomputeGranularity, RecomputeMethod, RecomputeModule, ReferenceMode
from megadpo.config.schema import Config, ModelConfig, show
from megadpo.errors import ConfigError
from megadpo.loss.table import NOT_OFFERED

_MISSING_IN_YAML = "???"
# Maximum nesting of a value on the command line: OmegaConf recurses through each level many times.
_DEEPEST = 16


def compose_config(
    overrides: Sequence[str],
    *,
    config_dir: Path | None = None,
    check: Callable[[Config], None] = lambda config: None,
    dispensable: Mapping[str, Any] = MappingProxyType({}),
) -> Config:
    """Composes the configuration from conf/config.yaml, the chosen group files and the overrides, and checks it.

    `overrides` are words of the command line: `+GROUP=FILE` (or `GROUP=FILE`) picks conf/GROUP/FILE.yaml, `key=value`
    sets a key; the last value of a key wins. `config_dir` defaults to conf/ beside the package. `check` raises
    ConfigError for violations of rules beyond types. `dispensable` holds values, by dotted names, for required keys
    that may be missing in this call. Raises one ConfigError with every unknown key, wrong type, missing key, unknown
    file, word that is not an override, and violation that `check` finds.
    """
    conf = (config_dir or Path(__file__).parents[2] / "conf").resolve()
    if not (conf / "config.yaml").is_file():
        raise ConfigError(f"{conf}: no config.yaml there; run from a clone, or give the conf/ directory of one")
    parsed = _read_overrides(overrides, conf)
    tree = _merge(parsed, conf)
    for key, value in dispensable.items():
        group, _, name = key.partition(".")
        tree.setdefault(group, {}).setdefault(name, value)

    def missing(key: str) -> str:
        if key == "model.name":
            if "model" in parsed.refused:
                return ""  # the problem of the file already says it
            return (
                f"no model named: add +model=NAME, one of {', '.join(_options(conf, 'model'))} "
                "(+model=hf model.hf_path=DIR serves any supported Hugging Face directory)"
            )
        group = key.partition(".")[0]
        because = f" with +{group}={parsed.groups[group]}" if group in parsed.groups else ""
        return f"{key} is required{because}: add {key}=VALUE"

    return _to_config(tree, parsed.problems, missing, check)


def config_from_yaml(text: str) -> Config:
    """Reads a configuration that `config_to_yaml` has written. Raises one ConfigError with all problems."""
    try:
        tree = OmegaConf.to_container(OmegaConf.create(text))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"configuration file: not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"configuration file: must be a mapping of groups, got {show(tree)}")
    return _to_config(
        {str(key): value for key, value in tree.items()},
        [],
        lambda key: f"{key} is required: it is missing in the file",
        lambda config: None,
    )


def config_to_dict(config: Config) -> dict[str, Any]:
    """Converts a configuration to plain dicts, lists, texts and numbers, in the schema's order."""
    plain = _plain(config)
    assert isinstance(plain, dict)
    return plain


def config_to_yaml(config: Config) -> str:
    """Converts a configuration to YAML with all keys; `config_from_yaml` reads the same configuration back."""
    return OmegaConf.to_yaml(OmegaConf.create(config_to_dict(config)))


def resolve_defaults(config: Config, now: datetime) -> Config:
    """Returns a copy with the defaults filled in that depend on other keys or on the clock (null in the schema).

    `now` must be the same on all ranks: rank 0's clock determines the name of the run directory.
    """
    run_dir = config.train.run_dir or f"outputs/{now:%Y-%m-%d_%H-%M-%S}-{config.model.name}"
    sequence_parallel = config.parallel.uses_sequence_parallelism()
    data = replace(
        config.data,
        cache_dir=config.data.cache_dir or f"{run_dir}/tokens",
        template_date=config.data.template_date or f"{now:%Y-%m-%d}",
    )
    reference = config.reference
    if reference.mode == ReferenceMode.cached:
        reference = replace(reference, cache_dir=reference.cache_dir or f"{run_dir}/reference")
    return replace(
        config,
        data=data,
        reference=reference,
        model=_resolve_recompute(config.model),
        train=replace(config.train, run_dir=run_dir),
        parallel=replace(config.parallel, sequence_parallel=sequence_parallel),
    )


def _resolve_recompute(model: ModelConfig) -> ModelConfig:
    if model.recompute_granularity == RecomputeGranularity.full:
        method = model.recompute_method or RecomputeMethod.uniform
        return replace(model, recompute_method=method, recompute_num_layers=model.recompute_num_layers or 1)
    if model.recompute_granularity == RecomputeGranularity.selective:
        return replace(model, recompute_modules=model.recompute_modules or [RecomputeModule.core_attn])
    return model


# Overrides and files


@dataclass(kw_only=True, slots=True)
class _Overrides:
    """The parsed command line: chosen group files, groups whose file does not exist, values of keys, problems."""

    groups: dict[str, str] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    values: list[tuple[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def _read_overrides(overrides: Sequence[str], conf: Path) -> _Overrides:
    result = _Overrides()
    parser = OverridesParser.create()
    for text in overrides:
        if text.startswith("-"):
            result.problems.append(f"{text}: options are not known here: set keys with key=value")
            continue
        try:
            override = parser.parse_override(text)
        except (
            HydraException,
            ValueError,
            RecursionError,
        ):  # Python's errors for too many digits or brackets
            result.problems.append(f"{text}: must be key=value or +group=file; quote special characters: key='\"a,b\"'")
            continue
        if _depth(override.value()) > _DEEPEST:
            result.problems.append(
                f"{override.key_or_group}=...: nested too deeply: no key takes more than {_DEEPEST} levels"
            )
            continue
        _sort_override(text, override, conf, result)
    return result


def _depth(value: Any) -> int:
    """Nesting of lists and mappings, counted up to one more than any key allows."""
    level, found = [value], 0
    while level and found <= _DEEPEST:
        inner = [item for item in level if isinstance(item, (list, Mapping))]
        level = [part for item in inner for part in (item.values() if isinstance(item, Mapping) else item)]
        found += bool(inner)
    return found


def _sort_override(text: str, override: Override, conf: Path, result: _Overrides) -> None:
    key = override.key_or_group
    if override.is_delete():
        result.problems.append(f"{text}: keys cannot be deleted: set the value you want, {key}=VALUE")
    elif override.is_sweep_override():
        result.problems.append(f"{text}: one run has one value: give one, or a list as {key}=[a,b]")
    elif override.package is not None or "/" in key:
        result.problems.append(f"{text}: groups have no packages or subgroups: write +group=file or key=value")
    elif (conf / key).is_dir() and isinstance(override.value(), str):
        _select_file(key, str(override.value()), conf, result)
    else:
        result.values.append((key, override.value()))


def _select_file(group: str, option: str, conf: Path, result: _Overrides) -> None:
    options = _options(conf, group)
    if option not in options:
        result.refused.add(group)
        close = difflib.get_close_matches(option, options, n=1)
        hint = f"did you mean {group}={close[0]}? " if close else ""
        result.problems.append(f"{group}={option}: no such {group}: {hint}one of {', '.join(options)}")
    elif group in result.groups:
        result.problems.append(f"{group}={option}: {group}={result.groups[group]} is given too: choose one of them")
    else:
        result.groups[group] = option


def _options(conf: Path, group: str) -> list[str]:
    return sorted(path.stem for path in (conf / group).glob("*.yaml"))


def _merge(parsed: _Overrides, conf: Path) -> dict[str, Any]:
    """Merges config.yaml, the chosen files (an experiment last, so that it wins) and the values to a plain tree."""
    selections = sorted(parsed.groups.items(), key=lambda item: item[0] == "experiment")
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf)):
            composed = compose("config", overrides=[f"+{group}={option}" for group, option in selections])
        OmegaConf.set_struct(composed, False)
        for key, value in parsed.values:
            _set(composed, key, value, parsed.problems)
        tree = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        where = error.full_key or str(conf)
        raise ConfigError([*parsed.problems, f"{where}: {str(error).splitlines()[0]}"]) from error
    except (HydraException, YAMLError) as error:
        raise ConfigError([*parsed.problems, f"{conf}: {error}"]) from error
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _set(composed: DictConfig, key: str, value: Any, problems: list[str]) -> None:
    if not isinstance(value, Mapping) and any(known.startswith(f"{key}.") for known in known_keys()):
        problems.append(_not_a_group(key, value))
        return
    try:
        OmegaConf.update(composed, key, value, merge=True, force_add=True)
    except (OmegaConfBaseException, TypeError, AttributeError) as error:
        problems.append(f"{key}={show(value)}: cannot be set: {str(error).splitlines()[0]}")


# Plain tree to dataclasses


@dataclass(kw_only=True, slots=True)
class _Findings:
    """The problems so far, and the keys that have a stand-in because they are missing or of a wrong type."""

    problems: list[str]
    stand_ins: list[str] = field(default_factory=list)


def _to_config(
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
                problems.append(_not_a_group(key, subtree))
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


def _not_a_group(key: str, value: Any) -> str:
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
