"""Composes the typed `Config` from Hydra's YAML files and `key=value` overrides, and converts it to and from YAML.

The only library file that names hydra or omegaconf. Hydra finds and merges the files of conf/; overrides of single keys
are applied here and checked against the schema, so that one ConfigError reports all mistakes instead of the first.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megadpo.config.choices import RecomputeGranularity, RecomputeMethod, RecomputeModule, ReferenceMode
from megadpo.config.schema import Config, ModelConfig, show
from megadpo.config.typed import config_to_dict, known_keys, not_a_group, to_config
from megadpo.errors import ConfigError

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

    return to_config(tree, parsed.problems, missing, check)


def config_from_yaml(text: str) -> Config:
    """Reads a configuration that `config_to_yaml` has written. Raises one ConfigError with all problems."""
    try:
        tree = OmegaConf.to_container(OmegaConf.create(text))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"configuration file: not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"configuration file: must be a mapping of groups, got {show(tree)}")
    return to_config(
        {str(key): value for key, value in tree.items()},
        [],
        lambda key: f"{key} is required: it is missing in the file",
        lambda config: None,
    )


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
        problems.append(not_a_group(key, value))
        return
    try:
        OmegaConf.update(composed, key, value, merge=True, force_add=True)
    except (OmegaConfBaseException, TypeError, AttributeError) as error:
        problems.append(f"{key}={show(value)}: cannot be set: {str(error).splitlines()[0]}")
