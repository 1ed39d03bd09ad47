"""Checks before anything is built, and exit statuses: shared by the tools that read `+model=NAME key=value` words."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from megadpo.config.schema import Config
from megadpo.config.validation import ModelShape, validate
from megadpo.errors import CheckpointError, ConfigError, ConversionError, MegaDPOError, Stopped
from megadpo.runtime.rank_logging import (
    configure_logging,
    get_logger,
    global_rank,
    launched_restarts,
    launched_world_size,
    silence_libraries,
)
from megadpo.setup.model_source import model_source, resolve_model

if TYPE_CHECKING:
    from megadpo.models.hf_config import Architecture

REFUSED = 2
# EX_TEMPFAIL of sysexits.h: come again.
STOPPED = 75
_SECONDS_FOR_RANK_0 = 5.0


def run_tool(name: str, action: Callable[[logging.Logger], int]) -> int:
    """The exit status of `action`, given the tool's logger; REFUSED for a MegaDPOError, which is logged once.

    STOPPED for a run that was told to stop.
    """
    configure_logging()
    silence_libraries()
    logger = get_logger(f"megadpo.{name}")
    try:
        return action(logger)
    except Stopped as stopped:
        logger.warning("%s", stopped)
        return STOPPED
    except MegaDPOError as error:
        if global_rank() != 0:
            # Rank 0 says the same: leaving before it would have the launcher kill it in mid-sentence. Whoever is still
            # here afterwards failed alone and speaks.
            time.sleep(_SECONDS_FOR_RANK_0)
        logger.error("%s", error)
        return REFUSED


def check_plan(config: Config) -> None:
    """Raises one ConfigError with all reasons why the configuration can't be planned, on the ranks that it names."""
    model_ranks = max(1, config.parallel.tensor * config.parallel.pipeline)
    _check(config, world_size=config.cluster.gpus or model_ranks, planning=True)


def check(config: Config) -> None:
    """Raises one ConfigError with all reasons why the configuration can't run on this launch's ranks."""
    _check(config, world_size=launched_world_size(), planning=False)


def _check(config: Config, *, world_size: int, planning: bool) -> None:
    violations: list[str] = []
    try:
        shapes = _shapes(config, violations)
        validate(
            config,
            world_size=world_size,
            planning=planning,
            shape=shapes.get("model"),
            reference_shape=shapes.get("reference"),
        )
    except ConfigError as error:
        violations += error.violations
    except OSError as error:  # of a path too long, or in a directory that is closed to this user
        violations.append(
            f"{error.filename}: can't be looked up ({error.strerror}): check the path and its permissions"
        )
    if not planning:
        violations += _check_restarts(config)
    if violations:
        raise ConfigError(violations)


def _check_restarts(config: Config) -> list[str]:
    if launched_restarts() == 0 or config.train.resume == "auto":
        return []
    return [
        f"torchrun --max-restarts={launched_restarts()}, train.resume={config.train.resume}: a run that is started "
        "again must go on from its newest checkpoint: give train.resume=auto and train.run_dir=DIR"
    ]


def _shapes(config: Config, violations: list[str]) -> dict[str, ModelShape]:
    """Sizes of the model and of a reference of its own, as far as they are known; adds what is wrong to `violations`.

    A named model's are known without its weights; those that are given must be of its architecture.
    """
    from megadpo.models.hf_config import (  # transformers takes seconds to import
        differences,
        parse_architecture,
        read_architecture,
    )

    architectures: dict[str, Architecture] = {}
    if config.model.shape is not None:
        try:
            architectures["model"] = parse_architecture(config.model.shape, source="model.shape")
        except ConversionError as error:
            violations.append(str(error))
    named = architectures.get("model")
    for role, path in (("model", _model_dir(config, violations)), ("reference", config.reference.hf_path)):
        if path is not None and (Path(path) / "config.json").is_file():
            try:
                architectures[role] = read_architecture(path)
            except ConversionError as error:
                violations.append(str(error))
    if named is not None and (apart := differences(architectures["model"], named)):
        key = "model.hf_path" if config.model.checkpoint is None else "model.checkpoint"
        source = f"{key}={attrgetter(key)(config)}"
        violations.append(
            f"{source}: must be a {config.model.name} (model.shape), it differs: {'; '.join(apart)}: use +model=hf "
            f"{source}, which takes any supported model"
        )
    return {role: _sizes(arch) for role, arch in architectures.items()}


def _model_dir(config: Config, violations: list[str]) -> str | None:
    """Directory of the model's config.json; None where it is not known, adding to `violations` when it can't be had."""
    checkpoint = config.model.checkpoint
    if checkpoint is None or not Path(checkpoint).is_dir():
        return config.model.hf_path
    try:
        return str(model_source(resolve_model(config).model).hf_dir)
    except CheckpointError as error:
        violations.append(f"model.checkpoint={checkpoint}: {error}")
        return None


def _sizes(arch: Architecture) -> ModelShape:
    return ModelShape(
        num_layers=arch.num_layers,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        ffn_hidden_size=arch.ffn_hidden_size,
        vocab_size=arch.vocab_size,
    )
