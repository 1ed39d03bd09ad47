#!/usr/bin/env python3
"""Scores preference pairs with a model, at any layout:

    torchrun --nproc-per-node N tools/score.py +model=NAME data.train_path=FILE output=OUT.jsonl key=value ...

Writes one object a pair, in the data's order: index (0-based row of the data), chosen_logp and rejected_logp (nats,
summed over the response), chosen_tokens and rejected_tokens (how many were scored); and OUT.summary.json. A scoring
that was stopped goes on with the same command. Keys are those of training (megadpo/config/schema.py), as far as they
have a meaning here; train.global_batch_size is the number of pairs between two writes.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from megadpo.command_line import check, run_tool
from megadpo.config.compose import compose_config
from megadpo.config.schema import Config
from megadpo.errors import ConfigError

CONFIG_DIR = Path(__file__).resolve().parents[1] / "conf"
_TRAINING_ONLY = (
    "max_steps",
    "epochs",
    "seed",
    "shuffle",
    "log_every",
    "eval_every",
    "save_every",
    "run_dir",
    "dry_run",
    "resume",
)
_WITHOUT_EFFECT = (
    *("loss", "optimizer", "reference", "checkpoint", "trackers", "cluster", "plan"),
    *("data.validation_path", "data.validation_fraction"),
    *(f"train.{name}" for name in _TRAINING_ONLY),
)


def main(arguments: list[str]) -> int:
    """Runs the scoring that the command line describes; the exit status (0 done, 2 refused or stopped by a check)."""
    if any(word in ("-h", "--help") for word in arguments):
        print(__doc__)
        return 0

    def score(logger: logging.Logger) -> int:
        config, output = read_words(arguments)
        from megadpo.scoring import run_scoring  # Megatron takes seconds to import; mistakes above cost none

        run_scoring(config, output)
        return 0

    return run_tool("score", score)


def read_words(arguments: list[str]) -> tuple[Config, Path]:
    """The configuration, and the file to write. Raises one ConfigError with all mistakes, inert keys included."""
    outputs = [word for word in arguments if _key(word) == "output"]
    inert = [word for word in arguments if _has_no_effect(_key(word))]
    problems = [f"{word}: has no effect when scoring: drop it" for word in inert]
    paths = [word.partition("=")[2] for word in outputs]
    if len(paths) != 1 or not paths[0]:
        said = "is required" if not paths else f"must name one file, got {', '.join(outputs)}"
        problems.append(f"output {said}: add output=OUT.jsonl, the file that the scores are written to")
    try:
        config = compose_config(
            [word for word in arguments if word not in (*outputs, *inert)], config_dir=CONFIG_DIR, check=check
        )
    except ConfigError as error:
        raise ConfigError([*problems, *error.violations]) from error
    if problems:
        raise ConfigError(problems)
    return config, Path(paths[0])


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")


def _has_no_effect(key: str) -> bool:
    return any(key == inert or key.startswith(f"{inert}.") for inert in _WITHOUT_EFFECT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
