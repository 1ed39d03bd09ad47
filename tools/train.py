#!/usr/bin/env python3
"""Trains a policy with DPO: torchrun --nproc-per-node N tools/train.py +model=NAME key=value ...

Every key is described in megadpo/config/schema.py; docs/ and README.md show whole commands.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone's package, whatever is installed

from megadpo.commands.command_line import check, run_tool
from megadpo.config.compose import compose_config

CONFIG_DIR = Path(__file__).resolve().parents[1] / "conf"


def main(arguments: list[str]) -> int:
    """Runs the training that the command line describes; returns the exit status.

    0 done, 2 refused or stopped by a check, 75 told to stop; a rank that has waited too long for others ends with 70.
    """
    if any(word in ("-h", "--help") for word in arguments):
        print(__doc__)
        return 0

    def train(logger: logging.Logger) -> int:
        config = compose_config(arguments, config_dir=CONFIG_DIR, check=check)
        # Megatron takes seconds to import; mistakes above cost none.
        if config.train.dry_run:
            from megadpo.commands.dry_run import run_dry

            run_dry(config)
            return 0
        from megadpo.commands.train import run_training

        logger.info("done: %s", run_training(config))
        return 0

    return run_tool("train", train)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
