#!/usr/bin/env python3
"""Scores preference pairs with a model, at any layout:

    torchrun --nproc-per-node N tools/score.py +model=NAME data.train_path=FILE output=OUT.jsonl key=value ...

Writes one object a pair, in the data's order: index (0-based row of the data), chosen_logp and rejected_logp (nats,
summed over the response), chosen_tokens and rejected_tokens (how many were scored). reference.hf_path=DIR scores the
pairs with a second model, after the first has left memory, and adds reference_chosen_logp, reference_rejected_logp and
reward_margin, loss.beta times what the chosen response has gained less what the rejected one has.

reference.cache_dir=DIR also keeps the log-probs, of the second model or else of the only one, for trainings whose
reference it is (reference.mode=cached).

OUT.summary.json has means and accuracies under the names of metrics.jsonl, over all pairs and by length:

    buckets=N           N buckets of about equally many pairs (4)
    buckets=[A,B,...]   buckets that begin at A, B, ... tokens
    bucket_by=response  by the scored tokens of both responses (the default), or
    bucket_by=stream    by the tokens that a pair takes in a microbatch

A scoring that was stopped goes on with the same command; a finished one is only summarised again. Keys are those of
training (megadpo/config/schema.py), as far as they have a meaning here; train.global_batch_size is the number of pairs
between two writes. More: docs/scoring.md.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone's package, whatever is installed

from megadpo.commands.command_line import check, run_tool
from megadpo.commands.score_summary import BY, Buckets
from megadpo.config.choices import ReferenceMode
from megadpo.config.compose import compose_config
from megadpo.config.schema import Config, LossConfig, PrecisionConfig, ReferenceConfig
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
    *("data.validation_path", "data.validation_fraction", "precision.fp8_check_every", "precision.fp8_check_pairs"),
    *(f"train.{name}" for name in _TRAINING_ONLY),
)
_CACHE = "reference.cache_dir"
_EXCEPT = ("reference.hf_path", _CACHE, "loss.beta")
_OWN = ("output", "buckets", "bucket_by")


def main(arguments: list[str]) -> int:
    """Runs the scoring of the command line; returns the exit status (0 done, 2 refused or stopped by a check)."""
    if any(word in ("-h", "--help") for word in arguments):
        print(__doc__)
        return 0

    def score(logger: logging.Logger) -> int:
        config, output, buckets = read_words(arguments)
        from megadpo.commands.score import run_scoring  # Megatron takes seconds to import; mistakes above cost none

        run_scoring(config, output, buckets)
        return 0

    return run_tool("score", score)


def read_words(arguments: list[str]) -> tuple[Config, Path, Buckets]:
    """Parses the configuration, the output file, and the buckets by length.

    Raises one ConfigError with all mistakes, inert keys included.
    """
    own = [word for word in arguments if _key(word) in _OWN]
    inert = [word for word in arguments if _has_no_effect(_key(word))]
    problems = [f"{word}: has no effect when scoring: drop it" for word in inert]
    outputs = [word for word in own if _key(word) == "output"]
    paths = [word.partition("=")[2] for word in outputs]
    if len(paths) != 1 or not paths[0]:
        said = "is required" if not paths else f"must name one file, got {', '.join(outputs)}"
        problems.append(f"output {said}: add output=OUT.jsonl, the file that the scores are written to")
    buckets = _buckets({_key(word): word.partition("=")[2] for word in own}, problems)
    words = [word for word in arguments if word not in (*own, *inert)]
    try:
        config = for_scoring(
            compose_config(words, config_dir=CONFIG_DIR, check=lambda config: check(for_scoring(config)))
        )
    except ConfigError as error:
        raise ConfigError([*problems, *error.violations]) from error
    if config.reference.hf_path is None:
        problems += [
            f"{word}: has no effect without reference.hf_path: drop it, or name a second model"
            for word in arguments
            if _key(word) == "loss.beta"
        ]
    if problems:
        raise ConfigError(problems)
    return config, Path(paths[0]), buckets


def for_scoring(config: Config) -> Config:
    """Returns a copy in which keys of a file of conf/ that only matter for training have their defaults."""
    own = config.reference
    mode = ReferenceMode.resident if own.cache_dir is None else ReferenceMode.cached
    return replace(
        config,
        loss=LossConfig(beta=config.loss.beta),
        reference=ReferenceConfig(mode=mode, hf_path=own.hf_path, cache_dir=own.cache_dir),
        precision=replace(config.precision, fp8_check_every=None, fp8_check_pairs=PrecisionConfig().fp8_check_pairs),
    )


def _buckets(words: dict[str, str], problems: list[str]) -> Buckets:
    """Parses the tool's own words about buckets; adds mistakes to `problems`."""
    by = words.get("bucket_by", Buckets().by)
    if by not in BY:
        problems.append(f"bucket_by={by}: must be one of {', '.join(BY)}")
    text = words.get("buckets", str(Buckets().count))
    listed = text.startswith("[") and text.endswith("]")
    numbers = [part.strip() for part in text.strip("[]").split(",")]
    values = [int(number) for number in numbers if number.isdecimal()]
    increasing = all(low < high for low, high in pairwise([0, *values]))
    if len(values) < len(numbers) or not increasing or (len(values) > 1 and not listed):
        problems.append(
            f"buckets={text}: must be how many, >= 1, or the lengths at which they begin, >= 1 and increasing: "
            "buckets=4 or buckets=[100,300]"
        )
        return Buckets()
    return Buckets(by=by, edges=tuple(values)) if listed else Buckets(by=by, count=values[0])


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")


def _has_no_effect(key: str) -> bool:
    inert = any(key == name or key.startswith(f"{name}.") for name in _WITHOUT_EFFECT)
    return inert and key not in _EXCEPT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
