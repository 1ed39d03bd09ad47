#!/usr/bin/env python3
"""Trains a policy with DPO: torchrun --nproc-per-node N tools/train.py +model=NAME key=value ...

Every key is described in megadpo/config/schema.py; docs/ and README.md show whole commands.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megadpo.config.compose import compose_config
from megadpo.config.schema import Config
from megadpo.config.validation import ModelShape, validate
from megadpo.errors import MegaDPOError
from megadpo.models.hf_config import read_architecture
from megadpo.rank_logging import configure_logging, get_logger, global_rank

CONFIG_DIR = Path(__file__).resolve().parents[1] / "conf"


def main(arguments: list[str]) -> int:
    """Runs the training that the command line describes; the exit status (0 done, 2 refused or stopped by a check)."""
    if any(word in ("-h", "--help") for word in arguments):
        print(__doc__)
        return 0
    configure_logging()
    logger = get_logger("megadpo.train")
    try:
        config = compose_config(arguments, config_dir=CONFIG_DIR)
        validate(config, world_size=int(os.environ.get("WORLD_SIZE", "1")), shape=_model_shape(config))
        from megadpo.run import run_training  # Megatron takes seconds to import; mistakes above cost none

        run_dir = run_training(config)
    except MegaDPOError as error:
        if global_rank() == 0:
            logger.error("%s", error)
        return 2
    logger.info("done: %s", run_dir)
    return 0


def _model_shape(config: Config) -> ModelShape | None:
    """Sizes of the model that limit the layout; None where there is no model to read, which validation reports."""
    if config.model.hf_path is None or not (Path(config.model.hf_path) / "config.json").is_file():
        return None
    arch = read_architecture(config.model.hf_path)
    return ModelShape(
        num_layers=arch.num_layers,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        ffn_hidden_size=arch.ffn_hidden_size,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
