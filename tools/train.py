#!/usr/bin/env python3
"""Trains a policy with DPO: torchrun --nproc-per-node N tools/train.py +model=NAME key=value ...

Every key is described in megadpo/config/schema.py; docs/ and README.md show whole commands.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from megadpo.config.compose import compose_config
from megadpo.config.schema import Config
from megadpo.config.validation import ModelShape, validate
from megadpo.errors import ConfigError, ConversionError, MegaDPOError
from megadpo.rank_logging import configure_logging, get_logger, global_rank, launched_world_size, silence_libraries

_SECONDS_FOR_RANK_0 = 5.0
CONFIG_DIR = Path(__file__).resolve().parents[1] / "conf"


def main(arguments: list[str]) -> int:
    """Runs the training that the command line describes; the exit status (0 done, 2 refused or stopped by a check)."""
    if any(word in ("-h", "--help") for word in arguments):
        print(__doc__)
        return 0
    configure_logging()
    silence_libraries()
    logger = get_logger("megadpo.train")
    try:
        config = compose_config(arguments, config_dir=CONFIG_DIR, check=check)
        from megadpo.run import run_training  # Megatron takes seconds to import; mistakes above cost none

        run_dir = run_training(config)
    except MegaDPOError as error:
        if global_rank() != 0:
            # Rank 0 says the same: leaving before it would have the launcher kill it in mid-sentence. Whoever is still
            # here afterwards failed alone and speaks.
            time.sleep(_SECONDS_FOR_RANK_0)
        logger.error("%s", error)
        return 2
    logger.info("done: %s", run_dir)
    return 0


def check(config: Config) -> None:
    """Raises one ConfigError with all that keeps the configuration from running on this launch's ranks."""
    violations: list[str] = []
    shapes = {}
    for role, path in (("model", config.model.hf_path), ("reference", config.reference.hf_path)):
        if path is not None and (Path(path) / "config.json").is_file():
            try:
                shapes[role] = _shape(path)
            except ConversionError as error:
                violations.append(str(error))
    try:
        validate(
            config,
            world_size=launched_world_size(),
            shape=shapes.get("model"),
            reference_shape=shapes.get("reference"),
        )
    except ConfigError as error:
        violations += error.violations
    if violations:
        raise ConfigError(violations)


def _shape(path: str) -> ModelShape:
    """Sizes of the model in a Hugging Face directory; ConversionError where it is not supported."""
    from megadpo.models.hf_config import read_architecture  # transformers takes seconds to import

    arch = read_architecture(path)
    return ModelShape(
        num_layers=arch.num_layers,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        ffn_hidden_size=arch.ffn_hidden_size,
        vocab_size=arch.vocab_size,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
